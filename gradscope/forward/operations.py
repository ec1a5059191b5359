"""What is known of torch's own operations, by the name of the autograd node that each leaves behind.

A user's ``autograd.Function`` never has such a name: its node's name ends in "Backward", without a digit.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.autograd.graph import Node

from gradscope.forward.trunk import Vertex

# An entry of the result depends on the same entry of each operand (operands may be broadcast).
# The digit tells variants apart, such as an operand that is a number.
ELEMENTWISE = frozenset(
    f"{name}Backward{variant}"
    for variant in (0, 1)
    for name in (
        "Abs Add Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Log "
        "Maximum Minimum Mish Mul NativeDropout Neg Pow Reciprocal Relu Rsqrt Sigmoid Silu Sin Softplus Sqrt Sub Tanh "
        "Threshold ToCopy Where"
    ).split()
)

# Products with a matrix, and which input is the left factor: a row of the result depends on the same row of it.
PRODUCTS = {"AddmmBackward0": 1, "MmBackward0": 0}


def live_inputs(node: Node, live: Collection[Vertex]) -> list[int]:
    """Which inputs of an operation are among the ``live`` tensors."""
    return [number for number, parent in enumerate(node.next_functions) if parent in live]


def output_kind(tensor: Vertex) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Shape and dtype of a tensor of the graph; ((), None) where torch does not tell."""
    node, output_nr = tensor
    metadata = node._input_metadata  # of a backward's inputs, which are the operation's outputs
    if output_nr >= len(metadata):
        return (), None
    return tuple(metadata[output_nr].shape), metadata[output_nr].dtype
