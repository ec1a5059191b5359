"""GSC of two models from the same cotangents, so that the noise of the probes cancels in the difference.

    log10 GSC_b(k) - log10 GSC_a(k) = log10 (S_b / S_a) + log10 (p_b / p_a) - log10 (q_b / q_a)

S is the sum over samples and cotangents of |J^T v|^2, p that of |f_k|^2, q that of |f_l|^2 over samples (if the numbers
of entries agree).  The signs of a cotangent depend on a key, the sample and the place alone (`gradscope.probes.signs`),
so both models have the same.  If u_i is what sample i adds to S, the influence of the sample on the difference is
n (u_b,i / S_b - u_a,i / S_a) / ln 10, and likewise for p and q.  It contains the noise of the probes of this sample.
If samples are coupled, or a layer has no dimension of samples, the units are the probes instead.

Cost: one forward pass and one backward pass per cotangent, for each model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradscope.backward.cotangents import Probes, chosen
from gradscope.coefficients.gsc import rows_of
from gradscope.coefficients.pairs import Board
from gradscope.comparing.differences.conditions import Subject
from gradscope.estimates import LOG10_2
from gradscope.forward.inputs import Forward, LossFunction
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import LayerFilter
from gradscope.forward.state import alone
from gradscope.jacobians.capture import captured_unread
from gradscope.memory import together

FloatArray = npt.NDArray[np.float64]
LN10 = math.log(10)


@dataclass(frozen=True)
class Options:
    """Which GSC is measured: arguments of `gradscope.gsc`.  ``seed``: of the probes, the same for every model."""

    forward: Forward | None
    layers: LayerFilter | None
    target: str | None
    loss_fn: LossFunction | None
    probes: Probes
    seed: int


@dataclass(frozen=True)
class Gain:
    """What one model says about one row, each times ``4**exponents``: ``squares`` (cotangents, B or 1) of |J^T v|,
    ``source`` and ``target`` (B or 1) of |f_k| and |f_l|.  ``squares`` are ones for the target itself.
    """

    squares: FloatArray
    source: FloatArray
    target: FloatArray
    exponents: tuple[int, int, int]
    size: int
    num_probes: int

    @property
    def log10_value(self) -> float:
        """log10 GSC."""
        parts = (self.squares, self.source, self.target)
        with np.errstate(divide="ignore"):
            gain, p, q = (np.log10(part.sum()) + 2 * e * LOG10_2 for part, e in zip(parts, self.exponents, strict=True))
        return float(gain + p - q - math.log10(self.size * max(1, self.num_probes)))


@dataclass(frozen=True)
class Gains:
    """The rows of one model by name, in execution order; ``coupled``: whether samples influence each other."""

    rows: dict[str, Gain]
    coupled: bool
    remarks: tuple[str, ...]


def gains(subject: Subject, options: Options) -> Gains:
    """Measure one model.  Raises as `gradscope.gsc`."""
    batch, forward, loss_fn = subject.batch, options.forward, options.loss_fn
    data = batch.inputs if loss_fn is None else (batch.inputs, batch.labels)
    with interruptible() as whole, whole, together(), subject.context():
        captured = captured_unread(
            subject.model, data, forward=forward, layers=options.layers, loss_fn=loss_fn, target=options.target
        )
        with alone, captured.replay.guard() as state, state:  # checkpointed layers run again during the sweep
            rows = rows_of(captured, options.layers, options.target)
            board = Board(captured, rows, rows[-1:], "batch")
            generator = torch.Generator().manual_seed(options.seed)
            cotangents = chosen(board.columns[0], board.needed[0], options.probes, generator)
            readings = board.swept([cotangents], None)
            lengths = [board.lengths[row.index] for row in rows]
    found, target = {}, lengths[-1]
    for row, reading, length in zip(board.sources, readings, lengths, strict=False):
        most = int(reading.exponents.max())
        squares = np.square(np.ldexp(reading.values, (reading.exponents - most)[:, None]))
        exponents = most, length.exponent, target.exponent
        found[row.name] = Gain(squares, length.squares, target.squares, exponents, row.size, cotangents.num_probes)
    return Gains(found, captured.coupled, captured.remarks)


def units(a: Gain, b: Gain, *, coupled: bool) -> FloatArray | None:
    """The influence of each sample, or of each probe, on the change of log10 GSC; None if it is unknown."""
    pairs = [(a.squares.sum(axis=0), b.squares.sum(axis=0)), (a.source, b.source), (b.target, a.target)]
    num = len(a.source)
    if not coupled and num > 1 and all(len(part) == num for pair in pairs for part in pair):
        return np.sum([influence(*pair) for pair in pairs], axis=0)
    if a.num_probes == b.num_probes > 0:
        return influence(a.squares.sum(axis=1), b.squares.sum(axis=1))
    return None


def influence(a: FloatArray, b: FloatArray) -> FloatArray:
    """The influence of each of n terms on log10 (sum b / sum a): n (b_i / sum b - a_i / sum a) / ln 10."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return len(a) * (b / b.sum() - a / a.sum()) / LN10


def noise(a: Gain, b: Gain) -> float:
    """The root mean square of the relative changes of |J^T v|^2, weighted by |J^T v|^2, on the scale of log10.

    The change of log10 S is not larger, to first order, and may be small by chance; this number is not.
    """
    if a.squares.shape != b.squares.shape:
        return math.inf
    moved = np.ldexp(b.squares, 2 * (b.exponents[0] - a.exponents[0])) - a.squares
    where = a.squares > 0
    relative = np.divide(np.square(moved), a.squares, out=np.zeros_like(moved), where=where)
    total = a.squares.sum()
    return float(np.sqrt(relative.sum() / total)) / LN10 if total > 0 else 0.0
