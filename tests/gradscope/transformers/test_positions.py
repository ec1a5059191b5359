"""GSC by position against Jacobians written out, and its blocks against each other."""

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from tests import bruteforce
from tests.helpers import noise

B, T, C = 3, 5, 4


class Causal(nn.Module):
    """``x + attention(norm(x))``, pre-norm."""

    def __init__(self, width=C):
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.mix(self.norm(x)).chunk(3, -1))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class Mix(nn.Module):
    """Mixes positions, then channels."""

    def __init__(self):
        super().__init__()
        self.across, self.within = nn.Linear(T, T), nn.Linear(C, C)

    def forward(self, x):
        x = x + self.across(x.transpose(1, 2)).tanh().transpose(1, 2)
        return x + self.within(x).tanh()


class Steps(nn.Module):
    """All steps of a recurrent network."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(C, C, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def post_norm():
    return nn.TransformerEncoderLayer(C, 2, 8, dropout=0.0, batch_first=True)


def convolution(*more):
    return nn.Sequential(nn.Conv1d(C, 6, 3, padding=1), *more, nn.Tanh(), nn.Conv1d(6, 2, 3, padding=1))


MODELS = {
    "causal attention": (lambda: nn.Sequential(Causal(), Causal(), nn.Linear(C, 3)), 1),
    "post-norm": (lambda: nn.Sequential(post_norm(), post_norm()), 1),
    "mixer": (lambda: nn.Sequential(Mix(), Mix()), 1),
    "LSTM": (lambda: nn.Sequential(Steps(), Steps(), nn.Linear(C, 2)), 1),
    "convolution": (convolution, 2),
    "norm across positions": (lambda: nn.Sequential(nn.Linear(C, C), nn.LayerNorm((T, C)), nn.Linear(C, 2)), 1),
    "coupled samples": (lambda: convolution(nn.BatchNorm1d(6)).train(), 2),
}


def specimen(name):
    torch.manual_seed(0)
    build, position_dim = MODELS[name]
    x = noise(B, T, C) if position_dim == 1 else noise(B, C, T)
    model = build().double()
    return model.train(name == "coupled samples"), x, position_dim


def brute_force(model, layer, x, position_dim):
    """GSC_ts (T, T) of one layer, from the whole Jacobian."""
    f_k = x if layer == "input" else bruteforce.stages(model, [layer], x)[1]
    f_l = model(x).detach()
    squares = bruteforce.jacobian(model, layer, x).square().reshape(*f_l.shape, *f_k.shape)
    kept = (position_dim, f_l.ndim + position_dim)
    energy = squares.sum(dim=[d for d in range(squares.ndim) if d not in kept])
    return (energy / f_k.numel() * f_k.square().sum() / f_l.square().sum()).numpy()


@pytest.mark.parametrize("by", ["source", "target", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_equal_those_of_the_whole_jacobian(name, by):
    model, x, position_dim = specimen(name)
    found = gs.gsc(model, x, positions=by, position_dim=position_dim)
    assert found.blocks.layers == found.layers and found.coupled == (name == "coupled samples")
    for row, layer in enumerate(found.layers[:-1]):
        truth = brute_force(model, layer, x, position_dim)
        expected = {"source": truth.sum(0, keepdims=True), "target": truth.sum(1, keepdims=True), "both": truth}[by]
        np.testing.assert_allclose(10 ** found.blocks.log10_values[row], expected, rtol=1e-10, atol=1e-10 * truth.max())
    diagonal = {"source": np.full((1, T), 1 / T), "target": np.full((T, 1), 1 / T), "both": np.eye(T) / T}[by]
    np.testing.assert_allclose(10 ** found.blocks.log10_values[-1], diagonal, rtol=1e-12)
    assert not found.blocks.log10_stderr_probe.any()


@pytest.mark.parametrize("reduction", ["batch", "mean"])
@pytest.mark.parametrize("probes", ["exact", 1, 3, gs.Deflated(2, 3)], ids=str)
@pytest.mark.parametrize("name", ["causal attention", "convolution"])
def test_sums_over_source_positions_are_the_gsc_of_the_same_probes(name, probes, reduction):
    model, x, position_dim = specimen(name)
    options = {"probes": probes, "reduction": reduction}
    plain = gs.gsc(model, x, **options)
    found = gs.gsc(model, x, positions="source", position_dim=position_dim, **options)
    sums = np.log10((10**found.blocks.log10_values).sum(axis=(1, 2)))
    for values in (sums, found.log10_values[:, 0]):
        np.testing.assert_allclose(values, plain.log10_values[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.interval(), plain.interval(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("probes", ["exact", 3])
@pytest.mark.parametrize("by", ["target", "both"])
def test_sums_over_target_positions_are_the_sum_over_all_blocks(by, probes):
    model, x, _ = specimen("causal attention")
    found = gs.gsc(model, x, positions=by, probes=probes)
    sums = np.log10((10**found.blocks.log10_values).sum(axis=(1, 2)))
    np.testing.assert_allclose(sums, found.log10_values[:, 0], rtol=0, atol=1e-12)
    assert (found.num_probes[:-1] == (0 if probes == "exact" else 3)).all()


@pytest.mark.parametrize("probes", ["exact", 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_causal_network_has_exact_zeros_above_the_diagonal(dtype, probes):
    model, x, _ = specimen("causal attention")
    blocks = gs.gsc(model.to(dtype), x.to(dtype), positions="both", probes=probes).blocks
    above = np.triu(np.ones((T, T), dtype=bool), 1)
    assert np.isneginf(blocks.log10_values[:, above]).all()
    assert np.isfinite(blocks.log10_values[:2, ~above]).all()
    for array in (blocks.log10_stderr_probe, blocks.log10_stderr_sample):
        assert (array[:, above] == 0).all()
    for end in blocks.interval():
        assert np.isneginf(end[:, above]).all()


def test_negative_dimensions_count_from_the_end():
    model, x, _ = specimen("mixer")
    one, other = (gs.gsc(model, x, positions="both", position_dim=dim).blocks for dim in (1, -2))
    np.testing.assert_array_equal(one.log10_values, other.log10_values)


@pytest.mark.parametrize("by", ["source", "both"])
def test_a_stream_is_the_whole_batch(by):
    model, x, _ = specimen("causal attention")
    x = noise(12, T, C)
    whole = gs.gsc(model, x, positions=by, probes="exact")
    found = gs.gsc(model, iter(x.split([3, 5, 4])), positions=by, probes="exact")
    np.testing.assert_allclose(found.blocks.log10_values, whole.blocks.log10_values, rtol=0, atol=1e-12)
    error = found.blocks.log10_stderr_sample
    np.testing.assert_allclose(error, whole.blocks.log10_stderr_sample, rtol=1e-9)
    low, high = found.blocks.interval()
    known = np.isfinite(found.blocks.log10_values[:-1])
    assert (low[:-1][known] < high[:-1][known]).all() and (error[:-1][known] > 0).all()


def test_source_positions_of_a_loss():
    model, x, _ = specimen("causal attention")
    labels = noise(B, T, 3, seed=5)

    def loss(output, labels):
        return (output - labels).square().mean((1, 2))

    found = gs.gsc(model, (x, labels), loss_fn=loss, positions="source")
    leaf = x.clone().requires_grad_()
    losses = loss(model(leaf), labels)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    expected = gradient.square().sum((0, 2)) / x.numel() * x.square().sum() / losses.detach().square().sum()
    np.testing.assert_allclose(10 ** found.blocks.log10_values[0, 0], expected, rtol=1e-10)
    assert found.blocks.layers == ("input", "0", "1", "2") and found.target == "loss"


def test_layers_without_positions_are_named_and_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(Causal(), Causal(), nn.Flatten(), nn.Linear(T * C, 2)).double()
    found = gs.gsc(model, noise(B, T, C), positions="source")
    assert found.blocks.layers == ("input", "0", "1")
    assert "Blocks leave out layers without 5 positions at position_dim=1: '2'." in str(found)
    np.testing.assert_allclose(found.log10_values, gs.gsc(model, noise(B, T, C)).log10_values, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"layers= holds layers without 5 positions at position_dim=1: '2'"):
        gs.gsc(model, noise(B, T, C), positions="source", layers=["input", "0", "2"])
    with pytest.raises(ValueError, match=r"target '3' of shape \(3, 2\) has no axis of 5 positions.*\"source\""):
        gs.gsc(model, noise(B, T, C), positions="both")
    by_target = gs.gsc(model, noise(B, T, C), positions="target", target="1")
    np.testing.assert_allclose((10**by_target.blocks.log10_values).sum((1, 2)), 10 ** by_target.log10_values[:, 0])


BAD = [
    ({"positions": "sources"}, "positions must be one of source, target, both; got 'sources'; did you mean 'source'?"),
    ({"position_dim": 2}, "position_dim=2 has no effect without positions="),
    ({"positions": "both", "position_dim": 0}, "position_dim=0 is the dimension of samples; shapes"),
    ({"positions": "both", "position_dim": 3}, "position_dim=3 does not exist beside the samples in any layer"),
    ({"positions": "both", "position_dim": -4}, "position_dim=-4 does not exist"),
    ({"positions": "both", "reduction": "geometric"}, 'reduction="geometric" do not add up'),
    ({"positions": "both", "probes": gs.Deflated(2, 2)}, r"spans directions over all positions"),
    ({"positions": 1}, "positions must be a string or None, got 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_options(options, message):
    model, x, _ = specimen("causal attention")
    with pytest.raises((TypeError, ValueError), match=message):
        gs.gsc(model, x, **options)


class Decay(nn.Module):
    """y_t = sum_s a^(t - s) x_s: the squared Jacobian of a block is d a^(2 (t - s))."""

    def __init__(self, decay):
        super().__init__()
        t = torch.arange(T)
        self.weight = nn.Parameter((decay ** (t[:, None] - t).double()).tril())

    def forward(self, x):
        return self.weight @ x


def test_the_lag_profile_of_a_decay():
    model, x = Decay(0.5), noise(B, T, C)
    found = gs.gsc(model, x, positions="both")
    frame = found.lag_profile(sinks=2)
    frame = frame[frame["layer"] == "input"]
    scale = float(x.square().sum() / model(x).detach().square().sum()) / T
    lags = frame[frame["quantity"] == "gsc_by_lag"]
    assert lags["lag"].tolist() == list(range(1 - T, T - 2))
    assert lags["num_blocks"].tolist() == [1, 2, 3, 3, 3, 2, 1]
    expected = np.where(lags["lag"] < 0, 0.0, scale * 0.25 ** lags["lag"].astype(float))
    np.testing.assert_allclose(lags["value"], expected, rtol=1e-9)
    sinks = frame[frame["quantity"] == "gsc_of_sink"]
    columns = [scale / T * sum(0.25**lag for lag in range(T - s)) for s in (0, 1)]
    np.testing.assert_allclose(sinks["value"], columns, rtol=1e-9)
    total = (frame["value"] * frame["num_blocks"].astype(float)).sum()
    np.testing.assert_allclose(total, 10 ** found.log10_values[0, 0], rtol=1e-9)
    with pytest.raises(ValueError, match="sinks=5 leaves none of 5 source positions"):
        found.lag_profile(sinks=5)
    with pytest.raises(ValueError, match="A lag needs both positions, but positions='source'"):
        gs.gsc(model, x, positions="source").lag_profile()


def test_the_frame_holds_profile_and_blocks(tmp_path):
    model, x, _ = specimen("causal attention")
    found = gs.gsc(model, x, positions="both", probes=3)
    frame = found.to_frame()
    profile, blocks = (part for _, part in frame.groupby("quantity"))
    assert profile["value"].tolist() == gs.gsc(model, x, positions="both", probes=3).rows_to()["value"].tolist()
    table = blocks.set_index(["layer", "target_position", "source_position"])["log10_value"]
    assert table["0", 3, 1] == found.blocks.log10_values[1, 3, 1]
    found.save(tmp_path / "positions.parquet")
    assert gs.frames.load(tmp_path / "positions.parquet")["quantity"].nunique() == 2


@pytest.mark.parametrize(
    ("model", "shape", "layers"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), (8, 4), "'input', '0', '1', '2'"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()), (8, 4, 5, 5), "'input', '0', '1'"),
        (nn.Sequential(Causal(), Causal()), (8, T, C), None),
    ],
)
def test_positions_that_are_features_or_channels_have_a_remark(model, shape, layers):
    remarks = gs.gsc(model, noise(*shape).float(), positions="source").remarks
    assert [layers in remark for remark in remarks] == ([True] if layers else [])
