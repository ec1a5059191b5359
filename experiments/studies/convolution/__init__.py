"""Convolution: its gradients by hand, the symmetry under translation that it builds in, and whether images have it."""

from __future__ import annotations

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.archive.tables import Collected
from experiments.evidence.means import mean
from experiments.evidence.study import Claim, Study
from experiments.studies.convolution import backpropagation, measurement
from experiments.studies.convolution import claims as convolution_claims
from experiments.studies.convolution import figures as convolution_figures
from experiments.studies.convolution.backpropagation import DILATIONS, PADDINGS, STRIDES, WINDOWS
from experiments.studies.convolution.claims import SMALL
from experiments.studies.convolution.measurement import CONNECTED, CONNECTED_DEPTH, CONNECTED_WIDTH, CONVOLUTIONAL
from experiments.studies.convolution.numbers import WHEN, by_seed, change


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


# Of the configuration; the tests hold them against it.
TRAIN_STEPS, TRAIN_BATCH, NUM_IMAGES, NUM_FOR_PIXELS = 200, 64, 32, 5000

QUESTION = "Do convolutional networks and images keep the symmetry under translation?"
METHOD = f"""
**Gradients by hand.** `experiments/studies/convolution/backpropagation.py` holds convolution and pooling in NumPy, as a
lecture derives them. With G the gradient of the output Y, X the input, W a kernel, stride s, dilation d and padding p:

- kernel: dL/dW[k, c, u, v] = sum over n, i, j of G[n, k, i, j] X[n, c, i s + u d - p, j s + v d - p], the correlation
  of input and output gradient;
- input: the correlation of G, with s - 1 zeros between its entries, with the flipped kernel;
- bias: the sum of G; average pooling of m pixels: G / m to each; max pooling: G to the pixel that won.

They are compared with automatic differentiation in float64 for all strides of {_listed(STRIDES)}, paddings of
{_listed(PADDINGS)}, dilations of {_listed(DILATIONS)} and windows of {_listed(WINDOWS)}, on random pictures;
the difference is relative to the largest entry.

**Equivariance.** T moves images to the right by a shift, T' a map by the shift over its total stride, rounded. The
error is sqrt(sum |f(T x) - T' f(x)|^2 / sum |f(x)|^2), over positions that neither see the border nor what a shift
brings in, on mosaics of four images; at the border it is measured around a torus, where zero padding is all that can
break the symmetry.

**Invariance.** The change of the logits, |f(T x) - f(x)|, as a part of their distance for two different images (both
root mean square); pixels that come in mirror the image. Training may lower the first or raise the second, so factors
are given of both. Beside it how often the class stays.

**Networks.** An AlexNet B (5 x 5 convolutions with zero padding, two 2 x 2 max poolings, two linear layers) and a fully
connected ReLU network ({CONNECTED_DEPTH} layers of {CONNECTED_WIDTH}), at initialization and after {TRAIN_STEPS}
steps of SGD with batches of {TRAIN_BATCH} images of CIFAR-10 (augmented by mirroring left and right, not by shifts),
measured on {NUM_IMAGES} images that they did not learn from.

**Pooling.** The change of the first two rectified maps under a shift by one pixel, as a part of the distance of the
maps of two images: as they are, every second pixel, and after 2 x 2 max or average pooling.

**Stationarity.** Of the gray values of {NUM_FOR_PIXELS:,} images of CIFAR-10: how much mean and variance differ
between positions, and which part of the differences between the covariances of pairs of pixels is one between
displacements. All are products of two halves of the images, so that sampling errors count for nothing on average. The
spread over positions of a correlation near 1 is small whatever the images, so that of neighbors is taken as a part of
what they lack to 1.
"""
HOW_SURE = f"""
Intervals are over seeds, 95 %, Student's t: another initialization, other measured images, another order of training;
the images of the statistics of pixels overlap between seeds. Training is short, an accuracy far from what the network
can reach; longer training or shifted images in training may change what is said of training, and nothing of the rest.
What pooling does is measured here for shifts to the right by one pixel only and windows of 2; how it goes on for larger
shifts, without training, is the study [pooling](pooling.md). A part of {SMALL:g} counts as small throughout. Claims
that begin with "exploratory", and the measure of how alike neighbors are, were chosen after a first look.
The reference results are of CIFAR-10 recompressed as JPEG
(quality about 75), whose blocks of 8 x 8 pixels may add a dependence on the position that the original images do not
have.
"""


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator, **options: int) -> pd.DataFrame:
    """Gradients by hand beside torch's, and `measurement.measure`, whose arguments these are."""
    parts = [backpropagation.compared(generator), measurement.measure(model, x, generator=generator, **options)]
    return pd.concat(parts, ignore_index=True)


def figures(collected: Collected) -> dict[str, Figure]:
    """Maps and outputs against the shift, pooled maps, and pixels by position."""
    return convolution_figures.draw(collected)


def claims(collected: Collected) -> list[Claim]:
    """Gradients, maps, outputs, and images."""
    frame, of = collected.frame, convolution_claims
    single = [claim(frame) for claim in (of.gradients, of.exact, of.stride, of.border)]
    return [*single, *of.pooling(frame), *of.trained(frame).values(), *of.outputs(frame), *of.images(frame)]


def answer(collected: Collected) -> str:
    """Maps, outputs, images."""
    frame = collected.frame
    return "\n\n".join([_of_maps(frame), _of_outputs(frame), _of_images(frame)])


def _of_maps(frame: pd.DataFrame) -> str:
    of = convolution_claims
    breaks = [name for name, claim in (("stride", of.stride), ("zero padding", of.border)) if claim(frame).holds]
    more, less, unknown = (
        ", ".join(stage for stage, claim in of.trained(frame).items() if claim.holds is holds) or "none"
        for holds in (True, False, None)
    )
    where = "away from the border, and for shifts that all strides divide, their maps"
    return (
        f"Convolutions do, up to rounding: {where} move with the image. "
        if of.exact(frame).holds
        else f"Convolutions do not: even {where} do not move with the image. "
    ) + (
        f"What breaks the symmetry: {' and '.join(breaks) or 'nothing that was tested'}. Stages whose maps training "
        f"makes more equivariant, for a shift by one pixel: {more}; less: {less}; not decided: {unknown}."
    )


def _of_outputs(frame: pd.DataFrame) -> str:
    accuracy = mean(by_seed(frame, "test_accuracy", network=CONVOLUTIONAL))
    said = {}
    for network in (CONVOLUTIONAL, CONNECTED):
        before, after = (mean(change(frame, network, training, 1)).value for training in WHEN)
        moved, apart = convolution_claims.parts(frame, network)
        said[network] = (
            f"goes from {before:.2f} to {after:.2f}: the change itself is multiplied by {moved:.2f}, the distance of "
            f"two images by {apart:.2f}"
        )
    verdict = {
        True: "so more of what was learned is telling images apart than ignoring shifts",
        False: "so more of what was learned is ignoring shifts than telling images apart",
        None: "which of the two did more is not decided",
    }[convolution_claims.distance_first(frame).holds]
    return (
        "What a shift by one pixel does to the output, as a part of the distance of the outputs for two images, "
        f"{said[CONVOLUTIONAL]}, in a training to a test accuracy of {accuracy.value:.2f}; {verdict}. In a fully "
        f"connected network it {said[CONNECTED]}."
    )


def _of_images(frame: pd.DataFrame) -> str:
    verdicts = [claim.holds for claim in convolution_claims.images(frame)]
    covariance, correlation = (
        mean(by_seed(frame, f"{name}_explained")).value for name in ("covariance", "correlation")
    )
    return (
        f"Of {len(verdicts)} properties of stationary images those of CIFAR-10 are found to have "
        f"{verdicts.count(True)}: the displacement of two pixels explains {covariance:.2f} of the differences between "
        "covariances and "
        f"{correlation:.2f} of those between correlations."
    )


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
)
