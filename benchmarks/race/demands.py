"""Targets of the benchmark, and the measured numbers.  Both are only reported; no test depends on timings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks import memory
from benchmarks.race import errors, speed
from benchmarks.tables.rows import Row, find


@dataclass(frozen=True)
class Demand:
    """A measured number and its bound, which is an upper bound unless ``at_least``."""

    what: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the number satisfies the bound."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def demanded(self) -> str:
        """The bound as text."""
        return f"{'>=' if self.at_least else '<='} {self.bound:.4g}"


def demands(rows: Sequence[Row]) -> Iterator[Demand]:
    """All demands whose numbers are in ``rows``."""

    def ratio(group: str, above: str, below: str) -> float | None:
        a, b = find(rows, group, above), find(rows, group, below)
        return a.value / b.value if a and b else None

    deep, wide, dead = "selu_50x100", "selu_50x1000", "relu_dead_outputs"
    ratios = [
        ("profile, 1 probe, over forward + backward, 50 x 1000", ratio(wide, speed.PROFILE, speed.PASS), 0.85, False),
        ("profile, 1 probe, over forward + backward, 50 x 100", ratio(deep, speed.PROFILE, speed.PASS), 1.8, False),
        ("the same, AlexNet A", ratio("alexnet_a", speed.PROFILE, speed.PASS), 0.95, False),
        ("the same, ResNet-8", ratio("resnet_8", speed.PROFILE, speed.PASS), 1.2, False),
        ("gs.measure, AlexNet A", ratio("alexnet_a_statistics", speed.STATISTICS, speed.PASS), 1.0, False),
        ("exact profile over its matrix products, 50 x 100", ratio(deep, speed.EXACT, speed.FLOOR), 1.9, False),
        ("the same, ReLU, 40 % of the outputs dead", ratio(dead, speed.EXACT, speed.FLOOR), 1.9, False),
        ("vmap(jacrev) layer by layer over exact profile, 50 x 100", ratio(deep, speed.JACREV, speed.EXACT), 25, True),
        ("matrix of all pairs over forward + backward, 50 x 100", ratio(deep, speed.MATRIX, speed.PASS), 6, False),
        ("deflated over exact profile, 50 x 1000", ratio(wide, speed.DEFLATED, speed.EXACT), 1 / 20, False),
    ]
    error = find(rows, wide, speed.WORST, "relative_rms")
    ratios.append(("rms error of deflated, worst layer, 50 x 1000", error.value if error else None, 0.02, False))
    for row in rows:
        if (row.group, row.what) == ("deflated_vs_plain", errors.GAIN):
            ratios.append(
                (f"error of plain over deflated at equal cost, farthest layer, {row.case}", row.value, 10, True)
            )
    grown = {
        case: find(rows, "memory", f"{memory.GROWTH}: {memory.CASES[case]}", "times") for case in ("graph", "matrix")
    }
    if grown["matrix"] and grown["graph"]:
        what = "growth of the matrix's peak memory, depth 400 over 100, against a forward pass that keeps its graph"
        ratios.append((what, grown["matrix"].value, grown["graph"].value, False))
    for row in rows:
        allowed = next((other for other in rows if (other.case, other.what) == (row.case, memory.BOUND)), None)
        if (row.group, row.what) == ("memory", memory.MATRIX) and allowed:
            what = f"peak of the matrix over its documented bound, {row.case}"
            ratios.append((what, row.value / allowed.value, 1, False))
    for what, measured, bound, at_least in ratios:
        if measured is not None:
            yield Demand(what, measured, bound, at_least)
