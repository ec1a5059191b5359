"""`Monitor(model, data)`: measurements on a schedule while a model trains, and warnings that name the layer."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn

from gradscope import distributed, frames
from gradscope.choices import PathLike, Share, Size, checked, stacklevel
from gradscope.forward.inputs import Forward, LossFunction, as_batch
from gradscope.forward.lengths import ZeroOutputError
from gradscope.forward.modules import unwrap
from gradscope.forward.state import alone, same_draws
from gradscope.forward.wrappers.sharding import unsharded
from gradscope.memory import together
from gradscope.monitor import nonfinite
from gradscope.monitor.alarms import Alarms, MonitorWarning, check_state
from gradscope.monitor.probe_batch import coefficients, heads, statistics
from gradscope.monitor.records import Records
from gradscope.monitor.schedule import Every, Schedule
from gradscope.monitor.vitals import Vital, Vitals
from gradscope.monitor.weights import Weights
from gradscope.sinks.delivery import Sinks, values_of
from gradscope.transformers.attention.candidates import may_attend
from gradscope.transformers.attention.interception import NoAttentionError

MOST_PROBES = 4
GSC, STATISTICS_ONLY = "every", "statistics_every"  # kinds of record, named like the argument that sets their period
LOSS, GRADIENT, PROBE = "loss", "gradient", "probe batch"  # where the monitor looks for non-finite numbers


@checked
class Monitor:
    """Records GSC and layer statistics while a model trains, and warns of problems in named layers or the network.

        with gs.Monitor(model, data, every=100) as monitor:
            for inputs, labels in loader:
                ...                                       # forward and backward
                monitor.step(loss, (inputs, labels))      # before clipping and optimizer.step()
                optimizer.step()

    Every record uses the same inputs ``data`` (the probe batch), random probes and dropout masks.  It contains GSC of
    every unit, such as a block, and statistics of the inputs of nonlinearities.  For attention heads, it contains the
    entropy divided by ln n (for n keys), the largest logit and the weight on the first key.  It also contains
    statistics of weights, gradients (in ``.grad``) and updates (`gradscope.monitor.weights.Weights`).  GSC is
    measured without ``torch.autocast``, but statistics of activations with the ``torch.autocast`` of the caller.

    Arguments:
        model: The model in training; wrappers of ``torch.compile`` and data parallelism are removed for measuring.
        data: The probe batch, as for `gradscope.gsc`; about 32 samples, without labels.
        every: Steps between two records, or "log": steps 0, 1, 2, 4, 8, and so on.
        statistics_every: Steps between additional records without GSC, which are much less expensive.  Default: none.
        probes: Random vectors per measurement, at most 4, or "exact".
        layers, forward: As for `gradscope.gsc`.
        attention: Whether to record attention heads.  Default: True if the name of a module looks like attention.
        max_overhead: Largest extra time for measuring, as a fraction of the training time so far.  Records that would
            exceed it are skipped, and one warning at the end says how many were skipped.  None: no limit.
        total_steps: Steps of the run, if known.  No record is skipped if that would leave a gap of more than 1/20 of
            the run.  If the length is unknown, the first 20 records are never skipped.  Later, no record is skipped if
            that would leave a gap of more than 1/6 of the steps so far.  With "log", no record is ever skipped.
        loss_fn: ``(output, labels) -> losses``, used to locate non-finite numbers in the batch that `step` receives.
        on_nonfinite: "raise" a `NonFiniteError`, or "warn" and continue; records then lack the non-finite numbers.
        check_every: Steps between two checks of losses and gradients.  Default: 1 on a CPU.  On other devices, where a
            check must wait for the device, losses and gradients are checked at records and at least every 50 steps.
        save_to: Folder for ``nonfinite.pt``: the batch and the model state when a loss or gradient is not finite.
        report: Called with the frame of each record as soon as the record is taken; its errors stop the training.
        sinks: Trackers that receive each record, as for `gradscope.sinks.Sinks`: ``gs.sinks.TensorBoard(folder)``,
            ``gs.sinks.MLflow(folder)``, a run of wandb or trackio.  A sink that fails only causes a warning.

    If a loss or gradient is not finite, a second pass on the batch finds the first faulty layer, before the update.
    If no layer is faulty, a non-finite gradient only causes a warning, because a gradient scaler may skip this update.

    Each kind of `MonitorWarning` is given at most once per layer, and listed in ``alarms.fired``.  Causes in the whole
    network: a loss above 5 times its recent median, or an output of zero.  In a layer: GSC above 10^6 or below 10^-6,
    weights whose norm has grown tenfold, 90 % dead units, or updates that differ by a factor above 1.5 from those of
    similar layers.  In an attention head: a largest logit above 100, above its value in the previous record, and above
    twice its first value.  Also a fall of entropy / ln n (for n keys) from above 0.2 to below 0.02.

    With gradient accumulation, call `step` once per update.  With a gradient scaler, call ``scaler.unscale_`` before
    `step`, and clip after it.  Under ``torch.distributed``, all ranks pass the same ``data`` and make the same calls.
    Each rank measures its share of the samples, and all hold the merged records.  The model may be sharded.

    Raises:
        TypeError, ValueError: An argument is invalid, or ``data`` is no batch.

    >>> import torch
    >>> import gradscope as gs
    >>> model, data = torch.nn.Linear(2, 2), torch.ones(4, 2)
    >>> with gs.Monitor(model, data, every=10) as monitor:
    ...     print([monitor.step() for _ in range(3)])
    [True, False, False]
    """

    def __init__(
        self, model: nn.Module, data: Any, *, every: Every = 100, statistics_every: Every | None = None,
        probes: int | str = 2, layers: Any = None, forward: Forward | None = None, max_overhead: Share | None = 0.03,
        loss_fn: LossFunction | None = None, on_nonfinite: str = "raise", check_every: int | None = None,
        save_to: PathLike | None = None, report: Callable[[pd.DataFrame], None] | None = None, sinks: Any = (),
        total_steps: Size | None = None, attention: bool | None = None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        few = isinstance(probes, int) and not isinstance(probes, bool) and 1 <= probes <= MOST_PROBES
        if not (few or probes == "exact"):
            raise ValueError(f'probes must be a whole number from 1 to {MOST_PROBES} or "exact", got {probes!r}.')
        if on_nonfinite not in ("raise", "warn"):
            raise ValueError(f'on_nonfinite must be "raise" or "warn", got {on_nonfinite!r}.')
        periods = {GSC: every} | ({STATISTICS_ONLY: statistics_every} if statistics_every is not None else {})
        self.schedule = Schedule(periods, max_overhead, clock, total_steps)
        self.model = unwrap(model, sharded=True)
        as_batch(data, forward=forward, finite=False)  # raises if this is no batch
        self.data, self.layers, self.forward, self.loss_fn, self.probes = data, layers, forward, loss_fn, probes
        self.on_nonfinite, self.save_to = on_nonfinite, Path(save_to) if save_to is not None else None
        self.report, self.sinks = report, Sinks(sinks)
        self.vitals, self.weights = Vitals(self.model, check_every), Weights(self.model)
        self.alarms = Alarms(self.weights.first_norms(), self.weights.resolution())
        self.steps, self._recorded = 0, -1  # the next step, and the step of the last record
        self._records, self._thinned = Records(), False  # and whether a warning has said that some are missing
        self.attention = may_attend(self.model) if attention is None else attention

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """End the monitoring, as at the end of a ``with`` block; ``error``: the exception that ended the block, if any.

        Checks losses and gradients since the last check, reports skipped records, and closes the sinks.
        """
        try:
            if error is None:
                self._check(None, self.steps)
                self._say_thinned()
        except BaseException as found:  # an error that the caller is handling is no error of this run
            self.sinks.close(found)
            raise
        self.sinks.close(error)

    def step(self, loss: Tensor | float | None = None, batch: Any = None) -> bool:
        """Call after ``backward()`` and before ``optimizer.step()``; returns whether a scheduled record was taken.

        Checks ``loss`` and gradients every ``check_every`` steps.  If one of them is not finite, a second pass on
        ``batch`` finds the first faulty layer.  ``batch`` holds the inputs, or is the pair (inputs, labels).
        """
        self.schedule.arrives()
        number, self.steps = self.steps, self.steps + 1
        kind = self.schedule.due(number) if number > self._recorded else None
        self.vitals.keep(number, loss)
        self.schedule.checked()
        if kind or self.vitals.due:
            self._check(batch, number)
        kind = kind if kind is not None and distributed.agreed(self.schedule.allows(kind, number)) else None
        if kind is not None:
            self._record(number, kind, strict=self.on_nonfinite == "raise")
        self.schedule.leaves(kind)
        return kind is not None

    def record(self) -> None:
        """Record everything now, regardless of schedule and budget, for example at the end of training.

        Non-finite values only cause a warning here.  Nothing happens if this step already has a record.
        """
        if self.steps > self._recorded:
            self._record(self.steps, GSC, strict=False)
            self.schedule.leaves(GSC)

    def to_frame(self) -> pd.DataFrame:
        """Return the records as a tidy frame with column ``step``; above 40 MB, every n-th record and the last one.

        Raises:
            ValueError: Nothing was recorded.
        """
        if not self._records:
            raise ValueError("Nothing was recorded: call step() in every step of training.")
        self._say_thinned()
        return pd.concat(self._records, ignore_index=True)

    def __str__(self) -> str:
        """Return the numbers of steps and records, and every warning so far."""
        return f"{self.steps} steps, {len(self._records)} records, {self.skipped} skipped\n{self.alarms}".strip()

    def _repr_html_(self) -> str:
        """Return what ``print`` shows and a table of the last record as HTML, for notebooks."""
        shown = ["step", "layer", "quantity", "value", "log10_value"]
        return frames.notebook(str(self), self._records.last.reindex(columns=shown))

    @property
    def skipped(self) -> int:
        """Number of scheduled records that were skipped because of ``max_overhead``."""
        return self.schedule.skipped

    @property
    def overhead(self) -> float:
        """Extra time for measuring so far, as a fraction of the training time; waiting for a device is not counted."""
        return self.schedule.overhead

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the alarms so far, as plain values for a checkpoint, without the records."""
        return {"steps": self.steps, "recorded": self._recorded, "alarms": self.alarms.state_dict()}

    def load_state_dict(self, state: dict[str, Any], records: list[pd.DataFrame] | None = None) -> None:
        """Restore the state that `state_dict` returned, and ``records``, the frames that ``report`` was called with."""
        check_state(state, self.state_dict())
        lengths = self.alarms.first_lengths
        self.steps, self._recorded, self._records = state["steps"], state["recorded"], Records(records or ())
        self.alarms.load_state_dict(state["alarms"])
        self.alarms.first_lengths = lengths | self.alarms.first_lengths  # layers may be trainable only since the save

    def _record(self, number: int, kind: str, strict: bool) -> None:
        begin, self._recorded = self.schedule.clock(), number
        self.alarms.first_lengths |= self.weights.first_norms()
        with alone, same_draws(dict(self.model.named_modules())) as draws, draws, together():
            weights = self.weights.begun(number)
            with unsharded(self.model):
                frame = pd.concat([*self._measured(number, kind, strict), weights()], ignore_index=True)
        frame.insert(0, "step", number)
        if len(frame):  # empty if no weight is finite
            self._records.add(frame)
            if self.report is not None:
                self.report(frame)
            if self.sinks and not distributed.rank():
                self.sinks.write(number, values_of(frame))
            self.alarms.record(frame, number)
        self.schedule.took(kind, self.schedule.clock() - begin, number)

    def _measured(self, number: int, kind: str, strict: bool) -> Iterator[pd.DataFrame]:
        """Yield the frames that can be measured on the probe batch."""
        measured = [statistics(self.model, self.data, self.forward)]
        if self.attention:
            measured.append(heads(self.model, self.data, self.forward))
        if kind == GSC:  # copies all that waits on the device to the CPU
            measured.insert(0, partial(coefficients, self.model, self.data, self.forward, self.layers, self.probes))
        for measure in measured:
            try:
                if (frame := measure()) is not None:
                    yield frame
            except ZeroOutputError as error:
                self.alarms.once("zero output", "network", number, f"zero output, step {number}: {error}")
            except NoAttentionError as error:
                self.attention = False
                self.alarms.once("no attention", "network", number, f"no attention, step {number}: {error}")
            except (ValueError, FloatingPointError) as error:
                found, _ = nonfinite.traced(self.model, None, self.data, forward=self.forward, loss_fn=None)
                if found is None and not isinstance(error, FloatingPointError):  # a user error
                    raise
                message = f"The probe batch cannot be measured at step {number}: {found or error}."
                # A loss may ignore NaN or Inf that no parameter's gradient depends on, such as masks of -inf.
                self._tell(PROBE, message, number, strict and found is not None, error)

    def _check(self, batch: Any, now: int) -> None:
        """Check all losses and gradients since the last check; ``now`` is the number of updates so far."""
        for vital in self.vitals.read():
            if vital.loss is not None and not math.isfinite(vital.loss):
                self._nonfinite(LOSS, vital, batch, now)
                continue
            if vital.gradient is not None and not math.isfinite(vital.gradient):
                self._nonfinite(GRADIENT, vital, batch, now)
            if vital.loss is not None:
                self.alarms.loss(vital.loss, vital.step)

    def _nonfinite(self, what: str, vital: Vital, batch: Any, now: int) -> None:
        """Find the first faulty layer, save batch and state, and raise or warn."""
        strict, known = self.on_nonfinite == "raise", self.alarms.known("nonfinite", what)
        if known and not strict:
            return
        found, remark = nonfinite.traced(self.model, batch, self.data, forward=self.forward, loss_fn=self.loss_fn)
        if what == GRADIENT and found is None:
            # If all entries are finite, only their norm overflowed; otherwise a gradient scaler may skip the update.
            strict = False
            if known or all(bool(torch.isfinite(g).all()) for g in map(distributed.local, self.vitals.gradients())):
                return
        unknown = "; a gradient scaler skips such an update" if what == GRADIENT else ""
        unknown = unknown if self.loss_fn is not None else f"; pass loss_fn= to trace the loss function too{unknown}"
        reason = nonfinite.told(found, unknown, remark, now - vital.step)
        message = f"The {what} is {vital.loss if what == LOSS else 'not finite'} at step {vital.step}: {reason}"
        if self.save_to is not None:
            kept = {"batch": batch, "model": self.model.state_dict(), "step": vital.step}
            message += nonfinite.saved(self.save_to, kept)
        self._tell(what, message, vital.step, strict)

    def _say_thinned(self) -> None:
        """Warn once if the budget or the memory has thinned the records."""
        remarks = [self.schedule.thinning, self._records.thinning]
        if any(remarks) and not self._thinned and not distributed.rank():
            self._thinned = True
            warnings.warn(" ".join(filter(None, remarks)), MonitorWarning, stacklevel=stacklevel())

    def _tell(self, what: str, message: str, step: int, strict: bool, cause: Exception | None = None) -> None:
        if strict:
            raise nonfinite.NonFiniteError(message) from cause
        self.alarms.once("nonfinite", what, step, message)
