"""``parameter_gsc(model, x)``: how a target depends on each layer's parameters, by the same backward sweep."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradscope import frames
from gradscope.backward.cotangents import Cotangents, basis, signs
from gradscope.backward.pulling import PullBack, pulling
from gradscope.backward.sweep import rescale
from gradscope.estimates import Estimate, Moments
from gradscope.forward.inputs import Forward, LossFunction
from gradscope.forward.layers import squared_lengths
from gradscope.forward.modules import Owned, owned_parameters, state_restored, unwrap
from gradscope.forward.trunk import Trunk, vertex
from gradscope.jacobians.capture import Capture, capture
from gradscope.memory import peak_bytes
from gradscope.norms import sum_of_squares

# Exact up to so many backward passes, else so many random cotangents.
AUTO = 32
Scaled = tuple[Tensor, Tensor]


def parameter_gsc(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    target: str | None = None,
    loss_fn: LossFunction | None = None,
    probes: int | str = "auto",
    generator: torch.Generator | None = None,
) -> pd.DataFrame:
    """Gradient Scale Coefficient of every layer's *parameters* theta_k to one target l, in the squared convention.

    GSC(theta_k, l) = |T_k^l|_qm^2 |theta_k|^2 / |f_l|^2: the squared relative change of f_l, over the whole batch, for
    a small random relative change of theta_k.  T_k^l is the (B d_l) x P_k Jacobian of f_l with respect to the P_k
    parameters that module k itself holds, and |T|_qm = |T|_F / sqrt(P_k).

    Arguments:
        model, data, forward, target, loss_fn: As for `gradscope.gsc`, one batch.
        probes: ``"exact"`` (B d_l cotangents), a number of random cotangents, or ``"auto"``: exact up to 32, else 32.
        generator: Source of the probes.  Default: a fixed seed.

    Returns:
        A tidy frame, one row a module that holds trainable parameters and one of two quantities,
        ``parameter_gsc`` and ``parameter_qm_norm`` (|T|_qm); ``index`` counts those modules from 1.  A parameter that
        the target does not depend on gives 0.  Tied parameters count once, for the module that comes first.

    Cost: one forward pass and one backward pass with parameter gradients a cotangent.  Memory: the gradients of one
    segment of the trunk for each cotangent of a bundle, within a twentieth of what is free or one cotangent.

    Raises:
        ValueError: No trainable parameters, or ``probes`` is none of these.
        FloatingPointError: A gradient is NaN or Inf; the module is named.  The range of the dtype has to hold only one
            segment of the trunk, or all segments that a tied parameter spans.
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    owners = owned_parameters(modules)
    captured = capture(model, data, forward=forward, loss_fn=loss_fn, target=target)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    cotangents = _cotangents(captured, probes, generator)
    with state_restored(modules), pulling():  # checkpointed layers run again
        pulled = pull_to_parameters(captured.graph, owners, cotangents)
    (lengths,), (exponent,) = squared_lengths([captured.target])
    target_square = Estimate.exact(float(lengths.sum()), 2 * int(exponent))
    columns: dict[str, list[Estimate]] = {"parameter_gsc": [], "parameter_qm_norm": []}
    for name, parameters in owners.items():
        square = _mean_square(pulled[name], cotangents)
        if not np.isfinite(square.mantissa):
            raise FloatingPointError(f"The gradient of the parameters of {name!r} is NaN or Inf; measure in float64.")
        num = sum(p.numel() for p in parameters)
        weights = sum(float(p.detach().double().square().sum()) for p in parameters)
        columns["parameter_gsc"].append(_ratio(square, weights / num, target_square))
        columns["parameter_qm_norm"].append(square.scaled(1 / num).sqrt())
    index = np.arange(1, len(owners) + 1)
    parts = [
        frames.tidy(
            {
                "layer": list(owners),
                "index": index,
                "depth_from_output": len(owners) - index,
                "target": captured.target.name,
                "quantity": quantity,
                "log10_value": [value.log10_value for value in values],
                "log10_stderr_probe": [value.log10_stderr for value in values],
                "log10_stderr_sample": np.nan,
                "reduction": "batch",
                "coupled": None,
                "num_probes": cotangents.num_probes,
                "num_samples": captured.batch_size,
            }
        )
        for quantity, values in columns.items()
    ]
    return pd.concat(parts, ignore_index=True)


def pull_to_parameters(graph: Trunk, owners: Owned, cotangents: Cotangents) -> dict[str, list[tuple[Scaled, ...]]]:
    """|T^T v|^2 of every cotangent, a list of bundles for each owner, and in it one (squares, exponents) a parameter.

    The squares are ``squares * 4**exponents``, each (cotangents of the bundle,).
    """
    edges = {id(p): get_gradient_edge(p) for parameters in owners.values() for p in parameters}
    wanted = {vertex(edge) for edge in edges.values()}
    segments = list(_segments(graph, wanted))
    largest = max(sum(_bytes(leaf) for leaf in leaves) for _, leaves, _ in segments) + 1
    size = max(1, peak_bytes(next(iter(owners.values()))[0].device) // largest)
    pull_back = PullBack()
    pulled: dict[str, list[tuple[Scaled, ...]]] = {name: [] for name in owners}
    for first in range(0, cotangents.num, size):
        bundle = cotangents.draw(first, min(first + size, cotangents.num))
        squares = _descend(segments, bundle, pull_back)
        zero = torch.zeros(len(bundle), dtype=torch.float64), torch.zeros(len(bundle), dtype=torch.int64)
        for name, parameters in owners.items():
            pulled[name].append(tuple(squares.get(vertex(edges[id(p)]), zero) for p in parameters))
    return pulled


Segment = tuple[GradientEdge, list[GradientEdge], GradientEdge | None]


def _segments(graph: Trunk, wanted: Collection[tuple[Node, int]]) -> Iterator[Segment]:
    """(upper cut vertex, wanted leaves between, lower one or None) from the target downward.

    A leaf that several segments use is listed in the topmost: its gradient from there holds all uses below.
    """
    found: set[Node] = set()
    for position in range(len(graph.edges) - 1, -1, -1):
        lower = graph.edges[position - 1] if position else None
        stop = vertex(lower) if lower is not None else None
        start = graph.edges[position].node
        stack, seen, leaves = [start], {start}, []
        while stack:
            for parent, output_nr in stack.pop().next_functions:
                if parent is None or (parent, output_nr) == stop or parent in seen:
                    continue
                seen.add(parent)
                if (parent, output_nr) not in wanted:
                    stack.append(parent)
                elif parent not in found:
                    found.add(parent)
                    leaves.append(GradientEdge(parent, output_nr))
        yield graph.edges[position], leaves, lower


def _descend(segments: Sequence[Segment], bundle: Tensor, pull_back: PullBack) -> dict[tuple[Node, int], Scaled]:
    """Carry one bundle down the trunk; squares and exponents of what reaches each leaf."""
    squares: dict[tuple[Node, int], Scaled] = {}
    exponents = torch.zeros(len(bundle), dtype=torch.int64, device=bundle.device)
    for upper, leaves, lower in segments:
        inputs = [*leaves, *([] if lower is None else [lower])]
        if not inputs:
            break
        gradients = pull_back(upper, inputs, bundle)
        for leaf, gradient in zip(leaves, gradients, strict=False):
            square, common = sum_of_squares(gradient, 1)
            squares[vertex(leaf)] = square.cpu(), common.cpu() + exponents.cpu()
        if lower is not None:
            bundle, shift = rescale(gradients[-1])
            exponents = exponents + shift
    return squares


def _cotangents(captured: Capture, probes: int | str, generator: torch.Generator) -> Cotangents:
    target = captured.target
    if probes == "auto":
        probes = "exact" if target.size <= AUTO else AUTO
    if probes == "exact":
        return basis(target, target.size)
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f'probes must be a whole number >= 1, "exact" or "auto", got {probes!r}.')
    return signs(target, probes, generator)


def _mean_square(bundles: Sequence[tuple[Scaled, ...]], cotangents: Cotangents) -> Estimate:
    """|T|_F^2 of one owner: the sum over a basis, or the mean over random cotangents with its error."""
    parts = zip(*bundles, strict=True)  # by parameter
    columns = [tuple(torch.cat(pieces).numpy() for pieces in zip(*part, strict=True)) for part in parts]
    common = int(max(exponents.max() for _, exponents in columns))
    total = sum(np.ldexp(squares, 2 * (exponents - common)) for squares, exponents in columns)
    if cotangents.num_probes == 0:
        return Estimate.exact(float(np.sum(total)), 2 * common)
    return Moments.of(total, 2 * common).estimate()


def _ratio(square: Estimate, factor: float, target_square: Estimate) -> Estimate:
    scaled = square.scaled(factor / target_square.mantissa)
    return Estimate(
        scaled.mantissa, scaled.mantissa_stderr, scaled.exponent - target_square.exponent, square.num_probes
    )


def _bytes(leaf: GradientEdge) -> int:
    variable: Tensor = leaf.node.variable  # type: ignore[attr-defined]
    return variable.numel() * variable.element_size()
