"""Weight initializations: fill one weight tensor in place and return it, or fill a whole model (`critical`, `lsuv`).

A weight has shape (out, in, *kernel), with fan_in = in * kernel area and fan_out = out * kernel area.  Random numbers
are drawn on the device of ``generator``, so that a seed gives the same weights on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from gradscope.choices import Finite, Nonnegative, Positive, Range, Size, check_choice, checked
from gradscope.forward.inputs import Forward, as_batch
from gradscope.forward.interrupts import interruptible
from gradscope.forward.modules import recording_gradients, unwrap
from gradscope.forward.state import alone, state_restored
from gradscope.meanfield import Activation, CriticalPoint, critical_point
from gradscope.meanfield.rates import STANDARD_VARIANCE
from gradscope.probes import orthonormal

Initializer = Callable[..., Tensor]
NORMAL = Range(
    "a torch.Tensor made outside inference mode", lambda w: torch.is_inference_mode_enabled() or not w.is_inference()
)
Weight = Annotated[Tensor, NORMAL]
Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@checked
def he(weight: Weight, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw Gaussian weights of variance 2 / fan_in (He), so ReLU layers preserve the mean square of activations.

    Reference: He et al. (2015), "Delving deep into rectifiers", arXiv:1502.01852.

    >>> round(200 * float(he(torch.empty(500, 200), generator=torch.Generator().manual_seed(0)).var()), 2)
    2.0
    """
    return _normal(weight, 2 / _fans(weight)[0], generator)


@checked
def lecun(weight: Weight, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw Gaussian weights of variance 1 / fan_in (LeCun), so linear layers preserve the mean square of activations.

    References: LeCun et al. (1998), "Efficient BackProp"; for SELU, Klambauer et al. (2017), arXiv:1706.02515.

    >>> round(200 * float(lecun(torch.empty(500, 200), generator=torch.Generator().manual_seed(0)).var()), 2)
    1.0
    """
    return _normal(weight, 1 / _fans(weight)[0], generator)


@checked
def gaussian(weight: Weight, *, variance: Nonnegative, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with Gaussian numbers of variance ``variance`` / fan_in, and return it.

    >>> round(float(gaussian(torch.empty(500, 200), variance=4.0, generator=torch.Generator().manual_seed(0)).var()), 3)
    0.02
    """
    return _normal(weight, variance / _fans(weight)[0], generator)


@checked
def xavier(weight: Weight, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with Gaussian numbers of variance 2 / (fan_in + fan_out) (Xavier), and return it.

    A compromise: 1 / fan_in would preserve the mean square of activations, and 1 / fan_out that of gradients.
    Reference: Glorot and Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks".

    >>> round(700 * float(xavier(torch.empty(500, 200), generator=torch.Generator().manual_seed(0)).var()), 2)
    2.0
    """
    fan_in, fan_out = _fans(weight)
    return _normal(weight, 2 / (fan_in + fan_out), generator)


@checked
def orthogonal(weight: Weight, *, gain: Finite = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with ``gain`` times a random matrix (out, fan_in) with orthonormal rows or columns, and return it.

    The rows are orthonormal if out <= fan_in, otherwise the columns.  All such matrices are equally likely (Haar).

    Reference: Saxe, McClelland and Ganguli (2013), "Exact solutions to the nonlinear dynamics ...", arXiv:1312.6120.

    >>> weight = orthogonal(torch.empty(2, 5), gain=2.0)
    >>> (weight @ weight.T).round(decimals=4).abs().tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """
    columns, rows = _fans(weight)[0], weight.shape[0]
    short, long = sorted((rows, columns))
    directions = orthonormal(short, long, generator=generator, device=weight.device) / math.sqrt(long)
    return _fill(weight, gain * (directions if rows <= columns else directions.T).reshape(weight.shape))


@checked
def looks_linear(
    weight: Weight, *, mirror_input: bool = True, mirror_output: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a weight with mirrored orthogonal blocks, which make a ReLU network a linear map at initialization.

    The halves of a hidden layer's output are relu(z) and relu(-z).  Weights, with W from `orthogonal`:

        first layer (``mirror_input=False``)        [[W], [-W]]             W is (out / 2, in)
        middle layer                                [[W, -W], [-W, W]]      W is (out / 2, in / 2)
        last layer (``mirror_output=False``)        [[W, -W]]               W is (out, in / 2)

    Middle and last layers act on the difference of the halves, relu(z) - relu(-z) = z.

    Raises:
        ValueError: The weight is not a matrix, or a mirrored side has an odd number of features.

    Reference: Balduzzi et al. (2017), "The shattered gradients problem", arXiv:1702.08591.

    >>> looks_linear(torch.empty(4, 2)).sum().abs().round(decimals=4).tolist()
    0.0
    """
    if weight.ndim != 2:
        raise ValueError(f"looks_linear needs a matrix (out, in), got a weight of shape {tuple(weight.shape)}.")
    rows, columns = weight.shape
    if (mirror_output and rows % 2) or (mirror_input and columns % 2):
        raise ValueError(
            f"looks_linear needs an even number of features on mirrored sides, got a weight of {rows} x {columns}."
        )
    block = torch.empty(rows // (1 + mirror_output), columns // (1 + mirror_input), dtype=torch.float64)
    orthogonal(block, generator=generator)
    block = torch.cat([block, -block], dim=1) if mirror_input else block
    return _fill(weight, torch.cat([block, -block]) if mirror_output else block)


@checked
def critical(
    model: nn.Module, activation: str | Activation, *, bias_variance: Nonnegative = 0.0, chi: Positive = 1.0,
    orthogonal_weights: bool = False, generator: torch.Generator | None = None,
) -> CriticalPoint:  # fmt: skip
    """Initialize linear and convolutional layers so that squared gradients grow by the factor ``chi`` per layer.

    Weights get the variance sigma_w^2 / fan_in; the returned `gradscope.meanfield.CriticalPoint` contains sigma_w^2.

    Arguments:
        model: Any module with linear or convolutional layers.
        activation: The model's activation, as a name or an `Activation`.
        bias_variance: sigma_b^2; biases are Gaussian with this variance.
        chi: Growth factor of squared gradients per layer; at 1 (critical), they neither grow nor shrink.
        orthogonal_weights: Draw scaled orthogonal instead of Gaussian weights, with the same mean square.
        generator: Source of the random numbers.

    Raises:
        ValueError: There is no critical point, or the model has no linear or convolutional layers.

    Reference: Schoenholz et al. (2017), "Deep information propagation", arXiv:1611.01232.

    >>> round(critical(nn.Linear(8, 8), "tanh", bias_variance=0.1).weight_variance, 3)
    1.986
    """
    point = critical_point(activation, bias_variance, chi)
    for layer in weighted(unwrap(model)).values():
        fan_in, rows = _fans(layer.weight)[0], layer.weight.shape[0]
        if orthogonal_weights:
            gain = math.sqrt(point.weight_variance * rows / min(rows, fan_in))
            orthogonal(layer.weight, gain=gain, generator=generator)
        else:
            _normal(layer.weight, point.weight_variance / fan_in, generator)
        if layer.bias is not None:
            _normal(layer.bias, bias_variance, generator)
    return point


@checked
def lsuv(
    model: nn.Module, data: Any, *, tolerance: Positive = 0.1, max_rounds: Size = 10, forward: Forward | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:  # fmt: skip
    """Scale weights until each layer's output has variance 1 (LSUV); return the outputs' final standard deviations.

    First, `orthogonal` fills every linear and convolutional layer.  Then layers are scaled in the order of their first
    calls.  Weights are divided by sqrt(v) until |v - 1| <= ``tolerance``.  Here v is the variance of all entries of the
    layer's output (without Bessel's correction).  Biases do not change.

    Arguments:
        model: Any module; its buffers, its mode and the random state are left unchanged.
        data, forward: As in `gradscope.gsc`, without labels.
        tolerance: Largest |v - 1|; 0.1 in the paper.
        max_rounds: Largest number of divisions per layer; 10 in the paper.
        generator: Source of the orthogonal weights; torch's global generator by default.

    Cost: one forward pass, and one evaluation of a layer per division.

    Raises:
        ValueError: There is no linear or convolutional layer, or a variance is not 1 after ``max_rounds`` divisions.

    Reference: Mishkin and Matas (2016), "All you need is a good init", arXiv:1511.06422.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    >>> {name: round(deviation, 3) for name, deviation in lsuv(model, torch.randn(32, 4), tolerance=1e-4).items()}
    {'0': 1.0, '2': 1.0}
    """
    model = unwrap(model)
    layers = weighted(model)
    found: dict[str, float] = {}

    def scale(name: str) -> Callable[..., Any]:
        def hook(layer: Weighted, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if name in found:
                return None
            for number in range(max_rounds + 1):
                variance = float(output.detach().double().var(correction=0))
                if abs(variance - 1) <= tolerance:
                    found[name] = math.sqrt(variance)
                    return output
                if number == max_rounds or not (variance > 0 and math.isfinite(variance)):
                    break
                with torch.no_grad():
                    layer.weight.div_(math.sqrt(variance))
                output = layer.forward(*args, **kwargs)  # a call of the layer would run this hook again
            raise ValueError(
                f"The output of {name or 'the model'!r} has variance {variance:g} instead of 1 after {number} "
                "divisions. Check whether this output is dead, constant over the batch, or dominated by the bias."
            )

        return hook

    with interruptible() as whole, whole:
        batch = as_batch(data, forward=forward)
        for layer in layers.values():
            orthogonal(layer.weight, generator=generator)
        with alone, state_restored(dict(model.named_modules())) as state, state, recording_gradients():
            for name, layer in layers.items():
                layer.register_forward_hook(scale(name), with_kwargs=True)  # removed with the other changes of the pass
            batch.differentiable()[0].run(model, forward)
    return found


@checked
def weighted(model: nn.Module) -> dict[str, Weighted]:
    """Return a dict of the linear and convolutional layers of a model by name; ValueError if there are none.

    >>> list(weighted(nn.Sequential(nn.Linear(4, 4), nn.Tanh())))
    ['0']
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Weighted)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to initialize.")
    return layers


@checked
def auto(activation: str) -> Initializer:
    """Return the usual initializer for an activation: `he` for ReLU and its relatives, otherwise `lecun`.

    The table gives the mean square after one wide layer without normalization, for an input of mean square 1.  It is
    E[phi(sqrt(variance * fan_in) z)^2], where variance is that of a weight, and z is standard normal.

    activation  init   mean square
    ----------  -----  -----------
    relu        he     1
    leaky_relu  he     1.0001
    elu         he     1.2001
    gelu        he     0.9221
    silu        he     0.7992
    selu        lecun  1, a stable fixed point
    linear      lecun  1
    tanh        lecun  0.3943
    sigmoid     lecun  0.2934

    Raises:
        ValueError: The activation is not in the table.

    >>> auto("gelu").__name__, auto("tanh").__name__
    ('he', 'lecun')
    """
    check_choice("activation", activation, (*STANDARD_VARIANCE, "selu", "linear", "tanh", "sigmoid"))
    return he if activation in STANDARD_VARIANCE else lecun


BY_NAME: dict[str, Initializer] = {
    "he": he, "lecun": lecun, "xavier": xavier, "orthogonal": orthogonal, "looks_linear": looks_linear,
}  # fmt: skip


def _fans(weight: Tensor) -> tuple[int, int]:
    if weight.ndim < 2 or weight.numel() == 0 or weight.layout is not torch.strided:
        raise ValueError(
            f"A dense weight needs shape (out, in, ...) without empty dimensions, got {tuple(weight.shape)}."
        )
    area = math.prod(weight.shape[2:])
    return weight.shape[1] * area, weight.shape[0] * area


def _normal(weight: Tensor, variance: float, generator: torch.Generator | None) -> Tensor:
    source = generator.device if generator is not None else weight.device
    return _fill(weight, torch.randn(weight.shape, generator=generator, device=source) * math.sqrt(variance))


def _fill(weight: Tensor, values: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.copy_(values)
