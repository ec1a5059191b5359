"""Which layers a person would name: one row a unit of the trunk.

A module is *open* if it is the root, or is or has as a child a ``Sequential``, ``ModuleList`` or ``ModuleDict`` and at
least two tensors of its descendants besides its own output are on the trunk (one suffices in a container of modules
that have children themselves, so that a stage of two blocks is two rows, while Linear and ReLU in a pair are one).
Units are the outermost modules that are not open and whose output is on the trunk.  So an MLP gives its layers, a
ResNet its stem and blocks (also those whose shortcut is a ``Sequential``), GPT-2 its blocks, a ``Sequential`` of leaves
each leaf.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import nn

from gradscope.layers import Layer, Origin, module_name

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def units(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Layers of the trunk, each under the name of its unit, in execution order.

    The input, the target and tensors marked with ``tap`` are always among them where they are on the trunk.
    A tensor of two names keeps the outermost module that *made* it.
    """
    trunk = [layer for layer in layers if layer.on_trunk]
    tree = _Tree(layers, trunk)
    chosen: dict[int, str] = {}
    for path in tree.outermost(model, ""):
        for index, name in tree.made[path].items():
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
        self.inside: dict[str, set[int]] = defaultdict(set)
        for layer in trunk:
            for name, origin in layer.origins.items():
                path = module_name(name)
                if origin is Origin.MADE:
                    self.made[path].setdefault(layer.index, name)
                while "." in path:
                    path = path.rpartition(".")[0]
                    self.inside[path].add(layer.index)

    def outermost(self, module: nn.Module, prefix: str) -> Iterator[str]:
        """Paths of the modules left when every open one is opened; an open one comes after what it holds."""
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if self.is_open(child, path):
                yield from self.outermost(child, path)
            yield path

    def is_open(self, module: nn.Module, path: str) -> bool:
        if path not in self.called:  # a ModuleList, or a parent whose children are called one by one
            return True
        holds = isinstance(module, _CONTAINERS) or any(isinstance(child, _CONTAINERS) for child in module.children())
        composite = isinstance(module, _CONTAINERS) and any(
            True for child in module.children() for _ in child.children()
        )
        return holds and len(self.inside[path] - self.made[path].keys()) >= (1 if composite else 2)
