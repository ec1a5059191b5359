"""The backward sweep: a bundle of cotangents is pulled down the trunk, and its lengths are read at every layer.

The bundle has shape (cotangents, *shape of a trunk tensor).  At every so many cut vertices each cotangent is divided by
a power of two, the same for all its samples, and the exponent goes into an integer ledger: pulling back is linear, so
the result is bit-exact at any depth, also where samples are coupled.  A sweep is first tried with few rescalings; where
a length came near the end of its floating-point range on the way, it is done again with more.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.backward.links import WORTHWHILE, Link, find_links
from gradscope.backward.pulling import PullBack, pulling
from gradscope.forward.layers import Layer
from gradscope.forward.trunk import Trunk, vertex
from gradscope.memory import Workspace, bundle_bytes, is_out_of_memory
from gradscope.norms import plain_norms, power_of_two, vector_norms

# Cut vertices between two rescalings: as few rescalings as will do.
STRIDES = (128, 8, 1)

# The engine returns the gradients of all layers of one call at once; these together stay within this.
RUN_BYTES = 1 << 26

Progress = Callable[[float], None]
Draw = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Start:
    """Cotangents that begin at one cut vertex.

    ``position``: index into the trunk.  ``num``: how many.  ``draw(first, last)``: those numbered first to last - 1,
    shape (last - first, *shape), in fresh memory; called in order, and again where a sweep has to be repeated.
    ``bytes_each``: what one counts for in a bundle.
    """

    position: int
    num: int
    draw: Draw
    bytes_each: int


@dataclass(frozen=True)
class Reading:
    """Lengths of cotangents pulled back to one layer: |J^T v| = ``norms * 2**exponents``.

    ``norms`` (cotangents, samples) in float64, ``exponents`` (cotangents,); samples is 1 where the leading dimension
    of the layer is not the batch.  The cotangents are those of all starts above the layer, in the order of the starts.
    """

    norms: npt.NDArray[np.float64]
    exponents: npt.NDArray[np.int64]


def sweep(
    trunk: Trunk,
    rows: Sequence[Layer],
    starts: Sequence[Start],
    *,
    batch_size: int,
    strides: Sequence[int | None] = STRIDES,
    progress: Progress | None = None,
) -> list[Reading]:
    """Pull the cotangents of all ``starts`` back to all ``rows``.

    Arguments:
        trunk: Cut vertices of the recorded graph, which must still be alive.
        rows: Layers from which the target is reached, on the trunk or in a branch.
        starts: Sorted by descending position.
        batch_size: Number of samples B; 0 reads only the length of the whole batch.
        strides: Cut vertices between two rescalings, None for no rescaling; the next is tried where one was too long.
        progress: Called with the fraction done.

    Returns:
        One `Reading` a row.  A row sees the starts that lie strictly above it.

    Cost: one backward pass to activations for each cotangent; one device sync.  Memory beyond the graph: with w bytes
    at the widest layer and c cotangents in a bundle, 5 c w and ``RUN_BYTES``, where c w is at most 256 MiB and a
    twentieth of what is free, or c = 1; and 16 bytes for each cotangent, row and sample.  Where memory runs out, a
    bundle of half the size is tried.

    Raises:
        FloatingPointError: A gradient is NaN or Inf with the shortest stride; the layer is named.
    """
    if not rows:
        return []
    size = bundle_bytes(rows[0].device)
    total = sum(start.num for start in starts)
    pull_back = PullBack()
    for stride in strides:
        schedule = _Schedule(trunk, rows, stride)
        read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]
        done = 0
        with pulling():
            while done < total:
                chunk = _chunk(starts, done, size)
                num = sum(piece.last - piece.first for piece in chunk)
                try:
                    found = list(_descend(schedule, chunk, pull_back, batch_size))
                except (RuntimeError, MemoryError) as error:
                    if num == 1 or not is_out_of_memory(error):
                        raise
                    size = sum((piece.last - piece.first) * piece.start.bytes_each for piece in chunk) // 2
                    continue
                for row, norms, exponents in found:
                    read[row].append((norms, exponents))
                done += num
                if progress is not None:
                    progress(done / total)
        readings = _collect(read)
        if _comfortable(rows, readings):
            break
    for layer, reading in zip(rows, readings, strict=True):
        if not np.isfinite(reading.norms).all():
            raise FloatingPointError(
                f"The gradient at layer {layer.name!r} is NaN or Inf although the activations are finite: a backward "
                "there divides by zero or overflows in one step. Measure in float64, or move x off the singular point."
            )
    return readings


def _comfortable(rows: Sequence[Layer], readings: Sequence[Reading]) -> bool:
    """Whether no cotangent's length, before its exponent, came near an end of the range of its dtype."""
    for layer, reading in zip(rows, readings, strict=True):
        reach = 2.0**5 if layer.dtype == torch.float16 else 2.0**40
        square = np.einsum("ij,ij->i", reading.norms, reading.norms) / layer.size
        if len(square) and not (square.min() > reach**-2 and square.max() < reach**2):
            return False
    return True


@dataclass(frozen=True)
class _Piece:
    """Cotangents ``first`` to ``last - 1`` of one start."""

    start: Start
    first: int
    last: int

    def draw(self) -> Tensor:
        return self.start.draw(self.first, self.last)


def _chunk(starts: Sequence[Start], done: int, size: int) -> list[_Piece]:
    """The next cotangents, in order, after the first ``done``: as many as fit into a bundle of so many bytes."""
    chunk: list[_Piece] = []
    for start in starts:
        first = min(done, start.num)
        done -= first
        last = min(start.num, first + max(0 if chunk else 1, size // start.bytes_each))
        if first < last:
            chunk.append(_Piece(start, first, last))
            size -= (last - first) * start.bytes_each
        if last < start.num:
            break
    return chunk


class _Schedule:
    """Where the sweep stops on the trunk, which rows it reads on the way, and the memory that it uses again."""

    def __init__(self, trunk: Trunk, rows: Sequence[Layer], stride: int | None) -> None:
        self.trunk, self.rows, self.stride = trunk, rows, stride
        self.workspace = Workspace()
        keys = [vertex(layer.edge) for layer in rows]
        self.on = sorted((trunk.position[key], row) for row, key in enumerate(keys) if key in trunk.position)
        self.off = sorted((trunk.above[key], row) for row, key in enumerate(keys) if key not in trunk.position)
        # A tensor in a branch is read before the next cut vertex below it; below the first one there is none: -1.
        self.bottom = min([p for p, _ in self.on] + [p - 1 for p, _ in self.off])

    def stations(self, pieces: Sequence[_Piece]) -> list[tuple[int, bool]]:
        """Cut vertices at which cotangents join, or (True) the bundle is rescaled, from the topmost start downward."""
        joining = {piece.start.position for piece in pieces if piece.start.position > self.bottom}
        top = max(joining, default=self.bottom)
        regular = set(range(top - self.stride, self.bottom, -self.stride)) if self.stride else set()
        return [(at, at in regular) for at in sorted(joining | regular | {self.bottom}, reverse=True)]

    def crossings(self, lower: int, upper: int, num_cotangents: int) -> Iterator[tuple[int, int, Link | None]]:
        """(upper, lower, link) from one station to the next: single links, or runs that the engine crosses at once."""
        top, room = upper, RUN_BYTES
        linked = num_cotangents >= WORTHWHILE
        for position in range(upper, lower, -1):
            link = self.links[position] if linked else None
            if top > position and (link is not None or room < self.bytes[position - 1] * num_cotangents):
                yield top, position, None
                top, room = position, RUN_BYTES
            if link is not None:
                yield position, position - 1, link
                top = position - 1
            room -= self.bytes[position - 1] * num_cotangents
        if top > lower:
            yield top, lower, None

    @cached_property
    def bytes(self) -> list[int]:
        """What one gradient of the rows at every cut vertex, and in the branches above it, takes."""
        taken = [0] * (len(self.trunk.edges) + 1)  # the last entry is that of position -1
        for position, row in (*self.on, *((position - 1, row) for position, row in self.off)):
            taken[position] += self.rows[row].size * self.rows[row].dtype.itemsize
        return taken

    @cached_property
    def links(self) -> list[Link | None]:
        """The link below every cut vertex."""
        return find_links(self.trunk)

    def between(self, lower: int, upper: int) -> list[int]:
        """Rows on the trunk in [lower, upper), and in branches that flow into a cut vertex of (lower, upper]."""
        on = self.on[bisect_left(self.on, (lower, -1)) : bisect_left(self.on, (upper, -1))]
        off = self.off[bisect_left(self.off, (lower + 1, -1)) : bisect_left(self.off, (upper + 1, -1))]
        return [row for _, row in (*on, *off)]


def _descend(
    schedule: _Schedule, pieces: Sequence[_Piece], pull_back: PullBack, batch_size: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Carry one bundle from its topmost start to the bottom; yields (row, norms, exponents)."""
    bundle: list[Tensor] = []
    ledger: list[Tensor] = []
    workspace = schedule.workspace
    for (upper, _), (lower, rescaled) in pairwise(schedule.stations(pieces)):
        for piece in pieces:
            if piece.start.position == upper:
                bundle.append(piece.draw())
                ledger.append(torch.zeros(piece.last - piece.first, dtype=torch.int64, device=bundle[-1].device))
        cotangents = bundle[0] if len(bundle) == 1 else _joined(bundle, workspace)
        exponents = ledger[0] if len(ledger) == 1 else torch.cat(ledger)
        for top, bottom, link in schedule.crossings(lower, upper, len(cotangents)):
            rows = schedule.between(bottom, top)
            if link is not None:
                cotangents = link(cotangents, workspace)
                gradients = dict.fromkeys(rows, cotangents)
            else:
                gradients, cotangents = _pull(schedule, top, bottom, rows, pull_back, cotangents)
            for row in rows:
                gradient = gradients[row]
                per_sample = gradient.ndim > 1 and gradient.shape[1] == batch_size
                yield row, plain_norms(gradient, 2 if per_sample else 1, workspace.scratch(gradient)), exponents
        if rescaled:
            cotangents, shift = rescale(cotangents)
            exponents = exponents + shift
        bundle, ledger = [cotangents], [exponents]


def _joined(bundle: Sequence[Tensor], workspace: Workspace) -> Tensor:
    """All cotangents in one tensor."""
    shape = (sum(len(part) for part in bundle), *bundle[0].shape[1:])
    return torch.cat(list(bundle), out=workspace.beside(bundle[0], shape))


def _pull(
    schedule: _Schedule, top: int, bottom: int, rows: Sequence[int], pull_back: PullBack, cotangents: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Through the autograd engine: gradients of the rows between two cut vertices, and of the lower one."""
    edges = schedule.trunk.edges
    wanted = {vertex(schedule.rows[row].edge): schedule.rows[row].edge for row in rows}
    if bottom >= 0:
        wanted[vertex(edges[bottom])] = edges[bottom]
    pulled = dict(zip(wanted, pull_back(edges[top], list(wanted.values()), cotangents), strict=True))
    gradients = {row: pulled[vertex(schedule.rows[row].edge)] for row in rows}
    if bottom < 0:
        return gradients, cotangents
    below = pulled[vertex(edges[bottom])]
    # A link overwrites its bundle, and this one may share its memory with the cotangents or with itself.
    linked = len(cotangents) >= WORTHWHILE and schedule.links[bottom] is not None
    return gradients, below.clone(memory_format=torch.contiguous_format) if linked else below


def rescale(bundle: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each cotangent (first dimension) by the power of two next above its root mean square; exact.

    Returns the scaled bundle and the int64 exponents taken out.  A cotangent of zeros is left alone.
    """
    norms, common = vector_norms(bundle, 1)
    rms = norms / math.sqrt(bundle[0].numel())
    exponents = torch.where(rms > 0, torch.frexp(rms).exponent + common.to(rms.device), 0)
    dtype = bundle.real.dtype if bundle.is_complex() else bundle.dtype
    limit = math.frexp(torch.finfo(dtype).max)[1] - 2
    exponents = exponents.to(device=bundle.device, dtype=torch.int64).clamp(-limit, limit)
    return bundle * power_of_two(-exponents, dtype).reshape(-1, *[1] * (bundle.ndim - 1)), exponents


def _collect(read: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[Reading]:
    """Bring everything to the CPU in one copy."""
    pieces = [piece for of_row in read for piece in of_row]
    if not pieces:
        return [Reading(np.zeros((0, 1)), np.zeros(0, dtype=np.int64)) for _ in read]
    device = pieces[0][0].device
    norms = torch.cat([norms.reshape(-1).to(device) for norms, _ in pieces]).cpu().numpy()
    exponents = torch.cat([exponents.to(device) for _, exponents in pieces]).cpu().numpy()
    readings, first, second = [], 0, 0
    for of_row in read:
        size, num = sum(norms.numel() for norms, _ in of_row), sum(len(exponents) for _, exponents in of_row)
        values = norms[first : first + size]
        readings.append(Reading(values.reshape(num, -1) if num else np.zeros((0, 1)), exponents[second : second + num]))
        first, second = first + size, second + num
    return readings
