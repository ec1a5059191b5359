"""`check(model, data)`: self-tests that show whether gradscope measures a model correctly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.backward.cotangents import needed_for_exact
from gradscope.backward.pulling import pulling
from gradscope.checks.report import FAILED, PASSED, SKIPPED, Check, Report
from gradscope.choices import checked
from gradscope.coefficients.gsc import gsc
from gradscope.forward.inputs import Forward, LossFunction
from gradscope.forward.layers import Layer
from gradscope.forward.modules import unwrap
from gradscope.forward.state import alone, state_restored
from gradscope.forward.trunk import vertex
from gradscope.jacobians.capture import Capture, capture
from gradscope.norms import from_real, real
from gradscope.probes import sphere

MOST_LAYERS = 12  # layers tested, spread evenly over the network; each costs a few passes
EXACT_LIMIT, PROBES = 512, 64  # most cotangents for exact coefficients; probes to compare with them
MOST_ERRORS = 5.0  # largest deviation of probes from the exact value, in standard errors, over all layers
STEPS = (3.0, 1.0, 0.3)  # step sizes of central differences: multiples of eps^(1/3) times the input's length

Found = tuple[str, str]  # status and detail of a check


@checked
def check(
    model: nn.Module, data: Any, *, forward: Forward | None = None, loss_fn: LossFunction | None = None
) -> Report:
    """Return a report on whether several ways to measure ``model`` on one batch agree.

    - "adjoint": <v, J u> = <J^T v, u> for the Jacobian J between neighboring layers and random vectors u and v.  J u is
      computed by double differentiation.
    - "finite differences": if the input moves a little in a random direction, layers change as their Jacobians predict.
    - "independence": changing one sample does not change the output for the others.  Skipped if samples count as
      coupled.
    - "probes": GSC from random probes is within 5 standard errors of exact GSC.
    - "determinism": two captures record the same activations.
    - "left alone": measuring changes no parameter, buffer, gradient, training mode or random state.

    Arguments:
        model, data, forward, loss_fn: As for `gradscope.gsc`, with one small batch.  Prefer float64, because tolerances
            for float32 are wide and may hide a mistake.

    Cost: about a hundred forward and backward passes.

    Raises:
        ValueError, TypeError: The data or the model cannot be measured; see `gradscope.capture`.

    >>> import torch
    >>> import gradscope as gs
    >>> gs.check(torch.nn.Linear(2, 2).double(), torch.eye(2).double()).passed
    True
    """
    model = unwrap(model)
    before = _state(model)
    first = capture(model, data, forward=forward, loss_fn=loss_fn)
    generator = torch.Generator().manual_seed(0)

    tests: dict[str, Callable[[], Found]] = {
        "adjoint": lambda: _adjoint(first, generator),
        "finite differences": lambda: _finite_differences(first, generator),
        "independence": lambda: _independence(first, generator),
        "probes": lambda: _probes(first, model, data, forward, loss_fn),
        "determinism": lambda: _determinism(first, capture(model, data, forward=forward, loss_fn=loss_fn)),
    }
    checks = []
    for name, test in tests.items():
        try:
            checks.append(Check(name, *test()))
        except Exception as error:
            checks.append(Check(name, FAILED, f"raised {type(error).__name__}: {error}"))
    after = _state(model)
    changed = [name for name in before | after if not _same(after.get(name), before.get(name))]
    detail = f"changed: {', '.join(changed[:4])}" if changed else "parameters, buffers, gradients, modes, random state"
    checks.append(Check("left alone", FAILED if changed else PASSED, detail))
    return Report(tuple(checks))


def _determinism(first: Capture, second: Capture) -> Found:
    names = [[layer.name for layer in one.reached] for one in (first, second)]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1])) or names[0]
        return FAILED, f"a second pass runs other layers: {', '.join(odd[:4])}"
    worst = 0.0
    for a, b in zip(first.reached, second.reached, strict=True):
        one, two = (np.sqrt(run.lengths[vertex(layer.edge)].squares) for run, layer in ((first, a), (second, b)))
        difference = float(np.abs(one - two).max() / max(one.max(), 1e-300))
        if not difference <= math.sqrt(torch.finfo(a.dtype).eps):
            return FAILED, (
                f"a second pass with the same random state changes layer {a.name!r} by {difference:.1e}: "
                "the model keeps its own state, or uses its own random generator"
            )
        worst = max(worst, difference)
    return PASSED, f"{len(first.reached)} layers, largest relative difference {worst:.1e}"


def _adjoint(captured: Capture, generator: torch.Generator) -> Found:
    worst, skipped = 0.0, 0
    pairs = _spread(list(pairwise(captured.units)))
    for below, above in pairs:
        jacobian = captured.jacobian(below.name, above.name)
        u, v = _vector(below, generator), _vector(above, generator)
        try:
            product = jacobian.matvec(u)
        except NotImplementedError:
            skipped += 1
            continue
        forwards, backwards = _dot(v, product), _dot(jacobian.rmatvec(v), u)
        scale = float(v.double().norm() * product.double().norm()) / math.sqrt(above.size)
        error = abs(forwards - backwards) / (scale or 1.0)
        if not error <= 1e3 * torch.finfo(above.dtype).eps * math.sqrt(above.size):
            return FAILED, (
                f"between {below.name!r} and {above.name!r}: <v, J u> = {forwards:.6g}, <J^T v, u> = {backwards:.6g}"
            )
        worst = max(worst, error)
    if skipped == len(pairs):
        return SKIPPED, "no backward pass between layers can be differentiated (attention, checkpoints)"
    left = f", {skipped} could not be differentiated twice" if skipped else ""
    return PASSED, f"{len(pairs) - skipped} pairs of layers, worst {worst:.1e}{left}"


def _finite_differences(captured: Capture, generator: torch.Generator) -> Found:
    """Compare central differences of <v, f> along a direction of the sources with <J^T v, u>."""
    layers = [layer for layer in _spread(captured.units) if layer.name not in captured.source_names]
    replay, sources = captured.replay, [layer for layer in captured.reached if layer.name in captured.source_names]
    if len(sources) != len(captured.source_names):
        return SKIPPED, "the target does not depend on all sources"
    wanted = {layer.name: layer for layer in layers}
    base = replay.outputs({*wanted, *captured.source_names}, {})
    directions = {name: _vector_like(base[name], generator) for name in captured.source_names}
    cotangents = {name: _vector_like(base[name], generator) for name in wanted if name in base}
    slopes: dict[str, list[float]] = {name: [] for name in cotangents}
    for step in STEPS:
        h = step * max(torch.finfo(source.dtype).eps for source in sources) ** (1 / 3)
        moved = [replay.outputs(wanted, {n: sign * h * d for n, d in directions.items()}) for sign in (1.0, -1.0)]
        for name, v in cotangents.items():
            difference = real(moved[0][name]).double() - real(moved[1][name]).double()
            slopes[name].append(_dot(real(v), difference) / (2 * h))
    judged, worst = 0, 0.0
    for name, v in cotangents.items():
        predicted = _predicted(captured, wanted[name], sources, v, directions)
        # If results for different step sizes disagree, curvature or rounding is too large for a verdict.
        noise, slope = max(slopes[name]) - min(slopes[name]), slopes[name][1]
        scale = abs(slope) + abs(predicted) or 1.0
        if noise > 0.02 * abs(slope):
            continue
        judged += 1
        error = abs(slope - predicted) / scale
        if not abs(slope - predicted) <= 0.02 * scale + 3 * noise:
            return FAILED, (
                f"layer {name!r} changes by {slope:.6g} along a direction of the input, but its Jacobian predicts "
                f"{predicted:.6g}: a gradient is stopped, replaced or wrong at or below this layer"
            )
        worst = max(worst, error)
    if not judged:
        return SKIPPED, "differences with several step sizes disagree (too much curvature?): use float64"
    return PASSED, f"{judged} of {len(slopes)} layers, worst {worst:.1e}"


def _predicted(
    captured: Capture, layer: Layer, sources: Sequence[Layer], v: Tensor, directions: dict[str, Tensor]
) -> float:
    """Return <J^T v, u> summed over the sources."""
    with alone, state_restored(captured.replay.modules) as state, state, pulling():
        gradients = torch.autograd.grad(
            (layer.edge,), [source.edge for source in sources], (v,), retain_graph=True, allow_unused=True
        )
    pairs = zip(sources, gradients, strict=True)
    return sum(_dot(g, directions[source.name]) for source, g in pairs if g is not None)


def _independence(captured: Capture, generator: torch.Generator) -> Found:
    """Change one sample of the input and check that other samples do not change at the target."""
    replay, target = captured.replay, captured.target
    if captured.coupled:
        return SKIPPED, "samples count as coupled, which is always valid"
    if captured.batch_size == 1:
        return SKIPPED, "a single sample"
    base = replay.outputs({target.name, *captured.source_names}, {})
    shifts = {}
    for source in captured.source_names:
        if base[source].shape[:1] != (captured.batch_size,):
            return SKIPPED, f"the leading dimension of {source!r} is not the batch"
        shifts[source] = torch.zeros_like(base[source])
        shifts[source][0] = _vector_like(base[source][0], generator)
    change = real(replay.outputs([target.name], shifts)[target.name] - base[target.name]).double()
    change = change.reshape(captured.batch_size, -1).norm(dim=1)
    own, others = float(change[0]), float(change[1:].max())
    if others > math.sqrt(torch.finfo(target.dtype).eps) * max(own, float(real(base[target.name]).double().norm())):
        return FAILED, f"changing sample 0 moves another sample of {target.name!r} by {others:.2g}; the gradient says 0"
    return PASSED, f"sample 0 moves by {own:.2g}, others by at most {others:.1e}"


def _probes(
    captured: Capture, model: nn.Module, data: Any, forward: Forward | None, loss_fn: LossFunction | None
) -> Found:
    needed = needed_for_exact(captured.target, captured.batch_size, coupled=captured.coupled)
    if needed > EXACT_LIMIT:
        return SKIPPED, f"exact coefficients need {needed} cotangents: give a smaller batch"
    exact, probed = (gsc(model, data, forward=forward, loss_fn=loss_fn, probes=probes) for probes in ("exact", PROBES))
    difference = np.abs(probed.log10_values - exact.log10_values)[:-1, 0]
    errors = probed.log10_stderr_probe[:-1, 0]
    rounding = 1e3 * torch.finfo(captured.target.dtype).eps
    z = np.where(difference > rounding, difference / np.maximum(errors, 1e-300), 0.0)
    if len(z) == 0:
        return SKIPPED, "the target is the only layer"
    worst = int(np.argmax(z))
    return PASSED if z[worst] <= MOST_ERRORS else FAILED, (
        f"{PROBES} probes deviate by at most {z[worst]:.1f} standard errors from the exact value, at "
        f"{exact.layers[worst]!r}"
    )


def _spread(items: Sequence[Any]) -> Sequence[Any]:
    """Return at most `MOST_LAYERS` of the items, evenly spaced, including the last one."""
    if len(items) <= MOST_LAYERS:
        return items
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, MOST_LAYERS).round()]


def _vector(layer: Layer, generator: torch.Generator) -> Tensor:
    return sphere(1, layer.size, generator=generator, dtype=layer.real_dtype, device=layer.device)[0]


def _vector_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random direction with the length of the tensor, or with mean square 1 if the tensor is 0."""
    v = sphere(1, real(tensor).numel(), generator=generator, dtype=torch.float64)[0].to(tensor.device)
    rms = real(tensor).double().square().mean().sqrt()
    return from_real((v * (rms if rms > 0 else 1.0)).to(tensor.dtype.to_real()), tensor.shape, tensor.dtype)


def _dot(a: Tensor, b: Tensor) -> float:
    first, second = (real(one.detach()).double().reshape(-1) for one in (a, b))
    return float((first * second).sum())


def _state(model: nn.Module) -> dict[str, Any]:
    """Return everything that a measurement must not change."""
    state: dict[str, Any] = {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    for n, p in model.named_parameters():
        state[f"parameter {n}"], state[f"requires_grad of {n}"] = p.detach().clone(), p.requires_grad
        state[f"gradient of {n}"] = None if p.grad is None else p.grad.clone()
    for n, m in model.named_modules():
        state[f"mode of {n or 'the model'}"] = m.training
        state[f"hooks of {n or 'the model'}"] = len(m._forward_hooks), len(m._forward_pre_hooks)
        state |= {
            f"attribute {n}.{key}".replace(" .", " "): _kept(value) for key, value in vars(m).items() if key[:1] != "_"
        }
    return state | {"random state": torch.get_rng_state()}


def _kept(value: Any) -> Any:
    """Return what is compared later: a copy of a tensor, the entries of a container, or the value itself."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return list(map(id, value.values()))
    return list(map(id, value)) if isinstance(value, (list, set)) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))
