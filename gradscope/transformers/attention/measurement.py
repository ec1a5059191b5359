"""``attention(model, data)``: what every head attends to, and how large its logits are.

For a query i, s_j are the logits of its keys j after scale and mask, p = softmax(s), and n the number of keys that are
not hidden.  Each statistic is a mean over the queries of a sequence, and then over B sequences:

    attention_entropy             - sum_j p_j ln p_j                      (nats)
    relative_attention_entropy    the entropy / ln n                      (queries with n > 1)
    collapsed_fraction            [relative entropy < ``collapsed``]      (queries with n > 1)
    effective_keys                exp(entropy)
    participation_ratio           1 / sum_j p_j^2
    row_largest_attention_logit   max_j s_j
    largest_attention_logit       max_ij s_ij, over all sequences
    first_key_share               p_0;   first_four_keys_share: p_0 + p_1 + p_2 + p_3
    own_position_share            p_i    (if there are as many queries as keys)

The means are unbiased for a population of sequences; the largest logit grows with their number.  Cost: one forward
pass, and for each call a product q k^T and an exponential per logit, in float64.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pandas as pd
from torch import nn

from gradscope import frames
from gradscope.choices import Level, checked, listed
from gradscope.forward import modules as forward_modules
from gradscope.forward.inputs import Batch, Forward, as_batch, check_devices, stream
from gradscope.forward.interrupts import interruptible
from gradscope.forward.modules import Modules, recording_gradients
from gradscope.forward.state import alone, state_restored
from gradscope.jacobians.description import Description
from gradscope.memory import Later, together
from gradscope.transformers.attention.candidates import unseen
from gradscope.transformers.attention.interception import Interception, NoAttentionError
from gradscope.transformers.attention.statistics import (
    ENTROPY,
    FIRST_KEY,
    LOGIT,
    MASKED,
    MEANS,
    QUERIES,
    ROWS,
    Call,
    calls_of,
    frame_of,
    summed,
)  # fmt: skip

MOST_BATCHES = 500  # so that an endless iterator ends
COLLAPSED = 0.1  # a query is collapsed below this relative entropy
NOT_SEEN = (
    "Compiled code, flex_attention, kernels of other libraries, and attention without softmax are not seen; for a "
    'model of the transformers package choose attn_implementation="sdpa" or "eager".'
)


@dataclass(frozen=True, repr=False, eq=False)
class AttentionHeads:
    """Statistics of the attention heads of a network; made by `gradscope.attention`.

    ``frame``: the statistics, as `to_frame` returns them.  ``description``: which calls of attention were found, as
    `describe` returns it.

    >>> import torch, gradscope as gs
    >>> model = gs.models.GPT(vocabulary=11, length=8, width=8, depth=1, heads=2)
    >>> found = gs.attention(model, torch.arange(16).reshape(2, 8) % 11)
    >>> sorted(found.to_frame()["head"].unique().tolist())
    [0, 1]
    """

    frame: pd.DataFrame
    description: Description

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy frame, one row per quantity, call and head; with the columns ``head``, ``low`` and ``high``.

        Heads are numbered from 0.  ``low`` and ``high`` are the ends of the 95 % interval of ``value``; null if
        unknown.  ``log10_value`` is null for a negative logit.
        """
        return self.frame

    def describe(self) -> Description:
        """Return a frame of all calls of attention, and of all modules that look like attention but made no such call.

        Each call has a row with its mask and its number of fully masked queries.  For a module without a call,
        ``function`` is null, and ``note`` says why no call was found.
        """
        return self.description

    def plot(self, **options: Any) -> Any:
        """Return matplotlib Axes, one map of layers against heads per quantity; see `gradscope.plots.attention`."""
        # Imported on first use, because matplotlib is slow to import.
        return importlib.import_module("gradscope.plots").attention(self.frame, **options)

    def __repr__(self) -> str:
        return f"AttentionHeads({self._title})"

    def __str__(self) -> str:
        """Return a table with the least and the largest value over the heads of every call, and notes."""
        rows: dict[str, dict[str, Any]] = {}
        for layer, part in self.frame.groupby("layer", sort=False):
            values = {name: part.loc[part["quantity"] == name, "value"] for name in (ENTROPY, LOGIT, FIRST_KEY)}
            ranges = {name: f"{v.min():.3g} to {v.max():.3g}" if len(v) else "" for name, v in values.items()}
            rows[str(layer)] = {"heads": part["head"].nunique()} | ranges
        table = pd.DataFrame.from_dict(rows, orient="index").rename(columns=lambda name: name.replace("_", " "))
        return "\n".join([self._title, "", table.to_string(), "", *self.description.notes])

    def _repr_html_(self) -> str:
        """Return what ``print`` shows and the frame as HTML, for notebooks."""
        return frames.notebook(str(self), self.frame[["layer", "head", "quantity", "value", "low", "high"]])

    @property
    def _title(self) -> str:
        calls, heads = self.frame["layer"].nunique(), len(self.frame[["layer", "head"]].drop_duplicates())
        return f"{calls} calls of attention, {heads} heads, {self.frame['num_samples'].max()} sequences"


@checked
def attention(
    model: nn.Module, data: Any, *, forward: Forward | None = None, collapsed: Level = COLLAPSED
) -> AttentionHeads:
    """Return statistics of every attention head: entropy, logits and weights on special keys, with standard errors.

    Every call of ``scaled_dot_product_attention`` is measured, and every softmax whose result is multiplied with values
    (`gradscope.transformers.attention.interception`).  Let p be the attention weights of a query on its n keys that are
    not masked.  Unless stated otherwise, a quantity is a mean over queries and sequences:

    - ``attention_entropy``: entropy of p in nats.
    - ``relative_attention_entropy``: entropy divided by ln n, over queries with n > 1 keys.
    - ``collapsed_fraction``: fraction of the queries with n > 1 keys whose entropy / ln n is below ``collapsed``.
    - ``effective_keys``: exp(entropy).  ``participation_ratio``: 1 / sum p^2.
    - ``largest_attention_logit``: maximum over all queries, keys and sequences, after scale and mask.
      ``row_largest_attention_logit``: mean of each query's largest logit.
    - ``first_key_share``: weight on key 0.  ``first_four_keys_share``: sum of the weights on keys 0 to 3.  Both are
      large if the first keys are attention sinks.
    - ``own_position_share``: weight of query i on key i, if there are as many queries as keys.

    Arguments:
        model: Any module; it is not changed.
        data: B sequences: a tensor (B, ...), a mapping, or an iterable of such batches; as for `gradscope.gsc`.
        forward: A function ``(model, batch) -> output``.
        collapsed: A query counts as collapsed if its entropy / ln n is below this number.

    Returns:
        An `AttentionHeads`.  The standard error is that of the mean over B sequences.  The interval uses Student's t
        with at most B - 1 degrees of freedom (`gradscope.estimates.satterthwaite`).  Standard error and interval are
        missing (null) for one sequence, if all sequences have the same value, and for the largest logit.  Queries whose
        keys are all masked are left out; `describe` gives their number.  All other queries are included, also those at
        padded positions.

    Cost: one forward pass per batch.  Each call of attention needs another product q k^T in float64.  There is one
    device synchronization for all batches together.  The logits are computed in blocks of a few MB (256 MB on devices
    other than the CPU).

    Raises:
        ValueError: No attention was found, a logit is NaN or Inf, all queries of a head are fully masked, two batches
            make different calls, there are more than 500 batches, or the data are invalid.

    >>> import torch, gradscope as gs
    >>> model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> _ = torch.nn.init.zeros_(model.in_proj_weight)  # then q = 0, so all 5 keys have the same weight
    >>> heads = gs.attention(model, torch.randn(4, 5, 8), forward=lambda model, x: model(x, x, x)[0])
    >>> frame = heads.to_frame()
    >>> frame.loc[frame["quantity"] == "effective_keys", ["layer", "head", "value"]].round(4)
                    layer  head  value
    6  MultiheadAttention     0    5.0
    7  MultiheadAttention     1    5.0

    References: Zhai et al. (2023), "Stabilizing transformer training by preventing attention entropy collapse";
    Xiao et al. (2024), "Efficient streaming language models with attention sinks".
    """
    modules = forward_modules.listed(model)
    with interruptible() as whole, whole, together():
        given = stream(data, forward=forward, loss_fn=None)
        batches = (as_batch(each, forward=forward) for each in ([data] if given is None else given))
        several = islice(batches, MOST_BATCHES + 1)
        passes = [(_watch(modules, batch, forward, collapsed), batch.size) for batch in several]
        if len(passes) > MOST_BATCHES:
            raise ValueError(
                f"data has more than {MOST_BATCHES} batches: give a part of them, such as "
                f"itertools.islice(data, {MOST_BATCHES})."
            )
        if not passes:
            raise ValueError("data has no batches: give at least one.")
        return _result(modules, passes)


def begun(model: nn.Module, data: Any, *, forward: Forward | None) -> Callable[[], pd.DataFrame]:
    """Compute on the device, without waiting for it, and return the function that reads the numbers into a frame.

    The frame has the quantities that a `gradscope.Monitor` records.
    """
    batch = as_batch(data, forward=forward, finite=False)
    watched = _watch(forward_modules.listed(model), batch, forward, COLLAPSED)

    def finished() -> pd.DataFrame:
        frame = frame_of(calls_of([(watched, batch.size)]), (ENTROPY, LOGIT, FIRST_KEY))
        return frame.drop(columns=["low", "high"])

    return finished


def _watch(modules: Modules, batch: Batch, forward: Forward | None, collapsed: float) -> Interception:
    """One forward pass, whose calls of attention are measured; the numbers stay on the device.

    Raises NoAttentionError if there is no such call.
    """
    if forward is None:  # a user's function may move the batch to the model
        check_devices(modules, batch)
    watched = Interception(modules, batch.size, lambda scores: Later(summed(scores, collapsed)))
    with alone, state_restored(modules) as state, state, recording_gradients(), watched.watching():
        batch.differentiable()[0].run(modules[""], forward)
        watched.random = state.kept.drew()
    if not watched.calls:
        without = unseen(modules, watched)
        looks = f" in {listed(without)}" if without else ""
        raise NoAttentionError(
            f"No attention was seen in {type(modules['']).__name__}: no scaled_dot_product_attention ran{looks}, and "
            f"no softmax whose result is multiplied with values. {NOT_SEEN}"
        )
    return watched


def _result(modules: Modules, passes: Sequence[tuple[Interception, int]]) -> AttentionHeads:
    watched = passes[0][0]
    without = unseen(modules, watched)
    calls = calls_of(passes)
    for call in calls:
        if not (queries := call.sums[ROWS.index(QUERIES)].sum(0)).all():
            raise ValueError(
                f"All queries of head {int(queries.argmin())} in {call.seen.layer!r} are fully masked, so it attends "
                "to nothing: check the attention mask."
            )
    sizes = ("sequences", "heads", "queries", "keys")
    rows: list[dict[str, Any]] = [
        {"layer": call.seen.layer, "function": call.seen.function, **dict(zip(sizes, call.seen.shape, strict=True))}
        | {"mask": call.seen.mask, "masked_queries": call.total(MASKED)}
        for call in calls
    ]
    rows += [{"layer": name, "note": reason} for name, reason in without.items()]
    types = dict.fromkeys((*sizes, "masked_queries"), "Int64") | {"function": "str", "mask": "str", "note": "str"}
    table = pd.DataFrame(rows).reindex(columns=["layer", "function", *sizes, "mask", "masked_queries", "note"])
    notes = tuple(_notes(calls, watched, without))
    return AttentionHeads(frame_of(calls, [*MEANS, LOGIT]), Description(table.astype(types), notes))


def _notes(calls: Sequence[Call], watched: Interception, without: Mapping[str, str]) -> Iterator[str]:
    """Sentences that say what was seen, and what was not."""
    functions = Counter(call.seen.function for call in calls)
    yield "Seen: " + ", ".join(f"{num} x {function}" for function, num in functions.items()) + "."
    if watched.random:
        yield "The forward pass drew random numbers (dropout?): all numbers are for one draw. model.eval() avoids it."
    if masked := sum(call.total(MASKED) for call in calls):
        yield f"{masked} fully masked queries (summed over heads) are left out."
    for reason, names in _grouped(watched.left_out).items():
        yield f"Not counted: softmax or attention in {listed(names)}, {reason}."
    for reason, names in _grouped((name, reason) for name, reason in without.items()).items():
        yield f"Without attention, though it looks like it: {listed(names)}, {reason}."
    if without:
        yield NOT_SEEN


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by their reason, each name once."""
    found: dict[str, list[str]] = {}
    for name, reason in pairs:
        if name not in found.setdefault(reason, []):
            found[reason].append(name)
    return found
