"""``Monitor``: the same measurements on a schedule while a model trains, and a warning that names the layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscope.alarms import RECENT, Alarms
from gradscope.coefficients import gsc
from gradscope.inputs import Forward, LossFunction, as_batch
from gradscope.measures import DeadFraction, PreactivationStd, SignDiversity
from gradscope.measuring import Measure, measure
from gradscope.modules import unwrap
from gradscope.nonfinite import first_nonfinite
from gradscope.pairs import ZeroOutputError
from gradscope.planning import Probes
from gradscope.preactivations import NONLINEARITIES
from gradscope.schedule import Every, Schedule
from gradscope.weights import Weights

STATISTICS: tuple[Measure, ...] = (PreactivationStd(), SignDiversity(), DeadFraction())
MOST_PROBES = 4
GSC, CHEAP = "every", "statistics_every"  # the two kinds of record, by the argument that says how often


class NonFiniteError(FloatingPointError):
    """The loss became NaN or Inf; the message names the first layer, and the direction, that made it so."""


class Monitor:
    """Watch a model while it trains.

        with gs.Monitor(model, x, every=100) as monitor:
            for inputs, labels in loader:
                ...                                       # forward and backward
                monitor.step(loss, (inputs, labels))      # before the update, while weights are those of the loss
                optimizer.step()

    On its schedule it measures, on the fixed probe batch ``x`` and with the same probe vectors each time, so that
    curves are comparable: GSC of every unit (squared convention), statistics of pre-activations where nonlinearities
    are modules, and what `gradscope.weights.Weights` says of every layer's weights, gradients (those in ``.grad``, of
    the training batch) and updates.  Coefficients are measured in the parameters' own precision; statistics of
    pre-activations as the network runs where `step` is called, so inside ``torch.autocast`` in its precision.

    Arguments:
        model: What is trained; wrappers of ``torch.compile`` and data parallelism are taken off for measuring.
        x: The probe batch, as for `gradscope.gsc`; some 32 samples.
        every: Steps between two records; or "log", at steps 0, 1, 2, 4, 8, and so on.
        statistics_every: Steps between records of everything but GSC, for a small part of the cost; default: only
            together with GSC.
        probes: Random vectors a measurement, at most 4, or "exact".
        layers, forward: As for `gradscope.gsc`.
        max_overhead: The part of the time since the monitor began that measuring may take; where a record that is due
            would exceed it, it is left out.  None: never left out.
        loss_fn: ``(output, labels) -> losses``, by which a loss that is not finite is traced with the batch of `step`.
        on_nonfinite: "raise" a `NonFiniteError`, or "warn" and go on; records then lack what is not finite, and the
            coefficients of a network that is so dead that its output is zero.
        save_to: Folder for the batch and the model's state (``nonfinite.pt``) at the first loss that is not finite.
        report: Called with the frame of each record as soon as it is taken.

    Warnings (`MonitorWarning`) come at a loss of more than 5 times the recent median, weights 10 times as long as at
    the beginning, coefficients beyond 10^6 or below 10^-6, and layers of which 90 % of the units are dead; each once,
    and listed with its step in ``alarms.fired``.

    With gradient accumulation, call `step` once an update.  With a gradient scaler, call ``scaler.unscale_(optimizer)``
    before it, for the monitor reads ``.grad`` as it is.  Under ``torch.distributed`` every rank gives the same ``x``
    and calls `step` alike: each measures GSC of its part of the samples, and all have the merged records.

    Raises:
        ValueError: ``every``, ``statistics_every``, ``probes``, ``max_overhead`` or ``on_nonfinite`` is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        *,
        every: Every = 100,
        statistics_every: Every | None = None,
        probes: int | str = 2,
        layers: Any = None,
        forward: Forward | None = None,
        max_overhead: float | None = 0.03,
        loss_fn: LossFunction | None = None,
        on_nonfinite: str = "raise",
        save_to: str | Path | None = None,
        report: Callable[[pd.DataFrame], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        few = isinstance(probes, int) and not isinstance(probes, bool) and 1 <= probes <= MOST_PROBES
        if not (few or probes == "exact"):
            raise ValueError(f'probes must be a whole number from 1 to {MOST_PROBES} or "exact", got {probes!r}.')
        if on_nonfinite not in ("raise", "warn"):
            raise ValueError(f'on_nonfinite must be "raise" or "warn", got {on_nonfinite!r}.')
        periods = {GSC: every} | ({CHEAP: statistics_every} if statistics_every is not None else {})
        self.schedule = Schedule(periods, max_overhead, clock)
        self.model = unwrap(model)
        self.x, self.layers, self.forward, self.loss_fn = x, layers, forward, loss_fn
        self.probes: Probes = probes
        self.on_nonfinite, self.save_to = on_nonfinite, Path(save_to) if save_to is not None else None
        self.report = report
        self.weights = Weights(self.model)
        self.alarms = Alarms(self.weights.norms())
        self.has_statistics = any(isinstance(module, NONLINEARITIES) for module in self.model.modules())
        self.steps = 0
        self._records: list[pd.DataFrame] = []
        self._pending: list[Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._read_losses()

    def step(self, loss: Tensor | float | None = None, batch: Any = None) -> bool:
        """One step of training is done: count it, and record where it is due.  Returns whether it recorded.

        ``loss`` is looked at at once on a CPU, elsewhere when a record is due or after 50 steps, so that a step does
        not wait for the device.  ``batch``, the inputs or a pair of inputs and labels, is what the culprit of a loss
        that is not finite is looked for with; on a device that is the batch of the step that looks, at weights that may
        have gone bad since.
        """
        number, self.steps = self.steps, self.steps + 1
        kind = self.schedule.due(number)
        if loss is not None:
            self._pending.append(torch.as_tensor(loss).detach())
        if self._pending and (kind or len(self._pending) >= RECENT or self._pending[-1].device.type == "cpu"):
            self._read_losses(batch)
        if kind is None or not _agreed(self.schedule.allows(kind)):
            return False
        self._record(number, kind)
        return True

    def record(self) -> None:
        """Record everything now, whatever the schedule and the budget say; at the end of training, for one."""
        self._record(self.steps, GSC)

    def to_frame(self) -> pd.DataFrame:
        """All records: the tidy frame of `gradscope.frames` with a column ``step``.

        Raises:
            ValueError: Nothing was recorded.
        """
        if not self._records:
            raise ValueError("Nothing was recorded: call step() after each step of training.")
        return pd.concat(self._records, ignore_index=True)

    @property
    def skipped(self) -> int:
        """Records that were due and left out to keep to the budget."""
        return self.schedule.skipped

    @property
    def overhead(self) -> float:
        """The part of the time since the monitor began that measuring took."""
        return self.schedule.overhead

    def state_dict(self) -> dict[str, Any]:
        """Steps and alarms so far, plain values for a checkpoint; records are kept where `report` puts them."""
        return {"steps": self.steps, "alarms": self.alarms.state_dict()}

    def load_state_dict(self, state: dict[str, Any], records: list[pd.DataFrame] | None = None) -> None:
        """Go on from what `state_dict` gave; ``records`` are those reported before that step."""
        self.steps, self._records = state["steps"], list(records or ())
        self.alarms.load_state_dict(state["alarms"])

    def _record(self, number: int, kind: str) -> None:
        begin = self.schedule.clock()
        try:
            parts = self._measured(number, kind)
        except ValueError:
            if not self._diverged(number):
                raise
            parts = []
        parts.append(self.weights.frame(number))
        frame = pd.concat(parts, ignore_index=True)
        frame.insert(0, "step", number)
        if len(frame):  # where no weight is finite, nothing is
            self._records.append(frame)
            if self.report is not None:
                self.report(frame)
            self.alarms.record(frame, number)
        self.schedule.took(kind, self.schedule.clock() - begin)

    def _measured(self, number: int, kind: str) -> list[pd.DataFrame]:
        """What is measured on the probe batch."""
        parts = []
        if kind == GSC:
            x = iter([_part(self.x, self.forward)]) if _parallel() else self.x
            # Autocast would multiply rounded Jacobians, layer after layer.
            with torch.autocast(next(self.model.parameters()).device.type, enabled=False):
                try:
                    profile = gsc(self.model, x, forward=self.forward, layers=self.layers, probes=self.probes)
                    parts.append(profile.to_frame())
                except ZeroOutputError as error:
                    if self.on_nonfinite == "raise":
                        raise
                    self.alarms.warn("zero output", "network", number, str(error).removesuffix("."))
        if self.has_statistics:
            parts.append(measure(self.model, self.x, measures=STATISTICS, forward=self.forward))
        return parts

    def _diverged(self, number: int) -> bool:
        """Whether the monitor only warns of numbers that are not finite, and there are some on the probe batch."""
        culprit = first_nonfinite(self.model, self.x, forward=self.forward) if self.on_nonfinite == "warn" else None
        if culprit is not None:
            self.alarms.nonfinite(f"The probe batch cannot be measured at step {number}: {culprit}.", number)
        return culprit is not None

    def _read_losses(self, batch: Any = None) -> None:
        """Look at the losses since the last time: one synchronization with the device for all of them."""
        if not self._pending:
            return
        values = torch.stack([loss.double().reshape(()).cpu() for loss in self._pending]).tolist()
        self._pending.clear()
        for value in values:
            if not math.isfinite(value):
                self._nonfinite(value, batch)
                return
            self.alarms.loss(value, self.steps - 1)

    def _culprit(self, batch: Any) -> str:
        """In words, what a second pass on the batch, else on the probe batch, shows."""
        remark = ""
        if batch is not None:
            inputs = batch[0] if isinstance(batch, (tuple, list)) and self.loss_fn is None else batch
            try:
                if culprit := first_nonfinite(self.model, inputs, forward=self.forward, loss_fn=self.loss_fn):
                    return str(culprit)
            except Exception as error:  # whatever goes wrong here must not hide that the loss is not finite
                remark = f"; the batch itself could not be looked into ({error})"
        culprit = first_nonfinite(self.model, self.x, forward=self.forward)
        none = "a second pass was finite, so the numbers of that step are gone"
        return (str(culprit) if culprit else none) + remark

    def _nonfinite(self, value: float, batch: Any) -> None:
        """Find the culprit, save what shows it, and raise or warn."""
        where = self._culprit(batch)
        saved = ""
        if self.save_to is not None:
            self.save_to.mkdir(parents=True, exist_ok=True)
            state = {"batch": batch, "model": self.model.state_dict(), "step": self.steps - 1}
            torch.save(state, self.save_to / "nonfinite.pt")
            saved = f" The batch and the state are in {self.save_to / 'nonfinite.pt'}."
        message = f"The loss is {value} at or before step {self.steps - 1}: {where}.{saved}"
        if self.on_nonfinite == "raise":
            raise NonFiniteError(message)
        self.alarms.nonfinite(message, self.steps - 1)


def _parallel() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _agreed(decision: bool) -> bool:
    """What rank 0 decides: clocks differ between ranks, and all must measure, or none."""
    if not _parallel():
        return decision
    shared = [decision]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def _part(x: Any, forward: Forward | None) -> Any:
    """This rank's share of the samples, every so manieth."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    num = as_batch(x, forward=forward, loss_fn=None).size
    if num < world:
        raise ValueError(f"The probe batch of {num} samples is too small for {world} ranks; give one sample a rank.")
    return pytree.tree_map(
        lambda leaf: leaf[rank::world] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num else leaf, x
    )
