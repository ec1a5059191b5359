"""What is found out and kept when training meets a number that is not finite."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradscope.inputs import Forward, LossFunction
from gradscope.nonfinite import Culprit, first_nonfinite
from gradscope.ranks import parallel


class NonFiniteError(FloatingPointError):
    """A number of training is NaN or Inf; the message names the first layer, and the direction, that made it so."""


def culprit(
    model: nn.Module, batch: Any, x: Any, *, forward: Forward | None, loss_fn: LossFunction | None
) -> tuple[Culprit | None, str]:
    """What a second pass on the batch, else on the probe batch ``x``, shows, and a remark if the batch has none.

    It runs as the caller does, so under autocast in its precision, where what happened in training happens again.
    """
    remark = ""
    if batch is not None:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and loss_fn is None else batch
        try:
            if found := first_nonfinite(model, inputs, forward=forward, loss_fn=loss_fn):
                return found, ""
        except Exception as error:  # whatever goes wrong here must not hide what was seen in training
            remark = f"; the batch itself could not be looked into ({error})"
    try:
        return first_nonfinite(model, x, forward=forward), remark
    except Exception as error:  # nor here
        return None, f"{remark}; nor could the probe batch ({error})"


def kept(folder: Path, evidence: dict[str, Any]) -> str:
    """Write ``nonfinite.pt``, whole or not at all; in words, where it is, or why it is not there.

    Each of several ranks writes a file of its own.
    """
    rank = f"-rank{torch.distributed.get_rank()}" if parallel() else ""
    path = folder / f"nonfinite{rank}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(evidence, temporary)
        temporary.replace(path)
    except Exception as error:  # a full disk, a batch that cannot be pickled: the layer is told all the same
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return f" The batch and the state could not be saved in {path} ({error})."
    return f" The batch and the state are in {path}."
