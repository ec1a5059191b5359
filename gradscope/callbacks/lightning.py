"""``Trainer(callbacks=[MonitorCallback(data, every=100)])`` for Lightning; needs the extra ``lightning``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from gradscope.monitor.monitor import Monitor


class MonitorCallback(Callback):
    """Runs a `gradscope.Monitor` on the LightningModule, with one step of the monitor per update of the weights.

    The monitor sees accumulated, unscaled gradients before clipping.  With several optimizers (manual optimization),
    each update by any optimizer is a step of the monitor.

    Arguments:
        data: The probe batch for the module's ``forward``; it is converted to the Trainer's precision and moved to the
            module's device, as the Trainer does with its own batches.
        options: Options of `gradscope.Monitor`.  By default, ``total_steps`` is that of the Trainer.

    The numbers of each record go to the Trainer's loggers, with ``trainer.global_step`` as their step, and to the
    ``sinks`` among the options.  An error of a logger in such a call only causes a warning.

    The monitor's own passes run in the Trainer's precision, and nothing that the module logs in them is kept.
    ``monitor`` exists once training begins; its steps and alarms are saved in Lightning's checkpoints.
    """

    monitor: Monitor

    def __init__(self, data: Any, **options: Any) -> None:
        self.data, self.options = data, options
        self._loss: Tensor | None = None
        self._batch: Any = None
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the monitor here, because the module is now on its device and its weights are loaded."""
        data = move_data_to_device(trainer.precision_plugin.convert_input(self.data), pl_module.device)
        total = trainer.estimated_stepping_batches
        options = {"total_steps": int(total) if 0 < total < math.inf else None} | self.options
        options["sinks"] = [*options.get("sinks", ()), *trainer.loggers]
        self.monitor = Monitor(pl_module, data, **options)
        if self._state is not None:
            self.monitor.load_state_dict(self._state)
        else:
            self.monitor.steps = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, so that the monitor can trace a loss that is not finite."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Sum the losses of accumulated batches; Lightning has divided each loss by the number of batches."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Call the monitor's `step`, because the gradients are complete and the weights are not yet updated."""
        loss, self._loss = self._loss, None
        with trainer.precision_plugin.train_step_context(), _unlogged(trainer, pl_module):
            self.monitor.step(loss, self._batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the monitor."""
        with trainer.precision_plugin.train_step_context(), _unlogged(trainer, pl_module):
            self.monitor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the sinks."""
        if hasattr(self, "monitor"):
            self.monitor.close(exception)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state for Lightning's checkpoint."""
        return self.monitor.state_dict() if hasattr(self, "monitor") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state from Lightning's checkpoint until training begins."""
        self._state = state_dict or None


@contextlib.contextmanager
def _unlogged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Ignore what the module logs, because passes of the monitor are no steps of training."""
    modules = [module for module in pl_module.modules() if isinstance(module, LightningModule)]
    own, loggers = [vars(module).get("log") for module in modules], trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        for module in modules:
            vars(module)["log"] = lambda *_, **__: None  # log_dict calls it too
        yield
    finally:
        trainer.loggers = loggers
        for module, log in zip(modules, own, strict=True):
            vars(module).pop("log")
            vars(module).update({} if log is None else {"log": log})
