"""The numbers of residual additions x + f(x), with standard errors over samples.

Cost: a few reductions per sum in the forward pass, and that of `gradscope.transformers.residual.shares` for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradscope.backward.cotangents import Cotangents
from gradscope.backward.sweep import Progress
from gradscope.choices import listed
from gradscope.estimates import Estimate, FloatArray
from gradscope.jacobians.capture import Capture
from gradscope.measures.samples import jackknifed
from gradscope.memory import SCRATCH, Later
from gradscope.transformers.residual.additions import Addition
from gradscope.transformers.residual.shares import passed
from gradscope.transformers.residual.sums import Compute, Sum

SHARES = ("skip_share", "branch_share", "cross_share")
PERCENTILE = 0.99


@dataclass(frozen=True)
class Entry:
    """One residual addition.  Arrays have one entry per sample, or one in all if the first dimension is no batch.

    ``stream``, ``write``, ``total``, ``product``: means of x^2, f^2, (x + f)^2 and x f.
    ``largest``, ``percentile``: of |x + f| over its root mean square.  ``kurtosis``: of the entries of x + f.
    ``channel``: where the largest lies.  ``passed``, ``variance``: see `gradscope.transformers.residual.shares.passed`.
    """

    write_name: str
    block: str
    kind: str
    stream: FloatArray
    write: FloatArray
    total: FloatArray
    product: FloatArray
    largest: FloatArray
    percentile: FloatArray
    kurtosis: FloatArray
    channel: int
    passed: FloatArray
    variance: FloatArray

    def merge(self, other: Entry) -> Entry:
        """The same addition for the samples of both batches."""
        both: dict[str, Any] = {
            name: np.concatenate([own, getattr(other, name)])
            for name, own in vars(self).items()
            if isinstance(own, np.ndarray) and name != "variance"
        }
        channel = max((self, other), key=lambda entry: float(entry.largest.max())).channel
        return replace(self, **both, channel=channel, variance=self.variance + other.variance)


def statistics(batch_size: int) -> Compute:
    """What `observed` computes of every sum; each number is one per sample, or one in all."""

    def compute(a: Tensor, b: Tensor, alpha: float) -> Callable[[Tensor], list[Tensor]]:
        pairs = zip(_blocks(a, batch_size), _blocks(b, batch_size), strict=True)
        products = [torch.stack([x * x, x * y, y * y]).mean(dim=2) for x, y in pairs]
        first, mixed, second = torch.cat(products, dim=1)
        operands = [first, alpha * mixed, alpha**2 * second]
        return lambda total: operands + _of_sum(total, batch_size)

    return compute


def _of_sum(total: Tensor, batch_size: int) -> list[Tensor]:
    """Mean square, largest and percentile over RMS, kurtosis, and place of the largest entry; NaN if all are zero."""
    parts = []
    for block in _blocks(total, batch_size):
        scale = block.abs().amax(dim=1, keepdim=True)
        unit = block / scale  # so that no power overflows
        rms = unit.square().mean(dim=1).sqrt()
        place = PERCENTILE * (unit.shape[1] - 1)
        top = unit.abs().topk(unit.shape[1] - math.floor(place), dim=1).values
        percentile = torch.lerp(top[:, -1], top[:, max(-2, -top.shape[1])], place % 1)
        deviations = (unit - unit.mean(dim=1, keepdim=True)).square()
        kurtosis = deviations.square().mean(dim=1) / deviations.mean(dim=1).square()
        square = torch.where(scale[:, 0] > 0, (scale[:, 0] * rms).square(), 0.0)
        parts.append(torch.stack([square, 1 / rms, percentile / rms, kurtosis, block.abs().argmax(dim=1).double()]))
    return list(torch.cat(parts, dim=1))


def _blocks(tensor: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Rows of samples (or one row) in float64, a few at a time."""
    rows = tensor.reshape(batch_size if tensor.shape[0] == batch_size else 1, -1)
    for block in rows.split(max(1, SCRATCH // rows.shape[1])):
        yield (block.cpu() if block.device.type == "mps" else block).double()  # mps has no float64


def read_entries(
    captured: Capture, additions: Sequence[Addition], cotangents: Cotangents, channel_dim: int | None,
    progress: Progress | None,
) -> list[Entry]:  # fmt: skip
    """The entries of all additions, in execution order.  Raises FloatingPointError if gradients leave their range."""
    numbers = Later([tensor for addition in additions for tensor in addition.sum.values])
    arrays, entries = iter(numbers.arrays), []
    found = passed(captured, additions, cotangents, progress)
    for addition, (squares, variance) in zip(additions, found, strict=True):
        first, product, second, total, largest, percentile, kurtosis, places = (next(arrays) for _ in range(8))
        if not np.isfinite([first, second, total]).all():
            raise FloatingPointError(
                f"The squares of the residual stream before or after {addition.name!r} overflow: measure at a smaller "
                "scale of weights or input."
            )
        stream, write = (second, first) if addition.skip else (first, second)
        sample = int(np.argmax(largest))
        channel = _channel(addition.sum, sample, int(places[sample]), captured.batch_size, channel_dim)
        entries.append(
            Entry(
                addition.name, addition.sum.module, addition.kind, stream,
                write, total, product, largest, percentile, kurtosis, channel, squares, variance,
            )
        )  # fmt: skip
    return entries


def _channel(one: Sum, sample: int, place: int, batch_size: int, channel_dim: int | None) -> int:
    """The channel of an entry, given by its place in the row of a sample."""
    num, default = len(one.shape), 1 if len(one.shape) > 3 else -1
    dim = default if channel_dim is None else channel_dim
    if not -num <= dim < num:
        raise ValueError(f"channel_dim={dim} does not exist in a sum of shape {one.shape}.")
    first = sample * math.prod(one.shape[1:]) if one.shape[0] == batch_size else 0
    return int(np.unravel_index(first + place, one.shape)[dim])


@dataclass(frozen=True)
class Ledger:
    """What was measured so far; ``remarks`` as in `Residual`."""

    entries: tuple[Entry, ...]
    target: str
    coupled: bool | None
    num_probes: int
    num_samples: int
    remarks: tuple[str, ...]

    def merge(self, other: Ledger) -> Ledger:
        """Both batches together."""
        names, others = ([entry.write_name for entry in one.entries] for one in (self, other))
        if names != others:
            raise ValueError(
                f"Two batches have different residual additions, {listed(names)} and {listed(others)}: measure them "
                "one at a time."
            )
        return Ledger(
            tuple(a.merge(b) for a, b in zip(self.entries, other.entries, strict=True)),
            self.target,
            self.coupled or other.coupled,  # both are known
            max(self.num_probes, other.num_probes),
            self.num_samples + other.num_samples,
            tuple(dict.fromkeys((*self.remarks, *other.remarks))),
        )


Function = Callable[..., Any]
# The arrays of an `Entry` that a quantity is computed from, and the function of their means.
QUANTITIES: dict[str, tuple[tuple[str, ...], Function]] = {
    "stream_rms": (("stream",), np.sqrt),
    "write_rms": (("write",), np.sqrt),
    "sum_rms": (("total",), np.sqrt),
    "write_ratio": (("write", "stream"), lambda write, stream: np.sqrt(write / stream)),
    "write_cosine": (("product", "stream", "write"), lambda product, x, f: product / np.sqrt(x * f)),
    "sum_largest": (("largest",), lambda mean: mean),
    "sum_p99": (("percentile",), lambda mean: mean),
    "sum_kurtosis": (("kurtosis",), lambda mean: mean),
}
SIGNED = ("write_cosine", *SHARES)


def estimate(arrays: Sequence[FloatArray], function: Function, num_samples: int, *, signed: bool) -> Estimate | None:
    """A function of means over samples, with its error if the arrays have ``num_samples`` entries; None if NaN."""
    num, value = len(arrays[0]), float(function(*[array.mean() for array in arrays]))
    if np.isnan(value):
        return None
    if num != num_samples or num < 2:
        return Estimate(value, None)
    return jackknifed(value, function(*[(a.sum() - a) / (num - 1) for a in arrays]), signed=signed)


def probe_errors(entry: Entry) -> FloatArray:
    """Standard errors of the three shares due to probes, to first order."""
    parts = entry.passed.sum(axis=0)
    gradient = (np.eye(3) - (parts / parts.sum())[:, None]) / parts.sum()
    errors: FloatArray = np.sqrt(np.einsum("ki,ij,kj->k", gradient, entry.variance, gradient))
    return errors
