"""Leave a model as it was: buffers, attributes, containers, hooks, random generators; and one thread at a time."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, MutableMapping
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.forward.modules import Modules, listening, own_thread

# One measurement at a time in a process: threads share the model, the random state and the filters of warnings.
alone = threading.RLock()

MOST_ENTRIES = 10_000  # of a container whose entries are examined one by one; a larger one is only copied
MOST_BYTES = 1 << 20  # of a tensor in a plain attribute that is copied, in case the model overwrites the tensor
MOST_DEPTH = 2  # objects inside objects that are followed, counted from the attribute of a module

_OPAQUE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, *_OPAQUE})
_CONTAINERS = (dict, list, set, deque)
_DICTS = (dict, OrderedDict)


class state_restored:  # noqa: N801 - used like a function, as the context managers of torch are
    """Context in which a pass may change anything in the modules; afterwards all is as it was before.

    Restored are buffers, plain attributes, builtin containers and small tensors in them, simple objects, hooks, random
    generators, the embedding weights that ``max_norm`` shortens, and the gradient mode.  The context is entered twice,
    ``with alone, state_restored(modules) as state, state``: if Ctrl-C interrupts one exit, the other one restores all.

    Raises:
        RuntimeError: Another thread called a module that holds buffers, or changed a parameter (raised in this thread
            if autograd found the change).
        ValueError: The pass built new parameters.

    Cost: a copy of all buffers, and a few microseconds per module.
    """

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.ready = self.done = False

    def __enter__(self) -> Self:
        if not self.ready:  # nothing is changed before the second entry
            self._keep_all()
            self.ready = True
        else:
            self._replace_buffers()
            self._guard_buffers()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self.done:
            return
        built = None if kind else self._built()
        self._restore()
        self.done = True
        if built is not None:
            raise ValueError(
                f"The model made {built!r} during the pass, so a measurement would choose its random weights: call the "
                "model once, model(x), before you measure it, so that it has all its parameters."
            )
        if isinstance(error, RuntimeError) and "modified by an inplace operation" in str(error):
            for name, parameter, version in self.parameters:
                if parameter._version != version:
                    raise RuntimeError(
                        f"Parameter {name!r} was changed during the measurement, by another thread or by the model: "
                        "measure between two training steps, or measure a copy (copy.deepcopy(model))."
                    ) from error

    def _keep_all(self) -> None:
        self.seen: set[int] = set()
        self.empty: list[Any] = []
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.tensors: list[tuple[Tensor, int, Tensor]] = []
        self.generators: list[tuple[Callable[[Any], object], Any]] = list(_generator_states(self.modules))
        self.extra: dict[str, nn.Module] = {}  # modules that the model holds without registering them
        self.known = {id(module) for module in self.modules.values()}
        self.parameters: list[tuple[str, Tensor, int]] = []
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.graded, self.listener = torch.is_grad_enabled(), listening.get()
        with torch.inference_mode(False), torch.no_grad():
            for name, module in self.modules.items():
                self._keep_module(name, module)
            for kind in {kind: None for module in self.modules.values() for kind in type(module).__mro__}:
                if issubclass(kind, nn.Module) and not kind.__module__.startswith("torch."):
                    for value in vars(kind).values():
                        self._keep(value, MOST_DEPTH)

    def _keep_module(self, name: str, module: nn.Module) -> None:
        """Remember the attributes of one module; parameters and buffers are not copied here."""
        self._keep_entries(module.__dict__)
        for key, value in module.__dict__.items():
            kind = type(value)
            if kind in _ATOMS:
                continue
            if key in ("_parameters", "_buffers", "_modules"):
                self._keep_entries(value)
            elif kind in _DICTS and not value:  # most attributes of a module: its dictionaries of hooks
                self.empty.append(value)
            else:
                self._keep(value, 0)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                self.parameters.append((f"{name}.{key}".lstrip("."), parameter, _version(parameter)))
        if module.__dict__.get("max_norm") and isinstance(module.weight, Tensor):
            self.weights.append((module.weight, module.weight.detach().clone()))

    def _keep(self, value: Any, depth: int) -> None:
        """Remember a value that a module holds, and what is inside."""
        kind = type(value)
        if kind in _ATOMS or id(value) in self.seen:
            return
        if kind is tuple or isinstance(value, _CONTAINERS):
            if not value:
                if kind is not tuple:
                    self.empty.append(value)
                return
            self.seen.add(id(value))
            if kind is not tuple:
                self._keep_entries(value)
            if len(value) <= MOST_ENTRIES:
                for entry in value.values() if isinstance(value, dict) else value:
                    self._keep(entry, depth)
        elif isinstance(value, Tensor):
            self.seen.add(id(value))
            small = value.layout is torch.strided and value.numel() * value.element_size() <= MOST_BYTES
            if small and not (value.is_meta or value.is_inference()):
                self.tensors.append((value, value._version, value.detach().clone()))
        elif isinstance(value, np.ndarray):
            if value.nbytes <= MOST_BYTES and value.flags.writeable:
                self.generators.append((lambda before: np.copyto(value, before), value.copy()))
        elif isinstance(value, nn.Module):
            for module in value.modules():
                if id(module) not in self.known:
                    self.known.add(id(module))
                    self.extra[f"an unregistered {type(module).__name__} ({len(self.extra)})"] = module
                    self._keep_module("", module)
        elif (generator := _generator_state(value)) is not None:
            self.generators.append(generator)
        elif depth < MOST_DEPTH and not isinstance(value, _OPAQUE):
            inside = getattr(value, "__dict__", None)
            # An object with a lock belongs to several threads, so only its owner may change it.
            if isinstance(inside, dict) and not any(hasattr(entry, "acquire") for entry in inside.values()):
                self.seen.add(id(value))
                self._keep_entries(inside)
                for entry in inside.values():
                    self._keep(entry, depth + 1)

    def _keep_entries(self, container: Any) -> None:
        before = dict(container) if isinstance(container, dict) else list(container)
        self.containers[id(container)] = container, before

    def _replace_buffers(self) -> None:
        """Give the modules clones of their buffers; a buffer that several modules share is cloned only once."""
        clones: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for module in (*self.modules.values(), *self.extra.values()):
                for name, buffer in module._buffers.items():
                    if buffer is not None and id(buffer) not in clones:
                        clones[id(buffer)] = buffer.clone()
                    if buffer is not None:
                        module._buffers[name] = clones[id(buffer)]

    def _guard_buffers(self) -> None:
        """Refuse calls by other threads: what they write into buffers would be lost."""
        if threading.active_count() > 1:
            guard = own_thread()
            for name, module in self.modules.items():
                if module._buffers:
                    module.register_forward_pre_hook(lambda *_, name=name: guard(name))

    def _built(self) -> str | None:
        """The name of a parameter that the pass added or replaced, if any."""
        for name, module in self.modules.items():
            _, parameters = self.containers[id(module._parameters)]
            _, children = self.containers[id(module._modules)]
            for key, parameter in module._parameters.items():
                if parameter is not None and parameters.get(key) is not parameter:
                    return f"{name}.{key}".lstrip(".")
            for key, child in module._modules.items():
                if child is not None and children.get(key) is not child and any(True for _ in child.parameters()):
                    return f"{name}.{key}".lstrip(".")
        return None

    def _restore(self) -> None:
        torch.set_grad_enabled(self.graded)
        listening.set(self.listener)
        for container, before in self.containers.values():
            _restore_entries(container, before)
        for container in self.empty:
            if container:
                container.clear()
        for weight, values in self.weights:
            weight.data.copy_(values)  # by .data: autograd ignores this change, since backward does not use the values
        for tensor, version, values in self.tensors:
            if tensor._version != version:
                tensor.data.copy_(values)
        for restore, state in self.generators:
            restore(state)


def _restore_entries(container: Any, before: Any) -> None:
    same = len(container) == len(before) and all(map(is_, container, before))
    if same and isinstance(container, dict):
        same = all(map(is_, container.values(), before.values()))
    if not same:
        container.clear()
        (container.update if isinstance(container, (MutableMapping, set)) else container.extend)(before)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class same_draws:  # noqa: N801
    """Context in which a model draws the same random numbers each time, such as dropout masks; restores the state.

    With ``modules=None``, which is for building a model, the generators of all CUDA devices are seeded.
    """

    def __init__(self, modules: Modules | None, seed: int = 0) -> None:
        self.modules, self.seed = modules, seed

    def __enter__(self) -> None:
        self.before = list(_generator_states(self.modules))
        devices = _cuda_devices(self.modules)
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002 - models that draw from numpy may use its global generator

    def __exit__(self, *_: object) -> None:
        for restore, state in self.before:
            restore(state)


def random_state(modules: Modules) -> list[Any]:
    """States of the random generators that a forward pass of the modules may use, as values that can be compared."""
    *states, python, (_, keys, *rest) = [state for _, state in _generator_states(modules)]
    return [*(state.numpy().tobytes() for state in states), python, keys.tobytes(), rest]


def _generator_states(modules: Modules | None) -> Iterator[tuple[Callable[[Any], object], Any]]:
    """(function that sets a state, state) of the global generators of torch, Python and numpy."""
    yield torch.set_rng_state, torch.get_rng_state()
    for index in _cuda_devices(modules):
        yield torch.cuda.default_generators[index].set_state, torch.cuda.get_rng_state(index)
    yield random.setstate, random.getstate()
    yield np.random.set_state, np.random.get_state()  # noqa: NPY002


def _generator_state(value: Any) -> tuple[Callable[[Any], object], Any] | None:
    """(function that sets a state, state) of a generator that a model holds; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.set_state, value.get_state()
    if isinstance(value, random.Random):
        return value.setstate, value.getstate()
    if isinstance(value, np.random.RandomState):
        return value.set_state, value.get_state()
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return (lambda state: setattr(bits, "state", state)), bits.state
    return None


def _cuda_devices(modules: Modules | None) -> list[int]:
    """Indices of the CUDA devices that hold parameters or buffers; of all devices for None."""
    if modules is None:
        if torch.cuda.is_available():
            torch.cuda.init()
        return list(range(len(torch.cuda.default_generators)))
    held = (t for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values()))
    return sorted({t.device.index for t in held if t is not None and t.is_cuda})
