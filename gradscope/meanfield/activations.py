"""Elementwise activations with derivatives and kinks, by name or from a callable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import special

from gradscope.choices import Finite, check_choice, checked
from gradscope.meanfield.callables import derivative_of, find_kinks, jumps_at
from gradscope.meanfield.quadrature import FloatArray, Function

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


@checked
@dataclass(frozen=True)
class Activation:
    """An activation function phi with its derivative phi', both elementwise on float64 arrays.

    ``kinks`` are the points where phi or phi' is not smooth; numerical integrals are split there.  Where phi jumps, the
    jump is ignored in phi', as in automatic differentiation.

    >>> phi = NAMED["relu"]
    >>> phi(np.array([1.0, 2.0])), phi.derivative(np.array([-1.0, 2.0])), phi.kinks
    (array([1., 2.]), array([0., 1.]), (0.0,))
    """

    name: str
    function: Function
    derivative: Function
    kinks: tuple[Finite, ...] = ()

    def __call__(self, h: FloatArray) -> FloatArray:
        """phi(h)."""
        return self.function(h)

    @cached_property
    def jumps(self) -> tuple[float, ...]:
        """The kinks at which phi itself is discontinuous."""
        return tuple(kink for kink in self.kinks if jumps_at(self.function, kink))


ActivationLike = str | Function | Activation


def _exponential(alpha: float, scale: float) -> tuple[Function, Function]:
    return (
        lambda h: np.where(h > 0, scale * h, scale * alpha * np.expm1(np.minimum(h, 0))),
        lambda h: np.where(h > 0, scale, scale * alpha * np.exp(np.minimum(h, 0))),
    )


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
        Activation("gelu", lambda h: h * special.ndtr(h), lambda h: special.ndtr(h) + h * _normal_pdf(h)),
        Activation("silu", lambda h: h * special.expit(h), lambda h: special.expit(h) * (1 + h * special.expit(-h))),
        Activation("softplus", lambda h: np.logaddexp(0, h), special.expit),
        Activation("sin", np.sin, np.cos),
        Activation("square", np.square, lambda h: 2 * h),
        Activation("abs", np.abs, np.sign, kinks=(0.0,)),
        Activation("hard_tanh", *_clipped(-1.0, 1.0), kinks=(-1.0, 1.0)),
        Activation("relu6", *_clipped(0.0, 6.0), kinks=(0.0, 6.0)),
    )
}


@checked
def as_activation(given: ActivationLike, kinks: tuple[Finite, ...] = ()) -> Activation:
    """Return the `Activation` for a name or for a callable on arrays; an `Activation` is returned unchanged.

    A callable must return float64 or integers.  It is differentiated by finite differences, with an error of about
    1e-10.  Its kinks (points where the callable or one of its derivatives jumps) are searched on a grid from -512 to
    512.  The grid has steps of 5e-4 between -16 and 16, and of 0.02 beyond.  ``kinks`` are added to the kinks found.

    Raises:
        ValueError: The name is unknown, or ``kinks`` are given without a callable.  Or the callable does not take
            arrays, is not elementwise, returns another dtype, or is not finite at a test point in [-8, 7].  The
            derivative of the returned `Activation` raises ValueError near a kink that was not found, because finite
            differences fail there.

    Cost: 130,000 evaluations of a callable.

    >>> def shrink(h):
    ...     return np.where(abs(h) < 1, 0.0, h)
    >>> phi = as_activation(shrink)
    >>> phi.kinks, phi.jumps, phi.derivative(np.array([0.5, 2.0])).round(6)
    ((-1.0, 1.0), (-1.0, 1.0), array([0., 1.]))
    """
    if kinks and isinstance(given, (str, Activation)):
        raise ValueError("kinks can only be given with a plain callable; named activations know their kinks.")
    if isinstance(given, Activation):
        return given
    if isinstance(given, str):
        check_choice("activation", given, NAMED)
        return NAMED[given]
    if not callable(given):
        raise ValueError(f"activation must be a name, a callable or an Activation, got {type(given).__name__}.")
    name = getattr(given, "__name__", type(given).__name__)
    probe = np.linspace(-8, 7, 61)
    with np.errstate(all="ignore"):
        try:
            whole = np.asarray(given(probe))
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"activation {name!r} does not take a NumPy array of float64: {error}") from error
        if whole.dtype != np.float64 and whole.dtype.kind not in "biu":
            raise ValueError(
                f"activation {name!r} must return float64, got {whole.dtype}: the theory needs its digits."
            )
        alone = np.concatenate([np.ravel(given(part)) for part in np.split(probe, len(probe))])
    if whole.shape != probe.shape or not np.allclose(whole, alone, rtol=1e-9, equal_nan=True):
        raise ValueError(f"activation {name!r} is not elementwise: its value at one entry depends on other entries.")
    if not np.isfinite(whole).all():
        raise ValueError(f"activation {name!r} is not finite at {probe[~np.isfinite(whole)][0]:g}.")

    def function(h: FloatArray) -> FloatArray:
        with np.errstate(all="ignore"):  # values that are not finite are refused where they matter
            return np.asarray(given(np.array(h, dtype=np.float64)), dtype=np.float64)

    corners = tuple(sorted({*(float(kink) for kink in kinks), *find_kinks(function)}))
    return Activation(name, function, derivative_of(name, function, corners), corners)
