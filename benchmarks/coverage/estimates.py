"""How often do 95 % intervals contain the true value?  Every quantity but the growth rate, by repeated measurements.

Samples are drawn with replacement from a finite population, so that the truth is the value of the whole population:
a formula in NumPy for statistics, the exact Jacobian for coefficients.  The networks differ from those with which the
rules for unknown errors were chosen (the first seed of development is 1000).  Finished parts are kept in the folder
``runs`` and not measured again.

Where only some batches have an interval, these are the batches with an unusual value, so their own coverage says
little.  The column ``misses`` counts intervals without the truth among all measurements: at most 7 % for a coverage
of at least 93 %.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import special
from torch import Tensor, nn

import gradscope as gs
from benchmarks.coverage.truths import KNOWN, STATISTICS, Population, gradient_truths, grouped, statistic_truths
from gradscope.coefficients.gains import Gain, Length
from gradscope.coefficients.reductions import Tally
from gradscope.models.mlp import MLP

SEED = 2027
# Repetitions: the standard error of 95 % is 1.1 %, 1.5 % and 2.2 %.
REPLAYED, MEASURED, SLOW = 400, 200, 100
Z = 1.959964
Replay = tuple[float, float, float]  # value, low, high, on the scale of the interval


def run(folder: Path, *, quick: bool, processes: int = 1) -> pd.DataFrame:
    """Measure all coverages, each part in one of the processes, write ``estimates.csv`` and return its rows."""
    parts = (statistics, gradients, probes, streams, nonlinearity, parameters, depths)
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        frame = pd.concat(pool.map(partial(complete, folder / "runs", quick=quick), parts), ignore_index=True)
    frame.to_csv(folder / "estimates.csv", index=False, float_format="%.4g")
    return frame


def complete(runs: Path, part: Callable[[bool], Iterator[dict[str, object]]], *, quick: bool) -> pd.DataFrame:
    """Measure one part unless its file exists, print every row, and return the rows."""
    file = runs / f"estimates_{part.__name__}.csv"
    if not file.exists():
        torch.manual_seed(SEED)
        started, rows = time.perf_counter(), []
        for found in part(quick):
            rows.append(found)
            if not quick:
                print(*(f"{value:.4g}" if isinstance(value, float) else value for value in found.values()), flush=True)
        runs.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(file, index=False, float_format="%.4g")
        print(f"{part.__name__}: {time.perf_counter() - started:.0f} s", flush=True)
    return pd.read_csv(file)


def row(quantity: str, network: str, setting: str, truth: float, replays: list[Replay]) -> dict[str, object]:
    """Coverage with its standard error, misses, width over that of an ideal interval, and the share of nulls."""
    values, low, high = np.transpose(replays)
    known = ~(np.isnan(low) | np.isnan(high))
    inside = (low[known] <= truth + 1e-12) & (truth - 1e-12 <= high[known])
    num, share = int(known.sum()), float(inside.mean()) if known.any() else math.nan
    finite = values[np.isfinite(values)]
    ideal = 2 * Z * float(np.std(finite)) if len(finite) else 0.0
    return {
        "quantity": quantity, "network": network, "setting": setting, "replays": len(replays), "coverage": share,
        "coverage_stderr": math.sqrt(share * (1 - share) / num) if num else math.nan,
        "misses": float(np.sum(~inside)) / len(replays),
        "relative_width": float(np.mean((high - low)[known])) / ideal if num and ideal > 0 else math.nan,
        "nulls": 1 - num / len(replays),
    }  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(depth: int, width: int, activation: str, norm: str = "none") -> nn.Module:
    return MLP(depth=depth, width=width, activation=activation, norm=norm, generator=seeded(SEED)).double()


def inputs(num: int, width: int) -> Tensor:
    return torch.randn(num, width, dtype=torch.float64, generator=seeded(SEED + 1))


def of_estimate(found: gs.Estimate, signed: bool) -> Replay:
    if not signed:
        return (found.log10_value, *found.interval())
    margin = math.nan if found.stderr is None else Z * found.stderr
    return found.value, found.value - margin, found.value + margin


def resampled(population: Population, size: int, replays: int) -> Iterator[Population]:
    generator = seeded(SEED + size)
    for _ in range(replays):
        yield population.take(torch.randint(0, len(population), (size,), generator=generator))


def statistics(quick: bool) -> Iterator[dict[str, object]]:
    replays = 6 if quick else REPLAYED
    cases = [("tanh", "none", 4), ("tanh", "layer", 20), ("selu", "none", 20), ("relu", "none", 15)]
    for activation, norm, depth in cases:
        population = Population.of(network(depth, 40, activation, norm), inputs(1500 if quick else 4000, 40))
        truths = statistic_truths(population)
        for size in (30, 100, 300):
            found: dict[str, list[Replay]] = {m.quantity: [] for m in STATISTICS}
            for number, drawn in enumerate(resampled(population, size, replays)):
                for m in STATISTICS if number < 20 else KNOWN:  # some errors are always unknown
                    found[m.quantity].append(of_estimate(m(drawn.values[m.of]), m.signed))
            for m in STATISTICS:
                truth = truths[m.quantity]
                truth = truth if m.signed else math.log10(truth) if truth > 0 else -math.inf
                yield row(m.quantity, f"{activation} {norm} {depth}", f"B={size}", truth, found[m.quantity])


def gradients(quick: bool) -> Iterator[dict[str, object]]:
    replays = 4 if quick else REPLAYED
    measures = (gs.measures.GradientNorm(), gs.measures.GradientCosine(), gs.measures.SignalToNoise())
    for activation, offset in (("tanh", 0.0), ("relu", 0.0), ("relu", 1.0)):
        model = nn.Sequential(network(3, 16, activation), nn.Linear(16, 4, dtype=torch.float64))
        x = inputs(100 if quick else 3000, 16) + offset
        labels = torch.arange(len(x)) % 4
        weights: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}

        def loss(given: dict[str, Tensor], one: Tensor, label: Tensor, model: nn.Module = model) -> Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(model, given, (one[None],)), label[None])

        found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, labels)
        g = found["0.layers.1.linear.weight"].detach().flatten(1)
        truths = gradient_truths(g.numpy())
        for size in (100, 300, 1000):
            generator, rows = seeded(size), {m.quantity: list[Replay]() for m in measures}
            for _ in range(replays):
                drawn = grouped(g[torch.randint(0, len(g), (size,), generator=generator)])
                for m in measures:
                    rows[m.quantity].append(of_estimate(m(drawn), m.signed))
            for m in measures:
                truth = truths[m.quantity] if m.signed else math.log10(truths[m.quantity])
                yield row(m.quantity, f"{activation} 3, mean {offset:g}", f"B={size}", truth, rows[m.quantity])


def profiles(model: nn.Module, x: Tensor, replays: int, **options: object) -> tuple[list[str], list[list[Replay]]]:
    """Names of the layers, and for each of them the replays of its coefficient."""
    found: list[list[Replay]] = []
    names: list[str] = []
    for seed in range(replays):
        profile = gs.gsc(model, x, generator=seeded(SEED + seed), **options)  # type: ignore[arg-type]
        low, high = profile.interval()
        names = list(profile.layers[:-1])
        found.append(list(zip(profile.log10_values[:-1, 0], low[:-1, 0], high[:-1, 0], strict=True)))
    return names, [list(layer) for layer in zip(*found, strict=True)]


def probes(quick: bool) -> Iterator[dict[str, object]]:
    cases = {
        "selu 10": (network(10, 32, "selu"), inputs(16, 32)),
        "relu batch 8, width 20": (network(8, 20, "relu", "batch"), inputs(16, 20)),
        "relu batch 8, width 50": (network(8, 50, "relu", "batch"), inputs(16, 50)),
    }
    settings: dict[str, dict[str, object]] = {
        "2 probes": {"probes": 2}, "4 probes": {"probes": 4}, "8 probes": {"probes": 8}, "auto": {"probes": "auto"},
        "rtol 0.1": {"rtol": 0.1},
    }  # fmt: skip
    for name, (model, x) in cases.items():
        exact = gs.gsc(model, x, probes="exact").log10_values[:, 0]
        for setting, options in settings.items():
            slow = setting in ("auto", "rtol 0.1")
            layers, found = profiles(model, x, 2 if quick else SLOW // 2 if slow else SLOW, **options)
            for at in (0, len(layers) // 2, len(layers) - 1):
                yield row("gsc", name, f"{setting}, {layers[at]}", float(exact[at]), found[at])


def jacobians(model: nn.Module, units: Tensor) -> Tensor:
    """The Jacobians (units, outputs, inputs) of all units (units, samples, width)."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # `vmap` cannot update running statistics, which training mode ignores
            module.track_running_stats, module.num_batches_tracked = False, None
            module.running_mean = module.running_var = None
    found: Tensor = torch.func.vmap(torch.func.jacrev(model), chunk_size=100)(units)
    return found.detach().reshape(len(units), units[0].numel(), units[0].numel())


def streams(quick: bool) -> Iterator[dict[str, object]]:
    """From the input to the output.  Coupled: the population is a set of batches.  Independent: a set of samples."""
    replays = 4 if quick else REPLAYED
    cases = [("selu", "none", 6), ("relu", "none", 6), ("tanh", "layer", 15), ("relu", "batch", 6)]
    for activation, norm, depth in cases:
        model, x = network(depth, 16, activation, norm), inputs(80 if quick else 8000 if norm == "batch" else 4000, 16)
        units = x.reshape(-1, 8 if norm == "batch" else 1, 16)
        J = jacobians(model, units).numpy()  # (units, outputs, inputs)
        a = np.square(J).sum(axis=(1, 2))
        p = units.square().sum(dim=(1, 2)).numpy()
        q = np.array([float(model(unit).detach().square().sum()) for unit in units])
        entries, rng = units[0].numel(), np.random.default_rng(SEED)
        truth = math.log10(a.mean() * p.mean() / (q.mean() * entries))
        for count in (5, 10, 30) if norm == "batch" else (40, 160):
            for num in (0, 4):
                found = []
                for _ in range(replays):
                    rows = rng.integers(len(a), size=count)
                    norms = np.sqrt(a[rows])[None, None]
                    if num:
                        signs = rng.choice([-1.0, 1.0], size=(num, count, J.shape[1]))
                        norms = np.linalg.norm(np.einsum("pbi,bij->pbj", signs, J[rows]), axis=2)[None]
                    exponents = np.zeros((1, max(num, 1)), dtype=np.int64)
                    gain = Gain.of(norms, exponents, num_fixed=int(not num), coupled=False)
                    lengths = [Length(square[None, rows], np.zeros(1, dtype=np.int64)) for square in (p, q)]
                    sizes = [entries * count]
                    tally = Tally.of(gain, *lengths, sizes=sizes, reduction="batch", batch_size=count)
                    error = np.hypot(tally.log10_stderr_probe, tally.log10_stderr_sample)
                    margin = error * special.stdtrit(tally.sample_freedom, 0.975)
                    value = float(tally.log10_values[0])
                    found.append((value, value - float(margin[0]), value + float(margin[0])))
                setting = f"{count} {'batches' if norm == 'batch' else 'samples'}, {num or 'no'} probes"
                yield row("gsc of a stream", f"{activation} {norm} {depth}", setting, truth, found)


def nonlinearity(quick: bool) -> Iterator[dict[str, object]]:
    for activation, norm, depth in (("tanh", "none", 3), ("relu", "none", 10), ("tanh", "layer", 8)):
        model, x = network(depth, 12, activation, norm), inputs(150 if quick else 3000, 12)
        J = jacobians(model, x[:, None])
        mean_gram = torch.einsum("bij,bik->jk", J, J) / len(x)
        spread_x = torch.cov(x.T, correction=0)
        spread_f = torch.cov(model(x).detach().T, correction=0)
        truth = 0.5 * math.log10(float((mean_gram * spread_x).sum() / spread_f.trace()))
        for size, plan in ((40, "exact"), (120, "exact"), (120, 4)):
            generator, found = seeded(size), []
            for _ in range(2 if quick else SLOW):
                drawn = x[torch.randint(0, len(x), (size,), generator=generator)]
                found.append(of_estimate(gs.nlc(model, drawn, probes=plan, generator=generator), False))
            yield row("nlc", f"{activation} {norm} {depth}", f"N={size}, {plan}", truth, found)


def parameters(quick: bool) -> Iterator[dict[str, object]]:
    for name, norm in (("selu", "none"), ("relu", "batch")):
        model, x = network(5, 20, name, norm), inputs(8, 20)
        exact = gs.parameter_gsc(model, x, probes="exact").to_frame()
        for num in (2, 4, 8):
            found = [
                gs.parameter_gsc(model, x, probes=num, generator=seeded(SEED + s)).to_frame()
                for s in range(2 if quick else MEASURED)
            ]
            for at in (0, 4, 5):
                value, low, high = (
                    [float(f[column].iloc[at]) for f in found] for column in ("log10_value", "log10_low", "log10_high")
                )
                truth = float(exact["log10_value"].iloc[at])
                setting = f"{num} probes, {exact['layer'].iloc[at]}"
                replays = list(zip(value, low, high, strict=True))
                yield row(str(exact["quantity"].iloc[at]), f"{name} {norm} 5", setting, truth, replays)


def depths(quick: bool) -> Iterator[dict[str, object]]:
    """Contributions to the Jacobian: over probes of one batch, and over samples."""
    for name, depth, width in (("tanh", 4, 10), ("relu", 6, 12)):
        yield from _depths(quick, name, depth, width)


def _depths(quick: bool, name: str, depth: int, width: int) -> Iterator[dict[str, object]]:
    before, after = network(depth, width, name), network(depth, width, name)
    with torch.no_grad():
        for p in after.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=seeded(SEED + 3)))
    x = inputs(400, width)
    for setting, size, plan in (("8 probes", 8, 8), ("20 samples", 20, "exact"), ("60 samples", 60, "exact")):
        batch, generator = x[:8] if plan == 8 else x, seeded(size)
        exact = gs.effective_depth(after, batch, initial=before, probes="exact").log10_values
        found = []
        for _ in range(2 if quick else SLOW):
            drawn = batch if plan == 8 else x[torch.randint(0, len(x), (size,), generator=generator)]
            found.append(gs.effective_depth(after, drawn, initial=before, probes=plan, generator=generator))
        for order in (0, 2, 4):
            replays = [(d.log10_values[order], *(e[order] for e in d.contribution_intervals())) for d in found]
            yield row("effective_depth", f"{name} {depth}", f"{setting}, order {order}", float(exact[order]), replays)
