"""``measure(model, x, y, loss_fn)``: statistics of every layer's pre-activations and of its parameters' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gradscope import frames
from gradscope.estimates import Estimate
from gradscope.forward.inputs import Batch, Forward, LossFunction, as_batch, check_devices
from gradscope.forward.modules import Modules, state_restored, unwrap
from gradscope.measures import (
    DeadFraction,
    EffectiveRank,
    GradientCosine,
    GradientNorm,
    GradientRms,
    GradientToWeight,
    GradientZeroFraction,
    Kurtosis,
    LinearFitError,
    PreactivationMean,
    PreactivationStd,
    SampleCosine,
    SaturatedFraction,
    SignalToNoise,
    SignDiversity,
    UpdateToWeight,
)
from gradscope.measures.activation import PREACTIVATIONS, RESPONSES, SLOPES
from gradscope.measures.gradient import GRADIENTS
from gradscope.measures.layer_gradients import layer_gradients
from gradscope.measures.preactivations import heard, response, slopes


class Measure(Protocol):
    """A statistic of one layer: a pure function with the name of its quantity.

    ``of`` says of what: ``"preactivations"`` or ``"slopes"``, tensors (B, ...), ``"responses"``, the pair of
    pre-activations and what the nonlinearity makes of them, or ``"gradients"``, a
    `gradscope.measures.LayerGradient`.  A statistic that may be negative also has ``signed = True``.
    """

    @property
    def quantity(self) -> str:
        """Name of the statistic in a frame."""

    @property
    def of(self) -> str:
        """What the statistic is taken of."""

    def __call__(self, values: Any, /) -> Estimate:
        """The statistic with its standard error over samples."""


PREACTIVATION_MEASURES: tuple[Measure, ...] = (
    PreactivationMean(), PreactivationStd(), SignDiversity(), SaturatedFraction(), DeadFraction(), Kurtosis(),
    EffectiveRank(), SampleCosine(), LinearFitError(),
)  # fmt: skip
GRADIENT_MEASURES: tuple[Measure, ...] = (
    GradientNorm(), GradientRms(), GradientZeroFraction(), GradientToWeight(), GradientCosine(), SignalToNoise(),
)  # fmt: skip

Found = list[tuple[str, list[Estimate]]]


def measure(
    model: nn.Module,
    x: Any,
    y: Any = None,
    loss_fn: LossFunction | None = None,
    measures: Sequence[Measure] | None = None,
    *,
    learning_rate: float | None = None,
    forward: Forward | None = None,
) -> pd.DataFrame:
    """Statistics of what every nonlinearity receives, and with a loss of every layer's gradient, as a tidy frame.

    Arguments:
        model: Any module; it is left exactly as it was.
        x: A tensor (B, ...), or a mapping; with ``forward`` anything.
        y: Labels, handed to ``loss_fn``.
        loss_fn: ``(output, labels) -> (B,)`` losses, one a sample; the gradient is that of their mean.
        measures: Statistics to take (`gradscope.measures`, or your own).  Default: all of pre-activations; with
            ``loss_fn`` also all of gradients.
        learning_rate: Adds `gradscope.measures.UpdateToWeight` at this rate.
        forward: ``(model, batch) -> output``.

    Returns:
        One row a measure and a call of a nonlinearity (a module of torch.nn), or a module that holds parameters;
        ``index`` counts those calls, or modules, from 1.  ``log10_stderr_sample``, or ``stderr_sample`` for statistics
        that may be negative, is the sampling error over the batch.

    Cost: one forward pass without gradients; for gradients one with, and one backward pass a sample, vectorized.

    Raises:
        ValueError: No nonlinearity fired although a measure wants its input, no trainable parameters, a gradient
            measure without ``loss_fn``, or bad data.
        FloatingPointError: A gradient is NaN or Inf; the layer is named.
    """
    model = unwrap(model)
    by_default = PREACTIVATION_MEASURES + (GRADIENT_MEASURES if loss_fn is not None else ())
    chosen = list(by_default if measures is None else measures)
    if learning_rate is not None:
        chosen.append(UpdateToWeight(learning_rate))
    if unknown := [m.quantity for m in chosen if m.of not in (PREACTIVATIONS, SLOPES, RESPONSES, GRADIENTS)]:
        raise ValueError(f"Measure {unknown[0]!r}: of must be 'preactivations', 'slopes', 'responses' or 'gradients'.")
    of_gradients = [m for m in chosen if m.of == GRADIENTS]
    if of_gradients and loss_fn is None:
        raise ValueError(
            f"{of_gradients[0].quantity!r} is a statistic of gradients, so it needs loss_fn= and labels y."
        )
    batch = as_batch(x if loss_fn is None else (x, y), forward=forward, loss_fn=loss_fn)
    parts = []
    if of_activations := [m for m in chosen if m.of != GRADIENTS]:
        parts.append(_frame(of_activations, _activations(model, batch, forward, of_activations), batch))
    if of_gradients and loss_fn is not None:
        found = layer_gradients(model, batch, forward=forward, loss_fn=loss_fn)
        parts.append(_frame(of_gradients, [(name, [m(g) for m in of_gradients]) for name, g in found.items()], batch))
    if not parts:
        raise ValueError("measures= is an empty list; leave it out to take all of them.")
    return pd.concat(parts, ignore_index=True)


def _activations(model: nn.Module, batch: Batch, forward: Forward | None, measures: Sequence[Measure]) -> Found:
    """The statistics of every call of a nonlinearity, in execution order."""
    modules: Modules = dict(model.named_modules())
    if forward is None:
        check_devices(modules, batch)
    found: Found = []

    def listen(name: str, module: nn.Module, received: Tensor) -> None:
        wanted = {m.of for m in measures}
        values: dict[str, Any] = {PREACTIVATIONS: received}
        if SLOPES in wanted:
            values[SLOPES] = slopes(module, received)
        if RESPONSES in wanted:
            values[RESPONSES] = received, response(module, received)
        # The network may run under autocast; its numbers are not to be rounded once more.
        with torch.autocast(received.device.type, enabled=False):
            found.append((name, [m(values[m.of]) for m in measures]))

    with heard(modules, listen), state_restored(modules), torch.no_grad():
        batch.run(model, forward)
    if not found:
        raise ValueError(
            f"No nonlinearity module fired in {type(model).__name__}: functional calls such as F.relu are not seen; "
            "use nn.ReLU() and the like as modules, or choose measures= of gradients only."
        )
    return found


def _frame(measures: Sequence[Measure], found: Found, batch: Batch) -> pd.DataFrame:
    """One frame of all measures, one after the other."""
    rows = [(m, layer, name, values[n]) for n, m in enumerate(measures) for layer, (name, values) in enumerate(found)]
    index = np.array([layer + 1 for _, layer, _, _ in rows])
    signed = [getattr(m, "signed", False) for m, *_ in rows]
    values = [value for *_, value in rows]
    return frames.tidy(
        {
            "layer": [name for _, _, name, _ in rows],
            "index": index,
            "depth_from_output": len(found) - index,
            "target": None,
            "quantity": [m.quantity for m, *_ in rows],
            "value": [value.value for value in values],
            "log10_value": [np.nan if s else v.log10_value for s, v in zip(signed, values, strict=True)],
            "log10_stderr_probe": 0.0,
            "log10_stderr_sample": [np.nan if s else v.log10_stderr for s, v in zip(signed, values, strict=True)],
            "stderr_sample": [value.stderr for value in values],
            "reduction": None,
            "coupled": None,
            "num_probes": 0,
            "num_samples": batch.size,
        }
    )
