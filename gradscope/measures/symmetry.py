"""Translation: does a map move with its image (equivariance), and does an output stay as it is (invariance)?

Images are (B, C, H, W), and a shift (dx, dy) moves their content dx pixels to the right and dy down.  Errors are 0 for
the symmetry; each is an `Estimate` whose standard error is that of sampling the images, to first order.

References: A. Azulay and Y. Weiss (2019), "Why do deep convolutional networks generalize so poorly to small image
transformations?", arXiv:1805.12177; R. Zhang (2019), "Making convolutional networks shift-invariant again",
arXiv:1904.11486.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope.estimates import Estimate
from gradscope.forward.modules import state_restored
from gradscope.measures.samples import influenced, sample_mean

Shift = tuple[int, int]

FILLS = ("zeros", "reflect", "circular")
# An image is made wider by so much to see how much wider its map becomes: a multiple of the total strides
# that powers of two and a three make: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32.
GROWTH = 96


def shifted(images: Tensor, shift: Shift, fill: str = "reflect") -> Tensor:
    """The content of ``images`` moved by (dx, dy) pixels; what comes in at the border is ``fill``.

    Arguments:
        images: (B, C, H, W).
        shift: Less than a whole image in each direction.
        fill: zeros; reflect, the image mirrored about its outermost pixels, so that no edge appears that images do not
            have; or circular, what left at the other side.

    Raises:
        ValueError: Not a batch of images, an unknown fill, or a shift as large as an image.
    """
    if images.ndim != 4:
        raise ValueError(f"Images are (B, C, H, W), got a tensor of shape {tuple(images.shape)}.")
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}.")
    (dx, dy), (height, width) = shift, images.shape[2:]
    if abs(dx) >= width or abs(dy) >= height:
        raise ValueError(
            f"A shift by {shift} leaves nothing of images of {height} x {width} pixels; take a smaller one."
        )
    if fill == "circular":
        return images.roll((dy, dx), (2, 3))
    borders = [max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)]
    padded = functional.pad(images, borders, mode="constant" if fill == "zeros" else fill)
    top, left = max(-dy, 0), max(-dx, 0)
    return padded[:, :, top : top + height, left : left + width]


def equivariance_error(module: nn.Module, images: Tensor, shift: Shift, *, circular: bool = False) -> Estimate:
    """Relative change of a map when its image is moved and the map is moved back.

        sqrt(sum_b |f(T x_b) - T' f(x_b)|^2 / sum_b |f(x_b)|^2)

    T moves images by ``shift``, T' maps by ``shift`` over the total stride of ``module``; where that is no whole
    number, by the nearest one (halves toward zero), and the misfit is part of the error.

    The border: only positions count that see neither what lies outside of an image nor what a shift brings in, neither
    in f(T x) nor in T' f(x).  They are found by sending NaN through the module from there, so that any module will do;
    one that mixes all positions has none.  With ``circular`` all positions count, and images and maps are moved around
    a torus: then zero padding counts as what breaks the symmetry.

    Arguments:
        module: From images (B, C, H, W) of any size to maps (B, C', H', W'); left as it was.
        images: At least two.
        shift: (dx, dy) in pixels.

    Cost: two forward passes of the batch, and six of one larger image.

    Raises:
        ValueError: The output is no map, or its size does not grow with the image's; no position is free of the border;
            with ``circular``, images that are no whole multiple of the maps.
    """
    with torch.no_grad(), state_restored(dict(module.named_modules())):
        maps = _maps(module, images)
        strides = _strides(module, images)
        dx, dy = (_nearest(d, stride) for d, stride in zip(shift, strides, strict=True))
        moved, expected = _maps(module, shifted(images, shift, "circular")), maps.roll((dy, dx), (2, 3))
        if circular:
            if images.shape[2:] != (maps.shape[2] * strides[1], maps.shape[3] * strides[0]):
                raise ValueError(
                    f"Maps of {tuple(maps.shape[2:])} at a stride of {strides[::-1]} do not fill images of "
                    f"{tuple(images.shape[2:])}, so that they cannot go around a torus; leave circular=False."
                )
            inside = torch.ones(maps.shape[2:], dtype=torch.bool, device=maps.device)
        else:
            inside = _interior(module, images, shift, (dx, dy), strides, (maps.shape[2], maps.shape[3]))
        return _relative(moved[:, :, inside], expected[:, :, inside])


def invariance_error(model: nn.Module, images: Tensor, shift: Shift, *, fill: str = "reflect") -> Estimate:
    """Relative change of an output when the image is moved: sqrt(sum_b |f(T x_b) - f(x_b)|^2 / sum_b |f(x_b)|^2).

    An output that hardly depends on the image changes little for that reason alone: compare with `contrast`.

    Arguments:
        model: From images to outputs of any shape (B, ...); left as it was.
        images: (B, C, H, W), at least two.
        shift, fill: As in `shifted`.

    Cost: two forward passes.
    """
    with torch.no_grad(), state_restored(dict(model.named_modules())):
        return _relative(model(shifted(images, shift, fill)), model(images))


def argmax_agreement(model: nn.Module, images: Tensor, shift: Shift, *, fill: str = "reflect") -> Estimate:
    """Fraction of the images whose largest output, the class, stays the same when the image is moved.

    Arguments and cost as for `invariance_error`; outputs are (B, num_classes).

    Raises:
        ValueError: Outputs of another shape.
    """
    with torch.no_grad(), state_restored(dict(model.named_modules())):
        before, after = model(images), model(shifted(images, shift, fill))
    if before.ndim != 2:
        raise ValueError(f"Classes are read from outputs (B, num_classes), got shape {tuple(before.shape)}.")
    return sample_mean((before.argmax(1) == after.argmax(1)).double())


def contrast(model: nn.Module, images: Tensor) -> Estimate:
    """Relative distance of the outputs for two different images: sqrt(E |f(x) - f(x')|^2 / E |f(x)|^2).

    E |f(x) - f(x')|^2 = 2 Tr Cov f, without bias.  It is the scale of `invariance_error`: at that distance a moved
    image is as far from itself as from any other.  sqrt(2) where outputs have no mean, 0 where they are all the same.

    Cost: one forward pass.
    """
    with torch.no_grad(), state_restored(dict(model.named_modules())):
        outputs = _flat(model(images))
    deviations = (outputs - outputs.mean(dim=0)).square().sum(dim=1) * (len(outputs) / (len(outputs) - 1))
    return _root_of_ratio(2 * deviations, outputs.square().sum(dim=1))


def _relative(moved: Tensor, expected: Tensor) -> Estimate:
    first, second = _flat(moved), _flat(expected)
    return _root_of_ratio((first - second).square().sum(dim=1), second.square().sum(dim=1))


def _root_of_ratio(numerators: Tensor, denominators: Tensor) -> Estimate:
    """sqrt(sum of numerators / sum of denominators), both (B,)."""
    scale = denominators.mean()
    if not scale > 0:
        raise ValueError("The outputs are zero for every image, so that nothing is relative to them.")
    value = float(numerators.mean() / scale)
    return influenced(value, (numerators - value * denominators) / scale).sqrt()


def _flat(outputs: Tensor) -> Tensor:
    if len(outputs) < 2:
        raise ValueError("An error over images needs at least two of them.")
    return outputs.flatten(1).double()


def _maps(module: nn.Module, images: Tensor) -> Tensor:
    maps: Tensor = module(images)
    if maps.ndim != 4:
        raise ValueError(
            f"Only maps (B, C, H, W) can move with an image, got an output of shape {tuple(maps.shape)}; of such a "
            "module measure invariance_error."
        )
    return maps


def _strides(module: nn.Module, images: Tensor) -> Shift:
    """Pixels from one position of the map to the next, along x and y."""
    image = torch.zeros_like(images[:1])
    size = _maps(module, image).shape
    strides = []
    for axis, borders in ((3, [0, GROWTH]), (2, [0, 0, 0, GROWTH])):
        try:
            grown = _maps(module, functional.pad(image, borders)).shape[axis] - size[axis]
        except RuntimeError as error:
            raise ValueError(
                f"{type(module).__name__} takes images of one size only, so that its maps cannot be told from its "
                "borders; give the part of it before the first linear layer."
            ) from error
        if grown < 1 or GROWTH % grown:
            raise ValueError(
                f"An image that is {GROWTH} pixels larger makes a map that is {grown} larger, which is no stride; "
                "of a module that pools over all positions measure invariance_error."
            )
        strides.append(GROWTH // grown)
    return strides[0], strides[1]


def _nearest(d: int, stride: int) -> int:
    """d / stride, rounded to the nearest whole number, halves toward zero."""
    return int(math.copysign(math.ceil(abs(d) / stride - 0.5), d))


def _interior(
    module: nn.Module, images: Tensor, shift: Shift, moved: Shift, strides: Shift, size: tuple[int, int]
) -> Tensor:
    """Which positions of a map (H', W') see neither the outside of an image nor what the shift brings in."""
    image = torch.zeros_like(images[:1])
    margin_x, margin_y = (
        stride * -(-length // stride) for stride, length in zip(strides, image.shape[:1:-1], strict=True)
    )
    canvas = functional.pad(image, [margin_x, margin_x, margin_y, margin_y], value=math.nan)
    top, left = margin_y // strides[1], margin_x // strides[0]

    def part(maps: Tensor) -> Tensor:
        """The positions that the image itself has, where any channel is NaN."""
        return maps[0, :, top : top + size[0], left : left + size[1]].isnan().any(dim=0)

    outside = part(module(canvas).roll((moved[1], moved[0]), (2, 3)))
    brought_in = part(module(canvas + canvas.roll((shift[1], shift[0]), (2, 3))))
    inside = ~(outside | brought_in)
    if not inside.any():
        raise ValueError(
            f"No position of the map is free of the border after a shift by {shift}: its field of view is as large as "
            f"the images, {tuple(images.shape[2:])}.  Take larger images, or circular=True."
        )
    return inside
