"""What one batch of samples says about the coherence of Jacobians, from cotangents that all samples share.

With v_b = J_b^T g for one cotangent g, and u_b = sum_a <v_a, v_b> over all samples a other than b,

    P = sum_b u_b / (N (N - 1)),   Q = sum_b |v_b|^2 / N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.backward.cotangents import AUTO_COST, AUTO_EXACT, Cotangents, Deflated, basis, shared_signs
from gradscope.backward.readings import Reading
from gradscope.backward.route import TrunkRoute
from gradscope.backward.sweep import sweep
from gradscope.forward.layers import Layer
from gradscope.forward.state import alone, state_restored
from gradscope.jacobians.capture import Capture
from gradscope.memory import Workspace
from gradscope.norms import real

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Part(NamedTuple):
    """One batch of N samples: ``p``, ``q`` (layers, N) on the scale ``4**exponents`` (layers,).

    ``p``: jackknife pseudo-values of P, ``q``: the terms of Q, both averaged over probes.  Their means are P and Q.
    ``by_probe`` (layers, 2, probes): P and Q of every random probe.  ``interaction`` (layers, 2, 2): the part of the
    covariance of P and Q that is due to probes and samples together, on the scale ``16**exponents``.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    p: FloatArray
    q: FloatArray
    by_probe: FloatArray
    interaction: FloatArray
    exponents: IntArray
    num_probes: int
    remarks: tuple[str, ...]

    def variances(
        self, values: FloatArray, mean: FloatArray, shift: IntArray, share: float
    ) -> tuple[FloatArray, FloatArray]:
        """The variance of the coherences ``values`` = P / ``mean`` due to these probes, and the interaction in it.

        For given samples; 0 if exact, NaN with one probe.  The variance due to samples holds the interaction as well.
        ``shift``: log2 of the scale of p and q, relative to that of ``mean``.  ``share``: of all samples.
        """
        if self.num_probes < 2:
            unknown = np.full_like(values, np.nan if self.num_probes else 0.0)
            return unknown, unknown
        slope = share * np.stack([np.ones_like(values), -values], axis=1) / mean[:, None]
        p, q = np.moveaxis(np.ldexp(self.by_probe, shift[:, :, None]), 1, 0)
        terms = slope[:, :1] * p + slope[:, 1:] * q
        # Divided as by the jackknife of a ratio, because a large term pulls the ratio towards itself.
        weights = share * q / (self.num_probes * mean[:, None])
        deviations = (terms - terms.mean(axis=1, keepdims=True)) / (1 - weights)
        both = np.einsum("li,lij,lj->l", slope, np.ldexp(self.interaction, 2 * shift[:, :, None]), slope)
        return np.square(deviations).sum(axis=1) / (self.num_probes * (self.num_probes - 1)), both


def check_samples(captured: Capture, rows: Sequence[Layer]) -> None:
    """Raise ValueError unless every sample has a Jacobian of its own, and there is a pair of samples."""
    if captured.coupled:
        raise ValueError(
            "Samples of this batch influence each other (batch statistics?), so a single sample has no Jacobian and "
            "the data have no coherence: use model.eval()."
        )
    if captured.batch_size < 3:
        raise ValueError(
            f"Coherence needs at least three samples per batch, got {captured.batch_size}: use larger batches, or "
            "drop_last=True if this is the last batch of a DataLoader."
        )
    for row in rows:
        if row.shape[:1] != (captured.batch_size,):
            raise ValueError(
                f"Coherence needs samples along the leading dimension; layer {row.name!r} has shape {row.shape} at "
                f"batch size {captured.batch_size}: leave this layer out of layers=."
            )


def shared_cotangents(target: Layer, plan: Deflated | str, generator: torch.Generator) -> Cotangents:
    """Cotangents that are the same for all samples: a basis, or random signs."""
    needed = target.size // target.shape[0]
    if plan == "exact" or (plan == "auto" and needed <= AUTO_EXACT):
        return basis(target, needed)
    return shared_signs(target, plan.num if isinstance(plan, Deflated) else AUTO_COST, generator)


def _read(rows: Sequence[int], gradients: Sequence[Tensor], workspace: Workspace, lead: int) -> list[Tensor]:
    """|v_b| and <v_b, s / |s|> of every sample, with s the sum of all v_b: (c, 2, B)."""
    found = []
    for gradient in gradients:
        v = real(gradient if lead else gradient[None]).flatten(2).double()
        s = v.sum(dim=1)
        length = torch.linalg.vector_norm(s, dim=1, keepdim=True)
        along = (v @ (s / torch.where(length > 0, length, 1.0))[:, :, None])[:, :, 0]
        found.append(torch.stack([torch.linalg.vector_norm(v, dim=2), along], dim=1))
    return found


def terms(reading: Reading, num_probes: int) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, int]:
    """Fields ``p``, ``q``, ``by_probe``, ``interaction`` and ``exponents`` of a `Part`, for one layer.

    Without sample b, the sum of all u is smaller by 2 u_b: so the pseudo-values of P follow from u.
    """
    common = int(reading.exponents.max())
    values = np.ldexp(reading.values, (reading.exponents - common)[:, None, None])
    q = np.square(values[:, 0])
    u = values[:, 1] * values[:, 1].sum(axis=1, keepdims=True) - q
    pairs, num = u.sum(axis=1, keepdims=True), u.shape[1]
    p = pairs / (num - 1) - (pairs - 2 * u) / (num - 2)
    if not num_probes:
        return p.sum(axis=0), q.sum(axis=0), np.zeros((2, 0)), np.zeros((2, 2)), common
    both = np.stack([p, q])  # (2, probes, N)
    by_probe, by_sample = both.mean(axis=2, keepdims=True), both.mean(axis=1, keepdims=True)
    rest = (both - by_probe - by_sample + both.mean(axis=(1, 2), keepdims=True)).reshape(2, -1)
    interaction = rest @ rest.T / (max(1, num_probes - 1) * (num - 1) * num_probes * num)
    return by_sample[0, 0], by_sample[1, 0], by_probe[:, :, 0], interaction, common


def part_of(captured: Capture, rows: Sequence[Layer], cotangents: Cotangents) -> Part:
    """What one batch says about the sources ``rows[:-1]`` and the target ``rows[-1]``."""
    if not rows[:-1]:
        raise ValueError(f"No layer lies before the target {rows[-1].name!r}: choose a later target= or other layers=.")
    captured.check_target(rows[-1], rows[0])
    with alone, state_restored(captured.replay.modules) as state, state:  # checkpointed layers run again
        widest = max(layer.bytes for layer in captured.reached)
        readings = sweep(TrunkRoute(captured.graph, rows[:-1]), [cotangents], _read, widest=widest)
    p, q, by_probe, interaction, exponents = (
        np.array(part) for part in zip(*[terms(one, cotangents.num_probes) for one in readings], strict=True)
    )
    order = [unit.index for unit in captured.units]
    return Part(
        names=tuple(row.name for row in rows),
        indices=tuple(int(np.searchsorted(order, row.index)) for row in rows),
        p=p,
        q=q,
        by_probe=by_probe,
        interaction=interaction,
        exponents=exponents,
        num_probes=cotangents.num_probes,
        remarks=captured.remarks,
    )
