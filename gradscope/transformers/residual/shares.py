"""How gradients pass through residual additions x + f(x): |S v|^2, |W v|^2 and 2 <S v, W v> for cotangents v.

With v_out the gradient at the sum, S v is v_out pulled back to x through the skip, and W v = J_f^T v_out through the
branch.  Together they arrive at x as v_x, so W v = v_x - S v if x has no other way to the target.  Elsewhere v_out is
pulled back through the branch once more.  Cost: one backward pass per cotangent, and once more the branches of the
latter additions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradscope.backward.cotangents import Cotangents
from gradscope.backward.pulling import PullBack
from gradscope.backward.route import Leaf, TrunkRoute
from gradscope.backward.sweep import Progress, sweep
from gradscope.estimates import FloatArray
from gradscope.forward.trunk import Vertex, output_kind, vertex
from gradscope.jacobians.capture import Capture
from gradscope.memory import Workspace
from gradscope.transformers.residual.additions import Addition

LEAST = 2.0**6  # root mean square of a gradient over the least number of its dtype; below, few digits are left


def passed(
    captured: Capture, additions: Sequence[Addition], cotangents: Cotangents, progress: Progress | None
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Of every addition: |S v|^2, |W v|^2 and 2 <S v, W v>, (samples, 3), and the variance of their sums, (3, 3).

    The numbers are sums over a basis (variance 0) or means over random probes (variance due to the probes; NaN if
    unknown).  The variance is that of the sum over samples.
    Raises FloatingPointError if gradients leave the range of their dtype.
    """
    reader = _Reader(additions, captured)
    route = TrunkRoute(captured.graph, reader.rows)

    def draw(first: int, last: int) -> Tensor:
        drawn = cotangents.draw(first, last)
        reader.start(drawn)
        return drawn

    # Without rescaling, because gradients at two rows are compared with each other.
    widest, started = max(row.bytes for row in reader.rows), replace(cotangents, draw=draw)
    readings = sweep(route, [started], reader.read, widest=widest, strides=(None,), progress=progress)
    for number, addition in enumerate(additions):
        row, place = reader.places[number]
        squares = readings[row].values.reshape(cotangents.num, len(reader.ends[row]), -1, 3)[:, place]
        arrived, leaf = squares.sum(axis=(1, 2)), reader.rows[row]
        least = LEAST * torch.finfo(leaf.dtype).smallest_normal * torch.finfo(leaf.dtype).eps
        if ((arrived > 0) & (arrived < leaf.size * least**2)).any():
            raise FloatingPointError(
                f"The gradient before {addition.name!r} is too small for {leaf.dtype}: measure in float32 or float64."
            )
        if not cotangents.num_probes:
            yield squares.sum(axis=0), np.zeros((3, 3))
            continue
        totals, num = squares.sum(axis=1), cotangents.num
        unknown = np.full((3, 3), np.nan)
        yield squares.mean(axis=0), np.cov(totals, rowvar=False) / num if num > 1 else unknown


class _Reader:
    """Reads |S v|^2, |W v|^2 and 2 <S v, W v> of every addition during a sweep whose rows are the sums and their x."""

    def __init__(self, additions: Sequence[Addition], captured: Capture) -> None:
        self.additions, self.batch_size = additions, captured.batch_size
        self.target = vertex(captured.target.edge)
        self.pull_back, self.rows = PullBack(), list[Leaf]()
        self.numbers: dict[Vertex, int] = {}
        self.tops, self.places = list[int](), list[tuple[int, int]]()
        self.closed = list[bool]()  # whether W v is read as the difference of two gradients
        self.ends = defaultdict[int, list[int]](list)  # the additions that are read at each row
        for number, addition in enumerate(additions):
            for key in (addition.sum.key, addition.way.at):
                if key not in self.numbers:
                    self.numbers[key] = len(self.rows)
                    shape, dtype = output_kind(key)
                    about = math.prod(shape), dtype or addition.sum.dtype, addition.sum.device
                    self.rows.append(Leaf(f"stream at {addition.name}", GradientEdge(*key), *about))
            top, bottom = self.numbers[addition.sum.key], self.numbers[addition.way.at]
            self.tops.append(top)
            # In half precision, a difference of two gradients has no digits left of a short branch.
            self.closed.append(addition.closed and self.rows[bottom].dtype.itemsize > 2)
            # A sweep reads no gradient at its target.
            row = bottom if self.closed[-1] or addition.sum.key == self.target else top
            self.places.append((row, len(self.ends[row])))
            self.ends[row].append(number)
        self.waiting: dict[int, Tensor] = {}  # gradients at sums whose x comes later in the sweep

    def start(self, cotangents: Tensor) -> None:
        """Keep the cotangents as the gradient at the target, in case it is a sum."""
        self.waiting = {self.numbers[self.target]: cotangents.clone()} if self.target in self.numbers else {}

    def read(self, rows: Sequence[int], gradients: Sequence[Tensor], workspace: Workspace, lead: int) -> list[Tensor]:
        """For each row, (c, additions that are read there, samples, 3)."""
        here = {row: g if lead else g[None] for row, g in zip(rows, gradients, strict=True)}
        arrived, found = self.waiting | here, []
        for row in rows:
            parts = [self._parts(n, arrived[self.tops[n]], here[row]) for n in self.ends[row]]
            found.append(torch.stack(parts, dim=1) if parts else torch.zeros(len(here[row]), 0, dtype=torch.float64))
        pairs = zip(self.tops, self.places, strict=True)
        waits = {top for top, (row, _) in pairs if top in arrived and row not in here}
        # A later step may overwrite the gradients that it starts from.
        self.waiting = {row: arrived[row].clone() if row in here else arrived[row] for row in waits}
        return found

    def _parts(self, number: int, out: Tensor, arrived: Tensor) -> Tensor:
        addition = self.additions[number]
        skip = out if addition.way.factor == 1 else addition.way.factor * out
        for top, bottom in addition.way.legs:
            (skip,) = self.pull_back(GradientEdge(*top), [GradientEdge(*bottom)], skip)
        s = self._flat(skip)
        if self.closed[number]:
            w = self._flat(arrived) - s
        else:
            alpha = addition.sum.factors[1 - addition.skip]
            x, write = GradientEdge(*addition.way.at), GradientEdge(*addition.write)
            w = self._flat(self.pull_back(write, [x], out if alpha == 1 else alpha * out)[0])
        return torch.stack([s.square().sum(2), w.square().sum(2), 2 * (s * w).sum(2)], dim=-1)

    def _flat(self, gradient: Tensor) -> Tensor:
        """(c, samples, entries) in float64."""
        gradient = gradient.cpu() if gradient.device.type == "mps" else gradient
        samples = self.batch_size if gradient.shape[1] == self.batch_size else 1
        return gradient.reshape(len(gradient), samples, -1).double()
