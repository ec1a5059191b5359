"""``gsc(model, data, positions=...)``: which position of a layer moves which position of the target.

    GSC_ts(k, l) = |J_ts|_F^2 / (B d_k) * |f_k|^2 / |f_l|^2,   J_ts: position s of f_k to position t of f_l

The sum over all blocks (t, s) is GSC(k, l), because the squared Frobenius norm of J is the sum over its blocks.
Cost: source positions cost no further passes.  Target positions cost one cotangent per position and probe.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import nn

from gradscope import frames
from gradscope.choices import Level, Range, check_choice, checked
from gradscope.coefficients.gsc import measured, rows_of
from gradscope.coefficients.planning import Options, Planner
from gradscope.coefficients.profiles import Profile, WithIntervals
from gradscope.jacobians.capture import Capture
from gradscope.transformers.blocks import BlockBoard, BlockPairs, PerTarget

FloatArray = npt.NDArray[np.float64]
Group = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # target and source positions of some blocks
Count = Annotated[int, Range("a whole number >= 0", lambda number: number >= 0)]
ERRORS = ("log10_stderr_probe", "log10_stderr_sample", "log10_stderr_cautious")


def measured_by_position(model: nn.Module, data: Any, options: Options, by: str, position_dim: int) -> Positions:
    """The result of `gradscope.gsc` with ``positions=by``."""
    check_choice("positions", by, ("source", "target", "both"))
    if options.reduction == "geometric":
        raise ValueError('Blocks of reduction="geometric" do not add up to the GSC of a layer: use "batch" or "mean".')

    def board(captured: Capture) -> BlockBoard:
        return BlockBoard(captured, rows_of(captured, options.layers, options.target), options, by, position_dim)

    pairs, fields = measured(model, data, options, board, Planner if by == "source" else PerTarget)
    assert isinstance(pairs, BlockPairs)
    return Positions(**fields, by=by, position_dim=position_dim, blocks=Blocks.of(pairs, streamed=fields["streamed"]))


@checked
@dataclass(frozen=True, eq=False)
class Blocks(WithIntervals):
    """GSC_ts of the layers that have positions, with errors: arrays (layers, T_target or 1, T_source or 1).

    ``layers``: names in execution order, with the target last if it has positions.  ``log10_values``: -inf for a block
    that is exactly zero, as above the diagonal of a causal network; its errors are 0.
    """

    layers: tuple[str, ...]
    log10_values: FloatArray
    log10_stderr_probe: FloatArray
    log10_stderr_sample: FloatArray
    streamed: bool
    _log10_stderr_cautious: FloatArray
    _fixed_share: FloatArray
    _probe_freedom: FloatArray
    _sample_freedom: FloatArray

    @classmethod
    def of(cls, pairs: BlockPairs, *, streamed: bool) -> Blocks:
        """The blocks of the statistics of all batches."""
        values = pairs.of_blocks("log10_values")
        own = len(pairs.blocked) - len(values)  # the target's Jacobian with respect to itself is the identity
        num = max(pairs.shape)
        diagonal = np.full(pairs.shape, 1 / num) if 1 in pairs.shape else np.eye(num) / num

        def array(name: str, of_target: Any = 0.0) -> FloatArray:
            found = pairs.of_blocks(name)
            if name in ERRORS:
                found = np.where(np.isneginf(values), 0.0, found)
            return np.concatenate([found, *[np.broadcast_to(of_target, (1, *pairs.shape))] * own])

        with np.errstate(divide="ignore"):
            log10_values = array("log10_values", np.log10(diagonal))
        return cls(
            layers=pairs.blocked,
            log10_values=log10_values,
            log10_stderr_probe=array("log10_stderr_probe"),
            log10_stderr_sample=array("log10_stderr_sample"),
            streamed=streamed,
            _log10_stderr_cautious=array("log10_stderr_cautious"),
            _fixed_share=array("fixed_share", 1.0),
            _probe_freedom=array("probe_freedom", np.inf),
            _sample_freedom=array("sample_freedom", np.inf),
        )

    def interval(self, level: Level = 0.95) -> tuple[FloatArray, FloatArray]:
        """Return the ends of intervals for log10 GSC_ts, as in `gradscope.Matrix.interval`; -inf for exact zeros."""
        low, high = (np.where(np.isneginf(self.log10_values), -np.inf, end) for end in super().interval(level))
        return low, high

    def means(self, groups: Sequence[Group]) -> Blocks:
        """Means over groups of blocks, each with its target and source positions, as blocks (layers, groups, 1).

        No group may hold a target position twice: then its blocks have independent probes, and their variances due to
        probes add.  Errors due to samples are added as if they were fully correlated, which is an upper bound.
        """

        def total(array: FloatArray) -> FloatArray:
            return np.stack([array[:, t, s].sum(axis=1) for t, s in groups], axis=1)[:, :, None]

        highest = self.log10_values.max(axis=(1, 2), keepdims=True)
        values = np.power(10.0, self.log10_values - highest)
        found, num = total(values), np.array([len(t) for t, _ in groups])[:, None]
        scale = np.where(found > 0, found, 1.0)
        probe, cautious = (
            np.square(values * error) for error in (self.log10_stderr_probe, self._log10_stderr_cautious)
        )
        doubt, known = total(np.square(cautious) / self._probe_freedom), total(cautious)
        with np.errstate(divide="ignore"):
            log10_values = np.log10(found / num) + highest
        return replace(
            self,
            log10_values=log10_values,
            log10_stderr_probe=np.sqrt(total(probe)) / scale,
            log10_stderr_sample=total(values * self.log10_stderr_sample) / scale,
            _log10_stderr_cautious=np.sqrt(known) / scale,
            _fixed_share=np.where(found > 0, total(values * self._fixed_share) / scale, 1.0),
            _probe_freedom=np.where(doubt > 0, np.square(known) / np.where(doubt > 0, doubt, 1.0), np.inf),
            _sample_freedom=np.broadcast_to(self._sample_freedom.min(axis=(1, 2), keepdims=True), found.shape),
        )


@checked
@dataclass(frozen=True, repr=False, eq=False)
class Positions(Profile):
    """GSC of every layer with respect to one target, split by position (token); made by `gradscope.gsc(positions=...)`.

    J_ts is the block of the Jacobian from position s of the layer (source) to position t of the target.  GSC_ts is the
    part of GSC due to J_ts.  The sum of GSC_ts over all s and t is the GSC of the layer.  Attributes in addition to
    those of `Profile`:

    - ``by``: which positions are distinguished, "source", "target" or "both".
    - ``position_dim``: dimension of the positions in layers.
    - ``blocks``: an object with all GSC_ts.  Its ``log10_values``, their standard errors and the ends of its
      ``interval()`` are arrays (layers, target positions, source positions).  If ``by`` is "target", the
      dimension of source positions has size 1; if "source", that of target positions.

    The example is a network that shifts a sequence by one position:

    >>> import torch
    >>> import gradscope as gs
    >>> class Shift(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.scale = torch.nn.Parameter(torch.ones(()))
    ...     def forward(self, x):
    ...         return torch.nn.functional.pad(self.scale * x, (0, 0, 1, 0))[:, :-1]
    >>> found = gs.gsc(Shift(), torch.ones(1, 3, 2), positions="both")
    >>> (10 ** found.blocks.log10_values[0]).round(3)
    array([[0. , 0. , 0. ],
           [0.5, 0. , 0. ],
           [0. , 0.5, 0. ]])
    >>> found.lag_profile(sinks=0)[["layer", "lag", "value"]].query("layer == 'input' and value > 0")
       layer  lag  value
    3  input    1    0.5
    """

    by: str
    position_dim: int
    blocks: Blocks

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy frame: the rows of `Profile.to_frame`, then one row per layer and block of its Jacobian.

        The quantity of a block is "gsc_by_position".  The columns ``target_position`` and ``source_position`` hold its
        positions.  ``target_position`` is null if ``by`` is "source", and ``source_position`` if ``by`` is "target".
        """
        num, rows, columns = self.blocks.log10_values.shape
        t, s = np.indices((rows, columns)).reshape(2, -1)
        places = {
            "target_position": np.tile(t, num) if self.by != "source" else None,
            "source_position": np.tile(s, num) if self.by != "target" else None,
        }
        return pd.concat([super().to_frame(), self._rows("gsc_by_position", self.blocks, places)], ignore_index=True)

    @checked
    def lag_profile(self, *, sinks: Count = 1) -> pd.DataFrame:
        """Return means of GSC_ts in each layer: one per lag t - s, without sinks, and one per sink.

        Sinks are the first source positions.

        Arguments:
            sinks: Number of first source positions that count as sinks.  In many transformers, the first positions
                receive most of the attention (attention sinks).

        Returns:
            A tidy frame.  "gsc_by_lag" is the mean of all blocks of one lag (column ``lag``), except those from sinks.
            "gsc_of_sink" is the mean of all blocks from one sink (column ``source_position``).
            ``num_blocks`` is the number of blocks in each mean.  Errors due to samples are upper bounds: they assume
            that the errors of the blocks in a mean are fully correlated.

        Raises:
            ValueError: ``by`` is not "both", or all source positions are sinks.
        """
        num = self.blocks.log10_values.shape[2]
        if self.by != "both":
            raise ValueError(f'A lag needs both positions, but positions={self.by!r}: measure with positions="both".')
        if sinks >= num:
            raise ValueError(
                f"sinks={sinks} leaves none of {num} source positions for the lags: give a smaller number."
            )
        t = np.arange(num)
        of_lag = {lag: t[(t >= lag + sinks) & (t < num + lag)] for lag in range(1 - num, num - sinks)}
        lags = [(targets, targets - lag) for lag, targets in of_lag.items()]
        columns = [(t, np.full(num, sink)) for sink in range(sinks)]
        parts = [self._means("gsc_by_lag", lags, "lag", list(of_lag))]
        if sinks:
            parts.append(self._means("gsc_of_sink", columns, "source_position", range(sinks)))
        return pd.concat(parts, ignore_index=True)

    def plot(self, *, ax: Any = None, **options: Any) -> Any:
        """Return matplotlib Axes with a figure of the blocks: `gradscope.plots.positions`."""
        return importlib.import_module("gradscope.plots").positions(self, ax=ax, **options)

    def summary(self) -> str:
        """Return what ``print`` shows: the profile, the numbers of positions, and the share of blocks that are zero."""
        _, rows, columns = self.blocks.log10_values.shape
        sources = self.blocks.log10_values[[name != self.target for name in self.blocks.layers]]
        split = (
            f"{rows} target x {columns} source positions"
            if self.by == "both"
            else f"{rows * columns} {self.by} positions"
        )
        zero = np.isneginf(sources).mean()
        return f"{super().summary()}\n  blocks: {len(sources)} layers, {split}, {zero:.0%} of them exactly zero"

    def _means(self, quantity: str, groups: Sequence[Group], column: str, labels: Sequence[int]) -> pd.DataFrame:
        """Rows of the means over groups of blocks, with the label of each group in a column."""
        num, sizes = len(self.blocks.layers), [len(t) for t, _ in groups]
        places = {column: np.tile(labels, num), "num_blocks": np.tile(sizes, num)}
        return self._rows(quantity, self.blocks.means(groups), places)

    def _rows(self, quantity: str, blocks: Blocks, columns: dict[str, Any]) -> pd.DataFrame:
        """A tidy frame of blocks, with further columns of whole numbers."""
        each = blocks.log10_values[0].size
        places = np.repeat([self.sources.index(name) for name in blocks.layers], each)
        index = np.array(self.indices)[places]
        low, high = blocks.interval()
        frame = frames.tidy(
            {
                "layer": np.array(self.sources, dtype=object)[places],
                "index": index,
                "depth_from_output": self.indices[-1] - index,
                "target": self.target,
                "quantity": quantity,
                "log10_value": blocks.log10_values.ravel(),
                "log10_stderr_probe": blocks.log10_stderr_probe.ravel(),
                "log10_stderr_sample": blocks.log10_stderr_sample.ravel(),
                "reduction": self.reduction,
                "coupled": self.coupled,
                "num_probes": self.num_probes[places, 0],
                "num_samples": self.num_samples,
                "log10_low": low.ravel(),
                "log10_high": high.ravel(),
            }
        )
        whole = {
            name: pd.array([None] * len(frame) if values is None else values, dtype="Int64")
            for name, values in columns.items()
        }
        return frame.assign(**whole)
