"""Name the layer that differs from its siblings: layers of equal kind, each run on the same input.

Let f_1, ..., f_n be segments of one kind (`gradscope.checks.segments`), and x_i the input of f_i.  If all weights were
drawn alike, f_i is to x_i what any f_j is.  So the statistics of f_i(x_i) are compared with those of f_j(x_i), j != i:
z = (s_ii - median_j s_ij) / scale.  An unusual input, made by a wrong layer before, is the same for all f_j, so it does
not make a later layer look wrong.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradscope.checks.levels import limit, nearest
from gradscope.checks.segments import FEWEST, Segment, most, parameters_of, rare
from gradscope.forward.modules import recording_gradients
from gradscope.forward.state import alone, state_restored

FloatArray = npt.NDArray[np.float64]

STRUCTURE, SHARE, SCALE = "structure", "share of quiet features", "scale of"
MOST = 12  # siblings with which a layer is compared: the nearest ones
QUIET = 0.01  # a feature is quiet if its variance is below this fraction of the mean variance
FLOOR, FLOOR_WEIGHTS, FLOOR_SHARE = 0.1, 0.01, 0.02  # smallest scale of a difference: ln of squares, or a share
TINY = 1e-9  # smallest squared relative change that is not rounding


@dataclass(frozen=True)
class Deviation:
    """One deviation of a layer: the layer's name, the quantity, |z| divided by its threshold, and a sentence."""

    layer: str
    quantity: str
    strength: float
    text: str


def odd_structures(group: Sequence[Segment], network: Sequence[Segment]) -> list[Deviation]:
    """Return the segments that consist of other modules than most, or of which other parameters have a gradient.

    What occurs more often in the network, also among layers of other shapes, is a design.
    """
    usual, count = most(group), Counter(s.structure for s in group)
    everywhere = Counter((s.kind[0], s.structure) for s in network[:-1])  # what follows the last one is unknown
    if 2 * count[usual.structure] <= len(group):
        return []
    return [
        Deviation(s.name, STRUCTURE, math.inf, _difference(s, usual))
        for s in group
        if s.structure != usual.structure and everywhere[s.kind[0], s.structure] <= rare(len(group))
    ]


def odd_numbers(group: Sequence[Segment], model: nn.Module, tests: int) -> list[Deviation]:
    """Return the segments whose statistics differ from those of their siblings.

    ``tests``: number of segments of the network that are compared; thresholds hold for all of them together.
    """
    state = state_restored(dict(model.named_modules()))
    with alone, state as kept, kept, torch.inference_mode(False):
        weights = [_scales(segment) for segment in group]
        measured = [
            [_numbers(group[j], given) | weights[j] for j in nearest(i, len(group))[: MOST + 1]]
            for i, given in enumerate(group)
        ]
    deviations = []
    for segment, numbers in zip(group, measured, strict=True):
        for quantity in numbers[0]:
            values = np.array([n[quantity] for n in numbers if quantity in n])
            if len(values) < FEWEST:  # siblings may have no such part
                continue
            z, difference = _z(values[:, 0], values[:, 1], _floor(quantity))
            threshold = limit(tests * len(measured[0][0]), 2 * (len(values) - 1))
            if abs(z) > threshold:
                amount = f"{difference:+.2g} compared with"
                if not quantity.startswith(SHARE):
                    amount = f"{math.exp(max(-700.0, min(700.0, difference))):.3g} times that of"
                text = f"{quantity}: {amount} its siblings (z = {z:.1f}, threshold {threshold:.1f})"
                deviations.append(Deviation(segment.name, quantity, abs(z) / threshold, text))
    return deviations


def _difference(segment: Segment, usual: Segment) -> str:
    """Say in what the structure differs from the usual one."""
    own, leaves = [[leaf.__name__ for leaf in s.leaves] for s in (segment, usual)]
    missing, extra = Counter(leaves) - Counter(own), Counter(own) - Counter(leaves)
    if missing:
        return f"runs no {' and no '.join(missing)} where its siblings do"
    if extra:
        return f"runs {' and '.join(extra)}, unlike its siblings"
    if segment.unreached != usual.unreached:
        names = ", ".join(sorted(set(segment.unreached) ^ set(usual.unreached))[:4])
        gradient = "no gradient" if len(segment.unreached) > len(usual.unreached) else "a gradient"
        return f"{names}: {gradient}, unlike in its siblings"
    if segment.between != usual.between:
        own, others = [[n.removesuffix("Backward0") for n in s.between] or ["nothing"] for s in (segment, usual)]
        return f"{', '.join(own)} lies between it and the next layer, but {', '.join(others)} behind its siblings"
    return f"runs its parts in the order {', '.join(own)}, unlike its siblings"


def _floor(quantity: str) -> float:
    return FLOOR_SHARE if quantity.startswith(SHARE) else FLOOR_WEIGHTS if quantity.startswith(SCALE) else FLOOR


def _z(values: FloatArray, errors: FloatArray, floor: float) -> tuple[float, float]:
    """Return z of the first value among the others, and its difference from their median."""
    others = values[1:]
    center = float(np.median(others))
    scale = max(1.4826 * float(np.median(np.abs(others - center))), float(np.median(errors[1:])), floor)
    difference = float(values[0]) - center
    return difference / (scale * math.sqrt(1 + 1.57 / len(others))), difference


def _numbers(segment: Segment, given: Segment) -> dict[str, tuple[float, float]]:
    """Return logarithms of statistics of ``segment`` on the input of ``given``, with standard errors over features."""
    x = given.received.detach()
    generator = torch.Generator().manual_seed(0)
    other = _normal(x, generator) * x.double().square().mean().sqrt().to(x)
    conv = next(p.ndim for m in segment.modules for p in m.parameters() if p.ndim >= 2) > 2
    axis = 1 if conv else -1
    with recording_gradients():
        leaf = x.clone().requires_grad_()
        with _outputs_of_leaves(segment) as inside:
            y = segment.run(given, leaf)
        others = [segment.run(given, v.requires_grad_()) for v in (2 * x, x + other, x - other)]
        g = torch.autograd.grad(y, leaf, _normal(y, generator), allow_unused=True)[0] if y.requires_grad else None
    with torch.no_grad():
        y = y.detach().double()
        twice, plus, minus = (output.detach().double() for output in others)
        square = _power(y, axis)
        return {
            "length of the output": _log_ratio(square),
            SHARE: _quiet(y, axis),
            "gradient (GSC)": _log_ratio(_power(torch.zeros_like(x) if g is None else g, axis), square),
            "curvature": _log_ratio(_power(plus + minus - 2 * y, axis), _power(plus - minus, axis)),
            "response to twice the input": _log_ratio(_power(twice - y, axis), square),
            **{f"{SHARE} in {name}": _quiet(h, axis) for name, h in inside.items()},
        }


@contextlib.contextmanager
def _outputs_of_leaves(segment: Segment) -> Iterator[dict[str, Tensor]]:
    """Collect outputs of all modules without children while the segment runs once."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1:
            outputs[name] = output.detach().clone()

    with contextlib.ExitStack() as hooks:
        for n, top in enumerate(segment.modules):
            for name, module in top.named_modules(prefix=str(n)):
                if not module._modules and top._modules:
                    hooks.callback(module.register_forward_hook(partial(keep, name)).remove)
        yield outputs


def _scales(segment: Segment) -> dict[str, tuple[float, float]]:
    """Return ln of the mean square of every parameter, with its standard error over entries."""
    return {
        f"{SCALE} {name}": _log_ratio(_power(p.reshape(-1), 0)) for name, p in parameters_of(segment.modules).items()
    }


def _power(values: Tensor, axis: int) -> FloatArray:
    """Return sums of squares over all but the axis of features."""
    moved = values.detach().double().square().movedim(axis if values.ndim > abs(axis) else -1, 0)
    return moved.reshape(moved.shape[0], -1).sum(1).cpu().numpy()


def _log_ratio(a: FloatArray, b: FloatArray | None = None) -> tuple[float, float]:
    """Return ln(mean a / mean b) and its standard error for independent entries; b = 1 by default."""
    value, variance = _log_mean(a)
    if b is not None:
        below, more = _log_mean(b)
        value, variance = max(value - below, math.log(TINY)), variance + more
    return value, math.sqrt(variance)


def _log_mean(a: FloatArray) -> tuple[float, float]:
    mean = float(a.mean())
    if not mean > 1e-300:
        return math.log(1e-300), 0.0
    return math.log(mean), float(np.square(a / mean - 1).sum()) / len(a) ** 2


def _quiet(y: Tensor, axis: int) -> tuple[float, float]:
    """Return the share of features that hardly vary over the batch, and its standard error."""
    y = y.detach().double()
    varied = _power(y - y.mean(0) if len(y) > 1 else y, axis)
    quiet, num = int((varied <= QUIET * varied.mean()).sum()), len(varied)
    likely = (quiet + 1) / (num + 2)  # no quiet feature among a few does not prove that there are none (Laplace)
    return quiet / num, math.sqrt(likely * (1 - likely) / num)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
