"""Growth rates of one architecture in several sizes, read from the frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, all_of, geometric_mean, mean
from experiments.studies.depth_width.measurement import LOOKS, NETWORKS, TOLERANCE
from gradscope import meanfield as mf
from gradscope.coefficients.growth import fit_growth

FloatArray = npt.NDArray[np.float64]
SIZES = ("depth", "width")


@dataclass(frozen=True)
class Rates:
    """Rates of one network: ``values`` of shape (seeds, depths, widths), and the mean-field rate ``theory``."""

    values: FloatArray
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    theory: float

    @property
    def logs(self) -> FloatArray:
        """Natural logarithms of the rates."""
        return np.log(self.values)

    @property
    def largest(self) -> Mean:
        """Geometric mean of the rates of the deepest and widest network."""
        return geometric_mean(self.values[:, -1, -1])

    def numbers(self, size: str) -> tuple[int, ...]:
        """All depths or all widths."""
        return self.depths if size == "depth" else self.widths

    def by(self, size: str) -> FloatArray:
        """Log rate at every depth (width) but the largest, minus that at the largest; means over widths (depths)."""
        own = self.logs.mean(axis=2 if size == "depth" else 1)
        return np.asarray(own[:, :-1] - own[:, -1:])

    def ends(self, size: str) -> FloatArray:
        """Log rate at the largest size minus log rate at the smallest size, one per seed."""
        return -self.by(size)[:, 0]

    def within_tolerance(self, size: str, first: int = 0) -> bool | None:
        """Whether all log rates are within tolerance of that at the largest size; the ``first`` seeds are left out."""
        return all_of(*(one.within(0, TOLERANCE) for one in simultaneous(self.by(size)[first:], LOOKS)))

    @property
    def lines(self) -> FloatArray:
        """Least-squares fit of the log rate against 1 / width, (seeds, 2): value at infinite width, and slope."""
        design = np.column_stack([np.ones(len(self.widths)), 1 / np.array(self.widths, dtype=np.float64)])
        return np.asarray(np.linalg.lstsq(design, self.logs.mean(axis=1).T, rcond=None)[0].T)


def simultaneous(deviations: FloatArray, looks: int = 1) -> list[Mean]:
    """The mean of each column of an array (seeds, columns); intervals are simultaneous over columns and analyses."""
    return [mean(column, deviations.shape[1] * looks) for column in deviations.T]


@lru_cache(maxsize=1)
def all_rates(collected: Collected) -> dict[str, Rates]:
    """Rates of the measured `NETWORKS` by name; cached, because claims, answer and figures all need them."""
    own = collected.frame[collected.frame["quantity"] == "gsc"]
    return {name: _of_network(rows) for name in NETWORKS if len(rows := own[own["model"] == name])}


def _of_network(rows: pd.DataFrame) -> Rates:
    rates = {
        run: fit_growth(own["log10_value"], own["depth_from_output"]).rate
        for run, own in rows.groupby(["seed", "depth", "width"], observed=True)
    }
    seeds, depths, widths = (tuple(sorted(set(map(int, values)))) for values in zip(*rates, strict=True))
    values = [[[rates[seed, depth, width] for width in widths] for depth in depths] for seed in seeds]
    return Rates(np.array(values), depths, widths, theory(rows))


def theory(rows: pd.DataFrame) -> float:
    """The mean-field rate of a network, given its rows of the frame."""
    activation, norm, batch_size = rows.iloc[0][["activation", "norm", "batch_size"]]
    return _gsc_rate(activation, norm, int(batch_size) if norm == "batch" else None)


_gsc_rate = cache(mf.gsc_rate)


def name(model: str) -> str:
    """``relu+batch`` for ``relu_batch``."""
    return labels.network_name(model.split("_"))
