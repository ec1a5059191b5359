"""Do the gradient coefficients of two AlexNets move while they learn?"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean
from experiments.evidence.study import Claim, Study
from experiments.reports import sweep_figures, training_figures

RESULTS = "alexnet"
NAMES = {"alexnet_a_no_dropout": "A without dropout", "alexnet_b": "B"}
KINDS = {"conv": "convolution", "relu": "ReLU", "pool": "pooling", "fc": "fully connected layer"}
ORDINALS = ("zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
# One order of magnitude, of log10.
ORDER = 1.0

QUESTION = "How do the coefficients of two AlexNets move while they learn CIFAR-10?"
METHOD = f"""
Two AlexNets for CIFAR-10 ([training](../training.md)) are trained for {{train.epochs}} epochs by SGD with momentum
{{optimizer.momentum}}, a one-cycle learning rate up to {{optimizer.lr}}, batches of {{train.batch_size}} and label
smoothing {{train.label_smoothing}}, in {{num_seeds}} runs each. A goes without its dropout, which cost accuracy in so
few epochs ([decisions](../decisions.md)). Training is in bfloat16 (autocast); coefficients are measured in float32. The
images are CIFAR-10 **recompressed as JPEG**, not the original files ([results](../../results/README.md)).

Every {{monitor.every}} steps the gradient scale coefficient (GSC) of every unit to the logits is measured, exactly and
on the same {{monitor.batch_size}} test images; so is the length of every layer's gradient. The reshape before the first
fully connected layer has the coefficient of the unit below and is left out.

The movement of a unit at a record is log10 GSC there minus log10 GSC at step 0 of the same run. "Within one order of
magnitude" means that it stays between -{ORDER:g} and {ORDER:g}, and is decided by the 95 % intervals of its mean over
runs: supported where all of them lie within, contradicted where one lies beyond, undecided otherwise. GSC is defined by
G. Philipp, D. Song and J. Carbonell (arXiv:1712.05577); here it is squared, so that in the paper's convention every
movement is half as large.
"""
HOW_SURE = """
Intervals are over {num_seeds} runs that differ in weights and order of the data, 95 %, Student's t. With so few they
are wide, so that a claim needs a clear margin to be supported. They are those of one unit at one record, not corrected
for there being many. The width of an interval of movement holds the spread of runs at the beginning as well as at the
end. A few epochs of one recipe are no statement about training to the end, nor about other learning rates.
"""
CAPTIONS = {
    "gsc_over_training": (
        "GSC of every layer to the logits, layer by layer against the steps of training. Red is more than 1, blue less."
    ),
    "gsc_before_after": (
        "GSC of every unit before and after training, a panel a network. Bands are one standard deviation between runs."
    ),
    "learning": (
        "Training loss and test accuracy of both networks against the steps of training. Bands are one standard "
        "deviation between runs; the legend has the last accuracy."
    ),
    "gradient_norms": (
        "Length of the gradient of every layer's parameters over training, a panel a network. Each layer has its "
        "marker, and its name at the right end."
    ),
}


def figures(collected: Collected) -> dict[str, Figure]:
    """GSC over training, before and after; what was learned; gradient norms."""
    assert collected.metrics is not None
    frame, metrics = (
        table.assign(network=[_name(model) for model in table["model"]])
        for table in (collected.frame, collected.metrics)
    )
    made = training_figures.draw(frame, metrics, sweep_figures.describe(collected))
    order = ("gsc_over_training", "gsc_before_after", "learning", "gradient_norms")
    return {name: made[name] for name in order}


def claims(collected: Collected) -> list[Claim]:
    """Of each network: which way coefficients move, how far, where most, when; and what was learned."""
    moved, made = _movement(collected.frame), list[Claim]()
    for model in _models(collected):
        table = _part(moved, "model", model)
        made += [_falls(model, table), _after(model, table), _during(model, table), _where(model, table)]
        made += [_when(model, table)]
    return [*made, *_accuracy(collected)]


def answer(collected: Collected) -> str:
    """What was learned, which way coefficients move and how far; before and after of every unit."""
    assert collected.metrics is not None
    moved, accuracy, models = _movement(collected.frame), _accuracies(collected.metrics), _models(collected)
    reached = " and ".join(f"{_name(model)} reaches {100 * mean(accuracy[model]).value:.1f} %" for model in models)
    parts, rising = [], []
    for model in models:
        last = _last(_part(moved, "model", model))
        unit, change = _farthest(last)
        rising += [f"{_unit(u)} of {_name(model)}, {c:+.2f}" for u, c in _means(last).items() if c.value > 0]
        parts.append(
            f"Of {_name(model)} {_fallen(last)}; {_unit(unit)} moved most and ends at 10^{change.value:+.2f} times its "
            "first GSC; the standard deviation of log10 GSC between runs, averaged over units, goes from {:.2f} to "
            "{:.2f}.".format(*_apart(collected.frame, model))
        )
    gsc = collected.frame.loc[collected.frame["quantity"] == "gsc", "log10_value"]
    rises = f"The mean of log10 GSC rises only in {', '.join(rising)}." if rising else "No mean of log10 GSC rises."
    return (
        f"{reached} test accuracy in {collected.metrics['epoch'].max():g} epochs. {' '.join(parts)} {rises} All GSC of "
        f"both, at every record, lie between {10 ** gsc.min():.2g} and {10 ** gsc.max():.2g}.\n\n"
        f"{_before_after(collected.frame, moved)}"
    )


def _models(collected: Collected) -> list[str]:
    return [str(model) for model in collected.frame["model"].unique()]


def _name(model: object) -> str:
    return NAMES.get(str(model), str(model))


def _unit(layer: object) -> str:
    """``the fourth ReLU (relu4)``; a name of another form stays."""
    found = re.fullmatch(r"([a-z]+)(\d)", str(layer))
    if found is None or found[1] not in KINDS:
        return f"the {layer}"
    return f"the {ORDINALS[int(found[2])]} {KINDS[found[1]]} ({layer})"


def _movement(frame: pd.DataFrame) -> pd.DataFrame:
    """log10 GSC minus that at step 0: a row for each (model, layer, step), a column a seed."""
    table = _logarithms(frame)
    return table - table.groupby(level=["model", "layer"], sort=False).transform("first")


def _logarithms(frame: pd.DataFrame) -> pd.DataFrame:
    """log10 GSC of all units but the last, whose own is always 1, and a reshape, in rows and columns as above."""
    rows = frame[(frame["quantity"] == "gsc") & (frame["depth_from_output"] > 0) & (frame["layer"] != "flatten")]
    return rows.sort_values("step", kind="stable").pivot_table(
        index=["model", "layer", "step"], columns="seed", values="log10_value", observed=True, sort=False
    )


def _apart(frame: pd.DataFrame, model: str) -> tuple[float, float]:
    """Standard deviation between runs, mean over units, at the first and at the last record."""
    deviations = _part(_logarithms(frame), "model", model).std(axis=1).groupby(level="step").mean()
    return deviations.iloc[0], deviations.iloc[-1]


def _part(table: pd.DataFrame, level: str, value: object) -> pd.DataFrame:
    """The rows of one value of an index level, without it."""
    return table[table.index.get_level_values(level) == value].droplevel(level)


def _last(table: pd.DataFrame) -> pd.DataFrame:
    return _part(table, "step", table.index.get_level_values("step").max())


def _means(table: pd.DataFrame) -> dict[Any, Mean]:
    return {place: mean(row) for place, row in zip(table.index, table.to_numpy(), strict=True)}


def _farthest(table: pd.DataFrame) -> tuple[Any, Mean]:
    """The row whose mean is farthest from 0."""
    found = _means(table)
    return max(found.items(), key=lambda item: abs(item[1].value))


def _within(found: list[Mean]) -> bool | None:
    """All intervals within one order of magnitude; False: one lies beyond; None: one straddles the border."""
    if any(one.low > ORDER or one.high < -ORDER for one in found):
        return False
    return True if all(one.low > -ORDER and one.high < ORDER for one in found) else None


def _fallen(last: pd.DataFrame) -> str:
    found = _means(last).values()
    return (
        f"{sum(one.value < 0 for one in found)} of {len(found)} units have fallen in the mean, "
        f"{sum(one.high < 0 for one in found)} with the whole interval"
    )


def _falls(model: str, table: pd.DataFrame) -> Claim:
    found = list(_means(_last(table)).values())
    fallen, risen = sum(one.high < 0 for one in found), sum(one.low > 0 for one in found)
    return Claim(
        f"By the end GSC of most units of {_name(model)} has fallen",
        True if fallen > len(found) / 2 else False if risen >= len(found) / 2 else None,
        f"{_fallen(_last(table))}; {risen} have risen with the whole interval",
    )


def _after(model: str, table: pd.DataFrame) -> Claim:
    last = _last(table)
    unit, change = _farthest(last)
    return Claim(
        f"After training the GSC of every unit of {_name(model)} is within one order of magnitude of that before",
        _within(list(_means(last).values())),
        f"{len(last)} units, the farthest is {_unit(unit)} with log10 changed by {change:.2f}",
    )


def _during(model: str, table: pd.DataFrame) -> Claim:
    moved = table[table.index.get_level_values("step") > 0]
    (unit, step), change = _farthest(moved)
    found = list(_means(moved).values())
    loosest = max(found, key=lambda one: max(abs(one.low), abs(one.high)))
    return Claim(
        f"At every record of training the GSC of every unit of {_name(model)} is within one order of magnitude of that "
        "before",
        _within(found),
        f"{len(found)} intervals, the farthest mean is that of {_unit(unit)} at step {step}, {change:.2f}; the "
        f"farthest end of an interval belongs to {loosest:.2f}",
    )


def _where(model: str, table: pd.DataFrame) -> Claim:
    last = _last(table)
    farthest = {seed: str(last[seed].abs().idxmax()) for seed in last}
    return Claim(
        f"The unit of {_name(model)} that has moved most by the end is the same in every run",
        len(set(farthest.values())) == 1,
        ", ".join(f"{_unit(unit)} by {last[seed][unit]:+.2f}" for seed, unit in farthest.items()),
    )


def _when(model: str, table: pd.DataFrame) -> Claim:
    """The path of log10 GSC of the input: is more than half of it gone in the first quarter of the steps?"""
    path = _part(table, "layer", "input").diff().abs()
    early = path[path.index <= path.index.max() / 4].sum() / path.sum()
    part = mean(early)
    return Claim(
        f"Most of the movement of the input's GSC of {_name(model)} happens in the first quarter of training",
        True if part.low > 0.5 else False if part.high < 0.5 else None,
        f"part of the length of its path {part:.2f}",
    )


def _accuracies(metrics: pd.DataFrame) -> dict[str, pd.Series]:
    """The last test accuracy of each run, by model and seed."""
    last = metrics[metrics["test_accuracy"].notna()].groupby(["model", "seed"], observed=True)["test_accuracy"].last()
    return {str(model): last.xs(model, level="model") for model in last.index.get_level_values("model").unique()}


def _accuracy(collected: Collected) -> list[Claim]:
    """Of two networks, which is the better."""
    assert collected.metrics is not None
    found = _accuracies(collected.metrics)
    if len(found) != 2:
        return []
    (a, first), (b, second) = found.items()
    difference = mean(100 * (second - first))
    return [
        Claim(
            f"{_name(b)} reaches another test accuracy than {_name(a)} with this recipe",
            True if difference.low > 0 or difference.high < 0 else None,
            f"{_name(a)} {mean(100 * first):.1f} %, {_name(b)} {mean(100 * second):.1f} %, difference {difference:.1f}",
        )
    ]


def _before_after(frame: pd.DataFrame, moved: pd.DataFrame) -> str:
    """GSC of every unit at the first and last record, and the change of log10, in Markdown; a column is a network's."""
    logarithms = _logarithms(frame)
    models = list(dict.fromkeys(logarithms.index.get_level_values("model")))
    head = [f"{_name(model)}: {word}" for model in models for word in ("before", "after", "change of log10")]
    lines = [f"| unit | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for layer in dict.fromkeys(logarithms.index.get_level_values("layer")):
        cells = []
        for model in models:
            own = _part(_part(logarithms, "model", model), "layer", layer)
            change = _part(_part(moved, "model", model), "layer", layer)
            ends = [f"{geometric_mean(10**row):.2g}" for row in own.iloc[[0, -1]].to_numpy()] if len(own) else ["", ""]
            cells += [*ends, f"{mean(change.iloc[-1]):+.2f}" if len(own) else ""]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
    captions=CAPTIONS,
    results=RESULTS,
)
