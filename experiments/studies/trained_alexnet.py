"""Do the gradient coefficients of two AlexNets move while they learn?"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import drawing, report, training_figures
from experiments.collect import Collected
from experiments.study import Claim
from experiments.summaries import Mean, mean
from gradscope.alarms import EXTREME_LOG10

QUESTION = "How do the coefficients of two AlexNets move while they learn CIFAR-10?"
METHOD = """
Two AlexNets for CIFAR-10, A without dropout and B, are trained by SGD with momentum (one-cycle learning rate, label
smoothing) in three runs each. Five times an epoch the gradient scale coefficient (GSC) of every unit to the logits is
measured, exactly and on the same 32 test images; so is the length of every layer's gradient.

The movement of a unit at a record is log10 GSC there minus log10 GSC at step 0 of the same run. "Within one order of
magnitude" means that it stays between -1 and 1, and is decided by the 95 % intervals of its mean over runs: supported
where all of them lie within, contradicted where one lies beyond, undecided otherwise. GSC is defined by G. Philipp,
D. Song and J. Carbonell (arXiv:1712.05577); here it is squared, as everywhere in gradscope, so that the logarithm of
the paper's moves by half as much. As the word "order of magnitude" depends on that, both are decided.
"""
HOW_SURE = """
Intervals are over three runs that differ in weights and order of the data, 95 %, Student's t. With two degrees of
freedom they are wide: 4.3 standard errors, so that a claim needs a clear margin to be supported. They are those of one
unit at one record, not corrected for there being many. Runs begin further apart than they end, so most of the width of
an interval of movement is that of the beginning. A few epochs of one recipe are no statement about training to
the end, nor about other learning rates.
"""
RESULTS = "alexnet"

# One order of magnitude, of log10.
ORDER = 1.0
# What log10 of the squared GSC is multiplied by to be that of each convention.
CONVENTIONS = {"GSC": 1.0, "GSC without the square": 0.5}


def figures(collected: Collected) -> dict[str, Figure]:
    """GSC over training, before and after; what was learned; gradient norms."""
    assert collected.metrics is not None
    frame, metrics = (report.with_networks(table, ["model"]) for table in (collected.frame, collected.metrics))
    made = training_figures.draw(frame, metrics, drawing.describe(collected))
    order = ("gsc_over_training", "gsc_before_after", "learning", "gradient_norms")
    return {name: made[name] for name in order}


def claims(collected: Collected) -> list[Claim]:
    """Of each network: how far coefficients move, where most, when; and what was learned."""
    assert collected.metrics is not None
    moved, made = _movement(collected.frame), list[Claim]()
    for model in _models(collected):
        table = _part(moved, "model", model)
        made += [_after(model, table, name) for name in CONVENTIONS]
        made += [_during(model, table, name) for name in CONVENTIONS]
        made += [_never_extreme(model, collected.frame), _where(model, table), _when(model, table)]
    return [*made, _accuracy(collected)]


def answer(collected: Collected) -> str:
    """The movement of both, and their accuracies."""
    assert collected.metrics is not None
    moved, parts = _movement(collected.frame), []
    accuracy = _accuracies(collected.metrics)
    for model in _models(collected):
        unit, change = _farthest(_last(_part(moved, "model", model)))
        parts.append(
            f"{model} reaches {100 * mean(accuracy[model]).value:.1f} % test accuracy; the unit that moved most, "
            f"{unit}, ends at 10^{change.value:+.2f} times the GSC that it began with; the standard deviation of log10 "
            "GSC between runs, averaged over units, goes from {:.2f} to {:.2f}".format(*_apart(collected.frame, model))
        )
    least, most = (
        10.0 ** getattr(collected.frame.query("quantity == 'gsc'")["log10_value"], end)() for end in ("min", "max")
    )
    return f"{'. '.join(parts)}. All GSC of both, at every record, lie between {least:.2g} and {most:.2g}."


def _models(collected: Collected) -> list[str]:
    return [str(model) for model in collected.frame["model"].unique()]


def _movement(frame: pd.DataFrame) -> pd.DataFrame:
    """log10 GSC minus that at step 0: a row for each (model, layer, step), a column a seed."""
    table = _logarithms(frame)
    return table - table.groupby(level=["model", "layer"], sort=False).transform("first")


def _logarithms(frame: pd.DataFrame) -> pd.DataFrame:
    """log10 GSC of all units but the last, whose own is always 1, in rows and columns as above."""
    rows = frame[(frame["quantity"] == "gsc") & (frame["depth_from_output"] > 0)].sort_values("step", kind="stable")
    return rows.pivot_table(
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


def _after(model: str, table: pd.DataFrame, convention: str) -> Claim:
    last = CONVENTIONS[convention] * _last(table)
    unit, change = _farthest(last)
    return Claim(
        f"After training the {convention} of every unit of {model} is within one order of magnitude of that before",
        _within(list(_means(last).values())),
        f"{len(last)} units, the farthest is {unit} with log10 changed by {change:.2f}",
    )


def _during(model: str, table: pd.DataFrame, convention: str) -> Claim:
    moved = CONVENTIONS[convention] * table[table.index.get_level_values("step") > 0]
    (unit, step), change = _farthest(moved)
    found = list(_means(moved).values())
    loosest = max(found, key=lambda one: max(abs(one.low), abs(one.high)))
    return Claim(
        f"The {convention} of {model} is within one order of magnitude of that before at every record during training",
        _within(found),
        f"{len(found)} intervals, the farthest mean is that of {unit} at step {step}, {change:.2f}; the farthest end "
        f"of an interval belongs to {loosest:.2f}",
    )


def _never_extreme(model: str, frame: pd.DataFrame) -> Claim:
    values = frame[(frame["quantity"] == "gsc") & (frame["model"] == model)]["log10_value"]
    return Claim(
        f"GSC of {model} passes the monitor's threshold of 10^{EXTREME_LOG10:g}, up or down, at no record",
        bool(values.abs().max() < EXTREME_LOG10),
        f"log10 GSC between {values.min():.2f} and {values.max():.2f}, {len(values)} values",
    )


def _where(model: str, table: pd.DataFrame) -> Claim:
    last = _last(table)
    farthest = {seed: str(last[seed].abs().idxmax()) for seed in last}
    return Claim(
        f"The unit of {model} that has moved most by the end is the same in every run",
        len(set(farthest.values())) == 1,
        ", ".join(f"{unit} by {last[seed][unit]:+.2f}" for seed, unit in farthest.items()),
    )


def _when(model: str, table: pd.DataFrame) -> Claim:
    """The path of log10 GSC of the input: is more than half of it gone in the first quarter of the steps?"""
    path = _part(table, "layer", "input").diff().abs()
    early = path[path.index <= path.index.max() / 4].sum() / path.sum()
    part = mean(early)
    return Claim(
        f"Most of the movement of the input's GSC of {model} happens in the first quarter of training",
        True if part.low > 0.5 else False if part.high < 0.5 else None,
        f"part of the length of its path {part:.2f}",
    )


def _accuracies(metrics: pd.DataFrame) -> dict[str, pd.Series]:
    """The last test accuracy of each run, by model and seed."""
    last = metrics[metrics["test_accuracy"].notna()].groupby(["model", "seed"], observed=True)["test_accuracy"].last()
    return {str(model): last.xs(model, level="model") for model in last.index.get_level_values("model").unique()}


def _accuracy(collected: Collected) -> Claim:
    assert collected.metrics is not None
    found = _accuracies(collected.metrics)
    (a, first), (b, second) = found.items()
    difference = mean(100 * (second - first))
    return Claim(
        f"{b} reaches another test accuracy than {a} with this recipe",
        True if difference.low > 0 or difference.high < 0 else None,
        f"{a} {mean(100 * first):.1f} %, {b} {mean(100 * second):.1f} %, difference {difference:.1f}",
    )
