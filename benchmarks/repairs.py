"""Does `gradscope.repair` bring the local GSC of every unit to its goal?  Twelve kinds of networks, and three others.

Each network is solved on one batch, and measured on data that were not used for it.  A kind passes if the intervals of
all its units contain their goals; these intervals hold together with probability 95 %.  The goals were chosen such that
the scales can reach them.  In the other three kinds no scale changes GSC, and the outcome of all units must say so.

    python -m benchmarks.repairs        # two minutes on one core; writes results/calibration/repairs.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs
from gradscope.comparing.repair.stages import find_stages
from gradscope.models import GPT, MLP, AlexNetA, ResNet

OUTPUT = Path("results/calibration")
WIDTH, DEPTH, BATCH = 128, 4, 384
VOCABULARY, LENGTH = 64, 16
Data = Callable[[int, int], Any]


def seeded(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Data:
    """A function of a size and a seed that draws Gaussian samples."""
    return lambda size, seed: torch.randn(size, *shape, generator=seeded(seed))


def tokens(size: int, seed: int) -> Tensor:
    """Random tokens."""
    return torch.randint(VOCABULARY, (size, LENGTH), generator=seeded(seed))


@dataclass(frozen=True)
class Kind:
    """A network, its data, and the goals of the units by patterns of their names; other units have none.

    ``batch``: samples of the solution.  ``batches``: fresh batches of this size; with None, one of a quarter.
    """

    make: Callable[[], nn.Module]
    data: Data
    goals: dict[str, float]
    batch: int = BATCH
    batches: int | None = None


class Scaled(nn.Module):
    """``x + gain * f(x)`` with a learned gain per feature, which starts at 1e-2."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm, self.linear, self.out = nn.LayerNorm(width), linear(width, 3.0, generator), linear(width, 1.0)
        self.gain = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        y: Tensor = x + self.gain * self.out(torch.tanh(self.linear(self.norm(x))))
        return y


def linear(width: int, deviation: float, generator: torch.Generator | None = None) -> nn.Linear:
    """A linear map without bias, whose weights have this standard deviation, times 1 / sqrt(width)."""
    layer = nn.Linear(width, width, bias=False)
    gs.initializers.gaussian(layer.weight, variance=deviation**2, generator=generator or seeded(5))
    return layer


def normalized(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Tanh layers with a normalization that has a learned gain, which starts at 3."""
    generator, layers = seeded(), []
    for _ in range(DEPTH):
        layers.append(nn.Sequential(linear(WIDTH, 1.0, generator), norm(WIDTH), nn.Tanh()))
        nn.init.constant_(layers[-1][1].weight, 3.0)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def convolutions() -> nn.Module:
    """Convolutions with tanh, whose weights are too large."""
    generator, channels = seeded(), [3, 16, 32, 32]
    layers = []
    for n_in, n_out in pairwise(channels):
        layers.append(nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.Tanh()))
        gs.initializers.gaussian(layers[-1][0].weight, variance=16.0, generator=generator)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def scored(factor: float, **options: Any) -> nn.Module:
    """A GPT whose queries are multiplied by a factor, so that its attention is too sharp."""
    model = GPT(vocabulary=VOCABULARY, length=LENGTH, depth=3, width=64, heads=4, generator=seeded(), **options)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight.mul_(factor)  # type: ignore[union-attr, operator]
    return model


MADE = partial(MLP, depth=DEPTH, width=WIDTH)
KINDS = {
    "tanh, small weights, biases": Kind(
        lambda: MADE(activation="tanh", weight_variance=0.2, bias=True, bias_variance=0.1, generator=seeded()),
        noise(WIDTH), {"*": 1.0},
    ),
    "tanh, large weights": Kind(
        lambda: MADE(activation="tanh", weight_variance=9.0, generator=seeded()), noise(WIDTH), {"*": 1.2}
    ),
    "sigmoid": Kind(lambda: MADE(activation="sigmoid", generator=seeded()), noise(WIDTH), {"*": 1.0}),
    "SELU, small weights, biases": Kind(
        lambda: MADE(activation="selu", weight_variance=0.2, bias=True, bias_variance=0.1, generator=seeded()),
        noise(WIDTH), {"*": 0.9},
    ),
    # The units are the linear maps, which no scale changes, and the normalizations with the activation after them.
    "tanh, batch norm": Kind(lambda: normalized(nn.BatchNorm1d), noise(WIDTH), {"*.1": 1.2}, 64, 20),
    "tanh, layer norm": Kind(lambda: normalized(nn.LayerNorm), noise(WIDTH), {"*.1": 1.2}),
    "residual tanh, large weights": Kind(
        lambda: MADE(activation="tanh", residual="identity", weight_variance=9.0, generator=seeded()),
        noise(WIDTH), {"*": 1.1},
    ),
    "residual with a gain per feature": Kind(
        lambda: nn.Sequential(*(Scaled(WIDTH, seeded(n)) for n in range(DEPTH))), noise(WIDTH), {"*": 1.1}
    ),
    # Stage 3 includes the mean over positions, through which little of a random change passes.
    "ResNet-8": Kind(
        lambda: ResNet(depth=8, width=8, generator=seeded()), noise(3, 16, 16), {"stage[12]": 1.1, "stage3": 0.25},
        32, 20,
    ),
    "convolutions with tanh, large weights": Kind(convolutions, noise(3, 12, 12), {"*": 1.2}, 128),
    "pre-norm GPT, sharp attention": Kind(lambda: scored(6.0), tokens, {"blocks*": 1.1}, 128),
    "post-norm GPT, sharp attention": Kind(lambda: scored(6.0, norm="post"), tokens, {"blocks*": 1.1}, 128),
}  # fmt: skip
FIXED = {
    "ReLU": Kind(lambda: MADE(weight_variance=0.3, generator=seeded()), noise(WIDTH), {"*": 1.0}),
    "ReLU, batch norm": Kind(lambda: MADE(norm="batch", generator=seeded()), noise(WIDTH), {"*": 1.0}, 64, 20),
    "AlexNet A (ReLU, max pooling)": Kind(lambda: AlexNetA(generator=seeded()), noise(3, 32, 32), {"*": 1.0}, 48),
}


def run(name: str, kind: Kind) -> pd.DataFrame:
    """The rows of those units of a repair that have a goal."""
    model, x, size = kind.make(), kind.data(kind.batch, 1), kind.batch
    captured = gs.capture(model, x)
    units = [stage.layer for stage in find_stages(captured, captured.units)]
    goals = {unit: goal for pattern, goal in kind.goals.items() for unit in units if fnmatchcase(unit, pattern)}
    fresh = [kind.data(size if kind.batches else size // 4, seed) for seed in range(10, 10 + (kind.batches or 1))]
    plan = gs.repair(model, x, goal=goals, fresh=fresh, probes=24)
    print(name, plan, "", sep="\n", flush=True)
    table = plan.table[plan.table["unit"].isin(goals)]
    contains = (table["low"] <= table["goal"]) & (table["goal"] <= table["high"])
    fixed = table["outcome"].isin(("length", "no effect"))
    return table.assign(kind=name, passes=fixed if name in FIXED else contains)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all kinds, print the results and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS, *FIXED])
    options = parser.parse_args(arguments)
    rows = pd.concat([run(name, (KINDS | FIXED)[name]) for name in options.kinds], ignore_index=True)
    rows.insert(0, "kind", rows.pop("kind"))
    rows.to_csv(options.output / "repairs.csv", index=False, float_format="%.5g")
    passed = rows.groupby("kind", sort=False)["passes"].all()
    print(passed.to_string())


if __name__ == "__main__":
    main()
