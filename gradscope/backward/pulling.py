"""Vector-Jacobian products of a batch of cotangents on a recorded graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradscope.memory import is_out_of_memory

# Largest size in bytes of all gradients that one call of the autograd engine returns.
RUN_BYTES = 1 << 26


@contextlib.contextmanager
def pulling() -> Iterator[None]:
    """Context for vector-Jacobian products: nothing is recorded, and warnings about slow vectorization are silenced.

    These warnings mean that torch lacks a batching rule.  This only costs time, and a user cannot change it.
    """
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def engine(
    outputs: Sequence[GradientEdge], inputs: Sequence[GradientEdge], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` with ``retain_graph``, for edges of one graph that all depend on each other.

    This calls the engine itself: the checks of the arguments in `torch.autograd.grad` take as long as a small layer.
    """
    found: tuple[Tensor, ...] = _run(
        tuple(outputs), tuple(cotangents), True, False, tuple(inputs), False, accumulate_grad=False
    )
    return found


_run = torch.autograd.Variable._execution_engine.run_backward


def pulled(output: GradientEdge, inputs: Sequence[GradientEdge], v: Tensor) -> tuple[Tensor, ...]:
    """J^T v for one cotangent v of ``output``, at every edge of ``inputs``."""
    found = torch.autograd.grad((output,), inputs, (v,), retain_graph=True)
    return tuple([gradient.to_dense() if gradient.is_sparse else gradient for gradient in found])


class PullBack:
    """Vector-Jacobian products: vectorized, or one by one if the backward pass cannot be vectorized.

    Afterwards ``vectorized`` says which of the two was used.
    """

    def __init__(self) -> None:
        self.vectorized = True

    def __call__(self, output: GradientEdge, inputs: Sequence[GradientEdge], cotangents: Tensor) -> Sequence[Tensor]:
        """J^T v for every cotangent v of ``output`` (first dimension), at every edge of ``inputs``."""

        def vjp(v: Tensor) -> tuple[Tensor, ...]:
            return pulled(output, inputs, v)

        if len(cotangents) == 1:
            return [gradient[None] for gradient in vjp(cotangents[0])]
        if self.vectorized:
            try:
                return torch.vmap(vjp)(cotangents)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # No batching rule, or the backward pass branches on its data.  Any other error is raised again below.
                self.vectorized = False
        return [torch.stack(column) for column in zip(*map(vjp, cotangents), strict=True)]
