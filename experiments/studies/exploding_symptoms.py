"""Which signal warns first when training explodes?"""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from scipy import stats

from experiments.collect import Collected
from experiments.study import Claim
from experiments.summaries import Mean, mean
from experiments.symptoms import FAILURE, THRESHOLDS, condensed
from experiments.symptoms import leads as leads_of
from experiments.symptoms import runs as runs_of

__all__ = ["condensed"]

QUESTION = "Which signal warns first when training explodes, and how long before?"
METHOD = """
Plain networks of depth 20 and width 50 learn digits by SGD with momentum at a constant learning rate, 40 steps, in
float32: three that explode at initialization (relu_batch, tanh_layer, selu) and two that do not (relu, tanh), at
learning rates from sane to far too large. Everything is recorded at every step before the update.

**Failure** is the first step whose loss is not finite or above 10 ln 10, ten times that of guessing among ten classes.
**Signals** have thresholds that were fixed before any run, where the monitor has one, its own:

- *loss jump*: the loss above 5 times the median of up to 50 before it, of which there must be 5;
- *gradient jump*: the length of the whole gradient above 10 times its recent median, by the same rule;
- *update*: a layer's update longer than 0.1 of its weights;
- *weight growth*: a layer's weights 10 times as long as at the beginning;
- *GSC*: the coefficient of some layer to the logits (squared convention, arXiv:1712.05577) above 10^6.

A run is **warned** by a signal that passes its threshold at a step before the failure; the lead is the number of steps
between. In a run that does not fail the same signal is a **false alarm**.
"""
HOW_SURE = """
Parts of runs have Wilson intervals, 95 %, which take runs as independent; seeds of one network at one learning rate are
alike, so they are too narrow. That of the ranking by GSC is over seeds, Student's t, with these networks and learning
rates as they are. Failures later than the last step count as none. Where a run fails within five steps no jump can be
seen, for there is nothing to jump from. Another grid of learning rates would give other parts.
"""

WORDS = {
    "loss_jump": "loss jump", "gradient_jump": "gradient jump", "update": "update", "weight_growth": "weight growth",
    "gsc": "GSC",
}  # fmt: skip


def figures(collected: Collected) -> dict[str, Figure]:
    """One run, leads, how many were warned, and who failed."""
    runs = runs_of(collected.frame)
    return {
        "warnings": _draw_warnings(runs),
        "leads": _draw_leads(leads_of(runs)),
        "one_run": _draw_run(collected.frame),
        "failures": _draw_failures(runs),
    }


def claims(collected: Collected) -> list[Claim]:
    """Warnings and false alarms of each signal, which comes first, and what GSC at the beginning predicts."""
    runs = runs_of(collected.frame)
    return [
        *(_warns(name, leads_of(runs)[name]) for name in THRESHOLDS),
        *(_silent(name, runs) for name in THRESHOLDS),
        _update_first(leads_of(runs)),
        _predicts(runs),
    ]


def answer(collected: Collected) -> str:
    """Who warns, how long before, and at what price."""
    runs = runs_of(collected.frame)
    leads, quiet = leads_of(runs), runs[np.isinf(runs["failure_step"])]
    parts = [
        f"{WORDS[name]} warns {leads[name].notna().sum()} of {len(leads)} failing runs ({_quartiles(leads[name])}) and "
        f"{np.isfinite(quiet[f'first_{name}']).sum()} of {len(quiet)} others"
        for name in sorted(THRESHOLDS, key=lambda name: -leads[name].notna().sum())
    ]
    return (
        f"{'; '.join(parts)}. Failures come at a median step of "
        f"{runs['failure_step'][np.isfinite(runs['failure_step'])].median():g}, so there is little time to warn."
    )


def _quartiles(lead: pd.Series) -> str:
    known = lead.dropna()
    if not len(known):
        return "0 leads"
    low, middle, high = known.quantile([0.25, 0.5, 0.75])
    return f"lead {middle:g} steps, quartiles {low:g} and {high:g}"


def _part(successes: int, num: int) -> tuple[float, float, float]:
    """Of runs, with its Wilson interval; everything is possible where there are none."""
    if not num:
        return math.nan, 0.0, 1.0
    interval = stats.binomtest(successes, num).proportion_ci(method="wilson")
    return successes / num, float(interval.low), float(interval.high)


def _most(says: str, successes: int, num: int, more: str = "") -> Claim:
    """That more than half of the runs do."""
    _, low, high = _part(successes, num)
    return Claim(
        says,
        True if low > 0.5 else False if high < 0.5 else None,
        f"{successes} of {num} runs, {100 * low:.0f} to {100 * high:.0f} %{more}",
    )


def _warns(name: str, lead: pd.Series) -> Claim:
    says = f"{WORDS[name]} comes before the failure in most runs that fail"
    return _most(says, int(lead.notna().sum()), len(lead), f"; {_quartiles(lead)}")


def _silent(name: str, runs: pd.DataFrame) -> Claim:
    firsts = runs[np.isinf(runs["failure_step"])][f"first_{name}"]
    return _most(f"{WORDS[name]} is silent in most runs that do not fail", int(np.isinf(firsts).sum()), len(firsts))


def _update_first(leads: pd.DataFrame) -> Claim:
    warned = leads[leads.notna().any(axis=1)]
    first = warned.eq(warned.max(axis=1), axis=0)
    says = "The update is the first to warn, alone or with others, in most failing runs that are warned at all"
    others = ", ".join(f"{WORDS[name]} {first[name].sum()}" for name in THRESHOLDS if name != "update")
    return _most(says, int(first["update"].sum()), len(warned), f"; the others are first in: {others}")


def _predicts(runs: pd.DataFrame) -> Claim:
    area = _ranking(runs)
    return Claim(
        "At a given learning rate the networks with larger GSC at step 0 are those that fail",
        None if area is None else True if area.low > 0.5 else False if area.high < 0.5 else None,
        "0 learning rates at which some fail and others do not"
        if area is None
        else f"the failing one of a pair of runs has the larger GSC in a part of {area:.2f}; chance is 0.5",
    )


def _ranking(runs: pd.DataFrame) -> Mean | None:
    """Area under the ROC curve over pairs at one learning rate and seed, averaged over seeds."""
    areas = []
    for _, own in runs.groupby(level="seed", observed=True):
        wins = []
        for _, group in own.groupby(level="lr", observed=True):
            bad = np.isfinite(group["failure_step"].to_numpy())
            start = group["log10_gsc_at_start"].to_numpy()
            difference = start[bad][:, None] - start[~bad][None, :]
            wins.append((np.sign(difference).ravel() + 1) / 2)
        pairs = np.concatenate(wins)
        if len(pairs):
            areas.append(pairs.mean())
    return mean(areas) if areas else None


def _draw_run(frame: pd.DataFrame) -> Figure:
    """Everything over its own threshold."""
    figure, ax = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    rows = frame[frame["quantity"].isin(["loss", *THRESHOLDS])]
    limits = {"loss": FAILURE} | THRESHOLDS
    colors = dict(zip(limits, ["black", *sns.color_palette("colorblind")], strict=False))
    for name, limit in limits.items():
        own = rows[(rows["quantity"] == name) & np.isfinite(rows["value"])].sort_values("step")
        label = "loss (failure)" if name == "loss" else WORDS[name]
        ax.plot(own["step"], own["value"] / limit, "o-", color=colors[name], markersize=3, linewidth=1.3, label=label)
    ax.axhline(1, color="0.5", linewidth=0.8, zorder=0)
    one = rows.iloc[0]
    ax.set(yscale="log", xlabel="step of training", ylabel="signal over its threshold")
    ax.set_title(
        f"The run that failed last: {one['model']}, learning rate {one['lr']:g}, seed {one['seed']}", fontsize=10
    )
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(ax=ax)
    return figure


def _draw_leads(leads: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    long = leads.melt(var_name="signal", value_name="lead").dropna()
    order = list(THRESHOLDS)
    color = sns.color_palette("colorblind")[0]
    sns.stripplot(
        long, x="lead", y="signal", order=order, orient="h", color=color, alpha=0.45, size=4, jitter=0.28, ax=ax,
    )  # fmt: skip
    for place, name in enumerate(order):
        known = leads[name].dropna()
        if len(known):
            low, middle, high = known.quantile([0.25, 0.5, 0.75])
            ax.plot([low, high], [place, place], color="black", linewidth=2, zorder=5)
            ax.plot(middle, place, "D", color="black", markersize=6, zorder=6)
    ax.set_yticks(range(len(order)), [f"{WORDS[name]}\n{leads[name].notna().sum()} of {len(leads)}" for name in order])
    ax.set(xlabel="steps between warning and failure", ylabel="")
    ax.set_xlim(left=0)
    ax.set_title("Lead of each signal, a dot a warned run; diamond: median, bar: quartiles", fontsize=10)
    sns.despine(ax=ax)
    return figure


def _draw_warnings(runs: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    failed, leads = np.isfinite(runs["failure_step"]), leads_of(runs)
    colors = sns.color_palette("colorblind")
    bars: tuple[tuple[str, Callable[[str], pd.Series]], ...] = (
        (f"warned before the failure, of {failed.sum()} failing runs", lambda name: leads[name].notna()),
        (f"false alarm, of {(~failed).sum()} other runs", lambda name: np.isfinite(runs[~failed][f"first_{name}"])),
    )
    for number, (label, which) in enumerate(bars):
        parts = [_part(int(which(name).sum()), len(which(name))) for name in THRESHOLDS]
        value, low, high = (100 * np.array(column) for column in zip(*parts, strict=True))
        place = np.arange(len(parts)) + 0.38 * (number - 0.5)
        ax.bar(place, value, width=0.36, color=colors[number], label=label)
        ax.errorbar(place, value, yerr=[value - low, high - value], fmt="none", color="black", linewidth=1, capsize=3)
    ax.set_xticks(range(len(THRESHOLDS)), list(WORDS.values()))
    ax.set(ylabel="runs in %", ylim=(0, 119), yticks=range(0, 101, 20))
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    ax.set_title("Warnings and false alarms; error bars: Wilson, 95 %, over runs", fontsize=10)
    sns.despine(ax=ax)
    return figure


def _draw_failures(runs: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    start = runs["log10_gsc_at_start"].groupby(level="model", observed=True).mean().sort_values()
    part = np.isfinite(runs["failure_step"]).groupby(level=["model", "lr"], observed=True).mean().unstack("lr")
    sns.heatmap(
        100 * part.loc[start.index], vmin=0, vmax=100, cmap="Greys", annot=True, fmt=".0f", ax=ax,
        cbar_kws={"label": "runs that fail in %"},
    )  # fmt: skip
    ax.set_yticks(np.arange(len(start)) + 0.5, [f"{model}\n{value:.1f}" for model, value in start.items()], rotation=0)
    ax.set(xlabel="learning rate", ylabel=r"network, its mean largest $\log_{10}$ GSC at step 0")
    seeds = runs.index.get_level_values("seed").nunique()
    ax.set_title(f"Failures within the run, {seeds} seeds a cell; error bars: none, counts", fontsize=10)
    return figure
