"""How a bundle crosses from one cut vertex to the next below it, where a single known operation lies between the two.

The autograd engine computes an elementwise derivative anew for each cotangent, and each of its calls has its price.
Where the operation is known, a bundle of many cotangents is multiplied by the derivative, computed once a bundle, or by
the weight.  Everything else goes through the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradscope.operations import ELEMENTWISE, PRODUCTS, live_inputs, output_kind
from gradscope.trunk import Trunk, Vertex, vertex

# (bundle, spare) -> (bundle, spare): the pulled-back bundle, and memory that may be overwritten.  Fresh memory for each
# link would cost more than its arithmetic.
Link = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]

# With fewer cotangents in a bundle the engine is as fast.
WORTHWHILE = 4


def find_links(trunk: Trunk) -> list[Link | None]:
    """For every cut vertex the map of cotangents (c, *shape) to the cut vertex below; None: the engine must be asked.

    A link overwrites the bundle that it is given.
    """
    live = trunk.position.keys() | trunk.above.keys()
    below = (None, *trunk.edges)
    return [lower and _link(upper, lower, live) for lower, upper in zip(below, trunk.edges, strict=False)]


def _link(upper: GradientEdge, lower: GradientEdge, live: Collection[Vertex]) -> Link | None:
    node: Any = upper.node
    inputs = live_inputs(node, live)
    if len(inputs) != 1 or node.next_functions[inputs[0]] != vertex(lower):
        return None
    (shape, dtype), (shape_below, dtype_below) = output_kind(vertex(upper)), output_kind(vertex(lower))
    if dtype is None or dtype != dtype_below or dtype.is_complex:
        return None
    name = node.name()
    if name in ELEMENTWISE and shape == shape_below:

        def pointwise(bundle: Tensor, spare: Tensor | None) -> tuple[Tensor, Tensor | None]:
            ones = torch.ones_like(bundle[0])
            (derivative,) = torch.autograd.grad((upper,), (lower,), (ones,), retain_graph=True)
            return bundle.mul_(derivative), spare

        return pointwise
    if PRODUCTS.get(name) == inputs[0] and getattr(node, "_saved_alpha", 1) == 1:

        def product(bundle: Tensor, spare: Tensor | None) -> tuple[Tensor, Tensor | None]:
            shape = (*bundle.shape[:2], *shape_below[1:])
            if spare is None or spare.shape != shape:
                spare = bundle.new_empty(shape)
            torch.mm(bundle.flatten(0, 1), node._saved_mat2.T, out=spare.flatten(0, 1))
            return spare, bundle

        return product
    return None
