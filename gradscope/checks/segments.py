"""Segments: the layers or blocks of a network, each a map that can be run on the input of another one of its kind.

A segment is a module that holds parameters, with the modules behind it that hold no weight matrix and receive exactly
its output (normalizations, activations).  Nothing here depends on a layer's class, except that segments of one kind
begin with modules of the same class.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradscope.forward.inputs import Forward, as_batch, check_devices
from gradscope.forward.modules import eager, hooked, recording_gradients, tensors
from gradscope.forward.outputs import first_tensor, leaf_tensors
from gradscope.forward.state import alone, state_restored

FEWEST = 4  # least number of segments of one kind that can be compared with each other
RARE = 0.1  # a structure that at most this fraction of the siblings has is a fault, not a design
MOST_OPERATIONS = 20  # operations between two segments that are compared; further ones are ignored


@dataclass(frozen=True)
class Segment:
    """One map of the network, with the arguments that it received.

    ``name``: name of the first module.  ``modules``: run in this order.  ``arguments``, ``received``: positional and
    keyword arguments of the first module, and the first floating-point tensor in them.  ``kind``: what siblings have in
    common.  ``leaves``: class of every module without children that computed something, in order.  ``between``:
    operations of functional code between this segment and the next one, as autograd names them.  ``unreached``:
    trainable parameters that get no gradient.
    """

    name: str
    modules: tuple[nn.Module, ...]
    arguments: tuple[Any, Any] = field(repr=False)
    received: Tensor = field(repr=False)
    kind: tuple[Any, ...] = field(repr=False)
    leaves: tuple[type[nn.Module], ...]
    between: tuple[str, ...]
    unreached: tuple[str, ...]

    @property
    def structure(self) -> tuple[Any, ...]:
        """What should be the same in all segments of one kind."""
        return self.leaves, self.between, self.unreached

    def run(self, given: Segment, value: Tensor) -> Tensor:
        """Return the output of this segment for the arguments of ``given``, with ``value`` as its first tensor."""
        args, kwargs = _exchanged(given.arguments, given.received, value.clone())
        output = self.modules[0](*args, **kwargs)
        for module in self.modules[1:]:
            output = module(output)
        return first_tensor(output)


@dataclass
class _Call:
    """One call of a module: the first tensor received, its copy, arguments with the copy, output, and leaves inside."""

    received: Tensor | None
    copy: Tensor | None
    arguments: tuple[Any, Any]
    name: str = ""
    output: Any = None
    leaves: tuple[type[nn.Module], ...] = ()


class _Calls:
    """Records every call of every module, in the order in which the calls began."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules, self.calls, self.leaves = modules, list[_Call](), list[type[nn.Module]]()

    def before(self, args: Any, kwargs: Any) -> tuple[_Call, int]:
        received = next((t for t in tensors(args, kwargs) if t.is_floating_point()), None)
        copy = None if received is None else received.detach().clone()
        self.calls.append(_Call(received, copy, _exchanged((args, kwargs), received, copy)))
        return self.calls[-1], len(self.leaves)

    def after(
        self, name: str, number: int, label: str, args: Any, kwargs: Any, output: Any, token: tuple[_Call, int]
    ) -> None:
        call, before = token
        call.name, call.output = name, output
        if not self.modules[name]._modules and not any(output is t for t in tensors(args, kwargs)):
            self.leaves.append(type(self.modules[name]))
        call.leaves = tuple(self.leaves[before:])


def segments(model: nn.Module, data: Any, *, forward: Forward | None = None) -> list[Segment]:
    """Return the segments of the network in execution order, for one forward and one backward pass on ``data``."""
    modules, batch = dict(model.named_modules()), as_batch(data, forward=forward)
    if forward is None:
        check_devices(modules, batch)
    listener, parameters = _Calls(modules), {n: p for n, p in model.named_parameters() if p.requires_grad}
    state = state_restored(modules)
    with alone, state as kept, kept, recording_gradients(), eager(modules):
        with hooked(modules, listener) as times:
            copy, inputs = batch.differentiable()
            output = first_tensor(copy.run(model, forward))
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if output.requires_grad and parameters:
            found = torch.autograd.grad(output.double().square().sum(), list(parameters.values()), allow_unused=True)
    unreached = {id(p) for p, g in zip(parameters.values(), found, strict=True) if g is None}
    calls = {call.name: call for call in listener.calls if times[call.name] == 1 and call.name}
    return _merged(_items(modules, calls), modules, calls, unreached, {t.grad_fn for t in inputs})


def siblings(found: Sequence[Segment]) -> list[list[Segment]]:
    """Return the groups of at least `FEWEST` segments of one kind, each in execution order.

    Behind the last segment of a group, the network often goes on in another way: with a final normalization, with
    pooling, or without an activation.  So only the parts that its siblings have, too, are compared; and if the last
    segment of the network has fewer parts, it is not compared at all.  Segments with and without an activation, say,
    are groups of their own, unless one of the two is rare.
    """
    groups: dict[Any, list[Segment]] = defaultdict(list)
    for segment in found:
        groups[segment.kind[:3]].append(segment)
    chosen = []
    for group in (g for g in groups.values() if len(g) >= FEWEST):
        usual = most(group)
        if group[-1] is found[-1] and group[-1].leaves[: len(usual.leaves)] != usual.leaves:
            group.pop()
        last = replace(group.pop(), between=usual.between)
        if last.leaves != usual.leaves and last.leaves[: len(usual.leaves)] == usual.leaves:
            last = replace(last, modules=last.modules[: len(usual.modules)], leaves=usual.leaves, kind=usual.kind)
        by_end: dict[Any, list[Segment]] = defaultdict(list)
        num = Counter(s.leaves for s in (*group, last))
        for segment in (*group, last):
            design = num[segment.leaves] > rare(len(group) + 1)
            by_end[segment.kind, segment.leaves if design else usual.leaves].append(segment)
        chosen += [part for part in by_end.values() if len(part) >= FEWEST]
    return chosen


def rare(num: int) -> int:
    """Return how many of ``num`` siblings may have a structure that is a fault."""
    return max(1, int(RARE * num))


def most(group: Sequence[Segment]) -> Segment:
    """Return the first segment that has the most frequent structure."""
    structure = Counter(s.structure for s in group).most_common(1)[0][0]
    return next(s for s in group if s.structure == structure)


def _items(modules: dict[str, nn.Module], calls: dict[str, _Call]) -> list[str]:
    """Return the outermost modules of which at least `FEWEST` are of one kind, and the leaves of all others."""
    frontier = [""]
    while True:
        kinds = Counter(_kind(modules[name], calls[name]) for name in frontier if name in calls)
        expanded: list[str] = []
        for name in frontier:
            grouped = name in calls and kinds[_kind(modules[name], calls[name])] >= FEWEST
            children = [f"{name}.{key}" if name else key for key, m in modules[name]._modules.items() if m is not None]
            expanded += [name] if grouped or not children else [child for child in children if child in modules]
        if expanded == frontier:
            return [name for name in calls if name in set(frontier)]
        frontier = expanded


def _kind(module: nn.Module, call: _Call) -> tuple[Any, ...]:
    """Return class and shapes of input and output; only the name if it holds no weight matrix or receives no tensor."""
    if call.copy is None or not _holds(module):
        return (call.name,)
    return type(module), tuple(call.copy.shape), tuple(_shape(call.output))


def _holds(module: nn.Module) -> bool:
    """Whether the module holds a weight matrix."""
    return any(p.ndim >= 2 for p in module.parameters())


def parameters_of(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return all parameters; names are relative, so that those of siblings are equal."""
    return {f"{n}.{key}": p for n, m in enumerate(modules) for key, p in m.named_parameters()}


def _exchanged(arguments: tuple[Any, Any], old: Tensor | None, new: Tensor | None) -> tuple[Any, Any]:
    """Return the arguments with ``new`` in place of ``old``."""
    args, kwargs = pytree.tree_map(lambda leaf: new if leaf is old else leaf, arguments)
    return args, kwargs


def _shape(output: Any) -> torch.Size:
    return next((t.shape for t in leaf_tensors(output) if t.is_floating_point()), torch.Size())


def _merged(
    names: Sequence[str], modules: dict[str, nn.Module], calls: dict[str, _Call], unreached: set[int], ends: set[Any]
) -> list[Segment]:
    """Join every module that holds a weight matrix with the modules behind it that hold none."""
    groups: list[list[str]] = []
    for name in names:
        if groups and not _holds(modules[name]) and calls[name].received is calls[groups[-1][-1]].output:
            groups[-1].append(name)
        else:
            groups.append([name])
    made: list[Segment] = []
    ends |= {t.grad_fn for name in names for t in leaf_tensors(calls[name].output) if t.grad_fn is not None}
    begins = {call.received.grad_fn for call in calls.values() if call.received is not None}
    for group, after in zip(groups, [*groups, None][1:], strict=True):
        first, parts = calls[group[0]], tuple(modules[name] for name in group)
        kind = _kind(parts[0], first)
        if first.copy is None or len(kind) == 1:
            continue
        made.append(
            Segment(
                name=group[0],
                modules=parts,
                arguments=first.arguments,
                received=first.copy,
                kind=(*kind, tuple(_shape(calls[group[-1]].output))),
                leaves=tuple(leaf for name in group for leaf in calls[name].leaves),
                between=_between(calls[after[0]].received, ends, begins) if after else (),
                unreached=tuple(key for key, p in parameters_of(parts).items() if id(p) in unreached),
            )
        )
    return made


def _between(received: Tensor | None, ends: set[Any], begins: set[Any]) -> tuple[str, ...]:
    """Return names of the operations that made ``received`` from outputs and inputs of modules, nearest first."""
    start = received.grad_fn if received is not None else None
    waiting, names, known = [start], [], set()  # type: ignore[var-annotated]
    while waiting and len(names) < MOST_OPERATIONS:
        node = waiting.pop(0)
        if node is None or node in ends or node in known or (node in begins and node is not start):
            continue
        known.add(node)
        names.append(node.name())
        waiting += [below for below, _ in node.next_functions]
    return tuple(names)
