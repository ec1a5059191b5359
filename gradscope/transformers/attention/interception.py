"""See every call of attention in a forward pass, fused or written by hand, by intercepting functions of torch.

- `torch.nn.functional.scaled_dot_product_attention`, whatever kernel runs it: its logits are computed from q and k.
- A softmax over the last dimension of logits (B, H, Tq, Tk) or (B, Tq, Tk), if its result is a factor in a product of
  matrices with another tensor of at least three dimensions, the values.  In between, the result may pass through
  functions that keep its number of entries (dropout, a change of type or shape, a mask), and may be sliced.  Therefore
  a softmax over classes or experts does not count.
- `torch.nn.functional.multi_head_attention_forward`, the function of ``nn.MultiheadAttention``, calls one of the two.

Not seen: flex_attention, kernels of other libraries, and calls inside transforms of `torch.func`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from gradscope.forward.interrupts import FunctionMode
from gradscope.forward.modules import Modules, attach, own_thread, transforming

FUSED, SOFTMAX = "scaled_dot_product_attention", "softmax"
SOFTMAXES = (functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"}
# Why a call is not counted.
TRANSFORMED = "inside a transform of torch.func"
NO_VALUES = "no product of its result with values followed"
MORE_DIMENSIONS = "a softmax of more than four dimensions"

# The function of ``nn.MultiheadAttention``, except that it finds no mode.  A mode is switched off while it handles a
# function; if it were switched on for that very function, the function would ask the mode again, and so on forever.
_multi_head = FunctionType(
    functional.multi_head_attention_forward.__code__,
    vars(functional) | {"has_torch_function": lambda _: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)
_arguments = inspect.signature(functional.multi_head_attention_forward)


@dataclass(frozen=True, eq=False)
class Scores:
    """The logits (L, H, Tq, Tk) of one call, after scale and mask.

    ``block(sequences, heads, queries)`` computes the part of three slices.  L is the number of sequences, or a multiple
    of it where a sequence has several parts, such as windows.  ``mask``: "causal", "boolean" or "additive", or empty;
    a softmax does not show its mask.
    """

    function: str
    shape: tuple[int, int, int, int]
    mask: str
    device: torch.device
    block: Callable[[slice, slice, slice], Tensor]


@dataclass(frozen=True, eq=False)
class Seen:
    """One call: the innermost module in which it happened (``#2`` for its second call), and what was measured."""

    layer: str
    function: str
    shape: tuple[int, int, int, int]
    mask: str
    measured: Any


class NoAttentionError(ValueError):
    """No call of attention was seen."""


class Interception(FunctionMode):
    """Calls ``measure`` with the logits of every call of attention; ``calls`` holds the results in execution order.

    ``left_out``: (module, reason) of calls that are not counted.  ``called``: names of the modules that were called.
    ``random``: whether the pass drew random numbers.
    ``batch_size``: number of sequences.  Folded heads (B H, T, d) are recognized by it.
    """

    def __init__(self, modules: Modules, batch_size: int, measure: Callable[[Scores], Any]) -> None:
        super().__init__()
        self.modules, self.batch_size, self.measure = modules, batch_size, measure
        self.calls: list[Seen] = []
        self.left_out: list[tuple[str, str]] = []
        self.called: set[str] = set()
        self.random = False
        self._running: list[str] = []
        self._times: Counter[str] = Counter()
        self._num_heads = 0  # of the ``nn.MultiheadAttention`` that is running
        self._weights = WeakTensorKeyDictionary()  # results of a softmax, with its number
        self._waiting: dict[int, Seen] = {}  # softmax calls whose result may still meet values
        self._number = count()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which calls are seen."""
        guard = own_thread()

        def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            guard(name)
            self.called.add(name)
            self._running.append(name)

        def after(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # A call inside this one may have raised, and the model may have caught the error.
            while self._running.pop() != name:
                pass

        # In compiled functions nothing is seen.  Setting the stance would import the compiler, which takes seconds.
        compiler = "torch._dynamo" in sys.modules
        remove = attach(self.modules, before, after)
        try:
            with torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext(), self:
                yield
        finally:
            remove()
        self.left_out += [(seen.layer, NO_VALUES) for seen in self._waiting.values()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward and not self._num_heads:
            return self._multi_head(args, kwargs)
        if func is functional.scaled_dot_product_attention:
            if self._counts():
                self._take(self._measured(scaled_dot_product(self.batch_size, *args, **kwargs)))
        elif self._waiting and getattr(func, "__name__", "") in PRODUCTS:
            self._multiplied([*args, *kwargs.values()])
        output = func(*args, **kwargs)
        if func in SOFTMAXES:
            self._softmax(output, *args, **kwargs)
        elif self._waiting and isinstance(output, Tensor):
            self._passed_on(func, args, output)
        return output

    @property
    def _module(self) -> str:
        """The name of the innermost module that is running."""
        return (self._running[-1] if self._running else "") or type(self.modules[""]).__name__

    def _counts(self) -> bool:
        if inside := transforming():
            self.left_out.append((self._module, TRANSFORMED))
        return not inside

    def _measured(self, scores: Scores) -> Seen:
        return Seen(self._module, scores.function, scores.shape, scores.mask, self.measure(scores))

    def _take(self, seen: Seen) -> None:
        """Count a call, for the module that is running now."""
        layer = self._module
        self._times[layer] += 1
        number = self._times[layer]
        self.calls.append(replace(seen, layer=layer if number == 1 else f"{layer}#{number}"))

    def _multi_head(self, args: Any, kwargs: Any) -> Any:
        """Run the function of ``nn.MultiheadAttention`` such that the functions inside are seen."""
        self._num_heads = int(_arguments.bind(*args, **kwargs).arguments["num_heads"])
        try:
            with self:
                return _multi_head(*args, **kwargs)
        finally:
            self._num_heads = 0

    def _softmax(self, output: Tensor, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        """Measure the logits, which counts once the result meets values."""
        if input.ndim < 3 or dim not in (-1, input.ndim - 1) or not self._counts():
            return
        if input.ndim > 4:
            self.left_out.append((self._module, MORE_DIMENSIONS))
            return
        logits = input.detach()
        logits = logits.unflatten(0, (-1, self._num_heads)) if self._num_heads else _with_heads(logits, self.batch_size)

        def block(sequences: slice, heads: slice, queries: slice) -> Tensor:
            return logits[sequences, heads, queries].to(precision(logits.device))

        seen = self._measured(Scores(SOFTMAX, tuple(logits.shape), "", logits.device, block))
        if self._num_heads:
            self._take(seen)
        else:
            self._weights[output] = number = next(self._number)
            self._waiting[number] = seen

    def _passed_on(self, func: Any, args: Any, output: Tensor) -> None:
        """Follow the weights through functions that keep the number of entries, and through slices."""
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor in self._weights:
                same = output.numel() == tensor.numel()
                if same or (func is Tensor.__getitem__ and output.ndim == tensor.ndim):
                    self._weights[output] = self._weights[tensor]

    def _multiplied(self, args: list[Any]) -> None:
        """Count the softmax whose result is multiplied with values."""
        operands = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        for tensor in operands:
            number = self._weights.get(tensor)
            if number in self._waiting and any(other.ndim > 2 for other in operands if other is not tensor):
                self._take(self._waiting.pop(number))


def precision(device: torch.device) -> torch.dtype:
    """The dtype of all computations: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def scaled_dot_product(
    batch_size: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Scores:
    """The logits of ``scaled_dot_product_attention`` with these arguments; dropout acts on the weights, so not here."""
    q, k = (tensor.detach()[(None,) * max(0, 3 + enable_gqa - tensor.ndim)] for tensor in (query, key))
    (num_queries, num_keys), groups = (q.shape[-2], k.shape[-2]), q.shape[-3] // k.shape[-3] if enable_gqa else 1
    lead = torch.broadcast_shapes(q.shape[:-2], (*k.shape[:-3], groups * k.shape[-3]))
    q = _with_heads(q.expand(*lead, -1, -1), batch_size)
    k = _with_heads(k.expand(*lead[:-1], lead[-1] // groups, -1, -1), batch_size)
    mask = None
    if attn_mask is not None:
        # A bias of torch.nn.attention.bias stands for a causal mask, which it can write out.
        given = attn_mask._materialize(q.device) if hasattr(attn_mask, "_materialize") else attn_mask.detach()
        mask = _with_heads(given.expand(*lead, num_queries, num_keys), batch_size)
    kinds = ["causal"] * is_causal
    if mask is not None:
        kinds.append("boolean" if mask.dtype == torch.bool else "additive")
    kind, factor = precision(q.device), 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    places = torch.arange(max(num_queries, num_keys), device=q.device)

    def block(sequences: slice, heads: slice, queries: slice) -> Tensor:
        own = (
            k[sequences, heads]
            if groups == 1
            else k[sequences, torch.arange(heads.start, heads.stop, device=k.device) // groups]
        )
        logits = q[sequences, heads, queries].to(kind) @ own.to(kind).mT * factor
        if mask is not None:
            part = mask[sequences, heads, queries]
            logits = logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part
        if is_causal:
            logits = logits.masked_fill(places[queries, None] < places[:num_keys], -math.inf)
        return logits

    shape = (*q.shape[:3], num_keys)
    return Scores(FUSED, shape, " and ".join(kinds), q.device, block)


def _with_heads(tensor: Tensor, batch_size: int) -> Tensor:
    """The tensor as (L, H, rows, columns).  Of three dimensions, the first one holds sequences, or heads of each."""
    if tensor.ndim == 2:
        return tensor[None, None]
    if tensor.ndim == 3:
        return tensor.unflatten(0, (batch_size, -1)) if len(tensor) % batch_size == 0 else tensor[:, None]
    return tensor if tensor.ndim == 4 else tensor.flatten(0, -4)
