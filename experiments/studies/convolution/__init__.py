"""Convolution: its gradients by hand, the symmetry under translation that it builds in, and whether images have it."""

from __future__ import annotations

from experiments.archive.tables import Collected
from experiments.evidence.means import geometric_mean, mean
from experiments.evidence.study import Study
from experiments.evidence.words import listed, table
from experiments.studies.convolution import claims as of
from experiments.studies.convolution import figures
from experiments.studies.convolution.backpropagation import DILATIONS, PADDINGS, STRIDES, WINDOWS
from experiments.studies.convolution.measurement import CONNECTED_DEPTH, CONNECTED_WIDTH, CONVOLUTIONAL, measure
from experiments.studies.convolution.numbers import NAMES, WHEN, by_seed, change, training_factors

__all__ = ["STUDY", "measure"]


def answer(collected: Collected) -> str:
    """Maps, outputs, images."""
    frame = collected.frame
    keep = "keep the symmetry up to rounding" if of.exact(frame).holds else "do not keep the symmetry even"
    breaks = [name for name, claim in (("stride", of.stride), ("zero padding", of.border)) if claim(frame).holds]
    before, after = (mean(change(frame, CONVOLUTIONAL, when)).value for when in WHEN)
    images = [claim.holds for claim in of.images(frame)]
    explained = [mean(by_seed(frame, f"{name}_explained")).value for name in ("covariance", "correlation")]
    return (
        f"Convolutions {keep} away from the border, for shifts that all strides divide; it is broken by "
        f"{listed(breaks)}. A shift by one pixel changes the output of the AlexNet by {before:.2f} of the distance "
        f"between two images at initialization, and by {after:.2f} of it after training. CIFAR-10 images are shown to "
        f"have {images.count(True)} of {len(images)} properties of stationary images: the displacement of two pixels "
        f"explains a fraction of {explained[0]:.2f} of the differences between covariances and {explained[1]:.2f} of "
        "those between correlations."
    )


def details(collected: Collected) -> str:
    """The effect of training on maps and outputs."""
    frame = collected.frame
    stages = of.trained(frame)
    more, less, unknown = (
        listed(stage for stage, claim in stages.items() if claim.holds is holds) for holds in (True, False, None)
    )
    accuracy = mean(by_seed(frame, "test_accuracy", network=CONVOLUTIONAL))
    rows = []
    for network, name in NAMES.items():
        relative = [f"{mean(change(frame, network, when)).value:.2f}" for when in WHEN]
        rows.append([name, *relative, *(f"{geometric_mean(part):.2f}" for part in training_factors(frame, network))])
    both = "it is undecided whether separating images or ignoring shifts"
    winner = {True: "separating images", False: "ignoring shifts", None: both}[of.distance_first(frame).holds]
    header = ["network", *(f"relative change {words}" for words in WHEN.values())]
    return (
        f"Training makes maps more equivariant for a shift by one pixel in these stages: {more}. Less: {less}. "
        f"Undecided: {unknown}.\n\n"
        f"The relative change is the change of the output under a shift by one pixel, divided by the distance between "
        f"the outputs for two images. Training multiplies change and distance by these factors:\n\n"
        f"{table([*header, 'factor of the change', 'factor of the distance'], rows)}\n\n"
        f"The AlexNet reaches a test accuracy of {accuracy.value:.2f}. In its training, {winner} gains more "
        "relative invariance."
    )


STUDY = Study(
    question="Do convolutional networks and images keep the symmetry under translation?",
    use="""
Do not rely on the architecture for invariance to shifts: stride and zero padding break the symmetry. If the position of
an object must not matter, measure how the output responds to shifts. If it changes too much, train on shifted images.
Images of CIFAR-10 are not stationary, so a network may use the position of a pixel.
""",
    method=f"""
**Gradients by hand.** `experiments/studies/convolution/backpropagation.py` writes convolution and pooling in NumPy. G
is the gradient of the output Y, X the input, W a kernel, s the stride, d the dilation and p the padding:

- kernel: dL/dW[k, c, u, v] = sum over n, i, j of G[n, k, i, j] X[n, c, i s + u d - p, j s + v d - p];
- input: the correlation of G, with s - 1 zeros between its entries, with the flipped kernel;
- bias: the sum of G; average pooling of m pixels: G / m to each; max pooling: G to the largest pixel.

They are compared with automatic differentiation in float64, on random images. Differences are relative to the largest
entry. Cases: strides {listed(STRIDES)}, paddings {listed(PADDINGS)}, dilations {listed(DILATIONS)}, windows
{listed(WINDOWS)}.

**Equivariance.** T shifts images to the right. T' shifts a map by this distance divided by its total stride, rounded.
The error is sqrt(sum |f(T x) - T' f(x)|^2 / sum |f(x)|^2), on mosaics of four images. Positions that depend on the
border or on shifted-in pixels are left out. The error at the border is measured for circular shifts, where only zero
padding can break the symmetry.

**Invariance.** The change of the logits, |f(T x) - f(x)|, is divided by the distance between the logits of two images
(both root mean square). Missing pixels are filled by mirroring. For **pooling**, f is one of the first two maps after a
ReLU: the full map, every second pixel of it, or its 2 x 2 max or average pooling.

**Networks.** An AlexNet B has 5 x 5 convolutions with zero padding, two 2 x 2 max poolings and two linear layers. A
fully connected ReLU network has {CONNECTED_DEPTH} layers of {CONNECTED_WIDTH} units. Both are trained by
{{measurement.train_steps}} steps of SGD with batches of {{measurement.train_batch}} images of CIFAR-10, which are
mirrored at random but not shifted. The {{data.batch_size}} measured images are not used for training.

**Stationarity** is measured on gray values of {{measurement.num_images}} images. We measure how mean and variance
differ between positions. For pairs of pixels, we measure which fraction of the differences between their covariances
(or correlations) is explained by their displacement. All numbers are products over two halves of the images, so
sampling errors cancel on average. The spread of the correlation r of neighbors is divided by 1 - r, because a
correlation near 1 cannot spread far.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals over {{num_seeds}} seeds, which draw the initialization, the measured images
and the order of training. The images for the statistics of pixels overlap between seeds. Training is short, and the
network could reach a much higher accuracy. The study [pooling](pooling.md) measures larger shifts, without training.
Fractions below {of.SMALL:g} count as small. "Exploratory" claims and the measure for neighbors were chosen after a
first look at the data. The reference results use CIFAR-10 recompressed as JPEG (quality about 75). JPEG blocks of 8 x 8
pixels may make statistics depend on the position.
""",
    claims=lambda collected: of.claims(collected.frame),
    answer=answer,
    details=details,
    figures=figures.draw,
    captions={
        "equivariance": "Relative error of the maps of AlexNet B under a shift of the image, away from the border. It "
        "is zero up to rounding where the total stride of the map divides the shift. Bars are 95 % intervals.",
        "invariance": "Response of the output to a shift of the image. Left: change divided by the distance between "
        "two images. Right: fraction of images whose predicted class stays the same. Bars are 95 % intervals.",
        "pooling": "Change of two maps under a shift by one pixel with and without pooling, divided by the "
        "distance between two images. Bars are 95 % intervals.",
        "stationarity": "Gray values of CIFAR-10 by position: mean, standard deviation, and correlation of two pixels. "
        "Stationary images would have flat lines and no band. The band is the standard deviation over positions.",
    },
)
