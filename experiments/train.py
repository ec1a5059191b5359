"""How does a network learn?

python -m experiments.train model=alexnet_a data=cifar10 train.epochs=4
python -m experiments.train model=resnet optimizer=adamw train.augmentation.crop=4 monitor.every=200
python -m experiments.train -m study=alexnet
torchrun --nproc-per-node=2 -m experiments.train model=alexnet_b
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
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
from torch.nn.functional import cross_entropy

import gradscope as gs
from experiments import build, checkpoints, config, loop, parallel, records, run, sinks
from experiments.files import write_json, write_table
from experiments.guard import carry_out
from experiments.images import Augmentation, Images
from experiments.manifest import manifest
from experiments.measure import CONF
from experiments.parallel import Ranks
from experiments.progress import LateBar
from experiments.recipe import Recipe
from experiments.records import Record, Records

config.register()

SETS: dict[str, Callable[..., Images]] = {
    "experiments.data.cifar10": Images.cifar10,
    "experiments.data.digits": Images.digits,
}


def recipe(cfg: DictConfig) -> Recipe:
    """The recipe that a configuration describes."""
    values: dict[str, Any] = OmegaConf.to_container(cfg.train, resolve=True)  # type: ignore[assignment]
    values |= {"augmentation": Augmentation(**values["augmentation"]), "seed": cfg.seed}
    return Recipe(**values, optimizer=build.optimizer(cfg.optimizer))


def images(cfg: DictConfig, device: torch.device) -> tuple[Images, Images]:
    """Training images, and those that accuracy is taken on: the test set, or ``holdout`` of the training images.

    Raises:
        ValueError: Data without labels.
    """
    if cfg.data._target_ not in SETS:
        raise ValueError("experiments.train learns from images with labels: data=cifar10 or data=digits.")
    make = partial(SETS[cfg.data._target_], **({"download": cfg.data.download} if "download" in cfg.data else {}))
    sets = make(train=True).split(cfg.holdout) if cfg.holdout else (make(train=True), make(train=False))
    if cfg.memory_map is None:
        return sets[0].to(device), sets[1].to(device)
    name = cfg.data._target_.rpartition(".")[2]
    return sets[0].mapped(Path(cfg.memory_map) / f"{name}-{len(sets[0])}.bytes", device), sets[1].to(device)


def watched(
    cfg: DictConfig, model: torch.nn.Module, test: Images, report: Callable[[pd.DataFrame], None], folder: Path
) -> gs.Monitor | None:
    """The monitor, on the first images of the test set; None where ``monitor.every`` is null."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.monitor, resolve=True)  # type: ignore[assignment]
    x, _ = test.batch(torch.arange(options.pop("batch_size")))
    options["loss_fn"] = partial(cross_entropy, reduction="none", label_smoothing=cfg.train.label_smoothing)
    return None if cfg.monitor.every is None else gs.Monitor(model, x, **options, report=report, save_to=folder)


def train(
    cfg: DictConfig, folder: Path, device: torch.device, console: Console, columns: dict[str, Any] | None = None
) -> list[Record]:
    """Train one network as configured, in its run folder: ``metrics`` and ``monitor`` as JSON lines and as Parquet."""
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    if cfg.resume not in ("auto", "none"):
        raise ValueError(f"resume must be auto or none, got {cfg.resume!r}.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    settings, (learned, test) = recipe(cfg), images(cfg, device)
    sizes = {"in_features": learned.images[0].numel()} if cfg.model.get("in_features", 0) is None else {}
    model = build.model(cfg, **sizes).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = checkpoints.load(folder / "checkpoints", device) if cfg.resume == "auto" else None
    outputs = _Outputs(cfg, folder, console, settings.steps(len(learned)), state)
    monitor = watched(cfg, model, test, outputs.measured, folder)
    if monitor is not None and state is not None and "monitor" in state:
        monitor.load_state_dict(state["monitor"], outputs.frames)
    try:
        done = loop.train(model, learned, test, settings, folder, state=state, monitor=monitor, report=outputs.trained)
    finally:
        outputs.close()
    if outputs.active:
        write_table(folder / "metrics.parquet", pd.DataFrame(done).assign(**columns or {}))
        if monitor is not None and outputs.frames:
            gs.frames.save(monitor.to_frame().assign(**columns or {}), folder / "monitor.parquet")
    return done


class _Outputs:
    """Where records go while a run lasts: files of JSON lines, sinks, the progress bar, and a line an epoch."""

    def __init__(
        self, cfg: DictConfig, folder: Path, console: Console, steps: int, state: dict[str, Any] | None
    ) -> None:
        self.console, self.frames, self.active = console, list[pd.DataFrame](), Ranks.here().first
        begin, self.accuracy = 0 if state is None else state["step"], ""
        measured = [record for record in records.read(folder / "monitor.jsonl") if record["step"] < begin]
        self.frames += [_from_record(record) for record in measured]
        if not self.active:
            return
        self.metrics = Records(folder / "metrics.jsonl", [] if state is None else state["records"])
        self.monitored = Records(folder / "monitor.jsonl", measured)
        plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        self.sinks = sinks.make(cfg.sinks, folder, plain)
        self.bar = LateBar("steps", steps)
        self.bar.show(begin)

    def trained(self, record: Record) -> None:
        """A record of training."""
        if not self.active:
            return
        self.metrics.append(record)
        for sink in self.sinks:
            sink.write(record["step"], sinks.of_record(record))
        tested = "test_accuracy" in record
        if tested:
            self.accuracy = f"  test accuracy {100 * record['test_accuracy']:.2f} %"
        text = f"loss {record['train_loss']:.4f}{self.accuracy}  {record['images_per_second']:.0f} images/s"
        self.bar.show(record["step"], text)
        if tested:
            console = self.bar.progress.console if self.bar.visible else self.console
            console.print(f"epoch {record['epoch']:.2f}  {text}", highlight=False)

    def measured(self, frame: pd.DataFrame) -> None:
        """A record of the monitor."""
        self.frames.append(frame)
        if not self.active:
            return
        values = {str(name): frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame}
        self.monitored.append(values | {"step": int(frame["step"].iloc[0])})
        for sink in self.sinks:
            sink.write(int(frame["step"].iloc[0]), sinks.of_frame(frame))

    def close(self) -> None:
        """The run is over, or was stopped."""
        if self.active:
            self.bar.close()
            self.metrics.close()
            self.monitored.close()
            for sink in self.sinks:
                sink.close()


def _from_record(record: Record) -> pd.DataFrame:
    """A record of the monitor as the frame it was."""
    return gs.frames.upgraded(pd.DataFrame(record)).astype({"step": "int64"})


def _shown(console: Console) -> Callable[..., None]:
    """Warnings of the monitor in one line, without the place in the code; others as always."""
    always = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, gs.MonitorWarning):
            console.print(f"Warning: {message}", highlight=False, markup=False, soft_wrap=True)
        else:
            always(message, category, *place)

    return show


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train one network and write its run folder; returns the last test accuracy, for sweepers that search."""
    info = HydraConfig.get()
    alone, choices = info.mode is RunMode.RUN, dict(info.runtime.choices)
    folder, console = run.folder(cfg, info.overrides.task), Console()
    with parallel.started(run.device(cfg.device)) as device, warnings.catch_warnings():
        warnings.showwarning = _shown(console)

        def work() -> float:
            began = time.perf_counter()
            records = train(cfg, folder, device, console, run.columns(cfg, choices))
            if Ranks.here().first:
                write_json(folder / "manifest.json", manifest(cfg, choices, time.perf_counter() - began))
                console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)
            return float(records[-1]["test_accuracy"])

        try:
            # Of several processes the first answers for the run; the others do as it does.
            first = Ranks.here().first
            return carry_out(cfg, folder, info.overrides.task, work, alone=alone) if first else work()
        except gs.NonFiniteError as error:
            sys.exit(f"Stopped: {error}\nRun folder: {folder}")


if __name__ == "__main__":
    sys.argv[1:] = run.with_study_defaults(sys.argv[1:], CONF)
    main()
