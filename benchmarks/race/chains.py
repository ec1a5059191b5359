"""A network as a chain of modules, so that a peer can be given "the rest of the network" above each layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscope.models import MLP, AlexNetA

SEED = 0


@dataclass(frozen=True)
class Chain:
    """``model`` on the batch ``x``, and the modules that it runs in turn, by the names of gradscope's layers."""

    model: nn.Module
    modules: OrderedDict[str, nn.Module]
    x: Tensor

    def sources(self) -> Iterator[tuple[str, Tensor, nn.Module]]:
        """Name, output and tail (what turns that output into the network's) of all layers but the last."""
        names, modules = ["input", *self.modules], list(self.modules.values())
        outputs = [self.x]
        with torch.no_grad():
            for module in modules:
                outputs.append(module(outputs[-1]))
        for number, name in enumerate(names[:-1]):
            yield name, outputs[number], nn.Sequential(*modules[number:])

    def forward_backward(self) -> tuple[Tensor, ...]:
        """One forward and backward pass with parameter gradients: what every ratio of the benchmark is held against."""
        return torch.autograd.grad(self.model(self.x).square().sum(), tuple(self.model.parameters()))


def mlp(depth: int, width: int, batch: int, norm: str = "none") -> Chain:
    """SELU network of equal layers on Gaussian noise: a deep Jacobian of low effective rank."""
    generator = torch.Generator().manual_seed(SEED)
    model = MLP(depth=depth, width=width, activation="selu", norm=norm, generator=generator)
    modules = OrderedDict((f"layers.{name}", layer) for name, layer in model.layers.named_children())
    return Chain(model, modules, torch.randn(batch, width, generator=torch.Generator().manual_seed(SEED + 1)))


def alexnet(batch: int) -> Chain:
    """AlexNet A in evaluation mode, where dropout does nothing and so is no layer."""
    model = AlexNetA(generator=torch.Generator().manual_seed(SEED)).eval()
    modules = OrderedDict((name, layer) for name, layer in model.named_children() if name != "dropout")
    return Chain(model, modules, torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(SEED + 1)))
