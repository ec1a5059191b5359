"""How does a network learn?

python -m experiments.train model=alexnet_a data=cifar10 train.epochs=4
python -m experiments.train model=alexnet_b train.lr=0.02 train.augmentation.crop=4 monitor.every=200
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import gradscope as gs
from experiments import config, loop, run
from experiments.images import Augmentation, Images
from experiments.measure import call

config.register()


def recipe(cfg: DictConfig) -> loop.Recipe:
    """The recipe that a configuration describes."""
    values: dict[str, Any] = OmegaConf.to_container(cfg.train, resolve=True)  # type: ignore[assignment]
    return loop.Recipe(**(values | {"augmentation": Augmentation(**values["augmentation"]), "seed": cfg.seed}))


def watched(cfg: DictConfig, model: torch.nn.Module, test: Images) -> gs.Monitor | None:
    """The monitor, on the first images of the test set; None where ``monitor.every`` is null."""
    if cfg.monitor.every is None:
        return None
    x, _ = test.batch(torch.arange(cfg.monitor.batch_size, device=test.images.device))
    return gs.Monitor(
        model, x, every=cfg.monitor.every, probes=cfg.monitor.probes, max_overhead=cfg.monitor.max_overhead
    )


def train(cfg: DictConfig, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Train one network as configured, in its run folder."""
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    if cfg.resume not in ("auto", "none"):
        raise ValueError(f"resume must be auto or none, got {cfg.resume!r}.")
    if "download" not in cfg.data:
        raise ValueError("experiments.train learns from images with labels: data=cifar10.")
    device = run.device(cfg.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    model = call(cfg.model, generator=run.generator(cfg.seed, "model")).to(device, memory_format=torch.channels_last)
    sets = [Images.cifar10(train=part, device=device, download=cfg.data.download) for part in (True, False)]
    monitor = watched(cfg, model, sets[1])

    def report(record: dict[str, Any]) -> None:
        console.print(
            f"epoch {record['epoch']:.2f}  loss {record['train_loss']:.4f}  test accuracy "
            f"{100 * record['test_accuracy']:.2f} %  {record['images_per_second']:.0f} images/s",
            highlight=False,
        )

    images, test = sets
    records = loop.train(
        model, images, test, recipe(cfg), folder, resume=cfg.resume == "auto", monitor=monitor, report=report
    )
    if monitor is not None and monitor.steps:
        gs.frames.save(monitor.to_frame(), folder / "monitor.parquet")
    return records


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train one network and write its run folder."""
    began = time.perf_counter()
    folder = run.folder(cfg, HydraConfig.get().overrides.task)
    console = Console()
    train(cfg, folder, console)
    run.write_json(folder / "manifest.json", run.manifest(cfg, time.perf_counter() - began))
    console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
