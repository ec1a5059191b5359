"""Two small AlexNets for CIFAR-10 images (B, 3, 32, 32), with named layers.  conv3-64: 64 kernels of size 3 x 3."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.choices import Probability, Size, check_choice, checked
from gradscope.models.layers import fill, unfilled

IMAGE_SHAPE = (3, 32, 32)
INITS = ("he", "lecun", "xavier", "orthogonal")


class _AlexNet(nn.Sequential):
    """Named layers in execution order, with weights from one initializer and zero biases."""

    def __init__(self, layers: OrderedDict[str, nn.Module], init: str, generator: torch.Generator | None) -> None:
        super().__init__(layers)
        check_choice("init", init, INITS)
        fill(self, init, generator)

    def __getitem__(self, index: slice | int) -> Any:
        """Return one layer, or the layers of a slice as a plain `nn.Sequential` with the same names."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, 3, 32, 32)."""
        if x.shape[1:] != IMAGE_SHAPE:
            raise ValueError(f"{type(self).__name__} needs images of shape (B, 3, 32, 32), got {tuple(x.shape)}.")
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits


class AlexNetA(_AlexNet):
    """Convolutional network for 32 x 32 images, with four 3 x 3 convolutions and three linear layers.

    In order: twice conv3-64, pool, twice conv3-128, pool, fc-256, dropout, fc-256, fc-10.  Here conv3-64 is a 3 x 3
    convolution with 64 channels, and fc-256 a linear layer with 256 features; both are followed by ReLU.  fc-10 gives
    the logits.

    Arguments:
        padding: "same", or "valid" for no padding (then the first linear layer gets 5 x 5 instead of 8 x 8 positions).
        dropout: Probability of dropping a feature between the first two linear layers.
        num_classes: Number of logits.
        init: he, lecun, xavier or orthogonal; biases start at zero.
        generator: Source of the random weights; torch's global generator by default.

    Raises:
        TypeError: ``num_classes`` is not an integer.
        ValueError: ``padding`` or ``init`` is unknown, ``num_classes`` is below 1, or ``dropout`` is outside [0, 1].

    >>> AlexNetA(padding="valid")(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    @checked
    def __init__(
        self, *, padding: str = "same", dropout: Probability = 0.5, num_classes: Size = 10, init: str = "he",
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        check_choice("padding", padding, ("same", "valid"))
        side = 8 if padding == "same" else 5  # 32 -> 16 -> 8, or 32 -> 28 -> 14 -> 10 -> 5
        layers = OrderedDict[str, nn.Module](
            conv1=_conv(3, 64, 3, padding), relu1=nn.ReLU(),
            conv2=_conv(64, 64, 3, padding), relu2=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv3=_conv(64, 128, 3, padding), relu3=nn.ReLU(),
            conv4=_conv(128, 128, 3, padding), relu4=nn.ReLU(), pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=unfilled(nn.Linear, 128 * side * side, 256), relu5=nn.ReLU(), dropout=nn.Dropout(dropout),
            fc2=unfilled(nn.Linear, 256, 256), relu6=nn.ReLU(),
            fc3=unfilled(nn.Linear, 256, num_classes),
        )  # fmt: skip
        super().__init__(layers, init, generator)


class AlexNetB(_AlexNet):
    """Convolutional network for 32 x 32 images, with four 5 x 5 convolutions and two linear layers.

    In order: conv5-96, pool, conv5-80, pool, conv5-96, conv5-64, fc-256, fc-10, in the notation of `AlexNetA`, and with
    padding "same".  ``num_classes``, ``init``, ``generator`` and errors are as in `AlexNetA`.

    >>> [name for name, _ in AlexNetB().named_children()][:4]
    ['conv1', 'relu1', 'pool1', 'conv2']
    """

    @checked
    def __init__(self, *, num_classes: Size = 10, init: str = "he", generator: torch.Generator | None = None) -> None:
        layers = OrderedDict[str, nn.Module](
            conv1=_conv(3, 96, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=_conv(96, 80, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
            conv3=_conv(80, 96, 5), relu3=nn.ReLU(),
            conv4=_conv(96, 64, 5), relu4=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=unfilled(nn.Linear, 64 * 8 * 8, 256), relu5=nn.ReLU(),
            fc2=unfilled(nn.Linear, 256, num_classes),
        )  # fmt: skip
        super().__init__(layers, init, generator)


def _conv(n_in: int, n_out: int, kernel: int, padding: str = "same") -> nn.Conv2d:
    return unfilled(nn.Conv2d, n_in, n_out, kernel, padding=padding)
