"""Loss and gradient norm of every step; the values of several steps are read from the device together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscope.distributed import alike, is_shard, local, mean_of_ranks, of_all_parts

LATE = 50  # steps between two reads if a read has to wait for the device


@dataclass(frozen=True)
class Vital:
    """Loss and gradient norm of one step, None if missing; the norm may overflow in the gradients' precision."""

    step: int
    loss: float | None
    gradient: float | None


class Vitals:
    """Keeps loss and gradient norm of every step on the device, and reads the values of several steps together.

    If parameters are sharded, the norm is that of all shards, and the loss is the mean over the processes.

    ``every``: steps between two reads.  None: every step on a CPU, `LATE` steps elsewhere.

    Parameters are looked up at every step, because layers may be added or replaced during training.

    Cost: one pass over all gradients per step, and per read one synchronization for each device and precision.
    """

    def __init__(self, model: nn.Module, every: int | None) -> None:
        if every is not None and not (isinstance(every, int) and not isinstance(every, bool) and every >= 1):
            raise ValueError(f"check_every must be a whole number >= 1 or None, got {every!r}.")
        self.model, self.every = model, every
        self._pending: list[tuple[int, Tensor | None, Tensor | None]] = []

    def keep(self, step: int, loss: Tensor | float | None) -> None:
        """Keep the loss of this step and the norm of the gradients in ``.grad``, without waiting for the device."""
        kept = None if loss is None else torch.as_tensor(loss).detach()
        if kept is not None and (kept.numel() != 1 or kept.is_meta):
            raise ValueError(
                f"step needs one loss, the number that is differentiated; got shape {tuple(kept.shape)} "
                f"on {kept.device}: give losses.mean()."
            )
        parameters = list(self.model.parameters())
        if kept is not None and any(map(is_shard, parameters)):  # all processes must decide alike what happens next
            kept = mean_of_ranks(kept.to(parameters[0].device))
        length = total_norm(self.gradients())
        if kept is not None or length is not None:
            self._pending.append((step, None if kept is None else kept.reshape(()), length))

    def gradients(self) -> list[Tensor]:
        """Return the gradients in ``.grad``."""
        return [p.grad.detach() for p in self.model.parameters() if p.grad is not None]

    @property
    def due(self) -> bool:
        """Whether a read is scheduled."""
        if not self._pending:
            return False
        free = all(t.device.type == "cpu" for t in self._pending[-1][1:] if t is not None)
        return len(self._pending) >= (self.every or (1 if free else LATE))

    def read(self) -> list[Vital]:
        """Return loss and gradient norm of every step since the last read."""
        pending, self._pending = self._pending, []
        numbers = _together([t for _, *both in pending for t in both if t is not None])
        return [
            Vital(step, *(None if t is None else numbers.pop(0) for t in (loss, length)))
            for step, loss, length in pending
        ]


def _together(values: list[Tensor]) -> list[float]:
    """Return the numbers in order; numbers of the same device and dtype are read together."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        kinds[value.device, value.dtype].append(place)
    numbers = [0.0] * len(values)
    for places in kinds.values():
        for place, number in zip(places, torch.stack([values[place] for place in places]).tolist(), strict=True):
            numbers[place] = number
    return numbers


def total_norm(gradients: Sequence[Tensor]) -> Tensor | None:
    """The norm of all gradients as one vector, also of those that are distributed; None if there is none."""
    norms = []
    for group in alike(gradients):
        parts = [g.coalesce().values() if g.is_sparse else local(g) for g in group]
        norms.append(of_all_parts(torch.nn.utils.get_total_norm(parts), group[0], "norm"))
    return torch.nn.utils.get_total_norm(norms) if norms[1:] else norms[0] if norms else None
