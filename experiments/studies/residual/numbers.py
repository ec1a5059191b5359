"""Rates, exponents and values of GSC - 1, read from the frame of the study residual."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.studies.residual import measurement
from experiments.studies.residual.measurement import DILUTIONS, UNIT
from gradscope.coefficients.growth import fit_growth

FloatArray = npt.NDArray[np.float64]

# The law holds if GSC - 1 or a growth has at most this relative error.  A smaller tolerance would be of no use: finite
# width changes GSC - 1 by about half of this tolerance (tanh+layer against mean field, without a skip).
TOLERANCE = 0.1
# Late growth (between the last two of these blocks, counted from the stem) is compared with early growth (between the
# first two).
WINDOW = (8, 32, 100)
NARROW_WIDTH = 100
NARROW = f"-{NARROW_WIDTH}"
# The skips whose single blocks are compared with the law, and the label of each skip.
CASES = {k: f"k = {k}" for k in DILUTIONS[1:]} | {UNIT: "unit skips", f"4{NARROW}": f"k = 4 at width {NARROW_WIDTH}"}


def _exponent(_: Any, middle: Any, end: Any) -> Any:
    return (end - middle) / math.log10(WINDOW[2] / WINDOW[1])


def _late_over_early(begin: Any, middle: Any, end: Any) -> Any:
    early, late = (middle - begin) / (WINDOW[1] - WINDOW[0]), (end - middle) / (WINDOW[2] - WINDOW[1])
    return late / early


# Late growth divided by early growth for a power of the depth. For an exponential, this ratio is 1.
POWER = float(_late_over_early(*np.log(WINDOW)))


def name(branch: str) -> str:
    """``relu+batch`` for ``relu_batch``."""
    return branch.replace("_", "+")


def profile(frame: pd.DataFrame, case: str, quantity: str = "gsc", columns: str = "depth_from_output") -> pd.DataFrame:
    """log10 values of a network (``case``), with one row per seed."""
    rows = frame[(frame["case"] == case) & (frame["quantity"] == quantity)]
    return rows.pivot_table(index="seed", columns=columns, values="log10_value", observed=True)


def rates(frame: pd.DataFrame, branch: str, dilution: str) -> FloatArray:
    """Growth rates of GSC per block by `fit_growth`, one per seed."""
    table = profile(frame, f"{branch}-{dilution}")
    return np.array([fit_growth(values, table.columns.to_numpy()).rate for values in table.to_numpy()])


def from_stem(frame: pd.DataFrame, case: str) -> FloatArray:
    """log10 GSC from the stem to the blocks in `measurement.REACHED`, as an array of shape (seeds, blocks)."""
    return profile(frame, case, "gsc_from_stem").to_numpy()


def _in_window(frame: pd.DataFrame, case: str) -> FloatArray:
    """log10 GSC from the stem to the blocks in `WINDOW`, as an array of shape (3, seeds)."""
    return from_stem(frame, case).T[[measurement.REACHED.index(number) for number in WINDOW]]


def exponents(frame: pd.DataFrame, branch: str) -> FloatArray:
    """d log GSC / d log depth with unit skips, over the later part of `WINDOW`, one per seed."""
    return np.asarray(_exponent(*_in_window(frame, f"{branch}-{UNIT}")))


def steadiness(frame: pd.DataFrame, case: str) -> FloatArray:
    """Growth of log GSC per block in the later part of `WINDOW`, divided by growth in the earlier part, by seed."""
    return np.asarray(_late_over_early(*_in_window(frame, case)))


def ratios(frame: pd.DataFrame, branch: str, dilution: str, width: str = "") -> FloatArray:
    """(rate - 1) (k^2 + 1), divided by rate - 1 without a skip, one per seed."""
    plain, found = (rates(frame, branch, case + width) for case in ("0", dilution))
    return np.asarray((found - 1) * (float(dilution) ** 2 + 1) / (plain - 1))


def block_growth(frame: pd.DataFrame, case: str, stage: str) -> FloatArray:
    """log10 of the growth factor of GSC per block, from the last to the first block of a ResNet stage, one per seed."""
    values = profile(frame, case, columns="layer").filter(like=stage).to_numpy()
    return np.asarray((values[:, 0] - values[:, -1]) / (values.shape[1] - 1))


def block_totals(frame: pd.DataFrame, case: str) -> FloatArray:
    """log10 GSC from the first to the last block of a ResNet, one per seed."""
    values = profile(frame, case, columns="layer").to_numpy()
    return np.asarray(values[:, 0] - values[:, -1])


def flattening(frame: pd.DataFrame, case: str) -> FloatArray:
    """Growth of log GSC per block in the last stage of a ResNet, divided by growth in the first stage, one per seed."""
    return np.asarray(block_growth(frame, case, "stage3") / block_growth(frame, case, "stage1"))


def factors_by_stage(frame: pd.DataFrame, case: str) -> str:
    """The mean growth factor per block in each stage of a ResNet, as text."""
    return ", ".join(f"{(10 ** block_growth(frame, case, f'stage{number}')).mean():.2f}" for number in (1, 2, 3))


def branch_rate(frame: pd.DataFrame, branch: str) -> float:
    """GSC r of the branch without the skip, by mean field at the batch size of the study."""
    return measurement.rate(branch, int(frame["batch_size"].iloc[0]))


@cache
def _law(branch: str, dilution: str, batch_size: int) -> FloatArray:
    return measurement.law(branch, dilution, max(measurement.REACHED), batch_size)


def expected(frame: pd.DataFrame, branch: str, dilution: str) -> FloatArray:
    """log10 GSC from the stem to every block, by the law."""
    return _law(branch, dilution, int(frame["batch_size"].iloc[0]))


def expected_exponent(frame: pd.DataFrame, branch: str) -> float:
    """The exponent that the law predicts; see `exponents`."""
    return float(_exponent(*expected(frame, branch, UNIT)[list(WINDOW)]))


def expected_steadiness(frame: pd.DataFrame, branch: str, dilution: str) -> float:
    """The late growth divided by the early growth that the law predicts; see `steadiness`."""
    return float(_late_over_early(*expected(frame, branch, dilution)[list(WINDOW)]))


def single_blocks(frame: pd.DataFrame, branch: str) -> pd.DataFrame:
    """Dilution, GSC of branch and block, and GSC by the ``law``: one row per case with a skip, seed and block."""
    rows = frame[frame["case"].str.split("-").str[0] == branch]
    rows = rows[rows["quantity"].isin(["dilution", "branch_gsc", "block_gsc"])]
    table = rows.pivot_table(index=["case", "seed", "index"], columns="quantity", values="value", observed=True)
    table = table[table["dilution"] > 0]
    squares = table["dilution"] ** 2
    return table.assign(law=(squares + table["branch_gsc"]) / (squares + 1))


def block_excess(table: pd.DataFrame, case: str) -> FloatArray:
    """Sum of GSC - 1 over the blocks of a network (``case``), divided by the sum that the law gives, one per seed."""
    sums = (table.loc[case, ["block_gsc", "law"]] - 1).groupby(level="seed").sum()
    return (sums["block_gsc"] / sums["law"]).to_numpy()
