"""Statistics of attention heads against a reference in NumPy, for fused attention and for attention written by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode

import gradscope as gs
from gradscope import memory
from tests.helpers import noise

RTOL = 1e-6
LOWEST = torch.finfo(torch.float32).min


def reference(q, k, mask=None, scale=None, collapsed=0.1):
    """Each statistic (B, H) from q (B, H, Tq, d), k (B, Hk, Tk, d) and a mask of True (seen) or numbers, in float64."""
    q, k = (np.asarray(a.detach(), dtype=np.float64) for a in (q, k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = scale * np.einsum("bhid,bhjd->bhij", q, k)
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask), logits.shape)
        logits = np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
    return statistics(logits, collapsed)


def statistics(logits, collapsed=0.1):
    found = {}
    for b, h in np.ndindex(*logits.shape[:2]):
        rows = []
        for i, row in enumerate(logits[b, h]):
            seen = row > -5000
            if not seen.any():
                continue
            s = row[seen]
            p = np.zeros(len(row))
            p[seen] = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            relative = entropy / math.log(len(s)) if len(s) > 1 else np.nan
            rows.append(
                {
                    "attention_entropy": entropy,
                    "relative_attention_entropy": relative,
                    "collapsed_fraction": float(relative < collapsed) if len(s) > 1 else np.nan,
                    "effective_keys": math.exp(entropy),
                    "participation_ratio": 1 / np.square(p).sum(),
                    "row_largest_attention_logit": s.max(),
                    "largest_attention_logit": s.max(),
                    "first_key_share": p[0],
                    "first_four_keys_share": p[:4].sum(),
                    "own_position_share": p[i] if len(logits[b, h]) == len(row) else np.nan,
                }
            )
        for name in rows[0] if rows else ():
            reduce = np.nanmax if name == "largest_attention_logit" else np.nanmean
            values = [row[name] for row in rows]
            table = found.setdefault(name, np.full(logits.shape[:2], np.nan))
            table[b, h] = np.nan if np.isnan(values).all() else reduce(values)
    return {name: table for name, table in found.items() if not np.isnan(table).all()}


def check(result, expected, layer=None, rtol=RTOL):
    """Compare all values, errors and intervals of one call."""
    frame = result.to_frame()
    frame = frame[frame["layer"] == (layer or frame["layer"].iloc[0])]
    assert set(frame["quantity"]) == set(expected)
    for quantity, table in expected.items():
        rows = frame[frame["quantity"] == quantity]
        assert rows["head"].tolist() == list(range(table.shape[1]))
        largest = quantity == "largest_attention_logit"
        values = np.nanmax(table, 0) if largest else np.nanmean(table, 0)
        np.testing.assert_allclose(rows["value"], values, rtol=rtol, atol=1e-6, err_msg=quantity)
        errors = stats.sem(table, nan_policy="omit")
        if largest or not (np.asarray(errors) > 1e-9).all():
            continue
        np.testing.assert_allclose(rows["stderr_sample"], errors, rtol=1e-4, err_msg=quantity)
        num = (~np.isnan(table)).sum(0)
        low, high = stats.t.interval(0.95, num - 1, loc=values, scale=errors)  # with most degrees of freedom
        assert (rows["low"] <= low + 1e-5).all() and (rows["high"] >= high - 1e-5).all()
        assert (rows["num_samples"] == num).all()


class Fused(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, **self.options)


def data(batch=3, heads=2, key_heads=None, queries=6, keys=6, width=4, size=1.5):
    shapes = {"q": (heads, queries), "k": (key_heads or heads, keys), "v": (key_heads or heads, keys)}
    return {n: size * noise(batch, *shape, width, seed=s).float() for s, (n, shape) in enumerate(shapes.items(), 1)}


CAUSAL = torch.ones(6, 6).tril().bool()
PADDING = (torch.arange(6) < torch.tensor([6, 4, 3])[:, None])[:, None, None]
BIAS = noise(2, 6, 6, seed=7).float()
CASES = {
    "plain": ({}, {}, None),
    "causal": ({"is_causal": True}, {}, CAUSAL),
    "padding": ({"attn_mask": PADDING}, {}, PADDING),
    "causal, added": ({"attn_mask": torch.zeros(6, 6).masked_fill(~CAUSAL, -math.inf)}, {}, CAUSAL),
    "padding, added": ({"attn_mask": torch.zeros(3, 1, 1, 6).masked_fill(~PADDING, LOWEST)}, {}, PADDING),
    "padding by -10000": ({"attn_mask": torch.zeros(3, 1, 1, 6).masked_fill(~PADDING, -1e4)}, {}, PADDING),
    "bias": ({"attn_mask": BIAS}, {}, BIAS),
    "scale": ({"scale": 0.9}, {}, None),
    "grouped": ({"enable_gqa": True, "is_causal": True}, {"heads": 4, "key_heads": 2}, CAUSAL),
    "cross": ({}, {"queries": 4, "keys": 6}, None),
    "causal bias": ({"attn_mask": causal_lower_right(4, 6)}, {"queries": 4}, torch.ones(4, 6).tril(2).bool()),
    "dropout": ({"dropout_p": 0.5}, {}, None),
    "one key": ({}, {"keys": 1, "queries": 1}, None),
}


@pytest.mark.parametrize("options, shape, mask", CASES.values(), ids=CASES)
def test_fused_attention(options, shape, mask):
    batch = data(**shape)
    result = gs.attention(Fused(**options), batch)
    check(result, reference(batch["q"], batch["k"], mask, options.get("scale")))
    row = result.describe().to_frame().iloc[0]
    assert (row["layer"], row["function"]) == ("Fused", "scaled_dot_product_attention")
    assert row[["sequences", "heads", "queries", "keys"]].tolist() == [*batch["q"].shape[:3], batch["k"].shape[2]]


@pytest.mark.parametrize("bytes", [1, 6 * 8 * 4, 6 * 6 * 8, 6 * 6 * 8 * 3])
def test_blocks_of_any_size_add_up(monkeypatch, bytes):
    batch = data()
    whole = gs.attention(Fused(is_causal=True), batch).to_frame()
    monkeypatch.setitem(memory._BATCH, "cpu", bytes)
    np.testing.assert_allclose(gs.attention(Fused(is_causal=True), batch).to_frame()["value"], whole["value"], 1e-12)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and "expand" not in str(func):
                self.most = max(self.most, tensor.numel())
        return output


def test_no_tensor_holds_all_logits():
    batch = data(batch=1, heads=4, queries=1024, keys=1024, width=8)
    with Largest() as largest:
        gs.attention(Fused(), batch)
    assert largest.most <= memory.batch_bytes(torch.device("cpu")) // 8 < 1024**2


def weights(way):
    return {
        "torch.softmax": lambda s, training: torch.softmax(s, dim=-1),
        "Tensor.softmax": lambda s, training: s.softmax(3),
        "functional": lambda s, training: functional.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
        "module": lambda s, training: nn.Softmax(-1)(s),
        "dropout": lambda s, training: functional.dropout(s.softmax(-1), 0.5, training),
        "masked": lambda s, training: s.softmax(-1) * torch.ones(s.shape[-1]),
        "sliced": lambda s, training: s.softmax(-1)[..., :],
    }[way]


class ByHand(nn.Module):
    """Attention as people write it; ``product``: how the weights meet the values."""

    def __init__(self, way="torch.softmax", product=torch.matmul, fold=False, mask=None):
        super().__init__()
        self.weights, self.product, self.fold, self.mask = weights(way), product, fold, mask

    def forward(self, q, k, v):
        if self.fold:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask, LOWEST)
        return self.product(self.weights(scores, self.training), v)


PRODUCTS = {
    "@": lambda a, b: a @ b,
    "einsum": lambda a, b: torch.einsum("bhij,bhjd->bhid", a, b),
    "transposed": lambda a, b: (b.mT @ a.mT).mT,
    "folded afterwards": lambda a, b: torch.bmm(a.flatten(0, 1), b.flatten(0, 1)),
}


@pytest.mark.parametrize("way", "torch.softmax Tensor.softmax functional module dropout masked sliced".split())
def test_attention_by_hand(way):
    batch = data()
    result = gs.attention(ByHand(way, mask=PADDING), batch)
    check(result, reference(batch["q"], batch["k"], PADDING))
    assert result.describe().to_frame()["function"].tolist() == ["softmax"]


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_with_values(product):
    batch = data()
    check(gs.attention(ByHand(product=product), batch), reference(batch["q"], batch["k"]))


@pytest.mark.parametrize("fold", [True, False], ids=["B H", "B, H"])
def test_heads_may_be_folded_into_the_samples(fold):
    batch = data()
    check(
        gs.attention(ByHand("module" if fold else "functional", torch.matmul, fold), batch),
        reference(batch["q"], batch["k"]),
    )


def test_a_fused_call_of_folded_heads_or_of_one_head():
    batch = data()
    folded = gs.attention(Fused(), batch, forward=lambda m, b: m(*(b[n].flatten(0, 1) for n in "qkv")))
    check(folded, reference(batch["q"], batch["k"]))
    single = gs.attention(Fused(), {name: t[:, 0] for name, t in batch.items()})
    check(single, reference(batch["q"][:, :1], batch["k"][:, :1]))


def test_windows_of_a_sequence_count_as_one_sequence():
    batch = data(batch=6)
    result = gs.attention(
        Fused(), batch | {}, forward=lambda m, b: m(**{n: t.unflatten(0, (3, 2)).flatten(0, 1) for n, t in b.items()})
    )
    assert set(result.to_frame()["num_samples"]) == {6}
    half = gs.attention(
        Fused(), {"x": torch.zeros(3, 1)}, forward=lambda m, b: m(**batch) + b["x"].sum()
    )  # three sequences of two windows each
    expected = reference(batch["q"], batch["k"])
    halves = {name: table.reshape(3, 2, -1) for name, table in expected.items()}
    check(half, {n: t.max(1) if n == "largest_attention_logit" else t.mean(1) for n, t in halves.items()})


def projected(mha, x, memory=None):
    """q and k (B, H, T, d) of an ``nn.MultiheadAttention``."""
    w, b, size = mha.in_proj_weight, mha.in_proj_bias, mha.embed_dim
    q = x @ w[:size].T + b[:size]
    k = (x if memory is None else memory) @ w[size : 2 * size].T + b[size : 2 * size]
    return (t.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2) for t in (q, k))


def module(seed=0, **options):
    torch.manual_seed(seed)
    mha = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    nn.init.normal_(mha.in_proj_weight)
    return mha


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_module_of_torch(need_weights, training, frozen):
    mha, x = module(dropout=0.5).train(training).requires_grad_(not frozen), noise(3, 5, 8).float()
    padding = torch.arange(5) >= torch.tensor([5, 4, 3])[:, None]
    result = gs.attention(
        mha, x, forward=lambda m, x: m(x, x, x, key_padding_mask=padding, need_weights=need_weights)[0]
    )
    check(result, reference(*projected(mha, x), ~padding[:, None, None]))
    row = result.describe().to_frame().iloc[0]
    assert row["function"] == ("softmax" if need_weights else "scaled_dot_product_attention")


def test_the_module_of_torch_with_keys_of_its_own_and_sequences_last():
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2)  # (T, B, d)
    x, other = noise(4, 3, 8).float(), noise(6, 3, 8, seed=2).float()
    result = gs.attention(mha, {"x": x, "other": other}, forward=lambda m, b: m(b["x"], b["other"], b["other"])[0])
    check(result, reference(*projected(mha, x.transpose(0, 1), other.transpose(0, 1))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_encoder_of_torch_in_eval_mode_takes_no_other_path(training, frozen):
    """Without gradients torch would run one kernel for the whole layer, in which no function can be seen."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), noise(3, 5, 8).float()
    model.train(training).requires_grad_(not frozen)
    padding = torch.arange(5) >= torch.tensor([5, 4, 3])[:, None]
    with torch.no_grad():
        result = gs.attention(model, x, forward=lambda m, x: m(x, src_key_padding_mask=padding))
    assert result.to_frame()["layer"].unique().tolist() == ["layers.0.self_attn", "layers.1.self_attn"]
    check(result, reference(*projected(model.layers[0].self_attn, x), ~padding[:, None, None]), "layers.0.self_attn")


def test_without_queries_all_keys_are_equal():
    batch = data(keys=7)
    rows = gs.attention(Fused(), batch | {"q": torch.zeros_like(batch["q"])}).to_frame()
    expected = {
        "attention_entropy": math.log(7), "relative_attention_entropy": 1, "effective_keys": 7,
        "participation_ratio": 7, "largest_attention_logit": 0, "row_largest_attention_logit": 0,
        "first_key_share": 1 / 7, "first_four_keys_share": 4 / 7, "collapsed_fraction": 0,
    }  # fmt: skip
    for quantity, value in expected.items():
        np.testing.assert_allclose(rows.loc[rows["quantity"] == quantity, "value"], value, rtol=1e-14)


def test_one_key_takes_all():
    """Orthogonal keys, and queries that are 1000 times the key of the same position."""
    eye = torch.eye(6).expand(2, 1, 6, 6)
    frame = gs.attention(Fused(scale=1.0), {"q": 1000 * eye, "k": eye, "v": eye}).to_frame()
    found = frame.set_index("quantity")["value"]
    assert found["attention_entropy"] == 0 and found["effective_keys"] == 1 and found["participation_ratio"] == 1
    assert found["own_position_share"] == 1 and found["collapsed_fraction"] == 1
    assert found["largest_attention_logit"] == 1000


def test_a_sink_head_is_told_from_others():
    """Head 1 gives all queries a logit of 50 at key 0."""
    batch = data(width=4)
    batch["q"][:, 1], batch["k"][:, 1] = 0.0, 0.0
    batch["q"][:, 1, :, 0], batch["k"][:, 1, 0, 0] = 1.0, 100.0
    share = gs.attention(Fused(), batch).to_frame().query("quantity == 'first_key_share'")["value"].tolist()
    assert share[1] == pytest.approx(1 / (1 + 5 * math.exp(-50)), rel=1e-12) and share[0] < 0.5


def test_fully_masked_queries_are_left_out_and_counted():
    batch, mask = data(), torch.ones(3, 1, 6, 6, dtype=torch.bool)
    mask[1, :, 2:] = False
    for mask_or_numbers in (mask, torch.zeros(3, 1, 6, 6).masked_fill(~mask, LOWEST)):
        result = gs.attention(Fused(attn_mask=mask_or_numbers), batch)
        check(result, reference(batch["q"], batch["k"], mask))
        assert result.describe().to_frame()["masked_queries"].tolist() == [4 * 2]
        assert "8 fully masked queries" in str(result)


def test_a_sequence_without_queries_is_left_out():
    batch, mask = data(), torch.ones(3, 1, 6, 6, dtype=torch.bool)
    mask[1] = False
    result = gs.attention(Fused(attn_mask=mask), batch)
    check(result, reference(batch["q"], batch["k"], mask))
    assert set(result.to_frame().query("quantity == 'first_key_share'")["num_samples"]) == {2}


def test_several_batches_are_one_population():
    batch = data(batch=6)
    parts = [{name: t[at : at + 2] for name, t in batch.items()} for at in (0, 2, 4)]
    check(gs.attention(Fused(), iter(parts)), reference(batch["q"], batch["k"]))


def test_one_sequence_has_no_error():
    frame = gs.attention(Fused(), data(batch=1)).to_frame()
    assert frame[["stderr_sample", "low", "high", "log10_stderr_sample"]].isna().all(axis=None)


def test_collapsed_is_a_threshold_of_the_relative_entropy():
    batch = data()
    for threshold in (0.3, 0.8):
        check(gs.attention(Fused(), batch, collapsed=threshold), reference(batch["q"], batch["k"], collapsed=threshold))


@pytest.mark.parametrize("quantity", ["attention_entropy", "first_key_share", "row_largest_attention_logit"])
def test_intervals_cover_the_mean_over_sequences(quantity):
    """1,000 heads with the same distribution, and 12 sequences; the standard error of the coverage is 0.7 %."""
    rows = gs.attention(Fused(), data(batch=12, heads=1000)).to_frame().query("quantity == @quantity")
    truth = rows["value"].mean()
    assert 0.93 <= ((rows["low"] <= truth) & (truth <= rows["high"])).mean() <= 0.97
