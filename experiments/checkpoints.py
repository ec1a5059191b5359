"""Checkpoints that are never half written: a temporary file, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

LAST = "last.pt"


def save(state: dict[str, Any], folder: Path, name: str = LAST) -> Path:
    """Write ``folder/name``; the one before stays intact until the new one is whole.

    Raises:
        OSError: The disk is full or cannot be written; the message says that the last checkpoint is still good.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / name, folder / f"{name}.part"
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        before = f"the checkpoint before it, {path}, is intact" if path.exists() else "there is none before it"
        raise OSError(f"The checkpoint {path} could not be written ({error}); {before}. Free some space.") from error


def load(folder: Path, device: torch.device, name: str = LAST) -> dict[str, Any] | None:
    """The checkpoint of that name, None where there is none."""
    path = folder / name
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
