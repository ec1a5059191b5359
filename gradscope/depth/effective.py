"""``effective_depth``: the largest k for which products of k layers' changes noticeably contribute to the Jacobian.

    C^lambda_l = I_l C^lambda_(l-1) + R_l C^(lambda-1)_(l-1),   J_l = I_l + R_l

I_l is the Jacobian of the initial layer l, R_l its change by training, and C^lambda the sum of the terms with lambda
factors R_l.  |C^lambda|_F^2 is unbiased with probes.  Cost: see `effective_depth`.  Philipp, Song and Carbonell
(arXiv:1712.05577) proposed C^lambda and bounded it by norms; here C^lambda is computed exactly at the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import special
from torch import Tensor, nn
from torch.nn import functional

from gradscope import frames
from gradscope.backward.cotangents import Cotangents, chosen, generator_or_default, needed_for_exact, resolved, signs
from gradscope.backward.pulling import PullBack, pulling
from gradscope.backward.sweep import sweep
from gradscope.choices import checked
from gradscope.depth.segments import Parameters, Segment, TwoNetworks, cut, initial_parameters
from gradscope.estimates import satterthwaite
from gradscope.forward.inputs import Forward
from gradscope.forward.state import alone, state_restored
from gradscope.jacobians.capture import Capture, capture
from gradscope.memory import Workspace
from gradscope.norms import plain_norms

FloatArray = npt.NDArray[np.float64]

TOLERANCE = 1e-6
AUTO_LAYER = 8  # random cotangents for the change of each single unit


@checked
@dataclass(frozen=True)
class EffectiveDepth:
    """Contributions C^lambda to a trained network's Jacobian: all terms that contain exactly lambda layer changes.

    `gradscope.effective_depth` makes this result, and defines C^lambda, I_l and R_l.

    - ``log10_values``: log10 of |C^lambda|_F / (|C^0|_F + |C^1|_F + ...), lambda = 0, 1, ...; norms over the batch.
    - ``log10_stderr``: standard errors of ``log10_values``, over samples if ``num_probes`` is 0, else over probes.
    - ``freedom``: degrees of freedom of these errors, by `gradscope.estimates.satterthwaite`.
    - ``log10_cancellation``: log10 of (|C^0|_F + |C^1|_F + ...) / |J|_F for the Jacobian J of the network.  It is 0 if
      all C^lambda have the same direction, and large if they cancel.
    - ``layers``: names of the units in execution order.
    - ``log10_changes``, ``log10_changes_stderr``: log10(|R_l|_F / |I_l|_F) of each unit l, and its error due to probes.

    >>> import copy, torch, gradscope as gs
    >>> model = gs.models.MLP(depth=3, width=4, activation="tanh")
    >>> found = gs.effective_depth(model, torch.ones(2, 4), initial=copy.deepcopy(model))  # nothing has been trained
    >>> found.at(), found.layers
    (0, ('layers.0', 'layers.1', 'layers.2'))
    """

    log10_values: FloatArray
    log10_stderr: FloatArray
    freedom: FloatArray
    log10_cancellation: float
    layers: tuple[str, ...]
    log10_changes: FloatArray
    log10_changes_stderr: FloatArray
    target: str
    coupled: bool
    num_probes: int
    num_samples: int

    def at(self, tolerance: float = TOLERANCE) -> int:
        """Effective depth: the largest lambda with |C^lambda|_F >= ``tolerance`` (|C^0|_F + |C^1|_F + ...).

        It is 0 if there is no such lambda.  `gradscope.effective_depth` defines C^lambda.

        Raises:
            ValueError: ``tolerance`` is not between 0 and 1.
        """
        return _largest(self.log10_values, tolerance)

    def interval(self, tolerance: float = TOLERANCE) -> tuple[int, int]:
        """95 % interval of the effective depth, by `contribution_intervals`; if NaN, (0, number of changed units)."""
        low, high = self.contribution_intervals()
        low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
        return _largest(low, tolerance), _largest(high, tolerance)

    def contribution_intervals(self) -> tuple[FloatArray, FloatArray]:
        """Both ends of the 95 % intervals (Student's t) of ``log10_values``; NaN if the error is unknown.

        An exact result for coupled samples holds for this batch alone; both ends are then equal.
        """
        error = np.nan_to_num(self.log10_stderr) if self.coupled and not self.num_probes else self.log10_stderr
        margin = error * special.stdtrit(self.freedom, 0.975)
        return self.log10_values - margin, self.log10_values + margin

    @property
    def log10_independent(self) -> FloatArray:
        """Prediction of ``log10_values`` if the Jacobians and changes of all layers had independent directions.

        Squares then add up.  Let p_l = |R_l|^2 / (|I_l|^2 + |R_l|^2) be the probability that layer l belongs to a
        random set.  E|C^lambda|_F^2 / E|J|_F^2 is the probability e^lambda_L that the set has lambda of the L layers:
        e^lambda_l = (1 - p_l) e^lambda_(l-1) + p_l e^(lambda-1)_(l-1).
        """
        halves = symmetric_logarithms(2 * math.log(10) * self.log10_changes) / 2
        values: FloatArray = (halves - np.logaddexp.reduce(halves)) / math.log(10)
        return values

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy frame of the quantities contribution, independent_contribution, cancellation and change.

        Both contributions have one row per lambda (``index``).  Change has one row per unit, and cancellation one row.
        """
        num, order = len(self.log10_values), np.arange(len(self.layers))
        terms = {"layer": "network", "index": np.arange(num), "depth_from_output": 0}
        whole = {**terms, "index": 0}
        places = {"layer": list(self.layers), "index": order + 1, "depth_from_output": order[::-1]}
        unknown = np.full(num, np.nan)
        probe, sample = (self.log10_stderr, unknown) if self.num_probes else (np.zeros(num), self.log10_stderr)
        parts = [
            self._rows("contribution", self.log10_values, probe, sample, self.num_probes, terms),
            self._rows("independent_contribution", self.log10_independent[:num], np.nan, np.nan, AUTO_LAYER, terms),
            self._rows("cancellation", np.array([self.log10_cancellation]), np.nan, np.nan, self.num_probes, whole),
            self._rows("change", self.log10_changes, self.log10_changes_stderr, np.nan, AUTO_LAYER, places),
        ]
        return pd.concat(parts, ignore_index=True)

    def _rows(
        self, quantity: str, values: FloatArray, probe: Any, sample: Any, num_probes: int, places: dict[str, Any]
    ) -> pd.DataFrame:
        own = {"quantity": quantity, "log10_value": values, "log10_stderr_probe": probe, "log10_stderr_sample": sample}
        about = {"reduction": "batch", "coupled": self.coupled, "num_probes": num_probes}
        return frames.tidy({**places, "target": self.target, **own, **about, "num_samples": self.num_samples})

    def __str__(self) -> str:
        low, high = self.interval()
        return f"effective depth {self.at()} ({low} to {high}) of {len(self.layers)} layers at {TOLERANCE:g}"


@checked
def effective_depth(
    model: nn.Module,
    data: Any,
    *,
    initial: nn.Module | Parameters,
    forward: Forward | None = None,
    probes: int | str = "auto",
    generator: torch.Generator | None = None,
) -> EffectiveDepth:
    """Effective depth: products of at most this many layer changes matter in a trained network's Jacobian.

    Let J_l be the Jacobian of unit l in the trained network.  I_l is the Jacobian at the same input of the unit with
    the parameters ``initial``; R_l = J_l - I_l.  The network's Jacobian J is the product of all I_l + R_l.  C^lambda
    is the sum of all terms of this product with exactly lambda factors R_l.  C^lambda_l is that of the first l units:

        C^lambda_l = I_l C^lambda_(l-1) + R_l C^(lambda-1)_(l-1)

    All C^lambda add up to J.  The effective depth ``.at(tolerance)`` is the largest lambda with
    |C^lambda|_F >= tolerance (|C^0|_F + |C^1|_F + ...).

    Arguments:
        model: Any trained module; it is not changed.
        initial: ``model`` before its training, or a copy of its ``state_dict``.  Only its parameters are used.
        data, forward: As for `gradscope.gsc`; ``data`` must be one batch.
        probes, generator: As for `gradscope.nlc`.

    Cost: three forward passes.  Each cotangent needs four backward passes, and up to one more for each trained unit.
    The sizes |R_l| / |I_l| need 16 backward passes in all.  Memory: two autograd graphs, and a cotangent per lambda.

    Raises:
        ValueError: ``initial`` shares memory with ``model``, or its parameters have other names or shapes.  Or the
            network has a single unit, the output does not depend on the input, or ``probes`` is invalid.
        FloatingPointError: A gradient is NaN or Inf; the message names the unit.

    >>> import copy, torch, gradscope as gs
    >>> model = gs.models.MLP(depth=3, width=4, activation="tanh")
    >>> initial = copy.deepcopy(model)
    >>> with torch.no_grad():
    ...     _ = model.layers[1].linear.weight.mul_(2)  # as if training had changed one layer
    >>> gs.effective_depth(model, torch.ones(2, 4), initial=initial).at()
    1
    """
    resolved(probes)
    generator = generator_or_default(generator)
    captured = capture(model, data, forward=forward)
    now, then = cut(captured, initial_parameters(captured.replay.model, initial))
    needed = needed_for_exact(captured.target, captured.batch_size, coupled=captured.coupled)
    cotangents = chosen(captured.target, needed, probes, generator)
    with alone, state_restored(captured.replay.modules) as state, state, pulling():  # checkpointed layers run again
        changes, errors = _changes(captured, now, then, generator)
        found = _lengths(captured, now, then, cotangents)
    values, stderr, freedom, cancellation = _shares(found, exact=cotangents.num_probes == 0)
    return EffectiveDepth(
        log10_values=values,
        log10_stderr=stderr,
        freedom=freedom,
        log10_cancellation=cancellation,
        layers=tuple(segment.name for segment in now),
        log10_changes=changes,
        log10_changes_stderr=errors,
        target=captured.target.name,
        coupled=captured.coupled,
        num_probes=cotangents.num_probes,
        num_samples=captured.batch_size,
    )


def symmetric_logarithms(log_odds: npt.ArrayLike) -> FloatArray:
    """ln p_k for k = 0 .. L, where p_k is the probability that exactly k of L independent events happen.

    The recurrence in `EffectiveDepth.log10_independent` runs on logarithms, so that nothing underflows.  Cost: O(L^2).
    """
    odds = np.atleast_1d(np.asarray(log_odds, dtype=np.float64))
    found = np.zeros(1)
    for one in odds:
        without = -np.logaddexp(0.0, one)
        kept, taken = np.append(found, -np.inf) + without, np.append(-np.inf, found) + (-np.logaddexp(0.0, -one))
        found = np.logaddexp(kept, taken)
    return found


def _largest(log10_values: FloatArray, tolerance: float) -> int:
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance!r}.")
    return int(np.flatnonzero(log10_values >= math.log10(tolerance)).max(initial=0))


def _lengths(captured: Capture, now: Sequence[Segment], then: Sequence[Segment], cotangents: Cotangents) -> FloatArray:
    """|C^T v| for each cotangent v, where C is J and every C^lambda; shape (cotangents, 1 + terms, samples or 1)."""
    most = len(now) + 2
    by_sample = not captured.coupled and captured.units[0].shape[:1] == (captured.batch_size,)
    samples = captured.batch_size if by_sample else 1

    def read(rows: Sequence[int], gradients: Sequence[Tensor], workspace: Workspace, lead: int) -> list[Tensor]:
        norms = [plain_norms(gradient.reshape(*gradient.shape[:2], samples, -1), 3) for gradient in gradients]
        return [functional.pad(one, (0, 0, 0, most - one.shape[1])) for one in norms]

    def draw(first: int, last: int) -> Tensor:
        return cotangents.draw(first, last)[:, None].repeat(1, 2, *[1] * len(cotangents.target.shape))

    route = TwoNetworks(captured, now, then)
    widest = most * max(layer.bytes for layer in captured.units)
    # The terms of one cotangent differ by many orders of magnitude, so cotangents are rescaled at every unit.
    (reading,) = sweep(route, [replace(cotangents, draw=draw)], read, widest=widest, strides=(1,))
    scaled: FloatArray = np.ldexp(reading.values, (reading.exponents - reading.exponents.max())[:, None, None])
    return scaled[:, : route.terms]


def _changes(
    captured: Capture, now: Sequence[Segment], then: Sequence[Segment], generator: torch.Generator
) -> tuple[FloatArray, FloatArray]:
    """log10 |R_l|_F / |I_l|_F of every unit and its standard error over random cotangents."""
    layers = [layer for layer in captured.units if layer.index <= captured.target.index][1:]
    values, errors, pull = [], [], PullBack()
    for new, old, layer in zip(now, then, layers, strict=True):
        v = signs(layer, AUTO_LAYER, generator).draw(0, AUTO_LAYER)
        (moved,), (kept,) = (pull(segment.exit, [segment.entry], v.clone()) for segment in (new, old))
        squares = np.stack([plain_norms(part, 1).square().cpu().numpy() for part in (moved - kept, kept)], axis=1)
        value, error = _log10_root_of_ratio(squares[:, 0], squares[:, 1])
        values.append(value)
        errors.append(error)
    return np.array(values), np.array(errors)


def _shares(lengths: FloatArray, *, exact: bool) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """log10 of every C^lambda's share, its first-order error with freedom, and log10 of sum |C^lambda|_F / |J|_F."""
    # (samples or probes, terms): the error is over samples if exact, else over probes.
    squares = np.square(lengths).sum(axis=0).T if exact else np.square(lengths).sum(axis=2)
    means = squares.mean(axis=0)
    if not means[0] > 0:
        raise ValueError("The Jacobian of the network is zero, so nothing contributes to it.")
    roots = np.sqrt(means)
    shares = roots[1:] / roots[1:].sum()
    relative = squares[:, 1:] / np.where(means[1:] > 0, means[1:], 1.0)
    influence = (relative - (relative @ shares)[:, None]) / 2
    deviations = influence - influence.mean(axis=0)
    freedom = satterthwaite(np.square(deviations).sum(axis=0), (deviations**4).sum(axis=0), len(squares))
    if exact:  # every share contains the tails of all terms: batches of samples show even less of them
        freedom = np.maximum(freedom / 2 - 1, min(2.0, len(squares) - 1.0))
    errors = np.full(len(shares), np.nan)
    if len(squares) > 1:
        errors = np.where(shares > 0, influence.std(axis=0, ddof=1), 0.0) / math.sqrt(len(squares)) / math.log(10)
    with np.errstate(divide="ignore"):
        return np.log10(shares), errors, freedom, float(np.log10(roots[1:].sum() / roots[0]))


def _log10_root_of_ratio(numerators: FloatArray, denominators: FloatArray) -> tuple[float, float]:
    """log10 sqrt(sum / sum), and its error by the delta method over the entries; NaN if there is only one."""
    top, bottom = numerators.sum(), denominators.sum()
    if top == 0 or bottom == 0:  # nothing changed; or all of it, and any change is infinitely large
        return (-math.inf, 0.0) if top == 0 else (math.inf, math.nan)
    influence = numerators / numerators.mean() - denominators / denominators.mean()
    error = influence.std(ddof=1) / math.sqrt(len(influence)) if len(influence) > 1 else math.nan
    return math.log10(top / bottom) / 2, error / (2 * math.log(10))
