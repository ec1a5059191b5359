"""Healthy networks of several architectures, and the faults that `benchmarks.faults` plants in one of their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope.models import MLP

WIDTHS: tuple[int, ...] = (50, 100, 200, 400)
DEPTHS: tuple[int, ...] = (8, 12)
BATCH = 32


class Functional(nn.Module):
    """Linear layers with a functional activation, which the layer ``skip`` lacks; with skip connections if wanted."""

    def __init__(self, width: int, depth: int, activation: Callable[[Tensor], Tensor], *, residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.activation, self.residual, self.skip, self.cut = activation, residual, -1, -1

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            h = layer(x)
            h = h if number == self.skip else self.activation(h)
            x = x + (h.detach() if number == self.cut else h) if self.residual else h
        return x


class Block(nn.Module):
    """A transformer block in the order normalization, attention or perceptron, sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        y: Tensor = x + self.down(self.act(self.up(self.norm2(x))))
        return y


class Transformer(nn.Module):
    """Embedding, blocks, final normalization and head."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, width), nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x))
        return y


@dataclass
class Network:
    """A network, its batch, and the names of the modules of every layer."""

    name: str
    width: int
    model: nn.Module
    x: Tensor
    layers: Sequence[tuple[str, ...]]

    def parts(self, layer: int) -> list[tuple[nn.Module, str, nn.Module]]:
        """Every module without children of a layer, with its parent and its name in it."""
        found = []
        for name in self.layers[layer]:
            top = self.model.get_submodule(name)
            for inner, module in top.named_modules():
                if not module._modules:
                    parent, _, key = f"{name}.{inner}".rstrip(".").rpartition(".")
                    found.append((self.model.get_submodule(parent), key, module))
        return found


def flat(width: int, depth: int, norm: Callable[[int], nn.Module] | None, activation: Callable[[], nn.Module]) -> Any:
    """A Sequential of single modules with PyTorch's initialization and a head, with the names of its layers."""
    modules: list[nn.Module] = []
    layers = []
    for _ in range(depth):
        begin = len(modules)
        modules += [nn.Linear(width, width), *([norm(width)] if norm else []), activation()]
        layers.append(tuple(str(n) for n in range(begin, len(modules))))
    return nn.Sequential(*modules, nn.Linear(width, 10)), layers


def conv(width: int, depth: int, norm: bool) -> Any:
    """A stem and blocks of convolution, normalization and ReLU on 8 x 8 images, pooling and a head."""
    channels = max(16, width // 12)
    blocks = [
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), *([nn.BatchNorm2d(channels)] if norm else []), nn.ReLU()
        )
        for _ in range(depth)
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Sequential(*blocks), head)
    if not norm:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return model, [(f"1.{n}",) for n in range(depth)]


def network(name: str, seed: int) -> Network:
    """Return the healthy network of this name; width, depth and weights follow from the seed."""
    random = np.random.default_rng([seed, 7])
    width, depth = int(random.choice(WIDTHS)), int(random.choice(DEPTHS))
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    kind, _, rest = name.partition(" ")
    x = torch.randn(BATCH, width)
    layers = [(f"layers.{n}",) for n in range(depth)]
    model: nn.Module
    if kind == "mlp":
        activation, _, norm = rest.partition("+")
        model = MLP(depth=depth, width=width, activation=activation, norm=norm or "none", bias=True, out_features=10)
    elif kind == "residual":
        model = MLP(depth=depth, width=width, activation=rest, norm="layer", residual="identity")
    elif kind == "flat":
        activation, _, norm = rest.partition("+")
        make = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "": None}[norm]
        model, layers = flat(width, depth, make, {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}[activation])
    elif kind == "functional":
        model = Functional(width, depth, {"tanh": torch.tanh, "relu": torch.relu}[rest.split("+")[0]],
                           residual=rest.endswith("+skip"))  # fmt: skip
    elif kind == "conv":
        model, layers = conv(width, min(depth, 12), rest == "batch")
        x = torch.randn(BATCH, 3, 8, 8)
    else:
        depth, width = min(depth, 8), min(width, 128) // 4 * 4
        model, layers = Transformer(width, depth), [(f"blocks.{n}",) for n in range(depth)]
        x = torch.randint(50, (8, 12))
    torch.set_rng_state(state)
    return Network(name, width, model, x, layers)


RELU = ("mlp relu", "mlp relu+layer", "flat relu", "flat relu+batch", "conv none", "conv batch")
TANH = ("mlp tanh", "mlp tanh+layer", "mlp tanh+batch", "flat tanh")
NORMED = ("mlp relu+layer", "mlp tanh+layer", "mlp relu+batch", "flat relu+layer", "flat relu+batch", "conv batch",
          "residual relu", "transformer")  # fmt: skip
SKIPS = ("residual relu", "residual tanh", "functional relu+skip", "transformer")
ALL = tuple(dict.fromkeys((
    *RELU, *TANH, *NORMED, *SKIPS, "mlp selu", "mlp gelu", "mlp silu", "mlp gelu+layer", "mlp selu+batch", "flat gelu",
    "flat gelu+layer", "functional tanh", "functional relu", "functional tanh+skip",
)))  # fmt: skip
HOSTS = {
    "gain": ALL,
    "dead": RELU,
    "half dead": ("mlp relu+layer", "flat relu+layer", "flat gelu+layer", "mlp tanh+layer", "residual relu"),
    "saturated": TANH,
    "no activation": tuple(n for n in ALL if n != "functional tanh+skip"),
    "no normalization": NORMED,
    "detached branch": SKIPS,
    "doubled step": ALL,
    "backward NaN": ALL,
}


class _Nan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


def _not_a_number(module: nn.Module, args: Any, output: Tensor) -> Any:
    return _Nan.apply(output)  # type: ignore[no-untyped-call]


def plant(host: Network, kind: str, seed: int) -> tuple[str, ...]:
    """Plant the fault in a random layer; returns the names of the modules of the layer."""
    random = np.random.default_rng([seed, 11])
    layer, variant = int(random.integers(len(host.layers))), int(random.integers(3))
    if kind == "no activation" and host.name.startswith("functional"):
        layer = int(random.integers(len(host.layers) - 1))
    parts = host.parts(layer)
    held = [(p, k, m) for p, k, m in parts if isinstance(m, (nn.Linear, nn.Conv2d))]
    norms = [(p, k, m) for p, k, m in parts if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d))]
    activations = [
        (p, k, m) for p, k, m in parts if isinstance(m, (nn.ReLU, nn.Tanh, nn.SELU, nn.GELU, nn.SiLU))
    ]  # fmt: skip
    weight = held[0][2].weight
    bias = weight.new_zeros(len(weight)) if held[0][2].bias is None else held[0][2].bias
    with torch.no_grad():
        if kind == "gain":
            weight.mul_(1.3)
        elif kind == "dead":
            dead = torch.rand(len(weight)) < 0.9
            affine = norms[0][2] if norms and getattr(norms[0][2], "bias", None) is not None else None
            if affine is not None:
                affine.bias[dead] = -10.0
            elif norms:
                activations[0][2].register_forward_hook(lambda m, a, y: y * ~dead)
            else:
                bias[dead] = -100.0 * float(weight.square().sum(tuple(range(1, weight.ndim))).mean().sqrt())
        elif kind == "half dead":
            half = torch.arange(len(weight)) % 2 == 0
            if variant == 0:
                weight[half] = 0.0
            elif variant == 1 and getattr(norms[0][2], "bias", None) is not None:
                norms[0][2].bias[half] = -10.0
            else:
                activations[0][2].register_forward_hook(lambda m, a, y: y * ~half)
        elif kind == "saturated":
            if variant == 0 and not norms:
                weight.mul_(30.0)
            elif variant == 1 and not norms:
                bias.copy_(5.0 * torch.randn(len(bias)).sign())
            else:
                activations[0][2].register_forward_pre_hook(lambda m, a: (10.0 * a[0],))
        elif kind == "no activation":
            if activations:
                setattr(activations[0][0], activations[0][1], nn.Identity())
            else:
                host.model.skip = layer  # type: ignore[assignment]
        elif kind == "no normalization":
            parent, key, _ = norms[variant % len(norms)]
            setattr(parent, key, nn.Identity())
        elif kind == "detached branch":
            if isinstance(host.model, Functional):
                host.model.cut = layer
            else:
                ends = [m for _, key, m in held if key in ("out", "proj", "down")]
                ends[variant % len(ends)].register_forward_hook(lambda m, a, y: y.detach())
        elif kind == "backward NaN":
            held[-1][2].register_forward_hook(_not_a_number)
        else:
            raise ValueError(f"No fault {kind!r} changes the network.")
    return host.layers[layer]
