"""How many cotangents a batch needs, and how many batches are measured.

A batch is measured exactly if that is less expensive, otherwise with as many probes as a pilot suggests.  Costs are
counted in backward passes: one per cotangent, and one more per direction of the subspace.  The result does not use the
values of the pilot: the number of probes depends on them, so they would bias the result.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from gradscope.backward.cotangents import (
    AUTO_COST,
    AUTO_EXACT,
    Cotangents,
    Deflated,
    Probes,
    basis,
    deflated,
    generator_or_default,
    resolved,
    signs,
    signs_for_each,
)
from gradscope.backward.subspace import find_subspaces
from gradscope.backward.sweep import Progress
from gradscope.choices import stacklevel
from gradscope.coefficients.pairs import Board, Pairs
from gradscope.distributed import gathered
from gradscope.forward.inputs import Forward, LossFunction
from gradscope.forward.layers import LayerFilter

# Without rtol=, "auto" asks for this relative error.
AUTO_RTOL = 0.05

# A batch of a stream gets few probes, because measuring more samples reduces the error more than further probes.
STREAM_PLAN = Deflated(4, 4)

# The pilot, and the maximum of its rank.  The rank is doubled while the subspace contains at least this share of the
# value with the largest error.  A smaller share means a flat spectrum: more directions would help little.
PILOT = Deflated(4, 6)
MAX_RANK = 32
WORTHWHILE_SHARE = 0.5

# Factor for the number of probes, because a pilot's estimate of the noise is itself noisy.
SAFETY = 1.3

# Reaching rtol ends a stream only after at least this many batches and this many samples.
MIN_BATCHES, MIN_SAMPLES = 3, 30

# A stream whose length is unknown ends after this many batches, unless an option says when it ends.
MOST_BATCHES = 2000


@dataclass(frozen=True)
class Options:
    """The options of `gradscope.gsc`; invalid ones raise ValueError."""

    forward: Forward | None
    layers: LayerFilter | None
    target: str | None
    loss_fn: LossFunction | None
    probes: Probes
    rtol: float | None
    max_samples: int | None
    max_seconds: float | None
    reduction: str
    generator: torch.Generator | None
    progress: Progress | None

    def __post_init__(self) -> None:
        plan = resolved(self.probes, deflated=True)
        if self.reduction == "geometric" and isinstance(plan, Deflated):
            raise ValueError(
                'reduction="geometric" takes logarithms of single samples, which are biased low with few probes: '
                'use probes="exact" or reduction="mean".'
            )

    def check_single(self) -> None:
        """Raise ValueError if an option would be ignored because data is a single batch."""
        if self.rtol is not None and self.probes != "auto":
            raise ValueError(
                f"probes={self.probes!r} and rtol={self.rtol:g} contradict each other for a single batch, because rtol "
                'decides the number of probes: leave one of them out, or use probes="auto".'
            )
        if self.max_samples is not None:
            raise ValueError("max_samples ends a stream of batches, but data is a single batch: leave max_samples out.")
        if self.max_seconds is not None and self.rtol is None:
            raise ValueError(
                "max_seconds has an effect only if data is a stream of batches, or with rtol. Here data is a single "
                "batch, and rtol is not given: leave max_seconds out, or give rtol."
            )


class Planner:
    """Measures batches with as many cotangents as the options ask for; all batches of a stream use the same plan."""

    def __init__(self, options: Options, *, streaming: bool) -> None:
        plan = resolved(options.probes, deflated=True)
        self.probes: Deflated | str = "exact" if options.reduction == "geometric" else plan
        self.options, self.streaming = options, streaming
        self.generator = generator_or_default(options.generator)

    def measure(self, board: Board) -> Pairs:
        """Measure one batch; a single batch is measured again until ``rtol`` or ``max_seconds`` is reached."""
        rtol, progress = self.options.rtol, self.options.progress
        if self.probes == "auto" and self.streaming:  # few probes, or the exact Jacobian if that costs no more
            exact = sum(board.needed) <= STREAM_PLAN.cost * len(board.needed)
            self.probes = "exact" if exact else STREAM_PLAN
        elif self.probes == "auto":
            self.probes = self._chosen(board, rtol)
        began, seconds, plan = time.monotonic(), self.options.max_seconds or math.inf, self.probes
        while True:
            pairs = board.measure(self._cotangents(board, plan), progress)
            if self.streaming or rtol is None or not isinstance(plan, Deflated):
                return pairs
            error = largest_error(pairs)
            if error <= rtol or time.monotonic() - began >= seconds:
                return pairs
            # With one probe of a coupled batch the error is unknown; with four probes it can be estimated.
            factor = SAFETY * (error / rtol) ** 2 if math.isfinite(error) else 4
            larger = replace(plan, num=math.ceil(factor * plan.num))
            plan = "exact" if larger.cost * len(board.needed) >= sum(board.needed) else larger

    def _chosen(self, board: Board, rtol: float | None) -> Deflated | str:
        """The least expensive plan for ``rtol`` (None: the default error, at a limited cost), according to pilots."""
        total = sum(board.needed)
        if rtol is None and total <= AUTO_EXACT:
            return "exact"
        best, rank = None, PILOT.rank
        while True:
            plan, share = self._reaching(board, rtol or AUTO_RTOL, rank)
            if best is not None and plan.cost >= best.cost:
                break
            best = plan
            # Doubling the rank costs 2 * rank backward passes, so it must be able to save more probes than that.
            if 2 * rank > MAX_RANK or plan.num <= 2 * rank or share < WORTHWHILE_SHARE:
                break
            rank *= 2
        if share < WORTHWHILE_SHARE:
            best = min(best, self._reaching(board, rtol or AUTO_RTOL, 0)[0], key=lambda plan: plan.cost)
        if best.cost * len(board.needed) >= total:
            return "exact"
        if rtol is None and best.cost > AUTO_COST:
            return replace(best, num=max(PILOT.num, AUTO_COST - 2 * best.rank))
        return best

    def _reaching(self, board: Board, rtol: float, rank: int) -> tuple[Deflated, float]:
        """Plan for ``rtol`` with ``rank`` directions, and their share of the value that has the largest error."""
        pilot = board.measure(self._cotangents(board, Deflated(rank, PILOT.num)))
        errors = np.nan_to_num(pilot.spread("log10_stderr_probe"))
        worst = np.unravel_index(errors.argmax(), errors.shape)
        num = math.ceil(SAFETY * PILOT.num * (errors[worst] * math.log(10) / rtol) ** 2)
        return Deflated(rank, max(2, num)), float(pilot.spread("fixed_share", 1.0)[worst])

    def _cotangents(self, board: Board, plan: Deflated | str) -> list[Cotangents]:
        """Cotangents of every column (target): a basis if it is not larger than a subspace with its probes."""
        pairs, captured = list(zip(board.columns, board.needed, strict=True)), board.captured
        if not isinstance(plan, Deflated):
            return [basis(column, needed) for column, needed in pairs]
        found: list[Cotangents] = []
        if not plan.rank:
            return signs_for_each(board.columns, plan.num, self.generator)
        num, subspaces = plan.rank + plan.num, dict[int, torch.Tensor]()
        if names := {name: c for c, needed in pairs if needed > num for name in c.names}:
            shapes = {name: column.shape for name, column in names.items()}
            by_name = find_subspaces(
                captured.replay, shapes, plan.rank, coupled=captured.coupled, generator=self.generator
            )
            subspaces = {names[name].index: subspace for name, subspace in by_name.items()}
        for column, needed in pairs:
            if needed <= num:
                found.append(basis(column, needed))
            elif (subspace := subspaces.get(column.index)) is not None:
                found.append(deflated(column, subspace, plan.num, self.generator, coupled=captured.coupled))
            else:
                found.append(signs(column, num, self.generator))
        return found


def largest_error(pairs: Pairs, *, samples: bool = False) -> float:
    """The largest relative standard error of all pairs due to probes (and ``samples``, if True); inf if unknown."""
    errors = pairs.spread("log10_stderr_probe")
    if samples:
        errors = np.hypot(errors, pairs.spread("log10_stderr_sample"))
    measured = ~np.isnan(pairs.spread("log10_values"))
    return float(np.nan_to_num(errors[measured], nan=math.inf).max(initial=0.0)) * math.log(10)


def accumulate(
    batches: Iterable[Any], measure: Callable[[Any], Pairs], options: Options, ends: bool
) -> tuple[Pairs, str]:
    """Measure and merge batches, over all ranks of ``torch.distributed``; returns the result and why the stream ended.

    The reason is "end of data", "rtol reached", "max_samples", "max_seconds", "interrupted" or "2000 batches".  The
    last one, with a warning, is for streams that no option ends and whose length is unknown (not ``ends``).  After an
    interrupt (Ctrl-C), the batches measured so far are returned, with a warning.  ValueError if there is no batch.
    """
    found: Pairs | None = None
    began, reason = time.monotonic(), "end of data"
    ends = ends or (options.rtol, options.max_samples, options.max_seconds) != (None, None, None)
    try:
        for batch in batches:
            measured = measure(batch)
            found = measured if found is None else found.merge(measured)
            if stop := _stop(found, options, time.monotonic() - began):
                reason = stop
                break
            if found.num_batches >= MOST_BATCHES and not ends:
                reason = f"{MOST_BATCHES} batches"
                warnings.warn(
                    f"data has no length, so it was measured up to {reason}, and the rest was left out: give "
                    "max_samples=, max_seconds= or rtol= to say when to stop.",
                    stacklevel=stacklevel(),
                )
                break
    except KeyboardInterrupt:
        if found is None:
            raise
        reason = "interrupted"
        warnings.warn(
            f"Interrupted: the result holds the {found.num_batches} batches measured so far and is marked incomplete.",
            stacklevel=stacklevel(),
        )
    parts = gathered((found, reason))  # in the order of the ranks, so that each rank gets the same bits
    measured_parts = [part for part, _ in parts if part is not None]
    if not measured_parts:
        raise ValueError("data yields no batch. Is the iterator exhausted, or the loader empty?")
    return reduce(lambda a, b: a.merge(b), measured_parts), ", ".join(sorted({why for _, why in parts}))


def has_length(data: Any) -> bool:
    """Whether the number of batches of a stream is known."""
    try:
        return len(data) >= 0
    except TypeError:  # also a loader of an `IterableDataset`
        return False


def _stop(found: Pairs, options: Options, seconds: float) -> str:
    enough = found.num_batches >= MIN_BATCHES and found.num_samples >= MIN_SAMPLES
    if options.rtol is not None and enough and largest_error(found, samples=True) <= options.rtol:
        return "rtol reached"
    if options.max_samples is not None and found.num_samples >= options.max_samples:
        return "max_samples"
    return "max_seconds" if options.max_seconds is not None and seconds >= options.max_seconds else ""
