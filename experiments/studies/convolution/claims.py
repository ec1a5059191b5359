"""The claims of the study of convolution, decided from its frame."""

from __future__ import annotations

from collections.abc import Iterable

import numpy.typing as npt
import pandas as pd

from experiments.evidence.means import geometric_mean, mean
from experiments.evidence.study import Claim
from experiments.studies.convolution.measurement import AFTER, CONNECTED, CONVOLUTIONAL, STAGES
from experiments.studies.convolution.numbers import WHEN, by_seed, change, neighbor_spread, pooled, training_factors

# A fraction below SMALL counts as small. A fraction above EXPLAINED counts as everything.
SMALL = 0.1
EXPLAINED = 1 - SMALL
# Rounding errors of float64 in sums of a few hundred terms, and of float32 in sums of a few thousand terms.
ROUNDING, ROUNDING_FLOAT32 = 1e-12, 1e-5
# Total strides of the stages. The last stages come after two poolings.
STRIDES_OF = dict(zip(STAGES, (1, 2, 2, 4, 4, 4), strict=True))
STRIDED = tuple(stage for stage, stride in STRIDES_OF.items() if stride > 1)
LAST = STAGES[-1]
RATIO = "after / before training"


def claims(frame: pd.DataFrame) -> list[Claim]:
    """The claims about gradients, maps, pooling, training, outputs and images."""
    single = [claim(frame) for claim in (gradients, exact, stride, border)]
    return [*single, *pooling(frame), *trained(frame).values(), *outputs(frame), distance_first(frame), *images(frame)]


def gradients(frame: pd.DataFrame) -> Claim:
    """Whether gradients by hand equal the gradients of torch."""
    rows = frame[frame["quantity"] == "backpropagation_error"]
    cases = int(rows.groupby("seed")["num_samples"].sum().iloc[0])
    says = "Hand-written gradients of convolution and pooling equal the gradients of automatic differentiation"
    return _rounding(says, f"{cases} cases per seed; largest relative difference", rows["value"].max(), ROUNDING)


def exact(frame: pd.DataFrame) -> Claim:
    """Whether maps are equivariant away from the border, for shifts that the total stride divides."""
    errors = frame[frame["quantity"] == "equivariance_error"]
    divided = errors["shift"] % errors["layer"].map(STRIDES_OF).astype(float) == 0
    says = "Away from the border, a map moves with the image if the total stride of the map divides the shift"
    cases = f"{divided.sum()} combinations of map, shift and seed, before and after training; largest relative error"
    return _rounding(says, cases, errors.loc[divided, "value"].max(), ROUNDING_FLOAT32)


def _rounding(says: str, cases: str, worst: float, limit: float) -> Claim:
    """Claim that errors are rounding errors. Values below the limit are not printed, as they depend on the machine."""
    small = bool(worst < limit)
    return Claim(says, small, f"{cases}: {f'below {limit:.0e}, as required' if small else f'{worst:.1e}'}")


def stride(frame: pd.DataFrame) -> Claim:
    """Whether shifts that the stride does not divide break the symmetry."""
    cases = [(when, shift) for when in WHEN for shift in (1, 2)]
    errors = [by_seed(frame, "equivariance_error", layer=LAST, training=when, shift=shift) for when, shift in cases]
    says = f"Shifts by one or two pixels (the total stride is {STRIDES_OF[LAST]}) break the symmetry of maps of {LAST}"
    return _large(
        says, "smallest of four relative errors of these maps (two shifts, before and after training)", errors
    )


def border(frame: pd.DataFrame) -> Claim:
    """Whether zero padding breaks the symmetry."""
    errors = [by_seed(frame, "border_error", layer=LAST, training=when) for when in WHEN]
    smaller = (
        f"relative error of the maps of {LAST} over all positions (before or after training, whichever is smaller)"
    )
    return _large("Zero padding breaks the symmetry at the border", smaller, errors)


def _large(says: str, words: str, errors: Iterable[npt.ArrayLike]) -> Claim:
    least = min(map(mean, errors), key=lambda found: found.low)
    return Claim(says, least.above(SMALL), f"{words}: {least}; broken: error above {SMALL:g}")


def pooling(frame: pd.DataFrame) -> list[Claim]:
    """Whether maps change less under a shift of the image if the network has pooling, compared seed by seed."""
    of_max, of_mean, full = (pooled(frame, name) for name in ("max", "average", "none"))
    return [
        _lower(
            "Max pooling lowers the relative change of a map under a shift by one pixel",
            of_max / full,
            "relative change of the pooled map / of the full map",
        ),
        _lower(
            "Average pooling lowers the relative change of a map more than max pooling",
            of_mean / of_max,
            "relative change after average pooling / after max pooling",
        ),
    ]


def _lower(says: str, ratios: npt.ArrayLike, of: str, comparisons: int = 1) -> Claim:
    ratio = geometric_mean(ratios, comparisons)
    return Claim(says, ratio.below(1), f"ratio ({of}): {ratio}; claimed: ratio below 1")


def trained(frame: pd.DataFrame) -> dict[str, Claim]:
    """Whether training makes the maps of each stage more equivariant. Only the claim on the last stage was planned."""
    made = {}
    for stage in STRIDED:
        before, after = (by_seed(frame, "equivariance_error", layer=stage, training=when, shift=1) for when in WHEN)
        says = f"raining makes the maps of {stage} more equivariant, for a shift by one pixel"
        says = f"T{says}" if stage == LAST else f"Exploratory: t{says}"
        made[stage] = _lower(says, after / before, f"relative error {RATIO}", len(STRIDED))
    return made


def outputs(frame: pd.DataFrame) -> list[Claim]:
    """Whether outputs are invariant, at initialization and after training."""
    made, changes = [], {when: change(frame, CONVOLUTIONAL, when) for when in WHEN}
    for when, words in WHEN.items():
        found = mean(changes[when])
        says = f"{words.capitalize()}, the output of the AlexNet is nearly invariant to a shift by one pixel"
        because = f"change / distance: {found}; nearly invariant: change of the output below {SMALL:g} times the "
        because += "distance between the outputs for two images"
        made.append(Claim(says, found.below(SMALL), because))
    for when, words in WHEN.items():
        says = f"{words.capitalize()}, the AlexNet is nearer to invariance than the fully connected network"
        of = "relative change of the AlexNet / of the fully connected network"
        made.append(_lower(says, changes[when] / change(frame, CONNECTED, when), of))
    before, after = changes.values()
    moved, distances = training_factors(frame, CONVOLUTIONAL)
    apart = geometric_mean(distances)
    farther = "Exploratory: training increases the distance between the outputs for two images"
    same = mean(by_seed(frame, "class_agreement", network=CONVOLUTIONAL, training=AFTER, shift=1))
    survive = "After training, nine of ten images keep their predicted class under a shift by one pixel"
    return [
        *made,
        _lower("Training brings the AlexNet nearer to invariance", after / before, f"relative change {RATIO}"),
        _lower(
            "Exploratory: training lowers the change of the output under a shift by one pixel",
            moved,
            f"change {RATIO}",
        ),
        Claim(farther, apart.above(1), f"ratio (distance {RATIO}): {apart}; claimed: ratio above 1"),
        Claim(
            survive,
            same.above(EXPLAINED),
            f"fraction of images that keep their predicted class: {same}; required: above {EXPLAINED:g}",
        ),
    ]


def distance_first(frame: pd.DataFrame) -> Claim:
    """Whether training changes the distance between images by a larger factor than the response to a shift."""
    moved, apart = training_factors(frame, CONVOLUTIONAL)
    found = geometric_mean(moved * apart)
    says = "Exploratory: training increases the distance between outputs by a larger factor than it lowers the "
    says += "change under a shift"
    because = (
        f"product of the factors by which training multiplies distance and change: {found}; claimed: product above 1"
    )
    return Claim(says, found.above(1), because)


def images(frame: pd.DataFrame) -> list[Claim]:
    """Whether the images are stationary."""
    made, divided, spread = [], ", divided by", "standard deviation over positions of the"
    same = f"required: below {SMALL:g}"
    scales = {"mean": f"{divided} the standard deviation of a pixel", "variance": f"{divided} the mean variance"}
    for name, scale in scales.items():
        found = mean(by_seed(frame, f"{name}_spread"))
        says = f"The {name} of a pixel is the same at all positions"
        made.append(Claim(says, found.below(SMALL), f"{spread} {name}{scale}: {found}; {same}"))
    for name in ("covariance", "correlation"):
        found = mean(by_seed(frame, f"{name}_explained"))
        says = f"The {name} of two pixels depends only on the displacement between them"
        because = f"fraction of the variance of the {name}s (one for each pair of pixels) that the displacement "
        because += f"explains: {found}; required: above {EXPLAINED:g}"
        made.append(Claim(says, found.above(EXPLAINED), because))
    found = max((mean(neighbor_spread(frame, axis)) for axis in ("row", "column")), key=lambda found: found.high)
    because = f"{spread} correlation r of neighbors{divided} 1 - (mean of r): {found}; {same}"
    return [*made, Claim("Neighboring pixels have the same correlation at all positions", found.below(SMALL), because)]
