"""The manifest of a benchmark: machine, versions and settings."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from experiments.runs import cpu, provenance

PACKAGES = ("gradscope-toolkit", "torch", "numpy", "curvlinops-for-pytorch")


def manifest(**run: Any) -> dict[str, Any]:
    """Settings of the run, commit, versions, hardware, threads, command line and date."""
    script = Path(sys.argv[0])
    name = script.parent.name if script.stem == "__main__" else script.stem
    return run | {
        **provenance(PACKAGES),
        "hardware": {"cpu": cpu(), "machine": platform.machine(), "num_threads": torch.get_num_threads()},
        "command": " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]]),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
