"""How much memory a sweep may take, and what running out of it looks like."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

# Numbers that are copied to float64 at a time.
SCRATCH = 1 << 21


# On a CPU a bundle that stays in a core's cache is pulled back faster; other devices want large products.
_BUNDLE = {"cpu": 1 << 21}
_BUNDLE_ELSEWHERE = 1 << 28
# A bundle at the widest layer takes five times its size: itself, the next one, a copy in float64, a derivative.
_COPIES = 5
_PEAK = 1 << 28


def bundle_bytes(device: torch.device) -> int:
    """What the cotangents that are pulled back together should take at their target."""
    return _BUNDLE.get(device.type, _BUNDLE_ELSEWHERE)


def peak_bytes(device: torch.device) -> int:
    """What they may take at the widest layer: all copies together stay within a quarter of what is free."""
    elsewhere = _PEAK if device.type == "cpu" else 4 * _PEAK
    return max(1, min(elsewhere, free_bytes(device) // 4 // _COPIES))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return 4 * _PEAK * _COPIES


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


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
