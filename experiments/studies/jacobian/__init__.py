"""The Jacobian as the local linear map: grids, areas, and what its norm and its volume say at depth."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, mean
from experiments.evidence.study import Claim, Study
from experiments.studies.jacobian import figures as jacobian_figures
from experiments.studies.jacobian.measurement import FEW, NUM_DIRECTIONS, STEPS
from experiments.studies.jacobian.measurement import measure as measure
from experiments.studies.jacobian.numbers import DEEP, GAUSSIAN, ROTATIONS, by_depth, rate, rows_of

# Of the configuration; the tests hold them against it.
DEPTH, WIDTH, SCALE = 50, 100, 1.1
PLANE_DEPTH, PLANE_WIDTH, PLANE_VARIANCE = 3, 32, 2.0
# Half of the logarithm of this: a norm that grows faster explodes, as its square, the coefficient, does.
STABLE_SQUARE = 1.02
STABLE = math.log(STABLE_SQUARE) / 2
# Steps small enough for the first order to dominate, and large enough for rounding not to.
FITTED = (1e-4, 1e-2)
# What a slope of 1 may differ from it, and an area from the determinant, relative: both counted as none.
SLOPE_MARGIN, SMALL = 0.02, 1e-3
# Of logarithms that are sums over fifty layers, float64.
ROUNDING = 1e-12

QUESTION = "What does the Jacobian of a network say about it?"
METHOD = f"""
**A map of the plane.** A tanh network R^2 -> R^2 (depth {PLANE_DEPTH}, width {PLANE_WIDTH}, weight variance
{PLANE_VARIANCE:g} / fan-in), float64, at a random point x. A grid around x is mapped by the network and by its
linearization f(x) + J dx. Against the step h: the error |f(x + h u) - f(x) - h J u| / |h J u| (root mean square over
{NUM_DIRECTIONS} directions u), which falls like h where J is the derivative, and the area of the image of a square of
side h over h^2, which tends to |det J|.

**Depth.** Networks of width n = {WIDTH} and depth {DEPTH} at one random point. Three have Gaussian weights: *linear*,
*tanh* and *selu*. Two are controls of which all is known: *orthogonal*, linear with uniformly random orthogonal
weights, keeps every length and every volume; *expanding*, the same times {SCALE:g}, stretches all directions alike.
Of the singular values s_i of the Jacobian from the input to every layer:

- the quadratic mean norm qm(J), the root of the mean of s_i^2;
- the mean log singular value ln|det J| / n: the logarithm of the factor by which J scales volumes, a dimension. It adds
  up layer by layer and is computed so, because the small singular values of the product lie below the rounding error of
  the large ones. A quadratic mean is never below a geometric mean, so ln qm(J) is at least this;
- the same of all but the largest tenth;
- the effective rank (sum s_i^2)^2 / sum s_i^4 (participation ratio): n where all are equal, 1 where one has all of the
  norm. It counts as few directions where it is below {FEW:g} n.

Rates are changes a layer over the half of the layers farther from the input. Explode, vanish and collapse mean here
what they mean for coefficients: a square that changes by more than {100 * (STABLE_SQUARE - 1):.0f} % a layer. For
Gaussian matrices of variance 1 / n the mean of ln|det W| / n is known: the sum over i of
(digamma(i / 2) + ln(2 / n)) / (2 n), about -1/2.
"""
HOW_SURE = """
Intervals are over initializations and input points, 95 %, Student's t; a claim that two numbers agree is supported
where the whole interval lies within a stated margin, not where a wide interval happens to hold the number. That ln qm
is at least the mean log singular value, and what rotations do, are known beforehand: they check the measurement, and a
failure would be an error of the code. Everything is exact in float64 but for rounding, which limits the error of the
linearization at the smallest steps. Gaussian matrices lose volume by themselves, and most of the loss is theirs: that
the volume collapses says more of the weights than of the nonlinearity. A rate over half of the layers still holds what
little of the beginning has not died away: tanh networks settle slowly, and deeper ones would tell more. The effective
rank and the rotations were added after the norms and volumes had been seen. The networks are square and without
normalization: layer normalization and ReLU make Jacobians singular, whose volume is zero.
"""


def figures(collected: Collected) -> dict[str, Figure]:
    """The grid and its linearization; errors and areas against the step; singular values against depth."""
    return jacobian_figures.draw(collected.frame)


def claims(collected: Collected) -> list[Claim]:
    """The linear map, areas, and what happens at depth."""
    frame = collected.frame
    return [
        _proportional(frame),
        _areas(frame),
        _identity(frame),
        *(_norm(frame, model) for model in GAUSSIAN),
        *(_collapses(frame, model) for model in GAUSSIAN),
        _gaussian(frame),
        *_controls(frame),
        *(_few(frame, model) for model in GAUSSIAN),
        *(_most_collapse(frame, model) for model in GAUSSIAN),
    ]


def answer(collected: Collected) -> str:
    """The linear map, norm against volume, and how many directions there are."""
    frame = collected.frame
    norms, volumes = (
        ", ".join(f"{model} {math.exp(rate(frame, model, quantity).value):.3f}" for model in DEEP)
        for quantity in ("log_qm_norm", "mean_log_singular_value")
    )
    ranks = ", ".join(f"{model} {_rank(frame, model).value:.1f}" for model in DEEP)
    near = _proportional(frame).holds and _areas(frame).holds
    few = [model for model in GAUSSIAN if _few(frame, model).holds and _most_collapse(frame, model).holds]
    return (
        f"{'It is the map that the network is nearby' if near else 'It is not shown to be the map nearby'}: the error "
        f"of the linearization falls with the step to the power {1 + _slope(frame).value:.2f}, and the area of the "
        f"smallest square is |det J| within {_area_error(frame).value:.1g} of it. At depth one number does not tell "
        f"what it does: over the second half of the layers the quadratic mean norm changes by a factor a layer of "
        f"{norms}, the geometric mean of the singular values by {volumes}. The effective number of directions at the "
        f"last layer, of {_width(frame)}, is {ranks}. Networks in which few directions carry the norm and most of the "
        f"others collapse: {', '.join(few) or 'none'}."
    )


def _slope(frame: pd.DataFrame) -> Mean:
    """Of ln error against ln step, one a seed."""
    rows = rows_of(frame, "linearization_error")
    rows = rows[rows["step"].between(FITTED[0] * 0.99, FITTED[1] * 1.01)]
    fits = [np.polyfit(np.log(r["step"]), np.log(r["value"]), 1)[0] for _, r in rows.groupby("seed", observed=True)]
    return mean(fits)


def _proportional(frame: pd.DataFrame) -> Claim:
    slope = _slope(frame)
    return Claim(
        "The error of the linearization, as a part of the step's image, falls in proportion to the step",
        _equal(slope, 1.0, SLOPE_MARGIN),
        f"slope on logarithmic axes {slope:.4f}; equal is within {SLOPE_MARGIN:g} of 1",
    )


def _area_error(frame: pd.DataFrame) -> Mean:
    areas = rows_of(frame, "area")
    smallest = areas[areas["step"] == areas["step"].min()].set_index("seed")["value"]
    return mean((smallest / rows_of(frame, "determinant").set_index("seed")["value"] - 1).abs())


def _areas(frame: pd.DataFrame) -> Claim:
    error = _area_error(frame)
    return Claim(
        "Small squares are scaled by |det J|",
        True if error.high < SMALL else False if error.low > SMALL else None,
        f"relative difference at the smallest step, {STEPS[0]:g}: {error:.2g}; small is below {SMALL:g}",
    )


def _identity(frame: pd.DataFrame) -> Claim:
    """The inequality of the means, which no data can contradict, only a wrong measurement."""
    gaps = [
        (by_depth(frame, model, "log_qm_norm") - by_depth(frame, model, "mean_log_singular_value")).to_numpy().ravel()
        for model in DEEP
    ]
    smallest = float(np.concatenate(gaps).min())
    return Claim(
        "ln qm(J) is at least the mean log singular value up to rounding (an identity)",
        smallest >= -ROUNDING,
        f"{sum(map(len, gaps))} layers of {len(DEEP)} networks, smallest difference "
        + (f"{smallest:.3g}" if abs(smallest) > ROUNDING else f"within {ROUNDING:g} of 0"),
    )


def _norm(frame: pd.DataFrame, model: str) -> Claim:
    found = rate(frame, model, "log_qm_norm")
    return Claim(
        f"In quadratic mean the Jacobian of the {model} network neither explodes nor vanishes",
        _equal(found, 0.0, STABLE),
        f"ln qm a layer {found:.4f}; stable is within {STABLE:.4f} of 0",
    )


def _collapses(frame: pd.DataFrame, model: str) -> Claim:
    return _falls(f"The volume of the {model} network collapses", rate(frame, model, "mean_log_singular_value"))


def _gaussian(frame: pd.DataFrame) -> Claim:
    found, expected = rate(frame, "linear", "mean_log_singular_value"), gaussian_log_volume(_width(frame))
    return Claim(
        "The linear network loses the volume that its Gaussian matrices lose",
        _equal(found, expected, STABLE),
        f"mean log singular value a layer {found:.4f}, expected {expected:.4f}; equal is within {STABLE:.4f}",
    )


def _controls(frame: pd.DataFrame) -> list[Claim]:
    """Volumes that are known to stay and to explode."""
    kept, grown = (rate(frame, model, "mean_log_singular_value") for model in ROTATIONS)
    return [
        Claim(
            "Control: the volume of the orthogonal network neither collapses nor explodes",
            _equal(kept, 0.0, STABLE),
            f"mean log singular value a layer {kept:z.4f}; stable is within {STABLE:.4f} of 0",
        ),
        Claim(
            "Control: the volume of the expanding network explodes",
            True if grown.low > STABLE else False if grown.high < STABLE else None,
            f"mean log singular value a layer {grown:.4f}; exploding is above {STABLE:.4f}",
        ),
    ]


def _rank(frame: pd.DataFrame, model: str) -> Mean:
    """Effective rank at the last layer."""
    return mean(by_depth(frame, model, "effective_rank").iloc[:, -1])


def _few(frame: pd.DataFrame, model: str) -> Claim:
    found, few = _rank(frame, model), FEW * _width(frame)
    return Claim(
        f"Exploratory: few directions carry the norm of the {model} network at the last layer",
        True if found.high < few else False if found.low > few else None,
        f"effective rank {found:.1f} of {_width(frame)}; few is below {few:g}",
    )


def _most_collapse(frame: pd.DataFrame, model: str) -> Claim:
    return _falls(
        f"Exploratory: all but the largest tenth of the singular values of the {model} network collapse",
        rate(frame, model, "mean_log_of_most"),
    )


def _falls(says: str, found: Mean) -> Claim:
    return Claim(
        says,
        True if found.high < -STABLE else False if found.low > -STABLE else None,
        f"mean log singular value a layer {found:.3f}; collapse is below {-STABLE:.4f}",
    )


def _equal(found: Mean, expected: float, margin: float) -> bool | None:
    """Whether the interval lies entirely within the margin around ``expected``, or entirely outside of it."""
    low, high = found.low - expected, found.high - expected
    return True if -margin < low and high < margin else False if low > margin or high < -margin else None


def _width(frame: pd.DataFrame) -> int:
    return int(frame.loc[frame["model"] == "linear", "width"].iloc[0])


def gaussian_log_volume(n: int) -> float:
    """E ln|det W| / n of an n x n Gaussian matrix of variance 1 / n, a sum over chi-square variables."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return float((torch.digamma(i / 2) + math.log(2 / n)).mean() / 2)


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
)
