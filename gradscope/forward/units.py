"""Which layers a person would name: one row per unit of the trunk.

A module is *open* if it is the root, or if it is or has as a child a ``Sequential``, ``ModuleList`` or ``ModuleDict``
and at least two tensors of its descendants besides its own output are on the trunk (one suffices in a container of
modules that have children themselves, so that a stage of two blocks is two rows, while Linear and ReLU in a pair are
one), or if it holds a module that is open.  A *block*, a module of a class of its own that stands beside others of the
same class in a container, is open only if it holds blocks itself.  Units are the outermost modules that are not open
and whose output is on the trunk.  So an MLP gives its layers, a ResNet its stem and blocks (also those whose shortcut
is a ``Sequential``), GPT-2 its blocks, a ``Sequential`` of leaves each leaf.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from gradscope.forward.layers import Layer, Origin, module_name
from gradscope.forward.trunk import Vertex, vertex

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_RESHAPES = {
    f"{name}Backward0"
    for name in "View UnsafeView ReshapeAlias Alias Squeeze Unsqueeze Transpose Permute Clone T".split()
} | {"SqueezeBackward1"}


def units(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Layers of the trunk, each under the name of its unit, in execution order.

    The input, the target and tensors marked with ``tap`` are always included if they are on the trunk.
    A tensor with two names keeps the outermost module that *made* it.  A tensor of functional code has the name of the
    first unit that passed it on.  The output of an opened module is skipped if it is only a reshaped copy of an
    existing row.
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
    """Recorded names, looked up by module: which modules were called, and which trunk tensors they made or hold."""

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
        """Paths of the modules left when every open one is opened, and of the open ones (True) after their contents."""
        for path, child in _children(module, prefix):
            is_open = path not in self.called or self.is_open(child, path, module)  # a parent whose children are called
            if is_open:
                yield from self.outermost(child, path)
            yield path, is_open

    def is_open(self, module: nn.Module, path: str, parent: nn.Module) -> bool:
        """Whether a module that was called, inside ``parent``, is open."""
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
        """Whether blocks with children of their own lie on the trunk somewhere inside."""
        return any(
            (_is_block(child, module) and any(True for _ in child.children()) and bool(self.made[inner]))
            or self._holds_blocks(child, inner)
            for inner, child in _children(module, path)
        )


def _is_block(module: nn.Module, parent: nn.Module) -> bool:
    """Whether a module other than a container stands in a container beside others of its class."""
    if isinstance(module, _CONTAINERS) or not isinstance(parent, _CONTAINERS):
        return False
    return sum(type(sibling) is type(module) for sibling in parent.children()) > 1


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield (f"{prefix}.{name}" if prefix else name), child


def _reshapes(layer: Layer, rows: Collection[Vertex]) -> bool:
    """Whether a layer is a reshaped copy of a row."""
    node = layer.edge.node
    return node.name() in _RESHAPES and node.next_functions[0] in rows
