"""Several processes that watch one training run: what they agree on, and which samples are whose."""

from __future__ import annotations

import torch


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
