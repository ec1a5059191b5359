"""``nlc(model, data)``: how much a network differs from its linearization over the spread of the data.

    NLC = sqrt(mean_b,c |J_b (x_c - mean x)|^2 / mean_b |f_b - mean f|^2)   over samples b, c

Cost: two forward passes (three for a stream) and one backward pass per cotangent.  With probes, NLC^2 is unbiased for
the given data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.backward.cotangents import Cotangents, chosen, generator_or_default, needed_for_exact, resolved
from gradscope.backward.route import TrunkRoute
from gradscope.backward.sweep import sweep
from gradscope.choices import checked
from gradscope.coefficients.gains import Gain, Length
from gradscope.coefficients.planning import MOST_BATCHES
from gradscope.coefficients.reductions import Tally
from gradscope.estimates import Estimate
from gradscope.forward.inputs import Forward, LossFunction, stream
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import lookup
from gradscope.forward.state import alone
from gradscope.forward.wrappers.sharding import of_whole
from gradscope.jacobians.capture import Capture, captured_unread
from gradscope.memory import Later, Workspace, peak_bytes, together
from gradscope.norms import real

# Trunk tensors between two rescalings, fewer than in `gsc`: no readings in between show that a value leaves the range.
STRIDES = (8, 1)
FEWEST = 30  # samples of a standard error

FloatArray = npt.NDArray[np.float64]


@of_whole
@checked
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
    """Nonlinearity coefficient (NLC) of a network over data: 1 for an affine map, larger for a more nonlinear one.

    NLC = sqrt(E_x Tr(J(x) Cov_x J(x)^T) / Tr Cov_f).  J(x) is the Jacobian of the target with respect to the input at
    the sample x.  Cov_x and Cov_f are the covariances (divisor N) of inputs and targets over the N samples.  NLC does
    not change under invertible affine maps of the input, or if the output is shifted, scaled or rotated.  A complex
    number counts as two real ones.  Some authors use NLC^2.  GSC does not determine NLC: in a deep ReLU network, GSC
    stays at 1 while NLC grows.

    Arguments:
        model, data, forward, target, loss_fn: As for `gradscope.gsc`; the batches of a stream are kept in memory.
        probes: ``"exact"``, a number of random cotangents per batch, or ``"auto"``: exact if that takes at most
            128 cotangents, otherwise 40 random ones.
        generator: Source of the probes.  Default: a fixed seed.

    Returns:
        An `Estimate`.  Its standard error covers the choice of random probes and the choice of samples, on which J,
        Cov_x and Cov_f depend.  ``num_probes`` is 0 if no random probes were used.  If samples influence each other
        (batch normalization), J is the Jacobian of the whole batch, and Cov_x treats the inputs of different samples
        as independent.  The standard error is None for such samples, for fewer than 30 samples, and for an NLC of 0.

    Cost: two forward passes (three for a stream).  Per cotangent: one backward pass and N^2 d operations, for N samples
    with inputs of size d.  Memory: the data, and N^2 numbers for each of the cotangents that are pulled back together.

    Raises:
        ValueError: Fewer than two samples, more than 2,000 batches, an invalid ``probes``, or a target that is the
            input or does not vary over the data.

    Reference: Philipp and Carbonell (2018), "The nonlinearity coefficient", arXiv:1806.00179.

    >>> import gradscope as gs
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> print(f"{gs.nlc(nn.Linear(3, 2, dtype=torch.float64), x).value:.6f}")
    1.000000
    """
    resolved(probes)
    generator = generator_or_default(generator)
    streamed = stream(data, forward=forward, loss_fn=loss_fn)
    batches = [data] if streamed is None else list(islice(streamed, MOST_BATCHES + 1))
    if len(batches) > MOST_BATCHES:
        raise ValueError(f"data has more than {MOST_BATCHES:,} batches, and NLC keeps all in memory: give fewer.")

    def captured(batch: Any) -> Capture:
        return captured_unread(model, batch, forward=forward, loss_fn=loss_fn, target=target)

    def read(batch: Any) -> Capture:
        found = captured(batch)
        found.lengths.read()  # what waits keeps its graph in memory
        return found

    with interruptible() as whole, whole, together():
        # The graphs of all batches of a stream may not fit into memory, so each pass is recorded twice.
        only = [captured(data)] if streamed is None else []
        inputs, targets = zip(*map(_values, only or map(read, batches)), strict=True)
        x, f = torch.cat(inputs), torch.cat(targets)
        if len(x) < 2:
            raise ValueError("NLC compares the spread of inputs and targets, so it needs at least two samples.")
        x, f = x - x.mean(dim=0), f - f.mean(dim=0)
        deviations = Later([f.square().sum(dim=1)])
        deviations.then(lambda: _check_spread(deviations.arrays[0]))
        rows, gains, num_probes, coupled = [], [], 0, False
        for recorded in only or map(captured, batches):
            needed = needed_for_exact(recorded.target, recorded.batch_size, coupled=recorded.coupled)
            cotangents = chosen(recorded.target, needed, probes, generator)
            num_probes, coupled = max(num_probes, cotangents.num_probes), coupled or recorded.coupled
            moved, exponent, gain = _stretched(recorded, cotangents, x)
            rows.append((moved, exponent))
            gains.append(gain)
    (spread,) = deviations.arrays
    common = max(exponent for _, exponent in rows)
    moved = np.concatenate([np.ldexp(m, 2 * (e - common)) for m, e in rows])  # (N, N): sample b, direction x_c
    numerator, denominator = float(moved.mean()), float(spread.mean())
    estimate = Estimate(numerator / denominator, None, 2 * common, num_probes)
    if coupled or len(x) < FEWEST or numerator == 0:
        return estimate.sqrt()
    # Each sample contributes three times: as the point where J is taken, as a direction, and to the target's spread.
    directions = moved.mean(axis=0) / numerator
    ends = np.cumsum([len(m) for m, _ in rows])[:-1]
    parts = zip(gains, np.split(directions, ends), np.split(spread, ends), strict=True)
    tally = reduce(Tally.merge, (_tally(*part) for part in parts))
    error = float(np.hypot(tally.log10_stderr_probe, tally.log10_stderr_sample)[0]) * math.log(10)
    return replace(estimate, mantissa_stderr=estimate.mantissa * error, freedom=float(tally.sample_freedom[0])).sqrt()


def _check_spread(squares: FloatArray) -> None:
    if not squares.any():
        raise ValueError("The target is the same for all samples, so NLC is not defined.")


def _tally(gain: Gain, directions: FloatArray, spread: FloatArray) -> Tally:
    """NLC^2 of one batch as a coefficient in the notation of `gradscope.coefficients.reductions`."""
    p, q = (Length(squares[None], np.zeros(1, dtype=np.int64)) for squares in (directions, spread))
    return Tally.of(gain, p, q, sizes=[len(spread)], reduction="batch", batch_size=len(spread))


def _values(captured: Capture) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (B, d) in float64; several sources are concatenated."""
    names = (*captured.source_names, captured.target.name)
    if captured.target.name in captured.source_names:
        raise ValueError(f"target must be a layer after the input, got {captured.target.name!r}.")
    found = captured.replay.outputs(set(names), {})
    for name in names:
        if name not in found or found[name].shape[:1] != (captured.batch_size,):
            raise ValueError(f"NLC needs samples along the leading dimension of layer {name!r}.")
    *parts, target = (real(found[name]).double().reshape(captured.batch_size, -1) for name in names)
    return torch.cat(parts, dim=1), target


def _stretched(captured: Capture, cotangents: Cotangents, x: Tensor) -> tuple[FloatArray, int, Gain]:
    """|J_b x_c|^2 for every sample b of the batch and centered input x_c, (B, N), as ``mantissas * 4**exponent``.

    The gain has the means over c, for the errors.
    """
    sources = [lookup(captured.reached, name, captured.elsewhere) for name in captured.source_names]
    ends = np.cumsum([source.size // captured.batch_size for source in sources])[:-1].tolist()
    directions = x.tensor_split(ends, dim=1)

    def read(rows: Sequence[int], gradients: Sequence[Tensor], workspace: Workspace, lead: int) -> list[Tensor]:
        """v^T J_b x_c of every cotangent v, (c, B, N)."""
        nums = [len(gradient) if lead else 1 for gradient in gradients]
        parts = [real(g).reshape(num, captured.batch_size, -1) for g, num in zip(gradients, nums, strict=True)]
        return [part.double() @ directions[row].T for row, part in zip(rows, parts, strict=True)]

    each = 8 * captured.batch_size * max(x.shape)
    step = max(1, peak_bytes(x.device) // each)
    total, common = np.zeros((captured.batch_size, len(x))), -(1 << 60)
    norms, exponents = [], []
    route = TrunkRoute(captured.graph, sources)
    with alone, captured.replay.guard() as state, state:  # checkpointed layers run again
        for first in range(0, cotangents.num, step):
            window = cotangents.window(first, first + step)
            readings = sweep(route, [window], read, widest=each, strides=STRIDES)
            top = max(common, *(int(reading.exponents.max()) for reading in readings))
            total, common = np.ldexp(total, 2 * max(common - top, -2000)), top
            for number in range(window.num):
                parts = [np.ldexp(reading.values[number], reading.exponents[number] - common) for reading in readings]
                square = np.square(sum(parts))
                total += square
                norms.append(np.sqrt(square.mean(axis=1)))
                exponents.append(common)
    num_fixed = 0 if cotangents.num_probes else len(norms)
    gain = Gain.of(np.array([norms]), np.array([exponents]), num_fixed=num_fixed, coupled=False)
    return total / (cotangents.num_probes or 1), common, gain
