"""The study that the project is about, measured here: rates against mean-field theory, and the verdicts."""

import math

import numpy as np
import pytest
import torch

import gradscope as gs
from gradscope.coefficients.growth import fit_growth
from gradscope.measures.activation import PreactivationStd, SignDiversity
from gradscope.models.mlp import MLP

DEPTH, WIDTH, BATCH, SEEDS = 50, 100, 100, 8

# Growth of GSC (squared) a layer in the limit of infinite width, at B = 100 where batch normalization is used.
# relu+batch: Yang et al. (2019), "A mean field theory of batch normalization", Theorems 8 and 9; the others are
# q E[phi'(sqrt(q) z)^2] / E[phi(sqrt(q) z)^2] at q = 1 or the fixed point.
C = -1 / (BATCH - 1)
J0 = (math.sqrt(1 - C**2) + (math.pi - math.acos(C)) * C) / math.pi
J1 = (math.pi - math.acos(C)) / math.pi
RELU_BATCH = (J1 + BATCH - 1) / ((BATCH - 3) * (1 - J0)) - 1 / (BATCH - 3)
THEORY = {
    ("relu", "none"): (1.0, "not exploding"),
    ("relu", "layer"): (1.0, "not exploding"),
    ("relu", "batch"): (RELU_BATCH, "exploding"),
    ("tanh", "none"): (1.0, "not exploding"),
    ("tanh", "layer"): (1.177807, "exploding"),
    ("tanh", "batch"): (1.187, "exploding"),
    ("selu", "none"): (1.071575, "exploding"),
}


def test_the_closed_form_is_the_published_number():
    assert pytest.approx(1.483361, abs=5e-7) == RELU_BATCH


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "norm"), THEORY)
def test_rate_and_verdict(activation, norm):
    profiles = []
    for seed in range(SEEDS):
        model = MLP(
            depth=DEPTH, width=WIDTH, activation=activation, norm=norm, generator=torch.Generator().manual_seed(seed)
        )
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(100 + seed))
        # The scatter between seeds includes that of the signs, and is far larger.
        profiles.append(gs.gsc(model, x, probes=16, generator=torch.Generator().manual_seed(200 + seed)))
    log10 = np.stack([profile.log10_values[:, 0] for profile in profiles])
    growth = fit_growth(log10, np.arange(DEPTH, -1, -1))
    expected, verdict = THEORY[activation, norm]
    # Half of a 95 % t-interval with seven degrees of freedom is 2.365 standard errors.
    stderr = (math.log(growth.rate_high) - math.log(growth.rate_low)) / 2 / 2.365
    assert abs(math.log(growth.rate / expected)) <= max(0.03, 3 * stderr)
    assert (growth.verdict == "exploding") == (verdict == "exploding")


def test_pseudo_linearity_shows_in_the_statistics():
    def last(activation, norm):
        model = MLP(
            depth=DEPTH, width=WIDTH, activation=activation, norm=norm, generator=torch.Generator().manual_seed(0)
        )
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
        frame = gs.measure(model, x, measures=[SignDiversity(), PreactivationStd()])
        return frame[frame["index"] == DEPTH].set_index("quantity")["value"]

    assert last("relu", "none")["sign_diversity"] < 0.1
    assert last("relu", "layer")["sign_diversity"] < 0.1
    assert last("relu", "batch")["sign_diversity"] > 0.4
    assert last("tanh", "none")["preactivation_std"] == pytest.approx(0.10, abs=0.02)
    assert last("tanh", "batch")["preactivation_std"] == pytest.approx(1, abs=1e-3)
