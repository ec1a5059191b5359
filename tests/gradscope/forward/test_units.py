"""Which rows a default profile has."""

import torch
from torch import nn

import gradscope as gs
from gradscope.models.alexnet import AlexNetA
from gradscope.models.mlp import MLP


def names(model: nn.Module, x: torch.Tensor) -> list[str]:
    return [layer.name for layer in gs.capture(model, x).units]


def test_an_mlp_gives_its_layers():
    assert names(MLP(depth=3, width=4), torch.randn(2, 4)) == ["input", "layers.0", "layers.1", "layers.2"]


def test_a_residual_mlp_gives_stem_blocks_and_head():
    model = MLP(depth=2, width=4, in_features=6, out_features=3, residual="identity")
    assert names(model, torch.randn(2, 6)) == ["input", "stem", "layers.0", "layers.1", "head"]


def test_a_sequential_gives_each_leaf():
    expected = (
        "input conv1 relu1 conv2 relu2 pool1 conv3 relu3 conv4 relu4 pool2 flatten fc1 relu5 dropout fc2 relu6 fc3"
    )
    assert names(AlexNetA(), torch.randn(2, 3, 32, 32)) == expected.split()


class Block(nn.Module):
    """A residual block whose output and last ReLU are one tensor, with a Sequential or Identity shortcut."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(width, out, 1), nn.BatchNorm2d(out)) if width != out else nn.Identity()
        )

    def forward(self, x):
        h = self.conv2(self.relu(self.bn1(self.conv1(x))))
        h += self.downsample(x)
        return self.relu(h)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 8), Block(8, 8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.pool(self.layer2(self.layer1(self.conv1(x)))).flatten(1))


def test_a_resnet_gives_stem_blocks_and_head():
    expected = ["input", "conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "pool", "fc"]
    assert names(ResNet(), torch.randn(2, 3, 8, 8)) == expected


def test_children_called_one_by_one_by_a_distant_parent():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.norm = nn.LayerNorm(4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.head = Decoder(), nn.Linear(4, 2)

        def forward(self, x):
            for block in self.decoder.blocks:
                x = x + torch.tanh(block(x))
            return self.head(self.decoder.norm(x))

    # The sum after each block is functional, so only the norm and the head are modules on the trunk.
    assert names(Model(), torch.randn(2, 4)) == ["input", "decoder.norm", "head"]


def test_a_functional_output_is_a_row_named_output():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear(x)

    assert names(Root(), torch.randn(2, 4)) == ["input", "output"]


def test_a_module_called_output_keeps_its_name():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.output = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.tanh(self.output(self.input(x)))

    assert names(Root(), torch.randn(2, 4)) == ["(input)", "input", "output", "(output)"]
