"""One run: its folder, seeds, device, and what of its configuration stands in its frame."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments import launches

# Keys that say where and how fast, not what: they change neither a result nor the name of its folder.
PLACE_KEYS = (
    "results", "sweep", "device", "num_threads", "resume", "sinks", "memory_map", "rerun", "on_error",
)  # fmt: skip
MAX_NAME = 120
DIGITS = 12  # of a digest: two of a million runs share one with a probability of 0.2 %
# Keys that are columns of the frame already, row by row, or no property of a network.
NO_COLUMN = (
    *PLACE_KEYS, "_target_", "target", "probes", "reduction", "matrix", "matrix_probes", "log_every",
    "checkpoint_every", "keep", "compile", "seeds", "measurement", "nlc",
)  # fmt: skip


def folder(cfg: DictConfig, overrides: Sequence[str]) -> Path:
    """``<results>/<sweep>/<overridden keys>-<hash of the configuration>``; equal configuration, equal folder.

    The words are those of the first time that this configuration ran in the sweep.  Names are at most 120 characters of
    ASCII, and two of them never differ in case only.
    """
    key, sweep = digest(cfg), Path(cfg.results) / cfg.sweep
    known = _names(sweep.absolute())
    if (found := launches.of_digest(known, key)) is None:
        named = [item.lstrip("+~").split("=", 1) for item in words(overrides) if "=" in item]
        texts = [f"{name.rpartition('.')[2]}={value}" for name, value in named if name != "study"]
        text = re.sub(r"[^A-Za-z0-9._=,+-]", "_", ",".join(sorted(texts)))[: MAX_NAME - len(key) - 1]
        name = "-".join(filter(None, (text, key)))
        in_launch = launches.current() is not None  # beside which there may be others
        found = known[key] = Path(launches.settled(sweep, key, name) if in_launch else name)
    return sweep / found.name


def digest(cfg: DictConfig) -> str:
    """Twelve hex digits of the resolved configuration, without what does not change a result."""
    content: dict[str, Any] = {}
    for key in cfg:
        if key not in (*PLACE_KEYS, "hydra"):
            value = "???" if OmegaConf.is_missing(cfg, key) else cfg[key]
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            content[str(key)] = plain
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]


def words(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that say what a run is, not where or how it is carried out."""
    unsaid = (*PLACE_KEYS, "launcher")
    keys = [item.lstrip("+~").split("=", 1)[0] for item in overrides]
    kept = [key not in unsaid and "/" not in key and not key.startswith("hydra.") for key in keys]
    return tuple(item for item, keep in zip(overrides, kept, strict=True) if keep)


@cache
def _names(sweep: Path) -> dict[str, Path]:
    """Run folders of a sweep by the digest that their names end with; read once a process."""
    return launches.digests(sweep)


def generator(seed: int, purpose: str) -> torch.Generator:
    """An independent stream for each purpose (model, data, probes) of a seed."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; with several GPUs the runs of a sweep take them in turn.

    Raises:
        ValueError: Not a device, or none of that kind in this machine.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", _job() % torch.cuda.device_count())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name} cannot be used here ({str(error).splitlines()[0]}); use device=auto."
        ) from error
    return torch.device(name)


def columns(cfg: DictConfig, choices: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration as columns of its frame: scalar keys by their own name, groups by what was chosen."""
    flat: dict[str, Any] = {"model": choices["model"], "data": choices["data"]}
    groups = ("model", "optimizer", "train") if "train" in cfg else ("model", "data", "measurement")
    for group in (cfg, *(cfg[name] for name in groups if cfg[name] is not None)):
        for key, value in group.items():
            if isinstance(value, (DictConfig, ListConfig)) or key in NO_COLUMN:
                continue
            if key in flat:
                raise ValueError(f"Key {key!r} stands in two groups of the configuration; a column needs one meaning.")
            flat[str(key)] = value
    return flat


def with_study_defaults(arguments: Sequence[str], conf: Path) -> list[str]:
    """Let a key given on the command line replace the same key of a study's sweep, instead of multiplying with it."""
    study = next((item.split("=", 1)[1] for item in arguments if item.startswith("study=")), None)
    path = conf / "study" / f"{study}.yaml"
    if study is None or not path.is_file():
        return list(arguments)
    params = yaml.safe_load(path.read_text()).get("hydra", {}).get("sweeper", {}).get("params", {})
    given = {item.lstrip("+").split("=", 1)[0] for item in arguments}
    if not given & params.keys():
        return list(arguments)
    kept = [f"{key}={value}" for key, value in params.items() if key not in given]
    return [*arguments, "hydra.sweeper.params=null", *kept]


def _job() -> int:
    """The number of this run in its sweep; 0 where it is no sweep."""
    if not HydraConfig.initialized():
        return 0
    job = HydraConfig.get().job
    return 0 if OmegaConf.is_missing(job, "num") else int(job.num)
