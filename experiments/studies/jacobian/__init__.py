"""The Jacobian as a linear map: its effect on grids and areas, and its norm and volume in deep networks."""

from __future__ import annotations

import math

import pandas as pd

from experiments.archive.tables import Collected
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table
from experiments.studies.jacobian import figures, numbers
from experiments.studies.jacobian.measurement import FEW, NUM_DIRECTIONS, STEPS, measure
from experiments.studies.jacobian.numbers import DEEP, GAUSSIAN, ROTATIONS

__all__ = ["STUDY", "measure"]

# Copies of values in the configuration; a test compares them.
DEPTH, WIDTH, SCALE = 50, 100, 1.1
PLANE_DEPTH, PLANE_WIDTH, PLANE_VARIANCE = 3, 32, 2.0
# The square of a stable norm changes by at most STABLE_SQUARE per layer, so ln qm changes by at most STABLE.
STABLE_SQUARE = 1.02
STABLE = math.log(STABLE_SQUARE) / 2
# A slope within SLOPE_MARGIN of 1 counts as 1. Areas with a relative difference below SMALL count as equal.
SLOPE_MARGIN, SMALL = 0.02, 1e-3
# Rounding errors in float64 of logarithms that are sums over fifty layers.
ROUNDING = 1e-12


def claims(collected: Collected) -> list[Claim]:
    """The claims about the linear map and areas, and about norm, volume and effective rank of deep networks."""
    frame = collected.frame
    volumes = {model: numbers.rate(frame, model, "mean_log_singular_value") for model in DEEP}
    norms = {model: numbers.rate(frame, model, "log_qm_norm") for model in GAUSSIAN}
    linear, (kept, grown) = volumes["linear"], (volumes[model] for model in ROTATIONS)
    expected, says = numbers.gaussian_log_volume(numbers.width(frame)), "change of ln|det J| / n per layer"
    return [
        *_near_a_point(frame),
        _identity(frame),
        *(
            Claim(
                f"The quadratic mean norm qm(J) of the Jacobian of the {model} network neither explodes nor vanishes",
                norm.within(0.0, STABLE),
                f"change of ln qm(J) per layer: {norm}; stable: change within {STABLE:.4f} of 0",
            )
            for model, norm in norms.items()
        ),
        *(_collapses(f"The volume of the {model} network collapses", says, volumes[model]) for model in GAUSSIAN),
        Claim(
            "Per layer, the volume of the linear network shrinks by the expected factor of a Gaussian matrix",
            linear.within(expected, STABLE),
            f"{says}: {linear}; expected: {expected:.4f}; equal: difference within {STABLE:.4f} of 0",
        ),
        Claim(
            "Control: the volume of the orthogonal network neither collapses nor explodes",
            kept.within(0.0, STABLE),
            f"{says}: {kept}; stable: change within {STABLE:.4f} of 0",
        ),
        Claim(
            "Control: the volume of the expanding network explodes",
            grown.above(STABLE),
            f"{says}: {grown}; exploding: change above {STABLE:.4f}",
        ),
        *(_few(frame, model) for model in GAUSSIAN),
        *(_most_collapse(frame, model) for model in GAUSSIAN),
    ]


def answer(collected: Collected) -> str:
    """The linear map, the scaling of areas, and how many directions carry the norm."""
    frame = collected.frame
    near = all(claim.holds for claim in _near_a_point(frame))
    few = [model for model in GAUSSIAN if _few(frame, model).holds and _most_collapse(frame, model).holds]
    return (
        f"Near a point, the Jacobian J is {'' if near else 'not shown to be '}the best linear approximation of the "
        "network: the absolute error of this approximation grows like the step size to the power "
        f"{1 + numbers.slope(frame).value:.2f}. A network from the plane to the plane scales small "
        f"areas by |det J|, up to a relative error of {numbers.area_error(frame).value:.1g}. In "
        f"{len(few)} of {len(GAUSSIAN)} deep networks with Gaussian weights ({listed(few)}), a few singular values "
        "dominate the norm of J and most others shrink with depth, so the norm alone does not describe J."
    )


def details(collected: Collected) -> str:
    """A table of norm, volume and effective rank of the deep networks."""
    frame, rows = collected.frame, []
    for model in DEEP:
        norm, volume = (numbers.rate(frame, model, name) for name in ("log_qm_norm", "mean_log_singular_value"))
        factors = [f"{math.exp(one.value):.3f}" for one in (norm, volume)]
        rows.append([model, *factors, f"{numbers.last_rank(frame, model).value:.1f}"])
    head = ["network", "quadratic mean, factor per layer", "geometric mean, factor per layer", "effective rank"]
    return (
        f"{table(head, rows)}\n\nQuadratic and geometric means are over the singular values of the Jacobian. Their "
        "factors per layer are averaged geometrically over the second half of the layers. The effective rank is "
        "measured at the last layer; it is at most "
        f"{numbers.width(frame)}."
    )


def _near_a_point(frame: pd.DataFrame) -> list[Claim]:
    slope, error = numbers.slope(frame), numbers.area_error(frame)
    return [
        Claim(
            "The relative error of the linearization is proportional to the step size",
            slope.within(1.0, SLOPE_MARGIN),
            f"slope on logarithmic axes: {slope}; proportional: slope within {SLOPE_MARGIN:g} of 1",
        ),
        Claim(
            "The network scales the area of small squares by |det J|",
            error.below(SMALL),
            f"relative difference between |det J| and the factor of the area, for a square of side {STEPS[0]:g}: "
            f"{error}; equal: below {SMALL:g}",
        ),
    ]


def _identity(frame: pd.DataFrame) -> Claim:
    """The inequality between quadratic and geometric mean, a theorem that fails only if the measurement is wrong."""
    norms, volumes = (
        pd.concat([numbers.by_depth(frame, model, name) for model in DEEP], keys=DEEP)
        for name in ("log_qm_norm", "mean_log_singular_value")
    )
    smallest = float((norms - volumes).to_numpy().min())
    return Claim(
        "ln qm(J) is at least the mean log singular value, up to rounding (a theorem)",
        smallest >= -ROUNDING,
        f"smallest value of ln qm(J) minus the mean log singular value, over {norms.size} layers ({len(DEEP)} "
        "networks, all runs): " + (f"{smallest:.3g}" if abs(smallest) > ROUNDING else f"within {ROUNDING:g} of 0"),
        identity=True,
    )


def _few(frame: pd.DataFrame, model: str) -> Claim:
    rank, size = numbers.last_rank(frame, model), numbers.width(frame)
    says = f"Exploratory: few directions carry the norm of the Jacobian of the {model} network at the last layer"
    return Claim(
        says, rank.below(FEW * size), f"effective rank: {rank} of {size}; few: effective rank below {FEW * size:g}"
    )


def _most_collapse(frame: pd.DataFrame, model: str) -> Claim:
    return _collapses(
        f"Exploratory: all but the largest tenth of the Jacobian's singular values collapse in the {model} network",
        "change of the mean logarithm of these singular values per layer",
        numbers.rate(frame, model, "mean_log_of_most"),
    )


def _collapses(says: str, what: str, found: Mean) -> Claim:
    return Claim(says, found.below(-STABLE), f"{what}: {found}; collapse: change per layer below {-STABLE:.4f}")


STUDY = Study(
    question="What does the Jacobian tell about a network?",
    answer=answer,
    use="""
Use the Jacobian to predict the effect of small changes, and check whether the change is small enough. In deep networks,
look at both the norm and the effective rank of J (about how many directions carry the norm). The norm can be stable
although nearly all singular values have collapsed.
""",
    method=f"""
**A map of the plane.** A tanh network R^2 -> R^2 (depth {PLANE_DEPTH}, width {PLANE_WIDTH}, weight variance
{PLANE_VARIANCE:g} / fan-in, float64) is linearized at a random point x. We measure two numbers for steps h from
{STEPS[0]:g} to {STEPS[-1]:g}:

- the relative error |f(x + h u) - f(x) - h J u| / |h J u|, as root mean square over {NUM_DIRECTIONS} random unit
  vectors u. If J is the derivative, this error is proportional to h for small h;
- the area of the region to which the network maps a square of side h, divided by h^2. For small h, this ratio tends to
  |det J|.

**Depth.** Networks of width n = {WIDTH} and depth {DEPTH} are measured at one random point. Three networks have
Gaussian weights: *linear*, *tanh* and *selu*. Two networks are controls: *orthogonal* is linear with uniformly random
orthogonal weights, and *expanding* multiplies such weights by {SCALE:g}. We compute four numbers from the singular
values s_i of the Jacobian J from the input to every layer:

- the quadratic mean norm qm(J), the root of the mean of s_i^2;
- the mean log singular value ln|det J| / n, which is at most ln qm(J). The **volume** is |det J|. We compute ln|det J|
  as the sum of ln|det| over layers, because rounding hides the small singular values of the product J;
- the mean log singular value without the largest tenth of the singular values;
- the effective rank (sum s_i^2)^2 / sum s_i^4 (participation ratio). It is n if all s_i are equal, and 1 if only one
  s_i is not zero. If the effective rank is below {FEW:g} n, we say that few directions carry the norm.

Changes per layer of ln qm(J) and of mean log singular values are averaged over the half of the layers farther from the
input. qm(J) **explodes** if ln qm(J) grows by more than ln({STABLE_SQUARE:g}) / 2 = {STABLE:.4f} per layer, and
**vanishes** if ln qm(J) falls by more than that. A geometric mean of singular values **explodes** if its logarithm
grows by more than {STABLE:.4f} per layer, and **collapses** if its logarithm falls by more than that. The volume
explodes or collapses if the geometric mean |det J|^(1/n) does.

In the linear network, each layer is a Gaussian n x n matrix W with entries of variance 1 / n. We expect that a layer
changes ln|det J| / n by the mean of ln|det W| / n, which is sum_i (digamma(i/2) + ln(2/n)) / (2 n), about -1/2.
""",
    how_sure="""
Intervals are 95 % Student's t intervals over initializations and input points. For both controls, the changes per layer
are known beforehand, so the controls check the measurement. All numbers are exact up to rounding in float64. At the
smallest step h, the rounding error of the area is visible in the figure. Volume also collapses in the linear
network, so a collapse is mainly an effect of the Gaussian weights. In tanh networks, changes per layer become constant
only after many layers, so their mean depends on the depth. The effective rank and the controls were added after a first
look at norms and volumes. All layers are square. Normalization and ReLU are left out, because they make J singular.
""",
    claims=claims,
    figures=figures.draw,
    captions={
        "grid": "A grid of the plane, mapped by a tanh network (blue) and by the linearization of the network at the "
        "center of the grid (orange).",
        "steps": "Errors of the linearization against the step size h, one curve per initialization. Left: "
        "relative error of the linearization. Right: relative difference between the scaling of areas and |det J|.",
        "volume": "Singular values of the Jacobian from the input to each layer. Top: logarithms of three means "
        "(quadratic, geometric, and geometric without the largest tenth); some curves coincide. Bottom: effective "
        "rank. Bands are 95 % intervals over seeds.",
    },
    details=details,
)
