"""The backward sweep pulls batches of cotangents from targets to sources, and reads them at the rows of a route.

A batch has shape (cotangents, *shape of a trunk tensor).  Every few positions each cotangent is divided by a power of
two, which is the same for all samples; the exponents are summed as integers.  Pulling back is linear, so rescaling
changes no bit of the result, at any depth and also if samples are coupled.  The first sweep rescales rarely.  If a
length comes near an end of the floating-point range, the sweep is repeated with a shorter stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.backward.cotangents import Cotangents
from gradscope.backward.pulling import pulling
from gradscope.backward.route import Read, Route, Row
from gradscope.memory import Workspace, batch_bytes, is_out_of_memory, peak_bytes
from gradscope.norms import plain_norms, power_of_two, vector_norms

# Numbers of positions between two rescalings, tried in this order.
STRIDES = (128, 8, 1)

Progress = Callable[[float], None]
_Piece = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reading:
    """Readings at a row, for the c cotangents of targets above it: ``values`` (c, ...) times ``2**exponents`` (c,)."""

    values: npt.NDArray[np.float64]
    exponents: npt.NDArray[np.int64]


def lengths(batch_size: int = 0) -> Read:
    """A function that keeps |J^T v|, (c, B), or (c, 1) if the gradient's first dimension is not ``batch_size``."""

    def read(row: int, gradient: Tensor, workspace: Workspace) -> Tensor:
        per_sample = gradient.ndim > 1 and gradient.shape[1] == batch_size
        norms = plain_norms(gradient, 2 if per_sample else 1, workspace.scratch(gradient))
        return norms if per_sample else norms[:, None]

    return read


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

    Returns one `Reading` per row, for the targets strictly above it.  Raises FloatingPointError for NaN or Inf.

    Cost: one backward pass to activations per cotangent, and one device synchronization.  Memory besides the graph and
    the readings: 5 c w + `route.RUN_BYTES`, for c cotangents per batch with w bytes each at the widest layer.  c w is
    at most 256 MiB (1 GiB on devices other than a CPU) and at most a twentieth of the free memory, unless c = 1.  If
    memory runs out, c is halved.
    """
    if not route.rows:
        return []
    size = batch_bytes(route.rows[0].device)
    least = widest * size // peak_bytes(route.rows[0].device)
    total = sum(c.num for c in cotangents)
    for stride in strides:
        found: list[list[_Piece]] = [[] for _ in route.rows]
        done = 0
        with pulling():
            while done < total:
                batch = _next_batch(cotangents, done, size, least)
                num = sum(c.num for c in batch)
                try:
                    arrived = list(_descend(route, batch, stride, read))
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
        readings = _collect(found)
        if _comfortable(route.rows, readings):
            break
    for row, reading in zip(route.rows, readings, strict=True):
        if not np.isfinite(reading.values).all():
            raise FloatingPointError(
                f"The gradient at layer {row.name!r} is NaN or Inf although the activations are finite: an "
                "operation there divides by zero or overflows. Measure in float64, or move x off the singular point."
            )
    return readings


def _comfortable(rows: Sequence[Row], readings: Sequence[Reading]) -> bool:
    """Whether all readings, without their exponents, are far from both ends of the range of their dtype."""
    for row, reading in zip(rows, readings, strict=True):
        reach = 2.0**5 if row.dtype == torch.float16 else 2.0**40
        values = reading.values.reshape(len(reading.values), -1)
        square = np.einsum("ij,ij->i", values, values) / row.size
        if len(square) and not (square.min() > reach**-2 and square.max() < reach**2):
            return False
    return True


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


def _stations(positions: Sequence[int], bottom: int, stride: int | None) -> list[tuple[int, bool]]:
    """(position, whether to rescale there) from the topmost target down, wherever cotangents join or are rescaled."""
    joining = {position for position in positions if position > bottom}
    top = max(joining, default=bottom)
    regular = set(range(top - stride, bottom, -stride)) if stride else set()
    return [(at, at in regular) for at in sorted(joining | regular | {bottom}, reverse=True)]


def _descend(
    route: Route, batch: Sequence[Cotangents], stride: int | None, read: Read
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Pull one batch from its topmost target to the bottom; yields (row, values, exponents)."""
    parts: list[Tensor] = []
    ledger: list[Tensor] = []
    starts = [route.position(c.target) for c in batch]
    for (upper, _), (lower, rescaled) in pairwise(_stations(starts, route.bottom, stride)):
        for c, start in zip(batch, starts, strict=True):
            if start == upper:
                parts.append(c.draw(0, c.num))
                ledger.append(torch.zeros(c.num, dtype=torch.int64, device=parts[-1].device))
        cotangents = parts[0] if len(parts) == 1 else _joined(parts, route.workspace)
        exponents = ledger[0] if len(ledger) == 1 else torch.cat(ledger)
        cotangents, readings = route.cross(upper, lower, cotangents, read)
        for row, values in readings:
            yield row, values, exponents
        if rescaled:
            cotangents, shift = rescale(cotangents)
            exponents = exponents + shift
        parts, ledger = [cotangents], [exponents]


def _joined(parts: Sequence[Tensor], workspace: Workspace) -> Tensor:
    """All cotangents in one tensor."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return torch.cat(list(parts), out=workspace.beside(parts[0], shape))


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


def _collect(found: Sequence[Sequence[_Piece]]) -> list[Reading]:
    """Copy all values and exponents to the CPU at once; return one `Reading` per row."""
    pieces = [piece for of_row in found for piece in of_row]
    if not pieces:
        return [Reading(np.zeros((0, 1)), np.zeros(0, dtype=np.int64)) for _ in found]
    device = pieces[0][0].device
    values = torch.cat([values.reshape(-1).to(device) for values, _ in pieces]).cpu().numpy()
    exponents = torch.cat([exponents.to(device) for _, exponents in pieces]).cpu().numpy()
    readings, first, second = [], 0, 0
    for of_row in found:
        size, num = sum(values.numel() for values, _ in of_row), sum(len(exponents) for _, exponents in of_row)
        shape = of_row[0][0].shape[1:] if of_row else (1,)
        own = values[first : first + size].reshape(num, *shape)
        readings.append(Reading(own, exponents[second : second + num]))
        first, second = first + size, second + num
    return readings
