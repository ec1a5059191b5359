"""Growth rates of one architecture in several sizes, read from a frame, and intervals that hold together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from experiments.archive import labels
from experiments.evidence.means import Mean, geometric_mean
from gradscope import meanfield as mf
from gradscope.coefficients.growth import fit_growth

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rates:
    """Rates of one network: ``values`` (seeds, depths, widths), and what mean field says of them."""

    values: FloatArray
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    theory: float

    @property
    def logs(self) -> FloatArray:
        """Natural logarithms of the rates: what a deviation adds to log GSC with every layer."""
        return np.log(self.values)

    @property
    def common(self) -> Mean:
        """The geometric mean over all sizes."""
        return geometric_mean(np.exp(self.logs.mean(axis=(1, 2))))

    @property
    def by_depth(self) -> FloatArray:
        """Log rates less their common mean, averaged over widths, (seeds, depths)."""
        return np.asarray(self.logs.mean(axis=2) - self.logs.mean(axis=(1, 2))[:, None])

    @property
    def by_width(self) -> FloatArray:
        """Log rates less their common mean, averaged over depths, (seeds, widths)."""
        return np.asarray(self.logs.mean(axis=1) - self.logs.mean(axis=(1, 2))[:, None])

    @property
    def lines(self) -> FloatArray:
        """Least squares of the log rate against 1 / width, a seed each, (seeds, 2): at infinite width, and slope."""
        design = np.column_stack([np.ones(len(self.widths)), 1 / np.array(self.widths, dtype=np.float64)])
        return np.asarray(np.linalg.lstsq(design, self.logs.mean(axis=1).T, rcond=None)[0].T)


def simultaneous(deviations: FloatArray, looks: int = 1) -> FloatArray:
    """Intervals (2, columns) for the means of the columns of (seeds, columns), which hold together at 95 %
    (Bonferroni), at all of so many looks at a growing number of seeds."""
    seeds, columns = deviations.shape
    quantile = float(stats.t.ppf(1 - 0.025 / (columns * looks), seeds - 1))
    margin = quantile * deviations.std(axis=0, ddof=1) / math.sqrt(seeds)
    return np.stack([deviations.mean(axis=0) - margin, deviations.mean(axis=0) + margin])


def all_rates(frame: pd.DataFrame, networks: Sequence[str]) -> dict[str, Rates]:
    """By network, in that order."""
    own = frame[frame["quantity"] == "gsc"]
    return {name: _of_network(rows) for name in networks if len(rows := own[own["model"] == name])}


def _of_network(rows: pd.DataFrame) -> Rates:
    depths, widths, seeds = (tuple(sorted(map(int, rows[key].unique()))) for key in ("depth", "width", "seed"))
    values = np.full((len(seeds), len(depths), len(widths)), math.nan)
    for (depth, width, seed), run in rows.groupby(["depth", "width", "seed"], observed=True):
        place = seeds.index(seed), depths.index(depth), widths.index(width)
        values[place] = fit_growth(run["log10_value"].to_numpy(), run["depth_from_output"].to_numpy()).rate
    row = rows.iloc[0]
    return Rates(values, depths, widths, theory(row["activation"], row["norm"], int(row["batch_size"])))


@cache
def theory(activation: str, norm: str, batch_size: int) -> float:
    """The rate of mean field."""
    return mf.gsc_rate(activation, norm, batch_size if norm == "batch" else None)


def name(model: str) -> str:
    """``relu+batch`` of ``relu_batch``."""
    return labels.network_name(model.split("_"))
