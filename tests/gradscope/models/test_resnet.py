"""The residual network for CIFAR-10: counts by hand, shapes, shortcuts, and what the skip connections do to GSC."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.models import ResNet
from tests.helpers import seeded


def test_parameter_counts_are_those_of_the_paper():
    # Table 6 of He et al. gives 0.27 M for 20 layers and 0.85 M for 56.
    counts = {depth: sum(p.numel() for p in ResNet(depth=depth).parameters()) for depth in (20, 56)}
    assert round(counts[20] / 1e6, 2) == 0.27 and round(counts[56] / 1e6, 2) == 0.85
    n, expected = 3, 3 * 9 * 16 + 2 * 16
    for stage, before in ((16, 16), (32, 16), (64, 32)):
        expected += before * 9 * stage + (2 * n - 1) * stage * 9 * stage + 2 * n * 2 * stage
    assert counts[20] == expected + 64 * 10 + 10
    plain = ResNet(depth=20, residual="none")
    assert sum(p.numel() for p in plain.parameters()) == counts[20]


def test_a_block_by_hand():
    model = ResNet(depth=8, width=4, generator=seeded()).eval()
    block, x = model.stage2[0], torch.randn(2, 4, 6, 6, generator=seeded(1))
    h = functional.relu(block.norm1(functional.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    h = block.norm2(functional.conv2d(h, block.conv2.weight, padding=1))
    shortcut = torch.zeros_like(h)
    shortcut[:, 2:6] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), functional.relu(h + shortcut))
    block.residual = False
    torch.testing.assert_close(block(x), functional.relu(h))


def test_shapes_units_and_the_layers_that_a_person_would_name():
    model, x = ResNet(depth=14, width=4, generator=seeded()), torch.randn(6, 3, 32, 32, generator=seeded(1))
    assert model(x).shape == (6, 10)
    names = gs.gsc(model, x, probes=1).layers
    blocks = [f"stage{stage}.{number}" for stage in (1, 2, 3) for number in (0, 1)]
    assert [name for name in names if name.startswith("stage")] == blocks


def test_skip_connections_tame_the_growth():
    x = torch.randn(16, 3, 32, 32, generator=seeded(1))
    coefficients = {
        residual: gs.gsc(
            ResNet(depth=56, width=4, residual=residual, generator=seeded()), x, probes=2
        ).log10_values.max()
        for residual in ("identity", "none")
    }
    assert coefficients["none"] > coefficients["identity"] + 1


def test_the_same_generator_gives_the_same_weights():
    a, b, c = (ResNet(depth=8, width=4, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a.fc.weight, b.fc.weight) and not torch.equal(a.fc.weight, c.fc.weight)
    assert [m.bias is not None for m in ResNet(depth=8, norm="none").modules() if isinstance(m, nn.Conv2d)] == [
        True
    ] * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 18}, "depth.*18"),
        ({"residual": "yes"}, "residual.*'yes'"),
        ({"norm": "layer"}, "norm.*'layer'"),
        ({"width": 0}, "width.*0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**options)
