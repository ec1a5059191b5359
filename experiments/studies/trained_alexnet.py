"""How GSC of two AlexNets changes while they learn CIFAR-10."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table
from experiments.reports import sweep_figures, training_figures

KINDS = {"conv": "convolution", "relu": "ReLU", "pool": "pooling", "fc": "fully connected layer"}
ORDINALS = ("zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
# One order of magnitude in log10.
ORDER = 1.0


def figures(collected: Collected) -> dict[str, Figure]:
    """Figures of GSC during training, of GSC before and after, of loss and accuracy, and of gradient norms."""
    assert collected.metrics is not None
    frame, metrics = (
        table.assign(network=[_name(model) for model in table["model"]])
        for table in (collected.frame, collected.metrics)
    )
    made = training_figures.draw(frame, metrics, sweep_figures.describe(collected))
    order = ("gsc_over_training", "gsc_before_after", "learning", "gradient_norms")
    return {name: made[name] for name in order}


def claims(collected: Collected) -> list[Claim]:
    """Claims on each network (whether GSC falls, how far, where and when it changes most) and on the accuracies."""
    moved, models = _movement(collected.frame), _models(collected)
    made = [claim for model in models for claim in _of_network(_name(model), _part(moved, "model", model))]
    return [*made, *_accuracy(collected)]


def answer(collected: Collected) -> str:
    """The accuracies, in how many units GSC falls, and the largest changes of GSC."""
    assert collected.metrics is not None
    moved, accuracy = _movement(collected.frame), _accuracies(collected.metrics)
    reached, fallen, farthest = [], [], []
    for model in _models(collected):
        last = _means(_last(_part(moved, "model", model)))
        unit, change = _farthest(last)
        reached.append(f"{_name(model)} reaches {100 * means.mean(accuracy[model]).value:.1f} %")
        fallen.append(f"{sum(one.value < 0 for one in last.values())} of {len(last)} units of {_name(model)}")
        farthest.append(f"10^{change.value:+.2f} in {_unit(unit)} of {_name(model)}")
    return (
        f"{listed(reached)} test accuracy in {collected.metrics['epoch'].max():g} epochs. After training, GSC from a "
        "unit (input, layer, activation or pooling) to the logits, averaged geometrically over runs, is lower than "
        f"before training in {listed(fallen)}. The largest change in each network multiplies GSC by {listed(farthest)}."
    )


def details(collected: Collected) -> str:
    """Units in which GSC rises, differences between runs, the range of GSC, and a table of all units."""
    frame, moved, models = collected.frame, _movement(collected.frame), _models(collected)
    rising, spread = [], []
    for model in models:
        last = _means(_last(_part(moved, "model", model)))
        rising += [f"{_unit(unit)} of {_name(model)}, {one:+}" for unit, one in last.items() if one.value > 0]
        apart = _part(_logarithms(frame), "model", model).std(axis=1).groupby(level="step").mean()
        spread.append(f"from {apart.iloc[0]:.2f} to {apart.iloc[-1]:.2f} for {_name(model)}")
    gsc = 10 ** frame.loc[frame["quantity"] == "gsc", "log10_value"]
    rises = f", except for a rise in {', '.join(rising)}" if rising else ""
    return (
        f"From step 0 to the end of training, the mean of log10 GSC over runs falls in every unit{rises}. The standard "
        f"deviation of log10 GSC between runs, averaged over units, changes {listed(spread)} during training. "
        f"In all runs and at all records, GSC from the units to the logits lies between "
        f"{gsc.min():.2g} and {gsc.max():.2g}.\n\n"
        f"GSC from every unit to the logits, and the change of log10 GSC:\n\n{_before_after(frame, moved)}"
    )


def _models(collected: Collected) -> list[str]:
    return [str(model) for model in collected.frame["model"].unique()]


def _name(model: object) -> str:
    return labels.label("model", str(model))


def _unit(layer: object) -> str:
    """``the fourth ReLU (relu4)`` for ``relu4``; ``the NAME`` for a unit that is not in `KINDS`."""
    found = re.fullmatch(r"([a-z]+)(\d)", str(layer))
    if found is None or found[1] not in KINDS:
        return f"the {layer}"
    return f"the {ORDINALS[int(found[2])]} {KINDS[found[1]]} ({layer})"


def _movement(frame: pd.DataFrame) -> pd.DataFrame:
    """log10 GSC minus log10 GSC at step 0, with a row for each (model, layer, step) and a column for each seed."""
    table = _logarithms(frame)
    return table - table.groupby(level=["model", "layer"], sort=False).transform("first")


def _logarithms(frame: pd.DataFrame) -> pd.DataFrame:
    """log10 GSC, with rows and columns as in `_movement`. The reshape and the last unit (GSC always 1) are left out."""
    rows = frame[(frame["quantity"] == "gsc") & (frame["depth_from_output"] > 0) & (frame["layer"] != "flatten")]
    return rows.sort_values("step", kind="stable").pivot_table(
        index=["model", "layer", "step"], columns="seed", values="log10_value", observed=True, sort=False
    )


def _part(table: pd.DataFrame, level: str, value: object) -> pd.DataFrame:
    """The rows in which an index level has this value; the level is dropped."""
    return table[table.index.get_level_values(level) == value].droplevel(level)


def _last(table: pd.DataFrame) -> pd.DataFrame:
    return _part(table, "step", table.index.get_level_values("step").max())


def _means(table: pd.DataFrame) -> dict[Any, Mean]:
    return {place: means.mean(row) for place, row in zip(table.index, table.to_numpy(), strict=True)}


def _farthest(found: dict[Any, Mean]) -> tuple[Any, Mean]:
    """The key and the mean of the entry that is farthest from 0."""
    return max(found.items(), key=lambda item: abs(item[1].value))


def _of_network(name: str, moved: pd.DataFrame) -> list[Claim]:
    """Whether GSC of a network falls, how far it changes (at the end, at any record), where and when most."""
    final = _last(moved)
    last, records = _means(final), _means(moved[moved.index.get_level_values("step") > 0])
    fallen, risen = sum(one.high < 0 for one in last.values()), sum(one.low > 0 for one in last.values())
    (unit, change), ((other, step), largest) = _farthest(last), _farthest(records)
    loosest = max(records.values(), key=lambda one: max(abs(one.low), abs(one.high)))
    farthest = {seed: str(final[seed].abs().idxmax()) for seed in final}
    path = _part(moved, "layer", "input").diff().abs()
    early = means.mean(path[path.index <= path.index.max() / 4].sum() / path.sum())
    return [
        Claim(
            f"At the end, GSC of most units of {name} is lower than before training",
            means.verdict(fallen > len(last) / 2, risen >= len(last) / 2),
            f"units whose mean change is negative: {sum(one.value < 0 for one in last.values())} of {len(last)}; "
            f"units in which the whole interval of the change is negative: {fallen}; units in which the whole "
            f"interval of the change is positive: {risen}; required: in more "
            "than half of the units, the whole interval is negative",
        ),
        Claim(
            f"After training, GSC of every unit of {name} is within one order of magnitude of GSC before",
            means.all_of(*(one.within(0.0, ORDER) for one in last.values())),
            f"{len(last)} units, with the largest mean change of log10 GSC in {_unit(unit)}, {change}; required of "
            f"every unit: change of log10 GSC between -{ORDER:g} and {ORDER:g}",
        ),
        Claim(
            f"At every record, GSC of every unit of {name} is within one order of magnitude of GSC before training",
            means.all_of(*(one.within(0.0, ORDER) for one in records.values())),
            f"intervals, one for each unit and record: {len(records)}; mean change of log10 GSC farthest from 0: "
            f"{largest}, in {_unit(other)} at step {step}; change whose interval reaches farthest from 0: "
            f"{loosest}; required of every unit and record: change of log10 GSC between -{ORDER:g} and {ORDER:g}",
        ),
        Claim(
            f"At the end of training, the unit of {name} whose GSC has changed most is the same in every run",
            len(set(farthest.values())) == 1,
            "unit with the largest change of log10 GSC, one for each run: "
            + ", ".join(f"{_unit(where)} by {final[seed][where]:+.2f}" for seed, where in farthest.items()),
        ),
        Claim(
            f"GSC from the input of {name} to the logits changes more in the first quarter of training than in the "
            "rest",
            early.above(0.5),
            "fraction that the first quarter has of the sum of absolute changes of log10 GSC between consecutive "
            f"records: {early}; required: fraction above 0.5",
        ),
    ]


def _accuracies(metrics: pd.DataFrame) -> dict[str, pd.Series]:
    """The last test accuracy of each run, as a series over seeds for each model."""
    last = metrics[metrics["test_accuracy"].notna()].groupby(["model", "seed"], observed=True)["test_accuracy"].last()
    return {str(model): last.xs(model, level="model") for model in last.index.get_level_values("model").unique()}


def _accuracy(collected: Collected) -> list[Claim]:
    """Whether the two networks reach different accuracies."""
    assert collected.metrics is not None
    found = {_name(model): 100 * values for model, values in _accuracies(collected.metrics).items()}
    if len(found) != 2:
        return []
    (a, first), (b, second) = found.items()
    difference = means.mean(second - first)
    says = f"After this training, the test accuracy of {b} differs from the accuracy of {a}"
    because = f"{a}: {means.mean(first)} %; {b}: {means.mean(second)} %; difference: {difference} percentage points"
    return [Claim(says, means.verdict(difference.low > 0 or difference.high < 0, False), because)]


def _before_after(frame: pd.DataFrame, moved: pd.DataFrame) -> str:
    """A table of GSC of every unit at the first and the last record, and of the change of log10 GSC."""
    logarithms, rows = _logarithms(frame), []
    models = list(dict.fromkeys(logarithms.index.get_level_values("model")))
    for layer in dict.fromkeys(logarithms.index.get_level_values("layer")):
        rows.append([layer])
        for model in models:
            own, change = (_part(_part(values, "model", model), "layer", layer) for values in (logarithms, moved))
            ends = [means.geometric_mean(10**row) for row in own.iloc[[0, -1]].to_numpy()] if len(own) else []
            rows[-1] += [*ends, f"{means.mean(change.iloc[-1]):+}"] if len(own) else ["", "", ""]
    words = ("before", "after", "change of log10 GSC")
    return table(["unit", *(f"{_name(model)}: {word}" for model in models for word in words)], rows)


STUDY = Study(
    question="How does GSC of two AlexNets change while they learn CIFAR-10?",
    answer=answer,
    use="""
GSC at initialization does not describe the trained network, so measure GSC again after training. At initialization,
measure several seeds, because GSC differs more between seeds before training than after.
""",
    method=f"""
Two AlexNets for CIFAR-10 ([training](../training.md)) are trained for {{train.epochs}} epochs by SGD with momentum
{{optimizer.momentum}}, a one-cycle learning rate up to {{optimizer.lr}}, batches of {{train.batch_size}} and label
smoothing {{train.label_smoothing}}. There are {{num_seeds}} runs per network. AlexNet A is used without dropout,
because dropout lowers the accuracy if there are few epochs ([decisions](../decisions.md)). Training uses bfloat16
(autocast); GSC is measured in float32. The images are CIFAR-10 **recompressed as JPEG**, not the original files
([results](../../results/README.md)).

Every {{monitor.every}} steps, GSC from every unit to the logits is measured exactly, always on the same
{{monitor.batch_size}} test images. One such measurement is a **record**. A **unit** is the input, a layer, an
activation or a pooling. The reshape before the first fully connected layer is left out, because its GSC equals GSC of
the unit before it.

The **change** of a unit is log10 GSC at a record minus log10 GSC at step 0. "Within one order of magnitude" means that
the mean change over runs is between -{ORDER:g} and {ORDER:g}. For the square root of GSC, which part of the literature
calls GSC (G. Philipp et al., arXiv:1712.05577), every change is half as large.
""",
    how_sure="""
Intervals are 95 % Student's t intervals over {num_seeds} runs, which differ in weights and order of the data. Each
interval is for one unit at one record; the intervals are not corrected for the number of units and records. A change
compares the record with step 0 of the same run. So the interval of a change is wide if runs differ at step 0,
even if they agree at the record. A few epochs of one recipe say nothing about longer training or about other learning
rates.
""",
    claims=claims,
    figures=figures,
    captions={
        "gsc_over_training": "GSC from every unit to the logits during training, as a geometric mean over seeds. Red: "
        "GSC above 1. Blue: GSC below 1.",
        "gsc_before_after": "GSC of every unit to the logits before and after training, one panel per network. Lines "
        "are geometric means over seeds, bands one standard deviation of log10 GSC. The legend gives the growth rate "
        "per layer, in brackets its 95 % interval, and the verdict.",
        "learning": "Training loss and test accuracy of both networks, against the step of training. Lines are means "
        "over seeds, bands one standard deviation. The legend on the right gives the final accuracy.",
        "gradient_norms": "Norm of the gradient of the parameters of every layer during training, for each network. "
        "Lines are geometric means over seeds, bands one standard deviation. Dark: near the input. Light: near the "
        "output.",
    },
    details=details,
    results="alexnet",
)
