"""What a capture recorded and what it did not record: a frame, a printed table, and notes that say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
import torch

from gradscope.backward.pulling import PullBack
from gradscope.forward.layers import Layer, Origin, module_name
from gradscope.forward.state import alone, state_restored

VMAP, LOOP = "vmap", "loop"
BATCH, RUNNING = "batch", "running"
NEVER_CALLED = "never called"


@dataclass(frozen=True)
class Description:
    """What a forward pass recorded and what not: ``frame``, a table, and ``notes``, sentences about the whole pass.

    The frame has one row per recorded tensor, and one row per module that was not called or whose output was not
    recorded.  Its columns:

    - ``layer``, ``aliases``: name of the tensor, and its other names.
    - ``call``, ``shape``, ``dtype``, ``bytes``: number of the module's call; shape, dtype and memory of the tensor.
    - ``on_trunk``: whether every path from the input to the target passes through the tensor.
    - ``unit``: whether the tensor is a row of `gradscope.gsc` by default.
    - ``fired``: whether the module was called.
    - ``left_out``: why there is no recorded tensor; null for a recorded one.
    - ``modified``: whether the tensor was later overwritten in place.  The values before that are measured.
    - ``batch_norm``: which statistics batch normalization used, "batch" or "running".
    - ``dropout``: whether dropout was active.
    - ``backward``: how torch pulls a batch of cotangents back to the tensor: at once ("vmap") or one by one ("loop").
      It is null for the target, and where ``on_trunk`` is False.

    >>> import torch, gradscope as gs
    >>> found = gs.capture(gs.models.MLP(depth=2, width=4), torch.ones(2, 4)).describe()
    >>> found.to_frame()["layer"].tolist()
    ['input', 'layers.0.linear', 'layers.0', 'layers.1.linear', 'layers.1']
    """

    frame: pd.DataFrame
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return the frame, without the notes."""
        return self.frame

    def __str__(self) -> str:
        shown = self.frame.astype(object).where(self.frame.notna(), "").replace({True: "yes", False: ""})
        return "\n".join([shown.to_string(index=False), "", *self.notes])


def describe(captured: Any) -> Description:
    """The description of ``captured``, a `Capture`.  Cost: two cotangents pulled back through the trunk."""
    names = {layer.index: layer.name for layer in captured.units}
    with alone, state_restored(captured.replay.modules) as state, state:  # checkpointed layers run again
        backward = _backward(captured.reached)
    rows: list[dict[str, Any]] = []
    for layer in captured.reached:
        name = names.get(layer.index, layer.name)
        made = {module_name(n) for n, origin in layer.origins.items() if origin is Origin.MADE}
        rows.append(
            {
                "layer": name,
                "aliases": ", ".join(other for other in layer.names if other != name),
                "call": layer.call,
                "shape": "x".join(map(str, layer.shape)),
                "dtype": str(layer.dtype).removeprefix("torch."),
                "on_trunk": layer.on_trunk,
                "unit": layer.index in names,
                "fired": True,
                "left_out": None,
                "modified": layer.modified,
                "batch_norm": _batch_norm(layer),
                "dropout": not made.isdisjoint(captured.dropout),
                "backward": backward.get(layer.index),
                "bytes": layer.bytes,
            }
        )
    left_out = captured.left_out | dict.fromkeys(captured.uncalled, NEVER_CALLED)
    rows += [
        {"layer": name, "on_trunk": False, "unit": False, "fired": reason != NEVER_CALLED, "left_out": reason}
        for name, reason in left_out.items()
    ]
    types = {
        "batch_norm": "str",
        "left_out": "str",
        "modified": "boolean",
        "dropout": "boolean",
        "call": "Int64",
        "bytes": "Int64",
    }
    frame = pd.DataFrame(rows).astype(types)
    return Description(frame, tuple(_notes(frame, captured)))


def remarks(
    layers: Sequence[Layer], *, random: bool, picked: str | None, merged: Mapping[str, Sequence[str]],
    avoidable: Sequence[str], frozen: Sequence[str], meeting: str | None,
) -> Iterator[str]:  # fmt: skip
    """Sentences that say what the results depend on."""
    statistics = {_batch_norm(layer) for layer in layers if "BatchNorm" in type(layer.edge.node).__name__}
    if BATCH in statistics:
        yield "Batch normalization used the statistics of this batch."
    if RUNNING in statistics:
        yield "Batch normalization used running statistics, which are (0, 1) in a model that was never trained."
    if random:
        yield "The forward pass drew random numbers (dropout?): all results are for one draw."
    if picked:
        yield picked
    if frozen:
        yield (
            f"Frozen embedding: {_listed(frozen)}. What lies before the first trainable layer is not measured. To "
            "measure from the embedding on, call requires_grad_() on it."
        )
    if meeting is not None:
        yield (
            f"A default profile begins at {meeting!r}, where the paths from several inputs meet. To measure the layers "
            "before it, hold all inputs but one fixed: forward=lambda model, x: model(x, other)."
        )
    for row, blocks in merged.items():
        yield (
            f"Functional code such as x + f(x) joins {_listed(blocks)}, so together they are one row, {row!r}. For a "
            "row each, mark the sums in forward: x = gs.tap(x, name)."
        )
    if avoidable:
        yield (
            f"These blocks are not rows, because some path to the target avoids each of them: {_listed(avoidable)}. "
            "Ask for them with layers=; the coefficient then counts only the paths through this layer."
        )


def off_trunk(names: Sequence[str]) -> str:
    """The remark about layers inside branches."""
    return (
        f"Inside a branch, so the coefficient counts only the paths through this layer: {_listed(names)}. A growth "
        "rate leaves these layers out if it has others."
    )


def _notes(frame: pd.DataFrame, captured: Any) -> list[str]:
    """Notes about the whole forward pass; the last ones say what was not recorded and what to do."""
    seen = frame[frame["left_out"].isna()]
    notes = [
        f"{len(seen)} tensors recorded, {int(seen['on_trunk'].sum())} of them on the trunk to "
        f"{captured.target.name!r}, {int(seen['unit'].sum())} rows of a default profile; "
        f"{int(seen['bytes'].sum()) / 2**20:.3g} MiB.",
        "Samples influence each other, so the batch is measured as one vector."
        if captured.coupled
        else "Samples are independent.",
        *captured.remarks,
    ]
    if changed := list(seen.loc[seen["modified"], "layer"]):
        notes.append(f"Overwritten in place later; the earlier values are measured: {_listed(changed)}.")
    if slow := list(seen.loc[seen["backward"] == LOOP, "layer"]):
        notes.append(
            f"torch pulls cotangents one by one through an operation above {_listed(slow)}: correct, but slow."
        )
    if inside := list(seen.loc[~seen["on_trunk"], "layer"]):
        notes.append(
            f"Inside branches, so not in a default profile: {_listed(inside)}. Ask for them with layers=; the "
            "coefficient then counts only the paths through this layer."
        )
    if captured.elsewhere:
        notes.append(f"Recorded, but the target does not depend on them: {_listed(captured.elsewhere)}.")
    for reason in dict.fromkeys(captured.left_out.values()):
        names = [name for name, other in captured.left_out.items() if other == reason]
        notes.append(f"Called, but not recorded: {_listed(names)}; {reason}.")
    if captured.uncalled:
        notes.append(
            f"Never called as modules, so not recorded: {_listed(captured.uncalled)}. They may be unused, containers "
            "whose items are called one by one, modules called by .forward(), modules called inside a transform of "
            "torch.func (vmap, grad), or modules used for their weights only. "
            'To record a tensor inside, mark it with gs.tap(tensor, "name").'
        )
    notes.append("Functional code (F.relu, +) does not create a layer; mark its tensors with gs.tap.")
    return notes


def _batch_norm(layer: Layer) -> str | None:
    """The statistics that batch normalization used to make this tensor; None if another operation made it."""
    node = layer.edge.node
    if "BatchNorm" not in node.name():
        return None
    return BATCH if node._saved_training else RUNNING  # type: ignore[attr-defined]


def _backward(layers: Sequence[Layer]) -> dict[int, str]:
    """How two cotangents are pulled back to each layer of the trunk from the layer above: "vmap" or "loop"."""
    trunk = [layer for layer in layers if layer.on_trunk]
    found = {}
    for below, above in pairwise(trunk):
        pull_back = PullBack()
        zeros = torch.zeros(2, *above.shape, dtype=above.dtype, device=above.device)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pull_back(above.edge, [below.edge], zeros)
        slow = any("performance drop" in str(warning.message) for warning in caught)
        found[below.index] = VMAP if pull_back.vectorized and not slow else LOOP
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
