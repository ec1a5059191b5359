"""``capture(model, data)`` records one forward pass, to inspect layers and to compute Jacobians between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from torch import nn

from gradscope.backward.coupling import coupled
from gradscope.backward.hooks import check_inside, check_linear, survey
from gradscope.choices import checked
from gradscope.forward.inputs import Forward, Loss, LossFunction, as_batch
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import Layer, LayerFilter, find, lookup, select
from gradscope.forward.modules import listed
from gradscope.forward.recorder import FROZEN, Recording, record
from gradscope.forward.state import alone
from gradscope.forward.trunk import Trunk, depends, find_trunk, vertex
from gradscope.forward.units import avoidable, merged, units
from gradscope.jacobians.description import Description, describe, remarks
from gradscope.jacobians.jacobian import Jacobian


@dataclass(frozen=True)
class Capture(Recording):
    """One recorded forward pass, made by `gradscope.capture`.  This object keeps the autograd graph in memory.

    - ``target``: the layer whose Jacobians are studied: the output, the losses or a named layer.
    - ``reached``: recorded tensors that the target depends on, in execution order.
    - ``layers``: the tensors of ``reached`` that the option ``layers=`` chose; all of them by default.
    - ``chosen``: whether ``layers=`` was given.
    - ``units``: the layers that are the rows of `gradscope.gsc` by default.
    - ``elsewhere``: names of recorded tensors on which the target does not depend.
    - ``graph``: cut vertices of the autograd graph, through which every path from the input to the target passes.

    The other fields are those of `gradscope.forward.recorder.Recording`.

    >>> import torch, gradscope as gs
    >>> captured = gs.capture(gs.models.MLP(depth=2, width=4), torch.ones(2, 4))
    >>> [layer.name for layer in captured.units], captured.target.name, captured.coupled
    (['input', 'layers.0', 'layers.1'], 'layers.1', False)
    """

    layers: tuple[Layer, ...]
    chosen: bool
    units: tuple[Layer, ...]
    target: Layer
    elsewhere: tuple[str, ...]
    graph: Trunk = field(repr=False)
    reached: tuple[Layer, ...] = field(repr=False)

    @property
    def trunk(self) -> tuple[Layer, ...]:
        """The layers through which every path from the input to the target passes."""
        return tuple(layer for layer in self.layers if layer.on_trunk)

    @cached_property
    def coupled(self) -> bool:
        """Whether samples of the batch influence each other."""
        with alone:
            guard = self.replay.guard  # checkpointed layers run again
            return coupled(self.graph, self.reached, self.target, self.batch_size, self.source_names, guard)

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """Sentences that say what the results depend on, such as batch statistics, dropout, or a frozen embedding.

        Others say which blocks are not rows of a default profile, and why; with ``layers=``, the caller chose the rows.
        """
        frozen = [name for name, reason in self.left_out.items() if reason == FROZEN]
        blocks: dict[str, list[str]] = {}
        beside: list[str] = []
        if not self.chosen:
            blocks = merged(self.replay.modules, self.reached, self.units, self.graph)
            joined = {name for names in blocks.values() for name in names}
            beside = [n for n in avoidable(self.replay.modules, self.reached, self.units) if n not in joined]
        first = self.units[0].name
        found = remarks(
            self.reached, random=self.random, picked=self.picked, merged=blocks, avoidable=beside, frozen=frozen,
            meeting=first if len(self.sources) > 1 and first not in self.source_names else None,
        )  # fmt: skip
        return tuple(found)

    @checked
    def jacobian(self, source: str, target: str) -> Jacobian:
        """Jacobian of layer ``target`` with respect to layer ``source``, as a linear operator (`gradscope.Jacobian`).

        Raises:
            ValueError: A name is unknown, the target does not depend on the source, or a hook makes the backward pass
                nonlinear.
        """
        from_layer, to_layer = (find(self.layers, name, self.elsewhere) for name in (source, target))
        if from_layer.index > to_layer.index:
            raise ValueError(f"Layer {target!r} comes before {source!r}, so it cannot be the target: swap the two.")
        if not depends(to_layer.edge, from_layer.edge):
            raise ValueError(f"Layer {target!r} does not depend on layer {source!r}.")
        with alone, self.replay.guard() as state, state:
            survey(self.graph)
            self.check_target(to_layer, from_layer)
        return Jacobian(from_layer, to_layer, self.replay)

    def check_target(self, target: Layer, source: Layer) -> None:
        """Raise ValueError if backward hooks around the target make its gradients depend on earlier backward passes."""
        if target.index != self.target.index and any(module._backward_hooks for module in self.replay.modules.values()):
            check_inside(self.graph.edges[-1], target.edge, source.edge, target.name)

    def describe(self) -> Description:
        """Return a `Description`: what was recorded, what was not recorded and why, and how gradients are computed."""
        return describe(self)


@checked
def capture(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    loss_fn: LossFunction | None = None,
    target: str | None = None,
) -> Capture:
    """Run and record one forward pass of ``model`` on ``data``; the result gives layers and Jacobians between them.

    Arguments:
        model: Any module; it is not changed.
        data: A tensor (B, ...); a mapping (``model(**batch)``); with ``loss_fn`` a pair (inputs, labels).
        layers: Which layers the attribute ``layers`` contains, as in `gradscope.gsc`.  Default: all.
        forward, loss_fn, target: As in `gradscope.gsc`.

    Raises:
        ValueError, TypeError: The data or the model cannot be measured; the message says what to do.

    Cost: one forward pass.  If a module has backward hooks, eight backward passes test whether the hooks are linear.

    >>> import torch, gradscope as gs
    >>> captured = gs.capture(gs.models.MLP(depth=2, width=4), torch.ones(3, 4))
    >>> [layer.name for layer in captured.units]
    ['input', 'layers.0', 'layers.1']
    >>> captured.jacobian("input", "layers.1").shape
    (12, 12)
    """
    with interruptible() as whole, whole:
        captured = captured_unread(model, data, forward=forward, layers=layers, loss_fn=loss_fn, target=target)
        captured.lengths.read()
        return replace(captured, replay=replace(captured.replay, snapshot=None))  # the model may change from now on


def captured_unread(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    loss_fn: Loss = ...,
    target: str | None = None,
) -> Capture:
    """The same without waiting for the device: whether all layers are finite is checked when a number is first read."""
    modules = listed(model)
    batch = as_batch(data, forward=forward, loss_fn=loss_fn, finite=False)
    try:
        recording = record(modules, batch, forward=forward, loss_fn=None if loss_fn is ... else loss_fn)
    except Exception:
        batch.check_finite()  # names the place of a NaN in x; otherwise the error stands
        raise
    end = recording.end if target is None else lookup(recording.tensors, target).edge
    try:
        graph = find_trunk(end, recording.sources, recording.hooks)
    except ValueError as error:
        what = "The output" if target is None else f"Layer {target!r}"
        raise ValueError(
            f"{what} does not depend on x: no differentiable path connects them. "
            "Look for .detach(), torch.no_grad() or a constant in the model's forward."
        ) from error
    names = set(graph.names.values())
    if any("NotImplemented" in name for name in names):
        missing = {node for node, name in graph.names.items() if "NotImplemented" in name}
        at = [layer.name for layer in recording.tensors if layer.edge.node in missing]
        raise ValueError(
            f"torch has no derivative of an operation {f'in layer {at[0]!r}' if at else 'of the model'} (is it "
            "quantized?), so nothing can be pulled back through it: measure the model before it is converted."
        )
    if "CheckpointFunctionBackward" in names:
        raise ValueError(
            "The model uses reentrant checkpointing, so torch gives no gradients of inner tensors: call "
            "checkpoint(..., use_reentrant=False)."
        )
    if any(map(any, map(attrgetter("_backward_hooks", "_backward_pre_hooks"), modules.values()))):
        with alone, recording.replay.guard() as state, state:
            check_linear(graph.edges[-1:], graph.edges[:1])
    # Sort by the graph: a tensor that only an outer module returns is recorded after tensors computed from it.
    order, recorded = graph.order, recording.tensors
    places = sorted([(order[vertex(layer.edge)], n) for n, layer in enumerate(recorded) if vertex(layer.edge) in order])
    reached = [recorded[n] for _, n in places]
    for index, layer in enumerate(reached):  # nobody else has these layers yet
        own = vars(layer)
        own["index"], own["on_trunk"] = index, vertex(layer.edge) in graph.position
    rows = units(modules[""], reached)
    last = next((layer for layer in reversed(rows) if vertex(layer.edge) == vertex(end)), None)
    if last is None:  # the target is inside a unit, so it is not a unit itself
        last = find(reached, str(target)) if target else reached[-1]
        rows = [layer for layer in rows if layer.index != last.index] + [last]
    elsewhere = tuple([n for layer in recorded if vertex(layer.edge) not in order for n in layer.origins])
    selected = reached if layers is None else select(reached, layers, elsewhere)
    return Capture(
        **vars(recording),
        layers=tuple(selected),
        chosen=layers is not None,
        units=tuple(rows),
        target=last,
        elsewhere=elsewhere,
        graph=graph,
        reached=tuple(reached),
    )
