"""How often signals fire before failures and in runs that do not fail (controls).

A signal is a quantity with a threshold. The signal fires at the first step at which the quantity exceeds the threshold.
Runs with equal configurations up to the seed (a cell) resemble each other, so all intervals resample whole cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.evidence.counts import FloatArray, Median, Part, draws, interval, median, part, ratio
from experiments.evidence.means import verdict
from experiments.evidence.words import measured
from gradscope.monitor.alarms import FEWEST, RECENT


@dataclass(frozen=True)
class Between:
    """A number with its 95 % interval by resampling cells."""

    value: float
    low: float
    high: float

    def above(self, limit: float) -> bool | None:
        """Whether the number is greater than ``limit``; None if the interval contains ``limit``."""
        return verdict(self.low > limit, self.high < limit)

    def __str__(self) -> str:
        return measured(self.value, self.low, self.high)


@dataclass(frozen=True)
class Alarms:
    """Runs with the step at which each signal fires, and resamples of these runs.

    Arguments:
        table: One row per run, with the columns failure_step and first_SIGNAL (inf means never).
        drawn: How often each resample contains each run, as an array (resamples, runs).
        signals: The names of the signals.
    """

    table: pd.DataFrame
    drawn: FloatArray
    signals: tuple[str, ...]

    @classmethod
    def resampled(
        cls, table: pd.DataFrame, signals: Iterable[str], cell: list[str], *, generator: np.random.Generator
    ) -> Self:
        """Alarms of a table with resampled cells. Runs whose index agrees in the levels ``cell`` form a cell."""
        cells = table.groupby(level=cell, observed=True).ngroup()
        return cls(table, draws(cells, generator=generator), tuple(signals))

    @cached_property
    def leads(self) -> pd.DataFrame:
        """Steps from each signal to the failure, one row per failing run; NaN if the signal did not fire before."""
        return leads(self.table, self.signals)

    @cached_property
    def false(self) -> pd.DataFrame:
        """Whether each signal fired in each control."""
        return quiet(self.table, self.signals)

    @property
    def fired(self) -> list[str]:
        """Signals that fired in a control or before a failure. The data cannot judge signals that never fired."""
        return [name for name in self.signals if self.leads[name].notna().any() or self.false[name].any()]

    def part(self, which: pd.Series) -> Part:
        """The proportion of runs for which ``which`` is True, with its interval."""
        return part(which, self.drawn_of(which.index))

    def median(self, values: pd.Series) -> Median:
        """The median over runs whose value is not NaN, with its interval."""
        known = values.dropna()
        return median(known, self.drawn_of(known.index))

    def announced(self, values: pd.Series) -> Part:
        """The proportion of failing runs whose failure is announced, that is, whose lead is not NaN."""
        return self.part(values.notna())

    def typical(self, values: pd.Series) -> str:
        """The median over runs in words, such as ``5 steps (3 to 8)``; "none" if every value is NaN."""
        return f"{self.median(values):steps}" if values.notna().any() else "none"

    def false_alarms(self, name: str) -> Part:
        """The proportion of controls in which a signal fires."""
        return self.part(self.false[name])

    def matched(self, name: str) -> Between:
        """Fraction of pairs (control, failing run) in which the signal fires before the step of the failure.

        This is the rate of false alarms if each control is monitored only for as long as a failing run.
        """
        pairs, controls, failing = self._pairs(name)
        resampled = _pair_means(pairs, controls, failing)
        return Between(float(pairs.mean()) if pairs.size else np.nan, *interval(resampled))

    def advantage(self, name: str) -> Between:
        """Fraction of failures that the signal announces, minus `matched`."""
        pairs, controls, failing = self._pairs(name)
        warned = self.leads[name].notna().to_numpy()
        hits = ratio(failing @ warned, failing.sum(axis=1))
        value = warned.mean() - pairs.mean() if pairs.size else np.nan
        return Between(float(value), *interval(hits - _pair_means(pairs, controls, failing)))

    def reliable(self, limit: float) -> dict[str, bool | None]:
        """Whether the rate of false alarms of each signal is below ``limit``; None if undecided."""
        found = {name: self.false_alarms(name).interval for name in self.fired}
        return {name: verdict(high < limit, low > limit) for name, (low, high) in found.items()}

    def drawn_of(self, index: pd.Index) -> FloatArray:
        """How often each resample draws the runs of an index, shape (resamples, runs)."""
        return self.drawn[:, self.table.index.get_indexer(index)]

    def _pairs(self, name: str) -> tuple[npt.NDArray[np.bool_], FloatArray, FloatArray]:
        """Whether the signal fires in a control (row) before a run (column) fails, and how often each run is drawn."""
        first = self.table.loc[self.false.index, f"first_{name}"].to_numpy()
        failed = self.table.loc[self.leads.index, "failure_step"].to_numpy()
        return first[:, None] < failed[None, :], self.drawn_of(self.false.index), self.drawn_of(self.leads.index)


def _pair_means(pairs: npt.NDArray[np.bool_], rows: FloatArray, columns: FloatArray) -> FloatArray:
    """The mean over the pairs of each resample; NaN for a resample without pairs."""
    over = ((rows @ pairs) * columns).sum(axis=1)
    return ratio(over, rows.sum(axis=1) * columns.sum(axis=1))


def leads(found: pd.DataFrame, signals: Iterable[str], end: str = "failure_step") -> pd.DataFrame:
    """Steps from each signal to ``end``; NaN if the signal did not fire before the failure."""
    ended = found[np.isfinite(found[end])]
    firsts = _firsts(ended, signals)
    return firsts.rsub(ended[end], axis=0).where(firsts.lt(ended["failure_step"], axis=0))


def quiet(found: pd.DataFrame, signals: Iterable[str]) -> pd.DataFrame:
    """Whether each signal fired, one row per run that did not fail."""
    return _firsts(found[~np.isfinite(found["failure_step"])], signals).apply(np.isfinite)


def _firsts(found: pd.DataFrame, signals: Iterable[str]) -> pd.DataFrame:
    return found[[f"first_{name}" for name in signals]].set_axis(list(signals), axis=1)


def first_steps(passed: Mapping[str, pd.Series], keys: list[str]) -> pd.DataFrame:
    """The first step at which each condition holds, inf if never, with one row per run.

    ``passed`` holds one truth value per run and step, with an index of ``keys`` and "step".
    """
    steps = {
        name: pd.Series(where.index.get_level_values("step"), where.index, float) for name, where in passed.items()
    }
    first = pd.DataFrame({name: steps[name].where(where, math.inf) for name, where in passed.items()})
    return first.groupby(level=keys, observed=True).min()


def by_layer(frame: pd.DataFrame, quantity: str, index: pd.Index, keys: list[str]) -> pd.DataFrame:
    """One column per layer. A value that is missing after the first record was not finite, so it becomes infinite."""
    rows = frame[frame["quantity"] == quantity]
    table = rows.pivot_table(index=[*keys, "step"], columns="layer", values="value", observed=True).reindex(index)
    began = table.notna().groupby(level=keys, observed=True).cummax()
    return table.mask(table.isna() & began, math.inf)


def jump(values: pd.Series, keys: list[str]) -> pd.Series:
    """Values divided by the median of previous values in the same run, as `gs.Monitor` computes jumps."""
    runs = values.groupby(level=keys, observed=True)
    return values / runs.transform(lambda run: run.shift(1).rolling(RECENT, min_periods=FEWEST).median()).clip(1e-12)
