"""The manifest of a run: configuration, commit, versions, hardware, threads, command line, time and memory."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from experiments.program import program
from experiments.seeds import device
from gradscope.frames import SCHEMA_VERSION

COMMAND = "GRADSCOPE_COMMAND"  # an environment variable, inherited by worker processes
MACOS = sys.platform == "darwin"
PACKAGES = ("gradscope-toolkit", "torch", "numpy", "scipy", "pandas", "hydra-core")


def manifest(
    cfg: DictConfig, choices: Mapping[str, Any], seconds: float, resolved: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The manifest of a run.  ``resolved``: further entries for its key ``hardware``, such as the dtype of autocast."""
    return {
        "schema": SCHEMA_VERSION,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "choices": {name: choice for name, choice in choices.items() if not name.startswith("hydra/")},
        **provenance(),
        "hardware": {
            "machine": platform.machine(),
            "cpu": cpu(),
            "system": platform.system(),
            "num_threads": torch.get_num_threads(),
            "device": str(device(cfg.device)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            **(resolved or {}),
        },
        "command": command(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        # The peak of this process so far, which in a serial sweep includes earlier runs.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if MACOS else 1024),
    }


@cache
def provenance(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """The commit, whether there are uncommitted changes outside ``results`` (both null without git), and versions."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
    }


def command() -> str:
    """The command line, quoted for a shell.  In a worker process: the command line of the sweep."""
    if COMMAND in os.environ:
        return os.environ[COMMAND]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = sys.argv[0] if spec is None else spec.name.removesuffix(".__main__")
    of_experiments = module.startswith("experiments.")
    begin = program(module.partition(".")[2]) if of_experiments else f"python {'-m ' * (spec is not None)}{module}"
    return f"{begin} {shlex.join(sys.argv[1:])}".strip()


@cache
def cpu() -> str | None:
    """The model name of the processor; None if ``/proc/cpuinfo`` does not give one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


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
