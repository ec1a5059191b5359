"""`measure(model, data)`: statistics of every layer's pre-activations and of its parameters' gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gradscope import frames
from gradscope.choices import Nonnegative, checked
from gradscope.estimates import Estimate
from gradscope.forward.inputs import Batch, Forward, LossFunction, as_batch, check_devices
from gradscope.forward.interrupts import interruptible
from gradscope.forward.modules import Modules, recording_gradients, unwrap
from gradscope.forward.state import alone, state_restored
from gradscope.forward.wrappers.sharding import of_whole
from gradscope.measures import activation, gradient
from gradscope.measures.blocks import PREACTIVATIONS, RESPONSES, SLOPES, Blockwise, Neurons, in_one_pass
from gradscope.measures.gradient import GRADIENTS
from gradscope.measures.layer_gradients import layer_gradients
from gradscope.measures.preactivations import by_part, nonlinearity_calls, response, slopes
from gradscope.measures.rank import EffectiveRank
from gradscope.measures.samples import Statistic, quiet
from gradscope.memory import Later, together


@runtime_checkable
class Measure(Protocol):
    """Protocol of a statistic of a layer: a pure function with the attributes ``quantity`` (name) and ``of`` (input).

    ``quantity`` is the name of the statistic in frames.  ``of`` says what the function receives:

    - ``"preactivations"``: the inputs of the nonlinearity, a tensor (B, ...).
    - ``"slopes"``: the derivatives of the nonlinearity at the pre-activations, a tensor (B, ...).
    - ``"responses"``: the pair of pre-activations and outputs of the nonlinearity.
    - ``"gradients"``: a `gradscope.measures.LayerGradient`.

    A statistic that can be negative also sets ``signed = True``.  On a GPU, each conversion to a Python number waits
    for the device.  Subclasses of `gradscope.measures.samples.Statistic` are converted together, with a single wait.

    >>> import torch
    >>> from gradscope import Estimate, Measure
    >>> class Largest:
    ...     quantity, of = "largest", "preactivations"
    ...     def __call__(self, h):
    ...         return Estimate.exact(float(h.abs().max()))
    >>> print(Largest()(torch.tensor([[1.0, -3.0]])))
    3 +- 0
    """

    @property
    def quantity(self) -> str: ...

    @property
    def of(self) -> str: ...

    def __call__(self, values: Any, /) -> Estimate: ...


PREACTIVATION_MEASURES: tuple[Measure, ...] = (
    activation.PreactivationMean(), activation.PreactivationStd(), activation.SignDiversity(),
    activation.SaturatedFraction(), activation.DeadFraction(), activation.Kurtosis(), EffectiveRank(),
    activation.SampleCosine(), activation.LinearFitError(),
)  # fmt: skip
GRADIENT_MEASURES: tuple[Measure, ...] = (
    gradient.GradientNorm(), gradient.GradientRms(), gradient.GradientZeroFraction(), gradient.GradientToWeight(),
    gradient.GradientCosine(), gradient.SignalToNoise(),
)  # fmt: skip

Begun = Estimate | tuple[Statistic, Later]
Found = list[tuple[str, list[Begun]]]


@of_whole
@checked
def measure(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    loss_fn: LossFunction | None = None,
    measures: Sequence[Measure] | None = None,
    learning_rate: Nonnegative | None = None,
) -> pd.DataFrame:
    """Return statistics of the input of every nonlinearity and, with a loss, of the gradient of every layer.

    Arguments:
        model: Any module; it is left exactly as it was.
        data: A tensor (B, ...) or a mapping; with ``loss_fn`` a pair (inputs, labels); with ``forward`` any batch.
        forward: A function ``(model, batch) -> output``.
        loss_fn: A function ``(output, labels) -> losses`` (B,), one per sample.
        measures: Statistics to compute (`gradscope.measures`, or your own).  Default: all statistics of
            pre-activations, and with ``loss_fn`` all statistics of gradients.
        learning_rate: If given, `gradscope.measures.UpdateToWeight` is also measured, for this learning rate.

    Returns:
        A tidy frame.  Each measure has one row per call of a nonlinearity (a module of torch.nn) or, for gradients, per
        module that holds trainable parameters.  ``index`` counts these calls or modules from 1.  The sampling error
        over the batch is ``log10_stderr_sample``, or ``stderr_sample`` for statistics that can be negative.

    Cost: one forward pass.  Gradients need a second forward pass, a backward pass of the mean loss, and a backward pass
    of the loss of each sample.  The backward passes of several samples run at once, as memory allows.  There is one
    device synchronization, and a second one if an effective rank needs another forward pass (see `EffectiveRank`).

    Raises:
        ValueError: The data are invalid, or only one of ``loss_fn`` and statistics of gradients is given.  Or the model
            calls no nonlinearity or has no trainable parameter, although a statistic needs one.
        FloatingPointError: A gradient is NaN or Inf; the message names the layer.

    >>> import torch
    >>> import gradscope as gs
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Tanh())
    >>> _ = torch.nn.init.eye_(model[0].weight)
    >>> x = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    >>> gs.measure(model, x, measures=[gs.measures.PreactivationStd()])[["layer", "quantity", "value"]]
      layer           quantity     value
    0     1  preactivation_std  1.581139
    """
    model = unwrap(model)
    by_default = PREACTIVATION_MEASURES + (GRADIENT_MEASURES if loss_fn is not None else ())
    chosen = list(by_default if measures is None else measures)
    if learning_rate is not None:
        chosen.append(gradient.UpdateToWeight(learning_rate))
    if not chosen:
        raise ValueError("measures= is an empty list; leave out measures= to compute all statistics.")
    if unknown := [m.quantity for m in chosen if m.of not in (PREACTIVATIONS, SLOPES, RESPONSES, GRADIENTS)]:
        raise ValueError(f"Measure {unknown[0]!r} needs of='preactivations', 'slopes', 'responses' or 'gradients'.")
    of_gradients = [m for m in chosen if m.of == GRADIENTS]
    if of_gradients and loss_fn is None:
        raise ValueError(
            f"{of_gradients[0].quantity!r} is a statistic of gradients: give loss_fn= and data=(inputs, labels)."
        )
    if loss_fn is not None and not of_gradients:
        raise ValueError(
            "loss_fn= would be ignored, because none of measures= is a statistic of gradients: leave out loss_fn=, or "
            "add one, such as gs.measures.GradientNorm()."
        )
    with interruptible() as whole, whole, together(), quiet():
        return begun(model, data, chosen, forward=forward, loss_fn=loss_fn)()


def begun(
    model: nn.Module, data: Any, measures: Sequence[Measure], *, forward: Forward | None, loss_fn: LossFunction | None
) -> Callable[[], pd.DataFrame]:
    """Compute on the device, without waiting for it, and return the function that reads the numbers into a frame.

    Both are called inside one context `together`.
    """
    batch = as_batch(data, forward=forward, loss_fn=loss_fn, finite=False)
    finite = Later(torch.isfinite(tensor).all() for tensor in batch.floats)
    finite.then(lambda: None if all(finite.arrays) else batch.check_finite())
    of_activations = [m for m in measures if m.of != GRADIENTS]
    of_gradients = [m for m in measures if m.of == GRADIENTS]
    activations, gradients = Found(), Found()
    try:
        if of_activations:
            activations = _activations(model, batch, forward, lambda call: of_activations)
        if of_gradients and loss_fn is not None:
            by_layer = layer_gradients(model, batch, forward=forward, loss_fn=loss_fn)
            gradients = [(name, [_begun(m, gradient) for m in of_gradients]) for name, gradient in by_layer.items()]
    except Exception:
        batch.check_finite()  # names the place of a NaN in x; otherwise the error stands
        raise

    def finished() -> pd.DataFrame:
        first = [(name, [_result(value, name) for value in values]) for name, values in activations]
        others = [[value for value in values if isinstance(value, Statistic)] for _, values in first]
        if any(others):
            second = _activations(model, batch, forward, others.__getitem__)
            found = iter([_result(value, name) for name, values in second for value in values])
            first = [(name, [next(found) if isinstance(v, Statistic) else v for v in values]) for name, values in first]
        last = [(name, [_result(value, name) for value in values]) for name, values in gradients]
        both = ((of_activations, first), (of_gradients, last))
        return pd.concat([_frame(own, found, batch.size) for own, found in both if found], ignore_index=True)

    return finished


def _begun(measure: Measure, values: Any) -> Begun:
    """A statistic with parts that are still on the device; a measure of any other class reads its own result."""
    if isinstance(measure, Statistic) and type(measure).__call__ is Statistic.__call__:
        return measure, Later(measure.parts(values))
    return measure(values)


def _all_begun(
    measures: Sequence[Measure], module: nn.Module, received: Tensor, rooms: dict[str, Tensor]
) -> list[Begun]:
    """The statistics of one call of a nonlinearity."""
    kind, sources = received.device.type, [partial(source, module) for source in (slopes, response)]
    exact = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
    if torch.is_autocast_enabled(kind):  # as the network does
        sources = [torch.autocast(kind, torch.get_autocast_dtype(kind))(source) for source in sources]
    neurons = Neurons(received, *sources, by_part=by_part(module), rooms=rooms)
    wholes: dict[str, Callable[[], Any]] = {
        PREACTIVATIONS: lambda: received,
        SLOPES: lambda: sources[0](received),
        RESPONSES: lambda: (received, sources[1](received)),
    }
    # The network may run under autocast, but the statistics must not: autocast would round them.
    with exact:
        shared = [m for m in measures if isinstance(m, Blockwise) and type(m).parts is Blockwise.parts]
        found: dict[int, Begun] = {
            id(m): (m, Later(parts)) for m, parts in zip(shared, in_one_pass(shared, neurons), strict=True)
        }
        return [found[id(m)] if id(m) in found else _begun(m, wholes[m.of]()) for m in measures]


def _result(begun: Begun, layer: str) -> Estimate | Statistic:
    """The estimate, or a statistic that must be computed instead."""
    return begun if isinstance(begun, Estimate) else begun[0].estimated(begun[1].arrays, layer)


def _activations(
    model: nn.Module, batch: Batch, forward: Forward | None, measures: Callable[[int], Sequence[Measure]]
) -> Found:
    """Statistics of every call of a nonlinearity, in execution order; ``measures`` of the number of a call."""
    modules: Modules = dict(model.named_modules())
    if forward is None:
        check_devices(modules, batch)
    found: Found = []
    rooms: dict[str, Tensor] = {}  # memory that all layers share

    def listen(name: str, module: nn.Module, received: Tensor) -> None:
        if received.is_complex():
            raise ValueError(
                f"Nonlinearity {name!r} receives complex numbers, but statistics of pre-activations are those of real "
                "ones: choose measures= of gradients."
            )
        received, own = received.detach(), measures(len(found))
        most = received.amax() if received.numel() else received.sum()  # NaN if any entry is NaN
        unknown = Later([most.isnan()])  # the sign of NaN would count as a sign
        unknown.then(partial(_check_known, name, unknown))
        found.append((name, _all_begun(own, module, received, rooms)))

    calls = nonlinearity_calls(modules, torch.no_grad()(listen))
    with alone, state_restored(modules) as state, state, calls, recording_gradients():
        batch.differentiable()[0].run(model, forward)
    if not found:
        raise ValueError(
            f"No nonlinearity module was called in model {type(model).__name__}: functional calls such as F.relu are "
            "not recorded. Use modules such as nn.ReLU(), or choose measures= of gradients only."
        )
    return found


def _check_known(name: str, unknown: Later) -> None:
    if unknown.arrays[0]:
        raise ValueError(
            f"Nonlinearity {name!r} receives NaN: gs.first_nonfinite(model, data) names the first layer that makes it."
        )


def _frame(measures: Sequence[Measure], found: Sequence[tuple[str, Sequence[Any]]], num_samples: int) -> pd.DataFrame:
    """One frame with the rows of all measures, one measure after the other."""
    rows = [(m, layer, name, values[n]) for n, m in enumerate(measures) for layer, (name, values) in enumerate(found)]
    used, places, names, values = zip(*rows, strict=True)
    index, signed = np.array(places) + 1, [getattr(m, "signed", False) for m in used]
    return frames.tidy(
        {
            "layer": names,
            "index": index,
            "depth_from_output": len(found) - index,
            "quantity": [m.quantity for m in used],
            "value": [value.value for value in values],
            "log10_value": [np.nan if s else v.log10_value for s, v in zip(signed, values, strict=True)],
            "log10_stderr_probe": 0.0,
            "log10_stderr_sample": [np.nan if s else v.log10_stderr for s, v in zip(signed, values, strict=True)],
            "stderr_sample": [value.stderr for value in values],
            "num_samples": num_samples,
        }
    )
