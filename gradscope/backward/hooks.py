"""What hooks and custom functions do to the gradients of a recorded graph, found by small experiments.

The autograd engine runs the hooks of a tensor whenever it returns the gradient of this tensor, and again when it starts
there.  A sweep that stopped there would run them twice.  A gradient that is returned on the way to a lower tensor has
not passed them at all.  PyTorch does not list hooks.  So every tensor gets a gradient, which must come back unchanged.

PyTorch numbers the hooks that Python code registers.  If no number was given since the forward pass began, no tensor
and no node of the graph has a hook, so only custom functions are examined.  (Hooks that C++ code registers have no
number; they are found only if a hook of Python code was registered, too.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradscope.backward.pulling import engine
from gradscope.forward.trunk import Effect, Trunk, Vertex, hooks_so_far, live_inputs, output_kind, vertex

# The magnitudes of a test gradient are 2^-spread, 1 and 2^spread, so that clipping shows at any threshold in between.
SPREAD = 20
# Length of the pattern of random numbers that fills a test gradient; a prime number, so that no axis repeats it.
_PERIOD = 1009
# The node that torch puts before and after a module with backward hooks.
MODULE_HOOK = "BackwardHookFunctionBackward"

_PLAIN = Effect((), False)

Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


@dataclass(frozen=True)
class Survey:
    """``hooked``: tensors whose hooks change a gradient.  ``overwrites``: whether anything writes into gradients."""

    hooked: frozenset[Vertex]
    overwrites: bool


def survey(trunk: Trunk) -> Survey:
    """What hooks and custom functions do to gradients between the sources and the target.

    ValueError if the result of a hook or of a custom function is not linear in the gradient: there is no Jacobian then.
    Cost: eight backward passes of one cotangent through each custom function; if a hook was registered since the
    forward pass began, also one call of the engine per tensor, once per recorded graph.
    """
    outputs: dict[Node, list[int]] = defaultdict(list)
    for node, number in trunk.order:
        outputs[node] += [number]
    if untested := [node for node in outputs if node not in trunk.effects]:
        given = None if no_hooks(trunk) else _Given()
        with torch.inference_mode(False), torch.no_grad():
            for node in untested:
                plain = _untouched(node, outputs[node], given)
                trunk.effects[node] = _PLAIN if plain else _effect(node, outputs[node], trunk)
    found = [(node, effect) for node in outputs if (effect := trunk.effects[node]) is not _PLAIN]
    return Survey(
        frozenset((node, number) for node, effect in found for number in effect.hooked),
        any(effect.overwrites for _, effect in found),
    )


def no_hooks(trunk: Trunk) -> bool:
    """Whether no hook has been registered since the forward pass began, and therefore none in its graph."""
    return trunk.hooks == hooks_so_far()


class _Given:
    """Test gradients, which share their memory if they have one dtype; the last one is kept."""

    def __init__(self) -> None:
        self.flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.kind: Kind | None = None

    def of(self, kind: Kind) -> Tensor:
        shape, key = kind[0], kind[1:]
        numel = torch.Size(shape).numel()
        if key not in self.flat or len(self.flat[key]) < numel:
            self.flat[key] = cotangent(((numel,), *key))
        self.kind, self.last = kind, self.flat[key][:numel].view(shape)
        return self.last

    def forget(self) -> None:
        self.flat, self.kind = {}, None


def _untouched(node: Node, numbers: Sequence[int], given: _Given | None) -> bool:
    """Whether the gradient of the only output comes back as it was; False also if that needs a closer look."""
    if issubclass(type(node), torch._C._FunctionBase):
        return False
    if given is None:
        return True
    if numbers[1:]:
        return False
    about = node._input_metadata[numbers[0]]
    kind, edges = (tuple(about.shape), about.dtype, about.device), (GradientEdge(node, numbers[0]),)
    v = given.last if kind == given.kind else given.of(kind)
    version = v._version
    (found,) = engine(edges, edges, (v,))
    if v._version != version:
        given.forget()
    return found is v and v._version == version


def _effect(node: Node, numbers: Sequence[int], trunk: Trunk) -> Effect:
    edges = [GradientEdge(node, number) for number in numbers]
    given = [cotangent(kind(edge)) for edge in edges]
    versions = [v._version for v in given]
    found = torch.autograd.grad(edges, edges, given, retain_graph=True)
    overwritten = [v._version > version for v, version in zip(given, versions, strict=True)]
    changed = [new is not old or over for new, old, over in zip(found, given, overwritten, strict=True)]
    custom = issubclass(type(node), torch._C._FunctionBase) and trunk.names[node] != MODULE_HOOK
    if custom or any(changed):
        below = dict.fromkeys(node.next_functions[n] for n in live_inputs(node, trunk.order)) if custom else {}
        inputs = [GradientEdge(parent, number) for parent, number in below if parent is not None]
        overwritten.append(check_linear(edges, inputs or edges))
    return Effect(tuple(n for n, new in zip(numbers, changed, strict=True) if new), any(overwritten))


def check_linear(outputs: Sequence[GradientEdge], inputs: Sequence[GradientEdge]) -> bool:
    """Whether the backward pass from ``outputs`` to ``inputs`` writes into its gradients; ValueError if not linear."""
    overwrites = False

    def pulled(gradients: Sequence[Tensor]) -> Tensor:
        nonlocal overwrites
        own = [gradient.clone() for gradient in gradients]
        found = torch.autograd.grad(outputs, inputs, own, retain_graph=True, allow_unused=True)
        overwrites = overwrites or any(v._version > 0 for v in own)
        parts = [zero if g is None else g.to(zero) for g, zero in zip(found, zeros, strict=True)]
        return torch.cat([part.reshape(-1) for part in parts])

    kinds = [kind(edge) for edge in inputs]
    zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]
    rounding = max(0.02, 16 * max(torch.finfo(dtype).eps for _, dtype, _ in kinds))
    for spread in (SPREAD, 0):  # large numbers show clipping, small ones show noise
        u, v = ([cotangent(kind(edge), seed, spread) for edge in outputs] for seed in (0, 1))
        a, b, both = pulled(u), pulled(v), pulled([x + y for x, y in zip(u, v, strict=True)])
        wrong = torch.stack([both - a - b, a + pulled([-x for x in u])]).norm(dim=1).max()
        # Narrow types may overflow at large numbers; NaN is for the sweep to report.  Comparisons are false for both.
        if wrong > rounding * torch.stack([part.norm() for part in (a, b, both)]).max():
            (shape, _, _), name = kind(outputs[0]), outputs[0].node.name()
            raise ValueError(
                f"Where {name} made a tensor of shape {shape}, a hook or a custom backward pass changes the gradient "
                "in a nonlinear way (clipping, normalization, noise?). Its result is no Jacobian, so there is no GSC: "
                "remove it for the measurement."
            )
    return overwrites


def check_inside(end: GradientEdge, target: GradientEdge, source: GradientEdge, name: str) -> None:
    """ValueError if a pass from ``target`` depends on whether a pass from ``end`` to ``target`` ran before.

    This is so inside a module with full backward hooks, which keep the gradient of the module's output.
    Cost: three backward passes of one cotangent.
    """

    def pulled(upper: GradientEdge, lower: GradientEdge) -> Tensor | None:
        return torch.autograd.grad(
            upper, lower, cotangent(kind(upper), spread=0), retain_graph=True, allow_unused=True
        )[0]

    pulled(end, target)
    after = pulled(target, source)  # afterwards the hooks have forgotten what they kept
    alone = pulled(target, source)
    if alone is not None and after is not None and not torch.allclose(alone, after, equal_nan=True):
        raise ValueError(
            f"Layer {name!r} lies inside a module with a full backward hook that changes gradients, so a backward pass "
            "from there depends on the passes before it: remove the hook, or measure this layer with "
            f"gs.gsc(..., target={name!r})."
        )


def kind(edge: GradientEdge) -> Kind:
    """Shape, dtype and device of a tensor of the graph."""
    shape, dtype = output_kind(vertex(edge))
    return shape, dtype or torch.get_default_dtype(), edge.node._input_metadata[edge.output_nr].device


def cotangent(kind: Kind, seed: int = 0, spread: int = SPREAD) -> Tensor:
    """Random numbers of very different magnitudes, always the same for one seed."""
    shape, dtype, device = kind
    generator = torch.Generator().manual_seed(seed)
    spread = min(spread, 4) if dtype == torch.float16 else spread
    powers = torch.randint(-1, 2, (_PERIOD,), generator=generator) * spread
    pattern = torch.randn(_PERIOD, generator=generator).ldexp(powers)
    pattern = (torch.complex(pattern, pattern.roll(1)) if dtype.is_complex else pattern).to(device, dtype)
    numel = torch.Size(shape).numel()
    return pattern.repeat(-(-numel // _PERIOD))[:numel].reshape(shape)
