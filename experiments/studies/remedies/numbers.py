"""Numbers of the study of remedies, read from its frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.evidence.means import geometric_mean, mean
from experiments.evidence.rank_correlation import RankCorrelation, rank_correlation
from experiments.studies.remedies import measurement
from experiments.studies.remedies.measurement import BASELINES, NONE
from gradscope.coefficients.growth import fit_growth

FloatArray = npt.NDArray[np.float64]

REMEDIES = {
    NONE: "as it is", "wider": "wider", "residual": "residual", "batch": "batch norm", "layer": "layer norm",
    "plain": "plain", "he": "he", "lecun": "lecun", "xavier": "xavier", "orthogonal": "orthogonal",
    "critical": "critical", "lsuv": "LSUV", "looks_linear": "looks linear",
}  # fmt: skip
NAMES = {"tanh_large": "tanh with large weights", "relu_batch": "relu+batch", "selu": "selu"}
# Of weights mean field knows the variance alone, and batch normalization takes that away, too.  For tanh chi_1 = 1
# without biases is lecun's variance 1; for SELU, variance 1 is what it is made for and the length LSUV sets.
TWINS = {
    "tanh_large": {"orthogonal": "lecun", "critical": "lecun"},
    "relu_batch": {"xavier": NONE, "orthogonal": NONE, "lsuv": NONE},
    "selu": {"orthogonal": NONE, "lsuv": NONE},
}
MEASURES = {"nonlinearity": "the outputs", "last_layer": "the last layer", "nlc": "NLC"}
# The square of NLC is GSC but for the mean of the outputs, so growth cannot be tested against it.
TESTED = ("nonlinearity", "last_layer")
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

    @property
    def affine(self) -> bool:
        """Whether it is an affine map up to rounding, in all seeds."""
        return bool((self.nonlinearity < ROUNDING).all())


Outcomes = dict[str, dict[str, Outcome]]


def outcomes(frame: pd.DataFrame) -> Outcomes:
    """By baseline and remedy, in the order of `REMEDIES`."""
    batch_size = int(frame["batch_size"].iloc[0])
    by_case = {str(case): rows for case, rows in frame.groupby("case", sort=False, observed=True)}
    return {
        baseline: {
            remedy: _outcome(by_case[f"{baseline}-{remedy}"], measurement.rate(f"{baseline}-{remedy}", batch_size))
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


def remedies_of(baseline: str, by_remedy: dict[str, Outcome]) -> list[str]:
    """Those of a network that are remedies of their own: not the network as it is, and no twins."""
    return [remedy for remedy in by_remedy if remedy != NONE and remedy not in TWINS[baseline]]


def level(outcome: Outcome, measure: str) -> float:
    """The mean over seeds of a measure of nonlinearity; geometric but for that of the outputs, which may be 0."""
    values = getattr(outcome, measure)
    return mean(values).value if measure == "nonlinearity" else geometric_mean(values).value


def correlation(baseline: str, by_remedy: dict[str, Outcome], measure: str) -> RankCorrelation:
    """Of log10 GSC and nonlinearity, means over seeds, over the network as it is and with every remedy of its own."""
    own = [by_remedy[remedy] for remedy in (NONE, *remedies_of(baseline, by_remedy))]
    return rank_correlation([outcome.total.mean() for outcome in own], [level(outcome, measure) for outcome in own])


def left(outcome: Outcome) -> str:
    """The part of the outputs' variance that is not affine, in a few letters."""
    return f"below {ROUNDING:g}" if outcome.affine else f"{mean(outcome.nonlinearity):.2f}"


def percent(outcome: Outcome) -> str:
    """The same rounded to percent."""
    return f"{100 * (0.0 if outcome.affine else outcome.nonlinearity.mean()):.0f} %"


def theory_of(outcome: Outcome) -> str:
    """The rate of mean field, or nothing where it has none."""
    return "" if math.isnan(outcome.theory) else f"{outcome.theory:.4f}"
