"""How skip connections change the growth of GSC: single blocks, growth with depth, and a ResNet."""

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
# Accepted relative error of GSC if the law predicts GSC 1; `gradscope.coefficients.growth` calls rates this close to 1
# stable.
STEADY = 0.02
# Limit of log10 GSC over all blocks: above it, GSC explodes. The same limit holds for log10 of the squared length.
KEEPS = 1.0
EQUAL = f"within {100 * TOLERANCE:.0f} % of 1"
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
    tests = f"{diluted.count(True)} of {len(diluted)} tests at width {WIDTH} (one for each network and k) support this"
    slower = [name(branch) for branch in BRANCHES if _by_depth(frame, branch)[1].holds]
    plain, residual = (means.mean(numbers.block_totals(frame, case)) for case in RESNETS)
    lowers = {True: "lower", False: "do not lower", None: "may or may not lower"}[_resnet(frame)[0].holds]
    return (
        "If the output of a skip connection is k times as long (Euclidean norm) as the output of the branch of its "
        f"block, the skip divides GSC - 1 of the block by k^2 + 1: {tests} within {100 * TOLERANCE:.0f} %, and "
        f"{diluted.count(False)} contradict it. With identity skips, k grows with the depth, and GSC grows more slowly "
        f"than an exponential of the depth for {listed(slower)}. Skip connections {lowers} the growth of a ResNet's "
        f"GSC: over all its blocks, log10 GSC grows by {residual} with skips and {plain} without."
    )


def details(collected: Collected) -> str:
    """A table of rates and exponents, measured and predicted by the law."""
    frame, rows = collected.frame, []
    for branch in BRANCHES:
        rates = [means.mean(numbers.rates(frame, branch, k)) for k in DILUTIONS]
        rows.append([name(branch), *rates, means.mean(numbers.exponents(frame, branch))])
        law = [f"{mf.residual_rate(numbers.branch_rate(frame, branch), float(k)):.4f}" for k in DILUTIONS]
        rows.append([f"{name(branch)}, by the law", *law, f"{numbers.expected_exponent(frame, branch):.3f}"])
    head = ["branch", *(f"k = {k}" for k in DILUTIONS), "unit skips: exponent"]
    words = (
        "The table gives the growth rate of GSC per block at constant dilution k. The last column gives the "
        f"exponent with unit skips (skip weight 1), from block {WINDOW[1]} to block {WINDOW[2]}."
    )
    return f"{words}\n\n{table(head, rows)}"


def _undiluted(frame: pd.DataFrame, branch: str) -> Claim:
    rates, theory = numbers.rates(frame, branch, "0"), numbers.branch_rate(frame, branch)
    ratio = means.mean((rates - 1) / (theory - 1))
    says = f"Without a skip, GSC of {name(branch)} grows as mean field predicts"
    rate = f"growth rate of GSC per block: {means.mean(rates)}; mean-field rate: {theory:.4f}"
    because = f"{rate}; ratio of measured (rate - 1) to mean-field (rate - 1): {ratio}; required: ratio {EQUAL}"
    return Claim(says, ratio.within(1.0, TOLERANCE), because)


def _diluted(frame: pd.DataFrame, branch: str, dilution: str, width: str = "") -> Claim:
    ratio = means.mean(numbers.ratios(frame, branch, dilution, width))
    law = mf.residual_rate(numbers.branch_rate(frame, branch), float(dilution))
    where = f", at width {NARROW_WIDTH}" if width else ""
    return Claim(
        f"A skip with dilution k = {dilution} divides GSC - 1 of {name(branch)} blocks by k^2 + 1{where}",
        ratio.within(1.0, TOLERANCE),
        f"growth rate of GSC per block: {means.mean(numbers.rates(frame, branch, dilution + width))}; rate by the "
        f"law: {law:.4f}; ratio of (rate - 1) (k^2 + 1) with the skip to (rate - 1) without a skip: {ratio}; "
        f"required: (rate - 1) (k^2 + 1) with the skip within {100 * TOLERANCE:.0f} % of (rate - 1) without a skip",
    )


def _diluted_by_all(frame: pd.DataFrame) -> list[Claim]:
    return [_diluted(frame, branch, k) for branch in BRANCHES for k in DILUTIONS[1:]]


def _by_depth(frame: pd.DataFrame, branch: str) -> list[Claim]:
    """Whether growth is exponential at constant dilution, and slower with unit skips, as the law predicts."""
    exponents, exponent = numbers.exponents(frame, branch), numbers.expected_exponent(frame, branch)
    unit, law = numbers.steadiness(frame, f"{branch}-{UNIT}"), numbers.expected_steadiness(frame, branch, UNIT)
    constant = means.mean(numbers.steadiness(frame, f"{branch}-1"))
    growing, relative = means.mean(unit), means.mean(unit / law)
    late, power = "late / early growth of log GSC:", f"a power of the depth would give {POWER:.3f}"
    return [
        Claim(
            f"At constant dilution, k = 1, GSC of {name(branch)} grows exponentially",
            constant.within(1.0, TOLERANCE),
            f"{late} {constant}; required: late / early growth {EQUAL}; {power}",
        ),
        Claim(
            f"With unit skips (skip weight 1), GSC of {name(branch)} grows more slowly than an exponential",
            growing.below(1 - TOLERANCE),
            f"{late} {growing}; required: late / early growth below {1 - TOLERANCE:g}; an exponential would give 1, "
            f"{power}",
        ),
        Claim(
            f"With unit skips (skip weight 1), the growth of GSC of {name(branch)} slows down as the law predicts",
            relative.within(1.0, TOLERANCE),
            f"{late} {growing}; late / early growth by the law: {law:.3f}; measured / law: {relative}; "
            f"required: measured / law {EQUAL}",
        ),
        Claim(
            f"With unit skips (skip weight 1), the exponent of GSC of {name(branch)} from block {WINDOW[1]} to "
            f"{WINDOW[2]} is as the law predicts",
            means.mean(exponents / exponent).within(1.0, TOLERANCE),
            f"measured exponent: {means.mean(exponents)}; required: between {(1 - TOLERANCE) * exponent:.3f} and "
            f"{(1 + TOLERANCE) * exponent:.3f}; exponent by the law: {exponent:.3f}; exponent by the law for infinite "
            f"depth: {numbers.branch_rate(frame, branch) - 1:.3f}",
        ),
    ]


def _in_blocks(frame: pd.DataFrame, branch: str, case: str) -> Claim:
    blocks = numbers.single_blocks(frame, branch)
    own, ratio = blocks.loc[f"{branch}-{case}"], means.mean(numbers.block_excess(blocks, f"{branch}-{case}"))
    return Claim(
        f"The law of dilution holds in single blocks of {name(branch)} with {CASES[case]}",
        ratio.within(1.0, TOLERANCE),
        f"ratio of the sum of measured (GSC - 1) to the sum of (GSC - 1) by the law: {ratio}; required: ratio {EQUAL}; "
        f"mean measured dilution k: {own['dilution'].mean():.2f}; mean measured GSC r of a branch: "
        f"{own['branch_gsc'].mean():.3f}",
    )


def _without_excess(frame: pd.DataFrame, branch: str, end: str) -> Claim:
    blocks = numbers.single_blocks(frame, branch)
    ratio = means.mean((blocks["block_gsc"] / blocks["law"]).groupby(level="seed").mean())
    return Claim(
        f"In single blocks of ReLU networks whose branches end in {end}, GSC is 1, as the law predicts",
        ratio.within(1.0, STEADY),
        f"ratio of measured GSC of a block to GSC by the law: {ratio}; required: ratio within {100 * STEADY:.0f} % of "
        f"1; mean measured GSC r of a branch: {blocks['branch_gsc'].mean():.3f}",
    )


def _keeps(frame: pd.DataFrame) -> Claim:
    lengths = frame[(frame["case"] == f"relu-{UNIT}") & (frame["quantity"] == "log10_length_growth")]["value"]
    length, gsc = means.mean(lengths), means.mean(numbers.from_stem(frame, f"relu-{UNIT}")[:, -1])
    return Claim(
        "In a ReLU network with unit skips (skip weight 1) and without normalization, activations explode, but GSC "
        "does not",
        means.all_of(length.above(KEEPS), gsc.within(0.0, KEEPS)),
        f"growth of log10 of the squared length of the activations over {DEPTH} blocks: {length}; required: above "
        f"{KEEPS:g}; log10 GSC from the stem to the last block: {gsc}; required: within {KEEPS:g} of 0",
    )


def _resnet(frame: pd.DataFrame) -> list[Claim]:
    """Whether skip connections lower the growth of a ResNet, and lower the growth more in the last stage."""
    plain, residual = (numbers.block_totals(frame, case) for case in RESNETS)
    flat_plain, flat = (numbers.flattening(frame, case) for case in RESNETS)
    others, factors = (numbers.factors_by_stage(frame, case) for case in RESNETS)
    return [
        Claim(
            "Skip connections lower the growth of a ResNet's GSC",
            means.mean(plain - residual).above(0.0),
            f"growth of log10 GSC over all blocks: {means.mean(plain)} without skips, {means.mean(residual)} with "
            "skips",
        ),
        Claim(
            "Skip connections lower the growth of log GSC per block in the last stage of a ResNet, relative to the "
            "growth in the first stage",
            means.mean(flat - flat_plain).below(0.0),
            f"growth of log GSC per block, last stage / first stage: {means.mean(flat)} with skips, "
            f"{means.mean(flat_plain)} without; growth factor of GSC per block in the three stages: {factors} with "
            f"skips, {others} without",
        ),
    ]


STUDY = Study(
    question="How do skip connections change the growth of GSC?",
    answer=answer,
    use="""
Expect that skip connections reduce the growth of GSC but do not remove it. To reduce this growth further, make the
output of the skip longer relative to the output of the branch, for example with a smaller weight on the branch. Do not
infer exploding GSC from exploding activations.
""",
    method=f"""
Block l of a residual network computes f_l = s f_(l-1) + V phi(norm(W f_(l-1))), where V and W are weight matrices. The
first term is the **skip** with weight s, the second term is the **branch**. The activation phi and the normalization
norm are tanh with layer normalization (tanh+layer), or ReLU with batch normalization (relu+batch). We measure networks
of {DEPTH} blocks and width {WIDTH}. A linear map (the stem) maps the input to this width. There are
{NUM_SEEDS} initializations and {BATCH_SIZE} samples of Gaussian noise. GSC (squared convention) is estimated from
{NUM_PROBES} random probes.

**Law of dilution** ("the law"). The **dilution** k of a block is the length (Euclidean norm) of its skip divided by the
length of its branch. GSC of the branch alone is called r. If the outputs of skip and branch are orthogonal, and their
Jacobians too (Frobenius inner product 0), GSC of the block is (k^2 + r) / (k^2 + 1) (G. Philipp et al.,
arXiv:1712.05577; `gradscope.meanfield.residual_rate`). So GSC of the block minus 1 is (r - 1) / (k^2 + 1).

**Constant dilution.** Normalization gives the branches of all blocks the same length b. If the skip weight s is below
1, the length of f_l converges over several blocks to b / sqrt(1 - s^2), because skip and branch are orthogonal. So k
converges to s / sqrt(1 - s^2). We choose s such that this limit is {", ".join(DILUTIONS)} (0: no skip). Networks
without a skip and networks with the largest k are also measured at width {NARROW_WIDTH}.

The **rate** is the growth factor of GSC per block. By the law, a skip divides rate - 1 by k^2 + 1. So for each seed, we
divide (rate - 1) (k^2 + 1) with the skip by rate - 1 without a skip. By the law, this ratio is 1. Its mean must be
within {100 * TOLERANCE:.0f} % of 1.

**Unit skips** (s = 1). The skip gets longer with every block: k^2 of a block is about the number of blocks before this
block (the depth). By the law, log GSC therefore grows by about (r - 1) / depth per block. So GSC from the stem grows
like a power of the depth, depth^(r - 1), and not like the exponential r^depth. We measure two numbers of GSC from the
stem:

- **Late / early growth**: the growth of log GSC per block from block {WINDOW[1]} to block {WINDOW[2]}, divided by the
  growth per block from block {WINDOW[0]} to block {WINDOW[1]}. It is 1 for an exponential, and {POWER:.3f} for a power
  of the depth.
- **Exponent**: the growth of log GSC from block {WINDOW[1]} to block {WINDOW[2]}, divided by the growth of log depth.

By the law, GSC is exactly a power of the depth only in the limit of large depth. At the measured depths, GSC by the law
is the product of (k^2 + r) / (k^2 + 1) over the blocks, with k and r from mean field. Late / early growth and exponent
"by the law" are those of this product.

**Single blocks.** In {NUM_BLOCKS} blocks of every network, we measure k, r and the GSC of the block. For each network
and seed, the measured values of GSC - 1 are summed over these blocks. This sum is divided by the sum that the law gives
for the measured k and r. The mean of this ratio over seeds must be within {100 * TOLERANCE:.0f} % of 1. In networks
with k = 1, a law with k instead of k^2 would also pass this test.

**ReLU without normalization.** Two networks with unit skips (s = 1) have no normalization. The branch is V relu(W f) in
one network, and relu(W f) in the other. Both branches have r = 1, so the law predicts that a block has GSC 1, for any
k. For each network, the mean of (measured GSC / GSC by the law) over blocks and seeds must be within
{100 * STEADY:.0f} % of 1.

**ResNet.** The network of He et al. for CIFAR-10 (arXiv:1512.03385) has {RESNET_DEPTH} layers, {RESNET_BLOCKS} blocks
in three stages, and {RESNET_WIDTH} channels in the first stage. We measure GSC from every block to the logits, on
Gaussian noise of the size of the images. We compare two numbers with and without skips:

- the growth of log GSC over all blocks: log GSC of the first block minus log GSC of the last block;
- the growth of log GSC per block in the last stage, divided by this growth in the first stage.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals over initializations. They are not corrected for multiple comparisons, so some
verdicts may be wrong by chance. **The width was raised from {NARROW_WIDTH} to {WIDTH} after a first look at the data.**

Mean field holds in the limit of infinite width. For random weights, the law holds in the same limit, because skip
and branch then become orthogonal. Networks of finite width have other rates (study [depth_width](depth_width.md)). As k
grows, rate - 1 tends to 0, but the relative error of the law for rate - 1 need not tend to 0. The law does not cover
the ResNet, whose blocks end in a ReLU and whose stages differ in width. All networks are at initialization.
""",
    claims=claims,
    figures=figures.draw,
    captions={
        "law": "Growth rate of GSC per block, minus 1, against the dilution k (length of the skip divided by the "
        "length of the branch), for two kinds of branches. Bars are 95 % intervals over seeds. Dashed: law of "
        "dilution.",
        "growth": "GSC from the stem to each block, one row per kind of branch. Left: several dilutions. Right: unit "
        "skips (skip weight 1), with a logarithmic axis for the depth. Bars are 95 % intervals over seeds. Dashed: law "
        "of dilution.",
        "blocks": "GSC of single blocks, measured and by the law of dilution. Left: one marker per block. Right: sum "
        "of GSC - 1 over the blocks of a network, measured / by the law, with 95 % intervals over seeds. The gray band "
        "is the tolerance.",
        "resnet": "GSC from every block of a ResNet to the logits, with and without skip connections. Lines are means "
        'over seeds, bands one standard deviation to each side. The legend ("in all") gives the factor by which GSC '
        "grows from the last block to the first.",
    },
    details=details,
)
