"""Read the structure of a plain or residual perceptron from its modules, as input of mean-field theory.

Only this file and `gradscope.measures.preactivations` depend on module classes.  The reading is verified: each layer
is recomputed from the layer before and must reproduce the recorded values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope.forward.inputs import Forward
from gradscope.forward.layers import Layer, Origin
from gradscope.forward.modules import unwrap
from gradscope.jacobians.capture import Capture, capture
from gradscope.meanfield import Activation, LayerSpec
from gradscope.measures.preactivations import NONLINEARITIES, slopes

FloatArray = npt.NDArray[np.float64]

_KINKED = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU)
_SMOOTH = (nn.GELU, nn.LogSigmoid, nn.Mish, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink)

REPRODUCED = 1e-3  # largest relative difference between a recorded layer and one recomputed from the layer before


class UnreadableError(ValueError):
    """Raised if mean-field theory does not cover the network; the message names the unsupported part.

    >>> import torch
    >>> import gradscope as gs
    >>> try:
    ...     gs.compare(torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1)), torch.ones(2, 1, 3))
    ... except gs.UnreadableError as error:
    ...     print(error)
    '0' is of class Conv1d; a layer should begin with a Linear. The network has no four layers or blocks of one kind.
    """


@dataclass(frozen=True)
class ReadLayer:
    """One layer f = phi(norm(W f' + b)) of the network, with f' the layer before, or one block.

    ``name``, ``preactivation``: names of the tensors f and W f' + b.  ``spec``: the layer for theory, with measured
    variances of the weights.  ``fan_in``, ``width``: sizes of W.  ``square``, ``received``: measured mean squares of f
    and W f' + b.  ``overlap``: mean squared cosine of pre-activations over all pairs of samples, (b, b) included.
    """

    name: str
    preactivation: str
    spec: LayerSpec
    fan_in: int
    width: int
    square: float
    received: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    """A network as input of theory: ``layers``, mean square and correlation of the input, and the batch size."""

    layers: tuple[ReadLayer, ...]
    mean_square: float
    correlation: float
    batch_size: int
    source: str

    @property
    def specs(self) -> list[LayerSpec]:
        """Arguments of `gradscope.meanfield.predict`."""
        return [layer.spec for layer in self.layers]

    def with_weight_variances(self, variances: Sequence[float]) -> Reading:
        """Return the same network with other weight variances."""
        pairs = zip(self.layers, variances, strict=True)
        layers = (replace(layer, spec=replace(layer.spec, weight_variance=w)) for layer, w in pairs)
        return replace(self, layers=tuple(layers))


def read(model: nn.Module, data: Any, *, forward: Forward | None = None) -> Reading:
    """Return the reading of a perceptron.

    A perceptron is a chain of layers, each a Linear, perhaps a BatchNorm1d or LayerNorm, and perhaps a nonlinearity.
    Residual blocks s x + V phi(norm(W x)) may take the place of layers.

    Raises:
        UnreadableError: Any other network, a normalization with trained scales or running statistics, a nonlinearity
            that is not a module of torch.nn, or a layer that cannot be recomputed from the layer before.
    """
    model = unwrap(model)
    captured = capture(model, data, forward=forward)
    with torch.no_grad():
        return _Reader(captured, dict(model.named_modules())).read()


class _Reader:
    """Reads the modules that made a tensor, in order."""

    def __init__(self, captured: Capture, modules: Mapping[str, nn.Module]) -> None:
        if len(captured.source_names) != 1:
            raise UnreadableError(f"The network has {len(captured.source_names)} inputs; theory covers one.")
        if complex_ones := [layer.name for layer in captured.reached if layer.dtype.is_complex]:
            raise UnreadableError(f"Layer {complex_ones[0]!r} is complex; theory covers real networks.")
        self.captured, self.modules = captured, modules
        self.leaves: list[tuple[Layer, str, nn.Module]] = []
        for layer in captured.reached:
            for name, origin in layer.origins.items():
                if origin is Origin.MADE and "#" in name:
                    raise UnreadableError(f"Module {name.partition('#')[0]!r} is called twice, so weights are shared.")
                module = modules.get(name)
                if origin is not Origin.MADE or module is None or isinstance(module, nn.Flatten):
                    continue
                if not any(True for _ in module.children()):
                    self.leaves.append((layer, name, module))
        self.titles = {layer.index: layer.name for layer in captured.units}
        blocks = [name for layer in captured.reached if layer.on_trunk for name in layer.names]
        source = captured.source_names[0]
        wanted = {source, *(name for _, name, _ in self.leaves), *blocks}
        found = captured.replay.outputs(wanted, {})
        if other := [name for name, value in found.items() if value.ndim < 2]:
            shape = tuple(found[other[0]].shape)
            raise UnreadableError(f"Layer {other[0]!r} has shape {shape}; theory covers layers of shape (B, neurons).")
        self.values = {name: value.flatten(1) for name, value in found.items()}
        self.current, self.source = self.values[source], source

    def read(self) -> Reading:
        x, batch_size = self.current.double(), len(self.current)
        if batch_size < 2:
            raise UnreadableError("A single sample has no correlations: give at least two.")
        layers, place = [], 0
        while place < len(self.leaves):
            layer, place = self.layer(place)
            layers.append(layer)
        if not layers or self.current.shape != self.values[self.captured.target.name].shape:
            raise UnreadableError("No chain of linear layers leads from the input to the target.")
        self.same(self.current, self.captured.target.name, "the output")
        gram = x @ x.T
        square = float(gram.diagonal().mean())
        if not 0 < square < math.inf:
            raise UnreadableError(f"The data has the mean square {square:g}; theory needs a finite number > 0.")
        cross = float((gram.sum() - gram.diagonal().sum()) / (batch_size * (batch_size - 1)))
        return Reading(tuple(layers), square / x.shape[1], cross / square, batch_size, self.source)

    def layer(self, place: int) -> tuple[ReadLayer, int]:
        """Return the layer or block whose first module is at ``place``, and the place where the next one begins."""
        found, name, _ = self.leaves[place]
        before = self.current
        linear = self.linear(place)
        h = self.values[name]
        norm, value, place = self.norm(place + 1, h)
        activation, value, last, place = self.activation(place, value, name)
        spec = LayerSpec.of(activation, *_variances(linear), norm)
        if found.on_trunk:
            self.current = value
            name_of_f = next(self.titles.get(leaf.index, last) for leaf, other, _ in self.leaves if other == last)
        else:
            out = self.linear(place, value)
            name_of_f, skip = self.block(place, before)
            spec = replace(spec, branch_variance=_variances(out)[0], skip_weight=skip)
            place += 1
        square = float(self.current.double().square().mean())
        return ReadLayer(
            name_of_f, name, spec, linear.in_features, linear.out_features, square,
            float(h.double().square().mean()), _overlap(h),
        ), place  # fmt: skip

    def linear(self, place: int, given: Tensor | None = None) -> nn.Linear:
        """Return the linear map at ``place``, which must be applied to ``given`` (default: the layer before)."""
        if place >= len(self.leaves):
            raise UnreadableError("The last block has no linear map at its end.")
        _, name, module = self.leaves[place]
        if not isinstance(module, nn.Linear):
            raise UnreadableError(f"{name!r} is of class {type(module).__name__}; a layer should begin with a Linear.")
        value = self.current if given is None else given
        if value.shape[1] != module.in_features:
            raise UnreadableError(f"{name!r} does not take the output of the layer before it.")
        self.same(
            functional.linear(value, module.weight.detach(), module.bias), name, "a linear map of the layer before"
        )
        return module

    def norm(self, place: int, h: Tensor) -> tuple[str, Tensor, int]:
        """Return kind and output of the normalization at ``place`` (or "none" and ``h``), and the next place."""
        if place >= len(self.leaves):
            return "none", h, place
        _, name, module = self.leaves[place]
        if isinstance(module, nn.BatchNorm1d):
            if not module.training and module.running_mean is not None:
                raise UnreadableError(f"{name!r} uses running statistics, which theory does not cover: use .train().")
            value, kind = functional.batch_norm(h, None, None, training=True, eps=module.eps), "batch"
        elif isinstance(module, nn.LayerNorm):
            value, kind = functional.layer_norm(h, module.normalized_shape, eps=module.eps), "layer"
        else:
            return "none", h, place
        self.same(value, name, "a normalization without trained scale and shift")
        return kind, self.values[name], place + 1

    def activation(self, place: int, value: Tensor, name: str) -> tuple[Activation, Tensor, str, int]:
        """Return the nonlinearity at ``place`` (or the identity), its output, the output's name, and the next place."""
        last = name if place == 0 else self.leaves[place - 1][1]
        if place < len(self.leaves) and isinstance(self.leaves[place][2], NONLINEARITIES):
            _, name, module = self.leaves[place]
            activation = _activation(name, module)
            self.same(torch.from_numpy(activation(value.double().cpu().numpy())).to(value), name, "its function")
            return activation, self.values[name], name, place + 1
        return LayerSpec.of("linear", 1.0).activation, value, last, place

    def block(self, place: int, before: Tensor) -> tuple[str, float]:
        """Return name and skip weight of the residual block whose branch ends with the linear map at ``place``."""
        inner, name, _ = self.leaves[place]
        after = next(layer for layer in self.captured.reached if layer.on_trunk and layer.index > inner.index)
        total, branch = self.values.get(after.name), self.values[name]
        if total is None or total.shape != before.shape:
            raise UnreadableError(f"The branch that ends with {name!r} is not added to its input.")
        skip = float(((total - branch) * before).sum() / before.square().sum())
        self.same(skip * before + branch, after.name, "the sum of a skip connection and a branch")
        self.current = total
        return self.titles.get(after.index, after.name), round(skip, 6)

    def same(self, value: Tensor, name: str, what: str) -> None:
        """Raise UnreadableError if the recorded tensor is not ``value``."""
        recorded = self.values[name]
        if value.shape != recorded.shape or not float((value - recorded).norm()) <= REPRODUCED * float(recorded.norm()):
            raise UnreadableError(f"Layer {name!r} is not {what}, so theory cannot predict it.")


def _activation(name: str, module: nn.Module) -> Activation:
    """Return the nonlinearity as a function on arrays, with its derivative by automatic differentiation."""
    if isinstance(module, (nn.Hardtanh, nn.ReLU6)):
        kinks: tuple[float, ...] = (float(module.min_val), float(module.max_val))
    elif isinstance(module, _KINKED):
        kinks = (0.0,)
    elif isinstance(module, _SMOOTH):
        kinks = ()
    else:
        raise UnreadableError(f"Nonlinearity {name!r} is a {type(module).__name__}, which theory does not cover.")

    def function(h: FloatArray) -> FloatArray:
        with torch.no_grad():
            return module.forward(torch.from_numpy(np.array(h, dtype=np.float64))).numpy()

    def derivative(h: FloatArray) -> FloatArray:
        return slopes(module, torch.from_numpy(np.array(h, dtype=np.float64))).numpy()

    return Activation(type(module).__name__, function, derivative, kinks)


def _variances(linear: nn.Linear) -> tuple[float, float]:
    """Return sigma_w^2 = fan_in mean(W^2) and sigma_b^2 = mean(b^2)."""
    bias = 0.0 if linear.bias is None else float(linear.bias.detach().double().square().mean())
    return linear.in_features * float(linear.weight.detach().double().square().mean()), bias


def _overlap(h: Tensor) -> float:
    """Return the mean squared cosine between samples, weighted by their lengths."""
    h = h.double()
    gram = h @ h.T
    length = gram.diagonal().clamp_min(1e-300)
    weights = torch.outer(length, length)
    total = float(weights.sum())
    return float((gram.square() / weights * weights).sum()) / total if 0 < total < math.inf else 1.0
