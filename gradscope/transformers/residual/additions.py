"""Residual additions of a forward pass, x + f(x): sums of two tensors of one shape, found in the autograd graph.

A sum is residual if one operand (the skip) is the tensor x, or leads to x through a few linear operations, and the
other operand (the write) is computed from x by more than elementwise operations.  So an embedding sum is not residual,
because no operand depends on the other; nor is x + 0.04 x^3, a part of an activation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import takewhile
from typing import Any, NamedTuple

from torch.autograd.graph import Node

from gradscope.forward.layers import Layer, Origin
from gradscope.forward.trunk import Trunk, Vertex, live_inputs, output_kind, vertex
from gradscope.transformers.residual.sums import POINTWISE, Sum

KINDS = ("identity", "scaled", "projection")

# Operations between x and the skip operand, by the name of their autograd node.
_MOVES = frozenset(
    f"{name}Backward{variant}"
    for variant in (0, 1)
    for name in "Alias Clone Permute ReshapeAlias Squeeze T ToCopy Transpose Unsqueeze UnsafeView View".split()
) | {"BackwardHookFunctionBackward"}
_FACTORS = frozenset({"MulBackward0", "DivBackward0", "NegBackward0"})
_PROJECTIONS = tuple(
    "Addmm AdaptiveAvgPool AvgPool ConstantPad Convolution CudnnBatchNorm CudnnConvolution MaxPool MiopenBatchNorm "
    "MkldnnConvolution Mm NativeBatchNorm NativeGroupNorm NativeLayerNorm Slice Upsample".split()
)
# Operations after the module that made a write, besides factors and moves.
_AFTER = ("NativeDropout", "FusedDropout", "Roll", "Slice")
# Sums inside operations of torch, which are found in the graph although their values are not.
_FUSED = frozenset({"AddBackward0", "AddcmulBackward0", "AddmmBackward0", "BaddbmmBackward0", "LerpBackward0"})


class Step(NamedTuple):
    """A tensor on the way from a skip operand down to x: the ``kind`` of the way so far.

    Gradients are multiplied by ``factor`` and pulled back through the ``legs`` (top, bottom).  ``jumps``: whether the
    way leads past other residual additions.
    """

    at: Vertex
    kind: int
    legs: tuple[tuple[Vertex, Vertex], ...]
    factor: float
    jumps: bool


@dataclass(frozen=True)
class Addition:
    """A residual addition.  ``name``: of its write.  ``skip``: which operand is the skip.  ``way``: from there to x.

    ``closed``: whether all paths from x to the target lead through this sum, so that the gradient at x comes from it.
    """

    name: str
    sum: Sum
    skip: int
    way: Step
    closed: bool

    @property
    def write(self) -> Vertex:
        """The operand that is not the skip."""
        return self.sum.operands[1 - self.skip]

    @property
    def kind(self) -> str:
        """What the skip does to x."""
        return KINDS[self.way.kind]


def find_additions(sums: Sequence[Sum], trunk: Trunk, layers: Sequence[Layer]) -> tuple[list[Addition], int]:
    """The residual additions among the ``sums``, and the number of others whose values were not seen.

    Cost: linear in the nodes of the graph between each addition and its x.
    """
    live, found = trunk.order, dict[Vertex, Addition]()
    names, users = _Names(sums, live, layers), _Users(trunk)
    for one in sums:
        if one.key not in live or not set(one.operands) <= live.keys():
            continue
        ways = [way for skip in (0, 1) if (way := _way(one, skip, live, found)) is not None]
        ways.sort(key=lambda way: way[0])
        if not ways or (ways[1:] and ways[0][0] == ways[1][0]):
            continue
        _, skip, step = ways[0]
        closed = not step.jumps and users.closed(step.at, one.key)
        found[one.key] = Addition(names.write(one, 1 - skip), one, skip, step, closed)
    seen = {one.key[0] for one in sums}
    unseen = sum(name in _FUSED and node not in seen and _is_residual(node, live) for node, name in trunk.names.items())
    return list(found.values()), unseen


def _way(
    one: Sum, skip: int, live: Mapping[Vertex, int], found: Mapping[Vertex, Addition]
) -> tuple[tuple[int, int], int, Step] | None:
    """The way from an operand to the first tensor that the other operand is computed from, and how simple it is."""
    above, (start, other) = _Ancestors(one.operands[1 - skip]), (one.operands[skip], one.operands[1 - skip])
    for number, step in enumerate(_walk(start, one.factors[skip], live, found)):
        if step.at in above and step.at != other:
            return ((step.kind, number), skip, step) if _mixes(step.at, other) else None
    return None


def _walk(start: Vertex, factor: float, live: Mapping[Vertex, int], found: Mapping[Vertex, Addition]) -> Iterator[Step]:
    """The tensors that a skip operand may be made of, as long as no unknown operation and no other branch comes."""
    kind = 0 if factor == 1 else 1
    at, top, legs, jumps = start, start, tuple[tuple[Vertex, Vertex], ...](), False
    while True:
        yield Step(at, kind, (*legs, (top, at)) if top != at else legs, factor, jumps)
        if at in found:  # x + f(x) + g(x): the skip of the second sum is the x of the first
            below = found[at]
            legs, jumps = (*legs, (top, at)) if top != at else legs, True
            factor *= below.sum.factors[below.skip]
            kind = max(kind, int(factor != 1))
            at = top = below.sum.operands[below.skip]
        else:
            inputs = live_inputs(at[0], live)
            own = _kind(at, inputs[0]) if len(inputs) == 1 else None
            if own is None:
                return
            kind, at = max(kind, own), _inputs(at[0])[inputs[0]]


def _kind(at: Vertex, number: int) -> int | None:
    """What an operation on its input of this number can be in a skip: a number in `KINDS`, or None."""
    node: Any = at[0]
    name = node.name()
    if name in _MOVES:
        return 0
    if name == "NegBackward0":
        return 1
    if name in _FACTORS and (number == 0 or name == "MulBackward0"):
        if node.next_functions[1 - number][0] is not None:  # a parameter, or computed from parameters alone
            return 1
        factor = node._saved_self if number else node._saved_other
        return None if factor.numel() != 1 else int(float(factor) != 1)
    if name == "SliceBackward0" and output_kind(at) == output_kind(node.next_functions[number]):
        return 0
    return 2 if name.startswith(_PROJECTIONS) else None


class _Ancestors:
    """Tensors that a tensor is computed from.  The graph is searched only as far back as needed.

    Nodes have numbers that increase in execution order, so no path to a node leads through nodes with smaller numbers.
    """

    def __init__(self, start: Vertex) -> None:
        self.tensors, self.nodes = {start}, {start[0]}
        self.heap: list[tuple[int, int, Node]] = []
        self._add(start[0])

    def __contains__(self, wanted: Vertex) -> bool:
        self.search(wanted)
        return wanted in self.tensors

    def search(self, wanted: Vertex) -> None:
        """Search all nodes made after ``wanted``."""
        last = _number(wanted[0])
        while self.heap and -self.heap[0][0] > last:
            node = heappop(self.heap)[2]
            for parent in _inputs(node):
                if parent[0] is not None and parent not in self.tensors:
                    self.tensors.add(parent)
                    if parent[0] not in self.nodes:
                        self.nodes.add(parent[0])
                        self._add(parent[0])

    def _add(self, node: Node) -> None:
        if node.next_functions:  # a leaf has no number
            heappush(self.heap, (-_number(node), len(self.nodes), node))


def _inputs(node: Node) -> Sequence[Any]:
    """The tensors that an operation receives; (None, 0) for those without gradients."""
    return node.next_functions


def _number(node: Any) -> int:
    return int(node._sequence_nr())


class _Users:
    """Which nodes use each tensor of the graph."""

    def __init__(self, trunk: Trunk) -> None:
        self.of_tensor, self.of_node = defaultdict[Vertex, set[Node]](set), defaultdict[Node, set[Node]](set)
        live = trunk.order
        for node in trunk.names:
            for parent in node.next_functions:
                if parent in live:
                    self.of_tensor[parent].add(node)
                    self.of_node[parent[0]].add(node)

    def closed(self, x: Vertex, end: Vertex) -> bool:
        """Whether every path from x to the target leads through ``end``."""
        between = _between(x, end)
        return self.of_tensor[x].union(*(self.of_node[node] for node in between - {end[0]})) <= between


def _between(x: Vertex, end: Vertex) -> set[Node]:
    """The operations on all paths from x to ``end``."""
    above, found = _Ancestors(end), set[Node]()
    above.search(x)
    for node in sorted((node for node in above.nodes if node.next_functions), key=_number):
        if any(parent == x or parent[0] in found for parent in node.next_functions):
            found.add(node)
    return found


def _mixes(x: Vertex, write: Vertex) -> bool:
    """Whether some entry of a tensor is computed from several entries of x."""
    return not {node.name() for node in _between(x, write)} <= _MOVES | POINTWISE


def _is_residual(node: Node, live: Mapping[Vertex, int]) -> bool:
    """Whether an operation adds two tensors of the shape of its result, one of them computed from the other."""
    shape = output_kind((node, 0))[0]
    inputs = [_inputs(node)[n] for n in live_inputs(node, live)]
    alike = [parent for parent in inputs if output_kind(parent)[0] == shape]
    return any(x in _Ancestors(other) and _mixes(x, other) for x in alike for other in inputs if x != other)


class _Names:
    """Names of writes: of the module that made the operand, else of the running module."""

    def __init__(self, sums: Sequence[Sum], live: Mapping[Vertex, int], layers: Sequence[Layer]) -> None:
        self.live, self.sums, self.taken = live, {one.key: one for one in sums}, Counter[str]()
        self.made = {
            vertex(layer.edge): min(own, key=_depth)
            for layer in layers
            if (own := [name for name, origin in layer.origins.items() if origin in (Origin.MADE, Origin.MARKED)])
        }

    def write(self, one: Sum, operand: int) -> str:
        """A name that no other write has."""
        name = self._of(one.operands[operand]) or f"{one.module} (sum)"
        self.taken[name] += 1
        return name if self.taken[name] == 1 else f"{name} ({self.taken[name]})"

    def _of(self, at: Vertex) -> str | None:
        """The outermost module that made the tensor, or from whose output scaling or dropout made the tensor."""
        best: str | None = None
        while True:
            name = self.made.get(at)
            if name is not None and (best is None or _depth(name) <= _depth(best)):
                best = name
            inputs, kind = live_inputs(at[0], self.live), at[0].name()
            if at in self.sums and best is None:
                parts = [self._of(operand) for operand in self.sums[at].operands]
                return None if None in parts else _joined([str(part) for part in parts])
            simple = kind in _MOVES or kind in _FACTORS or kind.startswith(_AFTER)
            if not simple or len(inputs) != 1:
                return best
            at = _inputs(at[0])[inputs[0]]


def _joined(names: Sequence[str]) -> str:
    """A name of a sum.

    >>> _joined(["h.0.attn", "h.0.mlp"])
    'h.0.(attn + mlp)'
    """
    parts = [name.split(".") for name in names]
    columns = zip(*(own[:-1] for own in parts), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    rest = " + ".join(".".join(own[len(shared) :]) for own in parts)
    return ".".join([*shared, f"({rest})"]) if shared else rest


def _depth(name: str) -> int:
    return name.count(".")
