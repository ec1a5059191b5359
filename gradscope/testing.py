"""Assertions about gradients for your own test suite.

    def test_gradients_neither_explode_nor_vanish():
        gs.testing.assert_growth(build_model(), batch, low=0.98, high=1.02)

The AssertionError shows the measured numbers and, for a model, names the layer to look at.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.backward.cotangents import Probes
from gradscope.choices import Nonnegative, Positive, Share, check_choice, checked, stacklevel
from gradscope.coefficients.growth import trunk_of
from gradscope.coefficients.gsc import gsc, whole
from gradscope.coefficients.profiles import Profile
from gradscope.estimates import Estimate
from gradscope.forward.inputs import Forward, as_batch
from gradscope.forward.layers import LayerFilter
from gradscope.jacobians.capture import capture
from gradscope.measures.activation import SampleCosine
from gradscope.norms import qm_norm
from gradscope.operators import LinearOperator

__all__ = ["assert_growth", "assert_no_collapse", "assert_qm_norm", "assert_total"]

# What to do if the interval contains a bound.
Undecided = Literal["warn", "fail", "pass"]
MOST_LINES = 16
ROUNDING = 1e-9


@checked
def assert_growth(
    model: nn.Module,
    data: Any,
    *,
    low: Positive = 0.98,
    high: Positive = 1.02,
    undecided: Undecided = "warn",
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    probes: Probes = "auto",
    generator: torch.Generator | None = None,
) -> Profile:
    """Assert that GSC (squared convention) grows by a factor within [low, high] per layer; return the profile.

    The assertion fails if the whole 95 % interval of the factor (`gradscope.growth`) lies outside [low, high].

    Arguments:
        model, data, forward, layers, probes, generator: As for `gradscope.gsc`.
        low, high: Bounds of the factor per layer, in the direction from the output to the input.
        undecided: What to do if the 95 % interval of the factor contains ``low`` or ``high``: "warn", "fail", or "pass"
            silently.  Many layers and samples make the interval narrow.

    Raises:
        AssertionError: The whole 95 % interval of the factor is outside [low, high].  The message has the profile.
            It also names the first layer whose factor violates the same bound, and the layer whose factor does so most.
        ValueError: There are fewer than six layers (use `assert_total`), or ``low > high``.  Or the model has several
            inputs and ``layers`` is None: the default profile then leaves out all layers before the point where the
            paths from the inputs meet.

    >>> import torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=8, width=20, init="orthogonal", activation="linear")
    >>> gs.testing.assert_growth(model.double(), torch.ones(4, 20).double(), undecided="fail")
    Profile(8 layers to 'layers.7', exact, 4 samples)
    """
    __tracebackhide__ = True
    _check_bounds(low, high, undecided)
    profile = _profile(model, data, forward=forward, layers=layers, probes=probes, generator=generator)
    try:
        growth = profile.growth()
    except ValueError as reason:
        raise ValueError(f"{reason} For a network with few layers, bound the total: gs.testing.assert_total.") from None
    rows = trunk_of(profile.rows_to())
    layers, values = rows["layer"].tolist(), rows["log10_value"].to_numpy()
    steps = -np.diff(values) / np.maximum(np.diff(rows["index"].to_numpy()), 1)
    found = f"GSC grows by {growth.rate:.4f} per layer (95 % interval {growth.rate_low:.4f} to {growth.rate_high:.4f})"
    # Rounding of an exact line must not put it outside a bound that it equals.
    if growth.rate_low > high * (1 + ROUNDING) or growth.rate_high < low * (1 - ROUNDING):
        beyond = steps - math.log10(high) if growth.rate_low > high else math.log10(low) - steps
        worst = int(np.argmax(beyond))
        first = int(np.argmax(beyond > 0)) if beyond[worst] > 0 else worst
        raise AssertionError(
            f"{found}, outside [{low:g}, {high:g}].\n"
            f"First layer outside: {layers[first + 1]!r} (factor {10 ** steps[first]:.4g}); worst layer: "
            f"{layers[worst + 1]!r} ({10 ** steps[worst]:.4g}).\n"
            + _printed(profile.layers, profile.log10_values[:, 0], "log10 GSC = ")
        )
    if not (growth.rate_low >= low * (1 - ROUNDING) and growth.rate_high <= high * (1 + ROUNDING)):
        more = "more layers, more samples or wider bounds would decide"
        _undecided(f"{found}: the interval contains a bound of [{low:g}, {high:g}]; {more}.", undecided)
    return profile


@checked
def assert_total(
    model: nn.Module,
    data: Any,
    *,
    low: Positive,
    high: Positive,
    undecided: Undecided = "warn",
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    probes: Probes = "auto",
    generator: torch.Generator | None = None,
) -> Profile:
    """Assert that GSC (squared convention) from the input to the output is within [low, high]; return the profile.

    With ``layers``, the first chosen layer takes the place of the input.  The assertion also works for networks with
    too few layers for a growth rate.  GSC is that of this network on this batch, so it is uncertain only because of
    random probes.

    Arguments:
        model, data, forward, layers, probes, generator: As for `gradscope.gsc`.
        low, high: Bounds of GSC.
        undecided: What to do if the 95 % interval of GSC contains ``low`` or ``high``: "warn", "fail", or "pass"
            silently.

    Raises:
        AssertionError: The whole 95 % interval of GSC is outside [low, high].  The message has the profile, and the
            layer at which GSC changes most.
        ValueError: ``low > high``.  Or the model has several inputs and ``layers`` is None: the default profile then
            leaves out all layers before the point where the paths from the inputs meet.

    >>> import torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=2, width=20, init="orthogonal", activation="linear")
    >>> gs.testing.assert_total(model.double(), torch.ones(4, 20).double(), low=0.99, high=1.01)
    Profile(2 layers to 'layers.1', exact, 4 samples)
    """
    __tracebackhide__ = True
    _check_bounds(low, high, undecided)
    profile = _profile(model, data, forward=forward, layers=layers, probes=probes, generator=generator)
    total = float(profile.log10_values[0, 0])
    ends = [float(end[0, 0]) for end in profile.interval()]
    known = not any(map(math.isnan, ends))
    lowest, highest = ends if known else (total, total)
    interval = f" (95 % interval 10^{lowest:.3f} to 10^{highest:.3f})" if lowest < highest else ""
    found = f"GSC from {profile.layers[0]!r} to {profile.target!r} is 10^{total:.3f}{interval}"
    bounds = f"[{low:g}, {high:g}]"
    if not (lowest <= math.log10(high) and highest >= math.log10(low)):
        steps = -np.diff(profile.log10_values[:, 0])
        worst = int(np.argmax(np.abs(steps)))
        raise AssertionError(
            f"{found}, outside {bounds}.\nLargest change: {profile.layers[worst + 1]!r} (factor "
            f"{10 ** steps[worst]:.4g}).\n" + _printed(profile.layers, profile.log10_values[:, 0], "log10 GSC = ")
        )
    if not known:
        _undecided(f"{found}; its error is unknown with one probe: use more probes.", undecided)
    elif not (math.log10(low) <= lowest and highest <= math.log10(high)):
        _undecided(f"{found}: the interval contains a bound of {bounds}; more probes would decide.", undecided)
    return profile


def _profile(model: nn.Module, data: Any, **options: Any) -> Profile:
    """The profile; ValueError if its default rows leave out the layers before several inputs meet."""
    token = whole.set(True)
    try:
        return gsc(model, data, **options)
    finally:
        whole.reset(token)


@checked
def assert_no_collapse(
    model: nn.Module, data: Any, *, most: Share = 0.99, forward: Forward | None = None
) -> dict[str, float]:
    """Assert that the mean cosine between samples is below ``most`` at every unit; return the cosines by unit.

    A unit is a row of a default profile, such as a block of a ResNet.

    Arguments:
        model, data, forward: As for `gradscope.gsc`; the data are one batch of at least two samples.
        most: The limit.  A mean cosine of 1 means that all samples have the same direction.

    Raises:
        AssertionError: The cosine is ``most`` or larger at a unit, but not at the first unit.  The message names the
            first unit with such a cosine, and has all cosines.  A cosine that is already this large at the first unit,
            usually the input, is no fault of the network.
        ValueError: Fewer than two samples, ``most`` outside (0, 1], or no unit has the batch as the first dimension of
            its output.

    >>> import torch
    >>> import gradscope as gs
    >>> gs.testing.assert_no_collapse(torch.nn.Linear(2, 2).requires_grad_(), torch.eye(2), most=1)["input"]
    0.0
    """
    __tracebackhide__ = True
    if as_batch(data, forward=forward).size < 2:
        raise ValueError("Collapse is a property of several samples: give a batch of at least two.")
    captured = capture(model, data, forward=forward)
    units = [u for u in captured.units if u.shape[:1] == (captured.batch_size,) and len(u.shape) > 1]
    values = captured.replay.outputs([name for unit in units for name in unit.names], {})
    known = {unit.name: [values[name] for name in unit.names if name in values] for unit in units}
    found = {name: SampleCosine()(own[0]).value for name, own in known.items() if own}
    if not found:
        raise ValueError("No unit of the trunk has the batch as its leading dimension: samples cannot be compared.")
    collapsed = [name for name, cosine in found.items() if cosine >= most]
    # If the data themselves are collapsed, the network is not at fault.
    if collapsed and collapsed[0] != next(iter(found)):
        raise AssertionError(
            f"Samples collapse at {collapsed[0]!r}: the mean cosine between samples is {found[collapsed[0]]:.4f}, "
            f"at least {most:g}. Cosines by layer:\n{_printed(found, found.values())}"
        )
    return found


@checked
def assert_qm_norm(
    operator: LinearOperator | Tensor | npt.NDArray[np.generic],
    expected: Nonnegative,
    *,
    rtol: Nonnegative = 1e-6,
    probes: int | str = "exact",
    generator: torch.Generator | None = None,
) -> None:
    """Assert that the quadratic mean norm |A|_F / sqrt(n) of an m x n matrix or operator A is ``expected``.

    Arguments:
        operator: A matrix, or a `gradscope.LinearOperator`.
        expected, rtol: The norm may differ from ``expected`` by up to ``rtol * expected``.  With random probes, three
            standard errors of the measured norm are added to this limit.
        probes, generator: As for `gradscope.qm_norm`, for operators only.

    Raises:
        AssertionError: The norm differs from ``expected`` by more than the tolerance.  The message has the measured
            norm and its standard error.
        ValueError: ``probes`` is given for a matrix, whose norm is always exact.

    >>> import torch
    >>> import gradscope as gs
    >>> gs.testing.assert_qm_norm(2 * torch.eye(3), 2)
    """
    __tracebackhide__ = True
    if probes != "exact" and not isinstance(operator, LinearOperator):
        raise ValueError(f"probes={probes!r} would be ignored, because the norm of a matrix is exact: leave it out.")
    if isinstance(operator, LinearOperator):
        found = qm_norm(operator, probes=probes, generator=generator)
    elif operator.ndim != 2:
        raise ValueError(f"operator must be one matrix, got shape {tuple(operator.shape)}.")
    else:
        found = Estimate.exact(float(qm_norm(operator)))
    allowed = rtol * abs(expected) + 3 * (found.stderr or 0.0)
    if not abs(found.value - expected) <= allowed:
        raise AssertionError(f"The qm norm is {found}, expected {expected:g} within {allowed:.2g}.")


def _check_bounds(low: Positive, high: Positive, undecided: str) -> None:
    if not 0 < low <= high:
        raise ValueError(f"low and high must be an interval of positive numbers, got {low!r} and {high!r}.")
    check_choice("undecided", undecided, get_args(Undecided))


def _undecided(message: str, what: Undecided) -> None:
    __tracebackhide__ = True
    if what == "fail":
        raise AssertionError(message)
    if what == "warn":
        warnings.warn(message, stacklevel=stacklevel())


def _printed(layers: Iterable[str], values: Iterable[float], label: str = "") -> str:
    """Return one line per layer; for a long network, leave out the lines in the middle."""
    lines = [f"  {name:<30} {label}{value:.4f}" for name, value in zip(layers, values, strict=True)]
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        lines[half:-half] = [f"  ... {len(lines) - MOST_LINES} more"]
    return "\n".join(lines)
