"""Parts of a recipe: flips in turn, reflected shifts, Muon, an average of the weights, tests with mirror images."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from experiments.data.images import Augmentation
from experiments.runs import names
from experiments.train import recipe as configured
from experiments.training import checkpoints, loop
from experiments.training.muon import POLYNOMIAL, STEPS, Muon, orthogonalized
from experiments.training.recipe import Recipe
from tests.experiments.example_runs import composed
from tests.experiments.training.test_loop import CPU, RECIPE, KilledError, Killer, images, network, without_time

MUON = partial(Muon, lr=0.02, momentum=0.9, weight_decay=0.05)
WHOLE = replace(RECIPE, optimizer=MUON, average=0.8, augmentation=Augmentation(True, 2, 3, True, True))


class Listener(Killer):
    """A monitor that keeps every batch, and weights and buffers before each update."""

    def __init__(self, model):
        self.model, self.batches, self.states = model, [], []

    def step(self, loss, batch):
        self.batches.append(batch)
        self.states.append({name: value.clone() for name, value in self.model.state_dict().items()})


def test_every_image_is_mirrored_in_every_other_epoch():
    data, model = images(64), network()
    plain = [data.batch(torch.tensor([n]))[0][0] for n in range(64)]
    recipe = replace(RECIPE, epochs=4, augmentation=Augmentation(alternate=True))
    listener = Listener(model)
    loop.train(model, data, None, recipe, monitor=listener)
    turns = {n: [] for n in range(64)}
    for x, _ in listener.batches:
        for image in x:
            (found,) = [
                (n, bool(torch.equal(image, one.flip(2)))) for n, one in enumerate(plain)
                if torch.equal(image, one) or torch.equal(image, one.flip(2))
            ]  # fmt: skip
            turns[found[0]].append(found[1])
    assert {tuple(turn) for turn in turns.values()} == {(False, True, False, True), (True, False, True, False)}
    assert 16 < sum(turn[0] for turn in turns.values()) < 48
    order, mirrored = torch.randperm(64), torch.arange(64) % 3 == 0
    whole, share = (data.batch(order, recipe.augmentation, 1, part, mirrored)[0] for part in (slice(64), slice(20, 40)))
    assert torch.equal(whole[20:40], share)
    first = [turn[0] for turn in turns.values()]
    assert data.mirrored(torch.arange(64), recipe.seed, 0).tolist() == first
    assert data.mirrored(torch.arange(64), recipe.seed + 1, 0).tolist() != first


def test_shifted_images_are_filled_with_their_reflection():
    x = torch.rand(40, 2, 5, 7)

    def shifted(image, down, right):
        rows = [abs(r) if r < 5 else 8 - r for r in range(down - 2, down + 3)]  # 1 0 [0 1 2 3 4] 3 2, without the edge
        columns = [abs(c) if c < 7 else 12 - c for c in range(right - 2, right + 5)]
        return image[:, rows][:, :, columns]

    found = Augmentation(False, 2, reflect=True)(x, torch.Generator().manual_seed(1))
    places = [
        [(r, c) for r in range(5) for c in range(5) if torch.equal(shifted(a, r, c), b)]
        for a, b in zip(x, found, strict=True)
    ]
    assert all(len(place) == 1 for place in places) and len({place[0] for place in places}) > 10
    with pytest.raises(ValueError, match=r"crop=5 with reflect=true must be smaller than the images, 5 x 7 pixels"):
        Augmentation(False, 5, reflect=True)(x, torch.Generator())


def test_the_average_of_the_weights_is_what_is_tested_and_kept(tmp_path):
    data, test, model = images(67), images(30, seed=1), network()
    listener, average = Listener(model), 0.8
    records = loop.train(model, data, test, WHOLE, tmp_path, monitor=listener)
    state = checkpoints.load(tmp_path / "checkpoints", CPU)
    weights = [name for name, _ in model.named_parameters()]  # at a listener's call, buffers have been updated already
    later = [*listener.states[1:], state["not_averaged"]]
    raw = [seen | {name: after[name] for name in weights} for seen, after in zip(listener.states, later, strict=True)]
    expected = {name: value.double() for name, value in raw[0].items()}
    for after in raw[1:]:
        expected = {name: average * expected[name] + (1 - average) * after[name].double() for name in expected}
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name])
        if value.is_floating_point():  # BatchNorm counts its batches in whole numbers
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, raw[-1][name])
    by_hand = loop.evaluate(model, test)
    assert {name: records[-1][name] for name in by_hand} == by_hand
    best = checkpoints.load(tmp_path / "checkpoints", CPU, "best.pt")
    model.load_state_dict(best["model"])
    assert loop.evaluate(model, test)["test_accuracy"] == best["best"]


@pytest.mark.parametrize("after", [1, 5, 8, 11])
def test_a_killed_run_with_every_part_of_a_recipe_ends_with_the_same_weights(tmp_path, after):
    data, test, whole, model = images(67), images(30, seed=1), network(), network()
    expected = loop.train(whole, data, test, WHOLE)
    with pytest.raises(KilledError):
        loop.train(network(), data, test, WHOLE, tmp_path, monitor=Killer(after))
    state = checkpoints.load(tmp_path / "checkpoints", CPU)
    records = loop.train(model, data, test, WHOLE, state=state)
    assert without_time(records) == without_time(expected)
    for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_monitor_measures_the_weights_that_are_trained():
    data, model = images(64), network()
    monitor = gs.Monitor(model, data.batch(torch.arange(8))[0], every=4, max_overhead=None)
    loop.train(model, data, images(30, seed=1), replace(WHOLE, epochs=2), monitor=monitor)
    plain = network()
    other = gs.Monitor(plain, data.batch(torch.arange(8))[0], every=4, max_overhead=None)
    loop.train(plain, data, None, replace(WHOLE, epochs=2, average=0.0), monitor=other)
    assert monitor.to_frame().equals(other.to_frame())


def test_checkpoints_with_and_without_an_average(tmp_path):
    data = images(67)
    for average in (0.0, 0.8):
        loop.train(network(), data, None, replace(RECIPE, average=average), tmp_path / str(average))
    states = [checkpoints.load(tmp_path / name / "checkpoints", CPU) for name in ("0.0", "0.8")]
    # Checkpoints of runs without an average are what they always were.
    assert set(states[0]) == {"model", "optimizer", "step", "since", "losses", "records", "best"}
    assert set(states[1]) - set(states[0]) == {"not_averaged"}
    for state, average in zip(states, (0.8, 0.0), strict=True):
        with pytest.raises(ValueError, match=r"written with another train\.average; .* resume=none"):
            loop.train(network(), data, None, replace(RECIPE, average=average), state=state)


def polar(matrix):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, s / s.norm(), vt


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12), (1, 9), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalization_is_a_polynomial_of_the_singular_values(shape, dtype):
    matrix = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    u, s, vt = polar(matrix)
    a, b, c = POLYNOMIAL
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    scale = max(1, shape[0] / shape[1]) ** 0.5
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(orthogonalized(matrix).double(), scale * u @ torch.diag(s) @ vt, rtol=0, atol=tolerance)
    assert orthogonalized(matrix).dtype == dtype


def test_orthogonalization_is_close_to_the_polar_factor():
    generator = torch.Generator().manual_seed(2)
    u, vt = (torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator))[0] for _ in range(2))
    for smallest in (1.0, 0.1, 0.02):  # over the largest
        matrix = u @ torch.diag(torch.logspace(0, np.log10(smallest), 20, dtype=torch.float64)) @ vt
        found = u.T @ orthogonalized(matrix) @ vt.T
        torch.testing.assert_close(found, torch.diag(found.diag()), rtol=0, atol=1e-9)
        assert float(found.diag().min()) > 0.68 and float(found.diag().max()) < 1.14
    assert orthogonalized(torch.zeros(3, 4)).eq(0).all()
    assert orthogonalized(1e-20 * torch.eye(3)).isfinite().all()


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_muon_is_the_one_of_torch(shape):
    generator = torch.Generator().manual_seed(3)
    ours, its = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    last = nn.Parameter(torch.zeros(2, 2))
    options = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3}
    optimizers = [Muon([{"params": [ours, last]}], **options), torch.optim.Muon([its], **options)]
    for _ in range(4):
        ours.grad = its.grad = torch.randn(shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, its, rtol=0, atol=0.02)  # its matrices are bfloat16
    assert float((ours - 1).detach().abs().max()) > 0.2


def test_muon_takes_kernels_as_matrices_and_leaves_the_last_matrix_and_vectors_to_sgd():
    model, twin = network().to(memory_format=torch.channels_last), network()
    recipe = Recipe(optimizer=partial(MUON, weight_decay=0.0, rest_lr=0.03))
    optimizer = recipe.make_optimizer(model)
    groups = [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(0.02, 1), (0.03, 1), (0.03, 4)]
    sgd = torch.optim.SGD(list(twin.parameters())[1:], lr=0.03, momentum=0.9, nesterov=True)
    kernel, mean = twin[0].weight, torch.zeros(6, 27, dtype=torch.float64)
    expected = kernel.detach().double().clone()
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn(q.shape)
            p.grad = q.grad.clone(memory_format=torch.preserve_format)
        gradient = kernel.grad.double().flatten(1)
        mean = 0.9 * mean + gradient
        expected -= 0.02 * orthogonalized(gradient + 0.9 * mean).reshape(kernel.shape)
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(model[0].weight.double(), expected, rtol=0, atol=1e-5)
    for p, q in list(zip(model.parameters(), twin.parameters(), strict=True))[1:]:
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_accuracy_with_mirror_images_by_hand():
    data, model = images(200), network().eval()
    found = loop.evaluate(model, data, mirrored=True)
    correct = [0, 0]
    with torch.no_grad():
        for n in range(200):
            x, y = data.batch(torch.tensor([n]))
            one, mirrored = model(x).double(), model(x.flip(3)).double()
            correct[0] += int(one.argmax()) == int(y)
            correct[1] += int((one + mirrored).argmax()) == int(y)
    assert found["test_accuracy"] == pytest.approx(correct[0] / 200)
    assert found["test_accuracy_mirrored"] == pytest.approx(correct[1] / 200)
    assert correct[0] != correct[1]
    records = loop.train(network(), images(67), data, replace(RECIPE, test_mirrored=True))
    assert [record["step"] for record in records if "test_accuracy_mirrored" in record] == [12]
    vectors = replace(data, images=data.images.flatten(1))
    with pytest.raises(ValueError, match=r"test_mirrored=true needs images, got samples of shape \(192,\)"):
        loop.train(network(), data, vectors, replace(RECIPE, test_mirrored=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.average=1", r"train\.average must be in \[0, 1\), got 1\.0"),
        ("train.augmentation.crop=-1", r"train\.augmentation\.crop must be >= 0 pixels, got -1"),
        (
            "train.augmentation.alternate=true",
            r"alternate=true mirrors images and needs .*flip=true",
        ),
        ("optimizer.momentum=1", r"optimizer\.momentum must be in \[0, 1\), got 1"),
        ("optimizer.lr=0", r"optimizer\.lr must be positive, got 0"),
        ("optimizer.rest_lr=-1", r"optimizer\.rest_lr must be positive, got -1"),
        ("optimizer.weight_decay=-0.1", r"optimizer\.weight_decay must be >= 0, got -0\.1"),
    ],
)
def test_values_out_of_range(override, message):
    further = ["train.augmentation.flip=false"] * ("alternate" in override)
    with pytest.raises(ValueError, match=message):
        configured(composed("train", "optimizer=muon", override, *further)).make_optimizer(network())


@pytest.mark.parametrize(
    ("key", "value"), [("average", 0.9), ("test_mirrored", "true"), ("augmentation.alternate", "true"),
                       ("augmentation.reflect", "true")],
)  # fmt: skip
def test_only_values_of_new_keys_that_change_a_result_change_the_folder(key, value):
    assert names.digest(composed("train", f"train.{key}={value}")) != names.digest(composed("train"))
