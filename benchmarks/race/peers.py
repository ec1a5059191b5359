"""Alternatives to a profile in other tools: |J|_F^2 of each layer, computed through the whole network above it.

Each function returns squared Frobenius norms by layer: ``{name: (B,)}``, one per sample, or ``{name: ()}``, their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

import gradscope as gs
from benchmarks.race.chains import Chain

try:
    import curvlinops

    HAS_CURVLINOPS = True
except ImportError:
    HAS_CURVLINOPS = False

TOLERANCE = 1e-3  # relative, float32
DEVIATIONS = 5

Norms = dict[str, Tensor]


def vmap_jacrev(chain: Chain) -> Norms:
    """``torch.func``: the Jacobian of one sample in reverse mode, mapped over the samples.  Exact."""
    norms = {}
    for name, output, tail in chain.sources():
        with torch.no_grad():  # saves the graph of the parameters: a third faster
            jacobians = vmap(jacrev(lambda h, tail=tail: tail(h[None])[0]))(output)  # (B, d_l, *d_k)
        norms[name] = torch.linalg.vector_norm(jacobians.flatten(1), dim=1).square()
    return norms


def functional_jacobian(chain: Chain) -> Norms:
    """``torch.autograd.functional.jacobian``, vectorized.  Exact.

    The outputs of all samples are summed.  Samples are independent, so the Jacobian of the sum has one block per
    sample and needs d_l cotangents instead of B d_l.
    """
    norms = {}
    for name, output, tail in chain.sources():
        jacobian = torch.autograd.functional.jacobian(lambda h, tail=tail: tail(h).sum(0), output, vectorize=True)
        norms[name] = torch.linalg.vector_norm(jacobian.flatten(2), dim=(0, 2)).square()  # (d_l, B, *d_k) -> (B,)
    return norms


class Tail(nn.Module):
    """The network above layer k, as a function of a parameter: the outputs of layer k, (B, *d_k)."""

    def __init__(self, output: Tensor, tail: nn.Module) -> None:
        super().__init__()
        self.output, self.tail = nn.Parameter(output), tail

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, *d_l); only the batch size of ``x`` (B, ...) matters, and curvlinops reads it."""
        return self.tail(self.output)


def hutchinson(chain: Chain, num: int) -> Norms:
    """``curvlinops.hutchinson_squared_fro`` with ``num`` Rademacher vectors: an estimate for the whole batch.

    curvlinops differentiates with respect to parameters, so the layer's output becomes the only parameter of the tail.
    The (B d_l) x (B d_k) Jacobian is block diagonal.  Forward mode and reverse mode take the same time here.
    """
    norms = {}
    for name, output, tail in chain.sources():
        module = Tail(output, tail)
        data = [(chain.x, chain.x)]  # the second entry stands for labels, which a Jacobian does not use
        operator = curvlinops.JacobianLinearOperator(
            module, [module.output], data, check_deterministic=False, num_data=len(chain.x)
        )
        norms[name] = curvlinops.hutchinson_squared_fro(operator, num).detach()
    return norms


def assert_exact(name: str, norms: Norms, chain: Chain, profile: gs.Profile) -> None:
    """Assert that the norms give the GSC of ``profile`` within 0.1 % for every layer."""
    _compare(name, norms, chain, profile, lambda layer: TOLERANCE)


def assert_estimate(name: str, norms: Norms, num: int, exact: Norms, chain: Chain, profile: gs.Profile) -> None:
    """Assert that estimates from ``num`` random sign vectors lie within five standard deviations of ``profile``.

    The standard deviation for a sample with squared norm n is at most sqrt(2 / num) n (rank one); samples are
    independent.  ``exact`` holds the squared norm of each sample.
    """

    def tolerance(layer: str) -> float:
        squares = exact[layer].double()
        return DEVIATIONS * math.sqrt(2 / num * float(squares.square().sum())) / float(squares.sum())

    _compare(name, norms, chain, profile, tolerance)


def _compare(name: str, norms: Norms, chain: Chain, profile: gs.Profile, tolerance: Callable[[str], float]) -> None:
    """Compare GSC = |J|_F^2 / (B d_k) |F_k|^2 / |F_l|^2, with the batch as one vector."""
    with torch.no_grad():
        length = chain.model(chain.x).double().square().sum()
    outputs = {layer: output.double() for layer, output, _ in chain.sources()}
    if list(norms) != list(profile.layers[:-1]):
        raise AssertionError(f"{name} measured {list(norms)}, gradscope {list(profile.layers[:-1])}")
    for layer, squares in norms.items():
        output = outputs[layer]
        gsc = float(squares.double().sum() / output.numel() * output.square().sum() / length)
        ratio = gsc / 10 ** profile.log10_values[profile.layers.index(layer), 0]
        if not abs(ratio - 1) <= tolerance(layer):
            raise AssertionError(f"{name} and gradscope differ by the factor {ratio:.5f} at layer {layer!r}")
