"""What the nonlinearities of a model receive in one forward pass, and their slopes there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gradscope.forward.modules import Modules

# Elementwise nonlinearities of torch.nn.  Classes, because "what the nonlinearity receives" is a question about roles;
# gradients never depend on this list.
NONLINEARITIES = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip

Listener = Callable[[str, nn.Module, Tensor], None]


@contextlib.contextmanager
def heard(modules: Modules, listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every call of a nonlinearity: the layer's name, the module, and what it receives."""
    calls: dict[str, int] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            calls[name] = call = calls.get(name, 0) + 1
            listener(f"{name}#{call}" if call > 1 else name, module, args[0] if args else kwargs["input"])

        return hook

    handles = []
    try:
        for name, module in modules.items():
            if isinstance(module, NONLINEARITIES):
                handles.append(module.register_forward_pre_hook(listen(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def slopes(module: nn.Module, received: Tensor) -> Tensor:
    """phi'(h) of an elementwise nonlinearity at every entry of ``received``, by differentiation; of ReLU by comparison.

    RReLU in training mode draws its slopes anew; the model's random numbers are not used up.
    """
    if type(module) is nn.ReLU:  # the most frequent one, and automatic differentiation takes many times as long
        # Into numbers, because a mask of truth values takes twenty times as long from bfloat16.
        return torch.gt(received, 0, out=torch.empty_like(received))
    with torch.enable_grad():
        leaf = received.detach().requires_grad_()
        return torch.autograd.grad(response(module, leaf).sum(), leaf)[0]


def response(module: nn.Module, received: Tensor) -> Tensor:
    """phi(h) of a nonlinearity; RReLU in training mode draws its slopes anew, as for `slopes`."""
    devices = [received.device] if received.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        # Not the module's call, which would be heard again; a clone, because it may work in place.
        value: Tensor = module.forward(received.clone())
    return value
