"""How GSC of two AlexNets changes while they learn CIFAR-10."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table
from experiments.reports import sweep_figures, training_figures

NAMES = {"alexnet_a_no_dropout": "A without dropout", "alexnet_b": "B"}
KINDS = {"conv": "convolution", "relu": "ReLU", "pool": "pooling", "fc": "fully connected layer"}
ORDINALS = ("zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
# One order of magnitude in log10.
ORDER = 1.0


def figures(collected: Collected) -> dict[str, Figure]:
    """GSC over training, before and after; loss and accuracy; gradient norms."""
    assert collected.metrics is not None
    frame, metrics = (
        table.assign(network=[_name(model) for model in table["model"]])
        for table in (collected.frame, collected.metrics)
    )
    made = training_figures.draw(frame, metrics, sweep_figures.describe(collected))
    order = ("gsc_over_training", "gsc_before_after", "learning", "gradient_norms")
    return {name: made[name] for name in order}


def claims(collected: Collected) -> list[Claim]:
    """For each network: which way GSC moves, how far, where most, when; and the accuracies."""
    moved, made = _movement(collected.frame), list[Claim]()
    for model in _models(collected):
        own = _part(moved, "model", model)
        made += [decide(model, own) for decide in (_falls, _after, _during, _where, _when)]
    return [*made, *_accuracy(collected)]


def answer(collected: Collected) -> str:
    """The accuracies, which way GSC moves, and how far."""
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
        f"{listed(reached)} test accuracy in {collected.metrics['epoch'].max():g} epochs. By the end, mean log10 GSC "
        f"has fallen in {listed(fallen)}. The largest changes of GSC are by a factor of {listed(farthest)}."
    )


def details(collected: Collected) -> str:
    """Spread between runs, rising units, the range of GSC, and every unit before and after."""
    frame, moved, models = collected.frame, _movement(collected.frame), _models(collected)
    rising, spread = [], []
    for model in models:
        last = _means(_last(_part(moved, "model", model)))
        rising += [f"{_unit(unit)} of {_name(model)}, {one:+.2f}" for unit, one in last.items() if one.value > 0]
        before, after = _apart(frame, model)
        spread.append(f"from {before:.2f} to {after:.2f} for {_name(model)}")
    gsc = 10 ** frame.loc[frame["quantity"] == "gsc", "log10_value"]
    rises = f"Mean log10 GSC rises only in {', '.join(rising)}." if rising else "Mean log10 GSC rises in no unit."
    return (
        f"{rises} The standard deviation of log10 GSC between runs, averaged over units, changes {listed(spread)}. All "
        f"GSC at all records lie between {gsc.min():.2g} and {gsc.max():.2g}.\n\n{_before_after(frame, moved)}"
    )


def _models(collected: Collected) -> list[str]:
    return [str(model) for model in collected.frame["model"].unique()]


def _name(model: object) -> str:
    return NAMES.get(str(model), str(model))


def _unit(layer: object) -> str:
    """``the fourth ReLU (relu4)``, or ``the NAME`` for other names."""
    found = re.fullmatch(r"([a-z]+)(\d)", str(layer))
    if found is None or found[1] not in KINDS:
        return f"the {layer}"
    return f"the {ORDINALS[int(found[2])]} {KINDS[found[1]]} ({layer})"


def _movement(frame: pd.DataFrame) -> pd.DataFrame:
    """log10 GSC minus that at step 0: a row for each (model, layer, step), a column for each seed."""
    table = _logarithms(frame)
    return table - table.groupby(level=["model", "layer"], sort=False).transform("first")


def _logarithms(frame: pd.DataFrame) -> pd.DataFrame:
    """log10 GSC in the form of `_movement`, without the reshape and the last unit, whose GSC is always 1."""
    rows = frame[(frame["quantity"] == "gsc") & (frame["depth_from_output"] > 0) & (frame["layer"] != "flatten")]
    return rows.sort_values("step", kind="stable").pivot_table(
        index=["model", "layer", "step"], columns="seed", values="log10_value", observed=True, sort=False
    )


def _apart(frame: pd.DataFrame, model: str) -> tuple[float, float]:
    """Standard deviation between runs, averaged over units, at the first and the last record."""
    deviations = _part(_logarithms(frame), "model", model).std(axis=1).groupby(level="step").mean()
    return deviations.iloc[0], deviations.iloc[-1]


def _part(table: pd.DataFrame, level: str, value: object) -> pd.DataFrame:
    """The rows with this value of an index level, without that level."""
    return table[table.index.get_level_values(level) == value].droplevel(level)


def _last(table: pd.DataFrame) -> pd.DataFrame:
    return _part(table, "step", table.index.get_level_values("step").max())


def _means(table: pd.DataFrame) -> dict[Any, Mean]:
    return {place: means.mean(row) for place, row in zip(table.index, table.to_numpy(), strict=True)}


def _farthest(found: dict[Any, Mean]) -> tuple[Any, Mean]:
    """The mean that is farthest from 0, with its key."""
    return max(found.items(), key=lambda item: abs(item[1].value))


def _falls(model: str, moved: pd.DataFrame) -> Claim:
    found = list(_means(_last(moved)).values())
    fallen, risen = sum(one.high < 0 for one in found), sum(one.low > 0 for one in found)
    return Claim(
        f"By the end, GSC of most units of {_name(model)} has fallen",
        means.verdict(fallen > len(found) / 2, risen >= len(found) / 2),
        f"the mean has fallen in {sum(one.value < 0 for one in found)} of {len(found)} units, the whole interval in "
        f"{fallen}; the whole interval has risen in {risen}",
    )


def _after(model: str, moved: pd.DataFrame) -> Claim:
    last = _means(_last(moved))
    unit, change = _farthest(last)
    return Claim(
        f"After training, GSC of every unit of {_name(model)} is within one order of magnitude of that before",
        means.all_of(*(one.within(0.0, ORDER) for one in last.values())),
        f"{len(last)} units; the largest change of log10 is that of {_unit(unit)}, {change:.2f}",
    )


def _during(model: str, moved: pd.DataFrame) -> Claim:
    found = _means(moved[moved.index.get_level_values("step") > 0])
    (unit, step), change = _farthest(found)
    loosest = max(found.values(), key=lambda one: max(abs(one.low), abs(one.high)))
    return Claim(
        f"At every record, GSC of every unit of {_name(model)} is within one order of magnitude of that before "
        "training",
        means.all_of(*(one.within(0.0, ORDER) for one in found.values())),
        f"{len(found)} intervals; the largest mean is that of {_unit(unit)} at step {step}, {change:.2f}; the largest "
        f"end of an interval is that of {loosest:.2f}",
    )


def _where(model: str, moved: pd.DataFrame) -> Claim:
    last = _last(moved)
    farthest = {seed: str(last[seed].abs().idxmax()) for seed in last}
    return Claim(
        f"The unit of {_name(model)} that has moved most by the end is the same in every run",
        len(set(farthest.values())) == 1,
        ", ".join(f"{_unit(unit)} by {last[seed][unit]:+.2f}" for seed, unit in farthest.items()),
    )


def _when(model: str, moved: pd.DataFrame) -> Claim:
    """Whether the path of log10 GSC of the input is longer in the first quarter of the steps than afterwards."""
    path = _part(moved, "layer", "input").diff().abs()
    early = means.mean(path[path.index <= path.index.max() / 4].sum() / path.sum())
    return Claim(
        f"Most of the movement of the input's GSC of {_name(model)} happens in the first quarter of training",
        early.above(0.5),
        f"part of the length of its path {early:.2f}",
    )


def _accuracies(metrics: pd.DataFrame) -> dict[str, pd.Series]:
    """The last test accuracy of each run, by model and seed."""
    last = metrics[metrics["test_accuracy"].notna()].groupby(["model", "seed"], observed=True)["test_accuracy"].last()
    return {str(model): last.xs(model, level="model") for model in last.index.get_level_values("model").unique()}


def _accuracy(collected: Collected) -> list[Claim]:
    """Whether two networks reach different accuracies."""
    assert collected.metrics is not None
    found = _accuracies(collected.metrics)
    if len(found) != 2:
        return []
    (a, first), (b, second) = found.items()
    difference = means.mean(100 * (second - first))
    return [
        Claim(
            f"With this recipe, the test accuracy of {_name(b)} differs from that of {_name(a)}",
            means.verdict(difference.low > 0 or difference.high < 0, False),
            f"{_name(a)} {means.mean(100 * first):.1f} %, {_name(b)} {means.mean(100 * second):.1f} %, difference "
            f"{difference:.1f}",
        )
    ]


def _before_after(frame: pd.DataFrame, moved: pd.DataFrame) -> str:
    """A table of GSC of every unit at the first and the last record, and of the change of log10, for every network."""
    logarithms, rows = _logarithms(frame), []
    models = list(dict.fromkeys(logarithms.index.get_level_values("model")))
    for layer in dict.fromkeys(logarithms.index.get_level_values("layer")):
        rows.append([layer])
        for model in models:
            own, change = (_part(_part(values, "model", model), "layer", layer) for values in (logarithms, moved))
            ends = [f"{means.geometric_mean(10**row):.2g}" for row in own.iloc[[0, -1]].to_numpy()] if len(own) else []
            rows[-1] += [*ends, f"{means.mean(change.iloc[-1]):+.2f}"] if len(own) else ["", "", ""]
    words = ("before", "after", "change of log10")
    return table(["unit", *(f"{_name(model)}: {word}" for model in models for word in words)], rows)


STUDY = Study(
    question="How does GSC of two AlexNets change while they learn CIFAR-10?",
    answer=answer,
    use="""
GSC at initialization does not describe the trained network, so measure it again after training. Measure several runs at
initialization, where runs differ more than after training.
""",
    method=f"""
Two AlexNets for CIFAR-10 ([training](../training.md)) are trained for {{train.epochs}} epochs by SGD with momentum
{{optimizer.momentum}}. The recipe is a one-cycle learning rate up to {{optimizer.lr}}, batches of {{train.batch_size}}
and label smoothing {{train.label_smoothing}}; there are {{num_seeds}} runs per network. A is trained without its
dropout, which reduced accuracy in so few epochs ([decisions](../decisions.md)). Training uses bfloat16 (autocast); GSC
is measured in float32. The images are CIFAR-10 **recompressed as JPEG**, not the original files
([results](../../results/README.md)).

Every {{monitor.every}} steps, GSC of every unit to the logits is measured exactly, always on the same
{{monitor.batch_size}} test images. The norm of the gradient of every layer is recorded too. The reshape before the
first fully connected layer has the GSC of the unit before it, so it is left out.

The movement of a unit is log10 GSC at a record minus log10 GSC at step 0 of the same run. "Within one order of
magnitude" means between -{ORDER:g} and {ORDER:g}, decided by the 95 % intervals of the mean over runs. A claim is
supported if all intervals lie within, contradicted if one lies outside, and undecided otherwise. GSC is defined by G.
Philipp, D. Song and J. Carbonell (arXiv:1712.05577). It is squared here; in the convention of that paper, every
movement is half as large.
""",
    how_sure="""
Intervals are 95 % Student's t intervals over {num_seeds} runs, which differ in weights and order of the data. With so
few runs they are wide, so only a claim with a clear margin is supported. Each interval is that of one unit at one
record, without correction for their number. The interval of a movement contains the spread of runs at the beginning as
well as at the end. A few epochs of one recipe say nothing about training to the end or about other learning rates.
""",
    claims=claims,
    figures=figures,
    captions={
        "gsc_over_training": (
            "GSC of every layer to the logits over the steps of training. Red is more than 1, blue is less."
        ),
        "gsc_before_after": (
            "GSC of every unit before and after training, one panel per network. Bands are one standard deviation over "
            "runs."
        ),
        "learning": (
            "Training loss and test accuracy of both networks over the steps of training. Bands are one standard "
            "deviation over runs; the legend shows the last accuracy."
        ),
        "gradient_norms": (
            "Norm of the gradient of every layer's parameters over training, one panel per network. Each layer has its "
            "own marker, and its name at the right end."
        ),
    },
    details=details,
    results="alexnet",
)
