"""Convolution: its gradients by hand, the symmetry under translation that it builds in, and whether images have it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import by_hand, symmetry_figures, translation
from experiments.collect import Collected
from experiments.study import Claim
from experiments.summaries import Mean, geometric_mean, mean
from experiments.symmetry_figures import by_seed, change
from experiments.translation import AFTER, BEFORE, CONNECTED, CONVOLUTIONAL, STAGES

QUESTION = "Do convolutional networks and images keep the symmetry under translation?"
METHOD = """
**Gradients by hand.** `experiments/backpropagation.py` holds convolution and pooling in NumPy, as a lecture derives
them. With G the gradient of the output Y, X the input, W a kernel, stride s, dilation d and padding p:

- kernel: dL/dW[k, c, u, v] = sum over n, i, j of G[n, k, i, j] X[n, c, i s + u d - p, j s + v d - p], the correlation
  of input and output gradient;
- input: the correlation of G, with s - 1 zeros between its entries, with the flipped kernel;
- bias: the sum of G; average pooling of m pixels: G / m to each; max pooling: G to the pixel that won.

They are compared with automatic differentiation in float64 for strides 1 to 3, with and without padding, dilations 1
and 2, windows of 2 and 3, on random pictures; the difference is relative to the largest entry.

**Equivariance.** T moves images to the right by a shift, T' a map by the shift over its total stride, rounded. The
error is sqrt(sum |f(T x) - T' f(x)|^2 / sum |f(x)|^2), over positions that neither see the border nor what a shift
brings in, on mosaics of four images; at the border it is measured around a torus, where zero padding is all that can
break the symmetry.

**Invariance.** The change of the logits, |f(T x) - f(x)|, as a part of their distance for two different images (both
root mean square); pixels that come in mirror the image. Beside it how often the class stays.

**Networks.** An AlexNet B (5 x 5 convolutions with zero padding, two 2 x 2 max poolings, two linear layers) and a fully
connected ReLU network of two layers of 256, at initialization and after 200 steps of SGD with batches of 64 images
of CIFAR-10 (augmented by mirroring left and right, not by shifts), measured on 32 images that they did not learn from.

**Pooling.** The change of the first two rectified maps under a shift by one pixel, as a part of the distance of the
maps of two images: as they are, every second pixel, and after 2 x 2 max or average pooling.

**Stationarity.** Of the gray values of 5,000 images of CIFAR-10: how much mean and variance differ between positions,
and which part of the differences between the covariances of pairs of pixels is one between displacements. All are
products of two halves of the images, so that sampling errors count for nothing on average.
"""
HOW_SURE = """
Intervals are over five seeds, 95 %, Student's t: another initialization, other measured images, another order of
training; the images of the statistics of pixels overlap between seeds. Training is short, an accuracy far from what the
network can reach; longer training or shifted images in training may change what is said of training, and nothing of
the rest. A tenth counts as small throughout. The reference results are of CIFAR-10 recompressed as JPEG (quality about
75), whose blocks of 8 x 8 pixels may add a dependence on the position that the original images do not have.
"""

# Of an image, a map, or a standard deviation: what counts as small.
SMALL = 0.1
EXPLAINED = 1 - SMALL
# Of float64 in sums of a few hundred terms, and of float32 in sums of a few thousand.
ROUNDING, ROUNDING_FLOAT32 = 1e-12, 1e-5
# Total strides of the stages: the last one comes after two poolings.
STRIDES_OF = dict(zip(STAGES, (1, 2, 2, 4, 4, 4), strict=True))


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator, **options: int) -> pd.DataFrame:
    """Gradients by hand beside torch's, and `experiments.translation.measure`, whose arguments these are."""
    parts = [by_hand.compared(generator), translation.measure(model, x, generator=generator, **options)]
    return pd.concat(parts, ignore_index=True)


def figures(collected: Collected) -> dict[str, Figure]:
    """Maps and outputs against the shift, pooled maps, and pixels by position."""
    return symmetry_figures.draw(collected)


def claims(collected: Collected) -> list[Claim]:
    """Gradients, maps, outputs, and images."""
    frame = collected.frame
    return [_gradients(frame), *_maps(frame), *_outputs(frame), *_images(frame)]


def _gradients(frame: pd.DataFrame) -> Claim:
    rows = frame[frame["quantity"] == "backpropagation_error"]
    cases = int(rows[rows["seed"] == rows["seed"].iloc[0]]["num_samples"].sum())
    return Claim(
        "The gradients of convolution and pooling by hand are those of automatic differentiation",
        bool(rows["value"].max() < ROUNDING),
        f"{cases} cases a seed, relative difference {_threshold(rows['value'].max(), ROUNDING)}",
    )


def _maps(frame: pd.DataFrame) -> list[Claim]:
    errors = frame[frame["quantity"] == "equivariance_error"]
    divided = errors["shift"] % errors["layer"].map(STRIDES_OF).astype(float) == 0
    exact, last = float(errors.loc[divided, "value"].max()), STAGES[-1]
    others = {
        (training, shift): by_seed(frame, "equivariance_error", layer=last, training=training, shift=shift)
        for training in (BEFORE, AFTER)
        for shift in (1, 2)
    }
    smallest = min((mean(values) for values in others.values()), key=lambda found: found.low)
    border = [mean(by_seed(frame, "border_error", layer=last, training=training)) for training in (BEFORE, AFTER)]
    relative = {name: geometric_mean(_pooled(frame, name) / _pooled(frame, "none")) for name in ("max", "average")}
    apart = geometric_mean(_pooled(frame, "average") / _pooled(frame, "max"))
    return [
        Claim(
            "Away from the border maps move with the image, for shifts that their strides divide",
            exact < ROUNDING_FLOAT32,
            f"{int(divided.sum())} cases of map, shift, seed, before and after training, error "
            f"{_threshold(exact, ROUNDING_FLOAT32)}",
        ),
        _larger(
            f"Shifts by one or two pixels, which the stride of 4 does not divide, change the maps of {last}",
            smallest,
            "smallest error",
        ),
        _larger(
            "Zero padding breaks the symmetry at the border",
            min(border, key=lambda found: found.low),
            f"smaller of the errors of {last} before and after training",
        ),
        _below("A map changes less under a shift by one pixel after max pooling", relative["max"]),
        _below("A map changes less after average pooling than after max pooling", apart),
        _below(
            f"Training makes the maps of {last} more equivariant, for a shift by one pixel",
            geometric_mean(others[AFTER, 1] / others[BEFORE, 1]),
        ),
    ]


def _outputs(frame: pd.DataFrame) -> list[Claim]:
    changes = {
        (network, training): change(frame, network, training, 1)
        for network in (CONVOLUTIONAL, CONNECTED)
        for training in (BEFORE, AFTER)
    }
    same = mean(by_seed(frame, "class_agreement", network=CONVOLUTIONAL, training=AFTER, shift=1))
    words = {BEFORE: "At initialization", AFTER: "After training"}
    return [
        *(
            _small(
                f"{words[training]} the output of the AlexNet is nearly invariant to a shift by one pixel",
                mean(changes[CONVOLUTIONAL, training]),
                "change, of the distance of two images,",
            )
            for training in (BEFORE, AFTER)
        ),
        *(
            _below(
                f"{words[training]} the AlexNet is nearer to invariance than the fully connected network",
                geometric_mean(changes[CONVOLUTIONAL, training] / changes[CONNECTED, training]),
            )
            for training in (BEFORE, AFTER)
        ),
        _below(
            "Training brings the AlexNet nearer to invariance",
            geometric_mean(changes[CONVOLUTIONAL, AFTER] / changes[CONVOLUTIONAL, BEFORE]),
        ),
        Claim(
            "After training nine classes of ten survive a shift by one pixel",
            True if same.low > EXPLAINED else False if same.high < EXPLAINED else None,
            f"part of the images whose class stays {same:.2f}",
        ),
    ]


def _images(frame: pd.DataFrame) -> list[Claim]:
    neighbors = frame[(frame["quantity"] == "correlation_spread") & (frame["place"] == 1)]
    spread = max((mean(rows["value"]) for _, rows in neighbors.groupby("axis", observed=True)), key=lambda m: m.high)
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
        _explained("covariance", mean(by_seed(frame, "covariance_explained"))),
        _explained("correlation", mean(by_seed(frame, "correlation_explained"))),
        _small(
            "Neighboring pixels are correlated alike everywhere",
            spread,
            "standard deviation over positions of the correlation of two neighbors",
        ),
    ]


def answer(collected: Collected) -> str:
    """Maps, outputs, images."""
    frame = collected.frame
    accuracy = mean(by_seed(frame, "test_accuracy", network=CONVOLUTIONAL))
    moved = {
        network: [mean(change(frame, network, training, 1)).value for training in (BEFORE, AFTER)]
        for network in (CONVOLUTIONAL, CONNECTED)
    }
    changes = [f"{before:.2f} to {after:.2f}" for before, after in moved.values()]
    explained = [mean(by_seed(frame, f"{name}_explained")).value for name in ("covariance", "correlation")]
    return (
        "Convolutions do: up to rounding their maps move with the image, away from the border and for shifts that all "
        "strides divide. Stride and zero padding break the symmetry for the rest, and most of the invariance of the "
        "output is learned: what a shift by one pixel does to it, as a part of the distance of two images, falls from "
        f"{changes[0]} in a training to a test accuracy of {accuracy.value:.2f}; in a fully connected network it falls "
        f"from {changes[1]}. Images do so only nearby: the displacement of two pixels explains {explained[0]:.2f} of "
        f"the differences between covariances and {explained[1]:.2f} of those between correlations."
    )


def _pooled(frame: pd.DataFrame, pooling: str) -> npt.NDArray[np.float64]:
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


def _below(says: str, ratio: Mean) -> Claim:
    return Claim(says, True if ratio.high < 1 else False if ratio.low > 1 else None, f"ratio {ratio:.2f}")


def _explained(name: str, found: Mean) -> Claim:
    return Claim(
        f"The {name} of two pixels depends on the displacement between them alone",
        True if found.low > EXPLAINED else False if found.high < EXPLAINED else None,
        f"part of the differences that is explained {found:.2f}; all but a tenth counts as all",
    )
