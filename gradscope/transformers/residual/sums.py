"""Sums a + b in a forward pass, also those by Python operators, with numbers that are computed when they are made.

A `TorchFunctionMode` sees the calls of torch functions.  It does not see sums inside operations of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.forward.interrupts import FunctionMode
from gradscope.forward.modules import Modules, attach, transforming
from gradscope.forward.trunk import ELEMENTWISE, Vertex

# Operations without influence of one entry on another, by the name of their autograd node.
POINTWISE = ELEMENTWISE | {"FusedDropoutBackward0", "PowBackward1"}
MOST_OPERATIONS = 8  # of an elementwise function that is not worth the numbers of a sum
_ADDS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})


@dataclass(frozen=True)
class Sum:
    """A sum of two tensors of one shape.  ``module``: the innermost module that was running, or the
    class of the model; "forward" outside of the model.

    ``key`` and ``operands``: sum and operands in the graph.  ``factors``: of the operands (``alpha`` of `torch.add`).
    ``values``: what `observed` was asked to compute.
    """

    module: str
    key: Vertex
    operands: tuple[Vertex, Vertex]
    factors: tuple[float, float]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    values: Any = field(repr=False)


Compute = Callable[[Tensor, Tensor, float], Callable[[Tensor], Any]]


@contextlib.contextmanager
def observed(modules: Modules, compute: Compute) -> Iterator[list[Sum]]:
    """Context in which all sums of two differentiable tensors of one shape are listed, in execution order.

    Sums in which one operand is an elementwise function of the other by few operations are left out.

    ``compute(a, b, alpha)`` is called before a sum a + alpha b, which may overwrite a, and returns a function of the
    sum, whose result is kept as ``values``.
    """
    observer = _Observer(compute)

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        observer.running.append(name or type(module).__name__)

    def after(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while observer.running and observer.running.pop() != (name or type(module).__name__):
            pass  # a call inside this one raised, but the model caught the error

    remove = attach(modules, before, after)
    try:
        with observer:
            yield observer.sums
    finally:
        remove()


class _Observer(FunctionMode):
    """Sees the calls of torch functions, also those by Python operators."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute, self.sums, self.running = compute, list[Sum](), list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _ADDS or transforming():
            return func(*args, **kwargs)
        operands = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if len(operands) != 2 or not _comparable(*operands):
            return func(*args, **kwargs)
        (a, b), alpha = operands, float(kwargs.get("alpha", 1))
        keys = _key(a), _key(b)
        if _elementwise(*keys) or _elementwise(*reversed(keys)):
            return func(*args, **kwargs)
        shape, device = tuple(a.shape), a.device
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            then = self.compute(a.detach(), b.detach(), alpha)
        result = func(*args, **kwargs)
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            values = then(result.detach())
        module = self.running[-1] if self.running else "forward"
        self.sums.append(Sum(module, _key(result), keys, (1.0, alpha), shape, result.dtype, device, values))
        return result


def _key(tensor: Tensor) -> Any:
    return tensor.grad_fn, tensor.output_nr


def _elementwise(x: Vertex, other: Vertex) -> bool:
    """Whether a tensor is an elementwise function of x, of few operations, as inside an activation."""
    waiting = [other]
    for _ in range(MOST_OPERATIONS):
        if not waiting:
            return True
        at = waiting.pop()
        if at != x:
            if at[0].name() not in POINTWISE:
                return False
            waiting += [parent for parent in _inputs(at) if parent[0] is not None]
    return False


def _inputs(at: Vertex) -> Any:
    return at[0].next_functions


def _comparable(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are differentiable, different and of one shape, so that their sum may be residual."""
    dense = a.layout is b.layout is torch.strided and a.is_floating_point() and b.is_floating_point()
    made = a.grad_fn is not None and b.grad_fn is not None and a is not b
    return dense and made and a.shape == b.shape and a.ndim > 1 and a.numel() > 0
