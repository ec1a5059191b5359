"""Do intervals hold what they promise?  Replayed from exact Jacobians, thousands of repetitions cost seconds."""

import numpy as np
import pytest
import torch
from scipy import special, stats

import gradscope as gs
from gradscope.backward.subspace import find_subspaces
from gradscope.coefficients.gains import Gain, Length
from gradscope.coefficients.profiles import probe_interval
from gradscope.coefficients.reductions import Tally
from gradscope.models.alexnet import AlexNetA
from gradscope.models.mlp import MLP
from tests.helpers import seeded

REPETITIONS = 2000


def networks():
    selu = MLP(depth=30, width=64, activation="selu", generator=seeded()).double()
    batch = MLP(depth=20, width=20, activation="relu", norm="batch", generator=seeded()).double()
    alexnet = AlexNetA(generator=seeded()).double().eval()
    return {
        "selu": (selu, (16, 64), ("input", "layers.15", "layers.28")),
        "relu+batch": (batch, (16, 20), ("input", "layers.9", "layers.18")),
        "alexnet_a": (alexnet, (8, 3, 32, 32), ("input", "flatten")),
    }


def grams(captured, name):
    """J J^T, sample by sample (B, d, d) where samples are independent, else of the batch (1, B d, B d)."""
    operator, B = captured.jacobian(name, captured.target.name), captured.batch_size
    d = operator.shape[0] // B
    if captured.coupled:
        J = operator.T.dense().T[None]
    else:
        eye = torch.eye(d, dtype=torch.float64)
        J = torch.stack([operator.rmatvec(e.repeat(B)).reshape(B, -1) for e in eye], dim=1)
    return (J @ J.transpose(1, 2)).numpy()


def replay(gram, q, num, rng):
    """|v^T J|, shape (REPETITIONS, rank + num, samples), of directions q and of random signs in their complement."""
    samples, d, _ = gram.shape
    complement = np.eye(d) - np.swapaxes(q, 1, 2) @ q
    rest = complement @ gram @ complement
    fixed = np.einsum("sid,sde,sie->is", q, gram, q)
    squares = np.empty((REPETITIONS, num, samples))
    for sample in range(samples):
        bits = np.unpackbits(np.frombuffer(rng.bytes(REPETITIONS * num * d // 8), dtype=np.uint8))
        v = bits.reshape(REPETITIONS * num, d).astype(np.float32) * 2 - 1
        scale = np.abs(rest[sample]).max()  # float32 is exact enough beside the scatter of signs, and twice as fast
        product = v @ (rest[sample] / scale).astype(np.float32)
        squares[:, :, sample] = scale * np.einsum("ij,ij->i", product, v).reshape(REPETITIONS, num)
    fixed = np.broadcast_to(fixed, (REPETITIONS, *fixed.shape))
    return np.sqrt(np.maximum(np.concatenate([fixed, squares], axis=1), 0))


def _holds(gram, q, num, rng, truth, samples, *, coupled):
    """Whether the interval of each repetition contains the truth."""
    ones = Length(np.ones((REPETITIONS, samples)), np.zeros(REPETITIONS, dtype=int))
    norms = replay(gram, q, num, rng)
    gain = Gain.of(norms, np.zeros(norms.shape[:2], dtype=int), num_fixed=q.shape[1], coupled=coupled)
    tally = Tally.of(gain, ones, ones, sizes=np.ones(REPETITIONS), reduction="batch", batch_size=samples)
    low, high = probe_interval(
        tally.log10_values, tally.log10_stderr_cautious, tally.fixed_share, tally.probe_freedom, 0.95
    )
    return (low <= truth) & (truth <= high)


@pytest.mark.parametrize("network", ["selu", "relu+batch", "alexnet_a"])
def test_coverage_with_few_and_many_probes(network):
    model, shape, names = networks()[network]
    x = torch.randn(*shape, dtype=torch.float64, generator=seeded(1))
    captured = gs.capture(model, x)
    target = captured.target
    directions = []
    for seed in (2, 3):  # coverage is over random directions, too
        (subspace,) = find_subspaces(
            captured.replay, {target.name: target.shape}, 3, coupled=captured.coupled, generator=seeded(seed)
        ).values()
        directions.append(subspace.reshape(3, 1 if captured.coupled else shape[0], -1).transpose(0, 1).numpy())
    rng = np.random.default_rng(0)
    for name in names:
        gram = grams(captured, name)
        truth = np.log10(np.trace(gram, axis1=1, axis2=2).sum())
        for choice in ([directions[0][:, :0]], directions):
            for num in (4, 48):
                holds = [_holds(gram, q, num, rng, truth, shape[0], coupled=captured.coupled) for q in choice]
                assert 0.93 <= np.mean(holds) <= 0.97, (name, choice[0].shape[1], num, np.mean(holds))


@pytest.mark.parametrize(
    ("network", "probes"),
    [("selu", gs.Deflated(3, 4)), ("relu+batch", 6), ("alexnet_a", 4)],
    ids=["selu", "batch", "a"],
)
def test_coverage_of_true_runs(network, probes):
    model, shape, names = networks()[network]
    x = torch.randn(*shape, dtype=torch.float64, generator=seeded(1))
    model, x = model.float(), x[: 3 if network == "alexnet_a" else None].float()  # exact enough, and twice as fast
    exact = gs.gsc(model, x, probes="exact")
    inside = []
    for seed in range(100):
        profile = gs.gsc(model, x, probes=probes, generator=seeded(seed))
        low, high = profile.interval()
        inside.append((low <= exact.log10_values) & (exact.log10_values <= high))
        assert (profile.num_probes[:-1] > 0).all()
    coverage = dict(zip(exact.layers, np.mean(inside, axis=0)[:, 0], strict=True))
    for name in names:
        # The standard error of 95 % in 100 runs is 2.2 %: three below, and 100 of 100 would be too many.
        assert 0.88 <= coverage[name] <= 0.99, coverage


def test_an_exact_value_is_its_own_interval_and_an_unknown_error_has_none():
    model, shape, _ = networks()["relu+batch"]
    x = torch.randn(*shape, dtype=torch.float64, generator=seeded(1))
    exact = gs.gsc(model, x, target="layers.2", probes="exact")
    for end in exact.interval():
        np.testing.assert_array_equal(end, exact.log10_values)
    unknown = gs.gsc(model, x, probes=1).interval()
    assert np.isnan(unknown[0][:-1]).all()
    assert np.isnan(unknown[1][:-1]).all()


def test_one_coefficient_has_the_quantile_of_student_with_one_probe_less():
    model, shape, _ = networks()["relu+batch"]
    x = torch.randn(*shape, dtype=torch.float64, generator=seeded(1))
    found = gs.gsc(model, x, target="layers.2", probes=4)["input"]
    low, high = found.interval()
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 3) * found.log10_stderr, rel=1e-9)


def test_a_higher_level_makes_a_wider_interval():
    model, shape, _ = networks()["selu"]
    profile = gs.gsc(model, torch.randn(*shape, dtype=torch.float64, generator=seeded(1)), probes=4)
    (low, high), (lower, higher) = profile.interval(0.68), profile.interval(0.99)
    assert (lower[:-1] < low[:-1]).all()
    assert (high[:-1] < higher[:-1]).all()
    with pytest.raises(ValueError, match=r"level must be a number between 0 and 1, such as 0\.05 or 0\.95, got 95"):
        profile.interval(95)


def test_the_mean_of_few_lognormal_samples():
    s, num, rng = 1.5, 40, np.random.default_rng(0)
    a = np.exp(s * rng.normal(size=(REPETITIONS, 1, num)))
    ones = Length(np.ones((REPETITIONS, num)), np.zeros(REPETITIONS, dtype=int))
    truth = s**2 / 2 / np.log(10)  # the mean is exp(s^2 / 2)
    for probes in (0, 4):
        random = a * rng.chisquare(1, size=(REPETITIONS, 4, num)) if probes else a
        gain = Gain.of(np.sqrt(random), np.zeros(random.shape[:2], dtype=int), num_fixed=int(not probes), coupled=False)
        for reduction in ("batch", "mean"):
            tally = Tally.of(gain, ones, ones, sizes=np.full(REPETITIONS, num), reduction=reduction, batch_size=num)
            error = np.hypot(tally.log10_stderr_probe, tally.log10_stderr_sample)
            # The spread of 40 samples alone would give 85 %.
            inside = abs(tally.log10_values - truth) <= error * special.stdtrit(tally.sample_freedom, 0.975)
            assert 0.93 <= inside.mean() <= 0.98, (probes, reduction, inside.mean())


@pytest.mark.parametrize("fixed", [0.0, 0.6])
@pytest.mark.parametrize("freedom", [3.0, np.inf])
def test_the_interval_due_to_probes_is_that_of_a_chi_square(fixed, freedom):
    # A share of 1 - fixed is k-th of a chi-square with k = 7 degrees of freedom; its relative variance is 2 / k.
    k, value, random = 7, 1.5, 1 - fixed
    error = random * np.sqrt(2 / k) / np.log(10)
    low, high = probe_interval(np.array([value]), np.array([error]), np.array([fixed]), np.array([freedom]), 0.95)
    wider = stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    for end, quantile in ((low, 0.975), (high, 0.025)):
        expected = fixed + random * (k / stats.chi2.ppf(quantile, k)) ** wider
        assert end[0] == pytest.approx(value + np.log10(expected), rel=1e-9)
