"""Blocks |J_ts|_F^2 of one batch, for target position t and source position s, from a sweep that keeps positions.

Source positions are read from the same cotangents as those of plain GSC.  Target positions need cotangents that are
zero at all other positions: T cotangents, one per position, take the place of one cotangent of plain GSC.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from gradscope.backward.cotangents import AUTO_EXACT, Cotangents, Deflated, at_places, by_position, combs, signs
from gradscope.backward.readings import Reading
from gradscope.backward.sweep import Progress
from gradscope.choices import listed
from gradscope.coefficients.gains import Gain
from gradscope.coefficients.pairs import Board, Pairs, Tallies
from gradscope.coefficients.planning import Options, Planner
from gradscope.coefficients.reductions import Tally
from gradscope.forward.layers import Layer
from gradscope.jacobians.capture import Capture
from gradscope.transformers.rotation import Rotated, num_rotated, rotation

# "auto" takes this many random cotangents per target position: the fewest whose error can be estimated.
AUTO_PER_POSITION = 2
ROTATED = "rotated"  # a plan of "auto"

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockPairs(Pairs):
    """Statistics of all layers, and of the blocks of those that have positions; they can be merged.

    ``blocked``: names of these layers.  ``shape``: numbers of target and source positions, 1 if they are not split.
    ``blocks``: tallies of the blocks, ordered by target position and source position: one of all layers together, or
    one per layer if target positions were rotated over the samples of a single batch.
    """

    blocked: tuple[str, ...]
    shape: tuple[int, int]
    blocks: tuple[Tally | Rotated, ...]

    def of_blocks(self, name: str) -> FloatArray:
        """An attribute of the tallies as an array (layers, target positions, source positions)."""
        return np.concatenate([getattr(tally, name) for tally in self.blocks]).reshape(-1, *self.shape)

    def merge(self, other: Pairs) -> BlockPairs:
        """The statistics of both together; ValueError as in `Pairs.merge`."""
        merged = super().merge(other)
        assert isinstance(merged, BlockPairs) and isinstance(other, BlockPairs)
        (own,), (others,) = self.blocks, other.blocks
        assert isinstance(own, Tally) and isinstance(others, Tally)
        return replace(merged, blocks=(own.merge(others),))


class BlockBoard(Board):
    """A board with one target that also collects blocks by position: ``by`` "source", "target" or "both"."""

    def __init__(self, captured: Capture, rows: Sequence[Layer], options: Options, by: str, position_dim: int) -> None:
        super().__init__(captured, rows, rows[-1:], options.reduction)
        axes, num = position_axes(rows, position_dim, captured.batch_size)
        self.axis = axes[-1]
        self.num_targets, self.num_sources = 1 if by == "source" else num, 1 if by == "target" else num
        if by != "source" and self.axis is None:
            raise ValueError(
                f"The target {rows[-1].name!r} of shape {rows[-1].shape} has no axis of {num} positions at "
                f'position_dim={position_dim}: use positions="source", or target= with a layer that has positions.'
            )
        self.remarks: tuple[str, ...] = tuple(_meanings(rows, axes, position_dim))
        if by == "target":  # sources need only samples
            axes = [axis if row is rows[-1] else None for row, axis in zip(rows, axes, strict=True)]
            without = [row.name for row in self.sources if row.shape[:1] != (captured.batch_size,)]
        else:
            without = [row.name for row, axis in zip(self.sources, axes, strict=False) if axis is None]
        reason = f"without {num} positions at position_dim={position_dim}: {listed(without)}"
        if without and options.layers is not None:
            raise ValueError(f"layers= holds layers {reason}. Leave them out, or choose another position_dim=.")
        if without:
            self.remarks += (f"Blocks leave out layers {reason}.",)
        self.axes = axes[:-1]
        self.blocked = {row.name: row for row in self.sources if row.name not in without}
        if not self.blocked:
            raise ValueError(f"No layer before the target {rows[-1].name!r} has {num} positions: choose position_dim=.")
        # A window holds whole passes, each with one cotangent per target position.
        self.window = max(1, self.window // self.num_targets) * self.num_targets
        self.needed = [needed // self.num_targets for needed in self.needed]
        self.gains: dict[str, Gain] = {}
        self.places: IntArray | None = None  # target position of every sample in every cotangent, if they are rotated
        self.rotated: dict[str, list[Reading]] = {}

    def measure(self, cotangents: Sequence[Cotangents], progress: Progress | None = None) -> BlockPairs:
        """Measure with the given cotangents: passes of one per target position, or rotated ones."""
        self.gains.clear()
        self.rotated = {name: [] for name in self.blocked}
        pairs, num_probes, remarks = super().measure(cotangents, progress), self.num_targets, self.remarks
        blocks: tuple[Tally | Rotated, ...] = ()
        if self.places is None:
            blocks = (Tally.concatenate([self._tally(row) for row in self.blocked.values()]),)
        else:
            blocks, num_probes = tuple(self._rotated(row) for row in self.blocked.values()), 1
            num = self.places.size // self.num_targets
            remarks += (f"Each target position was probed in {num} of {self.captured.batch_size} samples.",)
        return BlockPairs(
            **vars(pairs) | {"num_probes": pairs.num_probes // num_probes, "remarks": (*pairs.remarks, *remarks)},
            blocked=(*self.blocked, *[self.rows[-1].name] * (self.axis is not None)),
            shape=(self.num_targets, self.num_sources),
            blocks=blocks,
        )

    def collect(self, cotangents: Sequence[Cotangents], tallies: Tallies, progress: Progress | None) -> None:
        """Sweep once; add the sums over all blocks to the tallies, and the blocks to the gains."""
        (c,) = cotangents
        # Of rotated cotangents, each probes one position of every sample: T times the result is unbiased for their sum.
        targets, factor = (self.num_targets, 1.0) if self.places is None else (1, math.sqrt(self.num_targets))
        num, num_fixed = c.num // targets, c.num_fixed // targets
        readings = self.swept(cotangents, progress, self.axes)
        for layer, axis, reading in zip(self.sources, self.axes, readings, strict=True):
            sources = self.num_sources if axis is not None else 1
            values = reading.values.reshape(num, targets, -1, sources)
            exponents = reading.exponents.reshape(num, targets)
            common = exponents.max(axis=1)
            squares = np.square(np.ldexp(values, (exponents - common[:, None])[:, :, None, None]))
            tallies.add(layer, 0, 1, num_fixed, num, factor * np.sqrt(squares.sum(axis=(1, 3))), common)
            if layer.name not in self.blocked:
                continue
            if self.places is not None:
                self.rotated[layer.name].append(Reading(values[:, 0], reading.exponents))
                continue
            norms = values.transpose(1, 3, 0, 2).reshape(-1, num, values.shape[2])
            each = np.repeat(exponents.T, sources, axis=0)
            gain = Gain.of(norms, each, num_fixed=num_fixed, coupled=self.captured.coupled)
            known = self.gains.get(layer.name)
            self.gains[layer.name] = gain if known is None else known.merge(gain)

    def _tally(self, row: Layer) -> Tally:
        gain = self.gains[row.name]
        num, batch_size = len(gain.exponent), self.captured.batch_size
        source, target = (self.length_of([one], np.zeros(num, dtype=np.int64)) for one in (row, self.rows[-1]))
        sizes = np.full(num, row.size)
        return Tally.of(gain, source, target, sizes=sizes, reduction=self.reduction, batch_size=batch_size)

    def _rotated(self, row: Layer) -> Rotated:
        assert self.places is not None
        parts = self.rotated[row.name]
        values, exponents = (np.concatenate([getattr(one, name) for one in parts]) for name in ("values", "exponents"))
        source, target = (self.length_of([one], np.zeros(1, dtype=np.int64)) for one in (row, self.rows[-1]))
        return Rotated.of(values, exponents, self.places, source, target, size=row.size, reduction=self.reduction)


class PerTarget(Planner):
    """Plans cotangents that are nonzero at one target position only; ``probes`` counts them per position."""

    def __init__(self, options: Options, *, streaming: bool) -> None:
        super().__init__(options, streaming=streaming)
        if isinstance(self.probes, Deflated) and self.probes.rank:
            raise ValueError(
                f"probes={self.probes} spans directions over all positions, which cannot be split by target position: "
                'give a number of random cotangents per position, "exact" or "auto".'
            )

    def _chosen(self, board: Board, rtol: float | None) -> Deflated | str:
        assert isinstance(board, BlockBoard)
        (needed,) = board.needed
        if needed * board.num_targets <= AUTO_EXACT or needed <= AUTO_PER_POSITION:
            return "exact"
        rotates = rtol is None and not board.captured.coupled
        if rotates and num_rotated(board.num_targets, board.captured.batch_size) < board.num_targets:
            return ROTATED
        return Deflated(0, AUTO_PER_POSITION)

    def _cotangents(self, board: Board, plan: Deflated | str) -> list[Cotangents]:
        assert isinstance(board, BlockBoard) and board.axis is not None
        (target,), (needed,) = board.columns, board.needed
        if isinstance(plan, Deflated):
            return [by_position(signs(target, plan.num, self.generator), board.axis)]
        if plan == ROTATED:
            num = num_rotated(board.num_targets, board.captured.batch_size)
            board.places = rotation(num, board.num_targets, board.captured.batch_size, self.generator)
            return [at_places(signs(target, num, self.generator), board.axis, torch.from_numpy(board.places))]
        return [by_position(combs(target, board.axis, needed), board.axis)]


def _meanings(rows: Sequence[Layer], axes: Sequence[int | None], position_dim: int) -> Iterator[str]:
    """Remarks about layers whose positions are hardly those of a sequence."""
    last = [row.name for row, axis in zip(rows, axes, strict=True) if axis == len(row.shape) - 1]
    if last:
        yield f"Each position is one feature in {listed(last)}: position_dim={position_dim} is the last dimension."
    if channels := [row.name for row, axis in zip(rows, axes, strict=True) if axis == 1 and len(row.shape) == 4]:
        yield (
            f"If {listed(channels)} hold images (B, C, H, W), each position is one channel: position_dim=2 splits "
            "rows, and position_dim=3 splits columns."
        )


def position_axes(rows: Sequence[Layer], position_dim: int, batch_size: int) -> tuple[list[int | None], int]:
    """The dimension of positions of every row, None where it has none, and the number of positions.

    This number is the most common size of the dimension among the rows.  ValueError if no row has this dimension.
    """
    found: list[int | None] = []
    for row in rows:
        axis = position_dim if position_dim >= 0 else len(row.shape) + position_dim
        found.append(axis if row.shape[:1] == (batch_size,) and 0 < axis < len(row.shape) else None)
    sizes = [row.shape[axis] for row, axis in zip(rows, found, strict=True) if axis is not None]
    if not sizes:
        shapes = listed(dict.fromkeys(str(row.shape) for row in rows))
        why = "is the dimension of samples" if position_dim == 0 else "does not exist beside the samples in any layer"
        raise ValueError(
            f"position_dim={position_dim} {why}; shapes of layers: {shapes}. Choose another position_dim=."
        )
    ((num, _),) = Counter(sizes).most_common(1)
    return [axis if axis and row.shape[axis] == num else None for row, axis in zip(rows, found, strict=True)], num
