"""How many cotangents a measurement needs: exact where that is cheaper, else as many as a pilot suggests.

The cost of a plan is counted in backward passes: one a cotangent, and one more for each direction of the subspace,
which takes a forward pass to find.  The numbers of a pilot decide the plan and are then thrown away: a value whose
probes also decided when to stop would be biased.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gradscope.backward.cotangents import Cotangents, basis, deflated, needed_for_exact, signs
from gradscope.backward.subspace import Deflated, find_subspaces
from gradscope.backward.sweep import Progress
from gradscope.coefficients.pairs import Board, Pairs
from gradscope.coefficients.streaming import probe_error
from gradscope.forward.layers import Layer
from gradscope.forward.replay import Rerun

Probes = int | str | Deflated

# Without rtol=, "auto" is exact up to so many cotangents in all; it asks for this relative error, at this cost at most.
EXACT_LIMIT = 128
AUTO_RTOL = 0.05
AUTO_COST = 40

# A batch of a stream gets few probes: more samples say more.
STREAM_PLAN = Deflated(4, 4)

# The pilot, and how far the rank may be doubled: only while the subspace holds this share of the noisiest value, for
# else the spectrum is flat, and more directions would hold little more.
PILOT = Deflated(4, 6)
MAX_RANK = 32
WORTHWHILE_SHARE = 0.5

# A pilot's estimate of the noise is itself noisy.
SAFETY = 1.3


@dataclass(frozen=True)
class Plan:
    """Exact, plain signs (rank 0), or deflated."""

    exact: bool
    rank: int = 0
    num: int = 0

    @property
    def cost(self) -> int:
        """In backward passes a target."""
        return 2 * self.rank + self.num


EXACT = Plan(True)


class Planner:
    """Chooses the cotangents of one recorded batch."""

    def __init__(self, board: Board, rerun: Rerun, generator: torch.Generator) -> None:
        self.board, self.rerun, self.generator = board, rerun, generator
        captured = board.captured
        self.needed = [
            needed_for_exact(column, captured.batch_size, coupled=captured.coupled) for column in board.columns
        ]

    def asked(self, probes: Probes, reduction: str) -> Plan | None:
        """The plan that ``probes`` says; None where it leaves the choice."""
        if probes == "exact" or reduction == "geometric":
            return EXACT
        if isinstance(probes, Deflated):
            return Plan(False, probes.rank, probes.num)
        return Plan(False, 0, probes) if isinstance(probes, int) else None

    def for_stream(self) -> Plan:
        """Few probes a batch, or the exact Jacobian where that costs no more."""
        plan = Plan(False, STREAM_PLAN.rank, STREAM_PLAN.num)
        return EXACT if sum(self.needed) <= plan.cost * len(self.needed) else plan

    def chosen(self, rtol: float | None) -> Plan:
        """The cheapest plan that pilots expect to reach ``rtol``; None asks for a default at a bounded cost.

        The share of a value that the pilot's few directions hold tells its effective rank.
        """
        total = sum(self.needed)
        if rtol is None and total <= EXACT_LIMIT:
            return EXACT
        best, rank = None, PILOT.rank
        while True:
            plan, share = self._reaching(rtol or AUTO_RTOL, rank)
            if best is not None and plan.cost >= best.cost:
                break
            best = plan
            # A subspace of twice the rank pays only if it saves more probes than it costs.
            if 2 * rank > MAX_RANK or plan.num <= 2 * rank or share < WORTHWHILE_SHARE:
                break
            rank *= 2
        if share < WORTHWHILE_SHARE:
            best = min(best, self._reaching(rtol or AUTO_RTOL, 0)[0], key=lambda plan: plan.cost)
        if best.cost * len(self.needed) >= total:
            return EXACT
        if rtol is None and best.cost > AUTO_COST:
            return replace(best, num=max(PILOT.num, AUTO_COST - 2 * best.rank))
        return best

    def reach(self, plan: Plan, rtol: float, seconds: float, progress: Progress | None) -> Pairs:
        """Measure by this plan, and again by a larger one until ``rtol`` is reached, or so many seconds have passed.

        What fell short is thrown away, for a value that decided when to stop would be biased.
        """
        began = time.monotonic()
        while True:
            pairs = self.board.measure(self.cotangents(plan), progress)
            error = probe_error(pairs)
            if error <= rtol or plan.exact or time.monotonic() - began >= seconds:
                return pairs
            # One probe of a coupled batch knows no error; a few know enough to go on.
            factor = SAFETY * (error / rtol) ** 2 if math.isfinite(error) else 4
            plan = replace(plan, num=math.ceil(factor * plan.num))
            if plan.cost * len(self.needed) >= sum(self.needed):
                plan = EXACT

    def _reaching(self, rtol: float, rank: int) -> tuple[Plan, float]:
        """Number of probes beside ``rank`` directions for ``rtol``, and the share of the noisiest value these hold."""
        pilot = self.board.measure(self.cotangents(Plan(False, rank, PILOT.num)))
        errors = np.nan_to_num(pilot.spread("log10_stderr_probe"))
        worst = np.unravel_index(errors.argmax(), errors.shape)
        num = math.ceil(SAFETY * PILOT.num * (errors[worst] * math.log(10) / rtol) ** 2)
        return Plan(False, rank, max(2, num)), float(pilot.spread("fixed_share", 1.0)[worst])

    def cotangents(self, plan: Plan) -> list[Cotangents]:
        """Cotangents of every column; a target for which exact is cheaper than a subspace with probes is exact."""
        columns, coupled = self.board.columns, self.board.captured.coupled
        exact = [plan.exact or (plan.rank > 0 and needed <= plan.rank + plan.num) for needed in self.needed]
        wanted = [column for column, is_exact in zip(columns, exact, strict=True) if not is_exact]
        subspaces = self._subspaces(wanted, plan.rank) if plan.rank and wanted else {}
        chosen = []
        for column, needed, is_exact in zip(columns, self.needed, exact, strict=True):
            if is_exact:
                chosen.append(basis(column, needed))
            elif (subspace := subspaces.get(column.index)) is not None:
                chosen.append(deflated(column, subspace, plan.num, self.generator, coupled=coupled))
            else:
                chosen.append(signs(column, plan.rank + plan.num, self.generator))
        return chosen

    def _subspaces(self, columns: Sequence[Layer], rank: int) -> dict[int, torch.Tensor]:
        names = {name: column for column in columns for name in column.names}
        found = find_subspaces(
            self.rerun,
            {name: column.shape for name, column in names.items()},
            rank,
            coupled=self.board.captured.coupled,
            generator=self.generator,
        )
        return {names[name].index: subspace for name, subspace in found.items()}
