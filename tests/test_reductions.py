"""Coefficients and their errors from squared lengths, against the formulas written out and against enumeration."""

import itertools
import math

import numpy as np
import pytest

from gradscope.reductions import Gain, Length, reduce

RNG = np.random.default_rng


def brute(a, p, q, size, reduction):
    """The three definitions, plainly."""
    if reduction == "batch":
        return a.sum() / size * p.sum() / q.sum()
    g = a / (size / len(a)) * p / q
    return g.mean() if reduction == "mean" else math.exp(np.log(g).mean())


@pytest.mark.parametrize("reduction", ["batch", "mean", "geometric"])
@pytest.mark.parametrize("shift", [0, 3000, -3000])
def test_definitions_at_any_scale(reduction, shift):
    rng = RNG(0)
    a, p, q = rng.lognormal(size=(3, 6))
    squares = np.stack([a / 4, a * 3 / 4])[None]  # one target, two exact cotangents that add up to a
    exponents = np.full((1, 2), shift)
    gain = Gain.of(squares, exponents, exact=True, coupled=False)
    value, probe, _ = reduce(gain, Length(p, 7), [Length(q, -2)], size=30, reduction=reduction, batch_size=6)
    expected = math.log10(brute(a, p, q, 30, reduction)) + 2 * (shift + 7 + 2) * math.log10(2)
    assert value[0] == pytest.approx(expected, rel=1e-12)
    assert probe[0] == 0


def test_cotangents_of_different_exponents_are_brought_to_one():
    gain = Gain.of(np.ones((1, 3, 1)), np.array([[10, 0, -2000]]), exact=False, coupled=True)
    assert gain.exponent[0] == 10
    assert gain.value[0, 0] == pytest.approx((1 + 4.0**-10) / 3, rel=1e-15)


def all_probes(J):
    """|J^T v|^2 for every sign vector v."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=J.shape[0])))
    return np.square(signs @ J).sum(axis=1)


def test_two_probes_estimate_their_own_variance_without_bias_by_enumeration():
    J = RNG(1).normal(size=(4, 3))
    x = all_probes(J)
    pairs = np.array(list(itertools.product(x, x)))  # all ordered pairs of independent probes
    gain = Gain.of(pairs[:, :, None], np.zeros(pairs.shape, dtype=int), exact=False, coupled=True)
    assert gain.value.mean() == pytest.approx(np.square(J).sum(), rel=1e-12)
    assert gain.variance.mean() == pytest.approx(gain.value.var(), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_one_probe_bounds_its_variance_from_above_by_enumeration(rank):
    for seed in range(20):
        J = RNG(seed).normal(size=(6, rank)) @ RNG(seed + 99).normal(size=(rank, 5))
        x = all_probes(J)
        gain = Gain.of(np.repeat(x[:, None, None], 2, axis=2), np.zeros((64, 1), dtype=int), exact=False, coupled=False)
        assert gain.bound
        assert gain.variance.mean() >= x.var()
        if rank == 1:  # the bound is not empty: signs over six dimensions come close to it
            assert gain.variance.mean() < 4 * x.var()


def test_one_probe_of_a_coupled_batch_knows_no_error():
    gain = Gain.of(np.ones((1, 1, 4)), np.zeros((1, 1), dtype=int), exact=False, coupled=True)
    _, probe, sample = reduce(
        gain, Length(np.ones(4), 0), [Length(np.ones(4), 0)], size=8, reduction="batch", batch_size=4
    )
    assert np.isnan(probe[0])
    assert np.isnan(sample[0])


def test_coupled_totals_add_the_samples_of_each_probe():
    squares = np.array([[[1.0, 2.0], [3.0, 6.0]]])
    gain = Gain.of(squares, np.zeros((1, 2), dtype=int), exact=False, coupled=True)
    assert gain.value[0, 0] == 6
    assert gain.variance[0, 0] == 9  # (3 - 9)^2 / 2, over two probes


def test_the_sampling_error_of_a_ratio_of_three_correlated_sums():
    rng = RNG(2)
    values, errors = [], []
    for _ in range(2000):
        common = rng.normal(size=50)
        a, p, q = (np.exp(0.4 * rng.normal(size=50) + w * common) for w in (0.3, 0.5, 0.6))
        gain = Gain.of(a[None, None], np.zeros((1, 1), dtype=int), exact=True, coupled=False)
        value, _, sample = reduce(gain, Length(p, 0), [Length(q, 0)], size=50, reduction="batch", batch_size=50)
        values.append(value[0])
        errors.append(sample[0])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_probe_noise_is_taken_out_of_the_sampling_error():
    rng = RNG(3)
    a = np.full(4000, 2.0)  # no spread over samples at all
    x = a * rng.chisquare(1, size=(4, 4000))  # rank-one probes: relative variance 2
    gain = Gain.of(x[None], np.zeros((1, 4), dtype=int), exact=False, coupled=False)
    ones = Length(np.ones(4000), 0)
    _, probe, sample = reduce(gain, ones, [ones], size=4000, reduction="batch", batch_size=4000)
    assert probe[0] * math.log(10) == pytest.approx(math.sqrt(2 / 4 / 4000), rel=0.05)
    assert sample[0] < 0.3 * probe[0]


def test_a_dead_source_has_coefficient_zero_and_no_warning():
    gain = Gain.of(np.ones((1, 1, 3)), np.zeros((1, 1), dtype=int), exact=True, coupled=False)
    value, _, sample = reduce(
        gain, Length(np.zeros(3), 0), [Length(np.ones(3), 0)], size=6, reduction="batch", batch_size=3
    )
    assert value[0] == -math.inf
    assert np.isfinite(sample[0])


def test_a_gradient_of_exact_zeros_is_zero():
    gain = Gain.of(np.zeros((1, 2, 3)), np.zeros((1, 2), dtype=int), exact=True, coupled=False)
    ones = Length(np.ones(3), 0)
    value, probe, _ = reduce(gain, ones, [ones], size=6, reduction="batch", batch_size=3)
    assert value[0] == -math.inf
    assert probe[0] == 0
