"""Modules that cannot be measured as they are, each with the way out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_SHARDING = tuple(f"torch.distributed.{part}" for part in ("fsdp", "tensor", "_composable.replicate"))
# By name, because importing these classes takes a second.
_FSDP1, _FSDP2, _SHARD = "FullyShardedDataParallel", "FSDPModule", "DTensor"


def held(module: nn.Module) -> Iterable[Tensor | None]:
    """The parameters and buffers that a module itself holds."""
    return (*module._parameters.values(), *module._buffers.values())


def doubtful(kind: type) -> bool:
    """Whether a module of this class, or one that holds tensors of this class, may be refused."""
    names = {base.__name__ for base in kind.__mro__}
    return issubclass(kind, (torch.jit.ScriptModule, UninitializedTensorMixin)) or not names.isdisjoint(
        (_FSDP1, _FSDP2, _SHARD)
    )


def refusal(module: nn.Module, *, sharded: bool) -> str | None:
    """Why a module cannot be measured, as the end of a sentence; None if it can.  ``sharded``: whether it may be."""
    kind, tensors = type(module), set(map(type, held(module)))
    if issubclass(kind, torch.jit.ScriptModule):
        return (
            f" ({kind.__name__}) is TorchScript, whose layers cannot be observed: measure the original module, before "
            "torch.jit.script or torch.jit.trace."
        )
    if any(issubclass(one, UninitializedTensorMixin) for one in tensors):
        return (
            f" ({kind.__name__}) is not initialized: call the model once, model(x), before you measure it. Its weights "
            "are drawn at random in this call, and a measurement must not draw them."
        )
    if any(base.__name__ == _FSDP1 for base in kind.__mro__):
        return (
            f" is sharded by {_FSDP1}, so no process holds all parameters: shard the model with "
            "torch.distributed.fsdp.fully_shard instead, or measure it before you wrap it."
        )
    if not sharded and (any(one.__name__ == _SHARD for one in tensors) or has_sharding_hooks(module)):
        return (
            " is sharded (FSDP2 or tensor parallelism), so no process holds all parameters: enter "
            "with gs.unsharded(model) in all processes, and measure inside."
        )
    return None


def class_name(module: nn.Module) -> str:
    """The name of a module's class, without the class that FSDP2 puts in front of it."""
    return (original(type(module)) if is_fsdp(module) else type(module)).__name__


def original(kind: type) -> type:
    """The class of a module before ``fully_shard`` was called for it."""
    names = [base.__name__ for base in kind.__mro__]
    return kind.__mro__[names.index(_FSDP2) + 1]


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called for a module."""
    kind = type(module)  # `replicate` puts a subclass of FSDPModule in front; a parametrization another class
    return kind.__module__.startswith("torch.distributed") and _FSDP2 in [base.__name__ for base in kind.__mro__]


def has_sharding_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks by which torch gathers, frees or redistributes tensors."""
    return any(is_sharding(hook) for name in HOOKS for hook in getattr(module, name).values())


def is_sharding(hook: Any) -> bool:
    """Whether a hook is one of FSDP2, of tensor parallelism or of ``replicate``."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(_SHARDING)
