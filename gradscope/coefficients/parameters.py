"""``parameter_gsc(model, data)``: how much the target changes with the parameters of each module.

    GSC(theta_k, l) = |T_k^l|_F^2 / P_k * |theta_k|^2 / |f_l|^2,   T_k^l: (B d_l) x P_k.

|T|_F^2 is exact with B d_l cotangents, and unbiased with random probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from gradscope import frames
from gradscope.backward.cotangents import Cotangents, chosen, generator_or_default
from gradscope.backward.readings import Reading, lengths
from gradscope.backward.route import Leaf, TrunkRoute
from gradscope.backward.sweep import sweep
from gradscope.choices import checked
from gradscope.coefficients.profiles import LN10, Profile
from gradscope.estimates import Estimate, Moments
from gradscope.forward.inputs import Forward, LossFunction
from gradscope.forward.interrupts import interruptible
from gradscope.forward.lengths import check_length
from gradscope.forward.modules import Owned, owned_parameters
from gradscope.forward.state import alone
from gradscope.forward.trunk import leaf_edge, leaf_positions, vertex
from gradscope.forward.wrappers.sharding import of_whole
from gradscope.jacobians.capture import Capture, captured_unread
from gradscope.memory import Later, together
from gradscope.norms import real

# Trunk tensors between two rescalings, fewer than in `gsc`: no readings in between show that a value leaves the range.
STRIDES = (8, 1)


@of_whole
@checked
def parameter_gsc(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: int | str = "auto",
    generator: torch.Generator | None = None,
) -> ParameterProfile:
    """Gradient Scale Coefficient (GSC) of the *parameters* of every module with respect to one target layer l.

    GSC(theta_k, l) = |T_k^l|_qm^2 |theta_k|^2 / |f_l|^2.  theta_k are the P_k parameters of module k without those of
    its submodules, and f_l is the target over the whole batch.  T_k^l is the (B d_l) x P_k Jacobian of f_l with respect
    to theta_k, and |T|_qm = |T|_F / sqrt(P_k).  For a small random change of theta_k, GSC is the mean squared relative
    change of f_l divided by the squared relative change of theta_k.  A complex number counts as two real ones.

    Arguments:
        model, data, forward, target, loss_fn: As for `gradscope.gsc`; ``data`` must be one batch.
        probes, generator: As for `gradscope.nlc`; ``"exact"`` takes B d_l cotangents.

    Returns:
        A `ParameterProfile`, one row per module that holds trainable parameters; the target is not a row.  The
        frame has two quantities, ``parameter_gsc`` and ``parameter_qm_norm`` (|T|_qm).  ``index`` numbers the modules
        from 1.  A parameter on which the target does not depend has Jacobian 0, but counts in P_k and |theta_k|.  Tied
        parameters count once, for the first module that holds them.

    Cost: one forward pass, and one backward pass with parameter gradients per cotangent.
    Memory: cotangents are pulled back in batches.  A trunk tensor is one that every path to the target passes through.
    For each cotangent of a batch, the gradients between two neighboring trunk tensors are in memory.  A batch takes at
    most 1/20 of the free memory, unless one cotangent needs more.

    Raises:
        ValueError: No trainable parameters, an invalid ``probes``, or a target of length zero (`ZeroOutputError`).
        FloatingPointError: The gradient of a parameter, which the message names, is NaN or Inf.  Gradients are rescaled
            only at trunk tensors.  Between two of these, or between two uses of a tied parameter, they can overflow.

    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=3, width=8, generator=torch.Generator().manual_seed(0))
    >>> profile = gs.parameter_gsc(model, torch.ones(2, 8))
    >>> profile.layers
    ('layers.0.linear', 'layers.1.linear', 'layers.2.linear')
    """
    with interruptible() as whole, whole, together():
        captured = captured_unread(model, data, forward=forward, loss_fn=loss_fn, target=target)
        owners = owned_parameters(captured.replay.modules)
        cotangents = chosen(captured.target, captured.target.size, probes, generator_or_default(generator))
        every = {id(p): p for parameters in owners.values() for p in parameters}
        squares = Later(real(p.detach()).double().square().sum() for p in every.values())
        readings = _pulled(captured, owners, cotangents)
        length = captured.lengths[vertex(captured.target.edge)]
        check_length(captured.target, length.squares, "batch")
    weights = dict(zip(every, map(float, squares.arrays), strict=True))
    gains, norms = [], []
    for parameters in owners.values():
        square = _mean_square([readings[id(p)] for p in parameters if id(p) in readings], cotangents)
        num = sum(real(p).numel() for p in parameters)
        gain = square.scaled(sum(weights[id(p)] for p in parameters) / num / float(length.squares.sum()))
        gains.append(replace(gain, exponent=gain.exponent - 2 * length.exponent))
        norms.append(square.scaled(1 / num).sqrt())
    num_probes = cotangents.num_probes
    errors = np.array([[gain.log10_stderr] for gain in gains], dtype=np.float64)
    constant = np.ones_like(errors)
    return ParameterProfile(
        sources=tuple(owners),
        targets=(captured.target.name,),
        indices=tuple(range(1, len(owners) + 1)),
        on_trunk=(True,) * len(owners),
        log10_values=np.array([[gain.log10_value] for gain in gains]),
        log10_stderr_probe=errors,
        log10_stderr_sample=np.nan * constant,
        num_probes=np.full(errors.shape, num_probes),
        num_samples=captured.batch_size,
        reduction="batch",
        coupled=captured.coupled,
        stopped="end of data",
        relative_error=float(np.nan_to_num(errors, nan=np.inf).max()) * LN10,
        num_batches=1,
        streamed=False,
        _log10_stderr_cautious=errors,
        _fixed_share=constant * (num_probes == 0),
        _probe_freedom=constant * (max(1, num_probes - 1) if num_probes else np.inf),
        _sample_freedom=np.nan * constant,
        remarks=captured.remarks,
        qm_norms=tuple(norms),
    )


@dataclass(frozen=True, repr=False, eq=False)
class ParameterProfile(Profile):
    """GSC of the parameters of every module with respect to one target: a `Profile` of modules, without the target.

    ``qm_norms``: |T|_qm of each module.
    """

    qm_norms: tuple[Estimate, ...]

    @property
    def _title(self) -> str:
        return f"parameters of {len(self.sources)} modules to {self.target!r}"

    def rows_to(self, target: str | None = None) -> pd.DataFrame:
        """Return all rows of `to_frame`, because there is only one target."""
        return self.to_frame()

    def to_frame(self) -> pd.DataFrame:
        """Tidy frame, one row per module and quantity (``parameter_gsc`` and ``parameter_qm_norm``)."""
        index = np.array(self.indices)
        low, high = self.interval()
        norms = np.array([norm.log10_value for norm in self.qm_norms])
        # GSC is |T|_qm^2 times numbers without error.
        with np.errstate(invalid="ignore"):
            shifts = [(end[:, 0] - self.log10_values[:, 0]) / 2 for end in (low, high)]
        qm_low, qm_high = (norms + np.where(np.isneginf(norms), 0.0, shift) for shift in shifts)
        columns: dict[str, dict[str, Any]] = {
            "parameter_gsc": {
                "log10_value": self.log10_values[:, 0],
                "log10_stderr_probe": self.log10_stderr_probe[:, 0],
                "log10_low": low[:, 0],
                "log10_high": high[:, 0],
            },
            "parameter_qm_norm": {
                "log10_value": norms,
                "log10_stderr_probe": [norm.log10_stderr for norm in self.qm_norms],
                "log10_low": qm_low,
                "log10_high": qm_high,
            },
        }
        about = {
            "layer": self.sources,
            "index": index,
            "depth_from_output": len(index) - index,
            "target": self.target,
            "reduction": self.reduction,
            "coupled": self.coupled,
            "num_probes": self.num_probes[:, 0],
            "num_samples": self.num_samples,
        }
        parts = [frames.tidy({**about, "quantity": name, **values}) for name, values in columns.items()]
        return pd.concat(parts, ignore_index=True)


def _pulled(captured: Capture, owners: Owned, cotangents: Cotangents) -> dict[int, Reading]:
    """|T^T v| of every cotangent for each parameter that the target depends on, by the id of the parameter."""
    leaves = {
        id(p): Leaf(f"{name}.{number}", leaf_edge(p), real(p).numel(), p.dtype, p.device)
        for name, parameters in owners.items()
        for number, p in enumerate(parameters)
    }
    above = leaf_positions(captured.graph, {vertex(leaf.edge) for leaf in leaves.values()})
    leaves = {key: leaf for key, leaf in leaves.items() if vertex(leaf.edge) in above}
    graph = replace(captured.graph, above=captured.graph.above | above)
    route = TrunkRoute(graph, list(leaves.values()))
    with alone, captured.replay.guard() as state, state:  # checkpointed layers run again
        readings = sweep(route, [cotangents], lengths(), widest=max(route.bytes), strides=STRIDES)
    return dict(zip(leaves, readings, strict=True))


def _mean_square(readings: Sequence[Reading], cotangents: Cotangents) -> Estimate:
    """|T|_F^2 of one module: the sum over a basis, or the mean over random cotangents with its error."""
    common = int(max((reading.exponents.max() for reading in readings), default=0))
    total = np.zeros(cotangents.num)
    for reading in readings:
        total += np.ldexp(np.square(reading.values[:, 0]), 2 * (reading.exponents - common))
    if cotangents.num_probes == 0:
        return Estimate.exact(float(total.sum()), 2 * common)
    return Moments.of(total, 2 * common).estimate()
