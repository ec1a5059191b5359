"""The study of remedies: networks of equal size, affine maps by construction, and numbers that are known."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats

import gradscope as gs
import gradscope.meanfield as mf
from experiments.archive import reference
from experiments.archive.tables import Collected
from experiments.evidence.means import mean
from experiments.evidence.rank_correlation import rank_correlation
from experiments.studies import remedies
from experiments.studies.remedies import measurement, numbers
from gradscope import frames
from gradscope.frames import observed
from tests.experiments.studies.claimed import only
from tests.helpers import ROOT, noise, seeded

STUDY = ROOT / "conf" / "study" / "remedies.yaml"
CASES = yaml.safe_load(STUDY.read_text())["hydra"]["sweeper"]["params"]["model.case"].split(",")


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_as_many_parameters(case):
    model = measurement.network(case, 50, 100, 100, generator=seeded())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(50 * 100**2 + 1000, rel=0.01)
    baseline, _, remedy = case.partition("-")
    assert remedy in numbers.REMEDIES and baseline in numbers.NAMES
    layer, norm = model.layers[0], {"batch": "BatchNorm1d", "layer": "LayerNorm"}
    expected = None if remedy in ("plain", "looks_linear") else norm.get(remedy, norm.get(baseline.split("_")[-1]))
    assert (None if layer.norm is None else type(layer.norm).__name__) == expected
    assert type(layer.activation).__name__.lower() == baseline.split("_")[0]


@pytest.mark.parametrize(
    ("case", "variance"),
    [("tanh_large-none", 4), ("tanh_large-wider", 4), ("tanh_large-batch", 4), ("tanh_large-residual", 4),
     ("tanh_large-he", 2), ("tanh_large-lecun", 1), ("tanh_large-critical", 1), ("relu_batch-none", 2),
     ("relu_batch-xavier", 1), ("selu-none", 1), ("selu-he", 2)],
)  # fmt: skip
def test_weight_variances(case, variance):
    weight = measurement.network(case, 10, 100, 100, generator=seeded()).layers[-1].linear.weight
    error = variance * math.sqrt(2 / weight.numel())
    assert float(weight.detach().square().mean() * weight.shape[1]) == pytest.approx(variance, abs=4 * error)


@pytest.mark.parametrize("case", ["tanh_large-orthogonal", "relu_batch-orthogonal", "tanh_large-lsuv"])
def test_orthogonal_weights(case):
    weight = measurement.network(case, 4, 20, 20, generator=seeded()).layers[1].linear.weight.detach()
    gram = weight @ weight.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(20), atol=1e-5, rtol=0)
    assert bool((gram[0, 0] - 1).abs() < 1e-5) == ("lsuv" not in case)


def test_lsuv_holds_on_other_samples():
    model = measurement.network("tanh_large-lsuv", 6, 50, 50, generator=seeded())
    frame = gs.measure(model, torch.randn(500, 50, generator=seeded(9)), measures=[gs.measures.PreactivationStd()])
    np.testing.assert_allclose(frame["value"], 1, rtol=0.1)


def test_a_looks_linear_network_is_affine_as_a_whole():
    model, x = measurement.network("relu_batch-looks_linear", 5, 20, 20, generator=seeded()), noise(16, 20).float()
    frame = measurement.measure(model, x, generator=seeded(), num_probes=2).set_index("quantity")["value"]
    assert frame["network_linear_fit_error"] < 1e-10
    assert frame["nlc"] == pytest.approx(1, rel=1e-4)
    assert frame["linear_fit_error"] > 0.1


def test_linear_fit_error_of_a_network():
    """Of y = x + |x| the variance of |x|, 1 - 2 / pi, is not affine; independent noise is not at all."""
    x = noise(20000, 3)
    share = (1 - 2 / math.pi) / (2 - 2 / math.pi)
    assert measurement.network_linear_fit_error(x, x + x.abs()) == pytest.approx(share, rel=0.02)
    assert measurement.network_linear_fit_error(x, 3 * x @ noise(3, 2, seed=4) + 7) < 1e-25
    few = [measurement.network_linear_fit_error(noise(40, 20, seed=s), noise(40, 5, seed=s + 500)) for s in range(300)]
    assert np.mean(few) == pytest.approx(1, abs=4 * np.std(few) / math.sqrt(len(few)))
    with pytest.raises(ValueError, match="3 inputs"):
        measurement.network_linear_fit_error(x[:4], x[:4])


@pytest.mark.parametrize(("depth", "n_in"), [(10, 100), (2, 30), (1, 50)])
def test_equal_width(depth, n_in):
    width = measurement.equal_width(50000, depth, n_in)
    assert n_in * width + (depth - 1) * width**2 == pytest.approx(50000, rel=0.03)


def test_mean_field_beside_the_measurement():
    assert measurement.rate("tanh_large-none", 32) == mf.gsc_rate("tanh", weight_variance=4.0)
    assert measurement.rate("tanh_large-lsuv", 32) == pytest.approx(mf.gsc_rate("tanh", "layer"))
    assert measurement.rate("relu_batch-orthogonal", 32) == mf.gsc_rate("relu", "batch", 32)
    assert measurement.rate("relu_batch-looks_linear", 32) == pytest.approx(1, rel=1e-14)
    assert measurement.rate("relu_batch-layer", 32) == pytest.approx(1, rel=1e-14)
    assert math.isnan(measurement.rate("selu-residual", 32)) and math.isnan(measurement.rate("selu-he", 32))


def test_unknown_cases():
    with pytest.raises(ValueError, match="gelu-none"):
        measurement.network("gelu-none", 5, 10, 10, generator=seeded())
    with pytest.raises(ValueError, match="prayer"):
        measurement.network("selu-prayer", 5, 10, 10, generator=seeded())


def test_networks_that_repeat_another_do_so_in_mean_field():
    for baseline, twins in numbers.TWINS.items():
        for remedy, twin in twins.items():
            rates = [measurement.rate(f"{baseline}-{name}", 32) for name in (remedy, twin)]
            assert rates[0] == pytest.approx(rates[1], rel=1e-6)
    names = [f"{baseline}-{remedy}" for baseline, twins in numbers.TWINS.items() for remedy in twins]
    assert set(names) <= set(CASES)


def test_the_method_names_the_sizes_that_were_measured():
    frame, config = (lambda c: (c.frame, c.manifest["config"]))(reference.load(ROOT / "results" / "remedies"))
    assert (config["model"]["depth"], config["model"]["width"]) == (remedies.DEPTH, remedies.WIDTH)
    assert config["data"]["batch_size"] == remedies.BATCH_SIZE
    assert config["seeds"] == frame["seed"].nunique() == remedies.NUM_SEEDS
    assert math.isclose(10 ** (remedies.LEAST / remedies.DEPTH), 1.02)


@pytest.mark.parametrize("num", [3, 5, 7])
def test_a_rank_correlation_is_tested_by_every_order(num):
    """Against Spearman of SciPy and a count by hand: of n! orders one is rising, and one is falling."""
    x = noise(num, 1).flatten().numpy()
    rising = rank_correlation(x, 3 * x + 1)
    assert (rising.value, rising.num) == (pytest.approx(1), num)
    assert rising.p == pytest.approx(2 / math.factorial(num))
    assert rank_correlation(x, -x).p == rising.p and rank_correlation(x, -x).value == pytest.approx(-1)
    y = noise(num, 1, seed=5).flatten().numpy()
    found, known = rank_correlation(x, y), stats.spearmanr(x, y).statistic
    assert found.value == pytest.approx(known)
    if num <= 5:
        every = np.array([stats.spearmanr(order, y).statistic for order in itertools.permutations(x)])
        tails = np.mean(every >= known - 1e-9), np.mean(every <= known + 1e-9)
        assert found.p == pytest.approx(min(1.0, 2 * min(tails)))


def test_a_rank_correlation_that_cannot_be():
    with pytest.raises(ValueError, match="2 and 2"):
        rank_correlation([1, 2], [1, 2])
    with pytest.raises(ValueError, match="3 and 4"):
        rank_correlation([1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="differ"):
        rank_correlation([1, 2, 3], [5, 5, 5])


def synthetic(totals, nonlinearity, last_layer=None):
    """Fifty layers of known log10 GSC and nonlinearities by case, three seeds that differ a little."""
    networks, away = [(case, seed) for case in CASES for seed in range(3)], np.arange(50, -1, -1)
    cases, seeds = map(list, zip(*networks, strict=True))
    profiles = frames.tidy(
        {
            "layer": [f"layers.{n}" for n in range(51)] * len(networks), "index": np.tile(range(51), len(networks)),
            "depth_from_output": np.tile(away, len(networks)), "target": "layers.50", "quantity": "gsc",
            "log10_value": np.concatenate([away / 50 * (totals[case] + 0.001 * seed) for case, seed in networks]),
            "log10_stderr_probe": 0.0, "log10_stderr_sample": 0.0, "reduction": "batch", "coupled": False,
            "num_probes": 0, "num_samples": 32,
        }
    )  # fmt: skip
    last_layer = last_layer or graded(0.2, 0.01)
    parts = [
        profiles.assign(case=np.repeat(cases, 51), seed=np.repeat(seeds, 51)),
        observed("nlc", [2.0 + totals[case] for case in cases], case=cases, seed=seeds),
        observed("linear_fit_error", [last_layer[case] for case in cases], case=cases, seed=seeds),
        observed("network_linear_fit_error", [nonlinearity[case] for case in cases], case=cases, seed=seeds),
    ]
    return Collected(pd.concat(parts, ignore_index=True).assign(batch_size=32), None, {})


def graded(start, step):
    """Values by case: the network as it is has ``start``, every remedy of its own a step more than the one before."""
    values = {}
    for baseline, twins in numbers.TWINS.items():
        own = [r for r in numbers.REMEDIES if f"{baseline}-{r}" in CASES and r not in twins]
        mine = {remedy: start + step * number for number, remedy in enumerate(own)}
        for remedy, twin in twins.items():
            mine[remedy] = mine[twin]
        values |= {f"{baseline}-{remedy}": value for remedy, value in mine.items()}
    return values


def verdicts(collected):
    claims = remedies.STUDY.claims(collected)
    return lambda network, *words: only(claims, f"{network}: ", *words).verdict


LOWERS, REPEATS, PAID, SAME_RATE = "lowers GSC", "the same GSC as", "leave less GSC", "the rate per layer"


def test_claims_of_a_frame_that_is_known():
    """The less growth, the less nonlinear are the outputs, and the more the last layer."""
    down = graded(8.0, -0.5)
    left = {case: value / 10 for case, value in down.items()} | {"relu_batch-looks_linear": 1e-9}
    last = {case: 1 / (1 + value) for case, value in down.items()}
    totals = down | {"selu-batch": 9.0, "selu-wider": 7.58, "selu-lsuv": 9.0}
    collected = synthetic(totals, left, last)
    outcome = numbers.outcomes(collected.frame)["selu"]["residual"]
    np.testing.assert_allclose(outcome.total, 7.0 + 0.001 * np.arange(3))
    np.testing.assert_allclose(outcome.rate, 10 ** (7.0 / 50), rtol=1e-3)
    claims, found = remedies.STUDY.claims(collected), verdicts(collected)
    assert found("selu", "residual", LOWERS) == "supported"
    assert found("selu", "wider", LOWERS) == "contradicted"  # by 0.42, and 0.43 counts
    assert found("selu", "batch norm", LOWERS) == "contradicted"
    assert not any("orthogonal" in claim.says and LOWERS in claim.says for claim in claims)  # it is not a remedy
    assert found("selu", "orthogonal", REPEATS) == "supported" and found("selu", "LSUV", REPEATS) == "contradicted"
    assert found("tanh with large weights", "orthogonal", REPEATS, "lecun") == "supported"
    exact = [("tanh", "critical"), ("relu+batch", "xavier"), ("relu+batch", "LSUV")]  # equal by construction
    assert not any(a in claim.says and b in claim.says and REPEATS in claim.says for claim in claims for a, b in exact)
    assert only(claims, "LSUV weights", "nonlinear").verdict == "supported"
    for words, verdict in (("outputs", "supported"), ("last layer", "contradicted")):
        assert found("relu+batch", PAID, words) == verdict
    assert found("relu+batch", SAME_RATE) == "contradicted"
    assert only(claims, "affine map").verdict == "checked"
    answer, details = remedies.STUDY.answer(collected), remedies.STUDY.details(collected)
    assert answer.startswith("15 of 17 remedies lower GSC")
    assert '"looks linear" for relu+batch (GSC from 10^8.0 to 10^5.5)' in answer
    assert "supported for the outputs (tanh with large weights, relu+batch" in answer
    assert "contradicted for the last layer (tanh with large weights, relu+batch" in answer
    assert "of the outputs: none." in details and "| below 1e-06 |" in details and "| critical† |" in details


def test_claims_of_a_frame_that_says_the_opposite():
    up = graded(1.0, 1.0)
    left = {case: 1 / (1 + value) for case, value in up.items()}
    collected = synthetic(up | {"relu_batch-layer": 0.1}, left | {"relu_batch-layer": 0.45})
    claims, found = remedies.STUDY.claims(collected), verdicts(collected)
    assert found("relu+batch", "layer norm", LOWERS) == "supported"
    assert [claim.verdict for claim in claims if LOWERS in claim.says].count("contradicted") == 16
    assert found("tanh with large weights", PAID, "outputs") == "contradicted"
    assert only(claims, "affine map").verdict == "contradicted"
    assert remedies.STUDY.answer(collected).startswith("1 of 17 remedies lower")
    assert 'relu+batch with "layer norm"' in remedies.STUDY.details(collected)


def test_what_follows_from_the_rate_is_not_claimed_again():
    """With the rate kept, a fifth of the layers has a fifth of the growth."""
    totals = graded(8.0, -0.5)
    frame = synthetic(totals | {"selu-wider": 8.0}, graded(0.8, -0.05)).frame
    wide = (frame["case"] == "selu-wider") & (frame["quantity"] == "gsc")
    frame = frame[~wide | (frame["depth_from_output"] <= 10)]  # the same rate, fewer layers
    collected = Collected(frame, None, {})
    claims = remedies.STUDY.claims(collected)
    same = only(claims, "selu: ", SAME_RATE)
    assert same.verdict == "supported" and "change of log10 GSC from input to output: -6.40" in same.because
    assert not any("selu" in claim.says and "wider" in claim.says and LOWERS in claim.says for claim in claims)
    assert only(claims, "relu+batch: ", "wider", LOWERS).verdict == "supported"  # its rate is another one
    assert remedies.STUDY.answer(collected).startswith("17 of 17 remedies lower GSC")


def test_a_change_that_its_interval_leaves_open():
    frame = synthetic(graded(8.0, -0.5), graded(0.8, -0.05)).frame
    wide = (frame["case"] == "selu-residual") & (frame["quantity"] == "gsc")
    frame.loc[wide, "log10_value"] *= 1 + 0.1 * frame.loc[wide, "seed"]
    found = verdicts(Collected(frame, None, {}))
    assert found("selu", "residual", LOWERS) == "undecided"
    assert found("selu", "layer norm", LOWERS) == "supported"


def test_intervals_of_many_comparisons_are_wider():
    values = [1.0, 2.0, 4.0]
    found = mean(values, comparisons=24)
    low, high = stats.t.interval(1 - 0.05 / 24, 2, loc=7 / 3, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
