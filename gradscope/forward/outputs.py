"""Find the tensors in what a model returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from gradscope.forward.inputs import continuous


def picked(output: Any) -> str | None:
    """A sentence that says which part of a structured output is measured; None if the output is one tensor."""
    if isinstance(output, Tensor):
        return None
    if isinstance(getattr(output, "logits", None), Tensor):
        return f"The model returned {type(output).__name__}; its .logits is measured."
    first, entries = first_tensor(output), output.items() if isinstance(output, Mapping) else ()
    where = next((f", {key!r}," for key, value in entries if value is first), "")
    return f"The model returned {type(output).__name__}; its first floating-point tensor{where} is measured."


def first_tensor(output: Any) -> Tensor:
    """``output.logits`` if it exists, else the first floating-point tensor with entries; TypeError if there is none."""
    logits = getattr(output, "logits", None)
    for tensor in (logits,) if isinstance(logits, Tensor) else leaf_tensors(output):
        if continuous(tensor) and tensor.numel():
            return tensor
    raise TypeError(
        f"The model returned {type(output).__name__} without a floating-point tensor that has entries; "
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
