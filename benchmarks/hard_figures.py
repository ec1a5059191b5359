"""Figures that are hard to draw: very few or many layers, long names, many curves, huge ranges, sweeps of many keys."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradscope as gs
from experiments import figures
from experiments.archive.tables import Collected
from experiments.reports.roles import Choice
from gradscope import frames, plots

LAYERS = (1, 2, 12, 50, 150, 300)
CURVES = (8, 9, 25)
Drawing = Callable[[], Axes]
SHORT, LONG = "layers.{}", "backbone.encoder.stages.layers.{}.attention.self.output.dense"  # 60 characters
SWEEPS: dict[str, Mapping[str, list[Any]]] = {
    "two": {"activation": ["relu", "tanh"], "norm": ["none", "batch"]},
    "two_many": {"width": [50, 100, 200, 400, 800, 1600, 10_000], "gain": [0.1, 0.5, 1.0, 1.5, 2.0]},
    "two_together": {"activation": ["relu", "selu", "tanh"], "width": [50, 100, 200, 400, 800]},
    "three": {"width": [64, 128, 256], "depth": [10, 20, 40], "norm": ["none", "batch", "layer"]},
    "four": {"width": [64, 128, 256], "depth": [10, 20], "norm": ["none", "batch"], "residual": ["none", "identity"]},
    "five": {"width": [64, 128], "depth": [10, 20], "norm": ["none", "batch"], "residual": ["none", "identity"],
             "activation": ["relu", "tanh", "selu"]},
    "six": {"width": [64, 128], "depth": [10, 20], "norm": ["none", "batch"], "residual": ["none", "identity"],
            "activation": ["relu", "tanh"], "init": ["auto", "a_very_long_name_of_an_initialization_scheme_of_mine"]},
    "words": {"activation": [f"word_number_{number}" for number in range(30)]},
}  # fmt: skip
CHOICES: dict[str, dict[str, str]] = {
    "two_many": {"x": "width", "hue": "gain"},
    "three": {"x": "width", "col": "depth", "hue": "norm"},
    "four": {"x": "depth", "hue": "width", "col": "norm", "row": "residual"},
    "five": {"x": "width", "hue": "activation", "col": "norm,residual", "row": "depth"},
    "six": {"x": "init", "hue": "activation", "col": "norm,residual", "row": "depth,width"},
    "words": {"x": "activation", "y": "gsc"},
}


def rows(
    number: int, slope: float = 0.1, *, names: str = SHORT, seed: int = 0, quantity: str = "gsc", target: int = -1,
    wiggle: float = 0.02, **columns: Any,
) -> pd.DataFrame:  # fmt: skip
    """Tidy rows of ``number`` layers to one target, whose log10 value grows by ``slope`` per layer."""
    index = np.arange(number)
    target = number - 1 if target < 0 else target
    index = index[: target + 1]
    log10 = slope * (target - index) + wiggle * np.sin(7.3 * index + seed) * (index < target)
    made = frames.tidy(
        {
            "layer": [names.format(i) for i in index], "index": index, "depth_from_output": target - index,
            "target": names.format(target), "quantity": quantity,
            "log10_value": log10, "log10_stderr_probe": 0.0, "log10_stderr_sample": 0.05, "reduction": "batch",
            "coupled": False, "num_probes": 0, "num_samples": 5,
        }
    )  # fmt: skip
    return made.assign(seed=seed, **columns)


def networks(number: int, layers: int = 12, names: str = "network {}", **options: Any) -> pd.DataFrame:
    """Rows of several networks with close rates."""
    parts = [rows(layers, 0.01 * n, network=names.format(n), seed=seed, **options)
             for n in range(number) for seed in range(2)]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def records(layers: int, number: int, quantity: str = "gsc", slope: float = 0.1, **options: Any) -> pd.DataFrame:
    """Rows of a monitor with ``number`` records."""
    parts = [rows(layers, slope * (1 + place / number), quantity=quantity, **options).assign(step=100 * place)
             for place in range(number)]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def pairs(number: int, slope: float = 0.1, **options: Any) -> pd.DataFrame:
    """Rows of all pairs of layers, of about 24 targets if there are many."""
    targets = sorted({*range(0, number, -(-number // 24)), number - 1})
    return pd.concat([rows(number, slope, target=target, **options) for target in targets], ignore_index=True)


def metrics(number: int) -> pd.DataFrame:
    """Records of training of several networks."""
    steps = np.arange(0, 1001, 50)
    parts = [pd.DataFrame({"step": steps, "train_loss": 2.3 * np.exp(-steps / (300 + 40 * n)), "model": f"network {n}"})
             for n in range(number)]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def rates(number: int, names: str) -> pd.DataFrame:
    """Growth rates of several networks, with theory."""
    rate = 0.9 + 0.2 * np.linspace(0, 1, number)
    words = ["vanishing", "undecided", "stable", "exploding"]
    return pd.DataFrame({
        "network": [names.format(n) for n in range(number)], "rate": rate, "rate_low": rate - 0.01,
        "rate_high": rate + 0.01, "theory": rate + 0.002, "verdict": [words[4 * n // number] for n in range(number)],
    })  # fmt: skip


def widths(number: int) -> pd.DataFrame:
    """Growth rates of close networks at six widths, with theory."""
    parts = [
        rates(6, "").assign(network=f"network {n}", width=[50, 100, 200, 400, 800, 1600], theory=1 + 0.004 * n)
        for n in range(number)
    ]
    return pd.concat(parts, ignore_index=True)


def measured(depth: int, draw: str) -> Axes:
    """The plot of a measured profile or matrix."""
    torch.manual_seed(0)
    model, x = gs.models.MLP(depth=depth, width=6), torch.randn(8, 6)
    result = gs.gsc(model, x) if draw == "profile" else gs.gsc_matrix(model, x)
    return result.plot()


def sweep(
    keys: Mapping[str, list[Any]], together: bool = False, choice: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Figure]:
    """The figures of a sweep of these keys; with ``together``, the third key ``norm`` belongs to the first."""
    parts = []
    for number, values in enumerate(itertools.product(*keys.values())):
        own = dict(zip(keys, values, strict=True)) | {"model": "mlp", "data": "none"}
        own |= {"norm": f"norm of {values[0]}"} if together else {}
        for seed, quantity in itertools.product(range(2), ("gsc", "sign_diversity")):
            parts.append(rows(11, 0.01 * (number + 1), seed=seed, quantity=quantity, **own))
    collected = Collected(pd.concat(parts, ignore_index=True), None, {})
    with contextlib.redirect_stdout(io.StringIO()):
        return {f".{name}": made for name, made in figures.drawn("mine", collected, [], Choice(**choice)).items()}


def _one(draw: Callable[[], Axes]) -> dict[str, Figure]:
    figure = draw().figure
    assert isinstance(figure, Figure)
    return {"": figure}


def _of(draw: Callable[..., Axes], frame: Callable[..., pd.DataFrame], *args: Any, **options: Any) -> Drawing:
    return lambda: draw(frame(*args, **options))


def _axes() -> Iterator[tuple[str, Drawing]]:
    """Names of cases and what draws their Axes."""
    norms, updates = (partial(plots.over_steps, quantity=name) for name in ("gradient_norm", "update"))
    nlc = partial(plots.statistic, quantity="nlc")
    for number, (kind, names) in itertools.product(LAYERS, (("", SHORT), ("_long", LONG))):
        tag = f"{number}{kind}"
        yield f"profile_{tag}", _of(plots.profile, rows, number, names=names)
        yield f"named_profile_{tag}", _of(plots.named_profile, rows, number, names=names)
        yield f"matrix_{tag}", _of(plots.matrix, pairs, number, names=names)
        yield f"evolution_{tag}", _of(plots.evolution, records, number, 5, names=names)
        yield f"over_steps_{tag}", _of(norms, records, number, 5, "gradient_norm", names=names)
        for told in (1, 5):
            yield f"before_after_{tag}_of_{told}", _of(plots.before_after, records, number, told, names=names)
    for kind, slope, wiggle in (("decades", 24.0, 0.02), ("equal", 0.0, 0.0)):
        of: dict[str, Any] = {"slope": slope, "wiggle": wiggle}
        yield f"profile_{kind}", _of(plots.profile, rows, 13, **of)
        yield f"statistic_{kind}", _of(partial(nlc, log10=True), rows, 13, quantity="nlc", **of)
        yield f"matrix_{kind}", _of(plots.matrix, pairs, 12, **of)
        yield f"evolution_{kind}", _of(plots.evolution, records, 13, 5, **of)
        yield f"before_after_{kind}", _of(plots.before_after, records, 13, 2, **of)
        yield f"over_steps_{kind}", _of(updates, records, 13, 1, "update", **of)
    long = f"a network of mine, {{}}: {LONG.format(7)}"
    for number, (kind, names) in itertools.product(CURVES, (("", "network {}"), ("_long", long))):
        tag = f"{number}{kind}"
        yield f"profile_curves_{tag}", _of(plots.profile, networks, number, names=names)
        yield f"named_profile_curves_{tag}", _of(plots.named_profile, networks, number, names=names)
        yield f"statistic_curves_{tag}", _of(nlc, networks, number, names=names, quantity="nlc")
        yield f"rates_{tag}", _of(plots.rates, rates, number, names)
    for number in CURVES:
        yield f"convergence_{number}", _of(partial(plots.convergence, hue="network"), widths, number)
        yield f"learning_{number}", _of(partial(plots.learning, quantity="train_loss"), metrics, number)
    for depth, draw in itertools.product((1, 2, 12), ("profile", "matrix")):
        yield f"plot_of_{draw}_{depth}", partial(measured, depth, draw)


CASES: dict[str, Callable[[], dict[str, Figure]]] = {
    **{name: partial(_one, draw) for name, draw in _axes()},
    **{f"sweep_{name}": partial(sweep, keys, together=name.endswith("together")) for name, keys in SWEEPS.items()},
    **{f"choice_{name}": partial(sweep, SWEEPS[name], choice=choice) for name, choice in CHOICES.items()},
}
