"""Where NaN and Inf arise: the operations of a forward pass, and the nodes of its backward pass.

Times count operations and the beginnings and ends of module calls.  Numbers of autograd nodes lead from a node to the
time of its operation.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.forward.outputs import leaf_tensors
from gradscope.forward.trunk import Vertex

# Operations that ignore the old values of the tensor they write to, and operations whose result has no values yet.
OVERWRITING, EMPTY = {"copy_", "fill_", "zero_"}, ("empty", "new_empty")
# A constant Inf as a factor is a fault.  Other operations write or add it, as masks do.
MULTIPLYING = {"mul", "mul_", "div", "div_", "mm", "bmm", "addmm", "baddbmm"}


@dataclass(frozen=True)
class Bad:
    """Whether a tensor holds NaN, and whether it holds Inf."""

    nan: bool = False
    inf: bool = False

    def __bool__(self) -> bool:
        return self.nan or self.inf


FINITE = Bad()


def bad(value: Any) -> Bad:
    """Whether a tensor or a number holds NaN or Inf.  Cost: one device synchronization, two more if it does."""
    if isinstance(value, float):
        return Bad(math.isnan(value), math.isinf(value))
    if not isinstance(value, Tensor) or value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return FINITE
    value = value.detach()
    if value.layout is not torch.strided:
        value = value._values() if value.layout is torch.sparse_coo else value.values()
    value = value.float() if value.element_size() == 1 else value  # torch has no isfinite for 8 bits
    return FINITE if bool(value.isfinite().all()) else Bad(bool(value.isnan().any()), bool(value.isinf().any()))


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation that received or made NaN or Inf, or a tensor that held them before the pass (``source``).

    ``parents``: what each tensor it received held, and the operation that made this.  ``born``: NaN that no argument
    held, or an Inf that is neither received nor a constant.  ``kept``: the results, whose storage must not be used
    again while the records refer to it.
    """

    time: int
    result: Bad
    parents: tuple[tuple[Bad, Operation], ...] = ()
    born: Bad = FINITE
    source: str | None = None
    kept: Sequence[Tensor] = field(default=(), repr=False)


class Operations(TorchDispatchMode):
    """Keeps every operation, below autograd and autocast, that receives or makes NaN or Inf.

    ``sources``: parameters and data by name.  A constant is what does not depend on them.

    Cost: one device synchronization for each tensor that an operation receives or returns.
    """

    supports_higher_order_operators = True

    def __init__(self, sources: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, Operation] = {}
        self._numbers: list[int] = []
        self._made: dict[int, Operation] = {}
        self._derived: set[int] = set()
        for name, tensor in sources:
            if (key := _storage(tensor)) is not None and tensor.is_floating_point():
                self._derived.add(key)
                if held := bad(tensor):
                    self._made.setdefault(key, Operation(-1, held, source=name, kept=(tensor,)))

    def tick(self) -> int:
        """Return the time, and let it pass."""
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        return len(self._numbers) - 1

    def time(self, node: Node) -> int:
        """Return the time of the operation whose backward node this is."""
        return bisect_left(self._numbers, node._sequence_nr() + 1)

    def origins_of(self, tensor: Tensor) -> Origins:
        """Return where the NaN of a tensor come from, else where its Inf come from."""
        made, what = self._made.get(_storage(tensor) or 0), bad(tensor)
        kinds = [Bad(nan=True)] * what.nan + [Bad(inf=True)] * what.inf if made is not None else []
        found = [origins([(kind, made)]) for kind in kinds if made is not None]
        return next((each for each in found if each.sources or each.born), found[0] if found else NOWHERE)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        time, name = self.tick(), func.__name__.partition(".")[0]
        read = args[1:] if name in OVERWRITING else args
        leaves = pytree.tree_leaves((read, {k: v for k, v in (kwargs or {}).items() if not k.startswith("out")}))
        received = [(value, bad(value), _storage(value)) for value in leaves if isinstance(value, (Tensor, float))]
        output = func(*args, **(kwargs or {}))
        returned = list(leaf_tensors(output))
        derived = any(key in self._derived for *_, key in received)
        for key in map(_storage, (t for t in returned if t.is_floating_point() or t.is_complex())):
            if derived and key is not None:
                self._derived.add(key)
            elif not (returned and name.endswith("_")):  # what is written in place may already depend on a source
                self._derived.discard(key or 0)
        if name.startswith(EMPTY):
            return output
        result = [bad(tensor) for tensor in returned]
        held = [(what, key) for _, what, key in received if what]
        if any(result) or held:
            total = Bad(any(r.nan for r in result), any(r.inf for r in result))
            own = all(key not in self._derived for _, key in held) and (not held or name in MULTIPLYING)
            born = Bad(total.nan and not any(what.nan for what, _ in held), total.inf and derived and own)
            parents = tuple((what, self._made[key]) for what, key in held if key in self._made)
            operation = Operation(time, total, parents, born, kept=returned)
            self.found[time] = operation
            self._made |= {key: operation for r, t in zip(result, returned, strict=True) if r and (key := _storage(t))}
        return output


@dataclass(frozen=True)
class Origins:
    """Where NaN or Inf come from: ``sources`` that hold them, times at which they were ``born``, and all ``times``."""

    sources: set[str]
    born: list[int]
    times: list[int]


NOWHERE = Origins(set(), [], [])


def origins(starts: Iterable[tuple[Bad, Operation]]) -> Origins:
    """Follow NaN, or else Inf, back to where they come from.

    A NaN that arises from Inf is followed to this Inf, unless the Inf is a constant on purpose, such as a mask.
    """
    sources: set[str] = set()
    born: dict[int, list[tuple[Bad, Operation]]] = {}
    times: set[int] = set()
    stack = [start for start in starts if start[0]]
    seen: set[tuple[int, Bad]] = set()
    while stack:
        what, operation = stack.pop()
        what = Bad(nan=True) if what.nan else Bad(inf=True)
        if (id(operation), what) in seen:
            continue
        seen.add((id(operation), what))
        if operation.source is not None:
            sources.add(operation.source)
            continue
        times.add(operation.time)
        same = [(what, p) for held, p in operation.parents if (held.nan if what.nan else held.inf)]
        if what.nan and operation.born.nan:
            born[operation.time] = [(Bad(inf=True), p) for held, p in operation.parents if held.inf]
        elif what.inf and operation.born.inf:
            born[operation.time] = []
        stack += same
    earlier = [origins(infinite) if infinite else NOWHERE for infinite in born.values()]
    for time, before in zip(list(born), earlier, strict=True):
        sources |= before.sources
        if before.sources or before.born:
            del born[time]
    return Origins(sources, sorted({*born, *(t for before in earlier for t in before.born)}), sorted(times))


@dataclass(frozen=True)
class Step:
    """A node of the backward pass: which of the gradients that it received and passed on hold NaN or Inf."""

    node: Node
    received: tuple[bool, ...]
    passed: tuple[bool, ...]


class Backward:
    """Hooks on all nodes of a graph; ``steps`` lists the nodes in the order of the backward pass."""

    def __init__(self, root: Node) -> None:
        self.steps: list[Step] = []
        self._handles = [node.register_hook(self._hook(node)) for node in _nodes(root)]

    def __enter__(self) -> Backward:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, node: Node) -> Callable[..., None]:
        def keep(passed: Sequence[Tensor | None], received: Sequence[Tensor | None]) -> None:
            self.steps.append(Step(node, *(tuple(bool(bad(g)) for g in gradients) for gradients in (received, passed))))

        return keep

    def first(self, spoiled: Iterable[Vertex]) -> Node | None:
        """Return the first node, in the order of the backward pass, at which the NaN or Inf of ``spoiled`` arise.

        Such a node receives finite gradients and passes on one that is not finite.  Nodes that received NaN or Inf
        come later.  If no operation passed on the NaN or Inf of a tensor (a sum of finite gradients, a hook on the
        tensor), it is the node that made this tensor.
        """
        wanted, explained, found = set(spoiled), set[Vertex](), list[tuple[float, Node]]()
        places = {step.node: place for place, step in enumerate(self.steps)}
        for place, step in reversed(list(enumerate(self.steps))):
            above = zip(step.node.next_functions, step.passed, strict=False)
            hit = {(parent, number) for (parent, number), is_bad in above if is_bad and parent is not None} & wanted
            if hit:
                explained |= hit
                received = {(step.node, number) for number, is_bad in enumerate(step.received) if is_bad}
                wanted |= received
                found.append((place, step.node))
        found += [(places.get(node, len(self.steps)) - 0.5, node) for node, _ in wanted - explained]
        return min(found, key=lambda entry: entry[0])[1] if found else None


def _nodes(root: Node) -> Iterator[Node]:
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        yield node
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        stack += new


def _storage(value: Any) -> int | None:
    """Return what all views of the same memory have in common; None if there is no memory."""
    try:
        return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
    except (RuntimeError, NotImplementedError):  # sparse tensors
        return None
