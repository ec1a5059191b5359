"""Signals of the study exploding_symptoms as alarms, and how well GSC at step 0 predicts failures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.evidence import alarms
from experiments.evidence.alarms import Between
from experiments.evidence.counts import interval, ratio
from experiments.studies.exploding_symptoms.signals import THRESHOLDS, runs

CELL = ["model", "lr"]


class Alarms(alarms.Alarms):
    """The alarms of the signals of this study."""

    @classmethod
    def of(cls, frame: pd.DataFrame, *, generator: np.random.Generator) -> Alarms:
        """Alarms of the runs in a frame that `signals.condensed` returned."""
        return cls.resampled(runs(frame), THRESHOLDS, CELL, generator=generator)

    def ranking(self, models: npt.ArrayLike) -> Between | None:
        """Fraction of pairs (failing run, control) in which the failing run has the larger GSC at step 0.

        Runs of a pair have equal learning rate and seed. This is the area under the ROC curve, or None without pairs.
        """
        own = self.table[self.table.index.get_level_values("model").isin(np.asarray(models))]
        drawn, start = self.drawn_of(own.index), own["log10_gsc_at_start"].to_numpy()
        bad = np.isfinite(own["failure_step"].to_numpy())
        places = [own.index.get_level_values(name).to_numpy() for name in ("lr", "seed")]
        alike = np.logical_and.reduce([place[bad][:, None] == place[~bad][None, :] for place in places])
        first, second = np.nonzero(alike)
        if not len(first):
            return None
        wins = (np.sign(start[bad][first] - start[~bad][second]) + 1) / 2
        times = drawn[:, bad][:, first] * drawn[:, ~bad][:, second]
        return Between(float(wins.mean()), *interval(ratio(times @ wins, times.sum(axis=1))))
