"""How many cotangents: exact where that is cheap, else what the asked error takes."""

import numpy as np
import pytest
import torch

import gradscope as gs
from gradscope.models.mlp import MLP
from tests.helpers import seeded


def selu(width):
    return MLP(depth=20, width=width, activation="selu", generator=seeded())


def data(batch, width):
    return torch.randn(batch, width, generator=seeded(1))


@pytest.mark.parametrize(("width", "exact"), [(128, True), (129, False)])
def test_exact_up_to_128_cotangents(width, exact):
    assert gs.gsc(selu(width), data(3, width)).num_probes.any() != exact


@pytest.mark.parametrize("rtol", [0.1, 0.02])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_rtol_is_reached(norm, rtol):
    width, batch = (140, 12) if norm == "none" else (20, 16)
    model = MLP(depth=12, width=width, activation="selu", norm=norm, generator=seeded())
    x = data(batch, width)
    exact = gs.gsc(model, x, probes="exact").log10_values
    errors = []
    for seed in range(20):
        profile = gs.gsc(model, x, rtol=rtol, generator=seeded(seed))
        assert profile.relative_error <= rtol
        assert profile.stopped == "rtol reached"
        errors.append(10 ** (profile.log10_values - exact) - 1)
    assert np.sqrt(np.mean(np.square(errors), axis=0)).max() < 1.4 * rtol


def test_exact_where_the_asked_error_makes_it_cheaper():
    profile = gs.gsc(selu(140), data(3, 140), rtol=1e-4)
    assert not profile.num_probes.any()
    assert profile.relative_error == 0


def test_a_matrix_reaches_rtol():
    model, x = MLP(depth=8, width=60, activation="selu", generator=seeded()), data(6, 60)
    exact = gs.gsc_matrix(model, x, probes="exact").log10_values
    matrix = gs.gsc_matrix(model, x, rtol=0.1)
    assert matrix.relative_error <= 0.1
    assert np.nanmax(np.abs(10 ** (matrix.log10_values - exact) - 1)) < 0.4


def test_the_same_call_gives_the_same_number_and_touches_no_global_generator():
    model, x = selu(140), data(6, 140)
    state = torch.get_rng_state()
    first, second = (gs.gsc(model, x, rtol=0.05) for _ in range(2))
    np.testing.assert_array_equal(first.log10_values, second.log10_values)
    assert torch.equal(state, torch.get_rng_state())


def begin_with(plan, monkeypatch):
    monkeypatch.setattr("gradscope.coefficients.planning.Planner._chosen", lambda self, board, rtol: plan)


def test_time_that_runs_out_is_said(monkeypatch):
    begin_with(gs.Deflated(0, 2), monkeypatch)
    model, x = MLP(depth=20, width=40, norm="batch", generator=seeded()), data(30, 40)
    with pytest.warns(UserWarning, match=r"rtol of 0\.001 was not reached; the reason is 'max_seconds'"):
        profile = gs.gsc(model, x, rtol=0.001, max_seconds=1e-6)
    assert profile.relative_error > 0.001


def test_one_probe_of_a_coupled_batch_goes_on_until_its_error_is_known(monkeypatch):
    begin_with(gs.Deflated(0, 1), monkeypatch)
    model, x = MLP(depth=10, width=20, norm="batch", generator=seeded()), data(16, 20)
    assert gs.gsc(model, x, rtol=0.2).relative_error <= 0.2
