"""A small GPT: a causal transformer on tokens, with the variants of norm, attention and MLP that today's models use."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope import initializers
from gradscope.choices import Depth, Nonnegative, Probability, Size, check_choice, checked
from gradscope.meanfield import Transformer
from gradscope.models.layers import unfilled
from gradscope.models.mlp import ACTIVATIONS

NORMS = ("pre", "post", "none")
KINDS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
GATED = {"swiglu": nn.SiLU, "geglu": nn.GELU, "reglu": nn.ReLU}
INITS = ("lecun", "he", "xavier", "orthogonal", "gpt2")
GPT2_STD = 0.02
EPS = 1e-5


class Embedding(nn.Module):
    """``tokens[x_t] + positions[t]``: the sum of a learned vector per token and a learned vector per position."""

    def __init__(self, tokens: nn.Embedding, positions: nn.Embedding, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = tokens, positions, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T, width)."""
        length, vocabulary = self.positions.num_embeddings, self.tokens.num_embeddings
        if x.ndim != 2 or x.is_floating_point() or x.is_complex() or not 1 <= x.shape[1] <= length:
            raise ValueError(
                f"GPT needs integer tokens of shape (B, T) with T from 1 to length={length}, got {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        try:
            found = self.tokens(x)
        except IndexError as error:  # a CUDA device reports it only at its next synchronization
            raise ValueError(
                f"Tokens must be between 0 and {vocabulary - 1}, got {int(x.min())} to {int(x.max())}: set vocabulary."
            ) from error
        y: Tensor = self.dropout(found + self.positions(torch.arange(x.shape[1], device=x.device)))
        return y


class Attention(nn.Module):
    """``out(softmax(q k^T / sqrt(width / heads)) v)`` per head.  With ``norm``, q and k are normalized per head."""

    def __init__(self, width: int, heads: int, norm: type[nn.Module] | None, bias: bool, causal: bool, dropout: float):
        super().__init__()
        self.query, self.key, self.value, self.out = (unfilled(nn.Linear, width, width, bias=bias) for _ in range(4))
        self.query_norm, self.key_norm = (None if norm is None else norm(width // heads, eps=EPS) for _ in range(2))
        self.heads, self.causal, self.dropout = heads, causal, dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.query, self.key, self.value))  # (B, T, H, d)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, d)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=dropout)
        z: Tensor = self.out(y.transpose(1, 2).flatten(-2))  # (B, T, H d)
        return z


class FeedForward(nn.Module):
    """``out(phi(linear(x)))``, or ``out(phi(gate(x)) * linear(x))`` if it is gated."""

    def __init__(self, width: int, kind: str, bias: bool) -> None:
        super().__init__()
        gated = kind in GATED
        hidden = 8 * width // 3 if gated else 4 * width  # the same number of weights
        self.linear = unfilled(nn.Linear, width, hidden, bias=bias)
        self.gate = unfilled(nn.Linear, width, hidden, bias=bias) if gated else None
        self.activation = (GATED[kind] if gated else ACTIVATIONS[kind])()
        self.out = unfilled(nn.Linear, hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        h = self.linear(x)
        y: Tensor = self.out(self.activation(h) if self.gate is None else self.activation(self.gate(x)) * h)
        return y


class Block(nn.Module):
    """Attention, then MLP; each is a branch f of the stream x.

    pre: ``x + f(norm(x))``; post: ``norm(x + f(x))``; none: ``x + f(x)``.
    """

    def __init__(self, attention: Attention, mlp: FeedForward, norms: tuple[nn.Module, nn.Module], norm: str,
                 dropout: float) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.attention = norms[0], attention
        self.norm2, self.mlp = norms[1], mlp
        self.dropout, self.post = nn.Dropout(dropout), norm == "post"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        for norm, branch in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            x = norm(x + self.dropout(branch(x))) if self.post else x + self.dropout(branch(norm(x)))
        return x


class GPT(nn.Module):
    """Transformer, such as GPT-2, that returns logits of the next token at each position.

    Its layers are ``embedding``, ``blocks.0``, ..., ``norm`` (only with norm="pre") and a linear ``head``.  Each block
    has two branches, such as ``blocks.0.attention`` and ``blocks.0.mlp``.

    Arguments:
        vocabulary: Number of tokens; 256 for bytes.
        length: Largest number of positions T.
        depth, width, heads: Number of blocks, of features, and of attention heads per block.
        norm: pre (before each branch and before the head), post (after each sum) or none.
        norm_kind: layer or rms; both have learned scales, which start at 1, and eps = 1e-5.
        qk_norm: Whether to normalize queries and keys per head, with the normalization ``norm_kind``.
        mlp: An activation, as in `MLP`, with 4 * width hidden features.  Or a gated MLP (swiglu, geglu or reglu), with
            8 * width // 3 hidden features.
        residual_scale: Factor of the initial weights of each branch's last linear map; "depth" is 1 / sqrt(2 depth).
        tied: Whether the weight of the head is the token embedding.
        causal: Whether a position attends only to itself and to earlier positions.
        dropout: Probability of dropping an entry of embedding, attention weights and branches.
        init: gpt2: all weights and embeddings are Gaussian with standard deviation 0.02.  The rules lecun, he, xavier
            and orthogonal fill linear maps.  Embeddings of tokens and positions are then Gaussian with variance 1/2, so
            that their sum has mean square 1.  With ``tied``, however, these rules fill the embeddings too.
        bias: Whether linear maps and layer norms have a bias, which starts at zero.  The head never has one.  Layer
            norms of queries and keys always have one.
        generator: Source of the random weights; torch's global generator by default.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A name is unknown, a number is out of its range, or ``heads`` does not divide ``width``.

    References: Vaswani et al. (2017), arXiv:1706.03762; Radford et al. (2019), "Language models are unsupervised
    multitask learners" (GPT-2); Shazeer (2020), arXiv:2002.05202 (gated MLPs); Henry et al. (2020), arXiv:2010.04245
    (qk_norm).

    >>> model = GPT(depth=2, width=16, heads=4, length=8)
    >>> model(torch.zeros(3, 8, dtype=torch.long)).shape, [name for name, _ in model.named_children()]
    (torch.Size([3, 8, 256]), ['embedding', 'blocks', 'norm', 'head'])
    """

    @checked
    def __init__(
        self, *, vocabulary: Size = 256, length: Size = 128, depth: Depth = 6, width: Size = 128, heads: Size = 4,
        norm: str = "pre", norm_kind: str = "layer", qk_norm: bool = False, mlp: str = "gelu",
        residual_scale: Nonnegative | str = 1.0, tied: bool = False, causal: bool = True, dropout: Probability = 0.0,
        init: str = "lecun", bias: bool = False, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_choice("norm_kind", norm_kind, KINDS)
        check_choice("mlp", mlp, (*ACTIVATIONS, *GATED))
        check_choice("init", init, INITS)
        if isinstance(residual_scale, str):
            check_choice("residual_scale", residual_scale, ("depth",))
        if width % heads:
            raise ValueError(f"heads must divide width, got heads={heads} and width={width}.")
        kind = KINDS[norm_kind]
        options = {"eps": EPS} | ({"bias": bias} if kind is nn.LayerNorm else {})

        def normalization(used: bool) -> nn.Module:
            return kind(width, **options) if used else nn.Identity()

        def block() -> Block:
            attention = Attention(width, heads, kind if qk_norm else None, bias, causal, dropout)
            norms = normalization(norm != "none"), normalization(norm != "none")
            return Block(attention, FeedForward(width, mlp, bias), norms, norm, dropout)

        tokens, positions = (unfilled(nn.Embedding, rows, width) for rows in (vocabulary, length))
        self.embedding = Embedding(tokens, positions, dropout)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm = normalization(norm == "pre")
        self.head = unfilled(nn.Linear, width, vocabulary, bias=False)
        if tied:
            self.head.weight = tokens.weight
        self._fill(init, residual_scale, tied, generator)

    def _fill(self, init: str, scale: float | str, tied: bool, generator: torch.Generator | None) -> None:
        factor = 1 / math.sqrt(2 * len(self.blocks)) if isinstance(scale, str) else scale
        for name, layer in self.named_modules():
            if not isinstance(layer, nn.Linear | nn.Embedding):
                continue
            fan_in = layer.weight.shape[1]
            if init == "gpt2":
                initializers.gaussian(layer.weight, variance=GPT2_STD**2 * fan_in, generator=generator)
            elif isinstance(layer, nn.Embedding) and not tied:
                initializers.gaussian(layer.weight, variance=fan_in / 2, generator=generator)
            else:
                initializers.BY_NAME[init](layer.weight, generator=generator)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if name.endswith(".out"):
                with torch.no_grad():
                    layer.weight.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, T, vocabulary) for tokens (B, T)."""
        y: Tensor = self.head(self.norm(self.blocks(self.embedding(x))))
        return y

    @checked
    def mean_field(self, x: Tensor) -> Transformer:
        """Return the mean-field theory of an untrained network of this kind on the tokens x (B, T).

        A variance in the theory is the mean square of weights of this network, times their fan-in.  The mean square
        and correlations of embeddings are those of the tokens x in this network.  Biases, and dropout in the blocks,
        are ignored.

        >>> model = GPT(depth=2, width=64, heads=4, generator=torch.Generator().manual_seed(0))
        >>> theory = model.mean_field(torch.arange(16)[None])
        >>> theory.depth, theory.norm, round(theory.hidden_variance, 1)
        (2, 'pre', 1.0)
        """
        with torch.no_grad():
            embedded = self.embedding(x).double()
        kernel = (embedded @ embedded.mT).mean(dim=0) / embedded.shape[-1]
        length = kernel.diagonal().sqrt()
        block: Any = self.blocks[0]
        attention, mlp = block.attention, block.mlp

        def variance(*names: str) -> float:
            """The product of the mean squares of these weights in all blocks, times their numbers of inputs."""
            found = 1.0
            for name in names:
                weights = torch.stack([each.get_parameter(f"{name}.weight").detach().double() for each in self.blocks])
                found *= float(weights.square().mean()) * weights.shape[-1]
            return found

        plain = attention.query_norm is None
        return Transformer(
            depth=len(self.blocks), width=embedded.shape[-1], length=x.shape[1],
            activation=next(name for name, kind in ACTIVATIONS.items() if type(mlp.activation) is kind),
            gated=mlp.gate is not None,
            norm="post" if block.post else "none" if isinstance(block.norm1, nn.Identity) else "pre",
            norm_kind="rms" if isinstance(block.norm1, nn.RMSNorm) else "layer", causal=attention.causal,
            score_variance=variance("attention.query", "attention.key") if plain else 1.0,
            value_variance=variance("attention.value", "attention.out"), hidden_variance=variance("mlp.linear"),
            output_variance=variance("mlp.out"), outputs=self.head.out_features,
            mean_square=float(kernel.diagonal().mean()), overlap=(kernel / torch.outer(length, length)).numpy(),
        )  # fmt: skip
