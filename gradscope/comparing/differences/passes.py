"""Forward passes of two models on the same batch, compared value by value; every number is exact.

`traced` keeps what every module of the first model receives and returns.  `followed` runs a model in two ways:

- freely: |g_k - f_k| contains all differences of the layers before k, and how they grew;
- ``held``: every value is replaced by that of the first model as soon as it is compared.  So |g_k - f_k| is what layer
  k itself, or the code right before it, makes of equal inputs.

Cost: one forward pass each.  Memory: all values that modules of the first model receive or return, twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscope.comparing.differences.matching import Structure
from gradscope.forward.inputs import Batch, Forward, continuous
from gradscope.forward.layers import INPUT, OUTPUT, numbered
from gradscope.forward.modules import Modules, attach, transforming
from gradscope.forward.state import alone, state_restored

FloatArray = npt.NDArray[np.float64]


@dataclass
class Trace:
    """One pass of the first model: ``values`` by name, in the order in which they were made.

    ``received``, ``returned``: names of the values of every module call, by the call's name.  A value is named after
    the call that returned it; one that functional code made is named "input of" the call that received it.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    received: dict[str, list[str]] = field(default_factory=dict)
    returned: dict[str, list[str]] = field(default_factory=dict)
    structures: dict[str, Structure] = field(default_factory=dict)


class Distance(NamedTuple):
    """Squares of |f|, |g| and |g - f| of one value, per sample (B,) or for the whole batch (1,)."""

    first: FloatArray
    second: FloatArray
    apart: FloatArray

    @property
    def relative(self) -> float:
        """|g - f| / |f| over the batch; 0 if both are zero, and inf if g - f is NaN or Inf."""
        apart, length = float(self.apart.sum()), float(self.first.sum())
        if not np.isfinite(apart):
            return np.inf
        return float(np.sqrt(apart / length)) if length > 0 else (np.inf if apart > 0 else 0.0)


class _Tracer:
    """Keeps the values of a pass under their names."""

    def __init__(self, modules: Modules) -> None:
        self.modules, self.trace = modules, Trace()
        self.known: dict[int, tuple[Tensor, int, str]] = {}  # keeps the tensor, so that its id is not given away
        self.calls, self.running = Counter[str](), list[str]()

    def keep(self, tensor: Tensor, name: str) -> str:
        """Keep a value, and return its name; that of an earlier value if it is the same tensor, not overwritten."""
        found = self.known.get(id(tensor))
        if found is None or found[1] != tensor._version:
            self.trace.values[name] = tensor.detach().clone()
            found = self.known[id(tensor)] = tensor, tensor._version, name
        return found[2]

    def before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if transforming():
            return
        self.running.append(label := _label(name, self.calls))
        self.trace.received[label] = [
            self.keep(tensor, numbered(f"input of {label}", n)) for n, tensor in enumerate(_leaves((args, kwargs)))
        ]

    def after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if transforming():
            return
        label, returned = self.running.pop(), _leaves(output)
        self.trace.returned[label] = [self.keep(tensor, numbered(label, n)) for n, tensor in enumerate(returned)]
        parameters = tuple(tuple(parameter.shape) for parameter in module.parameters())
        self.trace.structures[label] = Structure(tuple(tuple(tensor.shape) for tensor in returned), parameters)


class _Follower:
    """Compares the values of a pass with those of a trace, and replaces them if ``held``."""

    def __init__(self, trace: Trace, partner: Mapping[str, str], held: bool, batch_size: int) -> None:
        self.trace, self.partner, self.held, self.batch_size = trace, partner, held, batch_size
        self.found: dict[str, tuple[str, Distance]] = {}
        self.given: dict[int, tuple[Tensor, str]] = {}
        self.calls, self.running = Counter[str](), list[str]()

    def each(self, tree: Any, names: Sequence[str], label: str, again: str = "") -> Any:
        """Compare the tensors of a structure; a structure with the values of the trace, if they replace them.

        ``again``: under which name a value is compared that was compared before, when another layer received it.
        """
        leaves, spec = pytree.tree_flatten(tree)
        places = [n for n, leaf in enumerate(leaves) if _wanted(leaf)]
        if len(places) != len(names):
            return None
        for place, name in zip(places, names, strict=True):
            leaves[place] = self.one(leaves[place], name, label, again)
        return pytree.tree_unflatten(leaves, spec) if self.held else None

    def one(self, tensor: Tensor, name: str, label: str, again: str = "") -> Tensor:
        """Compare one value; returns what is passed on."""
        value, known = self.trace.values[name], self.given.get(id(tensor))
        if value.shape != tensor.shape or (known is not None and known[1] == name):
            return tensor
        # A layer that only this model has may lie between the layer that made the value and the one that receives it.
        key = again if again and self.held and name in self.found else name
        if key not in self.found:
            self.found[key] = label, distance(value, tensor, self.batch_size)
        if not self.held:
            return tensor
        given = value.to(tensor.device, tensor.dtype, copy=True)
        self.given[id(given)] = given, name
        return given

    def before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if transforming():
            return None
        self.running.append(label := _label(name, self.calls))
        own = self.partner.get(label, "")
        return self.each((args, kwargs), self.trace.received.get(own, ()), f"input of {label}", f"input of {own}")

    def after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if transforming():
            return None
        label = self.running.pop()
        return self.each(output, self.trace.returned.get(self.partner.get(label, ""), ()), label)


def traced(modules: Modules, batch: Batch, forward: Forward | None, under: Any = None) -> Trace:
    """Run a model once, and keep its values."""
    tracer = _Tracer(modules)
    with torch.no_grad():
        inputs = batch.differentiable()[0]
        for number, tensor in enumerate(inputs.floats):
            tracer.keep(tensor, numbered(INPUT, number))
        _run(modules, inputs, forward, tracer, under)
    return tracer.trace


def followed(
    trace: Trace, modules: Modules, batch: Batch, forward: Forward | None, *, partner: Mapping[str, str] | None = None,
    held: bool = False, under: Any = None,
) -> dict[str, tuple[str, Distance]]:  # fmt: skip
    """Run a model once, and compare it with a trace: the name in this model and the distance, by name in the trace.

    ``partner``: as in `gradscope.comparing.differences.matching.Matching`; by default the names are equal.
    """
    partner = {label: label for label in trace.structures} if partner is None else partner
    follower = _Follower(trace, partner, held, batch.size)
    with torch.no_grad():
        inputs = batch.differentiable()[0]
        for number, tensor in enumerate(inputs.floats):
            name = numbered(INPUT, number)
            follower.one(tensor, name, name)
            follower.given[id(tensor)] = tensor, name  # the batch of both models is the same
        _run(modules, inputs, forward, follower, under)
    return follower.found


def distance(value: Tensor, other: Tensor, batch_size: int) -> Distance:
    """The squared lengths of two tensors and of their difference, in float64."""
    device = torch.device("cpu") if "mps" in (value.device.type, other.device.type) else value.device
    f, g = (_real(tensor.detach().to(device)).double() for tensor in (value, other.to(value.device)))
    rows = len(f) if f.shape[:1] == (batch_size,) else 1
    squares = [t.reshape(rows, -1).square().sum(dim=1).cpu().numpy() for t in (f, g, g - f)]
    return Distance(*squares)


def _run(modules: Modules, batch: Batch, forward: Forward | None, hooks: Any, under: Any) -> None:
    remove = attach(modules, hooks.before, hooks.after)
    try:
        with alone, state_restored(modules) as state, state, under or nullcontext():
            batch.run(modules[""], forward)
    finally:
        remove()


def _label(name: str, calls: Counter[str]) -> str:
    calls[name] += 1
    label = name or OUTPUT
    return label if calls[name] == 1 else f"{label}#{calls[name]}"


def _wanted(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.numel() > 0 and continuous(leaf)


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if _wanted(leaf)]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
