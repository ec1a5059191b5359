"""What a command measures: the model that ``MODULE:FACTORY`` names, and its input."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The input has a stream of random numbers of its own, so that it does not depend on the weights.
INPUT_STREAM = 1_000_000_007


def subject(given: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return the model and its input, with the dtype and on the device that the arguments ask for."""
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {given.device} cannot be used here: {str(error).splitlines()[0]}") from error
    model = made(given.model, given.seed).to(given.device)
    if given.eval:
        model.eval()
    if given.dtype:
        model.to(DTYPES[given.dtype])
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), DTYPES[given.dtype or "float32"])
    x = _random(given) if given.data is None else read(given.data)
    return model, x.to(given.device, dtype if x.is_floating_point() else x.dtype)


def made(name: str, seed: int) -> nn.Module:
    """Return the module that ``name`` (MODULE:FACTORY) names, or what the factory returns without arguments.

    Its weights depend only on ``seed``, even if other code in the file draws random numbers.
    """
    path, _, attributes = name.partition(":")
    if not path or not attributes or path.endswith(".py") or "/" in path:
        raise ValueError(f"{name!r} is not MODULE:FACTORY, for example my_net:resnet for resnet() in my_net.py.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    torch.manual_seed(seed)
    try:
        found: Any = importlib.import_module(path)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{path}.".startswith(f"{error.name}."):
            raise ValueError(f"There is no module {path!r} in {Path.cwd()} or among the installed packages.") from error
        raise ValueError(f"{path} cannot be imported: {_described(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            close = get_close_matches(attribute, [known for known in vars(found) if not known.startswith("_")], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"{path} has no {attribute!r}{hint}")
        found = getattr(found, attribute)
    if not isinstance(found, nn.Module) and callable(found):
        torch.manual_seed(seed)
        try:
            found = found()
        except Exception as error:
            raise ValueError(f"{name} cannot be called without arguments: {_described(error)}") from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"{name} must be or return a torch.nn.Module, got {type(found).__name__}.")
    return found


def read(path: str) -> Tensor:
    """Return the array ``x`` of an ``.npz`` file, or its only array."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(getattr(arrays, "files", []))
            if "x" not in names and len(names) != 1:
                raise ValueError(f"it needs an array x or only one array, got {', '.join(names) or 'no .npz archive'}.")
            return torch.from_numpy(arrays["x" if "x" in names else names[0]])
    except Exception as error:  # damaged bytes can raise nearly any exception
        raise ValueError(f"--data {path} cannot be read: {error}") from error


def shape(text: str) -> tuple[int, ...]:
    """Return the sizes of ``8,3,32,32``."""
    sizes = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 8,3,32,32 (batch size first)")
    return sizes


def _random(given: argparse.Namespace) -> Tensor:
    """Standard normal numbers, or token ids below ``--input-ids``, of the shape ``--input``."""
    generator = torch.Generator().manual_seed(given.seed + INPUT_STREAM)
    if given.input_ids is not None:
        return torch.randint(given.input_ids, given.input, generator=generator)
    return torch.randn(given.input, generator=generator)


def _described(error: Exception) -> str:
    """The type and first line of an exception, and the line of code that raised it."""
    frame = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")][-1]
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''} ({Path(frame.filename).name}, line {frame.lineno})"
