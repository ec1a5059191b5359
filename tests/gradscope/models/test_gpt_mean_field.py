"""The mean-field theory that a GPT reads from itself: its parameters, and measured GSC of one network."""

import numpy as np
import pytest
import torch

import gradscope as gs
from gradscope.models import GPT
from tests.helpers import seeded


def network(**options) -> tuple[GPT, torch.Tensor]:
    model = GPT(**{"depth": 3, "width": 192, "heads": 4, "length": 24} | options, generator=seeded())
    return model, torch.randint(256, (2, 24), generator=seeded(1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"norm": "pre", "norm_kind": "layer", "activation": "gelu", "gated": False, "causal": True}),
        ({"norm": "post", "norm_kind": "rms"}, {"norm": "post", "norm_kind": "rms"}),
        ({"norm": "none", "causal": False}, {"norm": "none", "causal": False}),
        ({"mlp": "swiglu"}, {"activation": "silu", "gated": True}),
        ({"mlp": "reglu"}, {"activation": "relu", "gated": True}),
    ],
)
def test_what_is_read(options, expected):
    model, x = network(**options)
    theory = model.mean_field(x)
    assert {key: getattr(theory, key) for key in expected} == expected
    assert (theory.depth, theory.width, theory.length, theory.outputs) == (3, 192, 24, 256)


@pytest.mark.parametrize(
    ("options", "variances"),  # of scores, values, hidden features and outputs of the MLP, and of the embeddings
    [
        ({}, (1, 1, 1, 1, 1)),
        ({"residual_scale": 0.5}, (1, 0.25, 1, 0.25, 1)),
        ({"init": "gpt2"}, (0.0768**2, 0.0768**2, 0.0768, 4 * 0.0768, 0.0008)),  # 0.02^2 = 0.0004, times 192 inputs
        ({"init": "gpt2", "qk_norm": True}, (1, 0.0768**2, 0.0768, 4 * 0.0768, 0.0008)),
    ],
)
def test_variances(options, variances):
    model, x = network(**options)
    theory = model.mean_field(x)
    names = ("score_variance", "value_variance", "hidden_variance", "output_variance", "mean_square")
    # Mean squares of 3 x 192^2 weights have an error of 0.4 %; those of 2 x 24 x 192 embeddings have one of 1.5 %.
    assert [getattr(theory, name) for name in names] == pytest.approx(variances, rel=0.06)


def test_repeated_tokens_overlap_by_half():
    model, _ = network(width=1024, heads=1, depth=1, length=4)
    overlap = model.mean_field(torch.tensor([[3, 5, 3, 7]])).overlap
    expected = np.eye(4) + 0.5 * (np.add.outer([0, 1, 0, 2], [0, 1, 0, 2]) == 0) * (1 - np.eye(4))
    np.testing.assert_allclose(overlap, expected, atol=5 / 32)  # five standard errors, 1 / sqrt(1024) each


@pytest.mark.parametrize("options", [{}, {"norm": "post", "qk_norm": True}, {"norm": "none", "residual_scale": 0.3}])
def test_measured_coefficients_lie_in_the_band(options):
    model, x = network(**options)
    theory = model.mean_field(x).gsc()
    names = list(theory["layer"][:-1])
    measured = gs.gsc(model, x, layers=names, probes=3).to_frame()
    both = theory.merge(measured, on=["layer", "target", "quantity", "index"], suffixes=("", "_measured"))
    assert len(both) - 1 == len(names) == 1 + 3 * 3 + (options.get("norm") is None)
    within = both["log10_value_measured"].between(both["log10_low"], both["log10_high"])
    assert within[:-1].mean() >= 0.9  # the head is the target, whose GSC is 1 up to rounding


def test_refused_tokens():
    model, x = network()
    with pytest.raises(ValueError, match="integer tokens of shape"):
        model.mean_field(x.float())
