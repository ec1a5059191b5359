"""Speed of ``experiments.training.loop`` compared with hand-written loops, and the cost of monitoring.

    python -m benchmarks.training [--quick] [--repeats N] [--output FOLDER] [--models a,b]

Three loops train AlexNets on CIFAR-10 (from GRADSCOPE_DATA; noise of the same shape with --quick), with batch size 128,
flips, SGD with Nesterov momentum, and label smoothing.  The loops take turns in one process:

- *bare loop*: a Dataset that standardizes and flips one image at a time, a DataLoader with two workers, float32;
- *hand-tuned loop*: the data on the device, channels last, bfloat16 autocast if it is faster, a fused optimizer;
- *gradscope*: ``experiments.training.loop.train`` with the same recipe, records every 50 steps.

All three are repeated without bfloat16, as on a processor without bfloat16 instructions.

Then gradscope's loop is timed with a monitor, and compared with the loop without one.  The monitor measures statistics
of activations and gradients every 10 steps, GSC of every layer every 100 steps, or everything at every step.  Two other
tools are timed in the same way, at every step: histograms of all parameters and gradients, as in ``wandb.watch``, and
the quantities of BackPACK, on which Cockpit builds.  The overhead of the monitor is limited only where this is stated.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import gradscope as gs
from benchmarks.tables.provenance import manifest
from benchmarks.tables.report import table
from benchmarks.tables.rows import Row, timed, to_frame
from benchmarks.tables.timing import Contestant, race
from experiments.data.batches import CIFAR10_MEAN, CIFAR10_STD
from experiments.data.images import Augmentation, Images
from experiments.training import loop
from experiments.training.recipe import Recipe
from gradscope.models import AlexNetA, AlexNetB

OUTPUT = Path("results/benchmarks")
REPEATS, WIDTH, BATCH, SMOOTHING = 4, 150, 128, 0.1
BARE, TUNED, OURS = "bare loop, DataLoader, float32", "hand-tuned loop", "gradscope"
STATISTICS, COEFFICIENTS, ALL = "statistics every 10 steps", "GSC every 100 steps", "everything every step"
THINNED = "statistics every 10 steps, within 3 %"
HISTOGRAMS, BACKPACK = "histograms of parameters and gradients every step", "BackPACK, variance and norms, every step"
MODELS: dict[str, Callable[..., nn.Module]] = {"alexnet_a": AlexNetA, "alexnet_b": AlexNetB}
Watch = Callable[[nn.Module], Any]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


class Pictures(Dataset[tuple[Tensor, int]]):
    """A data set that returns one image at a time, as in tutorials."""

    def __init__(self, images: Images) -> None:
        self.images, self.labels = images.images.numpy(), images.labels.tolist()
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.from_numpy(self.images[index]).float() / 255
        x = (x - self.mean) / self.std
        return (x.flip(2) if torch.rand(()) < 0.5 else x), self.labels[index]


def bare(make: Callable[[], nn.Module], images: Images, steps: int) -> None:
    """A typical training loop."""
    model = make()
    optimizer = SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    loader = DataLoader(Pictures(images), batch_size=BATCH, shuffle=True, num_workers=2, drop_last=True)
    for x, y in itertools.islice(loader, steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        scheduler.step()


def tuned(make: Callable[[], nn.Module], images: Images, steps: int, precision: str = "auto") -> None:
    """The same loop, optimized by hand."""
    device = images.device
    model = make().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = SGD(model.parameters(), fused=True)
    cast = Recipe(precision=precision).cast(device)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    order = torch.randperm(len(images.images), device=device)
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        x = (images.images[chosen].float() / 255 - mean) / std
        x = torch.where(torch.rand(BATCH, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(step / (0.3 * steps), (steps - step) / (0.7 * steps))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=cast, enabled=cast is not None):
            output = model(x)
        functional.cross_entropy(output.float(), images.labels[chosen], label_smoothing=SMOOTHING).backward()
        optimizer.step()


class Silent:
    """A monitor that does nothing."""

    on_nonfinite = "raise"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self, loss: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        """Do nothing."""

    def record(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """An empty state."""
        return {}


class Histograms(Silent):
    """Histograms with 64 bins of every parameter and gradient, every step."""

    def step(self, loss: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        for p in self.model.parameters():
            for values in (p.detach(), p.grad):
                if values is not None:
                    low, high = float(values.min()), float(values.max())
                    torch.histc(values.float(), bins=64, min=low, max=high).tolist()


class BackPack(Silent):
    """A second pass on the same batch with BackPACK: norms and variances of per-sample gradients."""

    def __init__(self, model: nn.Module) -> None:
        from backpack import extend

        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # BackPACK takes padding in pixels only; strides are 1, sides odd
                module.padding = (module.kernel_size[0] // 2, module.kernel_size[1] // 2)
        super().__init__(extend(model))
        self.loss = extend(nn.CrossEntropyLoss())

    def step(self, loss: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        from backpack import backpack
        from backpack.extensions import BatchL2Grad, Variance

        kept = [p.grad for p in self.model.parameters()]
        with backpack(BatchL2Grad(), Variance()):
            self.loss(self.model(batch[0]), batch[1]).backward()
        for p, grad in zip(self.model.parameters(), kept, strict=True):
            p.grad = grad


def ours(
    make: Callable[[], nn.Module], images: Images, steps: int, watch: Watch | None = None, precision: str = "auto"
) -> None:
    """``experiments.training.loop.train``, with or without a monitor."""
    model = make().to(images.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = Recipe(
        epochs=100, max_steps=steps, batch_size=BATCH, optimizer=SGD, label_smoothing=SMOOTHING,
        augmentation=Augmentation(flip=True), precision=precision,
    )  # fmt: skip
    loop.train(model, images, None, recipe, monitor=None if watch is None else watch(model))


def light(images: Images) -> Iterator[tuple[str, Watch]]:
    """Monitors that measure every 10 or every 100 steps."""
    yield STATISTICS, partial(_monitor, images, every=10**9, statistics_every=10)
    yield THINNED, partial(_monitor, images, every=10**9, statistics_every=10, max_overhead=0.03)
    yield COEFFICIENTS, partial(_monitor, images, every=100)


def heavy(images: Images) -> Iterator[tuple[str, Watch]]:
    """Monitors that measure every step."""
    yield ALL, partial(_monitor, images, every=1, probes=1)
    yield HISTOGRAMS, Histograms


def heaviest() -> Iterator[tuple[str, Watch]]:
    """Monitors that take many times as long as the step itself."""
    if importlib.util.find_spec("backpack") is not None:
        yield BACKPACK, BackPack


class Running(Silent):
    """A monitor in the middle of a long run, without the records of the first and the last step."""

    def __init__(self, model: nn.Module, monitor: gs.Monitor) -> None:
        super().__init__(model)
        self.monitor = monitor
        monitor.steps = 1

    def step(self, loss: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        self.monitor.step(loss, batch)


def _monitor(images: Images, model: nn.Module, **options: Any) -> Running:
    x, _ = images.batch(torch.arange(32))
    return Running(model, gs.Monitor(model, x, **({"max_overhead": None} | options)))


def speed(name: str, images: Images, steps: int, repeats: int, precision: str = "auto") -> list[Row]:
    """Times of the three loops, and their ratios to the time of gradscope.  The bare loop always runs in float32."""
    make = partial(seeded, MODELS[name])
    contestants = [
        Contestant(OURS, partial(ours, make, images, steps, precision=precision)),
        Contestant(TUNED, partial(tuned, make, images, steps, precision=precision)),
        Contestant(BARE, partial(bare, make, images, steps)),
    ]
    times = race(contestants, repeats)
    group = name if precision == "auto" else f"{name}, {precision} everywhere"
    return timed(group, f"{steps} steps of {BATCH} images", times, OURS)


def watching(name: str, images: Images, watches: Iterable[tuple[str, Watch]], steps: int, repeats: int) -> list[Row]:
    """Times of the loop with each monitor, and ratios to the loop alone."""
    make = partial(seeded, MODELS[name])
    contestants = [Contestant(OURS, partial(ours, make, images, steps))]
    contestants += [Contestant(what, partial(ours, make, images, steps, watch)) for what, watch in watches]
    return timed(f"{name}, watched", f"{steps} steps of {BATCH} images", race(contestants, repeats), OURS)


def seeded(make: Callable[..., nn.Module]) -> nn.Module:
    """A model with the weights of seed 0."""
    return make(generator=torch.Generator().manual_seed(0))


def data(quick: bool) -> Images:
    """The training images of CIFAR-10, or noise."""
    if not quick:
        return Images.cifar10(train=True)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (1024, 3, 32, 32), dtype=np.uint8)
    return Images(torch.from_numpy(pixels), torch.from_numpy(generator.integers(0, 10, 1024)))


def main(arguments: list[str] | None = None) -> None:
    """Print both tables of each model, and write one frame and its manifest."""
    options = _options(arguments)
    console, begin, rows = Console(width=WIDTH), time.perf_counter(), list[Row]()
    images, quick = data(options.quick), options.quick
    for name in options.models.split(","):
        for group in (
            speed(name, images, 2 if quick else 30, options.repeats),
            speed(name, images, 2 if quick else 30, options.repeats, precision="float32"),
            watching(name, images, light(images), 2 if quick else 100, options.repeats),
            watching(name, images, heavy(images), 2 if quick else 20, options.repeats),
            watching(name, images, heaviest(), 1 if quick else 2, 1),
        ):
            console.print(table(group[0].group, group))
            rows += group
    options.output.mkdir(parents=True, exist_ok=True)
    to_frame(rows).to_csv(options.output / "training.csv", index=False)
    seconds = time.perf_counter() - begin
    cast = Recipe().cast(torch.device("cpu"))
    written = manifest(quick=options.quick, repeats=options.repeats, seconds=round(seconds, 1), autocast=str(cast))
    (options.output / "training.json").write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"{options.output / 'training.csv'} ({seconds:.1f} s)", highlight=False)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps on noise, to test that everything runs")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--models", default="alexnet_a,alexnet_b")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
