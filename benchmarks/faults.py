"""Initialize one layer with 1.3 times its gain, and count how often the comparison with theory names this layer.

    python -m benchmarks.faults [--seeds N] [--first-seed N] [--width N] [--depth N] [--output FILE]

The networks are plain and have 50 layers.  Half of them have such a fault, at a random layer.  The table has one row
per network, with the planted and the named layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import gradscope as gs
from gradscope.models import MLP

GAIN, BATCH = 1.3, 32
CASES = {"tanh": "none", "selu": "none"}
SEEN_BY_WEIGHTS = {"relu": "none", "tanh": "layer"}


def one(activation: str, norm: str, seed: int, depth: int, width: int, planted: bool) -> dict[str, object]:
    """Initialize a network with or without a fault; returns the planted and the first deviating layer."""
    generator = torch.Generator().manual_seed(seed + (0 if planted else 10_000))
    model = MLP(depth=depth, width=width, activation=activation, norm=norm, generator=generator)
    fault = int(np.random.default_rng(seed).integers(depth)) if planted else None
    if fault is not None:
        with torch.no_grad():
            model.get_submodule(f"layers.{fault}.linear").get_parameter("weight").mul_(GAIN)
    x = torch.randn(BATCH, width, generator=generator)
    found = gs.compare(model, x, probes=gs.Deflated(2, 4))
    return {
        "activation": activation,
        "norm": norm,
        "seed": seed,
        "planted": None if fault is None else f"layers.{fault}",
        "named": found.first_deviation,
        "weight_outlier": found.first_weight_outlier,
    }


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Counts of named faults and of false alarms, by activation and norm."""
    planted = frame["planted"].notna()
    frame = frame.assign(
        faults=planted,
        healthy=~planted,
        named_right=planted & (frame["named"] == frame["planted"]),
        weights_right=planted & (frame["weight_outlier"] == frame["planted"]),
        false_alarms=~planted & frame["named"].notna(),
        false_outliers=~planted & frame["weight_outlier"].notna(),
    )
    counts = ["faults", "named_right", "weights_right", "healthy", "false_alarms", "false_outliers"]
    return frame.groupby(["activation", "norm"], as_index=False)[counts].sum()


def main(arguments: list[str] | None = None) -> None:
    """Measure all networks, write one row per network, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seeds", 100), ("first-seed", 0), ("width", 400), ("depth", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("results/theory/faults.csv"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [
        one(activation, norm, seed, options.depth, options.width, planted)
        for cases, seeds in ((CASES, options.seeds), (SEEN_BY_WEIGHTS, max(1, options.seeds // 5)))
        for activation, norm in cases.items()
        for seed in range(options.first_seed, options.first_seed + seeds)
        for planted in (True, False)
    ]
    frame = pd.DataFrame(rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.output, index=False)
    print(summary(frame).to_string(index=False))


if __name__ == "__main__":
    main()
