"""Gradient Scale Coefficients: ``gsc`` of every layer to one target, ``gsc_matrix`` between all pairs of layers.

    GSC(k, l) = |J_k^l|_F^2 / (B d_k) * |f_k|^2 / |f_l|^2

Cost: one forward pass, and one backward pass per cotangent.  |J|_F^2 is exact with a basis, and unbiased with probes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn

from gradscope.backward.cotangents import Probes
from gradscope.backward.sweep import Progress
from gradscope.choices import Level, Positive, Size, checked, stacklevel
from gradscope.coefficients.pairs import Board, Pairs
from gradscope.coefficients.planning import Options, Planner, accumulate, has_length, largest_error
from gradscope.coefficients.profiles import Matrix, Profile
from gradscope.forward.inputs import Forward, LossFunction, stream
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import Layer, LayerFilter
from gradscope.forward.state import alone
from gradscope.forward.wrappers.sharding import of_whole
from gradscope.jacobians.capture import Capture, captured_unread
from gradscope.memory import together


@of_whole
@checked
def gsc(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: Probes = "auto",
    rtol: Level | None = None,
    max_samples: Size | None = None,
    max_seconds: Positive | None = None,
    reduction: str = "batch",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    positions: str | None = None,
    position_dim: int = 1,
) -> Profile:
    """Gradient Scale Coefficient (GSC) of every layer k with respect to one target layer l, in the squared convention.

    GSC(k, l) = |J_k^l|_qm^2 |f_k|^2 / |f_l|^2.  f_k and f_l are the values of the layers, of sizes d_k and d_l for one
    sample.  J_k^l is the Jacobian of f_l with respect to f_k, and |J|_qm = |J|_F / sqrt(number of columns).  Let f_k
    undergo a small random change.  GSC is the mean squared relative change of f_l divided by the squared relative
    change of f_k.  This is the squared convention: some authors call the root of this number GSC.

    Arguments:
        model: Any module; it is measured in its current mode (training or evaluation) and is not changed.
        data: One batch of B samples: a tensor (B, ...); a mapping, for ``model(**batch)``; or with ``loss_fn`` a pair
            (inputs, labels).  Or a stream of such batches (a DataLoader, a list, an iterator); the result is then for
            the whole data set.  Without ``loss_fn``, labels in a stream are ignored.  A list of two tensors is read as
            one batch [inputs, labels], as loaders yield it; if the tensors are two batches, give ``iter(data)``.
            Under ``torch.distributed`` all ranks must call `gsc`.  A stream gives one result for the data of all ranks;
            one batch gives one result per rank.
        forward: A function ``(model, batch) -> tensor``.  It is needed if the data or the output of the model have a
            structure that gradscope does not know.
        layers: Rows of the profile: a pattern such as "blocks.*" (* also stands for dots), a list of patterns, or a
            function `Layer` -> bool.  Default: one row per unit, such as a block (`gradscope.forward.units.units`).
        target: Name of the layer l.  Default: the output, or with ``loss_fn`` the per-sample losses.
        loss_fn: ``(output, labels) -> (B,)``, one loss per sample.
        probes: The cotangents (vectors in the space of the target) that backward passes pull back:
            ``"exact"``: a basis of d_l cotangents, or of B d_l if samples are coupled (batch normalization).
            A number n: n random cotangents, called probes.  `Deflated`: some directions exactly, the rest with probes.
            ``"auto"``: exact if a basis has at most 128 cotangents, or costs less than deflated probes with an error of
            5 % would, as a short trial shows.  Otherwise deflated probes, in 40 to 70 passes at most.
            In a stream: exact if a basis has at most 12 cotangents, otherwise ``Deflated(4, 4)`` for each batch.
        rtol: Requested relative standard error of every value; ``relative_error`` of the result is the error reached.
            One batch: the error due to probes.  ``probes`` must be "auto", and ``rtol`` decides how many probes are
            used (or a basis, if that costs less).  Stream: the error due to probes and samples; the stream ends when
            the error is at most ``rtol``.  A warning says if ``rtol`` was not reached.
        max_samples, max_seconds: A stream ends after the batch that reaches one of these limits.  Without a limit or
            ``rtol``, a stream of unknown length, such as a generator, ends after 2000 batches.  For one batch with
            ``rtol``, probes are added until ``rtol`` or ``max_seconds`` is reached.
        reduction: ``"batch"`` treats the values of the batch as one long vector F, so that GSC is
            |J|_F^2 / (B d_k) * |F_k|^2 / |F_l|^2; samples may be coupled.  ``"mean"`` and ``"geometric"`` are the
            arithmetic and the geometric mean of the GSC of single samples, which must not be coupled.
        generator: Source of the probes.  Default: a fixed seed, so that the same call gives the same numbers.
        progress: A function that is called with the fraction of the current batch that is done.
        positions: Also split GSC by the position (token, time step) in the source layer k (``"source"``), in the target
            layer l (``"target"``), or in ``"both"``.  The result is then a `Positions`.
        position_dim: The dimension of positions in layers (B, ..., T, ...); negative numbers count from the end.

    Returns:
        A `Profile` with rows in execution order; the target (GSC = 1) is last.  With random probes, the estimate of
        |J|_F^2 is unbiased and has a standard error.  With a single probe, the standard error is an upper bound if
        samples are independent, and unknown (null) if they are coupled.

    Cost: one forward pass, and one backward pass per cotangent.  `Deflated` needs rank + 1 more forward passes.  If the
    autograd graph does not prove that samples are independent, this is tested with a few more cotangents (11 for
    B = 256).  Memory: see `gradscope.backward.sweep.sweep`.

    Raises:
        ValueError, TypeError: Invalid data, names or options, or an option without effect; the message says which.

    Reference: Philipp, Song and Carbonell (2018), "The exploding gradient problem demystified", arXiv:1712.05577.

    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=3, width=8, activation="linear", generator=torch.Generator().manual_seed(0))
    >>> profile = gs.gsc(model, torch.ones(4, 8))
    >>> profile.layers
    ('input', 'layers.0', 'layers.1', 'layers.2')
    >>> profile["layers.2"].value
    1.0
    """
    options = Options(
        forward=forward, layers=layers, target=target, loss_fn=loss_fn, probes=probes, rtol=rtol, reduction=reduction,
        max_samples=max_samples, max_seconds=max_seconds, generator=generator, progress=progress,
    )  # fmt: skip
    if positions is not None:  # imported on first use, because it lies above this folder
        by_position = importlib.import_module("gradscope.transformers.positions")
        found: Profile = by_position.measured_by_position(model, data, options, positions, position_dim)
        return found
    if position_dim != 1:
        raise ValueError(f"position_dim={position_dim} has no effect without positions=: leave it out, or give both.")

    def board(captured: Capture) -> Board:
        rows = rows_of(captured, options.layers, options.target)
        return Board(captured, rows, rows[-1:], options.reduction)

    return Profile(**measured(model, data, options, board)[1])


@of_whole
@checked
def gsc_matrix(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: Probes = "auto",
    rtol: Level | None = None,
    max_samples: Size | None = None,
    max_seconds: Positive | None = None,
    reduction: str = "batch",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Matrix:
    """Gradient Scale Coefficient (GSC) of every pair of layers, from one backward sweep for all targets.

    Arguments are those of `gsc` except ``positions``, with these differences.  ``target`` names the last of the
    targets.  ``probes`` holds for each target alone, but the limit of 128 cotangents in ``"auto"`` is for their sum
    over all targets.  Every path from the input to ``target`` must pass through each of the layers.

    Returns:
        A `Matrix` with GSC from each source (row) to each target (column), 1 on the diagonal, and NaN below it.

    Cost: one forward pass, and for every cotangent one backward pass from its target to the first layer.

    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=3, width=8, generator=torch.Generator().manual_seed(0))
    >>> matrix = gs.gsc_matrix(model, torch.ones(4, 8))
    >>> matrix.log10_values.shape
    (4, 4)
    """
    options = Options(
        forward=forward, layers=layers, target=target, loss_fn=loss_fn, probes=probes, rtol=rtol, reduction=reduction,
        max_samples=max_samples, max_seconds=max_seconds, generator=generator, progress=progress,
    )  # fmt: skip

    def board(captured: Capture) -> Board:
        rows = rows_of(captured, options.layers, options.target, matrix=True)
        return Board(captured, rows, rows, options.reduction)

    return Matrix(**measured(model, data, options, board)[1])


def measured(
    model: nn.Module,
    data: Any,
    options: Options,
    board: Callable[[Capture], Board],
    planner: type[Planner] = Planner,
) -> tuple[Pairs, dict[str, Any]]:
    """Measure all batches, each with its own `Board`; return statistics of all pairs, and the fields of a `Matrix`."""
    batches = stream(data, forward=options.forward, loss_fn=options.loss_fn)
    streaming = batches is not None
    if not streaming:
        options.check_single()
    plan = planner(options, streaming=streaming)

    def measure(batch: Any) -> Pairs:
        captured = captured_unread(
            model,
            batch,
            forward=options.forward,
            layers=options.layers,
            loss_fn=options.loss_fn,
            target=options.target,
        )
        with (
            alone,
            captured.replay.guard() as state,
            state,
        ):  # checkpointed layers run again during the sweep
            return plan.measure(board(captured))

    with interruptible() as whole, whole, together():
        if batches is None:
            pairs, stopped = measure(data), "end of data"
        else:
            pairs, stopped = accumulate(batches, measure, options, ends=has_length(data))
    error = largest_error(pairs, samples=streaming)
    if options.rtol is not None and not streaming:
        stopped = "rtol reached" if error <= options.rtol else "max_seconds"
    if options.rtol is not None and error > options.rtol and stopped != "interrupted":
        warnings.warn(
            f"rtol of {options.rtol:g} was not reached; the reason is {stopped!r}. The largest relative standard error "
            f"is {error:.2g} after {pairs.num_samples} samples.",
            stacklevel=stacklevel(),
        )
    return pairs, {
        "sources": pairs.sources,
        "targets": pairs.targets,
        "indices": pairs.indices,
        "on_trunk": pairs.on_trunk,
        "log10_values": pairs.spread("log10_values"),
        "log10_stderr_probe": pairs.spread("log10_stderr_probe"),
        "log10_stderr_sample": pairs.spread("log10_stderr_sample"),
        "num_probes": pairs.num_probes,
        "num_samples": pairs.num_samples,
        "reduction": pairs.reduction,
        "coupled": pairs.coupled,
        "stopped": stopped,
        "num_batches": pairs.num_batches,
        "streamed": streaming,
        "_log10_stderr_cautious": pairs.spread("log10_stderr_cautious"),
        "_fixed_share": pairs.spread("fixed_share", 1.0),
        "_probe_freedom": pairs.spread("probe_freedom", np.inf),
        "_sample_freedom": pairs.spread("sample_freedom", np.inf),
        "relative_error": error,
        "remarks": pairs.remarks,
    }


def rows_of(captured: Capture, layers: LayerFilter | None, target: str | None, *, matrix: bool = False) -> list[Layer]:
    """The layers that are rows of the result; the last row of a profile is the target."""
    if all(p is None for module in captured.replay.modules.values() for p in module._parameters.values()):
        raise ValueError(
            f"{type(captured.replay.model).__name__} has no parameters. Layers kept in a plain list are not "
            "registered: use nn.ModuleList. For a function without parameters use gs.capture(model, x).jacobian(...)."
        )
    if layers is not None:
        rows = list(captured.layers)
    else:
        rows = list(captured.units)
        _check_rows(captured, target)
    if not matrix:
        return [row for row in rows if row.index != captured.target.index] + [captured.target]
    if branch := [row.name for row in rows if not row.on_trunk]:
        raise ValueError(
            f"Layer {branch[0]!r} lies inside a branch, off the trunk, so it cannot be a target of a matrix: "
            f"use gsc(..., target={branch[0]!r}), or leave this layer out of layers=."
        )
    return rows


# Whether a default profile that leaves out the layers before several inputs meet is an error: in `gradscope.testing`.
whole: ContextVar[bool] = ContextVar("whole", default=False)


def _check_rows(captured: Capture, target: str | None) -> None:
    """Warn if fewer than three units lie on the trunk, although the network has other layers or uncalled modules."""
    if whole.get() and len(captured.sources) > 1:
        raise ValueError(
            f"The assertion would leave out all layers before {captured.units[0].name!r}, where the paths from "
            f"{len(captured.sources)} inputs meet. Hold all inputs but one fixed: forward=lambda model, x: "
            "model(x, other). Or choose layers with layers=."
        )
    known = {layer.index for layer in captured.units}
    others = [layer.name for layer in captured.reached if layer.index not in known]
    if target is None and len(known) < 3 and (others or captured.uncalled):
        offer = (
            f"Other layers, for layers=: {', '.join(others[:8])}."
            if others
            else "No other module was called, so layers= offers nothing else."
        )
        warnings.warn(
            f"Only {len(known)} layers lie on the trunk. If the model adds tensors in its own forward, mark each sum: "
            'x = gs.tap(x + f(x), "sum"). If it has several floating-point inputs, or one that feeds every layer, hold '
            f"the others fixed: forward=lambda model, x: model(x, other). {offer}",
            stacklevel=stacklevel(),
        )
