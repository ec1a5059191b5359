"""A recorded forward pass, run again: for values of layers, and at inputs that are shifted a little."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.inputs import Batch, Forward, LossFunction, first_tensor
from gradscope.layers import LOSS, OUTPUT, numbered
from gradscope.modules import Modules, eager, state_restored, tensors, watched
from gradscope.taps import tapped


@dataclass(frozen=True)
class Rerun:
    """What it takes to run a recorded forward pass again: the same buffers, random state and dropout masks."""

    model: nn.Module
    batch: Batch
    forward: Forward | None
    loss_fn: LossFunction | None
    source_names: tuple[str, ...]

    @cached_property
    def modules(self) -> Modules:
        """Every module by its name."""
        return dict(self.model.named_modules())

    def outputs(self, wanted: Collection[str], shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of those names from one forward pass without gradients, with ``shifts`` added to the sources."""
        listener = _Listener(set(wanted), shifts)
        names = self.source_names[: len(self.batch.floats)]
        batch = self.batch.shifted([shifts.get(name, 0.0) for name in names])
        with (
            torch.no_grad(),
            state_restored(self.modules),
            eager(self.modules),
            tapped(listener),
            watched(self.modules, listener),
        ):
            for name, tensor in zip(names, batch.floats, strict=True):
                listener.keep(name, tensor)
            output = first_tensor(batch.run(self.model, self.forward))
            listener.keep(OUTPUT, output)
            if self.loss_fn is not None:
                listener.keep(LOSS, self.loss_fn(output, batch.labels))
        return listener.kept


class _Listener:
    """Keeps what modules return under the wanted names, and shifts what embeddings return."""

    def __init__(self, wanted: set[str], shifts: Mapping[str, Tensor]) -> None:
        self.wanted, self.shifts = wanted, shifts
        self.kept: dict[str, Tensor] = {}

    def before(self, args: Any, kwargs: Any) -> None:
        return None

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: None) -> Any:
        shifted = None
        if label in self.shifts and isinstance(output, Tensor):
            shifted = output = output + self.shifts[label]
        if name:
            for number, tensor in enumerate(t for t in tensors((output,), {}) if t.is_floating_point()):
                self.keep(numbered(label, number), tensor)
        return shifted

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        self.keep(name, tensor)
        return tensor

    def keep(self, name: str, tensor: Tensor) -> None:
        if name in self.wanted and name not in self.kept:
            self.kept[name] = tensor.detach().clone()  # a later operation may overwrite it
