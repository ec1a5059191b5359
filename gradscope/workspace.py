"""Memory that is used again and again: fresh pages cost a sweep more than its arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Numbers that are copied to float64 at a time.
SCRATCH = 1 << 21


class Workspace:
    """Two buffers for bundles, used in turn, and one in float64; they grow where they must, and never shrink."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(0), torch.empty(0)]
        self._scratch = torch.empty(0, dtype=torch.float64)

    def beside(self, bundle: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uninitialized memory of that shape, of the bundle's dtype and device, which the bundle does not lie in."""
        taken = bundle.untyped_storage().data_ptr()
        number = int(self._buffers[0].untyped_storage().data_ptr() == taken)
        self._buffers[number] = _grown(self._buffers[number], math.prod(shape), bundle.dtype, bundle.device)
        return self._buffers[number][: math.prod(shape)].view(shape)

    def scratch(self, a: Tensor) -> Tensor:
        """A flat float64 buffer on the same device with room for ``a``, or for a part of a large one."""
        self._scratch = _grown(self._scratch, min(a.numel(), SCRATCH), torch.float64, a.device)
        return self._scratch


def _grown(buffer: Tensor, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if buffer.dtype == dtype and buffer.device == device and buffer.numel() >= size:
        return buffer
    return torch.empty(max(size, min(2 * buffer.numel(), 2 * size)), dtype=dtype, device=device)
