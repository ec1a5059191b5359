"""How many cotangents a measurement takes: exact if that is less expensive, otherwise as many as a pilot suggests.

Costs are counted in backward passes: one per cotangent, and one more per direction of the subspace, which takes a
forward pass to find.  A pilot decides the plan and its numbers are then thrown away, because a value whose probes also
decided when to stop would be biased.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from gradscope.backward.cotangents import AUTO_COST, AUTO_EXACT, Cotangents, basis, deflated, signs
from gradscope.backward.subspace import Deflated, find_subspaces
from gradscope.backward.sweep import Progress
from gradscope.coefficients.pairs import Board, Pairs
from gradscope.coefficients.streaming import Budget, probe_error
from gradscope.forward.layers import Layer
from gradscope.jacobians.capture import Capture

# Without rtol=, "auto" asks for this relative error.
AUTO_RTOL = 0.05

# A batch of a stream gets few probes: more samples say more.
STREAM_PLAN = Deflated(4, 4)

# The pilot.  The rank is doubled up to a maximum while the subspace holds this share of the noisiest value; otherwise
# the spectrum is flat, and more directions would hold little more.
PILOT = Deflated(4, 6)
MAX_RANK = 32
WORTHWHILE_SHARE = 0.5

# A pilot's estimate of the noise is itself noisy.
SAFETY = 1.3


class Planner:
    """Measures recorded batches with as many cotangents as were asked for; all batches of a stream follow one plan."""

    def __init__(
        self, probes: Deflated | str, budget: Budget, generator: torch.Generator, *, reduction: str, streaming: bool
    ) -> None:
        self.probes: Deflated | str = "exact" if reduction == "geometric" else probes
        self.budget, self.generator, self.streaming = budget, generator, streaming

    def measure(self, board: Board, progress: Progress | None) -> Pairs:
        """Measure one batch; a single batch is measured again until ``rtol`` is reached or the time is over."""
        if self.probes == "auto":
            self.probes = self._for_stream(board) if self.streaming else self._chosen(board, self.budget.rtol)
        if self.streaming or self.budget.rtol is None:
            return board.measure(self._cotangents(board, self.probes), progress)
        return self._reach(board, self.probes, self.budget.rtol, progress)

    def _for_stream(self, board: Board) -> Deflated | str:
        """Few probes per batch, or the exact Jacobian if that costs no more."""
        return "exact" if sum(board.needed) <= STREAM_PLAN.cost * len(board.needed) else STREAM_PLAN

    def _chosen(self, board: Board, rtol: float | None) -> Deflated | str:
        """The least expensive plan that pilots expect to reach ``rtol``; None asks for a default at a bounded cost.

        The share of a value that the pilot's few directions hold tells its effective rank.
        """
        total = sum(board.needed)
        if rtol is None and total <= AUTO_EXACT:
            return "exact"
        best, rank = None, PILOT.rank
        while True:
            plan, share = self._reaching(board, rtol or AUTO_RTOL, rank)
            if best is not None and plan.cost >= best.cost:
                break
            best = plan
            # A subspace of twice the rank pays only if it saves more probes than it costs.
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

    def _reach(self, board: Board, plan: Deflated | str, rtol: float, progress: Progress | None) -> Pairs:
        """Measure by this plan, and again by a larger one until ``rtol`` is reached or the time is over.

        Results that fell short are thrown away, because a value that decided when to stop would be biased.
        """
        began, seconds = time.monotonic(), self.budget.max_seconds or math.inf
        while True:
            pairs = board.measure(self._cotangents(board, plan), progress)
            error = probe_error(pairs)
            if error <= rtol or not isinstance(plan, Deflated) or time.monotonic() - began >= seconds:
                return pairs
            # One probe of a coupled batch knows no error; a few know enough to go on.
            factor = SAFETY * (error / rtol) ** 2 if math.isfinite(error) else 4
            larger = replace(plan, num=math.ceil(factor * plan.num))
            plan = "exact" if larger.cost * len(board.needed) >= sum(board.needed) else larger

    def _reaching(self, board: Board, rtol: float, rank: int) -> tuple[Deflated, float]:
        """Number of probes beside ``rank`` directions for ``rtol``, and the share of the noisiest value these hold."""
        pilot = board.measure(self._cotangents(board, Deflated(rank, PILOT.num)))
        errors = np.nan_to_num(pilot.spread("log10_stderr_probe"))
        worst = np.unravel_index(errors.argmax(), errors.shape)
        num = math.ceil(SAFETY * PILOT.num * (errors[worst] * math.log(10) / rtol) ** 2)
        return Deflated(rank, max(2, num)), float(pilot.spread("fixed_share", 1.0)[worst])

    def _cotangents(self, board: Board, plan: Deflated | str) -> list[Cotangents]:
        """Cotangents of every column; a target for which exact is cheaper than a subspace with probes is exact."""
        if not isinstance(plan, Deflated):
            return [basis(column, needed) for column, needed in zip(board.columns, board.needed, strict=True)]
        found: list[Cotangents] = []
        exact = [plan.rank > 0 and needed <= plan.rank + plan.num for needed in board.needed]
        wanted = [column for column, is_exact in zip(board.columns, exact, strict=True) if not is_exact]
        subspaces = self._subspaces(board.captured, wanted, plan.rank) if plan.rank and wanted else {}
        for column, needed, is_exact in zip(board.columns, board.needed, exact, strict=True):
            if is_exact:
                found.append(basis(column, needed))
            elif (subspace := subspaces.get(column.index)) is not None:
                coupled = board.captured.coupled
                found.append(deflated(column, subspace, plan.num, self.generator, coupled=coupled))
            else:
                found.append(signs(column, plan.rank + plan.num, self.generator))
        return found

    def _subspaces(self, captured: Capture, columns: Sequence[Layer], rank: int) -> dict[int, torch.Tensor]:
        names = {name: column for column in columns for name in column.names}
        shapes = {name: column.shape for name, column in names.items()}
        found = find_subspaces(captured.replay, shapes, rank, coupled=captured.coupled, generator=self.generator)
        return {names[name].index: subspace for name, subspace in found.items()}
