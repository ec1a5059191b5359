"""Whether the samples of a batch influence each other: proved from the graph or detected from gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.backward.cotangents import Cotangents
from gradscope.backward.hooks import no_hooks, survey
from gradscope.backward.readings import lengths
from gradscope.backward.route import TrunkRoute
from gradscope.backward.sweep import sweep
from gradscope.forward.layers import Layer
from gradscope.forward.state import state_restored
from gradscope.forward.trunk import ELEMENTWISE, PRODUCTS, Trunk, Vertex
from gradscope.norms import from_real

# Samples lie one after the other in the leading dimension, which has m rows per sample.  m changes in views only.
_VIEWS = {f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias")}

# Operations that process the rows of the leading dimension separately -> number of the input that holds the data.
_LEADING = (
    PRODUCTS
    | {
        f"{name}Backward0": 0
        for name in (
            "Convolution MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D Alias Slice Select Split SplitWithSizes "
            "Unbind Unsqueeze Expand Transpose Permute MaskedFill Softmax LogSoftmax SafeSoftmax "
            "ConstantPadNd NativeLayerNorm FusedRmsNorm NativeBatchNorm CudnnBatchNorm"
        ).split()
    }
    | {"MeanBackward1": 0, "SumBackward1": 0, "SqueezeBackward1": 0}
)  # over some dimensions

# Operations in which each row of the result is computed from the same row of several inputs.
_JOINT = {
    f"{name}Backward0"
    for name in (
        "Bmm Cat Stack ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention "
        "ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention"
    ).split()
}


def _others(dims: Collection[int], ndim: int) -> bool:
    """Whether none of the dimensions is the leading one.  Saved dimensions are unsigned: -1 is 2^64 - 1."""
    return all((dim if dim < 1 << 63 else dim - (1 << 64) + ndim) > 0 for dim in dims)


def _reduces_others(node: Any, ndim: int) -> bool:
    """Whether a mean or sum keeps the leading dimension apart."""
    dims = node._saved_dim
    return bool(dims) and _others(dims, ndim + (0 if node._saved_keepdim else len(dims)))


def _along_other(change: int = 0) -> Callable[[Any, int], bool]:
    """Whether an operation works along another dimension; its input has ``change`` more dimensions than its result."""
    return lambda node, ndim: _others([node._saved_dim], ndim + change)


# Further conditions: functions of the node, whose saved attributes they read, and of the result's number of dimensions.
_PROVISO: dict[str, Callable[[Any, int], bool]] = {
    "NativeLayerNormBackward0": lambda node, ndim: len(node._saved_normalized_shape) < ndim,
    "FusedRmsNormBackward0": lambda node, ndim: len(node._saved_normalized_shape) < ndim,
    "NativeBatchNormBackward0": lambda node, ndim: not node._saved_training,
    "CudnnBatchNormBackward0": lambda node, ndim: not node._saved_training,
    "ConstantPadNdBackward0": lambda node, ndim: not any(node._saved_pad[2 * (ndim - 1) :]),  # last dimension first
    "MeanBackward1": _reduces_others,
    "SumBackward1": _reduces_others,
    "ExpandBackward0": lambda node, ndim: len(node._saved_self_sym_sizes) == ndim,  # no new leading dimension
    "TransposeBackward0": lambda node, ndim: _others([node._saved_dim0, node._saved_dim1], ndim),
    "PermuteBackward0": lambda node, ndim: node._saved_dims[0] in (0, (1 << 64) - ndim),
    "SqueezeBackward1": lambda node, ndim: _others([node._saved_dim], len(node._saved_self_sym_sizes)),
    "SelectBackward0": _along_other(1),
    "UnbindBackward0": _along_other(1),
} | {f"{name}Backward0": _along_other() for name in "Unsqueeze Softmax LogSoftmax SafeSoftmax Stack".split()}


def coupled(
    trunk: Trunk,
    rows: Sequence[Layer],
    target: Layer,
    batch_size: int,
    sources: Collection[str],
    guard: Callable[[], state_restored],
) -> bool:
    """Whether a cotangent on some samples of the target gives nonzero gradients of other samples, at any of the rows.

    Only the ``sources`` and the rows on the trunk are examined.  In a branch, a leading dimension of size B may count
    something else, such as the tokens of an expert.  Samples count as coupled if the leading dimension of a source or
    of the target is not B.  Gradients are computed and compared (`detected`) only if the graph gives no answer.
    ``guard``: context for backward passes, which may run code of the model.
    """
    if batch_size == 1:
        return False
    names = {name: layer for layer in rows for name in layer.origins}
    ends = [names[name] for name in sources if name in names]
    if any(layer.shape[:1] != (batch_size,) for layer in [*ends, target]) or len(ends) < len(sources):
        return True  # unknown; results are right if independent samples are treated as coupled
    rows = [*ends, *[layer for layer in rows if layer.on_trunk and layer.shape[:1] == (batch_size,)]]
    rows = list({layer.index: layer for layer in rows if layer.index != target.index}.values())
    # A hook may mix samples, and the graph does not show it.
    if not rows or ((apart := separate(trunk, batch_size)) and no_hooks(trunk)):
        return False
    with guard() as state, state:
        if not survey(trunk).hooked and apart:
            return False
        return mixed(trunk) or detected(trunk, rows, target, batch_size)


def mixed(trunk: Trunk) -> bool:
    """Whether batch normalization in the graph uses the statistics of the batch, which couples the samples."""
    return any("BatchNorm" in name and getattr(node, "_saved_training", False) for node, name in trunk.names.items())


def separate(trunk: Trunk, batch_size: int) -> bool:
    """Whether the graph proves that samples are independent, by induction from the sources (leading dimension B).

    Every operation must be known, and may compute sample b of its result only from sample b of the inputs that depend
    on the sources.  A leading dimension of B m rows holds the m rows of the first sample first, and so on.  False means
    that there is no proof.  Cost: linear in the number of nodes.
    """
    live, shapes = trunk.order, _Shapes()
    return all(_keeps_apart(node, name, live, shapes, batch_size) for node, name in trunk.names.items())


class _Shapes(dict[Vertex, tuple[int, ...]]):
    """The shape of every tensor of the graph, read once, because each is needed twice; () if torch does not know it."""

    def __missing__(self, tensor: Vertex) -> tuple[int, ...]:
        node, number = tensor
        about = node._input_metadata[number : number + 1]
        self[tensor] = shape = about[0].shape if about else ()
        return shape


def _keeps_apart(node: Any, name: str, live: Collection[Vertex], shapes: _Shapes, batch_size: int) -> bool:
    shape, parents = shapes[node, 0], node.next_functions
    inputs = [number for number, parent in enumerate(parents) if parent in live]
    if not inputs:  # a source
        return bool(shape) and shape[0] == batch_size
    if not shape or shape[0] % batch_size:
        return False
    if name in _VIEWS:
        return True
    ndim, alike = len(shape), True
    for number in inputs:
        operand = shapes[parents[number]]
        if not operand or operand[0] != shape[0]:
            return False  # a part of the samples, or more than all
        alike = alike and len(operand) == ndim
    if name in _PROVISO and not _PROVISO[name](node, ndim):
        return False
    if name in _LEADING:
        return inputs == [_LEADING[name]]
    # An operand with as many dimensions as the result is not broadcast over samples.
    return name in _JOINT or (name in ELEMENTWISE and alike)


def detected(trunk: Trunk, rows: Sequence[Layer], target: Layer, batch_size: int) -> bool:
    """Whether gradients show an influence between samples, for every ordered pair of samples.

    A cotangent that is zero on some samples is pulled back.  Without coupling, its gradient is exactly zero on these
    samples.  The cotangents are nonzero on sets that separate every sample i from every other sample j.  Cost: as many
    cotangents as `splits` has sets, in one sweep: 6 for B = 20, 11 for B = 256.
    """
    inside = splits(batch_size)
    values = torch.randn(target.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = from_real(values.to(target.real_dtype), target.shape, target.dtype)
    masks = torch.from_numpy(inside).reshape(*inside.shape, *[1] * (len(target.shape) - 1))

    def draw(first: int, last: int) -> Tensor:
        return (masks[first:last] * values).to(dtype=target.dtype, device=target.device)

    readings = sweep(TrunkRoute(trunk, rows), [Cotangents(target, len(inside), len(inside), draw)], lengths(batch_size))
    return any(reading.values[~inside].any() for reading in readings)


def splits(batch_size: int) -> npt.NDArray[np.bool_]:
    """The fewest sets of samples, (n, B), so that for any i != j one of them contains i and not j.

    n is the least number with n over n / 2 >= B: every sample lies in n / 2 sets, and no two samples in the same ones
    (Sperner 1928).
    """
    num = next(n for n in itertools.count(1) if math.comb(n, n // 2) >= batch_size)
    inside = np.zeros((num, batch_size), dtype=bool)
    for sample, sets in zip(range(batch_size), itertools.combinations(range(num), num // 2), strict=False):
        inside[list(sets), sample] = True
    return inside
