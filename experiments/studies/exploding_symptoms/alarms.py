"""How often signals fire: before failures, in runs that do not fail (controls), and in equally long parts of controls.

Runs of one network at one learning rate (a cell) resemble each other, so all intervals resample cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.evidence.counts import FloatArray, Median, Part, draws, interval, median, part, ratio
from experiments.evidence.means import verdict
from experiments.evidence.words import measured
from experiments.studies.exploding_symptoms.signals import THRESHOLDS, leads, quiet, runs

CELL = ["model", "lr"]


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
    """A table of `signals.runs`, and how often each resample draws each run: an array (resamples, runs)."""

    table: pd.DataFrame
    drawn: FloatArray

    @classmethod
    def of(cls, frame: pd.DataFrame, *, generator: np.random.Generator) -> Alarms:
        """Alarms of the runs in a frame that `signals.condensed` returned."""
        table = runs(frame)
        cells = table.groupby(level=CELL, observed=True).ngroup()
        return cls(table, draws(cells, generator=generator))

    @cached_property
    def leads(self) -> pd.DataFrame:
        """Steps from each signal to the failure, for failing runs; NaN for a signal that did not fire earlier."""
        return leads(self.table)

    @cached_property
    def false(self) -> pd.DataFrame:
        """Whether each signal fired in each control."""
        return quiet(self.table)

    @property
    def fired(self) -> list[str]:
        """Signals that fired at least once in a control or before a failure. The data say nothing about the others."""
        return [name for name in THRESHOLDS if self.leads[name].notna().any() or self.false[name].any()]

    def part(self, which: pd.Series) -> Part:
        """The proportion of runs for which ``which`` is True, with its interval."""
        return part(which, self._drawn(which.index))

    def median(self, values: pd.Series) -> Median:
        """The median over runs whose value is not NaN, with its interval."""
        known = values.dropna()
        return median(known, self._drawn(known.index))

    def announced(self, values: pd.Series) -> Part:
        """The proportion of failing runs whose failure is announced, that is, whose lead is not NaN."""
        return self.part(values.notna())

    def typical(self, values: pd.Series) -> str:
        """The median of the leads, in words."""
        return f"{self.median(values)} steps" if values.notna().any() else "none"

    def false_alarms(self, name: str) -> Part:
        """The proportion of controls in which a signal fires."""
        return self.part(self.false[name])

    def matched(self, name: str) -> Between:
        """Fraction of pairs (control, failing run): the signal fires in the control before the failing run fails."""
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

    def ranking(self, models: npt.ArrayLike) -> Between | None:
        """Fraction of pairs (failing run, control) in which the failing run has the larger GSC at step 0.

        Runs of a pair have equal learning rate and seed. This is the area under the ROC curve, or None without pairs.
        """
        own = self.table[self.table.index.get_level_values("model").isin(np.asarray(models))]
        drawn, start = self._drawn(own.index), own["log10_gsc_at_start"].to_numpy()
        bad = np.isfinite(own["failure_step"].to_numpy())
        places = [own.index.get_level_values(name).to_numpy() for name in ("lr", "seed")]
        alike = np.logical_and.reduce([place[bad][:, None] == place[~bad][None, :] for place in places])
        first, second = np.nonzero(alike)
        if not len(first):
            return None
        wins = (np.sign(start[bad][first] - start[~bad][second]) + 1) / 2
        times = drawn[:, bad][:, first] * drawn[:, ~bad][:, second]
        return Between(float(wins.mean()), *interval(ratio(times @ wins, times.sum(axis=1))))

    def _drawn(self, index: pd.Index) -> FloatArray:
        return self.drawn[:, self.table.index.get_indexer(index)]

    def _pairs(self, name: str) -> tuple[npt.NDArray[np.bool_], FloatArray, FloatArray]:
        """Whether the signal fires in a control (row) before a run (column) fails, and how often each run is drawn."""
        first = self.table.loc[self.false.index, f"first_{name}"].to_numpy()
        failed = self.table.loc[self.leads.index, "failure_step"].to_numpy()
        return first[:, None] < failed[None, :], self._drawn(self.false.index), self._drawn(self.leads.index)


def _pair_means(pairs: npt.NDArray[np.bool_], rows: FloatArray, columns: FloatArray) -> FloatArray:
    """The mean over the pairs of each resample; NaN for a resample without pairs."""
    over = ((rows @ pairs) * columns).sum(axis=1)
    return ratio(over, rows.sum(axis=1) * columns.sum(axis=1))
