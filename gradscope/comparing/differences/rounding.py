"""How far two models that compute the same function differ because they round differently.

Let a be the first model, a64 its copy in float64, and c its copy in the dtype of the second model.  Rounding explains
a relative distance of layer k up to

    4 (e_k(a, a64) + e_k(a, c)),   e_k(a, c) = |f_k(c) - f_k(a)| / |f_k(a)|

and, at least, up to 2 (eps_a + eps_b), with the machine epsilons of both dtypes.  By the triangle inequality, the sum
in brackets suffices for a second model that rounds like c.  The factor 4 allows for other orders of summation and other
kernels.

If both dtypes agree, e(a, a64) replaces e(a, c), because the second model may round as unluckily as the first.  If only
the second model is in float64, c is a64, and e(a, c) is left out.  If a is in float64, e(a, a64) is the error of its
copy in float32 times 2^-29, the ratio of both precisions.  If a model does not run in float64, its parameters are
changed by one unit in the last place instead.  Cost: two or four forward passes and a copy of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from gradscope.choices import UNFIT
from gradscope.comparing.differences.conditions import Subject, fitted
from gradscope.comparing.differences.passes import Trace, followed
from gradscope.forward.inputs import Batch, Forward
from gradscope.forward.modules import listed

FACTOR = 4.0


class Twin(NamedTuple):
    """A copy of the first model in another dtype.  ``scale`` times its distance from the first model is counted."""

    subject: Subject
    scale: float


@dataclass(frozen=True)
class Rounding:
    """What rounding explains of relative distances, by the names of values: ``held`` and ``free`` as in `passes`."""

    held: Mapping[str, float]
    free: Mapping[str, float]
    least: float
    twins: tuple[Twin, ...]
    remarks: tuple[str, ...]

    def of(self, name: str, *, held: bool) -> float:
        """What rounding explains of the distance of one value."""
        return FACTOR * max((self.held if held else self.free).get(name, 0.0), self.least)


def rounding(trace: Trace, one: Subject, other: Subject, forward: Forward | None) -> Rounding:
    """What rounding explains of the distance between two models, from passes of copies of the first."""
    remarks: list[str] = []
    units = [_unit(subject.dtype) for subject in (one, other)]
    sums: list[dict[str, float]] = [{}, {}]
    twins = _twins(one, other)
    for number, twin in enumerate(twins):
        try:
            found = _distances(trace, twin, forward)
        except (RuntimeError, *UNFIT) as error:  # code of the user that insists on a dtype
            dtype = str(twin.subject.dtype).removeprefix("torch.")
            remarks.append(
                "Rounding is that of parameters changed by one unit in the last place, because the model does not run "
                f"in {dtype}: {str(error)[:120]}"
            )
            twins[number] = twin = _moved(one)
            found = _distances(trace, twin, forward)
        for total, distances in zip(sums, found, strict=True):
            for name, value in distances.items():
                total[name] = total.get(name, 0.0) + value * twin.scale
    return Rounding(sums[0], sums[1], sum(units), tuple(twins), tuple(remarks))


def _twins(one: Subject, other: Subject) -> list[Twin]:
    """Copies whose distances add up to what rounding explains, without the factor."""
    double = one.dtype == torch.float64
    scale = _unit(torch.float64) / _unit(torch.float32) if double else 1.0
    precise = _twin(one, torch.float32 if double else torch.float64, 2 * scale if other.dtype == one.dtype else scale)
    if other.dtype in (one.dtype, torch.float64):
        return [precise]
    return [precise, _twin(one, other.dtype, 1.0)]


def _twin(one: Subject, dtype: torch.dtype, scale: float) -> Twin:
    model = copy.deepcopy(one.model).to(dtype)
    return _subject(model, fitted(one.batch, model, one.dtype, dtype), dtype, scale)


def _moved(one: Subject) -> Twin:
    """A copy whose parameters are changed by one unit in the last place, up or down."""
    model, generator = copy.deepcopy(one.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(2, parameter.shape, generator=generator).to(parameter.device) * 2 - 1
            parameter.mul_((1 + 2 * _unit(one.dtype) * signs).to(parameter.dtype))
    return _subject(model, one.batch, one.dtype, 2.0)


def _subject(model: nn.Module, batch: Batch, dtype: torch.dtype, scale: float) -> Twin:
    return Twin(Subject(listed(model), batch, nullcontext, dtype, None), scale)


def _distances(trace: Trace, twin: Twin, forward: Forward | None) -> tuple[dict[str, float], dict[str, float]]:
    subject = twin.subject
    held, free = (
        {
            name: found.relative
            for name, (_, found) in followed(trace, subject.modules, subject.batch, forward, held=held).items()
        }
        for held in (True, False)
    )
    return held, free


def _unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to this dtype."""
    return torch.finfo(dtype).eps / 2
