"""``Monitor``: the same measurements on a schedule while a model trains, and a warning that names the layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscope import distributed
from gradscope.backward.cotangents import Probes
from gradscope.coefficients.gsc import gsc
from gradscope.coefficients.pairs import ZeroOutputError
from gradscope.forward.inputs import Forward, LossFunction, as_batch
from gradscope.forward.modules import same_draws, unwrap
from gradscope.measures import DeadFraction, PreactivationStd, SignDiversity
from gradscope.measures.measuring import Measure, measure
from gradscope.measures.preactivations import NONLINEARITIES
from gradscope.monitor import nonfinite
from gradscope.monitor.alarms import Alarms
from gradscope.monitor.nonfinite import Culprit, NonFiniteError
from gradscope.monitor.schedule import Every, Schedule
from gradscope.monitor.vitals import Vital, Vitals
from gradscope.monitor.weights import Weights

STATISTICS: tuple[Measure, ...] = (PreactivationStd(), SignDiversity(), DeadFraction())
MOST_PROBES = 4
GSC, CHEAP = "every", "statistics_every"  # the two kinds of record, by the argument that says how often
LOSS, GRADIENT, PROBE = "loss", "gradient", "probe batch"  # where a number may not be finite


class Monitor:
    """Watch a model while it trains.

        with gs.Monitor(model, x, every=100) as monitor:
            for inputs, labels in loader:
                ...                                       # forward and backward
                monitor.step(loss, (inputs, labels))      # before clipping and the update, where weights made the loss
                optimizer.step()

    On its schedule it measures, on the fixed probe batch ``x`` and with the same probe vectors and masks of dropout
    each time, so that curves are comparable: GSC of every unit (squared convention), statistics of pre-activations
    where nonlinearities are modules, and what `gradscope.monitor.weights.Weights` says of every layer's weights,
    gradients (those in ``.grad``, of the training batch) and updates.  Coefficients are measured in the parameters' own
    precision; statistics of pre-activations as the network runs where `step` is called, so inside ``torch.autocast``
    in its precision.

    Arguments:
        model: What is trained; wrappers of ``torch.compile`` and data parallelism are taken off for measuring.
        x: The probe batch, as for `gradscope.gsc`; some 32 samples.
        every: Steps between two records; or "log", at steps 0, 1, 2, 4, 8, and so on.
        statistics_every: Steps between records of everything but GSC, for a small part of the cost; default: only
            together with GSC.
        probes: Random vectors a measurement, at most 4, or "exact".
        layers, forward: As for `gradscope.gsc`.
        max_overhead: How much longer than by itself training may take since the monitor began, as a fraction; where a
            record that is due would exceed it, it is left out.  None: never left out.
        loss_fn: ``(output, labels) -> losses``, by which what is not finite is traced with the batch of `step`.
        on_nonfinite: "raise" a `NonFiniteError`, or "warn" and go on; records then lack what is not finite.
        check_every: Steps between two looks at the losses and gradients; None: each step on a CPU, and elsewhere, where
            a look waits for the device, at every record and after 50 steps.
        save_to: Folder for the batch and the model's state (``nonfinite.pt``) when a number is not finite.
        report: Called with the frame of each record as soon as it is taken.

    In every step it looks at the loss and at ``.grad``.  Where one is not finite, a second pass on the batch, as the
    network runs where `step` is called, finds the layer that made it so, before the update spreads it.  Gradients that
    are not finite though the second pass is are only warned of: a gradient scaler leaves such an update out.

    Warnings (`MonitorWarning`) come at a loss of more than 5 times the recent median, weights 10 times as long as at
    the beginning, coefficients beyond 10^6 or below 10^-6, layers of which 90 % of the units are dead, and a network
    whose output is zero, which has no coefficients; each once, and listed with its step in ``alarms.fired``.

    With gradient accumulation, call `step` once an update.  With a gradient scaler, call ``scaler.unscale_(optimizer)``
    before it, for the monitor reads ``.grad`` as it is, and clip after it, so that it sees what the network made.
    Under ``torch.distributed`` every rank gives the same ``x`` and calls `step` alike: each measures GSC of its part of
    the samples, and all have the merged records.

    Raises:
        ValueError: An argument is none of these.
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
        check_every: int | None = None,
        save_to: str | Path | None = None,
        report: Callable[[pd.DataFrame], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        few = isinstance(probes, int) and not isinstance(probes, bool) and 1 <= probes <= MOST_PROBES
        if not (few or probes == "exact"):
            raise ValueError(
                f'monitor.probes must be a whole number from 1 to {MOST_PROBES} or "exact", got {probes!r}.'
            )
        if on_nonfinite not in ("raise", "warn"):
            raise ValueError(f'monitor.on_nonfinite must be "raise" or "warn", got {on_nonfinite!r}.')
        periods = {GSC: every} | ({CHEAP: statistics_every} if statistics_every is not None else {})
        self.schedule = Schedule(periods, max_overhead, clock)
        self.model = unwrap(model)
        self.x, self.layers, self.forward, self.loss_fn = x, layers, forward, loss_fn
        self.probes: Probes = probes
        self.on_nonfinite, self.save_to = on_nonfinite, Path(save_to) if save_to is not None else None
        self.report = report
        self.vitals = Vitals(self.model.parameters(), check_every)
        self.weights = Weights(self.model)
        self.alarms = Alarms(self.weights.norms())
        self.has_statistics = any(isinstance(module, NONLINEARITIES) for module in self.model.modules())
        self.steps = 0
        self._records: list[pd.DataFrame] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._look(None, self.steps)

    def step(self, loss: Tensor | float | None = None, batch: Any = None) -> bool:
        """Gradients are there and the update is not: look at them, and record where it is due.  Returns whether it did.

        ``loss`` and gradients are looked at as ``check_every`` says.  ``batch``, the inputs or a pair of inputs and
        labels, is what the culprit of a number that is not finite is looked for with.
        """
        self.schedule.arrives()
        number, self.steps = self.steps, self.steps + 1
        kind = self.schedule.due(number)
        self.vitals.keep(number, loss)
        self.schedule.looked()
        if kind or self.vitals.due:
            self._look(batch, number)
        if kind is not None and not distributed.agreed(self.schedule.allows(kind)):
            kind = None
        if kind is not None:
            self._record(number, kind, strict=self.on_nonfinite == "raise")
        self.schedule.leaves(kind)
        return kind is not None

    def record(self) -> None:
        """Record everything now, whatever the schedule and the budget say; at the end of training, for one.

        What is not finite is only warned of, for no training is left to be stopped.
        """
        self._record(self.steps, GSC, strict=False)
        self.schedule.leaves(GSC)

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
        """How much longer than by itself training takes so far, as a fraction; waits for a device are not in it."""
        return self.schedule.overhead

    def state_dict(self) -> dict[str, Any]:
        """Steps and alarms so far, plain values for a checkpoint; records are kept where `report` puts them."""
        return {"steps": self.steps, "alarms": self.alarms.state_dict()}

    def load_state_dict(self, state: dict[str, Any], records: list[pd.DataFrame] | None = None) -> None:
        """Go on from what `state_dict` gave; ``records`` are those reported before that step."""
        self.steps, self._records = state["steps"], list(records or ())
        self.alarms.load_state_dict(state["alarms"])

    def _record(self, number: int, kind: str, strict: bool) -> None:
        begin = self.schedule.clock()
        with same_draws(dict(self.model.named_modules())):
            parts = [*self._measured(number, kind, strict), self.weights.frame(number)]
        frame = pd.concat(parts, ignore_index=True)
        frame.insert(0, "step", number)
        if len(frame):  # where no weight is finite, nothing is
            self._records.append(frame)
            if self.report is not None:
                self.report(frame)
            self.alarms.record(frame, number)
        self.schedule.took(kind, self.schedule.clock() - begin)

    def _measured(self, number: int, kind: str, strict: bool) -> Iterator[pd.DataFrame]:
        """What can be measured on the probe batch."""
        due = [self._coefficients] * (kind == GSC) + [self._statistics] * self.has_statistics
        for measured in due:
            try:
                yield measured()
            except ZeroOutputError as error:
                self.alarms.once("zero output", "network", number, f"zero output, step {number}: {error}")
            except (ValueError, FloatingPointError) as error:
                found, _ = nonfinite.culprit(self.model, None, self.x, forward=self.forward, loss_fn=None)
                if found is None and isinstance(error, ValueError):  # a mistake of the user's
                    raise
                message = f"The probe batch cannot be measured at step {number}: {found or error}."
                self._tell(PROBE, message, number, strict, error)

    def _coefficients(self) -> pd.DataFrame:
        x = iter([part(self.x, self.forward)]) if distributed.parallel() else self.x
        # Autocast would multiply rounded Jacobians, layer after layer.
        with torch.autocast(next(self.model.parameters()).device.type, enabled=False):
            return gsc(self.model, x, forward=self.forward, layers=self.layers, probes=self.probes).to_frame()

    def _statistics(self) -> pd.DataFrame:
        return measure(self.model, self.x, measures=STATISTICS, forward=self.forward)

    def _look(self, batch: Any, now: int) -> None:
        """Read losses and gradients since the last time; ``now`` counts the updates that were made."""
        for vital in self.vitals.read():
            if vital.loss is not None and not math.isfinite(vital.loss):
                self._nonfinite(LOSS, vital, batch, now)
                continue
            if vital.gradient is not None and not math.isfinite(vital.gradient):
                self._nonfinite(GRADIENT, vital, batch, now)
            if vital.loss is not None:
                self.alarms.loss(vital.loss, vital.step)

    def _nonfinite(self, what: str, vital: Vital, batch: Any, now: int) -> None:
        """Find the culprit, save what shows it, and raise or warn."""
        strict, known = self.on_nonfinite == "raise", self.alarms.known("nonfinite", what)
        if known and not strict:
            return
        found, remark = nonfinite.culprit(self.model, batch, self.x, forward=self.forward, loss_fn=self.loss_fn)
        if what == GRADIENT and found is None:
            # If all are finite, only the length overflowed; if not, a gradient scaler may leave this update out.
            strict = False
            if known or all(bool(torch.isfinite(g).all()) for g in self.vitals.gradients()):
                return
        saved = ""
        if self.save_to is not None:
            state = {"batch": batch, "model": self.model.state_dict(), "step": vital.step}
            saved = nonfinite.kept(self.save_to, state)
        seen = f"The {what} is {vital.loss if what == LOSS else 'not finite'} at step {vital.step}"
        message = f"{seen}: {self._where(found, what)}{remark}.{_late(now - vital.step)}{saved}"
        self._tell(what, message, vital.step, strict)

    def _where(self, found: Culprit | None, what: str) -> str:
        """The culprit in words, or what may be the reason that there is none."""
        if found is not None:
            return str(found)
        loss = "" if self.loss_fn is not None else "; with loss_fn= it would look at the loss function too"
        scaled = "; a gradient scaler leaves such an update out" if what == GRADIENT else ""
        return f"a second pass was finite, so the numbers of that step are gone{loss}{scaled}"

    def _tell(self, what: str, message: str, step: int, strict: bool, cause: Exception | None = None) -> None:
        if strict:
            raise NonFiniteError(message) from cause
        self.alarms.once("nonfinite", what, step, message)


def _late(updates: int) -> str:
    """What to do where a number was read after updates that it went into."""
    if not updates:
        return ""
    return (
        f" It was read {updates} {'update' if updates == 1 else 'updates'} later, which may have spread it to all "
        "layers: check_every=1 reads it before the update, and names the layer that began."
    )


def part(x: Any, forward: Forward | None) -> Any:
    """This rank's share of the samples, every so manieth.

    Raises:
        ValueError: Fewer samples than ranks.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    num = as_batch(x, forward=forward, loss_fn=None).size
    if num < world:
        raise ValueError(f"The probe batch of {num} samples is too small for {world} ranks; give one sample a rank.")
    return pytree.tree_map(
        lambda leaf: leaf[rank::world] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num else leaf, x
    )
