"""Complex numbers count as two real ones: every quantity against the same network written with real numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradscope as gs
from tests.bruteforce import gsc_log10
from tests.helpers import noise


class Complex(nn.Module):
    """x -> head(|tanh(x W)|) with complex x and W; neither modulus nor conjugate is holomorphic."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(4, 3, dtype=torch.cdouble)
        self.head = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, z):
        h = self.w(z)
        return self.head((torch.tanh(h) + 0.3 * h.conj()).abs())


class Real(nn.Module):
    """The same network on real and imaginary parts, inputs of shape (B, 4, 2)."""

    def __init__(self, twin: Complex):
        super().__init__()
        self.re, self.im = (nn.Parameter(part.detach().clone()) for part in (twin.w.weight.real, twin.w.weight.imag))
        self.bias = nn.Parameter(torch.view_as_real(twin.w.bias).detach().clone())
        self.w, self.head = nn.Identity(), twin.head

    def forward(self, x):
        a, b = x.unbind(-1)
        real, imaginary = a @ self.re.T - b @ self.im.T, a @ self.im.T + b @ self.re.T
        h = self.w(torch.stack([real, imaginary], -1) + self.bias)
        p, q = h.unbind(-1)
        scale = torch.cosh(2 * p) + torch.cos(2 * q)  # tanh(p + iq) = (sinh 2p + i sin 2q) / scale
        return self.head(torch.hypot(torch.sinh(2 * p) / scale + 0.3 * p, torch.sin(2 * q) / scale - 0.3 * q))


@pytest.fixture(scope="module")
def twins():
    torch.manual_seed(0)
    model = Complex()
    z = torch.randn(5, 4, dtype=torch.cdouble)
    twin, x = Real(model), torch.view_as_real(z)
    torch.testing.assert_close(twin(x), model(z))
    return model, z, twin, x


def test_coefficients(twins):
    model, z, twin, x = twins
    profile = gs.gsc(model, z, probes="exact")
    assert profile.layers == ("input", "w", "head") and not profile.coupled
    for name in ("input", "w"):
        assert profile[name].log10_value == pytest.approx(gsc_log10(twin, name, x), abs=1e-10)
    estimated = gs.gsc(model, z, probes=4000)
    for name in ("input", "w"):
        assert abs(estimated[name].log10_value - profile[name].log10_value) < 4 * estimated[name].log10_stderr


def test_a_complex_target(twins):
    model, z, _, _ = twins
    J = torch.autograd.functional.jacobian(
        lambda x: torch.view_as_real(model.w(torch.view_as_complex(x))), torch.view_as_real(z)
    )
    f = model.w(z).detach()
    expected = float(J.square().sum() / (2 * z.numel()) * z.abs().square().sum() / f.abs().square().sum())
    for probes in ("exact", gs.Deflated(6, 1)):  # six directions span all of C^3
        found = gs.gsc(model, z, target="w", probes=probes, layers=["input", "w"])
        assert found["input"].value == pytest.approx(expected, rel=1e-6)
    matrix = gs.gsc_matrix(model, z, probes="exact")
    assert 10 ** matrix.log10_values[0, 1] == pytest.approx(expected, rel=1e-10)


def test_jacobian_operator(twins):
    model, z, _, _ = twins
    captured = gs.capture(model, z)
    jacobian = captured.jacobian("input", "w")
    expected = torch.autograd.functional.jacobian(
        lambda x: torch.view_as_real(model.w(torch.view_as_complex(x))), torch.view_as_real(z)
    ).reshape(30, 40)
    torch.testing.assert_close(jacobian.dense(), expected)
    v, u = noise(40), noise(30)
    torch.testing.assert_close(jacobian.matvec(v), expected @ v)
    torch.testing.assert_close(jacobian.rmatvec(u), expected.T @ u)
    dz = torch.randn(5, 4, dtype=torch.cdouble)
    torch.testing.assert_close(jacobian.linearize()(dz), model.w(z + dz).detach())


def test_nlc(twins):
    model, z, twin, x = twins
    assert gs.nlc(model, z, probes="exact").value == pytest.approx(gs.nlc(twin, x, probes="exact").value, rel=1e-10)
    assert gs.nlc(model, z, target="w", probes="exact").value == pytest.approx(1, rel=1e-10)  # affine


def test_parameters(twins):
    model, z, _, _ = twins
    weight, bias = (torch.view_as_real(p).detach() for p in (model.w.weight, model.w.bias))

    def output(w: Tensor, b: Tensor) -> Tensor:
        own = {"w.weight": torch.view_as_complex(w), "w.bias": torch.view_as_complex(b)}
        return torch.func.functional_call(model, own, z)

    parts = torch.autograd.functional.jacobian(output, (weight, bias))
    square, length = sum(part.square().sum() for part in parts), weight.square().sum() + bias.square().sum()
    expected = float(square / (weight.numel() + bias.numel()) * length / model(z).detach().square().sum())
    frame = gs.parameter_gsc(model, z, probes="exact").to_frame().query("layer == 'w'").set_index("quantity")
    assert 10 ** frame.log10_value["parameter_gsc"] == pytest.approx(expected, rel=1e-10)
    norm = math.sqrt(float(square) / (weight.numel() + bias.numel()))
    assert 10 ** frame.log10_value["parameter_qm_norm"] == pytest.approx(norm, rel=1e-10)


def test_gradients_of_a_loss(twins):
    model, z, _, _ = twins
    labels = torch.zeros(5)
    gradients = torch.autograd.grad(model(z).square().sum(1).mean(), [model.w.weight, model.w.bias])
    expected = math.sqrt(sum(float(g.abs().square().sum()) for g in gradients))
    found = gs.measure(
        model, (z, labels), loss_fn=lambda f, y: f.square().sum(1), measures=[gs.measures.GradientNorm()]
    )
    assert found.query("layer == 'w'").value.item() == pytest.approx(expected, rel=1e-10)


def test_check_passes(twins):
    model, z, _, _ = twins
    report = gs.check(model, z)
    assert report.passed, str(report)


@pytest.mark.parametrize("first", [1, 0], ids=["imaginary parts", "real parts"])
def test_coupling_through_one_part_only(first):
    class Couples(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(2, 2, dtype=torch.cdouble)

        def forward(self, z):
            h = torch.view_as_real(self.w(z))
            parts = [h[..., 0], h[..., 1]]
            parts[first] = parts[first] - parts[first].mean(0)
            return torch.complex(*parts)

    assert gs.capture(Couples(), torch.randn(4, 2, dtype=torch.cdouble)).coupled


def test_what_is_defined_for_real_numbers_only_is_refused():
    z, model = torch.randn(3, 2, dtype=torch.cdouble), nn.Sequential(nn.Linear(2, 2, dtype=torch.cdouble), nn.Tanh())
    with pytest.raises(ValueError, match=r"Nonlinearity '1' receives complex numbers"):
        gs.measure(model, z)
    with pytest.raises(ValueError, match="must return real losses"):
        gs.gsc(model, (z, z), loss_fn=lambda f, y: (f - y).sum(1))
    z[0, 0] = complex(1, math.nan)
    with pytest.raises(ValueError, match="1 NaN"):
        gs.gsc(model, z)


def test_a_complex_batch_with_integers_has_no_embedding(twins):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = twins[0]

        def forward(self, z, mask):
            return self.net(z * mask)

    captured = gs.capture(Masked(), {"z": twins[1], "mask": torch.ones(5, 4, dtype=torch.long)})
    assert captured.source_names == ("input",)


def test_effective_depth_of_a_complex_network():
    torch.manual_seed(0)
    model, initial = (nn.Sequential(*(nn.Linear(2, 2, dtype=torch.cdouble) for _ in range(3))) for _ in range(2))
    z = torch.randn(4, 2, dtype=torch.cdouble)
    found = gs.effective_depth(model, z, initial=initial, probes="exact")
    now, then = ([layer.weight.detach() for layer in net] for net in (model, initial))
    terms = np.zeros(4)
    products = {0: [torch.eye(2, dtype=torch.cdouble)]}
    for new, old in zip(now, then, strict=True):
        following: dict[int, list[Tensor]] = {}
        for power, (product,) in products.items():
            for add, factor in ((0, old), (1, new - old)):
                following.setdefault(power + add, []).append(factor @ product)
        products = {power: [sum(parts[1:], parts[0])] for power, parts in following.items()}
    for power, (product,) in products.items():
        terms[power] = float(product.norm())
    np.testing.assert_allclose(10**found.log10_values, terms / terms.sum(), rtol=1e-8)
