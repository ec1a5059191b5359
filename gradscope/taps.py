"""``tap`` marks a tensor inside a model's own code; whoever is running the model hears of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class TapListener(Protocol):
    """What is told of every marked tensor."""

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        """Called with the tensor; what it returns takes its place."""


_listener: ContextVar[TapListener | None] = ContextVar("gradscope_tap_listener", default=None)


def tap(tensor: Tensor, name: str) -> Tensor:
    """Mark a tensor inside a ``forward`` as a layer of its own, ``name``; returns the tensor itself.

    For functional code that no module computes.  Outside a measurement it does nothing, so it can stay in the model.
    """
    listener = _listener.get()
    return tensor if listener is None else listener.tap(tensor, name)


@contextlib.contextmanager
def tapped(listener: TapListener) -> Iterator[None]:
    """Tell ``listener`` of every marked tensor."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
