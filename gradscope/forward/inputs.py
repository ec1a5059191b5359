"""Check the data that a user passes in, and make differentiable copies of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Forward = Callable[[nn.Module, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch: the inputs of the model, and the labels if a loss is measured."""

    inputs: Any
    labels: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        """All input tensors, in the order of the structure that holds them."""
        return list(leaf_tensors(self.inputs))

    @property
    def floats(self) -> list[Tensor]:
        """The floating-point input tensors."""
        return [tensor for tensor in self.tensors if tensor.is_floating_point()]

    @property
    def size(self) -> int:
        """Number of samples: the leading dimension of the first tensor."""
        return self.tensors[0].shape[0]

    def run(self, model: nn.Module, forward: Forward | None) -> Any:
        """``forward(model, inputs)``, or ``model(**inputs)`` for a mapping, or ``model(inputs)``."""
        if forward is not None:
            return forward(model, self.inputs)
        return model(**self.inputs) if isinstance(self.inputs, Mapping) else model(self.inputs)

    def differentiable(self) -> tuple[Batch, list[Tensor]]:
        """A copy of the batch and its floating-point tensors: clones of leaves, so that a model may overwrite them."""
        sources: list[Tensor] = []

        def follow(leaf: Tensor) -> Tensor:
            sources.append(leaf.detach().requires_grad_().clone())
            return sources[-1]

        return self._mapped(follow), sources

    def shifted(self, shifts: Sequence[Tensor | float]) -> Batch:
        """A copy of the batch in which ``shifts`` are added to the floating-point tensors, in the order of `floats`."""
        remaining = iter(shifts)
        return self._mapped(lambda leaf: leaf.detach() + next(remaining))

    def _mapped(self, follow: Callable[[Tensor], Tensor]) -> Batch:
        """A copy of the batch in which ``follow`` has replaced every floating-point tensor."""

        def each(leaf: Any) -> Any:
            return follow(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return replace(self, inputs=pytree.tree_map(each, self.inputs))


def stream(data: Any, *, forward: Forward | None, loss_fn: LossFunction | None) -> Iterator[Any] | None:
    """An iterator over the batches of a loader, list or iterator; None if ``data`` is itself one batch.

    With ``forward``, a tuple or list is one batch, because only the user knows its structure.  Without ``loss_fn``,
    labels in pairs (inputs, labels) are ignored.
    """
    if isinstance(data, (Tensor, Mapping, tuple)) or not isinstance(data, Iterable):
        return None
    if isinstance(data, list) and (forward is not None or _is_pair(data)):
        return None
    if forward is not None or loss_fn is not None:
        return iter(data)
    return (batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch for batch in data)


def _is_pair(batch: Any) -> bool:
    """Whether ``batch`` looks like a pair (inputs, labels) rather than like two batches."""
    if len(batch) != 2 or not isinstance(batch[1], Tensor):
        return False
    inputs, labels = batch
    return not isinstance(inputs, Tensor) or inputs.ndim != labels.ndim or inputs.dtype != labels.dtype


def as_batch(data: Any, *, forward: Forward | None, loss_fn: LossFunction | None) -> Batch:
    """Read ``data`` as one batch: a tensor, a mapping, a pair (x, y) with ``loss_fn``, anything with ``forward``.

    Raises TypeError for any other structure, and ValueError if the data are empty or not finite.
    """
    labels = None
    if loss_fn is not None:
        if not (isinstance(data, (tuple, list)) and len(data) == 2):
            raise TypeError(f"With loss_fn, data must be a pair (inputs, labels); got {type(data).__name__}.")
        data, labels = data
    if forward is None and loss_fn is None and isinstance(data, (tuple, list)) and len(data) == 2:
        raise ValueError(
            "data is a pair (inputs, labels), but without loss_fn= the labels would be ignored: give loss_fn= or only "
            "the inputs. If both are inputs, give forward=, a function (model, batch) -> tensor."
        )
    if forward is None and not isinstance(data, (Tensor, Mapping)):
        hint = "; give the batches of an iterator one at a time" if isinstance(data, Iterator) else ""
        raise TypeError(
            f"data must be a tensor, or a mapping for model(**batch); got {type(data).__name__}{hint}. "
            "For anything else give forward=, a function (model, batch) -> tensor."
        )
    # torch looks for tensors inside a dict, but not inside other mappings such as a tokenizer's output.
    batch = Batch(dict(data) if isinstance(data, Mapping) else data, labels)
    if not batch.tensors:
        raise ValueError("data contains no tensor, so there is nothing to measure.")
    for tensor in batch.tensors:
        if tensor.ndim == 0 or tensor.shape[0] == 0:
            raise ValueError(
                f"The batch is empty: data has a tensor of shape {tuple(tensor.shape)}; give at least one sample."
            )
        _check_finite(tensor)
    return batch


def _check_finite(tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    num_nan, num_bad = int(torch.isnan(tensor).sum()), int((~finite).sum())
    where = tuple(int(i) for i in torch.nonzero(~finite)[0])
    raise ValueError(
        f"x holds {num_nan} NaN and {num_bad - num_nan} Inf among {tensor.numel()} entries, the first at {where}. "
        "Remove them from the batch, because coefficients do not exist at such a point."
    )


def check_devices(modules: Mapping[str, nn.Module], batch: Batch) -> None:
    """Raise ValueError if a parameter or buffer lies on another device than the data."""
    device = batch.tensors[0].device
    for prefix, module in modules.items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device != device:
                raise ValueError(
                    f"x is on {device}, but {f'{prefix}.{name}'.lstrip('.')!r} of the model is on {tensor.device}: "
                    f"move one of them, for example x.to({str(tensor.device)!r})."
                )


def picked(output: Any) -> str | None:
    """A sentence that says which part of a structured output is measured; None if the output is one tensor."""
    if isinstance(output, Tensor):
        return None
    which = "its .logits" if isinstance(getattr(output, "logits", None), Tensor) else "its first floating-point tensor"
    return f"The model returned {type(output).__name__}; {which} is measured."


def first_tensor(output: Any) -> Tensor:
    """``output.logits`` if it exists, else the first floating-point tensor; TypeError if there is none."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    for tensor in leaf_tensors(output):
        if tensor.is_floating_point():
            return tensor
    raise TypeError(
        f"The model returned {type(output).__name__} without a floating-point tensor; "
        "give forward=, a function (model, batch) -> tensor, that picks the output to measure."
    )


def leaf_tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings, dataclasses and other structures of torch's pytree, in order."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from leaf_tensors(getattr(leaf, field.name, None))
