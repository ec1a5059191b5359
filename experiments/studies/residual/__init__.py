"""Skip connections: the law of dilution, growth with depth, and a ResNet compared with a plain network."""

from __future__ import annotations

import pandas as pd

import gradscope.meanfield as mf
from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table
from experiments.studies.residual import figures, numbers
from experiments.studies.residual.measurement import BRANCHES, DILUTIONS, NUM_BLOCKS, RESNET_DEPTH, UNIT, measure
from experiments.studies.residual.numbers import CASES, NARROW, NARROW_WIDTH, POWER, TOLERANCE, WINDOW, name

__all__ = ["STUDY", "measure"]

# Copies of values in the configuration; a test compares them.
DEPTH, WIDTH, BATCH_SIZE, NUM_PROBES, NUM_SEEDS = 100, 400, 32, 4, 8
RESNET_BLOCKS, RESNET_WIDTH = 15, 16
# Accepted relative error of GSC if the law predicts GSC 1; `gradscope.coefficients.growth` calls such a rate stable.
STEADY = 0.02
# Largest log10 GSC over all blocks that counts as no explosion; lengths grow by tens of orders of magnitude.
KEEPS = 1.0
EQUAL = f"equal: within {100 * TOLERANCE:.0f} % of 1"
RESNETS = ("resnet-0", f"resnet-{UNIT}")


def claims(collected: Collected) -> list[Claim]:
    """The claims about dilution, growth with depth, single blocks, and the ResNet."""
    frame = collected.frame
    return [
        *(_undiluted(frame, branch) for branch in BRANCHES),
        *_diluted_by_all(frame),
        *(_diluted(frame, branch, "4", NARROW) for branch in BRANCHES),
        *(claim for branch in BRANCHES for claim in _by_depth(frame, branch)),
        *(_in_blocks(frame, branch, case) for branch in BRANCHES for case in CASES),
        _without_excess(frame, "relu", "a linear map"),
        _without_excess(frame, "relu_end", "the ReLU"),
        _keeps(frame),
        *_resnet(frame),
    ]


def answer(collected: Collected) -> str:
    """The effect of dilution, the growth with unit skips, and the ResNet."""
    frame = collected.frame
    diluted = [claim.holds for claim in _diluted_by_all(frame)]
    slower = [name(branch) for branch in BRANCHES if _by_depth(frame, branch)[1].holds]
    plain, residual = (means.mean(numbers.block_totals(frame, case)) for case in RESNETS)
    lowers = {True: "lower", False: "do not lower", None: "may or may not lower"}[_resnet(frame)[0].holds]
    return (
        "A skip connection that is k times as long as its branch divides GSC - 1 of a block by k^2 + 1, as is shown "
        f"within {100 * TOLERANCE:.0f} % in {diluted.count(True)} of {len(diluted)} cases. If the skip has weight 1, "
        "k grows "
        f"with depth, and GSC grows more slowly than an exponential for {listed(slower)}. Skip connections {lowers} "
        f"the growth of a ResNet: log10 GSC from first to last block is {residual} with skips and {plain} without."
    )


def details(collected: Collected) -> str:
    """A table of rates and exponents, measured and predicted by the law."""
    frame, rows = collected.frame, []
    for branch in BRANCHES:
        rates = [means.mean(numbers.rates(frame, branch, k)) for k in DILUTIONS]
        rows.append([name(branch), *rates, means.mean(numbers.exponents(frame, branch))])
        law = [f"{mf.residual_rate(numbers.branch_rate(frame, branch), float(k)):.4f}" for k in DILUTIONS]
        rows.append([f"{name(branch)}, law", *law, f"{numbers.expected_exponent(frame, branch):.3f}"])
    head = ["branch", *(f"k = {k}" for k in DILUTIONS), "unit skips: exponent"]
    words = 'Growth factor of GSC per block, and exponent of the depth with unit skips; rows "law": values by the law:'
    return f"{words}\n\n{table(head, rows)}"


def _undiluted(frame: pd.DataFrame, branch: str) -> Claim:
    rates, theory = numbers.rates(frame, branch, "0"), numbers.branch_rate(frame, branch)
    ratio = means.mean((rates - 1) / (theory - 1))
    says = f"Without a skip, GSC of {name(branch)} grows as mean field predicts"
    because = (
        f"rate: {means.mean(rates)}; mean field: {theory:.4f}; measured (rate - 1) divided by predicted (rate - 1): "
    )
    because += f"{ratio}; {EQUAL}"
    return Claim(says, ratio.within(1.0, TOLERANCE), because)


def _diluted(frame: pd.DataFrame, branch: str, dilution: str, width: str = "") -> Claim:
    ratio = means.mean(numbers.ratios(frame, branch, dilution, width))
    law = mf.residual_rate(numbers.branch_rate(frame, branch), float(dilution))
    where = f", at width {NARROW_WIDTH}" if width else ""
    return Claim(
        f"A skip with dilution k = {dilution} divides GSC - 1 of {name(branch)} by k^2 + 1{where}",
        ratio.within(1.0, TOLERANCE),
        f"rate: {means.mean(numbers.rates(frame, branch, dilution + width))}; by the law: {law:.4f}; (rate - 1) "
        f"times (k^2 + 1), divided by (rate - 1) without a skip: {ratio}; {EQUAL}",
    )


def _diluted_by_all(frame: pd.DataFrame) -> list[Claim]:
    return [_diluted(frame, branch, k) for branch in BRANCHES for k in DILUTIONS[1:]]


def _by_depth(frame: pd.DataFrame, branch: str) -> list[Claim]:
    """Whether growth is exponential at constant dilution, and slower with unit skips, as the law predicts."""
    exponents, exponent = numbers.exponents(frame, branch), numbers.expected_exponent(frame, branch)
    unit, law = numbers.steadiness(frame, f"{branch}-{UNIT}"), numbers.expected_steadiness(frame, branch, UNIT)
    constant = means.mean(numbers.steadiness(frame, f"{branch}-1"))
    growing, relative = means.mean(unit), means.mean(unit / law)
    late, power = "late growth per block divided by early growth:", f"for a power of the depth: {POWER:.3f}"
    return [
        Claim(
            f"At constant dilution, k = 1, GSC of {name(branch)} grows exponentially",
            constant.within(1.0, TOLERANCE),
            f"{late} {constant}; exponential: within {100 * TOLERANCE:.0f} % of 1; {power}",
        ),
        Claim(
            f"With unit skips, GSC of {name(branch)} grows more slowly than an exponential",
            growing.below(1 - TOLERANCE),
            f"{late} {growing}; exponential: 1; more slowly: below {1 - TOLERANCE:g}; {power}",
        ),
        Claim(
            f"With unit skips, the growth of {name(branch)} slows down as the law predicts",
            relative.within(1.0, TOLERANCE),
            f"{late} {growing}; by the law: {law:.3f}; {power}; measured value divided by that of the law: "
            f"{relative}; {EQUAL}",
        ),
        Claim(
            f"From block {WINDOW[1]} to {WINDOW[2]}, the exponent of the depth agrees with the law for {name(branch)}",
            means.mean(exponents / exponent).within(1.0, TOLERANCE),
            f"exponent: {means.mean(exponents)}; by the law: {exponent:.3f}; accepted: "
            f"{(1 - TOLERANCE) * exponent:.3f} to {(1 + TOLERANCE) * exponent:.3f}; by the law for infinite depth: "
            f"{numbers.branch_rate(frame, branch) - 1:.3f}",
        ),
    ]


def _in_blocks(frame: pd.DataFrame, branch: str, case: str) -> Claim:
    blocks = numbers.single_blocks(frame, branch)
    own, ratio = blocks.loc[f"{branch}-{case}"], means.mean(numbers.block_excess(blocks, f"{branch}-{case}"))
    return Claim(
        f"The law holds in single blocks of {name(branch)}, {CASES[case]}",
        ratio.within(1.0, TOLERANCE),
        f"GSC - 1, summed over {len(own)} blocks and divided by the sum that the law predicts: {ratio}; {EQUAL}; "
        f"mean k: {own['dilution'].mean():.2f}; mean r: {own['branch_gsc'].mean():.3f}",
    )


def _without_excess(frame: pd.DataFrame, branch: str, end: str) -> Claim:
    blocks = numbers.single_blocks(frame, branch)
    ratio = means.mean((blocks["block_gsc"] / blocks["law"]).groupby(level="seed").mean())
    return Claim(
        f"In single blocks of relu whose branches end in {end}, GSC is 1, as the law predicts",
        ratio.within(1.0, STEADY),
        f"GSC of a block divided by GSC of the law, mean of {len(blocks)} blocks: {ratio}; equal: within "
        f"{100 * STEADY:.0f} % of 1; mean r: {blocks['branch_gsc'].mean():.3f}",
    )


def _keeps(frame: pd.DataFrame) -> Claim:
    lengths = frame[(frame["case"] == f"relu-{UNIT}") & (frame["quantity"] == "log10_length_growth")]["value"]
    length, gsc = means.mean(lengths), means.mean(numbers.from_stem(frame, f"relu-{UNIT}")[:, -1])
    return Claim(
        "In a ReLU network with unit skips and without normalization, activations explode, but GSC does not",
        means.all_of(length.above(KEEPS), gsc.within(0.0, KEEPS)),
        f"growth of log10 squared length over {DEPTH} blocks: {length}; explosion: above {KEEPS:g}; log10 GSC: {gsc}; "
        "no "
        f"explosion: within {KEEPS:g} of 0",
    )


def _resnet(frame: pd.DataFrame) -> list[Claim]:
    """Whether skip connections lower the growth of a ResNet, and lower the growth more in the last stage."""
    plain, residual = (numbers.block_totals(frame, case) for case in RESNETS)
    flat_plain, flat = (numbers.flattening(frame, case) for case in RESNETS)
    others, factors = (numbers.factors_by_stage(frame, case) for case in RESNETS)
    return [
        Claim(
            "Skip connections lower the growth of a ResNet",
            means.mean(plain - residual).above(0.0),
            f"log10 GSC from the first to the last block: {means.mean(plain)} without skips, "
            f"{means.mean(residual)} with skips",
        ),
        Claim(
            "Skip connections lower the growth per block of a ResNet more in the last stage than in the first stage",
            means.mean(flat - flat_plain).below(0.0),
            f"log GSC per block in the last stage, divided by that in the first stage: {means.mean(flat)} with skips, "
            f"{means.mean(flat_plain)} without; GSC per block by stage: {factors} (with), {others} (without)",
        ),
    ]


STUDY = Study(
    question="How do skip connections change the growth of GSC?",
    answer=answer,
    use="""
Expect that skip connections reduce growth but do not remove it. To reduce growth further, make the skip longer relative
to the branch, for example with a smaller weight on the branch. Exploding activations do not imply exploding GSC.
""",
    method=f"""
Residual networks f_l = s f_(l-1) + V phi(norm(W f_(l-1))) have depth {DEPTH} and width {WIDTH}, with a linear map
(stem) in front. We use {NUM_SEEDS} initializations and {BATCH_SIZE} samples of Gaussian noise. GSC (squared convention)
is estimated from {NUM_PROBES} random probes.

**Law of dilution** ("the law"). The **dilution** k is the ratio of lengths |skip| / |branch|, and r is GSC of the
branch without skip. If skip and branch are orthogonal, and their Jacobians too, GSC of a block is (k^2 + r) / (k^2 + 1)
(G. Philipp et al., arXiv:1712.05577; `gradscope.meanfield.residual_rate`). So the skip divides GSC - 1 by k^2 + 1.

**Constant dilution.** The branch of a normalized block has the same length for every input. So with a skip weight s
below 1, k converges to s / sqrt(1 - s^2). Skip weights are chosen such that k = {", ".join(DILUTIONS)} (0: no skip).
The largest k is also measured at width {NARROW_WIDTH}. The **rate** is the growth factor of GSC per block. By the law,
a skip divides rate - 1 by k^2 + 1. For equal seeds, this must hold within {100 * TOLERANCE:.0f} % on average.

**Unit skips** (s = 1). Lengths grow with every block, so k^2 is proportional to the depth. GSC approaches a power of
the depth, depth^(r - 1), instead of the exponential r^depth. The **late growth** is the growth of log GSC per block in
blocks {WINDOW[1]} to {WINDOW[2]}, the **early growth** that in blocks {WINDOW[0]} to {WINDOW[1]}. Late divided by early
growth is 1 for an exponential and {POWER:.3f} for a power of the depth. At these depths, the law does not predict a
pure power yet. So we also compare the ratio with the ratio that the law predicts. The law gives GSC as a product over
blocks, with k and r from mean field.

**Single blocks.** In {NUM_BLOCKS} blocks of every network we measure k, r and the GSC of the block. We sum GSC - 1 over
the blocks of a case, and compare this sum with the law for the same k and r. The two must agree within
{100 * TOLERANCE:.0f} %. (The case k = 1 cannot distinguish k from k^2.) Two more networks are ReLU networks without
normalization. In one of these, branches end in the ReLU: f_l = f_(l-1) + relu(W f_(l-1)). Branches of both networks
have r = 1, so the law predicts GSC 1 for any k. The measured GSC must be within {100 * STEADY:.0f} % of this
prediction.

**ResNet.** The network of He et al. for CIFAR-10 (arXiv:1512.03385) has {RESNET_DEPTH} layers, {RESNET_BLOCKS} blocks
and width {RESNET_WIDTH}. GSC from every block to the logits is measured with and without skip connections, on noise of
the size of an image. We compare two numbers with and without skips: the growth from the first to the last block, and
the growth per block in the last stage divided by the growth per block in the first stage.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals over initializations. The intervals are not simultaneous, so some of the many
claims may be wrong by chance. **The width was raised from {NARROW_WIDTH} to {WIDTH} after a first look.** The law and
mean field are limits of infinite width. At finite width the rate is different (study [depth_width](depth_width.md)),
and a stronger skip does not necessarily make this difference smaller. The law does not cover the ResNet, whose blocks
end in a ReLU and whose stages differ in width. All networks are at initialization.
""",
    claims=claims,
    figures=figures.draw,
    captions={
        "law": "GSC per block minus 1 against the dilution k (length of the skip divided by that of the branch), for "
        "two "
        "kinds of branches. Bars are 95 % intervals over seeds. Dashed: law of dilution. Points are shifted slightly "
        "sideways.",
        "growth": "GSC from the stem to each block, one row per kind of branch. Left: several dilutions. Right: unit "
        "skips, with a logarithmic axis for the depth. Bars are 95 % intervals over seeds. Dashed: law of dilution.",
        "blocks": "GSC of single blocks and law of dilution. Left: GSC of each block against the prediction of the "
        "law. Right: measured (GSC - 1) "
        "divided by predicted (GSC - 1), with 95 % intervals over seeds; the gray band is the tolerance. On the right, "
        "points are shifted slightly sideways.",
        "resnet": "GSC from every block of a ResNet to the logits, with and without skip connections. Lines are means "
        'over seeds, bands one standard deviation. The legend gives GSC from the first block to the last ("in all").',
    },
    details=details,
)
