"""How do coefficients look at initialization?

python -m experiments.measure model.depth=50 model.activation=selu
python -m experiments.measure -m model.depth=10,50,100 model.activation=relu,tanh model.norm=none,batch seed=range(8)
python -m experiments.measure -m study=architectures
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import gradscope as gs
from experiments import build, config, report, run
from experiments.cifar10 import IMAGE_SHAPE
from experiments.files import write_json
from experiments.guard import carry_out
from experiments.manifest import manifest
from experiments.progress import LateBar
from gradscope.measures import PreactivationStd, SignDiversity
from gradscope.preactivations import NONLINEARITIES

CONF = Path(__file__).parent.parent / "conf"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

STATISTICS = (PreactivationStd(), SignDiversity())

config.register()


def network(cfg: DictConfig) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model and the batch that a configuration describes, on its device."""
    if cfg.mode not in ("train", "eval"):
        raise ValueError(f"mode must be train or eval, got {cfg.mode!r}.")
    if cfg.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {cfg.dtype!r}.")
    x = build.call(cfg.data, shape=_sample_shape(cfg), generator=run.generator(cfg.seed, "data"))
    sizes = {}
    if "in_features" in cfg.model and cfg.model.in_features is None:
        sizes["in_features"] = math.prod(x.shape[1:])
    model = build.model(cfg, **sizes)
    device, dtype = run.device(cfg.device), DTYPES[cfg.dtype]
    return model.train(cfg.mode == "train").to(device, dtype), x.to(device, dtype)


def measure(cfg: DictConfig, choices: dict[str, Any]) -> tuple[gs.Profile, pd.DataFrame]:
    """The profile of one network, and the frame of everything measured, with the configuration as columns."""
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    torch.manual_seed(cfg.seed)  # dropout masks come from torch's global generator
    model, x = network(cfg)
    options: dict[str, Any] = {"reduction": cfg.reduction, "target": cfg.target, "rtol": cfg.rtol}
    with LateBar("profile", 1.0) as bar:
        random = run.generator(cfg.seed, "probes")
        profile = gs.gsc(model, x, probes=cfg.probes, generator=random, progress=bar.show, **options)
    parts = [profile.to_frame()]
    if any(isinstance(module, NONLINEARITIES) for module in model.modules()):
        parts.append(gs.measure(model, x, measures=STATISTICS))
    if cfg.matrix:
        options["layers"] = list(cfg.matrix_layers) if cfg.matrix_layers else None
        with LateBar("matrix", 1.0) as bar:
            random = run.generator(cfg.seed, "matrix")
            matrix = gs.gsc_matrix(model, x, probes=cfg.matrix_probes, generator=random, progress=bar.show, **options)
        pairs = matrix.to_frame()
        parts.append(pairs[pairs["target"] != profile.target])  # that column is the profile
    return profile, pd.concat(parts, ignore_index=True).assign(**run.columns(cfg, choices))


@hydra.main(version_base="1.3", config_path="../conf", config_name="measure")
def main(cfg: DictConfig) -> float | None:
    """Measure one network and write its run folder; returns the growth rate, for sweepers that search."""
    info = HydraConfig.get()
    alone, choices = info.mode is RunMode.RUN, dict(info.runtime.choices)
    folder = run.folder(cfg, info.overrides.task)

    def work() -> float | None:
        began = time.perf_counter()
        profile, frame = measure_seeds(cfg, choices)
        gs.frames.save(frame, folder / "frame.parquet")
        write_json(folder / "manifest.json", manifest(cfg, choices, time.perf_counter() - began))
        if alone:
            report.print_run(profile, frame, folder)
        return _rate(profile)

    return carry_out(cfg, folder, info.overrides.task, work, alone=alone)


def measure_seeds(cfg: DictConfig, choices: dict[str, Any]) -> tuple[gs.Profile, pd.DataFrame]:
    """`measure` for each of ``seeds`` (a number n: 0 to n - 1; null: ``seed`` alone); the last profile and one frame.

    Raises:
        ValueError: ``seeds`` is neither a positive number nor a list of different whole numbers.
    """
    if cfg.seeds is None:
        return measure(cfg, choices)
    seeds = range(cfg.seeds) if isinstance(cfg.seeds, int) else list(cfg.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds must be a positive number or a list of different whole numbers, got {cfg.seeds!r}.")
    cfg, parts = cfg.copy(), []
    for cfg.seed in seeds:
        profile, frame = measure(cfg, choices)
        parts.append(frame)
    return profile, pd.concat(parts, ignore_index=True)


def _rate(profile: gs.Profile) -> float | None:
    try:
        return profile.growth().rate
    except ValueError:  # too few layers for a rate
        return None


def _sample_shape(cfg: DictConfig) -> tuple[int, ...]:
    """Shape of one sample of noise: as configured, or what the model takes."""
    if cfg.data.get("shape") is not None:
        return tuple(cfg.data.shape)
    if "in_features" in cfg.model:
        return (cfg.model.in_features or cfg.model.width,)
    return IMAGE_SHAPE


if __name__ == "__main__":
    sys.argv[1:] = run.with_study_defaults(sys.argv[1:], CONF)
    main()
