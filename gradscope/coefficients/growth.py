"""Growth of a coefficient with depth: a rate with its interval, a verdict, and the total of the network.

The rate is exp(E[change of ln GSC per layer]).  The expectation is over networks that are drawn like the measured ones
(same architecture, depth, width and initialization) and over batches of this size.  The total, log10 GSC from the first
row to the target, is a fact about the measured networks on their batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from gradscope import frames
from gradscope.choices import Nonnegative, checked, require
from gradscope.coefficients.drift import Drift, drift, num_outer
from gradscope.estimates import FloatArray

MARGIN = 0.02  # a rate within this distance of 1 counts as stable
MIN_LAYERS = 6
NEAREST = 9  # the nearer half of the rows gives the rate, but never fewer rows than this, if there are as many
SAME_SLOPE = 0.25  # a larger relative difference between the slopes of both halves counts
CURVED_LEVEL = 0.01
MOST_NETWORKS = MOST_LAYERS = 1000  # more are not worth a recommendation
LN10 = math.log(10)


@runtime_checkable
class Measured(Protocol):
    """What `growth` needs of a result: a tidy frame of the coefficients to one target."""

    def rows_to(self, target: str | None = None) -> pd.DataFrame:
        """The rows with this target; the last one by default."""


@dataclass(frozen=True)
class Growth:
    """Growth of GSC (squared convention) with depth: each layer farther from the target multiplies it by ``rate``.

    ``rate_low``, ``rate_high``: 95 % interval of the rate of networks with this architecture and initialization.
    ``intercept``: c in the fit GSC = c * rate^n, where n counts layers backward from the target (n = 0).

    ``verdict`` compares the interval of the rate with the ``margin`` of `growth`:

    - "exploding": the whole interval lies above 1 + margin;
    - "vanishing": the whole interval lies below 1 - margin;
    - "stable": the whole interval lies between 1 - margin and 1 + margin;
    - "undecided": else; ``advice`` says how many networks or layers would decide, or that the rate is near a limit.

    Exception: several networks are also judged one by one.  If all get one verdict other than "undecided", it counts.
    ``curved``: whether log GSC grows at different rates in the two halves of the network.  If so, one rate does
    not describe it.  ``curved_p`` is the p value of the hypothesis that both rates are equal.
    ``total``: log10 GSC of the layer farthest from the target, as a mean over the networks.  ``total_low`` and
    ``total_high``: its 95 % interval due to probes, for streams also due to samples; NaN if unknown.
    ``num_networks``: number of independent networks.  ``num_rows``: number of depths that the rate was fitted to.

    >>> from gradscope.coefficients.growth import fit_growth
    >>> growth = fit_growth([0.62, 0.49, 0.41, 0.29, 0.21, 0.1, 0.0], [6, 5, 4, 3, 2, 1, 0])
    >>> print(growth)
    rate 1.252 (95 % interval 1.167 to 1.343) per layer, exploding
    >>> growth.total
    0.62
    """

    rate: float
    intercept: float
    rate_low: float
    rate_high: float
    verdict: str
    margin: float
    curved: bool
    curved_p: float
    total: float
    total_low: float
    total_high: float
    num_networks: int
    num_rows: int
    advice: str

    def __str__(self) -> str:
        """Return ``rate 1.473 (95 % interval 1.461 to 1.485) per layer, exploding``, with advice if undecided."""
        width = self.rate_high - self.rate_low
        digits = min(6, max(2, 2 - math.floor(math.log10(width)))) if width > 1e-6 else 4
        low, high = f"{self.rate_low:.{digits}f}", f"{self.rate_high:.{digits}f}"
        interval = f"95 % interval {low} to {high}" if low != high else "no spread"
        curved = f", curved (p = {self.curved_p:.1g})" if self.curved else ""
        text = f"rate {self.rate:.{digits}f} ({interval}) per layer, {self.verdict}{curved}"
        return f"{text}: {self.advice}" if self.advice else text


@checked
def growth(
    data: Measured | pd.DataFrame | Sequence[Measured], *, target: str | None = None, margin: Nonnegative = MARGIN
) -> Growth:
    """Return the growth of GSC with depth, with one verdict for all given networks.

    Arguments:
        data: A result of `gradscope.gsc`, `gradscope.gsc_matrix` or `gradscope.parameter_gsc`; a list of results, for
            networks that differ in their random numbers only; or a tidy frame of results, in which column ``seed``
            distinguishes the networks.
        target: The target layer; the last one by default.
        margin: Rates from 1 - margin to 1 + margin count as stable.

    Returns:
        A `Growth`.  Layers inside branches are left out if others are on the trunk.  The changes of log GSC from row
        to row give the interval of the rate.  The spread between networks gives it instead for eight or more networks,
        or if the spread is larger than these changes explain.

    Raises:
        ValueError: The layers besides the target have fewer than six different depths; GSC of a layer is zero or not
            finite; networks have different layers; or a frame holds networks of several configurations.

    Cost: O(rows^3), milliseconds for 100 rows.

    >>> import torch
    >>> import gradscope as gs
    >>> seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    >>> models = [gs.models.MLP(depth=30, width=50, activation="selu", generator=seed) for seed in seeds]
    >>> profiles = [gs.gsc(model, torch.randn(16, 50, generator=seed)) for model, seed in zip(models, seeds)]
    >>> gs.growth(profiles).verdict
    'exploding'
    """
    if not isinstance(data, pd.DataFrame):
        results = list(data) if isinstance(data, Sequence) else [data]
        if not results:
            raise ValueError("data is an empty list: give at least one result of gradscope.gsc.")
        data = pd.concat([one.rows_to(target).assign(seed=seed) for seed, one in enumerate(results)])
    return _of_rows(_selected(data, target), margin)


def fit_growth(
    log10_values: npt.ArrayLike, depth_from_output: npt.ArrayLike, *, margin: float = MARGIN,
    log10_total: tuple[float, float] = (math.nan, math.nan),
) -> Growth:  # fmt: skip
    """Return the growth of log10 GSC given as an array; `growth` does the same for results and frames.

    Arguments:
        log10_values: log10 GSC, shape (layers,), or (networks, layers).
        depth_from_output: Number of units from each layer to the target, shape (layers,); the target (0) is ignored.
        margin: As in `growth`.
        log10_total: Both ends of the interval of the total; unknown by default.

    Layers of equal depth are averaged.  Up to three rows nearest the target are left out: the first one if nine rows
    remain, and those up to an outlying change.  The rate is fitted to the half of the other rows that is nearer the
    target, and averaged over networks.  Its error is explained in `gradscope.coefficients.drift.drift`.

    Raises:
        ValueError: As `growth`, or shapes that do not fit.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin is a relative change of GSC per layer between 0 and 1, such as 0.02; got {margin!r}.")
    y = np.atleast_2d(np.asarray(log10_values, dtype=np.float64)) * LN10
    depth = np.asarray(depth_from_output, dtype=np.float64)
    if y.shape[1:] != depth.shape:
        raise ValueError(f"log10_values has shape {y.shape}, but depth_from_output has {depth.shape[0]} entries.")
    depth, y = _averaged(depth, y)
    near = _nearer(depth, y)
    rate = drift(depth[near], y[:, near])
    curved_p = _curved(depth[near.start :], y[:, near.start :], margin)
    intercept = float(np.mean(y[:, near]) - rate.value * np.mean(depth[near]))
    verdict = _verdict(rate, margin)
    if len(y) > 1:
        each = [(own[None], _nearer(depth, own[None])) for own in y]  # the rows that each network has by itself
        alone = {_verdict(drift(depth[rows], own[:, rows]), margin) for own, rows in each}
        verdict = alone.pop() if len(alone) == 1 and "undecided" not in alone else verdict
    return Growth(
        rate=math.exp(rate.value),
        intercept=math.exp(intercept),
        rate_low=math.exp(rate.value - rate.margin),
        rate_high=math.exp(rate.value + rate.margin),
        verdict=verdict,
        margin=margin,
        curved=curved_p < CURVED_LEVEL,
        curved_p=curved_p,
        total=float(y[:, -1].mean()) / LN10,
        total_low=log10_total[0],
        total_high=log10_total[1],
        num_networks=len(y),
        num_rows=near.stop - near.start,
        advice=_advice(rate, margin, len(y), float(depth[-1])) if verdict == "undecided" else "",
    )


def _selected(frame: pd.DataFrame, target: str | None) -> pd.DataFrame:
    """The rows of GSC, or of parameter GSC, to one target; each layer occurs once per seed."""
    require(frame, ["quantity", "layer", "target", "depth_from_output", "log10_value"], "gs.gsc(...).to_frame()")
    gsc = frame[frame["quantity"] == "gsc"]
    # The last module with parameters lies one module from the target.
    rows = gsc if len(gsc) else frame[frame["quantity"] == "parameter_gsc"].assign(
        depth_from_output=lambda own: own["depth_from_output"] + 1
    )  # fmt: skip
    if target is not None:
        if target not in set(rows["target"]):
            raise ValueError(f"There is no target {target!r}; the targets are {', '.join(rows['target'].unique())}.")
        rows = rows[rows["target"] == target]
    elif len(gsc):
        rows = frames.to_last_target(rows)
    if not len(rows):
        raise ValueError("The frame has no rows of quantity 'gsc' or 'parameter_gsc' to a target, so nothing grows.")
    rows = trunk_of(rows if "seed" in rows else rows.assign(seed=0))
    if (twice := rows.duplicated(["seed", "layer"], keep=False)).any():
        several = rows[twice]
        own = [name for name in rows if name not in frames.SCHEMA and several[name].nunique(dropna=False) > 1]
        differ = ", ".join(map(repr, own)) or "no column"
        raise ValueError(
            f"The frame holds several networks with the same seed ({several['seed'].iloc[0]}), which differ in "
            f"{differ}: call growth for one of them at a time, such as in a groupby, or give each its own seed."
        )
    return rows


def trunk_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of layers on the trunk; all rows if only the target is on the trunk."""
    beside = rows.get("on_trunk", pd.Series(True, rows.index)).fillna(True).eq(False)
    return rows[~beside] if (~beside & (rows["depth_from_output"] > 0)).any() else rows


def _of_rows(rows: pd.DataFrame, margin: float) -> Growth:
    table = rows.pivot_table("log10_value", index="seed", columns="depth_from_output", observed=True, dropna=False)
    if (lacking := table.isna()).to_numpy().any() and len(table) > 1:
        row, column = np.argwhere(lacking.to_numpy())[0]
        raise ValueError(
            f"Seed {table.index[row]} has no GSC {table.columns[column]} layers from the target, but another seed has: "
            "give networks of one architecture."
        )
    low, high = math.nan, math.nan
    if {"log10_low", "log10_high"} <= set(rows):
        # The probes of different networks are independent.
        first = rows[rows["depth_from_output"] == table.columns[-1]].drop_duplicates("seed")
        below, above = first["log10_value"] - first["log10_low"], first["log10_high"] - first["log10_value"]
        total = float(first["log10_value"].mean())
        low = total - float(np.linalg.norm(below)) / len(first)
        high = total + float(np.linalg.norm(above)) / len(first)
    return fit_growth(table.to_numpy(), table.columns.to_numpy(), margin=margin, log10_total=(low, high))


def _averaged(depth: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Different depths in increasing order without the target, and the mean of the curves at each depth."""
    y, depth = y[:, depth > 0], depth[depth > 0]
    if len(depth) < MIN_LAYERS:
        raise ValueError(f"A growth rate needs at least {MIN_LAYERS} layers besides the target, got {len(depth)}.")
    if not np.isfinite(y).all():
        where = depth[~np.isfinite(y).all(axis=0)][0]
        raise ValueError(f"GSC is zero or not finite {where:g} layers from the target (a dead layer?): no rate exists.")
    depth, place, count = np.unique(depth, return_inverse=True, return_counts=True)
    if len(depth) < MIN_LAYERS:
        raise ValueError(
            f"A growth rate needs at least {MIN_LAYERS} different depths, got {', '.join(f'{d:g}' for d in depth)}: "
            "layers inside one unit have the same depth."
        )
    average = np.zeros((len(place), len(depth)))
    average[np.arange(len(place)), place] = 1 / count[place]
    return depth, y @ average


def _nearer(depth: FloatArray, y: FloatArray) -> slice:
    """The rows that give the rate: the nearer half of those that are left."""
    start = num_outer(depth, y)
    num = len(depth) - start
    return slice(start, start + max(math.ceil(num / 2), min(num - 1, NEAREST)))


def _curved(depth: FloatArray, y: FloatArray, margin: float) -> float:
    """The p value of equal slopes in both halves, where a difference by a quarter, or by the margin, does not count."""
    middle = len(depth) // 2
    near, far = drift(depth[: middle + 1], y[:, : middle + 1]), drift(depth[middle:], y[:, middle:])
    allowed = max(SAME_SLOPE * abs(near.value), math.log1p(margin))
    excess, error = abs(far.value - near.value) - allowed, math.hypot(near.stderr, far.stderr)
    if error == 0.0:
        return float(excess <= 0)
    freedom = min(near.freedom, far.freedom)
    return float(special.stdtr(freedom, -excess / error) + special.stdtr(freedom, -(excess + 2 * allowed) / error))


def _verdict(rate: Drift, margin: float) -> str:
    low, high = rate.value - rate.margin, rate.value + rate.margin
    if low > math.log1p(margin):
        return "exploding"
    if high < math.log1p(-margin):
        return "vanishing"
    return "stable" if low >= math.log1p(-margin) and high <= math.log1p(margin) else "undecided"


def _advice(rate: Drift, margin: float, networks: int, layers: float) -> str:
    """How many networks, or layers of one network, would give an interval that excludes 1 - margin and 1 + margin."""
    distance = min(abs(rate.value - math.log1p(margin)), abs(rate.value - math.log1p(-margin)))
    # The interval shrinks with the square root of the number of networks, or of layers.
    factor = (1.96 * rate.stderr / distance) ** 2 if distance else math.inf
    if factor * networks > MOST_NETWORKS:
        near = f"the limit {1 + math.copysign(margin, rate.value):g}"
        return f"the rate lies too close to {near} for a verdict, so report the interval"
    more = max(networks + 1, math.ceil(factor * networks))
    deeper = math.ceil(more / networks * layers)
    return f"about {more} networks" + (f", or {deeper} layers," if deeper <= MOST_LAYERS else "") + " would decide"
