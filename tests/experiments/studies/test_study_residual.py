"""The study of skip connections against exact Jacobians, sums of the law, and mean field."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradscope.meanfield as mf
from experiments.archive import reference
from experiments.archive.tables import Collected
from experiments.evidence import study
from experiments.studies import residual
from experiments.studies.residual import measurement, numbers
from gradscope import frames
from gradscope.frames import observed
from gradscope.models.resnet import ResNet
from tests.experiments.studies.claimed import only
from tests.helpers import ROOT, noise, seeded


def gsc(function, x):
    """By the whole Jacobian of the batch."""
    jacobian = torch.autograd.functional.jacobian(function, x).reshape(x.numel(), x.numel())
    y = function(x).detach()
    return float(jacobian.square().sum() / x.numel() * x.square().sum() / y.square().sum())


@pytest.mark.parametrize("case", ["tanh_layer-2", "relu_batch-unit", "relu_end-unit"])
def test_blocks_by_their_whole_jacobians(case):
    model, x = measurement.network(case, 3, 8, generator=seeded()).double(), noise(6, 3, 32, 32)
    frame = measurement.measure(model, x, generator=seeded(1), num_probes=1500)
    quantities = frame.pivot_table(index="index", columns="quantity", values="value", aggfunc="first")
    f, s = model.stem(x.flatten(1)).detach(), measurement.skip_weight(case.rpartition("-")[2])
    for number, block in enumerate(model.layers):
        branch = (block(f) - s * f).detach()
        row = frame[(frame["layer"] == f"layers.{number}") & frame["log10_value"].isna()].set_index("quantity")["value"]
        assert row["dilution"] == pytest.approx(float((s * f).norm() / branch.norm()))
        assert row["block_gsc"] == pytest.approx(gsc(block, f), rel=0.04)
        assert row["branch_gsc"] == pytest.approx(gsc(lambda z, block=block: block(z) - s * z, f), rel=0.04)
        f = block(f).detach()
    assert "log10_length_growth" in quantities.columns
    from_stem = frame[frame["quantity"] == "gsc_from_stem"]
    assert from_stem["target"].tolist() == ["layers.1"]
    first = model.stem(x.flatten(1)).detach()
    assert from_stem["value"].iloc[0] == pytest.approx(gsc(model.layers[:2], first), rel=0.05)


def test_the_law_holds_in_a_block_that_is_orthogonal_by_construction():
    """The skip carries the first half of the features, the branch turns it into the second: no term is shared."""
    turn = torch.zeros(8, 8, dtype=torch.float64)
    turn[4:, :4] = torch.linalg.qr(noise(4, 4))[0]
    block = nn.Linear(8, 8, bias=False, dtype=torch.float64)
    block.weight.data = torch.eye(8, dtype=torch.float64) + 0.5 * turn
    block.skip_weight = 1.0
    x = torch.cat([noise(5, 4), torch.zeros(5, 4, dtype=torch.float64)], dim=1)
    frame = measurement._block(block, x, 0, seeded(), 2000).set_index("quantity")["value"]
    k, r = frame["dilution"], frame["branch_gsc"]
    # |branch| = 0.5 |x| and |J_branch|^2 = 0.25 * 4, over the columns of the whole: r = 0.5, k = 2, GSC = 4.5 / 5.
    assert (k, r) == (pytest.approx(2), pytest.approx(0.5, rel=0.02))
    assert frame["block_gsc"] == pytest.approx((4 + 0.5) / (4 + 1), rel=0.02) == mf.residual_rate(0.5, 2)


@pytest.mark.parametrize("dilution", ["0", "0.5", "2", "unit"])
def test_the_law_beside_mean_field(dilution):
    layer = mf.LayerSpec.of("tanh", 1.0, 0.0, "layer", 1.0, measurement.skip_weight(dilution))
    law = measurement.law("tanh_layer", dilution, 30, 32)
    for depth in (1, 7, 30):
        assert law[depth] == pytest.approx(mf.predict([layer] * depth, batch_size=32).log10_gsc[0], rel=1e-6)
    # With batch normalization mean field counts the last layer apart, and here there is none.
    layer = mf.LayerSpec.of("relu", 2.0, 0.0, "batch", 1.0, measurement.skip_weight(dilution))
    expected = mf.predict([layer] * 30, batch_size=1000).log10_gsc[0]
    assert measurement.law("relu_batch", dilution, 30, 1000)[-1] == pytest.approx(expected, rel=0.04)


def test_limits_of_the_law():
    assert measurement.skip_weight("0") == 0 and measurement.skip_weight("unit") == 1
    r = mf.gsc_rate("tanh", "layer")
    steps = np.diff(measurement.law("tanh_layer", "2", 400, 32))
    assert 10 ** steps[-1] == pytest.approx((4 + r) / 5, rel=1e-9)
    far = measurement.law("tanh_layer", "unit", 40000, 32)
    assert (far[-1] - far[10000]) / math.log10(4) == pytest.approx(r - 1, rel=1e-3)
    np.testing.assert_allclose(measurement.law("relu", "unit", 50, 32), 0, atol=1e-12)


def test_what_a_power_of_the_depth_leaves_of_growth():
    early, middle, late = (0.7 * math.log(depth) for depth in (8, 32, 100))
    assert (late - middle) / 68 / ((middle - early) / 24) == pytest.approx(numbers.POWER)


def test_the_method_names_the_sizes_that_were_measured():
    collected = reference.load(ROOT / "results" / "residual")
    config, frame = collected.manifest["config"], collected.frame
    assert (config["model"]["depth"], config["model"]["width"]) == (residual.DEPTH, residual.WIDTH)
    assert config["data"]["batch_size"] == residual.BATCH_SIZE
    assert config["measurement"]["num_probes"] == residual.NUM_PROBES
    assert config["seeds"] == frame["seed"].nunique() == residual.NUM_SEEDS
    blocks = frame.loc[frame["case"] == "resnet-unit", "layer"]
    assert blocks.str.startswith("stage").all() and blocks.nunique() == residual.RESNET_BLOCKS
    first = next(
        m for m in measurement.network("resnet-unit", 1, 1, generator=seeded()).modules() if isinstance(m, nn.Conv2d)
    )
    assert first.out_channels == residual.RESNET_WIDTH


def test_cases():
    model = measurement.network("resnet-0", 3, 8, generator=seeded())
    assert isinstance(model, ResNet) and not any(block.residual for block in model.stage1)
    assert all(block.residual for block in measurement.network("resnet-unit", 3, 8, generator=seeded()).stage1)
    assert measurement.network("tanh_layer-2-6", 3, 8, generator=seeded()).layers[0].linear.weight.shape == (6, 6)
    assert study.evenly(100, 6) == [16, 33, 49, 66, 83, 99] and study.evenly(100, 10)[-2:] == [89, 99]
    assert study.evenly(3, 6) == [0, 1, 2]
    for bad in ("selu-1", "tanh_layer", "tanh_layer-", "tanh_layer-x", "tanh_layer-2-x"):
        with pytest.raises(ValueError, match=rf"relu_batch, .* with -unit or -DILUTION; got '{bad}'"):
            measurement.network(bad, 3, 8, generator=seeded())


def test_a_resnet_has_a_row_a_block():
    model = ResNet(depth=14, width=4, generator=seeded())
    frame = measurement.measure(model, noise(4, 3, 8, 8).float(), generator=seeded(), num_probes=2)
    assert frame["layer"].tolist() == [f"stage{s}.{n}" for s in (1, 2, 3) for n in (0, 1)]


def rows(case, seed, quantity, layers, depth, log10_values):
    """Coefficients, for `framed`: one tidy frame of all rows takes far less time than a tidy frame of each."""
    values = np.broadcast_to(log10_values, len(layers))
    return [
        {
            "case": case, "seed": seed, "quantity": quantity, "layer": layer, "index": index, "target": "last",
            "depth_from_output": far, "log10_value": value, "value": 10.0**value,
        }
        for index, (layer, far, value) in enumerate(zip(layers, depth, values, strict=True))
    ]  # fmt: skip


def statistics(case, seed, **values):
    """Numbers of a whole network, for `framed`."""
    return [{"case": case, "seed": seed, "quantity": name, "value": value} for name, value in values.items()]


def framed(records):
    """One tidy frame of coefficients and of numbers of another kind, all of them exact."""
    about = {"layer": "network", "index": 0, "target": None, "depth_from_output": 0, "log10_value": math.nan}
    table = [about | record for record in records]
    names = ("quantity", "value", *about)
    columns = {name: [record[name] for record in table] for name in (*names, "case", "seed")}
    exact = {"stderr_sample": 0.0, "log10_stderr_probe": 0.0, "log10_stderr_sample": 0.0, "num_samples": 32}
    frame = frames.tidy({**{name: columns[name] for name in names}, **exact})
    return frame.assign(case=columns["case"], seed=columns["seed"], batch_size=32)


def test_numbers_of_a_frame_that_is_known():
    reached, away = np.array(measurement.REACHED), np.arange(9, -1, -1)
    blocks = [f"stage{s}.{n}" for s in (1, 2, 3) for n in (0, 1)]
    parts = []
    for seed in range(3):
        scale = 1 + 0.01 * seed
        parts += [
            *rows("tanh_layer-unit", seed, "gsc_from_stem", ["stem"] * len(reached), reached,
                 0.3 * scale * np.log10(reached)),
            *rows("tanh_layer-1", seed, "gsc_from_stem", ["stem"] * len(reached), reached, 0.02 * scale * reached),
            *rows("tanh_layer-0", seed, "gsc", [f"layers.{n}" for n in range(10)], away, away * math.log10(1.2)),
            *rows("tanh_layer-2", seed, "gsc", [f"layers.{n}" for n in range(10)], away, away * math.log10(1.06)),
            *rows("resnet-0", seed, "gsc", blocks, range(8, 2, -1), math.log10(2) * np.array([5, 4, 3, 2, 1.5, 1])),
        ]  # fmt: skip
    frame = framed(parts)
    np.testing.assert_allclose(numbers.exponents(frame, "tanh_layer"), [0.3, 0.303, 0.306])
    assert numbers.steadiness(frame, "tanh_layer-unit") == pytest.approx([numbers.POWER] * 3)
    assert numbers.steadiness(frame, "tanh_layer-1") == pytest.approx([1] * 3)
    np.testing.assert_allclose(numbers.rates(frame, "tanh_layer", "2"), 1.06)
    np.testing.assert_allclose(numbers.ratios(frame, "tanh_layer", "2"), 0.06 * 5 / 0.2)
    np.testing.assert_allclose(numbers.block_growth(frame, "resnet-0", "stage3"), 0.5 * math.log10(2))
    np.testing.assert_allclose(numbers.block_totals(frame, "resnet-0"), 4 * math.log10(2))
    np.testing.assert_allclose(numbers.flattening(frame, "resnet-0"), 0.5)
    assert numbers.factors_by_stage(frame, "resnet-0") == "2.00, 2.00, 1.41"


def test_the_law_of_single_blocks_is_taken_by_case_and_block():
    parts = [
        observed(name, value, layer="layers.7", index=7).assign(case=case, seed=0)
        for case, values in {"relu-unit": (2.0, 1.5, 1.1), "relu_end-unit": (1.0, 3.0, 1.0)}.items()
        for name, value in zip(("dilution", "branch_gsc", "block_gsc"), values, strict=True)
    ]
    table = numbers.single_blocks(pd.concat(parts, ignore_index=True), "relu")
    assert table["law"].tolist() == [pytest.approx((4 + 1.5) / 5)] and table["block_gsc"].tolist() == [1.1]


def right_law(k, r):
    return (k**2 + r) / (k**2 + 1)


def wrong_law(k, r):
    return (k + r) / (k + 1)


def constructed(law=right_law, unit=None, resnet=((2, 2, 2), (1.4, 1.2, 1.1)), noise_of=0.0, relu_end=0.7):
    """A frame of every case: rates and single blocks by a law, unit skips by mean field or ``unit`` (log10 GSC by
    blocks), a ResNet of a plain and a residual factor a block in each stage.  Four seeds, whose excesses differ by a
    thousandth, and by ``noise_of``."""
    reached, away, parts = np.array(measurement.REACHED), np.arange(9, -1, -1) * 10, []
    draws = np.random.default_rng(0)
    for seed in range(4):
        for branch in measurement.BRANCHES:
            r = rate(branch)
            cases = {k: float(k) for k in measurement.DILUTIONS} | {"0-100": 0.0, "4-100": 4.0, "unit": 6.0}
            for case, k in cases.items():
                spread = 1 + 0.001 * seed + noise_of * draws.standard_normal()
                growth = 1 + (law(k, r) - 1) * spread
                parts += rows(f"{branch}-{case}", seed, "gsc", [f"layers.{n}" for n in range(10)], away,
                              away * math.log10(growth))  # fmt: skip
                values = mean_field(branch, case.split("-")[0])[reached]
                values = unit(reached) if unit is not None and case == "unit" else values
                parts += rows(f"{branch}-{case}", seed, "gsc_from_stem", ["stem"] * len(reached), reached,
                              values * spread)  # fmt: skip
                parts += blocks_of(f"{branch}-{case}", seed, k, r, growth)
        for case, value in (("relu-unit", 1.0), ("relu_end-unit", relu_end)):
            parts += blocks_of(case, seed, 1.0, 1.0, value * (1 + 0.001 * seed))
            parts += statistics(case, seed, log10_length_growth=30 + 0.1 * seed)
            parts += rows(case, seed, "gsc_from_stem", ["stem"] * len(reached), reached, 0.001 * seed * reached)
        for case, factors in zip(("resnet-0", "resnet-unit"), resnet, strict=True):
            steps = [math.log10(factor) * (1 + 0.001 * seed) for factor in factors for _ in range(5)][:-1]
            values = np.array([*np.cumsum(steps[::-1])[::-1], 0.0])
            layers = [f"stage{stage}.{n}" for stage in (1, 2, 3) for n in range(5)]
            parts += rows(case, seed, "gsc", layers, range(14, -1, -1), values)
    return Collected(framed(parts), None, {})


@functools.cache
def rate(branch):
    return measurement.rate(branch, 32)


@functools.cache
def mean_field(branch, dilution):
    return measurement.law(branch, dilution, 100, 32)


def blocks_of(case, seed, k, r, value):
    named = {"dilution": k, "branch_gsc": r, "block_gsc": value}
    return [row | {"layer": f"layers.{n}", "index": n} for n in (3, 7) for row in statistics(case, seed, **named)]


def verdicts(collected):
    claims = residual.STUDY.claims(collected)
    return lambda *words: only(claims, *words).verdict


BRANCHES = ("tanh+layer", "relu+batch")
RELU_END = ("single blocks", "in the ReLU")


def test_a_frame_that_keeps_the_law():
    collected = constructed()
    claims = residual.STUDY.claims(collected)
    assert [claim for claim in claims if claim.verdict != "supported"] == [only(claims, *RELU_END)]
    text = residual.STUDY.answer(collected)
    assert "8 of 8 tests" in text and "10 %, and 0 contradict" in text and "for tanh+layer and relu+batch." in text
    assert "connections lower the growth of a ResNet" in text and "with skips and 4.2" in text
    assert "| tanh+layer, by the law |" in residual.STUDY.details(collected)


@functools.cache
def decided_by_a_wrong_law():
    """Verdicts by sentence."""
    return {claim.says: claim.verdict for claim in residual.STUDY.claims(constructed(wrong_law))}


@pytest.mark.parametrize("case", ["0.5", "2", "4", "unit", "4-100"])
def test_a_wrong_law_is_refused(case):
    """(k + r) / (k + 1) in place of (k^2 + r) / (k^2 + 1), although both are near 1 where the dilution is strong."""
    claims = decided_by_a_wrong_law()
    for branch in BRANCHES:
        blocks = {says.rpartition(" with ")[2]: v for says, v in claims.items() if f"single blocks of {branch}" in says}
        assert blocks[numbers.CASES[case]] == "contradicted" and blocks["k = 1"] == "supported"  # where both are one
        if case != "unit":
            k, narrow = case.split("-")[0], "-" in case
            words = f"k = {k} divides GSC - 1 of {branch} "
            (verdict,) = (v for says, v in claims.items() if words in says and ("width" in says) == narrow)
            assert verdict == "contradicted"


def test_the_answer_contradicts_where_the_frame_does():
    exponential = constructed(wrong_law, lambda blocks: 0.01 * blocks, ((1.2, 1.1, 1.05), (2, 2, 2)), relu_end=1.0)
    found, text = verdicts(exponential), residual.STUDY.answer(exponential)
    for branch in BRANCHES:
        assert found("unit skips", branch, "than an exponential") == "contradicted"
        assert found("unit skips", branch, "slows down") == "contradicted"
    assert found("lower the growth of a ResNet") == found("last stage") == "contradicted"
    assert found(*RELU_END) == "supported"
    assert "2 of 8 tests" in text and "6 contradict" in text and "for none." in text and "do not lower" in text


def test_noise_leaves_the_law_open():
    noisy = constructed(noise_of=0.3)
    found = verdicts(noisy)
    found = found("k = 2 divides GSC - 1 of relu+batch"), found("single blocks of relu+batch with k = 2")
    assert found == ("undecided", "undecided")
    assert "8 of 8 tests" not in residual.STUDY.answer(noisy)
