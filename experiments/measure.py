"""Measure coefficients of networks at initialization.

python -m experiments.measure model.depth=50 model.activation=selu
python -m experiments.measure -m model.depth=10,50,100 model.activation=relu,tanh model.norm=none,batch seed=range(8)
python -m experiments.measure -m study=architectures
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import hydra
import numpy as np
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import gradscope as gs
from experiments import seeds as experiment_seeds
from experiments.config import build, columns, command_line, overrides, schema
from experiments.config.build import network
from experiments.files import write_json
from experiments.progress import LateBar
from experiments.reports import terminal
from experiments.runs import explained, manifest, run_once
from experiments.runs import folder as run_folder
from gradscope.frames import observed
from gradscope.measures.measuring import PREACTIVATION_MEASURES
from gradscope.measures.preactivations import NONLINEARITIES

# More small frames than this are joined, because garbage collection visits every part of every frame.
MOST_FRAMES = 100
# The nonlinearity coefficient is exact up to this many cotangents, otherwise estimated from this many random ones.
NLC_PROBES = 16
STATISTICS = {measure.quantity: measure for measure in PREACTIVATION_MEASURES}

schema.register()


def measure(cfg: schema.MeasureConfig) -> tuple[gs.Profile | None, list[pd.DataFrame]]:
    """Profile of one network, and one frame per kind of measurement.  With ``measurement``: no profile, one frame."""
    experiment_seeds.threads(cfg.num_threads)
    experiment_seeds.seed_torch(cfg.seed)  # dropout masks come from torch's global generator
    model, x = network(cfg)
    if cfg.measurement is not None:
        random = experiment_seeds.generator(cfg.seed, "probes")
        frame = build.call(cfg.measurement, "measurement", model=model, x=x, generator=random)
        target = cfg.measurement["_target_"]
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(f"measurement._target_={target} returned a {type(frame).__name__}, not a pandas.DataFrame.")
        if missing := [name for name in gs.frames.COLUMNS if name not in frame]:
            raise ValueError(
                f"measurement._target_={target} returned a frame without {', '.join(missing)}: make it with "
                "gs.frames.tidy, or for one number per network with gs.frames.observed."
            )
        return None, [frame]
    options: dict[str, Any] = {"reduction": cfg.reduction, "target": cfg.target, "rtol": cfg.rtol}
    with LateBar("profile", 1.0) as bar:
        random = experiment_seeds.generator(cfg.seed, "probes")
        profile = gs.gsc(model, x, probes=cfg.probes, generator=random, progress=bar.show, **options)
    parts = [profile.to_frame()]
    if any(isinstance(module, NONLINEARITIES) for module in model.modules()):
        if unknown := [name for name in cfg.statistics if name not in STATISTICS]:
            raise ValueError(f"statistics: {unknown[0]!r} must be one of {', '.join(STATISTICS)}.")
        parts.append(gs.measure(model, x, measures=[STATISTICS[name] for name in cfg.statistics]))
    if cfg.nlc:
        captured = gs.capture(model, x)
        needed = captured.target.size // (1 if captured.coupled else len(x))
        probes = "exact" if needed <= NLC_PROBES else NLC_PROBES
        coefficient = gs.nlc(model, x, probes=probes, generator=experiment_seeds.generator(cfg.seed, "nlc"))
        parts.append(observed("nlc", coefficient.value, stderr=[coefficient.stderr], num_samples=len(x)))
    if cfg.matrix:
        options["layers"] = cfg.matrix_layers or None
        with LateBar("matrix", 1.0) as bar:
            random = experiment_seeds.generator(cfg.seed, "matrix")
            matrix = gs.gsc_matrix(model, x, probes=cfg.matrix_probes, generator=random, progress=bar.show, **options)
        pairs = matrix.to_frame()
        parts.append(pairs[pairs["target"] != profile.target])  # these pairs are in the profile
    return profile, parts


@hydra.main(version_base="1.3", config_path="../conf", config_name="measure")
def main(cfg: DictConfig) -> float | None:
    """Measure one network and write its run folder; returns the growth rate for a search such as Optuna's."""
    info = HydraConfig.get()
    alone, choices = info.mode is RunMode.RUN, dict(info.runtime.choices)

    def work() -> float | None:
        began = time.perf_counter()
        profile, frame = measure_seeds(cfg, choices)
        gs.frames.save(frame, folder / "frame.parquet")
        write_json(folder / "manifest.json", manifest(cfg, choices, time.perf_counter() - began))
        if alone:
            terminal.print_run(profile, frame, folder)
        with suppress(ValueError):  # too few layers for a rate
            return None if profile is None else profile.growth().rate
        return None

    with explained(alone):
        overrides.refuse_part_of_study()
        folder = run_folder(cfg, info.overrides.task)
        return run_once(cfg, folder, info.overrides.task, work, alone=alone)


def measure_seeds(cfg: DictConfig, choices: dict[str, Any]) -> tuple[gs.Profile | None, pd.DataFrame]:
    """The profile of the last seed, and one frame for all ``seeds`` with the configuration as columns.

    ``seeds``: a list, a number n (0 to n - 1), or null (only ``seed``).
    """
    settings = schema.resolved(cfg)
    given = settings.seeds
    seeds = [settings.seed] if given is None else range(given) if isinstance(given, int) else given
    if (
        not seeds
        or not isinstance(seeds, list | range)
        or len(set(seeds)) < len(seeds)
        or not all(isinstance(seed, int) for seed in seeds)
    ):
        raise ValueError(f"seeds must be a positive number or a list of different whole numbers, got {given!r}.")
    frames: list[pd.DataFrame] = []
    num_rows = []
    for seed in seeds:
        profile, found = measure(replace(settings, seed=seed))
        frames += found
        num_rows.append(sum(map(len, found)))
        if len(frames) > MOST_FRAMES:
            frames = [pd.concat(frames, ignore_index=True)]
    # Joined first, because adding columns to many small frames takes as long as measuring.
    frame = pd.concat(frames, ignore_index=True)
    of_run = columns.columns(cfg, choices)
    if taken := [name for name in of_run if name in frame]:
        raise ValueError(
            f"measurement._target_={settings.measurement['_target_']} returned a frame with the column {taken[0]!r}, "
            "but the key of this name needs this column: name yours differently."
        )
    del of_run["seed"]  # each row has its own
    return profile, frame.assign(seed=np.repeat(seeds, num_rows), **of_run)


if __name__ == "__main__":
    command_line.run_hydra(main)
