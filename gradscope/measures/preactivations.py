"""Inputs of a model's nonlinearities in one forward pass, with the slopes and outputs at these inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gradscope.forward.modules import Modules, transforming

# Elementwise nonlinearities of torch.nn, whose inputs are pre-activations; coefficients never depend on this list.
NONLINEARITIES = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip

Listener = Callable[[str, nn.Module, Tensor], None]


@contextlib.contextmanager
def nonlinearity_calls(modules: Modules, listener: Listener) -> Iterator[None]:
    """Call ``listener(name, module, input)`` at every call of a nonlinearity while the context is open.

    Calls inside a transform of `torch.func` are left out: their tensors belong to the transform.
    """
    calls: dict[str, int] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            if transforming():
                return
            calls[name] = call = calls.get(name, 0) + 1
            listener(f"{name}#{call}" if call > 1 else name, module, args[0] if args else kwargs["input"])

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            if isinstance(module, NONLINEARITIES):
                hooks.callback(module.register_forward_pre_hook(listen(name), with_kwargs=True).remove)
        yield


def slopes(module: nn.Module, received: Tensor) -> Tensor:
    """Return phi'(h) of an elementwise nonlinearity at every entry of ``received``.

    RReLU in training mode draws new slopes; the global random state is restored.
    """
    if type(module) is nn.ReLU:  # the most frequent nonlinearity; automatic differentiation is many times slower
        # Write numbers directly: converting a boolean mask is twenty times slower in bfloat16.
        return torch.gt(received, 0, out=torch.empty_like(received))
    with torch.enable_grad():
        leaf = received.detach().requires_grad_()
        return torch.autograd.grad(response(module, leaf).sum(), leaf)[0]


def by_part(module: nn.Module) -> bool:
    """Whether phi is one function of real numbers, without parameters and random numbers."""
    plain = type(module) in NONLINEARITIES and not isinstance(module, (nn.PReLU, nn.RReLU))
    return plain and "forward" not in vars(module)


def response(module: nn.Module, received: Tensor) -> Tensor:
    """Return phi(h) of a nonlinearity; for RReLU in training mode see `slopes`."""
    if by_part(module):
        return module.forward(received.clone() if getattr(module, "inplace", False) else received)
    devices = [received.device] if received.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        # Call `forward` directly so that our hook does not fire again, on a clone in case the module works in place.
        return module.forward(received.clone())
