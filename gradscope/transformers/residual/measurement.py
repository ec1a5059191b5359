"""``residual(model, data)``: what each block writes into the residual stream, and how gradients pass through it.

    x -> x + f(x):   |f| / |x|,   <x, f> / (|x| |f|)
    J = S + W:       |J|_F^2 = |S|_F^2 + |W|_F^2 + 2 <S, W>_F   (through the skip, the branch, and both)

J is the Jacobian of the target with respect to x through this addition.  Cost: one forward pass with a few reductions
per addition, and one backward pass per cotangent.  |J|_F^2 and its parts are unbiased with probes; their ratios have a
bias of the order of the squared standard error.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from gradscope import frames
from gradscope.backward.cotangents import chosen, generator_or_default, needed_for_exact, resolved
from gradscope.backward.sweep import Progress
from gradscope.choices import checked
from gradscope.choices import listed as quoted
from gradscope.estimates import Estimate, FloatArray
from gradscope.forward.inputs import Forward, LossFunction, as_batch, stream
from gradscope.forward.interrupts import interruptible
from gradscope.forward.modules import Modules, listed
from gradscope.forward.state import alone, state_restored
from gradscope.jacobians.capture import captured_unread
from gradscope.measures.samples import SAMPLES, quiet
from gradscope.memory import together
from gradscope.transformers.residual.additions import find_additions
from gradscope.transformers.residual.ledger import (
    QUANTITIES,
    SHARES,
    SIGNED,
    Ledger,
    estimate,
    probe_errors,
    read_entries,
    statistics,
)
from gradscope.transformers.residual.sums import observed

SHOWN = 40  # additions that are printed


@dataclass(frozen=True, repr=False, eq=False)
class Residual:
    """The residual additions of a network in execution order; made by `gradscope.residual`.

    At an addition x + f(x), x is the skip and f(x) the write.  The attributes have one entry per addition:

    - ``writes``: names of the modules whose outputs are the writes.
    - ``blocks``: names of the innermost modules that contain the sums.
    - ``skips``: kinds of the skips, "identity", "scaled" or "projection".
    - ``channels``: the channel of the largest entry of each sum.
    - ``estimates``: a dict from each quantity to one `Estimate` per addition, or None where the quantity is 0 / 0.
    - ``stderr_probe``: a dict from ``skip_share``, ``branch_share`` and ``cross_share`` to their standard errors due to
      probes; 0 if exact, NaN if unknown.

    Other attributes: ``num_probes`` is the number of random probes per batch, 0 if exact.  ``coupled`` says whether
    samples influence each other.  It is None (not tested) for a single batch of fewer than 30 samples if ``probes`` is
    a number.  ``remarks`` are sentences on what the result depends on and what it leaves out.

    >>> import torch, gradscope as gs
    >>> model = gs.models.MLP(depth=2, width=4, residual="identity", generator=torch.Generator().manual_seed(0))
    >>> gs.residual(model, torch.ones(3, 4))
    Residual(2 additions to 'layers.1', exact, 3 samples)
    """

    writes: tuple[str, ...]
    blocks: tuple[str, ...]
    skips: tuple[str, ...]
    channels: tuple[int, ...]
    estimates: dict[str, tuple[Estimate | None, ...]]
    stderr_probe: dict[str, FloatArray]
    target: str
    coupled: bool | None
    num_probes: int
    num_samples: int
    num_batches: int
    remarks: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy frame, one row per addition and quantity, with columns ``block``, ``skip``, ``stderr_probe``.

        ``layer`` is the module that computes f(x) in an addition x + f(x), and ``index`` numbers the additions from 1.
        The quantity ``outlier_channel`` holds the attribute ``channels``.  Quantities that may be negative (cosine,
        shares) have no logarithm.  A quantity that is 0 / 0, such as the cosine if f(x) = 0, has no row.
        """
        channels = tuple(Estimate.exact(channel) for channel in self.channels)
        parts = [self._rows(name, found) for name, found in (*self.estimates.items(), ("outlier_channel", channels))]
        return pd.concat(parts, ignore_index=True)

    def plot(self, *, axes: Any = None) -> Any:
        """Return three matplotlib Axes with a figure; see `gradscope.plots.residual`."""
        # Imported on first use, because matplotlib is slow to import.
        return importlib.import_module("gradscope.plots").residual(self, axes=axes)

    def __str__(self) -> str:
        kind = f"{self.num_probes} probes" if self.num_probes else "exact shares"
        head = f"{len(self.writes)} residual additions, gradients of {self.target!r}, {kind}, {self._samples}"
        table = self._table().to_string(index=False, max_rows=SHOWN, float_format="{:.3g}".format, na_rep="")
        return "\n".join([head, table, *self.remarks])

    def __repr__(self) -> str:
        kind = f"{self.num_probes} probes" if self.num_probes else "exact"
        return f"Residual({len(self.writes)} additions to {self.target!r}, {kind}, {self._samples})"

    def _repr_html_(self) -> str:
        """Return the summary and a table as HTML, for notebooks."""
        return frames.notebook(repr(self), self._table())

    @property
    def _samples(self) -> str:
        return f"{self.num_samples} sample{'s' * (self.num_samples != 1)}"

    def _table(self) -> pd.DataFrame:
        columns = {name: [np.nan if e is None else e.value for e in found] for name, found in self.estimates.items()}
        return pd.DataFrame({"write": self.writes, "skip": self.skips, **columns, "channel": self.channels})

    def _rows(self, quantity: str, found: Sequence[Estimate | None]) -> pd.DataFrame:
        known = [number for number, one in enumerate(found) if one is not None]
        estimates, index = [one for one in found if one is not None], np.array(known, dtype=np.int64) + 1
        signed, unknown = quantity in SIGNED, np.full(len(known), np.nan)
        columns = {
            "layer": [self.writes[n] for n in known],
            "index": index,
            "depth_from_output": len(self.writes) - index,
            "quantity": quantity,
            "value": [one.value for one in estimates],
            "log10_value": unknown if signed else [one.log10_value for one in estimates],
            "log10_stderr_probe": unknown if signed else 0.0,
            "log10_stderr_sample": unknown if signed else [one.log10_stderr for one in estimates],
            "stderr_sample": [one.stderr for one in estimates],
            "coupled": self.coupled,
            "num_probes": self.num_probes if quantity in SHARES else 0,
            "num_samples": self.num_samples,
        }
        return frames.tidy(columns).assign(
            block=[self.blocks[n] for n in known],
            skip=[self.skips[n] for n in known],
            stderr_probe=self.stderr_probe[quantity][known] if quantity in SHARES else 0.0,
        )


@checked
def residual(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: int | str = "auto",
    channel_dim: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Residual:
    """Return the sizes of skip and branch at each sum x + f(x), and the share of the squared Jacobian through each.

    A residual addition is a sum of two tensors of one shape: the write f is computed from a tensor x, and the skip is x
    or a simple function of x.  A skip is x itself ("identity"), x times a number or parameter ("scaled"), or x after
    linear or normalizing layers, pooling or slicing ("projection").  Sums are found in the autograd graph.

    Every addition has the following quantities.  q(z) is the mean of z^2 over entries and samples.  In this list,
    x is the skip after any scaling or projection.  "x itself" is the tensor before scaling and projection.

    - ``stream_rms``, ``write_rms``, ``sum_rms``: sqrt(q(x)), sqrt(q(f)), sqrt(q(x + f)).
    - ``write_ratio``: sqrt(q(f) / q(x)).  ``write_cosine``: mean(x f) / sqrt(q(x) q(f)).
    - ``sum_largest``, ``sum_p99``: largest and 99th percentile of |x + f|, divided by its root mean square.
      ``sum_kurtosis``: mean(d^4) / mean(d^2)^2 with d the deviation of an entry from the mean entry.  These three are
      computed for each sample and averaged.
    - ``outlier_channel``: channel with the largest |x + f|, relative to the root mean square of x + f in its sample.
    - ``skip_share``, ``branch_share``, ``cross_share``: |S|_F^2, |W|_F^2 and 2 <S, W>_F, each divided by |S + W|_F^2.
      S and W are the Jacobians of the target with respect to x itself, S through the skip and W through the branch.
      The three shares add up to 1.

    Arguments:
        model, data, forward, target, loss_fn: As for `gradscope.gsc`.  All batches of a stream are measured.
        probes: ``"exact"``, a number of random cotangents per batch, or ``"auto"``: exact if that takes at most
            128 cotangents, otherwise 40 random ones.
        channel_dim: Dimension of the channels.  Default: 1 for four or more dimensions (images), otherwise the last.
        generator: Source of the probes.  Default: a fixed seed.
        progress: Called with the fraction of the backward passes of the current batch that is done.

    Returns:
        A `Residual`.  Standard errors over samples are unknown (None) for fewer than 30 samples, or if samples
        influence each other.

    Cost: one forward pass, and one backward pass per cotangent.  For each cotangent, some branches need a second
    backward pass.  In half precision, these are all branches.  Otherwise, they are those whose input x also reaches
    the target around the sum x + f(x), as in parallel branches or long skips.

    Raises:
        ValueError: No residual addition lies between input and target, batches of a stream have different additions,
            ``channel_dim`` does not exist, or data or options are invalid.
        FloatingPointError: Numbers leave the range of their dtype.

    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=2, width=4, residual="identity", generator=torch.Generator().manual_seed(0))
    >>> ledger = gs.residual(model, torch.ones(3, 4))
    >>> ledger.writes, ledger.skips
    (('layers.0.out', 'layers.1.out'), ('identity', 'identity'))
    >>> shares = [ledger.estimates[name][0].value for name in ("skip_share", "branch_share", "cross_share")]
    >>> round(sum(shares), 6)
    1.0
    """
    resolved(probes)
    generator, modules = generator_or_default(generator), listed(model)
    batches = stream(data, forward=forward, loss_fn=loss_fn)
    streamed = batches is not None

    def measure(batch: Any) -> Ledger:
        with together():
            return _measured(
                modules, batch, forward=forward, target=target, loss_fn=loss_fn, probes=probes, streamed=streamed,
                channel_dim=channel_dim, generator=generator, progress=progress,
            )  # fmt: skip

    with interruptible() as whole, whole, quiet():
        found = list(map(measure, [data] if batches is None else batches))
        if not found:
            raise ValueError("data yields no batch. Is the iterator exhausted, or the loader empty?")
        return _result(reduce(Ledger.merge, found), len(found))


def _measured(
    modules: Modules, data: Any, *, forward: Forward | None, target: str | None, loss_fn: LossFunction | None,
    probes: int | str, streamed: bool, channel_dim: int | None, generator: torch.Generator, progress: Progress | None,
) -> Ledger:  # fmt: skip
    """The ledger of one batch."""
    size = as_batch(data, forward=forward, loss_fn=loss_fn, finite=False).size
    with observed(modules, statistics(size)) as sums:
        captured = captured_unread(modules[""], data, forward=forward, loss_fn=loss_fn, target=target)
    # The snapshot holds the hooks of `observed`, which are gone now.
    captured = replace(captured, replay=replace(captured.replay, snapshot=None))
    captured.lengths.read()  # names the first layer with NaN or Inf
    # Whether samples are coupled takes backward passes, and few samples have no standard errors anyway.
    coupled = captured.coupled if isinstance(probes, str) or streamed or size >= SAMPLES else None
    with alone, state_restored(captured.replay.modules) as state, state:  # checkpointed layers run again
        additions, unseen = find_additions(sums, captured.graph, captured.reached)
        if not additions:
            raise ValueError(
                f"The model has no residual addition between the input and {captured.target.name!r}: no sum of two "
                "real tensors of one shape in Python code, of which one is computed from the other. Such sums that are "
                f"complex or made inside operations of torch: {unseen}."
            )
        needed = needed_for_exact(captured.target, captured.batch_size, coupled=coupled is not False)
        cotangents = chosen(captured.target, needed, probes, generator)
        entries = read_entries(captured, additions, cotangents, channel_dim, progress)
    hidden = f"Sums x + f(x) that are not listed, because they are complex or inside operations of torch: {unseen}."
    return Ledger(
        tuple(entries),
        captured.target.name,
        coupled,
        cotangents.num_probes,
        captured.batch_size,
        (*captured.remarks, *([hidden] if unseen else [])),
    )


def _result(ledger: Ledger, num_batches: int) -> Residual:
    """The result, with standard errors; quantities that are 0 / 0 are None and named in a remark."""
    estimates = dict[str, tuple[Estimate | None, ...]]()
    num = ledger.num_samples if ledger.coupled is False else 0
    for quantity, (names, function) in QUANTITIES.items():
        arrays = [[getattr(entry, name) for name in names] for entry in ledger.entries]
        estimates[quantity] = tuple(estimate(own, function, num, signed=quantity in SIGNED) for own in arrays)
    for number, share in enumerate(SHARES):
        parts = [[entry.passed[:, number], entry.passed.sum(axis=1)] for entry in ledger.entries]
        estimates[share] = tuple(estimate(own, lambda part, all_: part / all_, num, signed=True) for own in parts)
    writes = tuple(entry.write_name for entry in ledger.entries)
    missing = [
        f"{quantity} does not exist for {quoted(writes[n] for n, one in enumerate(found) if one is None)}, because a "
        "length is zero."
        for quantity, found in estimates.items()
        if None in found
    ]
    errors = np.array([probe_errors(entry) for entry in ledger.entries]).T
    return Residual(
        writes=writes,
        blocks=tuple(entry.block for entry in ledger.entries),
        skips=tuple(entry.kind for entry in ledger.entries),
        channels=tuple(entry.channel for entry in ledger.entries),
        estimates=estimates,
        stderr_probe=dict(zip(SHARES, errors, strict=True)),
        target=ledger.target,
        coupled=ledger.coupled,
        num_probes=ledger.num_probes,
        num_samples=ledger.num_samples,
        num_batches=num_batches,
        remarks=(*ledger.remarks, *missing),
    )
