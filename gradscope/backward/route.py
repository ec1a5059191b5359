"""The route of cotangents down the trunk: its positions, the steps between them, and rows, where gradients are read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradscope.backward.hooks import MODULE_HOOK, Survey, survey
from gradscope.backward.links import WORTHWHILE, Link, find_links
from gradscope.backward.pulling import RUN_BYTES, PullBack, pulled
from gradscope.forward.layers import Layer
from gradscope.forward.trunk import Trunk, vertex
from gradscope.memory import Workspace


@dataclass(frozen=True)
class Leaf:
    """A parameter as a row of a route: the sweep reads the gradient of this parameter as it reads that of a layer."""

    name: str
    edge: GradientEdge
    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Memory of the gradient; ``size`` counts real numbers."""
        return self.size * self.dtype.to_real().itemsize


Row = Layer | Leaf  # where gradients are read

# Receives row numbers, their gradients (c, *shape), a workspace, and 1; returns what to keep of each, a float64 tensor
# (c, ...) or its entries in one dimension.  The gradients of a single cotangent may be *shape, and the last argument 0.
Read = Callable[[Sequence[int], Sequence[Tensor], Workspace, int], Sequence[Tensor]]
Readings = list[tuple[int, Tensor]]


class Route(Protocol):
    """A path with positions 0, 1, 2, ... from sources to target; cotangents are pulled back in descending order."""

    bottom: int
    workspace: Workspace
    expected: int  # cotangents of the present batch, of all targets; they join one by one

    @property
    def rows(self) -> Sequence[Row]:
        """The layers and parameters at which gradients are read."""

    def position(self, target: Layer) -> int:
        """The position at which the cotangents of a target start."""

    def open(self, position: int) -> bool:
        """Whether cotangents may stop at this position and go on from there."""

    def uppermost(self, rows: Collection[int]) -> list[int]:
        """The given rows that are not below another given row of the trunk."""

    def part(self, rows: Sequence[int]) -> Route:
        """The same route with some of its rows."""

    def cross(self, upper: int, lower: int, cotangents: Tensor, read: Read) -> tuple[Tensor, Readings]:
        """Pull cotangents from ``upper`` to ``lower``; return them and readings of rows at ``lower`` and between.

        ``cotangents`` may be overwritten.
        """


class TrunkRoute:
    """The cut vertices of a recorded graph as a `Route`; rows lie on the trunk or in branches that join the trunk."""

    def __init__(self, trunk: Trunk, rows: Sequence[Row], workspace: Workspace | None = None) -> None:
        self.trunk, self.rows = trunk, rows
        self.workspace, self.pull_back, self.expected = workspace or Workspace(), PullBack(), 0
        keys = [vertex(row.edge) for row in rows]
        self.on = sorted((trunk.position[key], row) for row, key in enumerate(keys) if key in trunk.position)
        self.off = sorted((trunk.above[key], row) for row, key in enumerate(keys) if key not in trunk.position)
        # Rows in branches that join the trunk at p are read on the way down from p to p - 1; for p = 0, this is -1.
        self.bottom = min([p for p, _ in self.on] + [p - 1 for p, _ in self.off], default=0)

    def position(self, target: Layer) -> int:
        """Index of the target among the cut vertices."""
        return self.trunk.position[vertex(target.edge)]

    def open(self, position: int) -> bool:
        """Whether no hook changes the gradient there; a pass that stops there and one that goes on both run hooks."""
        return position not in self.held and self.trunk.cuts[position] not in self.survey.hooked

    def uppermost(self, rows: Collection[int]) -> list[int]:
        """The topmost given row on the trunk, and given rows in branches that join the trunk above it."""
        top = max((position for position, row in self.on if row in rows), default=-1)
        on = [row for position, row in self.on if row in rows and position == top]
        return on + [row for position, row in self.off if row in rows and position > top]

    def part(self, rows: Sequence[int]) -> TrunkRoute:
        """The same trunk with some of the rows."""
        return TrunkRoute(self.trunk, [self.rows[row] for row in rows], self.workspace)

    def cross(self, upper: int, lower: int, cotangents: Tensor, read: Read) -> tuple[Tensor, Readings]:
        """Pull through links and through the autograd engine.  A link overwrites the cotangents that it is given."""
        readings: Readings = []
        for top, bottom, link in self._legs(upper, lower, len(cotangents)):
            rows, lead = self._between(bottom, top), 1
            if link is not None:
                cotangents = link(cotangents, self.workspace)
                gradients = dict.fromkeys(rows, cotangents)
            else:
                lead = int(len(cotangents) > 1)
                gradients, cotangents = self._pull(top, bottom, rows, cotangents)
            readings += zip(rows, read(rows, [gradients[row] for row in rows], self.workspace, lead), strict=True)
        return cotangents, readings

    def _legs(self, upper: int, lower: int, num_cotangents: int) -> Iterator[tuple[int, int, Link | None]]:
        """Steps (upper, lower, link): over one position with a link, or over several with the engine (link None)."""
        # If something writes into gradients, stop at every row, so that the row is read before.
        most = 0 if self.survey.overwrites else RUN_BYTES
        top, room = upper, most
        linked = self._linked(num_cotangents)
        for position in range(upper, lower, -1):
            link = self.links[position] if linked else None
            full = room < self.bytes[position - 1] * num_cotangents
            if top > position and (link is not None or full) and self.open(position):
                yield top, position, None
                top, room = position, most
            if link is not None:
                yield position, position - 1, link
                top = position - 1
            room -= self.bytes[position - 1] * num_cotangents
        if top > lower:
            yield top, lower, None

    @cached_property
    def survey(self) -> Survey:
        """Which hooks change gradients, and whether anything overwrites them."""
        return survey(self.trunk)

    @cached_property
    def held(self) -> range:
        """Positions where no pass may stop: hooks of a module keep the gradient of its output for that of its input."""
        hooked = {node for node, name in self.trunk.names.items() if name == MODULE_HOOK}
        known = chain(self.trunk.position.items(), ((key, p - 1) for key, p in self.trunk.above.items()))
        found = [position for (node, _), position in known if node in hooked] if hooked else []
        return range(min(found, default=0), max(found, default=0))

    @cached_property
    def apart(self) -> frozenset[int]:
        """Rows whose gradient needs a backward pass that ends there: see `gradscope.backward.hooks`."""
        hooked = {row for row, at in enumerate(self.rows) if vertex(at.edge) in self.survey.hooked}
        return frozenset(hooked | ({row for _, row in self.off} if self.survey.overwrites else set()))

    @cached_property
    def bytes(self) -> list[int]:
        """For each cut vertex, total bytes of the gradients (one per row) read there and in branches just above it."""
        taken = [0] * (len(self.trunk.cuts) + 1)  # the last entry is for position -1
        for position, row in (*self.on, *((position - 1, row) for position, row in self.off)):
            taken[position] += self.rows[row].bytes
        return taken

    @cached_property
    def links(self) -> list[Link | None]:
        """The link below every cut vertex; None if the engine is needed, for example because a row lies in between."""
        links = find_links(self.trunk)
        for position in (*(position for position, _ in self.off), *self.held):
            links[position] = None
        return links

    def _linked(self, num_cotangents: int) -> bool:
        """Whether links are used: also for the first few cotangents of a batch that needs links later anyway."""
        return max(num_cotangents, self.expected) >= WORTHWHILE

    def _between(self, lower: int, upper: int) -> list[int]:
        """Rows on the trunk at lower <= position < upper, and in branches that join it at lower < position <= upper."""
        on = self.on[bisect_left(self.on, (lower, -1)) : bisect_left(self.on, (upper, -1))]
        off = self.off[bisect_left(self.off, (lower + 1, -1)) : bisect_left(self.off, (upper + 1, -1))]
        return [row for _, row in (*on, *off)]

    def _pull(
        self, upper: int, lower: int, rows: Sequence[int], cotangents: Tensor
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Pull through the autograd engine; return the gradients of ``rows`` and the cotangents at ``lower``.

        The gradients of a single cotangent have no first dimension, because a view of each would cost an operation.
        """

        def pull(edges: Sequence[GradientEdge], v: Tensor) -> Sequence[Tensor]:
            return self.pull_back(top, edges, v) if len(v) > 1 else pulled(top, edges, v[0])

        top, below = GradientEdge(*self.trunk.cuts[upper]), self.trunk.cuts[lower] if lower >= 0 else None
        gradients: dict[int, Tensor] = {}
        for row in self.apart.intersection(rows):
            (gradients[row],) = pull([self.rows[row].edge], cotangents.clone())
        together = [row for row in rows if row not in gradients]
        wanted = {vertex(self.rows[row].edge): self.rows[row].edge for row in together}
        if below is not None and below not in wanted:
            wanted[below] = GradientEdge(*below)
        found = dict(zip(wanted, pull(list(wanted.values()), cotangents) if wanted else (), strict=True))
        gradients |= {row: found[vertex(self.rows[row].edge)] for row in together}
        if below is None:
            return gradients, cotangents
        down = found[below] if len(cotangents) > 1 else found[below][None]
        # Clone before a link overwrites these cotangents: they may share memory with each other or with others above.
        linked = self._linked(len(cotangents)) and self.links[lower] is not None
        return gradients, down.clone(memory_format=torch.contiguous_format) if linked else down
