"""Train networks with the monitor attached.

python -m experiments.train model=alexnet_a data=cifar10 train.epochs=4
python -m experiments.train model=resnet optimizer=adamw train.augmentation.crop=4 monitor.every=200
python -m experiments.train -m study=alexnet
torchrun --nproc-per-node=2 -m experiments.train model=alexnet_b
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import gradscope as gs
from experiments import seeds, targets
from experiments.config import build, command_line, overrides, schema
from experiments.config import columns as config_columns
from experiments.data import own
from experiments.data.images import Augmentation, Images
from experiments.files import write_json
from experiments.program import program
from experiments.runs import explained, finished, manifest, run_once
from experiments.runs import folder as run_folder
from experiments.terminal import PlainConsole
from experiments.training import checkpoints, distributed, loop, records, sinks
from experiments.training import recipe as training_recipe
from experiments.training.distributed import Ranks
from experiments.training.outputs import Outputs, clear
from experiments.training.recipe import Recipe
from experiments.training.records import Record

schema.register()

NEXT = "The records up to there are kept. A lower optimizer.lr, or train.clip=1, may help."
SETS: dict[str, Callable[..., Images]] = {
    "experiments.data.cifar10": Images.cifar10,
    "experiments.data.digits": Images.digits,
}


def recipe(cfg: DictConfig) -> Recipe:
    """The training recipe of a configuration."""
    values: dict[str, Any] = OmegaConf.to_container(cfg.train, resolve=True)  # type: ignore[assignment]
    values |= {"augmentation": Augmentation(**values["augmentation"]), "seed": cfg.seed}
    return Recipe(**values, optimizer=training_recipe.optimizer(cfg.optimizer))


def images(cfg: DictConfig, device: torch.device) -> tuple[Images, Images]:
    """Training images, and images to test on: the test set, or the last ``holdout`` training images."""
    name, (make, arguments) = cfg.data._target_, targets.called(cfg.data, "data")
    sets = own.sets(SETS.get(name, make), arguments, f"data._target_={name}", cfg.holdout)
    learned = sets[0].to(device) if cfg.memory_map is None else sets[0].mapped(Path(cfg.memory_map), device)
    return learned, sets[1].to(device)


def monitor_of(
    cfg: DictConfig,
    model: torch.nn.Module,
    test: Images,
    report: Callable[[pd.DataFrame], None],
    folder: Path,
    steps: int,
) -> gs.Monitor | None:
    """The monitor, with the first test images as probe batch; None if ``monitor.every`` is null."""
    if cfg.monitor.every is None:
        return None
    options: dict[str, Any] = OmegaConf.to_container(cfg.monitor, resolve=True)  # type: ignore[assignment]
    size = options.pop("batch_size")
    if not 1 <= size <= len(test):
        raise ValueError(f"monitor.batch_size must be between 1 and the {len(test)} test images, got {size}.")
    x, _ = test.batch(torch.arange(size))
    options["loss_fn"] = partial(loop.sample_losses, label_smoothing=cfg.train.label_smoothing)
    return gs.Monitor(model, x, **options, report=report, save_to=folder, total_steps=steps)


def network(cfg: DictConfig, learned: Images, device: torch.device) -> torch.nn.Module:
    """The model on the device.  If its number of inputs or outputs is null, the data determine this number."""
    classes = int(learned.labels.max()) + 1
    needed = {"in_features": learned.images[0].numel(), "out_features": classes}
    sizes = {key: value for key, value in needed.items() if cfg.model.get(key, value) is None}
    model = build.model(cfg.model, cfg.seed, **sizes).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, _ = learned.batch(torch.arange(1))
    try:
        with torch.no_grad():
            outputs = model.eval()(x).shape[-1]
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        given = [key for key in needed if cfg.model.get(key) is not None]
        hint = f" model.{given[0]}=null takes the number from the data." if given else ""
        raise ValueError(
            f"The model cannot take samples of shape {tuple(x.shape[1:])} of the data: {reason}{hint}"
        ) from error
    key = next((key for key in ("out_features", "num_classes", "vocabulary") if key in cfg.model), "num_classes")
    remark = f"The model has {outputs} outputs, but there are {classes} classes: set model.{key}={classes}."
    if outputs < classes:
        raise ValueError(remark)
    if outputs > classes and learned.labels.ndim == 1 and Ranks.here().first:  # of a vocabulary, tokens may not occur
        warnings.warn(remark, stacklevel=2)
    return model.train()


def train(
    cfg: DictConfig, folder: Path, device: torch.device, console: Console, columns: dict[str, Any] | None = None,
    alone: bool = True,
) -> list[Record]:  # fmt: skip
    """Train one network, from its last checkpoint if there is one.  Returns the records, also written to ``folder``.

    ``alone``: the run is not part of a sweep, so every record may be a line of output.
    """
    seeds.threads(cfg.num_threads)
    if cfg.resume not in ("auto", "none"):
        raise ValueError(f"resume must be auto or none, got {cfg.resume!r}.")
    seeds.tf32(cfg.tf32)
    settings, (learned, test) = recipe(cfg), images(cfg, device)
    model = network(cfg, learned, device)
    sinks.check(cfg.sinks)
    steps = settings.steps(len(learned))
    monitor = monitor_of(cfg, model, test, lambda frame: outputs.measured(frame), folder, steps)
    if from_scratch(cfg) and Ranks.here().first:  # after all checks of the configuration
        clear(folder)
    state = None if from_scratch(cfg) else checkpoints.resume(folder / checkpoints.FOLDER, device)
    opened = Outputs(cfg, folder, console, steps, state, columns or {}, alone)
    with distributed.noticed(alone) as interrupted, opened as outputs:
        if state is not None:
            outputs.say(f"Resuming at step {state['step']} of {steps}.")
        if monitor is not None and state is not None and "monitor" in state:
            try:
                monitor.load_state_dict(state["monitor"], outputs.frames)
            except Exception as error:  # a checkpoint from elsewhere can hold anything
                raise ValueError(f"The monitor in the checkpoint is damaged ({error}); use resume=none.") from error
        try:
            done = loop.train(
                model, learned, test, settings, folder, state=state, monitor=monitor, report=outputs.trained,
                interrupted=interrupted,
            )  # fmt: skip
        except KeyboardInterrupt as interrupt:
            without = " without resume=none and rerun=true" * from_scratch(cfg)
            text = f"{interrupt}; the same command{without} resumes from there."
            if not interrupt.args:  # a second Ctrl-C, or a long step
                kept = (folder / checkpoints.FOLDER / checkpoints.LAST).is_file()
                text = "Interrupted within a step; " + (
                    f"the same command{without} resumes from the last checkpoint." if kept else
                    "there is no checkpoint yet, so the same command starts from the beginning."
                )  # fmt: skip
            outputs.say(text)
            raise
        if monitor is not None:
            monitor.close()
    return done


def resuming(overrides: Sequence[str]) -> str:
    """A line with the command that resumes a run."""
    kept = [item for item in overrides if item not in ("resume=none", "rerun=true")]
    words = program("train").split()
    if (world := Ranks.here().world) > 1:
        words = ["torchrun", f"--nproc-per-node={world}", "-m", *words[words.index("-m") + 1 if "-m" in words else 0 :]]
    return f"Resume: {shlex.join([*words, *kept])}"


def results(cfg: DictConfig, folder: Path) -> str:
    """Lines with the folder of a run, and with the commands that draw its sweep."""
    place = shlex.join([f"sweep={cfg.sweep}", *[f"results={cfg.results}"] * (cfg.results != "results/runs")])
    draw = f"{program('collect')} {place} && {program('figures')} {place}"
    return f"Run folder: {folder}\nDraw: {draw}"


def from_scratch(cfg: DictConfig) -> bool:
    """Whether the run ignores earlier checkpoints."""
    return bool(cfg.resume == "none" or cfg.rerun)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train one network and write its run folder; returns the last test accuracy for a search such as Optuna's."""
    info = HydraConfig.get()
    alone, choices = info.mode is RunMode.RUN, dict(info.runtime.choices)
    console = PlainConsole(soft_wrap=True)
    with explained(alone), distributed.started(seeds.device(cfg.device)) as device:
        overrides.refuse_part_of_study()
        folder = run_folder(cfg, info.overrides.task)
        first = Ranks.here().first
        if alone and not from_scratch(cfg) and (status := finished(folder)) is not None:
            if first:
                step = records.read(folder / "metrics.jsonl")[-1]["step"]
                console.print(f"Already done at step {step}; resume=none trains again.\n{results(cfg, folder)}")
            return status.value

        def work() -> float:
            began = time.perf_counter()

            def describe() -> None:
                if first:
                    cast = recipe(cfg).cast(device)
                    resolved = {"autocast": cast and str(cast), "world_size": Ranks.here().world}
                    seconds = time.perf_counter() - began
                    write_json(folder / "manifest.json", manifest(cfg, choices, seconds, resolved))

            try:
                with distributed.together():
                    done = train(cfg, folder, device, console, config_columns.columns(cfg, choices), alone)
            except gs.NonFiniteError:
                describe()  # divergence is a result, too
                raise
            describe()
            if first:
                console.print(results(cfg, folder) if alone else f"Run folder: {folder}")
            return float(done[-1]["test_accuracy"])

        try:
            # With several processes, only the first locks the run and writes its status.
            return run_once(cfg, folder, info.overrides.task, work, alone=alone) if first else work()
        except gs.NonFiniteError as error:
            sys.exit(f"Stopped: {error}\n{NEXT}\n{results(cfg, folder)}")
        except KeyboardInterrupt as error:
            if alone:
                if first:
                    console.print(f"{resuming(info.overrides.task)}\nRun folder: {folder}")
                sys.exit(128 + getattr(error, "number", signal.SIGINT))
            raise


if __name__ == "__main__":
    command_line.run_hydra(main)
