"""Lengths of the tensors of one forward pass, measured before anything overwrites the tensors.

Small tensors are copied to float64 in blocks, because the norms of a block cost as much as those of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.forward.layers import Layer
from gradscope.forward.trunk import Vertex
from gradscope.memory import BLOCK, BLOCKED, Later, Workspace
from gradscope.norms import vector_norms

# Most tensors of one block, and most blocks at a time.
MOST_SLOTS, MOST_BLOCKS = 16, 32


Measured = tuple[list[Any], Tensor, Tensor | None]  # vertices, norms and exponent, both still on the device


class SquaredLength(NamedTuple):
    """|f|^2 of a layer as ``squares * 4**exponent``, on the CPU: shape (B,), or (1,) for the whole batch."""

    squares: npt.NDArray[np.float64]
    exponent: int


class Lengths:
    """Squared lengths of the tensors of a pass, by vertex; they are copied to the CPU when the first is needed."""

    def __init__(self, measured: Sequence[Measured]) -> None:
        self.measured = measured
        exponents = [exponent for _, _, exponent in measured if exponent is not None]
        self.later = Later([*[norms for _, norms, _ in measured], *exponents])

    def __getitem__(self, key: Vertex) -> SquaredLength:
        return self.all[key]

    @property
    def finite(self) -> bool:
        """Whether all lengths are finite."""
        return all(np.isfinite(norms).all() for norms in self.later.arrays)

    def read(self) -> None:
        """Copy the lengths to the CPU, and run their checks."""
        _ = self.later.arrays

    @cached_property
    def all(self) -> dict[Vertex, SquaredLength]:
        """All lengths.  Cost: one device synchronization, if they were not copied yet."""
        norms, found = self.later.arrays, dict[Vertex, SquaredLength]()
        powers = iter(norms[len(self.measured) :])
        for (keys, _, exponent), own in zip(self.measured, norms, strict=False):
            power = 0 if exponent is None else int(next(powers))
            for key, squares in zip(keys, np.square(own).reshape(len(keys), -1), strict=True):
                found[key] = SquaredLength(squares, power)
        return found


class Ruler:
    """Measures the tensors of one pass."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.workspace = Workspace()
        self.blocks: dict[Any, _Block | None] = {}  # by kind of tensor; None for kinds that are measured one by one
        self.measured: list[Measured] = []

    def measure(self, key: Vertex, tensor: Tensor) -> None:
        """Measure a tensor as it is now; later changes of the tensor have no effect."""
        kind = tensor.shape, tensor.dtype, tensor.device
        block = self.blocks.get(kind)
        if block is None and kind not in self.blocks:
            block = self.blocks[kind] = self._block(tensor)
        if block is None:
            norms, exponent = vector_norms(tensor, self._start(tensor), self.workspace.scratch(tensor))
            self.measured.append(([key], norms, exponent if tensor.dtype in _SCALED else None))
            return
        graded = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # torch.no_grad would take longer than the copy
        try:
            block.slots[block.num].copy_(tensor)
        finally:
            torch._C._set_grad_enabled(graded)
        block.keys[block.num] = key
        block.num += 1
        if block.num == block.room:
            self._empty(block)

    def lengths(self) -> Lengths:
        """The lengths of all tensors so far."""
        for block in filter(None, self.blocks.values()):
            self._empty(block)
        return Lengths(self.measured)

    def _block(self, tensor: Tensor) -> _Block | None:
        """Room for several tensors of one kind; None if large, or where a float64 copy is slow or not exact."""
        room, start = min(MOST_SLOTS, BLOCK // tensor.numel()), self._start(tensor)
        exact = tensor.is_floating_point() and tensor.dtype not in _SCALED and tensor.device.type == "cpu"
        if room < BLOCKED or not exact or start == tensor.ndim or tensor.layout is not torch.strided:
            return None
        if len(self.blocks) >= MOST_BLOCKS:
            for block in filter(None, self.blocks.values()):
                self._empty(block)
            self.blocks.clear()
        return _Block(torch.empty(room, *tensor.shape, dtype=torch.float64, device=tensor.device), start)

    def _empty(self, block: _Block) -> None:
        """Take the norms of the tensors in a block."""
        if num := block.num:
            rows = block.rows if num == block.room else block.rows[: num * len(block.rows) // block.room]
            self.measured.append((block.keys[:num], torch.linalg.vector_norm(rows, dim=1), None))
            block.num = 0

    def _start(self, tensor: Tensor) -> int:
        return int(tensor.shape[:1] == (self.batch_size,))


class _Block:
    """Copies of ``num`` tensors of one shape, and their keys."""

    def __init__(self, memory: Tensor, start: int) -> None:
        self.slots, self.room = memory.unbind(0), len(memory)
        self.rows = memory.view(math.prod(memory.shape[: start + 1]), -1)  # one for each length
        self.num = 0
        self.keys: list[Any] = [None] * self.room


_SCALED = (torch.float64, torch.complex128)


class ZeroOutputError(ValueError):
    """Raised if the target layer outputs only zeros, as when all units are dead: its relative change is undefined.

    >>> import gradscope as gs
    >>> gs.gsc(torch.nn.Linear(3, 2, bias=False), torch.zeros(1, 3), layers="*")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ZeroOutputError: The output of layer 'output' is zero for the whole batch ...
    """


def check_length(target: Layer, squares: npt.NDArray[np.float64], reduction: str) -> None:
    """Raise an error if the target has length zero, so that it has no relative change."""
    zero = np.flatnonzero(squares == 0)
    if len(zero) == len(squares):
        raise ZeroOutputError(
            f"The output of layer {target.name!r} is zero for the whole batch, so its relative change is not defined."
        )
    if reduction != "batch" and len(zero):
        raise ValueError(
            f"The output of layer {target.name!r} is zero for sample {zero[0]}, so this sample has no GSC: "
            'leave this sample out, or use reduction="batch".'
        )
