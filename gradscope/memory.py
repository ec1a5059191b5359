"""Memory budget of a backward sweep, recognition of out-of-memory errors, and copies from a device to the CPU."""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]

# Tensors are copied to float64 together if at least BLOCKED of them fit into a block of this many numbers.
BLOCK, BLOCKED = 1 << 17, 4
# How many numbers of a tensor are copied to float64 at a time, at most.
SCRATCH = 1 << 18

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


EMPTY = torch.empty(0)


class Workspace:
    """Two alternating buffers for cotangents and a float64 buffer.  Buffers grow if necessary and never shrink."""

    def __init__(self) -> None:
        self._buffers, self._scratch = [EMPTY, EMPTY], EMPTY

    def beside(self, cotangents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An uninitialized tensor with dtype and device of ``cotangents``, which shares no memory with them."""
        taken = cotangents.untyped_storage().data_ptr()
        number = int(self._buffers[0].untyped_storage().data_ptr() == taken)
        self._buffers[number] = grown(self._buffers[number], math.prod(shape), cotangents.dtype, cotangents.device)
        return self._buffers[number][: math.prod(shape)].view(shape)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """All cotangents in one tensor.  The first of them are not copied if they lie in a buffer that has room."""
        first, size = parts[0], sum(part.numel() for part in parts)
        shape = (sum(map(len, parts)), *first.shape[1:])
        for buffer in self._buffers:
            if buffer.data_ptr() == first.data_ptr() and buffer.numel() >= size and first.is_contiguous():
                whole = buffer[:size].view(shape)
                torch.cat(list(parts[1:]), out=whole[len(first) :])
                return whole
        return torch.cat(list(parts), out=self.beside(first, shape))

    def scratch(self, a: Tensor) -> Tensor | None:
        """A flat float64 buffer for ``a`` (a part if it is large); None where torch sums in float64 as fast without."""
        if a.device.type != "cpu":
            return None
        self._scratch = grown(self._scratch, min(a.numel(), SCRATCH), torch.float64, a.device)
        return self._scratch


def grown(buffer: Tensor, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``buffer`` if it has room for ``size`` numbers of this kind, otherwise a new, larger one."""
    if buffer.dtype == dtype and buffer.device == device and buffer.numel() >= size:
        return buffer
    return torch.empty(max(size, min(2 * buffer.numel(), 2 * size)), dtype=dtype, device=device)


class _Waiting(threading.local):
    """What waits in this thread, with the number of contexts `together` around it."""

    def __init__(self) -> None:
        self.depth = 0
        self.here: list[tuple[int, Later]] = []


_waiting = _Waiting()


class together:  # noqa: N801 - used like a function
    """Context in which all tensors that wait (`Later`) are copied to the CPU as soon as one of them is needed.

    Contexts may be nested: the outermost one counts.  What waits at an error is forgotten, with its checks.
    """

    def __enter__(self) -> None:
        _waiting.depth += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind or _waiting.depth == 1:
            leave(_waiting.depth - 1)
        else:
            _waiting.depth -= 1


def opened() -> int:
    """The number of contexts `together` that are open in this thread."""
    return _waiting.depth


def leave(depth: int) -> None:
    """Leave the contexts `together` inside the outermost ``depth`` ones, and forget what waits there."""
    _waiting.depth = depth
    _waiting.here[:] = [(own, later) for own, later in _waiting.here if own <= depth]


class Later:
    """Tensors that stay on their device until somebody needs ``arrays``, float64 copies of them on the CPU.

    A copy waits for the device, so all that wait in a context `together` are copied at once.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors: list[Tensor] | None = list(tensors)
        self.checks: list[Callable[[], None]] = []
        self.copies: list[FloatArray] = []
        if _waiting.depth:
            _waiting.here.append((_waiting.depth, self))

    @property
    def arrays(self) -> list[FloatArray]:
        """The copies, in the shapes of the tensors.  Cost: one device synchronization, if they were not copied yet."""
        if self.tensors is not None:
            found = [later for _, later in _waiting.here]
            if self in found:
                _waiting.here.clear()
            _copy(found if self in found else [self])
        return self.copies

    def then(self, check: Callable[[], None]) -> None:
        """Call ``check`` as soon as the copies are there; an error of it reaches whoever asked for any copy."""
        if self.tensors is None:
            check()
        else:
            self.checks.append(check)


def _copy(those: Iterable[Later]) -> None:
    """Copy all tensors of those, one synchronization per device; then call their checks."""
    devices: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)
    for later in those:
        for tensor in later.tensors or ():
            devices[tensor.device][id(tensor)] = tensor
    copies: dict[int, FloatArray] = {}
    for device, tensors in devices.items():
        kind = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        with torch.no_grad():
            flat = [a if a.ndim == 1 else a.reshape(-1) for a in tensors.values()]
            packed = torch.cat([a if a.dtype == kind else a.to(kind) for a in flat]).cpu().double().numpy()
        last = 0
        for key, tensor in tensors.items():
            first, last = last, last + tensor.numel()
            copies[key] = packed[first:last] if tensor.ndim == 1 else packed[first:last].reshape(tensor.shape)
    for later in those:
        later.copies, later.tensors = [copies[id(tensor)] for tensor in later.tensors or ()], None
    errors = []
    for later in those:
        checks, later.checks = later.checks, []
        for check in checks:
            try:
                check()
            except Exception as error:  # raised when all have been checked, because nobody checks twice
                errors.append(error)
    if errors:
        raise errors[0]


def read_once(tensors: Iterable[Tensor]) -> list[float]:
    """The values of tensors with one element each, copied to the CPU together: the device is waited for once."""
    return [array.item() for array in Later(tensors).arrays]
