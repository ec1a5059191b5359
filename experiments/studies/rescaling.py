"""The same network with rescaled layers: function, training and GSC stay the same, but raw gradients change."""

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
from experiments.evidence import means
from experiments.evidence.colors import COLORS
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim, Study
from gradscope.frames import observed
from gradscope.models import MLP

PLAIN, RESCALED, SAME_RATE = "plain", "rescaled", "rescaled, one rate"
# Rounding errors of float64 after all training steps.
ROUNDING = 1e-9
# The loss jumps if its relative rise in one step is above this value.
RISE = 0.01


def rescaled(model: MLP, factor: float) -> tuple[MLP, list[float]]:
    """A copy that multiplies the output of layer i (of L) by factor^-(L + 1 - i), and the factors of its weights."""
    activations = [getattr(layer, "activation", None) for layer in model.layers]
    plain = all(isinstance(a, nn.ReLU) for a in activations) and all(layer.norm is None for layer in model.layers)
    if not plain or model.head is None or any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise ValueError("Only a ReLU network with a head and without normalization or biases can be rescaled.")
    other, depth = copy.deepcopy(model), len(model.layers)
    factors = [factor**-depth] + [factor] * depth
    with torch.no_grad():
        for weight, scale in zip(other.parameters(), factors, strict=True):
            weight.mul_(scale)
    return other, factors


def measure(
    model: nn.Module, x: Tensor, *, generator: torch.Generator, factor: float, steps: int, learning_rate: float
) -> pd.DataFrame:
    """Raw gradients, GSC and training losses of a network and its rescaled copy, marked in the column ``variant``.

    The scale changes by ``factor`` per layer.  The ``generator`` draws the linear map that labels the batch ``x``.
    """
    if not isinstance(model, MLP):
        raise ValueError(f"Only a gradscope.models.MLP can be rescaled, got {type(model).__name__}.")
    other, factors = rescaled(model, factor)
    with torch.no_grad():
        num_classes = model(x).shape[1]
    labels = (x.flatten(1) @ torch.randn(x[0].numel(), num_classes, dtype=x.dtype, generator=generator)).argmax(dim=1)
    networks = {PLAIN: model, RESCALED: other}
    gradients = {variant: np.log10(raw_gradients(network, x, labels)) for variant, network in networks.items()}
    profiles = {variant: gs.gsc(network, x, probes="exact") for variant, network in networks.items()}
    one = [learning_rate] * len(factors)
    rates = {PLAIN: one, RESCALED: [learning_rate * scale**2 for scale in factors], SAME_RATE: one}
    losses = {v: descend(networks.get(v, other), x, labels, own, steps) for v, own in rates.items()}
    depth = len(factors) - 1
    layers: dict[str, Any] = {"layer": [f"layers.{i}" for i in range(depth)], "index": np.arange(1, depth + 1)}
    expected = np.arange(depth, 0, -1) * math.log10(factor)
    moved = profiles[RESCALED].log10_values[:, 0] - profiles[PLAIN].log10_values[:, 0]
    # Differences are computed here at full precision, because a saved frame has fewer digits.
    parts = [
        observed("ratio_error", 10 ** (gradients[RESCALED] - gradients[PLAIN] - expected) - 1, **layers),
        observed("gsc_difference", 10**moved - 1, index=np.arange(len(moved))),
        observed("loss_difference", _distance(losses[RESCALED], losses[PLAIN]), index=np.arange(steps + 1)),
    ]
    parts += [observed("log10_raw_gradient", lengths, variant=v, **layers) for v, lengths in gradients.items()]
    parts += [profile.to_frame().assign(variant=v) for v, profile in profiles.items()]
    parts += [observed("loss", values, index=np.arange(steps + 1), variant=v) for v, values in losses.items()]
    return pd.concat(parts, ignore_index=True)


def _distance(values: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """Absolute difference of two loss curves; infinite if one of the losses is infinite."""
    with np.errstate(invalid="ignore"):  # inf - inf
        return np.nan_to_num(np.abs(np.subtract(values, others)), nan=np.inf, posinf=np.inf)


def raw_gradients(model: MLP, x: Tensor, labels: Tensor) -> list[float]:
    """Norm of the gradient of the mean loss with respect to the output of every layer, in forward order."""
    outputs = [x.flatten(1)]
    for layer in model.layers:
        outputs.append(layer(outputs[-1]))
    assert model.head is not None
    gradients = torch.autograd.grad(functional.cross_entropy(model.head(outputs[-1]), labels), outputs[1:])
    return [float(gradient.norm()) for gradient in gradients]


def descend(model: MLP, x: Tensor, labels: Tensor, rates: Sequence[float], steps: int) -> list[float]:
    """Losses before every step of gradient descent and after the last; ``rates`` has one entry per weight matrix.

    The descent ends at a non-finite loss. This loss and all later losses are returned as infinite.
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
    """A figure of raw gradients, GSC and losses. If curves coincide, the thinner curve is on top."""
    frame, factors = collected.frame, _factors(collected.frame)
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.2), layout="constrained")
    parts = [("log10_raw_gradient", "value"), ("gsc", "log10_value"), ("loss", "value")]
    for ax, (quantity, column) in zip(axes, parts, strict=True):
        first = 1 if quantity == "gsc" else 0  # GSC of the input is left out
        # The original is the same for every R, so draw it once.
        _line(ax, _table(frame, quantity, PLAIN, max(factors), column).loc[:, first:], "0.7", "plain", 7.0)
        for place, factor in enumerate(factors):
            table = _table(frame, quantity, RESCALED, factor, column).loc[:, first:]
            _line(ax, table, COLORS[place], f"R = {factor:g}", 4.5 - 1.6 * place)
        sns.despine(ax=ax)
    trained, grown, moved = (claim.holds for claim in _identities(frame))
    label, words = "layer, from the input", {True: "all the same", False: "they differ"}
    ratio, same = "steeper by R per layer" if grown else "not as R says", words[bool(moved)]
    axes[0].set(xlabel=label, ylabel=r"$\log_{10}$ length of the raw gradient", title=f"raw gradients: {ratio}")
    axes[1].set(xlabel=label, ylabel=r"$\log_{10}$ GSC (squared convention)", title=f"coefficients: {same}")
    axes[2].set(xlabel="step", ylabel="training loss", title=f"training, step sizes rescaled: {words[bool(trained)]}")
    axes[0].legend(frameon=False)
    seeds = frame["seed"].nunique()
    figure.suptitle(f"One network in several units; mean over {seeds} seeds, band: one standard deviation", fontsize=10)
    return {"rescaling": figure}


def claims(collected: Collected) -> list[Claim]:
    """Whether training and GSC are the same, and raw gradients are not."""
    frame = collected.frame
    ends = {factor: _table(frame, "loss", SAME_RATE, factor).to_numpy()[:, -1] for factor in _factors(frame)}
    end = means.mean(_table(frame, "loss", PLAIN, max(ends)).to_numpy()[:, -1])
    reached = {factor: means.mean(own) if np.isfinite(own).all() else None for factor, own in ends.items()}
    return [
        *_identities(frame),
        _learns(frame),
        Claim(
            "The rescaled network also trains identically if all layers have the learning rate of the original",
            all(final is not None and abs(final.value - end.value) < ROUNDING for final in reached.values()),
            f"final loss of the original: {end}; of the rescaled network: "
            + ", ".join(f"{loss or 'not finite'} for R = {f:g}" for f, loss in reached.items()),
        ),
    ]


def answer(collected: Collected) -> str:
    """The answer is "no" if the identities hold."""
    frame = collected.frame
    most = max(_factors(frame))
    if not all(claim.holds for claim in _identities(frame)):
        return "These runs give no answer, because an identity fails that must hold for rescaled networks."
    return (
        "No. Without changing the function of the network, the outputs of its layers can be rescaled so that their "
        f"scale grows toward the output by a factor of R = {most:g} per layer. Then the norm of the gradient grows "
        f"toward the input by a factor of {_growth(frame, RESCALED, most)} per layer instead of "
        f"{_growth(frame, PLAIN, most)}; GSC and (with rescaled learning rates) the training stay the same."
    )


def _identities(frame: pd.DataFrame) -> list[Claim]:
    """Identities of training, of raw gradients, and of GSC."""
    largest = frame.assign(size=frame["value"].abs()).groupby(["quantity", "factor"], observed=True)["size"].max()
    drift, most = largest["loss_difference"], max(_factors(frame))
    exact = [factor for factor in _factors(frame) if math.log2(factor).is_integer()]
    ratio, moved = (float(largest[name].max()) for name in ("ratio_error", "gsc_difference"))
    return [
        Claim(
            "The rescaled network trains identically with rescaled learning rates",
            bool(drift.max() < ROUNDING and (drift[exact] == 0).all()),
            "largest difference of the loss over all steps and seeds: "
            + ", ".join(f"{_bound(difference)} for R = {factor:g}" for factor, difference in drift.items()),
            identity=True,
        ),
        Claim(
            "The factor by which the raw gradient grows per layer toward the input is R times as large in the rescaled "
            "network",
            ratio < ROUNDING,
            "largest relative difference between R^l and the ratio of the raw gradients of the two networks, l layers "
            f"before the logits: {_bound(ratio)}; growth factor per layer: {_growth(frame, RESCALED, most)} in the "
            f"rescaled network with R = {most:g}, {_growth(frame, PLAIN, most)} in the original",
            identity=True,
        ),
        Claim(
            "Rescaling does not change GSC",
            moved < ROUNDING,
            f"largest relative difference of GSC between the two networks: {_bound(moved)}",
            identity=True,
        ),
    ]


def _learns(frame: pd.DataFrame) -> Claim:
    """Whether the original network trains at all: its loss falls without jumps."""
    losses = _table(frame, "loss", PLAIN, max(_factors(frame))).to_numpy()
    rise = float((losses[:, 1:] / losses[:, :-1]).max() - 1)
    change = means.mean(losses[:, -1] - losses[:, 0])
    return Claim(
        "The original network learns: its loss falls without jumps",
        False if rise > RISE else change.below(0),
        f"loss from {means.mean(losses[:, 0])} to {means.mean(losses[:, -1])}; change: {change}; largest "
        f"rise of the loss in one step: {100 * max(rise, 0.0):.1f} %; jump: rise of more than {100 * RISE:g} %",
    )


def _table(frame: pd.DataFrame, quantity: str, variant: str, factor: float, column: str = "value") -> pd.DataFrame:
    """Values of one quantity, with one row per seed and one column per layer or step."""
    rows = frame[(frame["quantity"] == quantity) & (frame["variant"] == variant) & (frame["factor"] == factor)]
    return rows.pivot_table(index="seed", columns="index", values=column, observed=True)


def _factors(frame: pd.DataFrame) -> list[float]:
    return sorted(float(factor) for factor in frame["factor"].unique())


def _growth(frame: pd.DataFrame, variant: str, factor: float) -> Mean:
    """Growth of the raw gradient per layer toward the input."""
    table = _table(frame, "log10_raw_gradient", variant, factor).to_numpy()
    return means.geometric_mean(10 ** ((table[:, 0] - table[:, -1]) / (table.shape[1] - 1)))


def _bound(difference: float) -> str:
    """A rounding error as the next power of ten. Its digits would depend on the processor."""
    return "0" if difference == 0 else f"below 1e{math.floor(math.log10(difference)) + 1}"


def _line(ax: Axes, table: pd.DataFrame, color: object, label: str, width: float) -> None:
    center, deviation = table.mean(), table.std().fillna(0.0)
    ax.plot(table.columns, center, color=color, label=label, linewidth=width)
    ax.fill_between(table.columns, center - deviation, center + deviation, color=color, alpha=0.1, linewidth=0)


STUDY = Study(
    question="Can the norm of raw gradients tell whether a network explodes?",
    answer=answer,
    use="""
Detect exploding gradients with GSC, not with the norms of gradients. Compare gradient norms only between networks whose
layers have outputs of the same scale.
""",
    method="""
A ReLU network without normalization (depth {model.depth}, width {model.width}, a linear head for {model.out_features}
classes, {dtype}) is compared with a rescaled copy, for R = {measurement.factor}. In the copy, the output of the layer
that is l layers before the logits is multiplied by R^-l. Because ReLU is positively homogeneous (relu(c x) = c relu(x)
for c > 0), only weights must change: the first weight matrix is multiplied by R^-L (L is the number of hidden layers),
and every other one by R. The function of the network stays the same. If R is a power of two, even the rounding stays
the same.

If a weight matrix is multiplied by c and its learning rate by c^2, its relative change per step stays the same. The
copy is trained twice: with learning rates rescaled in this way, and with the learning rate of the original network
({measurement.learning_rate}) in all layers. Training has {measurement.steps} steps of gradient descent on
{data.batch_size} samples of Gaussian noise, labeled by a random linear map.

Before training, we measure GSC from every layer to the logits exactly. We also measure the **raw gradient** of every
layer: the norm of the gradient of the loss with respect to the output of the layer. The rescaling is from G. Philipp et
al. (arXiv:1712.05577).
""",
    how_sure="""
Weights, data and labels are random, with {num_seeds} draws for every R. Intervals are 95 % Student's t intervals over
these draws. The rescaling exists only if all layers are positively homogeneous. Layers with tanh are not.
""",
    claims=claims,
    figures=figures,
    captions={
        "rescaling": "Raw gradients (left), GSC (middle) and training loss (right) of one network and of its rescaled "
        "copies. R is the factor by which the scale of outputs changes per layer. Where curves coincide, the thinner "
        "curve is drawn on top. Lines are means over seeds, bands one standard deviation.",
    },
)
