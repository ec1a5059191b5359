"""``Trainer(callbacks=[MonitorCallback(x, every=100)])`` for Hugging Face; the extra ``transformers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradscope.monitor.monitor import Monitor

NO_LOSS = (
    "The model returned no loss (label_smoothing_factor or compute_loss_func?), so the monitor looks at gradients only."
)


class MonitorCallback(TrainerCallback):
    """A `gradscope.Monitor` of the Trainer's model, one step an update.

    Gradients are those after ``max_grad_norm``: the Trainer clips them before it tells anyone.

    Arguments:
        x: The probe batch, a mapping without labels (``{"input_ids": ...}``), moved to the model's device.
        options: Those of `gradscope.Monitor`.

    The loss is read off what the model returns, for the Trainer's own logs leave out losses that are not finite.  With
    ``label_smoothing_factor`` or ``compute_loss_func`` the model returns none; then there is a warning, and only
    gradients are looked at.  ``monitor`` is there once training begins.
    """

    monitor: Monitor

    def __init__(self, x: Mapping[str, Tensor], **options: Any) -> None:
        self.x, self.options = x, options
        self._losses: list[Tensor] = []
        self._batch: dict[str, Any] | None = None
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model is on its device."""
        x = pytree.tree_map(lambda leaf: leaf.to(args.device) if isinstance(leaf, Tensor) else leaf, dict(self.x))
        self.monitor = Monitor(kwargs["model"], x, **self.options)
        self._remove()  # that of a run that ended in an error of its own
        self._hook = self.monitor.model.register_forward_hook(self._listen, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are complete, and the update is not made yet."""
        loss = sum(self._losses[1:], self._losses[0]) / len(self._losses) if self._losses else None
        try:
            if loss is None:
                self.monitor.alarms.once("no loss", "loss", self.monitor.steps, NO_LOSS)
            self.monitor.step(loss, self._batch)
        except BaseException:  # the Trainer calls nobody after an error
            self._remove()
            raise
        self._losses = []  # also those of a second pass of the monitor

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model is left without hooks."""
        self._remove()

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _listen(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not module.training:
            return
        # A number beside the batch, like num_items_in_batch, has no samples.
        self._batch = {key: value for key, value in kwargs.items() if isinstance(value, Tensor) and value.ndim}
        if isinstance(output, Mapping) and (loss := output.get("loss")) is not None:
            self._losses.append(loss.detach())
