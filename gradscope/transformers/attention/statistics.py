"""Statistics of every attention head, from its logits: sums over queries, then means over sequences with errors.

The logits are computed in blocks of bounded memory; nothing of size Tq x Tk is kept for more than one block.  Sums are
in float64, or float32 on devices without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import special
from torch import Tensor

from gradscope import frames
from gradscope.choices import listed
from gradscope.estimates import UPPER, satterthwaite
from gradscope.forward.recorder import NonFiniteLayerError
from gradscope.memory import batch_bytes
from gradscope.transformers.attention.interception import Interception, Scores, Seen, precision

FloatArray = npt.NDArray[np.float64]

# A key is hidden if its logit lies this far below the largest one of its query.  Masks add -10,000, a lower number or
# -inf.  A query is fully masked if all of its logits are below minus this number.
HIDDEN = 5000.0
FIRST_KEYS = 4
ROUNDING = 1e-12  # relative differences between sequences below this are rounding
ENTROPY, LOGIT, FIRST_KEY = "relative_attention_entropy", "largest_attention_logit", "first_key_share"
# The means over queries, in the order of the rows of `summed`, each with the row that counts its queries.
QUERIES, CHOOSING, PLACED = "queries", "queries with several keys", "queries with a position of their own"
MASKED, UNKNOWN = "fully masked queries", "queries with NaN or Inf"
MEANS = {
    "attention_entropy": QUERIES,
    ENTROPY: CHOOSING,
    "collapsed_fraction": CHOOSING,
    "effective_keys": QUERIES,
    "participation_ratio": QUERIES,
    "row_largest_attention_logit": QUERIES,
    FIRST_KEY: QUERIES,
    "first_four_keys_share": QUERIES,
    "own_position_share": PLACED,
}
ROWS = [*MEANS, QUERIES, CHOOSING, PLACED, MASKED, UNKNOWN]


def summed(scores: Scores, collapsed: float) -> tuple[Tensor, Tensor]:
    """Sums (rows, L, H) over the queries of each of L sequences and H heads, and the largest logits (L, H).

    The rows are those of `ROWS`.  ``collapsed``: relative entropy below which a query counts as collapsed.
    """
    num_sequences, num_heads, num_queries, num_keys = scores.shape
    kind = precision(scores.device)
    sums = torch.zeros(len(ROWS), num_sequences, num_heads, dtype=kind, device=scores.device)
    largest = torch.full(sums.shape[1:], -torch.inf, dtype=kind, device=scores.device)
    rows = max(1, batch_bytes(scores.device) // (kind.itemsize * max(num_keys, 1)))  # of logits in one block
    steps = max(1, rows // max(1, num_heads * num_queries)), max(1, rows // max(1, num_queries)), rows
    # Autocast would round products in float32; those in float64 it leaves alone.
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        for sequences in _slices(num_sequences, steps[0]):
            for heads in _slices(num_heads, steps[1]):
                for queries in _slices(num_queries, steps[2]):
                    found, top = _block(scores.block(sequences, heads, queries), queries, num_queries, collapsed)
                    sums[:, sequences, heads] += found
                    largest[sequences, heads] = torch.maximum(largest[sequences, heads], top)
    return sums, largest


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _block(logits: Tensor, queries: slice, num_queries: int, collapsed: float) -> tuple[Tensor, Tensor]:
    """The sums of one block of logits (l, h, t, Tk), and its largest logits (l, h)."""
    top = logits.amax(-1)
    unknown, masked = ~(top < torch.inf), top <= -HIDDEN
    known = ~(unknown | masked)
    gaps = (logits - torch.where(known, top, 0.0)[..., None]).clamp_(min=-HIDDEN)
    powers = gaps.exp()  # exactly 0 for hidden keys
    total = powers.sum(-1)
    num_keys = (gaps > -HIDDEN).sum(-1).to(total.dtype)
    entropy = total.log() - (powers * gaps).sum(-1) / total
    choosing = known & (num_keys > 1)
    relative = entropy / num_keys.log()
    placed = known & (logits.shape[-1] == num_queries)
    places = torch.arange(queries.start, queries.stop, device=logits.device).clamp(max=logits.shape[-1] - 1)
    own = powers[..., places - queries.start, places] if logits.shape[-1] == num_queries else torch.zeros_like(total)
    values = (
        (entropy, known),
        (relative, choosing),
        ((relative < collapsed).to(total.dtype), choosing),
        (entropy.exp(), known),
        (total.square() / powers.square().sum(-1), known),
        (top, known),
        (powers[..., 0] / total, known),
        (powers[..., :FIRST_KEYS].sum(-1) / total, known),
        (own / total, placed),
    )
    sums = [torch.where(where, value, 0.0).sum(-1) for value, where in values]
    counts = [where.sum(-1).to(total.dtype) for where in (known, choosing, placed, masked, unknown)]
    return torch.stack([*sums, *counts]), torch.where(known, top, -torch.inf).amax(-1)


@dataclass(frozen=True)
class Call:
    """One call: sums over queries (rows, B, H), and the largest logits (B, H)."""

    seen: Seen
    sums: FloatArray
    largest: FloatArray

    def total(self, row: str) -> int:
        """A count, over all sequences and heads."""
        return int(self.sums[ROWS.index(row)].sum())


def calls_of(passes: Sequence[tuple[Interception, int]]) -> list[Call]:
    """The calls of one forward pass, with the sequences of all passes."""
    first = [(seen.layer, seen.shape[1]) for seen in passes[0][0].calls]
    found: list[list[tuple[FloatArray, FloatArray]]] = [[] for _ in first]
    for watched, batch_size in passes:
        if first != (own := [(seen.layer, seen.shape[1]) for seen in watched.calls]):
            raise ValueError(
                f"The batches make different calls of attention, {listed(dict.fromkeys(n for n, _ in first))} and "
                f"{listed(dict.fromkeys(n for n, _ in own))}: measure them one by one."
            )
        for parts, seen in zip(found, watched.calls, strict=True):
            sums, largest = seen.measured.arrays
            num = batch_size if sums.shape[1] % batch_size == 0 else sums.shape[1]
            heads = sums.shape[2]
            parts.append((sums.reshape(len(ROWS), num, -1, heads).sum(2), largest.reshape(num, -1, heads).max(1)))
    calls = []
    for seen, parts in zip(passes[0][0].calls, found, strict=True):
        sums, largest = (np.concatenate(both, axis=-2) for both in zip(*parts, strict=True))
        calls.append(call := Call(seen, sums, largest))
        if call.total(UNKNOWN):
            raise NonFiniteLayerError(
                f"Attention in {seen.layer!r} has logits that are NaN or Inf: gs.first_nonfinite(model, data) names "
                "the first layer that makes them."
            )
    return calls


def frame_of(calls: Sequence[Call], quantities: Sequence[str]) -> pd.DataFrame:
    """The tidy frame, with further columns head, low and high.  What no query of a head has is left out."""
    parts = []
    for quantity in quantities:
        for place, call in enumerate(calls):
            part = _largest(call) if quantity == LOGIT else _means(call, quantity)
            about = {
                "layer": call.seen.layer,
                "place": place,
                "quantity": quantity,
                "head": np.arange(len(part["num"])),
            }
            parts.append(pd.DataFrame(about | part)[part["num"] > 0])
    rows = pd.concat(parts, ignore_index=True)
    with np.errstate(divide="ignore"):
        positive = rows["value"].where(rows["value"] >= 0)  # a negative logit has no logarithm
        columns = {
            "layer": rows["layer"],
            "index": rows["place"] + 1,
            "depth_from_output": len(calls) - 1 - rows["place"],
            "quantity": rows["quantity"],
            "value": rows["value"],
            "log10_value": np.log10(positive),
            "log10_stderr_probe": 0.0,
            "log10_stderr_sample": rows["stderr"] / (positive.where(positive > 0) * math.log(10)),
            "stderr_sample": rows["stderr"],
            "num_samples": rows["num"],
        }
    ends = {"low": rows["value"] - rows["margin"], "high": rows["value"] + rows["margin"]}
    return frames.tidy(columns).assign(head=rows["head"].astype("Int64"), **ends)


def _largest(call: Call) -> dict[str, FloatArray]:
    """The largest logit of each head, whose error no sample shows."""
    value = call.largest.max(0)
    unknown = np.full_like(value, np.nan)
    return {"value": value, "stderr": unknown, "margin": unknown, "num": np.full(len(value), len(call.largest))}


def _means(call: Call, quantity: str) -> dict[str, FloatArray]:
    """Mean, standard error and half the interval of each head, over the sequences that have queries."""
    sums, counts = call.sums[ROWS.index(quantity)], call.sums[ROWS.index(MEANS[quantity])]
    have = counts > 0
    num = have.sum(0)
    values = np.where(have, sums / np.maximum(counts, 1), 0.0)
    mean = values.sum(0) / np.maximum(num, 1)
    squares = np.square(np.where(have, values - mean, 0.0))
    second, fourth = squares.sum(0), np.square(squares).sum(0)
    known = (num > 1) & (second > num * np.square(ROUNDING * mean))  # otherwise all sequences agree
    error = np.where(known, np.sqrt(second / np.maximum(num * (num - 1), 1)), np.nan)
    margin = np.full_like(mean, np.nan)
    for each in np.unique(num[known]):
        own = known & (num == each)
        margin[own] = error[own] * special.stdtrit(satterthwaite(second[own], fourth[own], int(each)), UPPER)
    return {"value": mean, "stderr": error, "margin": margin, "num": num}
