"""The trunk of a network: the tensors through which every path from the sources to the target passes.

Everything is read from the autograd graph, so residual branches, functional code and unknown modules need no special
case.  A tensor of the graph is identified by its autograd node and an output number, because all tensors that
``chunk``, ``split`` or an LSTM returns have the same node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

# The hashable identity of a tensor of the graph: its node and output number, the first two entries of its edge.
Vertex = tuple[Node, int]
vertex: Callable[[GradientEdge], Vertex] = itemgetter(0, 1)

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

    ``position``: the number of every cut vertex, in execution order; the last one is the target.
    ``above``: for every tensor inside a branch, the number of the first cut vertex that it flows into.
    ``names``: the operations, by node.  ``hooks``: `hooks_so_far` before the first node was made; None if unknown.
    ``effects`` and ``agreed``: what backward sweeps found out about hooks (by node), and whether their shortcuts agree
    with the autograd engine (by position).
    """

    position: dict[Vertex, int]
    above: dict[Vertex, int]
    names: dict[Node, str] = field(repr=False)
    hooks: int | None = None
    effects: dict[Node, Effect] = field(default_factory=dict, repr=False)
    agreed: dict[int, bool] = field(default_factory=dict, repr=False)

    @cached_property
    def cuts(self) -> tuple[Vertex, ...]:
        """The cut vertices in execution order."""
        return tuple(self.position)

    @cached_property
    def edges(self) -> tuple[GradientEdge, ...]:
        """The edges of the cut vertices."""
        return tuple(GradientEdge(*cut) for cut in self.cuts)

    @cached_property
    def order(self) -> dict[Vertex, int]:
        """Sort keys for execution order: tensors of a branch come before the cut vertex that the branch joins."""
        branches = {key: 2 * position for key, position in self.above.items()}
        return branches | {key: 2 * position + 1 for key, position in self.position.items()}


def hooks_so_far() -> int:
    """How many hooks Python code has registered in this process: on modules, on tensors, or on nodes of a graph."""
    return RemovableHandle.next_id


def leaf_edge(leaf: Tensor) -> GradientEdge:
    """The edge of a parameter, also if the caller is under inference_mode, where torch returns none."""
    with torch.inference_mode(False):
        return get_gradient_edge(leaf)


def depends(target: GradientEdge, source: GradientEdge) -> bool:
    """Whether a path of the graph leads from ``source`` to ``target``.  Cost: linear in the nodes below the target."""
    wanted = vertex(source)
    return vertex(target) == wanted or any(wanted in parents for parents in _topological_order(target.node).values())


def find_trunk(target: GradientEdge, sources: Iterable[GradientEdge], hooks: int | None = None) -> Trunk:
    """Cut vertices of the graph between all ``sources`` and ``target``.

    The nodes are sorted topologically, with one virtual root before all sources.  A tensor is a cut vertex if no edge
    leads past its node, and if it is the only output of this node that is used.  ``hooks``: that of the `Trunk`.
    Cost: linear in nodes and edges.
    """
    starts, end = {vertex(source) for source in sources}, vertex(target)
    order = _topological_order(target.node)
    number = {node: index for index, node in enumerate(order)}

    last: dict[Vertex, int] = {}  # the last consumer of every tensor on a path
    fed: dict[Node, int] = {}
    for node, parents in order.items():
        for parent in parents:
            if parent in starts or parent[0] in fed:
                last[parent] = fed[node] = number[node]
    if end not in starts and target.node not in fed:
        raise ValueError(
            "The target does not depend on the input: no path of the autograd graph leads from the input to the target."
        )
    last[end] = number[target.node]

    # Count the edges that lead past each node by a running sum: +1 after the producer, -1 at the last consumer.
    spans = [0] * (len(order) + 1)
    outputs: dict[Node, list[Vertex]] = defaultdict(list)
    for tensor, consumer in last.items():
        outputs[tensor[0]] += [tensor]
        producer = number[tensor[0]]
        for first, stop in ((producer, consumer), (-1, producer)) if tensor in starts else ((producer, consumer),):
            if stop > first + 1:  # it leads past the nodes strictly between
                spans[first + 1] += 1
                spans[stop] -= 1
    tensors = [tensor for node in order if node in outputs for tensor in outputs[node]]
    past = list(accumulate(spans))
    cuts = [tensor for tensor in tensors if outputs[tensor[0]] == [tensor] and past[number[tensor[0]]] == 0]

    position = {tensor: index for index, tensor in enumerate(cuts)}
    above: dict[Vertex, int] = {}
    following = len(cuts)
    for tensor in reversed(tensors):
        if tensor in position:
            following = position[tensor]
        else:
            above[tensor] = following
    return Trunk(position, above, {node: node.name() for node in outputs}, hooks)


def leaf_positions(trunk: Trunk, leaves: Collection[Vertex]) -> dict[Vertex, int]:
    """For each parameter (leaf) that the target depends on, the index of the first cut vertex after its last use.

    A backward pass from this cut vertex reaches every use of the parameter.  Cost: linear in the nodes of the graph.
    """
    found: dict[Vertex, int] = {}
    cuts = trunk.cuts
    for position in range(len(cuts) - 1, -1, -1):
        stop = cuts[position - 1] if position else None
        start = cuts[position][0]
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
    about = node._input_metadata[output_nr : output_nr + 1]  # the inputs of a backward node are what its operation made
    return (tuple(about[0].shape), about[0].dtype) if about else ((), None)


def _topological_order(root: Node) -> dict[Node, Sequence[Any]]:
    """All ancestors of ``root``, then ``root``, inputs first; each with its ``next_functions``.

    Not recursive: networks may be deeper than the stack.
    """
    order: dict[Node, Sequence[Any]] = {}
    seen: dict[Node, Sequence[Any]] = {}
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        if type(node) is tuple:  # all inputs of this node are in order
            order[node[0]] = seen[node[0]]
        elif node not in seen:
            seen[node] = parents = node.next_functions
            stack += [(node,)]
            for parent, _ in parents:
                if parent is not None and parent not in seen:
                    stack += [parent]
    return order
