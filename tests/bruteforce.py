"""Slow float64 truths: the whole Jacobian of a batch, written out."""

import torch
from torch import Tensor, nn


def stages(model: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """Outputs of the named modules in one forward pass, the input first; a plain hook, no gradscope."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
        for name, module in model.named_modules()
        if name in names
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [x, *(seen[name].clone() for name in names)]


def replaced(model: nn.Module, name: str, value: Tensor, x: Tensor) -> Tensor:
    """The model's output when the named module's output is ``value``."""
    module = dict(model.named_modules())[name]
    handle = module.register_forward_hook(lambda m, a, out: value)
    try:
        return model(x)
    finally:
        handle.remove()


def jacobian(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Full-batch Jacobian (B d_out) x (B d_k) of the output with respect to the named module's output."""
    if name == "input":
        full = torch.autograd.functional.jacobian(model, x)
        columns = x.numel()
    else:
        value = stages(model, [name], x)[1]
        full = torch.autograd.functional.jacobian(lambda v: replaced(model, name, v, x), value)
        columns = value.numel()
    return full.reshape(-1, columns)


def gsc_log10(model: nn.Module, name: str, x: Tensor) -> float:
    """log10 GSC (squared, reduction "batch") of one module to the output, from the definition."""
    J = jacobian(model, name, x)
    f_k = x if name == "input" else stages(model, [name], x)[1]
    f_l = model(x).detach()
    value = J.square().sum() / J.shape[1] * f_k.square().sum() / f_l.square().sum()
    return float(value.log10())


def sample_gsc(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """GSC of every sample (B,), each from a batch of its own."""
    return torch.tensor([10 ** gsc_log10(model, name, row[None]) for row in x], dtype=torch.float64)
