"""Plain and residual multilayer perceptrons whose every layer is one module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from numbers import Integral

import torch
from torch import Tensor, nn

from gradscope import initializers
from gradscope.models.unfilled import unfilled

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
    """``phi(norm(W x))``: linear, normalization of the pre-activation (without affine map), activation."""

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
    """``skip_weight * x + V phi(norm(W x))``: W is ``linear``, V is ``out``.

    The branch ends with a linear map, so the mean of phi does not point the same way in each block.
    """

    def __init__(self, linear: nn.Linear, out: nn.Linear, activation: str, norm: str, skip_weight: float) -> None:
        super().__init__(linear, activation, norm)
        self.out, self.skip_weight = out, skip_weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        y: Tensor = self.skip_weight * x + self.out(super().forward(x))
        return y


class MLP(nn.Module):
    """Layers f_l = phi(norm(W_l f_{l-1})), or residual blocks f_l = skip_weight f_{l-1} + V_l phi(norm(W_l f_{l-1})).

    ``layers`` holds f_1 .. f_depth, one module each; ``head``, a linear map, exists only with ``out_features``.  A
    residual network whose input has not ``width`` features begins with a linear map ``stem``.  Samples of any shape
    are flattened.

    Arguments:
        depth, width: Number of layers or blocks, and features of each.
        activation: linear, relu, leaky_relu, elu, selu, gelu, silu, tanh, sigmoid.
        norm: none, batch, layer; of the pre-activation, without affine map, torch's eps of 1e-5 added to the variance.
        residual: none, identity.
        skip_weight: Factor of the skip connection.
        init: auto (he or lecun, as suits the activation), he, lecun, xavier, orthogonal, looks_linear.  It fills W.  No
            activation follows V, stem and head, so they keep lengths with lecun, or orthogonal where that is asked for.
        weight_variance: sigma_w^2 instead of ``init``: W is Gaussian of variance sigma_w^2 / fan_in.
        bias: Whether linear maps have a bias, which begins at zero.
        bias_variance: sigma_b^2; above zero, biases before a nonlinearity begin Gaussian of that variance.
        in_features: Features of a flattened sample; default ``width``.
        out_features: Features of the head; default no head.
        generator: Source of the weights; default torch's global one.

    Raises:
        TypeError: A size that is not a whole number.
        ValueError: An unknown name (the nearest is offered), a size below one or a skip weight that is not finite;
            looks_linear without ReLU, or with a norm, skips or an odd width.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        activation: str = "relu",
        norm: str = "none",
        residual: str = "none",
        skip_weight: float = 1.0,
        init: str = "auto",
        weight_variance: float | None = None,
        bias: bool = False,
        bias_variance: float = 0.0,
        in_features: int | None = None,
        out_features: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("norm", norm, NORMS)
        check_choice("residual", residual, RESIDUALS)
        check_choice("init", init, INITS)
        in_features = width if in_features is None else in_features
        sizes = {"depth": depth, "width": width, "in_features": in_features}
        if out_features is not None:
            sizes["out_features"] = out_features
        for name, size in sizes.items():
            check_size(name, size)
        if not isinstance(skip_weight, (int, float)) or not math.isfinite(skip_weight):
            raise ValueError(f"skip_weight must be a finite number, got {skip_weight!r}.")
        mirrored = init == "looks_linear"
        if mirrored and (activation != "relu" or norm != "none" or residual != "none" or width % 2):
            raise ValueError(
                "init='looks_linear' needs activation='relu', norm='none', residual='none' and an even width, got "
                f"activation={activation!r}, norm={norm!r}, residual={residual!r}, width={width}."
            )
        for name, variance in (("weight_variance", weight_variance or 0.0), ("bias_variance", bias_variance)):
            if not (math.isfinite(variance) and variance >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {variance!r}.")
        if bias_variance and not bias:
            raise ValueError("bias_variance is that of biases, so it needs bias=True.")
        if weight_variance is not None and init != "auto":
            raise ValueError(f"weight_variance and init both fill the weights; leave one out, got init={init!r}.")
        inner = initializers.auto(activation) if init == "auto" else initializers.BY_NAME[init]
        if weight_variance is not None:
            inner = partial(initializers.gaussian, variance=weight_variance)
        linear = initializers.orthogonal if init == "orthogonal" else initializers.lecun

        def make(n_in: int, n_out: int, fill: initializers.Initializer) -> nn.Linear:
            layer = unfilled(nn.Linear, n_in, n_out, bias=bias)
            fill(layer.weight, generator=generator)
            if layer.bias is not None:
                if bias_variance and fill is not linear:
                    initializers.gaussian(layer.bias[:, None], variance=bias_variance, generator=generator)
                else:
                    nn.init.zeros_(layer.bias)
            return layer

        self.in_features = in_features
        self.stem = None
        layers: list[nn.Module] = []
        if residual == "identity":
            if in_features != width:
                self.stem = make(in_features, width, linear)
            for _ in range(depth):
                layers.append(
                    Block(make(width, width, inner), make(width, width, linear), activation, norm, skip_weight)
                )
        else:
            for number in range(depth):
                fill = partial(inner, mirror_input=number > 0) if mirrored else inner
                layers.append(Layer(make(in_features if number == 0 else width, width, fill), activation, norm))
        self.layers = nn.Sequential(*layers)
        last = partial(initializers.looks_linear, mirror_output=False) if mirrored else linear
        self.head = None if out_features is None else make(width, out_features, last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, width) or (B, out_features)."""
        if x.ndim < 2:
            raise ValueError(f"This MLP takes a batch of shape (B, ...), got x of shape {tuple(x.shape)}.")
        x = x.flatten(1)
        if x.shape[1] != self.in_features:
            raise ValueError(f"This MLP takes {self.in_features} features a sample, got {x.shape[1]}.")
        if self.stem is not None:
            x = self.stem(x)
        x = self.layers(x)
        return x if self.head is None else self.head(x)


def check_size(name: str, size: object) -> None:
    """A size is a whole number of at least 1, or an error says which argument is not."""
    if isinstance(size, bool) or not isinstance(size, Integral):
        raise TypeError(f"{name} must be a whole number of at least 1, got {size!r}.")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}.")


def check_choice(name: str, choice: object, known: Iterable[str]) -> None:
    """A choice is one of the known names, or an error lists them and offers the nearest."""
    if choice not in tuple(known):
        close = get_close_matches(str(choice), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {choice!r}{hint}")
