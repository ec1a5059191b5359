"""Deflated probes: unbiased for any subspace, and far less noisy where Jacobians are deep."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.backward import cotangents
from gradscope.backward.subspace import find_subspaces
from gradscope.coefficients.pairs import Board
from gradscope.forward.inputs import as_batch
from gradscope.forward.replay import Replay
from gradscope.models.mlp import MLP
from tests.helpers import noise, seeded


def replay_of(model, captured, data, forward=None, loss_fn=None):
    batch = as_batch(data, forward=forward, loss_fn=loss_fn)
    return Replay(dict(model.named_modules()), batch, forward, loss_fn, captured.source_names)


def subspace_of(model, data, rank, forward=None, loss_fn=None, target=None, seed=0):
    captured = gs.capture(model, data, forward=forward, loss_fn=loss_fn, target=target)
    replay = replay_of(model, captured, data, forward, loss_fn)
    shapes = {captured.target.name: captured.target.shape}
    found = find_subspaces(replay, shapes, rank, coupled=captured.coupled, generator=seeded(seed))
    return captured, found.get(captured.target.name)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("wild", [False, True], ids=["found", "any"])
def test_unbiased_by_enumeration_of_all_signs(norm, wild, monkeypatch):
    model = MLP(depth=3, width=3, activation="tanh", norm=norm, generator=seeded()).double()
    x = noise(3, 3)
    exact = gs.gsc(model, x, probes="exact")
    captured, subspace = subspace_of(model, x, 1)
    if wild:  # nothing to do with the network
        shape = (1, 9) if norm == "batch" else (1, 3, 3)
        subspace = torch.nn.functional.normalize(noise(*shape, seed=4), dim=-1).reshape(1, 3, 3)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9)), dtype=torch.float64).reshape(-1, 3, 3)
    position = iter(range(len(signs)))
    monkeypatch.setattr(cotangents, "_signs", lambda target, generator: lambda first, last: signs[[next(position)]])
    board = Board(captured, list(captured.units), [captured.target], "batch")
    values = []
    for _ in signs:
        start = cotangents.deflated(captured.target, subspace, 1, seeded(), coupled=captured.coupled)
        values.append(board.measure([start]).spread("log10_values")[:, 0])
    np.testing.assert_allclose(
        np.log10(np.mean(10.0 ** np.array(values), axis=0)), exact.log10_values[:, 0], atol=1e-10
    )
    assert np.std(values, axis=0)[0] > 1e-3


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_orthonormal_sample_by_sample_or_over_the_batch(norm):
    model = MLP(depth=4, width=8, norm=norm, generator=seeded()).double()
    captured, q = subspace_of(model, noise(5, 8), 3)
    flat = q.reshape(3, 1 if captured.coupled else 5, -1).transpose(0, 1)
    expected = torch.eye(3, dtype=torch.float64).expand(len(flat), 3, 3)
    torch.testing.assert_close(flat @ flat.transpose(1, 2), expected, atol=1e-10, rtol=0)


def test_far_layers_are_at_least_ten_times_less_noisy_than_with_plain_probes():
    model, x = MLP(depth=30, width=40, activation="selu", generator=seeded()), torch.randn(16, 40, generator=seeded(1))
    exact = gs.gsc(model, x, probes="exact").log10_values[0, 0]
    error = {}
    for probes in (gs.Deflated(8, 8), 24):  # as many backward passes, counting a forward pass as one
        values = [gs.gsc(model, x, probes=probes, generator=seeded(s)).log10_values[0, 0] for s in range(15)]
        error[probes] = np.sqrt(np.mean(np.square(10 ** (np.array(values) - exact) - 1)))
    assert 10 * error[gs.Deflated(8, 8)] < error[24]


def test_directions_are_those_of_the_jacobian():
    model, x = MLP(depth=5, width=6, activation="tanh", generator=seeded()).double(), noise(4, 6)
    _, q = subspace_of(model, x, 6)
    # With as many directions as dimensions they span everything, and nothing is left to probe.
    profile = gs.gsc(model, x, probes=gs.Deflated(5, 1), generator=seeded(3))
    assert not profile.num_probes.any()
    low_rank = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)).double()
    _, two = subspace_of(low_rank, x, 2)
    weight = low_rank[1].weight.detach()
    projected = weight - two[:, 0].T @ (two[:, 0] @ weight)
    assert projected.norm() < 1e-6 * weight.norm()
    assert q.shape == (6, 4, 6)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.drop = nn.Dropout(0.3)

    def forward(self, tokens, scale=1.0):
        return self.head(gs.tap(torch.tanh(self.drop(self.body(self.embedding(tokens).mean(1)))), "tapped")) * scale


@pytest.mark.parametrize("target", [None, "tapped", "body"])
def test_integers_mappings_taps_dropout_and_inner_targets(target):
    model = Tokens().double()
    data = {"tokens": torch.randint(0, 9, (5, 4), generator=seeded()), "scale": 2.0}
    torch.manual_seed(1)
    exact = gs.gsc(model, data, target=target, probes="exact")
    state = torch.get_rng_state()
    values = []
    for seed in range(75):
        torch.manual_seed(1)  # one dropout mask
        profile = gs.gsc(model, data, target=target, probes=gs.Deflated(2, 2), generator=seeded(seed))
        assert (profile.num_probes[:-1] == 2).all()
        values.append(10 ** (profile.log10_values - exact.log10_values)[:-1, 0])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    error = np.std(values, axis=0) / np.sqrt(75)
    np.testing.assert_array_less(np.abs(np.mean(values, axis=0) - 1), 4 * error + 1e-9)
    _, subspace = subspace_of(model, data, 2, target=target)
    assert subspace is not None


def test_buffers_and_random_state_are_left_alone():
    model = MLP(depth=3, width=6, norm="batch", generator=seeded()).double()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    gs.gsc(model, noise(5, 6), probes=gs.Deflated(2, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_that_never_repeats_falls_back_to_plain_probes():
    calls = itertools.count()  # outside of the model, whose attributes are restored before every pass

    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, x):
            h = torch.tanh(self.linear(x))
            return h if next(calls) == 0 else h[:, :3]

    profile = gs.gsc(Fickle(), noise(5, 6), probes=gs.Deflated(2, 3))
    assert profile.num_probes[0, 0] == 5


def test_a_forward_that_overflows_when_it_is_moved_falls_back():
    class Edge(nn.Module):
        def __init__(self, x):
            super().__init__()
            self.linear, self.x = nn.Linear(6, 6, dtype=torch.float64), x

        def forward(self, x):
            return torch.tanh(self.linear(x)) if torch.equal(x, self.x) else self.linear(x) * torch.nan

    x = noise(5, 6)
    assert gs.gsc(Edge(x), x, probes=gs.Deflated(2, 3)).num_probes[0, 0] == 5


@pytest.mark.parametrize(("options", "name"), [({"rank": -1}, "rank"), ({"num": -1}, "num"), ({"num": 2.5}, "num")])
def test_bad_numbers(options, name):
    with pytest.raises(ValueError, match=rf"Deflated\({name}=\) must be a whole number"):
        gs.Deflated(**options)
