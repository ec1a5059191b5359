"""Helpers for several processes under ``torch.distributed``: rank, shared values and shared decisions."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


def parallel() -> bool:
    """Whether ``torch.distributed`` is initialized."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """The rank of this process; 0 if there is only one process."""
    return torch.distributed.get_rank() if parallel() else 0


def share(num: int) -> range:
    """Numbers of this process's ``num`` samples among those of all processes, which take turns."""
    world = torch.distributed.get_world_size() if parallel() else 1
    return range(rank(), rank() + num * world, world)


def gathered(own: T) -> list[T]:
    """The value of ``own`` in every process, in the order of the ranks."""
    if not parallel():
        return [own]
    values: list[T] = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, own)
    return values


def agreed(decision: bool) -> bool:
    """The decision of rank 0, for all ranks: clocks differ between ranks, but either all must measure or none."""
    if not parallel():
        return decision
    shared = [decision]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
