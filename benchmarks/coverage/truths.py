"""Finite populations of samples, and the values of their statistics as formulas in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import gradscope as gs
from gradscope.measures.gradient import LayerGradient
from gradscope.measures.layer_gradients import GROUPS
from gradscope.measures.preactivations import NONLINEARITIES, nonlinearity_calls, response, slopes

M = gs.measures
STATISTICS = (
    M.PreactivationMean(), M.PreactivationStd(), M.SignDiversity(), M.SaturatedFraction(), M.DeadFraction(),
    M.Kurtosis(), M.EffectiveRank(), M.SampleCosine(), M.LinearFitError(),
)  # fmt: skip

KNOWN = tuple(m for m in STATISTICS if m.quantity not in {"dead_fraction", "kurtosis", "effective_rank"})


@dataclass(frozen=True)
class Population:
    """Pre-activations, slopes and responses of the last nonlinearity, one row per sample."""

    values: dict[str, Any]

    def __len__(self) -> int:
        return len(self.values["preactivations"])

    def take(self, rows: Tensor) -> Population:
        """The samples with these numbers."""
        h, s, (_, a) = self.values["preactivations"], self.values["slopes"], self.values["responses"]
        return Population({"preactivations": h[rows], "slopes": s[rows], "responses": (h[rows], a[rows])})

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Population:
        """The population of the samples ``x``."""
        calls: list[tuple[nn.Module, Tensor]] = []
        modules = {name: m for name, m in model.named_modules() if isinstance(m, NONLINEARITIES)}
        with nonlinearity_calls(modules, lambda name, module, h: calls.append((module, h))), torch.no_grad():
            model(x)
        module, h = calls[-1]
        a = response(module, h).detach()
        return cls({"preactivations": h, "slopes": slopes(module, h), "responses": (h, a)})


def statistic_truths(population: Population) -> dict[str, float]:
    """The value of every statistic for a population: what a batch would give if it could be infinitely large."""
    h, a = (part.numpy() for part in population.values["responses"])
    s = population.values["slopes"].numpy()
    d, e = h - h.mean(axis=0), a - a.mean(axis=0)
    units = h / np.linalg.norm(h, axis=1, keepdims=True)
    positive, negative = (h > 0).mean(axis=0), (h < 0).mean(axis=0)
    p = np.linalg.svd(h, compute_uv=False)
    p = p[p > 0] / p.sum()
    slope = (d * e).mean(axis=0) / np.square(d).mean(axis=0)
    return {
        "preactivation_mean": h.mean(),
        "preactivation_std": np.sqrt(h.var(axis=0).mean()),
        "sign_diversity": (np.minimum(positive, negative) / (positive + negative)).mean(),
        "saturated_fraction": (np.abs(s) < 0.05).mean(),
        "dead_fraction": (s == 0).all(axis=0).mean(),
        "kurtosis": np.square(np.square(d)).mean() / np.square(d).mean() ** 2,
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "sample_cosine": np.square(units.mean(axis=0)).sum(),
        "linear_fit_error": np.square(e - slope * d).sum() / np.square(e).sum(),
    }


def gradient_truths(g: npt.NDArray[np.float64]) -> dict[str, float]:
    """The statistics of the gradients g (samples, P) of a population."""
    mean = g.mean(axis=0)
    lengths = np.linalg.norm(g, axis=1, keepdims=True)
    units = (g / np.where(lengths > 0, lengths, 1.0))[lengths[:, 0] > 0]
    return {
        "gradient_norm": np.linalg.norm(mean),
        "gradient_cosine": np.square(units.mean(axis=0)).sum(),
        "signal_to_noise": np.square(mean).sum() / np.square(g - mean).sum(axis=1).mean(),
    }


def grouped(g: Tensor) -> LayerGradient:
    """The summary of gradients (B, P) that `gradscope.measure` makes, with few groups of unit gradients."""
    found = LayerGradient.of(g, torch.ones(g.shape[1], dtype=g.dtype))
    sums = torch.zeros(GROUPS, g.shape[1], dtype=g.dtype)
    sums.index_add_(0, torch.arange(len(g)) % GROUPS, found.unit_sums)
    return LayerGradient(found.mean, found.weight, found.squares, found.projections, sums)
