"""The training loop in plain PyTorch, written to be read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments import seeds
from experiments.data.images import IMAGE_DIMS, Images
from experiments.training import checkpoints
from experiments.training.distributed import Ranks
from experiments.training.recipe import Recipe
from experiments.training.records import Record
from gradscope import Monitor, MonitorWarning, NonFiniteError

EVALUATED = 1000  # test images per forward pass
PREDICTED = 16_384  # predictions per forward pass, where a sample has one per position


def train(
    model: nn.Module,
    images: Images,
    test: Images | None,
    recipe: Recipe,
    folder: Path | None = None,
    *,
    state: dict[str, Any] | None = None,
    monitor: Monitor | None = None,
    report: Callable[[Record], None] = lambda record: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Record]:
    """Train ``model`` in place; returns its records.

    Every ``recipe.log_every`` steps and at the end of each epoch, one record describes the steps since the last one:
    ``step``, ``epoch``, ``train_loss``, ``learning_rate``, ``images_per_second``.  If there is a test set, the record
    at the end of an epoch adds ``test_accuracy`` and ``test_loss``.  Under ``torch.distributed``, each process takes a
    share of every batch, and the first process writes all files.

    Arguments:
        folder: Run folder.  Its folder ``checkpoints`` gets ``last.pt``, ``best.pt`` and the newest ``step-*.pt``.
            Checkpoints with weights or losses that are not finite are never written.
        state: Checkpoint to resume from.  On a CPU a resumed run ends with the same weights, bit for bit.
        monitor: The monitor, which measures the gradients before they are clipped.
        interrupted: Called after each step and during tests.  If it returns True, a checkpoint is written and
            KeyboardInterrupt raised.  A test that was interrupted is repeated by the run that resumes.

    Raises:
        NonFiniteError: A recorded loss or a value for a checkpoint is not finite, or the monitor raises this error.
    """
    device, ranks = next(model.parameters()).device, Ranks.here()
    total, per_epoch = recipe.steps(len(images)), recipe.steps_per_epoch(len(images))
    cast = recipe.cast(device)
    optimizer, average = recipe.make_optimizer(model), recipe.make_average(model)
    tested = model if average is None else average.module
    begin, since, records, best = 0, 0, list[Record](), -1.0
    losses = torch.zeros((), device=device)  # sum over the steps since the last record
    if recipe.test_mirrored and test is not None and test.images.ndim != IMAGE_DIMS:
        raise ValueError(f"train.test_mirrored=true needs images, got samples of shape {tuple(test.images.shape[1:])}.")
    if state is not None:
        if ("not_averaged" in state) != (average is not None):
            raise ValueError(
                "The checkpoint was written with another train.average; set the same value, or train from the "
                "beginning with resume=none."
            )
        try:
            tested.load_state_dict(state["model"])
            if average is not None:
                model.load_state_dict(state["not_averaged"])
                average.n_averaged.fill_(state["step"])
            optimizer.load_state_dict(state["optimizer"])
            [group["initial_lr"] * group["lr"] for group in optimizer.param_groups]
        except Exception as error:  # a checkpoint from elsewhere can hold anything
            raise ValueError(
                f"The checkpoint does not fit the model or its optimizer ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}); delete it, or restart with resume=none."
            ) from error
        begin, since, records, best = state["step"], state["since"], list(state["records"]), state["best"]
        losses = state["losses"].to(device)
    forward = ranks.wrap(model)
    forward = torch.compile(forward) if recipe.compile else forward  # type: ignore[assignment]
    first, started = begin, time.perf_counter()
    model.train()
    # Ctrl-C during the test leaves a checkpoint of a step whose record is still to be made.
    untested = since < begin and (begin % per_epoch == 0 or begin == total)
    for done in range(begin if untested else begin + 1, total + 1):
        step, stopping = done - 1, False
        epoch, place = divmod(step, per_epoch)
        if place == 0 or done <= begin + 1:
            order = images.order(recipe.seed, epoch)
        if done > begin:
            indices = order[place * recipe.batch_size : (place + 1) * recipe.batch_size]
            losses += update(forward, optimizer, images, indices, recipe, step, total, cast=cast, monitor=monitor)
            if average is not None:
                average.update_parameters(model)
        ended = done % per_epoch == 0 or done == total
        if ended or done % recipe.log_every == 0:
            mean_loss = float(ranks.sum(losses)) / (ranks.world * (done - since))
            speed = (done - first) * recipe.batch_size / (time.perf_counter() - started)
            rate = float(optimizer.param_groups[0]["lr"])
            record = {"step": done, "epoch": done / per_epoch, "train_loss": mean_loss, "learning_rate": rate,
                      "images_per_second": speed}  # fmt: skip
            if monitor is None and not math.isfinite(mean_loss):
                raise NonFiniteError(
                    f"The loss of steps {since + 1} to {done} is {mean_loss}; "
                    "monitor.every=100 stops the run at the first step with such a value and names the layer."
                )
            try:
                if ended and test is not None:
                    record |= evaluate(tested, test, cast, interrupted, recipe.test_mirrored and done == total)
            except KeyboardInterrupt:
                if ranks.world > 1:
                    raise
                stopping = True
            else:
                records.append(record)
                report(record)
                losses, since, first, started = torch.zeros((), device=device), done, done, time.perf_counter()
        improved = ended and test is not None and not stopping and records[-1]["test_accuracy"] > best
        best = records[-1]["test_accuracy"] if improved else best
        stopping = stopping or (done < total and interrupted())
        due = stopping or done == total or (recipe.checkpoint_every and done % recipe.checkpoint_every == 0)
        if due:  # the first process writes the checkpoint, with the mean loss of all processes
            losses = ranks.sum(losses) / ranks.world
        target = folder / checkpoints.FOLDER if folder is not None and (due or improved) else None
        if target is not None and (bad := _nonfinite(losses, model)):
            lost = f"After step {done} {bad[0]} is not finite, so no checkpoint was written; older files are intact."
            if monitor is None or monitor.on_nonfinite == "raise":
                raise NonFiniteError(lost)
            warnings.warn(lost, MonitorWarning, stacklevel=2)
        elif target is not None and ranks.first:
            state = {"model": tested.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "since": since}
            state |= {"losses": losses, "records": records, "best": best}
            state |= {} if monitor is None else {"monitor": monitor.state_dict()}
            state |= {} if average is None else {"not_averaged": model.state_dict()}
            if due:
                checkpoints.save(state, target)
                checkpoints.keep(target, done, recipe.keep)
            if improved:
                checkpoints.save(state, target, checkpoints.BEST)
        if stopping:
            raise KeyboardInterrupt(f"Interrupted after step {done} of {total}")
    if monitor is not None:
        with _autocast(device, cast):
            monitor.record()
    if average is not None:
        model.load_state_dict(tested.state_dict())
    return records


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    indices: Tensor,
    recipe: Recipe,
    step: int,
    total: int,
    *,
    cast: torch.dtype | None = None,
    monitor: Monitor | None = None,
) -> Tensor:
    """Train one step on the images of these indices, in place; returns the loss.

    Reads no value from the device, so the CPU never waits for a GPU.
    """
    ranks = Ranks.here()
    share = ranks.share(len(indices))
    epoch, alternate = step // recipe.steps_per_epoch(len(images)), recipe.augmentation.alternate
    mirrored = images.mirrored(indices, recipe.seed, epoch) if alternate else None
    x, y = images.batch(indices, recipe.augmentation, _seed(recipe.seed, "augmentation", step), share, mirrored)
    seeds.seed_torch(_seed(recipe.seed, "dropout", step) + ranks.rank)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * recipe.factor(step, total)
    output = _run(model, x, cast)
    loss = functional.cross_entropy(output.movedim(-1, 1), y, label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if monitor is not None:
        with _autocast(x.device, cast):
            monitor.step(loss, (x, y))
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(
    model: nn.Module, test: Images, cast: torch.dtype | None = None, interrupted: Callable[[], bool] = lambda: False,
    mirrored: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Loss and accuracy on all test images, in evaluation mode; restores the mode.  Each process takes a share.

    If a sample has one label per position, both are means over positions, and ``test_bits`` is the loss in bits.
    ``mirrored`` adds ``test_accuracy_mirrored``, of the mean logits of each image and its mirror image.
    KeyboardInterrupt if ``interrupted``, called before each forward pass, returns True.
    """
    mode, ranks = model.training, Ranks.here()
    model.eval()
    sums = torch.zeros(2 + mirrored, device=test.device)
    positions = test.labels[0].numel()
    size = min(EVALUATED, max(1, PREDICTED // positions))
    for indices in torch.arange(len(test)).split(size)[ranks.rank :: ranks.world]:
        if interrupted():
            raise KeyboardInterrupt
        x, y = test.batch(indices)
        output = _run(model, x, cast)
        sums[0] += (output.argmax(-1) == y).sum()
        sums[1] += functional.cross_entropy(output.movedim(-1, 1), y, reduction="sum")
        if mirrored:
            sums[2] += ((output + _run(model, x.flip(-1), cast)).argmax(1) == y).sum()
    model.train(mode)
    names = ("test_accuracy", "test_loss", "test_accuracy_mirrored")
    found = {
        name: value / (len(test) * positions) for name, value in zip(names, ranks.sum(sums).tolist(), strict=False)
    }
    return found | ({"test_bits": found["test_loss"] / math.log(2)} if positions > 1 else {})


def sample_losses(output: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each sample (B,).  Logits (B, ..., classes) with labels (B, ...): the mean over positions."""
    losses = functional.cross_entropy(output.movedim(-1, 1), y, reduction="none", label_smoothing=label_smoothing)
    return losses.reshape(len(y), -1).mean(dim=1)


def _run(model: nn.Module, x: Tensor, cast: torch.dtype | None) -> Tensor:
    """Logits in float32, computed under autocast to ``cast``.  Images are converted to channels-last memory format."""
    with _autocast(x.device, cast):
        output: Tensor = model(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
    return output.float()


def _autocast(device: torch.device, cast: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if cast is None else torch.autocast(device.type, dtype=cast)


def _nonfinite(losses: Tensor, model: nn.Module) -> list[str]:
    """Names of the values (loss and weights) that are not finite.  Synchronizes once with the device."""
    weights = {repr(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    kept = {"the loss": losses} | weights
    finite = torch.stack([value.isfinite().all() for value in kept.values()]).tolist()
    return [name for name, good in zip(kept, finite, strict=True) if not good]


def _seed(seed: int, purpose: str, step: int) -> int:
    return seeds.generator(seed, f"{purpose} of step {step}").initial_seed()
