"""Small networks of every build, in float64, each with its data and the rows that a person would name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gradscope as gs

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: models come from configs, nothing is downloaded


@dataclass(frozen=True)
class Specimen:
    """A model, a batch, and the rows of its default profile; ``forward`` as in `gradscope.gsc`.

    ``rtol``: how exact a profile can be; less where the model itself rounds to float32 on its way.
    """

    model: nn.Module
    data: Any
    rows: tuple[str, ...]
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    rtol: float = 1e-8


Builder = Callable[[], Specimen]
SMALL: dict[str, Builder] = {}
SINGLE: dict[str, Builder] = {}
TRANSFORMERS: dict[str, Builder] = {}


def named(shelf: dict[str, Builder], name: str) -> Callable[[Builder], Builder]:
    """Put a builder on a shelf, in float64, in eval mode and from one seed."""

    def put(build: Builder) -> Builder:
        def built() -> Specimen:
            torch.manual_seed(0)
            return build()

        shelf[name] = built
        return built

    return put


def specimen(model: nn.Module, data: Any, rows: str, **options: Any) -> Specimen:
    return Specimen(model.double().eval(), data, tuple(rows.split()), **options)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens(*shape: int, vocabulary: int = 7) -> Tensor:
    return torch.randint(vocabulary, shape)


# ---- networks, written small ----------------------------------------------------------------------------------------


class DenseNet(nn.Module):
    """Every layer of a block reads all layers before it, so only the transitions between blocks are cut vertices."""

    def __init__(self, growth: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for _ in range(2):
            self.blocks.append(nn.ModuleList(self.layer(growth * (i + 1), growth) for i in range(3)))
            self.transitions.append(nn.Sequential(nn.Conv2d(4 * growth, growth, 1), nn.AvgPool2d(2)))
        self.norm = nn.BatchNorm2d(growth)
        self.head = nn.Linear(growth, 3)

    @staticmethod
    def layer(channels: int, growth: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, growth, 3, padding=1))

    def forward(self, x):
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            for layer in block:
                x = torch.cat([x, layer(x)], dim=1)
            x = transition(x)
        return self.head(self.norm(x).relu().mean((2, 3)))


class UNet(nn.Module):
    """Skips run from the way down to the way up, so hardly anything but the ends is a cut vertex."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(width * 2**i, width * 2 ** (i + 1), 3, 2, 1) for i in range(2))
        self.middle = nn.Conv2d(width * 4, width * 4, 3, padding=1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(width * 2 ** (i + 1), width * 2**i, 2, 2) for i in (1, 0))
        self.merge = nn.ModuleList(nn.Conv2d(width * 2 ** (i + 1), width * 2**i, 3, padding=1) for i in (1, 0))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        x = nn.functional.silu(self.stem(x))
        skips = []
        for down in self.down:
            skips.append(x)
            x = nn.functional.silu(down(x))
        x = nn.functional.silu(self.middle(x))
        for up, merge in zip(self.up, self.merge, strict=True):
            x = nn.functional.silu(merge(torch.cat([up(x), skips.pop()], dim=1)))
        return self.head(x)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.within = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x):
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(4, 6), MixerBlock(4, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


class Recurrent(nn.Module):
    """A classifier of sequences that reads the last step."""

    def __init__(self, cell: type[nn.RNNBase]):
        super().__init__()
        self.inp = nn.Linear(3, 5)
        self.rnn = cell(5, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(self.inp(x))[0][:, -1])


class Experts(nn.Module):
    """Each token goes to one expert, which the data chooses; some experts may stay without work."""

    def __init__(self, width: int, num: int):
        super().__init__()
        self.gate = nn.Linear(width, num)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)) for _ in range(num)
        )

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            out[mine] = weights[mine, None] * expert(x[mine])
        return x + out


class MixtureOfExperts(nn.Module):
    def __init__(self, num_experts: int):
        super().__init__()
        self.inp = nn.Linear(3, 6)
        self.layers = nn.ModuleList(Experts(6, num_experts) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ResidualBlock(nn.Module):
    """Pre-activation (the sum is the output) or post-activation (the sum is rectified in place)."""

    def __init__(self, channels: int, out: int, pre: bool):
        super().__init__()
        self.pre = pre
        self.bn1, self.bn2 = nn.BatchNorm2d(channels if pre else out), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(channels, out, 3, out // channels, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, 2, bias=False), nn.BatchNorm2d(out))
            if out != channels
            else nn.Identity()
        )

    def forward(self, x):
        if self.pre:
            return self.downsample(x) + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        h += self.downsample(x)
        return self.relu(h)


class ResNet(nn.Module):
    def __init__(self, pre: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(ResidualBlock(4, 4, pre), ResidualBlock(4, 4, pre))
        self.layer2 = nn.Sequential(ResidualBlock(4, 8, pre), ResidualBlock(8, 8, pre))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.pool(self.layer2(self.layer1(self.conv1(x)))).flatten(1))


class AttentionBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h)[0]


class Attentive(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.inp = nn.Linear(3, width)
        self.blocks = nn.ModuleList(AttentionBlock(width) for _ in range(2))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class EncoderClassifier(nn.Module):
    def __init__(self, norm_first: bool, dropout: float = 0.1):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True, norm_first=norm_first)
        self.inp = nn.Linear(3, 4)
        self.encoder = nn.TransformerEncoder(layer, 3, nn.LayerNorm(4), enable_nested_tensor=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(self.inp(x)))


class Decoder(nn.Module):
    """Every layer reads the memory, so with the memory as an input only the last layer is a cut vertex."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(3, 4)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 3, nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x, memory):
        return self.head(self.decoder(self.inp(x), memory))


@named(SMALL, "DenseNet")
def _():
    return specimen(DenseNet(), noise(2, 3, 8, 8), "input stem transitions.0 transitions.1 norm head")


@named(SMALL, "U-Net")
def _():
    return specimen(UNet(), noise(2, 2, 8, 8), "input stem merge.1 head")


@named(SMALL, "Mixer")
def _():
    return specimen(Mixer(), noise(2, 3, 8, 8), "input patches blocks.0 blocks.1 norm head")


@named(SMALL, "LSTM")
def _():
    return specimen(Recurrent(nn.LSTM), noise(3, 4, 3), "input inp rnn head")


@named(SMALL, "GRU")
def _():
    return specimen(Recurrent(nn.GRU), noise(3, 4, 3), "input inp rnn head")


@named(SMALL, "mixture of experts")
def _():
    return specimen(MixtureOfExperts(3), noise(4, 5, 3), "input inp layers.0 layers.1 layers.2 head")


@named(SMALL, "mixture of experts, some without work")
def _():
    return specimen(MixtureOfExperts(8), noise(2, 2, 3), "input inp layers.0 layers.1 layers.2 head")


@named(SMALL, "pre-activation ResNet")
def _():
    rows = "input conv1 layer1.0 layer1.1 layer2.0 layer2.1 pool fc"
    return specimen(ResNet(pre=True), noise(2, 3, 8, 8), rows)


@named(SMALL, "post-activation ResNet")
def _():
    rows = "input conv1 layer1.0 layer1.1 layer2.0 layer2.1 pool fc"
    return specimen(ResNet(pre=False), noise(2, 3, 8, 8), rows)


@named(SMALL, "nn.MultiheadAttention")
def _():
    return specimen(Attentive(), noise(2, 3, 3), "input inp blocks.0 blocks.1 head")


ENCODER = "input inp encoder.layers.0 encoder.layers.1 encoder.layers.2 encoder.norm head"


@named(SMALL, "nn.TransformerEncoder, norm first")
def _():
    return specimen(EncoderClassifier(norm_first=True), noise(2, 3, 3), ENCODER)


@named(SMALL, "nn.TransformerEncoder, norm last")
def _():
    return specimen(EncoderClassifier(norm_first=False), noise(2, 3, 3), ENCODER)


@named(SMALL, "nn.TransformerDecoder, memory as an input")
def _():
    data = {"x": noise(2, 3, 3), "memory": noise(2, 2, 4)}
    return specimen(Decoder(), data, "decoder.layers.2 decoder.norm head")


@named(SMALL, "nn.TransformerDecoder, memory held fixed")
def _():
    memory = noise(2, 2, 4)
    rows = "input inp decoder.layers.0 decoder.layers.1 decoder.layers.2 decoder.norm head"
    return specimen(Decoder(), noise(2, 3, 3), rows, forward=lambda model, x: model(x, memory))


# ---- transformers, from tiny configs with random weights -------------------------------------------------------------


def under(prefix: str, names: str) -> str:
    return " ".join(f"{prefix}.{name}" for name in names.split())


def image_model(name: str, rows: str, size: int, batch: int = 2, **config: Any) -> Specimen:
    """The image classifier of ``transformers`` of that name."""
    import transformers

    options = getattr(transformers, f"{name}Config")(num_labels=3, **config)
    model = getattr(transformers, f"{name}ForImageClassification")(options)
    return specimen(model, noise(batch, 3, size, size), rows)


def language_model(name: str, kind: str, rows: str, **config: Any) -> Specimen:
    """The language model of ``transformers`` of that name, fed with tokens."""
    import transformers

    options = getattr(transformers, f"{name}Config")(vocab_size=7, **config)
    model = getattr(transformers, f"{name}{kind}")(options)
    data = {"input_ids": tokens(2, 4)}
    if kind == "ForConditionalGeneration":
        data["decoder_input_ids"] = tokens(2, 3)
    return specimen(model, data, rows, rtol=1e-6 if name == "Mamba" else 1e-8)  # Mamba returns float32


@named(TRANSFORMERS, "ResNet")
def _():
    blocks = under("resnet.encoder.stages", "0.layers.0 0.layers.1 1.layers.0 1.layers.1")
    rows = f"input resnet.embedder {blocks} resnet.pooler classifier"
    return image_model(
        "ResNet", rows, 32, embedding_size=4, hidden_sizes=[8, 16], depths=[2, 2], layer_type="bottleneck"
    )


@named(TRANSFORMERS, "ConvNeXt")
def _():
    blocks = under("convnext.encoder.stages", "0 1.downsampling_layer.0 1.downsampling_layer.1 1.layers.0 1.layers.1")
    rows = f"input convnext.embeddings {blocks} convnext.layernorm classifier"
    return image_model(
        "ConvNext", rows, 16, hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, layer_scale_init_value=0.5
    )


@named(TRANSFORMERS, "MobileNetV2")
def _():
    blocks = under("mobilenet_v2.layer", " ".join(map(str, range(16))))
    rows = f"input mobilenet_v2.conv_stem {blocks} mobilenet_v2.conv_1x1 mobilenet_v2.pooler classifier"
    return image_model("MobileNetV2", rows, 32, depth_multiplier=0.1, output_stride=8)


VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@named(TRANSFORMERS, "ViT")
def _():
    rows = "input vit.embeddings vit.layers.0 vit.layers.1 vit.layernorm classifier"
    return image_model("ViT", rows, 16, image_size=16, patch_size=8, **VIT)


@named(TRANSFORMERS, "Swin")
def _():
    blocks = under("swin.encoder.layers", "0.blocks.0 0.blocks.1 0.downsample 1.blocks.0 1.blocks.1")
    rows = f"input swin.embeddings {blocks} swin.layernorm swin.pooler classifier"
    return image_model(
        "Swin", rows, 16, image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2
    )


@named(TRANSFORMERS, "GPT-2")
def _():
    rows = "transformer.wte transformer.drop transformer.h.0 transformer.h.1 transformer.ln_f lm_head"
    return language_model(
        "GPT2", "LMHeadModel", rows, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )


@named(TRANSFORMERS, "BERT")
def _():
    rows = "bert.embeddings bert.encoder.layer.0 bert.encoder.layer.1 bert.pooler classifier"
    return language_model("Bert", "ForSequenceClassification", rows, max_position_embeddings=8, num_labels=3, **VIT)


@named(TRANSFORMERS, "T5")
def _():
    rows = "decoder.block.1 decoder.final_layer_norm lm_head"
    return language_model("T5", "ForConditionalGeneration", rows, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)


@named(TRANSFORMERS, "Llama")
def _():
    rows = "model.embed_tokens model.layers.0 model.layers.1 model.norm lm_head"
    return language_model("Llama", "ForCausalLM", rows, num_key_value_heads=1, **VIT)


@named(TRANSFORMERS, "Mamba")
def _():
    sizes = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 3, "time_step_rank": 2}
    rows = "backbone.embeddings backbone.layers.0 backbone.layers.1 backbone.norm_f lm_head output"
    return language_model("Mamba", "ForCausalLM", rows, **sizes)


@named(TRANSFORMERS, "T5 encoder")
def _():
    rows = "encoder.embed_tokens encoder.block.0 encoder.block.1 encoder.final_layer_norm"
    return language_model("T5", "EncoderModel", rows, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)


@named(TRANSFORMERS, "BERT, embedded outside")
def _():
    bert = TRANSFORMERS["BERT"]()
    return specimen(bert.model, {"inputs_embeds": noise(2, 4, 8)}, " ".join(("input", *bert.rows)))


@named(TRANSFORMERS, "BERT, with a mask")
def _():
    bert = TRANSFORMERS["BERT"]()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    return specimen(bert.model, {**bert.data, "attention_mask": mask}, " ".join(bert.rows))


@named(TRANSFORMERS, "Llama, frozen but for adapters")
def _():
    llama = TRANSFORMERS["Llama"]()
    for name, parameter in llama.model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    return specimen(llama.model, llama.data, " ".join(llama.rows[1:]))


# ---- single constructs -----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two layers, for constructs to be put between them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.between(self.first(x)))

    def between(self, h):
        return h.tanh()


def construct(name: str, rows: str, *shape: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Show a module class, fed with noise of that shape (default: (3, 4))."""

    def show(cls: type[nn.Module]) -> type[nn.Module]:
        named(SINGLE, name)(lambda: specimen(cls(), noise(*(shape or (3, 4))), rows))
        return cls

    return show


@construct("in place through a view", "input first last")
class ThroughView(Pair):
    def between(self, h):
        gate = h[:, 2:].sigmoid()
        h.view(-1, 2, 2)[:, 0].mul_(gate)
        h[:, 3] = h[:, 2] + 1
        return h.tanh()


@construct("read before it is overwritten", "input first last")
class Overwritten(Pair):
    def between(self, h):
        kept = h.exp()  # the backward of exp keeps its result, not h
        h.add_(1).relu_()
        return h + kept


@construct("parts of a tensor in another order", "input first last")
class Parts(Pair):
    def between(self, h):
        left, right = h.chunk(2, 1)
        a, b = right.split(1, 1)
        return torch.cat([b, 2 * left, a.exp()], 1)


class Returns(nn.Module):
    """Returns its result packed in something."""

    def __init__(self, pack: Callable[[Tensor], Any]):
        super().__init__()
        self.linear, self.pack = nn.Linear(4, 4), pack

    def forward(self, x):
        return self.pack(self.linear(x).tanh())


@dataclass
class Packed:
    """What a module may return."""

    hidden: Tensor
    note: str = "not a tensor"


@construct("tuple, dict and dataclass inside", "input one two three last")
class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = Returns(lambda h: (torch.tensor(3), [h], None))
        self.two = Returns(lambda h: {"mask": h > 0, "h": h})
        self.three = Returns(Packed)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        h = self.one(x)[1][0]
        h = self.two(h)["h"]
        return self.last(self.three(h).hidden)


@construct("dataclass as the output", "input first last")
class ReturnsDataclass(Pair):
    def forward(self, x):
        return Packed(super().forward(x))


@construct("first layer frozen", "input first last")
class FrozenFirst(Pair):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)


@construct("a tap in a loop", "input first step step#2 step#3 last")
class TappedLoop(Pair):
    def between(self, h):
        for _ in range(3):
            h = gs.tap((1.5 * h).tanh(), "step")
        return h


@construct("modules called through .forward()", "input output")
class Unhooked(Pair):
    def forward(self, x):
        return self.last.forward(self.first.forward(x).tanh())


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return (x @ self.weight).tanh()


@construct("modules of parameters alone", "input 0 1 2")
class Bares(nn.Sequential):
    def __init__(self):
        super().__init__(Bare(), Bare(), Bare())


@construct("a module in two containers", "input one.0 one.1 one.0#2 two last")
class InTwoContainers(Pair):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(self.first, nn.Tanh())
        self.two = nn.Sequential(self.first, nn.Tanh())
        del self.first

    def forward(self, x):
        return self.last(self.two(self.one(x)))


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, depth=2):
        return self.linear(self(x, depth - 1) if depth else x).tanh()


@construct("a module that calls itself", "input first inner inner#2 inner#3 last")
class CallsItself(Pair):
    def __init__(self):
        super().__init__()
        self.inner = Recursive()

    def between(self, h):
        return self.inner(h)


@construct("checkpointed, with dropout", "input first block last")
class Checkpointed(Pair):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh())

    def between(self, h):
        return checkpoint(self.block, h, use_reentrant=False)


@construct("random numbers drawn in forward", "input first noisy last")
class Noisy(Pair):
    def __init__(self):
        super().__init__()
        self.noisy = nn.RReLU()

    def between(self, h):
        return self.noisy(h) * torch.rand_like(h)


@construct("vmap over an ensemble", "input first last")
class Ensemble(Pair):
    def __init__(self):
        super().__init__()
        self.member, self.weights = nn.Linear(4, 4, bias=False), nn.Parameter(torch.randn(3, 4, 4))

    def between(self, h):
        def call(weight):
            return torch.func.functional_call(self.member, {"weight": weight}, (h,))

        return torch.vmap(call)(self.weights).mean(0).tanh()


@construct("a gradient as the output", "input first output")
class Force(Pair):
    def forward(self, x):
        return torch.autograd.grad(super().forward(x).square().sum(), x, create_graph=True)[0]


class Fourier(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x)


@construct("complex numbers inside", "input first fourier last")
class ThroughFourier(Pair):
    def __init__(self):
        super().__init__()
        self.fourier = Fourier()

    def between(self, h):
        return self.fourier(h).abs()


@construct("packed sequence", "input first rnn last", 2, 4, 4)
class PackedSequence(Pair):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def between(self, h):
        h, _ = self.rnn(nn.utils.rnn.pack_padded_sequence(h, torch.tensor([4, 2]), batch_first=True))
        return nn.utils.rnn.pad_packed_sequence(h, batch_first=True)[0]


@construct("weight and spectral normalization", "input first last")
class Reparametrized(Pair):
    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(self.first)
        self.last = nn.utils.parametrizations.spectral_norm(self.last)


@construct("a hook of the user's own", "input first last")
class UserHook(Pair):
    def __init__(self):
        super().__init__()
        self.first.register_forward_hook(lambda module, args, out: 2 * out)


@construct("positions from an embedding", "input first layers.0 layers.1 last", 2, 3, 4)
class Positions(Pair):
    """The embedding is fed with integers, but not with the data's."""

    def __init__(self):
        super().__init__()
        self.position = nn.Embedding(3, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def between(self, h):
        h = h + self.position(torch.arange(h.shape[1]))
        for layer in self.layers:
            h = layer(h)
        return h


@construct("weights that another module makes of the data", "input first body last")
class Hypernetwork(Pair):
    def __init__(self):
        super().__init__()
        self.body, self.maker = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 16)

    def between(self, h):
        return torch.func.functional_call(self.body, {"0.weight": self.maker(h.mean(0)).view(4, 4)}, (h,))


@construct("samples folded into the groups of a convolution", "input first last")
class Folded(Pair):
    """The leading dimension is 1 in the middle, as in modulated convolutions."""

    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(3, 4, 3)), nn.Linear(15, 2)

    def between(self, h):
        kernels = (self.weight * h.sigmoid()[:, None, :, None]).reshape(-1, 4, 3)
        signal = (h[:, :, None] * torch.linspace(1, 2, 5, dtype=h.dtype)).reshape(1, -1, 5)
        return functional.conv1d(signal, kernels, padding=1, groups=len(h)).reshape(len(h), 15).tanh()


@construct("a fixed point, with a hook that solves for its gradient", "input first last")
class Equilibrium(Pair):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.cell.weight.data *= 0.4

    def step(self, z, h):
        return torch.tanh(self.cell(z) + h)

    def between(self, h):
        z = torch.zeros_like(h)
        with torch.no_grad():
            for _ in range(30):
                z = self.step(z, h)
        start = z.clone().requires_grad_()
        again = self.step(start, h.detach())

        def solve(gradient):
            found = gradient
            for _ in range(30):
                found = torch.autograd.grad(again, start, found, retain_graph=True)[0] + gradient
            return found

        z = self.step(z, h)
        z.register_hook(solve)
        return z


@construct("rounding with a straight-through gradient, in a range that every pass moves", "input first last")
class Rounding(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.ones(()))

    def between(self, h):
        with torch.no_grad():
            self.largest.lerp_(h.abs().max(), 0.5)
        scale = self.largest / 8
        return h.clamp(-self.largest, self.largest) + ((h / scale).round() * scale - h).detach()


class Conditioned(nn.Module):
    """Every layer reads the embedding of a class."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, label):
        for layer in self.layers:
            x = (layer(x) * self.label(label)).tanh()
        return x


@named(SINGLE, "conditioned on a class, which is held fixed")
def _():
    label = tokens(3, vocabulary=5)
    rows = "input layers.0 layers.1 layers.2 output"
    return specimen(Conditioned(), noise(3, 4), rows, forward=lambda model, x: model(x, label))


@named(SINGLE, "embedding tied to the head")
def _():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7, bias=False))
    model[3].weight = model[0].weight
    return specimen(model, tokens(2, 3), "0 1 2 3")


class TimeFirst(nn.Module):
    """Samples influence each other where they are not the leading dimension."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.up, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.embedding(x.T)
        h = self.mix(h - h.mean(1, keepdim=True)).tanh()
        return self.head(self.up(h.transpose(0, 1)).tanh())


@named(SINGLE, "coupled below, time first")
def _():
    return specimen(TimeFirst(), tokens(3, 5), "embedding mix up head")


class Siamese(Pair):
    def forward(self, a, b):
        return self.last((self.first(a) - self.first(b)).abs())


@named(SINGLE, "two inputs through one module")
def _():
    return specimen(Siamese(), {"a": noise(3, 4), "b": noise(3, 4)}, "last")
