"""Translation symmetry: do feature maps move with the image (equivariance)?  Are outputs unchanged (invariance)?

Images are (B, C, H, W) with B >= 2.  A shift (dx, dy) moves their content dx pixels to the right and dy pixels down.
An error of 0 means exact symmetry.  Results are `Estimate`s with the sampling error over images, to first order.

References: A. Azulay and Y. Weiss (2019), "Why do deep convolutional networks generalize so poorly to small image
transformations?", arXiv:1805.12177; R. Zhang (2019), "Making convolutional networks shift-invariant again",
arXiv:1904.11486.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope.choices import check_choice, checked, shown
from gradscope.estimates import Estimate
from gradscope.forward.inputs import as_batch
from gradscope.forward.modules import recording_gradients, unwrap
from gradscope.forward.state import alone, state_restored
from gradscope.measures.samples import jackknifed, sample_mean, without_one

Shift = tuple[int, int]

FILLS = ("zeros", "reflect", "circular")
GROWTH = 96  # pixels by which an image is enlarged to find a stride; a multiple of all usual strides up to 32


@checked
def shifted(images: Tensor, shift: Shift, fill: str = "reflect") -> Tensor:
    """Return the ``images`` (B, C, H, W) with their content moved by (dx, dy) pixels.

    Arguments:
        shift: (dx, dy), smaller than an image.
        fill: Content that enters at the border: "zeros", "reflect" (the mirrored image), or "circular" (the opposite
            side).

    Raises:
        ValueError: ``images`` is not a batch of images, ``fill`` is unknown, or the shift is as large as an image.

    >>> shifted(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (1, 0), fill="circular").flatten().tolist()
    [3.0, 1.0, 2.0]
    """
    if images.ndim != 4:
        raise ValueError(f"Images must have shape (B, C, H, W), got {tuple(images.shape)}.")
    check_choice("fill", fill, FILLS)
    (dx, dy), (height, width) = shift, images.shape[2:]
    if abs(dx) >= width or abs(dy) >= height:
        raise ValueError(
            f"A shift by {shift} moves images of {height} x {width} pixels out of sight; choose a smaller shift."
        )
    if fill == "circular":
        return images.roll((dy, dx), (2, 3))
    borders = [max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)]
    padded = functional.pad(images, borders, mode="constant" if fill == "zeros" else fill)
    top, left = max(-dy, 0), max(-dx, 0)
    return padded[:, :, top : top + height, left : left + width]


@checked
def equivariance_error(module: nn.Module, images: Tensor, shift: Shift, *, circular: bool = False) -> Estimate:
    """Relative distance between the feature maps of moved images and the moved feature maps of the original images.

        sqrt(sum_b |f(T x_b) - T' f(x_b)|^2 / sum_b |T' f(x_b)|^2)

    f is the module, and x_b are the images.  T moves images by ``shift``.  T' moves maps by ``shift`` divided by the
    total stride of the module, rounded to whole positions (halves toward zero).  The rounding contributes to the error.

    A position counts only if its receptive field contains neither padding nor pixels that the shift brought in.  The
    module is also run on an image surrounded by NaN; positions that NaN reaches do not count.

    Arguments:
        module: Maps images (B, C, H, W) of any size to feature maps (B, C', H', W'); is left unchanged.
        images: (B, C, H, W), at least two.
        shift: (dx, dy) in pixels.
        circular: Move images and maps circularly: pixels that leave at one side enter at the opposite one.  The error
            then covers all positions, so it includes effects of zero padding in the module.

    Cost: two forward passes of the batch, and five of one enlarged image.

    Raises:
        ValueError: The output is not a feature map, or has no stride because its size does not grow with the image.
            Without ``circular``: every receptive field contains padding or pixels that the shift brought in.  With
            ``circular``: the size of the images is not the size of the maps times the stride.

    >>> images = torch.arange(128.0).reshape(2, 1, 8, 8)
    >>> [round(equivariance_error(nn.MaxPool2d(2), images, shift).value, 4) for shift in ((2, 0), (1, 0))]
    [0.0, 0.0128]
    """
    maps = _maps(module, images)
    strides = _strides(module, images)
    dx, dy = (_nearest(d, stride) for d, stride in zip(shift, strides, strict=True))
    moved, expected = _maps(module, shifted(images, shift, "circular")), maps.roll((dy, dx), (2, 3))
    if circular:
        if images.shape[2:] != (maps.shape[2] * strides[1], maps.shape[3] * strides[0]):
            raise ValueError(
                f"circular=True needs images as large as maps times stride, got images {tuple(images.shape[2:])}, "
                f"maps {tuple(maps.shape[2:])} and stride {strides[::-1]}; use circular=False."
            )
        inside = torch.ones(maps.shape[2:], dtype=torch.bool, device=maps.device)
    else:
        inside = _interior(module, images, shift, (dx, dy), strides, (maps.shape[2], maps.shape[3]))
    return _relative(moved[:, :, inside], expected[:, :, inside])


@checked
def invariance_error(model: nn.Module, images: Tensor, shift: Shift, *, fill: str = "reflect") -> Estimate:
    """Relative change of the outputs when the images are moved.

    It is sqrt(sum_b |f(T x_b) - f(x_b)|^2 / sum_b |f(x_b)|^2) for the model f, images x_b and the shift T.  Compare it
    with `contrast`, because an output that hardly depends on the image also hardly changes when the image moves.

    Arguments:
        model: Maps images to outputs of any shape (B, ...); is left unchanged.
        images: (B, C, H, W), at least two.
        shift, fill: As in `shifted`.

    Cost: two forward passes.

    >>> images = torch.eye(2).reshape(2, 1, 1, 2)
    >>> round(invariance_error(nn.Flatten(), images, (1, 0), fill="circular").value, 4)
    1.4142
    """
    return _relative(_run(model, shifted(images, shift, fill)), _run(model, images))


@checked
def argmax_agreement(model: nn.Module, images: Tensor, shift: Shift, *, fill: str = "reflect") -> Estimate:
    """Fraction of images whose predicted class (the largest output) does not change when the image is moved.

    Arguments and cost are those of `invariance_error`; outputs are (B, num_classes).

    Raises:
        ValueError: The outputs do not have this shape.

    >>> argmax_agreement(nn.Flatten(), torch.eye(2).reshape(2, 1, 1, 2), (1, 0), fill="circular").value
    0.0
    """
    before, after = _run(model, images), _run(model, shifted(images, shift, fill))
    if before.ndim != 2:
        raise ValueError(f"The outputs of the model must have shape (B, num_classes), got {tuple(before.shape)}.")
    return sample_mean((before.argmax(1) == after.argmax(1)).double())


@checked
def contrast(model: nn.Module, images: Tensor) -> Estimate:
    """Relative distance between the outputs f of two different images x and x': sqrt(E |f(x) - f(x')|^2 / E |f(x)|^2).

    The numerator is estimated without bias, as twice the trace of the covariance of f(x).  If `invariance_error` equals
    the contrast, moving an image changes the output as much as taking another image.  The contrast of many images is
    sqrt(2) if their mean output is zero.  It is 0 if all outputs are the same.

    Cost: one forward pass.

    >>> round(contrast(nn.Flatten(), torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)).value, 4)
    2.0
    """
    outputs = _flat(_run(model, images))
    num, deviations = len(outputs), (outputs - outputs.mean(dim=0)).square().sum(dim=1)
    spread, spreads = deviations.sum() / (num - 1), without_one(deviations) / max(num - 2, 1)
    return _root_of_ratio(2 * spread, 2 * spreads, outputs.square().sum(dim=1))


def _relative(moved: Tensor, expected: Tensor) -> Estimate:
    first, second = _flat(moved), _flat(expected)
    changes = (first - second).square().sum(dim=1)
    num = len(changes)
    return _root_of_ratio(changes.mean(), (changes.sum() - changes) / (num - 1), second.square().sum(dim=1))


def _root_of_ratio(numerator: Tensor, without_one: Tensor, squares: Tensor) -> Estimate:
    """sqrt(numerator / mean of squares); ``without_one`` (B,): the numerator without one image; ``squares``: (B,)."""
    scale = squares.mean()
    if not torch.isfinite(scale):
        raise ValueError("The outputs for the images are NaN or Inf, so there is no relative error: scale the images.")
    if not scale > 0:
        raise ValueError("The outputs are zero for every image, so the relative error is undefined.")
    scales = (squares.sum() - squares) / (len(squares) - 1)
    return jackknifed(math.sqrt(float(numerator / scale)), (without_one.clamp_min(0) / scales).sqrt())


def _flat(outputs: Tensor) -> Tensor:
    if len(outputs) < 2:
        raise ValueError(f"images must hold at least two images, got {len(outputs)}.")
    return outputs.flatten(1).double()


def _run(model: nn.Module, images: Tensor) -> Tensor:
    """The output of one forward pass with the modes of every measurement, from the present state of the model."""
    model = unwrap(model)
    modules = dict(model.named_modules())
    batch = as_batch(images, forward=None, finite=False)
    with alone, state_restored(modules) as state, state, recording_gradients():
        output = batch.differentiable()[0].run(model, None)
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return one tensor, so that images can be compared, got {shown(output)}.")
    return output.detach()


def _maps(module: nn.Module, images: Tensor) -> Tensor:
    maps = _run(module, images)
    if maps.ndim != 4:
        raise ValueError(
            f"equivariance_error needs feature maps (B, C, H, W), got an output of shape {tuple(maps.shape)}; use "
            "invariance_error."
        )
    return maps


def _strides(module: nn.Module, images: Tensor) -> Shift:
    """Pixels between neighboring positions of the map, along x and y."""
    image = torch.zeros_like(images[:1])
    size = _maps(module, image).shape
    strides = []
    for axis, borders in ((3, [0, GROWTH]), (2, [0, 0, 0, GROWTH])):
        try:
            grown = _maps(module, functional.pad(image, borders)).shape[axis] - size[axis]
        except RuntimeError as error:
            raise ValueError(
                f"{type(module).__name__} accepts only one image size, so its stride cannot be measured; pass only "
                "the layers before the first linear layer."
            ) from error
        if grown < 1 or GROWTH % grown:
            raise ValueError(
                f"{type(module).__name__} has no stride: {GROWTH} more pixels per row or column of the image give "
                f"{grown} more positions of the map. If the module pools over all positions, use invariance_error."
            )
        strides.append(GROWTH // grown)
    return strides[0], strides[1]


def _nearest(d: int, stride: int) -> int:
    """d / stride, rounded to the nearest integer; halves are rounded toward zero."""
    return int(math.copysign(math.ceil(abs(d) / stride - 0.5), d))


def _interior(
    module: nn.Module, images: Tensor, shift: Shift, moved: Shift, strides: Shift, size: tuple[int, int]
) -> Tensor:
    """Mask (H', W') of the positions whose field of view has neither padding nor pixels that the shift brought in."""
    image = torch.zeros_like(images[:1])
    margin_x, margin_y = (stride * -(-n // stride) for stride, n in zip(strides, image.shape[:1:-1], strict=True))
    canvas = functional.pad(image, [margin_x, margin_x, margin_y, margin_y], value=math.nan)
    top, left = margin_y // strides[1], margin_x // strides[0]

    def part(maps: Tensor) -> Tensor:
        """Mask of the positions of the image itself at which any channel is NaN."""
        return maps[0, :, top : top + size[0], left : left + size[1]].isnan().any(dim=0)

    outside = part(_run(module, canvas).roll((moved[1], moved[0]), (2, 3)))
    brought_in = part(_run(module, canvas + canvas.roll((shift[1], shift[0]), (2, 3))))
    inside = ~(outside | brought_in)
    if not inside.any():
        raise ValueError(
            f"The border affects every position of the map after a shift by {shift}: the field of view is as large as "
            f"the images, {tuple(images.shape[2:])}. Use larger images, or circular=True."
        )
    return inside
