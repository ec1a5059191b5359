"""The Jacobian between two recorded layers, as a linear operator, and the affine map at the recorded point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradscope.backward.pulling import PullBack, pulling
from gradscope.forward.layers import Layer
from gradscope.forward.modules import recording_gradients
from gradscope.forward.replay import Replay
from gradscope.forward.state import alone, state_restored
from gradscope.memory import batch_bytes
from gradscope.norms import from_real, real
from gradscope.operators import LinearOperator
from gradscope.probes import sphere


class Jacobian(LinearOperator):
    """Jacobian J of layer ``target`` with respect to layer ``source``, over the whole flattened batch, as an operator.

    J has the shape (B d_target) x (B d_source), where B is the batch size and d the size of a layer for one sample.  A
    product with J^T costs one backward pass between the layers.  A product with J costs two, because it is the
    derivative of a product with J^T.  All vectors are real: a complex number of a layer is two entries, its real and
    its imaginary part.

    >>> import gradscope as gs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    >>> J = gs.capture(model, torch.ones(2, 3).double()).jacobian("0", "2")
    >>> J.shape, torch.allclose(J.dense() @ torch.ones(6).double(), J.matvec(torch.ones(6).double()))
    ((4, 6), True)
    """

    source: Layer
    target: Layer
    _replay: Replay

    def __init__(self, source: Layer, target: Layer, replay: Replay) -> None:
        for name, value in (("source", source), ("target", target), ("_replay", replay)):
            object.__setattr__(self, name, value)

        # Bound methods would refer to this object, and so keep the graph in memory until the garbage collector runs.
        def product(function: Callable[[Layer, Layer, Tensor], Tensor], v: Tensor) -> Tensor:
            if source.index == target.index:
                return v
            # Hooks and checkpointed layers may change the model in a backward pass.
            with alone, state_restored(replay.modules) as state, state:
                return function(source, target, v)

        products = partial(product, _pushed), partial(product, _pulled)
        super().__init__((target.size, source.size), *products, target.real_dtype, target.device)

    def dense(self) -> Tensor:
        """Return J as a matrix.  Cost: B d_target backward passes, one per row, vectorized."""
        if self.source.index == self.target.index:
            return torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        rows, pull_back = [], PullBack()
        num = max(1, batch_bytes(self.device) // (self.target.bytes))
        for first in range(0, self.shape[0], num):
            last = min(first + num, self.shape[0])
            unit = torch.zeros(last - first, self.shape[0], dtype=self.dtype, device=self.device)
            unit[torch.arange(last - first), torch.arange(first, last)] = 1
            with alone, state_restored(self._replay.modules) as state, state, pulling():
                cotangents = from_real(unit, self.target.shape, self.target.dtype)
                (block,) = pull_back(self.target.edge, [self.source.edge], cotangents)
            rows.append(real(block).reshape(last - first, -1))
        return torch.cat(rows)

    def linearize(self) -> Affine:
        """Return the function dx -> J dx + f: the target, to first order in a change dx of the recorded source.

        f is the recorded value of the target.  The error of the expansion is O(|dx|^2).

        Cost: one forward pass without gradients.

        Raises:
            ValueError: A second forward pass does not reproduce the target, because a state of the model has changed.
        """
        value = self._replay.outputs(self.target.names, {}).get(self.target.name)
        if value is None or tuple(value.shape) != self.target.shape:
            raise ValueError(
                f"A second forward pass did not reproduce layer {self.target.name!r}: the model has a state "
                "that changes from call to call. Register this state as a buffer."
            )
        return Affine(self, value)


def _pulled(source: Layer, target: Layer, u: Tensor, create_graph: bool = False) -> Tensor:
    # A clone, because a backward pass may write into the gradient that it receives.
    cotangent = from_real(u, target.shape, target.dtype).clone()
    (gradient,) = torch.autograd.grad(
        (target.edge,), (source.edge,), (cotangent,), retain_graph=True, create_graph=create_graph
    )
    return real(gradient).reshape(-1)


def _pushed(source: Layer, target: Layer, v: Tensor) -> Tensor:
    # J^T u is linear in u, with matrix J^T.  So its vector-Jacobian product with v is J v, at any u.
    reason: Exception | str = "a hook or a custom backward pass computes with detached tensors"
    try:
        with recording_gradients():
            generator = torch.Generator().manual_seed(0)
            u = sphere(1, target.size, generator=generator, dtype=target.real_dtype, device=v.device)[0]
            gradient = _pulled(source, target, u.requires_grad_(), create_graph=True)
            (product,) = torch.autograd.grad(gradient, u, v)
    except RuntimeError as error:
        missing = "is not implemented", "does not require grad", "twice", "not have been used"
        if not any(words in str(error) for words in missing):
            raise
        reason = error
    else:  # <u, J v> = <J^T u, v>
        a, b, c, d = (part.detach().double() for part in (u, product, gradient, v))
        scale = 1e3 * torch.finfo(target.dtype).eps * (a.norm() * b.norm() + c.norm() * d.norm())
        if not bool((a @ b - c @ d).abs() > scale):
            return product
    raise NotImplementedError(
        f"J v from {source.name!r} to {target.name!r} needs the derivative of a backward pass, missing for one "
        f"operation between them ({reason}). J^T u and dense() do not need it; for attention, capture under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
    )


@dataclass(frozen=True)
class Affine:
    """First-order expansion of a layer f around x: a function that maps a change dx to J dx + f(x).

    ``jacobian``: the Jacobian J at x.  ``value``: f(x), in the shape of the target.

    >>> import gradscope as gs
    >>> layer, x, dx = torch.nn.Linear(3, 2).double(), torch.ones(1, 3).double(), torch.full((1, 3), 0.5).double()
    >>> affine = gs.capture(layer, x).jacobian("input", "output").linearize()
    >>> torch.allclose(affine(dx), layer(x + dx))  # a linear layer is its own expansion
    True
    """

    jacobian: Jacobian
    value: Tensor

    def __call__(self, dx: Tensor) -> Tensor:
        """Return J dx + f(x), in the shape of the target, for ``dx`` in the shape of the source."""
        if tuple(dx.shape) != self.jacobian.source.shape:
            raise ValueError(
                f"dx must have the shape of layer {self.jacobian.source.name!r}, {self.jacobian.source.shape}, "
                f"got {tuple(dx.shape)}."
            )
        source = self.jacobian.source
        flat = real(dx.to(self.jacobian.device, source.dtype)).reshape(-1)
        return from_real(self.jacobian.matvec(flat), self.value.shape, self.value.dtype) + self.value
