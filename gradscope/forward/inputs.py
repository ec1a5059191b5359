"""What the user hands over as data: checked, and made differentiable without touching the original."""

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
    """One batch: what goes into the model, and the labels where a loss is measured."""

    inputs: Any
    labels: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        """All input tensors, in the order of the structure that holds them."""
        return list(leaf_tensors(self.inputs))

    @property
    def floats(self) -> list[Tensor]:
        """The input tensors that can be differentiated by."""
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
        """A copy whose floating-point tensors are clones of leaves, which a model may overwrite, and those tensors."""
        sources: list[Tensor] = []

        def follow(leaf: Tensor) -> Tensor:
            sources.append(leaf.detach().requires_grad_().clone())
            return sources[-1]

        return self._mapped(follow), sources

    def shifted(self, shifts: Sequence[Tensor | float]) -> Batch:
        """A copy with something added to each floating-point tensor, in their order."""
        remaining = iter(shifts)
        return self._mapped(lambda leaf: leaf.detach() + next(remaining))

    def _mapped(self, follow: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with every floating-point tensor replaced."""

        def each(leaf: Any) -> Any:
            return follow(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return replace(self, inputs=pytree.tree_map(each, self.inputs))


def stream(data: Any, *, forward: Forward | None, loss_fn: LossFunction | None) -> Iterator[Any] | None:
    """The batches of a loader, list or iterator, one by one; None where ``data`` is itself one batch.

    With ``forward``, tuples and lists are batches, for only the user knows their structure.  Without ``loss_fn`` the
    labels of pairs are left aside.
    """
    if isinstance(data, (Tensor, Mapping, tuple)) or not isinstance(data, Iterable):
        return None
    if isinstance(data, list) and (forward is not None or _is_pair(data)):
        return None
    if forward is not None or loss_fn is not None:
        return iter(data)
    return (batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch for batch in data)


def _is_pair(batch: Any) -> bool:
    """Whether this looks like (inputs, labels) rather than two batches."""
    if len(batch) != 2 or not isinstance(batch[1], Tensor):
        return False
    inputs, labels = batch
    return not isinstance(inputs, Tensor) or inputs.ndim != labels.ndim or inputs.dtype != labels.dtype


def as_batch(data: Any, *, forward: Forward | None, loss_fn: LossFunction | None) -> Batch:
    """Read ``data`` as one batch: a tensor, a mapping, a pair (x, y) with ``loss_fn``, anything with ``forward``.

    Raises TypeError for any other structure, and ValueError if it is empty or not finite.
    """
    labels = None
    if loss_fn is not None:
        if not (isinstance(data, (tuple, list)) and len(data) == 2):
            raise TypeError(f"With loss_fn, data is a pair (inputs, labels); got {type(data).__name__}.")
        data, labels = data
    if forward is None and loss_fn is None and isinstance(data, (tuple, list)) and len(data) == 2:
        raise ValueError(
            "data is a pair (inputs, labels), but without loss_fn= the labels would be ignored: give loss_fn=, or the "
            "inputs alone; for two inputs give forward=, a function (model, batch) -> tensor."
        )
    if forward is None and not isinstance(data, (Tensor, Mapping)):
        hint = "; a stream of batches is measured one batch at a time" if isinstance(data, Iterator) else ""
        raise TypeError(
            f"data is a tensor, or a mapping that becomes model(**batch); got {type(data).__name__}{hint}. "
            "For anything else give forward=, a function (model, batch) -> tensor."
        )
    # Mappings other than dict (a tokenizer's output) are no structure that torch walks through.
    batch = Batch(dict(data) if isinstance(data, Mapping) else data, labels)
    if not batch.tensors:
        raise ValueError("data holds no tensor, so there is nothing to measure at.")
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
        f"x holds {num_nan} NaN and {num_bad - num_nan} Inf among {tensor.numel()} entries, the first at {where}; "
        "clean the batch first, for a coefficient at such a point does not exist."
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
    """In words, which part of a structured output `first_tensor` measures; None where the output is one tensor."""
    if isinstance(output, Tensor):
        return None
    which = "its .logits" if isinstance(getattr(output, "logits", None), Tensor) else "its first floating-point tensor"
    return f"The model returned {type(output).__name__}; {which} is what is measured."


def first_tensor(output: Any) -> Tensor:
    """``output.logits`` where it exists, else the first floating-point tensor; TypeError if there is none."""
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
    """All tensors in nested tuples, lists, mappings, dataclasses and what torch knows besides, in their order."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from leaf_tensors(getattr(leaf, field.name, None))
