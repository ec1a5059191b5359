"""The residual ledger on library models, its errors, and what it refuses."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.backward.cotangents import signs
from tests import zoo
from tests.helpers import linear, noise, seeded

SHARES = ("skip_share", "branch_share", "cross_share")


def values(found, quantity):
    return np.array([one.value for one in found.estimates[quantity]])


def gpt2(num_layers=2):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=num_layers, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval(), torch.randint(11, (3, 6), generator=seeded())


def hooked(model, data):
    """Logits and, per residual addition of GPT-2: x, write and sum, as hooks saw them."""
    seen = {}

    def keep(module, args, output):
        seen[module] = args[0] if args else None, output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep) for module in model.modules()]
    logits = model(data).logits
    for handle in handles:
        handle.remove()
    triples = []
    for block in model.transformer.h:
        middle = seen[block.ln_2][0]
        triples.append((seen[block.ln_1][0], seen[block.attn][1], middle))
        triples.append((middle, seen[block.mlp][1], seen[block][1]))
    return logits, triples


def test_gpt2_in_float32_against_numpy():
    model, data = gpt2()
    found = gs.residual(model, data, probes=1)
    assert found.writes == tuple(f"transformer.h.{n}.{part}" for n in range(2) for part in ("attn", "mlp"))
    for number, triple in enumerate(hooked(model, data)[1]):
        x, f, s = (t.detach().numpy().astype(np.float64).reshape(3, -1) for t in triple)
        rms = np.sqrt(np.square(s).mean(1))
        expected = {
            "stream_rms": np.sqrt(np.square(x).mean()),
            "write_rms": np.sqrt(np.square(f).mean()),
            "write_cosine": np.vdot(x, f) / np.linalg.norm(x) / np.linalg.norm(f),
            "sum_largest": (np.abs(s).max(1) / rms).mean(),
            "sum_p99": (np.percentile(np.abs(s), 99, axis=1) / rms).mean(),
        }
        for quantity, value in expected.items():
            assert values(found, quantity)[number] == pytest.approx(value, rel=1e-6), quantity
        assert found.channels[number] == int(np.argmax(np.abs(s) / rms[:, None])) % s.shape[1] % 8


def test_gradients_of_gpt2_with_the_same_probes_by_hand():
    model, data = gpt2()
    model = model.double()
    found = gs.residual(model, data, probes=5, generator=seeded(3))
    logits, triples = hooked(model, data)
    target = gs.capture(model, data).target
    probes = signs(target, 5, seeded(3)).draw(0, 5)
    for number, (x, _, total) in enumerate(triples):
        parts = []
        for v in probes:
            v_out, v_x = torch.autograd.grad(logits, (total, x), v, retain_graph=True)
            branch = v_x - v_out
            parts.append([float((v_out**2).sum()), float((branch**2).sum()), float(2 * (v_out * branch).sum())])
        parts = np.array(parts)
        share = parts.mean(0) / parts.sum(1).mean()
        np.testing.assert_allclose([values(found, name)[number] for name in SHARES], share, rtol=1e-10, atol=1e-12)
        influence = (parts - share * parts.sum(1, keepdims=True)) / parts.sum(1).mean()
        np.testing.assert_allclose(
            [found.stderr_probe[name][number] for name in SHARES], influence.std(0, ddof=1) / math.sqrt(5), rtol=1e-10
        )


@pytest.mark.parametrize("channel_dim", [None, 1, -1])
def test_resnet_in_float32_against_numpy(channel_dim):
    model = gs.models.ResNet(depth=8, width=4, generator=seeded()).eval()
    x = noise(3, 3, 8, 8).float()
    found = gs.residual(model, x, probes=1, channel_dim=channel_dim)
    assert found.skips == ("identity", "projection", "projection")
    sums, writes = [], []
    for name, module in model.named_modules():
        if name.endswith("relu2"):
            module.register_forward_hook(lambda module, args, output: sums.append(args[0].detach().double().numpy()))
        if name.endswith("norm2"):
            module.register_forward_hook(lambda module, args, output: writes.append(output.detach().double().numpy()))
    model(x)
    for number, (s, f) in enumerate(zip(sums, writes, strict=True)):
        assert values(found, "sum_rms")[number] == pytest.approx(np.sqrt((s**2).mean()), rel=1e-6)
        assert values(found, "write_rms")[number] == pytest.approx(np.sqrt((f**2).mean()), rel=1e-6)
        d = s.reshape(3, -1) - s.reshape(3, -1).mean(1, keepdims=True)
        kurtosis = ((d**4).mean(1) / (d**2).mean(1) ** 2).mean()
        assert values(found, "sum_kurtosis")[number] == pytest.approx(kurtosis, rel=1e-6)
        relative = np.abs(s) / np.sqrt((s**2).mean((1, 2, 3), keepdims=True))
        assert found.channels[number] == np.unravel_index(relative.argmax(), s.shape)[channel_dim or 1]


class Rotated(nn.Module):
    """x + a R x, where R rotates every plane by one angle."""

    def __init__(self, a, angle, depth=3):
        super().__init__()
        c, s = math.cos(angle), math.sin(angle)
        plane = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        self.layers = nn.ModuleList(linear(a * torch.block_diag(plane, plane)) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(("a", "angle"), [(0.5, 1.0), (2.0, 2.5)])
def test_rotations_have_closed_forms(a, angle):
    found = gs.residual(Rotated(a, angle), noise(3, 4))
    cosine = math.cos(angle)
    square = 1 + a**2 + 2 * a * cosine
    for quantity, value in (
        ("write_ratio", a), ("write_cosine", cosine), ("skip_share", 1 / square), ("branch_share", a**2 / square),
        ("cross_share", 2 * a * cosine / square),
    ):  # fmt: skip
        np.testing.assert_allclose(values(found, quantity), value, rtol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_writes_of_an_encoder_layer(norm_first, training):
    layer = nn.TransformerEncoderLayer(4, 2, 8, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    found = gs.residual(model, noise(2, 3, 4).float())
    assert found.writes == tuple(f"layers.{n}.{part}" for n in range(2) for part in ("self_attn", "linear2"))
    assert found.blocks[::2] == ("layers.0", "layers.1")


def function(call):
    """A module with two weights that calls a function of (linear layers, x)."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double()

        def forward(self, x):
            return call(*self.layers, x)

    return Model()


def rotary(first, second, third, x):
    q, angles = first(x), torch.arange(4.0, dtype=x.dtype)
    return second(q * angles.cos() + torch.cat([-q[..., 2:], q[..., :2]], -1) * angles.sin())


def gated(first, second, third, x):
    gate = first(x).sigmoid()
    return gate * x + (1 - gate) * second(x).tanh()


def long_activation(first, second, third, x):
    h = f = first(x)
    for _ in range(12):
        f = f.sin()
    return second(h + f)


NOT_RESIDUAL = {
    "long activation": long_activation,
    "plain": lambda first, second, third, x: second(first(x).relu()),
    "activation": lambda first, second, third, x: second((h := first(x)) + 0.04 * h**3),
    "two branches": lambda first, second, third, x: second(first(x).tanh()) + third(first(x).relu()),
    "equal projections": lambda first, second, third, x: first(x) + second(x),
    "twice": lambda first, second, third, x: (h := first(x)) + h,
    "rotary": rotary,
    "gates": gated,
    "broadcast": lambda first, second, third, x: (h := first(x)) + second(h).mean(0, keepdim=True),
    "detached": lambda first, second, third, x: (h := first(x)) + second(h).detach(),
}


@pytest.mark.parametrize("call", NOT_RESIDUAL.values(), ids=NOT_RESIDUAL)
def test_other_sums_are_not_residual(call):
    with pytest.raises(ValueError, match="The model has no residual addition between the input and '"):
        gs.residual(function(call), noise(3, 4))


def test_an_embedding_sum_is_not_residual():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.word, self.kind, self.head = nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, word, kind):
            x = self.word(word) + self.kind(kind)
            return x + self.head(x)

    tokens = torch.arange(4).reshape(2, 2)
    assert gs.residual(Embedded(), {"word": tokens, "kind": tokens}).writes == ("head",)


def test_sums_inside_operations_are_counted():
    model = function(lambda first, second, third, x: second(torch.addcmul(h := first(x), third(h), third(h))))
    with pytest.raises(ValueError, match="inside operations of torch: 1"):
        gs.residual(model, noise(3, 4))
    both = function(lambda first, second, third, x: (y := torch.addcmul(x, first(x), first(x))) + second(y))
    found = gs.residual(both, noise(3, 4))
    assert found.writes == ("layers.1",)
    assert found.remarks[-1].endswith("complex or inside operations of torch: 1.")


def test_a_write_without_a_module_has_the_name_of_the_block():
    model = function(lambda first, second, third, x: (y := x + x @ first.weight) + y.flip(1) @ second.weight)
    assert gs.residual(model, noise(3, 4)).writes == ("Model (sum)", "Model (sum) (2)")


def test_a_write_of_zeros_has_no_cosine():
    model = function(lambda first, second, third, x: (y := x + 0 * first(x)) + second(y))
    found = gs.residual(model, noise(3, 4))
    frame = found.to_frame()
    assert list(frame.loc[frame["quantity"] == "write_cosine", "layer"]) == ["layers.1"]
    assert frame.loc[frame["quantity"] == "write_rms", "value"].iloc[0] == 0
    assert values(found, "branch_share")[0] == 0
    assert found.remarks[-1] == "write_cosine does not exist for 'layers.0', because a length is zero."
    assert len(found.plot()) == 3


def mlp(depth=4, width=6, **options):
    options = {"norm": "layer", "residual": "identity", "generator": seeded()} | options
    return gs.models.MLP(depth=depth, width=width, **options).double()


def test_a_stream_is_one_large_batch():
    x = noise(64, 6)
    whole, parts = gs.residual(mlp(), x), gs.residual(mlp(), iter(x.split(16)))
    assert (parts.num_batches, parts.num_samples) == (4, 64)
    one, other = whole.to_frame(), parts.to_frame()
    np.testing.assert_allclose(one["value"], other["value"], rtol=1e-12)
    np.testing.assert_allclose(one["stderr_sample"], other["stderr_sample"], rtol=1e-9)
    assert one.loc[one["quantity"] == "cross_share", "stderr_sample"].notna().all()
    assert gs.residual(mlp(), x[:29]).to_frame().query("quantity == 'sum_rms'")["stderr_sample"].isna().all()


def test_batches_with_different_additions_are_refused():
    model = function(lambda first, second, third, x: x + (first if len(x) > 2 else second)(x))
    with pytest.raises(ValueError, match=r"different residual additions, 'layers\.0' and 'layers\.1'"):
        gs.residual(model, iter([noise(3, 4), noise(2, 4)]))


def test_errors_due_to_probes_are_those_of_repetitions():
    model, x = mlp(), noise(4, 6)
    exact = gs.residual(model, x, probes="exact")
    runs = [gs.residual(model, x, probes=12, generator=seeded(seed)) for seed in range(60)]
    for share in SHARES:
        errors = np.array([run.stderr_probe[share] for run in runs])
        deviations = np.array([values(run, share) for run in runs]) - values(exact, share)
        ratio = np.sqrt((deviations**2).mean(0) / (errors**2).mean(0))
        assert np.all((ratio > 0.75) & (ratio < 1.35)), share  # 60 runs: 9 % per standard error
    assert (exact.stderr_probe["skip_share"] == 0).all()


def test_intervals_over_samples_contain_the_value_of_a_large_population():
    x, model = noise(40 * 60, 6), mlp(norm="none", activation="tanh")
    runs, whole = [gs.residual(model, part) for part in x.split(40)], gs.residual(model, iter(x.split(400)))
    for quantity, truth in ((name, values(whole, name)) for name in whole.estimates):
        errors = np.array([[one.stderr for one in run.estimates[quantity]] for run in runs], dtype=np.float64)
        inside = np.abs([values(run, quantity) - truth for run in runs]) < 1.96 * errors
        known = ~np.isnan(errors)
        assert known.mean() > 0.9 and inside[known].mean() > 0.91, quantity  # 240 intervals of 95 %


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    model, x = mlp(width=16).float(), noise(8, 16).float()
    expected = gs.residual(model, x)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = gs.residual(model, x)
    else:
        found = gs.residual(model.bfloat16(), x.bfloat16())
    assert found.writes == expected.writes
    for quantity in found.estimates:
        np.testing.assert_allclose(values(found, quantity), values(expected, quantity), rtol=0.03, atol=0.02)


def test_gradients_that_underflow_are_refused():
    model = function(lambda first, second, third, x: 3e-44 * ((y := first(x)) + second(y))).float()
    with pytest.raises(FloatingPointError, match=r"too small for torch.float32: measure in float32 or float64"):
        gs.residual(model, noise(3, 4).float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_dim": 2}, r"channel_dim=2 does not exist in a sum of shape \(3, 6\)"),
        ({"probes": 0}, 'probes must be a whole number >= 1, "exact" or "auto"; got 0'),
        ({"target": "layer.9"}, "No layer is called 'layer.9'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        gs.residual(mlp(), noise(3, 6), **options)


def test_the_model_and_torch_are_left_as_they_were():
    model, x = gs.models.ResNet(depth=8, width=4), noise(4, 3, 8, 8).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    gs.residual(model, x)
    with pytest.raises(RuntimeError, match="stop"):
        gs.residual(model, x, forward=lambda model, x: (model(x), stop())[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def stop():
    raise RuntimeError("stop")


def test_frames_follow_the_schema(tmp_path):
    found = gs.residual(mlp(), noise(40, 6), probes=3)
    frame = gs.frames.check(found.to_frame())
    assert len(frame) == 4 * 12
    shares = frame[frame["quantity"].isin(SHARES)]
    assert (shares.groupby("index")["value"].sum() - 1).abs().max() < 1e-12
    assert (shares["num_probes"] == 3).all() and (shares["stderr_probe"] > 0).all()
    path = gs.frames.save(frame, tmp_path / "ledger.parquet")
    assert gs.frames.load(path).equals(frame)
    assert "\n" not in repr(found) and "layers.3.out" in str(found) and "<table" in found._repr_html_()


def test_a_target_inside_leaves_out_what_comes_after():
    found = gs.residual(mlp(), noise(3, 6), target="layers.1")
    assert (found.target, found.writes) == ("layers.1", ("layers.0.out", "layers.1.out"))
    assert values(found, "skip_share").shape == (2,)


def test_torch_functional_dropout_changes_nothing_but_the_write():
    model = function(lambda first, second, third, x: x + functional.dropout(first(x), 0.5))
    torch.manual_seed(0)
    found = gs.residual(model, noise(300, 4))
    torch.manual_seed(0)
    write = functional.dropout(model.layers[0](noise(300, 4)), 0.5)
    assert values(found, "write_rms")[0] == pytest.approx(float(write.detach().square().mean().sqrt()), rel=1e-12)


def test_a_write_that_is_a_sum_has_both_names():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, vocab_size=11)).eval()
    found = gs.residual(model, torch.arange(6).reshape(2, 3), probes=1)
    assert found.writes == tuple(f"gpt_neox.layers.{n}.(mlp + attention)" for n in range(2))


LIBRARY = {
    "GPT-2": "transformer.h.{0,1}.{attn,mlp}",
    "BERT": "bert.encoder.layer.{0,1}.{attention.output.dense,output.dense}",
    "Llama": "model.layers.{0,1}.{self_attn,mlp}",
    "T5 encoder": "encoder.block.{0,1}.layer.{0.SelfAttention,1.DenseReluDense}",
    "Swin": "swin.encoder.layers.{0,1}.blocks.{0,1}.{attention,mlp}",
    "ViT": "vit.layers.{0,1}.{attention,mlp}",
    "Mamba": "backbone.layers.{0,1}.{mixer (sum),mixer}",
    "ResNet": "resnet.encoder.stages.{0,1}.layers.{0,1}.layer",
}


def expanded(pattern):
    """The names of a pattern with alternatives in braces, as in a shell."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return tuple(map("".join, itertools.product(*parts)))


@pytest.mark.parametrize("name", LIBRARY)
def test_names_of_writes_in_library_models(name):
    specimen = zoo.TRANSFORMERS[name]()
    found = gs.residual(specimen.model, specimen.data, probes=1)
    assert found.writes == expanded(LIBRARY[name])
    assert {"Mamba": {"scaled", "identity"}, "ResNet": {"projection", "identity"}}.get(name, {"identity"}) == {
        *found.skips
    }


def test_the_figure_shows_the_numbers():
    found = gs.residual(mlp(), noise(40, 6))
    lengths, ratios, shares = found.plot()
    lines = {line.get_label(): line.get_ydata() for ax in (lengths, shares) for line in ax.lines}
    np.testing.assert_array_equal(lines["stream"], values(found, "stream_rms"))
    np.testing.assert_array_equal(lines["out"], values(found, "write_rms"))
    np.testing.assert_array_equal(lines["branch"], values(found, "branch_share"))
    cross = values(found, "cross_share")
    np.testing.assert_array_equal(lines["cross term"], np.abs(cross))
    assert (cross < 0).any()
    np.testing.assert_array_equal(lines["cross term, negative"], -cross[cross < 0])
    np.testing.assert_array_equal(ratios.lines[0].get_ydata(), values(found, "write_ratio"))
    with pytest.raises(ValueError, match="several rows of 'stream_rms' for an addition: draw one network at a time"):
        gs.plots.residual([found, found])
    with pytest.raises(ValueError, match="axes must be three Axes, got 2"):
        found.plot(axes=[lengths, ratios])
