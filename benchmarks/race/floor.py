"""Lower bounds on the time of an exact profile and of a profile with one probe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.race.chains import Chain

SIDE = 1024


def products(chain: Chain) -> Callable[[], Tensor]:
    """The matrix products that any exact method with one backward sweep needs.

    The (B d_l, d_l) matrix of all basis cotangents is multiplied by each weight matrix, from the last to the first.
    """
    weights = [weight.detach() for weight in reversed(list(chain.model.parameters()))]
    cotangents = torch.eye(len(weights[0])).repeat(len(chain.x), 1)

    def call() -> Tensor:
        v = cotangents
        for weight in weights:
            v = v @ weight  # (B d_l, d_k+1) @ (d_k+1, d_k)
        return v

    return call


def hooked_pass(chain: Chain) -> Tensor:
    """A forward pass with two empty hooks per module, and a backward pass to the input.

    Any measurement with hooks takes at least this long.
    """
    handles = []
    for module in chain.model.modules():
        handles.append(module.register_forward_pre_hook(lambda *_: None, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: None, with_kwargs=True))
    x = chain.x.clone().requires_grad_()
    output = chain.model(x)
    for handle in handles:
        handle.remove()
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
    return gradient


def flops(chain: Chain) -> int:
    """Floating-point operations of `products`."""
    rows = len(chain.x) * len(list(chain.model.parameters())[-1])
    return sum(2 * rows * weight.numel() for weight in chain.model.parameters())


def square_product(side: int = SIDE) -> Callable[[], Tensor]:
    """A float32 product of two square matrices, 2 side**3 operations; its time gives the machine's peak rate."""
    a, b = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0))
    return lambda: a @ b
