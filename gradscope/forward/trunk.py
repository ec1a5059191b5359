"""The trunk of a network: the tensors through which every path from the sources to the target passes.

Everything is read from the autograd graph, so residual branches, functional code and unknown modules need no special
case.  A tensor of the graph is identified by its autograd node and an output number, because all tensors that
``chunk``, ``split`` or an LSTM returns have the same node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Vertex = tuple[Node, int]

# Operations of torch, by the name of their autograd node.  The node of a user's ``autograd.Function`` never has such
# a name: the names of such nodes end in "Backward", without a digit.
#
# Elementwise: an entry of the result depends on the same entry of each operand (operands may be broadcast).
# The digit distinguishes variants of an operation, for example one whose second operand is a number.
ELEMENTWISE = frozenset(
    f"{name}Backward{variant}"
    for variant in (0, 1)
    for name in (
        "Abs Add Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Log "
        "Maximum Minimum Mish Mul NativeDropout Neg Pow Reciprocal Relu Rsqrt Sigmoid Silu Sin Softplus Sqrt Sub Tanh "
        "Threshold ToCopy Where"
    ).split()
)

# Matrix products: which input is the left factor.  A row of the result depends on the same row of the left factor.
PRODUCTS = {"AddmmBackward0": 1, "MmBackward0": 0}


class Effect(NamedTuple):
    """What a node of the graph does to gradients, beyond its derivative.

    ``hooked``: indices of the outputs with hooks that change a gradient.  ``overwrites``: whether the node modifies
    gradients in place.
    """

    hooked: tuple[int, ...]
    overwrites: bool


@dataclass(frozen=True)
class Trunk:
    """Cut vertices between the sources and the target, and the next cut vertex after every other tensor.

    ``edges``: the cut vertices in execution order; the last one is the target.
    ``position``: index into ``edges`` of every cut vertex.
    ``above``: for every tensor inside a branch, the index of the first cut vertex that it flows into.
    ``effects`` and ``agreed``: what backward sweeps found out about hooks (by node), and whether their shortcuts agree
    with the autograd engine (by position).
    """

    edges: tuple[GradientEdge, ...]
    position: dict[Vertex, int]
    above: dict[Vertex, int]
    effects: dict[Node, Effect] = field(default_factory=dict, repr=False)
    agreed: dict[int, bool] = field(default_factory=dict, repr=False)

    def reaches_target(self, edge: GradientEdge) -> bool:
        """Whether this tensor lies on a path from a source to the target."""
        return vertex(edge) in self.position or vertex(edge) in self.above

    def order(self, edge: GradientEdge) -> tuple[int, bool]:
        """A sort key for execution order: tensors of a branch come before the cut vertex that the branch joins."""
        key = vertex(edge)
        return (self.position[key], True) if key in self.position else (self.above[key], False)


def vertex(edge: GradientEdge) -> Vertex:
    """The hashable identity of a tensor of the autograd graph."""
    return edge.node, edge.output_nr


def leaf_edge(leaf: Tensor) -> GradientEdge:
    """The edge of a parameter, also if the caller is under inference_mode, where torch returns none."""
    with torch.inference_mode(False):
        return get_gradient_edge(leaf)


def depends(target: GradientEdge, source: GradientEdge) -> bool:
    """Whether a path of the graph leads from ``source`` to ``target``.  Cost: linear in the nodes below the target."""
    wanted = vertex(source)
    return vertex(target) == wanted or any(
        (parent, number) == wanted for node in _topological_order(target.node) for parent, number in node.next_functions
    )


def find_trunk(target: GradientEdge, sources: Iterable[GradientEdge]) -> Trunk:
    """Cut vertices of the graph between all ``sources`` and ``target``.

    The nodes are sorted topologically, with one virtual root before all sources.  A tensor is a cut vertex if no edge
    leads past its node, and if it is the only output of this node that is used.  Cost: linear in nodes and edges.
    """
    source_vertices = {vertex(source) for source in sources}
    order = _topological_order(target.node)
    number = {node: index for index, node in enumerate(order)}

    live: set[Vertex] = set()
    consumers: dict[Vertex, list[int]] = defaultdict(list)
    live_nodes: set[Node] = set()
    for node in order:
        for parent, output_nr in node.next_functions:
            if parent is not None and ((parent, output_nr) in source_vertices or parent in live_nodes):
                live.add((parent, output_nr))
                consumers[parent, output_nr].append(number[node])
                live_nodes.add(node)
    if vertex(target) in source_vertices or target.node in live_nodes:
        live.add(vertex(target))
    else:
        raise ValueError(
            "The target does not depend on the input: no path of the autograd graph leads from the input to the target."
        )

    # Count the edges that lead past each node by a running sum: +1 after the producer, -1 at the last consumer.
    spans = [0] * (len(order) + 1)
    outputs: dict[Node, int] = defaultdict(int)
    for tensor in live:
        outputs[tensor[0]] += 1
        start = number[tensor[0]]
        if consumers[tensor]:
            _span(spans, start, max(consumers[tensor]))
        if tensor in source_vertices:
            _span(spans, -1, start)

    depth, spanned = 0, []
    for change in spans[: len(order)]:
        depth += change
        spanned.append(depth)
    tensors = sorted(live, key=lambda tensor: number[tensor[0]])
    cuts = [tensor for tensor in tensors if outputs[tensor[0]] == 1 and spanned[number[tensor[0]]] == 0]

    position = {tensor: index for index, tensor in enumerate(cuts)}
    above: dict[Vertex, int] = {}
    following = len(cuts)
    for tensor in reversed(tensors):
        if tensor in position:
            following = position[tensor]
        else:
            above[tensor] = following
    return Trunk(tuple(GradientEdge(*cut) for cut in cuts), position, above)


def leaf_positions(trunk: Trunk, leaves: Collection[Vertex]) -> dict[Vertex, int]:
    """For each parameter (leaf) that the target depends on, the index of the first cut vertex after its last use.

    A backward pass from this cut vertex reaches every use of the parameter.  Cost: linear in the nodes of the graph.
    """
    found: dict[Vertex, int] = {}
    for position in range(len(trunk.edges) - 1, -1, -1):
        stop = vertex(trunk.edges[position - 1]) if position else None
        start = trunk.edges[position].node
        stack, seen = [start], {start}
        while stack:
            for parent, output_nr in stack.pop().next_functions:
                if parent is None or (parent, output_nr) == stop or parent in seen:
                    continue
                seen.add(parent)
                if (parent, output_nr) in leaves:
                    found.setdefault((parent, output_nr), position)
                else:
                    stack.append(parent)
    return found


def live_inputs(node: Node, live: Collection[Vertex]) -> list[int]:
    """Positions of those inputs of an operation that are among the ``live`` tensors."""
    return [number for number, parent in enumerate(node.next_functions) if parent in live]


def output_kind(tensor: Vertex) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Shape and dtype of a tensor of the graph; ((), None) if torch does not know them."""
    node, output_nr = tensor
    metadata = node._input_metadata  # the inputs of a backward node are the outputs of its operation
    if output_nr >= len(metadata):
        return (), None
    return tuple(metadata[output_nr].shape), metadata[output_nr].dtype


def _span(spans: list[int], first: int, last: int) -> None:
    """Count one more edge over the nodes strictly between ``first`` and ``last``."""
    if last > first + 1:
        spans[first + 1] += 1
        spans[last] -= 1


def _topological_order(root: Node) -> list[Node]:
    """All ancestors of ``root``, then ``root``; inputs first.  Not recursive: networks may be deeper than the stack."""
    order: list[Node] = []
    seen: set[Node] = {root}
    stack = [(root, iter(root.next_functions))]
    while stack:
        node, parents = stack[-1]
        for parent, _ in parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append((parent, iter(parent.next_functions)))
                break
        else:
            order.append(node)
            stack.pop()
    return order
