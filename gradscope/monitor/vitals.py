"""What the monitor looks at in every step: the loss, and whether the gradient is finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LATE = 50  # steps that may wait for a look, where a look waits for the device


@dataclass(frozen=True)
class Vital:
    """The loss of one step, and the length of its whole gradient, None where there is none.

    The length is taken in the gradient's own precision, so one that is not finite may also have overflowed.
    """

    step: int
    loss: float | None
    gradient: float | None


class Vitals:
    """Keeps both of every step where they are, and reads them together.

    ``every``: steps between two looks; None: each on a CPU, where a look is free, and `LATE` elsewhere.

    Cost: one read of all gradients a step, and where it is read one synchronization for each device and precision.

    Raises:
        ValueError: ``every`` is no whole number >= 1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], every: int | None) -> None:
        if every is not None and not (isinstance(every, int) and not isinstance(every, bool) and every >= 1):
            raise ValueError(f"monitor.check_every must be a whole number >= 1 or None, got {every!r}.")
        self.parameters, self.every = list(parameters), every
        self._pending: list[tuple[int, Tensor | None, Tensor | None]] = []

    def keep(self, step: int, loss: Tensor | float | None) -> None:
        """The loss of this step, and the gradients in ``.grad``; without a wait for the device."""
        kept = None if loss is None else torch.as_tensor(loss).detach().reshape(())
        gradients = [g.coalesce().values() if g.is_sparse else g for g in self.gradients()]
        length = torch.nn.utils.get_total_norm(gradients) if gradients else None
        if kept is not None or length is not None:
            self._pending.append((step, kept, length))

    def gradients(self) -> list[Tensor]:
        """Those in ``.grad``."""
        return [p.grad.detach() for p in self.parameters if p.grad is not None]

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        if not self._pending:
            return False
        free = all(t.device.type == "cpu" for t in self._pending[-1][1:] if t is not None)
        return len(self._pending) >= (self.every or (1 if free else LATE))

    def read(self) -> list[Vital]:
        """All since the last time."""
        pending, self._pending = self._pending, []
        numbers = _together([t for _, *both in pending for t in both if t is not None])
        return [
            Vital(step, *(None if t is None else numbers.pop(0) for t in (loss, length)))
            for step, loss, length in pending
        ]


def _together(values: list[Tensor]) -> list[float]:
    """Numbers in their order; those of one device and dtype are read at once."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        kinds[value.device, value.dtype].append(place)
    numbers = [0.0] * len(values)
    for places in kinds.values():
        for place, number in zip(places, torch.stack([values[place] for place in places]).tolist(), strict=True):
            numbers[place] = number
    return numbers
