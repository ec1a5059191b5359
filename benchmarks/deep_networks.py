"""Do float32 and float64 agree on the growth rate of a 2,000-layer network whose GSC is about 1e336?

    python -m benchmarks.deep_networks [num_seeds]

The forward passes of a relu+batch network in the two precisions decorrelate after about 90 layers.  The two log GSC are
then independent sums of 2,000 increments, so they agree in the mean over seeds but not for each seed.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import gradscope as gs
from gradscope.models import MLP

DEPTH, WIDTH, BATCH, PROBES = 2000, 100, 100, 4
OUTPUT = Path("results/benchmarks/deep_networks.csv")


def total(seed: int, dtype: torch.dtype) -> float:
    """log10 GSC from the first layer to the last."""
    model = MLP(depth=DEPTH, width=WIDTH, norm="batch", generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 + seed)).to(dtype)
    profile = gs.gsc(model, x, layers="layers.*", probes=PROBES, generator=torch.Generator().manual_seed(seed))
    assert np.isfinite(profile.log10_values).all()
    return profile["layers.0"].log10_value


def main(num_seeds: int) -> None:
    """Print log GSC of each seed, and the ratio of the mean rates with its standard error."""
    rows = []
    for seed in range(num_seeds):
        row = {"seed": seed} | {str(d).removeprefix("torch."): total(seed, d) for d in (torch.float32, torch.float64)}
        rows.append(row)
        print(f"seed {seed}: log10 GSC float32 {row['float32']:.2f}, float64 {row['float64']:.2f}", flush=True)
    frame = pd.DataFrame(rows)
    steps = DEPTH - 1
    difference = (frame["float32"] - frame["float64"]) / steps * math.log(10)
    rate = 10 ** (frame["float64"].mean() / steps)
    print(f"rate (float64) {rate:.5f} per layer; float32 over float64: {math.exp(difference.mean()):.5f}"
          f" +- {difference.std() / math.sqrt(num_seeds):.5f}")  # fmt: skip
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(OUTPUT, index=False, float_format="%.6f")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
