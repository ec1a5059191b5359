"""Numbers of the study of skip connections, read from its frame."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments import skips
from experiments.skips import UNIT
from experiments.summaries import Mean, mean
from gradscope.growth import fit_growth

FloatArray = npt.NDArray[np.float64]


def rates(frame: pd.DataFrame, branch: str, dilution: str) -> FloatArray:
    """GSC a block over the half nearer the output, a seed each."""
    rows = frame[(frame["case"] == f"{branch}-{dilution}") & (frame["quantity"] == "gsc")]
    table = rows.pivot_table(index="seed", columns="depth_from_output", values="log10_value", observed=True)
    return np.array([fit_growth(values, table.columns.to_numpy()).rate for values in table.to_numpy()])


def exponents(frame: pd.DataFrame, branch: str) -> FloatArray:
    """d log GSC / d log depth from block 32 to block 100 with unit skips, a seed each."""
    values = from_stem(frame, f"{branch}-{UNIT}")
    return np.asarray((values[:, -1] - values[:, skips.REACHED.index(32)]) / math.log10(100 / 32))


def block_rates(frame: pd.DataFrame, case: str, stage: str = "stage") -> FloatArray:
    """Factor a block of a ResNet, or one stage of it, from the last block to the first, a seed each."""
    rows = frame[(frame["case"] == case) & (frame["quantity"] == "gsc") & frame["layer"].str.startswith(stage)]
    values = rows.pivot_table(index="seed", columns="index", values="log10_value", observed=True).to_numpy()
    return np.asarray(10 ** ((values[:, 0] - values[:, -1]) / (values.shape[1] - 1)))


def branch_rate(frame: pd.DataFrame, branch: str) -> float:
    """r of mean field at the batch size of the study."""
    return skips.rate(branch, int(frame["batch_size"].iloc[0]))


@cache
def _law(branch: str, dilution: str, batch_size: int) -> FloatArray:
    return skips.law(branch, dilution, max(skips.REACHED), batch_size)


def expected(frame: pd.DataFrame, branch: str, dilution: str) -> FloatArray:
    """log10 GSC from the stem to every block by the law."""
    return _law(branch, dilution, int(frame["batch_size"].iloc[0]))


def expected_exponent(frame: pd.DataFrame, branch: str) -> float:
    """What `exponents` should be by the law."""
    values = expected(frame, branch, UNIT)
    return float((values[100] - values[32]) / math.log10(100 / 32))


def from_stem(frame: pd.DataFrame, case: str) -> FloatArray:
    """log10 GSC from the stem to the blocks of `skips.REACHED`, (seeds, blocks)."""
    rows = frame[(frame["case"] == case) & (frame["quantity"] == "gsc_from_stem")]
    return rows.pivot_table(index="seed", columns="depth_from_output", values="log10_value", observed=True).to_numpy()


def steadiness(frame: pd.DataFrame, case: str) -> Mean:
    """Growth of log GSC a block between blocks 32 and 100 over that between 8 and 32."""
    values = from_stem(frame, case)
    eighth, middle = skips.REACHED.index(8), skips.REACHED.index(32)
    near, far = (values[:, middle] - values[:, eighth]) / 24, (values[:, -1] - values[:, middle]) / 68
    return mean(far / near)


def ratios(frame: pd.DataFrame, branch: str, dilution: str, width: str = "") -> FloatArray:
    """Excess times k^2 + 1 over that without a skip, a seed each."""
    plain, found = (rates(frame, branch, case + width) for case in ("0", dilution))
    return np.asarray((found - 1) * (float(dilution) ** 2 + 1) / (plain - 1))


def single_blocks(frame: pd.DataFrame, branch: str) -> pd.DataFrame:
    """Of every measured block of a branch, all dilutions above 0: ``dilution``, ``branch_gsc``, ``block_gsc``, ``law``;
    indexed by case, seed and block."""
    rows = frame[frame["case"].str.split("-").str[0] == branch]
    rows = rows[rows["quantity"].isin(["dilution", "branch_gsc", "block_gsc"])]
    table = rows.pivot_table(index=["case", "seed", "index"], columns="quantity", values="value", observed=True)
    table = table[table["dilution"] > 0]
    squares = table["dilution"] ** 2
    return table.assign(law=(squares + table["branch_gsc"]) / (squares + 1))
