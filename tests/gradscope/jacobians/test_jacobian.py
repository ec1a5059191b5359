"""The Jacobian between layers as an operator: matrix, singular values, volume, and the affine map."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.operators import matrix
from tests.helpers import noise


class Net(nn.Module):
    """A residual block, batch normalization and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.norm, self.last = (
            nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.BatchNorm1d(5), nn.Linear(5, 3),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(self.dropout(self.norm(h + self.branch(h))))


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net().double()


def test_dense_products_and_brute_force_agree(net):
    net.eval()
    x = noise(3, 4)
    jacobian = gs.capture(net, x).jacobian("first", "last")
    above = lambda h: net.last(net.norm(torch.tanh(h) + net.branch(torch.tanh(h))))  # noqa: E731
    expected = torch.autograd.functional.jacobian(above, net.first(x).detach()).reshape(9, 15)
    torch.testing.assert_close(jacobian.dense(), expected, rtol=1e-12, atol=1e-14)
    columns = torch.stack([jacobian.matvec(v) for v in torch.eye(15).double()], dim=1)
    torch.testing.assert_close(columns, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(jacobian.T.dense(), expected.T, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(jacobian.singular_values(), torch.linalg.svdvals(expected), rtol=1e-10, atol=1e-14)
    assert torch.equal(gs.capture(net, x).jacobian("last", "last").dense(), torch.eye(9).double())


def test_a_product_with_many_equals_the_product_of_jacobians(net):
    capture = gs.capture(net, noise(3, 4))
    whole = capture.jacobian("input", "last").dense()
    parts = capture.jacobian("norm", "last").dense() @ capture.jacobian("input", "norm").dense()
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("source", ["input", "embedding"])
def test_the_error_of_the_affine_map_falls_as_the_square(net, source):
    if source == "embedding":

        class Ids(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.net = nn.Embedding(9, 4).double(), net

            def forward(self, ids):
                return self.net(self.embedding(ids))

        model, x, target = Ids(), torch.tensor([0, 3, 8]), "net.last"
    else:
        model, x, target = net, noise(3, 4), "last"
    capture = gs.capture(model, x)  # dropout active: one mask for all
    affine = capture.jacobian(source, target).linearize()
    dx, errors = noise(3, 4, seed=5), []
    for h in (1e-2, 1e-3, 1e-4):
        moved = capture.replay.outputs([target], {source: h * dx})[target]
        errors.append(float((moved - affine(h * dx)).norm()))
        assert errors[-1] < 0.05 * float((moved - affine.value).norm())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.2)


def test_few_singular_values_of_a_large_operator():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(600, 600, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    spectrum = torch.logspace(2, -5, 600, dtype=torch.float64)
    operator = matrix(u @ torch.diag(spectrum) @ v)
    torch.testing.assert_close(operator.singular_values(7), spectrum[:7], rtol=1e-8, atol=0)
    torch.testing.assert_close(operator.singular_values(100), spectrum[:100], rtol=1e-8, atol=0)  # densely
    for k in (0, 601, 2.5, True):
        with pytest.raises(ValueError, match="k must be"):
            operator.singular_values(k)


def test_condition_and_volume_in_closed_form():
    diagonal = matrix(torch.diag(torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64)))
    assert diagonal.condition() == pytest.approx(8)
    assert diagonal.log_volume() == pytest.approx(math.log(4.0))
    square = noise(6, 6)
    assert matrix(square).log_volume() == pytest.approx(float(np.linalg.slogdet(square.numpy())[1]), rel=1e-10)
    singular = matrix(torch.zeros(2, 3).double())
    assert singular.condition() == math.inf and singular.log_volume() == -math.inf
    tall = noise(9, 5)  # explode or collapse: the mean log singular value lies below the log of the qm norm
    assert matrix(tall).log_volume() / 5 < math.log(float(gs.qm_norm(tall)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        return self.last(functional.scaled_dot_product_attention(h, h, h))


def test_attention_whose_backward_cannot_be_differentiated():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 1, 3, 4)
    jacobian = gs.capture(model, x).jacobian("first", "last")
    expected = torch.autograd.functional.jacobian(
        lambda h: model.last(functional.scaled_dot_product_attention(h, h, h)), model.first(x).detach()
    )
    torch.testing.assert_close(jacobian.dense(), expected.reshape(24, 24), rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"J v from 'first' to 'last'.*SDPBackend.MATH"):
        jacobian.matvec(torch.ones(24))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = gs.capture(model, x).jacobian("first", "last")
    v = torch.randn(24)
    torch.testing.assert_close(jacobian.matvec(v), expected.reshape(24, 24) @ v, rtol=1e-4, atol=1e-6)


def test_refusals(net):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    capture = gs.capture(Two(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="Layer 'b' does not depend on layer 'a'"):
        capture.jacobian("a", "b")
    capture = gs.capture(net, noise(3, 4))
    with pytest.raises(ValueError, match="'first' comes before 'last', so it cannot be the target: swap"):
        capture.jacobian("last", "first")
    with pytest.raises(ValueError, match=r"dx must have the shape of layer 'first', \(3, 5\), got \(15,\)"):
        capture.jacobian("first", "last").linearize()(torch.zeros(15))


class Watched(torch.autograd.Function):
    """The identity; its context lives as long as the graph."""

    @staticmethod
    def forward(ctx, x, alive):
        alive.append(weakref.ref(ctx))
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g, None


class Watching(nn.Module):
    def __init__(self, alive):
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 3)
        self.watch = lambda h: Watched.apply(h, alive)
        self.double()

    def forward(self, x):
        return self.c(torch.tanh(self.watch(self.a(x))))


def used(jacobian):
    jacobian.matvec(torch.ones(jacobian.shape[1], dtype=torch.float64))
    (jacobian @ jacobian.T).dense()
    jacobian.linearize()


@pytest.mark.parametrize(
    "measure",
    [
        gs.gsc,
        gs.gsc_matrix,
        gs.nlc,
        gs.parameter_gsc,
        lambda model, x: str(gs.capture(model, x).describe()),
        lambda model, x: used(gs.capture(model, x).jacobian("a", "c")),
    ],
    ids="gsc matrix nlc parameters describe jacobian".split(),
)
def test_no_graph_needs_the_garbage_collector(measure):
    alive, x = [], noise(3, 4)
    model = Watching(alive)
    gc.collect()
    gc.disable()
    try:
        measure(model, x)
        assert alive and all(graph() is None for graph in alive)
    finally:
        gc.enable()


class DoubledBack(nn.Module):
    def __init__(self, hook):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.hook = nn.Linear(4, 4), nn.Linear(4, 3), hook
        self.double()

    def forward(self, x):
        h = torch.tanh(self.a(x))
        h.register_hook(self.hook)
        return self.c(h)


def test_products_with_hooks_that_cannot_be_differentiated_are_refused():
    x, v = noise(3, 4), noise(12, seed=2)
    for hook in (lambda g: 2 * g.detach(), lambda g: g + g.detach()):
        jacobian = gs.capture(DoubledBack(hook), x).jacobian("input", "c")
        with pytest.raises(
            NotImplementedError, match=r"from 'input' to 'c' needs .* J\^T u and dense\(\) do not need it"
        ):
            jacobian.matvec(v)
        expected = gs.capture(DoubledBack(lambda g: 2 * g), x).jacobian("input", "c")
        np.testing.assert_allclose(jacobian.dense(), expected.dense(), rtol=1e-12)
        np.testing.assert_allclose(expected.matvec(v), expected.dense() @ v, rtol=1e-12)
