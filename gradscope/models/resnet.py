"""The residual network of He et al. for CIFAR-10, with or without its skip connections."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope.choices import Depth, Size, check_choice, checked
from gradscope.models.alexnet import INITS
from gradscope.models.layers import fill, unfilled

NORMS = ("batch", "none")
RESIDUALS = ("identity", "none")
STAGES = 3


class ResidualBlock(nn.Module):
    """``relu2(shortcut(x) + norm2(conv2(relu1(norm1(conv1(x))))))``, or without the shortcut if ``residual`` is false.

    The shortcut has no parameters (option A of He et al.): subsampled positions, and zeros for new channels.
    """

    def __init__(self, conv1: nn.Conv2d, conv2: nn.Conv2d, norm: str, residual: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2
        self.norm1, self.norm2 = _norm(norm, conv1.out_channels), _norm(norm, conv2.out_channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        h = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        if self.residual:
            stride, new = self.conv1.stride[0], self.conv1.out_channels - x.shape[1]
            shortcut = x[:, :, ::stride, ::stride]
            h = h + (functional.pad(shortcut, (0, 0, 0, 0, new // 2, new - new // 2)) if new else shortcut)
        y: Tensor = self.relu2(h)
        return y


class ResNet(nn.Sequential):
    """Residual network for small images, such as ResNet-20 for CIFAR-10.

    It has 6n + 2 layers: a convolution with w channels, three stages of n blocks with w, 2w and 4w channels, a mean
    over positions, and a linear layer.

    Arguments:
        depth: Number of layers, 6n + 2, for example 8, 14, 20, 32, 44, 56 or 110.
        width: Channels w of the first stage.
        residual: identity; or none, for the same layers and parameters without skip connections.
        norm: batch; or none, which gives convolutions a bias.
        in_channels, num_classes: Channels of an image, and number of logits.
        init: he, lecun, xavier or orthogonal; biases start at zero.
        generator: Source of the random weights; torch's global generator by default.

    Raises:
        TypeError: A size is not an integer.
        ValueError: ``depth`` is not 6n + 2, a name is unknown, or a size is below 1.

    Reference: He, Zhang, Ren and Sun (2016), "Deep Residual Learning for Image Recognition", section 4.2.

    >>> model = ResNet(depth=14, width=4)
    >>> model(torch.zeros(2, 3, 32, 32)).shape, len(model.stage3)
    (torch.Size([2, 10]), 2)
    """

    @checked
    def __init__(
        self, *, depth: Depth = 20, width: Size = 16, residual: str = "identity", norm: str = "batch",
        in_channels: Size = 3, num_classes: Size = 10, init: str = "he", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if depth < 8 or (depth - 2) % (2 * STAGES):
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, ...), got {depth}.")
        check_choice("residual", residual, RESIDUALS)
        check_choice("norm", norm, NORMS)
        check_choice("init", init, INITS)

        def conv(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
            return unfilled(nn.Conv2d, n_in, n_out, 3, stride=stride, padding=1, bias=norm == "none")

        layers = OrderedDict[str, nn.Module](conv1=conv(in_channels, width), norm1=_norm(norm, width), relu1=nn.ReLU())
        channels = width
        for stage in range(STAGES):
            blocks, new = [], width * 2**stage
            for number in range((depth - 2) // (2 * STAGES)):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(ResidualBlock(conv(channels, new, stride), conv(new, new), norm, residual == "identity"))
                channels = new
            layers[f"stage{stage + 1}"] = nn.Sequential(*blocks)
        layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        layers["fc"] = unfilled(nn.Linear, channels, num_classes)
        super().__init__(layers)
        fill(self, init, generator)


def _norm(norm: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()
