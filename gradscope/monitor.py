"""``Monitor``: the same measurements on a schedule while a model trains, and a warning that names the layer."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gradscope import frames
from gradscope.coefficients import gsc
from gradscope.inputs import Forward, LossFunction
from gradscope.measures import DeadFraction, PreactivationStd, SignDiversity
from gradscope.measuring import Measure, measure
from gradscope.modules import unwrap
from gradscope.nonfinite import first_nonfinite
from gradscope.parameters import owned_parameters
from gradscope.planning import Probes

STATISTICS: tuple[Measure, ...] = (PreactivationStd(), SignDiversity(), DeadFraction())

# What is worth a warning: a loss so many times the recent median, weights so many times as long as at the beginning,
# coefficients beyond so many powers of ten between two layers, and this part of a layer's units dead.
LOSS_JUMP, RECENT = 5.0, 50
WEIGHT_GROWTH = 10.0
EXTREME_LOG10 = 6.0
DEAD = 0.9
MOST_PROBES = 4


class MonitorWarning(UserWarning):
    """Something in training looks wrong; the message names the layer."""


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
    are modules, and of every layer with parameters the length of its weights, of the gradient that it holds in
    ``.grad``, and its relative change a step since the last record (``weight_norm``, ``gradient_norm``,
    ``update_to_weight``).

    Arguments:
        model: What is trained; wrappers of ``torch.compile`` and data parallelism are taken off for measuring.
        x: The probe batch, as for `gradscope.gsc`; some 32 samples.
        every: Steps between two records; or "log", at steps 0, 1, 2, 4, 8, and so on.
        probes: Random vectors a measurement, at most 4, or "exact".
        layers, forward: As for `gradscope.gsc`.
        max_overhead: The part of the time since the monitor began that measuring may take; where a record that is due
            would exceed it, it is left out.  None: never left out.
        loss_fn: ``(output, labels) -> losses``, by which a loss that is not finite is traced with the batch of `step`.
        on_nonfinite: "raise" a `NonFiniteError`, or "warn".
        save_to: Folder for the batch and the model's state (``nonfinite.pt``) at the first loss that is not finite.

    Warnings (`MonitorWarning`) come at a loss of more than 5 times the recent median, weights 10 times as long as at
    the beginning, coefficients beyond 10^6 or below 10^-6, and layers of which 90 % of the units are dead; each once.

    Raises:
        ValueError: ``every``, ``probes``, ``max_overhead`` or ``on_nonfinite`` is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        *,
        every: int | str = 100,
        probes: int | str = 2,
        layers: Any = None,
        forward: Forward | None = None,
        max_overhead: float | None = 0.03,
        loss_fn: LossFunction | None = None,
        on_nonfinite: str = "raise",
        save_to: str | Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        counted = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        if not (counted or every == "log"):
            raise ValueError(f'every must be a whole number >= 1 or "log", got {every!r}.')
        few = isinstance(probes, int) and not isinstance(probes, bool) and 1 <= probes <= MOST_PROBES
        if not (few or probes == "exact"):
            raise ValueError(f'probes must be a whole number from 1 to {MOST_PROBES} or "exact", got {probes!r}.')
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise ValueError(f"max_overhead must be in (0, 1] or None, got {max_overhead!r}.")
        if on_nonfinite not in ("raise", "warn"):
            raise ValueError(f'on_nonfinite must be "raise" or "warn", got {on_nonfinite!r}.')
        self.model, self.x, self.every, self.layers = unwrap(model), x, every, layers
        self.probes: Probes = probes
        self.forward, self.loss_fn, self.max_overhead = forward, loss_fn, max_overhead
        self.on_nonfinite, self.save_to = on_nonfinite, Path(save_to) if save_to is not None else None
        self.owners = owned_parameters(dict(self.model.named_modules()))
        self.steps, self.skipped, self.spent = 0, 0, 0.0
        self._clock, self._began = clock, clock()
        self._records: list[pd.DataFrame] = []
        self._losses: list[float] = []
        self._pending: list[Tensor] = []
        self._warned: set[tuple[str, str]] = set()
        self._extremes: set[str] = set()
        self._before: tuple[int, dict[str, Tensor]] | None = None
        self._first_lengths = {name: self._length(name) for name in self.owners}
        self._has_statistics: bool | None = None

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
        due = self._due(number)
        if loss is not None:
            self._pending.append(torch.as_tensor(loss).detach())
        if self._pending and (due or len(self._pending) >= RECENT or self._pending[-1].device.type == "cpu"):
            self._read_losses(batch)
        if not due:
            return False
        begin = self._clock()
        if self._over_budget(begin):
            self.skipped += 1
            return False
        self._record(number)
        self.spent += self._clock() - begin
        return True

    def to_frame(self) -> pd.DataFrame:
        """All records: the tidy frame of `gradscope.frames` with a column ``step``.

        Raises:
            ValueError: Nothing was recorded.
        """
        if not self._records:
            raise ValueError("Nothing was recorded: call step() after each step of training.")
        return pd.concat(self._records, ignore_index=True)

    @property
    def overhead(self) -> float:
        """The part of the time since the monitor began that measuring took."""
        return self.spent / max(self._clock() - self._began, 1e-12)

    def _due(self, number: int) -> bool:
        if self.every == "log":
            return number & (number - 1) == 0
        return number % int(self.every) == 0

    def _over_budget(self, now: float) -> bool:
        """Whether one more record, as dear as those before, would take more than the budget allows by now."""
        if self.max_overhead is None or not self._records:
            return False
        expected = self.spent / len(self._records)
        return self.spent + expected > self.max_overhead * (now - self._began + expected)

    def _record(self, number: int) -> None:
        profile = gsc(self.model, self.x, forward=self.forward, layers=self.layers, probes=self.probes)
        parts = [profile.to_frame()]
        if self._has_statistics is not False:
            try:
                parts.append(measure(self.model, self.x, measures=STATISTICS, forward=self.forward))
                self._has_statistics = True
            except ValueError as error:
                if "No nonlinearity module fired" not in str(error):
                    raise
                self._has_statistics = False
        parts += self._weights(number)
        frame = pd.concat(parts, ignore_index=True)
        frame.insert(0, "step", number)
        self._records.append(frame)
        self._judge(frame)

    def _weights(self, number: int) -> list[pd.DataFrame]:
        """Lengths of weights and gradients, and relative changes a step since the last record."""
        current = {name: self._flat(name) for name in self.owners}
        lengths = {name: float(weight.norm()) for name, weight in current.items()}
        columns: dict[str, dict[str, float]] = {"weight_norm": lengths, "gradient_norm": {}, "update_to_weight": {}}
        for name, parameters in self.owners.items():
            gradients = [p.grad.detach().double().norm() for p in parameters if p.grad is not None]
            if gradients:
                columns["gradient_norm"][name] = float(torch.stack(gradients).norm())
        if self._before is not None:
            since, weights = self._before
            for name, weight in current.items():
                change = float((weight - weights[name]).norm()) / (number - since)
                columns["update_to_weight"][name] = change / max(lengths[name], 1e-300)
        self._before = number, current
        order = {name: index for index, name in enumerate(self.owners, start=1)}
        return [self._statistic(quantity, values, order) for quantity, values in columns.items() if values]

    def _statistic(self, quantity: str, values: dict[str, float], order: dict[str, int]) -> pd.DataFrame:
        index = np.array([order[name] for name in values])
        with np.errstate(divide="ignore"):
            logs = np.log10(np.array(list(values.values())))
        return frames.tidy(
            {
                "layer": list(values),
                "index": index,
                "depth_from_output": len(order) - index,
                "target": None,
                "quantity": quantity,
                "log10_value": logs,
                "log10_stderr_probe": 0.0,
                "log10_stderr_sample": np.nan,
                "reduction": None,
                "coupled": None,
                "num_probes": 0,
                "num_samples": 1,
            }
        )

    def _judge(self, frame: pd.DataFrame) -> None:
        """Warn once of each thing that looks wrong."""

        def values(quantity: str, column: str = "value") -> dict[str, float]:
            rows = frame[frame["quantity"] == quantity]
            return dict(zip(rows["layer"].astype(str), rows[column].astype(float), strict=True))

        # Where a gradient explodes it does so at many layers, so the worst stands for all.
        coefficients = sorted((value, layer) for layer, value in values("gsc", "log10_value").items())
        for kind, (log10_gsc, layer) in (("vanishing", coefficients[0]), ("exploding", coefficients[-1])):
            if (log10_gsc if kind == "exploding" else -log10_gsc) > EXTREME_LOG10 and kind not in self._extremes:
                self._extremes.add(kind)
                self._warn(kind, layer, f"its GSC is 10^{log10_gsc:.1f}, the most extreme of all layers")
        for layer, dead in values("dead_fraction").items():
            if dead >= DEAD:
                self._warn("dead units", layer, f"{100 * dead:.0f} % of its units pass no gradient")
        for layer, length in values("weight_norm").items():
            if (first := self._first_lengths[layer]) > 0 and length > WEIGHT_GROWTH * first:
                self._warn("weight growth", layer, f"its weights are {length / first:.0f} times as long")

    def _warn(self, kind: str, layer: str, what: str) -> None:
        if (kind, layer) not in self._warned:
            self._warned.add((kind, layer))
            message = f"{kind} at layer {layer!r}, step {self.steps - 1}: {what}."
            warnings.warn(message, MonitorWarning, stacklevel=5)

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
            recent = self._losses[-RECENT:]
            if len(recent) >= 5 and value > LOSS_JUMP * max(float(np.median(recent)), 1e-12):
                self._warn("loss jump", "loss", f"{value:.4g} after a median of {np.median(recent):.4g}")
            self._losses.append(value)

    def _nonfinite(self, value: float, batch: Any) -> None:
        """Find the culprit, save what shows it, and raise or warn."""
        culprit = None
        if batch is not None:
            inputs = batch[0] if isinstance(batch, (tuple, list)) and self.loss_fn is None else batch
            culprit = first_nonfinite(self.model, inputs, forward=self.forward, loss_fn=self.loss_fn)
        if culprit is None:
            culprit = first_nonfinite(self.model, self.x, forward=self.forward)
        saved = ""
        if self.save_to is not None:
            self.save_to.mkdir(parents=True, exist_ok=True)
            state = {"batch": batch, "model": self.model.state_dict(), "step": self.steps - 1}
            torch.save(state, self.save_to / "nonfinite.pt")
            saved = f" The batch and the state are in {self.save_to / 'nonfinite.pt'}."
        where = str(culprit) if culprit else "a second pass was finite, so the numbers of that step are gone"
        message = f"The loss is {value} at or before step {self.steps - 1}: {where}.{saved}"
        if self.on_nonfinite == "raise":
            raise NonFiniteError(message)
        if ("nonfinite", "loss") not in self._warned:
            self._warned.add(("nonfinite", "loss"))
            warnings.warn(message, MonitorWarning, stacklevel=4)

    def _flat(self, name: str) -> Tensor:
        return torch.cat([p.detach().double().reshape(-1) for p in self.owners[name]])

    def _length(self, name: str) -> float:
        return float(self._flat(name).norm())
