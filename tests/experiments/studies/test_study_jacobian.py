"""The Jacobian study against closed forms."""

import ast
import functools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from experiments.archive.tables import Collected
from experiments.studies import jacobian
from experiments.studies.jacobian import measurement, numbers
from experiments.studies.jacobian.measurement import rotations
from gradscope.frames import observed
from tests.experiments.studies.claimed import only
from tests.helpers import ROOT, noise, seeded


class Quadratic(nn.Module):
    """(u, v) -> (u^2, u v): the Jacobian at (u, v) is [[2u, 0], [v, u]], its determinant 2 u^2."""

    def forward(self, x):
        return torch.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1]], dim=1)


def measured(model, x, **options):
    frame = measurement.measure(model, x, generator=seeded(0), **({"num_lines": 5, "extent": 0.5} | options))
    return dict(list(frame.groupby("quantity", sort=False)))


def test_a_curved_map_of_the_plane():
    found = measured(Quadratic(), torch.tensor([[1.5, -0.5]], dtype=torch.float64))
    assert found["determinant"]["value"].item() == pytest.approx(2 * 1.5**2)
    linear = found["linear"].pivot_table(index="axis", columns="index", values="value").to_numpy()
    np.testing.assert_allclose(linear, [[2.25, 3.0, 0.0], [-0.75, -0.5, 1.5]])
    image = found["image"].pivot_table(index=["u", "v"], columns="axis", values="value")
    assert len(image) == 25
    np.testing.assert_allclose(image.loc[(0.5, -0.25)], [4.0, 2.0 * -0.75])
    # The second order is h^2 (u_x^2, u_x u_y), |h u_x|^2 times a unit vector or less.
    errors = found["linearization_error"].set_index("step")["value"]
    assert errors.iloc[0] < 1e-4 and errors.iloc[-1] / errors.iloc[0] == pytest.approx(1e4, rel=1e-6)
    areas = found["area"].set_index("step")["value"]
    # Of this map the chords of a square span the area of its image; rounding is 1e-16 of a corner over h^2.
    np.testing.assert_allclose(areas, 4.5, rtol=1e-7)


def test_a_linear_map_has_no_error():
    model = nn.Linear(2, 2, bias=False).double()
    found = measured(model, noise(1, 2))
    assert found["linearization_error"]["value"].max() < 1e-9
    determinant = abs(float(torch.linalg.det(model.weight.detach())))
    np.testing.assert_allclose(found["area"]["value"], determinant, rtol=1e-6)


def test_norm_and_volume_of_orthogonal_and_diagonal_layers():
    q = torch.linalg.qr(noise(6, 6))[0]
    d = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0, 0.1]).double()
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).double()
    with torch.no_grad():
        for layer, weight in zip(model, (3 * q, torch.diag(d), q.T), strict=True):
            layer.weight.copy_(weight)
    found = measured(model, noise(1, 6))
    volume = d.log().mean().item()
    np.testing.assert_allclose(
        found["mean_log_singular_value"]["value"], [math.log(3), math.log(3) + volume, math.log(3) + volume]
    )
    norms = 0.5 * math.log(9 * d.square().mean().item())
    np.testing.assert_allclose(found["log_qm_norm"]["value"], [math.log(3), norms, norms])


def test_the_volume_of_gaussian_matrices():
    generator = seeded(3)
    draws = [torch.linalg.slogdet(torch.randn(8, 8, generator=generator) / math.sqrt(8))[1] / 8 for _ in range(4000)]
    draws = torch.stack(draws)
    error = float(draws.std() / math.sqrt(len(draws)))
    assert numbers.gaussian_log_volume(8) == pytest.approx(float(draws.mean()), abs=4 * error)


def test_singular_values_that_are_known():
    """Of diag(d) then 2: s = 2 d; the effective rank has no scale, and of 20 values the 18 smallest are most."""
    d = torch.tensor([5.0, 3.0, *(0.9**k for k in range(18))], dtype=torch.float64)
    model = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(2))).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(d))
        model[1].weight.copy_(2 * torch.eye(20))
    found = {quantity: rows["value"].to_numpy() for quantity, rows in measured(model, noise(1, 20)).items()}
    rank = float(d.square().sum().square() / d.pow(4).sum())
    np.testing.assert_allclose(found["effective_rank"], [rank, rank])
    most = math.log(0.9) * 17 / 2
    np.testing.assert_allclose(found["mean_log_of_most"], [most, most + math.log(2)])
    np.testing.assert_allclose(found["mean_log_singular_value"][0], d.log().mean())


def test_the_effective_rank_of_gaussian_matrices_is_half_of_their_width():
    """E sum s^4 = n (n + n + 1) n / n^2 and E sum s^2 = n for variance 1 / n, so n / 2 for large n."""
    weight = torch.randn(400, 400, generator=seeded(1), dtype=torch.float64) / 20
    model = nn.Linear(400, 400, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    found = measured(nn.Sequential(model), noise(1, 400))
    assert found["effective_rank"]["value"].item() == pytest.approx(200, rel=0.02)


def test_small_singular_values_below_the_rounding_of_the_large():
    """s = 10^(-k) and thirty layers: 10^(-570) and its inverse are no float64 at all, their logarithms are."""
    d = torch.logspace(0, -19, 20, dtype=torch.float64)
    model = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(30))).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.diag(d))
    found = measured(model, noise(1, 20))
    np.testing.assert_allclose(
        found["mean_log_of_most"]["value"], -math.log(10) * np.mean(range(2, 20)) * np.arange(1, 31)
    )


def test_rotations_stretch_all_directions_alike():
    model = rotations(depth=4, width=7, scale=1.3, in_features=7, generator=seeded(2)).double()
    found = {quantity: rows["value"].to_numpy() for quantity, rows in measured(model, noise(1, 7)).items()}
    expected = math.log(1.3) * np.arange(1, 5)
    for quantity in ("log_qm_norm", "mean_log_singular_value", "mean_log_of_most"):
        np.testing.assert_allclose(found[quantity], expected, rtol=1e-5)  # weights were drawn in float32
    np.testing.assert_allclose(found["effective_rank"], 7, rtol=1e-5)
    assert rotations(depth=1, width=5, scale=1.0, in_features=9, generator=seeded(0))(noise(2, 9).float()).shape == (
        2,
        5,
    )


KNOWN = {
    "linear": (0.0, None),
    "tanh": (0.0, -0.6),
    "selu": (0.05, -0.5),
    "orthogonal": (0.0, 0.0),
    "expanding": (0.1, 0.1),
}


@functools.cache
def decided(story):
    """Claims about the frame of a story, which is written as Python."""
    return jacobian.STUDY.claims(told(**ast.literal_eval(story)))


def told(rates=(), *, power=1.0, area=1e-8, rank=3.0, noise=1e-4, transient=0.0, seeds=6):
    """A frame of the study: rates of ln qm and of the mean logarithm by model, the rest alike."""
    parts, generator, steps, deep = [], np.random.default_rng(0), measurement.STEPS, []
    for seed in range(seeds):
        plane = [
            observed("linearization_error", steps**power, step=steps),
            observed("area", 2 * (1 + area * steps / steps[0]), step=steps),
            observed("determinant", 2.0),
            observed("image", np.arange(8.0), axis=np.tile([0, 1], 4), u=[0, 0, 0, 0, 1, 1, 1, 1], v=[0, 0, 1, 1] * 2),
            observed("linear", np.arange(6.0), axis=[0, 0, 0, 1, 1, 1], index=[0, 1, 2] * 2),
        ]
        parts += [part.assign(model="plane", seed=seed, width=32) for part in plane]
        for model, (norm, volume) in (KNOWN | dict(rates)).items():
            volume = numbers.gaussian_log_volume(50) if volume is None else volume
            layers = np.arange(1, 21)
            early = transient * np.minimum(layers, 9)
            values = {
                "log_qm_norm": norm * layers + early, "mean_log_singular_value": volume * layers,
                "mean_log_of_most": volume * layers, "effective_rank": np.full(20, rank),
            }  # fmt: skip
            for quantity, value in values.items():
                shaken = value + noise * generator.normal(size=20)
                deep += [(quantity, number, at, model, seed) for number, at in zip(shaken, layers, strict=True)]
    quantities, numbered, index, models, of_seed = map(list, zip(*deep, strict=True))
    parts.append(observed(quantities, numbered, index=index, model=models, seed=of_seed, width=50))
    return Collected(pd.concat(parts, ignore_index=True), None, {})


SAYS = {
    "slope": ("error of the linearization",),
    "area": ("small squares",),
    "identity": ("a theorem",),
    "norm": ("quadratic mean norm", "tanh"),
    "volume": ("The volume of the tanh network",),
    "gaussian": ("a Gaussian matrix",),
    "orthogonal": ("Control", "orthogonal"),
    "expanding": ("Control", "expanding"),
    "few": ("few directions", "tanh"),
    "most": ("largest tenth", "tanh"),
}


@pytest.mark.parametrize(
    ("story", "claim", "expected"),
    [
        ({}, "slope", True),
        ({"power": 1.1}, "slope", False),
        ({"area": 0.01}, "area", False),
        ({}, "area", True),
        ({"noise": 0.0}, "identity", True),
        ({"rates": {"tanh": (-0.6, 0.0)}}, "identity", False),
        ({}, "norm", True),
        ({"rates": {"tanh": (-0.02, -0.6)}}, "norm", False),
        ({"rates": {"tanh": (-0.0099, -0.6)}, "noise": 0.02}, "norm", None),
        ({"transient": -0.1}, "norm", True),  # what the first layers do is no rate
        ({}, "volume", True),
        ({"rates": {"tanh": (0.0, 0.0)}}, "volume", False),
        ({}, "gaussian", True),
        ({"rates": {"linear": (0.0, -0.3)}}, "gaussian", False),
        ({"noise": 0.5}, "gaussian", None),  # a wide interval is no agreement
        ({}, "orthogonal", True),
        ({"rates": {"orthogonal": (0.1, 0.05)}}, "orthogonal", False),
        ({}, "expanding", True),
        ({"rates": {"expanding": (0.1, 0.0)}}, "expanding", False),
        ({}, "few", True),
        ({"rank": 20.0}, "few", False),
        ({}, "most", True),
        ({"rates": {"tanh": (0.0, 0.1)}}, "most", False),
    ],
)
def test_claims_of_frames_whose_truth_is_known(story, claim, expected):
    assert only(decided(repr(story)), *SAYS[claim]).holds is expected


def test_the_answer_follows_the_claims():
    text, table = jacobian.STUDY.answer(told()), jacobian.STUDY.details(told())
    assert "to the power 2.00" in text and "| selu | 1.051 |" in table and "| expanding | 1.105 | 1.105 |" in table
    assert "not shown" not in text and "3 of 3 deep networks with Gaussian weights (linear, tanh and selu)" in text
    other = jacobian.STUDY.answer(told({"tanh": (0.0, 0.1)}, power=1.5))
    assert "not shown" in other and "(linear and selu)" in other
    assert "(none)" in jacobian.STUDY.answer(told(rank=30.0))


def test_figures_show_rates_and_ranks():
    drawn = jacobian.STUDY.figures(told(rank=4.0))
    axes = drawn["volume"].axes
    assert [ax.get_title() for ax in axes[:5]] == ["linear", "tanh", "selu", "orthogonal", "expanding"]
    norm = axes[2].lines[0].get_ydata()
    assert norm[-1] == pytest.approx(20 * 0.05 / math.log(10), rel=1e-3)
    assert axes[7].lines[0].get_ydata() == pytest.approx(np.full(20, 4.0), rel=1e-3)
    for figure in drawn.values():
        plt.close(figure)


def test_sizes_are_those_of_the_configuration():
    conf = ROOT / "conf" / "model"
    plane, deep, grown, mlp = (
        yaml.safe_load((conf / f"{name}.yaml").read_text()) for name in ("plane", "orthogonal", "expanding", "mlp")
    )
    assert (plane["depth"], plane["width"], plane["weight_variance"]) == (
        jacobian.PLANE_DEPTH, jacobian.PLANE_WIDTH, jacobian.PLANE_VARIANCE,
    )  # fmt: skip
    for sizes in (deep, mlp):
        assert (sizes["depth"], sizes["width"]) == (jacobian.DEPTH, jacobian.WIDTH)
    assert (deep["scale"], grown["scale"]) == (1.0, jacobian.SCALE)


def test_it_takes_one_point():
    with pytest.raises(ValueError, match="got 3 samples"):
        measured(nn.Linear(2, 2).double(), noise(3, 2))
