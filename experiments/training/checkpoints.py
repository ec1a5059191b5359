"""Checkpoints that are never half written: a temporary file, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.files import written

LAST, BEST = "last.pt", "best.pt"
FOLDER = "checkpoints"  # in that of a run


def save(state: dict[str, Any], folder: Path, name: str = LAST) -> Path:
    """Write ``folder/name``; the one before stays intact until the new one is whole.

    Raises:
        OSError: The disk is full or cannot be written; the message says that the last checkpoint is still good.
    """
    return _written(folder / name, lambda temporary: torch.save(state, temporary))


def keep(folder: Path, step: int, num: int) -> None:
    """Keep the last checkpoint also under its step, and of those the newest ``num``.

    Checkpoints of later steps are of a run that this one has taken back, so they go.

    Raises:
        OSError: As for `save`.
    """
    if num == 0:
        return
    own = _written(folder / f"step-{step:08d}.pt", lambda temporary: shutil.copyfile(folder / LAST, temporary))
    paths = sorted(folder.glob("step-*.pt"))
    kept = [path for path in paths if path.name <= own.name][-num:]
    for path in set(paths) - set(kept):
        path.unlink()


def load(folder: Path, device: torch.device, name: str = LAST) -> dict[str, Any] | None:
    """The checkpoint of that name, None where there is none.

    Raises:
        ValueError: The file is no checkpoint.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); remove it, or begin anew: resume=none."
        ) from error
    return state


def _written(path: Path, write: Callable[[Path], object]) -> Path:
    def flushed(temporary: Path) -> None:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())

    try:
        return written(path, flushed)
    except (OSError, RuntimeError) as error:
        before = f"the checkpoint before it, {path}, is intact" if path.exists() else "there is none before it"
        raise OSError(f"The checkpoint {path} could not be written ({error}); {before}. Free some space.") from error
