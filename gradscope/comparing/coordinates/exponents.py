"""Exponents: slopes of log length against log size, with intervals over seeds, and their verdicts.

Estimator, for a length r of seed i at size s: beta_i is the slope of the least-squares line of log r against log s,
and the exponent is the mean of beta_i over the seeds.  Its interval is Student's t over the seeds.  Its population is
random initializations, on the given batch and at the given sizes.

Verdicts compare the interval with the prediction plus and minus a margin (doubled for GSC, which is a square).
"agrees": the 95 % interval lies inside.  It is not corrected for the number of exponents, because all must agree.
"differs": the interval lies outside, also after Bonferroni's correction for all predicted exponents.  Otherwise
"undecided".
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import special

from gradscope.comparing.coordinates.measurement import ACTIVATION, CHANGE, EFFECT, GSC
from gradscope.comparing.coordinates.parametrizations import DEPTH, DIFFERS, UNJUDGED, Expectation

LEVEL = 0.95
KEYS = ["axis", "layer", "quantity", "step"]
FORWARD = [EFFECT, ACTIVATION, CHANGE]  # known before the backward pass, in this order for each layer


def slopes(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per axis, layer, quantity and step: ``exponent``, ``stderr``, ``low``, ``high``, and ``zero``.

    ``zero`` says that the length is zero in every network; it has no exponent then, nor if it is zero in some.
    """
    rows = []
    for key, part in frame.groupby(KEYS, sort=False):
        table = part.pivot(index="seed", columns="size", values="log10_value").to_numpy()
        x = np.log10(np.sort(part["size"].unique()).astype(float))
        finite = np.isfinite(table).all()
        own = np.polyfit(x, table.T, 1)[0] if finite else np.full(len(table), np.nan)
        error = own.std(ddof=1) / math.sqrt(len(own))
        half = quantile(len(own), 1) * error
        mean = own.mean()
        row = dict(zip(KEYS, key, strict=True)) | {"index": part["index"].iloc[0], "role": part["role"].iloc[0]}
        zero = bool(np.isneginf(table).all())
        rows.append(row | {"exponent": mean, "stderr": error, "low": mean - half, "high": mean + half, "zero": zero})
    return pd.DataFrame(rows)


def quantile(num_seeds: int, num_intervals: int) -> float:
    """Student's t for intervals that hold together with probability 95 %."""
    return float(special.stdtrit(num_seeds - 1, 1 - (1 - LEVEL) / 2 / num_intervals))


def judged(
    table: pd.DataFrame, expectations: list[Expectation | None], seeds: int, steps: int, margin: float
) -> pd.DataFrame:
    """Return the table of `slopes` with the columns ``expected`` and ``verdict``, in the order of the computation.

    A length of zero has no verdict, because zero is a common initialization.  Exception: a layer that is unchanged
    after the last step differs.
    """
    factor = quantile(seeds, max(1, sum(e is not None for e in expectations)))
    verdicts = []
    for row, expectation in zip(table.to_dict("records"), expectations, strict=True):
        if expectation is None:
            verdicts.append(UNJUDGED)
        elif row["zero"]:
            verdicts.append(DIFFERS if row["quantity"] in (CHANGE, EFFECT) and row["step"] == steps else UNJUDGED)
        else:
            half = factor * row["stderr"]
            cautious = row["exponent"] - half, row["exponent"] + half
            allowed = margin * (2 if row["quantity"] == GSC else 1)  # GSC is the square of a ratio of lengths
            verdicts.append(expectation.verdict((row["low"], row["high"]), cautious, allowed))
    table = table.assign(expected=[str(e or "") for e in expectations], verdict=verdicts)
    forward = table["quantity"].isin(FORWARD)
    order = table.assign(
        place=np.where(forward, table["index"], -table["index"]),
        kind=table["quantity"].map({quantity: place for place, quantity in enumerate(FORWARD)}),
        backward=~forward,
        depth=table["axis"] == DEPTH,
    ).sort_values(["depth", "step", "backward", "place", "kind"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)
