"""The training loop: what a resumed run gives, what batches hold, and what a full disk leaves behind."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

import gradscope as gs
from experiments import checkpoints, loop, train
from experiments.images import Augmentation, Images


def images(num, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = (pixels[:, 0].float().mean((1, 2)) > 127.5).long() + 2 * (pixels[:, 1, 0, 0] > 127).long()
    return Images(pixels, labels)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(216, 4)
    )


RECIPE = loop.Recipe(
    epochs=3, batch_size=16, augmentation=Augmentation(crop=2, cutout=3), precision="float32", checkpoint_every=2
)


class KilledError(Exception):
    pass


class Killer:
    """A monitor that ends the run after so many steps, as a kill would: between two checkpoints."""

    def __init__(self, steps):
        self.left = steps

    def step(self, loss, batch):
        self.left -= 1
        if self.left < 0:
            raise KilledError


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("after", [1, 5, 8, 11])
def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path, optimizer, after):
    data, test = images(67), images(30, seed=1)
    recipe = loop.Recipe(**{**vars(RECIPE), "optimizer": optimizer, "lr": 0.01})
    whole = network()
    expected = loop.train(whole, data, test, recipe)
    model = network()
    with pytest.raises(KilledError):
        loop.train(model, data, test, recipe, tmp_path, monitor=Killer(after))
    resumed = network()
    records = loop.train(resumed, data, test, recipe, tmp_path)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    without_time = [
        [{k: v for k, v in r.items() if k != "images_per_second"} for r in one] for one in (records, expected)
    ]
    assert without_time[0] == without_time[1] and len(records) == 3
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == records
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert state["step"] == 12 and torch.equal(state["model"]["5.weight"], resumed[5].weight)


def bright(num, seed):
    """Four classes of noise of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num,), generator=generator)
    noise = torch.randint(-40, 40, (num, 3, 8, 8), generator=generator)
    return Images((60 + 45 * labels[:, None, None, None] + noise).to(torch.uint8), labels)


def test_it_learns():
    records = loop.train(
        network(), bright(512, 0), bright(200, 1), loop.Recipe(epochs=6, batch_size=32, precision="float32")
    )
    assert records[-1]["test_accuracy"] > 0.95
    assert records[-1]["train_loss"] < 0.5 * records[0]["train_loss"]
    assert records[-1]["epoch"] == 6 and records[-1]["step"] == 96


def test_a_batch_is_standardized():
    data = images(10)
    x, y = data.batch(torch.tensor([3, 7]))
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (data.mean, data.std))
    expected = (data.images[[3, 7]].numpy() / 255 - mean) / std
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert y.tolist() == data.labels[[3, 7]].tolist()


def test_augmentation_pixel_by_pixel():
    x = torch.arange(6 * 2 * 5 * 5, dtype=torch.float32).reshape(6, 2, 5, 5) + 1
    flipped = Augmentation(flip=True)(x, torch.Generator().manual_seed(1))
    kinds = [bool((b == a).all()) - bool((b == a.flip(2)).all()) for a, b in zip(x, flipped, strict=True)]
    assert sorted(set(kinds)) == [-1, 1]
    padded = nn.functional.pad(x, [2] * 4)
    for a, b in zip(padded, Augmentation(flip=False, crop=2)(x, torch.Generator().manual_seed(2)), strict=True):
        places = [(r, c) for r in range(5) for c in range(5) if torch.equal(a[:, r : r + 5, c : c + 5], b)]
        assert len(places) == 1
    cut = Augmentation(flip=False, cutout=3)(x, torch.Generator().manual_seed(3))
    for a, b in zip(x, cut, strict=True):
        zero = (b == 0).all(0)
        assert 4 <= int(zero.sum()) <= 9 and torch.equal(b[:, ~zero], a[:, ~zero])
        rows, columns = zero.any(1).nonzero().flatten(), zero.any(0).nonzero().flatten()
        assert int(zero.sum()) == len(rows) * len(columns)  # a rectangle: the square, less what lies outside
    assert torch.equal(Augmentation(flip=False)(x, torch.Generator()), x)


def test_order_and_augmentation_depend_on_seed_and_time_alone():
    data = images(40)
    assert torch.equal(data.order(0, 3), data.order(0, 3)) and not torch.equal(data.order(0, 3), data.order(0, 4))
    assert sorted(data.order(1, 0).tolist()) == list(range(40))


@pytest.mark.parametrize("schedule", loop.SCHEDULES)
def test_schedules(schedule):
    recipe = loop.Recipe(schedule=schedule, lr=0.2, warmup=0.25)
    rates = [recipe.rate(step, 100) for step in range(101)]
    if schedule == "constant":
        assert set(rates) == {0.2}
    elif schedule == "cosine":
        assert rates[0] == 0.2 and rates[50] == pytest.approx(0.1) and rates[100] == pytest.approx(0)
    else:
        assert max(rates) == rates[25] == pytest.approx(0.2) and rates[0] < 0.01 and rates[100] < 0.01
        assert all(math.isclose(rates[s], 0.2 * s / 25) for s in range(5, 26))


def test_a_step_on_the_meta_device():
    # A tensor made on the wrong device in the loop would meet one of the meta device and fail.
    model = network().to("meta")
    data = Images(images(40).images.to("meta"), images(40).labels.to("meta"))
    x, y = data.batch(torch.arange(8, device="meta"), Augmentation(crop=2, cutout=3), seed=1)
    assert x.device.type == y.device.type == "meta"
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    loop._optimizer(model, RECIPE).step()


def test_weight_decay_spares_biases_and_scales():
    optimizer = loop._optimizer(network(), loop.Recipe(weight_decay=0.1))
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(2, 0.1), (4, 0.0)]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoints.save({"step": 1}, tmp_path)

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left.*last.pt, is intact\. Free some space"):
        checkpoints.save({"step": 2}, tmp_path)
    monkeypatch.undo()
    assert checkpoints.load(tmp_path, torch.device("cpu")) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoints.load(tmp_path / "nowhere", torch.device("cpu")) is None


def test_the_monitor_watches_a_run():
    data = images(64)
    model = network()
    monitor = gs.Monitor(model, data.batch(torch.arange(8))[0], every=4, max_overhead=None)
    loop.train(model, data, None, loop.Recipe(epochs=2, batch_size=16, precision="float32"), monitor=monitor)
    frame = monitor.to_frame()
    assert set(frame["step"]) == {0, 4} and {"gsc", "gradient_norm", "update_to_weight"} <= set(frame["quantity"])


def test_training_needs_labels():
    cfg = OmegaConf.create({"num_threads": None, "resume": "auto", "data": {"batch_size": 4}, "device": "cpu"})
    with pytest.raises(ValueError, match="learns from images with labels: data=cifar10"):
        train.train(cfg, Path(), Console())
    with pytest.raises(ValueError, match="resume must be auto or none, got 'yes'"):
        train.train(OmegaConf.merge(cfg, {"resume": "yes"}), Path(), Console())


def test_the_configuration_is_the_recipe():
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", ["train.lr=0.01", "train.augmentation.crop=4", "seed=3"])
    found = train.recipe(cfg)
    assert (found.lr, found.augmentation.crop, found.seed, found.batch_size) == (0.01, 4, 3, 128)
    assert set(vars(found)) == {*cfg.train, "seed"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "train.schedule must be one of one_cycle, cosine, constant, got 'step'"),
        ({"optimizer": "lion"}, "train.optimizer must be one of sgd, adamw"),
        ({"lr": -1.0}, "train.lr must be a positive number, got -1.0"),
        ({"warmup": 1.0}, "train.warmup must be between 0 and 1"),
        ({"precision": "float16"}, "train.precision must be one of auto, float32, bfloat16"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        loop.Recipe(**options)
    with pytest.raises(ValueError, match=r"train\.batch_size=128 is more than the 10 training images"):
        loop.train(network(), images(10), None, loop.Recipe())
