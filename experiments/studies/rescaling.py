"""A network in other units: the same function, the same training, other raw gradients, the same coefficients."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import gradscope as gs
from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean
from experiments.evidence.study import Claim, Study
from gradscope.frames import observed
from gradscope.models import MLP

QUESTION = "Can the length of raw gradients tell whether a network explodes?"
METHOD = """
A ReLU network without normalization (depth {model.depth}, width {model.width}, a linear head for {model.out_features}
classes, {dtype}), and the same network with every layer in other units: the output of the layer that lies l layers
before the output is multiplied by R^-l, for R of {measurement.factor}. As ReLU is positively homogeneous, it takes a
factor R on every weight matrix but the first, which gets R^-L. The function is the same; for R a power of two even bit
for bit.

A weight c w has a gradient 1/c times as long, and takes a step c times as long as that of w if its learning rate is
multiplied by c^2. Both networks are trained by gradient descent on {data.batch_size} samples of Gaussian noise, labeled
by a random linear map, for {measurement.steps} steps with these rates ({measurement.learning_rate} for the plain
network); a third time with one rate for all layers.

Measured before training: the length of the gradient of the loss with respect to every layer's output, and GSC of every
layer to the logits, exact. The construction is that of G. Philipp, D. Song and J. Carbonell (arXiv:1712.05577).
"""
HOW_SURE = """
Nothing here is a matter of chance but the weights, data and labels, {num_seeds} of them for every R: identities hold
for every seed up to rounding. Intervals of losses and rates are over these seeds, 95 %, Student's t. The statement is
about networks that are positively homogeneous in every layer; with tanh the compensation would have to stand outside
of the nonlinearity.
"""
CAPTIONS = {
    "rescaling": (
        "Raw gradients, coefficients and training loss of one network in several units. Where lines coincide the later "
        "is thinner and lies upon the earlier; bands are one standard deviation over seeds."
    )
}

PLAIN, RESCALED, SAME_RATE = "plain", "rescaled", "rescaled, one rate"
# Rounding in float64, grown over the steps of training.
ROUNDING = 1e-9
# A loss that rises by more than this part of itself in a step does not learn steadily.
RISE = 0.01


def rescaled(model: MLP, factor: float) -> tuple[MLP, list[float]]:
    """The same function with the output of layer i of L multiplied by factor^-(L + 1 - i), and what each weight got.

    Raises:
        ValueError: The network is not positively homogeneous layer by layer, or has no head.
    """
    activations = [getattr(layer, "activation", None) for layer in model.layers]
    plain = all(isinstance(a, nn.ReLU) for a in activations) and all(layer.norm is None for layer in model.layers)
    if not plain or model.head is None or any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise ValueError("Only a ReLU network with a head, without normalization and biases, can be rescaled.")
    other, depth = copy.deepcopy(model), len(model.layers)
    factors = [factor**-depth] + [factor] * depth
    with torch.no_grad():
        for weight, scale in zip(other.parameters(), factors, strict=True):
            weight.mul_(scale)
    return other, factors


def measure(
    model: nn.Module, x: Tensor, *, generator: torch.Generator, factor: float, steps: int, learning_rate: float
) -> pd.DataFrame:
    """Raw gradients, GSC and losses in training of a network and of itself in other units, told apart by ``variant``.

    Arguments:
        model, x: A ReLU network with a head, and its batch.
        generator: The map that labels the batch.
        factor: R.
        steps, learning_rate: Of gradient descent on the whole batch.
    """
    if not isinstance(model, MLP):
        raise ValueError(f"Only a gradscope.models.MLP can be rescaled here, got {type(model).__name__}.")
    other, factors = rescaled(model, factor)
    with torch.no_grad():
        num_classes = model(x).shape[1]
    labels = (x.flatten(1) @ torch.randn(x[0].numel(), num_classes, dtype=x.dtype, generator=generator)).argmax(dim=1)
    networks = {PLAIN: model, RESCALED: other}
    gradients = {variant: np.log10(raw_gradients(network, x, labels)) for variant, network in networks.items()}
    profiles = {variant: gs.gsc(network, x, probes="exact") for variant, network in networks.items()}
    rates = {PLAIN: [1.0] * len(factors), RESCALED: [scale**2 for scale in factors], SAME_RATE: [1.0] * len(factors)}
    losses = {
        variant: descend(networks.get(variant, other), x, labels, [learning_rate * rate for rate in own], steps)
        for variant, own in rates.items()
    }
    depth = len(factors) - 1
    layers: dict[str, Any] = {"layer": [f"layers.{i}" for i in range(depth)], "index": np.arange(1, depth + 1)}
    expected = np.arange(depth, 0, -1) * math.log10(factor)
    moved = profiles[RESCALED].log10_values[:, 0] - profiles[PLAIN].log10_values[:, 0]
    # Differences are taken here, at full precision: a saved frame keeps fewer digits.
    parts = [
        observed("ratio_error", 10 ** (gradients[RESCALED] - gradients[PLAIN] - expected) - 1, **layers),
        observed("gsc_difference", 10**moved - 1, index=np.arange(len(moved))),
        observed("loss_difference", _distance(losses[RESCALED], losses[PLAIN]), index=np.arange(steps + 1)),
    ]
    parts += [observed("log10_raw_gradient", lengths, variant=v, **layers) for v, lengths in gradients.items()]
    parts += [profile.to_frame().assign(variant=variant) for variant, profile in profiles.items()]
    parts += [observed("loss", values, index=np.arange(steps + 1), variant=v) for v, values in losses.items()]
    return pd.concat(parts, ignore_index=True)


def _distance(values: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """Of two descents, step by step; two that have both left the range of numbers are infinitely far apart."""
    first, second = np.array(values), np.array(others)
    distance = np.full(first.shape, np.inf)
    return np.abs(np.subtract(first, second, out=distance, where=np.isfinite(first) & np.isfinite(second)))


def raw_gradients(model: MLP, x: Tensor, labels: Tensor) -> list[float]:
    """Length of the gradient of the mean loss with respect to the output of every layer, input first."""
    outputs = []
    h = x.flatten(1)
    for layer in model.layers:
        h = layer(h)
        outputs.append(h)
    assert model.head is not None
    gradients = torch.autograd.grad(functional.cross_entropy(model.head(h), labels), outputs)
    return [float(gradient.norm()) for gradient in gradients]


def descend(model: MLP, x: Tensor, labels: Tensor, rates: Sequence[float], steps: int) -> list[float]:
    """Losses before every step and after the last of gradient descent, a learning rate for each weight matrix.

    A loss that is not finite stands as infinite, and ends the descent; ``model`` is left as it is.
    """
    network, losses = copy.deepcopy(model), []
    for step in range(steps + 1):
        loss = functional.cross_entropy(network(x), labels)
        losses.append(float(loss.detach()) if torch.isfinite(loss) else math.inf)
        if step == steps or losses[-1] == math.inf:
            break
        weights = list(network.parameters())
        with torch.no_grad():
            for weight, gradient, rate in zip(weights, torch.autograd.grad(loss, weights), rates, strict=True):
                weight.sub_(gradient, alpha=rate)
    return losses + [math.inf] * (steps + 1 - len(losses))


def figures(collected: Collected) -> dict[str, Figure]:
    """Raw gradients, coefficients and losses, side by side; where lines coincide the later is thinner."""
    frame = collected.frame
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.2), layout="constrained")
    parts = [("log10_raw_gradient", "value"), ("gsc", "log10_value"), ("loss", "value")]
    for ax, (quantity, column) in zip(axes, parts, strict=True):
        rows = _rows(frame[frame["index"] > 0] if quantity == "gsc" else frame, quantity)
        once = rows[(rows["variant"] == PLAIN) & (rows["factor"] == max(_factors(frame)))]  # the same beside every R
        _line(ax, once, column, "0.7", "plain", 7.0)
        for place, factor in enumerate(_factors(frame)):
            chosen = rows[(rows["variant"] == RESCALED) & (rows["factor"] == factor)]
            _line(ax, chosen, column, sns.color_palette("colorblind")[place], f"R = {factor:g}", 4.5 - 1.6 * place)
        sns.despine(ax=ax)
    trained, grown, moved = (claim.holds for claim in _identities(frame))
    label, words = "layer, from the input", ("they differ", "all the same")
    ratio = "steeper by R a layer" if grown else "not as R says"
    axes[0].set(xlabel=label, ylabel=r"$\log_{10}$ length of the raw gradient", title=f"raw gradients: {ratio}")
    axes[1].set(
        xlabel=label, ylabel=r"$\log_{10}$ GSC (squared convention)", title=f"coefficients: {words[bool(moved)]}"
    )
    axes[2].set(xlabel="step", ylabel="training loss", title=f"training, step sizes rescaled: {words[bool(trained)]}")
    axes[0].legend(frameon=False)
    seeds = frame["seed"].nunique()
    figure.suptitle(f"One network in several units; mean over {seeds} seeds, band: one standard deviation", fontsize=10)
    return {"rescaling": figure}


def claims(collected: Collected) -> list[Claim]:
    """The same training, the same coefficients, other gradients."""
    frame = collected.frame
    factors = _factors(frame)
    apart = {factor: _final(frame, SAME_RATE, factor) for factor in factors}
    end = _final(frame, PLAIN, max(factors))
    return [
        *_identities(frame),
        _learns(frame),
        Claim(
            "It trains identically with one learning rate for all layers, too",
            all(abs(final.value - end.value) < ROUNDING for final in apart.values()),
            f"final loss {end:.3f} plain, "
            + ", ".join(f"{_reached(final)} for R = {factor:g}" for factor, final in apart.items()),
        ),
    ]


def answer(collected: Collected) -> str:
    """No, if the identities hold."""
    frame = collected.frame
    most = max(_factors(frame))
    if not all(claim.holds for claim in _identities(frame)):
        return "These runs do not tell: the networks that should be one in several units are not, see the claims."
    return (
        f"No. In other units the same network has a raw gradient that grows by a factor "
        f"{_growth(frame, RESCALED, most):.2f} a layer toward the input (R = {most:g}) instead of "
        f"{_growth(frame, PLAIN, most):.2f}, and it trains exactly as before if its step sizes are in these units as "
        "well. GSC, which compares relative changes, is the same number for both."
    )


def _identities(frame: pd.DataFrame) -> list[Claim]:
    """Of training, of raw gradients, and of coefficients."""
    drift = {factor: _largest(frame, "loss_difference", factor) for factor in _factors(frame)}
    exact = [factor for factor in drift if math.log2(factor).is_integer()]
    ratio, moved = (max(_largest(frame, name, f) for f in drift) for name in ("ratio_error", "gsc_difference"))
    most = max(drift)
    return [
        Claim(
            "With its step sizes rescaled the network trains identically",
            max(drift.values()) < ROUNDING and all(drift[factor] == 0 for factor in exact),
            "largest difference of the loss over all steps and seeds "
            + ", ".join(f"{_bound(difference)} for R = {factor:g}" for factor, difference in drift.items()),
            identity=True,
        ),
        Claim(
            "Its raw gradient grows by R a layer more than that of the plain network",
            ratio < ROUNDING,
            f"relative error of the ratio of both {_bound(ratio)}; for R = {most:g} it grows by "
            f"{_growth(frame, RESCALED, most):.3f} a layer, plain by {_growth(frame, PLAIN, most):.3f}",
            identity=True,
        ),
        Claim("GSC does not move", moved < ROUNDING, f"largest relative difference {_bound(moved)}", identity=True),
    ]


def _learns(frame: pd.DataFrame) -> Claim:
    """Whether the training that is the same is one: the loss of the plain network falls, and without jumps."""
    rows = _rows(frame[(frame["factor"] == max(_factors(frame))) & (frame["variant"] == PLAIN)], "loss")
    losses = rows.pivot_table(index="seed", columns="index", values="value", observed=True).to_numpy()
    rise = float((losses[:, 1:] / losses[:, :-1]).max() - 1)
    change = mean(losses[:, -1] - losses[:, 0])
    falls = True if change.high < 0 else False if change.low > 0 else None
    return Claim(
        "The plain network learns: its loss falls and never jumps",
        False if rise > RISE else falls,
        f"from {mean(losses[:, 0]):.2f} to {mean(losses[:, -1]):.2f}, change {change:.2f}; "
        f"the largest rise in one step is {100 * max(rise, 0.0):.1f} %, a jump is more than {100 * RISE:g} %",
    )


def _rows(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return frame[frame["quantity"] == quantity]


def _factors(frame: pd.DataFrame) -> list[float]:
    return sorted(float(factor) for factor in frame["factor"].unique())


def _largest(frame: pd.DataFrame, quantity: str, factor: float) -> float:
    """Over layers or steps, and seeds."""
    return float(_rows(frame[frame["factor"] == factor], quantity)["value"].abs().max())


def _growth(frame: pd.DataFrame, variant: str, factor: float) -> Mean:
    """Of the raw gradient, a layer toward the input."""
    rows = _rows(frame[(frame["factor"] == factor) & (frame["variant"] == variant)], "log10_raw_gradient")
    table = rows.pivot_table(index="seed", columns="index", values="value", observed=True).to_numpy()
    return geometric_mean(10 ** ((table[:, 0] - table[:, -1]) / (table.shape[1] - 1)))


def _final(frame: pd.DataFrame, variant: str, factor: float) -> Mean:
    """Of the loss over seeds; infinite if one of them left the range of numbers."""
    rows = _rows(frame[(frame["factor"] == factor) & (frame["variant"] == variant)], "loss")
    losses = rows[rows["index"] == rows["index"].max()]["value"]
    return mean(losses) if np.isfinite(losses).all() else Mean(math.inf, math.inf, math.inf, len(losses))


def _reached(loss: Mean) -> str:
    return f"{loss:.3f}" if math.isfinite(loss.value) else "beyond the range of numbers"


def _bound(difference: float) -> str:
    """Of rounding only the power of ten can be repeated on another processor."""
    return "0" if difference == 0 else f"below 1e{math.floor(math.log10(difference)) + 1}"


def _line(ax: Axes, rows: pd.DataFrame, column: str, color: object, label: str, width: float) -> None:
    by_index = rows.groupby("index", observed=True)[column]
    means, deviation = by_index.mean(), by_index.std().fillna(0.0)
    ax.plot(means.index, means, color=color, label=label, linewidth=width)
    ax.fill_between(means.index, means - deviation, means + deviation, color=color, alpha=0.1, linewidth=0)


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
    captions=CAPTIONS,
)
