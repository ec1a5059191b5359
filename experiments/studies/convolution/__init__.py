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
    explained = [mean(by_seed(frame, f"{name}_explained")).value for name in ("covariance", "correlation")]
    return (
        f"Convolutions {keep} the symmetry up to rounding, except near the border, if the shift is a multiple of all "
        f"strides; it is broken by {listed(breaks)}. A shift by one pixel changes the output of the AlexNet "
        "by "
        f"{before:.2f} of the distance between two images at initialization, and by {after:.2f} of this distance after "
        f"training. If statistics of images are the same at all positions, the images have {len(images)} properties "
        "that we test; "
        f"CIFAR-10 is shown to have {images.count(True)} of these {len(images)}, and the displacement between two "
        f"pixels explains {explained[0]:.2f} of the differences between covariances of pixels, and {explained[1]:.2f} "
        "of the differences between their correlations."
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
        rows.append([name, *relative, *(geometric_mean(part) for part in training_factors(frame, network))])
    names = {True: "The distance", False: "The change", None: "It is undecided which of the two factors"}
    winner = names[of.distance_first(frame).holds]
    header = ["network", *(f"relative change {words}" for words in WHEN.values())]
    return (
        f"Training makes the maps of these stages more equivariant for a shift by one pixel: {more}. Less equivariant: "
        f"{less}. Undecided: {unknown}.\n\n"
        f"The relative change is the change of the output under a shift by one pixel, divided by the distance between "
        f"the outputs for two images. Training multiplies change and distance by the factors in the last columns:\n\n"
        f"{table([*header, 'factor of the change', 'factor of the distance'], rows)}\n\n"
        f"The AlexNet reaches a test accuracy of {accuracy.value:.2f}. {winner} contributes more to "
        "the invariance that the AlexNet gains by training."
    )


STUDY = Study(
    question="Are convolutional networks and images symmetric under translation?",
    use="""
Do not rely on the architecture for invariance to shifts: stride and zero padding break the symmetry. If the position of
an object must not matter, measure how the output responds to shifts. If the output changes too much, train on shifted
images. Images of CIFAR-10 are not stationary, so a network may use the position of a pixel.
""",
    method=f"""
**Gradients by hand.** `experiments/studies/convolution/backpropagation.py` implements convolution and pooling in NumPy.
For input X, kernel W, stride s, dilation d, padding p and the gradient G = dL/dY of the output, the gradients are

- kernel: dL/dW[k, c, u, v] = sum over n, i, j of G[n, k, i, j] X[n, c, i s + u d - p, j s + v d - p];
- input: put s - 1 zeros between the entries of G, then correlate G with the flipped kernel;
- bias: the sum of G;
- average pooling of m pixels: each pixel receives G / m; max pooling: the largest pixel receives G.

These gradients are compared with automatic differentiation in float64, on random images. Differences are divided by the
largest entry of the gradient. Cases: strides {listed(STRIDES)}, paddings {listed(PADDINGS)}, dilations
{listed(DILATIONS)}, windows {listed(WINDOWS)}.

**Equivariance.** T shifts images to the right. T' shifts a map by the same distance, divided by the total stride of the
map and rounded. The error of a map f is sqrt(sum |f(T x) - T' f(x)|^2 / sum |f(x)|^2), on mosaics of four images.
Positions that depend on the border or on shifted-in pixels are left out. The error at the border is measured with
circular shifts. Under circular shifts, only zero padding can break the symmetry.

**Invariance.** The change of the logits, |f(T x) - f(x)|, is divided by the distance between the logits of two images
(both are root mean squares). Missing pixels are filled by mirroring. To measure the effect of **pooling**, f is a map
after the first or second ReLU: the full map, every second pixel of the map, or the map after 2 x 2 max or average
pooling.

**Networks.** AlexNet B has 5 x 5 convolutions with zero padding, two 2 x 2 max poolings and two linear layers. A fully
connected ReLU network has {CONNECTED_DEPTH} layers of {CONNECTED_WIDTH} units. Both are trained by
{{measurement.train_steps}} steps of SGD with batches of {{measurement.train_batch}} images of CIFAR-10. The training
images are mirrored at random but not shifted. The {{data.batch_size}} measured images are not used for training.

**Stationarity** is measured on gray values of {{measurement.num_images}} images. We measure by how much the mean and
the variance of a pixel differ between positions. In stationary images, pairs of pixels with equal displacement have
equal covariance. We measure which fraction of the variance of these covariances (or correlations) over pairs the
displacement explains. Each squared deviation is estimated as a product of two estimates, one from each half of the
images. Their sampling errors are independent, so these errors cancel on average. The correlation r of neighbors is near
1 and cannot vary much. So the deviation of r over positions is divided by 1 - r.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals over {{num_seeds}} seeds. Each seed has another initialization, other measured
images and another order of training images. Different seeds share images for the statistics of pixels. Training is
short, so the accuracy is much lower than the network could reach. The study [pooling](pooling.md) measures larger
shifts, without training. Relative errors and changes below {of.SMALL:g} count as small. The "exploratory" claims and
the measure for neighbors were chosen after a first look at the data. The reference results use CIFAR-10 recompressed as
JPEG (quality about 75). JPEG blocks of 8 x 8 pixels may make statistics depend on the position.
""",
    claims=lambda collected: of.claims(collected.frame),
    answer=answer,
    details=details,
    figures=figures.draw,
    captions={
        "equivariance": "Relative error of the maps of AlexNet B under a shift of the image, away from the border. The "
        "error is zero up to rounding if the total stride of the map divides the shift. Bars are 95 % intervals. "
        "Points are shifted slightly sideways.",
        "invariance": "Response of the output to a shift of the image. Left: change divided by the distance between "
        "two images (gray line: as large as this distance). Right: fraction of images that keep their predicted class. "
        "Bars are 95 % intervals; bars of fractions are cut at 1. Points are shifted slightly sideways.",
        "pooling": "Change of two feature maps under a shift by one pixel, with and without pooling. The change is "
        "divided by the distance between two images. Bars are 95 % intervals. Points are shifted slightly sideways.",
        "stationarity": "Gray values of CIFAR-10 by position: mean, standard deviation, and correlation of two pixels. "
        "Stationary images would have flat curves of mean and standard deviation, and equal correlations at all "
        "positions. The band is the standard deviation over positions. The axes of mean and standard deviation do not "
        "start at 0.",
    },
)
