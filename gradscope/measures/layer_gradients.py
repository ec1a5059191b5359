"""Gradients of per-sample losses with respect to each layer's parameters, summarized while they are computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from gradscope.backward.pulling import PullBack, pulling
from gradscope.forward.inputs import Batch, Forward, LossFunction
from gradscope.forward.modules import owned_parameters
from gradscope.forward.recorder import record
from gradscope.forward.state import alone, state_restored
from gradscope.forward.trunk import leaf_edge, vertex
from gradscope.measures.gradient import LayerGradient
from gradscope.memory import Later, peak_bytes
from gradscope.norms import real

GROUPS = 8  # groups of samples in the jackknife over unit gradients


def layer_gradients(
    model: nn.Module, batch: Batch, *, forward: Forward | None, loss_fn: LossFunction
) -> dict[str, LayerGradient]:
    """Return the `LayerGradient` of every module that holds trainable parameters, by module name.

    Call this in a context `together`: then gradients are checked when the first number is read.

    Cost: one forward pass, a backward pass of the mean loss, and a backward pass of the loss of each sample.  The
    backward passes of several samples run at once (vectorized).  Memory: ten full gradients, and the gradients of the
    samples that run at once.  These take at most 1/20 of the free memory in float32, unless one sample needs more.

    Raises:
        ValueError: No parameter is trainable, the batch has one sample, or the losses do not depend on any parameter.
        FloatingPointError: A gradient is NaN or Inf; the message names the layer.
    """
    if batch.size < 2:
        raise ValueError("Gradient statistics compare samples, so they need a batch of at least two, got one.")
    modules = dict(model.named_modules())
    owners = owned_parameters(modules)
    recording = record(modules, batch, forward=forward, loss_fn=loss_fn)
    loss = next(layer for layer in recording.tensors if vertex(layer.edge) == vertex(recording.end))
    edges = {id(p): leaf_edge(p) for parameters in owners.values() for p in parameters}
    reached = _reached(recording.end, {edge.node for edge in edges.values()})
    inputs = {key: edge for key, edge in edges.items() if edge.node in reached}
    if not inputs:
        raise ValueError("The losses depend on none of the trainable parameters; does loss_fn detach the output?")
    device = next(iter(owners.values()))[0].device
    numel = sum(real(p).numel() for parameters in owners.values() for p in parameters)
    at_once = max(1, peak_bytes(device) // (4 * max(1, numel)))
    pull_back, basis = PullBack(), torch.eye(batch.size, device=loss.device, dtype=loss.dtype)
    with alone, state_restored(modules) as state, state, pulling():  # checkpointed layers run again

        def unknown(num: int, p: Tensor) -> Tensor:
            return torch.zeros(num, real(p).numel(), dtype=torch.float64, device=device)

        def pull(cotangents: Tensor) -> dict[str, Tensor]:
            """Return the float64 gradients (cotangents, P) by layer, with 0 for parameters that the losses ignore."""
            num, found = len(cotangents), pull_back(recording.end, list(inputs.values()), cotangents)
            known = {key: real(g).reshape(num, -1) for key, g in zip(inputs, found, strict=True)}
            return {
                name: torch.cat([known[id(p)].double() if id(p) in known else unknown(num, p) for p in own], 1)
                for name, own in owners.items()
            }

        mean = {name: g[0] for name, g in pull(torch.full_like(basis[:1], 1 / batch.size)).items()}
        groups = min(GROUPS, batch.size)
        squares = {name: torch.zeros(batch.size, dtype=torch.float64, device=device) for name in mean}
        projections = {name: torch.zeros_like(part) for name, part in squares.items()}
        unit_sums = {name: torch.zeros(groups, len(g), dtype=torch.float64, device=device) for name, g in mean.items()}
        for first in range(0, batch.size, at_once):
            for name, g in pull(basis[first : first + at_once]).items():
                own = slice(first, first + len(g))
                squares[name][own], projections[name][own] = g.square().sum(dim=1), g @ mean[name]
                lengths = squares[name][own].sqrt()
                units = g / lengths.where(lengths > 0, 1.0)[:, None]
                unit_sums[name].index_add_(0, torch.arange(first, first + len(g), device=device) % groups, units)
    checked = Later(squares.values())

    def check() -> None:
        for name, array in zip(squares, checked.arrays, strict=True):
            if not np.isfinite(array).all():
                raise FloatingPointError(f"The gradient of the parameters of {name!r} is NaN or Inf; try float64.")

    checked.then(check)
    weights = {name: torch.cat([real(p.detach()).double().reshape(-1) for p in own]) for name, own in owners.items()}
    return {n: LayerGradient(mean[n], weights[n], squares[n], projections[n], unit_sums[n]) for n in owners}


def _reached(target: GradientEdge, wanted: set[Node]) -> set[Node]:
    """Return the wanted nodes that the target depends on."""
    stack, seen = [target.node], {target.node}
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen & wanted
