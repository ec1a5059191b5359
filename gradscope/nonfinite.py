"""Which layer made the first NaN or Inf, and on which way: forward, or backward?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.inputs import Forward, LossFunction, as_batch, first_tensor
from gradscope.layers import OUTPUT, numbered
from gradscope.modules import eager, state_restored, tensors, unwrap, watched

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
        if self.before:
            return f"code before layer {self.layer!r}, in no module, is the first with NaN or Inf in its forward pass"
        if self.direction == PARAMETERS:
            return f"the parameters of layer {self.layer!r} hold NaN or Inf"
        return f"layer {self.layer!r} is the first with NaN or Inf in its {self.direction} pass"


def first_nonfinite(
    model: nn.Module, data: Any, *, forward: Forward | None = None, loss_fn: LossFunction | None = None
) -> Culprit | None:
    """Run one forward and one backward pass, and name the first layer that makes something that is not finite.

    A layer whose parameters are not finite is named before all; else the first module, in order of execution, whose
    output is not finite although its inputs are; else, going backward from the loss (the sum of the outputs without
    ``loss_fn``), the first whose gradient is not finite.  None where everything is finite.  The model is left as it
    was.  Cost: one forward and one backward pass, and a synchronization with the device a layer.

    Raises:
        ValueError, TypeError: See `gradscope.inputs.as_batch`; data that are not finite themselves are refused.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not all(_finite(p) for p in module._parameters.values() if p is not None):
            return Culprit(name or OUTPUT, PARAMETERS)
    batch = as_batch(data, forward=forward, loss_fn=loss_fn)
    listener = _Listener()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        state_restored(modules),
        eager(modules),
        watched(modules, listener),
    ):
        differentiable, _ = batch.differentiable()
        output = first_tensor(differentiable.run(model, forward))
        loss = output if loss_fn is None else loss_fn(output, batch.labels)
        if listener.first is not None:
            return Culprit(listener.first, FORWARD, listener.received)
        if not _finite(loss):
            return Culprit("loss", FORWARD)
        made = [(name, tensor) for name, tensor in listener.outputs if tensor.requires_grad]
        if not loss.requires_grad or not made:
            return None
        gradients = torch.autograd.grad(loss.sum(), [tensor for _, tensor in made], allow_unused=True)
    for (name, _), gradient in zip(reversed(made), reversed(gradients), strict=True):
        if gradient is not None and not _finite(gradient):
            return Culprit(name, BACKWARD)
    return None


class _Listener:
    """Keeps a copy of what every module returns, and the first name under which something is not finite."""

    def __init__(self) -> None:
        self.outputs: list[tuple[str, Tensor]] = []
        self.first: str | None = None
        self.received = False

    def before(self, args: Any, kwargs: Any) -> bool:
        return all(_finite(t) for t in tensors(args, kwargs))

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: bool) -> None:
        if self.first is None and not token:
            self.first, self.received = label, True
        for number, tensor in enumerate(t for t in tensors((output,), {}) if t.is_floating_point()):
            if self.first is None and token and not _finite(tensor):
                self.first = numbered(label, number)
            if name:
                self.outputs.append((numbered(label, number), tensor))


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())
