"""Random attention against closed forms, SciPy's quadrature, explicit sums and simulation of scores in NumPy."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special

import gradscope.meanfield as mf
from gradscope.meanfield.attention import Attention, softmax_moments
from gradscope.meanfield.kernels import activation_kernels


def kernel_of(T, seed=0, width=7, lengths=False):
    x = np.random.default_rng(seed).standard_normal((T, width)) + 0.5
    x = x if lengths else x / np.linalg.norm(x, axis=1, keepdims=True) * math.sqrt(width)
    return x @ x.T / width


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("variance", [1e-3, 0.5, 4.0, 50.0])
def test_moments_of_two_keys_by_quadrature(variance):
    def mean(function):  # the difference of the two scores has twice the variance
        weight = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
        value = lambda z: function(special.expit(math.sqrt(2 * variance) * z))  # noqa: E731
        return 2 * integrate.quad(lambda z: weight(z) * value(z), 0, 12, epsabs=1e-13, limit=200)[0]

    found = softmax_moments(np.array([variance]), np.array([2.0]))
    assert found.square[0] == pytest.approx(mean(lambda a: a**2 + (1 - a) ** 2), rel=1e-9)
    assert found.slope[0] == pytest.approx(mean(lambda a: 4 * (a * (1 - a)) ** 2), rel=1e-9)


def test_moments_of_many_keys_by_simulation():
    weights = softmax(1.5 * np.random.default_rng(0).standard_normal((40_000, 30)))
    squares = (weights**2).sum(axis=1)
    slopes = (weights**2 * (1 - 2 * weights + squares[:, None])).sum(axis=1)
    found = softmax_moments(np.array([2.25]), np.array([30.0]))
    for value, sample in ((found.square[0], squares), (found.slope[0], slopes)):
        assert abs(value - sample.mean()) < 4 * sample.std() / math.sqrt(len(sample))


def test_limit_of_infinitely_many_keys():
    assert mf.critical_score(0.0) == pytest.approx(math.sqrt(2))
    assert mf.critical_score(1.0) == math.inf
    for p in (0.0, 0.3, 1.0):
        below, above = mf.random_attention(p, 0.9 * min(mf.critical_score(p), 9)), mf.random_attention(p, 4.0)
        assert below.mean_square == pytest.approx(p)  # only what all tokens share is left
        assert above.mean_square == pytest.approx(p + (1 - p) * max(0, 1 - mf.critical_score(p) / 4))
    far = [abs(mf.random_attention(0.5, 4.0, keys).mean_square - 0.75) for keys in (1e3, 1e6, 1e9, 1e12)]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.015  # corrections are of order ln ln(keys) / ln(keys)


@pytest.mark.parametrize(("p", "beta"), [(0.0, 0.5), (0.4, 0.5), (0.4, 1.5), (0.8, 3.0)])
def test_finitely_many_keys_by_simulation(p, beta):
    keys, num = 40, 20_000
    rng, scale = np.random.default_rng(1), beta * math.sqrt(math.log(keys) * (1 - p))
    common, own = rng.standard_normal((num, keys)), rng.standard_normal((2, num, keys))
    first, second = (softmax(scale * (math.sqrt(p) * common + math.sqrt(1 - p) * z)) for z in own)
    square, product = ((1 - p) * (first * other).sum(axis=1) + p for other in (first, second))
    found = mf.random_attention(p, beta, keys)
    assert abs(found.mean_square - square.mean()) < 4 * square.std() / math.sqrt(num)
    # The product of two queries is exact at p = 0 and p = 1 and an interpolation between.
    assert found.mean_square * found.overlap == pytest.approx(product.mean(), rel=0.03)


@pytest.mark.parametrize("causal", [True, False])
def test_uniform_attention_is_an_average(causal):
    T, kernel, gradient = 6, kernel_of(6, lengths=True), kernel_of(6, seed=1)
    average = np.tril(np.ones((T, T))) if causal else np.ones((T, T))
    average /= average.sum(axis=1, keepdims=True)
    attention = Attention(kernel, 0.0, causal=causal)
    np.testing.assert_allclose(attention.output, average @ kernel @ average.T, rtol=1e-12)
    np.testing.assert_allclose(attention.backward(gradient), average.T @ gradient @ average, rtol=1e-12)


def test_uniform_attention_on_equal_overlaps():
    T, p = 9, 0.3
    output = Attention((1 - p) * np.eye(T) + p, 0.0, causal=False).output
    np.testing.assert_allclose(output, p + (1 - p) / T, rtol=1e-12)


def test_one_token_is_its_value():
    attention = Attention(np.array([[2.5]]), 3.0, causal=True)
    assert attention.output[0, 0] == pytest.approx(2.5, rel=1e-12)
    assert attention.backward(np.array([[0.7]]))[0, 0] == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("score_variance", "width", "tolerance"), [(0.05, 20, 0.005), (0.5, 300, 0.005), (2.0, 300, 0.02)]
)
def test_output_by_simulation_of_scores(causal, score_variance, width, tolerance):
    # Overlaps that differ (small width) are treated to first order in the score variance, equal ones to any order.
    T, num = 12, 10_000
    kernel = kernel_of(T, width=width)
    root = np.linalg.cholesky(kernel)
    scores = math.sqrt(score_variance) * root @ np.random.default_rng(0).standard_normal((num, T, T)) @ root.T
    weights = softmax(np.where(np.tril(np.ones((T, T))) > 0, scores, -np.inf) if causal else scores)
    samples = weights @ kernel @ weights.transpose(0, 2, 1)
    expected, error = samples.mean(axis=0), samples.std(axis=0) / math.sqrt(num)
    found = Attention(kernel, score_variance, causal=causal).output
    assert (np.abs(found - expected) < 4 * error + tolerance * expected).all()


def test_derivative_of_the_scores_by_explicit_sums():
    # At small scores, the derivative of softmax is that of uniform attention, and covariances are sums over 4 tokens.
    T, kernel, gradient = 5, kernel_of(5, lengths=True), kernel_of(5, seed=3)
    attention = Attention(kernel, 1e-9, causal=True)
    average = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    queries, keys = np.zeros((T, T)), np.zeros((T, T))
    for t in range(T):
        for u in range(T):
            left, right = np.eye(T) - average[t], np.eye(T) - average[u]  # (s, .): token s minus the mean
            centered = left @ kernel @ right.T
            weights = np.outer(average[t], average[u])
            queries[t, u] = gradient[t, u] * (weights * centered * kernel).sum()
            keys += gradient[t, u] * kernel[t, u] * weights * centered
    values = average.T @ gradient @ average
    found = (attention.backward(gradient) - values) / 1e-9
    # Values have a part of first order too, the change of E[A A], equal to that of the keys.
    np.testing.assert_allclose(found, queries + 2 * keys, atol=1e-6)


@pytest.mark.parametrize(("causal", "score_variance", "p"), [(True, 0.1, 0.0), (True, 3.0, 0.6), (False, 1.0, 0.3)])
def test_squared_jacobian_by_automatic_differentiation(causal, score_variance, p):
    T, d, heads, energies = 16, 512, 4, []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, generator=generator):
            return torch.randn(*shape, generator=generator)

        x = (math.sqrt(1 - p) * normal(T, d) + math.sqrt(p) * normal(1, d)).requires_grad_()
        query, key, value, out = (normal(d, d) / math.sqrt(d) for _ in range(4))
        q, k, v = (torch.stack((x @ w.T).chunk(heads, dim=1)) for w in (query, key, value))
        scores = math.sqrt(score_variance) * q @ k.mT / math.sqrt(d / heads)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf) if causal else scores
        y = torch.cat(list(scores.softmax(dim=-1) @ v), dim=1) @ out.T
        for cotangent in (normal(T, d), normal(T, d)):
            (gradient,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
            energies.append(float(gradient.square().sum()) / (T * d))
    kernel = (1 - p) * np.eye(T) + p
    found = np.trace(Attention(kernel, score_variance, causal=causal).backward(np.eye(T))) / T
    error = np.std(energies, ddof=1) / math.sqrt(len(energies))
    assert abs(found - np.mean(energies)) < 5 * error + 0.04 * found  # keys, queries: 20 % to 60 % of the energy


def test_kernels_of_activations_in_closed_form():
    kernel = kernel_of(8, width=5, lengths=True)
    q = np.diag(kernel)
    c = np.clip(kernel / np.sqrt(np.outer(q, q)), -1, 1)
    value, slope = activation_kernels(mf.as_activation("relu"), kernel)
    arc = (np.sqrt(1 - c**2) + (math.pi - np.arccos(c)) * c) / (2 * math.pi)
    np.testing.assert_allclose(value, arc * np.sqrt(np.outer(q, q)), atol=2e-4)
    np.testing.assert_allclose(slope, (math.pi - np.arccos(c)) / (2 * math.pi), atol=6e-3)
    np.testing.assert_allclose(np.diag(value), q / 2, rtol=1e-8)
    value, slope = activation_kernels(mf.as_activation("erf"), kernel)
    one = 1 + 2 * q
    np.testing.assert_allclose(value, 2 / math.pi * np.arcsin(2 * kernel / np.sqrt(np.outer(one, one))), atol=1e-5)
    np.testing.assert_allclose(slope, 4 / math.pi / np.sqrt(np.outer(one, one) - 4 * kernel**2), rtol=2e-3)


def test_refusals():
    with pytest.raises(ValueError, match=r"keys must be at least 1, got 0\.5"):
        mf.random_attention(0.5, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"standard deviation 31\.6; beyond 20 attention picks single keys"):
        Attention(np.eye(4), 1000.0, causal=False)
