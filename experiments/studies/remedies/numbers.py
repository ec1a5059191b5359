"""Growth and nonlinearity of every network, read from the frame of the study remedies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.evidence import means
from experiments.evidence.means import Mean
from experiments.evidence.rank_correlation import RankCorrelation, rank_correlation
from experiments.studies.remedies import measurement
from experiments.studies.remedies.measurement import BASELINES, NONE
from gradscope.coefficients.growth import fit_growth

FloatArray = npt.NDArray[np.float64]

REMEDIES = {
    NONE: "unchanged", "wider": "wider", "residual": "residual", "batch": "batch norm", "layer": "layer norm",
    "plain": "plain", "he": "he", "lecun": "lecun", "xavier": "xavier", "orthogonal": "orthogonal",
    "critical": "critical", "lsuv": "LSUV", "looks_linear": "looks linear",
}  # fmt: skip
NAMES = {"tanh_large": "tanh with large weights", "relu_batch": "relu+batch", "selu": "selu"}
# Remedies that repeat another network in mean field, where only the variance of weights matters.  For tanh without
# biases, chi_1 = 1 needs the variance 1 of lecun. Batch normalization cancels the variance. For SELU, orthogonal and
# LSUV keep the variance.
TWINS = {
    "tanh_large": {"orthogonal": "lecun", "critical": "lecun"},
    "relu_batch": {"xavier": NONE, "orthogonal": NONE, "lsuv": "orthogonal"},
    "selu": {"orthogonal": NONE, "lsuv": NONE},
}
# Repetitions that hold at every width: these weights have the same distribution, up to a scale that a norm cancels.
EXACT = {("tanh_large", "critical"), ("relu_batch", "xavier"), ("relu_batch", "lsuv")}
MEASURES = {"nonlinearity": "the outputs", "last_layer": "the last layer", "nlc": "NLC"}
# NLC is not tested: its square would be GSC if the outputs had mean 0.
TESTED = ("nonlinearity", "last_layer")
# Upper limit of the linear fit error of an affine map in float32.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Outcome:
    """log10 GSC from input to output, rate and nonlinearity of one network, per seed, and the mean-field rate."""

    total: FloatArray
    rate: FloatArray
    nonlinearity: FloatArray
    last_layer: FloatArray
    nlc: FloatArray
    theory: float

    @property
    def affine(self) -> bool:
        """Whether the network is an affine map up to rounding, for all seeds."""
        return bool((self.nonlinearity < ROUNDING).all())


Outcomes = dict[str, dict[str, Outcome]]


def outcomes(frame: pd.DataFrame) -> Outcomes:
    """The `Outcome` of every baseline and remedy, with remedies in the order of `REMEDIES`."""
    batch_size = int(frame["batch_size"].iloc[0])
    by_case = {str(case): rows for case, rows in frame.groupby("case", sort=False, observed=True)}
    found: Outcomes = {baseline: {} for baseline in BASELINES}
    for baseline, by_remedy in found.items():
        for remedy in REMEDIES:
            if (case := f"{baseline}-{remedy}") in by_case:
                by_remedy[remedy] = _outcome(by_case[case], measurement.rate(case, batch_size))
    return found


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
    """The remedies of a network, without "none" and without remedies that repeat another network."""
    return [remedy for remedy in by_remedy if remedy != NONE and remedy not in TWINS[baseline]]


def level(outcome: Outcome, measure: str) -> Mean:
    """Mean over seeds of a measure of nonlinearity: geometric, except for the outputs, whose nonlinearity may be 0."""
    values = getattr(outcome, measure)
    return means.mean(values) if measure == "nonlinearity" else means.geometric_mean(values)


def correlation(baseline: str, by_remedy: dict[str, Outcome], measure: str) -> RankCorrelation:
    """Rank correlation of log10 GSC and nonlinearity (means over seeds) over the unchanged network and remedies."""
    own = [by_remedy[remedy] for remedy in (NONE, *remedies_of(baseline, by_remedy))]
    return rank_correlation(
        [outcome.total.mean() for outcome in own], [level(outcome, measure).value for outcome in own]
    )
