"""Is the growth of GSC a layer a property of the architecture, whatever the depth and the width?"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import gradscope as gs
from experiments import report
from experiments.collect import Collected
from experiments.sizes import FloatArray, Rates, all_rates, simultaneous, theory
from experiments.study import Claim
from experiments.summaries import mean
from gradscope import plots

QUESTION = "Does the growth of GSC a layer depend on the depth or on the width of the network?"
METHOD = """
Seven plain networks, each of three depths and three widths, on 32 samples of Gaussian noise, 13 initializations
each. GSC (squared convention) to the output is measured from ten layers at equal distances by four random probes; the
**rate** is its factor a layer, fitted over the half of the network nearer the output (`gradscope.growth`).

**Independent** means here: within 0.005 of the mean over all nine sizes. A rate that is off by as much changes GSC by a
factor of e over the deepest network, 200 layers. The means over the widths at each depth, and over the depths at each
width, are held against that tolerance with intervals that hold together at 95 % (Student's t over seeds, paired,
Bonferroni over the three): all inside, independent; one outside, dependent; else undecided.

**Mean field** (`gradscope.meanfield.gsc_rate`) is the limit of infinite width, at this batch size. Finite networks
should deviate from it by a constant over the width, so the rate is also extrapolated: the line through the rates
against 1 / width, at 0.
"""
HOW_SURE = """
Intervals are over initializations, 95 %, Student's t. Probes add little, because the noise of a probe is nearly the
same in all layers far from the output. The batch is smaller than every width; with batch normalization a batch larger
than the width lowers the rate. The steadiness of a rate says nothing of the first and last few layers, whose GSC may
change by other factors.
"""

NETWORKS = ("relu", "relu_layer", "relu_batch", "tanh", "tanh_layer", "tanh_batch", "selu")
# A factor of e over 200 layers.
TOLERANCE = 0.005


def measure(
    model: nn.Module, x: Tensor, *, generator: torch.Generator, num_probes: int, num_sources: int
) -> pd.DataFrame:
    """GSC to the last layer of an MLP from ``num_sources`` layers at equal distances, itself included."""
    depth = len(model.get_submodule("layers")._modules)
    if depth % num_sources:
        raise ValueError(f"num_sources={num_sources} layers at equal distances need a depth they divide, got {depth}.")
    step = depth // num_sources
    chosen = [f"layers.{number}" for number in range(step - 1, depth, step)]
    return gs.gsc(model, x, layers=chosen, probes=num_probes, generator=generator).to_frame()


def independent(deviations: FloatArray) -> bool | None:
    """Whether all means lie within the tolerance of 0; None where the intervals cannot tell."""
    low, high = simultaneous(deviations)
    if ((low > -TOLERANCE) & (high < TOLERANCE)).all():
        return True
    return False if ((low > TOLERANCE) | (high < -TOLERANCE)).any() else None


def figures(collected: Collected) -> dict[str, Figure]:
    """Rates of all sizes, their deviations from mean field against the width, and two networks layer by layer."""
    found = all_rates(collected.frame, NETWORKS)
    return {"rates": _rates(found), "width": _deviations(found), "profiles": _profiles(collected.frame)}


def claims(collected: Collected) -> list[Claim]:
    """Depth and width for each network, and the limit of infinite width."""
    found = all_rates(collected.frame, NETWORKS)
    return [
        *(_claim(name, "depth", rates.by_depth, rates.depths) for name, rates in found.items()),
        *(_claim(name, "width", rates.by_width, rates.widths) for name, rates in found.items()),
        *(_limit(name, rates) for name, rates in found.items()),
    ]


def answer(collected: Collected) -> str:
    """A table of the networks."""
    found = all_rates(collected.frame, NETWORKS)
    table = [
        "| network | rate a layer | mean field | deepest less shallowest | widest less narrowest | at infinite width |",
        "|---|---|---|---|---|---|",
    ]
    for name, rates in found.items():
        depth, width = (mean(values[:, -1] - values[:, 0]) for values in (rates.by_depth, rates.by_width))
        table.append(
            f"| {_name(name)} | {rates.common:.4f} | {rates.theory:.4f} | {depth:+.4f} | {width:+.4f} | "
            f"{mean(rates.lines[:, 0]):.4f} |"
        )
    selu = found["selu"]
    return (
        f"{_verdicts(found, 'depth')} {_verdicts(found, 'width')} Whatever the tolerance, the widest networks differ "
        f"from the narrowest for {_differing(found)}. SELU grows by {selu.common:.4f} a layer in all nine sizes "
        f"together (mean field {selu.theory:.4f}).\n\n" + "\n".join(table)
    )


def _claim(network: str, size: str, deviations: FloatArray, sizes: tuple[int, ...]) -> Claim:
    low, high = simultaneous(deviations)
    parts = [
        f"{middle:+.4f} ({a:+.4f} to {b:+.4f}) at {number}"
        for middle, a, b, number in zip(deviations.mean(axis=0), low, high, sizes, strict=True)
    ]
    return Claim(
        f"The rate of {_name(network)} does not depend on the {size}",
        independent(deviations),
        f"from the common mean {', '.join(parts)}; the tolerance is {TOLERANCE:g}",
    )


def _limit(network: str, rates: Rates) -> Claim:
    ends, slopes = mean(rates.lines[:, 0] - rates.theory), mean(rates.lines[:, 1])
    inside, outside = max(-ends.low, ends.high) < TOLERANCE, ends.low > TOLERANCE or ends.high < -TOLERANCE
    return Claim(
        f"At infinite width the rate of {_name(network)} is that of mean field",
        True if inside else False if outside else None,
        f"extrapolated less mean field {ends:+.4f}; the deviation at width n is that and {slopes:+.2f} / n",
    )


def _verdicts(found: dict[str, Rates], size: str) -> str:
    """Which networks are independent of that size, in a sentence or more."""
    words: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for name, rates in found.items():
        words[independent(rates.by_depth if size == "depth" else rates.by_width)].append(_name(name))
    sentences = {
        True: f"Whatever the {size}, the rate stays within {TOLERANCE:g} of the common mean for {{}}.",
        False: f"With the {size} it leaves that for {{}}.",
        None: f"Whether it stays there whatever the {size}, the intervals are too wide to tell for {{}}.",
    }
    return " ".join(sentences[verdict].format(", ".join(names)) for verdict, names in words.items() if names)


def _differing(found: dict[str, Rates]) -> str:
    """Networks whose widest and narrowest have different rates, with the difference."""
    changes = {name: mean(rates.by_width[:, -1] - rates.by_width[:, 0]) for name, rates in found.items()}
    parts = [f"{_name(name)} ({change.value:+.4f})" for name, change in changes.items() if change.low * change.high > 0]
    return ", ".join(parts) or "none"


def _rates(found: dict[str, Rates]) -> Figure:
    figure, axes = plt.subplots(2, 4, figsize=(12.4, 6.4), layout="constrained")
    half = 1.1 * max(_reach(rates) for rates in found.values())
    for ax, (name, rates) in zip(axes.flat, found.items(), strict=False):
        _draw_sizes(ax, rates)
        ax.set_ylim(rates.common.value - half, rates.common.value + half)
        ax.set_title(_name(name), fontsize=10)
    for ax in axes.flat[len(found) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("GSC rate a layer (squared)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False, fontsize=10)
    seeds = len(next(iter(found.values())).values)
    figure.suptitle(f"Rates of nine sizes; mean over {seeds} seeds, bars: 95 % interval", fontsize=11)
    return figure


def _reach(rates: Rates) -> float:
    """How far an interval or mean field lies from the common mean, at most."""
    cells = [mean(column) for column in rates.values.reshape(len(rates.values), -1).T]
    ends = [end for cell in cells for end in (cell.low, cell.high)] + [rates.theory]
    return max(abs(end - rates.common.value) for end in ends)


def _draw_sizes(ax: Axes, rates: Rates) -> None:
    ax.axhspan(
        rates.common.value - TOLERANCE, rates.common.value + TOLERANCE, color="0.9", zorder=0,
        label=f"common mean $\\pm$ {TOLERANCE:g}",
    )  # fmt: skip
    ax.axhline(rates.theory, color="0.15", linewidth=0.9, linestyle=(0, (4, 2.5)), label="mean field")
    places = np.arange(len(rates.depths))
    for number, (color, marker, width) in enumerate(
        zip(sns.color_palette("colorblind"), ("o", "s", "^"), rates.widths, strict=False)
    ):
        cells = [mean(column) for column in rates.values[:, :, number].T]
        middles = np.array([cell.value for cell in cells])
        margins = np.array([cell.high - cell.value for cell in cells])
        ax.errorbar(
            places + 0.16 * (number - 1), middles, yerr=margins, fmt=f"{marker}-", color=color, linewidth=0.8,
            elinewidth=1.4, markersize=5, capsize=2, label=f"width {width}",
        )  # fmt: skip
    ax.set_xticks(places, [str(depth) for depth in rates.depths])
    ax.set_xlabel("depth")
    sns.despine(ax=ax)


def _deviations(found: dict[str, Rates]) -> Figure:
    figure, ax = plt.subplots(figsize=(7.4, 4.8), layout="constrained")
    markers = ("o", "s", "^", "D", "v", "P", "X")
    widths = next(iter(found.values())).widths
    for number, (color, (name, rates)) in enumerate(zip(sns.color_palette("colorblind"), found.items(), strict=False)):
        columns = rates.values.mean(axis=1).T - rates.theory
        cells = [mean(column) for column in columns]
        at = np.array([1 / width for width in widths]) + 0.00012 * (number - 3)
        ends, slope = rates.lines.mean(axis=0)
        ax.plot([0, 1 / widths[0]], [ends - rates.theory, ends - rates.theory + slope / widths[0]], color=color,
                linewidth=0.8)  # fmt: skip
        ax.errorbar(
            at, [cell.value for cell in cells], yerr=[cell.high - cell.value for cell in cells], fmt=markers[number],
            color=color, markersize=5, capsize=2, label=_name(name),
        )  # fmt: skip
    ax.axhline(0, color="0.15", linewidth=0.9, linestyle=(0, (4, 2.5)))
    ax.set_xticks([0, *(1 / width for width in reversed(widths))], [r"$\infty$", *map(str, reversed(widths))])
    ax.set(xlabel="width (linear in 1 / width)", ylabel="rate less mean field")
    ax.set_title("Deviation from mean field, mean over depths; bars: 95 % interval, lines: least squares", fontsize=10)
    ax.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    sns.despine(ax=ax)
    return figure


def _profiles(frame: pd.DataFrame) -> Figure:
    """Two networks of all sizes: curves of one architecture lie on each other."""
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
    for ax, name in zip(axes, ("selu", "relu_batch"), strict=True):
        rows = frame[(frame["model"] == name) & (frame["quantity"] == "gsc")]
        sns.lineplot(
            rows, x="depth_from_output", y="log10_value", hue="width", style="depth", palette="colorblind",
            errorbar=None, ax=ax, legend=name == "selu", linewidth=1.2,
        )  # fmt: skip
        row = rows.iloc[0]
        rate = theory(row["activation"], row["norm"], int(row["batch_size"]))
        far = float(rows["depth_from_output"].max())
        ax.plot([0, far], [0, far * math.log10(rate)], color="0.15", linewidth=0.9, linestyle=(0, (4, 2.5)),
                label=f"mean field: {rate:.4f} a layer", zorder=0)  # fmt: skip
        ax.set(title=_name(name), xlabel="layers to the output", ylabel=plots.LABELS["gsc"])
        ax.legend(frameon=False, fontsize=9)
        sns.despine(ax=ax)
    figure.suptitle(f"Nine sizes of two networks; mean over {frame['seed'].nunique()} seeds", fontsize=11)
    return figure


def _name(model: str) -> str:
    return report.network_name(model.split("_"))
