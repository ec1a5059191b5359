"""What a measurement must leave as it was: a model with its hooks, random generators, and settings of torch."""

from __future__ import annotations

import pickle
import random
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradscope.forward.modules import listening
from gradscope.forward.state import alone

State = Mapping[str, Any]
HOOKS = [name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, Mapping)]


def hooks(model: nn.Module, x: Tensor) -> Iterator[int]:
    """The identities of all hooks on the modules, the parameters and the data."""
    for module in model.modules():
        for name in HOOKS:
            yield from map(id, vars(module)[name].values())
    for tensor in (x, *model.parameters(), *model.buffers()):
        for held in (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)):
            yield from map(id, (held or {}).values())


def state(model: nn.Module, x: Tensor) -> State:
    """Everything but the hooks, by name, as values that can be compared."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if key not in HOOKS}
        found[f"mode of {name!r}"] = module.training
        found[f"attributes of {name!r}"] = {key: id(value) for key, value in plain.items()}
        found[f"lists of {name!r}"] = {key: len(value) for key, value in plain.items() if isinstance(value, list)}
    named = {"x": x, **dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in named.items():
        found[f"tensor {name}"] = id(tensor), tensor.requires_grad, _bytes(tensor)
        found[f"gradient of {name}"] = id(tensor.grad), None if tensor.grad is None else _bytes(tensor.grad)
    found["random state of torch"] = _bytes(torch.get_rng_state())
    found["random state of Python"] = random.getstate()
    found["random state of NumPy"] = pickle.dumps(np.random.get_state())  # noqa: NPY002
    return found | settings()


def settings() -> dict[str, Any]:
    """The settings of this thread and of the process."""
    C = torch._C
    return {
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), C._is_autocast_cache_enabled()
                     if hasattr(C, "_is_autocast_cache_enabled") else torch.is_autocast_cache_enabled()),
        "default type": torch.get_default_dtype(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()),
        "threads of torch": torch.get_num_threads(),
        "modes of dispatch": (C._len_torch_dispatch_stack(), C._len_torch_function_stack()),
        "level of transforms": C._functorch.maybe_current_level(),
        "level of forward differentiation": forward_ad._current_level,
        "hooks of saved tensors": C._autograd._top_saved_tensors_default_hooks(True) is None,
        "warnings": (list(warnings.filters), warnings.showwarning),
        "handler of SIGINT": signal.getsignal(signal.SIGINT),
        "listener": listening.get(),
        "lock": alone._is_owned(),  # type: ignore[attr-defined]
        "threads": threading.active_count(),
    }  # fmt: skip


def differences(before: State, after: State) -> list[str]:
    """The names of what changed."""
    return [name for name in before if before[name] != after.get(name)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
