"""Cut the network at its units into separate autograd graphs, once with trained and once with initial parameters.

In a first forward pass every unit returns a new leaf instead of its output.  This cuts the graph into one segment per
unit.  A second pass, with the initial parameters, uses the same leaves, so both passes give a unit the same input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from gradscope.backward.readings import lengths
from gradscope.backward.route import Read, Readings, TrunkRoute
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import INPUT, Layer, numbered
from gradscope.forward.modules import recording_gradients
from gradscope.forward.replay import Passive
from gradscope.forward.trunk import find_trunk
from gradscope.jacobians.capture import Capture
from gradscope.memory import Workspace

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Segment:
    """One unit: ``entry`` and ``exit`` are the edges of its input and output tensors."""

    name: str
    entry: GradientEdge
    exit: GradientEdge


def initial_parameters(model: nn.Module, initial: nn.Module | Parameters) -> dict[str, Tensor]:
    """The checked initial parameters by name, with the devices and dtypes of ``model``."""
    given = dict(initial.named_parameters() if isinstance(initial, nn.Module) else initial)
    if unknown := given.keys() - model.state_dict().keys() - dict(model.named_buffers()).keys():
        raise ValueError(f"initial contains {min(unknown)!r}, but the model does not: these are different models.")
    found = {}
    for name, parameter in model.named_parameters():
        if name not in given:
            raise ValueError(
                f"initial lacks the parameter {name!r}; give the model as it was before training, or a copy of its "
                "state_dict from before: copy.deepcopy(model.state_dict())."
            )
        if given[name].shape != parameter.shape:
            raise ValueError(
                f"Parameter {name!r} has shape {tuple(parameter.shape)} in the model and {tuple(given[name].shape)} in "
                "initial: these are different models."
            )
        if given[name].data_ptr() == parameter.data_ptr() and parameter.numel():
            raise ValueError(
                f"Parameter {name!r} of initial shares its memory with the model, so it was trained, too. Copy the "
                "model or its state_dict before training: copy.deepcopy(model)."
            )
        found[name] = _plain(given[name]).detach().to(parameter).requires_grad_(parameter.requires_grad)
    return found


def _plain(parameter: Tensor) -> Tensor:
    """A copy of a parameter that was made under ``torch.inference_mode()``, which torch does not differentiate."""
    with torch.inference_mode(False):
        return parameter.clone() if parameter.is_inference() else parameter


def cut(captured: Capture, initial: Parameters) -> tuple[list[Segment], list[Segment]]:
    """The segments of all units after the first trunk tensor: with present parameters, and with ``initial`` ones.

    Cost: two forward passes, with the dropout masks and batch statistics of the capture.
    """
    names = [layer.name for layer in captured.units if layer.index < captured.target.index]
    if not names:
        raise ValueError("The network is a single unit, so its layers cannot be separated.")
    now = _Cutter(names)
    then = _Cutter(names, now.values)
    found = []
    for cutter, parameters in ((now, None), (then, initial)):
        with interruptible() as whole, whole, recording_gradients():
            batch, sources = captured.replay.batch.differentiable()
            for number, source in enumerate(sources):
                cutter.begin(source, numbered(INPUT, number))
            output = captured.replay.output(batch, cutter, parameters)
        if missing := [name for name in names if name not in cutter.entries]:
            raise ValueError(
                f"Unit {missing[0]!r} returns its output in a structure that torch's pytree does not know, so the "
                "network cannot be cut there."
            )
        exits = [*(cutter.exits[name] for name in names[1:]), get_gradient_edge(output)]
        ends = zip([*names[1:], captured.target.name], names, exits, strict=True)
        found.append([Segment(name, cutter.entries[entry], exit) for name, entry, exit in ends])
    return found[0], found[1]


class _Cutter(Passive):
    """Replaces the tensors of given names by leaves, with the same values or with given ones."""

    def __init__(self, names: Collection[str], values: dict[str, Tensor] | None = None) -> None:
        self.names, self.given = set(names), values
        self.values: dict[str, Tensor] = {}
        self.entries: dict[str, GradientEdge] = {}
        self.exits: dict[str, GradientEdge] = {}

    def begin(self, tensor: Tensor, name: str) -> None:
        """Record a source as an entry; a source is already a leaf."""
        if name in self.names:
            self.entries[name] = get_gradient_edge(tensor)

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: None) -> Any:
        """The output of a module, in which leaves replace the wanted tensors; None if nothing is replaced."""
        number, replaced = 0, False

        def follow(leaf: Any) -> Any:
            nonlocal number, replaced
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                return leaf
            fresh = self.tap(leaf, numbered(label, number))
            number, replaced = number + 1, replaced or fresh is not leaf
            return fresh

        made = pytree.tree_map(follow, output) if name else output
        return made if replaced else None

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        """Return a new leaf for a wanted tensor, and any other tensor unchanged."""
        if name not in self.names or name in self.entries:
            return tensor
        self.exits[name] = get_gradient_edge(tensor)
        self.values[name] = value = tensor.detach()
        # A clone of the leaf, because the model may overwrite the tensor in place.
        fresh = (value if self.given is None else self.given[name]).requires_grad_().clone()
        self.entries[name] = get_gradient_edge(fresh)
        return fresh


class TwoNetworks:
    """The route through the trained units and, with the same inputs, through the initial units.

    Cotangents have shape (P, 1 + terms, *shape): one term for J, the others for C^0, C^1, ...
    """

    bottom = expected = 0

    def __init__(self, captured: Capture, now: Sequence[Segment], then: Sequence[Segment]) -> None:
        self.names, self.rows, self.terms = [segment.name for segment in now], [captured.units[0]], 2
        self.workspace, workspaces = Workspace(), (Workspace(), Workspace())
        self.pairs = [
            [TrunkRoute(find_trunk(s.exit, [s.entry]), [], w) for s, w in zip(pair, workspaces, strict=True)]
            for pair in zip(now, then, strict=True)
        ]

    def position(self, target: Layer) -> int:
        """The position of the output, above all units."""
        return len(self.pairs)

    def open(self, position: int) -> bool:
        """Always: every unit has a graph of its own."""
        return True

    def uppermost(self, rows: Collection[int]) -> list[int]:
        """The only row."""
        return list(rows)

    def part(self, rows: Sequence[int]) -> TwoNetworks:
        """The same route."""
        return self

    def cross(self, upper: int, lower: int, cotangents: Tensor, read: Read) -> tuple[Tensor, Readings]:
        """Apply the recurrence to one unit after the other; read at the bottom."""
        for number in range(upper - 1, lower - 1, -1):
            cotangents = self._step(number, cotangents)
        self.terms = max(self.terms, cotangents.shape[1])
        return cotangents, [] if lower > self.bottom else [(0, read([0], [cotangents], self.workspace, 1)[0])]

    def _step(self, number: int, cotangents: Tensor) -> Tensor:
        # Both products have equal shapes, so an untrained unit gives the same bits twice, and R = 0 exactly.
        moved, kept = (
            route.cross(len(route.trunk.cuts) - 1, 0, cotangents.flatten(0, 1).clone(), lengths())[0]
            for route in self.pairs[number]
        )
        moved, kept = (part.unflatten(0, cotangents.shape[:2]) for part in (moved, kept))
        if not torch.isfinite(moved).all() or not torch.isfinite(kept).all():
            raise FloatingPointError(
                f"A gradient through unit {self.names[number]!r} is NaN or Inf; measure in float64."
            )
        learned = (moved - kept)[:, 1:]
        below = torch.cat([moved[:, :1], kept[:, 1:]], dim=1)
        if learned.any():
            below = torch.cat([below, torch.zeros_like(learned[:, :1])], dim=1)
            below[:, 2:] += learned
        return below
