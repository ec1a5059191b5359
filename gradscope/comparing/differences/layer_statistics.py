"""Changes of the statistics of `gradscope.measure` between two models, with the influence of groups of samples.

With D the difference of a statistic and D_g the difference without the samples of group g, the pseudo-values of the
jackknife are G D - (G - 1) D_g for G groups of equal size.  Both models lose the same samples, so what these samples do
to both cancels.  Cost: 17 `gradscope.measure` of each model, and one of each copy for rounding.

Reference: Efron and Stein (1981), "The jackknife estimate of variance".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.comparing.differences.conditions import Subject
from gradscope.comparing.differences.paired import Options
from gradscope.comparing.differences.rounding import FACTOR, Rounding
from gradscope.comparing.differences.simultaneous import FEWEST
from gradscope.forward.inputs import Batch, copied
from gradscope.measures.measuring import Measure, measure

FloatArray = npt.NDArray[np.float64]
Values = dict[tuple[str, str], float]  # by quantity and layer

GROUPS = 16


class StatisticChange(NamedTuple):
    """The value of a statistic of a layer in both models.  ``units`` (G,): pseudo-values of the change, or None."""

    quantity: str
    layer: str
    other: str
    first: float
    second: float
    rounding: float
    units: FloatArray | None


def changes(
    one: Subject, other: Subject, explained_by: Rounding, partner: Mapping[str, str], options: Options,
    measures: Sequence[Measure] | None, *, coupled: bool,
) -> list[StatisticChange]:  # fmt: skip
    """The changes of all statistics that both models have.  Raises as `gradscope.measure`.

    If samples are ``coupled``, the influence of a group is unknown, because it changes the other samples as well.
    ``partner``: the name of a layer of the first model, by that of the second.
    """
    num = one.batch.size
    groups = [] if coupled or num < FEWEST else np.array_split(np.arange(num), min(num, GROUPS))
    kept = [None, *(torch.from_numpy(np.setdiff1d(np.arange(num), group)) for group in groups)]
    a, b = ([_values(subject, keep, options, measures) for keep in kept] for subject in (one, other))
    copies = [_values(twin.subject, None, options, measures) for twin in explained_by.twins]
    explained: dict[str, float] = {}
    for key, value in a[0].items():  # the largest of all layers, because the change of one may be small by chance
        moved = sum(
            twin.scale * abs(found[key] - value) for twin, found in zip(explained_by.twins, copies, strict=True)
        )
        explained[key[0]] = max(explained.get(key[0], 0.0), FACTOR * max(moved, explained_by.least * abs(value)))
    rows = []
    for (quantity, layer), value in b[0].items():
        key = quantity, partner.get(layer, "")
        if key in a[0]:
            changed = np.array([b[n][quantity, layer] - a[n][key] for n in range(len(kept))])
            units = len(groups) * changed[0] - (len(groups) - 1) * changed[1:] if groups else None
            rows.append(StatisticChange(*key, layer, a[0][key], value, explained[quantity], units))
    return rows


def _values(subject: Subject, keep: Tensor | None, options: Options, measures: Sequence[Measure] | None) -> Values:
    """All statistics of a model on some samples of its batch, or on all."""
    batch = subject.batch if keep is None else _taken(subject.batch, keep)
    data = batch.inputs if options.loss_fn is None else (batch.inputs, batch.labels)
    with subject.context():
        found = measure(subject.model, data, forward=options.forward, loss_fn=options.loss_fn, measures=measures)
    columns = (found[name].tolist() for name in ("quantity", "layer", "value"))
    return {(quantity, layer): value for quantity, layer, value in zip(*columns, strict=True)}


def _taken(batch: Batch, keep: Tensor) -> Batch:
    """Some samples of a batch."""
    num, samples = batch.size, {id(tensor) for tensor in batch.samples}

    def inputs(tensor: Tensor) -> Tensor:
        return tensor[keep.to(tensor.device)] if id(tensor) in samples and len(tensor) == num else tensor

    def labels(tensor: Tensor) -> Tensor:
        return tensor[keep.to(tensor.device)] if tensor.ndim and len(tensor) == num else tensor

    return Batch(copied(batch.inputs, inputs), copied(batch.labels, labels))
