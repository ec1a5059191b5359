"""Stages of a trunk, each with the parameters whose common factor is its scale.

The autograd graph says which operations hold parameters, and how their outputs reach the output of a unit:

- In a unit with residual additions, the scale multiplies the last operation with parameters of every branch.
  The path with the fewest such operations is the skip; it is not scaled.
- In any other unit, the scale multiplies the last operation with parameters.

Of the parameters of one operation, those with the most dimensions are scaled: the weight of a linear map without its
bias, but both parameters of a normalization.  Cost: linear in the nodes of the graph.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from gradscope.forward.layers import Layer
from gradscope.forward.trunk import Trunk, Vertex, vertex
from gradscope.jacobians.capture import Capture

# Their parameters are added to the signal, so a factor of these parameters is no scale of it.
_SUMS = frozenset({"AddBackward0", "SubBackward0", "RsubBackward0"})
_Leaves = Mapping[Node, Sequence[Tensor]]


@dataclass(frozen=True)
class Stage:
    """The part of a trunk from the tensor ``source`` to ``target``; its scale lies in the unit ``layer``.

    ``parameters``: the names of the parameters that are scaled.  ``reason``: why they cannot be scaled, or "".
    """

    layer: str
    source: str
    target: str
    parameters: tuple[str, ...]
    reason: str


def find_stages(captured: Capture, rows: Sequence[Layer]) -> list[Stage]:
    """The stages between ``rows``, which lie on the trunk.  A row without a scale belongs to the stage before it."""
    trunk, known = captured.graph, _names(captured.replay.model)
    leaves = {node: found for node in trunk.names if (found := _side_leaves(node, trunk.order))}
    uses = Counter(id(leaf) for found in leaves.values() for leaf in found)
    starts: list[tuple[int, tuple[str, ...], str]] = []
    for place, (source, target) in enumerate(pairwise(rows), start=1):
        nodes = _gains(trunk, trunk.position[vertex(source.edge)], trunk.position[vertex(target.edge)], leaves)
        chosen = {id(leaf): leaf for node in nodes for leaf in _largest(leaves[node]) if id(leaf) in known}
        if chosen:
            shared = [known[key][0] for key in chosen if uses[key] > 1 or len(known[key]) > 1]
            starts.append((place, tuple(known[key][0] for key in chosen), _shared(shared)))
    ends = [place - 1 for place, *_ in starts[1:]] + [len(rows) - 1]
    sources = [0, *ends]
    return [
        Stage(rows[place].name, rows[source].name, rows[end].name, names, reason)
        for (place, names, reason), source, end in zip(starts, sources, ends, strict=False)
    ]


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)].append(name)
    return found


def _shared(names: Sequence[str]) -> str:
    return f"{names[0]} is used in several places" if names else ""


def _largest(leaves: Sequence[Tensor]) -> list[Tensor]:
    most = max(leaf.ndim for leaf in leaves)
    return [leaf for leaf in leaves if leaf.ndim == most]


def _side_leaves(node: Node, live: Mapping[Vertex, int]) -> list[Tensor]:
    """Parameters that enter the computation at this operation: those in inputs that do not depend on the data."""
    if node.name() in _SUMS:
        return []
    stack = [parent for parent, number in node.next_functions if parent is not None and (parent, number) not in live]
    found, seen = list[Tensor](), set(stack)
    while stack:
        parent: Any = stack.pop()
        if isinstance(leaf := getattr(parent, "variable", None), Tensor):
            found.append(leaf)
        for above, _ in parent.next_functions:
            if above is not None and above not in seen:
                seen.add(above)
                stack.append(above)
    return found


def _gains(trunk: Trunk, lower: int, upper: int, leaves: _Leaves) -> list[Node]:
    """The operations with parameters that scale what a unit computes, between two positions of the trunk."""
    residual, others = list[Node](), list[Node]()
    for position in range(upper, lower, -1):
        (node, _), below = trunk.cuts[position], trunk.cuts[position - 1]
        depths = _branches(node, below, trunk.order, leaves)
        skip = min(depths.values(), default=0)
        branches = [branch for branch, depth in depths.items() if branch != below[0] and depth > skip]
        residual += branches
        others = others or [node] * (node in leaves) or [branch for branch in depths if branch != below[0]]
    return residual or others


def _branches(top: Node, below: Vertex, live: Mapping[Vertex, int], leaves: _Leaves) -> dict[Node, int]:
    """The last operations with parameters of all branches that join at ``top``; ``below`` itself for one without.

    The value is the largest number of operations with parameters on a path from ``below`` to the output of the branch.
    """
    found: dict[Node, int] = {}
    depths = _depths(top, below[0], live, leaves)
    pending, seen = _inputs(top, live), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in leaves or node is below[0]:
            found[node] = depths[node]
        else:
            pending += _inputs(node, live)
    return found


def _depths(top: Node, below: Node, live: Mapping[Vertex, int], leaves: _Leaves) -> dict[Node, int]:
    """The largest number of operations with parameters on a path from ``below`` to each operation up to ``top``."""
    depths = {below: 0}
    stack = [(top, False)]
    while stack:  # not recursive: units may be deeper than Python's stack
        node, ready = stack.pop()
        if node in depths:
            continue
        inputs = _inputs(node, live)
        if ready:
            depths[node] = max((depths[each] for each in inputs), default=0) + (node in leaves)
        else:
            stack += [(node, True), *((each, False) for each in inputs)]
    return depths


def _inputs(node: Node, live: Mapping[Vertex, int]) -> list[Node]:
    """The operations whose outputs this operation reads, as far as they depend on the data."""
    return [parent for parent, number in node.next_functions if parent is not None and (parent, number) in live]
