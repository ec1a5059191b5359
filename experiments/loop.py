"""The training loop, readable from top to bottom; no framework."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradscope as gs
from experiments import checkpoints, run
from experiments.images import Augmentation, Images

SCHEDULES = ("one_cycle", "cosine", "constant")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "float32", "bfloat16")
EVALUATED = 1000  # test images at a time


@dataclass(frozen=True)
class Recipe:
    """How to train.  ``max_steps`` ends before ``epochs`` where it is set; ``warmup``: part of a cycle that rises."""

    epochs: float = 4
    max_steps: int | None = None
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one_cycle"
    warmup: float = 0.3
    label_smoothing: float = 0.0
    clip: float | None = None
    precision: str = "auto"
    augmentation: Augmentation = field(default_factory=Augmentation)
    checkpoint_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"train.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        positive = ("epochs", "batch_size", "lr", "max_steps", "checkpoint_every", "clip")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"train.{name} must be a positive number, got {value!r}.")
        if not 0 < self.warmup < 1:
            raise ValueError(f"train.warmup must be between 0 and 1, got {self.warmup!r}.")

    def steps(self, num_samples: int) -> int:
        """How many steps in all."""
        total = round(self.epochs * self.steps_per_epoch(num_samples))
        return max(1, total if self.max_steps is None else min(total, self.max_steps))

    def steps_per_epoch(self, num_samples: int) -> int:
        """Whole batches in an epoch; the rest is left to the next shuffle."""
        if num_samples < self.batch_size:
            raise ValueError(f"train.batch_size={self.batch_size} is more than the {num_samples} training images.")
        return num_samples // self.batch_size

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step."""
        done = step / max(1, total)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        rising = min(done / self.warmup, (1 - done) / (1 - self.warmup))
        return self.lr * max(rising, 0.02)


def train(
    model: nn.Module,
    images: Images,
    test: Images | None,
    recipe: Recipe,
    folder: Path | None = None,
    *,
    resume: bool = True,
    monitor: gs.Monitor | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place; returns the records, one an epoch and one at the end.

    ``folder``: where ``checkpoints/last.pt`` and ``metrics.jsonl`` go; with ``resume`` a run goes on from there, on a
    CPU to the same final weights, bit for bit, as if it had not been stopped.
    """
    device = next(model.parameters()).device
    total, per_epoch = recipe.steps(len(images)), recipe.steps_per_epoch(len(images))
    optimizer = _optimizer(model, recipe)
    state = checkpoints.load(folder / "checkpoints", device) if folder is not None and resume else None
    begin, since, records = 0, 0, list[dict[str, Any]]()
    losses = torch.zeros((), device=device)  # of the steps since the last record
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin, since, losses, records = state["step"], state["since"], state["losses"], state["records"]
    order, order_epoch = torch.empty(0), -1
    first, started = begin, time.perf_counter()
    cast = torch.bfloat16 if _uses_bfloat16(recipe.precision, device) else None
    model.train()
    for step in range(begin, total):
        epoch, place = divmod(step, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = images.order(recipe.seed, epoch), epoch
        indices = order[place * recipe.batch_size : (place + 1) * recipe.batch_size]
        x, y = images.batch(indices, recipe.augmentation, _seed(recipe.seed, "augmentation", step))
        torch.manual_seed(_seed(recipe.seed, "dropout", step))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, total)
        with torch.autocast(device.type, dtype=cast, enabled=cast is not None):
            output = model(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
        loss = functional.cross_entropy(output.float(), y, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if monitor is not None:
            monitor.step(loss, (x, y))
        optimizer.step()
        losses += loss.detach()
        done = step + 1
        if done % per_epoch == 0 or done == total:
            seconds = time.perf_counter() - started
            record = {
                "step": done,
                "epoch": done / per_epoch,
                "train_loss": float(losses) / (done - since),
                "images_per_second": (done - first) * recipe.batch_size / seconds,
            }
            if test is not None:
                record |= evaluate(model, test, cast)
            records.append(record)
            report(record)
            losses, since, first, started = torch.zeros((), device=device), done, done, time.perf_counter()
        if folder is not None and (done == total or (recipe.checkpoint_every and done % recipe.checkpoint_every == 0)):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "since": since}
            checkpoints.save(state | {"losses": losses, "records": records}, folder / "checkpoints")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


@torch.no_grad()
def evaluate(model: nn.Module, test: Images, cast: torch.dtype | None = None) -> dict[str, float]:
    """Loss and accuracy on all test images, in evaluation mode; the mode is put back."""
    mode, device = model.training, test.images.device
    model.eval()
    correct, loss = torch.zeros((), device=device), torch.zeros((), device=device)
    for indices in _chunks(len(test), device):
        x, y = test.batch(indices)
        with torch.autocast(device.type, dtype=cast, enabled=cast is not None):
            output = model(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
        correct += (output.argmax(1) == y).sum()
        loss += functional.cross_entropy(output.float(), y, reduction="sum")
    model.train(mode)
    return {"test_accuracy": float(correct) / len(test), "test_loss": float(loss) / len(test)}


def _chunks(num: int, device: torch.device) -> Iterator[Tensor]:
    yield from torch.arange(num, device=device).split(EVALUATED)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, not on biases and scales of a normalization."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _uses_bfloat16(precision: str, device: torch.device) -> bool:
    """auto: on CUDA where it is native, on a CPU with instructions for it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def _seed(seed: int, purpose: str, step: int) -> int:
    return run.generator(seed, f"{purpose} of step {step}").initial_seed()


def settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, for a manifest."""
    return asdict(recipe)
