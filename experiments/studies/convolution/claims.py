"""What is claimed of symmetry under translation, decided from a frame of `measurement`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.evidence.means import Mean, geometric_mean, mean
from experiments.evidence.study import Claim
from experiments.studies.convolution.measurement import AFTER, BEFORE, CONNECTED, CONVOLUTIONAL, STAGES
from experiments.studies.convolution.numbers import WHEN, by_seed, change

FloatArray = npt.NDArray[np.float64]

# Of an image, a map, or a standard deviation: what counts as small.
SMALL = 0.1
EXPLAINED = 1 - SMALL
# Of float64 in sums of a few hundred terms, and of float32 in sums of a few thousand.
ROUNDING, ROUNDING_FLOAT32 = 1e-12, 1e-5
# Total strides of the stages: the last one comes after two poolings.
STRIDES_OF = dict(zip(STAGES, (1, 2, 2, 4, 4, 4), strict=True))
STRIDED = tuple(stage for stage, stride in STRIDES_OF.items() if stride > 1)
LAST = STAGES[-1]


def gradients(frame: pd.DataFrame) -> Claim:
    """By hand and by torch."""
    rows = frame[frame["quantity"] == "backpropagation_error"]
    cases = int(rows[rows["seed"] == rows["seed"].iloc[0]]["num_samples"].sum())
    return Claim(
        "The gradients of convolution and pooling by hand are those of automatic differentiation",
        bool(rows["value"].max() < ROUNDING),
        f"{cases} cases a seed, relative difference {_threshold(rows['value'].max(), ROUNDING)}",
    )


def exact(frame: pd.DataFrame) -> Claim:
    """Where nothing breaks the symmetry."""
    errors = frame[frame["quantity"] == "equivariance_error"]
    divided = errors["shift"] % errors["layer"].map(STRIDES_OF).astype(float) == 0
    worst = float(errors.loc[divided, "value"].max())
    return Claim(
        "Away from the border maps move with the image, for shifts that their strides divide",
        worst < ROUNDING_FLOAT32,
        f"{int(divided.sum())} cases of map, shift, seed, before and after training, error "
        f"{_threshold(worst, ROUNDING_FLOAT32)}",
    )


def stride(frame: pd.DataFrame) -> Claim:
    """Shifts between the strides."""
    errors = [
        mean(by_seed(frame, "equivariance_error", layer=LAST, training=training, shift=shift))
        for training in WHEN
        for shift in (1, 2)
    ]
    return _larger(
        f"Shifts by one or two pixels, which the stride of {STRIDES_OF[LAST]} does not divide, change maps of {LAST}",
        min(errors, key=lambda found: found.low),
        "smallest error",
    )


def border(frame: pd.DataFrame) -> Claim:
    """What zeros around the image do."""
    errors = [mean(by_seed(frame, "border_error", layer=LAST, training=training)) for training in WHEN]
    return _larger(
        "Zero padding breaks the symmetry at the border",
        min(errors, key=lambda found: found.low),
        f"smaller of the errors of {LAST} before and after training",
    )


def pooling(frame: pd.DataFrame) -> list[Claim]:
    """Seed by seed."""
    of_max, of_average, as_it_is = (_pooled(frame, name) for name in ("max", "average", "none"))
    return [
        _below("A map changes less under a shift by one pixel after max pooling", geometric_mean(of_max / as_it_is)),
        _below("A map changes less after average pooling than after max pooling", geometric_mean(of_average / of_max)),
    ]


def trained(frame: pd.DataFrame) -> dict[str, Claim]:
    """Whether training makes maps more equivariant, stage by stage; the last was claimed before looking."""
    claims = {}
    for stage in STRIDED:
        before, after = (
            by_seed(frame, "equivariance_error", layer=stage, training=training, shift=1) for training in WHEN
        )
        found = geometric_mean(after / before, comparisons=len(STRIDED))
        claims[stage] = _below(
            f"{'Training' if stage == LAST else 'Exploratory: training'} makes the maps of {stage} more equivariant, "
            "for a shift by one pixel",
            found,
            f", one of {len(STRIDED)} simultaneous intervals",
        )
    return claims


def outputs(frame: pd.DataFrame) -> list[Claim]:
    """Invariance at initialization and after training."""
    changes = {
        (network, when): change(frame, network, when, 1) for network in (CONVOLUTIONAL, CONNECTED) for when in WHEN
    }
    same = mean(by_seed(frame, "class_agreement", network=CONVOLUTIONAL, training=AFTER, shift=1))
    moved, apart = parts(frame, CONVOLUTIONAL)
    return [
        *(
            _small(
                f"{words.capitalize()} the output of the AlexNet is nearly invariant to a shift by one pixel",
                mean(changes[CONVOLUTIONAL, when]),
                "change, of the distance of two images,",
            )
            for when, words in WHEN.items()
        ),
        *(
            _below(
                f"{words.capitalize()} the AlexNet is nearer to invariance than the fully connected network",
                geometric_mean(changes[CONVOLUTIONAL, when] / changes[CONNECTED, when]),
            )
            for when, words in WHEN.items()
        ),
        _below(
            "Training brings the AlexNet nearer to invariance",
            geometric_mean(changes[CONVOLUTIONAL, AFTER] / changes[CONVOLUTIONAL, BEFORE]),
        ),
        _below("Exploratory: training lowers the change of the output itself", moved),
        Claim(
            "Exploratory: training takes the outputs for two images farther apart",
            True if apart.low > 1 else False if apart.high < 1 else None,
            f"ratio {apart:.2f}",
        ),
        distance_first(frame),
        Claim(
            "After training nine classes of ten survive a shift by one pixel",
            True if same.low > EXPLAINED else False if same.high < EXPLAINED else None,
            f"part of the images whose class stays {same:.2f}",
        ),
    ]


def parts(frame: pd.DataFrame, network: str) -> tuple[Mean, Mean]:
    """Factors by which training changes what a shift by one pixel does to outputs, and the distance of two images."""
    moved, apart = _factors(frame, network)
    return geometric_mean(moved), geometric_mean(apart)


def distance_first(frame: pd.DataFrame) -> Claim:
    """Which of the two factors of relative invariance training changes more."""
    moved, apart = _factors(frame, CONVOLUTIONAL)
    found = geometric_mean(moved * apart)
    return Claim(
        "Exploratory: more of what training adds to relative invariance is distance of two images than smaller change",
        True if found.low > 1 else False if found.high < 1 else None,
        f"factor of the distance over that by which the change falls {found:.2f}",
    )


def _factors(frame: pd.DataFrame, network: str) -> tuple[FloatArray, FloatArray]:
    of = {"network": network}
    moved = [by_seed(frame, "invariance_error", training=training, shift=1, **of) for training in WHEN]
    apart = [by_seed(frame, "contrast", training=training, **of) for training in WHEN]
    return moved[1] / moved[0], apart[1] / apart[0]


def images(frame: pd.DataFrame) -> list[Claim]:
    """Stationarity."""
    return [
        _small(
            "The mean of a pixel is the same everywhere",
            mean(by_seed(frame, "mean_spread")),
            "standard deviation over positions, in standard deviations of a pixel,",
        ),
        _small(
            "The variance of a pixel is the same everywhere",
            mean(by_seed(frame, "variance_spread")),
            "standard deviation over positions, of the mean variance,",
        ),
        *(explained(frame, name) for name in ("covariance", "correlation")),
        neighbors(frame),
    ]


def explained(frame: pd.DataFrame, name: str) -> Claim:
    """By displacements."""
    found = mean(by_seed(frame, f"{name}_explained"))
    return Claim(
        f"The {name} of two pixels depends on the displacement between them alone",
        True if found.low > EXPLAINED else False if found.high < EXPLAINED else None,
        f"part of the differences that is explained {found:.2f}; all but a tenth counts as all",
    )


def neighbors(frame: pd.DataFrame) -> Claim:
    """In the direction in which they differ more.

    Correlations near 1 cannot spread far, so what counts is how much they differ in what they lack to 1.
    """
    near = {"place": 1}
    spreads = [
        mean(
            by_seed(frame, "correlation_spread", axis=axis, **near)
            / (1 - by_seed(frame, "correlation", axis=axis, **near))
        )
        for axis in ("row", "column")
    ]
    return _small(
        "Neighboring pixels are correlated alike everywhere",
        max(spreads, key=lambda found: found.high),
        "standard deviation over positions of the correlation of two neighbors, of what it lacks to 1,",
    )


def _pooled(frame: pd.DataFrame, pooling: str) -> FloatArray:
    """Change of pooled maps, the geometric mean of both layers before and after training; one a seed."""
    rows = frame[(frame["quantity"] == "pooled_change") & (frame["pooling"] == pooling)]
    logarithms = np.log(rows.pivot_table(index="seed", columns=["layer", "training"], values="value", observed=True))
    return np.exp(logarithms.mean(axis=1)).to_numpy(dtype=np.float64)


def _threshold(value: float, limit: float) -> str:
    """Rounding errors differ from machine to machine, their order does not."""
    return f"below {limit:.0e}" if value < limit else f"{value:.1e}"


def _small(says: str, found: Mean, what: str) -> Claim:
    holds = True if found.high < SMALL else False if found.low > SMALL else None
    return Claim(says, holds, f"{what} {found:.3f}; small is below {SMALL:g}")


def _larger(says: str, found: Mean, what: str) -> Claim:
    holds = True if found.low > SMALL else False if found.high < SMALL else None
    return Claim(says, holds, f"{what} {found:.2f}; small is below {SMALL:g}")


def _below(says: str, ratio: Mean, what: str = "") -> Claim:
    holds = True if ratio.high < 1 else False if ratio.low > 1 else None
    return Claim(says, holds, f"ratio {ratio:.2f}{what}")
