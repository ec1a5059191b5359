"""Skip connections: dilution, exponential growth against a power of the depth, and a ResNet beside a plain network."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradscope.meanfield as mf
from experiments import skips
from experiments.collect import Collected
from experiments.skip_numbers import (
    block_rates,
    branch_rate,
    expected,
    expected_exponent,
    exponents,
    from_stem,
    rates,
    ratios,
    single_blocks,
    steadiness,
)
from experiments.skips import BRANCHES, DILUTIONS, UNIT
from experiments.study import Claim
from experiments.summaries import Mean, mean
from gradscope import plots

QUESTION = "How do skip connections change the growth of GSC?"
METHOD = """
Residual networks f_l = s f_(l-1) + V phi(norm(W f_(l-1))) of depth 100 and width 400, 32 samples of Gaussian noise, a
linear map (stem) in front, eight initializations; GSC in the squared convention by four random probes.

**Law.** With the **dilution** k = |skip| / |branch|, a ratio of lengths, and r the GSC of the branch alone, a block has

- GSC = (k^2 + r) / (k^2 + 1)

where skip and branch are orthogonal in value and in Jacobian (G. Philipp, D. Song and J. Carbonell, arXiv:1712.05577;
`gradscope.meanfield.residual_rate`): the excess over 1 shrinks by k^2 + 1.

**Constant dilution.** The branch of a normalized block has the same length whatever its input, so that with a skip
weight s below 1 lengths settle, at k = s / sqrt(1 - s^2). Skip weights are chosen for k = 0 (no skip), 0.5, 1, 2, 4.
The measured excess of the rate, times k^2 + 1, is held against the excess without a skip, same seeds: the law holds
where the ratio is within 10 % of 1. The strongest dilution is also measured at width 100.

**Unit skips** (s = 1): lengths grow with every block, so does k^2, in proportion to the depth, and the product of the
blocks grows like depth^(r - 1) instead of r^depth. The growth of log GSC a block between blocks 32 and 100, over that
between blocks 8 and 32, tells the two apart: 1 for an exponential, 0.29 for a power; the line is drawn at their
geometric mean, 0.54. Theory is the product of the law over the blocks, k and r from mean field.

**Single blocks.** GSC of block and branch and the dilution of six blocks of every network, with the law between them.
Besides the above a ReLU network without normalization, and one whose branches end in the ReLU instead of a linear map,
f_l = f_(l-1) + relu(W f_(l-1)).

**ResNet.** The network of He et al. for CIFAR-10 (arXiv:1512.03385) with 32 layers, 15 blocks, width 16, with and
without its skip connections, all else equal, on noise of the size of an image: GSC from every block to the logits.
"""
HOW_SURE = """
Intervals are over initializations, 95 %, Student's t. The law and mean field are limits of infinite width: what finite
networks add to the rate (`depth_width`) is no part of the branch's excess, and need not shrink with it. The ResNet's
blocks end in a ReLU, so the law does not cover them. Everything is at initialization.
"""

# Growth a block between blocks 32 and 100 over that between 8 and 32: a power of the depth leaves
# (ln(100 / 32) / 68) / (ln(32 / 8) / 24), an exponential 1.
POWER = (math.log(100 / 32) / 68) / (math.log(32 / 8) / 24)
HALFWAY = math.sqrt(POWER)
# Plain networks exceed the excess of mean field by up to 2 % at width 400 (`depth_width`), which leaves room for noise.
TOLERANCE = 0.1
# Of the GSC of a single block, whose probes and finite width leave about as much.
BLOCK_TOLERANCE = 0.02
NARROW = "-100"
# What `gradscope.growth` calls neither exploding nor vanishing.
STEADY = 0.02


def figures(collected: Collected) -> dict[str, Figure]:
    """The law, growth with the depth, single blocks, and the ResNet."""
    frame = collected.frame
    return {"law": _law(frame), "growth": _growth(frame), "blocks": _blocks(frame), "resnet": _resnet(frame)}


def claims(collected: Collected) -> list[Claim]:
    """Dilution, exponential or power, single blocks, and the ResNet."""
    frame = collected.frame
    rows = [_undiluted(frame, branch) for branch in BRANCHES]
    rows += [_diluted(frame, branch, k) for branch in BRANCHES for k in DILUTIONS[1:]]
    rows += [_diluted(frame, branch, "4", NARROW) for branch in BRANCHES]
    for branch in BRANCHES:
        rows += [_exponential(frame, branch), _power(frame, branch), _exponent(frame, branch)]
    rows += [_single_blocks(frame, branch) for branch in (*BRANCHES, "relu", "relu_end")]
    plain, residual = (block_rates(frame, f"resnet-{skip}") for skip in ("0", UNIT))
    last = mean(block_rates(frame, f"resnet-{UNIT}", "stage3"))
    length, gsc = _lengths(frame), mean(from_stem(frame, "relu-unit")[:, -1])
    return [
        *rows,
        Claim(
            "An unnormalized ReLU network with unit skips keeps its GSC although its lengths explode",
            length.low > 1 and gsc.low > -1 and gsc.high < 1,
            f"over 100 blocks the squared length grows by 10^{length:.1f}, and log10 GSC is {gsc:.2f}",
        ),
        Claim(
            "Skip connections lower the growth of a ResNet",
            _below(mean(plain - residual)),
            f"factor a block {mean(plain):.3f} without, {mean(residual):.3f} with skip connections",
        ),
        Claim(
            "With its skip connections the ResNet does not explode",
            _within(mean(residual), 1.0, STEADY),
            f"factor a block {mean(residual):.3f}, in the last stage {last:.3f}; not exploding is below {1 + STEADY:g}",
        ),
    ]


def answer(collected: Collected) -> str:
    """Dilution, the power, and the ResNet, in numbers."""
    frame = collected.frame
    table = ["| branch | k = 0 | 0.5 | 1 | 2 | 4 | unit skips: exponent |", "|---|---|---|---|---|---|---|"]
    for branch in BRANCHES:
        cells = [f"{mean(rates(frame, branch, k)):.4f}" for k in DILUTIONS]
        table.append(f"| {_name(branch)} | {' | '.join(cells)} | {mean(exponents(frame, branch)):.3f} |")
        theory = [f"{mf.residual_rate(branch_rate(frame, branch), float(k)):.4f}" for k in DILUTIONS]
        expected = f"{expected_exponent(frame, branch):.3f}"
        table.append(f"| {_name(branch)}, law | {' | '.join(theory)} | {expected} |")
    plain, residual = (mean(block_rates(frame, f"resnet-{skip}")) for skip in ("0", UNIT))
    narrow = ", ".join(f"{_name(branch)} {mean(ratios(frame, branch, '4', NARROW)):.2f}" for branch in BRANCHES)
    return (
        "They dilute it: the part of a block's growth that exceeds 1 is divided by k^2 + 1, where the skip is k times "
        "as long as the branch. At constant dilution GSC still explodes exponentially, only slower; with unit skips "
        "and normalized branches lengths grow, the dilution with them, and GSC grows as a power of the depth. GSC "
        f"a block of a ResNet of 32 layers changes from {plain:.3f} without to {residual:.3f} with skip "
        "connections. The law is one of wide networks: at width 100 and k = 4 the excess is so many times what the law "
        f"leaves of it: {narrow}.\n\n" + "\n".join(table)
    )


def _lengths(frame: pd.DataFrame) -> Mean:
    return mean(frame.loc[(frame["case"] == "relu-unit") & (frame["quantity"] == "log10_length_growth"), "value"])


def _within(found: Mean, wanted: float, tolerance: float) -> bool | None:
    if max(found.high - wanted, wanted - found.low) < tolerance:
        return True
    return False if found.low > wanted + tolerance or found.high < wanted - tolerance else None


def _below(difference: Mean) -> bool | None:
    return True if difference.low > 0 else False if difference.high < 0 else None


def _undiluted(frame: pd.DataFrame, branch: str) -> Claim:
    found, theory = mean(rates(frame, branch, "0")), branch_rate(frame, branch)
    ratio = mean((rates(frame, branch, "0") - 1) / (theory - 1))
    return Claim(
        f"Without a skip {_name(branch)} grows as mean field says",
        _within(ratio, 1.0, TOLERANCE),
        f"rate {found:.4f}, mean field {theory:.4f}; ratio of the excesses {ratio:.3f}",
    )


def _diluted(frame: pd.DataFrame, branch: str, dilution: str, width: str = "") -> Claim:
    found, ratio = rates(frame, branch, dilution + width), mean(ratios(frame, branch, dilution, width))
    law = mf.residual_rate(branch_rate(frame, branch), float(dilution))
    where = ", at width 100" if width else ""
    return Claim(
        f"{_name(branch)} diluted by k = {dilution} keeps 1 / (k^2 + 1) of its excess{where}",
        _within(ratio, 1.0, TOLERANCE),
        f"rate {mean(found):.4f}, by the law {law:.4f}; excess times k^2 + 1 over that without a skip {ratio:.3f}",
    )


def _exponential(frame: pd.DataFrame, branch: str) -> Claim:
    found = steadiness(frame, f"{branch}-1")
    return Claim(
        f"At constant dilution, k = 1, {_name(branch)} grows exponentially",
        True if found.low > HALFWAY else False if found.high < HALFWAY else None,
        f"growth a block late over early {found:.3f}; an exponential has 1, a power of the depth {POWER:.2f}",
    )


def _power(frame: pd.DataFrame, branch: str) -> Claim:
    found = steadiness(frame, f"{branch}-{UNIT}")
    return Claim(
        f"With unit skips {_name(branch)} grows as a power of the depth",
        True if found.high < HALFWAY else False if found.low > HALFWAY else None,
        f"growth a block late over early {found:.3f}; an exponential has 1, a power of the depth {POWER:.2f}",
    )


def _exponent(frame: pd.DataFrame, branch: str) -> Claim:
    found, theory = mean(exponents(frame, branch)), expected_exponent(frame, branch)
    return Claim(
        f"The power of {_name(branch)} is that of the law",
        _within(mean(exponents(frame, branch) / theory), 1.0, TOLERANCE),
        f"exponent from block 32 to 100 {found:.3f}, by the law {theory:.3f}, and r - 1 = "
        f"{branch_rate(frame, branch) - 1:.3f} in the limit",
    )


def _single_blocks(frame: pd.DataFrame, branch: str) -> Claim:
    table = single_blocks(frame, branch)
    ratio = mean((table["block_gsc"] / table["law"]).groupby(level="seed").mean())
    where = "whose branches end in the ReLU" if branch == "relu_end" else "whose branches end in a linear map"
    return Claim(
        f"The law holds in single blocks of {_name(branch.removesuffix('_end'))} {where}",
        _within(ratio, 1.0, BLOCK_TOLERANCE),
        f"GSC of a block over the law {ratio:.3f}, mean of {len(table)} blocks",
    )


def _law(frame: pd.DataFrame) -> Figure:
    """Excess against dilution."""
    figure, ax = plt.subplots(figsize=(6.8, 4.6), layout="constrained")
    at = np.linspace(0, 4.2, 200)
    for number, (color, branch) in enumerate(zip(sns.color_palette("colorblind"), BRANCHES, strict=False)):
        cells = [mean(rates(frame, branch, k) - 1) for k in DILUTIONS]
        ax.errorbar(
            [float(k) + 0.03 * (2 * number - 1) for k in DILUTIONS], [cell.value for cell in cells],
            yerr=[cell.high - cell.value for cell in cells], fmt="os"[number], color=color, capsize=3, markersize=5,
            label=f"{_name(branch)}, measured",
        )  # fmt: skip
        r = branch_rate(frame, branch)
        ax.plot(at, (r - 1) / (at**2 + 1), color=color, linewidth=1, linestyle=(0, (4, 2.5)),
                label=f"{_name(branch)}, (r - 1) / (k$^2$ + 1), r = {r:.3f}")  # fmt: skip
    ax.set(yscale="log", xlabel="dilution k = |skip| / |branch|", ylabel="GSC rate a block (squared) less 1")
    ax.set_title(f"Constant dilution; mean over {frame['seed'].nunique()} seeds, bars: 95 % interval", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return figure


def _growth(frame: pd.DataFrame) -> Figure:
    """GSC from the stem; on the right unit skips alone, where a power of the depth is a straight line."""
    figure, axes = plt.subplots(len(BRANCHES), 2, figsize=(10.4, 7.4), layout="constrained")
    words = {k: "no skip" if k == "0" else f"k = {k}" for k in ("0", "1", "2")} | {UNIT: "unit skips"}
    for (left, right), branch in zip(axes, BRANCHES, strict=True):
        _draw_growth(left, frame, branch, words, tuple(words))
        _draw_growth(right, frame, branch, words, (UNIT,))
        left.set_title(_name(branch), fontsize=10)
        right.set_title(f"{_name(branch)}, unit skips, logarithmic depth", fontsize=10)
        right.set_xscale("log")
        right.set_xticks(skips.REACHED, [str(number) for number in skips.REACHED])
        right.minorticks_off()
        left.set_ylabel(plots.LABELS["gsc"])
        for ax in (left, right):
            ax.set_xlabel("blocks from the stem")
    axes[0, 0].legend(frameon=False, fontsize=9)
    seeds = frame["seed"].nunique()
    figure.suptitle(
        f"GSC from the stem to a block; mean over {seeds} seeds, bars: 95 % interval, dashed: the law", fontsize=11
    )
    return figure


def _draw_growth(ax: Axes, frame: pd.DataFrame, branch: str, words: dict[str, str], shown: tuple[str, ...]) -> None:
    reached = np.array(skips.REACHED)
    for color, marker, (dilution, word) in zip(sns.color_palette("colorblind"), "os^D", words.items(), strict=False):
        if dilution not in shown:
            continue
        cells = [mean(column) for column in from_stem(frame, f"{branch}-{dilution}").T]
        ax.errorbar(
            reached, [cell.value for cell in cells], yerr=[cell.high - cell.value for cell in cells],
            fmt=f"{marker}-", color=color, markersize=4, linewidth=1.2, capsize=2, label=word,
        )  # fmt: skip
        ax.plot(reached, expected(frame, branch, dilution)[reached], color="0.15", linewidth=0.9,
                linestyle=(0, (4, 2.5)), zorder=3)  # fmt: skip
    sns.despine(ax=ax)


def _blocks(frame: pd.DataFrame) -> Figure:
    """GSC of single blocks against the law."""
    figure, ax = plt.subplots(figsize=(6.0, 5.2), layout="constrained")
    words = {branch: _name(branch) for branch in BRANCHES} | {"relu": "relu", "relu_end": "relu, branch ends in it"}
    for color, marker, (branch, word) in zip(sns.color_palette("colorblind"), "os^D", words.items(), strict=False):
        table = single_blocks(frame, branch)
        ax.plot(table["law"], table["block_gsc"], marker, color=color, markersize=3.5, alpha=0.5, linestyle="none",
                markeredgewidth=0, label=word)  # fmt: skip
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], color="0.3", linewidth=0.9, zorder=0)
    ax.set(xlabel="(k$^2$ + r) / (k$^2$ + 1), k and r of the same block", ylabel="GSC of the block (squared)")
    ax.set_title(f"Single blocks of all dilutions, {frame['seed'].nunique()} seeds; line: the law", fontsize=10)
    ax.legend(frameon=False, fontsize=9, markerscale=2)
    sns.despine(ax=ax)
    return figure


def _resnet(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    words = {"resnet-0": "without skip connections", f"resnet-{UNIT}": "with skip connections"}
    for color, style, (case, word) in zip(sns.color_palette("colorblind"), "-s", words.items(), strict=False):
        rows = frame[(frame["case"] == case) & (frame["quantity"] == "gsc")]
        values = rows.pivot_table(index="seed", columns="layer", values="log10_value", observed=True)
        middle, spread = values.mean(), values.std()
        places = np.arange(len(middle))
        ax.plot(places, middle, "-", color=color, marker="os"[style == "s"], markersize=4,
                label=f"{word}: factor a block {mean(block_rates(frame, case)):.3f}")  # fmt: skip
        ax.fill_between(places, middle - spread, middle + spread, color=color, alpha=0.2, linewidth=0)
        ax.set_xticks(places, list(values.columns), rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="", ylabel=f"{plots.LABELS['gsc']}, to the logits")
    seeds = frame["seed"].nunique()
    ax.set_title(f"ResNet of 32 layers; mean over {seeds} seeds, band: one standard deviation", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return figure


def _name(branch: str) -> str:
    return branch.replace("_", "+")
