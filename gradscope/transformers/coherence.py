"""``jacobian_coherence(model, data)``: how much of the Jacobian of a layer is the same for all samples.

    coherence(k, l) = |E J_k^l|_F^2 / E |J_k^l|_F^2,   expectations over samples

With one cotangent g for all samples and v_b = J_b^T g, the estimates of numerator and denominator

    P = (|sum_b v_b|^2 - sum_b |v_b|^2) / (B (B - 1)),   Q = sum_b |v_b|^2 / B

are unbiased: P is the mean of <v_a, v_b> over pairs of different samples.  Cost: that of `gradscope.gsc`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import special
from torch import nn

from gradscope import frames
from gradscope.backward.cotangents import generator_or_default, resolved
from gradscope.choices import Level, PathLike, checked
from gradscope.coefficients.gsc import rows_of
from gradscope.coefficients.reductions import FEWEST
from gradscope.estimates import satterthwaite
from gradscope.forward.inputs import Forward, LossFunction, stream
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import LayerFilter
from gradscope.jacobians.capture import captured_unread
from gradscope.memory import together
from gradscope.transformers.shared_probes import Part, check_samples, part_of, shared_cotangents

FloatArray = npt.NDArray[np.float64]
QUANTITY = "jacobian_coherence"


@checked
def jacobian_coherence(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: int | str = "auto",
    generator: torch.Generator | None = None,
) -> Coherence:
    """Return the coherence |E J|_F^2 / E |J|_F^2 of each layer's Jacobians J; it is 1 if all samples have the same J.

    J is the Jacobian of the target f_l with respect to the layer f_k for one sample, and E the mean over samples.
    E |J|_F^2 is the sum of |E J|_F^2 and E |J - E J|_F^2.  The coherence is the first summand divided by this sum.  So
    it measures how well the single linear map E J replaces the layers between f_k and f_l for all samples.  The
    coherence is 1 for an affine network.  It is about 1 / 2 after one layer of ReLUs if each ReLU is active for a
    random half of the samples.

    Arguments:
        model, data, forward, layers, target, loss_fn: As for `gradscope.gsc`.  Samples must not influence each other.
            Each batch needs at least three samples, because pairs of samples within a batch are compared.
        probes: ``"exact"`` (as many cotangents as f_l has entries per sample), a number of random cotangents per
            batch, or ``"auto"``: exact for at most 128 entries per sample, otherwise 40 random cotangents.
        generator: Source of the probes.  Default: a fixed seed.

    Returns:
        A `Coherence`.  Its intervals are for the coherence of a whole data set.  They assume that the samples were
        drawn independently from this data set.

    Cost: one forward pass.  Each cotangent needs one backward pass, and two float64 passes over the gradient at each
    layer.

    Raises:
        ValueError: Samples influence each other, a batch has fewer than three samples, a layer has no samples along its
            leading dimension, a Jacobian is zero for all samples, or ``probes`` is invalid.

    >>> import gradscope as gs
    >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    >>> gs.jacobian_coherence(model, x).values.round(9)
    array([1., 1., 1.])
    """
    plan = resolved(probes)
    generator = generator_or_default(generator)
    streamed = stream(data, forward=forward, loss_fn=loss_fn)
    parts: list[Part] = []
    with interruptible() as whole, whole:
        for batch in [data] if streamed is None else streamed:
            with together():
                captured = captured_unread(model, batch, forward=forward, layers=layers, loss_fn=loss_fn, target=target)
                rows = rows_of(captured, layers, target)
                check_samples(captured, rows)
                part = part_of(captured, rows, shared_cotangents(captured.target, plan, generator))
                if parts and [row.name for row in rows] != list(parts[0].names):
                    raise ValueError("Batches do not pass through the same layers: choose layers= that all share.")
                parts.append(part)
    if not parts:
        raise ValueError("data yields no batch. Is the iterator exhausted, or the loader empty?")
    return Coherence.of(parts)


@checked
@dataclass(frozen=True, repr=False, eq=False)
class Coherence:
    """Coherence of the Jacobians of all samples, one value per layer; made by `gradscope.jacobian_coherence`.

    - ``layers``: names in execution order; the target, with coherence 1, is last.
    - ``values``: coherence of each layer; an estimate may lie below 0.
    - ``stderr_sample``: standard errors due to the choice of samples, by the jackknife.
    - ``stderr_probe``: standard errors due to the choice of probes, for these samples; 0 if exact, NaN with one probe.
    - ``num_probes``: random cotangents per batch.

    >>> import gradscope as gs
    >>> affine = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> gs.jacobian_coherence(affine, torch.randn(6, 4), layers="*").values.round(6).tolist()
    [1.0, 1.0, 1.0]
    """

    layers: tuple[str, ...]
    indices: tuple[int, ...]
    target: str
    values: FloatArray
    stderr_probe: FloatArray
    stderr_sample: FloatArray
    num_probes: int
    num_samples: int
    remarks: tuple[str, ...]
    _stderr: FloatArray  # due to both; the part that both errors hold counts once
    _freedom: FloatArray

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Coherence:
        """Return the coherence of all batches together, from the sums of each batch."""
        first, top = parts[0], np.max([part.exponents for part in parts], axis=0)
        shifts = [2 * (part.exponents - top)[:, None] for part in parts]
        p, q = (
            np.concatenate([np.ldexp(getattr(part, name), e) for part, e in zip(parts, shifts, strict=True)], axis=1)
            for name in ("p", "q")
        )
        num, mean = q.shape[1], q.mean(axis=1)
        if (dead := np.flatnonzero(mean == 0)).size:
            raise ValueError(
                f"The Jacobian of layer {first.names[dead[0]]!r} is zero for all samples, so it has no coherence: "
                "leave this layer out of layers=."
            )
        values = p.mean(axis=1) / mean
        # Between the delta method and the jackknife of a ratio, in which a large term pulls the ratio towards itself.
        deviations = (p - values[:, None] * q) / mean[:, None] / np.sqrt(1 - q / q.sum(axis=1, keepdims=True))
        second, fourth = np.square(deviations).sum(axis=1), np.power(deviations, 4).sum(axis=1)
        of_samples = second / (num * (num - 1))
        of_probes, interaction = np.sum(
            [part.variances(values, mean, e, part.q.shape[1] / num) for part, e in zip(parts, shifts, strict=True)],
            axis=0,
        )
        more = np.maximum(of_probes - interaction, 0.0)  # keeps NaN
        by_probes = max(1, first.num_probes - 1) * len(parts)
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.square(of_samples) / satterthwaite(second, fourth, num) + np.square(more) / by_probes
            freedom = np.square(of_samples + more) / each
        few = [f"Fewer than {FEWEST} samples show no interval."] if num < FEWEST else []
        own = np.ones(1)
        return cls(
            layers=first.names,
            indices=first.indices,
            target=first.names[-1],
            values=np.concatenate([values, own]),
            stderr_probe=np.concatenate([np.sqrt(of_probes), 0 * own]),
            stderr_sample=np.concatenate([np.sqrt(of_samples), 0 * own]),
            num_probes=first.num_probes,
            num_samples=num,
            remarks=(*parts[-1].remarks, *few),
            _stderr=np.concatenate([np.sqrt(of_samples + more), 0 * own]),
            _freedom=np.concatenate([np.where(np.isnan(freedom), np.inf, freedom), np.inf * own]),
        )

    def interval(self, level: Level = 0.95) -> tuple[FloatArray, FloatArray]:
        """Return the ends of one interval per layer, which contains the coherence with probability ``level``.

        The interval is for the coherence of the population from which the samples were drawn independently.  It uses
        the sum of the variances due to probes and samples, and the quantile of Student's t.  The interval is symmetric
        in ln(1 - coherence).  Exception: if the estimate is less than one standard error below 1, the interval is
        symmetric in the coherence itself.  Both ends are clipped to [0, 1].  They are NaN if an error is unknown or
        there are fewer than ten samples.
        """
        error, gap = self._stderr, 1 - self.values
        margin = special.stdtrit(self._freedom, 0.5 + level / 2) * error
        if self.num_samples < FEWEST:
            margin = np.where(error > 0, np.nan, 0.0)
        relative = np.where(gap > error, margin / np.where(gap > error, gap, 1.0), np.nan)
        low, high = (
            np.where(gap > error, 1 - gap * np.exp(sign * relative), self.values - sign * margin) for sign in (1, -1)
        )
        return np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy frame with one row per layer, of the quantity "jacobian_coherence"."""
        return frames.tidy(
            {
                "layer": self.layers,
                "index": self.indices,
                "depth_from_output": self.indices[-1] - np.array(self.indices),
                "target": self.target,
                "quantity": QUANTITY,
                "value": self.values,
                "stderr_sample": self._stderr,
                "coupled": False,
                "num_probes": self.num_probes,
                "num_samples": self.num_samples,
            }
        )

    def plot(self, *, ax: Any = None, **options: Any) -> Any:
        """Return matplotlib Axes with the coherence of every layer: `gradscope.plots.statistic`."""
        return importlib.import_module("gradscope.plots").statistic(self, QUANTITY, ax=ax, **options)

    def save(self, path: PathLike) -> Path:
        """Write the tidy frame as ``.parquet`` or ``.csv`` and return the path."""
        return frames.save(self.to_frame(), path)

    def summary(self) -> str:
        """Return what ``print`` shows: the coherence of every layer with its 95 % interval, and remarks."""
        kind = f"{self.num_probes} probes per batch" if self.num_probes else "exact"
        width = max(map(len, self.layers))
        lines = [f"Coherence of Jacobians to {self.target!r}: {self.num_samples} samples, {kind}"]
        for layer, value, low, high in zip(self.layers, self.values, *self.interval(), strict=True):
            lines.append(f"  {layer:{width}}  {value:.3f}  [{low:.3f}, {high:.3f}]")
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"Coherence({len(self.layers) - 1} layers to {self.target!r}, {self.num_samples} samples)"

    def _repr_html_(self) -> str:
        """Return the summary and a table as HTML, for notebooks."""
        low, high = self.interval()
        table = pd.DataFrame({"layer": self.layers, "coherence": self.values, "low": low, "high": high})
        return frames.notebook(str(self), table)
