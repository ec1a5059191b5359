"""How much memory a sweep may take, and what running out of it looks like."""

from __future__ import annotations

import os

import torch

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
