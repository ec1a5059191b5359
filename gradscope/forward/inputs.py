"""Check the data that a user passes in, and make differentiable copies of them."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from itertools import chain, islice
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from gradscope.forward.interrupts import FunctionMode

Forward = Callable[[nn.Module, Any], Tensor]
_TORCH = torch.__path__[0]
LossFunction = Callable[[Tensor, Any], Tensor]
Loss = LossFunction | EllipsisType | None  # left out, ..., by functions that have no loss_fn=


class ModelError(ValueError, RuntimeError):
    """The model does not fit the data."""


@dataclass(frozen=True)
class Batch:
    """One batch: the inputs of the model, and the labels if a loss is measured."""

    inputs: Any
    labels: Any = None

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All input tensors, in the order of the structure that holds them."""
        found: list[Tensor] = []
        copied(self.inputs, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    @cached_property
    def samples(self) -> list[Tensor]:
        """The tensors that hold samples.  Others are held fixed: numbers, sparse and empty tensors, and masks."""
        found = [t for t in self.tensors if t.layout is torch.strided and t.ndim and t.numel()]
        return [t for t in found if not _is_mask(t)] or found if found[1:] else found

    @cached_property
    def floats(self) -> list[Tensor]:
        """The real and complex tensors that hold samples; with respect to them the model is differentiated."""
        return [tensor for tensor in self.samples if continuous(tensor)]

    @property
    def size(self) -> int:
        """Number of samples: the leading dimension of the first tensor that holds samples."""
        return self.samples[0].shape[0]

    @property
    def held(self) -> str | None:
        """A sentence that names the tensors that are held fixed; None if there are none."""
        samples = {id(tensor) for tensor in self.samples}
        held = [f"{_kind(t)} {tuple(t.shape)}" for t in self.tensors if id(t) not in samples]
        return f"Held fixed beside the samples: {', '.join(held)}." if held else None

    def run(self, model: nn.Module, forward: Forward | None) -> Any:
        """``forward(model, inputs)``, or ``model(**inputs)`` for a mapping, or ``model(inputs)``.

        Raises `ModelError` if the model does not accept the data, or if the error arises inside a module of torch.
        """
        try:
            if forward is not None:
                return forward(model, self.inputs)
            return model(**self.inputs) if isinstance(self.inputs, Mapping) else model(self.inputs)
        except (RuntimeError, TypeError, LookupError, AssertionError) as error:
            frames = traceback.extract_tb(error.__traceback__)
            # A mode that watches functions of torch stands between a function and whoever called it.
            file = [frame.filename for frame in frames if frame.name != "__torch_function__"][-1]
            if isinstance(error, torch.OutOfMemoryError) or not file.startswith((_TORCH, __file__)):
                raise
            kinds = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in self.tensors[:4])
            raise ModelError(
                f"The model{' or forward=' if forward else ''} cannot run on data of {kinds}: check shape, type and "
                f"arguments. {type(error).__name__}: {str(error)[:200]}"
            ) from error

    def check_finite(self) -> None:
        """Raise ValueError if an input holds NaN or Inf."""
        for tensor in self.samples:
            _check_finite(tensor)

    def differentiable(self, shifts: Sequence[Tensor | float] = ()) -> tuple[Batch, list[Tensor]]:
        """A copy of the batch and its `floats`: clones of leaves, so that a model may overwrite them.

        ``shifts``, if given, are added to the `floats`.  Tensors made under inference_mode become ordinary ones.
        """
        sources: list[Tensor] = []

        floats = {id(tensor) for tensor in self.floats}

        def each(tensor: Tensor) -> Tensor:
            if id(tensor) not in floats:
                return tensor.detach().clone()
            source = (tensor.clone() if tensor.is_inference() else tensor).detach().requires_grad_()
            sources.append(source + shifts[len(sources)] if shifts else source.clone())
            return sources[-1]

        inputs = copied(self.inputs, each)
        return Batch(inputs, copied(self.labels, lambda tensor: tensor.detach().clone())), sources


def copied(tree: Any, follow: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy of a structure in which ``follow`` has replaced every tensor, also inside objects.

    Raises TypeError for an object that cannot be copied, because a model could change it.
    """
    memo: dict[int, Any] = {}

    def each(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return follow(leaf)
        try:
            with _Following(follow):
                return copy.deepcopy(leaf, memo)
        except Exception as error:
            raise TypeError(
                f"data holds a {type(leaf).__name__}, which cannot be copied ({error}), so a measurement could change "
                "it: leave it out of data, and use it inside forward=, a function (model, batch) -> tensor."
            ) from error

    return pytree.tree_map(each, tree)


class _Following(FunctionMode):
    """Lets `copy.deepcopy` call a function for every tensor that it finds, instead of copying the tensor."""

    def __init__(self, follow: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.follow = follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.follow(tensor)
        return memo[id(tensor)]


def stream(data: Any, *, forward: Forward | None, loss_fn: LossFunction | None) -> Iterator[Any] | None:
    """An iterator over the batches of a loader, list or iterator; None if ``data`` is itself one batch.

    With ``forward``, a tuple or list is one batch, because only the user knows its structure.  A list that may be the
    batch of a loader, such as [inputs, labels], is one batch.  So are a dataclass, and an object that yields strings
    (names of its items).  Without ``loss_fn``, labels in pairs (inputs, labels) are ignored.
    """
    if isinstance(data, (Tensor, Mapping, tuple)) or not isinstance(data, Iterable) or is_dataclass(data):
        return None
    if getattr(data, "ndim", None) == 0:  # an array of numpy that cannot be iterated
        return None
    if isinstance(data, list) and (forward is not None or _is_batch(data, loss_fn)):
        return None
    batches = iter(data)
    if not isinstance(data, (list, Iterator)):
        first = list(islice(batches, 1))
        if first and isinstance(first[0][0] if isinstance(first[0], tuple) and first[0] else first[0], str):
            return None
        batches = chain(first, batches)
    if forward is not None or loss_fn is not None:
        return batches
    return (batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch for batch in batches)


def _is_batch(data: list[Any], loss_fn: LossFunction | None) -> bool:
    """Whether a list may be one batch, as the list [inputs, labels] of a loader, rather than several batches."""
    if loss_fn is not None:
        return bool(data) and not all(isinstance(batch, (tuple, list)) for batch in data)
    if len(data) < 2 or not any(isinstance(part, Tensor) for part in data):
        return False
    if not all(isinstance(part, Tensor) for part in data):
        return True
    alike = len({(part.ndim, part.dtype) for part in data}) == 1
    return not alike or (len(data) == 2 and data[0].shape[:1] == data[1].shape[:1])


def as_batch(data: Any, *, forward: Forward | None, loss_fn: Loss = ..., finite: bool = True) -> Batch:
    """Read ``data`` as one batch: a tensor, a mapping, a pair (x, y) with ``loss_fn``, anything with ``forward``.

    Raises TypeError for any other structure, and ValueError if the data are empty or, with ``finite``, not finite.
    """
    labels = None
    if loss_fn is not None and loss_fn is not ...:
        if not (isinstance(data, (tuple, list)) and len(data) == 2):
            raise TypeError(f"With loss_fn, data must be a pair (inputs, labels); got {type(data).__name__}.")
        data, labels = data
    elif forward is None and isinstance(data, (tuple, list)):
        if len(data) == 2:
            raise ValueError(
                "data is a pair (inputs, labels), but the labels would be ignored: give "
                f"{'' if loss_fn is ... else 'loss_fn= or '}only the inputs. If both are inputs, give forward=, a "
                f"function (model, batch) -> tensor{'' if loss_fn is ... else '; for two batches, give iter(data)'}."
            )
        if len(data) == 1:  # a loader of inputs without labels
            (data,) = data
    if forward is None and not isinstance(data, (Tensor, Mapping)):
        several = isinstance(data, (Iterator, DataLoader))
        hint = ", which holds several batches: give one, such as next(iter(loader))[0]" if several else ""
        raise TypeError(
            f"data must be a tensor, or a mapping for model(**batch); got {type(data).__name__}{hint}. "
            "For anything else give forward=, a function (model, batch) -> tensor."
        )
    # torch looks for tensors inside a dict, but not inside other mappings such as a tokenizer's output.
    batch = Batch(dict(data) if isinstance(data, Mapping) else data, labels)
    if not batch.tensors:
        raise ValueError("data contains no tensor, so there is nothing to measure.")
    for tensor in batch.tensors:
        _check_supported(tensor)
    if not batch.samples:
        shapes = ", ".join(f"{_kind(t)} {tuple(t.shape)}" for t in batch.tensors[:4])
        raise ValueError(
            f"The batch is empty: data has only {shapes}; give at least one sample, as a dense tensor of "
            "shape (B, ...)."
        )
    if finite:
        batch.check_finite()
    return batch


def _kind(tensor: Tensor) -> str:
    """Words for a tensor that holds no samples."""
    if tensor.layout is not torch.strided:
        return "a sparse tensor of shape"
    if not tensor.ndim:
        return "a number of shape"
    return "a mask of shape" if tensor.numel() else "a tensor of shape"


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds only 0 and -inf, as a mask that is added to scores of attention."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return False
    hidden = torch.isneginf(tensor)
    return bool(hidden.any()) and bool((hidden | (tensor == 0)).all())


def _check_supported(tensor: Tensor) -> None:
    """Raise ValueError for a tensor that holds no numbers, or whose numbers cannot be differentiated."""
    if tensor.is_nested:
        raise ValueError(
            "data holds a nested (jagged) tensor, which is not supported: pad the samples to one length, for example "
            "with torch.nested.to_padded_tensor(x, 0.0)."
        )
    if tensor.is_meta:
        raise ValueError(
            "data holds a meta tensor, which has a shape but no numbers: give data and a model on a real device."
        )
    if tensor.is_quantized:
        raise ValueError("data holds a quantized tensor, which has no gradients: give x.dequantize().")


def continuous(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point or complex numbers, by which torch can differentiate."""
    return tensor.is_floating_point() or tensor.is_complex()


def _check_finite(tensor: Tensor) -> None:
    if not continuous(tensor):
        return
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    num_nan, num_bad = int(torch.isnan(tensor).sum()), int((~finite).sum())
    where = tuple(int(i) for i in torch.nonzero(~finite)[0])
    raise ValueError(
        f"x holds {num_nan} NaN and {num_bad - num_nan} Inf among {tensor.numel()} entries, the first at {where}. "
        "Remove them from the batch, because coefficients do not exist at such a point. If they belong to a mask, hold "
        "it fixed: forward=lambda model, x: model(x, mask)."
    )


def check_devices(modules: Mapping[str, nn.Module], batch: Batch) -> None:
    """Raise ValueError if a parameter or buffer lies on another device than the data."""
    device = batch.samples[0].device
    for prefix, module in modules.items():
        if not (module._parameters or module._buffers):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device != device:
                way = f"move one of them, for example x.to({str(tensor.device)!r})"
                if tensor.is_meta:
                    way = "a meta tensor holds no numbers, so give the model its weights first"
                raise ValueError(
                    f"x is on {device}, but {f'{prefix}.{name}'.lstrip('.')!r} of the model is on {tensor.device}: "
                    f"{way}."
                )
