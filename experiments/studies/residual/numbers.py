"""Numbers of the study of skip connections, read from its frame."""

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

# Growth a block is compared between the last two of these and the first two; counted in blocks from the stem.
WINDOW = (8, 32, 100)
NARROW_WIDTH = 100
NARROW = f"-{NARROW_WIDTH}"
# Cases of a branch whose single blocks are held against the law, and their words.
CASES = {k: f"k = {k}" for k in DILUTIONS[1:]} | {UNIT: "unit skips", f"4{NARROW}": f"k = 4 at width {NARROW_WIDTH}"}


def _late_over_early(begin: Any, middle: Any, end: Any) -> Any:
    early, late = (middle - begin) / (WINDOW[1] - WINDOW[0]), (end - middle) / (WINDOW[2] - WINDOW[1])
    return late / early


# Late over early of a power of the depth; an exponential has 1.
POWER = float(_late_over_early(*np.log(WINDOW)))


def name(branch: str) -> str:
    """``relu+batch`` of ``relu_batch``."""
    return branch.replace("_", "+")


def rates(frame: pd.DataFrame, branch: str, dilution: str) -> FloatArray:
    """GSC a block over the half nearer the output, a seed each."""
    rows = frame[(frame["case"] == f"{branch}-{dilution}") & (frame["quantity"] == "gsc")]
    table = rows.pivot_table(index="seed", columns="depth_from_output", values="log10_value", observed=True)
    return np.array([fit_growth(values, table.columns.to_numpy()).rate for values in table.to_numpy()])


def exponents(frame: pd.DataFrame, branch: str) -> FloatArray:
    """d log GSC / d log depth over the later part of the window with unit skips, a seed each."""
    values = from_stem(frame, f"{branch}-{UNIT}")
    middle, last = (values[:, measurement.REACHED.index(number)] for number in WINDOW[1:])
    return np.asarray((last - middle) / math.log10(WINDOW[2] / WINDOW[1]))


def block_rates(frame: pd.DataFrame, case: str, stage: str = "stage") -> FloatArray:
    """Factor a block of a ResNet, or one stage of it, from the last block to the first, a seed each."""
    rows = frame[(frame["case"] == case) & (frame["quantity"] == "gsc") & frame["layer"].str.startswith(stage)]
    values = rows.pivot_table(index="seed", columns="index", values="log10_value", observed=True).to_numpy()
    return np.asarray(10 ** ((values[:, 0] - values[:, -1]) / (values.shape[1] - 1)))


def block_totals(frame: pd.DataFrame, case: str) -> FloatArray:
    """log10 GSC from the first block of a ResNet to the last, a seed each."""
    num = frame.loc[(frame["case"] == case) & frame["layer"].str.startswith("stage"), "layer"].nunique()
    return np.asarray((num - 1) * np.log10(block_rates(frame, case)))


def flattening(frame: pd.DataFrame, case: str) -> FloatArray:
    """Growth of log GSC a block in the last stage of a ResNet over that in the first, a seed each."""
    first, last = (np.log(block_rates(frame, case, stage)) for stage in ("stage1", "stage3"))
    return np.asarray(last / first)


def factors_by_stage(frame: pd.DataFrame, case: str) -> str:
    """The mean factor a block of a ResNet in each of its stages, in words."""
    factors = [block_rates(frame, case, f"stage{number}").mean() for number in (1, 2, 3)]
    return ", ".join(f"{factor:.2f}" for factor in factors)


def branch_rate(frame: pd.DataFrame, branch: str) -> float:
    """r of mean field at the batch size of the study."""
    return measurement.rate(branch, int(frame["batch_size"].iloc[0]))


@cache
def _law(branch: str, dilution: str, batch_size: int) -> FloatArray:
    return measurement.law(branch, dilution, max(measurement.REACHED), batch_size)


def expected(frame: pd.DataFrame, branch: str, dilution: str) -> FloatArray:
    """log10 GSC from the stem to every block by the law."""
    return _law(branch, dilution, int(frame["batch_size"].iloc[0]))


def expected_exponent(frame: pd.DataFrame, branch: str) -> float:
    """What `exponents` should be by the law."""
    values = expected(frame, branch, UNIT)
    return float((values[WINDOW[2]] - values[WINDOW[1]]) / math.log10(WINDOW[2] / WINDOW[1]))


def expected_steadiness(frame: pd.DataFrame, branch: str, dilution: str) -> float:
    """What `steadiness` should be by the law."""
    return float(_late_over_early(*expected(frame, branch, dilution)[list(WINDOW)]))


def from_stem(frame: pd.DataFrame, case: str) -> FloatArray:
    """log10 GSC from the stem to the blocks of `skips.REACHED`, (seeds, blocks)."""
    rows = frame[(frame["case"] == case) & (frame["quantity"] == "gsc_from_stem")]
    return rows.pivot_table(index="seed", columns="depth_from_output", values="log10_value", observed=True).to_numpy()


def steadiness(frame: pd.DataFrame, case: str) -> FloatArray:
    """Growth of log GSC a block in the later part of the window over that in the earlier, a seed each."""
    values = from_stem(frame, case)
    return np.asarray(_late_over_early(*(values[:, measurement.REACHED.index(number)] for number in WINDOW)))


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


def block_excess(table: pd.DataFrame, case: str) -> FloatArray:
    """Of `single_blocks`: how much the GSC of the blocks of a case exceeds 1, over what it should by the law; both are
    summed over blocks, a seed each."""
    sums = (table.loc[case, ["block_gsc", "law"]] - 1).groupby(level="seed").sum()
    return (sums["block_gsc"] / sums["law"]).to_numpy()
