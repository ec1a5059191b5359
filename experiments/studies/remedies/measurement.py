"""Networks that explode, and the same networks with a remedy at an equal number of parameters."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs
import gradscope.meanfield as mf
from experiments.evidence.study import evenly
from gradscope import initializers
from gradscope.frames import observed
from gradscope.measures import LinearFitError, SignDiversity
from gradscope.models.mlp import MLP

BASELINES: dict[str, dict[str, Any]] = {
    "tanh_large": {"activation": "tanh", "weight_variance": 4.0},
    "relu_batch": {"activation": "relu", "norm": "batch"},
    "selu": {"activation": "selu"},
}
INITS = ("he", "lecun", "xavier", "orthogonal", "looks_linear")
# Normalization that a remedy sets.
NORMS = {"batch": "batch", "layer": "layer", "plain": "none", "looks_linear": "none"}
NONE = "none"
# FEWER: divisor of the number of layers for "wider".  NUM_FITTED, NUM_SCALED: samples for the affine fit and for LSUV.
FEWER, NUM_FITTED, NUM_SCALED = 5, 1000, 256
NUM_SOURCES, NUM_OUTPUTS = 10, 10
# Random cotangents for NLC if samples are coupled; otherwise NLC is exact.
NLC_PROBES = 16


def network(case: str, depth: int, width: int, in_features: int, *, generator: torch.Generator) -> nn.Module:
    """The network of ``<baseline>-<remedy>``, with about as many parameters as a plain network of this depth and width.

    The page of the study explains the remedies.  LSUV uses a separate batch.
    """
    baseline, _, remedy = case.partition("-")
    if baseline not in BASELINES:
        raise ValueError(f"A case must begin with one of {', '.join(BASELINES)}, got {case!r}.")
    options: dict[str, Any] = {"depth": depth, "width": width, "in_features": in_features, "out_features": NUM_OUTPUTS}
    options |= BASELINES[baseline]
    if remedy == "wider":
        options["depth"] = max(1, depth // FEWER)
        options["width"] = equal_width(in_features * width + (depth - 1) * width**2, options["depth"], in_features)
    elif remedy == "residual":
        options |= {"residual": "identity", "depth": max(1, depth // 2)}
    elif remedy in NORMS:
        options["norm"] = NORMS[remedy]
    elif remedy not in (NONE, "critical", "lsuv", *INITS):
        raise ValueError(f"Unknown remedy {remedy!r}; the page docs/studies/remedies.md lists the remedies.")
    if remedy in INITS:
        options |= {"init": remedy, "weight_variance": None}
    model = MLP(**options, generator=generator)
    if remedy == "critical":
        initializers.critical(model, options["activation"], generator=generator)
    if remedy == "lsuv":
        initializers.lsuv(model, torch.randn(NUM_SCALED, in_features, generator=generator), generator=generator)
    return model


def equal_width(num_parameters: int, depth: int, in_features: int) -> int:
    """Width w of a plain network with about ``num_parameters`` weights: in_features w + (depth - 1) w^2."""
    root = math.sqrt(in_features**2 + 4 * (depth - 1) * num_parameters)
    return max(1, round(2 * num_parameters / (root + in_features)))


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator, num_probes: int) -> pd.DataFrame:
    """GSC from the input and ten layers to the output, four measures of nonlinearity, and the number of parameters."""
    depth = len(model.get_submodule("layers")._modules)
    sources = ["input", *(f"layers.{number}" for number in evenly(depth, NUM_SOURCES)), "head"]
    profile = gs.gsc(model, x, layers=sources, probes=num_probes, generator=generator).to_frame()
    statistics = gs.measure(model, x, measures=[SignDiversity(), LinearFitError()])
    last = statistics[statistics["index"] == statistics["index"].max()].assign(layer="last", index=0)
    probes = NLC_PROBES if profile["coupled"].any() else "exact"
    coefficient = gs.nlc(model, x, probes=probes, generator=generator)
    fresh = torch.randn(NUM_FITTED, *x.shape[1:], generator=generator).to(x)
    with torch.no_grad(), torch.random.fork_rng():
        error = network_linear_fit_error(fresh.flatten(1), model(fresh))
    parts = [
        observed("nlc", coefficient.value, stderr=[coefficient.stderr], num_samples=len(x)),
        observed("network_linear_fit_error", error, num_samples=len(fresh)),
        observed("num_parameters", sum(parameter.numel() for parameter in model.parameters())),
    ]
    return pd.concat([profile, last, *parts], ignore_index=True)


def network_linear_fit_error(x: Tensor, y: Tensor) -> float:
    """Fraction of the variance of outputs y (N, m) that the best affine map of the inputs x (N, d) does not explain.

    Formula: residual sum of squares / (N - d - 1), divided by total sum of squares / (N - 1). Sums include all outputs.
    """
    x, y = x.double(), y.double()
    num, size = x.shape
    if num <= size + 1:
        raise ValueError(f"An affine map of {size} inputs fits any {num} samples exactly; pass more than {size + 1}.")
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    left = y - x @ torch.linalg.lstsq(x, y).solution
    return float(left.square().sum() / (num - size - 1) / (y.square().sum() / (num - 1)))


@cache
def rate(case: str, batch_size: int) -> float:
    """GSC per layer in mean field; NaN if there is no constant rate, as with residual connections."""
    baseline, _, remedy = case.partition("-")
    options = BASELINES[baseline]
    activation, norm = options["activation"], options.get("norm", "none")
    norm = NORMS.get(remedy, norm)
    if remedy == "residual" or (remedy, activation) == ("he", "selu"):  # With he and SELU, lengths grow without bound.
        return math.nan
    if norm != "none":
        return mf.gsc_rate(activation, norm, batch_size if norm == "batch" else None)
    if remedy == "lsuv":
        return mf.gsc_rate(activation, q=1.0)
    variances = {"he": 2.0, "lecun": 1.0, "xavier": 1.0, "orthogonal": 1.0, "critical": 1.0}
    return mf.gsc_rate(activation, weight_variance=variances.get(remedy, options.get("weight_variance")))
