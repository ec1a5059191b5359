"""Weight initializations by name, each filling one weight tensor in place from an explicit generator.

A weight has shape (out, in, *kernel); fan_in = in * kernel area and fan_out = out * kernel area.  Draws are made where
the generator lives, so that a seed means the same weights on every device.  Each function returns its argument, but
for `critical` and `lsuv`, which fill a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.forward.inputs import Forward, as_batch
from gradscope.forward.modules import state_restored, unwrap
from gradscope.meanfield import Activation, CriticalPoint, critical_point
from gradscope.probes import orthonormal

Initializer = Callable[..., Tensor]
Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def he(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian of variance 2 / fan_in, which keeps the length of signals through ReLU.

    He et al. (2015), "Delving deep into rectifiers", arXiv:1502.01852.
    """
    return _normal(weight, 2 / _fans(weight)[0], generator)


def lecun(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian of variance 1 / fan_in, which keeps the length of signals through a linear map.

    LeCun et al. (1998), "Efficient BackProp"; for SELU Klambauer et al. (2017), arXiv:1706.02515.
    """
    return _normal(weight, 1 / _fans(weight)[0], generator)


def gaussian(weight: Tensor, *, variance: float, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian of ``variance`` / fan_in."""
    return _normal(weight, variance / _fans(weight)[0], generator)


def xavier(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian of variance 2 / (fan_in + fan_out), between what signals and what gradients ask for.

    Glorot and Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks".
    """
    fan_in, fan_out = _fans(weight)
    return _normal(weight, 2 / (fan_in + fan_out), generator)


def orthogonal(weight: Tensor, *, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """``gain`` times a Haar-distributed matrix (out, fan_in) with orthonormal rows, or columns if out > fan_in.

    Saxe, McClelland and Ganguli (2013), "Exact solutions to the nonlinear dynamics of learning", arXiv:1312.6120.
    """
    columns, rows = _fans(weight)[0], weight.shape[0]
    short, long = sorted((rows, columns))
    directions = orthonormal(short, long, generator=generator, device=weight.device) / math.sqrt(long)
    return _fill(weight, gain * (directions if rows <= columns else directions.T).reshape(weight.shape))


def looks_linear(
    weight: Tensor, *, mirror_input: bool = True, mirror_output: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Orthogonal blocks that make a ReLU network a linear map at initialization.

    Balduzzi et al. (2017), "The shattered gradients problem", arXiv:1702.08591.  The halves of each layer mirror each
    other, relu(z) and relu(-z), and their difference is z.  With W orthogonal, as `orthogonal` draws it:

        first layer (``mirror_input=False``)        [[W], [-W]]             (out, in), W is (out / 2, in)
        middle layer                                [[W, -W], [-W, W]]      (out, in), W is (out / 2, in / 2)
        last layer (``mirror_output=False``)        [[W, -W]]               (out, in), W is (out, in / 2)

    The last layer, which no ReLU follows, takes the difference.  Without one, the difference of the two halves of the
    output is the linear map.

    Raises:
        ValueError: The weight is no matrix, or a mirrored side has an odd number of features.
    """
    if weight.ndim != 2:
        raise ValueError(f"looks_linear fills a matrix (out, in), got a weight of shape {tuple(weight.shape)}.")
    rows, columns = weight.shape
    if (mirror_output and rows % 2) or (mirror_input and columns % 2):
        raise ValueError(
            f"looks_linear halves the features, so mirrored sides must be even; got a weight of {rows} x {columns}."
        )
    block = torch.empty(rows // (1 + mirror_output), columns // (1 + mirror_input), dtype=torch.float64)
    orthogonal(block, generator=generator)
    if mirror_input:
        block = torch.cat([block, -block], dim=1)
    if mirror_output:
        block = torch.cat([block, -block], dim=0)
    return _fill(weight, block)


def critical(
    model: nn.Module,
    activation: str | Activation,
    *,
    bias_variance: float = 0.0,
    chi: float = 1.0,
    orthogonal_weights: bool = False,
    generator: torch.Generator | None = None,
) -> CriticalPoint:
    """Fill every linear and convolutional layer of ``model`` so that gradients grow by ``chi`` a layer, chi_1 = 1.

    Weights are Gaussian of variance sigma_w^2 / fan_in, or scaled orthogonal of that mean square; biases Gaussian of
    ``bias_variance``, or 0.  sigma_w^2 solves chi_1 = ``chi`` at the fixed point of the length
    (`gradscope.meanfield.critical_point`); with a bias it is a point of the line of critical points, without one, for
    an activation that is not homogeneous, the limit of short lengths.

    Returns:
        The point used.

    Raises:
        ValueError: No such point, or a model without linear or convolutional layers.

    Reference: Schoenholz et al. (2017), "Deep information propagation", arXiv:1611.01232.
    """
    point = critical_point(activation, bias_variance, chi)
    for layer in weighted(model).values():
        fan_in = _fans(layer.weight)[0]
        if orthogonal_weights:
            short = min(layer.weight.shape[0], fan_in)
            gain = math.sqrt(point.weight_variance * layer.weight.shape[0] / short)
            orthogonal(layer.weight, gain=gain, generator=generator)
        else:
            _normal(layer.weight, point.weight_variance / fan_in, generator)
        if layer.bias is not None:
            _normal(layer.bias, bias_variance, generator)
    return point


def lsuv(
    model: nn.Module,
    data: Any,
    *,
    tolerance: float = 0.1,
    max_rounds: int = 10,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Layer-sequential unit variance: orthonormal weights, each layer's divided by the deviation of its output.

    Every linear and convolutional layer is filled by `orthogonal`.  Then, in the order in which a forward pass of the
    batch calls them, W <- W / sqrt(v) with v the variance (1/N) of all entries of the layer's output, again until
    |v - 1| <= ``tolerance``; without a bias the first division makes v = 1.  Layers further on see the output of the
    scaled ones.  Biases stay as they are.  A layer that is called again keeps what its first call made, one that is not
    called its orthonormal weights.

    Arguments:
        model: Any module; buffers (running statistics), mode and random state are left as they were.
        data: One batch: a tensor, or a mapping; with ``forward`` anything.
        tolerance: Largest |v - 1|; 0.1 in the paper.
        max_rounds: Divisions a layer at most; 10 in the paper.
        forward: ``(model, batch) -> output``.
        generator: Source of the orthonormal weights.

    Returns:
        The standard deviation of the output of every layer that was called, by name, in the order of the calls.

    Cost: one forward pass, in which every layer is evaluated once more for each division.

    Raises:
        ValueError: No linear or convolutional layer, an output that is constant or not finite, or of another variance
            after ``max_rounds`` (a bias of more than unit variance, say); the layer is named.

    Reference: Mishkin and Matas (2016), "All you need is a good init", arXiv:1511.06422.
    """
    if not tolerance > 0 or max_rounds < 1:
        raise ValueError(f"lsuv needs tolerance > 0 and max_rounds >= 1, got {tolerance!r} and {max_rounds!r}.")
    model = unwrap(model)
    layers = weighted(model)
    for layer in layers.values():
        orthogonal(layer.weight, generator=generator)
    batch, found = as_batch(data, forward=forward, loss_fn=None), dict[str, float]()

    def scale(name: str) -> Callable[..., Any]:
        def hook(layer: Weighted, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if name in found:
                return None
            for number in range(max_rounds + 1):
                variance = float(output.double().var(correction=0))
                if abs(variance - 1) <= tolerance:
                    found[name] = math.sqrt(variance)
                    return output
                if number == max_rounds or not (variance > 0 and math.isfinite(variance)):
                    break
                layer.weight.div_(math.sqrt(variance))
                output = layer.forward(*args, **kwargs)  # not its call, which would be heard again
            raise ValueError(
                f"The output of {name or 'the model'!r} has variance {variance:g} after {number} divisions and no unit "
                "variance: is it dead, constant over the batch, or ruled by its bias?"
            )

        return hook

    handles = [layer.register_forward_hook(scale(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad(), state_restored(dict(model.named_modules())):
            batch.run(model, forward)
    finally:
        for handle in handles:
            handle.remove()
    return found


def weighted(model: nn.Module) -> dict[str, Weighted]:
    """The linear and convolutional layers of a model by name; ValueError where there are none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Weighted)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to fill.")
    return layers


def auto(activation: str) -> Initializer:
    """The initializer that suits an activation at mean field: `he` for relatives of ReLU, else `lecun`.

    The last column is the mean square that one wide layer without a norm makes of a mean square of 1,
    E[phi(sqrt(variance * fan_in) z)^2] with z standard normal: a length is kept exactly where it is 1.

    ==========  =====  ===========
    activation  init   mean square
    ==========  =====  ===========
    relu        he     1
    leaky_relu  he     1.0001: the slope of 0.01 is left out of the variance
    elu         he     1.2001
    gelu        he     0.9221
    silu        he     0.7992
    selu        lecun  1, and stable: every length is drawn to it
    linear      lecun  1
    tanh        lecun  0.3943
    sigmoid     lecun  0.2934
    ==========  =====  ===========

    Raises:
        ValueError: An activation that is not in the table.
    """
    if activation in ("relu", "leaky_relu", "elu", "gelu", "silu"):
        return he
    if activation in ("selu", "linear", "tanh", "sigmoid"):
        return lecun
    raise ValueError(
        f"activation must be one of relu, leaky_relu, elu, gelu, silu, selu, linear, tanh, sigmoid; got {activation!r}."
    )


BY_NAME: dict[str, Initializer] = {
    "he": he,
    "lecun": lecun,
    "xavier": xavier,
    "orthogonal": orthogonal,
    "looks_linear": looks_linear,
}


def _fans(weight: Tensor) -> tuple[int, int]:
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(
            f"A weight has at least two dimensions (out, in, ...) and no empty one, got shape {tuple(weight.shape)}."
        )
    area = math.prod(weight.shape[2:])
    return weight.shape[1] * area, weight.shape[0] * area


def _normal(weight: Tensor, variance: float, generator: torch.Generator | None) -> Tensor:
    source = generator.device if generator is not None else weight.device
    return _fill(weight, torch.randn(weight.shape, generator=generator, device=source) * math.sqrt(variance))


def _fill(weight: Tensor, values: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.copy_(values)
