"""Several processes under ``torch.distributed``: which one this is, and what all of them agree on."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


def parallel() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """The number of this process; 0 if it is alone."""
    return torch.distributed.get_rank() if parallel() else 0


def gathered(own: T) -> list[T]:
    """The values that all processes pass in, in the order of their ranks."""
    if not parallel():
        return [own]
    values: list[T] = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, own)
    return values


def agreed(decision: bool) -> bool:
    """The decision of rank 0.  Clocks differ between ranks, but either all of them must measure or none."""
    if not parallel():
        return decision
    shared = [decision]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
