"""Find the first layer that produces NaN or Inf, in the forward or the backward pass."""

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
from gradscope.forward.modules import eager, hooked, tensors, unwrap
from gradscope.forward.state import alone, state_restored
from gradscope.forward.trunk import Vertex, vertex

FORWARD, BACKWARD, PARAMETERS = "forward", "backward", "parameters"


@dataclass(frozen=True)
class Fault:
    """The first layer with NaN or Inf; ``direction`` says where they arise: "forward", "backward" or "parameters".

    ``before``: NaN or Inf arise in code outside any module, and this layer is the first to receive them.

    >>> import gradscope as gs
    >>> print(gs.Fault("layers.3", "forward"))
    layer 'layers.3' is the first with NaN or Inf in its forward pass
    """

    layer: str
    direction: str
    before: bool = False

    def __str__(self) -> str:
        if self.direction == PARAMETERS:
            return f"the parameters of layer {self.layer!r} hold NaN or Inf"
        who = "the loss function" if self.layer == LOSS else f"layer {self.layer!r}"
        if self.before:
            who = f"code outside any module, {'before' if self.direction == FORWARD else 'after'} {who},"
        return f"{who} is the first with NaN or Inf in its {self.direction} pass"


def first_nonfinite(
    model: nn.Module, data: Any, *, forward: Forward | None = None, loss_fn: LossFunction | None = None
) -> Fault | None:
    """Return the first layer that produces NaN or Inf in one forward and one backward pass; None if all is finite.

    Faults are sought in this order: (1) a layer with non-finite parameters; (2) in execution order, a module with
    finite inputs and a non-finite output; (3) going backward from the loss, a module that receives a finite gradient
    and passes a non-finite one to its inputs or parameters.  Without ``loss_fn``, the sum of the outputs is the loss.
    A fault of ``loss_fn`` has "loss" as its layer.

    Arguments:
        model: Any module; it is left exactly as it was.
        data, forward, loss_fn: As for `gradscope.gsc`, but a single batch.

    Cost: a forward and a backward pass, the gradients of all layers in memory, one device synchronization per layer.

    Raises:
        ValueError, TypeError: The data have a wrong form or are not finite; see `gradscope.forward.inputs.as_batch`.

    >>> import torch
    >>> import gradscope as gs
    >>> class Log(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x.log()
    >>> print(gs.first_nonfinite(torch.nn.Sequential(torch.nn.ReLU(), Log()), -torch.ones(1, 2)))
    layer '1' is the first with NaN or Inf in its forward pass
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not all(_finite(p) for p in module._parameters.values() if p is not None):
            return Fault(name or OUTPUT, PARAMETERS)
    batch = as_batch(data, forward=forward, loss_fn=loss_fn)
    listener = _Listener(modules)
    with (
        alone,
        state_restored(modules) as state,
        state,
        torch.inference_mode(False),
        torch.enable_grad(),
        eager(modules),
        hooked(modules, listener),
    ):
        differentiable, _ = batch.differentiable()
        output = first_tensor(differentiable.run(model, forward))
        # A non-finite gradient at the output itself is a fault of the loss function, not of the model.
        received = _edges([output])
        loss = output if loss_fn is None else loss_fn(output, batch.labels)
        if listener.first is not None:
            return Fault(listener.first, FORWARD, listener.received)
        if not _finite(loss):
            return Fault(LOSS, FORWARD)
        calls = list(listener.calls)  # a copy: checkpointed layers are called again in the backward pass
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
    return Fault(LOSS, BACKWARD) if bad & received.keys() else _first_backward(calls, modules, bad, spoiled)


@dataclass(frozen=True)
class _Call:
    """A finished call of a module: its input and output edges, and how many calls were finished when it began."""

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
) -> Fault | None:
    """Return the fault of the innermost call that received a finite gradient and passed on a non-finite one.

    The search goes backward.  ``bad`` and ``spoiled``: vertices and ids of parameters with a non-finite gradient.
    """
    times = Counter(call.name for call in calls)

    def guilty(call: _Call) -> bool:
        own = modules[call.name]._parameters.values() if times[call.name] == 1 else ()  # several calls: ambiguous
        made = bool(bad & call.received.keys()) or any(id(p) in spoiled for p in own)
        return made and not bad & call.returned.keys()

    found, begin, end = None, 0, len(calls)
    while inner := [n for n in range(begin, end) if guilty(calls[n])]:  # a call is listed after the calls inside it
        found, begin, end = calls[inner[-1]], calls[inner[-1]].begin, inner[-1]
    # Functional code between two child modules belongs to neither; report it as "after <module>".
    if after := next((call for call in reversed(calls[begin:end]) if bad & call.returned.keys()), None):
        return Fault(after.label, BACKWARD, before=True)
    if found is not None:
        return Fault(found.label, BACKWARD)
    owners = (name for name, module in modules.items() for p in module._parameters.values() if id(p) in spoiled)
    return next((Fault(name or OUTPUT, BACKWARD) for name in owners), None)


class _Listener:
    """Keeps the edges of every call of a module, and the name of the first non-finite tensor."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.calls: list[_Call] = []
        self.first: str | None = None
        self.received = False

    def before(self, args: Any, kwargs: Any) -> Any:
        received = tensors(args, kwargs)
        return all(_finite(t) for t in received), len(self.calls), _edges(received)

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: Any) -> None:
        finite, begin, received = token
        if self.first is None and not finite:
            self.first, self.received = label, True
        returned = [t for t in tensors((output,), {}) if t.is_floating_point()]
        for number, tensor in enumerate(returned):
            if self.first is None and not _finite(tensor):
                self.first = numbered(label, number)
        self.calls.append(_Call(name, label, begin, received, _edges(returned)))


def _edges(values: Sequence[Tensor]) -> dict[Vertex, GradientEdge]:
    """Return the edges by vertex; tensors are not kept, because a later in-place operation could change them."""
    edges = (get_gradient_edge(t) for t in values if t.is_floating_point() and t.requires_grad)
    return {vertex(edge): edge for edge in edges}


def _finite(tensor: Tensor) -> bool:
    values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


class NonFiniteError(FloatingPointError):
    """Raised by `Monitor` when a loss or gradient is NaN or Inf; the message names the first faulty layer.

    >>> import gradscope as gs
    >>> issubclass(gs.NonFiniteError, FloatingPointError)
    True
    """


def traced(
    model: nn.Module, batch: Any, probe: Any, *, forward: Forward | None, loss_fn: LossFunction | None
) -> tuple[Fault | None, str]:
    """Return the fault found on the batch, else on the probe batch; and a remark if the batch could not be run."""
    remark = ""
    if batch is not None:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and loss_fn is None else batch
        try:
            if found := first_nonfinite(model, inputs, forward=forward, loss_fn=loss_fn):
                return found, ""
        except Exception as error:  # a failure here must not hide the fault in training
            remark = f"; the batch itself could not be run ({error})"
    try:
        return first_nonfinite(model, probe, forward=forward), remark
    except Exception as error:
        return None, f"{remark}; the probe batch could not be run either ({error})"


def saved(folder: Path, state: dict[str, Any]) -> str:
    """Write ``nonfinite.pt`` atomically, one file per rank; return a sentence with its path or with the error."""
    rank = f"-rank{torch.distributed.get_rank()}" if parallel() else ""
    path = folder / f"nonfinite{rank}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        temporary.replace(path)
    except Exception as error:  # full disk, unpicklable batch; the caller must still name the layer
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return f" Batch and state could not be saved in {path} ({error})."
    return f" Batch and state are in {path}."
