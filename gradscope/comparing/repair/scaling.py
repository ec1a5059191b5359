"""Multiply parameters for a while, and restore them bit for bit, also under Ctrl-C."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from gradscope.forward.interrupts import interruptible


class rescaled(interruptible):  # noqa: N801 - used like a function, as the context managers of torch are
    """Context in which ``set`` multiplies parameters; afterwards they are as before.

    Memory: a copy of the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters

    def set(self, names: Collection[str], factor: float) -> None:
        """Make the named parameters ``factor`` times their values before."""
        multiplied({name: self.parameters[name] for name in names}, self.saved, factor)

    def _keep(self) -> None:
        self.saved = copies(self.parameters)

    def _restore(self, kind: type[BaseException] | None) -> None:
        restored(self.parameters, self.saved)


def copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each parameter."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def multiplied(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor], factor: float) -> None:
    """Write ``factor`` times the saved values into the parameters; by .data, so that graphs of the user stay valid."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.data.copy_(saved[name] * factor)


def restored(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Write the saved values back."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.data.copy_(saved[name])
