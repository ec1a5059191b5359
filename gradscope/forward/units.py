"""Units: the rows of a default profile, such as the blocks of a ResNet or the layers of an MLP."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from gradscope.forward.layers import Layer, Origin, module_name
from gradscope.forward.modules import Modules
from gradscope.forward.trunk import Trunk, Vertex, depends, vertex

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_RESHAPES = {
    f"{name}Backward0"
    for name in "View UnsafeView ReshapeAlias Alias Squeeze Unsqueeze Transpose Permute Clone T".split()
} | {"SqueezeBackward1"}


def units(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Layers of the trunk, each under the name of its unit, in execution order.

    An *open* module is not a unit itself, but modules inside it are.  The root is open, and so is a module that
    contains an open module.  A container (``Sequential`` and the like) is open if at least two tensors inside,
    besides its output, are on the trunk.  One such tensor suffices if modules in the container have children: a stage
    of two blocks is two units, but a pair of Linear and ReLU is one.  A module that calls the items of a container one
    by one is open if at least two tensors inside are on the trunk.  A *block* is a module in a container that holds
    another module of the same class; a block is open only if it or such a neighbor contains blocks.  A subclass of
    ``Sequential`` with a single weight matrix (convolution, normalization and nonlinearity) is a layer, neither
    container nor block.  Units are the outermost modules that are not open and whose output is on the trunk: the layers
    of an MLP, the stem and blocks of a ResNet, the blocks of GPT-2.

    Of several tensors that one call returns, such as hidden states, the last one on the trunk is the module's output.
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
            if origin is Origin.MARKED or (origin is Origin.OUTPUT and tree.last[tree.calls[name]] == layer.index):
                chosen.setdefault(layer.index, name)
    return [layer.called(chosen[layer.index]) for layer in trunk if layer.index in chosen]


def merged(modules: Modules, layers: Sequence[Layer], rows: Sequence[Layer], trunk: Trunk) -> dict[str, list[str]]:
    """For each row in which functional code joins several blocks to the trunk, one after the other: their names.

    Such blocks are items of one container, or calls of one module with children, that end in branches; the sums that
    the branches join are tensors without a name.  Blocks inside a row that is a block itself are not listed.
    """
    branches = [layer for layer in layers if not layer.on_trunk]
    ends = [(trunk.position[vertex(row.edge)], row) for row in rows if row.on_trunk and branches]
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for layer in branches:
        for name in layer.origins:
            path, join = module_name(name), trunk.above[vertex(layer.edge)]
            parent, row = path.rpartition(".")[0], next((row for end, row in ends if end >= join), None)
            item = isinstance(modules.get(parent), _CONTAINERS)
            if row is not None and path in modules and (item or _has_children(modules[path])):
                block = groups[row.name, parent if item else path]
                block[join] = min(block.get(join, name), _call(name), key=len)
    found: dict[str, list[str]] = defaultdict(list)
    outer: list[tuple[str, str]] = []
    for (row_name, around), blocks in sorted(groups.items(), key=lambda group: group[0][1].count(".")):
        path = module_name(row_name)
        in_block = around.startswith(f"{path}.") and isinstance(modules.get(path.rpartition(".")[0]), _CONTAINERS)
        nested = any(row_name == other and around.startswith(f"{above}.") for other, above in outer)
        if len(blocks) > 1 and not in_block and not nested:
            outer.append((row_name, around))
            found[row_name] += blocks.values()
    return found


def avoidable(modules: Modules, layers: Sequence[Layer], rows: Sequence[Layer]) -> list[str]:
    """Blocks that some path to the target avoids, and that follow each other, such as those of an encoder.

    A block is a module with children in a container that holds another module of its class.  Experts, which are blocks
    side by side, and blocks inside a row are not listed.
    """
    found: dict[str, dict[str, Layer]] = defaultdict(dict)
    row_paths = {module_name(row.name) for row in rows}
    for layer in layers:
        for name, origin in () if layer.on_trunk else layer.origins.items():
            path = module_name(name)
            above = [path[:dot] for dot, letter in enumerate(path) if letter == "."]
            parent = modules.get(above[-1]) if above else None
            if origin is not Origin.MADE or not isinstance(parent, _CONTAINERS) or not row_paths.isdisjoint(above):
                continue
            if _has_children(modules[path]) and Counter(map(type, parent.children()))[type(modules[path])] > 1:
                found[above[-1]][path] = layer
    names: list[str] = []
    for parent_path, blocks in found.items():
        first, *_, last = [*blocks.values(), *blocks.values()]
        in_row = any(path.rpartition(".")[0] == parent_path for path in row_paths)
        if in_row or (first is not last and depends(last.edge, first.edge)):
            names += blocks
    return names


class _Tree:
    """Which modules were called, and which tensors of the trunk each module made, passed on or holds inside."""

    def __init__(self, layers: Sequence[Layer], trunk: Sequence[Layer]) -> None:
        names = [name for layer in layers for name in layer.origins]
        self.calls = {name: _call(name) if "[" in name else name for name in names}
        paths = {name: module_name(name) if "#" in call or call != name else name for name, call in self.calls.items()}
        self.called = set(paths.values())
        self.items: dict[str, list[tuple[str, nn.Module]]] = {}
        self.blocks: dict[str, bool] = {}
        self.classes: dict[int, Counter[type[nn.Module]]] = {}
        self.stages: dict[int, set[type[nn.Module]]] = {}
        # What a call returns besides its last tensor on the trunk, such as hidden states, other tensors are made of.
        self.last = {self.calls[name]: layer.index for layer in trunk for name in layer.origins}
        self.made: dict[str, dict[int, str]] = defaultdict(dict)
        self.passed_on: dict[str, dict[int, str]] = defaultdict(dict)
        self.inside: dict[str, dict[int, None]] = defaultdict(dict)
        for layer in trunk:
            returned, own = (Origin.MADE, Origin.OUTPUT), layer.origins
            for name in own:
                if self.last[self.calls[name]] != layer.index:
                    own = {n: o for n, o in own.items() if o not in returned or self.last[self.calls[n]] == layer.index}
                    break
            for name, origin in own.items():
                path = paths[name]
                if origin is Origin.MADE and layer.index not in self.made[path]:
                    self.made[path][layer.index] = name
                elif origin is Origin.PASSED_ON and set(own.values()) == {origin}:
                    self.passed_on[path].setdefault(layer.index, name)
                while "." in path:  # all modules around this one, except the root
                    path = path.rpartition(".")[0]
                    self.inside[path][layer.index] = None

    def children(self, module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
        """The paths and modules right inside a module, each module once."""
        if not module._modules:
            return []
        if path not in self.items:
            found: dict[int, tuple[str, nn.Module]] = {}
            for name, child in module._modules.items():
                if child is not None and (key := id(child)) not in found:
                    found[key] = (f"{path}.{name}" if path else name), child
            self.items[path] = list(found.values())
        return self.items[path]

    def outermost(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, bool]]:
        """(path, is_open) of open modules, each after its contents, and of the outermost modules that are not open."""
        for path, child in self.children(module, prefix):
            is_open = path not in self.called or self.is_open(child, path, module)  # its children may be called
            if is_open:
                yield from self.outermost(child, path)
            yield path, is_open

    def is_open(self, module: nn.Module, path: str, parent: nn.Module) -> bool:
        """Whether a called module, a child of ``parent``, is open; `units` explains the rules."""
        within = len(self.inside[path].keys() - self.made[path].keys())
        if within == 0:
            return False
        if self._holds_blocks(module, path) or type(module) in self._stages(parent, path):
            return True
        if self._is_block(module, parent):
            return False
        inner = self.children(module, path)
        if _is_container(module):
            composite = any(_has_children(child) for _, child in inner)
            return within >= (1 if composite else 2)
        one_by_one = any(_is_container(m) and p not in self.called and self.inside[p] for p, m in inner)
        return (one_by_one and within >= 2) or any(self.is_open(m, p, module) for p, m in inner if p in self.called)

    def _holds_blocks(self, module: nn.Module, path: str) -> bool:
        """Whether the module contains, at any level, a block that has children and whose output is on the trunk."""
        if path not in self.blocks:
            parents = [(inner, child) for inner, child in self.children(module, path) if child._modules]
            self.blocks[path] = bool(parents) and any(
                (_has_children(child) and bool(self.made[inner]) and self._is_block(child, module))
                or self._holds_blocks(child, inner)
                for inner, child in parents
            )
        return self.blocks[path]

    def _is_block(self, module: nn.Module, parent: nn.Module) -> bool:
        """Whether a module lies in a container next to another module of its class, and is no container or layer."""
        if not isinstance(parent, _CONTAINERS) or type(module) in _CONTAINERS or _is_layer(module):
            return False
        if id(parent) not in self.classes:
            self.classes[id(parent)] = Counter(map(type, parent.children()))
        return self.classes[id(parent)][type(module)] > 1

    def _stages(self, parent: nn.Module, path: str) -> set[type[nn.Module]]:
        """Classes of which one module in the container ``parent``, around the module of this path, holds blocks."""
        if type(parent) not in _CONTAINERS:
            return set()
        if id(parent) not in self.stages:
            items = self.children(parent, path.rpartition(".")[0])
            self.stages[id(parent)] = {
                type(item) for inner, item in items if type(item) not in _CONTAINERS and self._holds_blocks(item, inner)
            }
        return self.stages[id(parent)]


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) and not _is_layer(module)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a class of its own for one layer: a convolution, say, with normalization and nonlinearity."""
    if type(module) is nn.Sequential or not isinstance(module, nn.Sequential):
        return False
    return sum(parameter.ndim > 1 for parameter in module.parameters()) < 2


def _has_children(module: nn.Module) -> bool:
    return bool(module._modules) and any(child is not None for child in module._modules.values())


def _call(name: str) -> str:
    """A layer's name without the number of the output."""
    return name.partition("[")[0]


def _reshapes(layer: Layer, rows: Collection[Vertex]) -> bool:
    """Whether a layer is only a reshaped copy of a layer chosen before; ``rows`` are these layers."""
    node = layer.edge.node
    return node.name() in _RESHAPES and node.next_functions[0] in rows
