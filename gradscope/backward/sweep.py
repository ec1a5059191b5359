"""The backward sweep pulls batches of cotangents from targets to sources, and reads their lengths at chosen layers.

A batch has shape (cotangents, *shape of a trunk tensor).  Every few positions each cotangent is divided by a power of
two, which is the same for all samples; the exponents are summed as integers.  Pulling back is linear, so rescaling
changes no bit of the result, at any depth and also if samples are coupled.  The first sweep rescales rarely.  If a
length comes near an end of the floating-point range, the sweep is repeated with a shorter stride.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.backward.cotangents import Cotangents
from gradscope.backward.pulling import pulling
from gradscope.backward.readings import Piece, Reading, collected, lengths, near_one, scaled
from gradscope.backward.route import Read, Route
from gradscope.memory import batch_bytes, is_out_of_memory, peak_bytes
from gradscope.norms import power_of_two, vector_norms

# Numbers of positions between two rescalings, tried in this order.
STRIDES = (128, 8, 1)

# How many cotangents are drawn at a time to find out where any of them is nonzero.
_AT_ONCE = 16

Progress = Callable[[float], None]
Renew = Callable[[Tensor], tuple[Tensor, Tensor]]  # brings cotangents into the range: new ones and their exponents


def sweep(
    route: Route,
    cotangents: Sequence[Cotangents],
    read: Read,
    *,
    widest: int = 0,
    strides: Sequence[int | None] = STRIDES,
    progress: Progress | None = None,
) -> list[Reading]:
    """Pull the cotangents of all targets back along a route, and read their gradients at its rows.

    Arguments:
        route: The rows and the path to them; the recorded graph must still be alive.
        cotangents: One item per target, sorted by descending position.
        read: What to keep of a gradient.  This must scale with the gradient, as a length does.
        widest: Bytes of one cotangent at the widest layer, if this layer is wider than the target.
        strides: Positions between two rescalings; None means no rescaling.  The next stride is tried if a reading came
            near an end of the range of its dtype.
        progress: Called with the fraction that is done.

    Returns one `Reading` per row, for the targets that come after it.  Raises FloatingPointError for NaN or Inf.

    Cost: one backward pass to activations per cotangent, and one device synchronization.  Memory besides the graph and
    the readings: 5 c w + `route.RUN_BYTES`, for c cotangents per batch with w bytes each at the widest layer.  c w is
    at most 256 MiB (1 GiB on devices other than a CPU) and at most a twentieth of the free memory, unless c = 1.  If
    memory runs out, c is halved.
    """
    if not route.rows:
        return []
    for stride in strides:
        readings = _pass(route, cotangents, scaled(read) if stride == 1 else read, stride, widest, rescale, progress)
        if len(strides) > 1 and _settled(route, cotangents, readings, widest):
            return readings
        if len(strides) == 1:
            break
        if stride == strides[-1] and _blocked(route, cotangents):
            raise FloatingPointError(
                "Gradients leave the floating-point range between two layers: hooks on the tensors in between change "
                "gradients, so cotangents cannot be rescaled there. Measure in float64, or remove the hooks."
            )
    for row, reading in reversed(list(zip(route.rows, readings, strict=True))):  # the first in the backward pass
        if not np.isfinite(reading.values).all():
            raise FloatingPointError(
                f"The gradient at layer {row.name!r} is NaN or Inf although the activations are finite: an operation "
                "after this layer divides by zero or overflows in the backward pass; gs.first_nonfinite names it. "
                "Measure in float64, or move x off the singular point."
            )
    return [near_one(reading) for reading in readings] if len(strides) > 1 else readings


def _pass(
    route: Route,
    cotangents: Sequence[Cotangents],
    read: Read,
    stride: int | None,
    widest: int,
    renew: Renew,
    progress: Progress | None = None,
) -> list[Reading]:
    """The readings of one pass of all cotangents along a route, in batches that fit into memory."""
    size = batch_bytes(route.rows[0].device)
    least = widest * size // peak_bytes(route.rows[0].device)
    total, done = sum(c.num for c in cotangents), 0
    found: list[list[Piece]] = [[] for _ in route.rows]
    with pulling():
        while done < total:
            batch = _next_batch(cotangents, done, size, least)
            num = route.expected = sum(c.num for c in batch)
            try:
                arrived = list(_descend(route, batch, stride, read, renew))
            except (RuntimeError, MemoryError) as error:
                if num == 1 or not is_out_of_memory(error):
                    raise
                size = sum(c.num * _bytes_each(c, least) for c in batch) // 2
                continue
            for number, values, exponents in arrived:
                found[number].append((values, exponents))
            done += num
            if progress is not None:
                progress(done / total)
    return collected(found)


def _settled(route: Route, cotangents: Sequence[Cotangents], readings: Sequence[Reading], widest: int) -> bool:
    """Whether all readings, without their exponents, are far from both ends of the range of their dtype, or exact 0."""
    zeros, alike = False, defaultdict[Any, list[int]](list)
    for number, (row, reading) in enumerate(zip(route.rows, readings, strict=True)):
        alike[reading.values.shape, row.dtype, row.bytes] += [number]
    for (shape, dtype, _), numbers in alike.items():
        reach = {torch.float16: 2.0**5, torch.float64: 2.0**200}.get(dtype, 2.0**40)
        every = np.concatenate([readings[number].values for number in numbers]).reshape(-1, math.prod(shape[1:]))
        square = np.vecdot(every, every) / route.rows[numbers[0]].size
        if not square.all():  # a square may also underflow
            nonzero = every.any(axis=1)
            zeros, square = zeros or not nonzero.all(), square[nonzero]
        if len(square) and not (square.min() > reach**-2 and square.max() < reach**2):
            return False
    return not zeros or (not _blocked(route, cotangents) and _zeros_hold(route, cotangents, readings, widest))


def _blocked(route: Route, cotangents: Sequence[Cotangents]) -> bool:
    """Whether cotangents must cross more positions without a stop than the second stride."""
    top = max(route.position(c.target) for c in cotangents)
    stops = [top, *(position for position in range(top - 1, route.bottom, -1) if route.open(position)), route.bottom]
    return any(above - below > STRIDES[1] for above, below in pairwise(stops))


def _zeros_hold(route: Route, cotangents: Sequence[Cotangents], readings: Sequence[Reading], widest: int) -> bool:
    """Whether all cotangents that were read as zero are zero there, instead of an underflow between two rescalings.

    The cotangents of a target that are zero at the same rows are tested together, by a test cotangent that is nonzero
    where any of them is.  At every position, its nonzero entries are replaced by random numbers between 1 and 2, so it
    cannot underflow.  If the test cotangent is zero at a row of the trunk, it is zero at all rows below, so it goes
    down to the first such row only.  Cost: one cotangent per target and set.
    """
    tests: list[Cotangents] = []
    expected: list[tuple[int, int]] = []  # (row, number of the test) that must be zero
    first = num_tests = 0
    for c in cotangents:
        last = first + c.num
        rows = [row for row, reading in enumerate(readings) if len(reading.values) >= last]
        zero = {row: ~readings[row].values[first:last].reshape(c.num, -1).any(axis=1) for row in rows}
        if dead := [row for row in rows if zero[row].any()]:
            members, number = np.unique([zero[row] for row in dead], axis=0, return_inverse=True)
            for n in range(len(members)):
                same = [row for row, own in zip(dead, number.reshape(-1), strict=True) if own == n]
                expected += [(row, num_tests + n) for row in route.uppermost(same)]
            tests.append(_union(c, members))
            num_tests += len(members)
        first = last
    rows = sorted({row for row, _ in expected})
    found = dict(zip(rows, _pass(route.part(rows), tests, scaled(lengths()), 1, widest, _spread), strict=True))
    return all(not found[row].values[number].any() for row, number in expected)


def _union(c: Cotangents, members: npt.NDArray[np.bool_]) -> Cotangents:
    """For every set of cotangents (a row of ``members``), random numbers wherever one of them is nonzero."""
    union = torch.zeros(len(members), *c.target.shape, dtype=c.target.dtype, device=c.target.device)
    for first in range(0, c.num, _AT_ONCE):
        support = (c.draw(first, min(first + _AT_ONCE, c.num)) != 0).to(union)
        union += torch.tensordot(torch.as_tensor(members[:, first : first + len(support)]).to(union), support, 1)
    return Cotangents(c.target, len(members), len(members), lambda first, last: _spread(union[first:last])[0])


def _spread(cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Random numbers between 1 and 2 in place of all nonzero entries; exponents 0."""
    random = torch.rand(cotangents.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    zeros = torch.zeros(len(cotangents), dtype=torch.int64, device=cotangents.device)
    return torch.where(cotangents == 0, cotangents, (1 + random).to(cotangents)), zeros


def _bytes_each(cotangents: Cotangents, least: int) -> int:
    return max(cotangents.target.bytes, least)


def _next_batch(cotangents: Sequence[Cotangents], done: int, size: int, least: int) -> list[Cotangents]:
    """The cotangents after the first ``done``: as many as fit in ``size`` bytes, but at least one."""
    batch: list[Cotangents] = []
    for c in cotangents:
        first, each = min(done, c.num), _bytes_each(c, least)
        done -= first
        last = min(c.num, first + max(0 if batch else 1, size // each))
        if first < last:
            batch.append(c.window(first, last))
            size -= (last - first) * each
        if last < c.num:
            break
    return batch


def _stations(route: Route, positions: Sequence[int], stride: int | None) -> list[tuple[int, bool]]:
    """(position, whether to rescale there) from the topmost target down, wherever cotangents join or are rescaled."""
    joining = {position for position in positions if position > route.bottom}
    top = max(joining, default=route.bottom)
    regular = set(range(top - stride, route.bottom, -stride)) if stride else set()
    inner = {at for at in joining | regular if at == top or route.open(at)}
    return [(at, at in regular) for at in sorted(inner | {route.bottom}, reverse=True)]


def _descend(
    route: Route, batch: Sequence[Cotangents], stride: int | None, read: Read, renew: Renew
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Pull one batch from its topmost target to the bottom; yields (row, values, exponents)."""
    parts: list[Tensor] = []
    ledger: list[Tensor] = []
    starts = [route.position(c.target) for c in batch]
    for (upper, _), (lower, rescaled) in pairwise(_stations(route, starts, stride)):
        crossing = []
        for c, start in zip(batch, starts, strict=True):
            if lower < start <= upper:
                v = c.draw(0, c.num)
                exponents = torch.zeros(c.num, dtype=torch.int64, device=v.device)
                if start == upper:
                    parts.append(v)
                    ledger.append(exponents)
                else:  # cotangents from above cannot stop at this target, so its own join them at the next station
                    crossing.append((start, v, exponents))
        cotangents = parts[0] if len(parts) == 1 else route.workspace.joined(parts)
        exponents = ledger[0] if len(ledger) == 1 else torch.cat(ledger)
        crossing.insert(0, (upper, cotangents, exponents))
        parts, ledger = [], []
        for start, cotangents, exponents in crossing:
            cotangents, readings = route.cross(start, lower, cotangents, read)
            for row, values in readings:
                yield row, values, exponents
            if rescaled:
                cotangents, shift = renew(cotangents)
                exponents = exponents + shift
            parts.append(cotangents.clone() if len(crossing) > 1 else cotangents)  # the workspace is used again
            ledger.append(exponents)


def rescale(cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each cotangent (first dimension), without rounding, by the first power of two above its root mean square.

    Returns the scaled cotangents and the int64 exponents of these powers.  A cotangent of zeros does not change.
    """
    norms, common = vector_norms(cotangents, 1)
    rms = norms / math.sqrt(cotangents[0].numel())
    exponents = torch.where(rms > 0, torch.frexp(rms).exponent + common.to(rms.device), 0)
    dtype = cotangents.real.dtype if cotangents.is_complex() else cotangents.dtype
    limit = math.frexp(torch.finfo(dtype).max)[1] - 2
    exponents = exponents.to(device=cotangents.device, dtype=torch.int64).clamp(-limit, limit)
    return cotangents * power_of_two(-exponents, dtype).reshape(-1, *[1] * (cotangents.ndim - 1)), exponents
