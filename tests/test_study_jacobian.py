"""The Jacobian study against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from experiments.studies import jacobian
from tests.helpers import noise, seeded


class Quadratic(nn.Module):
    """(u, v) -> (u^2, u v): the Jacobian at (u, v) is [[2u, 0], [v, u]], its determinant 2 u^2."""

    def forward(self, x):
        return torch.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1]], dim=1)


def measured(model, x, **options):
    frame = jacobian.measure(model, x, generator=seeded(0), **({"num_lines": 5, "extent": 0.5} | options))
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
    assert jacobian._gaussian_log_volume(8) == pytest.approx(float(draws.mean()), abs=4 * error)


def test_it_takes_one_point():
    with pytest.raises(ValueError, match=r"data\.batch_size=1, got 3 samples"):
        measured(nn.Linear(2, 2).double(), noise(3, 2))
