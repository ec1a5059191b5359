"""What a model and the random generators hold: buffers, attributes, containers, hooks; and how to restore it all."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, filterfalse, islice
from operator import attrgetter, is_, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.forward.modules import Modules, attach, listening, own_thread
from gradscope.forward.wrappers.refusals import held

MOST_ENTRIES = 10_000  # of a container whose entries are examined one by one; a larger one is only copied
MOST_BYTES = 1 << 20  # of a tensor in a plain attribute that is copied, in case the model overwrites the tensor
MOST_DEPTH = 2  # objects inside objects that are followed, counted from the attribute of a module

_OPAQUE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, *_OPAQUE})
_CONTAINERS = (dict, list, set, deque)

_STANDARD = vars(nn.Module())  # the attributes of every module; most of them are dictionaries of hooks
_hooks = itemgetter(*(name for name, value in _STANDARD.items() if isinstance(value, dict) and "hook" in name))
_members = attrgetter("_parameters", "_buffers", "_modules")


class Snapshot:
    """What modules and random generators hold now; ``active`` while a pass runs that may change it.

    These are buffers, plain attributes, builtin containers and small tensors in them, simple objects, hooks, random
    generators, and the embedding weights that ``max_norm`` shortens.  Cost: a few microseconds per module.
    """

    def __init__(self, modules: Modules) -> None:
        self.modules, self.listener, self.active = modules, listening.get(), False
        self.attributes: list[dict[str, Any]] = []  # of the modules
        self.dicts: list[dict[Any, Any]] = []
        self.others: list[Any] = []  # lists, sets and deques
        self.buffers: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self.tensors: list[tuple[Tensor, int, Tensor]] = []
        self.random, self.moved = list(generator_states(self.modules)), True  # moved: as far as is known
        self.generators: list[tuple[Callable[[Any], object], Any]] = []  # those that the model holds
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.seen: set[int] = set()
        self.known = set(map(id, self.modules.values()))
        self.versions = [
            (name, key, parameter, 0 if parameter.is_inference() else parameter._version)
            for name, module in self.modules.items()
            if module._parameters
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._keep_modules(self.modules.values())
        for kind in dict.fromkeys(kind for own in set(map(type, self.modules.values())) for kind in own.__mro__):
            if issubclass(kind, nn.Module) and not kind.__module__.startswith("torch."):
                for value in vars(kind).values():
                    self._keep_value(value, MOST_DEPTH)
        self.empty = [*filterfalse(None, self.dicts), *filterfalse(None, self.others)]
        self.dicts, self.others = [*filter(None, self.dicts)], [*filter(None, self.others)]
        self.sizes, self.names, self.entries = self._entries()

    def _keep_modules(self, modules: Collection[nn.Module]) -> None:
        """Remember the attributes of modules; parameters and buffers are not copied here."""
        attributes = [module.__dict__ for module in modules]
        hooks = list(chain.from_iterable(map(_hooks, attributes)))
        self.attributes += attributes
        self.dicts += chain(hooks, chain.from_iterable(map(_members, modules)))
        self.others += map(attrgetter("_non_persistent_buffers_set"), modules)
        keys = zip(attributes, map(dict.keys, attributes), strict=True)
        own = [one[name] for one, names in keys for name in names - _STANDARD]
        for value in chain(own, *map(dict.values, filter(None, hooks))):
            if type(value) not in _ATOMS:
                self._keep_value(value, 0)
        for module, one in zip(modules, attributes, strict=True):
            if buffers := module._buffers:
                self.buffers += [(buffers, name, buffer) for name, buffer in buffers.items() if buffer is not None]
            if "max_norm" in one and module.max_norm and isinstance(module.weight, Tensor):
                self.weights.append((module.weight, module.weight.detach().clone()))

    def _keep_value(self, value: Any, depth: int) -> None:
        """Remember a value that a module holds, and what is inside."""
        kind = type(value)
        if kind in _ATOMS or id(value) in self.seen:
            return
        self.seen.add(id(value))
        if kind is tuple or isinstance(value, _CONTAINERS):
            if isinstance(value, dict):
                self.dicts.append(value)
            elif kind is not tuple:
                self.others.append(value)
            if len(value) <= MOST_ENTRIES:
                for entry in value.values() if isinstance(value, dict) else value:
                    self._keep_value(entry, depth)
        elif isinstance(value, Tensor):
            small = value.layout is torch.strided and value.numel() * value.element_size() <= MOST_BYTES
            if small and not (value.is_meta or value.is_inference()):
                self.tensors.append((value, value._version, value.detach().clone()))
        elif isinstance(value, np.ndarray):
            if value.nbytes <= MOST_BYTES and value.flags.writeable:
                self.generators.append((lambda before: np.copyto(value, before), value.copy()))
        elif isinstance(value, nn.Module):  # held without being registered
            fresh = [module for module in value.modules() if id(module) not in self.known]
            self.known |= set(map(id, fresh))
            self._keep_modules(fresh)
        elif (generator := _generator_state(value)) is not None:
            self.generators.append(generator)
        elif depth < MOST_DEPTH and not isinstance(value, _OPAQUE):
            inside = getattr(value, "__dict__", None)
            # An object with a lock belongs to several threads, so only its owner may change it.
            if isinstance(inside, dict) and not any(hasattr(entry, "acquire") for entry in inside.values()):
                self.dicts.append(inside)
                for entry in inside.values():
                    self._keep_value(entry, depth + 1)

    def _entries(self) -> tuple[list[int], list[str], list[Any]]:
        """The sizes of all containers, the names of attributes, and all other entries; fast, all in C.

        The other entries are values of attributes, then keys, values, and the entries of lists and sets.
        """
        every = chain.from_iterable
        attributes, values = map(dict.values, self.attributes), map(dict.values, self.dicts)
        entries = [*every(attributes), *every(self.dicts), *every(values), *every(self.others)]
        return [*map(len, chain(self.attributes, self.dicts, self.others))], [*every(self.attributes)], entries

    def _changed(self) -> list[tuple[Any, Any]]:
        """The containers whose entries are other objects than before, each with its entries before."""
        found: list[tuple[Any, Any]] = [(container, ()) for container in filter(None, self.empty)]
        sizes, names, entries = self._entries()
        if sizes == self.sizes and names == self.names and all(map(is_, entries, self.entries)):
            return found
        num, first = len(self.names), len(self.attributes)
        last = num + sum(self.sizes[first : first + len(self.dicts)])
        keys, rest = chain(self.names, self.entries[num:last]), chain(self.entries[:num], self.entries[last:])
        for container, size in zip(chain(self.attributes, self.dicts, self.others), self.sizes, strict=True):
            before: Any = list(islice(rest, size))
            same = len(container) == size
            if isinstance(container, dict):
                same = same and all(map(is_, container.values(), before))
                before = dict(zip(islice(keys, size), before, strict=True))
            if not (same and all(map(is_, container, before))):
                found.append((container, before))
        return found

    def replace_buffers(self) -> None:
        """Give the modules clones of their buffers, and refuse calls by other threads, whose changes would be lost.

        A buffer that several modules share is cloned only once.
        """
        clones: dict[int, Tensor] = {}
        for entries, name, buffer in self.buffers:
            if id(buffer) not in clones:
                clones[id(buffer)] = buffer.clone()
            entries[name] = clones[id(buffer)]
        if threading.active_count() > 1:
            guard = own_thread()
            attach({n: m for n, m in self.modules.items() if m._buffers}, lambda name, m, args, kwargs: guard(name))

    def _built(self, changed: Sequence[tuple[Any, Any]]) -> str | None:
        """The name of a parameter that the pass added or replaced, if any."""
        before = {id(container): dict(entries) for container, entries in changed if isinstance(container, dict)}
        for name, module in self.modules.items() if before else ():
            for members in (module._parameters, module._modules):
                known = before.get(id(members), members)
                for key, new in members.items():
                    holder = new if isinstance(new, nn.Module) else module
                    if new is not None and known.get(key) is not new and any(True for _ in holder.parameters()):
                        return f"{name}.{key}".lstrip(".")
        return None

    def restore(self, *, failed: bool) -> str | None:
        """Restore everything; returns the name of a parameter that was built since, unless the pass ``failed``."""
        listening.set(self.listener)
        for entries, name, buffer in self.buffers:
            entries[name] = buffer
        changed = self._changed()
        built = None if failed else self._built(changed)
        for container, before in changed:
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(before)
        for weight, values in self.weights:
            weight.data.copy_(values)  # by .data: autograd ignores this change, since backward does not use the values
        for tensor, version, values in self.tensors:
            if tensor._version != version:
                tensor.data.copy_(values)
        for restore, state in chain(self.random if self.moved else (), self.generators):
            restore(state)
        self.moved = True
        return built

    def overwritten(self) -> str | None:
        """The name of a parameter that has been overwritten since, if any."""
        names = (f"{name}.{key}".lstrip(".") for name, key, p, version in self.versions if p._version != version)
        return next(names, None)

    def drew(self) -> bool:
        """Whether a global random generator has moved.  No code of the model may run before the next `restore`."""
        both = zip(generator_states(self.modules), self.random, strict=False)
        self.moved = any(_comparable(now) != _comparable(before) for (_, now), (_, before) in both)
        return self.moved


def _comparable(state: Any) -> Any:
    """The state of a global generator of torch, Python or numpy, as a value that can be compared."""
    if isinstance(state, Tensor):
        return state.numpy().tobytes()
    return (state[1].tobytes(), state[2:]) if isinstance(state[1], np.ndarray) else state


def generator_states(modules: Modules | None) -> Iterator[tuple[Callable[[Any], object], Any]]:
    """(function that sets a state, state) of the global generators of torch, Python and numpy."""
    yield torch.set_rng_state, torch.get_rng_state()
    for index in cuda_devices(modules):
        yield torch.cuda.default_generators[index].set_state, torch.cuda.get_rng_state(index)
    yield random.setstate, random.getstate()
    yield np.random.set_state, np.random.get_state()  # noqa: NPY002


def _generator_state(value: Any) -> tuple[Callable[[Any], object], Any] | None:
    """(function that sets a state, state) of a generator that a model holds; None for anything else."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return value.set_state, value.get_state()
    if isinstance(value, random.Random):
        return value.setstate, value.getstate()
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return (lambda state: setattr(bits, "state", state)), bits.state
    return None


def cuda_devices(modules: Modules | None) -> list[int]:
    """Indices of the CUDA devices that hold parameters or buffers; of all devices for None."""
    if modules is None:
        if torch.cuda.is_available():
            torch.cuda.init()
        return list(range(len(torch.cuda.default_generators)))
    if not torch.cuda.is_initialized():
        return []
    return sorted({t.device.index for m in modules.values() for t in held(m) if t is not None and t.is_cuda})
