"""Which layer made the first NaN or Inf, and on which way: forward, or backward?"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradscope.distributed import parallel
from gradscope.forward.inputs import Forward, LossFunction, as_batch, first_tensor
from gradscope.forward.layers import LOSS, OUTPUT, numbered
from gradscope.forward.modules import eager, hooked, state_restored, tensors, unwrap
from gradscope.forward.trunk import Vertex, vertex

FORWARD, BACKWARD, PARAMETERS = "forward", "backward", "parameters"


@dataclass(frozen=True)
class Culprit:
    """The layer that made the first NaN or Inf, and the ``direction``: "forward", "backward", or "parameters".

    ``before``: it was not the layer itself but code between modules, of which this layer was the first to receive it.
    """

    layer: str
    direction: str
    before: bool = False

    def __str__(self) -> str:
        if self.direction == PARAMETERS:
            return f"the parameters of layer {self.layer!r} hold NaN or Inf"
        who = "the loss function" if self.layer == LOSS else f"layer {self.layer!r}"
        if self.before:
            who = f"code {'before' if self.direction == FORWARD else 'after'} {who}, in no module,"
        return f"{who} is the first with NaN or Inf in its {self.direction} pass"


def first_nonfinite(
    model: nn.Module, data: Any, *, forward: Forward | None = None, loss_fn: LossFunction | None = None
) -> Culprit | None:
    """Run one forward and one backward pass, and name the first layer that makes something that is not finite.

    A layer whose parameters are not finite is named before all; else the first module, in order of execution, whose
    output is not finite although its inputs are; else, going backward from the loss (the sum of the outputs without
    ``loss_fn``), the first that receives a finite gradient and hands on one, to its inputs or its own parameters, that
    is not.  "loss" stands for ``loss_fn``.  None where everything is finite.  The model is left as it was.

    Cost: one forward and one backward pass, the gradients of all layers at once in memory, and a synchronization with
    the device a layer.

    Raises:
        ValueError, TypeError: See `gradscope.forward.inputs.as_batch`; data that are not finite themselves are refused.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not all(_finite(p) for p in module._parameters.values() if p is not None):
            return Culprit(name or OUTPUT, PARAMETERS)
    batch = as_batch(data, forward=forward, loss_fn=loss_fn)
    listener = _Listener(modules)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        state_restored(modules),
        eager(modules),
        hooked(modules, listener),
    ):
        differentiable, _ = batch.differentiable()
        output = first_tensor(differentiable.run(model, forward))
        # The loss is a vertex of its own, so that what the output receives is told from what the model makes of it.
        received = _edges([output])
        loss = output if loss_fn is None else loss_fn(output, batch.labels)
        if listener.first is not None:
            return Culprit(listener.first, FORWARD, listener.received)
        if not _finite(loss):
            return Culprit(LOSS, FORWARD)
        calls = list(listener.calls)  # checkpointed layers are called again in the backward pass
        edges = {vertex(edge): edge for call in calls for edge in call.edges} | received
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not loss.requires_grad or not edges:
            return None
        wanted: list[Any] = [*edges.values(), *parameters]
        gradients = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
    bad = {at for at, g in zip(edges, gradients, strict=False) if g is not None and not _finite(g)}
    spoiled = {
        id(p) for p, g in zip(parameters, gradients[len(edges) :], strict=True) if g is not None and not _finite(g)
    }
    return Culprit(LOSS, BACKWARD) if bad & received.keys() else _first_backward(calls, modules, bad, spoiled)


@dataclass(frozen=True)
class _Call:
    """One finished call of a module: what it received and returned, and how many calls were finished as it began."""

    name: str
    label: str
    begin: int
    received: dict[Vertex, GradientEdge]
    returned: dict[Vertex, GradientEdge] = field(default_factory=dict)

    @property
    def edges(self) -> Iterator[GradientEdge]:
        yield from self.received.values()
        yield from self.returned.values()


def _first_backward(
    calls: Sequence[_Call], modules: Mapping[str, nn.Module], bad: set[Vertex], spoiled: set[int]
) -> Culprit | None:
    """Going backward, the innermost call that got a finite gradient and made of it one that is not.

    ``bad``: vertices whose gradient is not finite; ``spoiled``: parameters, by id.
    """
    times = Counter(call.name for call in calls)

    def guilty(call: _Call) -> bool:
        own = modules[call.name]._parameters.values() if times[call.name] == 1 else ()  # else: of which of its calls?
        made = bool(bad & call.received.keys()) or any(id(p) in spoiled for p in own)
        return made and not bad & call.returned.keys()

    found, begin, end = None, 0, len(calls)
    while inner := [n for n in range(begin, end) if guilty(calls[n])]:  # calls inside a call are finished before it
        found, begin, end = calls[inner[-1]], calls[inner[-1]].begin, inner[-1]
    # Code between the modules inside is nobody's but theirs that it stands between.
    if after := next((call for call in reversed(calls[begin:end]) if bad & call.returned.keys()), None):
        return Culprit(after.label, BACKWARD, before=True)
    if found is not None:
        return Culprit(found.label, BACKWARD)
    owners = (name for name, module in modules.items() for p in module._parameters.values() if id(p) in spoiled)
    return next((Culprit(name or OUTPUT, BACKWARD) for name in owners), None)


class _Listener:
    """Keeps the edges of every call of a module, and the first name under which something is not finite."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.calls: list[_Call] = []
        self.first: str | None = None
        self.received = False

    def before(self, args: Any, kwargs: Any) -> tuple[bool, int, dict[Vertex, GradientEdge]]:
        received = tensors(args, kwargs)
        return all(_finite(t) for t in received), len(self.calls), _edges(received)

    def after(
        self,
        name: str,
        call: int,
        label: str,
        args: Any,
        kwargs: Any,
        output: Any,
        token: tuple[bool, int, dict[Vertex, GradientEdge]],
    ) -> None:
        finite, begin, received = token
        if self.first is None and not finite:
            self.first, self.received = label, True
        returned = [t for t in tensors((output,), {}) if t.is_floating_point()]
        for number, tensor in enumerate(returned):
            if self.first is None and not _finite(tensor):
                self.first = numbered(label, number)
        self.calls.append(_Call(name, label, begin, received, _edges(returned)))


def _edges(values: Sequence[Tensor]) -> dict[Vertex, GradientEdge]:
    """Edges, not tensors: an operation in place later would make a stored tensor the later one."""
    edges = (get_gradient_edge(t) for t in values if t.is_floating_point() and t.requires_grad)
    return {vertex(edge): edge for edge in edges}


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


class NonFiniteError(FloatingPointError):
    """A number of training is NaN or Inf; the message names the first layer, and the direction, that made it so."""


def culprit(
    model: nn.Module, batch: Any, x: Any, *, forward: Forward | None, loss_fn: LossFunction | None
) -> tuple[Culprit | None, str]:
    """What a second pass on the batch, else on the probe batch ``x``, shows, and a remark if the batch has none.

    It runs as the caller does, so under autocast in its precision, where what happened in training happens again.
    """
    remark = ""
    if batch is not None:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and loss_fn is None else batch
        try:
            if found := first_nonfinite(model, inputs, forward=forward, loss_fn=loss_fn):
                return found, ""
        except Exception as error:  # whatever goes wrong here must not hide what was seen in training
            remark = f"; the batch itself could not be looked into ({error})"
    try:
        return first_nonfinite(model, x, forward=forward), remark
    except Exception as error:  # nor here
        return None, f"{remark}; nor could the probe batch ({error})"


def kept(folder: Path, evidence: dict[str, Any]) -> str:
    """Write ``nonfinite.pt``, whole or not at all; in words, where it is, or why it is not there.

    Each of several ranks writes a file of its own.
    """
    rank = f"-rank{torch.distributed.get_rank()}" if parallel() else ""
    path = folder / f"nonfinite{rank}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(evidence, temporary)
        temporary.replace(path)
    except Exception as error:  # a full disk, a batch that cannot be pickled: the layer is told all the same
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return f" The batch and the state could not be saved in {path} ({error})."
    return f" The batch and the state are in {path}."
