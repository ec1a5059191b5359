"""The pairs of layers of one recorded batch, and their statistics from backward sweeps."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt

from gradscope.backward.cotangents import Cotangents, needed_for_exact
from gradscope.backward.readings import Reading, lengths
from gradscope.backward.route import TrunkRoute
from gradscope.backward.sweep import Progress, sweep
from gradscope.coefficients.gains import Gain, Length
from gradscope.coefficients.reductions import Tally
from gradscope.forward.layers import Layer
from gradscope.forward.lengths import SquaredLength, check_length
from gradscope.forward.trunk import vertex
from gradscope.jacobians.capture import Capture
from gradscope.jacobians.description import off_trunk

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

REDUCTIONS = ("batch", "mean", "geometric")

# Readings (pairs x cotangents x samples) are collected until they have this many entries, and then reduced.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Pairs:
    """Statistics of all pairs (source, later target) over the batches so far; they can be merged in any grouping.

    ``sources``, ``targets``: names in execution order.  ``indices``: number of units of the network before each source.
    ``on_trunk``: whether each source is on the trunk.  ``shapes``: shape of one sample of each source.
    ``tallies``: (pair numbers, tally) for pairs counted sample by sample (key True) or batch by batch (False).  A pair
    number is source * number of targets + target.
    ``num_probes`` (sources, targets): 0 if exact.  ``num_batches``: number of merged batches.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    indices: tuple[int, ...]
    on_trunk: tuple[bool, ...]
    shapes: tuple[tuple[int, ...], ...]
    tallies: dict[bool, tuple[IntArray, Tally]]
    num_probes: IntArray
    num_samples: int
    num_batches: int
    coupled: bool
    reduction: str
    remarks: tuple[str, ...]

    def merge(self, other: Pairs) -> Pairs:
        """The statistics of both together; ValueError if layers, shapes or coupling differ."""
        if self.sources != other.sources or self.targets != other.targets:
            odd = sorted({*self.sources, *self.targets} ^ {*other.sources, *other.targets})
            raise ValueError(
                f"Batches do not pass through the same layers: {', '.join(map(repr, odd[:4]))} appear in only some "
                "batches (does routing depend on the data?). Choose layers= that all batches share."
            )
        for name, a, b in zip(self.sources, self.shapes, other.shapes, strict=True):
            if a != b:
                raise ValueError(
                    f"A sample of layer {name!r} has shape {a} in one batch and {b} in another, so these "
                    "batches cannot be combined: pad or crop samples to one shape, or measure such batches separately."
                )
        if self.coupled != other.coupled or self.tallies.keys() != other.tallies.keys():
            raise ValueError(
                "Samples influence each other in one batch but not in another: measure such batches separately. "
                "If only the last batch differs, because it has one sample, leave it out."
            )
        return replace(
            self,
            tallies={key: (pairs, tally.merge(other.tallies[key][1])) for key, (pairs, tally) in self.tallies.items()},
            num_probes=np.maximum(self.num_probes, other.num_probes),
            num_samples=self.num_samples + other.num_samples,
            num_batches=self.num_batches + other.num_batches,
            remarks=other.remarks,
        )

    def spread(self, name: str, diagonal: float = 0.0) -> FloatArray:
        """An attribute of the tallies as an array (sources, targets); NaN if the source comes after the target."""
        values = np.full((len(self.sources), len(self.targets)), np.nan)
        for pairs, tally in self.tallies.values():
            values.flat[pairs] = getattr(tally, name)
        for column, target in enumerate(self.targets):  # a layer's Jacobian with respect to itself is the identity
            values[self.sources.index(target), column] = diagonal
        return values


class Board:
    """The sources and targets of one recorded batch, whose pairs can be measured any number of times."""

    # With one column (target), one sweep takes at most this many cotangents, which limits the memory of the readings.
    window = 128

    def __init__(self, captured: Capture, rows: Sequence[Layer], targets: Sequence[Layer], reduction: str) -> None:
        check_reduction(captured, reduction, rows)
        self.captured, self.rows, self.reduction = captured, list(rows), reduction
        self.columns = list(reversed(targets))  # in the order in which they join the sweep
        self.sources = [row for row in rows if row.index != self.columns[0].index]
        size, coupled = captured.batch_size, captured.coupled
        self.needed = [needed_for_exact(column, size, coupled=coupled) for column in self.columns]
        for target in targets:
            captured.check_target(target, rows[0])
        captured.lengths.later.then(self._check_lengths)

    @cached_property
    def lengths(self) -> dict[int, SquaredLength]:
        """The lengths of all rows, by index.  Cost: one device synchronization, if they were not copied yet."""
        every = self.captured.lengths.all
        return {row.index: every[vertex(row.edge)] for row in self.rows}

    def _check_lengths(self) -> None:
        for target in reversed(self.columns):
            check_length(target, self.lengths[target.index].squares, self.reduction)

    def measure(self, cotangents: Sequence[Cotangents], progress: Progress | None = None) -> Pairs:
        """Measure with the given cotangents of each column (target), in the order of ``columns``."""
        tallies, captured = Tallies(self), self.captured
        last = max(c.num for c in cotangents)
        step = self.window if len(cotangents) == 1 else last
        for first in range(0, last, step):
            shown = progress and _within(progress, first / last, min(first + step, last) / last)
            self.collect([c.window(first, first + step) for c in cotangents], tallies, shown)
            tallies.reduce()
        number = {row.index: place for place, row in enumerate(self.rows)}
        num_probes = np.zeros((len(self.rows), len(self.columns)), dtype=np.int64)
        for place, (column, c) in enumerate(zip(reversed(self.columns), reversed(cotangents), strict=True)):
            num_probes[: number[column.index], place] = c.num_probes
        order, branch = [unit.index for unit in captured.units], [row.name for row in self.rows if not row.on_trunk]
        return Pairs(
            sources=tuple([row.name for row in self.rows]),
            targets=tuple([column.name for column in reversed(self.columns)]),
            indices=tuple([bisect_left(order, row.index) for row in self.rows]),
            on_trunk=tuple([row.on_trunk for row in self.rows]),
            shapes=tuple([row.shape[1:] for row in self.rows]),
            tallies=tallies.finish(),
            num_probes=num_probes,
            num_samples=captured.batch_size,
            num_batches=1,
            coupled=captured.coupled,
            reduction=self.reduction,
            remarks=(*captured.remarks, *([off_trunk(branch)] if branch else [])),
        )

    def swept(
        self, cotangents: Sequence[Cotangents], progress: Progress | None, axes: Sequence[int | None] = ()
    ) -> list[Reading]:
        """The readings of one sweep, one per source; ``axes`` as in `gradscope.backward.readings.lengths`."""
        captured = self.captured
        return sweep(
            TrunkRoute(captured.graph, self.sources),
            cotangents,
            lengths(0 if captured.coupled else captured.batch_size, axes),
            widest=max([layer.bytes for layer in captured.reached]),
            progress=progress,
        )

    def collect(self, cotangents: Sequence[Cotangents], tallies: Tallies, progress: Progress | None) -> None:
        """Sweep once, and add the readings to the tallies."""
        captured, readings = self.captured, self.swept(cotangents, progress)
        runs, order = self._runs(cotangents), captured.graph.order
        places = [-order[vertex(column.edge)] for column in self.columns]
        for layer, reading in zip(self.sources, readings, strict=True):
            # The number of columns that come strictly later in the network; ``columns`` begins with these.
            visible, first = bisect_left(places, -order[vertex(layer.edge)]), 0
            for start, stop, num, num_fixed in runs:
                stop = min(stop, visible)
                if start < stop:
                    last = first + num * (stop - start)
                    norms, exponents = reading.values[first:last], reading.exponents[first:last]
                    tallies.add(layer, start, stop, num_fixed, num, norms, exponents)
                    first = last

    def length_of(self, layers: Sequence[Layer], places: IntArray) -> Length:
        """Lengths of ``layers[place]`` for every place; all must have equally many lengths, 1 or B."""
        unique, inverse = np.unique(places, return_inverse=True)
        found = [self.lengths[layers[place].index] for place in unique]
        squares, exponents = np.array([one.squares for one in found]), np.array([one.exponent for one in found])
        return Length(squares[inverse], exponents[inverse])

    def _runs(self, cotangents: Sequence[Cotangents]) -> list[tuple[int, int, int, int]]:
        """Groups of neighboring columns that are computed together: (first, last + 1, num, num_fixed) of each."""
        kinds = [
            (c.num, c.num_fixed, column.shape[:1] == (self.captured.batch_size,))
            for column, c in zip(self.columns, cotangents, strict=True)
        ]
        runs: list[tuple[int, int, int, int]] = []
        for (num, num_fixed, _), members in groupby(kinds):
            first = runs[-1][1] if runs else 0
            runs.append((first, first + len(list(members)), num, num_fixed))
        return runs


class Tallies:
    """Collects the lengths of gradients that sweeps read, and reduces them to statistics block by block."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.place = {row.index: place for place, row in enumerate(board.rows)}
        self.pending: dict[tuple[int, ...], list[tuple[int, int, int, FloatArray, IntArray]]] = defaultdict(list)
        self.gains: dict[tuple[int, ...], tuple[IntArray, IntArray, Gain]] = {}
        self.done: dict[bool, list[tuple[IntArray, Tally]]] = defaultdict(list)

    def add(
        self, layer: Layer, start: int, stop: int, num_fixed: int, num: int, norms: FloatArray, exponents: IntArray
    ) -> None:
        """Add readings (cotangents, samples) at one source, of a group of columns: ``start`` to ``stop`` - 1."""
        p, q = self.board.lengths[layer.index].squares, self.board.lengths[self.board.columns[start].index].squares
        key = (p.size, q.size, norms.shape[1], num, num_fixed)
        shape = (stop - start, num)
        entry = (self.place[layer.index], start, stop, norms.reshape(*shape, -1), exponents.reshape(shape))
        self.pending[key].append(entry)
        if self.board.columns[1:] and sum(entry[3].size for entry in self.pending[key]) > _BLOCK:
            self.reduce()
            self._finish_gains()

    def reduce(self) -> None:
        """Turn pending readings into gains, or merge them with the gains of earlier windows of the same pairs."""
        for (*widths, _, num_fixed), entries in self.pending.items():
            rows = np.repeat([entry[0] for entry in entries], [stop - start for _, start, stop, *_ in entries])
            columns = np.concatenate([np.arange(start, stop) for _, start, stop, *_ in entries])
            norms, exponents = (np.concatenate([entry[number] for entry in entries]) for number in (3, 4))
            gain = Gain.of(norms, exponents, num_fixed=num_fixed, coupled=self.board.captured.coupled)
            key = (*widths, int(rows[0]), int(columns[0]))
            known = self.gains.get(key)
            self.gains[key] = (rows, columns, gain if known is None else known[2].merge(gain))
        self.pending.clear()

    def _finish_gains(self) -> None:
        board, captured = self.board, self.board.captured
        sizes, num_columns = np.array([layer.size for layer in board.rows]), len(board.columns)
        for (*widths, _, _), (rows, columns, gain) in self.gains.items():
            source, target = board.length_of(board.rows, rows), board.length_of(board.columns, columns)
            tally = Tally.of(
                gain, source, target, sizes=sizes[rows], reduction=board.reduction, batch_size=captured.batch_size
            )
            by_sample = not captured.coupled and min(widths) == captured.batch_size
            self.done[by_sample].append((rows * num_columns + num_columns - 1 - columns, tally))
        self.gains.clear()

    def finish(self) -> dict[bool, tuple[IntArray, Tally]]:
        """(pair numbers, tally) of the pairs counted sample by sample (key True) and batch by batch (False)."""
        self._finish_gains()
        finished = {}
        for by_sample, parts in self.done.items():
            pairs = np.concatenate([pairs for pairs, _ in parts])
            order = np.argsort(pairs)
            tally = parts[0][1] if len(parts) == 1 else Tally.concatenate([tally for _, tally in parts])
            finished[by_sample] = (pairs[order], tally.take(order))
        return finished


def _within(progress: Progress, first: float, last: float) -> Progress:
    """A progress function for one part of a measurement, from fraction ``first`` to ``last`` of the whole."""
    return lambda fraction: progress(first + fraction * (last - first))


def check_reduction(captured: Capture, reduction: str, rows: Sequence[Layer]) -> None:
    """Raise ValueError if the reduction is unknown or not defined for these layers."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}.")
    if reduction == "batch":
        return
    if captured.coupled:
        raise ValueError(
            f"reduction={reduction!r} needs independent samples, but samples of this batch influence each other "
            '(batch statistics?), so a single sample has no GSC: use reduction="batch", or model.eval().'
        )
    for row in rows:
        if row.shape[:1] != (captured.batch_size,):
            raise ValueError(
                f"reduction={reduction!r} needs samples along the first dimension; layer {row.name!r} has shape "
                f'{row.shape} at batch size {captured.batch_size}: leave this layer out, or use reduction="batch".'
            )
