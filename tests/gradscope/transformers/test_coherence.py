"""Coherence of Jacobians against Jacobians written out, closed forms and populations that are known completely."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import linear, noise, seeded

NETWORKS = {
    "tanh": lambda: gs.models.MLP(depth=4, width=6, activation="tanh", generator=seeded()).double(),
    "relu, layer norm": lambda: gs.models.MLP(depth=4, width=6, norm="layer", generator=seeded()).double(),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Conv1d(3, 1, 2)
    ).double(),
}


def jacobians(model, x):
    return torch.func.vmap(torch.func.jacrev(lambda one: model(one[None])[0]))(x).detach().reshape(len(x), -1, 6)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_pairs_of_samples_written_out(name):
    torch.manual_seed(0)
    model, x = NETWORKS[name](), noise(7, 6)
    found = gs.jacobian_coherence(model, x, probes="exact")
    J = jacobians(model, x)
    pairs = [float((J[a] * J[b]).sum()) for a, b in itertools.permutations(range(7), 2)]
    expected = np.mean(pairs) / float(J.square().sum((1, 2)).mean())
    assert found.layers[0] == "input" and found.num_probes == 0
    np.testing.assert_allclose(found.values[0], expected, rtol=1e-12)
    np.testing.assert_array_equal(found.stderr_probe, 0)


def test_the_error_due_to_samples_is_that_of_the_jackknife():
    model, x = NETWORKS["tanh"](), noise(200, 6)
    found = gs.jacobian_coherence(model, x, probes="exact")
    left_out = [
        gs.jacobian_coherence(model, torch.cat([x[:b], x[b + 1 :]]), probes="exact").values[0] for b in range(200)
    ]
    expected = np.sqrt(199 / 200 * np.square(left_out - np.mean(left_out)).sum())
    np.testing.assert_allclose(found.stderr_sample[0], expected, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("probes", ["exact", 1, 5])
def test_an_affine_network_has_coherence_one_for_any_probes(probes, dtype):
    model = gs.models.MLP(depth=30, width=6, activation="linear", bias=True, generator=seeded()).to(dtype)
    found = gs.jacobian_coherence(model, noise(12, 6).to(dtype), probes=probes)
    np.testing.assert_allclose(found.values, 1, rtol=0, atol=100 * torch.finfo(dtype).eps)


class Gate(nn.Module):
    """Multiplies every sample by the sign of its last number."""

    def forward(self, x):
        return x * x[:, -1:].detach().sign()


@pytest.mark.parametrize("probes", ["exact", 4])
def test_gates_that_flip_the_sign_have_the_value_by_hand(probes):
    """J_b = s_b A: with k positive signs of n, the sum over pairs is (2 k - n)^2 - n, in units of |A|^2."""
    model, x = nn.Sequential(Gate(), linear(noise(3, 6))), noise(40, 6)
    k = int((x[:, -1] > 0).sum())
    found = gs.jacobian_coherence(model, x, probes=probes)
    expected = ((2 * k - 40) ** 2 - 40) / (40 * 39)
    np.testing.assert_allclose(found.values[0], expected, rtol=1e-12)
    assert found.values[-2] == pytest.approx(1)  # after the gate, the network is linear
    low, high = found.interval()
    assert low[0] <= 0 <= high[0]  # half of the samples of the population have each sign


def test_pairs_of_a_stream_are_those_within_batches():
    model, x = NETWORKS["tanh"](), noise(12, 6)
    batches = x.split([3, 5, 4])
    found = gs.jacobian_coherence(model, iter(batches), probes="exact")
    sums = []
    for batch in batches:
        J = jacobians(model, batch).flatten(1)
        inner = J @ J.T
        off, own = inner.sum() - inner.trace(), inner.trace()
        sums.append([float(off) / (len(batch) - 1), float(own)])
    off, own = np.sum(sums, axis=0)
    np.testing.assert_allclose(found.values[0], off / own, rtol=1e-12)
    assert found.num_samples == 12


def test_probes_are_shared_by_samples_and_unbiased():
    model, x = NETWORKS["tanh"](), noise(10, 6)
    exact = gs.jacobian_coherence(model, x, probes="exact")
    many = gs.jacobian_coherence(model, x, probes=4000)
    error = many.stderr_probe[:-1]
    assert (error < 0.02).all() and (np.abs(many.values - exact.values)[:-1] < 3 * error).all()
    one = gs.jacobian_coherence(model, x, probes=1)
    assert np.isnan(one.stderr_probe[:-1]).all() and np.isnan(one.interval()[0][:-1]).all()


@pytest.mark.parametrize("probes", ["exact", 8])
def test_intervals_contain_the_coherence_of_the_population(probes):
    model = gs.models.MLP(depth=2, width=6, activation="tanh", generator=seeded()).double()
    population = noise(3000, 6)
    J = jacobians(model, population)
    truth = float(J.mean(0).square().sum() / J.square().sum((1, 2)).mean())
    generator, inside = seeded(4), []
    for _ in range(200):
        drawn = population[torch.randint(len(population), (30,), generator=generator)]
        low, high = gs.jacobian_coherence(model, drawn, probes=probes, generator=generator).interval()
        inside.append(low[0] <= truth <= high[0])
    assert 0.90 <= np.mean(inside) <= 0.99  # the standard error of 95 % in 200 runs is 1.5 %


def test_depth_beyond_the_range_of_floats():
    x = noise(40, 4)
    model = nn.Sequential(Gate(), *[linear(1e-3 * noise(4, 4, seed=n)) for n in range(300)])
    found = gs.jacobian_coherence(model, x, layers=["input", "0"])
    k = int((x[:, -1] > 0).sum())
    np.testing.assert_allclose(found.values, [((2 * k - 40) ** 2 - 40) / (40 * 39), 1, 1], rtol=1e-9)


BAD = [
    (lambda m, x: gs.jacobian_coherence(m, x[:2]), "at least three samples per batch, got 2"),
    (lambda m, x: gs.jacobian_coherence(m, x, target="input"), "No layer lies before the target 'input'"),
    (lambda m, x: gs.jacobian_coherence(m, iter([])), "data yields no batch"),
    (lambda m, x: gs.jacobian_coherence(m, x, probes=0), "probes must be a whole number >= 1"),
    (lambda m, x: gs.jacobian_coherence(m, x, probes=gs.Deflated(2, 2)), "probes must be"),
    (lambda m, x: gs.jacobian_coherence(nn.Sequential(m, nn.BatchNorm1d(6).double(), m), x), "influence each other"),
    (lambda m, x: gs.jacobian_coherence(nn.Sequential(m, linear(torch.zeros(2, 6).double()), nn.Tanh()), x),
     "Jacobian of layer 'input' is zero for all samples"),
    (lambda m, x: gs.jacobian_coherence(nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 6)), m), x),
     "layer '0' has shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(linear(noise(6, 6)), noise(5, 6))


def test_the_frame_and_the_summary(tmp_path):
    found = gs.jacobian_coherence(NETWORKS["tanh"](), noise(20, 6), probes=6)
    frame = gs.frames.load(found.save(tmp_path / "coherence.parquet"))
    assert frame["quantity"].unique().tolist() == ["jacobian_coherence"]
    np.testing.assert_array_equal(frame["value"], found.values)
    assert (frame["stderr_sample"][:-1] >= found.stderr_sample[:-1]).all()
    assert "20 samples, 6 probes per batch" in str(found) and len(repr(found)) < 120
    assert found.plot().get_ylabel() == "coherence of Jacobians"


def test_few_samples_are_a_remark():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    assert gs.jacobian_coherence(model, noise(9, 3)).remarks[-1] == "Fewer than 10 samples show no interval."
    assert not gs.jacobian_coherence(model, noise(10, 3)).remarks
