"""Tensors in whatever structure a module receives or returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def leaf_tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings, dataclasses and what torch knows besides, in their order."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from leaf_tensors(getattr(leaf, field.name, None))
