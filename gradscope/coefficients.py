"""Gradient Scale Coefficients of a network: ``gsc`` to one target, ``gsc_matrix`` between all pairs of layers."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.inputs import Forward, LossFunction
from gradscope.layers import Layer, LayerFilter, select, squared_lengths
from gradscope.probes import rademacher
from gradscope.profiles import Matrix, Profile
from gradscope.recorder import state_restored, unwrap
from gradscope.recording import Capture, capture
from gradscope.reductions import Gain, Length, reduce
from gradscope.sweep import BUNDLE_BYTES, PEAK_BYTES, Progress, Start, sweep
from gradscope.trunk import vertex

REDUCTIONS = ("batch", "mean", "geometric")

# "auto" is exact up to this many cotangents, and else draws so many probes a target.
EXACT_LIMIT = 128
AUTO_PROBES = {"profile": 32, "matrix": 8}


def gsc(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: int | str = "auto",
    reduction: str = "batch",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Gradient Scale Coefficient of every layer k to one target l, in the squared convention.

    GSC(k, l) = |J_k^l|_qm^2 |f_k|^2 / |f_l|^2: the squared relative change of f_l for a small random relative change of
    f_k, where |J|_qm = |J|_F / sqrt(number of columns).

    Arguments:
        model: Any module; measured in the mode it is in, and left exactly as it was.
        data: A tensor (B, ...); a mapping (``model(**batch)``); with ``loss_fn`` a pair (inputs, labels).
        forward: ``(model, batch) -> tensor``, for any other structure of the data or the output.
        layers: Rows of the profile: a glob or list of globs over layer names, or a callable.  Default: one row a unit
            of the trunk (`gradscope.units`).
        target: Name of the layer l.  Default: the output, or with ``loss_fn`` the per-sample losses.
        loss_fn: ``(output, labels) -> (B,)`` losses, one a sample.
        probes: ``"exact"`` (basis cotangents: d_l of them, B d_l where samples are coupled), a number of random
            cotangents, or ``"auto"``: exact up to 128 cotangents, else 32 probes.
        reduction: ``"batch"`` takes the batch as one long vector, |J|_F^2 / (B d_k) * |F_k|^2 / |F_l|^2, right also for
            coupled samples.  ``"mean"`` and ``"geometric"`` average the GSC of single samples, uncoupled ones only.
        generator: Source of the probes.  Default: a fixed seed, so that the same call gives the same number.
        progress: Called with the fraction done.

    Returns:
        A `Profile`, rows in execution order, the target (GSC = 1) last.  Probes give an unbiased |J|_F^2 and a standard
        error; with a single probe and independent samples that error is an upper bound, reached at rank one, and with a
        single probe and coupled samples it is unknown (null).

    Cost: one forward pass, two backward passes to detect coupling, one for each cotangent.

    Raises:
        ValueError, TypeError: Bad data, names or options; every message names the culprit and the way out.

    Reference: Philipp, Song and Carbonell (2018), "The exploding gradient problem demystified", arXiv:1712.05577.
    """
    captured = _captured(model, data, forward=forward, loss_fn=loss_fn, target=target)
    last = captured.target
    rows = [row for row in _rows(captured, layers) if row.index != last.index] + [last]
    with state_restored(unwrap(model)):  # checkpointed layers run again during the sweep
        fields = _measure(captured, rows, [last], probes, reduction, generator, progress, AUTO_PROBES["profile"])
    return Profile(**fields)


def gsc_matrix(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: int | str = "auto",
    reduction: str = "batch",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Matrix:
    """Gradient Scale Coefficient between every pair of trunk layers, in one backward sweep whose bundle grows.

    Arguments are those of `gsc`; ``target`` ends the trunk, and ``probes`` counts the cotangents of each target
    (``"auto"``: exact up to 128 cotangents in all, else 8 a target).  Rows must lie on the trunk.

    Returns:
        A `Matrix`, sources x targets, NaN below the diagonal, 1 on it.

    Cost: one forward pass and sum over targets of (cotangents x backward to the first layer).
    """
    captured = _captured(model, data, forward=forward, loss_fn=loss_fn, target=target)
    rows = _rows(captured, layers)
    if branch := [row.name for row in rows if not row.on_trunk]:
        raise ValueError(
            f"Layer {branch[0]!r} lies inside a branch, off the trunk, so no column of a matrix can start there; "
            f"use gsc(..., target={branch[0]!r}), or leave it out of layers=."
        )
    with state_restored(unwrap(model)):
        fields = _measure(captured, rows, rows, probes, reduction, generator, progress, AUTO_PROBES["matrix"])
    return Matrix(**fields)


def _captured(model: nn.Module, data: Any, **options: Any) -> Capture:
    if next(unwrap(model).parameters(), None) is None:
        raise ValueError(
            f"{type(model).__name__} has no parameters. Layers kept in a plain list are not registered: use "
            "nn.ModuleList. For a function without parameters there is gs.capture(model, x).jacobian(source, target)."
        )
    return capture(model, data, **options)


def _rows(captured: Capture, layers: LayerFilter | None) -> list[Layer]:
    """The chosen layers, or the units of the trunk; warns where there is none besides the target."""
    if layers is not None:
        return select(captured.layers, layers, captured.elsewhere)
    if len(captured.units) < 2:
        names = [layer.name for layer in captured.layers if layer.index != captured.target.index]
        warnings.warn(
            "No layer but the target lies on the trunk, through which every path from the inputs passes (several "
            f"floating-point inputs, or one that feeds every layer?). Recorded are {', '.join(names[:8])}: choose with "
            "layers=, or hold other inputs fixed with forward=lambda model, x: model(x, other).",
            stacklevel=3,
        )
    return list(captured.units)


def _measure(
    captured: Capture,
    rows: Sequence[Layer],
    targets: Sequence[Layer],
    probes: int | str,
    reduction: str,
    generator: torch.Generator | None,
    progress: Progress | None,
    auto_probes: int,
) -> dict[str, Any]:
    """The fields of a `Matrix`, by one sweep from all ``targets``, which are among the ``rows``, to all rows."""
    _check_reduction(captured, reduction, rows)
    columns = list(reversed(targets))
    exact, nums = _plan(captured, columns, probes, reduction, auto_probes)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    starts = [_start(captured, column, exact, num, generator) for column, num in zip(columns, nums, strict=True)]
    sources = [row for row in rows if row.index != columns[0].index]
    readings = sweep(captured.graph, sources, starts, batch_size=captured.batch_size, progress=progress)
    lengths = _lengths(rows, targets, reduction)
    place = {target.index: number for number, target in enumerate(targets)}
    log10, probe, sample = (np.full((len(rows), len(targets)), np.nan) for _ in range(3))
    counts = np.zeros((len(rows), len(targets)), dtype=np.int64)
    for row, layer in enumerate(rows):
        if layer.index in place:  # the Jacobian to itself is the identity
            own = row, place[layer.index]
            log10[own] = probe[own] = sample[own] = 0.0
    for row, (layer, reading) in enumerate(zip(sources, readings, strict=True)):
        first = 0
        for num, group in groupby(_above(captured, columns, nums, layer), key=lambda pair: pair[1]):
            members = [column for column, _ in group]
            last = first + num * len(members)
            gain = Gain.of(
                reading.squares[first:last].reshape(len(members), num, -1),
                reading.exponents[first:last].reshape(len(members), num),
                exact=exact,
                coupled=captured.coupled,
            )
            into = [place[member.index] for member in members]
            log10[row, into], probe[row, into], sample[row, into] = reduce(
                gain,
                lengths[layer.index],
                [lengths[member.index] for member in members],
                size=layer.size,
                reduction=reduction,
                batch_size=captured.batch_size,
            )
            counts[row, into] = 0 if exact else num
            first = last
    order = [unit.index for unit in captured.units]
    return {
        "sources": tuple(row.name for row in rows),
        "targets": tuple(target.name for target in targets),
        "indices": tuple(bisect_left(order, row.index) for row in rows),
        "log10_values": log10,
        "log10_stderr_probe": probe,
        "log10_stderr_sample": sample,
        "num_probes": counts,
        "num_samples": captured.batch_size,
        "reduction": reduction,
        "coupled": captured.coupled,
    }


def _lengths(rows: Sequence[Layer], targets: Sequence[Layer], reduction: str) -> dict[int, Length]:
    """Lengths of all rows by index; a target of length zero is an error, for it has no relative change."""
    squares, exponents = squared_lengths(rows)
    lengths = {row.index: Length(s, int(e)) for row, s, e in zip(rows, squares, exponents, strict=True)}
    for target in targets:
        zero = np.flatnonzero(lengths[target.index].squares == 0)
        if len(zero) == len(lengths[target.index].squares):
            raise ValueError(
                f"The output of layer {target.name!r} is zero for the whole batch: it has no relative change."
            )
        if reduction != "batch" and len(zero):
            raise ValueError(
                f"The output of layer {target.name!r} is zero for sample {zero[0]}, so that sample has no GSC: "
                'leave it out, or use reduction="batch".'
            )
    return lengths


def _above(captured: Capture, columns: Sequence[Layer], nums: Sequence[int], layer: Layer) -> list[tuple[Layer, int]]:
    """The columns, with their numbers of cotangents, that ``layer`` flows into: those strictly later."""
    own = captured.graph.order(layer.edge)
    return [(c, num) for c, num in zip(columns, nums, strict=True) if captured.graph.order(c.edge) > own]


def _plan(
    captured: Capture, columns: Sequence[Layer], probes: int | str, reduction: str, auto_probes: int
) -> tuple[bool, list[int]]:
    """Whether to be exact, and how many cotangents each target needs."""
    if isinstance(probes, bool) or not (probes in ("exact", "auto") or (isinstance(probes, int) and probes >= 1)):
        raise ValueError(f'probes must be a whole number >= 1, "exact" or "auto", got {probes!r}.')
    needed = []
    for column in columns:  # one basis serves all samples only where they are independent and come first
        shared = not captured.coupled and column.shape[:1] == (captured.batch_size,)
        needed.append(column.size // captured.batch_size if shared else column.size)
    if reduction == "geometric" and isinstance(probes, int):
        raise ValueError(
            'reduction="geometric" takes logarithms of single samples, which are biased low from few probes: '
            'use probes="exact", or reduction="mean".'
        )
    if probes == "exact" or (probes == "auto" and (sum(needed) <= EXACT_LIMIT or reduction == "geometric")):
        return True, needed
    return False, [probes if isinstance(probes, int) else auto_probes] * len(columns)


def _start(captured: Capture, column: Layer, exact: bool, num: int, generator: torch.Generator) -> Start:
    """Cotangents of one target: basis vectors (one basis for all samples where they are independent), or signs."""
    device = column.device

    def basis(first: int, last: int) -> Tensor:
        cotangents = torch.zeros(last - first, column.size // num, num, dtype=column.dtype, device=device)
        chosen = torch.arange(first, last, device=device)
        cotangents[chosen - first, :, chosen] = 1
        return cotangents.reshape(-1, *column.shape)

    def signs(first: int, last: int) -> Tensor:
        v = rademacher(last - first, column.size, generator=generator, dtype=column.dtype, device=device)
        return v.reshape(-1, *column.shape)

    widest = max(layer.size * layer.dtype.itemsize for layer in captured.layers)
    return Start(
        captured.graph.position[vertex(column.edge)],
        num,
        basis if exact else signs,
        max(column.size * column.dtype.itemsize, widest * BUNDLE_BYTES // PEAK_BYTES),
    )


def _check_reduction(captured: Capture, reduction: str, rows: Sequence[Layer]) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}.")
    if reduction == "batch":
        return
    if captured.coupled:
        raise ValueError(
            f"reduction={reduction!r} needs independent samples, but samples of this batch influence each other "
            '(batch statistics?), so the GSC of a single sample does not exist: use reduction="batch", or model.eval().'
        )
    for row in rows:
        if row.shape[:1] != (captured.batch_size,):
            raise ValueError(
                f"reduction={reduction!r} needs samples along the first dimension; layer {row.name!r} has shape "
                f'{row.shape} at batch size {captured.batch_size}: leave it out, or use reduction="batch".'
            )
