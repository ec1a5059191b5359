"""One run: its folder, seeds, device and manifest."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from gradscope.frames import SCHEMA_VERSION

# Keys that say where and how fast, not what: they change neither a result nor the name of its folder.
PLACE_KEYS = ("results", "sweep", "device", "num_threads", "resume", "sinks", "memory_map")
MAX_NAME = 120
# Keys that are columns of the frame already, row by row, or no property of a network.
NO_COLUMN = (
    *PLACE_KEYS, "_target_", "target", "probes", "reduction", "matrix", "matrix_probes", "log_every",
    "checkpoint_every", "keep", "compile",
)  # fmt: skip
PACKAGES = ("gradscope-toolkit", "torch", "numpy", "scipy", "pandas", "hydra-core")


def folder(cfg: DictConfig, overrides: Sequence[str]) -> Path:
    """``<results>/<sweep>/<overridden keys>-<hash of the configuration>``; equal configuration, equal folder."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    content = {str(key): value for key, value in config.items() if key not in PLACE_KEYS}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    named = [item.lstrip("+~").split("=", 1) for item in overrides if "=" in item]
    words = [f"{key.rpartition('.')[2]}={value}" for key, value in named if key not in (*PLACE_KEYS, "study")]
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", ",".join(sorted(words)))[: MAX_NAME - len(digest) - 1]
    return Path(cfg.results) / cfg.sweep / "-".join(filter(None, (name, digest)))


def generator(seed: int, purpose: str) -> torch.Generator:
    """An independent stream for each purpose (model, data, probes) of a seed."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: Not a device, or none of that kind in this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    groups = ("model", "optimizer", "train") if "train" in cfg else ("model", "data")
    for group in (cfg, *(cfg[name] for name in groups)):
        for key, value in group.items():
            if isinstance(value, (DictConfig, ListConfig)) or key in NO_COLUMN:
                continue
            if key in flat:
                raise ValueError(f"Key {key!r} stands in two groups of the configuration; a column needs one meaning.")
            flat[str(key)] = value
    return flat


def manifest(cfg: DictConfig, seconds: float) -> dict[str, Any]:
    """What made a result: configuration, commit, versions, hardware, threads, command line, wall time."""
    return {
        "schema": SCHEMA_VERSION,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "num_threads": torch.get_num_threads(),
            "device": str(device(cfg.device)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "command": " ".join(["python -m", *[Path(sys.argv[0]).stem], *sys.argv[1:]]),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write by temporary file and rename, so that no half-written file is ever read."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def write_table(table: pd.DataFrame, path: Path) -> Path:
    """Write Parquet by temporary file and rename."""
    temporary = path.with_name(path.name + ".part")
    table.to_parquet(temporary, index=False)
    return temporary.replace(path)


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


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
