"""``tap`` marks a tensor inside a model's own code; a running measurement then records it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class TapListener(Protocol):
    """Receives every marked tensor."""

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        """Called with the tensor; the return value takes its place."""


_listener: ContextVar[tuple[TapListener, Counter[str]] | None] = ContextVar("gradscope_tap_listener", default=None)


def tap(tensor: Tensor, name: str) -> Tensor:
    """Mark a tensor inside a ``forward`` as a layer called ``name``; returns the tensor itself.

    For functional code outside modules.  Further tensors of that name in one forward pass are ``name#2``, ``name#3``.
    Outside a measurement it does nothing, so it can stay in the model.

    >>> import torch, gradscope as gs
    >>> class Square(torch.nn.Module):
    ...     def forward(self, x):
    ...         return gs.tap(x * x, "square").sum(1)
    >>> [layer.name for layer in gs.capture(Square(), torch.ones(2, 3)).layers]
    ['input', 'square', 'output']
    """
    listening = _listener.get()
    if listening is None:
        return tensor
    listener, calls = listening
    calls[name] += 1
    return listener.tap(tensor, name if calls[name] == 1 else f"{name}#{calls[name]}")


@contextlib.contextmanager
def tapped(listener: TapListener) -> Iterator[None]:
    """Report every marked tensor to ``listener``."""
    token = _listener.set((listener, Counter()))
    try:
        yield
    finally:
        _listener.reset(token)
