"""Expectations against closed forms and composite Gauss-Legendre with known kinks, and refusals where they fail."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import special

import gradscope.meanfield as mf
from gradscope.meanfield.maps import second_moment, slope_moment
from gradscope.meanfield.quadrature import Integral, exact, expectation


def fine(function, breaks=(), q=1.0):
    """E[function(sqrt(q) z)] by 24 Gauss-Legendre nodes on each of at least 480 panels, which end at ``breaks``."""
    reach = 12 * math.sqrt(q)
    ends = np.unique(np.clip([*np.linspace(-reach, reach, 481), *breaks], -reach, reach))
    x, w = np.polynomial.legendre.leggauss(24)
    half, middle = np.diff(ends)[:, None] / 2, ((ends[1:] + ends[:-1]) / 2)[:, None]
    h = middle + half * x
    return float((half * w * function(h) * np.exp(-(h**2) / (2 * q)) / math.sqrt(2 * math.pi * q)).sum())


def bump(h, at=0.3):
    return np.exp(-np.square((h - at) / 1e-3) / 2)


INTEGERS = np.arange(-40, 41)
PEAK = np.linspace(-0.02, 0.02, 81)
CALLABLES = {  # function, derivative almost everywhere, its kinks (for the truth only), q
    "hard shrink": (lambda h: np.where(abs(h) > 0.5, h, 0), lambda h: abs(h) > 0.5, [-0.5, 0.5], 1),
    "soft shrink": (lambda h: np.sign(h) * np.maximum(abs(h) - 0.37, 0), lambda h: abs(h) > 0.37, [-0.37, 0.37], 1),
    "kink at pi / 7": (lambda h: np.maximum(h - math.pi / 7, 0), lambda h: h > math.pi / 7, [math.pi / 7], 30),
    "kink at 20": (lambda h: h + np.maximum(h - 20, 0), lambda h: 1 + (h > 20), [20], 400),
    "kink, flat": (lambda h: h + 0.01 * abs(h - 1.7), lambda h: 1 + 0.01 * np.sign(h - 1.7), [1.7], 1),
    "kink in the slope": (lambda h: np.maximum(h - 0.3, 0) ** 2, lambda h: 2 * np.maximum(h - 0.3, 0), [0.3], 1),
    "oscillating": (lambda h: np.sin(20 * h), lambda h: 20 * np.cos(20 * h), [], 1),
    "oscillating faster": (lambda h: np.sin(h**2), lambda h: 2 * h * np.cos(h**2), [], 1),
    "steep": (lambda h: np.tanh(1e4 * h), lambda h: 1e4 / np.cosh(np.minimum(abs(1e4 * h), 300)) ** 2, PEAK, 1),
    "exploding": (np.exp, np.exp, [], 1),
    "sign and slope": (lambda h: np.sign(h - 0.1) + h, np.ones_like, [0.1], 1),
    "floor and slope": (lambda h: np.floor(h) + h, np.ones_like, INTEGERS, 1),
    "narrow peak": (lambda h: h + bump(h), lambda h: 1 - (h - 0.3) * 1e6 * bump(h), 0.3 + PEAK, 1),
}


@pytest.mark.parametrize("case", CALLABLES)
def test_kinks_and_jumps_of_callables_are_found(case):
    function, derivative, breaks, q = CALLABLES[case]
    square = fine(lambda h: function(h) ** 2, breaks, q)
    slope = fine(lambda h: np.asarray(derivative(h), dtype=float) ** 2, breaks, q)
    phi = mf.as_activation(function)
    assert float(second_moment(phi, q)) == pytest.approx(square, rel=1e-10)
    assert float(slope_moment(phi, q)) == pytest.approx(slope, rel=1e-8)
    assert mf.gsc_rate(function, q=q) == pytest.approx(q * slope / square, rel=1e-8)
    assert mf.gsc_rate(function, "batch") == pytest.approx(
        fine(lambda h: np.asarray(derivative(h), dtype=float) ** 2, breaks)
        / (fine(lambda h: function(h) ** 2, breaks) - fine(function, breaks) ** 2),
        rel=2e-8,
    )


@pytest.mark.parametrize("q", [1e-6, 1.0, 1e3, 1e6])
def test_sine_in_closed_form(q):
    square, slope = -math.expm1(-2 * q) / 2, (1 + math.exp(-2 * q)) / 2
    assert float(second_moment(mf.NAMED["sin"], q)) == pytest.approx(square, rel=1e-10)
    assert mf.gsc_rate("sin", q=q) == pytest.approx(q * slope / square, rel=1e-10)


@pytest.mark.parametrize("q", [0.5, 4.0, 25.0])
def test_heavy_tails_are_not_cut_off(q):
    assert float(second_moment(mf.as_activation(np.exp), q)) == pytest.approx(math.exp(2 * q), rel=1e-10)


def test_the_derivative_of_a_step_is_zero_almost_everywhere():
    for step in (np.sign, np.floor, np.round):
        assert mf.gsc_rate(step, q=1.0) == 0
    assert mf.as_activation(np.sign).jumps == (0.0,) and mf.NAMED["relu"].jumps == ()
    assert mf.MeanField(np.sign, 1.0).covariance(2.0, 0.5) == pytest.approx(1 / 3, rel=1e-10)
    assert mf.MeanField(np.sign, 1.0).fixed_correlation(1.0) == 0
    # With biases, c is a fixed point of (2 / pi arcsin(c) + 1 / 2) / (3 / 2).
    c = mf.MeanField(np.sign, 1.0, 0.5).fixed_correlation()
    assert (2 / math.pi * math.asin(c) + 0.5) / 1.5 == pytest.approx(c, rel=1e-10) and c < 0.9
    with pytest.raises(ValueError, match=r"sign jumps at 0.*correlation"):
        mf.MeanField(np.sign, 1.0, 0.5).depth_scales()


def test_undeclared_kinks_of_an_activation_are_found_by_bisection():
    function, slope = lambda h: np.maximum(h - 0.4321, 0), lambda h: (h > 0.4321) * 1.0
    plain, named = mf.Activation("shifted", function, slope), mf.Activation("shifted", function, slope, (0.4321,))
    assert mf.gsc_rate(plain, q=1.0) == pytest.approx(mf.gsc_rate(named, q=1.0), rel=1e-10)
    for c in (-0.5, 0.99):
        one, two = (mf.MeanField(phi, 1.0) for phi in (plain, named))
        assert one.covariance(1.0, c) == pytest.approx(two.covariance(1.0, c), rel=1e-10)
        assert one.chi_c(1.0, c) == pytest.approx(two.chi_c(1.0, c), rel=1e-10)
    assert mf.batch_moments(plain, 16).rate == pytest.approx(mf.batch_moments(named, 16).rate, rel=1e-10)
    assert mf.batch_moments(function, 16).rate == pytest.approx(mf.batch_moments(named, 16).rate, rel=1e-10)


def test_pairs_of_sines_in_closed_form():
    for q, c in ((1.0, 0.5), (5.0, 0.9), (100.0, 0.99)):
        expected = (math.exp(-q * (1 - c)) - math.exp(-q * (1 + c))) / 2
        assert mf.MeanField("sin", 1.0).covariance(q, c) == pytest.approx(expected, rel=1e-9)


def test_the_estimated_error_bounds_the_error():
    # Kinks and jumps at random places and near the ends of panels: E max(z - a, 0) and P(z > a).
    places = np.concatenate([np.random.default_rng(0).uniform(-3, 3, 60), [1 - 1e-3, 1e-9, -2 + 1e-6, 1.5 - 1e-4]])
    for a in places:
        pdf = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        for f, truth in (
            (lambda h, a=a: np.maximum(h - a, 0), pdf - a * special.ndtr(-a)),
            (lambda h, a=a: (h > a) * 1.0, special.ndtr(-a)),
        ):
            found = expectation(lambda h, f=f: exact(f(h)))
            assert abs(float(found.value) - truth) <= float(found.error) + 1e-15 and bool(found.known)


def test_fixed_points_of_a_grid_are_those_of_its_points_for_a_callable():
    weights, biases = np.array([0.5, 1.5, 3.0]), np.array([0.0, 0.3])
    shrink = lambda h: np.sign(h) * np.maximum(abs(h) - 0.37, 0)  # noqa: E731
    diagram = mf.phase_diagram(lambda h: np.tanh(shrink(h)), weights, biases)
    for i, weight in enumerate(weights):
        for j, bias in enumerate(biases):
            q = diagram.length[i, j]
            if q:
                again = weight * fine(lambda h: np.tanh(shrink(h)) ** 2, [-0.37, 0.37], q) + bias
                assert again == pytest.approx(q, rel=1e-9)


def test_the_slope_of_the_length_map():
    for name, q in (("relu", 2.0), ("erf", 0.7)):
        layer = mf.MeanField(name, 1.3, 0.4)
        scales = layer.depth_scales()
        q = scales.length
        expected = 1.3 / 2 if name == "relu" else 1.3 * 4 / math.pi / (1 + 2 * q) / math.sqrt(1 + 4 * q)
        assert scales.lengths == pytest.approx(-1 / math.log(expected), rel=1e-9)


def test_nlc_of_short_inputs_keeps_its_digits():
    # A short input sees the linear part: NLC - 1 = q (phi'' / phi')^2 / 4 + ..., and is 1 up to O(q).
    assert mf.elementwise_nlc("sigmoid", 1e-10) == pytest.approx(1, abs=1e-9)
    assert mf.elementwise_nlc("softplus", 1e-10) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mf.gsc_rate("sin", q=1e9), "sin at q = 1e.09 is known to .* only"),
        (lambda: mf.gsc_rate(lambda h: np.sqrt(h + 9), q=1.0), "not finite"),
        (lambda: mf.gsc_rate(np.sqrt), "sqrt.*not finite at -8"),
        (lambda: mf.gsc_rate(np.log), "log.*not finite at -8"),
        (lambda: mf.gsc_rate(np.exp, q=200.0), "exp at q = 200 .*not finite"),
        (lambda: mf.gsc_rate(np.exp), "without bound for exp"),
        (lambda: mf.gsc_rate(lambda h: np.exp(1j * h)), "float64, got complex128"),
        (lambda: mf.gsc_rate(lambda h: np.tanh(h.astype(np.float32))), "float64, got float32"),
        (lambda: mf.gsc_rate(lambda h: np.tanh(h.astype(np.float32)).astype(float), q=1.0), "known to|not known near"),
        (lambda: mf.gsc_rate(math.tanh), "tanh.*NumPy array"),
        (lambda: mf.gsc_rate(np.cbrt, q=1.0), "cbrt.*not known near"),  # E[phi'^2] is infinite
        (lambda: mf.gsc_rate(lambda h: np.sqrt(abs(h)), q=1.0), "not known near"),
        (lambda: mf.gsc_rate(lambda h: np.maximum(h - 1000, 0), q=1e6), "not known near 1000.*kinks"),
        (lambda: mf.gsc_rate(lambda h: np.round(h, 3), q=1.0), "known to .* only"),
        (lambda: mf.gaussian(lambda h: np.exp(h * h / 2)), "known to .* only"),
        (lambda: mf.gaussian_pair(np.sin, np.sin, 1e4, 0.5), "correlation 0.5 is known to"),
        (lambda: mf.batch_moments(lambda h: 1 + 1e-5 * np.tanh(h), 8), "constant up to rounding"),
        (lambda: mf.elementwise_nlc(np.ones_like), "constant"),
        (lambda: mf.elementwise_nlc("tanh", -1.0), "q .*-1"),
        (lambda: mf.gsc_rate(np.zeros_like, "layer"), "zeros_like.*no rate"),
        (lambda: mf.gsc_rate(np.zeros_like, q=1.0), "zeros_like.*no rate"),
        (lambda: mf.critical_point(np.sign, 0.1), "sign has slope 0"),
        (lambda: mf.critical_point(np.exp, 1e9), "No weight variance was found.*exp.*left out"),
        (lambda: mf.critical_line(np.sign), "sign has slope 0"),
        (lambda: mf.log_gradient_variance(np.sign, 10), "sign has slope 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value)) <= 400


def test_a_refusal_is_decided_by_the_error():
    known = Integral(np.array([2.0]), np.array([1.9e-8]), np.array([2.0]))
    assert known.checked("this").tolist() == [2.0]
    with pytest.raises(ValueError, match="this is known to 1e-08 only"):
        known._replace(error=np.array([2.1e-8])).checked("this")


def test_importing_the_package_does_not_import_the_heavy_parts_of_scipy():
    code = "import sys, gradscope; print([n for n in ('stats', 'optimize', 'sparse') if f'scipy.{n}' in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
