"""``tap`` marks a tensor inside a model's own code; whoever is running the model hears of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class TapListener(Protocol):
    """What is told of every marked tensor."""

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        """Called with the tensor; what it returns takes its place."""


_listener: ContextVar[tuple[TapListener, Counter[str]] | None] = ContextVar("gradscope_tap_listener", default=None)


def tap(tensor: Tensor, name: str) -> Tensor:
    """Mark a tensor inside a ``forward`` as a layer of its own, ``name``; returns the tensor itself.

    For functional code that no module computes.  Further tensors of that name in one forward pass are ``name#2``,
    ``name#3``.  Outside a measurement it does nothing, so it can stay in the model.
    """
    listening = _listener.get()
    if listening is None:
        return tensor
    listener, calls = listening
    calls[name] += 1
    return listener.tap(tensor, name if calls[name] == 1 else f"{name}#{calls[name]}")


@contextlib.contextmanager
def tapped(listener: TapListener) -> Iterator[None]:
    """Tell ``listener`` of every marked tensor."""
    token = _listener.set((listener, Counter()))
    try:
        yield
    finally:
        _listener.reset(token)
