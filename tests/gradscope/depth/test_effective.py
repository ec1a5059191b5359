"""Effective depth: contributions against brute force over all sets of layers, and against closed forms."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import gradscope as gs
from gradscope import frames
from gradscope.backward.cotangents import signs
from gradscope.depth.effective import symmetric_logarithms


def trained(model, scale=0.3, seed=1):
    """The model with every parameter moved, and itself before."""
    generator = torch.Generator().manual_seed(seed)
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model, before


def brute_force(now, before, x):
    """Shares of |C^lambda|_F, and their sum over |J|_F, from dense Jacobians of each layer over the whole batch, one
    product for each set."""
    factors, h = [], x
    for new, old in zip(now, before, strict=True):
        size = h.numel()
        full, initial = (torch.autograd.functional.jacobian(layer, h).reshape(-1, size) for layer in (new, old))
        factors.append((initial, full - initial))
        h = new(h).detach()
    terms = [0.0] * (len(factors) + 1)
    for chosen in itertools.product((0, 1), repeat=len(factors)):
        product = torch.eye(x.numel(), dtype=x.dtype)
        for factor, which in zip(factors, chosen, strict=True):
            product = factor[which] @ product
        terms[sum(chosen)] = terms[sum(chosen)] + product
    norms = np.array([float(term.norm()) for term in terms])
    return norms / norms.sum(), norms.sum() / float(sum(terms).norm())


def layers_of(model):
    return [*model.layers, model.head]


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "tanh"},
        {"activation": "selu", "norm": "layer"},
        {"activation": "relu", "norm": "batch"},
        {"activation": "tanh", "norm": "layer", "residual": "identity"},
    ],
    ids=str,
)
def test_contributions_are_sums_over_sets_of_layers(options):
    generator = torch.Generator().manual_seed(0)
    model, before = trained(gs.models.MLP(depth=4, width=5, out_features=3, generator=generator, **options).double())
    x = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    expected, cancellation = brute_force(layers_of(model), layers_of(before), x)
    found = gs.effective_depth(model, x, initial=before, probes="exact")
    np.testing.assert_allclose(10**found.log10_values, expected, rtol=1e-10)
    assert found.log10_cancellation == pytest.approx(math.log10(cancellation), abs=1e-10)
    assert found.num_probes == 0
    assert found.layers == ("layers.0", "layers.1", "layers.2", "layers.3", "head")
    assert found.coupled == (options.get("norm") == "batch")
    assert np.isnan(found.log10_stderr).all() == found.coupled


class Branches(nn.Module):
    """Two branches in functional code, a tensor that is overwritten after its unit handed it on, a random mask."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True))
        self.left, self.right = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.5)

    def both(self, x):
        return self.left(x).tanh() + self.right(x)

    def forward(self, x):
        x = gs.tap(self.both(self.stem(x)), "sum")
        x += 0.1
        return self.head(self.drop(self.pool(x)).flatten(1))


def test_branches_pooling_and_in_place_operations_are_cut_too():
    torch.manual_seed(0)
    model, before = trained(Branches().double().eval())
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    found = gs.effective_depth(model, x, initial=before, probes="exact")
    assert found.layers == ("stem", "sum", "pool", "head")

    def layers(m):
        return [m.stem, m.both, lambda h: m.pool(h + 0.1), lambda h: m.head(h.flatten(1))]

    expected, _ = brute_force(layers(model), layers(before), x)
    assert len(found.log10_values) == 4  # of pooling there is nothing to train
    np.testing.assert_allclose(10**found.log10_values, expected[:4], rtol=1e-10)
    assert expected[4] == 0


def test_dropout_masks_are_the_same_for_both():
    torch.manual_seed(0)
    model = Branches().double().train()
    before = copy.deepcopy(model)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    state = torch.get_rng_state()
    assert gs.effective_depth(model, x, initial=before).log10_values.tolist() == [0.0]
    assert torch.equal(state, torch.get_rng_state())


def chain(factors):
    layers = []
    for factor in factors:
        layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(layer.weight, factor)
        layers.append(layer)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("before", "now"), [(1.0, 1.5), (4.0, 5.0), (1e-3, 1.1e-3)])
def test_a_chain_has_binomial_contributions_at_any_depth(before, now):
    """(i + r)^L = sum of binomial(L, lambda) r^lambda i^(L - lambda): probabilities of lambda successes of L."""
    depth = 300  # 5^300 and 1e-900 are no numbers any more
    found = gs.effective_depth(
        chain([now] * depth), torch.ones(2, 1, dtype=torch.float64), initial=chain([before] * depth)
    )
    expected = stats.binom.logpmf(np.arange(depth + 1), depth, 1 - before / now) / math.log(10)
    np.testing.assert_allclose(found.log10_values, np.where(expected < -150, found.log10_values, expected), atol=1e-9)
    assert found.at(1e-6) == int(np.flatnonzero(expected >= -6).max())
    np.testing.assert_allclose(found.log10_changes, math.log10(now / before - 1), atol=1e-9)


def test_random_signs_agree_with_the_exact_contributions_within_their_errors():
    generator = torch.Generator().manual_seed(3)
    model = gs.models.MLP(depth=6, width=20, norm="batch", generator=generator).double()
    model, before = trained(model, 0.05)
    x = torch.randn(8, 20, dtype=torch.float64, generator=generator)
    exact = gs.effective_depth(model, x, initial=before, probes="exact")
    z = []
    for seed in range(40):
        found = gs.effective_depth(model, x, initial=before, probes=32, generator=torch.Generator().manual_seed(seed))
        assert found.num_probes == 32
        z.append((found.log10_values - exact.log10_values) / found.log10_stderr)
    inside = (np.abs(z) < 1.96).mean()
    # 40 seeds of 7 contributions that are not independent: three standard errors of 40 alone are 10 %.
    assert 0.85 <= inside <= 1.0
    assert 0.7 < np.std(z) < 1.4


def test_one_probe_shows_no_error():
    model, before = trained(gs.models.MLP(depth=4, width=10, generator=torch.Generator().manual_seed(3)).double(), 0.1)
    x = torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    one = gs.effective_depth(model, x, initial=before, probes=1)
    assert one.num_probes == 1 and np.isfinite(one.log10_values).all()
    assert np.isnan(one.log10_stderr).all() and np.isnan(one.contribution_intervals()).all()
    assert one.interval() == (0, len(one.log10_values) - 1)  # any order is possible
    frame = one.to_frame()
    unknown = frame[frame["quantity"] == "contribution"]
    assert unknown["log10_stderr_probe"].isna().all() and unknown["log10_stderr_sample"].isna().all()
    # Two probes show an error, with Student's t of one degree of freedom.
    two = gs.effective_depth(model, x, initial=before, probes=2)
    low, high = two.contribution_intervals()
    np.testing.assert_allclose((high - low) / 2, math.tan(0.475 * math.pi) * two.log10_stderr, rtol=1e-9)


def test_sample_errors_cover_the_mean_over_many_samples():
    generator = torch.Generator().manual_seed(4)
    model, before = trained(gs.models.MLP(depth=4, width=10, out_features=2, generator=generator).double(), 0.1)
    truth = gs.effective_depth(model, torch.randn(20000, 10, dtype=torch.float64, generator=generator), initial=before)
    z = []
    for _ in range(60):
        x = torch.randn(100, 10, dtype=torch.float64, generator=generator)
        found = gs.effective_depth(model, x, initial=before)
        z.append((found.log10_values - truth.log10_values)[1] / found.log10_stderr[1])
    assert 0.75 < np.std(z) < 1.3
    assert (np.abs(z) < 1.96).mean() >= 0.85


def test_the_error_of_a_change_is_that_of_a_ratio_of_means_by_hand():
    torch.manual_seed(0)
    model, before = trained(nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double())
    x = torch.randn(6, 4, dtype=torch.float64)
    found = gs.effective_depth(model, x, initial=before, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for row, layer in enumerate(gs.capture(model, x).units[1:]):
        v = signs(layer, 8, generator).draw(0, 8).reshape(8, 6, -1)
        now, then = (network[row].weight.detach() for network in (model, before))
        moved, kept = ((v @ w).square().sum(dim=(1, 2)).numpy() for w in (now - then, then))
        ratio = moved.sum() / kept.sum()
        assert found.log10_changes[row] == pytest.approx(math.log10(ratio) / 2, rel=1e-9)
        relative = (moved - ratio * kept).std(ddof=1) / math.sqrt(8) / moved.mean()
        assert found.log10_changes_stderr[row] == pytest.approx(relative / 2 / math.log(10), rel=1e-9)


def test_the_sample_error_is_the_derivative_by_the_weights_of_the_samples():
    generator = torch.Generator().manual_seed(5)
    model, before = trained(gs.models.MLP(depth=3, width=5, out_features=2, generator=generator).double())
    x = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    squares = []
    for one in x:
        shares, cancellation = brute_force(layers_of(model), layers_of(before), one[None])
        total = float(torch.autograd.functional.jacobian(model, one[None]).norm())
        squares.append(np.square(shares * cancellation * total))

    def log10_shares(weights):
        norms = np.sqrt(weights @ np.array(squares))
        return np.log10(norms / norms.sum())

    step = 1e-6 * np.eye(4)
    influence = [4 * (log10_shares(1 + h) - log10_shares(1 - h)) / 2e-6 for h in step]
    found = gs.effective_depth(model, x, initial=before, probes="exact")
    np.testing.assert_allclose(found.log10_values, log10_shares(np.ones(4)), rtol=1e-9)
    np.testing.assert_allclose(found.log10_stderr, np.std(influence, axis=0, ddof=1) / 2, rtol=1e-6)


def test_what_was_not_trained_contributes_nothing():
    model = gs.models.MLP(depth=5, width=16, norm="batch", out_features=4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    found = gs.effective_depth(model, x, initial=copy.deepcopy(model))
    assert found.log10_values.tolist() == [0.0]
    assert found.at() == 0 and found.interval() == (0, 0)
    assert np.isneginf(found.log10_changes).all()
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.layers[1].linear.weight *= 2  # undone by the normalization, but for its eps
        model.layers[3].linear.weight += 0.1
    found = gs.effective_depth(model, x, initial=before)
    assert found.at(0.01) == 1
    assert np.isfinite(found.log10_changes).tolist() == [False, True, False, True, False, False]
    frames.check(found.to_frame())


def test_independent_contributions_are_a_distribution_by_enumeration():
    odds = np.array([0.1, 2.0, 0.5, 1e-3, 7.0])
    p = odds / (1 + odds)
    expected = np.zeros(6)
    for events in itertools.product((0, 1), repeat=5):
        expected[sum(events)] += np.prod(np.where(events, p, 1 - p))
    np.testing.assert_allclose(np.exp(symmetric_logarithms(np.log(odds))), expected, rtol=1e-12)
    assert symmetric_logarithms(np.full(3000, -2.0)).max() > -math.inf
    log_pmf = stats.binom.logpmf(np.arange(3001), 3000, 1 / (1 + math.exp(2.0)))
    np.testing.assert_allclose(symmetric_logarithms(np.full(3000, -2.0)), log_pmf, rtol=1e-9)


@pytest.mark.filterwarnings("error")
def test_a_unit_that_was_dead_has_changed_infinitely():
    torch.manual_seed(0)
    dead = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(nn.Linear(4, 4), dead, nn.Linear(4, 2)).double()
    initial = copy.deepcopy(model)
    nn.init.constant_(initial[1][0].bias, -100)
    found = gs.effective_depth(model, torch.randn(6, 4, dtype=torch.float64), initial=initial)
    assert found.log10_changes.tolist() == [-math.inf, math.inf, -math.inf]


def test_independent_contributions_hold_where_changes_are_independent():
    """Gaussian matrices and independent Gaussian changes: squares add up, up to the spread of one network."""
    differences = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        model = gs.models.MLP(depth=10, width=100, activation="linear", init="lecun", generator=generator).double()
        before = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        x = torch.randn(2, 100, generator=generator, dtype=torch.float64)
        found = gs.effective_depth(model, x, initial=before, probes="exact")
        differences.append((found.log10_values - found.log10_independent)[:8])
    errors = np.std(differences, axis=0, ddof=1) / 8**0.5
    assert errors.max() < 0.02
    assert (np.abs(np.mean(differences, axis=0)) < 3.5 * errors).all()


def test_the_frame_has_every_contribution():
    model, before = trained(gs.models.MLP(depth=3, width=6, generator=torch.Generator().manual_seed(0)))
    found = gs.effective_depth(model, torch.randn(5, 6), initial=before.state_dict())
    frame = found.to_frame()
    rows = frame[frame["quantity"] == "contribution"]
    np.testing.assert_allclose(rows["log10_value"], found.log10_values)
    assert rows["log10_stderr_probe"].tolist() == [0.0] * 4
    assert (rows["log10_stderr_sample"] > 0).all()
    assert frame[frame["quantity"] == "change"]["layer"].tolist() == ["layers.0", "layers.1", "layers.2"]
    assert len(frame[frame["quantity"] == "independent_contribution"]) == 4
    assert str(found) == f"effective depth {found.at()} (3 to 3) of 3 layers at 1e-06"


def test_an_integer_input_begins_at_the_embedding():
    torch.manual_seed(0)
    model, before = trained(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = torch.arange(3).reshape(3, 1)
    found = gs.effective_depth(model, x, initial=before)
    h = model[0](x).detach()
    expected, _ = brute_force([*model[1:]], [*before[1:]], h)
    np.testing.assert_allclose(10**found.log10_values, expected[:3], rtol=1e-10)


def test_a_model_is_left_as_it_was():
    model, before = trained(gs.models.MLP(depth=3, width=6, norm="batch"))
    state, mode = copy.deepcopy(model.state_dict()), model.training
    gs.effective_depth(model, torch.randn(8, 6), initial=before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training == mode and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_input_is_named():
    model = gs.models.MLP(depth=3, width=4)
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"'layers.0.linear.weight' of initial shares its memory with the model"):
        gs.effective_depth(model, x, initial=model.state_dict())
    with pytest.raises(ValueError, match=r"initial lacks the parameter 'layers.2.linear.weight'"):
        gs.effective_depth(model, x, initial=gs.models.MLP(depth=2, width=4))
    with pytest.raises(ValueError, match=r"initial contains 'layers.3.linear.weight', but the model does not"):
        gs.effective_depth(model, x, initial=gs.models.MLP(depth=4, width=4))
    with pytest.raises(ValueError, match=r"has shape \(4, 4\) in the model and \(5, 4\) in initial"):
        gs.effective_depth(model, x, initial=gs.models.MLP(depth=3, width=5, in_features=4))
    with pytest.raises(ValueError, match="probes must be"):
        gs.effective_depth(model, x, initial=copy.deepcopy(model), probes=0)
    with pytest.raises(ValueError, match=r"tolerance must be between 0 and 1, got 1.5"):
        gs.effective_depth(model, x, initial=copy.deepcopy(model)).at(1.5)


def test_a_sample_that_dominates_leaves_few_degrees_of_freedom():
    generator = torch.Generator().manual_seed(4)
    model, before = trained(gs.models.MLP(depth=4, width=10, generator=generator).double(), 0.1)
    x = torch.randn(20, 10, dtype=torch.float64, generator=generator)
    x[1:] *= 30  # tanh saturates: nearly all of the Jacobian is that of the first sample, of 19 degrees of freedom
    found = gs.effective_depth(model, x, initial=before, probes="exact")
    assert (found.freedom < 2.5).all() and (found.freedom >= 2).all()
    low, high = found.contribution_intervals()
    np.testing.assert_allclose((high - low) / 2, stats.t.ppf(0.975, found.freedom) * found.log10_stderr, rtol=1e-9)
