"""The training loop: resumed runs, batches, recipes, checkpoints on a full disk."""

import json
import math
import re
import shlex
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from torch import nn

import gradscope as gs
from experiments import train
from experiments.config import build
from experiments.data import images as data_images
from experiments.data.images import Augmentation, Images
from experiments.training import checkpoints, loop
from experiments.training.recipe import SCHEDULES, Recipe
from experiments.training.records import read
from tests.commands import run
from tests.experiments.training.disk import full_disk


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


RECIPE = Recipe(
    epochs=3, batch_size=16, augmentation=Augmentation(crop=2, cutout=3), precision="float32", checkpoint_every=2,
    log_every=3, optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4),
)  # fmt: skip
ADAMW = partial(torch.optim.AdamW, lr=0.01)
CPU = torch.device("cpu")


class KilledError(Exception):
    pass


class Killer:
    """A monitor that ends the run after ``steps`` steps, like a kill between two checkpoints."""

    def __init__(self, steps):
        self.left = steps

    def step(self, loss, batch):
        self.left -= 1
        if self.left < 0:
            raise KilledError

    def record(self):
        pass

    def state_dict(self):
        return {}


def resumed(folder):
    return checkpoints.load(folder / "checkpoints", CPU)


def without_time(records):
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


@pytest.mark.parametrize("optimizer", [RECIPE.optimizer, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("after", [1, 5, 8, 11])
def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path, optimizer, after):
    data, test = images(67), images(30, seed=1)
    recipe = replace(RECIPE, optimizer=optimizer)
    whole = network()
    expected = loop.train(whole, data, test, recipe)
    with pytest.raises(KilledError):
        loop.train(network(), data, test, recipe, tmp_path, monitor=Killer(after))
    model = network()
    records = loop.train(model, data, test, recipe, tmp_path, state=resumed(tmp_path))
    for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert without_time(records) == without_time(expected)
    assert [record["step"] for record in records] == [3, 4, 6, 8, 9, 12]  # 4 steps an epoch, a record every 3
    assert [record["step"] for record in records if "test_accuracy" in record] == [4, 8, 12]
    state = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert state["step"] == 12 and torch.equal(state["model"]["5.weight"], model[5].weight)


def test_the_loss_of_a_record_is_the_mean_of_its_steps(tmp_path):
    seen = []

    class Listener(Killer):
        def step(self, loss, batch):
            seen.append(float(loss.detach()))

    records = loop.train(network(), images(67), None, RECIPE, monitor=Listener(0))
    begins = [0, *(record["step"] for record in records)]
    for begin, record in zip(begins, records, strict=False):
        assert record["train_loss"] == pytest.approx(np.mean(seen[begin : record["step"]]), rel=1e-6)
        assert record["learning_rate"] == pytest.approx(0.01 * RECIPE.factor(record["step"] - 1, 12))


def test_checkpoints_that_are_kept(tmp_path):
    records = loop.train(network(), images(67), images(30, seed=1), replace(RECIPE, keep=3), tmp_path)
    folder = tmp_path / "checkpoints"
    steps = {path.name for path in folder.iterdir()} - {"last.pt", "best.pt"}
    assert steps == {f"step-{n:08d}.pt" for n in (8, 10, 12)}
    assert checkpoints.load(folder, CPU, "step-00000010.pt")["step"] == 10
    accuracies = {record["step"]: record["test_accuracy"] for record in records if "test_accuracy" in record}
    best = checkpoints.load(folder, CPU, "best.pt")
    assert accuracies[best["step"]] == best["best"] == max(accuracies.values())


def bright(num, seed):
    """Four classes of noise of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num,), generator=generator)
    noise = torch.randint(-40, 40, (num, 3, 8, 8), generator=generator)
    return Images((60 + 45 * labels[:, None, None, None] + noise).to(torch.uint8), labels)


def test_it_learns():
    records = loop.train(
        network(), bright(512, 0), bright(200, 1), Recipe(epochs=6, batch_size=32, precision="float32")
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


@pytest.mark.parametrize("part", [slice(None), slice(2, 5)])
@pytest.mark.parametrize("augmentation", [Augmentation(True, 2, 3), Augmentation(False, 0, 2), Augmentation(True)])
def test_augmentation_draws_the_numbers_that_it_always_drew(augmentation, part):
    # One draw after the other; published results rest on their order.
    x, flip, crop, cutout = torch.rand(6, 1, 5, 7), augmentation.flip, augmentation.crop, augmentation.cutout
    generator = torch.Generator().manual_seed(4)

    def draw(low, high):
        return torch.randint(low, high, (6,), generator=generator).tolist()

    flips = draw(0, 2) if flip else [0] * 6
    tops, lefts = [draw(0, 2 * crop + 1) if crop else [0] * 6 for _ in range(2)]
    rows, columns = [draw(-(cutout // 2), n - cutout // 2) if cutout else [n] * 6 for n in (5, 7)]
    expected = []
    for n in range(6):
        image = x[n].flip(2) if flips[n] else x[n]
        image = nn.functional.pad(image, [crop] * 4)[:, tops[n] : tops[n] + 5, lefts[n] : lefts[n] + 7].clone()
        image[:, max(0, rows[n]) : max(0, rows[n] + cutout), max(0, columns[n]) : max(0, columns[n] + cutout)] = 0
        expected.append(image)
    found = augmentation(x[part], torch.Generator().manual_seed(4), part, 6)
    assert torch.equal(found, torch.stack(expected)[part])


def test_order_and_augmentation_depend_on_seed_and_time_alone():
    data = images(40)
    assert torch.equal(data.order(0, 3), data.order(0, 3)) and not torch.equal(data.order(0, 3), data.order(0, 4))
    assert sorted(data.order(1, 0).tolist()) == list(range(40))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    recipe = Recipe(schedule=schedule, warmup=0.25)
    rates = [0.2 * recipe.factor(step, 100) for step in range(101)]
    if schedule == "constant":
        assert set(rates) == {0.2}
    elif schedule == "cosine":
        assert rates[0] == 0.2 and rates[50] == pytest.approx(0.1) and rates[100] == pytest.approx(0)
    else:
        assert max(rates) == rates[25] == pytest.approx(0.2) and rates[0] < 0.01 and rates[100] < 0.01
        assert all(math.isclose(rates[s], 0.2 * s / 25) for s in range(5, 26))


def test_a_step_on_the_meta_device(monkeypatch):
    # A tensor made on the wrong device in the loop meets one of the meta device and fails.
    model = network().to("meta").to(memory_format=torch.channels_last)
    data = Images(images(40).images.to("meta"), images(40).labels.to("meta"))
    recipe = replace(RECIPE, clip=1.0, label_smoothing=0.1)
    optimizer, indices = recipe.make_optimizer(model), torch.arange(16, device="meta")
    assert loop.update(model, optimizer, data, indices, recipe, 0, 9).device.type == "meta"
    forgotten = {  # the device, at one place each
        (torch, "arange"): lambda num, device: torch.zeros(num, dtype=torch.int64),
        (data_images, "_sent"): lambda value, device: value,
        (nn.functional, "cross_entropy"): lambda output, y, **options: (output.sum(1) * torch.rand(16)).mean(),
    }
    for (place, name), on_the_cpu in forgotten.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, name, on_the_cpu)
            with pytest.raises(RuntimeError, match=r"Tensor on device (cpu|meta) is not on the expected device"):
                loop.update(model, optimizer, data, indices, recipe, 1, 9)


def by_hand(data, recipe, model):
    """Loss, gradients and learning rate of the first step, from formulas."""
    x, y = data.batch(data.order(recipe.seed, 0)[: recipe.batch_size])
    w, b = (p.detach().double() for p in model[1].parameters())
    z = x.flatten(1).double() @ w.T + b
    log_p = z - z.exp().sum(1, keepdim=True).log()
    s, classes = recipe.label_smoothing, z.shape[1]
    target = (1 - s) * torch.eye(classes, dtype=torch.float64)[y] + s / classes
    error = (log_p.exp() - target) / len(y)
    return float(-(target * log_p).sum(1).mean()), (error.T @ x.flatten(1).double(), error.sum(0))


LINEAR = Recipe(
    max_steps=1, batch_size=32, schedule="constant", precision="float32", augmentation=Augmentation(flip=False),
    optimizer=partial(torch.optim.SGD, lr=0.5, weight_decay=0.0),
)  # fmt: skip


def one_layer():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


@pytest.mark.parametrize("clip", [None, 0.01, 1e3])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_clipping_and_label_smoothing_by_hand(clip, smoothing):
    recipe, data, model = replace(LINEAR, clip=clip, label_smoothing=smoothing), images(40), one_layer()
    loss, gradients = by_hand(data, recipe, model)
    before = [p.detach().double().clone() for p in model.parameters()]
    (record,) = loop.train(model, data, None, recipe)
    assert record["train_loss"] == pytest.approx(loss, rel=1e-5)
    length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert 0.01 < length < 1e3
    scale = 1.0 if clip is None else min(1.0, clip / length)
    for w, g, p in zip(before, gradients, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), w - 0.5 * scale * g, rtol=1e-4, atol=2e-7)


def test_bfloat16_on_a_cpu_rounds_weights_and_images():
    data, recipe = images(40), replace(LINEAR, precision="bfloat16")
    model = one_layer()
    rounded = one_layer()
    x, y = data.batch(data.order(0, 0)[:32])
    with torch.no_grad():
        w, b = (p.bfloat16().double() for p in rounded[1].parameters())
        z = (x.flatten(1).bfloat16().double() @ w.T + b).bfloat16().double()
        expected = float((z.exp().sum(1).log() - z[torch.arange(32), y]).mean())
    exact, _ = by_hand(data, recipe, rounded)
    (record,) = loop.train(model, data, None, recipe)
    assert abs(record["train_loss"] - expected) < 0.1 * abs(expected - exact)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_weight_decay_spares_biases_and_scales():
    optimizer = Recipe().make_optimizer(network())
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(2, 5e-4), (4, 0.0)]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    checkpoints.save({"step": 1}, tmp_path)
    with full_disk(100_000), pytest.raises(OSError, match=r"last.pt .* intact"):
        checkpoints.save({"step": 2, "large": torch.zeros(1_000_000)}, tmp_path)
    assert checkpoints.load(tmp_path, CPU) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_file_that_is_no_checkpoint(tmp_path):
    assert checkpoints.load(tmp_path / "nowhere", CPU) is None
    (tmp_path / "last.pt").write_bytes(b"PK half")
    with pytest.raises(ValueError, match=r"last.pt cannot be read as a checkpoint .*resume=none"):
        checkpoints.load(tmp_path, CPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_is_the_same_run():
    data = images(64)
    plain, compiled = network(), network()
    plain[4].p = compiled[4].p = 0.0  # the compiler draws other masks
    records = [loop.train(model, data, data, replace(RECIPE, compile=model is compiled)) for model in (plain, compiled)]
    np.testing.assert_allclose(*([r["train_loss"] for r in found] for found in records), rtol=1e-4)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_monitor_watches_a_run():
    data = images(64)
    model = network()
    monitor = gs.Monitor(model, data.batch(torch.arange(8))[0], every=4, max_overhead=None)
    loop.train(model, data, None, Recipe(epochs=2, batch_size=16, precision="float32"), monitor=monitor)
    frame = monitor.to_frame()
    assert set(frame["step"]) == {0, 4, 8} and {"gsc", "gradient_norm", "update_to_weight"} <= set(frame["quantity"])


def test_the_monitor_sees_gradients_before_they_are_clipped():
    data, lengths = images(64), []
    for clip in (None, 1e-3):
        model = network()
        monitor = gs.Monitor(model, data.batch(torch.arange(8))[0], every=100)
        loop.train(model, data, None, replace(RECIPE, max_steps=1, clip=clip), monitor=monitor)
        frame = monitor.to_frame().query("quantity == 'gradient_norm' and step == 0")
        lengths.append(dict(zip(frame["layer"], frame["value"], strict=True)))
        assert sum(p.grad.square().sum() for p in model.parameters()).sqrt() == pytest.approx(
            math.hypot(*lengths[0].values()) if clip is None else clip, rel=1e-4
        )
    assert lengths[0] == lengths[1]


def test_the_monitor_of_a_compiled_run(monkeypatch):
    """It measures the eager original, which has the same weights, and the run goes on compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    data, records, frames = images(64), [], []
    for compiled in (False, True):
        model = network()
        model[4].p = 0.0  # the compiler draws other masks
        monitor = gs.Monitor(model, data.batch(torch.arange(8))[0], every=4, max_overhead=None)
        records.append(loop.train(model, data, None, replace(RECIPE, compile=compiled), monitor=monitor))
        frames.append(monitor.to_frame())
    np.testing.assert_allclose(*([r["train_loss"] for r in found] for found in records), rtol=1e-5)
    assert frames[0][["step", "layer", "quantity"]].equals(frames[1][["step", "layer", "quantity"]])
    np.testing.assert_allclose(*(frame["log10_value"] for frame in frames), atol=1e-4)


def test_the_monitor_of_a_run_knows_its_loss(tmp_path):
    cfg = composed("train.label_smoothing=0.2", "monitor.batch_size=8", "monitor.max_overhead=null")
    monitor = train.monitor_of(cfg, network(), images(16), print, tmp_path, 100)
    output, labels = torch.randn(5, 4), torch.arange(5) % 4
    expected = nn.functional.cross_entropy(output, labels, label_smoothing=0.2)
    assert monitor.loss_fn(output, labels).shape == (5,)
    assert float(monitor.loss_fn(output, labels).mean()) == pytest.approx(float(expected), rel=1e-6)


def test_a_run_with_a_planted_infinity_stops_with_the_layer_named(tmp_path):
    data, model = images(64), network()

    class Planting(gs.Monitor):
        def step(self, loss, batch):
            if self.steps == 5:
                with torch.no_grad():
                    model[1].weight[3] = math.inf
            return super().step(loss, batch)

    monitor = Planting(model, data.batch(torch.arange(8))[0], every=100, save_to=tmp_path)
    with pytest.raises(gs.NonFiniteError, match=r"The loss is nan .* step 6: the parameters of layer '1' hold NaN"):
        loop.train(model, data, None, replace(RECIPE, epochs=9), monitor=monitor)
    assert torch.load(tmp_path / "nonfinite.pt", weights_only=True)["step"] == 6


def test_a_sweep_of_several_processes_is_collected_drawn_and_published(tmp_path):
    pytest.importorskip("sklearn")

    def command(module, *arguments):
        code, out, err = run(f"experiments.{module}", *arguments, GRADSCOPE_PROCESSES="2")
        assert code == 0, out + err
        return out

    small = ["model=resnet", "model.depth=8", "model.width=4", "data=digits", "train.epochs=1", "train.batch_size=32"]
    sweep = ["optimizer=adamw", "model.residual=identity,none", "seed=0,1", "monitor.every=40", "sweep=s"]
    sweep += ["launcher=processes", "monitor.max_overhead=null", f"results={tmp_path}"]
    said = command("train", "-m", *small, *sweep)
    folders = [path.parent for path in (tmp_path / "s").glob("*/manifest.json")]
    runs = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert sorted((r["config"]["model"]["residual"], r["config"]["seed"]) for r in runs) == [
        ("identity", 0), ("identity", 1), ("none", 0), ("none", 1),
    ]  # fmt: skip
    # What a user can type again, also in the manifest that a worker process wrote.
    assert {r["command"] for r in runs} == {shlex.join(["python", "-m", "experiments.train", *small, *sweep, "-m"])}
    accuracies = [100 * read(folder / "metrics.jsonl")[-1]["test_accuracy"] for folder in folders]
    printed = re.findall(r"epoch 1.00 .* test accuracy ([\d.]+) %", said)
    assert sorted(printed) == sorted(f"{accuracy:.2f}" for accuracy in accuracies)
    command("collect", f"results={tmp_path}", "sweep=s")
    table = command("figures", "study=s", f"results={tmp_path}", f"reference={tmp_path}/ref", "publish=true")
    by_network = sorted(
        np.mean([a for a, r in zip(accuracies, runs, strict=True) if r["config"]["model"]["residual"] == residual])
        for residual in ("identity", "none")
    )
    assert sorted(map(float, re.findall(r"([\d.]+) % \+-", table))) == pytest.approx(by_network, abs=0.011)
    names = {"learning.png", "gsc_over_training.png", "gsc_before_after.png", "gradient_norms.png"}
    published = tmp_path / "ref" / "s"
    assert {path.name for path in published.iterdir()} == names | {"data.csv", "metrics.csv", "manifest.json"}
    again = command("figures", "study=s", f"results={tmp_path}/none", f"reference={tmp_path}/ref")
    assert again.splitlines()[:9] == table.splitlines()[:9]  # the same table from the published records


def test_a_rate_that_is_far_too_large_stops_with_the_layer_named(tmp_path):
    pytest.importorskip("sklearn")
    options = ["model=alexnet_b", "data=digits", "optimizer.lr=10", "train.batch_size=32", "train.precision=float32"]
    options += [f"results={tmp_path}"]
    code, _, said = run("experiments.train", *options)
    assert code == 1
    named = r"Stopped: The loss is \w+ at step \d+: layer '(\w+)' is the first with NaN or Inf in its forward pass"
    found = re.search(named + r"\. Batch and state are in (\S+)\.\n", said)
    saved = torch.load(found[2], weights_only=True)
    model = gs.models.AlexNetB()
    model.load_state_dict(saved["model"])
    x, bad = saved["batch"][0], []
    for name, layer in model.named_children():  # layer by layer, the plain way
        x = layer(x)
        bad += [name] * (not torch.isfinite(x).all())
    assert bad[0] == found[1]


def composed(*overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("train", list(overrides))


def test_training_needs_labels(tmp_path):
    with pytest.raises(ValueError, match="labels"):
        train.train(composed("data=noise"), tmp_path, CPU, Console())
    with pytest.raises(ValueError, match="resume must be auto or none, got 'yes'"):
        train.train(composed("resume=yes"), tmp_path, CPU, Console())


@pytest.mark.parametrize(
    ("study", "epochs", "augmentation", "padding"),
    [
        ("alexnet_a_valid", 50, Augmentation(flip=False), "valid"),
        ("alexnet_a_long", 100, Augmentation(True, 4, 8, True, True), "same"),
        ("alexnet_b_long", 100, Augmentation(True, 4, 8, True, True), None),
    ],
)
def test_the_long_recipes_build(study, epochs, augmentation, padding):
    cfg = composed(f"study={study}")
    found = train.recipe(cfg)
    assert (found.epochs, found.augmentation) == (epochs, augmentation) and cfg.model.get("padding") == padding
    data = Images(torch.zeros(32, 3, 32, 32, dtype=torch.uint8), torch.arange(32) % 10)
    model = train.network(cfg, data, CPU)
    (record,) = loop.train(model, data, None, replace(found, max_steps=1, batch_size=32))
    assert math.isfinite(record["train_loss"])


def test_outputs_are_as_many_as_classes():
    data = Images(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8))
    small = ["model=mlp", "model.depth=2", "model.width=5"]
    assert train.network(composed(*small), data, CPU)(torch.zeros(2, 3, 8, 8)).shape == (2, 8)
    with pytest.raises(ValueError, match=r"7 outputs, but there are 8 classes: set model.out_features=8"):
        train.network(composed(*small, "model.out_features=7"), data, CPU)
    with pytest.raises(ValueError, match=r"5 outputs, .* 8 classes: set model.num_classes=8"):
        train.network(composed("model=resnet", "model.depth=8", "model.num_classes=5"), data, CPU)
    for options, outputs, key in ((small, 9, "out_features"), (("model=resnet", "model.depth=8"), 10, "num_classes")):
        with pytest.warns(UserWarning, match=f"has {outputs} outputs, but there are 8 classes: set model.{key}=8"):
            train.network(composed(*options, f"model.{key}={outputs}"), data, CPU)


@pytest.mark.parametrize("size", [0, 11])
def test_a_probe_batch_that_there_is_not(tmp_path, size):
    cfg = composed(f"monitor.batch_size={size}")
    with pytest.raises(ValueError, match=f"monitor.batch_size must be between 1 and the 10 test images, got {size}"):
        train.monitor_of(cfg, network(), images(10), print, tmp_path, 100)
    cfg.monitor.every = None
    assert train.monitor_of(cfg, network(), images(10), print, tmp_path, 100) is None


def test_the_configuration_is_the_recipe():
    cfg = composed("optimizer.lr=0.01", "train.augmentation.crop=4", "seed=3")
    found = train.recipe(cfg)
    assert (found.augmentation.crop, found.seed, found.batch_size) == (4, 3, 128)
    assert set(vars(found)) == {*cfg.train, "seed", "optimizer"}
    optimizer = found.make_optimizer(network())
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["lr"] == 0.01
    adamw = train.recipe(composed("optimizer=adamw")).make_optimizer(network())
    assert type(adamw) is torch.optim.AdamW and [group["weight_decay"] for group in adamw.param_groups] == [0.05, 0.0]


def test_any_optimizer_and_any_model():
    cfg = composed(
        "optimizer._target_=torch.optim.RMSprop", "~optimizer.nesterov",
        "model=custom", "model._target_=torch.nn.Linear", "+model.in_features=3", "+model.out_features=2",
    )  # fmt: skip
    model = build.model(cfg.model, cfg.seed)
    assert type(train.recipe(cfg).make_optimizer(model)) is torch.optim.RMSprop
    cfg.optimizer = composed("optimizer._target_=torch.optim.Adagrad").optimizer
    away = r"takes no momentum and no nesterov: add ~optimizer.momentum ~optimizer.nesterov\."
    with pytest.raises(ValueError, match=rf"optimizer._target_=torch.optim.Adagrad {away}"):
        train.recipe(cfg)
    state = torch.get_rng_state()
    assert torch.equal(build.model(cfg.model, cfg.seed).weight, model.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(build.model(cfg.model, 1).weight, model.weight)
    cfg.model = {"_target_": "collections.OrderedDict"}
    with pytest.raises(TypeError, match=r"_target_=collections.OrderedDict .* not a torch.nn"):
        build.model(cfg.model, cfg.seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "train.schedule must be one of one_cycle, cosine, constant, got 'step'"),
        ({"epochs": -1.0}, "train.epochs must be a positive number, got -1.0"),
        ({"label_smoothing": 1.0}, r"train.label_smoothing must be in \[0, 1\), got 1.0"),
        ({"keep": -1}, "train.keep must be a whole number >= 0"),
        ({"warmup": 1.0}, "train.warmup must be between 0 and 1"),
        ({"precision": "float16"}, "train.precision must be one of auto, float32, bfloat16"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
    with pytest.raises(ValueError, match=r"train\.batch_size=128 is more than the 10 training images"):
        loop.train(network(), images(10), None, Recipe())
