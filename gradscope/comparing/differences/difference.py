"""The result of `gradscope.diff`: one row per layer and quantity, and the first layer that differs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradscope import frames
from gradscope.choices import PathLike, checked
from gradscope.comparing.differences.matching import Matching
from gradscope.comparing.differences.simultaneous import half_widths

FloatArray = npt.NDArray[np.float64]

HELD, FREE, COMPILED = "local_distance", "distance", "compiled_distance"
LENGTH, GSC = "log10_length_change", "log10_gsc_change"
MOST_NAMED = 6  # layers that the text names
SHOWN = ["layer", "quantity", "value", "low", "high", "rounding", "differs"]


@dataclass(frozen=True)
class Row:
    """What is known of one quantity of one layer; ``units``: influences for `half_widths`, or None if unknown."""

    quantity: str
    layer: str
    other: str
    index: int
    value: float
    rounding: float
    units: FloatArray | None = None


def to_frame(rows: Sequence[Row], *, num_samples: int, level: float) -> pd.DataFrame:
    """The tidy frame of all rows, with intervals that hold together for all layers of a quantity."""
    parts = []
    for quantity in dict.fromkeys(row.quantity for row in rows):
        own = [row for row in rows if row.quantity == quantity]
        num = max((len(row.units) for row in own if row.units is not None), default=0)
        unknown = np.full(num, np.nan)
        units = [row.units if row.units is not None and len(row.units) == num else unknown for row in own]
        error, half = half_widths(np.array(units).T.reshape(num, len(own)), level)
        value, explained = (np.array([getattr(row, name) for row in own]) for name in ("value", "rounding"))
        certain = np.isnan(half) | (np.abs(value) > half)
        exact = quantity in (HELD, FREE, COMPILED)
        parts.append(
            frames.observed(
                quantity, value, layer=[row.layer for row in own], index=[row.index for row in own],
                stderr=0.0 if exact else error, num_samples=num_samples,
                other=[row.other for row in own], low=value - (0.0 if exact else half),
                high=value + (0.0 if exact else half), rounding=explained,
                differs=(np.abs(value) > explained) & (exact | certain),
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


@checked
@dataclass(frozen=True, repr=False, eq=False)
class Difference:
    """What differs between two models, or two saved frames; made by `gradscope.diff`.

    - ``first``: name of the first layer whose output differs although its inputs are equal; None if there is none.  For
      saved results, the first layer with a difference in a quantity other than GSC; an earlier layer may be the cause.
    - ``frame``: one row per layer and quantity.  Additional columns: ``other`` (name of the layer in b), ``low`` and
      ``high`` (interval of the value), ``rounding`` (largest value that rounding explains) and ``differs``.
    - ``matching``: which layers of a and b are partners, and which have none.
    - ``subject``, ``population``: text on what was compared, and for what the intervals hold.
    - ``remarks``: sentences on what was not measured, and on what the numbers depend.
    - ``saved``: whether saved results were compared.  They do not show where a difference arises.

    Quantities, with f_k and g_k the outputs of layer k in a and b: ``distance`` is |g_k - f_k| / |f_k|.
    ``local_distance`` is the same, but b computes g_k from the values of the earlier layers of a.
    ``compiled_distance`` is given if model a or b is compiled: the relative distance of its output from that of model a
    in eager mode.  ``log10_length_change`` is log10 (|g_k| / |f_k|).  ``log10_gsc_change`` is log10 (GSC in b / GSC
    in a).  All other quantities are differences of statistics of `gradscope.measure`, b minus a.

    >>> import copy, torch
    >>> import gradscope as gs
    >>> a = gs.models.MLP(depth=4, width=16, generator=torch.Generator().manual_seed(0))
    >>> b = copy.deepcopy(a)
    >>> _ = b.layers[2].linear.weight.data.mul_(1.05)
    >>> found = gs.diff(a, b, torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
    >>> found.first, found.equal
    ('layers.2.linear', False)
    """

    first: str | None
    frame: pd.DataFrame
    matching: Matching
    subject: str
    population: str
    remarks: tuple[str, ...]
    saved: bool = False

    @property
    def equal(self) -> bool:
        """Whether rounding explains every difference, and every layer has a partner in the other model."""
        return not (self.frame["differs"].any() or self.matching.only_first or self.matching.only_second)

    def to_frame(self) -> pd.DataFrame:
        """Return ``frame``."""
        return self.frame

    def rows(self, quantity: str) -> pd.DataFrame:
        """Return the rows of one quantity, in execution order."""
        return self.frame[self.frame["quantity"] == quantity]

    def plot(self, *, ax: Any = None, **options: Any) -> Any:
        """Return matplotlib Axes with a figure: `gradscope.plots.difference`."""
        return importlib.import_module("gradscope.plots").difference(self, ax=ax, **options)

    def report(self, path: PathLike = "difference.html", *, title: str = "What differs?") -> Path:
        """Write one self-contained HTML page and return its path.  Needs the optional packages of the extra ``report``.

        Raises:
            ImportError: The packages of ``pip install "gradscope-toolkit[report]"`` are missing.
        """
        page: Path = importlib.import_module("gradscope.report.two_models").report(self, Path(path), title)
        return page

    def save(self, path: PathLike) -> Path:
        """Write the frame as ``.parquet`` or ``.csv`` and return the path."""
        return frames.save(self.frame, path)

    @property
    def headline(self) -> str:
        """The answer in one sentence.  If some layers have no partner, a sentence on these layers comes first."""
        without = [len(names) for names in (self.matching.only_first, self.matching.only_second)]
        unlike = f"Layers without a partner: {without[0]} of a, {without[1]} of b. " if any(without) else ""
        return unlike + (self._of_saved() if self.saved else self._of_models())

    def _of_models(self) -> str:
        """The answer for two models."""
        if not len(self.rows(HELD)):
            return "No outputs of layers were compared."
        if self.first is not None:
            return f"First layer that differs: {self.first!r}."
        if not self.frame["differs"].any():
            return "No layer differs by more than rounding explains."
        if (rows := self._differing(GSC)).size:
            last = rows["layer"].iloc[-1]
            return f"The outputs agree, but GSC differs up to {last!r}: look at this layer and the ones after it."
        return "No layer differs by itself, but quantities of layers do."

    def _of_saved(self) -> str:
        """The answer for two saved results, which do not show where a difference arises."""
        if not self.frame["differs"].any():
            return "No layer differs by more than the errors explain."
        cause = "Saved results do not show which layer is the cause: compare the models."
        if self.first is not None:
            return f"First layer whose numbers differ: {self.first!r}. {cause}"
        rows = self._differing(GSC)
        return f"GSC differs in {len(rows)} of {len(self.rows(GSC))} rows, last in {rows['layer'].iloc[-1]!r}. {cause}"

    def sentences(self) -> list[str]:
        """Return the sentences of the text after the headline."""
        found = []
        held = self.rows(HELD)
        own = held[held["differs"]]
        if len(own):
            row = own.iloc[0]
            found.append(
                f"Given equal inputs, its output differs by {row['value']:.2g} of its length; rounding explains "
                f"{row['rounding']:.2g}."
            )
            if len(own) > 1:
                found.append(f"Given equal inputs, {len(own)} layers differ: {_listed(_quoted(own['layer']))}.")
        elif len(held):
            worst = held.iloc[int((held["value"] / held["rounding"]).to_numpy().argmax())]
            found.append(
                f"Given equal inputs, layers differ by at most {worst['value']:.2g} of their length "
                f"({worst['layer']!r}); rounding explains {worst['rounding']:.2g}."
            )
        free = self.rows(FREE)
        if len(free):
            last = free.iloc[-1]
            found.append(f"At {last['layer']!r}, the whole difference is {last['value']:.2g} of the length.")
        for quantity in dict.fromkeys(self.frame["quantity"]):
            rows = self.rows(quantity)
            if quantity not in (HELD, FREE) and (changed := rows[rows["differs"]]).size:
                most = changed.iloc[int(changed["value"].abs().to_numpy().argmax())]
                interval = f" ({most['low']:+.3g} to {most['high']:+.3g})" if most["low"] == most["low"] else ""
                found.append(
                    f"{quantity}: {len(changed)} of {len(rows)} layers differ, most {most['layer']!r} by "
                    f"{most['value']:+.3g}{interval}."
                )
        for which, names in (("a", self.matching.only_first), ("b", self.matching.only_second)):
            if names:
                found.append(f"Layers of {which} without a partner: {_listed(_quoted(names))}.")
        if self.matching.renamed:
            pairs = [f"{a!r} = {b!r}" for a, b in self.matching.renamed]
            found.append(f"Matched by order and structure: {_listed(pairs)}.")
        return [*found, self.population, *self.remarks]

    def _differing(self, quantity: str) -> pd.DataFrame:
        rows = self.rows(quantity)
        return rows[rows["differs"]]

    def __str__(self) -> str:
        return "\n  ".join([self.subject, self.headline, *self.sentences()])

    def __repr__(self) -> str:
        num = int(self.frame["differs"].sum())
        return f"Difference(first={self.first!r}, {num} of {len(self.frame)} rows differ)"

    def _repr_html_(self) -> str:
        """Return the text and the rows that differ as HTML, for notebooks."""
        shown = self.frame[self.frame["differs"]]
        return frames.notebook(str(self), (shown if len(shown) else self.frame)[SHOWN])


def _quoted(names: Sequence[str] | pd.Series) -> list[str]:
    return [repr(name) for name in names]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
