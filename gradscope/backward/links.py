"""Links: shortcuts that pull cotangents from one cut vertex to the one before it, through a single known operation.

For an elementwise operation, the autograd engine computes the derivative again for each cotangent; a link computes it
once.  For a matrix product, a link multiplies all cotangents by the weight.  The engine handles all other operations,
and every operation at which a link did not agree with the engine, because of hooks.  If no tensor has a hook, links and
engine compute the same by construction, so nothing is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradscope.backward.hooks import check_linear, cotangent, kind, no_hooks, survey
from gradscope.backward.pulling import RUN_BYTES, engine
from gradscope.forward.trunk import ELEMENTWISE, PRODUCTS, Trunk, Vertex, live_inputs, output_kind, vertex
from gradscope.memory import Later, Workspace

Link = Callable[[Tensor, Workspace], Tensor]

# Smallest number of cotangents for which links are used; for fewer, their test costs more than they save.
WORTHWHILE = 32

# Most links whose agreement with the engine is tested by one pass: the range of float32 must contain its gradients.
RUN = 64

# Largest size in bytes of the elementwise derivatives that a sweep keeps for its later batches of cotangents.
KEPT_BYTES = 1 << 26


def find_links(trunk: Trunk) -> list[Link | None]:
    """For every cut vertex, the link that maps cotangents (c, *shape) to the cut vertex below, overwriting its input.

    None means that the autograd engine must be used.  Cost if there may be hooks: one cotangent, pulled back through
    every link and through the autograd engine, once per recorded graph; a second one through runs in which one of the
    links did not agree.  ValueError if both differ because a hook changes the gradient in a nonlinear way.
    """
    live, hooked = trunk.position.keys() | trunk.above.keys(), survey(trunk).hooked
    kept, links = _Derivatives(), list[Link | None]([None])
    for lower, upper in pairwise(trunk.edges):
        links.append(None if {vertex(upper), vertex(lower)} & hooked else _link(upper, lower, live, kept))
    if no_hooks(trunk):
        return links
    untested = {position: link for position, link in enumerate(links) if link and position not in trunk.agreed}
    with torch.no_grad():
        agreed = _agreed(trunk, untested, _runs(trunk, untested))
        # Alone, a link is tested with a gradient that comes from nowhere else and neither over- nor underflows.
        agreed |= _agreed(trunk, untested, [[position] for position, agrees in agreed.items() if not agrees])
        for position in (position for position, agrees in agreed.items() if not agrees):
            check_linear([trunk.edges[position]], [trunk.edges[position - 1]])
    trunk.agreed.update(agreed)
    return [link if trunk.agreed.get(position) else None for position, link in enumerate(links)]


def _runs(trunk: Trunk, positions: Iterable[int]) -> Iterator[list[int]]:
    """Lists of adjacent positions; the gradients of each list take at most `RUN_BYTES`."""
    run: list[int] = []
    room = RUN_BYTES
    for position in positions:
        shape, dtype, _ = kind(trunk.edges[position])
        size = math.prod(shape) * dtype.itemsize
        if run and (position != run[-1] + 1 or size > room or len(run) == RUN):
            yield run
            run, room = [], RUN_BYTES
        run.append(position)
        room -= size
    if run:
        yield run


def _tolerance(norm: Tensor) -> float:
    """Largest relative difference that counts as rounding."""
    return float(torch.finfo(norm.dtype).eps ** 0.5)


def _agreed(trunk: Trunk, links: Mapping[int, Link], runs: Iterable[Sequence[int]]) -> dict[int, bool]:
    """Whether each link and the engine pull a cotangent back to the same gradient, up to rounding, by position.

    One pass of the engine covers a run of adjacent links.  It starts at every cut vertex of the run, so the gradient
    below a vertex is what arrives from above plus what starts there.
    """
    made, tested, near = lru_cache(maxsize=2)(cotangent), list[int](), list[Tensor]()
    for run in runs:
        edges = trunk.edges[run[0] - 1 : run[-1] + 1]
        own = [made(kind(edge)) for edge in edges[1:]]
        lowest, *arrived = engine(edges[1:], edges, [v.clone() for v in own])
        expected, found = [lowest.clone()], []  # an operation may pass on the gradient, which its link overwrites
        if run[1:]:
            expected += torch._foreach_sub(arrived[:-1], own[:-1])
        for number, (position, upper, v) in enumerate(zip(run, edges[1:], arrived, strict=True)):
            if upper.node.name() in PRODUCTS:  # one random combination of the rows tests all of them
                rows = made((v.shape[:1], v.dtype, v.device), 1, 0)
                v, expected[number] = (rows @ v)[None], rows @ expected[number]
            found.append(links[position](v[None], Workspace()).view_as(expected[number]))
        errors = torch.stack(torch._foreach_norm(torch._foreach_sub(found, expected)))
        sizes = torch.stack(torch._foreach_norm(expected))
        near.append(errors <= _tolerance(errors) * sizes)
        tested += run
    return dict(zip(tested, map(bool, chain.from_iterable(Later(near).arrays)), strict=True))


class _Derivatives:
    """Elementwise derivatives for later batches, as many as fit into ``KEPT_BYTES``."""

    def __init__(self) -> None:
        self.kept: dict[Vertex, Tensor] = {}
        self.room = KEPT_BYTES

    def get(self, edge: GradientEdge) -> Tensor | None:
        return self.kept.get(vertex(edge))

    def add(self, edge: GradientEdge, derivative: Tensor) -> None:
        size = derivative.numel() * derivative.element_size()
        if size <= self.room:
            self.kept[vertex(edge)] = derivative
            self.room -= size


def _link(upper: GradientEdge, lower: GradientEdge, live: Collection[Vertex], kept: _Derivatives) -> Link | None:
    node: Any = upper.node
    inputs = live_inputs(node, live)
    if len(inputs) != 1 or node.next_functions[inputs[0]] != vertex(lower):
        return None
    (shape, dtype), (shape_below, dtype_below) = output_kind(vertex(upper)), output_kind(vertex(lower))
    # In half precision one rounded derivative for all cotangents would cause a bias (0.45 % per layer for SELU in
    # bfloat16).  The engine rounds each product separately.
    if dtype not in (torch.float32, torch.float64) or dtype != dtype_below:
        return None
    name = node.name()
    if name in ELEMENTWISE and shape == shape_below:

        def pointwise(cotangents: Tensor, workspace: Workspace) -> Tensor:
            if (derivative := kept.get(upper)) is None:
                (derivative,) = engine((upper,), (lower,), (torch.ones_like(cotangents[0]),))
                kept.add(upper, derivative)
            return cotangents.mul_(derivative)

        return pointwise
    if PRODUCTS.get(name) == inputs[0] and getattr(node, "_saved_alpha", 1) == 1:

        def product(cotangents: Tensor, workspace: Workspace) -> Tensor:
            below = workspace.beside(cotangents, (*cotangents.shape[:2], *shape_below[1:]))
            torch.mm(cotangents.flatten(0, 1), node._saved_mat2.T, out=below.flatten(0, 1))
            return below

        return product
    return None
