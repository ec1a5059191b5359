"""Do measurements agree with theory?  Writes a table of prediction, measurement, standard error and z.

    python -m benchmarks.agreement [--quick] [--output FILE]

Compares growth rates of GSC per layer (squared convention), total GSC, statistics of layers, nonlinearity coefficients
and residual networks.  Growth rates are measured at widths 100 and 600, and extrapolated to infinite width from widths
200, 400 and 800.  Networks are bias-free MLPs at initialization, on Gaussian noise with batch size 100.  A measurement
is a mean over seeds (of logarithms, except for statistics) with its standard error over seeds.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

import gradscope as gs
import gradscope.meanfield as mf
from gradscope.measures import PreactivationStd, SignDiversity
from gradscope.models import MLP

FloatArray = npt.NDArray[np.float64]

BATCH = 100
VARIANCES = {"relu": 2.0, "tanh": 1.0, "selu": 1.0, "sigmoid": 1.0}
NETWORKS = [
    ("relu", "none"), ("relu", "layer"), ("relu", "batch"), ("tanh", "none"), ("tanh", "layer"), ("tanh", "batch"),
    ("selu", "none"), ("selu", "layer"), ("selu", "batch"), ("sigmoid", "layer"), ("sigmoid", "batch"),
]  # fmt: skip
PROBES = gs.Deflated(4, 4)


@dataclass(frozen=True)
class Sizes:
    """(width, depth, seeds) of networks whose rates are compared at their width, and of those that are extrapolated."""

    alone: Sequence[tuple[int, int, int]] = ((100, 50, 8), (600, 30, 4))
    extrapolated: Sequence[tuple[int, int, int]] = ((200, 30, 8), (400, 30, 8), (800, 30, 8))
    samples: int = 600
    seeds: int = 8


QUICK = Sizes(alone=((60, 16, 3),), extrapolated=((30, 12, 3), (60, 12, 3), (90, 12, 3)), samples=80, seeds=3)


@dataclass(frozen=True)
class Row:
    """One comparison.  ``tolerance`` is the relative deviation that is allowed because the width is finite."""

    quantity: str
    network: str
    width: str
    prediction: float
    measurement: float
    stderr: float
    tolerance: float

    @property
    def z(self) -> float:
        """Deviation in standard errors."""
        return (self.measurement - self.prediction) / self.stderr if self.stderr else 0.0

    @property
    def agrees(self) -> bool:
        """Whether the deviation is within 3 standard errors or within the tolerance."""
        return abs(self.measurement - self.prediction) <= max(3 * self.stderr, self.tolerance * abs(self.prediction))


def profiles(width: int, depth: int, seeds: int, **options: Any) -> FloatArray:
    """ln GSC from each layer to the last one for ``seeds`` networks, as an array of shape (seeds, depth + 1)."""
    return np.array([_profile(width, depth, seed, **options) for seed in range(seeds)])


def _profile(width: int, depth: int, seed: int, **options: Any) -> FloatArray:
    generator = torch.Generator().manual_seed(1000 * width + seed)
    model = MLP(depth=depth, width=width, generator=generator, **options)
    x = torch.randn(BATCH, width, generator=generator)
    layers = ["input", "layers.0"] if depth == 1 else None  # avoids the warning about a trunk of one layer
    return gs.gsc(model, x, layers=layers, probes=PROBES).log10_values[:, 0] * math.log(10)


def rate(ln_gsc: FloatArray) -> tuple[float, float]:
    """ln of the growth rate per layer and its standard error over seeds, from the upper half without the last layer."""
    depth = ln_gsc.shape[1] - 1
    first, last = depth // 2, depth - 1
    slopes = (ln_gsc[:, first] - ln_gsc[:, last]) / (last - first)
    return float(slopes.mean()), float(slopes.std(ddof=1) / math.sqrt(len(slopes)))


def rates(sizes: Sizes) -> Iterator[Row]:
    """Growth rates at each width, and extrapolated linearly in 1 / width."""
    for activation, norm in NETWORKS:
        found: dict[int, tuple[float, float]] = {}
        for width, depth, seeds in (*sizes.alone, *sizes.extrapolated):
            prediction = _predicted(activation, norm, depth)
            value, error = rate(profiles(width, depth, seeds, activation=activation, norm=norm))
            found[width] = value, error
            if (width, depth, seeds) in sizes.alone:
                # The tolerance is 3 % at width 100 and 0.6 % at width 600.
                yield _rate_row(
                    activation, norm, str(width), prediction, value, error, 3.0 / width if width < 300 else 0.006
                )
        widths = [width for width, _, _ in sizes.extrapolated]
        value, error = extrapolate(widths, [found[w][0] for w in widths], [found[w][1] for w in widths])
        depth = sizes.extrapolated[0][1]
        yield _rate_row(activation, norm, "infinite", _predicted(activation, norm, depth), value, error, 0.0)


def extrapolate(widths: Sequence[int], values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Intercept at 1 / width = 0 of a weighted straight-line fit, and its standard error."""
    design = np.stack([np.ones(len(widths)), 1 / np.array(widths, dtype=float)], axis=1) / np.array(errors)[:, None]
    covariance = np.linalg.inv(design.T @ design)
    return float((covariance @ design.T @ (np.array(values) / np.array(errors)))[0]), math.sqrt(covariance[0, 0])


def _predicted(activation: str, norm: str, depth: int) -> float:
    """ln of the rate over the layers that `rate` uses."""
    predicted = mf.predict_mlp(activation, depth, batch_size=BATCH, norm=norm, weight_variance=VARIANCES[activation])
    first, last = depth // 2, depth - 1
    return float((predicted.log10_gsc[first] - predicted.log10_gsc[last]) / (last - first)) * math.log(10)


def _rate_row(
    activation: str, norm: str, width: str, prediction: float, value: float, error: float, tolerance: float
) -> Row:
    name = f"{activation}, {norm}"
    measured = math.exp(value)
    return Row("gsc rate", name, width, math.exp(prediction), measured, measured * error, tolerance)


def totals(sizes: Sizes) -> Iterator[Row]:
    """sqrt of GSC through 1, 5, 20 and 50 tanh layers, extrapolated in 1 / width."""
    depths = [depth for depth in (1, 5, 20, 50) if sizes is not QUICK or depth <= 5]
    for depth in depths:
        widths = [width for width, _, _ in sizes.extrapolated]
        logs = [profiles(width, depth, sizes.seeds, activation="tanh", norm="none")[:, 0] / 2 for width in widths]
        means = [float(part.mean()) for part in logs]
        errors = [float(part.std(ddof=1) / math.sqrt(len(part))) for part in logs]
        value, error = extrapolate(widths, means, errors)
        predicted = float(mf.predict_mlp("tanh", depth, batch_size=BATCH).log10_gsc[0]) / 2
        measured = math.exp(value)
        yield Row(
            "root of total gsc", f"tanh, {depth} layers", "infinite", 10**predicted, measured, measured * error, 0.0
        )


def statistics(sizes: Sizes) -> Iterator[Row]:
    """Pre-activation standard deviation and sign diversity of the first and the last layer, at the first width."""
    width, depth, _ = sizes.alone[0]
    for activation, norm in NETWORKS[:9]:
        predicted = mf.predict_mlp(
            activation, depth, batch_size=BATCH, norm=norm, weight_variance=VARIANCES[activation]
        )
        found = []
        for seed in range(sizes.seeds):
            generator = torch.Generator().manual_seed(seed)
            model = MLP(depth=depth, width=width, activation=activation, norm=norm, generator=generator)
            x = torch.randn(BATCH, width, generator=generator)
            frame = gs.measure(model, x, measures=(PreactivationStd(), SignDiversity()))
            found.append(frame.pivot_table(index="index", columns="quantity", values="value"))
        for quantity, values in (
            ("preactivation_std", predicted.preactivation_std),
            ("sign_diversity", predicted.sign_diversity),
        ):
            for layer in (1, depth):
                measured = np.array([table.loc[layer, quantity] for table in found])
                error = float(measured.std(ddof=1) / math.sqrt(len(measured)))
                name = f"{activation}, {norm}, layer {layer}"
                yield Row(quantity, name, str(width), float(values[layer - 1]), float(measured.mean()), error, 0.03)


def nonlinearity(sizes: Sizes) -> Iterator[Row]:
    """NLC of elementwise functions and of He-initialized ReLU networks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes.samples * 4, 20, generator=generator, dtype=torch.float64)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "square": torch.square, "relu": torch.relu, "tanh": torch.tanh
    }  # fmt: skip
    for name, function in functions.items():
        estimate = gs.nlc(_Elementwise(function), x, probes="exact")
        yield Row("nlc", name, "elementwise", mf.elementwise_nlc(name), estimate.value, estimate.stderr or 0.0, 0.0)
    for layers in (1, 2, 10):
        widths = [width for width, _, _ in sizes.extrapolated]
        values, errors = [], []
        for width in widths:
            logs = [_relu_nlc(layers, width, seed, sizes.samples) for seed in range(sizes.seeds)]
            values.append(float(np.mean(logs)))
            errors.append(float(np.std(logs, ddof=1) / math.sqrt(len(logs))))
        value, error = extrapolate(widths, values, errors)
        predicted = mf.network_nlc([mf.MeanField("relu", 2.0)] * layers)
        measured = math.exp(value)
        yield Row("nlc", f"relu, {layers} layers", "infinite", predicted, measured, measured * error, 0.0)


def _relu_nlc(layers: int, width: int, seed: int, samples: int) -> float:
    generator = torch.Generator().manual_seed(10_000 * layers + seed)
    model = MLP(depth=layers, width=width, activation="relu", generator=generator)
    return math.log(
        gs.nlc(model, torch.randn(samples, width, generator=generator), probes=4, generator=generator).value
    )


class _Elementwise(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The function of every entry."""
        return self.function(x)


def residuals(sizes: Sizes) -> Iterator[Row]:
    """Growth rates of residual networks, from the total GSC over all blocks."""
    width, _, _ = sizes.extrapolated[-1]
    depth, seeds = (8, sizes.seeds) if sizes is QUICK else (20, sizes.seeds)
    for activation, norm, skip in (
        ("tanh", "layer", 1.0),
        ("tanh", "layer", 0.5),
        ("relu", "none", 1.0),
        ("relu", "batch", 1.0),
    ):
        block = mf.LayerSpec.of(activation, VARIANCES[activation], norm=norm, branch_variance=1.0, skip_weight=skip)
        predicted = float(mf.predict([block] * depth, batch_size=BATCH).log10_gsc[0]) * math.log(10)
        found = profiles(width, depth, seeds, activation=activation, norm=norm, residual="identity", skip_weight=skip)[
            :, 0
        ]
        error = float(found.std(ddof=1) / math.sqrt(seeds))
        name = f"{activation}, {norm}, skip {skip}, {depth} blocks"
        value = float(found.mean())
        yield Row("rate of residual blocks", name, str(width), math.exp(predicted / depth), math.exp(value / depth),
                  math.exp(value / depth) * error / depth, 0.006)  # fmt: skip


class BatchNormBlock(torch.nn.Module):
    """x + V relu(BN(W BN(x))): the pre-activation block of a ResNet, with matrices instead of convolutions."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        linears = (torch.nn.Linear(width, width, bias=False), torch.nn.Linear(width, width, bias=False))
        for linear, variance in zip(linears, (1.0, 2.0), strict=True):  # the branch has mean square 1
            gs.initializers.gaussian(linear.weight, variance=variance, generator=generator)
        norms = [torch.nn.BatchNorm1d(width, affine=False) for _ in range(2)]
        self.branch = torch.nn.Sequential(norms[0], linears[0], norms[1], torch.nn.ReLU(), linears[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width) -> (B, width)."""
        y: torch.Tensor = x + self.branch(x)
        return y


def power_law(sizes: Sizes) -> Iterator[Row]:
    """Total GSC of a ResNet with batch normalization, which grows as a power of depth L.

    The input of block l has mean square 1 + l and variance 1 + v l over the batch.  The variance is smaller, because
    the mean of ReLU is common to all samples.  A squared gradient grows by 1 + c / (1 + v l) per block, where c is the
    slope of the branch.  GSC is the product of these factors divided by 1 + L, which is about L^(c / v - 1).  c / v is
    the growth rate of a ReLU network with batch normalization.
    """
    width = sizes.extrapolated[-1][0] // 2
    relu, linear = (mf.batch_moments(mf.as_activation(name), BATCH) for name in ("relu", "linear"))
    variance = 2 * (relu.square - relu.product)
    slope = 2 * relu.centred * relu.inflation * (1 - 1 / BATCH) * linear.centred * linear.inflation
    for depth in (8, 16) if sizes is QUICK else (16, 32, 64):
        predicted = sum(math.log1p(slope / (1 + variance * block)) for block in range(depth)) - math.log1p(depth)
        found = []
        for seed in range(sizes.seeds):
            generator = torch.Generator().manual_seed(seed)
            model = torch.nn.Sequential(*(BatchNormBlock(width, generator) for _ in range(depth)))
            x = torch.randn(BATCH, width, generator=generator)
            found.append(gs.gsc(model, x, probes=PROBES).log10_values[0, 0] * math.log(10))
        value, error = math.exp(float(np.mean(found))), float(np.std(found, ddof=1) / math.sqrt(len(found)))
        name = f"BN-linear-BN-relu-linear, {depth} blocks"
        yield Row("total gsc of a resnet", name, str(width), math.exp(predicted), value, value * error, 0.03)


PARTS = (rates, totals, statistics, nonlinearity, residuals, power_law)


def main(arguments: list[str] | None = None) -> None:
    """Print and write the table, and print the spread of the z-scores of the rows for infinite width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test that everything runs")
    parser.add_argument("--output", type=Path, default=Path("results/theory/agreement.csv"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin, sizes = time.perf_counter(), QUICK if options.quick else Sizes()
    rows = [row for part in PARTS for row in part(sizes)]
    frame = pd.DataFrame([asdict(row) | {"z": row.z, "agrees": row.agrees} for row in rows])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.output, index=False)
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.5g}"))
    infinite = frame[frame["width"].isin(["infinite", "elementwise"])]
    print(
        f"{int(frame['agrees'].sum())} of {len(frame)} rows agree; z-scores of the {len(infinite)} rows without finite "
        f"width: standard deviation {infinite['z'].std():.2f}, largest {infinite['z'].abs().max():.1f} "
        f"({time.perf_counter() - begin:.0f} s)"
    )


if __name__ == "__main__":
    main()
