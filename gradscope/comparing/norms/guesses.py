"""Norms of one gradient that a training may log by mistake, each with what it is: see `gradscope.check_norm`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradscope import distributed
from gradscope.norms import plain_norms

GLOBAL, LOCAL, WORLD, ROOT = "global", "local", "times world size", "times root of world size"
CLIPPED, SCALED, OTHER = "clipped", "loss scale", "another norm"
EPSILON = 1e-6  # that torch.nn.utils.clip_grad_norm_ adds to the norm
MOST_CHANCE = 0.01  # that a number between 0 and 2 |g| fits one of the partial norms by accident
SAME = 1e-6  # largest relative difference of the norms of a replica in two processes


class Guess(NamedTuple):
    """A number that may have been logged: ``values`` has one for every process; ``text`` says what it is."""

    kind: str
    values: Sequence[float]
    text: str


@dataclass(frozen=True)
class Gradient:
    """Squared norms of the gradient by parameter: ``squares`` of the whole, ``own`` of the part in this process.

    ``largest`` entry, ``total`` of absolute values and ``size`` are those of the whole gradient.
    """

    squares: dict[str, float]
    own: dict[str, float]
    largest: float
    total: float
    size: int

    @property
    def norm(self) -> float:
        """|g|."""
        return root(self.squares.values())


def root(squares: Iterable[float]) -> float:
    """The root of the sum."""
    return math.sqrt(math.fsum(squares))


def gradient_of(model: nn.Module, scale: float) -> Gradient:
    """The norms of the gradient in ``.grad``, divided by ``scale``.

    Raises:
        ValueError: There is no gradient, it holds NaN or Inf, or processes hold different replicas of a parameter.
    """
    parameters = dict(model.named_parameters())
    own = {name: dense(p.grad) for name, p in parameters.items() if p.grad is not None}
    whole = own | _averaged({name: p for name, p in parameters.items() if not distributed.is_shard(p)})
    if not whole:
        raise ValueError(
            "No parameter has a gradient: call check_norm after backward(), before the gradient is set to zero."
        )
    squares, largest, total = dict[str, float](), [0.0], [0.0]
    for name, gradient in whole.items():
        part = distributed.local(gradient)

        def read(number: Tensor, how: str, of: Tensor = gradient) -> float:
            return float(distributed.of_all_parts(number, of, how)) / scale

        squares[name] = read(plain_norms(part), "norm") ** 2
        if not math.isfinite(squares[name]):
            raise ValueError(
                f"The gradient of {name!r} holds NaN or Inf, so it has no norm: gs.first_nonfinite(model, data) names "
                "the first faulty layer. A gradient scaler skips such a step."
            )
        entries = part.abs().double()
        largest.append(read(entries.amax() if entries.numel() else entries.sum(), "max"))
        total.append(read(entries.sum(), "sum"))
    parts = {name: (float(plain_norms(distributed.local(g))) / scale) ** 2 for name, g in own.items()}
    return Gradient(squares, parts, max(largest), math.fsum(total), sum(g.numel() for g in whole.values()))


def dense(gradient: Tensor) -> Tensor:
    """The gradient with its zeros, detached."""
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach()


def _averaged(replicas: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The mean over processes of gradients that differ between them, although the parameters are the same."""
    if not distributed.parallel():
        return {}
    zero = {name: torch.zeros_like(p) for name, p in replicas.items() if p.grad is None}
    gradients = {name: zero[name] if p.grad is None else dense(p.grad) for name, p in replicas.items()}
    known = {name: p.grad is not None for name, p in replicas.items()}
    norms = {
        name: (float(plain_norms(p.detach())), float(plain_norms(gradients[name]))) for name, p in replicas.items()
    }
    every = distributed.gathered((norms, known))
    for name in norms:
        values = [others[name][0] for others, _ in every if name in others]
        if len(values) < len(every) or not _same(values):
            raise ValueError(
                f"Parameter {name!r} is not the same in all processes, and it is no DTensor, so nobody knows which "
                "gradient is the whole one: check_norm needs replicas (DDP), fully_shard or parallelize_module."
            )
    trained = [name for name in norms if any(others[name] for _, others in every)]
    if all(_same([others[name][1] for others, _ in every]) for name in trained):
        return {}
    return {name: distributed.mean_of_ranks(gradients[name]) for name in trained}


def _same(values: Sequence[float]) -> bool:
    return all(math.isclose(value, values[0], rel_tol=SAME) for value in values)


def guesses(
    model: nn.Module, g: Gradient, parts: Sequence[float], scale: float | None, max_norm: float | None, rtol: float
) -> Iterator[Guess]:
    """All numbers that are recognized; ``parts`` are the norms of the parts of g in the processes."""
    world = len(parts)

    def same(kind: str, value: float, text: str) -> Guess:
        return Guess(kind, [value] * world, text)

    yield same(GLOBAL, g.norm, "the global norm")
    if distributed.parallel():
        if world == 1 or not _same([g.norm, *parts]):
            for values in (parts, *([part] * world for part in parts)):
                yield Guess(LOCAL, values, "the norm of the gradient of one process")
        for kind, factor, name in ((WORLD, float(world), f"{world}"), (ROOT, math.sqrt(world), f"sqrt({world})")):
            yield same(kind, g.norm * factor, f"the global norm times {name}, for {world} processes")
            yield same(kind, g.norm / factor, f"the global norm divided by {name}, for {world} processes")
    if max_norm is not None:
        for clipped in (g.norm * min(1.0, max_norm / (g.norm + EPSILON)), min(g.norm, max_norm)):
            yield same(CLIPPED, clipped, f"the norm after clipping to max_norm={max_norm:g}")
    if scale is not None:
        yield same(SCALED, g.norm * scale, f"the global norm times the loss scale {scale:g}")
        yield same(SCALED, g.norm / scale, f"the global norm divided by the loss scale {scale:g}")
    named = [g.norm * world**power for power in (-1, -0.5, 0, 0.5, 1)]
    others = dict(_others(g)) | {t: v for t, v in _of_processes(parts) if not any(_close(v, n, rtol) for n in named)}
    partial = {text: root(found) for text, found in _partial(model, g.squares)}
    if rtol * len(set(partial.values())) < MOST_CHANCE:
        others |= partial
    yield from (same(OTHER, value, text) for text, value in others.items() if not _close(value, g.norm, rtol))


def _close(value: float, other: float, rtol: float) -> bool:
    """Whether one logged number may fit both."""
    return math.isclose(value, other, rel_tol=2 * rtol)


def _others(g: Gradient) -> Iterator[tuple[str, float]]:
    """Norms of another kind."""
    norms = [math.sqrt(square) for square in g.squares.values()]
    yield "the square of the global norm", g.norm**2
    yield "the largest entry", g.largest
    yield "the sum of all absolute values", g.total
    yield "the root mean square of all entries", g.norm / math.sqrt(g.size)
    yield "the largest norm of a parameter", max(norms)
    yield "the sum of the norms of the parameters", math.fsum(norms)
    yield "the mean of the norms of the parameters", math.fsum(norms) / len(norms)
    yield "the root mean square of the norms of the parameters", g.norm / math.sqrt(len(norms))


def _of_processes(parts: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Norms of the parts of several processes, joined in a wrong way."""
    yield "the sum of the norms of the processes", math.fsum(parts)
    yield "the mean of the norms of the processes", math.fsum(parts) / len(parts)
    yield "the root of the summed squares of the norms of the processes", root(part**2 for part in parts)


def _partial(model: nn.Module, squares: dict[str, float]) -> Iterator[tuple[str, list[float]]]:
    """The squares that norms of some parameters, or of some parameters twice, are sums of."""
    parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    every = [names[id(p)] for _, p in model.named_parameters(remove_duplicate=False)]
    chosen = {"the norm with tied parameters counted twice": [name for name in every if name in squares]}
    chosen["the norm without frozen parameters"] = [n for n in squares if parameters[n].requires_grad]
    chosen["the norm of matrices and larger tensors only"] = [n for n in squares if parameters[n].ndim > 1]
    chosen["the norm of vectors and numbers only"] = [n for n in squares if parameters[n].ndim < 2]
    prefixes = dict.fromkeys(n.rsplit(".", k)[0] for n in squares for k in range(1, n.count(".") + 1))
    for prefix in prefixes:
        inside = [n for n in squares if n.startswith(f"{prefix}.")]
        chosen[f"the norm of {prefix!r} only"] = inside
        chosen[f"the norm without {prefix!r}"] = [n for n in squares if n not in set(inside)]
    for text, own in chosen.items():
        if own:
            yield text, [squares[name] for name in own]
