"""The assertions for users' suites: they pass, they fail, and they say where."""

import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.models import MLP
from tests.helpers import noise, seeded


def test_growth():
    x = noise(32, 60)
    model = MLP(depth=30, width=60, activation="linear", init="orthogonal", generator=seeded()).double()
    profile = gs.testing.assert_growth(model, x, undecided="fail")
    assert len(profile.layers) == 31
    exploding = MLP(depth=30, width=60, activation="relu", norm="batch", generator=seeded()).double()
    with pytest.raises(AssertionError, match=r"(?s)GSC grows by 1\.[45]\d+ .*outside \[0.98, 1.02\]"):
        gs.testing.assert_growth(exploding, x)
    gs.testing.assert_growth(exploding, x, low=1.3, high=1.7, undecided="fail")
    with pytest.raises(AssertionError, match=r"(?s)outside \[2, 3\].*First layer outside: 'layers.0'.*log10 GSC = "):
        gs.testing.assert_growth(exploding, x, low=2, high=3)


def test_growth_names_the_worst_layer():
    model = MLP(depth=12, width=60, activation="linear", generator=seeded(), init="orthogonal").double()
    model.layers[4].activation = nn.Softshrink(1.0)  # most entries become 0, so what is left changes more
    with pytest.raises(AssertionError, match=r"worst layer: 'layers\.4'"):
        gs.testing.assert_growth(model, noise(16, 60), low=1e-6, high=2e-6)


def test_growth_that_is_undecided():
    model, x = MLP(depth=12, width=20, activation="tanh", generator=seeded()).double(), noise(8, 20)
    with pytest.warns(UserWarning, match=r"the interval contains a bound of \[0.98, 1.02\]; more layers"):
        gs.testing.assert_growth(model, x)
    with pytest.raises(AssertionError, match="the interval contains a bound"):
        gs.testing.assert_growth(model, x, undecided="fail")
    gs.testing.assert_growth(model, x, undecided="pass")
    with pytest.raises(ValueError, match="undecided must be one of warn, fail, pass; got 'ignore'"):
        gs.testing.assert_growth(model, x, undecided="ignore")


def test_total_of_few_layers():
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(10, 10), nn.Sigmoid())]
    model, x = nn.Sequential(*layers).double(), noise(8, 10)
    total = float(gs.gsc(model, x)["input"].log10_value)
    assert total < -3
    gs.testing.assert_total(model, x, low=0.99 * 10**total, high=1.01 * 10**total, undecided="fail")
    for low, high in ((1e-2, 1e2), (1e-9, 0.99 * 10**total)):
        with pytest.raises(AssertionError, match=r"(?s)GSC from 'input' to '7' is 10\^-\d.*outside.*Largest change: '"):
            gs.testing.assert_total(model, x, low=low, high=high)
    bound = 10**total
    with pytest.warns(UserWarning, match=r"95 % interval 10\^.*contains a bound"):
        gs.testing.assert_total(model, x, low=1e-9, high=bound, probes=4)
    with pytest.raises(AssertionError, match="contains a bound"):
        gs.testing.assert_total(model, x, low=1e-9, high=bound, probes=4, undecided="fail")


def test_failures_are_short_and_hide_the_library():
    model = MLP(depth=200, width=10, norm="batch", generator=seeded()).double()
    for check in (gs.testing.assert_growth, gs.testing.assert_total):
        with pytest.raises(AssertionError) as caught:
            check(model, noise(8, 10), low=2.0, high=3.0)
        assert len(str(caught.value).splitlines()) <= 25
        assert [entry.name for entry in caught.traceback if not entry.ishidden(caught)] == [
            "test_failures_are_short_and_hide_the_library"
        ]


def test_collapse():
    x = noise(16, 60)
    cosines = gs.testing.assert_no_collapse(MLP(depth=5, width=60, generator=seeded()).double(), x)
    assert list(cosines)[:2] == ["input", "layers.0"] and abs(cosines["input"]) < 0.1
    with pytest.raises(AssertionError, match=r"'layers\.\d+': the mean cosine .*at least 0.9"):
        gs.testing.assert_no_collapse(MLP(depth=60, width=60, generator=seeded()).double(), x, most=0.9)
    gs.testing.assert_no_collapse(MLP(depth=60, width=60, norm="batch", generator=seeded()).double(), x)


def test_qm_norm():
    gs.testing.assert_qm_norm(2 * torch.eye(5).double(), 2)
    torch.manual_seed(0)
    jacobian = gs.capture(nn.Linear(4, 4).double(), noise(3, 4)).jacobian("input", "output")
    value = float(gs.qm_norm(jacobian.dense()))
    gs.testing.assert_qm_norm(jacobian, value)
    gs.testing.assert_qm_norm(jacobian, value, probes=200)
    with pytest.raises(AssertionError, match="expected 2 within"):
        gs.testing.assert_qm_norm(torch.eye(5), 2)
    with pytest.raises(ValueError, match="probes=8 would be ignored"):
        gs.testing.assert_qm_norm(torch.eye(5), 1, probes=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: gs.testing.assert_growth(m, x, low=2, high=1), "low and high"),
        (lambda m, x: gs.testing.assert_growth(m, x), "(?s)at least 6 layers.*gs.testing.assert_total"),
        (lambda m, x: gs.testing.assert_total(m, x, low=2, high=1), "low and high"),
        (lambda m, x: gs.testing.assert_no_collapse(m, x[:1]), "at least two"),
        (lambda m, x: gs.testing.assert_no_collapse(m, x, most=2), r"most must be a number in \(0, 1\], got 2"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(MLP(depth=3, width=4, generator=seeded()).double(), noise(5, 4))


class TwoInputs(nn.Module):
    """Nothing before the sum lies on the trunk, and there gradients vanish."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, info):
        return self.last(torch.tanh(self.first(x) * 100) + self.other(info) * 100)


@pytest.mark.parametrize("check", [gs.testing.assert_total, gs.testing.assert_growth])
def test_an_assertion_that_would_leave_out_most_layers_is_refused(check):
    torch.manual_seed(0)
    model, x, info = TwoInputs(), torch.randn(8, 4), torch.randn(8, 4)
    with pytest.raises(
        ValueError, match=r"all layers before .last., where .* 2 inputs meet.*forward=lambda model, x: model\(x, other"
    ):
        check(model, {"x": x, "info": info}, low=0.1, high=10)


def test_the_total_of_one_of_two_inputs():
    torch.manual_seed(0)
    model, x, info = TwoInputs(), torch.randn(8, 4), torch.randn(8, 4)
    with pytest.raises(AssertionError, match="GSC from 'input' to 'last' is 10"):
        gs.testing.assert_total(model, x, low=0.1, high=10, forward=lambda model, x: model(x, info))
    profile = gs.testing.assert_total(model, {"x": x, "info": info}, layers=["first"], low=1e-9, high=1)
    assert profile.layers[0] == "first"


def test_one_input_that_a_few_layers_share_is_tested_whole():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.inner(x)

    with pytest.warns(UserWarning, match="Only 2 layers lie on the trunk"):  # inner lies off it, and may be wanted
        profile = gs.testing.assert_total(Residual(), torch.randn(8, 4), low=1e-3, high=1e3)
    assert profile.layers == ("input", "output")
