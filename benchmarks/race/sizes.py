"""Sizes of the benchmark's networks, and tiny ones to test that the code runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sizes:
    """Sizes of one run of the benchmark.

    Arguments:
        deep, wide: (depth, width, batch) of the two SELU networks.
        images: Batch size of AlexNet A.
        deflated_wide: (rank, num) of the deflated profile of the wide network.
        deflated_deep: (rank, num) of the deflated profiles that are compared with plain probes.
        seeds: Probe seeds over which errors are measured.
        depths, widths, batches, probes: Values that replace one size of the deep network at a time.
        matrix: (depth, width, batch) of the networks for the matrix, by normalization.
        memory_depths, memory_probes: Values at which peak memory is measured.
    """

    deep: tuple[int, int, int] = (50, 100, 100)
    wide: tuple[int, int, int] = (50, 1000, 32)
    images: int = 32
    deflated_wide: tuple[int, int] = (8, 8)
    deflated_deep: tuple[tuple[int, int], ...] = ((8, 8),)
    seeds: int = 40
    depths: tuple[int, ...] = (25, 50, 100, 200)
    widths: tuple[int, ...] = (50, 100, 200, 400)
    batches: tuple[int, ...] = (25, 50, 100, 200)
    probes: tuple[int, ...] = (1, 4, 16, 64)
    matrix: dict[str, tuple[int, int, int]] = field(
        default_factory=lambda: {"none": (30, 100, 20), "batch": (30, 30, 20)}
    )
    memory_depths: tuple[int, int] = (100, 400)
    memory_probes: tuple[int, ...] = (8, 256)


FULL = Sizes()
QUICK = Sizes(
    deep=(8, 20, 10),
    wide=(8, 40, 4),
    images=2,
    deflated_deep=((2, 4),),
    deflated_wide=(2, 4),
    seeds=4,
    depths=(4, 8),
    widths=(10, 20),
    batches=(5, 10),
    probes=(1, 4),
    matrix={"none": (10, 20, 5), "batch": (10, 10, 5)},
    memory_depths=(8, 32),
    memory_probes=(8,),
)
