"""Checkpoints, written atomically: to a temporary file, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.training import records
from gradscope.files import written

LAST, BEST = "last.pt", "best.pt"
FOLDER = "checkpoints"  # inside the run folder; may be a link to another disk
WRITTEN = tuple(f"{FOLDER}/{name}{end}" for name in (LAST, BEST, "step-*.pt") for end in ("", ".*.part"))
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The parts of a checkpoint and their types; others are optional.
PARTS: dict[str, Any] = {
    "model": dict, "optimizer": dict, "step": int, "since": int, "losses": torch.Tensor, "records": list,
    "best": int | float,
}  # fmt: skip


def save(state: dict[str, Any], folder: Path, name: str = LAST) -> Path:
    """Write ``folder/name``.  The previous file stays intact until the new one is complete."""
    return _written(folder / name, lambda temporary: torch.save(state, temporary))


def keep(folder: Path, step: int, num: int) -> None:
    """Copy the last checkpoint to ``step-<step>.pt``, and delete all such copies but the newest ``num``.

    Copies with a later step were written before the run was restarted at an earlier step.  They are deleted, too.
    """
    if num == 0:
        return
    own = _written(folder / f"step-{step:08d}.pt", lambda temporary: shutil.copyfile(folder / LAST, temporary))
    paths = sorted(folder.glob("step-*.pt"))
    kept = [path for path in paths if path.name <= own.name][-num:]
    for path in set(paths) - set(kept):
        path.unlink()


def load(folder: Path, device: torch.device, name: str = LAST) -> dict[str, Any] | None:
    """The checkpoint of that name, or None if there is no such file.  ValueError if the file is not a checkpoint.

    Nothing in the file is run.  It takes no more memory than it has bytes: compressed parts are refused.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is compressed")
        state = torch.load(path, map_location=device, weights_only=True)
        return dict(state)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); delete it, or restart with resume=none."
        ) from error


def resume(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The last checkpoint, checked for what a run needs to resume, or None.  ValueError if something is missing."""
    state = load(folder, device)
    if state is not None:
        wrong = [key for key, kind in PARTS.items() if not isinstance(state.get(key), kind)]
        if wrong or not 0 <= state["since"] <= state["step"] or not all(map(records.is_record, state["records"])):
            raise ValueError(
                f"{folder / LAST} is no checkpoint of a run ({', '.join(wrong) or 'steps or records'}); delete it, or "
                "restart with resume=none."
            )
    return state


def _written(path: Path, write: Callable[[Path], object]) -> Path:
    def flushed(temporary: Path) -> None:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())

    try:
        return written(path, flushed)
    except (OSError, RuntimeError) as error:
        previous = "the previous checkpoint there is intact" if path.exists() else "there is no earlier checkpoint"
        reason = getattr(error, "strerror", None) or error
        full = getattr(error, "errno", errno.ENOSPC) in FULL  # torch raises RuntimeError, without a number
        advice = " Free disk space." if full else ""
        raise OSError(f"Could not write the checkpoint {path} ({reason}); {previous}.{advice}") from error
