"""Do the samples of a batch influence each other?  Detected from gradients, never guessed from class names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradscope.layers import Layer
from gradscope.sweep import Start, sweep
from gradscope.trunk import Trunk


def coupled(trunk: Trunk, rows: Sequence[Layer], target: Layer, batch_size: int) -> bool:
    """Whether a cotangent on some samples of the target leaves gradients of other samples, at any of the rows.

    The rows are all recorded tensors that lead to the target, also those in branches: batch statistics may lie there.

    Two cotangents are pulled back: one on a fixed random half of the samples, one on the other half.  Uncoupled
    samples give exact zeros in the other half, in floating point too.  Any ordered pair of samples in different halves
    is seen, so k independent couplings are missed with probability 2^-k; batch normalization couples all pairs.
    A tensor whose leading dimension is not the batch says nothing, and is skipped.  Cost: two backward passes.
    """
    if batch_size == 1:
        return False
    rows = [layer for layer in rows if layer.shape[:1] == (batch_size,) and layer.index != target.index]
    if target.shape[:1] != (batch_size,) or not rows:
        return True  # nothing is known, and treating samples as coupled is right in either case
    generator = torch.Generator().manual_seed(0)
    half = torch.zeros(batch_size, dtype=torch.bool)
    half[torch.randperm(batch_size, generator=generator)[: batch_size // 2]] = True
    values = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    masks = torch.stack([half, ~half]).reshape(2, batch_size, *[1] * (len(target.shape) - 1))

    def draw(first: int, last: int) -> Tensor:
        return (masks[first:last] * values).to(dtype=target.dtype, device=target.device)

    start = Start(len(trunk.edges) - 1, 2, draw, target.size * target.dtype.itemsize)
    readings = sweep(trunk, rows, [start], batch_size=batch_size)
    return any(
        bool((reading.squares[0, ~half.numpy()] != 0).any() or (reading.squares[1, half.numpy()] != 0).any())
        for reading in readings
    )
