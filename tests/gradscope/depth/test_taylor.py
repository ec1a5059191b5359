"""Networks with their last layers replaced by a first-order expansion, against closed forms and finite differences."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope import frames


def loss_of(output, y):
    return 0.5 * (output - y).square().sum(dim=1)


def moved(model, scale=0.3):
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model, before


def test_a_linear_network_is_expanded_by_hand():
    """(A + a)(B + b) x without the term of both changes, a b x."""
    torch.manual_seed(0)
    model, before = moved(nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double())
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    (b_now, a_now), (b_0, a_0) = ([p.detach() for p in m.parameters()] for m in (model, before))
    first_order = x @ (a_0 @ b_0 + (a_now - a_0) @ b_0 + a_0 @ (b_now - b_0)).T
    frame = frames.check(gs.taylor_losses(model, (x, y), initial=before, loss_fn=loss_of))
    expected = [loss_of(model(x), y), loss_of(model(x), y), loss_of(first_order, y)]
    np.testing.assert_allclose(frame["value"], [float(losses.mean().detach()) for losses in expected], rtol=1e-12)
    errors = [float(losses.detach().std()) / 5**0.5 for losses in expected]
    np.testing.assert_allclose(frame["stderr_sample"], errors, rtol=1e-12)
    assert frame["layer"].tolist() == ["none", "1", "0"]
    assert frame["index"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_a_curved_network_is_expanded_as_finite_differences_say(norm):
    torch.manual_seed(1)
    make = {"depth": 3, "width": 6, "activation": "tanh", "norm": norm, "out_features": 2}
    model, before = moved(gs.models.MLP(**make).double())
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())
    frame = gs.taylor_losses(model, (x, y), initial=before, loss_fn=loss_of)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    step = 1e-5
    for num, replaced in ((1, ["head"]), (2, ["layers.2", "head"]), (4, ["layers.0", "layers.1", "layers.2", "head"])):
        outputs = []
        for shift in (-step, 0.0, step):
            mixed = copy.deepcopy(model)
            with torch.no_grad():
                for (name, parameter), old in zip(mixed.named_parameters(), before.parameters(), strict=True):
                    if name.startswith(tuple(replaced)):
                        parameter.copy_(old + shift * (parameter - old))
                outputs.append(mixed(x))
        expanded = outputs[1] + (outputs[2] - outputs[0]) / (2 * step)
        assert frame["value"][num] == pytest.approx(float(loss_of(expanded, y).mean()), rel=1e-7)


def test_nothing_changes_where_nothing_was_trained():
    model = gs.models.MLP(depth=3, width=6, out_features=3, norm="batch")
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    frame = gs.taylor_losses(
        model,
        (x, y),
        initial=copy.deepcopy(model),
        loss_fn=lambda o, y: functional.cross_entropy(o, y, reduction="none"),
    )
    assert frame["value"].nunique() == 1


def test_a_shared_parameter_counts_with_the_lowest_unit_that_has_it():
    torch.manual_seed(2)
    shared = nn.Linear(3, 3, bias=False)
    model, before = moved(nn.Sequential(shared, nn.Linear(3, 3, bias=False), shared).double())
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    frame = gs.taylor_losses(model, (x, y), initial=before, loss_fn=loss_of)
    assert frame["layer"].tolist() == ["none", "1", "0"]
    assert model[0] is model[2] is shared and isinstance(shared.weight, nn.Parameter)  # as they were
    (s, m), (s_0, m_0) = ([p.detach() for p in network.parameters()] for network in (model, before))
    # Only the middle one: in it everything is of first order.  All: two places of the shared one, and the middle.
    assert frame["value"][1] == pytest.approx(float(loss_of(model(x), y).mean().detach()))
    first_order = s_0 @ m_0 @ s_0 + (s - s_0) @ m_0 @ s_0 + s_0 @ (m - m_0) @ s_0 + s_0 @ m_0 @ (s - s_0)
    assert frame["value"][2] == pytest.approx(float(loss_of(x @ first_order.T, y).mean()))


def test_bad_input_is_named():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"loss_fn must return one loss per sample"):
        gs.taylor_losses(model, (x, y), initial=copy.deepcopy(model), loss_fn=lambda o, y: (o - y).square().mean())
    plain = nn.Sequential(nn.Tanh(), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"No unit of the network has parameters"):
        gs.taylor_losses(plain, (x, y), initial=copy.deepcopy(plain), loss_fn=loss_of)


def test_an_operation_without_a_forward_derivative_is_an_error():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * gradient

    class Cubed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.second(Cube.apply(self.first(x)))

    model, before = moved(Cubed())
    with pytest.raises(NotImplementedError, match="no forward-mode derivative of one operation"):
        gs.taylor_losses(model, (torch.randn(4, 3), torch.randn(4, 3)), initial=before, loss_fn=loss_of)


def test_an_initial_model_may_have_been_made_in_inference_mode():
    torch.manual_seed(5)
    model, before = moved(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    with torch.inference_mode():
        inferred = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        inferred.load_state_dict(before.state_dict())
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for initial in (inferred, inferred.state_dict()):
        frame = gs.taylor_losses(model, (x, y), initial=initial, loss_fn=loss_of)
        pd.testing.assert_frame_equal(frame, gs.taylor_losses(model, (x, y), initial=before, loss_fn=loss_of))
        found, expected = (gs.effective_depth(model, x, initial=given) for given in (initial, before))
        np.testing.assert_array_equal(found.log10_values, expected.log10_values)
