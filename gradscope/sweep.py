"""The backward sweep: a bundle of cotangents is pulled down the trunk, and its lengths are read at every layer.

The bundle has shape (cotangents, *shape of a trunk tensor).  Every few cut vertices each cotangent is divided by a
power of two, the same for all its samples, and the exponent goes into an integer ledger: pulling back is linear, so
the result is bit-exact at any depth, also where samples are coupled.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradscope.layers import Layer
from gradscope.norms import power_of_two, sum_of_squares
from gradscope.trunk import Trunk, vertex

# Between two rescalings nothing overflows unless gradients grow 1e38 times over this many cut vertices (float32).
RESCALE_EVERY = 8

# A bundle that stays in a core's cache is pulled back faster than one that does not.
BUNDLE_BYTES = 1 << 20

# Where layers below the target are wider than it, the bundle at the widest of them stays within this.
PEAK_BYTES = 1 << 28

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Start:
    """Cotangents that begin at one cut vertex.

    ``position``: index into the trunk.  ``num``: how many.  ``draw(first, last)``: those numbered first to last - 1,
    shape (last - first, *shape); called once for each, in order.  ``bytes_each``: what one counts for in a
    bundle.
    """

    position: int
    num: int
    draw: Callable[[int, int], Tensor]
    bytes_each: int


@dataclass(frozen=True)
class Reading:
    """Squared lengths of cotangents pulled back to one layer: |J^T v|^2 = ``squares * 4**exponents``.

    ``squares`` (cotangents, samples) in float64, ``exponents`` (cotangents,); samples is 1 where the leading dimension
    of the layer is not the batch.  The cotangents are those of all starts above the layer, in the order of the starts.
    """

    squares: npt.NDArray[np.float64]
    exponents: npt.NDArray[np.int64]


def sweep(
    trunk: Trunk,
    rows: Sequence[Layer],
    starts: Sequence[Start],
    *,
    batch_size: int,
    rescale_every: int | None = RESCALE_EVERY,
    progress: Progress | None = None,
) -> list[Reading]:
    """Pull the cotangents of all ``starts`` back to all ``rows``.

    Arguments:
        trunk: Cut vertices of the recorded graph, which must still be alive.
        rows: Layers from which the target is reached, on the trunk or in a branch.
        starts: Sorted by descending position.
        batch_size: Number of samples B.
        rescale_every: Cut vertices between two rescalings; None never rescales.
        progress: Called with the fraction done.

    Returns:
        One `Reading` a row.  A row sees the starts that lie strictly above it.

    Cost: one backward pass to activations for each cotangent, in bundles of about ``BUNDLE_BYTES``; memory beyond the
    graph is one bundle and its pullback over ``rescale_every`` cut vertices.  One device sync.

    Raises:
        FloatingPointError: A gradient became NaN or Inf between two rescalings; the layer is named.
    """
    if not rows:
        return []
    schedule = _Schedule(trunk, rows, rescale_every)
    pull_back = _PullBack()
    read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]
    chunks = list(_chunks(starts))
    for done, chunk in enumerate(chunks, start=1):
        for row, squares, exponents in _descend(schedule, chunk, pull_back, batch_size):
            read[row].append((squares, exponents))
        if progress is not None:
            progress(done / len(chunks))
    return _collect(rows, read)


@dataclass(frozen=True)
class _Piece:
    """Cotangents ``first`` to ``last - 1`` of one start."""

    start: Start
    first: int
    last: int

    def draw(self) -> Tensor:
        return self.start.draw(self.first, self.last)


def _chunks(starts: Sequence[Start]) -> Iterator[list[_Piece]]:
    """Split all cotangents, in order, into bundles of about ``BUNDLE_BYTES``."""
    chunk: list[_Piece] = []
    room = BUNDLE_BYTES
    for start in starts:
        first = 0
        while first < start.num:
            if chunk and room < start.bytes_each:
                yield chunk
                chunk, room = [], BUNDLE_BYTES
            last = min(start.num, first + max(1, room // start.bytes_each))
            chunk.append(_Piece(start, first, last))
            room -= (last - first) * start.bytes_each
            first = last
    yield chunk


class _Schedule:
    """Where the sweep stops on the trunk, and which rows it reads on the way."""

    def __init__(self, trunk: Trunk, rows: Sequence[Layer], rescale_every: int | None) -> None:
        self.trunk, self.rows, self.rescale_every = trunk, rows, rescale_every
        keys = [vertex(layer.edge) for layer in rows]
        self.on = sorted((trunk.position[key], row) for row, key in enumerate(keys) if key in trunk.position)
        self.off = sorted((trunk.above[key], row) for row, key in enumerate(keys) if key not in trunk.position)
        # A tensor in a branch is read before the next cut vertex below it; below the first one there is none: -1.
        self.bottom = min([p for p, _ in self.on] + [p - 1 for p, _ in self.off])

    def stations(self, pieces: Sequence[_Piece]) -> list[int]:
        """Cut vertices at which cotangents join or the bundle is rescaled, from the topmost start to the bottom."""
        joining = {piece.start.position for piece in pieces if piece.start.position > self.bottom}
        regular = range(max(joining, default=self.bottom), self.bottom, -(self.rescale_every or len(self.trunk.edges)))
        return sorted(joining | set(regular) | {self.bottom}, reverse=True)

    def between(self, lower: int, upper: int) -> list[int]:
        """Rows on the trunk in [lower, upper), and in branches that flow into a cut vertex of (lower, upper]."""
        on = self.on[bisect_left(self.on, (lower, -1)) : bisect_left(self.on, (upper, -1))]
        off = self.off[bisect_left(self.off, (lower + 1, -1)) : bisect_left(self.off, (upper + 1, -1))]
        return [row for _, row in (*on, *off)]


def _descend(
    schedule: _Schedule, pieces: Sequence[_Piece], pull_back: _PullBack, batch_size: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Carry one bundle from its topmost start to the bottom; yields (row, squares, exponents)."""
    edges = schedule.trunk.edges
    bundle: list[Tensor] = []
    ledger: list[Tensor] = []
    for upper, lower in pairwise(schedule.stations(pieces)):
        for piece in pieces:
            if piece.start.position == upper:
                bundle.append(piece.draw())
                ledger.append(torch.zeros(piece.last - piece.first, dtype=torch.int64, device=bundle[-1].device))
        cotangents, exponents = torch.cat(bundle), torch.cat(ledger)
        rows = schedule.between(lower, upper)
        below = [edges[lower]] if lower >= 0 else []
        gradients = pull_back(edges[upper], [*below, *(schedule.rows[row].edge for row in rows)], cotangents)
        for row, gradient in zip(rows, gradients[len(below) :], strict=True):
            per_sample = gradient.ndim > 1 and gradient.shape[1] == batch_size
            squares, exponent = sum_of_squares(gradient, start_dim=2 if per_sample else 1)
            yield row, squares.reshape(len(cotangents), -1), exponents + exponent
        if below:
            scaled, shift = rescale(gradients[0]) if schedule.rescale_every else (gradients[0], 0)
            bundle, ledger = [scaled], [exponents + shift]


def rescale(bundle: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each cotangent (first dimension) by the power of two next above its largest entry; exact.

    Returns the scaled bundle and the int64 exponents taken out.  A cotangent of zeros is left alone.
    """
    largest = bundle.abs().flatten(1).amax(dim=1)
    exponents = torch.frexp(largest.float() if largest.element_size() < 4 else largest).exponent.to(torch.int64)
    limit = math.frexp(torch.finfo(largest.dtype).max)[1] - 2
    exponents = exponents.clamp(-limit, limit)
    return bundle * power_of_two(-exponents, largest.dtype).reshape(-1, *[1] * (bundle.ndim - 1)), exponents


class _PullBack:
    """Vector-Jacobian products of a whole bundle: vectorized, or one by one where a backward cannot be."""

    def __init__(self) -> None:
        self.vectorized = True

    def __call__(self, output: GradientEdge, inputs: Sequence[GradientEdge], cotangents: Tensor) -> Sequence[Tensor]:
        """J^T v for every cotangent v of ``output`` (first dimension), at every edge of ``inputs``."""

        def vjp(v: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad((output,), inputs, (v,), retain_graph=True)

        if self.vectorized and len(cotangents) > 1:
            try:
                with warnings.catch_warnings():
                    # A batching rule that torch has not written yet costs time, and no user can do anything about it.
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    return torch.vmap(vjp)(cotangents)
            except RuntimeError:
                # No batching rule, or a backward that branches on its data.  A real error comes again below.
                self.vectorized = False
        return [torch.stack(column) for column in zip(*map(vjp, cotangents), strict=True)]


def _collect(rows: Sequence[Layer], read: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[Reading]:
    """Bring everything to the CPU in one copy, and check it."""
    squares = [torch.cat([s for s, _ in pieces]) if pieces else torch.zeros(0, 1) for pieces in read]
    exponents = [torch.cat([e for _, e in pieces]) if pieces else torch.zeros(0) for pieces in read]
    device = next((s.device for s in squares if s.numel()), torch.device("cpu"))
    all_squares = torch.cat([s.reshape(-1).to(device) for s in squares]).cpu().numpy().astype(np.float64)
    all_exponents = torch.cat([e.to(device) for e in exponents]).cpu().numpy().astype(np.int64)
    readings = []
    for layer, s, e in zip(rows, squares, exponents, strict=True):
        values, all_squares = np.split(all_squares, [s.numel()])
        powers, all_exponents = np.split(all_exponents, [e.numel()])
        if not np.isfinite(values).all():
            raise FloatingPointError(
                f"The gradient at layer {layer.name!r} is NaN or Inf although the activations are finite: a backward "
                "there divides by zero or overflows in one step. Measure in float64, or move x off the singular point."
            )
        readings.append(Reading(values.reshape(s.shape), powers))
    return readings
