"""The study of remedies: networks of equal size, affine maps by construction, and numbers that are known."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import gradscope as gs
import gradscope.meanfield as mf
from experiments import remedied
from experiments.collect import Collected
from experiments.studies import remedies
from experiments.study import observed
from gradscope import frames
from tests.helpers import noise, seeded

STUDY = Path(__file__).parent.parent / "conf" / "study" / "remedies.yaml"
CASES = yaml.safe_load(STUDY.read_text())["hydra"]["sweeper"]["params"]["model.case"].split(",")


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_as_many_parameters(case):
    model = remedied.network(case, 50, 100, 100, generator=seeded())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(50 * 100**2 + 1000, rel=0.01)
    baseline, _, remedy = case.partition("-")
    assert remedy in remedies.REMEDIES and baseline in remedies.NAMES
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
    weight = remedied.network(case, 10, 100, 100, generator=seeded()).layers[-1].linear.weight
    error = variance * math.sqrt(2 / weight.numel())
    assert float(weight.detach().square().mean() * weight.shape[1]) == pytest.approx(variance, abs=4 * error)


@pytest.mark.parametrize("case", ["tanh_large-orthogonal", "relu_batch-orthogonal", "tanh_large-lsuv"])
def test_orthogonal_weights(case):
    weight = remedied.network(case, 4, 20, 20, generator=seeded()).layers[1].linear.weight.detach()
    gram = weight @ weight.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(20), atol=1e-5, rtol=0)
    assert bool((gram[0, 0] - 1).abs() < 1e-5) == ("lsuv" not in case)


def test_lsuv_holds_on_other_samples():
    model = remedied.network("tanh_large-lsuv", 6, 50, 50, generator=seeded())
    frame = gs.measure(model, torch.randn(500, 50, generator=seeded(9)), measures=[gs.measures.PreactivationStd()])
    np.testing.assert_allclose(frame["value"], 1, rtol=0.1)


def test_a_looks_linear_network_is_affine_as_a_whole():
    model, x = remedied.network("relu_batch-looks_linear", 5, 20, 20, generator=seeded()), noise(16, 20).float()
    frame = remedied.measure(model, x, generator=seeded(), num_probes=2).set_index("quantity")["value"]
    assert frame["network_linear_fit_error"] < 1e-10
    assert frame["nlc"] == pytest.approx(1, rel=1e-4)
    assert frame["linear_fit_error"] > 0.1


def test_linear_fit_error_of_a_network():
    """Of y = x + |x| the variance of |x|, 1 - 2 / pi, is not affine; independent noise is not at all."""
    x = noise(20000, 3)
    share = (1 - 2 / math.pi) / (2 - 2 / math.pi)
    assert remedied.network_linear_fit_error(x, x + x.abs()) == pytest.approx(share, rel=0.02)
    assert remedied.network_linear_fit_error(x, 3 * x @ noise(3, 2, seed=4) + 7) < 1e-25
    few = [remedied.network_linear_fit_error(noise(40, 20, seed=s), noise(40, 5, seed=s + 500)) for s in range(300)]
    assert np.mean(few) == pytest.approx(1, abs=4 * np.std(few) / math.sqrt(len(few)))
    with pytest.raises(ValueError, match="An affine map of 3 inputs fits any 4 samples; give more than 4"):
        remedied.network_linear_fit_error(x[:4], x[:4])


@pytest.mark.parametrize(("depth", "n_in"), [(10, 100), (2, 30), (1, 50)])
def test_equal_width(depth, n_in):
    width = remedied.equal_width(50000, depth, n_in)
    assert n_in * width + (depth - 1) * width**2 == pytest.approx(50000, rel=0.03)


def test_mean_field_beside_the_measurement():
    assert remedied.rate("tanh_large-none", 32) == mf.gsc_rate("tanh", weight_variance=4.0)
    assert remedied.rate("tanh_large-lsuv", 32) == pytest.approx(mf.gsc_rate("tanh", "layer"))
    assert remedied.rate("relu_batch-orthogonal", 32) == mf.gsc_rate("relu", "batch", 32)
    assert remedied.rate("relu_batch-looks_linear", 32) == remedied.rate("relu_batch-layer", 32) == 1
    assert math.isnan(remedied.rate("selu-residual", 32)) and math.isnan(remedied.rate("selu-he", 32))


def test_unknown_cases():
    with pytest.raises(ValueError, match="A case begins with one of tanh_large, relu_batch, selu, got 'gelu-none'"):
        remedied.network("gelu-none", 5, 10, 10, generator=seeded())
    with pytest.raises(ValueError, match="No remedy 'prayer'"):
        remedied.network("selu-prayer", 5, 10, 10, generator=seeded())


def synthetic(rates, nonlinearity):
    """Ten layers of known rates and nonlinearities by case, three seeds that differ a little."""
    parts, away = [], np.arange(10, -1, -1)
    for case, rate in rates.items():
        for seed in range(3):
            log10_values = away * math.log10(rate) * (1 + 0.001 * seed)
            profile = frames.tidy(
                {
                    "layer": [f"layers.{n}" for n in range(11)], "index": range(11), "depth_from_output": away,
                    "target": "layers.10", "quantity": "gsc", "log10_value": log10_values, "log10_stderr_probe": 0.0,
                    "log10_stderr_sample": 0.0, "reduction": "batch", "coupled": False, "num_probes": 0,
                    "num_samples": 32,
                }
            )  # fmt: skip
            rows = [profile]
            for quantity, value in (("nlc", 2.0), ("linear_fit_error", 0.2), ("network_linear_fit_error", None)):
                rows.append(observed(quantity, nonlinearity[case] if value is None else value))
            parts.append(pd.concat(rows).assign(seed=seed, case=case, batch_size=32))
    return pd.concat(parts, ignore_index=True)


def test_claims_of_a_frame_that_is_known():
    rates = dict.fromkeys(CASES, 1.5) | {"selu-residual": 1.1, "selu-batch": 1.7, "tanh_large-wider": 1.2}
    rates["relu_batch-looks_linear"] = 1.01
    left = dict.fromkeys(CASES, 0.5) | {"selu-residual": 0.1, "selu-batch": 0.9, "tanh_large-wider": 0.8}
    left["relu_batch-looks_linear"] = 0.0
    frame = synthetic(rates, left)
    outcomes = remedies.outcomes(frame)
    outcome = outcomes["selu"]["residual"]
    np.testing.assert_allclose(outcome.total, 10 * math.log10(1.1) * np.array([1, 1.001, 1.002]))
    np.testing.assert_allclose(outcome.rate, 1.1, rtol=1e-3)
    found = {claim.says: claim.holds for claim in remedies.claims(Collected(frame, None, {}))}
    assert found["selu: residual lowers GSC from input to output"] is True
    assert found["selu: batch norm lowers GSC from input to output"] is False
    assert found["selu: LSUV lowers GSC from input to output"] is None
    assert found["tanh, large weights: fewer and wider layers leave the rate a layer as it is"] is False
    assert found["selu: fewer and wider layers leave the rate a layer as it is"] is True
    assert found["tanh with lecun weights keeps its layers nonlinear"] is True
    assert found["selu: the less a remedy leaves of GSC, the less it leaves of nonlinearity"] is True
    assert found["tanh, large weights: the less a remedy leaves of GSC, the less it leaves of nonlinearity"] is False
    assert found["A looks-linear network is an affine map"] is True
    short = remedies.answer(Collected(frame, None, {})).splitlines()[0]
    assert "selu: as it is 1.8 (50 %), wider 1.8 (50 %), residual 0.4 (10 %). " in short
    assert "looks linear 0.0 (0 %)" in short
