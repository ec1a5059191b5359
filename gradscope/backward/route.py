"""The route of cotangents down the trunk: positions, rows (where gradients are read), and steps between positions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradscope.backward.links import WORTHWHILE, Link, find_links
from gradscope.backward.pulling import PullBack
from gradscope.forward.layers import Layer
from gradscope.forward.trunk import Trunk, vertex
from gradscope.memory import Workspace

# One call of the engine returns the gradients of several rows at once.  Together they take at most this many bytes.
RUN_BYTES = 1 << 26


@dataclass(frozen=True)
class Leaf:
    """A parameter whose gradient is read, as a row of a route."""

    name: str
    edge: GradientEdge
    size: int
    dtype: torch.dtype
    device: torch.device


Row = Layer | Leaf  # where gradients are read

# A function of (number of the row, gradient (c, *shape), workspace); it returns the float64 tensor (c, ...) to keep.
Read = Callable[[int, Tensor, Workspace], Tensor]
Readings = list[tuple[int, Tensor]]


class Route(Protocol):
    """Positions 0, 1, 2, ... from the sources to the target; cotangents pass them in descending order."""

    bottom: int
    workspace: Workspace

    @property
    def rows(self) -> Sequence[Row]:
        """The layers and parameters at which gradients are read."""

    def position(self, target: Layer) -> int:
        """The position at which the cotangents of a target start."""

    def cross(self, upper: int, lower: int, cotangents: Tensor, read: Read) -> tuple[Tensor, Readings]:
        """The cotangents at ``lower``, and what was read at the rows from ``lower`` to just below ``upper``."""


class TrunkRoute:
    """The cut vertices of a recorded graph as a `Route`; rows lie on the trunk or in branches that join the trunk."""

    def __init__(self, trunk: Trunk, rows: Sequence[Row], workspace: Workspace | None = None) -> None:
        self.trunk, self.rows = trunk, rows
        self.workspace, self.pull_back = workspace or Workspace(), PullBack()
        keys = [vertex(row.edge) for row in rows]
        self.on = sorted((trunk.position[key], row) for row, key in enumerate(keys) if key in trunk.position)
        self.off = sorted((trunk.above[key], row) for row, key in enumerate(keys) if key not in trunk.position)
        # A row in a branch is read before the next cut vertex below; if there is no cut vertex below, at position -1.
        self.bottom = min([p for p, _ in self.on] + [p - 1 for p, _ in self.off], default=0)

    def position(self, target: Layer) -> int:
        """Index of the target among the cut vertices."""
        return self.trunk.position[vertex(target.edge)]

    def cross(self, upper: int, lower: int, cotangents: Tensor, read: Read) -> tuple[Tensor, Readings]:
        """Pull through links and through the autograd engine.  A link overwrites the cotangents that it is given."""
        readings: Readings = []
        for top, bottom, link in self._legs(upper, lower, len(cotangents)):
            rows = self._between(bottom, top)
            if link is not None:
                cotangents = link(cotangents, self.workspace)
                gradients = dict.fromkeys(rows, cotangents)
            else:
                gradients, cotangents = self._pull(top, bottom, rows, cotangents)
            readings += [(row, read(row, gradients[row], self.workspace)) for row in rows]
        return cotangents, readings

    def _legs(self, upper: int, lower: int, num_cotangents: int) -> Iterator[tuple[int, int, Link | None]]:
        """(upper, lower, link) of each leg: one link, or None for positions that the engine crosses in one call."""
        top, room = upper, RUN_BYTES
        linked = num_cotangents >= WORTHWHILE
        for position in range(upper, lower, -1):
            link = self.links[position] if linked else None
            if top > position and (link is not None or room < self.bytes[position - 1] * num_cotangents):
                yield top, position, None
                top, room = position, RUN_BYTES
            if link is not None:
                yield position, position - 1, link
                top = position - 1
            room -= self.bytes[position - 1] * num_cotangents
        if top > lower:
            yield top, lower, None

    @cached_property
    def bytes(self) -> list[int]:
        """For each cut vertex, the bytes of one gradient of every row there and in the branches just above."""
        taken = [0] * (len(self.trunk.edges) + 1)  # the last entry is for position -1
        for position, row in (*self.on, *((position - 1, row) for position, row in self.off)):
            taken[position] += self.rows[row].size * self.rows[row].dtype.itemsize
        return taken

    @cached_property
    def links(self) -> list[Link | None]:
        """The link below every cut vertex; None if the engine is needed, for example because a row lies in between."""
        links = find_links(self.trunk)
        for position, _ in self.off:
            links[position] = None
        return links

    def _between(self, lower: int, upper: int) -> list[int]:
        """Rows on the trunk in [lower, upper), and in branches that flow into a cut vertex of (lower, upper]."""
        on = self.on[bisect_left(self.on, (lower, -1)) : bisect_left(self.on, (upper, -1))]
        off = self.off[bisect_left(self.off, (lower + 1, -1)) : bisect_left(self.off, (upper + 1, -1))]
        return [row for _, row in (*on, *off)]

    def _pull(self, top: int, bottom: int, rows: Sequence[int], cotangents: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Pull through the autograd engine; return the gradients of ``rows`` and the cotangents at ``bottom``."""
        edges = self.trunk.edges
        wanted = {vertex(self.rows[row].edge): self.rows[row].edge for row in rows}
        if bottom >= 0:
            wanted[vertex(edges[bottom])] = edges[bottom]
        pulled = dict(zip(wanted, self.pull_back(edges[top], list(wanted.values()), cotangents), strict=True))
        gradients = {row: pulled[vertex(self.rows[row].edge)] for row in rows}
        if bottom < 0:
            return gradients, cotangents
        below = pulled[vertex(edges[bottom])]
        # Clone, because a link overwrites its cotangents, which may share memory with those above or with each other.
        linked = len(cotangents) >= WORTHWHILE and self.links[bottom] is not None
        return gradients, below.clone(memory_format=torch.contiguous_format) if linked else below
