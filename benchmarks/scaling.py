"""Is a coordinate check right about networks whose parametrization is known?

    python -m benchmarks.scaling [--repeats 1] [--first-seed 5000] [--output FOLDER] [--quick]

Networks are MLPs (SGD and Adam) and GPTs (Adam) in the standard parametrization and in mu-P, widths 64 to 1024, and
residual networks and GPTs with and without depth-mu-P, depths 4 to 32.  In broken networks, one layer is scaled as in
the standard parametrization.  Each network is judged by the tables of both parametrizations.  A judgment is right if
its verdict is the known one and, for a broken layer, the first layer that differs is this one.

Networks, learning rates and thresholds were fixed on seeds below 1,000.  The published rows are of seeds from 5,000 on.
Each repeat has its own eight seeds.  About three minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn, optim
from torch.nn import functional

import gradscope as gs
from benchmarks.tables.provenance import manifest
from gradscope.comparing.coordinates.check import MARGIN
from gradscope.models import GPT, MLP

OUTPUT = Path("results/calibration")
WIDTHS, DEPTHS, SEEDS, STEPS = (64, 128, 256, 512, 1024), (4, 8, 16, 32), 8, 2
BASE = 64  # width at which both parametrizations agree
BASE_DEPTH = 4
IN, OUT, TOKENS, LENGTH = 16, 8, 32, 16
OPTIMIZERS: dict[str, Any] = {"SGD": optim.SGD, "Adam": optim.Adam}
# Learning rates at the base width; those of the standard parametrization are small enough for all widths.
RATES = {("SGD", True): 0.1, ("SGD", False): 0.02, ("Adam", True): 2e-3, ("Adam", False): 1e-4}
HEAD = "head"


class Known(NamedTuple):
    """A network, whether its depths or widths are compared, and what a check must say of it."""

    name: str
    factory: Any
    data: tuple[Tensor, Tensor]
    axis: str
    verdicts: dict[str, str]
    broken: str = ""


def mlp(width: int, *, kind: str = "Adam", mup: bool = True, broken: str = "", depth: int = 3) -> Any:
    """An MLP and its optimizer; ``broken`` is a layer of a mu-P network that is scaled as in the standard one."""
    model = MLP(
        depth=depth, width=width, in_features=IN, out_features=OUT, activation="tanh", init="lecun"
    )  # fmt: skip
    return model, optimizer(model, width, kind, mup, broken, first="layers.0")


def gpt(width: int, *, mup: bool = True, broken: str = "") -> Any:
    """A GPT of two blocks with heads of 32 features, and its Adam."""
    model = GPT(vocabulary=TOKENS, length=LENGTH, depth=2, width=width, heads=width // 32)
    return model, optimizer(model, width, "Adam", mup, broken, first="embedding")


def optimizer(model: nn.Module, width: int, kind: str, mup: bool, broken: str, *, first: str) -> optim.Optimizer:
    """Scale the head of the model for mu-P, and return an optimizer with a learning rate per parameter."""
    ratio, groups = width / BASE, []
    for name, parameter in model.named_parameters():
        finite_fan_in = name.startswith(first) or parameter.ndim < 2
        output = name.startswith(HEAD)
        factor = 1.0
        if mup and not (broken and name.startswith(broken)):
            if output:
                parameter.data.mul_(ratio**-0.5)
            if kind == "SGD":
                factor = ratio if finite_fan_in else 1 / ratio if output else 1.0
            else:
                factor = 1.0 if finite_fan_in else 1 / ratio
        groups.append({"params": [parameter], "lr": RATES[kind, mup] * factor})
    return OPTIMIZERS[kind](groups)


def residual_mlp(width: int, depth: int, *, scaled: bool) -> Any:
    """A residual MLP and its Adam; ``scaled``: with depth-mu-P."""
    model = MLP(depth=depth, width=width, in_features=IN, out_features=OUT, activation="tanh", residual="identity")
    if scaled:
        with torch.no_grad():
            for block in model.layers:
                block.out.weight.mul_(math.sqrt(BASE_DEPTH / depth))  # type: ignore[operator, union-attr]
    return model, depth_optimizer(model, depth, scaled, blocks="layers")


def deep_gpt(width: int, depth: int, *, scaled: bool) -> Any:
    """A GPT and its Adam; ``scaled``: with depth-mu-P."""
    scale = math.sqrt(BASE_DEPTH / depth) if scaled else 1.0
    model = GPT(vocabulary=TOKENS, length=LENGTH, depth=depth, width=width, heads=2, residual_scale=scale)
    return model, depth_optimizer(model, depth, scaled, blocks="blocks")


def depth_optimizer(model: nn.Module, depth: int, scaled: bool, *, blocks: str) -> optim.Optimizer:
    """Adam.  The branch multiplier depth^(-1/2) is part of the last weights of each branch, so they get it twice."""
    ratio = BASE_DEPTH / depth if scaled else 1.0
    factors = {
        name: 1.0 if not name.startswith(blocks) else ratio if name.endswith("out.weight") else math.sqrt(ratio)
        for name, _ in model.named_parameters()
    }
    groups = [{"params": [p], "lr": RATES["Adam", True] * factors[name]} for name, p in model.named_parameters()]
    return optim.Adam(groups)


def loss(output: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy per sample, the mean over its positions."""
    losses = functional.cross_entropy(output.movedim(-1, 1), labels, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def features() -> tuple[Tensor, Tensor]:
    """A batch for MLPs."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, IN, generator=generator), torch.randint(OUT, (16,), generator=generator)


def text() -> tuple[Tensor, Tensor]:
    """A batch for GPTs: random tokens, and the same number of random labels."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(TOKENS, (4, LENGTH), generator=generator) for _ in range(2))  # type: ignore[return-value]


def known() -> Iterator[Known]:
    """All networks of the campaign."""
    standard, mup, broken = (
        {"standard": a, "mup": b} for a, b in (("agrees", "differs"), ("differs", "agrees"), ("differs", "differs"))
    )
    x = features()
    for kind in OPTIMIZERS:
        yield Known(f"MLP, {kind}, standard", partial(mlp, kind=kind, mup=False), x, "width", standard)
        yield Known(f"MLP, {kind}, mu-P", partial(mlp, kind=kind), x, "width", mup)
        layers = ("layers.0.linear", "layers.1.linear", "layers.2.linear") if kind == "Adam" else ("layers.0.linear",)
        for layer in (*layers, HEAD):
            if kind == "Adam" and layer == "layers.0.linear":
                continue  # both parametrizations scale it alike
            yield Known(f"MLP, {kind}, broken", partial(mlp, kind=kind, broken=layer), x, "width", broken, layer)
    yield Known("GPT, Adam, standard", partial(gpt, mup=False), text(), "width", standard)
    yield Known("GPT, Adam, mu-P", gpt, text(), "width", mup)
    for layer in ("blocks.1.mlp.linear", HEAD):
        yield Known("GPT, Adam, broken", partial(gpt, broken=layer), text(), "width", broken, layer)
    for name, factory, data in (("residual MLP", residual_mlp, x), ("GPT", deep_gpt, text())):
        yield Known(f"{name}, unscaled", partial(factory, scaled=False), data, "depth", {"depth_mup": "differs"})
        yield Known(f"{name}, depth-mu-P", partial(factory, scaled=True), data, "depth", {"depth_mup": "agrees"})


def judged(case: Known, seeds: range, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per table: the verdict, the first layer that differs, and whether both are right."""
    begin = time.process_time()
    options: dict[str, Any] = {"widths": sizes} if case.axis == "width" else {"widths": (BASE,), "depths": sizes}
    found = gs.coordinate_check(case.factory, case.data, loss_fn=loss, steps=STEPS, seeds=seeds, **options)
    seconds, rows = time.process_time() - begin, []
    for parametrization, verdict in case.verdicts.items():
        result = found.against(parametrization)
        counts = result.exponents["verdict"].value_counts()
        first = case.broken if parametrization == "mup" else ""
        rows.append({
            "network": case.name, "broken": case.broken, "axis": case.axis, "sizes": " ".join(map(str, sizes)),
            "first_seed": seeds[0], "table": parametrization, "known": verdict, "verdict": result.verdict,
            "first": result.first or "", "right": result.verdict == verdict and (not first or result.first == first),
            **{word: int(counts.get(word, 0)) for word in ("agrees", "differs", "undecided")},
            "cpu_seconds": round(seconds, 1),
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign, write one row per judgment, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=5000)
    parser.add_argument("--quick", action="store_true", help="MLPs only, widths to 256")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in known():
        if options.quick and not case.name.startswith("MLP"):
            continue
        for repeat in range(options.repeats):
            start = options.first_seed + 100 * repeat
            sizes = WIDTHS[:3] if options.quick else WIDTHS if case.axis == "width" else DEPTHS
            rows += judged(case, range(start, start + SEEDS), sizes)
        frame = pd.DataFrame(rows)
        frame.to_csv(options.output / "scaling.csv", index=False)
        Console(stderr=True).print(f"{case.name} {case.broken}: {frame['right'].sum()} of {len(frame)} right so far")
    counts = frame.groupby("network", sort=False)["right"].agg(judgments="count", right="sum").reset_index()
    about = manifest(
        first_seed=options.first_seed, seeds=SEEDS, steps=STEPS, margin=MARGIN,
        counts=counts.to_dict("records"),
        cpu_seconds=round(float(frame.drop_duplicates(["network", "broken", "first_seed"])["cpu_seconds"].sum())),
    )  # fmt: skip
    (options.output / "scaling.json").write_text(json.dumps(about, indent=2) + "\n")
    Console().print(counts.to_string(index=False), highlight=False)


if __name__ == "__main__":
    main()
