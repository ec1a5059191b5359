"""The training recipe: optimizer, learning-rate schedule, precision and everything else that affects the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiments import targets
from experiments.data.images import Augmentation

SCHEDULES = ("one_cycle", "cosine", "constant")
PRECISIONS = ("auto", "float32", "bfloat16")
FUSED = ("cpu", "cuda")  # devices with fused optimizers
# Makes an optimizer from parameter groups.  The optimizer's learning rate is the peak of the schedule.
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
SGD: MakeOptimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Arguments:
        max_steps: Upper limit on the number of steps; without it, ``epochs`` gives this number.
        batch_size: Samples per step, summed over all processes.
        warmup: Fraction of a one-cycle schedule during which the learning rate rises.
        clip: Largest norm of the gradient; a larger gradient is scaled down to this norm.  None for no limit.
        average: Test and keep an exponential moving average of the weights with this decay; 0 for the weights
            themselves.  The average reaches back about 1 / (1 - ``average``) steps.
        test_mirrored: Also test the last weights with the mean logits of each image and its mirror image.
        log_every: Steps per record.
        checkpoint_every: Steps per checkpoint; None for one checkpoint at the end.
        keep: Number of checkpoints to keep besides the last and the best.
    """

    epochs: float = 4
    max_steps: int | None = None
    batch_size: int = 128
    optimizer: MakeOptimizer = SGD
    schedule: str = "one_cycle"
    warmup: float = 0.3
    label_smoothing: float = 0.0
    clip: float | None = None
    average: float = 0.0
    test_mirrored: bool = False
    precision: str = "auto"
    compile: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    log_every: int = 50
    checkpoint_every: int | None = None
    keep: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"train.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("epochs", "batch_size", "max_steps", "log_every", "checkpoint_every", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"train.{name} must be a positive number, got {value!r}.")
        for name, valid, wanted in (
            ("warmup", 0 < self.warmup < 1, "between 0 and 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("average", 0 <= self.average < 1, "in [0, 1)"),
            ("keep", self.keep >= 0, "a whole number >= 0"),
        ):
            if not valid:
                raise ValueError(f"train.{name} must be {wanted}, got {getattr(self, name)!r}.")

    def steps(self, num_samples: int) -> int:
        """Total number of steps for this number of training images."""
        total = round(self.epochs * self.steps_per_epoch(num_samples))
        return max(1, total if self.max_steps is None else min(total, self.max_steps))

    def steps_per_epoch(self, num_samples: int) -> int:
        """Number of full batches per epoch.  The remaining images are left out of that epoch."""
        if num_samples < self.batch_size:
            raise ValueError(f"train.batch_size={self.batch_size} is more than the {num_samples} training images.")
        return num_samples // self.batch_size

    def factor(self, step: int, total: int) -> float:
        """Learning rate of a step, relative to the peak."""
        done = step / max(1, total)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return max(min(done / self.warmup, (1 - done) / (1 - self.warmup)), 0.02)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters.  Weight decay applies to matrices and kernels, not to biases and scales."""
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = self.optimizer([group for group in groups if group["params"]])
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
            if group.get("fused", False) is None and next(model.parameters()).device.type in FUSED:
                group["fused"] = True
        return optimizer

    def make_average(self, model: nn.Module) -> AveragedModel | None:
        """A copy of the model whose weights and buffers are the moving average; None if ``average`` is 0."""
        average = get_ema_multi_avg_fn(self.average)
        return AveragedModel(model, multi_avg_fn=average, use_buffers=True) if self.average else None

    def cast(self, device: torch.device) -> torch.dtype | None:
        """The autocast type, None for float32.  "auto" gives bfloat16 if the GPU or the CPU supports it natively."""
        if self.precision != "auto":
            native = self.precision == "bfloat16"
        elif device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else None


def optimizer(cfg: DictConfig) -> MakeOptimizer:
    """The optimizer of a configuration, as a function of the parameters.

    If only ``_target_`` is replaced, arguments of ``optimizer=sgd`` remain.  ValueError names those that do not fit.
    """
    made_by, arguments = targets.called(cfg, "optimizer")
    if foreign := sorted(targets.foreign(made_by, arguments)):
        away = " ".join(f"~optimizer.{key}" for key in foreign)
        raise ValueError(f"optimizer._target_={cfg._target_} takes no {' and no '.join(foreign)}: add {away}.")
    return partial(made_by, **arguments)
