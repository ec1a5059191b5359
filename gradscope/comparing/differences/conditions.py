"""The second model of a comparison: another module, a changed copy of the first, or the first in a context."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.choices import shown
from gradscope.forward.inputs import Batch, copied
from gradscope.forward.modules import Modules, listed

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Subject:
    """One of both models, its batch, and the context in which it runs.

    ``dtype``: the numbers that it computes with.  ``compiled``: the compiled module, of which ``modules`` holds the
    eager original, or None.
    """

    modules: Modules
    batch: Batch
    context: Context
    dtype: torch.dtype
    compiled: nn.Module | None

    @property
    def model(self) -> nn.Module:
        """The eager module."""
        return self.modules[""]


def first(model: nn.Module, batch: Batch) -> Subject:
    """The first model, which runs as it is."""
    modules, compiled = _eager(model)
    return Subject(modules, batch, nullcontext, dtype_of(modules[""], batch), compiled)


def second(one: Subject, change: Any) -> Subject:
    """The model that ``change`` says: a module; a function of a copy of the first model; or a context for the first.

    The batch follows: it is moved to the device of the model, and numbers with the dtype of the first model get that of
    the second.

    Raises:
        TypeError: ``change`` is none of these, or the function returns no module.
    """
    context: Context = nullcontext
    if isinstance(change, nn.Module):
        model = change
    elif hasattr(change, "__enter__") and hasattr(change, "__exit__"):
        # A context made by contextlib can be entered once; contextlib itself makes it anew for each decorated call.
        model, context = one.model, getattr(change, "_recreate_cm", lambda: change)
    elif callable(change):
        own = copy.deepcopy(one.model)
        found = change(own)
        model = own if found is None else found
        if not isinstance(model, nn.Module):
            raise TypeError(f"b changed a copy of the model and must return the model, got {shown(found)}.")
    else:
        raise TypeError(
            "b must be a model (load a checkpoint into one first), a function that changes a copy of a (lambda model: "
            "model.bfloat16()), a context in which a runs (torch.autocast(...)), or, as a, a saved frame; got "
            f"{shown(change)}."
        )
    modules, compiled = _eager(model)
    dtype = dtype_of(modules[""], one.batch)
    batch = fitted(one.batch, modules[""], one.dtype, dtype)
    device = batch.samples[0].device.type
    with context():
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    return Subject(modules, batch, context, computed, compiled)


def dtype_of(model: nn.Module, batch: Batch) -> torch.dtype:
    """The dtype of the first real or complex parameter, or of the data."""
    tensors = [*(p for p in model.parameters() if p.is_floating_point() or p.is_complex()), *batch.floats]
    return tensors[0].dtype if tensors else torch.get_default_dtype()


def fitted(batch: Batch, model: nn.Module, before: torch.dtype, after: torch.dtype) -> Batch:
    """The batch on the device of a model, with numbers of one dtype converted to another."""
    device = next((p.device for p in model.parameters()), None)

    def each(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device or tensor.device, after if tensor.dtype == before else tensor.dtype)

    return Batch(copied(batch.inputs, each), copied(batch.labels, each))


def _eager(model: nn.Module) -> tuple[Modules, nn.Module | None]:
    """The modules of a model and, if it is compiled, the model itself."""
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, nn.Module):
        return listed(original), model
    return listed(model), model if model._compiled_call_impl is not None else None
