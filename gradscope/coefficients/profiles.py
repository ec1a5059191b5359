"""Coefficients of many layers, as results: a profile toward one target, and a matrix of all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradscope import frames
from gradscope.coefficients.growth import Growth, fit_growth
from gradscope.coefficients.intervals import probe_interval, sample_margin
from gradscope.estimates import LOG10_2, Estimate

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Matrix:
    """GSC (squared convention) of every source layer to every target layer.

    ``sources`` and ``targets``: names in execution order.  ``indices``: how many units of the network come before each
    source, so that a selection of layers keeps its place.  ``log10_values``, ``log10_stderr_probe``,
    ``log10_stderr_sample``: (sources, targets), NaN where the source lies above the target; the errors are NaN too
    where unknown.  ``num_probes``: (sources, targets), random probes a batch, 0 where exact.  ``relative_error``: the
    largest relative standard error of a value, of the probes for one batch, of probes and samples for a stream, which
    ended after ``num_batches`` because of ``stopped``: "end of data", "rtol reached", "max_samples", "max_seconds" or
    "interrupted".  ``log10_stderr_cautious``, ``fixed_share`` (the part of each value that is free of probe noise) and
    ``probe_freedom`` (degrees of freedom of the probes' variance) make the `interval`.  ``remarks``: sentences on
    what the numbers rest on: statistics of normalization, random numbers, which output, rows inside branches.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    indices: tuple[int, ...]
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
    log10_stderr_cautious: FloatArray
    fixed_share: FloatArray
    probe_freedom: FloatArray
    remarks: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """Tidy frame, one row a pair, targets in execution order, each target's own row (GSC = 1) last."""
        columns = [self._column(target) for target in range(len(self.targets))]
        return pd.concat(columns, ignore_index=True)

    @property
    def complete(self) -> bool:
        """False if an interrupt (Ctrl-C) ended the stream."""
        return "interrupted" not in self.stopped

    def interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Lower and upper ends, as log10 GSC, of intervals that hold each coefficient with probability ``level``.

        For one batch the coefficient of that batch: only probes are random, see
        `gradscope.coefficients.intervals.probe_interval`.  For a stream that of the data
        set: probes and samples in quadrature, with Student's t where batches are counted.  NaN where the error is
        unknown.
        """
        if self.num_batches == 1:
            return probe_interval(
                self.log10_values, self.log10_stderr_cautious, self.fixed_share, self.probe_freedom, level
            )
        error = np.hypot(self.log10_stderr_probe, self.log10_stderr_sample)
        margin = sample_margin(error, self.num_batches if self.coupled else self.num_samples, level)
        return self.log10_values - margin, self.log10_values + margin

    def growth(self) -> Growth:
        """Growth of the coefficients to the last target; see `gradscope.coefficients.growth.fit_growth`."""
        depth = self.indices[-1] - np.array(self.indices)
        return fit_growth(self.log10_values[:, -1], depth, self.log10_stderr_probe[:, -1])

    def save(self, path: str | Path) -> Path:
        """Write the tidy frame as ``.parquet`` or ``.csv``."""
        return frames.save(self.to_frame(), path)

    def _column(self, target: int) -> pd.DataFrame:
        last = self.sources.index(self.targets[target]) + 1
        return frames.tidy(
            {
                "layer": self.sources[:last],
                "index": self.indices[:last],
                "depth_from_output": self.indices[last - 1] - np.array(self.indices[:last]),
                "target": self.targets[target],
                "quantity": "gsc",
                "log10_value": self.log10_values[:last, target],
                "log10_stderr_probe": self.log10_stderr_probe[:last, target],
                "log10_stderr_sample": self.log10_stderr_sample[:last, target],
                "reduction": self.reduction,
                "coupled": self.coupled,
                "num_probes": self.num_probes[:last, target],
                "num_samples": self.num_samples,
            }
        )


@dataclass(frozen=True)
class Profile(Matrix):
    """GSC (squared convention) of every layer to one target: a `Matrix` of a single column."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names in execution order; the last is the target."""
        return self.sources

    @property
    def target(self) -> str:
        """Name of the target."""
        return self.targets[0]

    def __getitem__(self, layer: str) -> Estimate:
        """GSC of one layer, with the standard error of its probes."""
        if layer not in self.sources:
            raise KeyError(f"No row {layer!r}; rows are {', '.join(self.sources)}.")
        row = self.sources.index(layer)
        exponent = int(np.floor(self.log10_values[row, 0] / LOG10_2)) if np.isfinite(self.log10_values[row, 0]) else 0
        mantissa = 10.0 ** (self.log10_values[row, 0] - exponent * LOG10_2)
        error = self.log10_stderr_probe[row, 0]
        stderr = None if np.isnan(error) else float(mantissa * error * np.log(10))
        return Estimate(float(mantissa), stderr, exponent, int(self.num_probes[row, 0]))

    def summary(self) -> str:
        """A few lines for the terminal: what was measured, first and last coefficients, growth and verdict."""
        kind = "exact" if not self.num_probes.any() else f"{int(self.num_probes.max())} probes"
        if self.num_batches > 1:
            kind += f" a batch, {self.num_batches} batches, {self.stopped}"
        lines = [
            f"GSC (squared) of {len(self.sources) - 1} layers to {self.target!r}: "
            f"{self.num_samples} samples{', coupled' if self.coupled else ''}, reduction {self.reduction!r}, {kind}",
            f"  {self.sources[0]}: log10 GSC = {self.log10_values[0, 0]:.4f}",
            f"  largest relative standard error: {self.relative_error:.2g}",
        ]
        try:
            lines.append(f"  {self.growth()}")
        except ValueError as reason:
            lines.append(f"  no growth rate: {reason}")
        lines += [f"  {remark}" for remark in self.remarks]
        return "\n".join(lines)
