"""The claims of the study of convolution, decided from its frame."""

from __future__ import annotations

import pandas as pd

from experiments.evidence.means import geometric_mean, mean
from experiments.evidence.study import Claim
from experiments.studies.convolution.measurement import AFTER, BEFORE, CONNECTED, CONVOLUTIONAL, STAGES
from experiments.studies.convolution.numbers import WHEN, by_seed, change, neighbor_spread, pooled, training_factors

# Fractions of an image, a map or a standard deviation below SMALL count as small, above EXPLAINED as all.
SMALL = 0.1
EXPLAINED = 1 - SMALL
# Rounding of float64 in sums of a few hundred terms, and of float32 in sums of a few thousand.
ROUNDING, ROUNDING_FLOAT32 = 1e-12, 1e-5
# Total strides of the stages. The last stages come after two poolings.
STRIDES_OF = dict(zip(STAGES, (1, 2, 2, 4, 4, 4), strict=True))
STRIDED = tuple(stage for stage, stride in STRIDES_OF.items() if stride > 1)
LAST = STAGES[-1]
IS_SMALL = f"small is below {SMALL:g}"


def claims(frame: pd.DataFrame) -> list[Claim]:
    """Gradients, maps, pooling, training, outputs, and images."""
    single = [claim(frame) for claim in (gradients, exact, stride, border)]
    return [*single, *pooling(frame), *trained(frame).values(), *outputs(frame), distance_first(frame), *images(frame)]


def gradients(frame: pd.DataFrame) -> Claim:
    """Gradients by hand against those of torch."""
    rows = frame[frame["quantity"] == "backpropagation_error"]
    cases = int(rows[rows["seed"] == rows["seed"].iloc[0]]["num_samples"].sum())
    worst = float(rows["value"].max())
    return Claim(
        "The gradients of convolution and pooling by hand are those of automatic differentiation",
        worst < ROUNDING,
        f"{cases} cases per seed, relative difference {_threshold(worst, ROUNDING)}",
    )


def exact(frame: pd.DataFrame) -> Claim:
    """Equivariance where nothing breaks the symmetry."""
    errors = frame[frame["quantity"] == "equivariance_error"]
    divided = errors["shift"] % errors["layer"].map(STRIDES_OF).astype(float) == 0
    worst = float(errors.loc[divided, "value"].max())
    return Claim(
        "Away from the border maps move with the image, for shifts that their strides divide",
        worst < ROUNDING_FLOAT32,
        f"{int(divided.sum())} cases of map, shift and seed, before and after training, error "
        f"{_threshold(worst, ROUNDING_FLOAT32)}",
    )


def _threshold(value: float, limit: float) -> str:
    """Rounding errors differ between machines; whether they are below the limit does not."""
    return f"below {limit:.0e}" if value < limit else f"{value:.1e}"


def stride(frame: pd.DataFrame) -> Claim:
    """Shifts between multiples of the stride."""
    at = [{"training": training, "shift": shift} for training in WHEN for shift in (1, 2)]
    errors = [mean(by_seed(frame, "equivariance_error", layer=LAST, **columns)) for columns in at]
    least = min(errors, key=lambda found: found.low)
    return Claim(
        f"Shifts by one or two pixels, which the stride of {STRIDES_OF[LAST]} does not divide, change maps of {LAST}",
        least.above(SMALL),
        f"smallest error {least:.2f}; {IS_SMALL}",
    )


def border(frame: pd.DataFrame) -> Claim:
    """The effect of zeros around the image."""
    errors = [mean(by_seed(frame, "border_error", layer=LAST, training=training)) for training in WHEN]
    least = min(errors, key=lambda found: found.low)
    return Claim(
        "Zero padding breaks the symmetry at the border",
        least.above(SMALL),
        f"smaller of the errors of {LAST} before and after training {least:.2f}; {IS_SMALL}",
    )


def pooling(frame: pd.DataFrame) -> list[Claim]:
    """Pooled maps against maps without pooling, seed by seed."""
    of_max, of_average, as_it_is = (pooled(frame, name) for name in ("max", "average", "none"))
    ratios = {
        "under a shift by one pixel after max pooling": geometric_mean(of_max / as_it_is),
        "after average pooling than after max pooling": geometric_mean(of_average / of_max),
    }
    return [Claim(f"A map changes less {says}", ratio.below(1), f"ratio {ratio:.2f}") for says, ratio in ratios.items()]


def trained(frame: pd.DataFrame) -> dict[str, Claim]:
    """Whether training makes the maps of each stage more equivariant. Only the last stage was claimed in advance."""
    made = {}
    for stage in STRIDED:
        errors = [by_seed(frame, "equivariance_error", layer=stage, training=when, shift=1) for when in WHEN]
        ratio = geometric_mean(errors[1] / errors[0], comparisons=len(STRIDED))
        says = f"raining makes the maps of {stage} more equivariant, for a shift by one pixel"
        made[stage] = Claim(
            f"T{says}" if stage == LAST else f"Exploratory: t{says}",
            ratio.below(1),
            f"ratio {ratio:.2f}, one of {len(STRIDED)} simultaneous intervals",
        )
    return made


def outputs(frame: pd.DataFrame) -> list[Claim]:
    """Invariance of the outputs at initialization and after training."""
    made = []
    for when, words in WHEN.items():
        found = mean(change(frame, CONVOLUTIONAL, when))
        says = f"{words.capitalize()} the output of the AlexNet is nearly invariant to a shift by one pixel"
        because = f"change relative to the distance of two images {found:.3f}; {IS_SMALL}"
        made.append(Claim(says, found.below(SMALL), because))
    for when, words in WHEN.items():
        ratio = geometric_mean(change(frame, CONVOLUTIONAL, when) / change(frame, CONNECTED, when))
        says = f"{words.capitalize()} the AlexNet is nearer to invariance than the fully connected network"
        made.append(Claim(says, ratio.below(1), f"ratio {ratio:.2f}"))
    nearer = geometric_mean(change(frame, CONVOLUTIONAL, AFTER) / change(frame, CONVOLUTIONAL, BEFORE))
    moved, apart = map(geometric_mean, training_factors(frame, CONVOLUTIONAL))
    same = mean(by_seed(frame, "class_agreement", network=CONVOLUTIONAL, training=AFTER, shift=1))
    return [
        *made,
        Claim("Training brings the AlexNet nearer to invariance", nearer.below(1), f"ratio {nearer:.2f}"),
        Claim("Exploratory: training lowers the change of the output itself", moved.below(1), f"ratio {moved:.2f}"),
        Claim(
            "Exploratory: training increases the distance of the outputs for two images",
            apart.above(1),
            f"ratio {apart:.2f}",
        ),
        Claim(
            "After training nine classes of ten survive a shift by one pixel",
            same.above(EXPLAINED),
            f"fraction of the images whose class stays {same:.2f}",
        ),
    ]


def distance_first(frame: pd.DataFrame) -> Claim:
    """Which of the two factors of relative invariance training changes more."""
    moved, apart = training_factors(frame, CONVOLUTIONAL)
    found = geometric_mean(moved * apart)
    return Claim(
        "Exploratory: training gains relative invariance more by a larger distance of images than by a smaller change",
        found.above(1),
        f"factor of the distance over that by which the change falls {found:.2f}",
    )


def images(frame: pd.DataFrame) -> list[Claim]:
    """Stationarity of the images."""
    made = []
    scales = {"mean": "in standard deviations of a pixel", "variance": "relative to the mean variance"}
    for name, scale in scales.items():
        found = mean(by_seed(frame, f"{name}_spread"))
        because = f"standard deviation over positions, {scale}, {found:.3f}; {IS_SMALL}"
        made.append(Claim(f"The {name} of a pixel is the same everywhere", found.below(SMALL), because))
    for name in ("covariance", "correlation"):
        found = mean(by_seed(frame, f"{name}_explained"))
        says = f"The {name} of two pixels depends on the displacement between them alone"
        because = f"explained fraction of the differences {found:.2f}; more than {EXPLAINED:g} counts as all"
        made.append(Claim(says, found.above(EXPLAINED), because))
    spread = max((mean(neighbor_spread(frame, axis)) for axis in ("row", "column")), key=lambda found: found.high)
    because = f"standard deviation over positions of the correlation r of neighbors, relative to 1 - r, {spread:.3f}"
    says = "Neighboring pixels have the same correlation everywhere"
    return [*made, Claim(says, spread.below(SMALL), f"{because}; {IS_SMALL}")]
