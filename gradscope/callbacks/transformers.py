"""``Trainer(callbacks=[MonitorCallback(data, every=100)])`` for Hugging Face; needs the extra ``transformers``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import TrainerCallback, TrainingArguments

from gradscope.monitor.monitor import Monitor

NO_LOSS = (
    "The model returned no loss (is label_smoothing_factor or compute_loss_func set?): only gradients are checked."
)


class MonitorCallback(TrainerCallback):
    """Runs a `gradscope.Monitor` on the Trainer's model, with one step of the monitor per update of the weights.

    The monitor sees gradients after ``max_grad_norm``, because the Trainer clips before it runs callbacks.

    Arguments:
        data: The probe batch without labels: a tensor of token ids (or what else is the model's first argument), or a
            mapping (``{"input_ids": ..., "attention_mask": ...}``); it is moved to the model's device.
        options: Options of `gradscope.Monitor`.  By default, ``total_steps`` is that of the Trainer.

    The numbers of each record go to ``trainer.state.log_history`` and to the ``sinks`` among the options.  A callback
    does not know its Trainer: set ``callback.log = trainer.log`` to send them to the trackers of ``report_to`` too.

    The loss is taken from the model's output, because the Trainer's logs omit losses that are not finite.  With
    ``label_smoothing_factor`` or ``compute_loss_func`` the model returns no loss; the monitor then warns and checks
    only gradients.  ``monitor`` exists once training begins.
    """

    monitor: Monitor
    log: Callable[[dict[str, float]], None] | None = None

    def __init__(self, data: Tensor | Mapping[str, Tensor], **options: Any) -> None:
        self.data, self.options = dict(data) if isinstance(data, Mapping) else data, options
        self._losses: list[Tensor] = []
        self._batch: dict[str, Any] | None = None
        self._hook: Any = None
        self._measuring = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the monitor here, because the model is now on its device."""
        data = pytree.tree_map(lambda leaf: leaf.to(args.device) if isinstance(leaf, Tensor) else leaf, self.data)
        options: dict[str, Any] = {"total_steps": state.max_steps if state.max_steps > 0 else None} | self.options
        options["sinks"] = [*options.get("sinks", ()), _History(self, state)]
        self.monitor = Monitor(kwargs["model"], data, **options)
        self.monitor.steps = state.global_step
        self._remove()  # the hook of an earlier run, if that run ended in an error
        self._hook = self.monitor.model.register_forward_hook(self._listen, with_kwargs=True)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the monitor's `step`, because the gradients are complete and the weights are not yet updated."""
        loss = sum(self._losses[1:], self._losses[0]) / len(self._losses) if self._losses else None
        self._losses, self._measuring = [], True
        try:
            if loss is None:
                self.monitor.alarms.once("no loss", "loss", self.monitor.steps, NO_LOSS)
            self.monitor.step(loss, self._batch)
        except BaseException as error:  # Trainer runs no callbacks after an exception
            self._remove()
            self.monitor.close(error)
            raise
        finally:
            self._measuring = False

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hook and close the monitor."""
        self._remove()
        self.monitor.close()

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _listen(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not module.training or self._measuring:
            return
        # Scalars such as num_items_in_batch are not part of the batch.
        self._batch = {key: value for key, value in kwargs.items() if isinstance(value, Tensor) and value.ndim}
        # Without a mapping (``return_dict=False``), the loss is the first output, and a scalar.
        first = output[0] if isinstance(output, (tuple, list)) and output else None
        loss = output.get("loss") if isinstance(output, Mapping) else first
        if isinstance(loss, Tensor) and (loss.ndim == 0 or isinstance(output, Mapping)):
            self._losses.append(loss.detach())


class _History:
    """A sink that writes to the log of the Trainer."""

    def __init__(self, callback: MonitorCallback, state: Any) -> None:
        self.callback, self.state = callback, state

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.callback.log is not None:
            self.callback.log(dict(values))
        else:
            self.state.log_history.append({**values, "epoch": self.state.epoch, "step": step})
