"""The two AlexNets on a device: speed, cost of the monitor, and accuracy of the recipes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training
from benchmarks.tables.rows import Row, timed
from benchmarks.tables.timing import Contestant, race
from experiments.training.recipe import Recipe

# Configurations of `experiments.train`, in the order in which each gets its next seed.
RECIPES = ("alexnet_a_long", "alexnet_b_long", "alexnet_a_valid")
RATE, SIDE = "matrix rate", 8192


class Run(NamedTuple):
    """One training: the study that configures it, its seed, and what came out."""

    recipe: str
    seed: int
    test_accuracy: float
    seconds: float


def matrix_rate(device: torch.device, quick: bool) -> Callable[[], Tensor]:
    """A product of two square matrices in the precision of training; its time gives the rate of the card."""
    side = 64 if quick else SIDE
    dtype = Recipe().cast(device) or torch.float32
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return lambda: a @ b


def operations(name: str, device: torch.device) -> int:
    """Floating-point operations of forward and backward for one batch of the training loop."""
    model = training.MODELS[name]().to(device)
    x = torch.zeros(training.BATCH, 3, 32, 32, device=device)
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long, device=device)).backward()
    return int(counter.get_total_flops())


def models(quick: bool) -> dict[str, Callable[..., torch.nn.Module]]:
    """Both AlexNets, or the first one."""
    return dict(list(training.MODELS.items())[: 1 if quick else None])


def speed(device: torch.device, quick: bool, repeats: int) -> Iterator[list[Row]]:
    """Images per second of gradscope's loop over a hand-tuned loop, and its share of the card's matrix rate."""
    images, steps = training.data(quick).to(device), 2 if quick else 300
    product = matrix_rate(device, quick)
    for name, make in models(quick).items():
        seeded = partial(training.seeded, make)
        times = race(
            [
                Contestant(training.OURS, partial(training.ours, seeded, images, steps)),
                Contestant(training.TUNED, partial(training.tuned, seeded, images, steps)),
                Contestant(RATE, product),
            ],
            repeats,
        )
        per_second = 2 * (64 if quick else SIDE) ** 3 / times.pop(RATE).median
        rows = timed(name, f"{steps} steps of {training.BATCH} images", times, training.TUNED)
        for what, measured in times.items():
            step = measured.median / steps
            rows.append(Row(name, "images per second", what, "count", training.BATCH / step))
            rows.append(Row(name, f"share of the {RATE}", what, "times", operations(name, device) / step / per_second))
        yield rows


def watching(device: torch.device, quick: bool, repeats: int) -> Iterator[list[Row]]:
    """Times of the loop with monitors over the loop without one."""
    images = training.data(quick).to(device)
    for name in models(quick):
        yield training.watching(name, images, training.light(images), 2 if quick else 300, repeats)
        yield training.watching(name, images, training.heavy(images), 2 if quick else 50, min(repeats, 3))


def accuracy(device: torch.device, quick: bool, deadline: float) -> Iterator[Run]:
    """Train the recipes with one seed after the other, as long as the longest run so far would end in time."""
    small = ["data=digits", "train.max_steps=2", "train.epochs=1"] if quick else []
    longest = 0.0
    for seed in count():
        for recipe in RECIPES:
            remaining = deadline - time.monotonic()
            if remaining < 1.2 * longest or (quick and longest):
                return
            began = time.monotonic()
            record = _trained([f"study={recipe}", f"seed={seed}", f"device={device}", *small], remaining)
            if record is None:
                return
            longest = max(longest, time.monotonic() - began)
            yield Run(recipe, seed, record["test_accuracy"], time.monotonic() - began)


def _trained(overrides: list[str], seconds: float) -> dict[str, Any] | None:
    """The last record of one training without a monitor; None if it does not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"results={folder}", "monitor.every=null", "train.checkpoint_every=null"]
        command = [sys.executable, "-m", "experiments.train", *overrides, *fixed]
        try:
            subprocess.run(command, timeout=min(seconds, 600.0), check=True, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return None
        (metrics,) = Path(folder).rglob("metrics.jsonl")
        record: dict[str, Any] = json.loads(metrics.read_text().splitlines()[-1])
        return record
