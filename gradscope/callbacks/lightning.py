"""``Trainer(callbacks=[MonitorCallback(x, every=100)])`` for Lightning; the extra ``lightning``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from gradscope.monitor.monitor import Monitor


class MonitorCallback(Callback):
    """A `gradscope.Monitor` of the LightningModule, one step an update.

    Gradients are accumulated, unscaled, and not yet clipped.  With several optimizers (manual optimization) the update
    of each is a step of its own, so ``every`` counts all of them.

    Arguments:
        x: The probe batch, handed to the module's ``forward``; it is moved to the module's device.
        options: Those of `gradscope.Monitor`.

    ``monitor`` is there once training begins; its steps and alarms travel with Lightning's checkpoints.
    """

    monitor: Monitor

    def __init__(self, x: Any, **options: Any) -> None:
        self.x, self.options = x, options
        self._loss: Tensor | None = None
        self._batch: Any = None
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is on its device, and its weights are loaded."""
        self.monitor = Monitor(pl_module, move_data_to_device(self.x, pl_module.device), **self.options)
        if self._state is not None:
            self.monitor.load_state_dict(self._state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What a loss that is not finite is looked into with."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Lightning divides the loss by the number of accumulated batches, so their sum is the loss of the update."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are complete, and the update is not made yet."""
        loss, self._loss = self._loss, None
        self.monitor.step(loss, self._batch)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return self.monitor.state_dict() if hasattr(self, "monitor") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        self._state = state_dict or None
