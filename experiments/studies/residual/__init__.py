"""Skip connections: dilution, exponential growth against a power of the depth, and a ResNet beside a plain network."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

import gradscope.meanfield as mf
from experiments.archive.tables import Collected
from experiments.evidence.means import all_of, mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import told
from experiments.studies.residual import figures as residual_figures
from experiments.studies.residual.measurement import BRANCHES, DILUTIONS, NUM_BLOCKS, RESNET_DEPTH, UNIT
from experiments.studies.residual.measurement import measure as measure
from experiments.studies.residual.numbers import (
    CASES,
    NARROW,
    NARROW_WIDTH,
    POWER,
    WINDOW,
    block_excess,
    block_totals,
    branch_rate,
    expected_exponent,
    expected_steadiness,
    exponents,
    factors_by_stage,
    flattening,
    from_stem,
    name,
    rates,
    ratios,
    single_blocks,
    steadiness,
)

DEPTH, WIDTH, BATCH_SIZE, NUM_PROBES, NUM_SEEDS = 100, 400, 32, 4, 8
RESNET_BLOCKS, RESNET_WIDTH = 15, 16
# The part by which an excess, or a growth, may miss the law.  Finite width moves an excess by about half of that
# where there is no skip (tanh+layer against mean field), so that less could not be told from it.
TOLERANCE = 0.1
# Of the GSC of a block without an excess: what `gradscope.coefficients.growth` calls neither exploding nor vanishing.
STEADY = 0.02
# log10 of what counts as keeping GSC over all blocks: one order of magnitude, where lengths go through tens of them.
KEEPS = 1.0

QUESTION = "How do skip connections change the growth of GSC?"
METHOD = f"""
Residual networks f_l = s f_(l-1) + V phi(norm(W f_(l-1))) of depth {DEPTH} and width {WIDTH}, {BATCH_SIZE} samples of
Gaussian noise, a linear map (stem) in front, {NUM_SEEDS} initializations; GSC in the squared convention by {NUM_PROBES}
random probes.

**Law.** With the **dilution** k = |skip| / |branch|, a ratio of lengths, and r the GSC of the branch alone, a block has

- GSC = (k^2 + r) / (k^2 + 1)

where skip and branch are orthogonal in value and in Jacobian (G. Philipp, D. Song and J. Carbonell, arXiv:1712.05577;
`gradscope.meanfield.residual_rate`): the excess over 1 shrinks by k^2 + 1.

**Constant dilution.** The branch of a normalized block has the same length whatever its input, so that with a skip
weight s below 1 lengths settle, at k = s / sqrt(1 - s^2). Skip weights are chosen for k = {", ".join(DILUTIONS)} (0: no
skip). The measured excess of the rate, times k^2 + 1, is held against the excess without a skip, same seeds: the law
holds where the ratio is within {100 * TOLERANCE:.0f} % of 1. The strongest dilution is also measured at width
{NARROW_WIDTH}.

**Unit skips** (s = 1): lengths grow with every block, so does k^2, in proportion to the depth, and the product of the
blocks approaches depth^(r - 1) instead of r^depth. The growth of log GSC a block between blocks {WINDOW[1]} and
{WINDOW[2]}, over that between blocks {WINDOW[0]} and {WINDOW[1]}, is 1 for an exponential and {POWER:.3f} for a power
of the depth. The law itself has not come down to that power in this window, so the measured ratio is held against the
law's own: the product of the law over the blocks, k and r from mean field.

**Single blocks.** GSC of block and branch and the dilution of {NUM_BLOCKS} blocks of every network. The law holds where
the excess of the blocks of a case over 1, in their sum, is within {100 * TOLERANCE:.0f} % of what k and r of the same
blocks make of it: an excess, because a GSC near 1 agrees with any law of dilution. (At k = 1 it cannot tell k from
k^2.) Besides the above a ReLU network without normalization, and one whose branches end in the ReLU instead of a linear
map, f_l = f_(l-1) + relu(W f_(l-1)): there r is 1, so that the law has no excess, whatever k, and GSC itself must be
within {100 * STEADY:.0f} % of it.

**ResNet.** The network of He et al. for CIFAR-10 (arXiv:1512.03385) with {RESNET_DEPTH} layers, {RESNET_BLOCKS}
blocks, width {RESNET_WIDTH}, with and without its skip connections, all else equal, on noise of the size of an image:
GSC from every block to the logits. Its growth changes from stage to stage, so that no factor a block stands for all of
them: judged are the growth from the first block to the last, and how much of the growth a block is left in the last
stage.
"""
HOW_SURE = f"""
Intervals are over initializations, 95 %, Student's t, each for itself: of so many claims one may be wrong by chance.
**The width was raised from {NARROW_WIDTH} to {WIDTH} after a first look** at width {NARROW_WIDTH}; of that the
strongest dilution is shown, where the excess is smallest. The law and mean field are limits of infinite width: what
finite networks add to the rate (`depth_width`) is no part of the branch's excess, and need not shrink with it. The
ResNet's blocks end in a ReLU, so the law does not cover them, and its stages differ in width, too, so that what changes
from stage to stage is not dilution alone. Everything is at initialization.
"""


def figures(collected: Collected) -> dict[str, Figure]:
    """The law, growth with the depth, single blocks, and the ResNet."""
    frame = collected.frame
    return {
        "law": residual_figures.law(frame),
        "growth": residual_figures.growth(frame),
        "blocks": residual_figures.blocks(frame, TOLERANCE),
        "resnet": residual_figures.resnet(frame),
    }


def claims(collected: Collected) -> list[Claim]:
    """Dilution, exponential or power, single blocks, and the ResNet."""
    frame = collected.frame
    rows = [_undiluted(frame, branch) for branch in BRANCHES]
    rows += [_diluted(frame, branch, k) for branch in BRANCHES for k in DILUTIONS[1:]]
    rows += [_diluted(frame, branch, "4", NARROW) for branch in BRANCHES]
    for branch in BRANCHES:
        rows += [_exponential(frame, branch), _slower(frame, branch), _slows(frame, branch), _exponent(frame, branch)]
    rows += [_in_blocks(frame, branch, case) for branch in BRANCHES for case in CASES]
    rows += [_without_excess(frame, "relu", "a linear map"), _without_excess(frame, "relu_end", "the ReLU")]
    return [*rows, _keeps(frame), _lowers(frame), _flattens(frame)]


def answer(collected: Collected) -> str:
    """Dilution, the power, and the ResNet, in numbers."""
    frame = collected.frame
    table = ["| branch | k = 0 | 0.5 | 1 | 2 | 4 | unit skips: exponent |", "|---|---|---|---|---|---|---|"]
    for branch in BRANCHES:
        cells = [f"{mean(rates(frame, branch, k)):.4f}" for k in DILUTIONS]
        table.append(f"| {name(branch)} | {' | '.join(cells)} | {mean(exponents(frame, branch)):.3f} |")
        theory = [f"{mf.residual_rate(branch_rate(frame, branch), float(k)):.4f}" for k in DILUTIONS]
        known = f"{expected_exponent(frame, branch):.3f}"
        table.append(f"| {name(branch)}, law | {' | '.join(theory)} | {known} |")
    return f"{_summary(frame)}\n\n" + "\n".join(table)


def _summary(frame: pd.DataFrame) -> str:
    """The answer in sentences, each by its verdicts."""
    part, branches = f"{100 * TOLERANCE:.0f} %", {name(branch): branch for branch in BRANCHES}
    totals = {skip: mean(block_totals(frame, f"resnet-{skip}")) for skip in ("0", UNIT)}
    flat = {skip: mean(flattening(frame, f"resnet-{skip}")) for skip in ("0", UNIT)}
    narrow = ", ".join(f"{word} {mean(ratios(frame, b, '4', NARROW)):.2f}" for word, b in branches.items())
    sentences = [
        told(
            {(name(b), f"k = {k}"): _diluted(frame, b, k).holds for b in BRANCHES for k in DILUTIONS[1:]},
            "They dilute it: the part of a block's growth that exceeds 1 is divided by k^2 + 1, where the skip is k "
            f"times as long as the branch, within {part} for {{}}.",
            f"It is not divided by k^2 + 1 for {{}}, where the excess is off by more than {part}.",
            f"Whether it is divided by k^2 + 1, within {part}, is undecided for {{}}.",
        ),
        told(
            {word: _diluted(frame, b, "4", NARROW).holds for word, b in branches.items()},
            f"At width {NARROW_WIDTH} and k = 4 the same holds for {{}}.",
            f"At width {NARROW_WIDTH} and k = 4 it does not hold for {{}}.",
            f"At width {NARROW_WIDTH} and k = 4 it is undecided for {{}}.",
        ),
        f"The excess there is so many times what the law leaves of it: {narrow}.",
        told(
            {word: _exponential(frame, b).holds for word, b in branches.items()},
            "At constant dilution (k = 1) GSC explodes exponentially all the same for {}.",
            "At constant dilution (k = 1) GSC does not grow exponentially for {}.",
            "Whether GSC grows exponentially at constant dilution (k = 1) is undecided for {}.",
        ),
        told(
            {word: _slower(frame, b).holds for word, b in branches.items()},
            "With unit skips lengths grow, the dilution with them, and GSC more slowly than an exponential for {}.",
            "With unit skips GSC grows no more slowly than an exponential for {}.",
            "Whether GSC grows more slowly than an exponential with unit skips is undecided for {}.",
        ),
        told(
            {word: _slows(frame, b).holds for word, b in branches.items()},
            f"It slows down as the law does, which approaches a power of the depth, within {part} for {{}}.",
            "It does not slow down as the law does, which approaches a power of the depth, for {}.",
            f"Whether it slows down as the law does, within {part}, which approaches a power of the depth, is "
            "undecided for {}.",
        ),
        told(
            {(name(b), CASES[case]): _in_blocks(frame, b, case).holds for b in BRANCHES for case in CASES},
            f"In single blocks the law holds within {part} of the excess for {{}}.",
            "In single blocks it does not hold for {}.",
            "In single blocks it is undecided for {}.",
        ),
        told(
            {"lower": _lowers(frame).holds},
            "Skip connections lower the growth of a ResNet: ",
            "Skip connections do not lower the growth of a ResNet: ",
            "Whether skip connections lower the growth of a ResNet is undecided: ",
        )
        + f"log10 GSC from the first block to the last is {totals['0']:.2f} without and {totals[UNIT]:.2f} with them. "
        f"Of the growth a block in the first stage {flat['0']:.2f} is left in the last without, {flat[UNIT]:.2f} with.",
    ]
    return " ".join(filter(None, sentences))


def _undiluted(frame: pd.DataFrame, branch: str) -> Claim:
    found, theory = mean(rates(frame, branch, "0")), branch_rate(frame, branch)
    ratio = mean((rates(frame, branch, "0") - 1) / (theory - 1))
    return Claim(
        f"Without a skip {name(branch)} grows as mean field says",
        ratio.within(1.0, TOLERANCE),
        f"rate {found:.4f}, mean field {theory:.4f}; ratio of the excesses {ratio:.3f}",
    )


def _diluted(frame: pd.DataFrame, branch: str, dilution: str, width: str = "") -> Claim:
    found, ratio = rates(frame, branch, dilution + width), mean(ratios(frame, branch, dilution, width))
    law = mf.residual_rate(branch_rate(frame, branch), float(dilution))
    where = f", at width {NARROW_WIDTH}" if width else ""
    return Claim(
        f"{name(branch)} diluted by k = {dilution} keeps 1 / (k^2 + 1) of its excess{where}",
        ratio.within(1.0, TOLERANCE),
        f"rate {mean(found):.4f}, by the law {law:.4f}; excess times k^2 + 1 over that without a skip {ratio:.3f}",
    )


def _exponential(frame: pd.DataFrame, branch: str) -> Claim:
    found = mean(steadiness(frame, f"{branch}-1"))
    return Claim(
        f"At constant dilution, k = 1, {name(branch)} grows exponentially",
        found.within(1.0, TOLERANCE),
        f"growth a block late over early {found:.3f}; an exponential has 1, a power of the depth {POWER:.3f}",
    )


def _slower(frame: pd.DataFrame, branch: str) -> Claim:
    found = mean(steadiness(frame, f"{branch}-{UNIT}"))
    return Claim(
        f"With unit skips {name(branch)} grows more slowly than an exponential",
        found.below(1 - TOLERANCE),
        f"growth a block late over early {found:.3f}; an exponential has 1, a power of the depth {POWER:.3f}",
    )


def _slows(frame: pd.DataFrame, branch: str) -> Claim:
    found, law = steadiness(frame, f"{branch}-{UNIT}"), expected_steadiness(frame, branch, UNIT)
    return Claim(
        f"With unit skips {name(branch)} slows down as the law does, which approaches a power of the depth",
        mean(found / law).within(1.0, TOLERANCE),
        f"growth a block late over early {mean(found):.3f}, by the law {law:.3f}; the one over the other "
        f"{mean(found / law):.2f}; a power of the depth has {POWER:.3f}",
    )


def _exponent(frame: pd.DataFrame, branch: str) -> Claim:
    found, theory = mean(exponents(frame, branch)), expected_exponent(frame, branch)
    return Claim(
        f"The exponent of {name(branch)} from block {WINDOW[1]} to {WINDOW[2]} is that of the law",
        mean(exponents(frame, branch) / theory).within(1.0, TOLERANCE),
        f"{found:.3f}, by the law {theory:.3f}, and r - 1 = {branch_rate(frame, branch) - 1:.3f} in the limit",
    )


def _in_blocks(frame: pd.DataFrame, branch: str, case: str) -> Claim:
    table = single_blocks(frame, branch)
    own = table.loc[f"{branch}-{case}"]
    ratio = mean(block_excess(table, f"{branch}-{case}"))
    return Claim(
        f"The law holds in single blocks of {name(branch)}, {CASES[case]}",
        ratio.within(1.0, TOLERANCE),
        f"excess of GSC over 1 in {len(own)} blocks, over that of the law {ratio:.3f}; in the mean k is "
        f"{own['dilution'].mean():.2f} and r {own['branch_gsc'].mean():.3f}",
    )


def _without_excess(frame: pd.DataFrame, branch: str, end: str) -> Claim:
    table = single_blocks(frame, branch)
    ratio = mean((table["block_gsc"] / table["law"]).groupby(level="seed").mean())
    return Claim(
        f"The law holds in single blocks of relu whose branches end in {end}, where it has no excess",
        ratio.within(1.0, STEADY),
        f"GSC of a block over the law {ratio:.3f}, mean of {len(table)} blocks; r {table['branch_gsc'].mean():.3f}",
    )


def _keeps(frame: pd.DataFrame) -> Claim:
    own = frame[(frame["case"] == f"relu-{UNIT}") & (frame["quantity"] == "log10_length_growth")]
    length, gsc = mean(own["value"]), mean(from_stem(frame, f"relu-{UNIT}")[:, -1])
    return Claim(
        "An unnormalized ReLU network with unit skips keeps its GSC although its lengths explode",
        all_of(length.above(KEEPS), gsc.within(0.0, KEEPS)),
        f"over {DEPTH} blocks the squared length grows by 10^{length:.1f}, and log10 GSC is {gsc:.2f}; what counts is "
        f"{KEEPS:g}",
    )


def _lowers(frame: pd.DataFrame) -> Claim:
    plain, residual = (block_totals(frame, f"resnet-{skip}") for skip in ("0", UNIT))
    return Claim(
        "Skip connections lower the growth of a ResNet",
        mean(plain - residual).above(0.0),
        f"log10 GSC from the first block to the last {mean(plain):.2f} without, {mean(residual):.2f} with them",
    )


def _flattens(frame: pd.DataFrame) -> Claim:
    plain, residual = (flattening(frame, f"resnet-{skip}") for skip in ("0", UNIT))
    return Claim(
        "With skip connections less of the growth a block is left in the last stage of a ResNet than without",
        mean(residual - plain).below(0.0),
        f"growth of log GSC a block in the last stage over that in the first {mean(residual):.2f} with, "
        f"{mean(plain):.2f} without; factor a block by stage "
        f"{factors_by_stage(frame, f'resnet-{UNIT}')} with, {factors_by_stage(frame, 'resnet-0')} without",
    )


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
)
