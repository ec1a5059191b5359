"""`diff(a, b, data)`: which layer of two models differs, by how much, and whether rounding explains it.

Three measurements of both models on the same batch (names of files in this folder):

- `passes`: every value of b's forward pass against that of a, with equal inputs for every layer; `rounding` says what
  rounding explains.  These numbers are exact, and they find the layer.
- `paired`: GSC from the same cotangents, so that the noise of the probes cancels.
- `layer_statistics`: statistics without the same groups of samples.

Intervals hold for all layers of a quantity together (`simultaneous`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from gradscope.backward.cotangents import Probes
from gradscope.choices import Level, PathLike, Range, checked, shown
from gradscope.coefficients.profiles import Matrix
from gradscope.comparing.differences import paired, saved
from gradscope.comparing.differences.conditions import Subject, first, fitted, second
from gradscope.comparing.differences.difference import COMPILED, FREE, GSC, HELD, LENGTH, Difference, Row, to_frame
from gradscope.comparing.differences.layer_statistics import changes
from gradscope.comparing.differences.matching import Matching, matched
from gradscope.comparing.differences.paired import LN10, Gains, Options, gains
from gradscope.comparing.differences.passes import Distance, Trace, distance, followed, traced
from gradscope.comparing.differences.rounding import FACTOR, Rounding, rounding
from gradscope.forward.inputs import Forward, LossFunction, as_batch
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import OUTPUT, LayerFilter
from gradscope.forward.outputs import first_tensor
from gradscope.forward.state import alone, state_restored
from gradscope.measures.measuring import Measure

# What a measurement raises if a model does not allow it; the result then says why.
REFUSED = (ValueError, TypeError, ArithmeticError, RuntimeError)
Found = dict[str, tuple[str, Distance]]
First = Annotated[
    nn.Module | Matrix | pd.DataFrame | PathLike,
    Range(
        "a model (load a checkpoint into one first), a Profile, a frame, or the path of a frame (.parquet, .csv)",
        lambda a: not isinstance(a, (str, Path)) or Path(a).suffix in (".parquet", ".csv"),
    ),
]


@checked
def diff(
    a: First,
    b: Any,
    data: Any = None,
    *,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: Probes = "auto",
    measures: Sequence[Measure] | None = None,
    level: Level = 0.95,
    generator: torch.Generator | None = None,
) -> Difference:
    """Return the differences between two models, between a model under two conditions, or between two saved results.

    Arguments:
        a: The first model, or a saved result: a `gradscope.Profile`, a tidy frame, or the path of a saved frame.  A
            checkpoint must be loaded into a model first.
        b: What is compared with a.  A module; or a function that changes a copy of a, such as
            ``lambda model: model.bfloat16()`` or ``torch.compile``; or a context for a second run of a, such as
            ``torch.autocast("cpu")``; or a second saved result.  The batch is moved to the dtype and device of b.
        data, forward, loss_fn: As for `gradscope.gsc`.  ``data`` is one batch; for saved results, it is left out.
        layers, target, probes: As for `gradscope.gsc`.  Both models have the same probes.  "auto" means exact GSC if a
            basis has at most 128 cotangents, and 40 random probes otherwise.
        measures: Statistics to compare, as for `gradscope.measure`; an empty list leaves them out.
        level: Probability that the intervals of all layers contain the true values of a quantity.
        generator: Source of the probes.  Default: a fixed seed.

    To find the layers that differ, each module of b receives the inputs of its partner in a.  Partners are modules with
    equal names, or equal shapes and neighbors.  A layer differs if the relative distance between its outputs in a and b
    exceeds four times the sum of both rounding errors.  The rounding errors of a and b are estimated from copies of a
    in other dtypes (`gradscope.comparing.differences.rounding`).  GSC, a length or a statistic differs if its change
    exceeds rounding, and the interval of the change, if known, excludes 0.

    Returns:
        A `Difference`.  ``print`` shows the first layer that differs, and layers without a partner.

    Cost for both models together: up to eight forward passes, and the backward passes of up to four calls of
    `gradscope.gsc`.  ``measures`` cost up to 17 calls of `gradscope.measure` for each model, and one per copy of a.
    Memory: all inputs and outputs of modules of a, twice, and a copy of the model.

    Raises:
        TypeError: b has none of the types listed above, ``data`` is missing for two models, or ``data`` is given with
            saved results.
        ValueError: The data are invalid, the saved results share no row, or one of them has several rows for the same
            layer and quantity.

    >>> import torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=4, width=16, generator=torch.Generator().manual_seed(0))
    >>> x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    >>> print(gs.diff(model, lambda copy: copy.bfloat16(), x).headline)
    No layer differs by more than rounding explains.
    """
    if not isinstance(a, nn.Module):
        if data is not None:
            raise TypeError("a is a saved result, so data would be ignored: leave data out, or give two models.")
        if not isinstance(b, (Matrix, pd.DataFrame, str, Path)):
            raise TypeError(f"a is a saved result, so b must be one too: a Profile, a frame or a path; got {shown(b)}.")
        return saved.difference(a, b, level)
    with interruptible() as whole, whole:
        batch = as_batch(data, forward=forward, loss_fn=loss_fn)
        one = first(a, batch)
        seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
        return _of_models(one, second(one, b), Options(forward, layers, target, loss_fn, probes, seed), measures, level)


def _of_models(
    one: Subject, other: Subject, options: Options, measures: Sequence[Measure] | None, level: float
) -> Difference:
    forward = options.forward
    trace = traced(one.modules, one.batch, forward)
    matching = matched(trace.structures, traced(other.modules, other.batch, forward, other.context()).structures)
    held, free = (
        followed(trace, other.modules, other.batch, forward, partner=matching.partner, held=held, under=other.context())
        for held in (True, False)
    )
    explained = rounding(trace, one, other, forward)
    remarks = list(explained.remarks)
    places = _places(trace, held)
    rows = [
        Row(quantity, name, found[name][0], index, found[name][1].relative, explained.of(name, held=quantity == HELD))
        for quantity, found in ((HELD, held), (FREE, free))
        for name, index in places.items()
        if name in found
    ]
    rows += _compiled(trace, (one, other), explained, forward)
    copies = [twin.subject for twin in explained.twins]
    swept = _tried(
        lambda: [gains(subject, options) for subject in (one, other, *copies)], "GSC was not measured", remarks
    )
    coupled = swept is None or swept[0].coupled or swept[1].coupled
    rows += _lengths(trace, free, explained, coupled=coupled)
    if swept is not None:
        rows += _gsc(trace, swept, explained, matching, remarks)
    if measures is None or len(measures):
        of_layers = _tried(
            lambda: changes(one, other, explained, matching.partner, options, measures, coupled=coupled),
            "Statistics were not measured",
            remarks,
        )
        for one_change in of_layers or ():
            quantity, layer, name, before, after, own, units = one_change
            index = places.get(_key(trace, layer), 0)
            rows.append(Row(f"{quantity}_change", layer, name, index, after - before, own, units))
    frame = to_frame(rows, num_samples=one.batch.size, level=level)
    names = [type(subject.model).__name__ for subject in (one, other)]
    dtypes = [str(subject.dtype).removeprefix("torch.") for subject in (one, other)]
    return Difference(
        first=next((row.layer for row in rows if row.quantity in (HELD, COMPILED) and row.value > row.rounding), None),
        frame=frame,
        matching=matching,
        subject=f"{names[0]} ({dtypes[0]}) and {names[1]} ({dtypes[1]}), {one.batch.size} samples:",
        population=_population(coupled, level),
        remarks=tuple(dict.fromkeys(remarks)),
    )


def _tried(call: Callable[[], Any], what: str, remarks: list[str]) -> Any:
    """The result of a measurement, or None with a remark if a model does not allow it."""
    try:
        return call()
    except REFUSED as error:
        remarks.append(f"{what}. {error}")
        return None


def _places(trace: Trace, held: Found) -> dict[str, int]:
    """The place of every compared value in execution order; an input comes right before what its call returned."""
    places = {name: index for index, name in enumerate(trace.values)}
    inputs = {f"input of {label}": places[names[0]] for label, names in trace.returned.items() if names}
    extra = {name: inputs[name] for name in held if name not in places and name in inputs}
    return dict(sorted((extra | places).items(), key=lambda item: item[1]))


def _lengths(trace: Trace, free: Found, explained: Rounding, *, coupled: bool) -> list[Row]:
    """Changes of log10 |f_k|; | |g| - |f| | <= |g - f|, so rounding explains at most that of the distance."""
    rows = []
    for index, name in enumerate(trace.values):
        if name in free:
            label, (f, g, _) = free[name]
            with np.errstate(divide="ignore", invalid="ignore"):
                value = float(np.log10(g.sum()) - np.log10(f.sum())) / 2
            if np.isfinite(value):
                units = None if coupled or len(f) < 2 else paired.influence(f, g) / 2
                rows.append(Row(LENGTH, name, label, index, value, explained.of(name, held=False) / LN10, units))
    return rows


def _gsc(
    trace: Trace, swept: Sequence[Gains], explained: Rounding, matching: Matching, remarks: list[str]
) -> list[Row]:
    """Changes of log10 GSC of the rows that both models have."""
    a, b, *copies = swept
    remarks += [remark for own in (a, b) for remark in own.remarks]
    if a.coupled != b.coupled:
        remarks.append("Samples influence each other in only one of both models.")
    places = {name: index for index, name in enumerate(trace.values)}
    rows, partner = [], {_partner(name, matching): name for name in b.rows}
    for name, own in a.rows.items():
        if name not in partner:
            remarks.append(f"GSC of {name} was not compared: b has no such row.")
            continue
        value = b.rows[partner[name]].log10_value - own.log10_value
        if not np.isfinite(value):
            remarks.append(f"GSC of {name} was not compared: it is zero in one of both models.")
            continue
        noise = sum(
            twin.scale * paired.noise(own, copy.rows[name]) for twin, copy in zip(explained.twins, copies, strict=True)
        )
        ends = [explained.of(_key(trace, end), held=False) / LN10 for end in (name, OUTPUT)]
        units = paired.units(own, b.rows[partner[name]], coupled=a.coupled or b.coupled)
        rows.append(
            Row(
                GSC, name, partner[name], places.get(_key(trace, name), 0), value, FACTOR * noise + 2 * sum(ends), units
            )
        )
    return rows


def _compiled(trace: Trace, subjects: Sequence[Subject], explained: Rounding, forward: Forward | None) -> list[Row]:
    """The outputs of compiled models, whose layers cannot be observed, against that of a in eager mode."""
    rows = []
    for which, subject in zip("ab", subjects, strict=True):
        if subject.compiled is not None:
            inputs = fitted(subject.batch, subject.model, subject.dtype, subject.dtype)
            with torch.no_grad(), alone, state_restored(subject.modules) as state, state, subject.context():
                output = first_tensor(inputs.run(subject.compiled, forward))
            name = trace.returned[OUTPUT][0]
            apart = distance(trace.values[name], output, subject.batch.size)
            index = len(trace.values) - 1
            rows.append(Row(COMPILED, name, f"compiled {which}", index, apart.relative, explained.of(name, held=False)))
    return rows


def _partner(name: str, matching: Matching) -> str:
    """The name in a of a row of b."""
    label, bracket, number = name.partition("[")
    return matching.partner.get(label, label) + bracket + number


def _key(trace: Trace, name: str) -> str:
    """The name of the value that a layer returned."""
    label, bracket, number = name.partition("[")
    returned = trace.returned.get(label, ())
    place = int(number.rstrip("]")) if bracket else 0
    return returned[place] if place < len(returned) else name


def _population(coupled: bool, level: float) -> str:
    units = "the probes of this batch" if coupled else "samples drawn as those of this batch, and for their probes"
    return f"Intervals ({level:.0%}) hold for all layers of a quantity together, for {units}."
