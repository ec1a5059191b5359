"""Links past the autograd engine, against the engine alone and against full Jacobians."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.backward.links import find_links
from gradscope.forward.trunk import ELEMENTWISE, find_trunk
from tests.bruteforce import gsc_log10
from tests.helpers import noise, seeded


@pytest.fixture(autouse=True)
def links_for_few_cotangents(monkeypatch):
    monkeypatch.setattr("gradscope.backward.route.WORTHWHILE", 1)


class Apply(nn.Module):
    """A function between two linear layers, so that everything on the trunk is recorded."""

    def __init__(self, function, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(width, width, dtype=torch.float64) for _ in range(2))
        self.weight = nn.Parameter(noise(width, width, seed=7) / 2)
        self.scale = nn.Parameter(noise(width, seed=8))
        self.function = function
        self.middle = _Middle(self)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class _Middle(nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]

    def forward(self, h):
        return self.owner[0].function(h, self.owner[0])


POINTWISE = {
    "relu": lambda h, m: h.relu(),
    "relu in place": lambda h, m: h.relu_(),
    "selu": lambda h, m: functional.selu(h),
    "elu": lambda h, m: functional.elu(h, alpha=0.7),
    "gelu": lambda h, m: functional.gelu(h),
    "tanh": lambda h, m: h.tanh(),
    "sigmoid": lambda h, m: h.sigmoid(),
    "silu": lambda h, m: functional.silu(h),
    "softplus": lambda h, m: functional.softplus(h),
    "leaky_relu": lambda h, m: functional.leaky_relu(h, 0.2),
    "hardtanh": lambda h, m: functional.hardtanh(h),
    "clamp": lambda h, m: h.clamp(-0.5, 0.5),
    "exp": lambda h, m: h.exp(),
    "sin": lambda h, m: h.sin(),
    "abs": lambda h, m: h.abs(),
    "square root": lambda h, m: (h * h + 1).sqrt(),
    "power": lambda h, m: h**3,
    "times a parameter": lambda h, m: h * m.scale,
    "over a parameter": lambda h, m: h / (2 + m.scale.abs()),
    "plus a bias": lambda h, m: h + m.scale,
    "times a column": lambda h, m: h * torch.linspace(1, 2, len(h), dtype=h.dtype)[:, None],
    "dropout": lambda h, m: functional.dropout(h, 0.4, training=True),
    "where": lambda h, m: torch.where(h > 0, h, 0.1 * m.scale),
    "native dropout": lambda h, m: torch.native_dropout(h, 0.4, True)[0],
    "cos": lambda h, m: h.cos(),
    "erf": lambda h, m: h.erf(),
    "mish": lambda h, m: functional.mish(h),
    "hardsigmoid": lambda h, m: functional.hardsigmoid(h),
    "hardswish": lambda h, m: functional.hardswish(h),
    "threshold": lambda h, m: functional.threshold(h, 0.1, 0.0),
    "clamp from above": lambda h, m: h.clamp_max(0.2),
    "clamp from below": lambda h, m: h.clamp_min(-0.2),
    "clamp between tensors": lambda h, m: h.clamp(-m.scale.abs(), m.scale.abs()),
    "clamp above a tensor": lambda h, m: h.clamp_max(m.scale),
    "clamp below a tensor": lambda h, m: h.clamp_min(m.scale),
    "maximum": lambda h, m: torch.maximum(h, m.scale),
    "minimum": lambda h, m: torch.minimum(h, m.scale),
    "minus": lambda h, m: -(h - m.scale) - 1,
    "times a number": lambda h, m: torch.ops.aten.mul.Scalar(h, 2.0),
    "over a number": lambda h, m: torch.ops.aten.div.Scalar(h, 2.0),
    "plus a number": lambda h, m: torch.ops.aten.sub.Scalar(torch.ops.aten.add.Scalar(h, 2.0), 3.0),
    "reciprocal": lambda h, m: (h + 9).reciprocal(),
    "reciprocal root": lambda h, m: (h + 9).rsqrt(),
    "logarithm": lambda h, m: (h + 9).log(),
    "power of a tensor": lambda h, m: (h + 9) ** m.scale.abs(),
    "copied": lambda h, m: h.clone().to(h.dtype, copy=True),
}
PRODUCTS = {
    "linear": lambda h, m: functional.linear(h, m.weight),
    "linear with bias": lambda h, m: functional.linear(h, m.weight, m.scale),
    "mm": lambda h, m: torch.mm(h, m.weight),
}
NO_LINK = {
    "addmm with alpha": lambda h, m: torch.addmm(m.scale, h, m.weight, alpha=2.0),
    "residual": lambda h, m: h + h.tanh(),
    "the same tensor twice": lambda h, m: h * h,
    "weight made of the data": lambda h, m: h @ (h.T @ h),
    "right factor": lambda h, m: m.weight[:4, :4] @ h if len(h) == 4 else h,
    "broadcast data": lambda h, m: h[:, :1] * m.scale,
    "three dimensions": lambda h, m: functional.linear(h.reshape(2, 2, 6), m.weight).reshape(4, 6),
    "sum": lambda h, m: h.sum(1, keepdim=True).expand(-1, 6),
    "transposed": lambda h, m: (h.T @ h).repeat(2, 1)[:4],
}


@pytest.mark.parametrize("function", (ALL := POINTWISE | PRODUCTS | NO_LINK).values(), ids=ALL.keys())
def test_bundles_give_the_full_jacobian(function):
    model, x = Apply(function), noise(4, 6)
    if function is POINTWISE["relu in place"]:
        model.function = POINTWISE["relu"]  # torch refuses to overwrite the brute force's leaf
        assert gs.gsc(Apply(function), x, probes="exact")["first"] == gs.gsc(model, x, probes="exact")["first"]
    if function in (POINTWISE["dropout"], POINTWISE["native dropout"]):  # one mask, also for the brute force
        mask = function(torch.ones(4, 6, dtype=torch.float64), model)
        model.function = lambda h, m: h * mask
    profile = gs.gsc(model, x, probes="exact")
    for name in ("input", "first"):
        assert profile[name].log10_value == pytest.approx(gsc_log10(model, name, x.clone()), abs=1e-10)


@pytest.mark.parametrize("function", ALL.values(), ids=ALL.keys())
def test_bundles_equal_the_engine_alone(function, monkeypatch):
    model, x = Apply(function), noise(4, 6)
    torch.manual_seed(3)
    linked = gs.gsc(model, x, probes=12, generator=seeded(5))
    monkeypatch.setattr("gradscope.backward.route.WORTHWHILE", 10**9)
    torch.manual_seed(3)
    engine = gs.gsc(model, x, probes=12, generator=seeded(5))
    np.testing.assert_allclose(linked.log10_values, engine.log10_values, atol=1e-12)


@pytest.mark.parametrize(
    ("functions", "expected"),
    [(POINTWISE, True), (PRODUCTS, True), ({k: v for k, v in NO_LINK.items() if k != "right factor"}, False)],
    ids=["pointwise", "products", "neither"],
)
def test_which_operations_are_links(functions, expected):
    for name, function in functions.items():
        if name == "square root":  # three operations, of which the square has two live inputs
            continue
        captured = gs.capture(Apply(function), noise(4, 6))
        position = captured.graph.position
        ends = {layer.name: position.get((layer.edge.node, layer.edge.output_nr)) for layer in captured.layers}
        links = find_links(captured.graph)[ends["first"] + 1 : ends["middle"] + 1]
        assert all(link is not None for link in links) == expected, name


def test_every_elementwise_operation_is_among_the_functions():
    """If there are no hooks, links are not compared with the engine: what the list says must be true."""
    names = set()
    for function in POINTWISE.values():
        names |= set(gs.capture(Apply(function), noise(4, 6)).graph.names.values())
    made = {f"{name}Backward0" for name in {name.removesuffix("Backward0").removesuffix("Backward1") for name in names}}
    assert {name.replace("Backward1", "Backward0") for name in ELEMENTWISE} <= made


def test_a_wrong_shortcut_is_found_and_the_others_of_its_run_are_kept(monkeypatch):
    monkeypatch.setattr("gradscope.backward.links.ELEMENTWISE", ELEMENTWISE | {"FlipBackward0"})
    captured = gs.capture(Apply(lambda h, m: h.tanh().flip(1).tanh()), noise(4, 6))
    nn.Tanh().register_forward_hook(lambda *_: None)  # with a hook somewhere, every link is compared with the engine
    names = [edge.node.name() for edge in captured.graph.edges[1:]]
    links = find_links(captured.graph)[1:]
    found = {name for name, link in zip(names, links, strict=True) if link is not None}
    assert found == {"AddmmBackward0", "TanhBackward0"}
    assert sum(link is None for link in links) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_no_links_in_other_precisions(dtype):
    model = nn.Sequential(nn.Linear(6, 6, dtype=dtype), nn.Tanh(), nn.Linear(6, 6, dtype=dtype))
    x = torch.ones(4, 6, dtype=dtype, requires_grad=True)
    target = torch.autograd.graph.get_gradient_edge(model(x * 1))
    source = torch.autograd.graph.get_gradient_edge(x)
    assert not any(find_links(find_trunk(target, [source])))


@pytest.mark.parametrize("size", [1, 4 * 6 * 8 * 3, 4 * 6 * 8 * 7, 10**6])
def test_memory_that_is_used_again_is_not_mixed_up(size, monkeypatch):
    model = gs.models.MLP(depth=6, width=6, activation="selu", in_features=9, out_features=5, generator=seeded())
    model, x = model.double(), noise(4, 9)
    columns = {
        target: gs.gsc(model, x, target=target, probes="exact").log10_values[:, 0]
        for target in ("layers.0", "layers.3", "head")
    }
    monkeypatch.setattr("gradscope.backward.sweep.batch_bytes", lambda device: size)
    matrix = gs.gsc_matrix(model, x, probes="exact")
    for target, expected in columns.items():
        column = matrix.log10_values[:, matrix.targets.index(target)]
        np.testing.assert_allclose(column[: len(expected)], expected, atol=1e-11)


def test_convolutions_and_links_mixed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 7), nn.SELU()
    ).double()
    x = noise(3, 2, 6, 6)
    profile = gs.gsc(model, x, probes="exact")
    for name in ("input", "0", "1", "2", "3", "5"):
        assert profile[name].log10_value == pytest.approx(gsc_log10(model, name, x), abs=1e-10)
