"""What a sweep reads at the rows of its route: lengths of gradients, copied to the CPU together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.backward.route import Read
from gradscope.memory import Later, Workspace
from gradscope.norms import power_of_two, stacked_norms

Piece = tuple[Tensor, Tensor]  # what was read of some cotangents, and their exponents


class Reading(NamedTuple):
    """Readings at a row, for the c cotangents of targets above it: ``values`` (c, ...) times ``2**exponents`` (c,)."""

    values: npt.NDArray[np.float64]
    exponents: npt.NDArray[np.int64]


_NONE = Reading(np.zeros((0, 1)), np.zeros(0, dtype=np.int64))


def lengths(batch_size: int = 0, axes: Sequence[int | None] = ()) -> Read:
    """A function that keeps |J^T v|, (c, B), or (c, 1) if the gradient's first dimension is not ``batch_size``.

    ``axes``: for each row, a dimension of its tensor that is kept as well, (c, B, T) or (c, T); None for no dimension.
    """

    def read(rows: Sequence[int], gradients: Sequence[Tensor], workspace: Workspace, lead: int) -> list[Tensor]:
        starts = [lead + (gradient.shape[lead : lead + 1] == (batch_size,)) for gradient in gradients]
        if axes:
            kept = [axes[row] for row in rows]
            each = list(zip(gradients, starts, kept, strict=True))
            gradients = [g if axis is None else g.movedim(lead + axis, start) for g, start, axis in each]
            starts = [start + (axis is not None) for _, start, axis in each]
        return stacked_norms(gradients, starts, workspace)

    return read


def scaled(read: Read) -> Read:
    """The same readings if squares of float64 gradients leave the range of float64.  Cost: a few operations per row."""

    def one(row: int, gradient: Tensor, workspace: Workspace, lead: int) -> Tensor:
        if gradient.dtype not in (torch.float64, torch.complex128):
            return read([row], [gradient], workspace, lead)[0]
        power = power_of_two(-torch.frexp(gradient.abs().amax()).exponent, torch.float64)
        return read([row], [gradient * power], workspace, lead)[0] / power

    def each(rows: Sequence[int], gradients: Sequence[Tensor], workspace: Workspace, lead: int) -> list[Tensor]:
        return [one(row, gradient, workspace, lead) for row, gradient in zip(rows, gradients, strict=True)]

    return each


def collected(found: Sequence[Sequence[Piece]]) -> list[Reading]:
    """Copy all values and exponents to the CPU at once; return one `Reading` per row."""
    pieces = [piece for of_row in found for piece in of_row]
    if not pieces:
        return [_NONE] * len(found)
    shared = {id(exponents): exponents for _, exponents in pieces}  # rows that were read together share them
    each = Later([*[values for values, _ in pieces], *shared.values()]).arrays
    exponents_of = {key: part.astype(np.int64) for key, part in zip(shared, each[len(pieces) :], strict=True)}
    readings, done = [], 0
    for of_row in found:
        if not of_row:
            readings.append(_NONE)
            continue
        values, exponents = each[done], exponents_of[id(of_row[0][1])]
        if of_row[1:]:
            values = np.concatenate([part.reshape(-1) for part in each[done : done + len(of_row)]])
            exponents = np.concatenate([exponents_of[id(shift)] for _, shift in of_row])
            done += len(of_row) - 1
        done += 1
        shape = of_row[0][0].shape[1:] if of_row[0][0].ndim > 1 else (values.size // exponents.size,)
        readings.append(_of_zeros(values.reshape(exponents.size, *shape), exponents))
    return readings


def near_one(reading: Reading) -> Reading:
    """The same reading with values near 1, whose squares stay in the range of float64."""
    values = reading.values
    powers = np.frexp(np.abs(values).max(axis=tuple(range(1, values.ndim)), initial=0))[1].astype(np.int64)
    values = np.ldexp(values, -powers.reshape(-1, *[1] * (values.ndim - 1)))
    return _of_zeros(values, reading.exponents + powers)


def _of_zeros(values: npt.NDArray[np.float64], exponents: npt.NDArray[np.int64]) -> Reading:
    """A reading in which the exponent of zeros, which means nothing, is the least of the others.

    A large one would make the other lengths underflow in their sum.
    """
    if exponents.any():
        nonzero = values.any(axis=tuple(range(1, values.ndim)))
        least = exponents.min(initial=1 << 60, where=nonzero) if nonzero.any() else 0
        exponents = np.where(nonzero, exponents, least)
    return Reading(values, exponents)
