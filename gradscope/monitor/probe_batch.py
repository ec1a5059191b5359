"""What a record contains besides weights and gradients: coefficients and statistics on the probe batch.

Cost of the coefficients: that of `gradscope.gsc` with a few probes; of the statistics of pre-activations and of those
of attention heads: one forward pass each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscope import distributed
from gradscope.backward.cotangents import Probes
from gradscope.coefficients.gsc import gsc
from gradscope.forward.inputs import Forward, as_batch
from gradscope.forward.layers import LayerFilter
from gradscope.measures import DeadFraction, PreactivationStd, SignDiversity
from gradscope.measures.measuring import Measure, begun
from gradscope.measures.preactivations import NONLINEARITIES
from gradscope.transformers.attention import measurement as attention

STATISTICS: tuple[Measure, ...] = (PreactivationStd(), SignDiversity(), DeadFraction())


def coefficients(
    model: nn.Module, data: Any, forward: Forward | None, layers: LayerFilter | None, probes: Probes
) -> pd.DataFrame:
    """Return the GSC of every unit on all ranks' shares of the batch."""
    data = iter([part(data, forward)]) if distributed.parallel() else data
    # Under autocast, rounding errors of the Jacobians would accumulate over layers.
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        return gsc(model, data, forward=forward, layers=layers, probes=probes).to_frame()


Read = Callable[[], pd.DataFrame | None]


def statistics(model: nn.Module, data: Any, forward: Forward | None) -> Read:
    """Compute statistics of pre-activations on the device; the result returns them once they are read.

    It returns None for a model without nonlinear modules, and raises what went wrong here.
    """
    if not any(isinstance(module, NONLINEARITIES) for module in model.modules()):
        return lambda: None
    return _later(lambda: begun(model, data, STATISTICS, forward=forward, loss_fn=None))


def heads(model: nn.Module, data: Any, forward: Forward | None) -> Read:
    """The same for attention heads; the result raises `NoAttentionError` if no attention was seen."""
    return _later(lambda: attention.begun(model, data, forward=forward))


def _later(begin: Callable[[], Read]) -> Read:
    try:
        return begin()
    except (ValueError, FloatingPointError) as error:
        problem = error  # Python deletes the name of a caught error

    def failed() -> pd.DataFrame:
        raise problem

    return failed


def part(data: Any, forward: Forward | None) -> Any:
    """Return this rank's share of the batch: every ``world_size``-th sample, starting at ``rank``."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    num = as_batch(data, forward=forward, finite=False).size
    if num < world:
        raise ValueError(
            f"The probe batch of {num} samples is too small for {world} ranks; give at least one sample per rank."
        )
    return pytree.tree_map(
        lambda leaf: leaf[rank::world] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num else leaf, data
    )
