"""The GPT: parameter counts, a forward pass in NumPy, causality, initial weights, and all measurements on it."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

import gradscope as gs
from gradscope.models import GPT
from gradscope.models.gpt import GATED, INITS, NORMS
from tests import bruteforce
from tests.helpers import seeded

SMALL = {"vocabulary": 11, "length": 6, "depth": 2, "width": 12, "heads": 3}


def tokens(batch: int = 3, length: int = 6, vocabulary: int = 11) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length), generator=seeded(1))


def perturbed(**options) -> GPT:
    """A float64 model whose norms and biases, too, have random parameters."""
    model = GPT(**SMALL | options, generator=seeded()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(2)))
    return model


@pytest.mark.parametrize(
    ("options", "per_block", "rest"),
    [
        ({}, 4 * 144 + 2 * 4 * 144 + 2 * 12, 11 * 12 + 6 * 12 + 12 + 11 * 12),
        ({"mlp": "swiglu"}, 4 * 144 + 3 * 12 * 32 + 2 * 12, 11 * 12 + 6 * 12 + 12 + 11 * 12),  # 8 * 12 / 3 = 32
        ({"norm": "none", "tied": True}, 4 * 144 + 8 * 144, 11 * 12 + 6 * 12),
        ({"norm": "post", "norm_kind": "rms", "qk_norm": True}, 12 * 144 + 2 * 12 + 2 * 4, 2 * 11 * 12 + 6 * 12),
        ({"bias": True}, 12 * 144 + 4 * 12 + 48 + 12 + 4 * 12, 11 * 12 + 6 * 12 + 2 * 12 + 11 * 12),
    ],
)
def test_parameter_counts_by_hand(options, per_block, rest):
    assert sum(p.numel() for p in GPT(**SMALL | options).parameters()) == 2 * per_block + rest


def test_gpt2_small_has_the_published_number_of_parameters():
    options = {"vocabulary": 1, "length": 1024, "width": 768, "heads": 12, "tied": True, "bias": True}
    one, two = (sum(p.numel() for p in GPT(**options, depth=depth).parameters()) for depth in (1, 2))
    assert one + 11 * (two - one) + 50256 * 768 == 124_439_808  # 12 blocks, 50257 tokens


def in_numpy(model: GPT, x: np.ndarray, *, norm: str, rms: bool, qk_norm: bool, swiglu: bool) -> np.ndarray:
    """The logits of one sequence (T,), position by position and head by head."""
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}

    def normalized(name: str, h: np.ndarray) -> np.ndarray:
        centered = h if rms else h - h.mean()
        y = centered / np.sqrt((centered**2).mean() + 1e-5) * p[f"{name}.weight"]
        return y + p.get(f"{name}.bias", 0.0)

    def linear(name: str, h: np.ndarray) -> np.ndarray:
        return p[f"{name}.weight"] @ h + p.get(f"{name}.bias", 0.0)

    def attention(name: str, stream: list[np.ndarray]) -> list[np.ndarray]:
        written = [[] for _ in stream]
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            q, k, v = ([linear(f"{name}.{kind}", h)[part] for h in stream] for kind in ("query", "key", "value"))
            if qk_norm:
                q = [normalized(f"{name}.query_norm", h) for h in q]
                k = [normalized(f"{name}.key_norm", h) for h in k]
            for t in range(len(stream)):
                weights = np.exp([q[t] @ k[s] / math.sqrt(4) for s in range(t + 1)])
                written[t].extend(sum(w * v[s] for s, w in enumerate(weights)) / weights.sum())
        return [linear(f"{name}.out", np.array(h)) for h in written]

    def mlp(name: str, h: np.ndarray) -> np.ndarray:
        hidden = linear(f"{name}.linear", h)
        if swiglu:
            gate = linear(f"{name}.gate", h)
            return linear(f"{name}.out", hidden * gate / (1 + np.exp(-gate)))
        return linear(f"{name}.out", hidden * np.array([(1 + math.erf(z / math.sqrt(2))) / 2 for z in hidden]))

    stream = [p["embedding.tokens.weight"][token] + p["embedding.positions.weight"][t] for t, token in enumerate(x)]
    for number in range(2):
        for place, branch in ((1, "attention"), (2, "mlp")):
            before = [normalized(f"blocks.{number}.norm{place}", h) if norm == "pre" else h for h in stream]
            name = f"blocks.{number}.{branch}"
            written = attention(name, before) if branch == "attention" else [mlp(name, h) for h in before]
            stream = [h + w for h, w in zip(stream, written, strict=True)]
            if norm == "post":
                stream = [normalized(f"blocks.{number}.norm{place}", h) for h in stream]
    last = [normalized("norm", h) if norm == "pre" else h for h in stream]
    return np.array([linear("head", h) for h in last])


@pytest.mark.parametrize(
    ("norm", "rms", "qk_norm", "swiglu", "bias"),
    [
        ("pre", False, False, False, True),
        ("pre", True, True, True, False),
        ("post", False, True, True, True),
        ("post", True, False, False, False),
        ("none", False, False, True, True),
    ],
)
def test_logits_are_those_of_a_forward_pass_in_numpy(norm, rms, qk_norm, swiglu, bias):
    kinds = {"norm_kind": "rms" if rms else "layer", "mlp": "swiglu" if swiglu else "gelu"}
    model, x = perturbed(norm=norm, qk_norm=qk_norm, bias=bias, **kinds), tokens()
    expected = [in_numpy(model, row, norm=norm, rms=rms, qk_norm=qk_norm, swiglu=swiglu) for row in x.numpy()]
    np.testing.assert_allclose(model(x).detach().numpy(), np.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_changes_the_logits_of_no_earlier_position_if_attention_is_causal(causal):
    model, x = perturbed(causal=causal), tokens()
    other = x.clone()
    other[:, 3] = (x[:, 3] + 1) % 11
    changed = (model(x) != model(other)).any(dim=2).all(dim=0)
    assert changed.tolist() == ([False] * 3 + [True] * 3 if causal else [True] * 6)
    if causal:  # a shorter sequence has the same logits
        torch.testing.assert_close(model(x[:, :4]), model(x)[:, :4])


def test_all_combinations_give_finite_logits_and_gradients():
    choices = {
        "norm": NORMS, "norm_kind": ("layer", "rms"), "qk_norm": (False, True), "mlp": ("gelu", "relu", *GATED),
        "residual_scale": (1.0, "depth"), "tied": (False, True), "init": INITS,
    }  # fmt: skip
    x = tokens()
    for number, values in enumerate(itertools.product(*choices.values())):
        if number % 7:  # every pair of values occurs, because 7 divides no number of values
            continue
        options = dict(zip(choices, values, strict=True))
        model = GPT(**SMALL, **options, dropout=0.1, generator=seeded())
        functional.cross_entropy(model(x).movedim(-1, 1), x).backward()
        assert all(p.grad.isfinite().all() and p.isfinite().all() for p in model.parameters()), options


def test_initial_weights():
    wide = {"vocabulary": 500, "length": 400, "depth": 8, "width": 400, "heads": 4}
    model = GPT(**wide, generator=seeded())
    names = ["blocks.3.attention.query", "blocks.3.mlp.linear", "blocks.3.mlp.out", "head"]
    variances = [float(model.get_submodule(name).weight.detach().var()) for name in names]
    # 160,000 numbers or more: the relative standard error of a variance is sqrt(2 / 160,000) = 0.0035.
    np.testing.assert_allclose(variances, [1 / 400, 1 / 400, 1 / 1600, 1 / 400], rtol=0.015)
    x = torch.arange(400)[None]
    assert float(model.embedding(x).detach().square().mean()) == pytest.approx(1.0, rel=0.015)
    scaled = GPT(**wide, residual_scale="depth", generator=seeded()).state_dict()
    for name, weight in model.state_dict().items():
        factor = 1 / 4 if name.endswith(("attention.out.weight", "mlp.out.weight")) else 1  # sqrt(2 * 8) = 4
        torch.testing.assert_close(scaled[name], factor * weight)
    gpt2 = GPT(**wide, init="gpt2", tied=True, generator=seeded())
    assert gpt2.head.weight is gpt2.embedding.tokens.weight
    assert {round(float(p.detach().std()), 3) for p in gpt2.parameters() if p.ndim > 1} == {0.02}
    query = GPT(**wide, init="orthogonal", generator=seeded()).blocks[0].attention.query.weight
    torch.testing.assert_close(query @ query.T, torch.eye(400), rtol=0, atol=1e-4)


def test_gsc_of_embedding_branches_and_blocks_is_that_of_the_whole_jacobian():
    model, x = perturbed(length=4, qk_norm=True, mlp="swiglu"), tokens(batch=2, length=4)
    layers = ["embedding", "blocks.0.attention", "blocks.0.mlp", "blocks.0", "blocks.1.attention", "norm"]
    profile = gs.gsc(model, x, layers=[*layers, "head"], probes="exact")
    assert profile.layers == (*layers, "head")
    expected = [bruteforce.gsc_log10(model, name, x) for name in layers]
    np.testing.assert_allclose(np.squeeze(profile.log10_values)[:-1], expected, rtol=1e-9, atol=1e-9)
    assert gs.gsc(model, x, probes=1).layers == ("embedding", "blocks.0", "blocks.1", "norm", "head")


@pytest.mark.parametrize("norm", NORMS)
def test_every_measurement_works_on_tokens(norm):
    model, x = GPT(**SMALL, norm=norm, generator=seeded()), tokens(batch=8)
    matrix = gs.gsc_matrix(model, x, probes="exact")
    profile = gs.gsc(model, x, probes="exact")
    pairs = matrix.to_frame().query("target == 'head'").set_index("layer")["log10_value"]
    whole = profile.to_frame().query("quantity == 'gsc'").set_index("layer")["log10_value"]
    np.testing.assert_allclose(pairs[whole.index], whole, atol=1e-5)
    of_parameters = gs.parameter_gsc(model, x, generator=seeded())
    assert {"embedding.tokens", "embedding.positions", "head"} <= set(of_parameters.layers)
    assert set(gs.measure(model, x)["layer"]) >= {"blocks.0.mlp.activation", "blocks.1.mlp.activation"}
    assert gs.nlc(model, x, generator=seeded()).value > 0
    assert gs.effective_depth(model, x, initial=GPT(**SMALL, norm=norm, generator=seeded())).at() == 0


def test_the_monitor_records_a_training():
    model, x = GPT(**SMALL, generator=seeded()), tokens(batch=8)
    monitor = gs.Monitor(model, x, every=1, loss_fn=lambda output, y: functional.cross_entropy(
        output.movedim(-1, 1), y, reduction="none").mean(1))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = functional.cross_entropy(model(x).movedim(-1, 1), x)
        optimizer.zero_grad()
        loss.backward()
        monitor.step(loss, (x, x))
        optimizer.step()
        losses.append(float(loss.detach()))
    monitor.close()
    assert losses[-1] < losses[0] / 2
    found = monitor.to_frame().query("quantity == 'gsc'")
    assert set(found["layer"]) >= {"embedding", "blocks.0", "blocks.1"} and found["log10_value"].notna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads must divide width, got heads=5 and width=12"),
        ({"norm": "middle"}, "norm must be one of pre, post, none; got 'middle'"),
        ({"norm_kind": "batch"}, "norm_kind.*'batch'"),
        ({"mlp": "swiglou"}, "did you mean 'swiglu'"),
        ({"residual_scale": "width"}, "residual_scale.*'width'"),
        ({"residual_scale": -1.0}, "residual_scale.*-1.0"),
        ({"init": "looks_linear"}, "init.*'looks_linear'"),
        ({"dropout": 2.0}, "dropout.*2.0"),
        ({"depth": 0}, "depth.*0"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        GPT(**SMALL | options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tokens().float(), r"integer tokens of shape \(B, T\).*float32"),
        (tokens(length=7), r"T from 1 to length=6, got torch.int64 of shape \(3, 7\)"),
        (tokens()[0], r"of shape \(6,\)"),
        (tokens() + 5, "between 0 and 10, got 5 to 1[0-9]: set vocabulary"),
    ],
)
def test_refused_tokens(x, message):
    with pytest.raises(ValueError, match=message):
        GPT(**SMALL)(x)
