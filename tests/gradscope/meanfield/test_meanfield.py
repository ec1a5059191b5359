"""Theory against closed forms, tables of the literature, SciPy's adaptive quadrature and simulation in NumPy."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate

import gradscope.meanfield as mf
from gradscope.meanfield.maps import second_moment, slope_moment

INF = math.inf
RATES = {  # activation: no norm, layer norm, batch norm at B = infinity and 100, to the digits of the literature
    "relu": (1.0, 1.0, 1.466942, 1.483361),
    "tanh": (1.0, 1.177807, 1.177807, 1.187),
    "selu": (1.071575, 1.071575, 1.071575, 1.082),
    "sigmoid": (0.055721, 0.152827, 1.033592, None),
}


def arc(c):
    return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi


def arc_slope(c):
    return (math.pi - math.acos(c)) / math.pi


@pytest.mark.parametrize("activation", RATES)
def test_rates_of_the_literature(activation):
    none, layer, batch, hundred = RATES[activation]
    assert mf.gsc_rate(activation) == pytest.approx(none, abs=5.1e-7)
    assert mf.gsc_rate(activation, "layer") == pytest.approx(layer, abs=5.1e-7)
    assert mf.gsc_rate(activation, "batch") == pytest.approx(batch, abs=5.1e-7)
    if hundred is not None:
        digits = 5.1e-7 if activation == "relu" else 5.1e-4
        assert mf.gsc_rate(activation, "batch", 100) == pytest.approx(hundred, abs=digits)


def test_relu_with_batch_normalization_in_closed_form():
    assert mf.gsc_rate("relu", "batch") == pytest.approx(math.pi / (math.pi - 1), rel=1e-13)
    for B in (4, 5, 16, 32, 100, 256, 5000):
        c = -1 / (B - 1)
        expected = (arc_slope(c) + B - 1) / ((B - 3) * (1 - arc(c))) - 1 / (B - 3)
        # At B = 4 the density of y has inverse square roots at its ends, which panels resolve to 1e-8.
        assert mf.gsc_rate("relu", "batch", B) == pytest.approx(expected, rel=1e-11 if B > 5 else 1e-7), B
        assert mf.gsc_rate("linear", "batch", B) == pytest.approx((B - 2) / (B - 3), rel=1e-11), B


@pytest.mark.parametrize("activation", ["tanh", "selu", "gelu", "relu6"])
def test_batch_moments_by_simulation(activation):
    # The vectors of the derivation themselves: y = sqrt(B) G h / |G h|, a gradient that sums to zero, P and D as given.
    B, num = 7, 400_000
    rng, phi = np.random.default_rng(0), mf.as_activation(activation)
    h = rng.standard_normal((num, B))
    e = h - h.mean(axis=1, keepdims=True)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    y = math.sqrt(B) * e
    g = rng.standard_normal((num, B))
    centred = g - g.mean(axis=1, keepdims=True)
    moments = mf.batch_moments(phi, B)

    def projected(g):
        v = phi.derivative(y) * g
        v = v - v.mean(axis=1, keepdims=True)
        return np.square(v - e * (e * v).sum(axis=1, keepdims=True)).sum(axis=1)

    for value, samples in (
        (moments.square, np.square(phi(y)).mean(axis=1)),
        (moments.product, phi(y)[:, 0] * phi(y)[:, 1]),
        (moments.centred, projected(centred) / (B - 1)),
        (moments.independent, projected(g) / B),
    ):
        assert abs(samples.mean() - value) < 4.5 * samples.std() / math.sqrt(num)
    assert moments.inflation == B / (B - 3)


@pytest.mark.parametrize("activation", [*mf.NAMED])
def test_gaussian_expectations_against_adaptive_quadrature(activation):
    phi = mf.NAMED[activation]
    for q in (1e-4, 0.3, 1.0, 30.0):

        def density(h, q=q):
            return math.exp(-h * h / (2 * q)) / math.sqrt(2 * math.pi * q)

        for f, found in ((phi.function, second_moment(phi, q)), (phi.derivative, slope_moment(phi, q))):
            edges = sorted({-10 * math.sqrt(q), -math.sqrt(q), math.sqrt(q), 10 * math.sqrt(q), *phi.kinks})
            edges = [x for x in edges if abs(x) <= 10 * math.sqrt(q)]
            expected = sum(
                integrate.quad(lambda h: float(f(np.array(h))) ** 2 * density(h), a, b, epsabs=0, epsrel=1e-12)[0]  # noqa: B023
                for a, b in itertools.pairwise(edges)
            )
            assert float(found) == pytest.approx(expected, rel=1e-10), (q, f)


def test_derivatives_are_derivatives():
    h = np.array([-3.3, -0.7, -0.01, 0.02, 0.9, 2.5, 7.0])
    for phi in mf.NAMED.values():
        step = 1e-6
        np.testing.assert_allclose(phi.derivative(h), (phi(h + step) - phi(h - step)) / (2 * step), atol=1e-8)
        own = mf.as_activation(phi.function, phi.kinks)
        np.testing.assert_allclose(own.derivative(h), phi.derivative(h), atol=1e-8)
        assert float(slope_moment(own, 0.7)) == pytest.approx(float(slope_moment(phi, 0.7)), rel=1e-7)


@pytest.mark.parametrize("c", [-1.0, -0.97, -0.2, 0.0, 0.5, 0.99, 1 - 1e-6, 1.0])
def test_pairs_against_the_arc_cosine_kernel_and_arcsine(c):
    relu = mf.MeanField("relu", 2.0)
    assert relu.correlation(1.7, c) == pytest.approx(arc(c), rel=1e-10, abs=1e-15)
    assert relu.chi_c(1.7, c) == pytest.approx(arc_slope(c), rel=1e-10, abs=1e-15)
    q = 0.8
    erf = mf.MeanField("erf", 1.0)
    expected = 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q))  # Williams 1998
    assert erf.covariance(q, c) == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize(
    ("weight", "bias", "q", "chi"), [(1.69, 0.09, 0.607047, 0.939807), (2.0, 0.0, 0.617965, 1.105529)]
)
def test_tanh_fixed_points(weight, bias, q, chi):
    scales = mf.MeanField("tanh", weight, bias).depth_scales()
    assert (scales.length, scales.chi_1) == pytest.approx((q, chi), abs=5.1e-7)
    assert scales.gradient == pytest.approx(-1 / math.log(chi), rel=1e-4)
    layer = mf.MeanField("tanh", weight, bias)
    assert float(layer.length(scales.length)) == pytest.approx(scales.length, rel=1e-12)
    # The correlation decays to c* at the rate of xi_c, by iteration.
    c = scales.correlation + 0.01 * (1 if scales.correlation < 1 else -1)
    before = abs(c - scales.correlation)
    after = abs(layer.correlation(scales.length, c) - scales.correlation)
    assert after / before == pytest.approx(math.exp(-1 / scales.correlations), rel=0.02)


def test_critical_points():
    for weight, bias, digits in ((1.05, 2.006e-5, 4e-5), (2.0, 0.1038, 1e-4)):
        point = mf.critical_point("tanh", bias)
        assert point.weight_variance == pytest.approx(weight, abs=digits)
        scales = mf.MeanField("tanh", point.weight_variance, bias).depth_scales()
        assert scales.chi_1 == pytest.approx(1, abs=1e-9) and scales.length == pytest.approx(point.length, rel=1e-6)
    assert mf.critical_point("relu").weight_variance == pytest.approx(2)
    assert mf.critical_point("tanh").weight_variance == pytest.approx(1) and mf.critical_point("tanh").length == 0
    assert mf.weight_gain("relu") == pytest.approx(math.sqrt(2))
    rate = 1.05
    gain = mf.weight_gain("tanh", rate, 0.05)
    assert mf.MeanField("tanh", gain**2, 0.05).depth_scales().chi_1 == pytest.approx(rate, rel=1e-8)
    for point in mf.critical_line("gelu", [0.5, 1.0, 2.0]):
        layer = mf.MeanField("gelu", point.weight_variance, point.bias_variance)
        assert float(layer.length(point.length)) == pytest.approx(point.length, rel=1e-9)
        assert float(layer.chi(point.length)) == pytest.approx(1, rel=1e-9)


def test_a_phase_diagram_is_its_points():
    weights, biases = np.linspace(0.2, 4, 5), np.array([0.0, 0.05, 1.0])
    diagram = mf.phase_diagram("tanh", weights, biases)
    for i, weight in enumerate(weights):
        for j, bias in enumerate(biases):
            scales = mf.MeanField("tanh", weight, bias).depth_scales()
            assert diagram.length[i, j] == pytest.approx(scales.length, rel=1e-6, abs=1e-11)
            assert diagram.chi_1[i, j] == pytest.approx(scales.chi_1, rel=1e-6)
    assert np.isnan(mf.phase_diagram("relu", [1.0, 3.0], [0.1]).chi_1).tolist() == [[False], [True]]


def test_the_profile_of_tanh_saturates():
    predicted = mf.predict_mlp("tanh", 50, batch_size=100)
    for layers, root in ((1, 1.0853), (5, 1.153), (20, 1.1785), (50, 1.1844)):
        assert 10 ** ((predicted.log10_gsc[0] - predicted.log10_gsc[layers]) / 2) == pytest.approx(root, abs=5.1e-5)
    assert predicted.preactivation_std[-1] == pytest.approx(0.10, abs=0.005)
    assert predicted.sign_diversity[0] == pytest.approx(0.460, abs=5e-4)
    relu = mf.predict_mlp("relu", 50, batch_size=100, weight_variance=2.0)
    assert np.abs(relu.log10_gsc).max() < 1e-12
    assert relu.sign_diversity[-1] == pytest.approx(0.03, abs=0.01)


def test_profiles_tend_to_the_rate():
    for activation, norm, variance in (("relu", "batch", 2.0), ("tanh", "layer", 1.0), ("selu", "none", 1.0)):
        log10_gsc = mf.predict_mlp(activation, 30, batch_size=40, norm=norm, weight_variance=variance).log10_gsc
        slope = -np.diff(log10_gsc)[10:-1]
        expected = math.log10(mf.gsc_rate(activation, norm, 40 if norm == "batch" else None))
        np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_sign_diversity_by_simulation():
    from gradscope.meanfield.prediction import _sign_diversity

    rng, B = np.random.default_rng(0), 9
    for shared, own in ((0.0, 1.0), (0.5, 0.5), (4.0, 0.05)):
        h = math.sqrt(shared) * rng.standard_normal((200_000, 1)) + math.sqrt(own) * rng.standard_normal((200_000, B))
        positive = (h > 0).sum(axis=1)
        minority = np.minimum(positive, B - positive) / B
        error = minority.std() / math.sqrt(len(minority))
        assert abs(minority.mean() - _sign_diversity(shared, own, B)) < 4.5 * error


def test_sign_diversity_after_batch_normalization_by_simulation():
    rng, B = np.random.default_rng(0), 100
    h = rng.standard_normal((40_000, B))
    positive = (h > h.mean(axis=1, keepdims=True)).sum(axis=1)
    predicted = mf.predict_mlp("tanh", 2, batch_size=B, norm="batch").sign_diversity
    np.testing.assert_allclose(predicted, (np.minimum(positive, B - positive) / B).mean(), atol=1e-3)


def test_nonlinearity_coefficients():
    assert mf.elementwise_nlc("square") == pytest.approx(math.sqrt(2), rel=1e-12)
    assert mf.elementwise_nlc("relu") == pytest.approx(1.21117, abs=5e-6)
    assert mf.elementwise_nlc("tanh") == pytest.approx(1.08527, abs=5e-6)
    c = 0.0
    for layers in range(1, 51):
        c = arc(c)
        if layers in (1, 2, 10, 50):
            assert mf.network_nlc([mf.MeanField("relu", 2.0)] * layers) == pytest.approx(1 / math.sqrt(1 - c), rel=1e-8)
    assert mf.network_nlc([mf.MeanField("linear", 3.0, 0.4)] * 9, 2.0, 0.3) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("activation", "variance"), [("linear", 1.0), ("relu", 2.0), ("tanh", 1.5)])
def test_the_spread_of_gradients_at_finite_width(activation, variance):
    # Squared gradients of 4,000 random networks; theory is first order in 1 / n, so n is large against the layers.
    rng, n, layers, num = np.random.default_rng(1), 90, 3, 4000
    phi = mf.as_activation(activation)
    q = mf.MeanField(phi, variance).fixed_length()
    logs = []
    for _ in range(num // 8):
        g = rng.standard_normal((8, n))
        for _ in range(layers):
            weights = rng.standard_normal((8, n, n), dtype=np.float32)
            back = math.sqrt(variance / n) * (g.astype(np.float32)[:, None] @ weights)[:, 0]
            g = phi.derivative(math.sqrt(q) * rng.standard_normal((8, n))) * back.astype(np.float64)
        logs.append(np.log(np.square(g).sum(axis=1)))
    logs = np.concatenate(logs) - math.log(n)
    own = np.log(np.square(rng.standard_normal((num, n))).mean(axis=1)).var()  # the spread of the cotangent itself
    expected = layers * mf.log_gradient_variance(phi, n, q)
    assert logs.var() - own == pytest.approx(expected, rel=0.12)


def test_residual_laws():
    assert mf.residual_rate(1.5, 2.0) == pytest.approx((4 + 1.5) / 5)
    assert mf.residual_rate(1.5, 0.0) == 1.5 and mf.residual_rate(1.5, INF) == 1
    # ReLU blocks without normalization: lengths and gradients grow by 1 + sv2 sw2 / 2, GSC stays 1.
    block = mf.LayerSpec.of("relu", 2.0, branch_variance=0.7)
    predicted = mf.predict([block] * 20, batch_size=50)
    assert np.abs(predicted.log10_gsc).max() < 1e-12
    np.testing.assert_allclose(predicted.mean_square[1:] / predicted.mean_square[:-1], 1.7, rtol=1e-12)
    # Diluted tanh blocks with layer normalization: each follows the law at its own dilution.
    block = mf.LayerSpec.of("tanh", 1.0, norm="layer", branch_variance=1.0)
    predicted = mf.predict([block] * 20, batch_size=50)
    tanh = float(second_moment(mf.NAMED["tanh"], 1.0))
    dilution = np.sqrt(predicted.mean_square[:-1] / tanh)
    laws = [mf.residual_rate(mf.gsc_rate("tanh", "layer"), k) for k in dilution]
    np.testing.assert_allclose(10 ** -np.diff(predicted.log10_gsc), laws, rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mf.gsc_rate("rellu"), "activation.*'relu'"),
        (lambda: mf.gsc_rate("relu", "batch", 3), "batch_size.*got 3"),
        (lambda: mf.gsc_rate("relu", "none", 8), "batch_size.*'none'"),
        (lambda: mf.gsc_rate("relu", "layr"), "norm.*'layer'"),
        (lambda: mf.gsc_rate("relu", "layer", q=2.0), "q .*'layer'"),
        (lambda: mf.gsc_rate("tanh", q=-2.0), "q .*-2"),
        (lambda: mf.gsc_rate(np.zeros_like), "zeros_like.*no rate"),
        (lambda: mf.MeanField("tanh", -1.0), "weight_variance.*-1"),
        (lambda: mf.MeanField("tanh", 1.0, math.nan), "bias_variance.*nan"),
        (lambda: mf.MeanField("tanh", 1.0, keep=0.0), "keep"),
        (lambda: mf.MeanField("relu", 3.0, 0.1).fixed_length(), "relu.*weight_variance=3"),
        (lambda: mf.LayerSpec.of("relu", 2.0, branch_variance=-1.0), "branch_variance.*-1"),
        (lambda: mf.as_activation(lambda h: h / h.sum()), "not elementwise"),
        (lambda: mf.as_activation(lambda h: np.log(np.where(h < 0, 0, h + 1))), "not finite at -8"),
        (lambda: mf.as_activation(7), "given must be .* a function of 1 argument .* got 7"),
        (lambda: mf.as_activation("relu", kinks=(1.0,)), "kinks"),
        (lambda: mf.batch_moments(np.ones_like, 8), "ones_like.*constant"),
        (lambda: mf.critical_point("relu", 0.1), "relu.*bias_variance=0.1"),
        (lambda: mf.critical_point("relu", -1.0), "bias_variance"),
        (lambda: mf.critical_point("relu", chi=0.0), "chi"),
        (lambda: mf.critical_line("sigmoid", [1.0]), "sigmoid"),
        (lambda: mf.predict([], batch_size=8), "layer"),
        (lambda: mf.predict_mlp("relu", 3, batch_size=1), "batch_size"),
        (lambda: mf.predict_mlp("relu", 3, batch_size=8, correlation=2), "correlation"),
        (lambda: mf.predict_mlp("relu", 3, batch_size=8, weight_variance=0.0), "Layer 1 .*0"),
        (lambda: mf.residual_rate(1.0, -1.0), "dilution.*-1"),
        (lambda: mf.network_nlc([mf.MeanField("relu", 2.0)], correlation=1.0), "infinite"),
        (lambda: mf.log_gradient_variance("relu", 0.5), "width"),
        (lambda: mf.phase_diagram("tanh", [-1.0], [0.0]), "weight_variances"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
