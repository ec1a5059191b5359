"""Coefficients and their errors from squared lengths, against the formulas written out and against enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from gradscope.coefficients.gains import Gain, Length
from gradscope.coefficients.reductions import Tally

RNG = np.random.default_rng


def gain_of(squares, exponents=None, *, num_fixed=0, coupled=False):
    """From squared lengths (pairs, cotangents, samples)."""
    squares = np.asarray(squares, dtype=float)
    exponents = np.zeros(squares.shape[:2], dtype=int) if exponents is None else np.asarray(exponents)
    return Gain.of(np.sqrt(squares), exponents, num_fixed=num_fixed, coupled=coupled)


def length(squares, exponent=0):
    squares = np.atleast_2d(squares)
    return Length(squares, np.full(len(squares), exponent))


def tally_of(gain, p, q, reduction="batch", size=None, exponents=(0, 0)):
    batch_size = np.atleast_2d(p).shape[1]
    sizes = np.full(len(gain.fixed), batch_size if size is None else size)
    return Tally.of(
        gain, length(p, exponents[0]), length(q, exponents[1]), sizes=sizes, reduction=reduction, batch_size=batch_size
    )


def brute(a, p, q, size, reduction):
    """The three definitions, plainly."""
    if reduction == "batch":
        return a.sum() / size * p.sum() / q.sum()
    g = a / (size / len(a)) * p / q
    return g.mean() if reduction == "mean" else math.exp(np.log(g).mean())


@pytest.mark.parametrize("reduction", ["batch", "mean", "geometric"])
@pytest.mark.parametrize("shift", [0, 3000, -3000])
def test_definitions_at_any_scale(reduction, shift):
    a, p, q = RNG(0).lognormal(size=(3, 6))
    squares = np.stack([a / 4, a * 3 / 4])[None]  # one pair, two exact cotangents that add up to a
    gain = gain_of(squares, np.full((1, 2), shift), num_fixed=2)
    tally = tally_of(gain, p, q, reduction, size=30, exponents=(7, -2))
    expected = math.log10(brute(a, p, q, 30, reduction)) + 2 * (shift + 7 + 2) * math.log10(2)
    assert tally.log10_values[0] == pytest.approx(expected, rel=1e-12)
    assert tally.log10_stderr_probe[0] == 0
    assert tally.fixed_share[0] == pytest.approx(1)


@pytest.mark.parametrize("reduction", ["batch", "mean", "geometric"])
def test_merging_is_measuring_together(reduction):
    rng = RNG(5)
    a, p, q = rng.lognormal(size=(3, 2, 12))
    random = rng.lognormal(size=(2, 4, 12))
    parts = []
    for chosen, shift in ((slice(0, 3), 200), (slice(3, 4), -40), (slice(4, 12), 0)):
        # The same numbers on scales of their own.
        squares = np.concatenate([a[:, None, chosen], random[:, :, chosen]], axis=1) * 4.0**-shift
        gain = gain_of(squares, np.full((2, 5), shift), num_fixed=1)
        parts.append(tally_of(gain, p[:, chosen], q[:, chosen], reduction, size=5 * (chosen.stop - chosen.start)))
    whole = tally_of(gain_of(np.concatenate([a[:, None], random], axis=1), num_fixed=1), p, q, reduction, size=60)
    for first, second, third in itertools.permutations(parts):
        merged = first.merge(second.merge(third))
        assert merged.count == 12
        for name in (
            "log10_values",
            "log10_stderr_probe",
            "log10_stderr_sample",
            "log10_stderr_cautious",
            "fixed_share",
            "probe_freedom",
        ):
            np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-10, err_msg=name)


def test_cotangents_in_two_sweeps_are_cotangents_in_one():
    norms = RNG(6).lognormal(size=(3, 7, 4))
    exponents = RNG(7).integers(-5, 5, size=(3, 7))
    whole = Gain.of(norms, exponents, num_fixed=2, coupled=False)
    parts = [
        Gain.of(norms[:, :3], exponents[:, :3], num_fixed=2, coupled=False),
        Gain.of(norms[:, 3:4], exponents[:, 3:4], num_fixed=0, coupled=False),
        Gain.of(norms[:, 4:], exponents[:, 4:], num_fixed=0, coupled=False),
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.num == whole.num == 5
    scale = 4.0 ** (merged.exponent - whole.exponent)[:, None]
    np.testing.assert_allclose(merged.value * scale, whole.value, rtol=1e-12)
    np.testing.assert_allclose(merged.variance * scale**2, whole.variance, rtol=1e-12)


def test_cotangents_of_different_exponents_are_brought_to_one():
    gain = gain_of(np.ones((1, 3, 1)), [[10, 0, -2000]], coupled=True)
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
    gain = gain_of(pairs[:, :, None], coupled=True)
    assert gain.value.mean() == pytest.approx(np.square(J).sum(), rel=1e-12)
    assert gain.variance.mean() == pytest.approx(gain.value.var(), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_one_probe_bounds_its_variance_from_above_by_enumeration(rank):
    for seed in range(20):
        J = RNG(seed).normal(size=(6, rank)) @ RNG(seed + 99).normal(size=(rank, 5))
        x = all_probes(J)
        gain = gain_of(np.repeat(x[:, None, None], 2, axis=2))
        assert gain.variance.mean() >= x.var()
        if rank == 1:  # the bound is not empty: signs over six dimensions come close to it
            assert gain.variance.mean() < 4 * x.var()


def test_one_probe_of_a_coupled_batch_knows_no_error():
    tally = tally_of(gain_of(np.ones((1, 1, 4)), coupled=True), np.ones(4), np.ones(4))
    assert np.isnan(tally.log10_stderr_probe[0])
    assert np.isnan(tally.log10_stderr_sample[0])


def test_coupled_totals_add_the_samples_of_each_probe():
    gain = gain_of([[[1.0, 2.0], [3.0, 6.0]]], coupled=True)
    assert gain.value[0, 0] == pytest.approx(6)
    assert gain.variance[0, 0] == pytest.approx(9)  # (3 - 9)^2 / 2, over two probes


def test_the_sampling_error_of_a_ratio_of_three_correlated_sums():
    rng = RNG(2)
    common = rng.normal(size=(2000, 50))
    a, p, q = (np.exp(0.4 * rng.normal(size=(2000, 50)) + w * common) for w in (0.3, 0.5, 0.6))
    tally = tally_of(gain_of(a[:, None], num_fixed=1), p, q)
    assert tally.log10_stderr_sample.mean() == pytest.approx(tally.log10_values.std(), rel=0.1)


def test_probe_noise_is_taken_out_of_the_sampling_error():
    a = np.full(4000, 2.0)  # no spread over samples at all
    x = a * RNG(3).chisquare(1, size=(4, 4000))  # rank-one probes: relative variance 2
    tally = tally_of(gain_of(x[None]), np.ones(4000), np.ones(4000))
    assert tally.log10_stderr_probe[0] * math.log(10) == pytest.approx(math.sqrt(2 / 4 / 4000), rel=0.05)
    assert tally.log10_stderr_sample[0] < 0.3 * tally.log10_stderr_probe[0]


@pytest.mark.parametrize("num", [1, 4])
def test_probe_and_sampling_error_together_are_the_spread_over_repetitions(num):
    rng = RNG(4)
    a = np.exp(0.8 * rng.normal(size=(1500, 60)))
    x = a[:, None] * rng.chisquare(1, size=(1500, num, 60))
    tally = tally_of(gain_of(x), np.ones((1500, 60)), np.ones((1500, 60)))
    together = np.hypot(tally.log10_stderr_probe, tally.log10_stderr_sample) * math.log(10)
    values = 10**tally.log10_values
    assert np.sqrt(np.mean(np.square(together))) == pytest.approx(values.std() / values.mean(), rel=0.15)


def test_a_dead_source_has_coefficient_zero_and_no_warning():
    tally = tally_of(gain_of(np.ones((1, 1, 3)), num_fixed=1), np.zeros(3), np.ones(3))
    assert tally.log10_values[0] == -math.inf
    assert np.isfinite(tally.log10_stderr_sample[0])


def test_a_gradient_of_exact_zeros_is_zero():
    tally = tally_of(gain_of(np.zeros((1, 2, 3))), np.ones(3), np.ones(3))
    assert tally.log10_values[0] == -math.inf
    assert tally.log10_stderr_probe[0] == 0


@pytest.mark.parametrize("seed", range(6))
def test_the_freedom_of_the_variance_due_to_probes_is_that_of_satterthwaite(seed):
    random = RNG(seed).chisquare(1, size=(4, 6)) * np.arange(1, 7)
    tally = tally_of(gain_of(random[None]), np.ones(6), np.ones(6))
    variances = random.var(axis=0, ddof=1) / 4
    assert tally.probe_freedom[0] == pytest.approx(variances.sum() ** 2 / np.sum(variances**2 / 3), rel=1e-12)
    # If all samples had the same relative noise.
    mean = random.mean(axis=0)
    equal = np.mean(variances / mean**2) * np.sum(mean**2)
    expected = math.sqrt(max(equal, variances.sum())) / mean.sum() / math.log(10)
    assert tally.log10_stderr_cautious[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("probes", [0, 2, 6])
@pytest.mark.parametrize("seed", range(12))
def test_the_sampling_error_is_the_wider_of_two_by_hand(probes, seed):
    rng, num = RNG(seed), 12
    a = np.exp(0.3 * (1 + seed % 4) * rng.normal(size=num))
    random = a * rng.chisquare(2, size=(probes, num)) / 2 if probes else a[None]
    tally = tally_of(gain_of(random[None], num_fixed=int(not probes)), np.ones(num), np.ones(num))
    x, noise = random.mean(axis=0), random.var(axis=0, ddof=1) / probes if probes else np.zeros(num)
    of_probes, d = noise.sum() / (num * x.mean()) ** 2, x / x.mean() - 1
    spread = max(d.var(ddof=1) / num - of_probes, 0)
    freedom = np.clip(1 / ((d**4).sum() / (d**2).sum() ** 2 - 1 / num) - 1, 2, num - 1)
    relative = np.mean(noise / x**2)
    subtracted = special.polygamma(1, 1 / relative - 1) if probes else 0.0
    s2 = max(np.log(x).var(ddof=1) - subtracted, 0) if subtracted < 1 else 0.0
    z, s = stats.norm.ppf(1 - 1 / num), math.sqrt(s2)
    w, share = math.log1p(math.expm1(s2) / num), stats.norm.cdf(z - s)
    below = math.log1p((math.exp(s2) * stats.norm.cdf(z - 2 * s) / share**2 - 1) / num)
    lognormal = min(w + w**2 / 4, below + math.log(share) ** 2)
    widths = [stats.t.ppf(0.975, f) * math.sqrt(v + of_probes) for v, f in ((spread, freedom), (lognormal, num - 1))]
    variance, expected = ((spread, freedom), (lognormal, num - 1))[int(widths[1] > widths[0])]
    assert tally.log10_stderr_sample[0] * math.log(10) == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-12)
    assert tally.sample_freedom[0] == pytest.approx(expected, rel=1e-9)


def test_fewer_than_ten_samples_have_no_interval():
    nine, ten = (
        tally_of(gain_of(np.arange(1.0, n + 1)[None, None], num_fixed=1), np.ones(n), np.ones(n)) for n in (9, 10)
    )
    assert np.isnan(nine.sample_freedom[0])
    assert ten.sample_freedom[0] == pytest.approx(9, rel=0.2)


def test_the_error_due_to_probes_of_a_mean_over_samples_weights_every_sample():
    rng = RNG(9)
    fixed, p, q = rng.lognormal(size=(3, 6))
    random = rng.chisquare(1, size=(4, 6))
    gain = gain_of(np.concatenate([fixed[None], random])[None], num_fixed=1)
    tally = tally_of(gain, p, q, "mean", size=30)
    weights = p / q / 5  # 30 entries of six samples
    values, errors = weights * (fixed + random.mean(axis=0)), weights * random.std(axis=0, ddof=1) / 2
    expected = math.sqrt(np.sum(errors**2)) / values.sum() / math.log(10)
    assert tally.log10_stderr_probe[0] == pytest.approx(expected, rel=1e-12)
    assert tally.fixed_share[0] == pytest.approx(np.sum(weights * fixed) / values.sum(), rel=1e-12)


def test_the_sampling_error_of_a_geometric_mean_is_that_of_the_mean_logarithm():
    a, p, q = RNG(8).lognormal(size=(3, 12))
    tally = tally_of(gain_of(a[None, None], num_fixed=1), p, q, "geometric")
    expected = np.log10(a * p / q).std(ddof=1) / math.sqrt(12)
    assert tally.log10_stderr_sample[0] == pytest.approx(expected, rel=1e-12)
    assert tally.sample_freedom[0] == 11
