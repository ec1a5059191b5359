"""Find the first layer that produces NaN or Inf, in the forward or the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gradscope.choices import checked
from gradscope.distributed import gathered, parallel
from gradscope.forward.inputs import Forward, LossFunction, as_batch
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import LOSS, OUTPUT
from gradscope.forward.modules import eager, hooked, recording_gradients, unwrap
from gradscope.forward.outputs import first_tensor
from gradscope.forward.state import alone, state_restored
from gradscope.forward.trunk import vertex
from gradscope.forward.wrappers.sharding import is_sharded, of_whole, unsharded
from gradscope.monitor.births import Backward, Operations, Origins, bad, origins

FORWARD, BACKWARD, PARAMETERS = "forward", "backward", "parameters"
_DATA = "(data)"  # a name that no module has


@dataclass(frozen=True)
class Fault:
    """The first layer with NaN or Inf; made by `gradscope.first_nonfinite`.

    ``layer``: name of the layer.  ``direction``: where NaN or Inf arise, "forward" or "backward" for a pass, or
    "parameters".  ``before``: if True, NaN or Inf arise in code between modules, and the layer is the first module that
    receives them.

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


@of_whole
@checked
def first_nonfinite(
    model: nn.Module, data: Any, *, forward: Forward | None = None, loss_fn: LossFunction | None = None
) -> Fault | None:
    """Return the first layer that produces NaN or Inf in one forward and one backward pass; None if there is no fault.

    NaN or Inf are a fault if the loss, or a gradient of a parameter or of the input, depends on them.  NaN in a
    trainable parameter is always a fault.  The faulty layer is sought in this order: (1) a layer with non-finite
    parameters; (2) the first layer of the forward pass that makes NaN or Inf from finite numbers; (3) the first layer
    of the backward pass that makes a non-finite gradient from finite ones.  Constants such as masks of -inf are a fault
    only if the loss is not finite.  Without ``loss_fn``, the sum of the outputs is the loss.  A fault in ``loss_fn``
    has "loss" as its layer.

    Arguments:
        model: Any module; it is left exactly as it was.
        data, forward, loss_fn: As for `gradscope.gsc`, but a single batch.

    Cost: one forward and one backward pass, and one device synchronization for each tensor of these passes.

    Raises:
        ValueError, TypeError: The data have a wrong form, or NaN or Inf in the data reach the loss; see
            `gradscope.forward.inputs.as_batch`.

    >>> import torch
    >>> import gradscope as gs
    >>> class Log(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x.log()
    >>> print(gs.first_nonfinite(torch.nn.Sequential(torch.nn.ReLU(), Log()), -torch.ones(1, 2)))
    layer '1' is the first with NaN or Inf in its forward pass
    """
    return _first(model, data, forward, loss_fn, of_input=True)


def _first(
    model: nn.Module, data: Any, forward: Forward | None, loss_fn: LossFunction | None, *, of_input: bool
) -> Fault | None:
    """As `first_nonfinite`; ``of_input``: whether the gradient of the input counts."""
    model = unwrap(model)
    modules = dict(model.named_modules())
    with interruptible() as whole, whole:
        batch = as_batch(data, forward=forward, loss_fn=loss_fn, finite=False)
    with alone, state_restored(modules) as state, state, recording_gradients(), eager(modules):
        differentiable, inputs = batch.differentiable()
        search = _Search(modules, inputs)
        with search.operations, hooked(modules, search):
            output = first_tensor(differentiable.run(model, forward))
            search.ended(OUTPUT, -1)
            loss = output if loss_fn is None else loss_fn(output, batch.labels)
        found = search.operations.origins_of(loss)
        if _DATA in found.sources:
            batch.check_finite()
        if found.sources:
            return search.parameters_of(found)
        if found.born:
            return search.fault(found.born[0], FORWARD)
        # Without a loss function nobody knows whether a constant in the output, such as -inf, reaches the loss.
        if loss_fn is not None and bad(loss):
            return search.fault(found.times[0], FORWARD) if found.times else Fault(LOSS, FORWARD)
        fault = search.backward_fault(loss, of_input) if loss.requires_grad else None
    spoiled = [name for name, p in search.owned if p.requires_grad and bad(p).nan]
    return fault or (Fault(spoiled[0] or OUTPUT, PARAMETERS) if spoiled else None)


@dataclass(frozen=True)
class _Call:
    """A finished call of a module, and the times at which it began and ended."""

    label: str
    begin: int
    end: int


class _Search:
    """Listens to module calls, and finds the call that ran an operation."""

    def __init__(self, modules: Mapping[str, nn.Module], inputs: Sequence[Tensor]) -> None:
        self.owned = [
            (name, p) for name, module in modules.items() for p in module._parameters.values() if p is not None
        ]
        trainable = [(name, p) for name, p in self.owned if p.requires_grad]
        self._leaves = {vertex(edge := get_gradient_edge(p)): (name, edge) for name, p in trainable}
        self._inputs = {vertex(edge := get_gradient_edge(tensor)): edge for tensor in inputs}
        self.operations = Operations([*self.owned, *((_DATA, tensor) for tensor in inputs)])
        self._calls: list[_Call] = []

    def before(self, args: Any, kwargs: Any) -> int:
        return self.operations.tick()

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: int) -> None:
        self.ended(label, token)

    def ended(self, label: str, begin: int) -> None:
        """Note that a call has ended."""
        self._calls.append(_Call(label, begin, self.operations.tick()))

    def parameters_of(self, found: Origins) -> Fault:
        """The fault of the first layer whose parameters are among the origins."""
        return Fault(next(name for name, _ in self.owned if name in found.sources) or OUTPUT, PARAMETERS)

    def fault(self, time: int, direction: str) -> Fault:
        """The fault of the innermost call that ran the operation of this time.

        Code between two calls inside belongs to neither: it is "before" the next one, or in the backward pass "after"
        the last one.
        """
        around = [call for call in self._calls if call.begin < time <= call.end]
        if not around:
            return Fault(LOSS, direction)
        owner = max(around, key=lambda call: call.begin)
        inside = [call for call in self._calls if owner.begin < call.begin and call.end < owner.end]
        if direction == FORWARD:
            beside = min((c for c in inside if c.begin > time), key=lambda c: c.begin, default=None)
        else:
            beside = max((c for c in inside if c.end < time), key=lambda c: c.end, default=None)
        return Fault(owner.label, direction) if beside is None else Fault(beside.label, direction, before=True)

    def backward_fault(self, loss: Tensor, of_input: bool) -> Fault | None:
        """The fault of the backward pass: of the gradients of parameters, else of the input's if ``of_input``."""
        edges = [edge for _, edge in self._leaves.values()], list(self._inputs.values())
        total = loss.sum()
        with Backward(get_gradient_edge(total).node) as backward:
            gradients = torch.autograd.grad(total, [*edges[0], *edges[1]], allow_unused=True)
        spoiled = [vertex(edge) for edge, g in zip([*edges[0], *edges[1]], gradients, strict=True) if bad(g)]
        node = backward.first(at for at in spoiled if at in self._leaves)
        if node is None and of_input:
            node = backward.first(spoiled)
        if node is None:
            return None
        if (node, 0) in self._leaves:
            return Fault(self._leaves[node, 0][0] or OUTPUT, BACKWARD)
        time = self.operations.time(node)
        fault, operation = self.fault(time, BACKWARD), self.operations.found.get(time)
        if operation is None:
            return fault
        # The backward pass of an operation that received NaN or Inf fails because of them.
        found = origins(operation.parents)
        if found.sources - {_DATA}:
            return self.parameters_of(found)
        cause = self.fault(found.born[0], FORWARD) if found.born else fault
        return fault if cause.layer == fault.layer else cause


class NonFiniteError(FloatingPointError):
    """Raised by `Monitor` when a loss or gradient is NaN or Inf; the message names the first faulty layer.

    >>> import gradscope as gs
    >>> issubclass(gs.NonFiniteError, FloatingPointError)
    True
    """


def traced(
    model: nn.Module, batch: Any, probe: Any, *, forward: Forward | None, loss_fn: LossFunction | None
) -> tuple[Fault | None, str]:
    """Return the fault found on the batch, else on the probe batch; and a remark if the batch could not be run.

    If the model is sharded, all processes search, each on its own batch, and the first fault is that of all.
    """
    if not is_sharded(model):
        return _traced(model, batch, probe, forward, loss_fn)
    with unsharded(model):
        found = gathered(_traced(model, batch, probe, forward, loss_fn))
    return next((one for one in found if one[0] is not None), found[0])


def _traced(
    model: nn.Module, batch: Any, probe: Any, forward: Forward | None, loss_fn: LossFunction | None
) -> tuple[Fault | None, str]:
    remark = ""
    if batch is not None:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and loss_fn is None else batch
        try:
            if found := _first(model, inputs, forward, loss_fn, of_input=False):
                return found, ""
        except Exception as error:  # a failure here must not hide the fault in training
            remark = f"; the batch itself could not be run ({error})"
    try:
        return _first(model, probe, forward, None, of_input=False), remark
    except Exception as error:
        return None, f"{remark}; the probe batch could not be run either ({error})"


def told(found: Fault | None, unknown: str, remark: str, updates: int) -> str:
    """What is known of a value that was read ``updates`` updates later; ``unknown``: advice if there is no fault."""
    text = f"a second pass found no NaN or Inf, so the first faulty layer is unknown{unknown}"
    late = f" This value was read {updates} {'update' if updates == 1 else 'updates'} later, so NaN or Inf may be in "
    late += "all layers by now. To find the first faulty layer, read values before each update: check_every=1."
    return f"{text if found is None else found}{remark}.{late if updates else ''}"


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
