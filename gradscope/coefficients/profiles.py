"""Results: a `Profile` of the coefficients of all layers to one target, and a `Matrix` of all pairs of layers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from gradscope import frames
from gradscope.choices import Level, PathLike, checked
from gradscope.coefficients.growth import MARGIN, Growth, growth
from gradscope.estimates import LOG10_2, Estimate

FloatArray = npt.NDArray[np.float64]
LN10 = np.log(10)


@checked
class WithIntervals:
    """Arrays of log10 values with errors due to probes and samples, from which `interval` follows."""

    log10_values: FloatArray
    log10_stderr_probe: FloatArray
    log10_stderr_sample: FloatArray
    streamed: bool
    # Inputs of the interval: the error due to probes, enlarged if there are few probes; the share of each value that is
    # free of probe noise; and the degrees of freedom of the variances due to probes and due to samples.
    _log10_stderr_cautious: FloatArray
    _fixed_share: FloatArray
    _probe_freedom: FloatArray
    _sample_freedom: FloatArray

    def interval(self, level: Level = 0.95) -> tuple[FloatArray, FloatArray]:
        """Return lower and upper ends (log10 GSC) of intervals that contain each GSC with probability ``level``.

        For one batch, the interval is for the GSC of this batch, and only the probes are random
        (`gradscope.coefficients.profiles.probe_interval`).  For a stream, the interval is for the GSC of the data set.
        The errors due to probes and to samples are then added in quadrature, and multiplied by a quantile of Student's
        t.  Its degrees of freedom are those of the error due to samples.  Both ends are NaN if the error is unknown, or
        if the stream has fewer than ten samples (ten batches, if samples are coupled).
        """
        if not self.streamed:
            return probe_interval(
                self.log10_values, self._log10_stderr_cautious, self._fixed_share, self._probe_freedom, level
            )
        error = np.hypot(self.log10_stderr_probe, self.log10_stderr_sample)
        margin = error * special.stdtrit(self._sample_freedom, 0.5 + level / 2)
        return self.log10_values - margin, self.log10_values + margin


@checked
@dataclass(frozen=True, repr=False, eq=False)
class Matrix(WithIntervals):
    """GSC (squared convention) of every source with respect to every target layer; made by `gradscope.gsc_matrix`.

    - ``sources``, ``targets``: names of the layers in execution order.
    - ``indices``: number of units of the network before each source.
    - ``on_trunk``: for each source, whether every path from the input to the target passes through it.
    - ``log10_values``: log10 GSC, an array (sources, targets); NaN if the source comes after the target.
    - ``log10_stderr_probe``, ``log10_stderr_sample``: standard errors of ``log10_values`` due to probes and due to
      samples, arrays (sources, targets); NaN if unknown.
    - ``num_probes``: random probes per batch, an array (sources, targets); 0 if exact.
    - ``coupled``: whether one sample of a batch influences another, as in batch normalization.
    - ``relative_error``: the largest relative standard error of a value, due to probes (one batch) or due to probes and
      samples (stream).
    - ``num_batches``: number of measured batches.
    - ``streamed``: whether the data were a stream of batches; if so, the result is for the whole data set.
    - ``stopped``: why the measurement ended: "end of data", "rtol reached", "max_samples", "max_seconds",
      "2000 batches" or "interrupted".
    - ``remarks``: sentences that say what the values depend on, such as random dropout masks.

    >>> import torch
    >>> import gradscope as gs
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    >>> _ = [torch.nn.init.eye_(layer.weight) for layer in model]
    >>> matrix = gs.gsc_matrix(model, torch.ones(1, 2))
    >>> matrix
    Matrix(3 sources, 3 targets, exact, 1 sample)
    >>> abs(matrix.log10_values)
    array([[ 0.,  0.,  0.],
           [nan,  0.,  0.],
           [nan, nan,  0.]])
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    indices: tuple[int, ...]
    on_trunk: tuple[bool, ...]
    log10_values: FloatArray
    log10_stderr_probe: FloatArray
    log10_stderr_sample: FloatArray
    num_probes: npt.NDArray[np.int64]
    num_samples: int
    reduction: str
    coupled: bool
    stopped: str
    relative_error: float
    num_batches: int
    streamed: bool
    remarks: tuple[str, ...]
    _log10_stderr_cautious: FloatArray
    _fixed_share: FloatArray
    _probe_freedom: FloatArray
    _sample_freedom: FloatArray

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy frame with 95 % intervals and one row per source and target, sorted by target."""
        low, high = self.interval()
        columns = [self._column(target, low, high) for target in range(len(self.targets))]
        return pd.concat(columns, ignore_index=True)

    @property
    def complete(self) -> bool:
        """False if an interrupt (Ctrl-C) ended the measurement of a stream early, otherwise True."""
        return "interrupted" not in self.stopped

    def growth(self, *, margin: float = MARGIN) -> Growth:
        """Return rate and verdict of the growth of GSC with respect to the last target; see `gradscope.growth`."""
        return growth(self, margin=margin)

    def rows_to(self, target: str | None = None) -> pd.DataFrame:
        """Return the rows of `to_frame` with the given target; by default the last target."""
        if target is not None and target not in self.targets:
            raise ValueError(f"There is no target {target!r}; the targets are {', '.join(self.targets)}.")
        return self._column(self.targets.index(target) if target else -1, *self.interval())

    def plot(self, *, ax: Any = None, **options: Any) -> Any:
        """Return the Axes of `gradscope.plots.profile` for a `Profile`, and else of `gradscope.plots.matrix`.

        ``ax``: where to draw; a new figure by default.  ``options``: arguments of these functions.
        """
        # Imported on first use, because matplotlib is slow to import.
        plots = importlib.import_module("gradscope.plots")
        return (plots.profile if isinstance(self, Profile) else plots.matrix)(self, ax=ax, **options)

    def save(self, path: PathLike) -> Path:
        """Write the tidy frame as ``.parquet`` or ``.csv`` and return the path."""
        return frames.save(self.to_frame(), path)

    def summary(self) -> str:
        """Return what ``print`` shows: what was measured, the largest relative error, growth rate, and remarks."""
        kind = self._kind
        if self.streamed:
            plural = "es" * (self.num_batches != 1)
            kind += f" per batch, {self.num_batches} batch{plural}, {self.stopped}"
        lines = [
            f"GSC (squared) of {self._title}: {self._samples}{', coupled' if self.coupled else ''}, "
            f"reduction {self.reduction!r}, {kind}",
            f"  {self.sources[0]}: log10 GSC = {self.log10_values[0, -1]:.4f}",
            f"  largest relative standard error: {self.relative_error:.2g}",
        ]
        try:
            lines.append(f"  {self.growth()}")
        except ValueError as reason:
            lines.append(f"  no growth rate: {reason}")
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._title}, {self._kind}, {self._samples})"

    def _repr_html_(self) -> str:
        """Return the summary and a table of log10 GSC as HTML, for notebooks."""
        table = pd.DataFrame(self.log10_values, columns=list(self.targets))
        table.insert(0, "log10 GSC", self.sources, allow_duplicates=True)
        return frames.notebook(str(self), table)

    @property
    def _title(self) -> str:
        return f"{len(self.sources)} sources, {len(self.targets)} targets"

    @property
    def _kind(self) -> str:
        return f"{int(self.num_probes.max())} probes" if self.num_probes.any() else "exact"

    @property
    def _samples(self) -> str:
        return f"{self.num_samples} sample{'s' * (self.num_samples != 1)}"

    def _column(self, target: int, low: FloatArray, high: FloatArray) -> pd.DataFrame:
        last = self.sources.index(self.targets[target]) + 1
        rows = slice(last), target
        beside = {} if all(self.on_trunk) else {"on_trunk": self.on_trunk[:last]}
        return frames.tidy(
            {
                **beside,
                "layer": self.sources[:last],
                "index": self.indices[:last],
                "depth_from_output": self.indices[last - 1] - np.array(self.indices[:last]),
                "target": self.targets[target],
                "quantity": "gsc",
                "log10_value": self.log10_values[rows],
                "log10_stderr_probe": self.log10_stderr_probe[rows],
                "log10_stderr_sample": self.log10_stderr_sample[rows],
                "reduction": self.reduction,
                "coupled": self.coupled,
                "num_probes": self.num_probes[rows],
                "num_samples": self.num_samples,
                "log10_low": low[rows],
                "log10_high": high[rows],
            }
        )


@dataclass(frozen=True, repr=False, eq=False)
class Profile(Matrix):
    """GSC (squared convention) of every layer with respect to one target; made by `gradscope.gsc`.

    It is a `Matrix` with one column, and has the same attributes.  ``profile["name"]`` is the GSC of the layer "name".

    >>> import torch
    >>> import gradscope as gs
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    >>> _ = [torch.nn.init.eye_(layer.weight) for layer in model]
    >>> profile = gs.gsc(model, torch.ones(1, 2))
    >>> profile
    Profile(2 layers to '1', exact, 1 sample)
    >>> print(profile["input"])
    1 +- 0
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in execution order; the last one is the target."""
        return self.sources

    @property
    def target(self) -> str:
        """Name of the target layer."""
        return self.targets[0]

    @checked
    def __getitem__(self, layer: str) -> Estimate:
        """Return the GSC of one layer as an `Estimate`, with the standard error due to probes."""
        if layer not in self.sources:
            raise KeyError(f"There is no layer {layer!r} in this profile; its layers are {', '.join(self.sources)}.")
        row = self.sources.index(layer)
        exponent = int(np.floor(self.log10_values[row, 0] / LOG10_2)) if np.isfinite(self.log10_values[row, 0]) else 0
        mantissa = 10.0 ** (self.log10_values[row, 0] - exponent * LOG10_2)
        error = self.log10_stderr_probe[row, 0]
        stderr = None if np.isnan(error) else float(mantissa * error * np.log(10))
        freedom = float(self._probe_freedom[row, 0])
        return Estimate(float(mantissa), stderr, exponent, int(self.num_probes[row, 0]), freedom)

    def _repr_html_(self) -> str:
        """Return the summary and a table of the coefficients with 95 % intervals as HTML, for notebooks."""
        return frames.notebook(str(self), self.to_frame()[["layer", "log10_value", "log10_low", "log10_high"]])

    @property
    def _title(self) -> str:
        return f"{len(self.sources) - 1} layers to {self.target!r}"


def probe_interval(
    log10_values: FloatArray, log10_stderr: FloatArray, fixed_share: FloatArray, freedom: FloatArray, level: float
) -> tuple[FloatArray, FloatArray]:
    """Interval for log10 of a value that is the sum of a known part and a mean of quadratic forms in probes.

    A quadratic form in random signs is nearly a scaled chi-square, which is skewed if only a few singular values of the
    Jacobian are large.  Then mean +- 1.96 standard errors contains the value too rarely (70 % with two probes of a
    coupled batch).  The random part R is modeled as a scaled chi-square with k = 2 R^2 / Var(R) degrees of freedom.  On
    a log scale, the distances of its quantiles from R are multiplied by the quantile of Student's t with ``freedom``
    degrees of freedom, divided by the normal quantile.  In tests (test_intervals.py), 93 to 97 % of the 95 % intervals
    contain the value.

    ``fixed_share``: known share of each value.  Both ends are NaN if the error is unknown, and equal to the value if
    the error is 0.
    """
    upper = 0.5 + level / 2
    random = np.clip(1 - fixed_share, np.finfo(float).tiny, 1.0)
    relative = np.where(log10_stderr > 0, log10_stderr * LN10 / random, 1.0)
    k = 2 / np.square(relative)
    wider = special.stdtrit(freedom, upper) / special.ndtri(upper)
    low, high = (
        fixed_share + random * np.exp(wider * np.log(k / (2 * special.gammaincinv(k / 2, quantile))))
        for quantile in (upper, 1 - upper)
    )
    known = log10_stderr == 0
    with np.errstate(divide="ignore"):
        ends = [log10_values + np.log10(np.where(known, 1.0, end)) for end in (low, high)]
    unknown = np.isnan(log10_stderr)
    return np.where(unknown, np.nan, ends[0]), np.where(unknown, np.nan, ends[1])
