"""``repair(model, data)``: one factor per unit, with which local GSC and lengths reach given goals.

Units are solved in execution order.  Each is solved by one-dimensional root finding (see ``solving.py``), with the
units before it already scaled, and with the same probes for all factors.  Cost: see `repair`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradscope.backward.sweep import Progress
from gradscope.choices import Nonnegative, Positive, checked, shown
from gradscope.choices import listed as quoted
from gradscope.coefficients.growth import MARGIN
from gradscope.coefficients.reductions import FEWEST
from gradscope.comparing.repair.local import Local, Probing, rms
from gradscope.comparing.repair.result import Repair
from gradscope.comparing.repair.scaling import rescaled
from gradscope.comparing.repair.solving import Measured, Solution, solve
from gradscope.comparing.repair.stages import Stage, find_stages
from gradscope.distributed import agreed
from gradscope.forward.inputs import Forward, stream
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import Layer, LayerFilter
from gradscope.forward.lengths import ZeroOutputError
from gradscope.forward.modules import listed
from gradscope.forward.recorder import NonFiniteLayerError
from gradscope.forward.wrappers.sharding import of_whole, stored
from gradscope.jacobians.capture import Capture, captured_unread
from gradscope.memory import together

INPUT = "input"
Wish = float | Mapping[str, float]


@of_whole
@checked
def repair(
    model: nn.Module,
    data: Any,
    *,
    goal: Positive | Mapping[str, Positive] = 1.0,
    length: Positive | str | None = INPUT,
    margin: Nonnegative = MARGIN,
    fresh: Any = None,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    probes: int | str = "auto",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Repair:
    """Return a factor for each unit's weights, chosen for two goals: first local GSC, second the output's length.

    A unit is a part of the network, such as a layer or a residual block.  Its local GSC is that of its input f_k with
    respect to its output f_(k+1): |J|_qm^2 |f_k|^2 / |f_(k+1)|^2, with the norm |J|_qm of `gradscope.qm_norm`.

    The factor of a unit multiplies the weights of the last linear map or normalization in the unit.  In a unit with
    residual additions x + f(x), the last linear map or normalization of every branch f is scaled instead; skips are
    not scaled.  The bias of a linear map is not scaled; that of a normalization is.  A unit without such weights is
    treated as a part of the unit before it.

    One factor cannot set both local GSC and length, so local GSC comes first.  If a factor between 1/1024 and 1024
    brings local GSC to its goal, this factor is chosen.  Otherwise, let d be the smallest relative distance of
    local GSC from its goal that any factor achieves.  All factors with a distance of at most d + ``margin`` / 2
    qualify.  Of these factors, the one that brings the output's length nearest to its goal is chosen.  For example, no
    factor changes local GSC in a ReLU network without biases.  Then all factors qualify, and the length alone decides.
    With the default ``length``, weights then have nearly the variance of He initialization, 2 / fan_in.

    Arguments:
        model: Any module, in its current mode.  It is unchanged until ``apply()`` of the result is called.
        data: One batch, as for `gradscope.gsc`, for which the factors are computed.
        goal: Goal for the local GSC of every unit; or {unit: goal}, where all other units have the goal 1.
        length: Goal for the root mean square of every unit's output: a number, or None for no goal.  Or "input" for the
            root mean square of the first of the ``layers``, usually the input or the embedding of tokens.
        margin: Largest relative deviation of local GSC at which its goal counts as reached; 2 % by default.
        fresh: Other data, on which local GSC is measured before and after the repair: one batch, or a loader or list of
            batches.  At least ten samples are needed, or ten batches if samples influence each other.
        forward, generator: As for `gradscope.gsc`.
        layers: Layers between which local GSC is measured.  Every path from input to output must pass through each of
            them.  Default: the units.
        probes: For each unit: ``"exact"``, a number of random probes, or ``"auto"``: exact if that takes at most 128
            cotangents, otherwise 40 random probes.
        progress: Called with the fraction of the units that is done.

    Returns:
        A `Repair`: ``print`` it, then call ``apply()``, and perhaps ``undo()``.  It holds 95 % intervals of local GSC
        after the repair, which are simultaneous for all units.  With ``fresh``, they are for the population from which
        ``fresh`` was drawn.  Without ``fresh``, they are for ``data`` alone, and measured with new probes.

        Several processes that hold one model (shards, or replicas of DDP) must all call `repair` with the same data.
        They all get the factors of the first process.

    Cost: 4 to 30 measurements per unit.  Each runs the whole forward pass, and the backward passes through this unit.

    Raises:
        ValueError: No unit has weights to scale, an argument is invalid, or ``fresh`` is too small for 95 % intervals.

    References: He et al. (2015), arXiv:1502.01852; Mishkin and Matas (2016), arXiv:1511.06422, whose method (LSUV) sets
    the lengths of outputs, one layer after the other.

    >>> import torch, gradscope as gs
    >>> model = gs.models.MLP(depth=3, width=64, weight_variance=0.5, generator=torch.Generator().manual_seed(0))
    >>> x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    >>> plan = gs.repair(model, x)  # a factor of 2 makes the variance 0.5 / fan_in that of He, 2 / fan_in
    >>> [round(factor) for factor in plan.factors.values()]
    [2, 2, 2]
    >>> plan.apply()
    >>> plan.undo()
    """
    if isinstance(length, str) and length != INPUT:
        raise ValueError(f'length must be a positive number, "input" or None, got {shown(length)}.')
    if stream(data, forward=forward, loss_fn=None) is not None:
        raise ValueError("data must be one batch, for which the factors are solved: give further batches as fresh=.")
    seed = int(torch.randint(1 << 31, (2,), generator=generator or torch.Generator().manual_seed(0))[0])
    with interruptible() as whole, whole, together():
        captured = captured_unread(model, data, forward=forward, layers=layers)
        rows = _rows(captured, layers)
        stages = find_stages(captured, rows)
        if not stages:
            raise ValueError("No unit has a trainable parameter that scales its output, so there is nothing to repair.")
        goals = _goals(goal, stages)
        wished = rms(captured, rows[0]) if length == INPUT else None if length is None else math.log(float(length))
        solving = Probing(forward, probes, seed, captured.coupled)
        proving = Probing(forward, probes, seed + 1, captured.coupled)
        batches = [data] if fresh is None else _batches(fresh, forward)
        frozen = [name for name, p in captured.replay.model.named_parameters() if not p.requires_grad]
        del captured
        eager = listed(model)[""]
        parameters = dict(eager.named_parameters())
        groups = _groups(model)

        def proved() -> Local:
            return proving.stages(model, batches, stages, streamed=fresh is not None)

        before = _with_intervals(proved())
        with rescaled({name: parameters[name] for stage in stages for name in stage.parameters}) as scale, scale:
            solutions = []
            for number, stage in enumerate(stages):

                def measure(t: float, stage: Stage = stage) -> Measured:
                    scale.set(stage.parameters, math.exp(t))
                    try:
                        return solving.point(model, data, stage)
                    except (ZeroOutputError, NonFiniteLayerError):
                        if t == 0:
                            raise
                        return math.nan, math.nan

                solution = Solution(0.0, stage.reason, 0)
                if not stage.reason:
                    solution = solve(measure, math.log(goals[number]), wished, math.log1p(margin) / 2)
                    solution = agreed(solution, groups)
                    scale.set(stage.parameters, math.exp(solution.log_factor))
                solutions.append(solution)
                if progress is not None:
                    progress((number + 1) / len(stages))
            after = proved()
    return Repair(
        model=eager, stages=tuple(stages), solutions=tuple(solutions), goals=tuple(goals),
        wished_rms=None if wished is None else math.exp(wished), margin=margin, before=before, after=after,
        fresh=fresh is not None, frozen=tuple(frozen),
    )  # fmt: skip


def _rows(captured: Capture, layers: LayerFilter | None) -> list[Layer]:
    """The rows between which local GSC is measured."""
    rows = list(captured.units if layers is None else captured.layers)
    if branch := [row.name for row in rows if not row.on_trunk]:
        raise ValueError(f"Layer {branch[0]!r} lies inside a branch, off the trunk: leave it out of layers=.")
    return rows


def _goals(goal: Wish, stages: Sequence[Stage]) -> list[float]:
    """The goal of each stage."""
    if not isinstance(goal, Mapping):
        return [float(goal)] * len(stages)
    known = [stage.layer for stage in stages]
    if unknown := [name for name in goal if name not in known]:
        raise ValueError(f"goal names {unknown[0]!r}, which is no unit with a scale; these are {quoted(known)}.")
    return [float(goal.get(name, 1.0)) for name in known]


def _groups(model: nn.Module) -> list[Any]:
    """Groups of processes that hold this model, as shards or as replicas, so that all must scale it alike."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return [model.process_group]
    shards = [stored(p) for p in model.parameters() if stored(p) is not p]
    meshes = dict.fromkeys(shard.device_mesh for shard in shards)  # type: ignore[attr-defined]
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def _batches(fresh: Any, forward: Forward | None) -> list[Any]:
    """All batches of fresh data; they are measured twice."""
    batches = stream(fresh, forward=forward, loss_fn=None)
    return [fresh] if batches is None else list(batches)


def _with_intervals(local: Local) -> Local:
    """The same; ValueError if the data are too few for an interval."""
    if local.streamed and np.isnan(local.interval()[0]).any():
        unit = "batches as a loader or list, because samples influence each other" if local.coupled else "samples"
        raise ValueError(f"fresh is too small for intervals: give at least {FEWEST} {unit}.")
    return local
