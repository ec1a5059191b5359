"""Several processes that watch one training run: what they agree on, and which samples are whose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradscope.inputs import Forward, as_batch


def parallel() -> bool:
    """Whether ``torch.distributed`` runs."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def agreed(decision: bool) -> bool:
    """What rank 0 decides: clocks differ between ranks, and all must measure, or none."""
    if not parallel():
        return decision
    shared = [decision]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def part(x: Any, forward: Forward | None) -> Any:
    """This rank's share of the samples, every so manieth.

    Raises:
        ValueError: Fewer samples than ranks.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    num = as_batch(x, forward=forward, loss_fn=None).size
    if num < world:
        raise ValueError(f"The probe batch of {num} samples is too small for {world} ranks; give one sample a rank.")
    return pytree.tree_map(
        lambda leaf: leaf[rank::world] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num else leaf, x
    )
