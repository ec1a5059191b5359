"""The result of `gradscope.repair`: what it would change, before and after, and the way there and back."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gradscope import frames
from gradscope.choices import listed as quoted
from gradscope.comparing.models import interval_text
from gradscope.comparing.repair.local import Local
from gradscope.comparing.repair.scaling import copies, multiplied, restored
from gradscope.comparing.repair.solving import LENGTH, NEAREST, NONE, SOLVED, Solution
from gradscope.comparing.repair.stages import Stage
from gradscope.distributed import local
from gradscope.estimates import FloatArray
from gradscope.forward.wrappers.sharding import reshard, stored

LEVEL = 0.95
REACHED, MISSED, UNDECIDED = "reached", "missed", "undecided"
SHOWN = 60  # units that are printed


@dataclass(repr=False, eq=False)
class Repair:
    """Factors for the weights of a model; made by `gradscope.repair`.  Nothing is changed before ``apply()``.

    ``table`` has one row per unit, with these columns:

    - ``unit``, ``parameters``, ``factor``: the factor, and the parameters that it multiplies.
    - ``outcome``: "goal" if the factor brings local GSC to its goal.  "nearest" if it brings local GSC only near the
      goal, because no factor reaches the goal or local GSC hardly depends on the factor.  "length" if the factor
      changes the length of the output but not local GSC.  "no effect" if it changes neither the length nor local GSC.
      If the parameters cannot be scaled, ``outcome`` is the reason.
    - ``goal``, ``gsc_before``, ``gsc``: the goal of local GSC, local GSC before the repair, and local GSC after it.
    - ``low``, ``high``: interval of ``gsc``.  With probability 95 %, the intervals of all units contain their true
      values.
    - ``verdict``: "reached" if the interval ``low`` to ``high`` is inside goal / (1 + margin) to goal * (1 + margin),
      "missed" if it is entirely outside, otherwise "undecided".
    - ``rms_before``, ``rms``: root mean square of the unit's output.

    ``factors`` maps the name of each changed parameter to its factor.  ``applied``: whether the model is changed now.

    >>> import torch, gradscope as gs
    >>> model = gs.models.MLP(depth=2, width=16, generator=torch.Generator().manual_seed(0))
    >>> gs.repair(model, torch.ones(8, 16))
    Repair(2 units, 2 factors, not applied)
    """

    model: nn.Module = field(repr=False)
    stages: tuple[Stage, ...]
    solutions: tuple[Solution, ...]
    goals: tuple[float, ...]
    wished_rms: float | None
    margin: float
    before: Local
    after: Local
    fresh: bool
    frozen: tuple[str, ...]
    applied: bool = False

    def __post_init__(self) -> None:
        held = dict(self.model.named_parameters())
        self._parameters = {name: stored(held[name]) for name in self.factors}
        self._saved = copies(self._parts)

    @property
    def factors(self) -> dict[str, float]:
        """Factors by parameter name, without factors of 1."""
        both = zip(self.stages, self.solutions, strict=True)
        return {
            name: math.exp(solution.log_factor)
            for stage, solution in both
            if solution.log_factor
            for name in stage.parameters
        }

    def apply(self) -> None:
        """Multiply the parameters by their factors, in place.

        Apply a repair before training, because the state of an optimizer is not scaled.  If the model is sharded, all
        processes must call this method, outside of `gradscope.unsharded`; each multiplies its shards.

        Raises:
            ValueError: The repair is applied already, a parameter has changed or was replaced since the repair was
                computed, or the model is inside `gradscope.unsharded`.
        """
        if self.applied:
            raise ValueError("The repair is already applied: call undo() first.")
        parts = self._unchanged(dict.fromkeys(self.factors, 1.0), "the repair was computed: compute a new one")
        for name, factor in self.factors.items():
            multiplied({name: parts[name]}, self._saved, factor)
        self.applied = True

    def undo(self) -> None:
        """Restore the parameters to what they were before ``apply()``, bit for bit.

        Raises:
            ValueError: The repair is not applied, a parameter has changed since ``apply()``, for example by training,
                or the model is inside `gradscope.unsharded`.
        """
        if not self.applied:
            raise ValueError("The repair is not applied, so there is nothing to undo.")
        restored(self._unchanged(self.factors, "apply(), so undo() would discard this change"), self._saved)
        self.applied = False

    @property
    def table(self) -> pd.DataFrame:
        """One row per unit; for the columns, see the class."""
        low, high = (10**end for end in self._interval)
        return pd.DataFrame(
            {
                "unit": [stage.layer for stage in self.stages],
                "parameters": [", ".join(stage.parameters) for stage in self.stages],
                "factor": [math.exp(solution.log_factor) for solution in self.solutions],
                "outcome": [solution.outcome for solution in self.solutions],
                "goal": self.goals,
                "gsc_before": 10**self.before.log10_values,
                "gsc": 10**self.after.log10_values,
                "low": low,
                "high": high,
                "verdict": self._verdicts(low, high),
                "rms_before": np.exp(self.before.log_rms),
                "rms": np.exp(self.after.log_rms),
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy frame of the quantity ``local_gsc`` before and after the repair, with a 95 % interval per row.

        Each interval alone contains its true value with probability 95 %.  ``layer`` is the name of the unit, and
        ``target`` that of the layer at the end of the unit.  Additional columns: ``repaired``, ``factor`` (1 before the
        repair), ``rms`` (of the target), ``goal`` and ``outcome``.
        """
        return pd.concat([self._frame(self.before, False), self._frame(self.after, True)], ignore_index=True)

    def __str__(self) -> str:
        local, num = self.after, len(self.stages)
        where = f"{'fresh data' if self.fresh else 'the batch of the solution'}, {local.num_samples} samples"
        table = self.table.drop(columns=["parameters", "low", "high"])
        digits = self.table
        table["gsc"] = [interval_text(*row) for row in digits[["gsc", "low", "high"]].itertuples(index=False)]
        scaled = f"{(k := len(self.factors))} parameter{'s' * (k != 1)} with a factor other than 1"
        head = f"{num} unit{'s' * (num != 1)}, {scaled}; GSC on {where}"
        shown = table.to_string(index=False, max_rows=SHOWN, float_format="{:.4g}".format)
        return "\n".join([head, shown, *self.remarks])

    def __repr__(self) -> str:
        units, num, state = len(self.stages), len(self.factors), "applied" if self.applied else "not applied"
        return f"Repair({units} unit{'s' * (units != 1)}, {num} factor{'s' * (num != 1)}, {state})"

    def _repr_html_(self) -> str:
        """Return the summary and the table as HTML, for notebooks."""
        return frames.notebook(repr(self), self.table)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences on missed goals, on units that no factor changes, and on limits of the result.

        All values of local GSC in these sentences are those after the repair.
        """
        table, found = self.table, list[str]()
        for outcome, text in SENTENCES.items():
            rows = table[table["outcome"] == outcome]
            if outcome != NONE:
                rows = rows[rows["verdict"] != REACHED]
            if len(rows):
                found.append(text.format(units=quoted(rows["unit"]), gsc=_range(rows["gsc"])))
        others = table[~table["outcome"].isin(OUTCOMES)]
        found += [f"{row.unit!r} is not scaled: {row.outcome}." for row in others.itertuples()]
        counts = Counter(table["verdict"])
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (REACHED, MISSED, UNDECIDED))
        found.append(f"Goals of local GSC, with a margin of {100 * self.margin:g} %: {told}.")
        if not self.fresh:
            found.append("The intervals are for this batch alone: give fresh= to prove the repair on other data.")
        if self.frozen:
            found.append(f"Frozen parameters are not scaled: {quoted(self.frozen)}.")
        return tuple(found)

    @property
    def _interval(self) -> tuple[FloatArray, FloatArray]:
        """Both ends of log10 of the local GSC after the repair, simultaneously for all units (Bonferroni)."""
        return self.after.interval(1 - (1 - LEVEL) / len(self.stages))

    def _verdicts(self, low: FloatArray, high: FloatArray) -> list[str]:
        goals, most = np.array(self.goals), 1 + self.margin
        inside, outside = (low >= goals / most) & (high <= goals * most), (low > goals * most) | (high < goals / most)
        return [REACHED if a else MISSED if b else UNDECIDED for a, b in zip(inside, outside, strict=True)]

    def _frame(self, local: Local, repaired: bool) -> pd.DataFrame:
        low, high = local.interval()
        num = len(self.stages)
        tidy = frames.tidy(
            {
                "layer": [stage.layer for stage in self.stages],
                "index": np.arange(1, num + 1),
                "depth_from_output": np.arange(num - 1, -1, -1),
                "target": [stage.target for stage in self.stages],
                "quantity": "local_gsc",
                "log10_value": local.log10_values,
                "log10_stderr_probe": local.log10_stderr_probe,
                "log10_stderr_sample": local.log10_stderr_sample,
                "reduction": "batch",
                "coupled": local.coupled,
                "num_probes": local.num_probes,
                "num_samples": local.num_samples,
                "log10_low": low,
                "log10_high": high,
            }
        )
        table = self.table
        return tidy.assign(
            repaired=repaired,
            factor=table["factor"] if repaired else 1.0,
            rms=np.exp(local.log_rms),
            goal=self.goals,
            outcome=table["outcome"],
        )

    @property
    def _parts(self) -> dict[str, Tensor]:
        """What this process holds of the scaled parameters."""
        return {name: local(parameter) for name, parameter in self._parameters.items()}

    def _unchanged(self, factors: dict[str, float], since: str) -> dict[str, Tensor]:
        """This process's parts of the parameters; ValueError if one is not what it was, times its factor."""
        reshard(self.model)
        held = dict(self.model.named_parameters())
        for name, parameter in self._parameters.items():
            if name in held and held[name] is not parameter and stored(held[name]) is parameter:
                raise ValueError(
                    "Inside gs.unsharded(model), the parameters are copies, so a change would be lost at its end: call "
                    "apply() and undo() after this context."
                )
            if held.get(name) is not parameter:
                raise ValueError(
                    f"The model has another parameter {name!r} than when the repair was computed, for example because "
                    "it was sharded since: compute a new repair."
                )
        parts = self._parts
        for name, factor in factors.items():
            if not torch.equal(parts[name], self._saved[name] * factor):
                raise ValueError(f"Parameter {name!r} has changed since {since}.")
        return parts


OUTCOMES = (SOLVED, NEAREST, LENGTH, NONE)
SENTENCES = {
    NONE: "No scale of these units changes their output or their local GSC, which is {gsc}: {units}.",
    LENGTH: "No scale of these units changes their local GSC, which is {gsc}: {units}.",
    NEAREST: "The scales of these units bring their local GSC near to the goal, but not to it. It is {gsc}: {units}.",
}


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} to {high}"
