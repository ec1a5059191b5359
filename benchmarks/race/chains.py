"""Networks as chains of modules, so that other tools can differentiate the part above each layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscope.models import MLP, AlexNetA, ResNet

SEED = 0


@dataclass(frozen=True)
class Chain:
    """``model``, its batch ``x``, and its modules in execution order, named like gradscope's layers."""

    model: nn.Module
    modules: OrderedDict[str, nn.Module]
    x: Tensor

    def sources(self) -> Iterator[tuple[str, Tensor, nn.Module]]:
        """Name, output and tail (the modules above the layer) of all layers except the last."""
        names, modules = ["input", *self.modules], list(self.modules.values())
        outputs = [self.x]
        with torch.no_grad():
            for module in modules:
                outputs.append(module(outputs[-1]))
        for number, name in enumerate(names[:-1]):
            yield name, outputs[number], nn.Sequential(*modules[number:])

    def forward_backward(self) -> tuple[Tensor, ...]:
        """One forward and backward pass with parameter gradients, the reference of all ratios."""
        return torch.autograd.grad(self.model(self.x).square().sum(), tuple(self.model.parameters()))


def mlp(depth: int, width: int, batch: int, norm: str = "none", activation: str = "selu") -> Chain:
    """A network of equal layers on Gaussian noise.  Its Jacobian has a low effective rank."""
    generator = torch.Generator().manual_seed(SEED)
    model = MLP(depth=depth, width=width, activation=activation, norm=norm, generator=generator)
    modules = OrderedDict((f"layers.{name}", layer) for name, layer in model.layers.named_children())
    return Chain(model, modules, torch.randn(batch, width, generator=torch.Generator().manual_seed(SEED + 1)))


def dead(depth: int, width: int, batch: int, share: float = 0.4) -> Chain:
    """A ReLU network in which a share of the output units is 0 for every sample, so that no gradient starts there."""
    chain = mlp(depth, width, batch, activation="relu")
    with torch.no_grad():
        list(chain.model.parameters())[-1][: round(share * width)] = 0
    return chain


def resnet(batch: int) -> Chain:
    """ResNet-8 with batch normalization in evaluation mode, for measurements of the whole model only."""
    model = ResNet(depth=8, generator=torch.Generator().manual_seed(SEED)).eval()
    return Chain(model, OrderedDict(), torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(SEED + 1)))


def alexnet(batch: int) -> Chain:
    """AlexNet A in evaluation mode; the chain omits the dropout layer, which does nothing in this mode."""
    model = AlexNetA(generator=torch.Generator().manual_seed(SEED)).eval()
    modules = OrderedDict((name, layer) for name, layer in model.named_children() if name != "dropout")
    return Chain(model, modules, torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(SEED + 1)))
