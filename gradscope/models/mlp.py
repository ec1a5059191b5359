"""Plain and residual multilayer perceptrons in which each layer is one module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gradscope import initializers
from gradscope.choices import Depth, Finite, Nonnegative, Size, check_choice, checked
from gradscope.models.layers import unfilled

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "batch": partial(nn.BatchNorm1d, affine=False),
    "layer": partial(nn.LayerNorm, elementwise_affine=False),
}
RESIDUALS = ("none", "identity")
INITS = ("auto", *initializers.BY_NAME)


class Layer(nn.Module):
    """``phi(norm(W x))``: a linear map, a normalization without affine parameters, and an activation."""

    def __init__(self, linear: nn.Linear, activation: str, norm: str) -> None:
        super().__init__()
        self.linear = linear
        make_norm = NORMS[norm]
        self.norm = make_norm(linear.out_features) if make_norm else None
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        h = self.linear(x)
        y: Tensor = self.activation(h if self.norm is None else self.norm(h))
        return y


class Block(Layer):
    """``skip_weight * x + V phi(norm(W x))``, where W is ``linear`` and V is ``out``.

    The branch ends in a random linear map, so the mean of phi points in a different direction in each block.
    """

    def __init__(self, linear: nn.Linear, out: nn.Linear, activation: str, norm: str, skip_weight: float) -> None:
        super().__init__(linear, activation, norm)
        self.out, self.skip_weight = out, skip_weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        y: Tensor = self.skip_weight * x + self.out(super().forward(x))
        return y


class MLP(nn.Module):
    """Perceptron with ``depth`` layers f_l = phi(norm(W_l f_{l-1})) of equal width, or with residual blocks.

    A residual block is f_l = skip_weight f_{l-1} + V_l phi(norm(W_l f_{l-1})).  phi is the activation.  ``layers``
    holds one module per layer or block.  ``head`` is a linear map that exists only if ``out_features`` is given.
    ``stem`` is a linear map that exists only in residual networks whose ``in_features`` is not ``width``.

    Arguments:
        depth, width: Number of layers or blocks, and their number of features.
        activation: linear, relu, leaky_relu, elu, selu, gelu, silu, tanh or sigmoid.
        norm: Normalization of the pre-activations, without affine parameters: none, batch or layer; eps is 1e-5.
        residual: none or identity.
        skip_weight: Factor of the skip connection.
        init: Initializer of W: auto (see `gradscope.initializers.auto`), he, lecun, xavier, orthogonal or looks_linear.
            No activation follows V, stem and head: they use orthogonal if ``init`` is orthogonal, otherwise lecun.
            The one exception is the head with looks_linear: it uses looks_linear too.
        weight_variance: sigma_w^2, instead of ``init``: W is Gaussian with variance sigma_w^2 / fan_in.
        bias: Whether linear maps have a bias, which starts at zero.
        bias_variance: sigma_b^2; if positive, biases before an activation start as Gaussian numbers of this variance.
        in_features: Features of a sample, which the network flattens first; ``width`` by default.
        out_features: Features of the head; no head by default.
        generator: Source of the random weights; torch's global generator by default.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A name is unknown, a number is out of its range, or arguments contradict each other (looks_linear
            needs ReLU, no norm, no skip connections and an even width).

    >>> model = MLP(depth=3, width=8, activation="tanh", norm="layer", in_features=5, out_features=2)
    >>> model(torch.zeros(4, 5)).shape, [name for name, _ in model.layers.named_children()]
    (torch.Size([4, 2]), ['0', '1', '2'])
    """

    @checked
    def __init__(
        self, *, depth: Depth, width: Size, activation: str = "relu", norm: str = "none", residual: str = "none",
        skip_weight: Finite = 1.0, init: str = "auto", weight_variance: Nonnegative | None = None, bias: bool = False,
        bias_variance: Nonnegative = 0.0, in_features: Size | None = None, out_features: Size | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("norm", norm, NORMS)
        check_choice("residual", residual, RESIDUALS)
        check_choice("init", init, INITS)
        in_features = width if in_features is None else in_features
        mirrored = init == "looks_linear"
        if mirrored and (activation != "relu" or norm != "none" or residual != "none" or width % 2):
            raise ValueError(
                "init='looks_linear' needs activation='relu', norm='none', residual='none' and an even width, got "
                f"activation={activation!r}, norm={norm!r}, residual={residual!r}, width={width}."
            )
        if bias_variance and not bias:
            raise ValueError(f"bias_variance={bias_variance!r} needs bias=True.")
        if weight_variance is not None and init != "auto":
            raise ValueError(f"weight_variance and init both set the weights; leave one out, got init={init!r}.")
        inner = initializers.auto(activation) if init == "auto" else initializers.BY_NAME[init]
        if weight_variance is not None:
            inner = partial(initializers.gaussian, variance=weight_variance)
        linear = initializers.orthogonal if init == "orthogonal" else initializers.lecun

        def make(n_in: int, n_out: int, fill: initializers.Initializer, *, activated: bool = False) -> nn.Linear:
            layer = unfilled(nn.Linear, n_in, n_out, bias=bias)
            fill(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
                if bias_variance and activated:
                    initializers.gaussian(layer.bias[:, None], variance=bias_variance, generator=generator)
            return layer

        self.in_features = in_features
        self.stem = None
        layers: list[nn.Module] = []
        if residual == "identity":
            if in_features != width:
                self.stem = make(in_features, width, linear)
            for _ in range(depth):
                inside, out = make(width, width, inner, activated=True), make(width, width, linear)
                layers.append(Block(inside, out, activation, norm, skip_weight))
        else:
            for number in range(depth):
                fill = partial(inner, mirror_input=number > 0) if mirrored else inner
                linear_map = make(in_features if number == 0 else width, width, fill, activated=True)
                layers.append(Layer(linear_map, activation, norm))
        self.layers = nn.Sequential(*layers)
        last = partial(initializers.looks_linear, mirror_output=False) if mirrored else linear
        self.head = None if out_features is None else make(width, out_features, last)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width), or (B, out_features) if there is a head, for inputs (B, ...)."""
        if x.ndim < 2:
            raise ValueError(f"MLP needs a batch of shape (B, ...), got {tuple(x.shape)}.")
        x = x.flatten(1)
        if x.shape[1] != self.in_features:
            raise ValueError(f"This MLP needs {self.in_features} features per sample, got {x.shape[1]}.")
        if self.stem is not None:
            x = self.stem(x)
        x = self.layers(x)
        return x if self.head is None else self.head(x)
