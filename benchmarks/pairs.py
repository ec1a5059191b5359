"""Pairs of models for `benchmarks.differences`: equal up to rounding, or with one planted change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import planted

WIDTHS, DEPTHS, BATCH = (24, 32, 48, 64), (4, 6, 8), 32
HOSTS = tuple(name for name in planted.ALL if name != "conv none")
CONDITIONS = (
    "float64", "bfloat16", "autocast", "inputs permuted", "sums split", "batch permuted", "other formulas",
    "bfloat16, inputs permuted", "wrapped",
)  # fmt: skip
# Behind a planted change: b computes otherwise, too.
BACKGROUNDS = ("same", "float64", "inputs permuted", "sums split", "batch permuted", "wrapped")
EQUAL = "equal"
CHANGES = ("weights x 1.05", "weights in bfloat16", "activation swapped", "wrong epsilon")
NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
SWAPS: dict[type[nn.Module], tuple[Callable[[], nn.Module], ...]] = {
    nn.ReLU: (nn.GELU, lambda: nn.LeakyReLU(0.01), nn.SiLU),
    nn.Tanh: (nn.Hardtanh, nn.Softsign, nn.GELU),
    nn.GELU: (nn.ReLU, lambda: nn.GELU("tanh"), nn.SiLU),
    nn.SiLU: (nn.GELU, nn.ReLU, nn.Mish),
    nn.SELU: (nn.ELU, nn.ReLU, nn.CELU),
}


@dataclass
class Pair:
    """Two models and their batch; ``changed``: names of which the first layer that differs must be one, or none."""

    network: str
    a: nn.Module
    b: Any
    x: Tensor
    kind: str
    condition: str
    changed: tuple[str, ...] = ()


def host(name: str, seed: int) -> planted.Network:
    """The network of `benchmarks.planted`, small and in the dtype float32."""
    widths, depths = planted.WIDTHS, planted.DEPTHS
    planted.WIDTHS, planted.DEPTHS = WIDTHS, DEPTHS
    try:
        return planted.network(name, seed)
    finally:
        planted.WIDTHS, planted.DEPTHS = widths, depths


def equal(seed: int) -> Pair:
    """Two models that compute the same function, in different ways."""
    name, kind = HOSTS[seed % len(HOSTS)], CONDITIONS[seed // len(HOSTS) % len(CONDITIONS)]
    own = host(name, seed)
    a, condition = own.model, kind
    if kind.startswith("bfloat16, "):
        a, condition = a.bfloat16(), kind.partition(", ")[2]
        own.x = own.x.bfloat16() if own.x.is_floating_point() else own.x
    return Pair(name, a, under(a, condition, seed), own.x, EQUAL, kind)


def changed(kind: str, seed: int, *, name: str = "", background: str = "") -> Pair:
    """Two models that differ in one module; the network and the background follow from the seed if not given."""
    random = np.random.default_rng([seed, 23])
    hosts = planted.NORMED if kind == "wrong epsilon" else HOSTS
    name = name or hosts[seed % len(hosts)]
    own = host(name, seed)
    other, layer = copy.deepcopy(own.model), int(random.integers(len(own.layers)))
    if kind == "activation swapped" and isinstance(other, planted.Functional):
        return _functional(name, own, other, layer)
    modules = {path: m for top in own.layers[layer] for path, m in _below(other, top)}
    classes = {"activation swapped": tuple(SWAPS), "wrong epsilon": NORMS}.get(kind, (nn.Linear, nn.Conv2d))
    paths = [path for path, module in modules.items() if isinstance(module, classes)]
    path = paths[int(random.integers(len(paths)))]
    module: Any = modules[path]
    with torch.no_grad():
        if kind == "weights x 1.05":
            module.weight.mul_(1.05)
        elif kind == "weights in bfloat16":
            module.weight.copy_(module.weight.bfloat16())
        elif kind == "wrong epsilon":
            module.eps = float(random.choice([1e-6, 1e-12, 1e-3]))
        else:
            parent, _, key = path.rpartition(".")
            swaps = SWAPS[type(module)]
            setattr(other.get_submodule(parent), key, swaps[int(random.integers(len(swaps)))]())
    condition = background or BACKGROUNDS[int(random.integers(len(BACKGROUNDS)))]
    return Pair(name, own.model, under(other, condition, seed), own.x, kind, condition, (path,))


def under(model: nn.Module, condition: str, seed: int) -> Any:
    """A copy of the model that computes in another way, or a context for the model itself."""
    if condition == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    own = copy.deepcopy(model)
    if condition in ("float64", "bfloat16"):
        return own.to(getattr(torch, condition))
    if condition == "wrapped":
        return Wrapped(own)
    generator = torch.Generator().manual_seed(seed)
    for module in own.modules():
        other: Any = _other(module, condition, generator)
        if other is not None:
            module.forward = other
    return own


class Wrapped(nn.Module):
    """A model inside another, as data parallelism has it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


def _below(model: nn.Module, top: str) -> list[tuple[str, nn.Module]]:
    found = model.get_submodule(top).named_modules()
    return [(".".join(filter(None, (top, name))), module) for name, module in found if not module._modules]


def _functional(name: str, own: planted.Network, other: planted.Functional, layer: int) -> Pair:
    """One functional activation is left out; its value has no name but that of the call that receives it."""
    other.skip = layer
    last = layer + 1 == len(other.layers)
    following = "output" if last else f"input of layers.{layer + 1}"
    return Pair(name, own.model, other, own.x, "activation swapped", "same", (following,))


def _other(module: Any, condition: str, generator: torch.Generator) -> Callable[[Tensor], Tensor] | None:
    """Another way to compute a module, with the same result but for rounding."""
    linear = isinstance(module, nn.Linear)
    if condition in ("inputs permuted", "sums split") and (linear or isinstance(module, nn.Conv2d)):
        weight, axis = module.weight, -1 if linear else 1
        call: Callable[..., Tensor] = (
            functional.linear if linear else partial(functional.conv2d, padding=module.padding)
        )
        if condition == "sums split":
            half = weight.shape[1] // 2 or 1

            def split(x: Tensor) -> Tensor:
                low, high = x.tensor_split([half], dim=axis)
                found = call(low, weight[:, :half])
                found = found + call(high, weight[:, half:]) if weight.shape[1] > half else found
                return found if module.bias is None else found + (module.bias if linear else module.bias[:, None, None])

            return split
        order = torch.randperm(weight.shape[1], generator=generator)
        return lambda x: call(x.index_select(axis, order), weight[:, order], module.bias)
    if condition == "batch permuted" and (linear or isinstance(module, (nn.Conv2d, *NORMS))):
        forward = type(module).forward

        def permuted(x: Tensor) -> Tensor:
            order = torch.randperm(len(x), generator=generator)
            return forward(module, x[order])[order.argsort()]

        return permuted
    return _formula(module) if condition == "other formulas" else None


def _formula(module: Any) -> Callable[[Tensor], Tensor] | None:
    """The definition of a nonlinearity or normalization, in elementary operations."""
    if isinstance(module, nn.ReLU):
        return lambda x: (x + x.abs()) / 2
    if isinstance(module, nn.Tanh):
        return lambda x: 1 - 2 / (1 + (2 * x).exp())
    if isinstance(module, nn.GELU):
        return lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if isinstance(module, nn.SiLU):
        return lambda x: x / (1 + (-x).exp())
    if isinstance(module, nn.LayerNorm):
        return lambda x: _normalized(x, (-1,), module.eps, module.weight, module.bias)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        axes, shape = ((0,), (-1,)) if isinstance(module, nn.BatchNorm1d) else ((0, 2, 3), (-1, 1, 1))
        weight, bias = (None if part is None else part.view(shape) for part in (module.weight, module.bias))
        return lambda x: _normalized(x, axes, module.eps, weight, bias)
    return None


def _normalized(x: Tensor, axes: tuple[int, ...], eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    centered = x - x.mean(axes, keepdim=True)
    found = centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()
    found = found if weight is None else found * weight
    return found if bias is None else found + bias
