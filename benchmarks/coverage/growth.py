"""How often the interval of a growth rate holds, how wide it is, and what its verdict is worth.

The truth of a cell is ln rate of all its networks together, from exact Jacobians.  The ideal interval is 1.96 standard
deviations of ln rate between networks, divided by the square root of the number of networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from benchmarks.coverage.networks import CELLS, PROBES, Cell, path_of
from gradscope.coefficients.drift import num_outer
from gradscope.coefficients.growth import MARGIN, NEAREST, Growth, fit_growth

FloatArray = npt.NDArray[np.float64]

ROWS, NETWORKS = ("all", "10"), (1, 4, 8)
# True rates of the operating characteristics.
RATES = (0.97, 1.0, 1.01, 1.03, 1.07)
# The prior weights of `gradscope.coefficients.drift` were chosen on simulated walks and on cells of this width.
TUNED_WIDTH = 50
FEWEST = 8
# All definitions were chosen with these networks in sight; later ones are reported apart.
SEEN = 200
LN10 = math.log(10)

Tables = tuple[list[dict[str, Any]], list[dict[str, Any]]]


class Profiles:
    """The measured profiles of one cell: depths (rows,), and log10 GSC (networks, rows) for each way of measuring."""

    def __init__(self, folder: Path, cell: Cell, most: int | None = None) -> None:
        paths = sorted(path_of(folder, cell, 0).parent.glob("*.npz"), key=lambda path: int(path.stem))[:most]
        found = [dict(np.load(path)) for path in paths]
        self.cell, self.num = cell, len(found)
        if found:
            self.depth: npt.NDArray[np.int64] = found[0]["depth"]
            self.values = {probes: np.stack([one[probes] for one in found]) for probes in PROBES}

    def rows(self, which: str) -> npt.NDArray[np.bool_]:
        """All rows, or the target and ten rows that are evenly spaced among the repeated layers."""
        if which == "all":
            return np.ones(len(self.depth), dtype=bool)
        last = 2 if self.cell.architecture == "GPT-like" else 1  # the final normalization does not repeat
        wanted = np.round(np.linspace(last, last + self.cell.depth - 1, int(which))).astype(int)
        return np.isin(self.depth, [0, *wanted])


def groups(num: int, size: int, seed: int = 0) -> list[npt.NDArray[np.int64]]:
    """Every network alone, or half as many random groups as there are networks."""
    if size == 1:
        return [np.array([network]) for network in range(num)]
    generator = np.random.default_rng(seed)
    return [generator.choice(num, size, replace=False) for _ in range(num // 2)]


def fits(depth: FloatArray, values: FloatArray, size: int) -> list[Growth]:
    """The growth of every group of ``size`` networks."""
    return [fit_growth(values[group], depth) for group in groups(len(values), size)]


def covered(found: list[Growth], truth: float) -> float:
    """Share of the intervals that contain ``truth``, the logarithm of a rate."""
    return float(np.mean([math.log(one.rate_low) <= truth <= math.log(one.rate_high) for one in found]))


def truth_of(depth: FloatArray, values: FloatArray) -> tuple[float, float]:
    """ln rate of all networks together, and its standard deviation between networks."""
    every = fit_growth(values, depth)
    half = math.log(every.rate_high / every.rate_low) / 2
    return math.log(every.rate), half / float(special.stdtrit(len(values) - 1, 0.975)) * math.sqrt(len(values))


def long_run(depth: FloatArray, values: FloatArray) -> float:
    """Variance of the change over the nearer rows, between networks, divided by that of independent changes.

    Below 1, curves revert to their mean; above 1, networks have slopes of their own.  One curve can hardly show either.
    """
    depth, place = np.unique(depth, return_index=True)
    depth, curves = depth[1:], values[:, place[1:]]  # without the target
    start = num_outer(depth, curves)
    near = curves[:, start : start + max(math.ceil((len(depth) - start) / 2), NEAREST)]
    return float(np.var(near[:, -1] - near[:, 0], ddof=1) / np.var(np.diff(near, axis=1), axis=0, ddof=1).sum())


def right_verdict(rate: float) -> str:
    """The verdict that is true for a rate."""
    return "exploding" if rate > 1 + MARGIN else "vanishing" if rate < 1 - MARGIN else "stable"


def coverage(profiles: Profiles) -> Iterator[dict[str, Any]]:
    """One row for each choice of rows, probes and number of networks of one cell."""
    for which in ROWS:
        kept = profiles.rows(which)
        depth = profiles.depth[kept].astype(np.float64)
        exact = profiles.values["exact"][:, kept]
        truth, spread = truth_of(depth, exact)
        ratio = long_run(depth, exact)
        once: dict[tuple[bytes, int], tuple[list[Growth], ...]] = {}  # several ways of measuring are often the same
        for probes, size in product(PROBES, NETWORKS):
            values = profiles.values[probes][:, kept]
            key = values.tobytes(), size
            if key not in once:
                once[key] = tuple(fits(depth, part, size) for part in (values, values[SEEN:]) if len(part) >= FEWEST)
            found, *fresh = once[key]
            verdicts = [one.verdict for one in found]
            decided = [verdict for verdict in verdicts if verdict != "undecided"]
            width = float(np.median([math.log(one.rate_high / one.rate_low) for one in found]))
            ideal = 2 * 1.96 * spread / math.sqrt(size)
            yield profiles.cell._asdict() | {
                "rows": which, "probes": probes, "networks": size, "measured": profiles.num,
                "rate": math.exp(truth), "coverage": covered(found, truth),
                "coverage_fresh": covered(fresh[0], truth) if fresh else math.nan,
                "relative_width": width / ideal, "decided": len(decided) / len(verdicts),
                "wrong": sum(verdict != right_verdict(math.exp(truth)) for verdict in decided) / len(verdicts),
                "curved": float(np.mean([one.curved for one in found])),
                "long_run": ratio, "tuned": profiles.cell.width == TUNED_WIDTH,
            }  # fmt: skip


def characteristics(profiles: Profiles) -> Iterator[dict[str, Any]]:
    """How often each verdict is given at a true rate: profiles are turned so that their mean rate is this rate."""
    depth = profiles.depth.astype(np.float64)
    values = profiles.values["exact"]
    truth, _ = truth_of(depth, values)
    for rate, size in product(RATES, NETWORKS):
        turned = values + (math.log(rate) - truth) / LN10 * depth
        verdicts = [one.verdict for one in fits(depth, turned, size)]
        shares = {word: verdicts.count(word) / len(verdicts) for word in ("exploding", "vanishing", "stable")}
        right = shares[right_verdict(rate)]
        yield profiles.cell._asdict() | {"networks": size, "measured": profiles.num, "true_rate": rate} | shares | {
            "undecided": 1 - sum(shares.values()), "wrong": sum(shares.values()) - right,
        }  # fmt: skip


def tables_of(folder: Path, cell: Cell, most: int) -> Tables:
    """The rows of both tables for one cell."""
    profiles = Profiles(folder, cell, most)
    if profiles.num < FEWEST:
        return [], []
    return list(coverage(profiles)), list(characteristics(profiles))


def weaker(profiles: Sequence[Profiles], num: int, seed: int = 0) -> tuple[int, int]:
    """(groups whose common verdict is weaker when pooled, groups with a common verdict) of ``num`` random groups."""
    generator, lost, common = np.random.default_rng(seed), 0, 0
    for _ in range(num):
        own = profiles[int(generator.integers(len(profiles)))]
        chosen = generator.choice(own.num, int(generator.integers(2, min(own.num, 12) + 1)), replace=False)
        curves = own.values[PROBES[int(generator.integers(len(PROBES)))]][chosen]
        alone = {fit_growth(curve, own.depth).verdict for curve in curves}
        if len(alone) == 1 and alone != {"undecided"}:
            common += 1
            lost += fit_growth(curves, own.depth).verdict not in alone
    return lost, common


def read(folder: Path, cells: Sequence[Cell] = CELLS, most: int | None = None) -> list[Profiles]:
    """The profiles of all cells that have enough networks for the largest group."""
    found = (Profiles(folder, cell, most) for cell in cells)
    return [one for one in found if one.num >= FEWEST]
