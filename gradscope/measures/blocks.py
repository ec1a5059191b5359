"""The neurons of one layer in blocks that fit into a processor's cache, so that several statistics share one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradscope.measures.samples import Statistic
from gradscope.memory import EMPTY, grown

PREACTIVATIONS, SLOPES, RESPONSES = "preactivations", "slopes", "responses"
BLOCK = 1 << 17  # entries of a block that fits into the processor's cache
BLOCK_ELSEWHERE = 1 << 23  # other devices need large operations

Source = Callable[[Tensor], Tensor]


class Neurons:
    """The inputs h (B, ...) of a nonlinearity phi as a matrix (B, neurons), with phi'(h) and phi(h) on request.

    ``slopes``, ``responses``: functions of h.  ``by_part``: whether they may be called with some neurons of h, too.
    ``rooms``: memory that several layers use one after the other; see `room`.
    """

    def __init__(
        self, received: Tensor, slopes: Source | None = None, responses: Source | None = None, *,
        by_part: bool = True, rooms: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.received, self.by_part = received, by_part
        self.sources = {SLOPES: slopes, RESPONSES: responses}
        self.matrix = flattened(received)
        self._wholes: dict[str, Tensor] = {}
        self._rooms = {} if rooms is None else rooms

    @classmethod
    def of(cls, kind: str, values: Any) -> Neurons:
        """The neurons of which these are the pre-activations, the slopes, or the pair (h, phi(h))."""
        if kind == RESPONSES:
            return cls(values[0], responses=lambda _: values[1], by_part=False)
        return cls(values, slopes=lambda part: part)

    @property
    def number(self) -> int:
        """Number of neurons."""
        return self.matrix.shape[1]

    @cached_property
    def scale(self) -> Tensor | None:
        """The largest |h|, by which h is divided where squares may leave the range of float64; None elsewhere."""
        return largest(self.matrix.abs().amax()) if self.matrix.dtype == torch.float64 else None

    @cached_property
    def inverse_lengths(self) -> Tensor:
        """1 / |h_b| of every sample (B,), and 0 for a sample of zeros."""
        scale = 1.0 if self.scale is None else self.scale
        # In blocks, because torch would copy all of h to float64.  A block in use has its own memory.
        parts = (block.received for block in self.blocks())
        scaled = (torch.div(part, scale, out=self.room("first", part)) for part in parts)
        lengths = scale * torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(h, dim=1) for h in scaled]), dim=0
        )
        return torch.where(lengths >= torch.finfo(torch.float64).tiny, lengths.reciprocal(), 0.0)

    def blocks(self) -> Iterator[Block]:
        """All neurons, some at a time."""
        entries = BLOCK if self.matrix.device.type == "cpu" else BLOCK_ELSEWHERE
        size = max(1, entries // len(self.matrix))
        for first in range(0, self.number, size):
            yield Block(self, slice(first, first + size))

    def room(self, name: str, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Memory for a tensor of this name and the shape of ``like``; the next block uses the same memory.

        "first" and "second" are for whichever statistic runs.  Without this, the allocator may return memory to the
        system after every block, and page faults take three quarters of the time.
        """
        self._rooms[name] = grown(self._rooms.get(name, EMPTY), like.numel(), dtype, like.device)
        return self._rooms[name][: like.numel()].view(like.shape)

    def computed(self, kind: str, block: Block) -> Tensor:
        """Slopes or responses of a block, (B, some of the neurons)."""
        source = self.sources[kind]
        assert source is not None
        if self.by_part:
            return source(block.received)
        if kind not in self._wholes:
            self._wholes[kind] = flattened(source(self.received), self.received)
        return self._wholes[kind][:, block.place]


class Block:
    """Some neurons of a layer; what several statistics need is computed once.  Nobody may change it in place.

    It is overwritten by the next block.
    """

    def __init__(self, neurons: Neurons, place: slice) -> None:
        self.neurons, self.place = neurons, place
        self.received = neurons.matrix[:, place]

    def room(self, name: str) -> Tensor:
        """Memory for float64 numbers, one per entry of the block; see `Neurons.room`."""
        return self.neurons.room(name, self.received)

    @cached_property
    def values(self) -> Tensor:
        """h in float64."""
        return self.received if self.received.dtype == torch.float64 else self.room("values").copy_(self.received)

    @cached_property
    def deviations(self) -> Tensor:
        """The differences from the mean over samples, in float64."""
        if self.neurons.scale is None:  # float64 holds sums of narrower numbers exactly
            return torch.sub(self.values, self.values.mean(dim=0), out=self.room("deviations"))
        # Otherwise rounding of a large mean spoils small deviations.
        shifted = torch.sub(self.values, self.values[:1], out=self.room("deviations"))
        return shifted.sub_(shifted.mean(dim=0))

    @cached_property
    def squares(self) -> Tensor:
        """The squared deviations."""
        return torch.square(self.deviations, out=self.room("squares"))

    @cached_property
    def spread(self) -> Tensor:
        """The sum of squared deviations of every sample, (B,)."""
        return self.squares.sum(dim=1)

    @cached_property
    def steepness(self) -> Tensor:
        """|phi'(h)| in the precision of h."""
        slopes = self.neurons.computed(SLOPES, self)
        return torch.abs(slopes, out=self.neurons.room("steepness", slopes, slopes.dtype))

    @property
    def responses(self) -> Tensor:
        """phi(h) in float64, which the caller may change."""
        return self.room("first").copy_(self.neurons.computed(RESPONSES, self))


class Blockwise(Statistic):
    """Base class of statistics that are computed from sums over blocks of neurons."""

    def of_block(self, block: Block) -> Sequence[Tensor]:
        """Return the contribution of one block of neurons to each sum that the statistic needs."""
        raise NotImplementedError

    def finished(self, sums: Sequence[Tensor], neurons: Neurons) -> Sequence[Tensor]:
        """Turn ``sums`` over neurons into the arguments of ``estimate``; by default, each sum / number of neurons."""
        return [total / neurons.number for total in sums]

    def parts(self, values: Any) -> Sequence[Tensor]:
        return in_one_pass([self], Neurons.of(self.of, values))[0]


def in_one_pass(statistics: Sequence[Blockwise], neurons: Neurons) -> list[Sequence[Tensor]]:
    """The ``parts`` of every statistic.  Cost: one pass over the pre-activations, two if lengths of samples count."""
    sums: list[Sequence[Tensor]] = [()] * len(statistics)
    for block in neurons.blocks():
        for number, statistic in enumerate(statistics):
            more, before = statistic.of_block(block), sums[number]
            sums[number] = [a + b for a, b in zip(before, more, strict=True)] if before else more
    return [statistic.finished(total, neurons) for statistic, total in zip(statistics, sums, strict=True)]


def largest(value: Tensor) -> Tensor:
    """The value, by which others are divided so that their squares stay in the range of float64."""
    return value.clamp_min(torch.finfo(torch.float64).tiny)


def flattened(values: Tensor, like: Tensor | None = None) -> Tensor:
    """The values as a matrix (B, neurons), in memory order, because the order of neurons does not matter.

    ``like``: a tensor of the same shape whose neurons decide the order.
    """
    like = values if like is None else like
    if values.ndim < 2 or values.shape[0] < 2 or 0 in values.shape:
        raise ValueError(
            "Statistics need pre-activations (B, ...) of at least two samples with at least one neuron, got shape "
            f"{tuple(values.shape)}."
        )
    values = values.detach()
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)
