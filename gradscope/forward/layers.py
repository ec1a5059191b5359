"""Layers (recorded tensors of the forward pass) and how to select them: by name, glob or callable, or as units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradscope.forward.trunk import Vertex, vertex

INPUT, OUTPUT, LOSS = "input", "output", "loss"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_RESHAPES = {
    f"{name}Backward0"
    for name in "View UnsafeView ReshapeAlias Alias Squeeze Unsqueeze Transpose Permute Clone T".split()
} | {"SqueezeBackward1"}


class Origin(Enum):
    """Where a name of a tensor comes from."""

    MADE = "made"  # the module call computed it
    PASSED_ON = "passed on"  # the module call returned its input, as an Identity does
    MARKED = "marked"  # the input, the loss, or a tensor marked with tap()
    OUTPUT = "output"  # the root module returned it


@dataclass(frozen=True)
class Layer:
    """One tensor of the forward pass, named after the module call that made it.

    ``name``: the module's name, with ``#2``, ``#3`` for further calls and ``[1]``, ``[2]`` for further outputs.
    ``origins``: every name of the tensor, and where this name comes from.  ``call``: number of the module's call.
    ``index``: execution order; the input is 0.  ``shape``: of the whole batch, samples first.
    ``norms``: length of each sample, shape (B,), or of the whole batch, shape (), if the leading dimension is not the
    batch.  The true lengths are ``norms * 2**exponent``.  ``modified``: whether an in-place operation overwrote the
    tensor later (the layer describes the old values).  ``on_trunk``: whether the tensor is on the trunk.
    """

    name: str
    call: int
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    origins: dict[str, Origin] = field(repr=False)
    edge: GradientEdge = field(repr=False)
    norms: Tensor = field(repr=False)
    exponent: Tensor = field(repr=False)
    modified: bool = False
    on_trunk: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of this tensor."""
        return tuple(self.origins)

    @property
    def size(self) -> int:
        """Number of entries of the whole batch, B times d."""
        return torch.Size(self.shape).numel()

    def called(self, name: str) -> Layer:
        """The same layer under another of its names."""
        return self if name == self.name else replace(self, name=name)


LayerFilter = str | Sequence[str] | Callable[[Layer], bool]


def select(layers: Sequence[Layer], wanted: LayerFilter, elsewhere: Collection[str] = ()) -> list[Layer]:
    """Layers that a glob, a list of globs over names, or a callable chooses, in execution order.

    Raises ValueError, with the nearest names, if a pattern or the callable matches no layer.  ``elsewhere`` names the
    recorded layers on which the target does not depend; such a layer does not count as a match.
    """
    if not isinstance(wanted, str) and callable(wanted):
        chosen = [layer for layer in layers if wanted(layer)]
        if not chosen:
            raise ValueError("The callable given as layers= accepted none of the recorded layers. " + _listed(layers))
        return chosen
    names: dict[int, str] = {}
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        matches = {layer.index: name for layer in layers for name in layer.names if _matches(name, pattern)}
        if not matches:
            raise ValueError(_missing(pattern, layers, elsewhere))
        names = matches | names
    if not names:
        raise ValueError("layers= is an empty list; leave it out to measure every unit. " + _listed(layers))
    return [layer.called(names[layer.index]) for layer in layers if layer.index in names]


def find(layers: Sequence[Layer], name: str, elsewhere: Collection[str] = ()) -> Layer:
    """The layer of that name, returned under this name; ValueError with the nearest names if there is none."""
    return lookup(layers, name, elsewhere).called(name)


def lookup(layers: Sequence[Layer], name: str, elsewhere: Collection[str] = ()) -> Layer:
    """The layer that has ``name`` among its names; raises like `find`."""
    for layer in layers:
        if name in layer.names:
            return layer
    raise ValueError(_missing(name, layers, elsewhere))


def squared_lengths(layers: Sequence[Layer]) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.int64]]:
    """|f|^2 of every layer as ``squares * 4**exponents``, on the CPU.  All lengths are copied together."""
    norms = torch.cat([layer.norms.reshape(-1) for layer in layers]).cpu().numpy()
    ends = np.cumsum([layer.norms.numel() for layer in layers])[:-1]
    exponents = torch.stack([layer.exponent.cpu() for layer in layers]).numpy()
    return np.split(np.square(norms), ends), exponents


def numbered(label: str, number: int) -> str:
    """Name of output ``number``, counted from 0, of the module call ``label``."""
    return f"{label}[{number}]" if number else label


def module_name(name: str) -> str:
    """A layer's name without the numbers of call and output."""
    return name.partition("#")[0].partition("[")[0]


def _missing(pattern: str, layers: Sequence[Layer], elsewhere: Collection[str]) -> str:
    if any(_matches(name, pattern) for name in elsewhere):
        return f"Layer {pattern!r} was recorded, but the target does not depend on it, so the layer has no coefficient."
    close = get_close_matches(pattern, [name for layer in layers for name in layer.names], n=5, cutoff=0.3)
    offer = f"Nearest names: {', '.join(map(repr, close))}." if close else _listed(layers)
    return f"No layer is called {pattern!r}. {offer}"


def _listed(layers: Sequence[Layer]) -> str:
    names = [layer.name for layer in layers]
    return f"Recorded: {', '.join(map(repr, names[:12]))}" + (f" and {len(names) - 12} more." if names[12:] else ".")


def _matches(name: str, pattern: str) -> bool:
    # "[1]" in a layer's name is an output number, not a glob's character class.
    return name == pattern or fnmatchcase(name, pattern.replace("[", "[[]"))


def units(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Layers of the trunk, each under the name of its unit, in execution order.

    An *open* module is not a unit itself, but modules inside it are.  The root is open, and so is a module that
    contains an open module.  A container (``Sequential`` and the like) is open if at least two tensors inside,
    besides its output, are on the trunk.  One such tensor suffices if modules in the container have children: a stage
    of two blocks is two units, but a pair of Linear and ReLU is one.  A module with a container as a child is open if
    at least two tensors inside are on the trunk.  A *block* is a module in a container that holds another module of
    the same class; a block is open only if it contains blocks.  Units are the outermost modules that are not open and
    whose output is on the trunk: the layers of an MLP, the stem and blocks of a ResNet, the blocks of GPT-2.

    The input, the target and tensors marked with ``tap`` are always included if they are on the trunk.  A tensor with
    several names has the name of the outermost module that *made* it or, if functional code made it, of the first
    unit that passed it on.  The output of an open module is skipped if it only reshapes a layer already included.
    """
    trunk = [layer for layer in layers if layer.on_trunk]
    tree = _Tree(layers, trunk)
    chosen: dict[int, str] = {}
    rows: set[Vertex] = set()
    for path, is_open in tree.outermost(model, ""):
        for index, name in tree.made[path].items():
            layer = layers[index]
            if not (is_open and _reshapes(layer, rows)):
                chosen.setdefault(index, name)
                rows.add(vertex(layer.edge))
        if not is_open:
            for index, name in tree.passed_on[path].items():
                chosen.setdefault(index, name)
    for layer in trunk:
        for name, origin in layer.origins.items():
            if origin in (Origin.MARKED, Origin.OUTPUT):
                chosen.setdefault(layer.index, name)
    return [layer.called(chosen[layer.index]) for layer in trunk if layer.index in chosen]


class _Tree:
    """Which modules were called, and which tensors of the trunk each module made, passed on or holds inside."""

    def __init__(self, layers: Sequence[Layer], trunk: Sequence[Layer]) -> None:
        self.called = {module_name(name) for layer in layers for name in layer.names}
        self.made: dict[str, dict[int, str]] = defaultdict(dict)
        self.passed_on: dict[str, dict[int, str]] = defaultdict(dict)
        self.inside: dict[str, set[int]] = defaultdict(set)
        for layer in trunk:
            for name, origin in layer.origins.items():
                path = module_name(name)
                if origin is Origin.MADE:
                    self.made[path].setdefault(layer.index, name)
                elif set(layer.origins.values()) == {Origin.PASSED_ON}:
                    self.passed_on[path].setdefault(layer.index, name)
                while "." in path:
                    path = path.rpartition(".")[0]
                    self.inside[path].add(layer.index)

    def outermost(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, bool]]:
        """(path, is_open) of open modules, each after its contents, and of the outermost modules that are not open."""
        for path, child in _children(module, prefix):
            is_open = path not in self.called or self.is_open(child, path, module)  # its children may be called
            if is_open:
                yield from self.outermost(child, path)
            yield path, is_open

    def is_open(self, module: nn.Module, path: str, parent: nn.Module) -> bool:
        """Whether a called module, a child of ``parent``, is open; `units` explains the rules."""
        within = len(self.inside[path] - self.made[path].keys())
        if within == 0:
            return False
        if self._holds_blocks(module, path):
            return True
        if _is_block(module, parent):
            return False
        holds = isinstance(module, _CONTAINERS) or any(isinstance(child, _CONTAINERS) for child in module.children())
        composite = isinstance(module, _CONTAINERS) and any(
            True for child in module.children() for _ in child.children()
        )
        return (holds and within >= (1 if composite else 2)) or any(
            self.is_open(child, inner, module) for inner, child in _children(module, path) if inner in self.called
        )

    def _holds_blocks(self, module: nn.Module, path: str) -> bool:
        """Whether the module contains, at any level, a block that has children and whose output is on the trunk."""
        return any(
            (_is_block(child, module) and any(True for _ in child.children()) and bool(self.made[inner]))
            or self._holds_blocks(child, inner)
            for inner, child in _children(module, path)
        )


def _is_block(module: nn.Module, parent: nn.Module) -> bool:
    """Whether a module lies in a container next to another module of its class, and is not a container itself."""
    if isinstance(module, _CONTAINERS) or not isinstance(parent, _CONTAINERS):
        return False
    return sum(type(sibling) is type(module) for sibling in parent.children()) > 1


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield (f"{prefix}.{name}" if prefix else name), child


def _reshapes(layer: Layer, rows: Collection[Vertex]) -> bool:
    """Whether a layer is only a reshaped copy of a layer chosen before; ``rows`` are these layers."""
    node = layer.edge.node
    return node.name() in _RESHAPES and node.next_functions[0] in rows
