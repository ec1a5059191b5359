"""Batches as loaders of other people yield them: measured as a plain twin, or refused; the caller's data stay."""

import copy
import warnings
from collections import UserDict
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradscope as gs
from tests.helpers import noise


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean(1)


def quietly(make):
    """The value of a function that warns of a feature of torch that is old or new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def loaded(*tensors: torch.Tensor) -> list[torch.Tensor]:
    batch = next(iter(DataLoader(TensorDataset(*tensors), batch_size=len(tensors[0]))))
    assert type(batch) in (list, tuple)
    return list(batch)


def test_the_list_of_a_loader_means_the_same_as_the_tuple():
    x, y = noise(6, 4), noise(6, 4, seed=2)
    batch = loaded(x, y)
    for measure in (gs.gsc, gs.gsc_matrix):
        expected = measure(net(), (x, y), loss_fn=squared)
        found = measure(net(), batch, loss_fn=squared)
        np.testing.assert_array_equal(found.log10_values, expected.log10_values)
        assert (found.num_samples, found.streamed) == (6, False)
    assert gs.nlc(net(), batch, loss_fn=squared).value == gs.nlc(net(), (x, y), loss_fn=squared).value
    for pair in (batch, tuple(batch)):
        with pytest.raises(ValueError, match=r"data is a pair .* give iter\(data\)"):
            gs.gsc(net(), pair)


@pytest.mark.parametrize("width", [1, 4])
def test_labels_of_a_regression_are_no_second_batch(width):
    model = nn.Sequential(net(), nn.Linear(4, width).double())
    x, y = noise(6, 4), noise(6, width, seed=2)
    expected = gs.gsc(model, (x, y), loss_fn=squared).log10_values
    np.testing.assert_array_equal(gs.gsc(model, loaded(x, y), loss_fn=squared).log10_values, expected)
    stream = DataLoader(TensorDataset(x, y), batch_size=6)
    np.testing.assert_allclose(gs.gsc(model, stream, loss_fn=squared).log10_values, expected, atol=1e-12)
    pairs = [(x[:3], y[:3]), (x[3:], y[3:])]
    np.testing.assert_allclose(gs.gsc(model, pairs, loss_fn=squared).log10_values, expected, atol=1e-12)


def test_inputs_labels_and_weights_are_one_batch_that_needs_forward():
    batch = loaded(noise(6, 4), torch.arange(6), torch.ones(6))
    with pytest.raises(TypeError, match=r"got list\. For anything else give forward="):
        gs.gsc(net(), batch)
    with pytest.raises(TypeError, match=r"With loss_fn, data must be a pair \(inputs, labels\); got list"):
        gs.gsc(net(), batch, loss_fn=squared)
    found = gs.gsc(net(), batch, forward=lambda model, b: model(b[0]))
    np.testing.assert_allclose(found.log10_values, gs.gsc(net(), batch[0]).log10_values, atol=1e-12)


def test_loaders_without_labels():
    x = noise(6, 4)
    expected = gs.gsc(net(), x).log10_values
    np.testing.assert_array_equal(gs.gsc(net(), (x,)).log10_values, expected)
    stream = gs.gsc(net(), DataLoader(TensorDataset(x), batch_size=3), probes="exact")
    np.testing.assert_allclose(stream.log10_values, expected, atol=1e-12)


def test_lists_of_batches_are_streams():
    x = noise(9, 4)
    for data in (list(x.split(3)), [x[:5], x[5:]], iter([x[:3], x[3:6], x[6:]]), [{"input": x[:3]}, {"input": x[3:]}]):
        assert gs.gsc(net(), data, probes="exact").num_samples == 9


def test_one_batch_as_a_stream_has_the_interval_of_a_stream():
    x = noise(12, 4)
    expected = gs.gsc(net(), list(x.split(5)), probes="exact").interval()
    for data in ([x], iter([x]), DataLoader(TensorDataset(x), batch_size=12)):
        stream = gs.gsc(net(), data, probes="exact")
        low, high = stream.interval()
        assert (low < high)[:-1].all()
        np.testing.assert_allclose((low, high), expected, rtol=1e-6, atol=1e-12)
        assert (stream.num_batches, stream.streamed) == (1, True)
        assert "per batch, 1 batch, end of data" in str(stream)
    low, high = gs.gsc(net(), x).interval()
    np.testing.assert_array_equal(low, high)
    coupled = gs.gsc(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double(), [x])
    assert np.isnan(coupled.interval()[0][:-1]).all()


class Data:
    """As the batches of graph libraries: it can be iterated, and its items have names."""

    def __init__(self, x, inner=None):
        self.x, self.inner, self.note, self.log = x, inner, "note", []

    def __iter__(self):
        yield "x", self.x


@dataclass
class Fields:
    x: torch.Tensor
    log: list = field(default_factory=list)

    def __iter__(self):
        return iter((self.x, self.log))


def careless(model, batch):
    """Overwrites what it gets, and writes into its containers."""
    batch.log.append(1)
    batch.x.mul_(2)
    return model(batch.x)


@pytest.mark.parametrize("kind", [Data, Fields])
def test_objects_are_single_batches_and_stay_as_they_are(kind):
    x = noise(3, 4)
    batch = kind(x.clone())
    with pytest.raises(TypeError, match=rf"got {kind.__name__}\. For anything else give forward="):
        gs.gsc(net(), batch)
    found = gs.gsc(net(), batch, forward=careless)
    assert found.num_samples == 3
    expected = gs.gsc(net(), x, forward=lambda model, x: model(2 * x))
    np.testing.assert_allclose(found.log10_values, expected.log10_values, atol=1e-12)
    assert torch.equal(batch.x, x)
    assert batch.log == []


def test_tensors_inside_objects_inside_lists_are_sources():
    x = noise(3, 4)
    found = gs.gsc(net(), [1, Data(None, inner=Fields(x))], forward=lambda model, b: model(b[1].inner.x))
    np.testing.assert_array_equal(found.log10_values, gs.gsc(net(), x).log10_values)


def test_an_object_that_cannot_be_copied_is_refused():
    with pytest.raises(TypeError, match=r"data holds a generator, which cannot be copied .* use it inside forward="):
        gs.gsc(net(), (noise(3, 4), (n for n in range(3))), forward=lambda model, b: model(b[0]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x, adj=None, mask=None, t=None, edges=None, cache=None):
        h = torch.tanh(self.a(x))
        h = h if adj is None else torch.sparse.mm(adj, h)
        h = h if mask is None else torch.softmax(h @ h.T + mask, 1) @ h
        if edges is not None:
            edges.masked_fill_(edges == 0, 7)
        if cache is not None:
            cache["h"] = h
        return self.b(h if t is None else h * t)


MASK = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)


@pytest.mark.parametrize(
    "extra",
    [
        {"adj": (torch.eye(5) + torch.eye(5).roll(1, 0)).double().to_sparse()},
        {"adj": quietly(lambda: torch.eye(5).double().to_sparse_csr())},
        {"mask": MASK},
        {"t": torch.tensor(10)},
        {"t": torch.tensor(0.5, dtype=torch.float64)},
        {"edges": torch.zeros(0, 2)},
        {"edges": torch.zeros(2, 3, dtype=torch.long)},
        {"cache": {}},
    ],
    ids=["sparse", "csr", "mask", "integer", "number", "no edges", "edges", "cache"],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
@pytest.mark.parametrize("first", [False, True])
def test_things_beside_the_samples_are_held_fixed(extra, first):
    x, before = noise(5, 4), {key: copy.copy(value) for key, value in extra.items()}
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in before.items()}
    batch = UserDict({**extra, "x": x} if first else {"x": x, **extra})
    found = gs.gsc(Net(), batch, probes="exact")
    (key,) = extra
    same = before[key] if key not in ("edges", "cache") else None
    twin = gs.gsc(Net(), x, forward=lambda model, x: model(x, **{key: same}), probes="exact")
    assert found.layers == twin.layers
    np.testing.assert_allclose(found.log10_values, twin.log10_values, atol=1e-12)
    value = extra[key]
    assert value == {} if key == "cache" else torch.equal(value.to_dense(), before[key].to_dense())
    if key != "cache" and not (key == "edges" and value.numel()):
        assert any("Held fixed beside the samples" in remark for remark in found.remarks)


def test_infinite_data_are_no_mask():
    x = noise(5, 4)
    x[2, 1] = -torch.inf
    with pytest.raises(ValueError, match=r"x holds 0 NaN and 1 Inf .* hold it fixed: forward="):
        gs.gsc(Net(), {"x": x, "t": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="x holds 0 NaN and 5 Inf"):  # the only tensor is no mask
        gs.gsc(Net(), torch.full((5, 1), -torch.inf).double())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.empty(3, 4, device="meta"), "holds a meta tensor, which has a shape but no numbers"),
        (
            torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged),
            "nested .* pad the samp",
        ),
        (
            quietly(lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)),
            r"quantized tensor, .* give x\.dequantize",
        ),
        (torch.ones(3, 4).to_sparse(), r"has only a sparse tensor of shape \(3, 4\); .* as a dense tensor"),
    ],
)
def test_tensors_without_numbers_or_gradients(x, message):
    for data in (x, {"input": x}):
        with pytest.raises(ValueError, match=message):
            gs.gsc(net().float(), data)


def test_integer_images():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.c(x.float() / 255)

    with pytest.raises(ValueError, match=r"holds images, give x\.float\(\)"):
        gs.gsc(Images(), torch.full((2, 3, 5, 5), 7, dtype=torch.uint8))


def test_an_inference_tensor():
    with torch.inference_mode():
        x = noise(6, 4).clone()
    model = nn.Sequential(net(), nn.BatchNorm1d(4).double())
    expected = gs.gsc(model, noise(6, 4)).log10_values
    np.testing.assert_allclose(gs.gsc(model, x).log10_values, expected, atol=1e-12)
    with torch.inference_mode():
        np.testing.assert_allclose(gs.gsc(model, x).log10_values, expected, atol=1e-12)


def test_a_loss_that_overwrites_its_labels():
    def careless_loss(output, labels):
        labels.zero_()
        return output.square().sum(1)

    labels = torch.ones(6)
    gs.gsc(net(), (noise(6, 4), labels), loss_fn=careless_loss)
    assert torch.equal(labels, torch.ones(6))
