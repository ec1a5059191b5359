"""Which attention is seen, in models of torch and of ``transformers``, and what is said about attention that is not."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention

import gradscope as gs
from tests.gradscope.transformers.test_attention import ByHand, Fused, check, data, reference, statistics
from tests.helpers import noise
from tests.zoo import SMALL, TRANSFORMERS, tokens


def built(name, implementation, seed=0):
    """A tiny model of ``transformers`` in float32 with large weights, so that heads differ."""
    transformers = pytest.importorskip("transformers", reason="the extra 'zoo' is not installed")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    kinds = {
        "GPT2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}),
        "Llama": ("LlamaForCausalLM", sizes | {"num_key_value_heads": 2}),
        "Bert": ("BertModel", sizes),
        "ViT": ("ViTModel", sizes | {"image_size": 8, "patch_size": 4}),
    }
    kind, options = kinds[name]
    if name != "ViT":
        options = options | {"vocab_size": 7}
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation=implementation)
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def inputs(name):
    torch.manual_seed(1)
    if name == "ViT":
        return {"pixel_values": noise(3, 3, 8, 8).float()}
    mask = torch.ones(3, 6, dtype=torch.long)
    if name in ("Bert", "Llama"):
        mask[1, 4:] = 0
    return {"input_ids": tokens(3, 6), "attention_mask": mask}


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Bert", "ViT"])
def test_eager_and_fused_attention_give_the_same_numbers_as_the_weights_of_the_model(name):
    batch = inputs(name)
    eager, fused = (built(name, implementation) for implementation in ("eager", "sdpa"))
    found = [gs.attention(model, batch) for model in (eager, fused)]
    first, second = (result.to_frame() for result in found)
    assert [set(result.describe().to_frame()["function"]) for result in found] == [
        {"softmax"}, {"scaled_dot_product_attention"},
    ]  # fmt: skip
    keys = ["layer", "index", "head", "quantity", "num_samples"]
    assert first[keys].equals(second[keys])
    np.testing.assert_allclose(first["value"], second["value"], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        attentions = eager(**batch, output_attentions=True).attentions
    layers = first["layer"].unique()
    assert len(layers) == len(attentions) == 2
    for layer, weights in zip(layers, attentions, strict=True):
        logits = np.log(np.where(weights > 0, weights.double(), 1e-30))  # up to a constant per query
        logits[np.asarray(weights) == 0] = -np.inf
        expected = statistics(logits)
        rows = first[(first["layer"] == layer) & ~first["quantity"].str.contains("logit")]
        for quantity, part in rows.groupby("quantity"):
            np.testing.assert_allclose(part["value"], expected[quantity].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["nn.MultiheadAttention", "nn.TransformerDecoder, memory as an input"])
def test_networks_of_torch(name):
    specimen = SMALL[name]()
    found = gs.attention(specimen.model, specimen.data, forward=specimen.forward).describe().to_frame()
    assert len(found) == sum(isinstance(m, nn.MultiheadAttention) for m in specimen.model.modules())


@pytest.mark.parametrize("name, calls", [("T5", 6), ("Swin", 4)])
def test_models_with_other_attention(name, calls):
    pytest.importorskip("transformers", reason="the extra 'zoo' is not installed")
    specimen = TRANSFORMERS[name]()
    result = gs.attention(specimen.model, specimen.data)
    assert len(result.describe().to_frame()) == calls and set(result.to_frame()["num_samples"]) == {2}


class Classifier(nn.Module):
    """A softmax over classes, with and without positions, and gates of experts that a linear map reads."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(5, 5))

    def forward(self, x):  # (B, T, 5)
        if self.kind == "classes":
            return x.mean(1).softmax(-1)
        if self.kind == "pixels":
            return x.softmax(-1)
        if self.kind == "channels":
            return x.softmax(1) @ x.mT
        gates = torch.softmax(x, -1)
        return gates @ self.weight if self.kind == "gates" else torch.einsum("bte,ef->btf", gates, self.weight)


@pytest.mark.parametrize("kind", ["classes", "pixels", "channels", "gates", "gates, einsum"])
def test_other_uses_of_softmax_are_not_attention(kind):
    with pytest.raises(ValueError, match="No attention was seen in Classifier"):
        gs.attention(Classifier(kind), noise(3, 4, 5).float())


@pytest.mark.parametrize("name", ["mixture of experts", "DenseNet"])
def test_networks_without_attention(name):
    specimen = SMALL[name]()
    with pytest.raises(ValueError, match="No attention was seen"):
        gs.attention(specimen.model, specimen.data)


class Block(nn.Module):
    """Attention with projections, by one of several functions."""

    def __init__(self, function):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.function = function

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.function(q, k, v).transpose(1, 2).flatten(2)


FUSED = functional.scaled_dot_product_attention


def flexible(q, k, v):
    return flex_attention(*(tensor.detach() for tensor in (q, k, v)))  # which has no gradients on a CPU


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_was_seen_and_what_was_not():
    model = nn.Sequential(Block(FUSED), Block(flexible), Block(FUSED))
    model.add_module("head", nn.Linear(4, 4))
    result = gs.attention(model, noise(3, 5, 4).float())
    described = result.describe()
    frame = described.to_frame()
    assert frame["layer"].tolist() == ["0", "2", "1"]
    assert frame["function"].isna().tolist() == [False, False, True]
    assert frame["note"].iloc[2] == "called, but no attention was seen in it"
    for text in (str(result), str(described)):
        assert "2 x scaled_dot_product_attention" in text and "'1', called, but" in text
    assert repr(result) == "AttentionHeads(2 calls of attention, 4 heads, 3 sequences)"
    assert "<table" in result._repr_html_()


def test_calls_are_named_by_their_module_and_numbered():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block(FUSED)

        def forward(self, x):
            return FUSED(x, self.inner(x), self.inner(x))

    frame = gs.attention(Twice(), noise(3, 5, 4).float()).describe().to_frame()
    assert frame["layer"].tolist() == ["inner", "inner#2", "Twice"]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_nothing_seen_names_the_modules_that_look_like_attention():
    with pytest.raises(ValueError, match=r"No attention was seen in Sequential: .* ran in '0', '1', and no softmax"):
        gs.attention(nn.Sequential(Block(flexible), Block(flexible)), noise(3, 5, 4).float())


@pytest.mark.parametrize("part", ["whole", "part", "function"])
def test_compiled_code_is_measured_in_eager_mode(part):
    model = nn.Sequential(Block(FUSED), nn.Linear(4, 4))
    expected = gs.attention(model, x := noise(3, 5, 4).float()).to_frame()["value"]
    if part == "whole":
        compiled = torch.compile(model, backend="eager")
        with pytest.warns(UserWarning, match="eager original is measured"):
            found = gs.attention(compiled, x)
    elif part == "part":
        model[0] = torch.compile(model[0], backend="eager")
        found = gs.attention(model, x)
    else:
        model[0].function = torch.compile(FUSED, backend="eager")
        found = gs.attention(model, x)
    assert found.to_frame()["value"].tolist() == expected.tolist()


def test_a_call_inside_a_transform_is_named():
    class Mapped(nn.Module):
        def forward(self, q, k, v):
            return torch.vmap(FUSED)(q, k, v) + FUSED(q, k, v)

    result = gs.attention(Mapped(), data())
    assert "in 'Mapped', inside a transform of torch.func" in str(result) and len(result.describe().to_frame()) == 1


def test_a_failed_call_that_the_model_caught_is_no_place():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.broken, self.inner = nn.Linear(3, 3), Fused()

        def forward(self, q, k, v):
            try:
                self.broken(q)
            except RuntimeError:
                return self.inner(q, k, v)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.careful = Careful()

        def forward(self, q, k, v):
            return self.careful(q, k, v) + FUSED(q, k, v)

    assert gs.attention(Outer(), data()).describe().to_frame()["layer"].tolist() == ["careful.inner", "Outer"]


def test_bad_shapes_are_the_model_s_error():
    with pytest.raises(ValueError, match=r"cannot run on data of float32 \(3, 5, 3\)"):
        gs.attention(nn.Sequential(nn.Linear(4, 4)), noise(3, 5, 3).float())


def test_logits_that_are_not_finite_name_the_module():
    batch = data()
    with pytest.raises(ValueError, match=r"Attention in 'Fused' has logits that are NaN or Inf: gs.first_nonfinite"):
        gs.attention(Fused(scale=float("inf")), batch)


def test_a_head_that_attends_to_nothing_is_named():
    mask = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    mask[:, 1] = False
    with pytest.raises(ValueError, match="All queries of head 1 in 'Fused' are fully masked"):
        gs.attention(Fused(attn_mask=mask), data())


def test_batches_that_make_other_calls_are_refused():
    batches = [data(heads=2), data(heads=4)]
    with pytest.raises(ValueError, match="The batches make different calls of attention"):
        gs.attention(Fused(), iter(batches))
    with pytest.raises(ValueError, match="data has no batches"):
        gs.attention(Fused(), iter([]))
    with pytest.raises(ValueError, match="data has more than 500 batches: give a part"):
        gs.attention(Fused(), itertools.repeat(data(batch=1, heads=1, queries=1, keys=1)))
    with pytest.raises(TypeError, match="data must be a tensor"):
        gs.attention(Fused(), np.array(1.0))


def test_the_model_and_the_settings_of_torch_are_as_before():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), nn.Dropout(0.5))
    x, before = noise(3, 5, 8).float(), copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    gs.attention(model, x)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0 and torch.backends.mha.get_fastpath_enabled()


def test_a_measurement_that_fails_leaves_no_mode():
    class Fails(nn.Module):
        def forward(self, q, k, v):
            FUSED(q, k, v)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gs.attention(Fails(), data())
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(kind):
    batch = {name: tensor.to(kind) for name, tensor in data().items()}
    check(gs.attention(Fused(), batch), reference(batch["q"].double(), batch["k"].double()))


def test_autocast_of_the_caller_does_not_round_the_statistics():
    batch = data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(gs.attention(Fused(), batch), reference(batch["q"].double(), batch["k"].double()))


def test_by_hand_in_training_mode():
    batch = data()
    check(gs.attention(ByHand("dropout").train(), batch), reference(batch["q"].double(), batch["k"].double()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_before_attention_has_a_remark(dropout):
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
    notes = gs.attention(nn.Sequential(nn.Dropout(dropout), model), noise(4, 3, 8).float()).describe().notes
    assert any("drew random numbers" in note for note in notes) == bool(dropout)
