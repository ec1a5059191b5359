"""The Jacobian as the local linear map: grids, areas, and what its norm and its volume say at depth."""

from __future__ import annotations

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import gradscope as gs
from experiments.collect import Collected
from experiments.study import Claim, observed
from experiments.summaries import Mean, mean

QUESTION = "What does the Jacobian of a network say about it?"
METHOD = """
**A map of the plane.** A tanh network R^2 -> R^2 (depth 3, width 32, weight variance 2 / fan-in), float64, at a random
point x. A grid around x is mapped by the network and by its linearization f(x) + J dx. Against the step h: the error
|f(x + h u) - f(x) - h J u| / |h J u| (root mean square over 16 directions u), which falls like h where J is the
derivative, and the area of the image of a square of side h over h^2, which tends to |det J|.

**Depth.** Plain networks of width 100 and depth 50 at one random point: the quadratic mean norm qm(J) of the Jacobian
from the input to every layer, and its mean log singular value ln|det J| / n. The latter adds up layer by layer and is
computed so, because the small singular values of the product lie below the rounding error of the large ones. For
every matrix ln qm(J) >= mean log singular value, equal only where all singular values are. For Gaussian matrices of
variance 1/n the mean of ln|det W| / n is known: the sum over i of (digamma(i / 2) + ln(2 / n)) / (2 n), about -1/2.
Explode, vanish and collapse mean here what they mean for coefficients: a square that changes by more than 2 % a layer.
"""
HOW_SURE = """
Intervals are over eight initializations and input points, 95 %, Student's t. Everything is exact in float64 but for
rounding, which limits the error of the linearization at the smallest steps. The networks are square and without
normalization: layer normalization and ReLU make Jacobians singular, whose volume is zero.
"""

STEPS = np.logspace(-4, 0, 13)
NUM_DIRECTIONS = 16
# Steps small enough for the first order to dominate, and large enough for rounding not to.
FITTED = (1e-4, 1e-2)
DEEP = ("linear", "tanh", "selu")
# Relative difference of area and determinant that counts as none: the order of the smallest step itself.
SMALL = 1e-3
# Half of ln 1.02: a norm that grows faster explodes, as its square, the coefficient, does.
STABLE = math.log(1.02) / 2


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator, num_lines: int, extent: float) -> pd.DataFrame:
    """Of a map of the plane its grid, areas and linearization; of a deep network norm and volume by depth.

    Arguments:
        model, x: A network and one input, (1, n); n = 2 is taken for a map of the plane.
        generator: Directions of the steps.
        num_lines, extent: Lines of the grid in each direction, and half of its side.
    """
    if len(x) != 1:
        raise ValueError(f"A Jacobian is that at one point: data.batch_size=1, got {len(x)} samples.")
    return _plane(model, x, generator, num_lines, extent) if x.shape[1] == 2 else _depth(model, x)


def _plane(model: nn.Module, x: Tensor, generator: torch.Generator, num_lines: int, extent: float) -> pd.DataFrame:
    captured = gs.capture(model, x)
    affine = captured.jacobian("input", captured.target.name).linearize()
    j, value = affine.jacobian.dense(), affine.value
    side = torch.linspace(-extent, extent, num_lines, dtype=x.dtype)
    u, v = (part.flatten() for part in torch.meshgrid(side, side, indexing="ij"))
    with torch.no_grad():
        image = model(x + torch.stack([u, v], dim=1))
        parts = [observed("image", image[:, axis].numpy(), axis=axis, u=u.numpy(), v=v.numpy()) for axis in (0, 1)]
        parts += [observed("linear", (value[0, a], *j[a]), axis=a, index=[0, 1, 2]) for a in (0, 1)]
        directions = torch.randn(NUM_DIRECTIONS, 2, dtype=x.dtype, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        for step in STEPS:
            linear = step * directions @ j.T
            error = (model(x + step * directions) - value - linear).norm(dim=1) / linear.norm(dim=1)
            corners = model(x + step / 2 * torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=x.dtype))
            parts.append(observed("linearization_error", float(error.square().mean().sqrt()), step=step))
            parts.append(observed("area", float(_area(corners) / step**2), step=step))
    parts.append(observed("determinant", abs(float(torch.linalg.det(j)))))
    return pd.concat(parts, ignore_index=True)


def _area(corners: Tensor) -> Tensor:
    """Of a polygon, (k, 2) -> (): half of the sum of cross products of neighboring corners."""
    after = corners.roll(-1, dims=0)
    return (corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]).sum().abs() / 2


def _depth(model: nn.Module, x: Tensor) -> pd.DataFrame:
    captured = gs.capture(model, x)
    names = [layer.name for layer in captured.units]
    total, norms, volumes = torch.eye(x.shape[1], dtype=x.dtype), [], []
    for before, name in itertools.pairwise(names):
        step = captured.jacobian(before, name).dense()
        total = step @ total
        norms.append(float(gs.qm_norm(total).log()))
        volumes.append(float(torch.linalg.slogdet(step).logabsdet) / len(step))
    index = np.arange(1, len(names))
    return pd.concat(
        [
            observed("log_qm_norm", norms, layer=names[1:], index=index),
            observed("mean_log_singular_value", np.cumsum(volumes), layer=names[1:], index=index),
        ],
        ignore_index=True,
    )


def figures(collected: Collected) -> dict[str, Figure]:
    """The grid and its linearization; errors and areas against the step; norm and volume against depth."""
    frame = collected.frame
    return {"grid": _grid(frame), "steps": _steps(frame), "volume": _volume(frame)}


def claims(collected: Collected) -> list[Claim]:
    """The linear map, areas, and what happens at depth."""
    frame = collected.frame
    slope, areas, ends = _slopes(frame), _area_errors(frame), _ends(frame)
    between = frame[frame["model"].isin(DEEP)].pivot_table(
        index=["model", "seed", "index"], columns="quantity", values="value", observed=True
    )
    gap = between["log_qm_norm"] - between["mean_log_singular_value"]
    expected = _gaussian_log_volume(100)
    found = ends["linear", "mean_log_singular_value"]
    return [
        Claim(
            "The error of the linearization, as a part of the step's image, falls in proportion to the step",
            slope.low < 1 < slope.high or abs(slope.value - 1) < 0.02,
            f"slope on logarithmic axes {slope:.4f}",
        ),
        Claim(
            "Small squares are scaled by |det J|",
            areas.high < SMALL,
            f"relative difference at the smallest step, {STEPS[0]:g}: {areas:.2g}",
        ),
        Claim(
            "ln qm(J) is never below the mean log singular value",
            bool((gap >= -1e-12).all()),
            f"{len(gap)} layers of {len(DEEP)} networks, smallest difference {gap.min():.3g}",
        ),
        *(_keeps_norm(model, ends[model, "log_qm_norm"]) for model in DEEP),
        *(_loses_volume(model, ends[model, "mean_log_singular_value"]) for model in DEEP),
        Claim(
            "A linear network loses the volume of its Gaussian matrices",
            found.low < expected < found.high,
            f"mean log singular value a layer {found:.4f}, expected {expected:.4f}",
        ),
    ]


def _keeps_norm(model: str, rate: Mean) -> Claim:
    outside = rate.high < -STABLE or rate.low > STABLE
    return Claim(
        f"In quadratic mean the Jacobian of the {model} network neither explodes nor vanishes",
        False if outside else True if rate.low > -STABLE and rate.high < STABLE else None,
        f"ln qm a layer {rate:.3f}; stable is within {STABLE:.3f} of 0",
    )


def _loses_volume(model: str, rate: Mean) -> Claim:
    return Claim(
        f"The volume of the {model} network collapses",
        True if rate.high < -STABLE else False if rate.low > -STABLE else None,
        f"mean log singular value a layer {rate:.3f}",
    )


def answer(collected: Collected) -> str:
    """The linear map, and norm against volume."""
    ends, slope = _ends(collected.frame), _slopes(collected.frame)
    falls = ", ".join(f"{model} {math.exp(ends[model, 'mean_log_singular_value'].value):.2f}" for model in DEEP)
    keeps = ", ".join(f"{model} {math.exp(ends[model, 'log_qm_norm'].value):.3f}" for model in DEEP)
    return (
        f"It is the map that the network is nearby: the error of the linearization falls with the step to the power "
        f"{1 + slope.value:.2f}, and areas are scaled by |det J|. At depth one number does not tell what it does: the "
        f"quadratic mean norm changes by a factor a layer of {keeps}, while the geometric mean of the singular values "
        f"falls by {falls}. A few directions carry the norm, the others collapse."
    )


def _rows(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return frame[frame["quantity"] == quantity]


def _slopes(frame: pd.DataFrame) -> Mean:
    rows = _rows(frame, "linearization_error")
    rows = rows[rows["step"].between(FITTED[0] * 0.99, FITTED[1] * 1.01)]
    fits = [np.polyfit(np.log(r["step"]), np.log(r["value"]), 1)[0] for _, r in rows.groupby("seed", observed=True)]
    return mean(fits)


def _area_errors(frame: pd.DataFrame) -> Mean:
    areas = _rows(frame, "area")
    smallest = areas[areas["step"] == areas["step"].min()].set_index("seed")["value"]
    return mean((smallest / _rows(frame, "determinant").set_index("seed")["value"] - 1).abs())


def _ends(frame: pd.DataFrame) -> dict[tuple[str, str], Mean]:
    """Change a layer between the first layer and the last, by model and quantity."""
    found = {}
    for model in DEEP:
        for quantity in ("log_qm_norm", "mean_log_singular_value"):
            rows = _rows(frame[frame["model"] == model], quantity)
            table = rows.pivot_table(index="seed", columns="index", values="value", observed=True)
            values = table.to_numpy()
            found[model, quantity] = mean((values[:, -1] - values[:, 0]) / (values.shape[1] - 1))
    return found


def _gaussian_log_volume(n: int) -> float:
    """E ln|det W| / n of an n x n Gaussian matrix of variance 1 / n, a sum over chi-square variables."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return float((torch.digamma(i / 2) + math.log(2 / n)).mean() / 2)


def _grid(frame: pd.DataFrame) -> Figure:
    """Three initializations: the image of a grid, and its linearization at the center."""
    rows = frame[frame["model"] == "plane"]
    seeds = sorted(rows["seed"].unique())[:3]
    figure, axes = plt.subplots(1, len(seeds), figsize=(4.4 * len(seeds), 4.6), layout="constrained", squeeze=False)
    for ax, seed in zip(axes[0], seeds, strict=True):
        _draw_grid(ax, rows[rows["seed"] == seed])
        ax.set_title(f"initialization {seed}", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("A grid of the plane, mapped by a tanh network and by its Jacobian at the center", fontsize=11)
    return figure


def _draw_grid(ax: Axes, rows: pd.DataFrame) -> None:
    image = _rows(rows, "image").pivot_table(index=["u", "v"], columns="axis", values="value", observed=True)
    linear = _rows(rows, "linear").pivot_table(index="axis", columns="index", values="value", observed=True).to_numpy()
    points = np.array(image.index.to_list())
    flat = linear[:, :1].T + points @ linear[:, 1:].T
    num = round(math.sqrt(len(points)))
    blue, orange = sns.color_palette("colorblind")[:2]
    for values, color, width, label in (
        (flat, orange, 0.7, "linearization f(x) + J dx"),
        (image.to_numpy(), blue, 1.0, "network"),
    ):
        table = values.reshape(num, num, 2)
        for lines in (table, table.transpose(1, 0, 2)):
            for line in lines:
                ax.plot(line[:, 0], line[:, 1], color=color, linewidth=width, label=label)
                label = "_nolegend_"
    ax.plot(*linear[:, 0], "o", color="black", markersize=5, label="f(x)", zorder=5)
    ax.set(xlabel="first output", ylabel="second output")
    ax.set_aspect("equal", adjustable="datalim")
    sns.despine(ax=ax)


def _steps(frame: pd.DataFrame) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    errors = _rows(frame, "linearization_error")
    determinants = _rows(frame, "determinant").set_index("seed")["value"]
    areas = _rows(frame, "area")
    distances = (areas["value"] / areas["seed"].map(determinants) - 1).abs()
    color = sns.color_palette("colorblind")[0]
    for ax, rows, values in ((left, errors, errors["value"]), (right, areas, distances)):
        for _, part in rows.assign(shown=values).groupby("seed", observed=True):
            ax.plot(part["step"], part["shown"], "o-", color=color, alpha=0.5, markersize=3, linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="step h")
        sns.despine(ax=ax)
    left.plot(STEPS, STEPS, color="0.4", linestyle="--", linewidth=1, label="proportional to h")
    right.plot(STEPS, STEPS**2, color="0.4", linestyle="--", linewidth=1, label="proportional to $h^2$")
    left.set_ylabel("relative error of the linearization")
    right.set_ylabel(r"relative difference of area and $|\det J|$")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"Linearization of a map of the plane; {frame['seed'].nunique()} initializations, a line each", fontsize=10
    )
    return figure


def _volume(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, len(DEEP), figsize=(4.0 * len(DEEP), 3.8), layout="constrained", sharey=True)
    colors = sns.color_palette("colorblind")
    words = {"log_qm_norm": "quadratic mean norm", "mean_log_singular_value": "geometric mean of singular values"}
    for ax, model in zip(axes, DEEP, strict=True):
        for color, (quantity, label) in zip(colors, words.items(), strict=False):
            rows = _rows(frame[frame["model"] == model], quantity)
            rows = rows.assign(log10=rows["value"] / math.log(10))
            sns.lineplot(rows, x="index", y="log10", errorbar="sd", color=color, label=label, ax=ax, legend=False)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(title=model, xlabel="layer, from the input", ylabel=r"$\log_{10}$")
        sns.despine(ax=ax)
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    seeds = frame["seed"].nunique()
    figure.suptitle(
        f"Jacobian from the input to each layer, width 100; mean over {seeds} seeds, band: one standard deviation",
        fontsize=10,
    )
    return figure
