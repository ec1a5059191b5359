"""Which rows a default profile has."""

import pytest
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


# ---- residual blocks, stages, and layers that are pairs --------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class OtherResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.act = nn.Linear(4, 4), nn.Sigmoid()

    def forward(self, x):
        return x - self.act(self.inner(x))


class LinearNorm(nn.Sequential):
    def __init__(self, *more):
        super().__init__(nn.Linear(4, 4), nn.LayerNorm(4), *more)


class Stage(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.down, self.blocks = nn.Linear(4, 4), nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.down(x))


class Merge(nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.c1, self.act, self.c2 = pair(), nn.ReLU(), pair()

    def forward(self, x):
        return self.c2(self.act(self.c1(x)))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """Returns its last hidden state, and all of them if asked to."""

    def __init__(self, returns, block=Residual):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(block() for _ in range(3)), nn.LayerNorm(4)
        self.returns = returns

    def forward(self, x):
        hidden = [x]
        for layer in self.layers:
            x = layer(x)
            hidden.append(x)
        return self.returns(self.norm(x), hidden)


class Encoded(nn.Module):
    def __init__(self, returns, pick, block=Residual):
        super().__init__()
        self.stem, self.encoder, self.head = nn.Linear(4, 4), Encoder(returns, block), nn.Linear(4, 2)
        self.pick = pick

    def forward(self, x):
        return self.head(self.pick(self.encoder(self.stem(x))))


@pytest.mark.parametrize(
    ("returns", "pick"),
    [
        (lambda last, hidden: last, lambda out: out),
        (lambda last, hidden: (last, hidden), lambda out: out[0]),
        (lambda last, hidden: (tuple(hidden), last), lambda out: out[1]),
        (lambda last, hidden: {"hidden": hidden, "last": last}, lambda out: out["last"]),
    ],
    ids=["one tensor", "last first", "last at the end", "dict"],
)
def test_hidden_states_that_a_model_returns_are_the_blocks(returns, pick):
    rows = "input stem encoder.layers.0 encoder.layers.1 encoder.layers.2 encoder.norm head"
    assert names(Encoded(returns, pick), X) == rows.split()


def test_hidden_states_that_the_root_returns():
    model = Encoder(lambda last, hidden: (last, [2 * h for h in hidden], hidden))
    assert names(model, X) == "input layers.0 layers.1 layers.2 norm".split()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_sum_that_a_module_passes_on_keeps_its_name_among_hidden_states(hidden):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.drop, self.block, self.head = nn.Linear(4, 4), nn.Dropout(), Residual(), nn.Linear(4, 2)

        def forward(self, x):
            h = self.drop(x + self.token(x))
            y = self.head(self.block(h))
            return (y, h) if hidden else y

    assert names(Model().eval(), X) == "input drop block head".split()


def test_a_block_that_also_returns_a_tensor_on_the_way():
    class TwoOutputs(Residual):
        def forward(self, x):
            h = torch.tanh(x)
            return super().forward(h), h

    model = Encoded(lambda last, hidden: last, lambda out: out, lambda: First(TwoOutputs()))
    rows = "input stem encoder.layers.0 encoder.layers.1 encoder.layers.2 encoder.norm head"
    assert names(model, X) == rows.split()


class First(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


@pytest.mark.parametrize(
    "pair", [LinearNorm, lambda: LinearNorm(nn.ReLU()), lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))],
    ids=["pair", "triple", "plain Sequential"],
)  # fmt: skip
def test_a_pair_inside_a_module_does_not_open_it(pair):
    model = nn.Sequential(nn.Sequential(Residual(), Residual()), Merge(pair), nn.Linear(4, 2))
    assert names(model, X) == "input 0.0 0.1 1 2".split()


def test_a_pair_is_one_row_among_blocks_and_in_the_root():
    features = nn.Sequential(LinearNorm(nn.ReLU()), Merge(LinearNorm), Merge(LinearNorm), LinearNorm(nn.ReLU()))
    model = nn.Sequential(features, nn.Linear(4, 2))
    assert names(model, X) == "input 0.0 0.1 0.2 0.3 1".split()
    assert names(LinearNorm(nn.ReLU()), X) == "input 0 1 2".split()  # the root is always open


def test_a_subclass_of_sequential_with_several_layers_is_a_container_or_a_block():
    class Deep(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())

    assert names(nn.Sequential(Deep(), nn.Linear(4, 2)), X) == "input 0.0 0.1 0.2 0.3 1".split()
    assert names(nn.Sequential(nn.Sequential(Deep(), Deep()), nn.Linear(4, 2)), X) == "input 0.0 0.1 1".split()


@pytest.mark.parametrize("other", [OtherResidual, type("Same", (Residual,), {})], ids=["other class", "subclass"])
def test_a_stage_of_unequal_blocks_opens_like_its_neighbors(other):
    stages = Stage(Residual(), Residual()), Stage(Residual(), other()), Stage(other(), Residual(), Residual())
    expected = (
        "input 0.down 0.blocks.0 0.blocks.1 1.down 1.blocks.0 1.blocks.1 2.down 2.blocks.0 2.blocks.1 2.blocks.2 3"
    )
    assert names(nn.Sequential(*stages, nn.Linear(4, 2)), X) == expected.split()


def test_a_module_whose_containers_lie_in_branches_keeps_its_name():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
            self.root = Merge(lambda: nn.Linear(4, 4))

        def forward(self, x):
            return self.root(x + self.project(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.level, self.head = Tree(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.level(x))

    assert names(Net(), X) == "input level head".split()


# ---- blocks that functional code makes one row -----------------------------------------------------------------------


class Sums(nn.Module):
    def __init__(self, tap=False, shared=False):
        super().__init__()
        blocks = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()) for _ in range(1 if shared else 3)]
        self.blocks, self.norm, self.tap = nn.ModuleList(blocks), nn.LayerNorm(4), tap

    def forward(self, x):
        for number in range(3):
            x = x + self.blocks[number % len(self.blocks)](x)
            x = gs.tap(x, "sum") if self.tap else x
        return self.norm(x)


class AroundSums(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 4), Sums(**options), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


@pytest.mark.parametrize(
    ("shared", "blocks"),
    [
        (False, "body.blocks.0, body.blocks.1, body.blocks.2"),
        (True, "body.blocks.0, body.blocks.0#2, body.blocks.0#3"),
    ],
)
def test_functional_sums_that_make_blocks_one_row_are_named(shared, blocks):
    captured = gs.capture(AroundSums(shared=shared), X)
    assert [layer.name for layer in captured.units] == "input stem body head".split()
    (remark,) = captured.remarks
    assert f"joins {blocks}, so together they are one row, 'body'." in remark
    assert remark in str(captured.describe()) and remark in gs.gsc(AroundSums(shared=shared), X).remarks
    assert gs.capture(AroundSums(shared=shared), X, layers=["stem", "head"]).remarks == ()


def test_marked_sums_and_parallel_branches_have_no_remark():
    assert names(AroundSums(tap=True), X) == "input stem sum sum#2 sum#3 body head".split()
    assert gs.capture(AroundSums(tap=True), X).remarks == ()

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.head = nn.ModuleList(Residual() for _ in range(3)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(sum(expert(x) for expert in self.experts))

    assert gs.capture(Experts(), X).remarks == ()


def test_sums_inside_a_block_have_no_remark():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Sums(), Sums()), nn.Linear(4, 2))
    captured = gs.capture(model, X)
    assert [layer.name for layer in captured.units] == "input 0 1.0 1.1 2".split()
    assert captured.remarks == ()


def test_blocks_beside_other_paths_are_named():
    class Both(nn.Module):
        """Encoder and decoder, which both see x."""

        def __init__(self):
            super().__init__()
            self.both = nn.Transformer(
                4, 2, num_encoder_layers=3, num_decoder_layers=2, dim_feedforward=8, batch_first=True
            )

        def forward(self, x):
            return self.both(x, x)

    model, x = Both().eval(), torch.randn(3, 2, 4)
    captured = gs.capture(model, x)
    blocks = "both.encoder.layers.0, both.encoder.layers.1, both.encoder.layers.2, both.decoder.layers.0"
    assert any(f"avoids each of them: {blocks}. " in remark for remark in captured.remarks)
    assert "both.decoder.layers.1" in [layer.name for layer in captured.units]
    for chosen in (gs.gsc(model, x, layers="both.encoder.*"), gs.gsc_matrix(model, x, layers="both.decoder")):
        assert not any("avoids each of them" in remark for remark in chosen.remarks)
