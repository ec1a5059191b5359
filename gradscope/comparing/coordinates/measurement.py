"""The first optimizer steps of one network: lengths of activations, gradients and updates, and GSC, at every step.

With h_t the output of a layer at step t (0: initialization) on one fixed batch, h(x, theta) its module as a function of
input and parameters, L the mean loss, and rms(a) = |a| / sqrt(number of entries):

    activation_rms           rms(h_t)
    activation_change_rms    rms(h_t - h_0)
    update_effect_rms        rms(h(x_0, theta_t) - h(x_0, theta_0)), the part of the change that this layer makes
    activation_gradient_rms  rms(dL / dh_t)
    update_rms               rms(theta_t - theta_0)
    gsc                      GSC of the layer with respect to the output, in the squared convention, from probes

Cost: steps + 1 times a forward and a backward pass, one more call of each measured module, and a call of
`gradscope.gsc`.  Memory: a copy of all parameters, and of the inputs and outputs of the measured layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from gradscope.choices import listed as quoted
from gradscope.coefficients.gsc import gsc
from gradscope.forward.inputs import Batch, Forward, LossFunction, copied
from gradscope.forward.layers import INPUT, OUTPUT, LayerFilter, module_name, numbered
from gradscope.forward.lengths import ZeroOutputError
from gradscope.forward.modules import Modules, eager, hooked, listed, recording_gradients
from gradscope.forward.outputs import first_tensor, leaf_tensors
from gradscope.forward.state import same_draws
from gradscope.jacobians.capture import Capture, capture
from gradscope.norms import plain_norms

ACTIVATION, CHANGE, GRADIENT = "activation_rms", "activation_change_rms", "activation_gradient_rms"
EFFECT, UPDATE, GSC = "update_effect_rms", "update_rms", "gsc"
Values = dict[tuple[str, str, int], float]


@dataclass(frozen=True)
class Task:
    """What every network is trained on, and how long."""

    batch: Batch
    forward: Forward | None
    loss_fn: LossFunction
    steps: int
    layers: LayerFilter | None
    probes: int


@dataclass(frozen=True)
class Network:
    """The lengths of one network: ``log10_values`` by (layer, quantity, step), layers in execution order.

    ``shapes``: shape of the output of each layer, and of the largest parameter that its module holds (empty if none).
    ``target``: the name of the output.  ``optimizer``: its class; None if only the initialization was measured.
    """

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    target: str
    optimizer: type[Optimizer] | None
    log10_values: Values = field(repr=False)


def measured(model: nn.Module, optimizer: Optimizer | None, task: Task, seed: int, *, trunk: bool) -> Network:
    """Train a model and return the lengths of each step.

    ``trunk``: measure the units of the trunk, instead of the modules that hold parameters and the output.

    Raises:
        ValueError: The optimizer does not fit, or a number is NaN or Inf.
    """
    modules = listed(model)
    if optimizer is not None:
        _check_owner(modules[""], optimizer)
    with same_draws(modules, seed) as draws, draws:
        captured = capture(model, task.batch.inputs, forward=task.forward, layers=task.layers)
        shapes = dict(_layers(captured, modules, trunk=trunk, chosen=task.layers is not None))
    values: Values = {}
    for step in range(task.steps + 1):
        now = _Recorder(shapes)
        with same_draws(modules, seed) as draws, draws:
            now.run(model, modules, task)
        if step == 0:
            first, effects = now, _Effects(modules, now.calls, seed)
        found = [(ACTIVATION, now.activations), (GRADIENT, now.gradients)]
        if step:
            changes = {name: h - first.activations[name] for name, h in now.activations.items()}
            found += [(CHANGE, changes), (EFFECT, effects.changes()), (UPDATE, effects.updates())]
        for quantity, tensors in found:
            values |= {(name, quantity, step): _log10_rms(tensor, name, step) for name, tensor in tensors.items()}
        values |= {(name, GSC, step): value for name, value in _gsc(model, task, shapes, seed).items()}
        if optimizer is not None and step < task.steps:
            optimizer.step()
    return Network(shapes, captured.target.name, None if optimizer is None else type(optimizer), values)


def parts(made: Any, steps: int) -> tuple[nn.Module, Optimizer | None]:
    """Model and optimizer, or None, of what a factory returned.

    Raises:
        TypeError: It returned something else.
        ValueError: It returned no optimizer, but training is asked for.
    """
    model, optimizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer | None):
        kinds = ", ".join(type(part).__name__ for part in (made if isinstance(made, tuple) else (made,)))
        raise TypeError(f"factory must return a torch.nn.Module, or a pair (model, optimizer); got {kinds}.")
    if optimizer is None and steps:
        raise ValueError(
            "factory returned a model without an optimizer: return the pair (model, optimizer), or give steps=0 to "
            "check the initialization only."
        )
    return model, optimizer


def _check_owner(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise ValueError if the optimizer lacks a trainable parameter of the model."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    if lacking:
        raise ValueError(
            f"The optimizer does not own {quoted(lacking)} of the model that factory returned with it: give it "
            "model.parameters() of this model, and freeze what must not train with requires_grad_(False)."
        )


def _layers(
    captured: Capture, modules: Modules, *, trunk: bool, chosen: bool
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Name and shapes of the layers to measure, in execution order; the target is one of them."""
    rows = {layer.index: layer.name for layer in (captured.layers if chosen else captured.units if trunk else ())}
    rows[captured.target.index] = captured.target.name
    for layer in captured.reached:
        if not (chosen or trunk) and layer.index not in rows:
            own = [name for name in layer.origins if _largest(modules.get(module_name(name)))]
            rows |= {layer.index: own[0]} if own else {}
        name = rows.get(layer.index, INPUT)
        if module_name(name) in modules or layer.index == captured.target.index:
            yield name, (layer.shape, _largest(modules.get(module_name(name))))


def _largest(module: nn.Module | None, *, trainable: bool = False) -> tuple[int, ...]:
    """The shape of the largest parameter that the module itself holds."""
    held = module._parameters.values() if module is not None else ()
    own = [tuple(p.shape) for p in held if p is not None and (p.requires_grad or not trainable)]
    return max(own, key=lambda shape: (len(shape), math.prod(shape)), default=())


class _Recorder:
    """Inputs and outputs of the measured layers in one pass, and the gradients of the loss at these outputs."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.calls: dict[str, tuple[Any, Any]] = {}
        self.activations: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def run(self, model: nn.Module, modules: Modules, task: Task) -> None:
        """One forward and one backward pass; the gradients of the parameters replace earlier ones."""
        batch = task.batch.differentiable()[0]
        model.zero_grad()
        with recording_gradients(), eager(modules):
            with hooked(modules, self):
                output = first_tensor(batch.run(model, task.forward))
            if OUTPUT in self.names:
                self.add(OUTPUT, output)
            loss = task.loss_fn(output, batch.labels)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise ValueError("loss_fn must return a tensor of losses that depends on the output of the model.")
            loss.mean().backward()

    def before(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call."""
        return args, kwargs

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: Any) -> None:
        """Keep inputs and outputs of a measured layer, numbered as a `gradscope.Capture` numbers the outputs."""
        for number, tensor in enumerate([t for t in leaf_tensors(output) if t.requires_grad]):
            if name and (key := numbered(label, number)) in self.names:
                self.add(key, tensor)
                self.calls[key] = copied(token, _copy)

    def add(self, key: str, tensor: Tensor) -> None:
        """Keep a copy, which no later operation in place changes, and the gradient when it is known."""
        self.activations[key] = tensor.detach().clone()
        tensor.register_hook(partial(self.gradients.__setitem__, key))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


class _Effects:
    """The measured modules that hold trainable parameters, with their first inputs, and outputs and parameters then."""

    def __init__(self, modules: Modules, calls: dict[str, tuple[Any, Any]], seed: int) -> None:
        self.modules = {n: m for n in calls if _largest(m := modules[module_name(n)], trainable=True)}
        self.calls, self.seed = calls, seed
        self.parameters = {name: self._parameters(name).clone() for name in self.modules}
        self.outputs = {name: self._output(name) for name in self.modules}

    def changes(self) -> dict[str, Tensor]:
        """The change of each output on the first inputs, which only the parameters of the module can make."""
        return {name: self._output(name) - before for name, before in self.outputs.items()}

    def updates(self) -> dict[str, Tensor]:
        """The change of the parameters that each module itself holds."""
        return {name: self._parameters(name) - before for name, before in self.parameters.items()}

    def _parameters(self, name: str) -> Tensor:
        own = [p.detach().flatten() for p in self.modules[name]._parameters.values() if p is not None]
        return torch.cat(own)

    def _output(self, name: str) -> Tensor:
        module, (args, kwargs) = self.modules[name], self.calls[name]
        buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}  # a call may update statistics
        with same_draws({name: module}, self.seed) as draws, draws:
            output = functional_call(module, buffers, args, kwargs)
        number = int(name.partition("[")[2].rstrip("]") or 0)
        return [t for t in leaf_tensors(output) if t.requires_grad][number].detach()


def _gsc(model: nn.Module, task: Task, names: Collection[str], seed: int) -> dict[str, float]:
    """log10 GSC of the layers; empty if the output is zero, because it then has no relative change."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"forward": task.forward, "layers": list(names), "probes": task.probes}
    try:
        profile = gsc(model, task.batch.inputs, generator=generator, **options)
    except ZeroOutputError:
        return {}
    return dict(zip(profile.layers[:-1], profile.log10_values[:-1, 0].tolist(), strict=True))


def _log10_rms(tensor: Tensor, name: str, step: int) -> float:
    """log10 of the root mean square; -inf if all entries are zero."""
    rms = float(plain_norms(tensor)) / math.sqrt(tensor.numel())
    if not math.isfinite(rms):
        raise ValueError(f"{name!r} is NaN or Inf at step {step}: use a smaller learning rate or fewer steps.")
    return math.log10(rms) if rms else -math.inf
