"""Elementwise activations with their derivatives and kinks, by name or made of a callable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray = npt.NDArray[np.float64]
Function = Callable[[FloatArray], FloatArray]

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


@dataclass(frozen=True)
class Activation:
    """phi and phi', elementwise on float64 arrays.  ``kinks``: where either of them is not smooth."""

    name: str
    function: Function
    derivative: Function
    kinks: tuple[float, ...] = ()

    def __call__(self, h: FloatArray) -> FloatArray:
        """phi(h)."""
        return self.function(h)


def _exponential(alpha: float, scale: float) -> tuple[Function, Function]:
    def function(h: FloatArray) -> FloatArray:
        return np.where(h > 0, scale * h, scale * alpha * np.expm1(np.minimum(h, 0)))

    def derivative(h: FloatArray) -> FloatArray:
        return np.where(h > 0, scale, scale * alpha * np.exp(np.minimum(h, 0)))

    return function, derivative


def _normal_cdf(h: FloatArray) -> FloatArray:
    return special.ndtr(h)


def _normal_pdf(h: FloatArray) -> FloatArray:
    return np.exp(-np.square(h) / 2) / math.sqrt(2 * math.pi)


def _leaky(slope: float) -> tuple[Function, Function]:
    return lambda h: np.where(h > 0, h, slope * h), lambda h: np.where(h > 0, 1.0, slope)


def _clipped(low: float, high: float) -> tuple[Function, Function]:
    return lambda h: np.clip(h, low, high), lambda h: ((h > low) & (h < high)).astype(np.float64)


NAMED: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("linear", lambda h: h * 1.0, np.ones_like),
        Activation("relu", *_leaky(0.0), kinks=(0.0,)),
        Activation("leaky_relu", *_leaky(0.01), kinks=(0.0,)),
        Activation("elu", *_exponential(1.0, 1.0), kinks=(0.0,)),
        Activation("selu", *_exponential(SELU_ALPHA, SELU_SCALE), kinks=(0.0,)),
        Activation("tanh", np.tanh, lambda h: 1 - np.square(np.tanh(h))),
        Activation("sigmoid", special.expit, lambda h: special.expit(h) * special.expit(-h)),
        Activation("erf", special.erf, lambda h: 2 / math.sqrt(math.pi) * np.exp(-np.square(h))),
        Activation("gelu", lambda h: h * _normal_cdf(h), lambda h: _normal_cdf(h) + h * _normal_pdf(h)),
        Activation(
            "silu",
            lambda h: h * special.expit(h),
            lambda h: special.expit(h) * (1 + h * special.expit(-h)),
        ),
        Activation("softplus", lambda h: np.logaddexp(0, h), special.expit),
        Activation("sin", np.sin, np.cos),
        Activation("square", np.square, lambda h: 2 * h),
        Activation("abs", np.abs, np.sign, kinks=(0.0,)),
        Activation("hard_tanh", *_clipped(-1.0, 1.0), kinks=(-1.0, 1.0)),
        Activation("relu6", *_clipped(0.0, 6.0), kinks=(0.0, 6.0)),
    )
}


def as_activation(given: str | Function | Activation, kinks: tuple[float, ...] = ()) -> Activation:
    """An `Activation` from a name, a callable on arrays, or itself.

    The derivative of a callable is a central difference of sixth order, right to about 1e-9; ``kinks`` are where it
    must not reach across, so give those of the function.

    Raises:
        ValueError: An unknown name (the nearest is offered); a callable that is not elementwise, or not finite on
            [-8, 7].
    """
    if isinstance(given, Activation):
        return given
    if isinstance(given, str):
        if given not in NAMED:
            close = get_close_matches(given, NAMED, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"activation must be one of {', '.join(NAMED)}, or a callable; got {given!r}{hint}")
        return NAMED[given]
    if not callable(given):
        raise ValueError(f"activation must be a name or a callable, got {type(given).__name__}.")
    name = getattr(given, "__name__", type(given).__name__)
    probe = np.linspace(-8, 7, 61)
    with np.errstate(all="ignore"):
        whole = np.asarray(given(probe), dtype=np.float64)
        alone = np.concatenate([np.ravel(given(part)) for part in np.split(probe, len(probe))])
    if whole.shape != probe.shape or not np.allclose(whole, alone, rtol=1e-9, equal_nan=True):
        raise ValueError(f"activation {name!r} is not elementwise: an entry's value depends on other entries.")
    if not np.isfinite(whole).all():
        raise ValueError(f"activation {name!r} is not finite at {probe[~np.isfinite(whole)][0]:g}.")
    corners = tuple(sorted(kinks))
    return Activation(name, given, _difference(given, corners), corners)


def _difference(function: Function, kinks: tuple[float, ...]) -> Function:
    """Sixth-order differences, one-sided next to a kink: of a polynomial through points on the same side."""
    step = 0.01
    central = np.array([-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60])

    def derivative(h: FloatArray) -> FloatArray:
        h = np.asarray(h, dtype=np.float64)
        reach = np.full(h.shape, np.inf)
        for kink in kinks:
            reach = np.minimum(reach, np.abs(h - kink))
        own = np.clip(reach / 4, 1e-7, step)
        # Where the kink is nearer than the rounding allows a central difference, go one way, away from it.
        side = np.zeros(h.shape)
        for kink in kinks:
            side = np.where(np.abs(h - kink) < 4e-4, np.where(h >= kink, 1.0, -1.0), side)
        middle = sum(c * function(h + k * own) for k, c in zip(range(-3, 4), central, strict=True)) / own
        forward = np.array([-49 / 20, 6, -15 / 2, 20 / 3, -15 / 4, 6 / 5, -1 / 6])
        stride = np.where(side == 0, 1.0, side) * step
        one_sided = sum(c * function(h + k * stride) for k, c in enumerate(forward)) / stride
        return np.where(side == 0, middle, one_sided)

    return derivative
