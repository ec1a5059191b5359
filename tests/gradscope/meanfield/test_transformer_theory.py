"""Predictions for transformers against calculations by hand and against a plain network in torch."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

import gradscope as gs
import gradscope.meanfield as mf
from gradscope.models import GPT

ACTIVATIONS = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}


def values(frame, quantity, suffix):
    mine = (frame["quantity"] == quantity) & frame["layer"].str.endswith(suffix)
    return frame.loc[mine, "value"].to_numpy()


def log10_gsc(theory, *, branches=False):
    frame = theory.gsc()
    return frame.loc[frame["layer"].str.count(r"\.") == 1 + branches, "log10_value"].to_numpy()


def test_pre_norm_with_a_linear_mlp_by_hand():
    # Attention writes nothing.  A branch adds v to the length q of the stream, and v / q to a squared gradient of 1.
    v, depth, width = 0.5, 6, 10_000_000
    theory = mf.Transformer(depth, width, 4, activation="linear", value_variance=0.0, output_variance=v, overlap=0.2)
    q = 1 + v * np.arange(depth)
    np.testing.assert_allclose(values(theory.ledger(), "stream_rms", "mlp") ** 2, q, rtol=1e-4)  # eps is 1e-5
    np.testing.assert_allclose(values(theory.ledger(), "write_rms", "mlp") ** 2, v, rtol=1e-4)
    np.testing.assert_allclose(values(theory.ledger(), "stream_overlap", "mlp"), 0.2, rtol=1e-10)
    np.testing.assert_allclose(values(theory.ledger(), "skip_share", "mlp"), q / (q + v), rtol=1e-4)
    np.testing.assert_array_equal(values(theory.ledger(), "skip_share", "attention"), 1.0)
    # GSC(k) is the product of (1 + v / q_j) over j >= k, times q_k over the length at the end: 1.
    np.testing.assert_allclose(log10_gsc(theory), 0.0, atol=1e-4)


def test_no_norm_with_a_linear_mlp_by_hand():
    theory = mf.Transformer(
        5, 64, 3, "linear", norm="none", value_variance=0.0, output_variance=3.0, residual_scale=0.5
    )
    np.testing.assert_allclose(values(theory.ledger(), "stream_rms", "mlp") ** 2, 1.75 ** np.arange(5), rtol=1e-8)
    np.testing.assert_allclose(log10_gsc(theory), 0.0, atol=1e-8)
    np.testing.assert_allclose(10 ** log10_gsc(theory, branches=True)[1::2], 0.75 / 1.75, rtol=1e-8)


def test_post_norm_with_relu_by_hand():
    # Per block x -> norm(x + f(x)) with |f|^2 = v / 2 and |J_f|^2 = v / 2: the sum has length 1 + v / 2, and so has the
    # squared gradient.  The last layer norm removes 2 of 100 directions.  Those below remove the mean of what passed
    # through the branch above, which is 0.8 / 1.8 above the first norm of a block, and nothing above the second one.
    theory = mf.Transformer(3, 100, 4, "relu", norm="post", value_variance=0.0, output_variance=1.6)
    one = math.log10(1 - 0.8 / 1.8 / 100)
    expected = [math.log10(0.98) + 2 * one, math.log10(0.98) + one, 0.0]
    np.testing.assert_allclose(log10_gsc(theory), expected, atol=1e-4)
    np.testing.assert_allclose(values(theory.ledger(), "skip_share", "mlp"), 1 / 1.8, rtol=1e-4)


def test_one_token_passes_through_attention_alone():
    # Without an MLP, one token adds v to the length, as a linear branch does.
    theory = mf.Transformer(4, 50, 1, norm="none", score_variance=9.0, value_variance=0.25, output_variance=0.0)
    stream = values(theory.ledger(), "stream_rms", "attention") ** 2
    np.testing.assert_allclose(stream, 1.25 ** np.arange(4), rtol=1e-8)
    np.testing.assert_allclose(log10_gsc(theory), 0.0, atol=1e-8)


def test_many_tokens_that_have_become_one_are_as_one_token():
    # With post-norm, attention makes all tokens equal, and all gradients pass through the first one.
    many, one = (np.diff(log10_gsc(mf.Transformer(96, 64, num, norm="post"))) for num in (16, 1))
    np.testing.assert_allclose(many[18:36], one[18:36], rtol=1e-4)


def test_gpt2_has_the_variances_of_its_standard_deviation():
    theory = mf.Transformer.gpt2(3, 100, 4, std=0.1, norm_kind="rms", score_variance=2.0)
    plain = mf.Transformer(
        3, 100, 4, norm_kind="rms", residual_scale=6**-0.5, score_variance=2.0, value_variance=1.0,
        hidden_variance=1.0, output_variance=4.0, mean_square=0.02,
    )  # fmt: skip
    np.testing.assert_allclose(theory.gsc()["log10_value"], plain.gsc()["log10_value"], rtol=1e-9, atol=1e-12)


class Network:
    """A transformer in plain torch, float64, with Gaussian weights; x (T, width)."""

    def __init__(self, theory, heads, seed):
        self.theory, self.heads = theory, heads
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, rows, columns, variance):
        noise = torch.randn(rows, columns, generator=self.generator, dtype=torch.float64)
        return noise * math.sqrt(variance / columns)

    def norm(self, x):
        if self.theory.norm_kind == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5)

    def attention(self, x):
        t, d = self.theory, self.theory.width
        query, key = (self.draw(d, d, math.sqrt(t.score_variance)) for _ in range(2))
        value, out = (self.draw(d, d, math.sqrt(t.value_variance)) for _ in range(2))
        q, k, v = (torch.stack((x @ w.T).chunk(self.heads, dim=-1)) for w in (query, key, value))
        scores = q @ k.transpose(1, 2) / math.sqrt(d / self.heads)
        if t.causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        return torch.cat(list(scores.softmax(dim=-1) @ v), dim=-1) @ out.T

    def mlp(self, x):
        t, d, phi = self.theory, self.theory.width, ACTIVATIONS[self.theory.activation]
        h = x @ self.draw(4 * d, d, t.hidden_variance).T
        h = phi(x @ self.draw(4 * d, d, t.hidden_variance).T) * h if t.gated else phi(h)
        return h @ self.draw(d, 4 * d, t.output_variance).T

    def measure(self):
        """Mean squares of stream and write (branches, 2), and ln GSC of the embedding and all blocks but the last."""
        t, ledger = self.theory, []
        x = self.draw(t.length, t.width, t.width * t.mean_square).requires_grad_()
        stream = [x]
        for _ in range(t.depth):
            for branch in (self.attention, self.mlp):
                write = t.residual_scale * branch(self.norm(x) if t.norm == "pre" else x)
                ledger.append([x.square().mean().item(), write.square().mean().item()])
                x = self.norm(x + write) if t.norm == "post" else x + write
            stream.append(x)
        y = self.norm(x) if t.norm == "pre" else x
        cotangent = self.draw(t.length, t.width, t.width)  # |J|_F^2 = E |J^T v|^2
        gradients = torch.autograd.grad(y, stream[:-1], cotangent)
        pairs = zip(gradients, stream, strict=False)
        gsc = [(g.square().mean() * f.square().mean() / y.square().mean()).item() for g, f in pairs]
        return np.array(ledger), np.log(gsc)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu"},
        {"activation": "relu", "causal": False, "score_variance": 0.1, "residual_scale": 0.5},
        {"activation": "silu", "gated": True, "norm_kind": "rms"},
        {"activation": "gelu", "norm": "post", "value_variance": 0.5},
        {"activation": "relu", "norm": "none", "residual_scale": 0.3, "norm_kind": "rms"},
        {"activation": "gelu", "mean_square": 1e-3, "hidden_variance": 0.1, "residual_scale": 0.2},
    ],
)
def test_a_network_in_torch(options):
    seeds, theory = 6, mf.Transformer(depth=4, width=256, length=24, **options)
    ledgers, gscs = (
        np.array(part) for part in zip(*(Network(theory, 4, s).measure() for s in range(seeds)), strict=True)
    )
    frame = theory.ledger()
    expected = np.stack([frame.loc[frame["quantity"] == f"{what}_rms", "value"] ** 2 for what in ("stream", "write")])
    ratios = ledgers / expected.T
    error = ratios.std(axis=0, ddof=1) / math.sqrt(seeds)
    # Student's t of 5 degrees of freedom: 5 errors leave 0.4 % outside.  Finite width: 3 % of the length, twice of its
    # square.
    assert (np.abs(ratios.mean(axis=0) - 1) < 5 * error + 0.06).all()
    profile = theory.gsc().set_index("layer").loc[["embedding", *(f"blocks.{k}" for k in range(theory.depth - 1))]]
    ends = profile[["log10_low", "log10_high"]].to_numpy().T * math.log(10)
    within = (ends[0] < gscs) & (gscs < ends[1])
    assert within.mean() >= 0.9  # of 24 values, of which at least 95 % should lie in the band
    deviation = gscs.mean(axis=0) - profile["log10_value"].to_numpy() * math.log(10)
    assert (np.abs(deviation) < 5 * gscs.std(axis=0, ddof=1) / math.sqrt(seeds) + 0.06).all()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_share_of_the_skip_is_that_of_the_measured_ledger(norm):
    shares = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        model = GPT(depth=4, width=256, heads=4, length=16, vocabulary=64, norm=norm, generator=generator)
        x = torch.randint(64, (8, 16), generator=generator)
        pairs = [gs.residual(model, x, probes=4).to_frame(), model.mean_field(x).ledger()]
        measured, predicted = (frame[frame["quantity"] == "skip_share"].set_index("layer")["value"] for frame in pairs)
        assert list(measured.index) == list(predicted.index)
        shares.append(measured - predicted)
    assert np.abs(np.mean(shares, axis=0)).max() < 0.02  # its standard errors are up to 0.005


def test_norms_of_a_narrow_deep_network_remove_the_same_directions_again():
    # Two of 32 directions at each of 32 norms would be a factor of exp(-2).
    theory = mf.Transformer(16, 32, 8, norm="post", residual_scale=0.2)
    measured = np.array([Network(theory, 4, seed).measure()[1][0] for seed in range(4)])
    predicted = theory.gsc()["log10_value"][0] * math.log(10)
    assert abs(measured.mean() - predicted) < 0.5  # five standard errors of 0.1


def test_band_shrinks_with_the_root_of_the_width():
    halves = []
    for width in (100_000, 400_000):
        row = mf.Transformer(3, width, 8).gsc().set_index("layer").loc["embedding"]
        halves.append(row["log10_high"] - row["log10_value"])
    assert halves[0] == pytest.approx(2 * halves[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"norm": "batch"}, r"norm must be one of pre, post, none; got 'batch'\."),
        ({"norm_kind": "root"}, "norm_kind must be one of layer, rms; got 'root'"),
        ({"activation": "geluu"}, "activation must be one of .* did you mean 'gelu'"),
        ({"overlap": np.eye(3)}, r"overlap must be a number or a matrix \(4, 4\), got shape \(3, 3\)"),
        ({"overlap": 1.5}, "overlap must hold correlations between -1 and 1"),
        ({"width": 2}, "width must be an integer from 3 to 1e7, got 2"),
        ({"length": 4096}, "length must be an integer from 1 to 2048, got 4096"),
        ({"depth": 0}, "depth must be an integer from 1 to 100,000, got 0"),
        ({"hidden_variance": -1.0}, "hidden_variance must be a number from 1e-12 to 1e6, got -1.0"),
    ],
)
def test_arguments_that_do_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        mf.Transformer(**{"depth": 2, "width": 16, "length": 4} | options)


def test_scores_that_explode_name_the_block():
    theory = mf.Transformer(depth=12, width=64, length=16, norm="none")
    with pytest.raises(ValueError, match=r"blocks\.\d+\.attention cannot be predicted: Scores have standard deviation"):
        theory.gsc()
