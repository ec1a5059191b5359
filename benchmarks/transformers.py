"""Does mean-field theory predict a transformer?  Writes a table of predictions and measurements per layer.

    python -m benchmarks.transformers [--depth 24] [--width 512] [--length 128] [--seeds 8] [--networks NAME ...]

Networks are `gradscope.models.GPT` at initialization, with pre-norm, on two sequences of random tokens.  Compared are
the residual ledger (lengths of the stream and of what each branch writes) and GSC of each block and branch.  A
prediction is that of `GPT.mean_field`.  A ratio is the mean over seeds of measured energy over predicted energy; for
lengths, its root.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import gradscope as gs
from gradscope.models import GPT

NETWORKS: dict[str, dict[str, Any]] = {
    "unit variances": {},
    "GPT-2": {"init": "gpt2", "residual_scale": "depth"},
    "SwiGLU, RMSNorm": {"mlp": "swiglu", "norm_kind": "rms"},
}
PROBES, HEADS, BATCH = 4, 8, 2


def ledger(model: GPT, x: torch.Tensor) -> dict[tuple[str, str], float]:
    """Mean squares of the stream before each branch, and of what the branch writes, in one forward pass."""
    found: dict[tuple[str, str], float] = {}

    def energy(y: torch.Tensor) -> float:
        return float(y.double().square().mean())

    def before(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found[name, "stream_rms"] = energy(inputs[0])

    def after(name: str, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        found[name, "write_rms"] = energy(output)

    handles = []
    block: Any
    for number, block in enumerate(model.blocks):
        for norm, branch in ((block.norm1, "attention"), (block.norm2, "mlp")):
            name = f"blocks.{number}.{branch}"
            handles += [
                norm.register_forward_pre_hook(partial(before, name)),
                getattr(block, branch).register_forward_hook(partial(after, name)),
            ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def compared(options: dict[str, Any], depth: int, width: int, length: int, seed: int) -> pd.DataFrame:
    """One network: energies of the ledger and GSC, with layer, quantity, prediction, measurement and whether within."""
    model = GPT(
        depth=depth, width=width, length=length, heads=HEADS, generator=torch.Generator().manual_seed(seed), **options
    )
    x = torch.randint(256, (BATCH, length), generator=torch.Generator().manual_seed(1000 + seed))
    theory = model.mean_field(x)
    predicted = theory.ledger().set_index(["layer", "quantity"])["value"] ** 2
    rows = [(*key, predicted[key], energy, math.nan) for key, energy in ledger(model, x).items()]
    coefficients = theory.gsc().set_index("layer")
    profile = gs.gsc(model, x, layers=list(coefficients.index[:-1]), probes=PROBES)
    for name, log10 in zip(profile.layers[:-1], profile.log10_values[:-1, -1], strict=True):
        row = coefficients.loc[name]
        quantity = "gsc of a branch" if name.count(".") == 2 else "gsc"
        within = row["log10_low"] <= log10 <= row["log10_high"]
        rows.append((name, quantity, 10 ** row["log10_value"], 10**log10, float(within)))
    return pd.DataFrame(rows, columns=["layer", "quantity", "prediction", "measurement", "within"]).assign(seed=seed)


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Per layer and quantity: prediction, ratio of measurement to prediction with its standard error, share within."""
    frame = frame.assign(ratio=frame["measurement"] / frame["prediction"])
    groups = frame.groupby(["network", "layer", "quantity"], sort=False)
    names = {"prediction": ("prediction", "mean"), "ratio": ("ratio", "mean"), "stderr": ("ratio", "sem")}
    table = groups.agg(**names, within=("within", "mean"))
    table = table.reset_index()
    lengths = table["quantity"].str.endswith("rms")
    for name, power in (("prediction", 0.5), ("ratio", 0.5)):
        table.loc[lengths, name] **= power
    table.loc[lengths, "stderr"] /= 2 * table.loc[lengths, "ratio"]
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per network and quantity: deviations in percent, how many rows are within 3 %, and the share in the band."""
    kind = table["quantity"].where(
        table["quantity"] != "write_rms", "write_rms " + table["layer"].str.split(".").str[-1]
    )
    table = table.assign(quantity=kind, deviation=100 * (table["ratio"] - 1), stderr=100 * table["stderr"])
    groups = table.groupby(["network", "quantity"], sort=False)
    return groups.agg(
        mean=("deviation", "mean"), largest=("deviation", lambda d: d.abs().max()), stderr=("stderr", "mean"),
        within_3_percent=("deviation", lambda d: int((d.abs() <= 3).sum())), rows=("deviation", "size"),
        in_band=("within", "mean"),
    ).round(3)  # fmt: skip


def main() -> None:
    """Measure, write the table and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("depth", 24), ("width", 512), ("length", 128), ("seeds", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--output", type=Path, default=Path("results/theory/transformers.csv"))
    args = parser.parse_args()
    frames = []
    for network in args.networks:
        for seed in range(args.seeds):
            frames.append(
                compared(NETWORKS[network], args.depth, args.width, args.length, seed).assign(network=network)
            )
            print(f"{network}, seed {seed}", flush=True)
    table = over_seeds(pd.concat(frames))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.output, index=False, float_format="%.6g")
    print(summary(table).to_string())


if __name__ == "__main__":
    main()
