"""What helps against exploding gradients, and what it costs in nonlinearity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments import remedied
from experiments.collect import Collected
from experiments.remedied import BASELINES, NONE
from experiments.study import Claim
from experiments.summaries import Mean, geometric_mean, mean
from gradscope.growth import fit_growth

FloatArray = npt.NDArray[np.float64]

QUESTION = "What helps against exploding gradients, and what does it cost?"
METHOD = """
Three networks that explode, depth 50 and width 100 with a linear head of ten outputs: tanh with weight variance
4 / fan-in, ReLU with batch normalization, and SELU; 32 samples of Gaussian noise, 16 initializations. Each is
measured as it is and with one thing changed, the number of parameters equal within 1 %:

- **wider**: a fifth of the layers, as much wider
- **residual**: unit skips f + V phi(W f), two linear maps a block, half as many blocks
- **batch**, **layer**: normalization of the pre-activations; **plain**: without the normalization there was
- **he**, **lecun**, **xavier** (in square layers the same as lecun), **orthogonal**, **critical** (chi_1 = 1 by mean
  field, arXiv:1611.01232), **looks linear** (without normalization, arXiv:1702.08591), and **LSUV**: orthonormal, then
  each layer divided by the deviation of its output over a batch (arXiv:1511.06422, `gradscope.initializers.lsuv`)

What counts is log10 GSC (squared convention) from input to output, because parameters are equal and layers are not;
the rate a layer or block stands beside it, with mean field where it has one.

Little growth alone is no merit: an affine map has none. **Nonlinearity** is measured by the part of the variance of the
outputs that the best affine map of the inputs leaves over, on 1000 further samples, corrected for the size of the fit
(0: the network is an affine map; 1: nothing in it is affine, as in chaos, too); by the same of the last layer's
nonlinearity, a line for each neuron; and by the nonlinearity coefficient, NLC (arXiv:1806.00179; 1 for an affine map).
"""
HOW_SURE = """
Intervals are over initializations, 95 %, Student's t, differences paired by seed (NLC: of the geometric mean). One
depth, one number of parameters, Gaussian noise, at initialization: nothing here says how the networks train, and a
network that is nearly affine at first need not stay so. The remedies are not combined.
"""

REMEDIES = {
    NONE: "as it is", "wider": "wider", "residual": "residual", "batch": "batch norm", "layer": "layer norm",
    "plain": "plain", "he": "he", "lecun": "lecun", "xavier": "xavier", "orthogonal": "orthogonal",
    "critical": "critical", "lsuv": "LSUV", "looks_linear": "looks linear",
}  # fmt: skip
NAMES = {"tanh_large": "tanh, large weights", "relu_batch": "relu+batch", "selu": "selu"}
# Part of the baseline's linear fit error of the last layer below which its layers are called nearly linear, as in the
# study of architectures.
KEPT = 0.1
# Rates that differ by less are called equal: what `gradscope.growth` takes for no growth.
EQUAL = 0.02
TOTAL = r"$\log_{10}$ GSC (squared), input to output"
# An affine map up to float32.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Outcome:
    """Of one network, a number a seed each: log10 GSC from input to output, rate, and nonlinearity."""

    total: FloatArray
    rate: FloatArray
    nonlinearity: FloatArray
    last_layer: FloatArray
    nlc: FloatArray
    theory: float


def figures(collected: Collected) -> dict[str, Figure]:
    """How much each remedy lowers, and what is left of nonlinearity."""
    found = outcomes(collected.frame)
    return {"growth": _growth(found), "cost": _cost(found)}


def claims(collected: Collected) -> list[Claim]:
    """Every remedy for every network, then what lowers the rate itself, and the price."""
    found = outcomes(collected.frame)
    rows = [_lowers(found, b, remedy) for b in BASELINES for remedy in found[b] if remedy != NONE]
    rows += [_same_rate(found[b], b) for b in BASELINES]
    rows += [_same_rate_of_batch(found["relu_batch"], init) for init in ("xavier", "orthogonal", "lsuv")]
    rows += [_keeps_layers(found["tanh_large"], remedy) for remedy in ("lecun", "orthogonal", "critical", "lsuv")]
    rows += [_goes_together(found[b], b) for b in BASELINES]
    linear = found["relu_batch"]["looks_linear"]
    rows.append(
        Claim(
            "A looks-linear network is an affine map",
            bool((linear.nonlinearity < ROUNDING).all()),
            f"one leaves {'less' if (linear.nonlinearity < ROUNDING).all() else 'more'} than 1e-6 of the variance, "
            f"although lines leave {mean(linear.last_layer):.2f} of that of its last ReLUs",
        )
    )
    return rows


def answer(collected: Collected) -> str:
    """A table for each network."""
    found = outcomes(collected.frame)
    parts = [_summary(found)]
    for baseline, by_remedy in found.items():
        table = [
            f"| {NAMES[baseline]} | log10 GSC, input to output | rate a layer | mean field | not affine | "
            "last layer not linear | NLC |",
            "|---|---|---|---|---|---|---|",
        ]
        for remedy, outcome in sorted(by_remedy.items(), key=lambda item: -item[1].total.mean()):
            theory = "" if math.isnan(outcome.theory) else f"{outcome.theory:.4f}"
            left = "below 1e-6" if (outcome.nonlinearity < ROUNDING).all() else f"{mean(outcome.nonlinearity):.2f}"
            table.append(
                f"| {REMEDIES[remedy]} | {mean(outcome.total):.2f} | {mean(outcome.rate):.3f} | {theory} | {left} | "
                f"{geometric_mean(outcome.last_layer):.1g} | {geometric_mean(outcome.nlc):.3g} |"
            )
        parts.append("\n".join(table))
    return "\n\n".join(parts)


def _summary(found: dict[str, dict[str, Outcome]]) -> str:
    parts = []
    for baseline, by_remedy in found.items():
        least = min(by_remedy, key=lambda remedy: float(by_remedy[remedy].total.mean()))
        shown = dict.fromkeys(remedy for remedy in (NONE, "wider", "residual", least) if remedy in by_remedy)
        parts.append(f"{NAMES[baseline]}: {', '.join(_in_short(remedy, by_remedy[remedy]) for remedy in shown)}")
    correlations = ", ".join(f"{NAMES[b]} {_correlation(by_remedy).value:.2f}" for b, by_remedy in found.items())
    changes = ", ".join(f"{mean(o['wider'].rate - o[NONE].rate).value:+.3f}" for o in found.values())
    return (
        "log10 GSC from input to output at equal parameters, with the part of the outputs' variance that is not affine "
        f"in brackets. {'; '.join(parts)}. With fewer and wider layers the rate a layer changes by {changes} only; "
        "there are fewer of them to grow. Initialization matters where no normalization undoes it. And little growth "
        "is paid for: over the remedies, GSC and nonlinearity fall together (rank correlation "
        f"{correlations}), down to the looks-linear network, which has no growth because it is an affine map. A low "
        "GSC says nothing without the nonlinearity beside it."
    )


def _in_short(remedy: str, outcome: Outcome) -> str:
    share = "0 %" if (outcome.nonlinearity < ROUNDING).all() else f"{100 * outcome.nonlinearity.mean():.0f} %"
    return f"{REMEDIES[remedy]} {outcome.total.mean():.1f} ({share})"


def outcomes(frame: pd.DataFrame) -> dict[str, dict[str, Outcome]]:
    """By baseline and remedy, in the order of `REMEDIES`."""
    batch_size = int(frame["batch_size"].iloc[0])
    by_case = {str(case): rows for case, rows in frame.groupby("case", sort=False, observed=True)}
    return {
        baseline: {
            remedy: _outcome(by_case[f"{baseline}-{remedy}"], remedied.rate(f"{baseline}-{remedy}", batch_size))
            for remedy in REMEDIES
            if f"{baseline}-{remedy}" in by_case
        }
        for baseline in BASELINES
    }


def _outcome(rows: pd.DataFrame, theory: float) -> Outcome:
    profile = rows[rows["quantity"] == "gsc"]
    table = profile.pivot_table(index="seed", columns="depth_from_output", values="log10_value", observed=True)
    rates = [fit_growth(values, table.columns.to_numpy()).rate for values in table.to_numpy()]

    def numbers(quantity: str) -> FloatArray:
        return rows[rows["quantity"] == quantity].sort_values("seed")["value"].to_numpy(dtype=np.float64)

    return Outcome(
        table.iloc[:, -1].to_numpy(), np.array(rates), numbers("network_linear_fit_error"),
        numbers("linear_fit_error"), numbers("nlc"), theory,
    )  # fmt: skip


def _sign(difference: Mean) -> bool | None:
    """Whether a difference is below 0."""
    return True if difference.high < 0 else False if difference.low > 0 else None


def _lowers(found: dict[str, dict[str, Outcome]], baseline: str, remedy: str) -> Claim:
    before, after = found[baseline][NONE], found[baseline][remedy]
    return Claim(
        f"{NAMES[baseline]}: {REMEDIES[remedy]} lowers GSC from input to output",
        _sign(mean(after.total - before.total)),
        f"log10 GSC changes by {mean(after.total - before.total):+.2f}; rate {mean(after.rate):.3f} instead of "
        f"{before.rate.mean():.3f}",
    )


def _equal(difference: Mean) -> bool | None:
    if difference.low > -EQUAL and difference.high < EQUAL:
        return True
    return False if difference.low > EQUAL or difference.high < -EQUAL else None


def _same_rate(by_remedy: dict[str, Outcome], baseline: str) -> Claim:
    difference = mean(by_remedy["wider"].rate - by_remedy[NONE].rate)
    return Claim(
        f"{NAMES[baseline]}: fewer and wider layers leave the rate a layer as it is",
        _equal(difference),
        f"the rate changes by {difference:+.3f}; equal is within {EQUAL:g}",
    )


def _same_rate_of_batch(by_remedy: dict[str, Outcome], init: str) -> Claim:
    difference = mean(by_remedy[init].rate - by_remedy[NONE].rate)
    return Claim(
        f"With batch normalization {REMEDIES[init]} leaves the rate a layer as it is",
        _equal(difference),
        f"the rate changes by {difference:+.3f}; equal is within {EQUAL:g}",
    )


def _keeps_layers(by_remedy: dict[str, Outcome], remedy: str) -> Claim:
    kept = geometric_mean(by_remedy[remedy].last_layer / by_remedy[NONE].last_layer)
    return Claim(
        f"tanh with {REMEDIES[remedy]} weights keeps its layers nonlinear",
        True if kept.low > KEPT else False if kept.high < KEPT else None,
        f"linear fit error of the last layer {kept:.2g} of that with large weights; nearly linear is below {KEPT:g}",
    )


def _correlation(by_remedy: dict[str, Outcome]) -> Mean:
    """Rank correlation of log10 GSC and nonlinearity over the remedies, a seed each."""
    totals, left = (np.array([getattr(o, name) for o in by_remedy.values()]) for name in ("total", "nonlinearity"))
    return mean([stats.spearmanr(a, b).statistic for a, b in zip(totals.T, left.T, strict=True)])


def _goes_together(by_remedy: dict[str, Outcome], baseline: str) -> Claim:
    correlation = _correlation(by_remedy)
    return Claim(
        f"{NAMES[baseline]}: the less a remedy leaves of GSC, the less it leaves of nonlinearity",
        True if correlation.low > 0 else False if correlation.high < 0 else None,
        f"rank correlation over {len(by_remedy)} networks {correlation:.2f}",
    )


def _styles() -> dict[str, tuple[tuple[float, float, float], str]]:
    """Color and marker of every remedy; the network as it is in black."""
    colors, markers = sns.color_palette("colorblind"), "oD^vP<>Xp*dh"
    others = [remedy for remedy in REMEDIES if remedy != NONE]
    styles = {remedy: (colors[n % len(colors)], markers[n]) for n, remedy in enumerate(others)}
    return {NONE: ((0.0, 0.0, 0.0), "s"), **styles}


def _growth(found: dict[str, dict[str, Outcome]]) -> Figure:
    """log10 GSC from input to output, and the rate."""
    figure, axes = plt.subplots(2, len(found), figsize=(12.6, 8.0), layout="constrained")
    for column, (baseline, by_remedy) in zip(axes.T, found.items(), strict=True):
        order = sorted(by_remedy, key=lambda remedy: by_remedy[remedy].total.mean())
        _draw_bars(column[0], by_remedy, order, "total")
        column[0].set(xlabel=TOTAL, title=NAMES[baseline])
        _draw_bars(column[1], by_remedy, order, "rate")
        for place, remedy in enumerate(order):
            if not math.isnan(theory := by_remedy[remedy].theory):
                column[1].plot(theory, place, "|", color="0.15", markersize=13, markeredgewidth=1.6)
        column[1].set(xlabel="GSC rate a layer (squared); bars: mean field")
    seeds = len(next(iter(found.values()))[NONE].total)
    figure.suptitle(f"Remedies at equal parameters; mean over {seeds} seeds, whiskers: 95 % interval", fontsize=11)
    return figure


def _draw_bars(ax: Axes, by_remedy: dict[str, Outcome], order: list[str], name: str) -> None:
    colors = sns.color_palette("colorblind")
    for place, remedy in enumerate(order):
        cell = mean(getattr(by_remedy[remedy], name))
        ax.errorbar(
            cell.value, place, xerr=cell.high - cell.value, fmt="s" if remedy == NONE else "o",
            color=colors[3] if remedy == NONE else colors[0], capsize=3, markersize=5,
        )  # fmt: skip
    ax.axvline(0.0 if name == "total" else 1.0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(order)), [REMEDIES[remedy] for remedy in order])
    sns.despine(ax=ax)


def _cost(found: dict[str, dict[str, Outcome]]) -> Figure:
    """Nonlinearity against growth."""
    figure, axes = plt.subplots(1, len(found), figsize=(12.6, 4.6), layout="constrained", sharey=True)
    styles, shown = _styles(), {}
    for ax, (baseline, by_remedy) in zip(axes, found.items(), strict=True):
        for remedy, outcome in by_remedy.items():
            color, marker = styles[remedy]
            total, left = mean(outcome.total), mean(outcome.nonlinearity)
            shown[remedy] = ax.errorbar(
                total.value, left.value, xerr=total.high - total.value, yerr=left.high - left.value, fmt=marker,
                color=color, markersize=7, capsize=2, elinewidth=1, markeredgecolor="0.2", markeredgewidth=0.5,
            )  # fmt: skip
        ax.set(title=NAMES[baseline], xlabel=TOTAL)
        sns.despine(ax=ax)
    axes[0].set_ylabel("part of the outputs' variance that is not affine")
    handles = [shown[remedy] for remedy in REMEDIES if remedy in shown]
    words = [REMEDIES[remedy] for remedy in REMEDIES if remedy in shown]
    figure.legend(handles, words, loc="outside right center", frameon=False, fontsize=9)
    seeds = len(next(iter(found.values()))[NONE].total)
    figure.suptitle(f"Growth and nonlinearity; mean over {seeds} seeds, bars: 95 % interval", fontsize=11)
    return figure
