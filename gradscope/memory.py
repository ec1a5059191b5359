"""Memory budget of a backward sweep, and recognition of out-of-memory errors."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

# Tensors are copied to float64 together if at least BLOCKED of them fit into a block of this many numbers.
BLOCK, BLOCKED = 1 << 17, 8
# How many numbers of a tensor are copied to float64 at a time, at most.
SCRATCH = 1 << 21

# Bytes of a batch.  A CPU is fastest if a batch fits into a core's cache; other devices need large matrix products.
_BATCH = {"cpu": 1 << 21}
_BATCH_ELSEWHERE = 1 << 28
# Memory in multiples of a batch of cotangents: the batch, the batch one step further, a float64 copy (2), a derivative.
_COPIES = 5
_PEAK = 1 << 28


def batch_bytes(device: torch.device) -> int:
    """Memory budget in bytes for one batch of cotangents, at the target layer."""
    return _BATCH.get(device.type, _BATCH_ELSEWHERE)


def peak_bytes(device: torch.device) -> int:
    """Memory budget in bytes for one batch of cotangents, at the widest layer: all copies fit in 1/4 of free memory."""
    elsewhere = _PEAK if device.type == "cpu" else 4 * _PEAK
    return max(1, min(elsewhere, free_bytes(device) // 4 // _COPIES))


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on a device now."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by the allocator, for reuse
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return 4 * _PEAK * _COPIES


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


_EMPTY = torch.empty(0)


class Workspace:
    """Two alternating buffers for cotangents and a float64 buffer.  Buffers grow if necessary and never shrink."""

    def __init__(self) -> None:
        self._buffers, self._scratch = [_EMPTY, _EMPTY], _EMPTY

    def beside(self, cotangents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An uninitialized tensor with dtype and device of ``cotangents``, which shares no memory with them."""
        taken = cotangents.untyped_storage().data_ptr()
        number = int(self._buffers[0].untyped_storage().data_ptr() == taken)
        self._buffers[number] = _grown(self._buffers[number], math.prod(shape), cotangents.dtype, cotangents.device)
        return self._buffers[number][: math.prod(shape)].view(shape)

    def scratch(self, a: Tensor, size: int = 0) -> Tensor:
        """A flat float64 buffer on the device of ``a``, for ``size`` numbers or for ``a`` (a part if it is large)."""
        self._scratch = _grown(self._scratch, size or min(a.numel(), SCRATCH), torch.float64, a.device)
        return self._scratch


def _grown(buffer: Tensor, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if buffer.dtype == dtype and buffer.device == device and buffer.numel() >= size:
        return buffer
    return torch.empty(max(size, min(2 * buffer.numel(), 2 * size)), dtype=dtype, device=device)
