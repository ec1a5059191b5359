"""Helpers for several processes under ``torch.distributed``: rank, shared values and decisions, parts of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

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


def agreed(decision: T, groups: Iterable[Any] | None = None) -> T:
    """The decision of the first rank, for all ranks, or those of ``groups``, which must not act differently."""
    if not parallel():
        return decision
    shared = [decision]
    for group in [None] if groups is None else groups:
        torch.distributed.broadcast_object_list(shared, group_src=0, group=group)
    return shared[0]


def local(tensor: Any) -> Tensor:
    """This process's part of a DTensor, after sums over processes that are still due; any other tensor as it is."""
    if not is_shard(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    wanted = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    part: Tensor = tensor.detach().redistribute(placements=wanted).to_local()
    return part


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: each process holds a part of it.  Importing that class would take a second."""
    return hasattr(tensor, "to_local")


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups that are distributed over the same processes in the same way."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        way = (tensor.device_mesh, tensor.placements) if is_shard(tensor) else None  # type: ignore[attr-defined]
        groups.setdefault(way, []).append(tensor)
    return list(groups.values())


def of_all_parts(number: Tensor, of: Any, how: str) -> Tensor:
    """The "sum", "max" or "norm" of numbers that the processes computed from their parts of tensors such as ``of``."""
    if not is_shard(of):
        return number
    if how == "norm":
        return of_all_parts(number.double().square(), of, "sum").sqrt()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    kept = [Replicate() if p.is_replicate() or p.is_partial() else Partial(how) for p in of.placements]
    return DTensor.from_local(number, of.device_mesh, kept, run_check=False).full_tensor()


def mean_of_ranks(number: Tensor) -> Tensor:
    """The mean of a number over all processes."""
    total = number.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
