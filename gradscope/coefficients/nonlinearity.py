"""``nlc(model, x)``: how far a network is from its own linearization over the spread of its data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.backward.cotangents import Cotangents, basis, needed_for_exact, signs
from gradscope.backward.pulling import PullBack, pulling
from gradscope.backward.sweep import rescale
from gradscope.estimates import Estimate
from gradscope.forward.inputs import Forward, LossFunction, stream
from gradscope.forward.layers import lookup
from gradscope.forward.modules import state_restored, unwrap
from gradscope.forward.trunk import vertex
from gradscope.jacobians.capture import Capture, capture
from gradscope.memory import peak_bytes
from gradscope.norms import power_of_two

# Exact up to so many cotangents, else so many random ones.
AUTO = 16
# Cut vertices between two rescalings.
STRIDE = 8

FloatArray = npt.NDArray[np.float64]


def nlc(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: int | str = "auto",
    generator: torch.Generator | None = None,
) -> Estimate:
    """Nonlinearity coefficient of the target as a function of the input, over a data set.

    NLC = sqrt(E_x Tr(J(x) Cov_x J(x)^T) / Tr Cov_f), J the Jacobian of one sample at x, Cov_x and Cov_f the covariances
    (with 1/N) of inputs and targets over the data.  1 for an affine map, and about 1 where the network is nearly linear
    over the spread of its data; invariant to affine maps of input and output.  This is the root; its square is the
    other convention.  GSC does not see what it sees: a deep ReLU network keeps its GSC at 1 while NLC grows.

    Arguments:
        model, data, forward, target, loss_fn: As for `gradscope.gsc`; the batches of a stream are kept in memory.
        probes: ``"exact"``, a number of random cotangents a batch, or ``"auto"``: exact up to 16 cotangents, else 16.
        generator: Source of the probes.  Default: a fixed seed.

    Returns:
        An `Estimate`.  Its error is that of sampling the data and of the probes together, to first order (inputs enter
        through J, Cov_x and Cov_f), because both make samples differ; ``num_probes`` is 0 where exact.  Where samples
        are coupled (batch normalization), J is that of the whole batch, inputs vary independently, and the error counts
        samples as if they were not.

    Cost: three forward passes, one backward pass a cotangent, and N^2 d operations a cotangent.  Memory: the data, and
    one N x N matrix.

    Raises:
        ValueError: Fewer than two samples, a target that is constant over the data, or ``probes`` is none of these.

    Reference: Philipp and Carbonell (2018), "The nonlinearity coefficient", arXiv:1806.00179.
    """
    model = unwrap(model)
    if (
        probes != "exact"
        and probes != "auto"
        and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 1)
    ):
        raise ValueError(f'probes must be a whole number >= 1, "exact" or "auto", got {probes!r}.')
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    streamed = stream(data, forward=forward, loss_fn=loss_fn)
    batches = [data] if streamed is None else list(streamed)

    def captured(batch: Any) -> Capture:
        return capture(model, batch, forward=forward, loss_fn=loss_fn, target=target)

    inputs, targets = zip(*(_values(captured(batch)) for batch in batches), strict=True)
    x, f = torch.cat(inputs), torch.cat(targets)
    if len(x) < 2:
        raise ValueError("NLC compares the spread of inputs and targets, so it needs at least two samples.")
    x, f = x - x.mean(dim=0), f - f.mean(dim=0)
    spread = f.square().sum(dim=1).cpu().numpy()
    if not spread.any():
        raise ValueError("The target is the same for all samples, so NLC is not defined.")
    rows, num_probes = [], 0
    for batch in batches:
        capture_ = captured(batch)
        cotangents = _cotangents(capture_, probes, generator)
        num_probes = max(num_probes, cotangents.num_probes)
        rows.append(_stretched(capture_, cotangents, x))
    common = max(exponent for _, exponent in rows)
    moved = np.concatenate([m * 2.0 ** (2 * (e - common)) for m, e in rows])  # (N, N): sample b, direction x_c
    numerator, denominator = float(moved.mean()), float(spread.mean())
    ratio = numerator / denominator
    # Every sample enters as a point of the network, as a direction of the input, and in the spread of the target.
    influence = (moved.mean(axis=1) + moved.mean(axis=0) - 2 * numerator - ratio * (spread - denominator)) / denominator
    error = float(influence.std(ddof=1)) / math.sqrt(len(influence))
    return Estimate(ratio, error, 2 * common, num_probes).sqrt()


def _values(captured: Capture) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, d) in float64; all sources side by side."""
    names = captured.source_names
    found = captured.rerun.outputs({*names, captured.target.name}, {})
    for name in (*names, captured.target.name):
        if name not in found or found[name].shape[:1] != (captured.batch_size,):
            raise ValueError(f"NLC needs samples along the leading dimension of {name!r}.")
    parts = [found[name].double().reshape(captured.batch_size, -1) for name in names]
    return torch.cat(parts, dim=1), found[captured.target.name].double().reshape(captured.batch_size, -1)


def _cotangents(captured: Capture, probes: int | str, generator: torch.Generator) -> Cotangents:
    needed = needed_for_exact(captured.target, captured.batch_size, coupled=captured.coupled)
    if probes == "exact" or (probes == "auto" and needed <= AUTO):
        return basis(captured.target, needed)
    return signs(captured.target, AUTO if probes == "auto" else int(probes), generator)


def _stretched(captured: Capture, cotangents: Cotangents, x: Tensor) -> tuple[FloatArray, int]:
    """|J_b x_c|^2 for every sample b of the batch and centred input x_c, (B, N), as ``mantissas * 4**exponent``."""
    total, common = torch.zeros(captured.batch_size, len(x), dtype=torch.float64, device=x.device), 0
    started = False
    size = max(1, peak_bytes(captured.target.device) // (8 * x.shape[1] * captured.batch_size))
    with state_restored(captured.rerun.modules), pulling():  # checkpointed layers run again
        for first in range(0, cotangents.num, size):
            drawn = cotangents.draw(first, min(first + size, cotangents.num))
            gradients, exponents = _pull_to_sources(captured, drawn)
            top = int(exponents.max())
            if not started or top > common:
                total, common, started = total * 4.0 ** max(common - top, -500), top, True
            scale = power_of_two(exponents - common, torch.float64)
            for gradient, factor in zip(gradients.double(), scale, strict=True):
                total += (factor * gradient @ x.T).square()
    return (total / (cotangents.num_probes or 1)).cpu().numpy(), common


def _pull_to_sources(captured: Capture, bundle: Tensor) -> tuple[Tensor, Tensor]:
    """J^T v at the sources, (cotangents, B, d), as ``gradients * 2**exponents``."""
    edges, pull_back = list(captured.graph.edges), PullBack()
    wanted = [lookup(captured.reached, name, captured.elsewhere).edge for name in captured.source_names]
    exponents = torch.zeros(len(bundle), dtype=torch.int64, device=bundle.device)
    position = len(edges) - 1
    while position >= STRIDE:
        (bundle,) = pull_back(edges[position], [edges[position - STRIDE]], bundle)
        bundle, shift = rescale(bundle)
        exponents, position = exponents + shift, position - STRIDE
    arrived = len(wanted) == 1 and vertex(edges[position]) == vertex(wanted[0])
    gradients = [bundle] if arrived else pull_back(edges[position], wanted, bundle)
    return torch.cat([g.reshape(len(g), captured.batch_size, -1) for g in gradients], dim=2), exponents
