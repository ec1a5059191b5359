"""Study of convolution: gradients by hand, and the translation symmetry of convolutional networks and of images."""

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
    """The symmetry of feature maps, outputs and images."""
    frame = collected.frame
    keep = "keep" if of.exact(frame).holds else "do not keep"
    breaks = [name for name, claim in (("stride", of.stride), ("zero padding", of.border)) if claim(frame).holds]
    before, after = (mean(change(frame, CONVOLUTIONAL, when)).value for when in WHEN)
    images = [claim.holds for claim in of.images(frame)]
    return (
        f"Convolutions {keep} the symmetry up to rounding (a feature map shifts with the image) away from the border, "
        "for shifts by multiples of the product of all strides up to the map; at the border or for other shifts, the "
        f"symmetry is broken by {listed(breaks)}. At initialization, a shift by one pixel changes the output of an "
        f"AlexNet by {before:.2f} times the distance between the outputs for two images; after training, by "
        f"{after:.2f} times this distance. We test {len(images)} properties of images whose statistics are the same at "
        f"all positions: CIFAR-10 is shown to have {images.count(True)} of these {len(images)} properties, and not to "
        f"have {images.count(False)}."
    )


def details(collected: Collected) -> str:
    """The effect of training on outputs."""
    frame = collected.frame
    accuracy = mean(by_seed(frame, "test_accuracy", network=CONVOLUTIONAL))
    rows = []
    for network, name in NAMES.items():
        relative = [f"{mean(change(frame, network, when)).value:.2f}" for when in WHEN]
        rows.append([name, *relative, *(geometric_mean(part) for part in training_factors(frame, network))])
    names = {True: "The distance", False: "The change", None: "It is undecided which of the two, change or distance,"}
    winner = names[of.distance_first(frame).holds]
    header = ["network", *(f"relative change {words}" for words in WHEN.values())]
    return (
        "The relative change is the change of the output under a shift by one pixel, divided by the distance between "
        "the outputs for two images. Training multiplies change and distance by the factors in the last two columns:"
        "\n\n"
        f"{table([*header, 'factor of the change', 'factor of the distance'], rows)}\n\n"
        f"The AlexNet reaches a test accuracy of {accuracy.value:.2f}. Its relative change falls if the change falls "
        f"or the distance grows. {winner} contributes more."
    )


STUDY = Study(
    question="Are convolutional networks and images symmetric under translation?",
    use="""
Do not rely on the architecture for invariance to shifts: stride and zero padding break the symmetry. If the position of
an object must not matter, measure how the output responds to shifts. If the output changes too much, train on shifted
images. Statistics of CIFAR-10 depend on the position, so a network may use the position of a pixel.
""",
    method=f"""
**Gradients by hand.** `experiments/studies/convolution/backpropagation.py` implements convolution and pooling in NumPy.
Let a layer have input X, kernel W, output Y, stride s, dilation d and padding p. L is the loss, and G = dL/dY. G' is G
with s - 1 zeros between neighboring entries. The indices are n for images, c for input channels, k for output channels,
and (u, v), (i, j) and (y, x) for positions in W, Y and X. The gradients of L are:

- kernel: dL/dW[k, c, u, v] = sum over n, i, j of G[n, k, i, j] X[n, c, i s + u d - p, j s + v d - p];
- input: dL/dX[n, c, y, x] = sum over k, u, v of W[k, c, u, v] G'[n, k, y + p - u d, x + p - v d];
- bias: the sum of G over images and positions;
- average pooling of m pixels: each pixel of a window receives G / m;
- max pooling: the largest pixel of a window receives G.

These gradients are compared with automatic differentiation in float64, on random images. Differences are divided by the
largest entry of the gradient. We compare strides {listed(STRIDES)}, paddings {listed(PADDINGS)}, dilations
{listed(DILATIONS)} and pooling windows of size {listed(WINDOWS)}.

**Equivariance.** The total stride of a map is the product of the strides of all layers up to it. T shifts an image x to
the right. T' shifts a map f(x) by the same distance, divided by the total stride of the map and rounded to whole
positions. The relative error of the map is sqrt(sum |f(T x) - T' f(x)|^2 / sum |f(x)|^2), summed over images and
positions. Each x is a mosaic of four images, because late maps see a window larger than one image. Positions that
depend on the border or on pixels that the shift brings in are left out.

To test zero padding, we take the relative error over all positions, also those at the border. For this, the shift is
circular: pixels that leave the image at the right enter it at the left. It is a multiple of the total stride of every
map, so stride does not break the symmetry. Only zero padding can break it.

**Invariance.** The output f(x) is the vector of logits for an image x, and T shifts the image. Pixels missing at the
border are filled by reflection. The *change* of the output is |f(T x) - f(x)|. The *distance* is |f(x) - f(x')| for
another image x'. Both are root mean squares over images, divided by the root mean square of the outputs. The *relative
change* is the change divided by the distance.

For the effect of **pooling**, f(x) is a map after the first or second ReLU instead of the output. We compare the full
map, the map of every second pixel in every second row, and the map after 2 x 2 max or average pooling. In claims, the
relative change of a pooled map is the geometric mean of four values: after each of the two ReLUs, before and after
training.

**Networks.** AlexNet B has four 5 x 5 convolutions with zero padding, two 2 x 2 max poolings and two linear layers. The
fully connected ReLU network has {CONNECTED_DEPTH} hidden layers of {CONNECTED_WIDTH} neurons. Both are trained by
{{measurement.train_steps}} steps of SGD with batches of {{measurement.train_batch}} images of CIFAR-10, which are
mirrored at random but not shifted. The {{data.batch_size}} measured images are not used for training.

**Stationarity** is measured on gray values of {{measurement.num_images}} images. Images are stationary if their
statistics are the same at all positions. We measure how much the mean and the variance of a pixel differ between
positions. In stationary images, the covariance of two pixels depends only on the displacement between them. We take the
covariances of all pairs of pixels and measure which fraction of the variance of these covariances the displacement
explains. We do the same for correlations. The correlation r of neighbors is near 1 and cannot vary much, so its
standard deviation over positions is divided by 1 - (mean of r).

A statistic of a pixel or of a pair of pixels has a sampling error. This error would enlarge the measured variance of
the statistic over positions or pairs. So the deviation of the statistic from its mean over positions or pairs is
estimated twice, once from each half of the images. The squared deviation is replaced by the product of the two
estimates. Their sampling errors are independent, so they cancel on average.
""",
    how_sure="""
Intervals are 95 % Student's t intervals over {num_seeds} seeds, which differ in the initialization, the measured
images and the order of training images. Intervals of the claims that training makes maps more equivariant are
simultaneous (Bonferroni). Different seeds share part of the images for the statistics of pixels, so the intervals of
these statistics may be too narrow. Training is short, so the accuracy is much lower than the network could reach. The
exploratory claims, and the division by 1 - (mean of r) for neighbors, were chosen after a first look at the data. The
reference results use CIFAR-10 recompressed as JPEG (quality about 75). JPEG compresses blocks of 8 x 8 pixels, which
may make statistics depend on the position.
""",
    claims=lambda collected: of.claims(collected.frame),
    answer=answer,
    details=details,
    figures=figures.draw,
    captions={
        "equivariance": "Relative error of the maps of AlexNet B under a shift of the image, away from the border. The "
        "error is zero up to rounding if the total stride of the map divides the shift. Bars are 95 % intervals. "
        "Points are shifted slightly sideways.",
        "invariance": "Response of the output to a shift of the image. Left: change of the output, divided by the "
        "distance between the outputs for two images; the gray line is at 1. Right: fraction of images that keep their "
        "predicted class. Bars are 95 % intervals, cut at a fraction of 1. Points are shifted slightly sideways.",
        "pooling": "Change |f(T x) - f(x)| of a feature map f under a shift T of the image x by one pixel. f is the "
        "map after the first or second ReLU, with or without pooling. The change is divided by the distance between "
        "the maps of two images. Bars are 95 % intervals. Points are shifted slightly sideways.",
        "stationarity": "Gray values of CIFAR-10: mean and standard deviation by position, and correlation of two "
        "pixels by distance. The band is the standard deviation over positions of the correlation. Stationary images "
        "would have flat curves of mean and standard deviation, and no band. The axes of mean and standard deviation "
        "do not start at 0.",
    },
)
