"""Sentences of the page: the verdict, what it means and what to do, what the numbers rest on, how they were made."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import torch

from gradscope.coefficients.growth import Growth
from gradscope.coefficients.profiles import Matrix
from gradscope.report.tables import number

HEADLINES = {
    "exploding": "▲ Gradients explode with depth",
    "vanishing": "▼ Gradients vanish with depth",
    "stable": "● Gradients neither explode nor vanish",
    "undecided": "■ Undecided: the interval of the rate does not settle it",
    "": "■ No verdict",
}
MEANING = {
    "exploding": "A small random change of a layer grows on its way to the output, relative to the layers it passes. "
    "Gradients grow in the same way on their way back to the input.",
    "vanishing": "A small random change of a layer shrinks on its way to the output, relative to the layers it passes. "
    "Gradients shrink in the same way on their way back to the input.",
    "stable": "A small random change of a layer reaches the output with about the same relative size. "
    "This alone does not make a network healthy: it may be nearly linear, or ignore its input.",
    "undecided": "The interval of the rate contains a bound between two verdicts, so more data are needed.",
    "": "The coefficients below are valid, but they give no growth rate.",
}
ACTIONS = {
    "exploding": "Reduce the depth, add skip connections, or change weights or normalization. Then look at the linear "
    "fit error of the layers: a network that is nearly linear has no growth, but is useless.",
    "vanishing": "Look for saturated or dead units in the table of layers. Then change weights, normalization or "
    "activation, or add skip connections.",
    "stable": "Nothing has to change because of growth. Look at sign diversity, pre-activation std and linear fit "
    "error in the table of layers.",
    "undecided": "Measure more networks that differ in their seed only, and give all results to gs.growth.",
    "": "Read the coefficients of single layers below.",
}


GSC = (
    "GSC of a layer is the factor by which the squared relative size of a small random change of its output is "
    "multiplied, on average, when the change reaches the target."
)


def power(log10_value: float) -> str:
    """Return a factor for people: 1.25 for 0.097, 10^8.43 where the digits of a number would say little."""
    return number(10**log10_value, 3) if abs(log10_value) < 3 else f"10^{log10_value:.4g}".replace("-", "−")


def verdict(rows: pd.DataFrame, growth: Growth | None, reason: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the headline, and pairs of a word and a sentence, for GSC to one target."""
    kind = growth.verdict if growth else ""
    first, last = rows.iloc[0], rows.iloc[-1]
    total = f"GSC from {first['layer']} to {last['layer']} is {power(first['log10_value'])}"
    if first["log10_low"] < first["log10_high"]:
        total += f" (95 % interval {power(first['log10_low'])} to {power(first['log10_high'])})"
    facts = [
        (
            "Rate",
            f"{str(replace(growth, advice='')).replace('rate', 'GSC grows by the factor', 1)}." if growth else reason,
        ),
        ("In total", f"{total}, over {first['depth_from_output']} layers."),
        ("Meaning", MEANING[kind]),
        ("What to do", f"{ACTIONS[kind]} {sentence(growth.advice) if growth else ''}".strip()),
    ]
    return HEADLINES[kind], facts


def sentence(text: str) -> str:
    """Return a clause as a sentence."""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def curve(rows: pd.DataFrame, theory: bool) -> str:
    """Return the text alternative of a profile."""
    known = rows[np.isfinite(rows["log10_value"])]
    high, low = (known.loc[getattr(known["log10_value"], f"idx{end}")()] for end in ("max", "min"))
    text = (
        f"log10 GSC of {len(rows)} layers against the number of layers to the target {rows['layer'].iloc[-1]}. "
        f"It is largest at {high['layer']} ({number(high['log10_value'], 3)}) and smallest at {low['layer']} "
        f"({number(low['log10_value'], 3)}). The band is the 95 % interval; exact values have none. A straight line "
        "is exponential growth."
    )
    if zero := len(rows) - len(known):
        text += f" {zero} layers are not drawn: their GSC is zero or not finite."
    return text + (" The dashed line is mean-field theory." if theory else "")


def pairs(matrix: Matrix) -> str:
    """Return the text alternative of a heat map of all pairs."""
    size = len(matrix.sources)
    exact = "All values are exact." if not matrix.num_probes.any() else (
        f"Values are estimates; the largest relative standard error is {matrix.relative_error:.2g}."
    )  # fmt: skip
    return (
        f"log10 GSC from every layer (column) to every later layer (row), {size} times {size}. Orange is growth, blue "
        f"is shrinking. {exact} Point at a cell to read it; the table below holds the numbers."
    )


def basis(result: Matrix, model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[tuple[str, str]]:
    """Return what the coefficients of a model rest on."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    given = {str(t.dtype).removeprefix("torch.") for t in inputs}
    probes = int(result.num_probes.max())
    how = "exact Jacobian norms, no random probes"
    if probes:
        how = f"{probes} random probes; largest relative standard error {result.relative_error:.2g}"
    coupled = "influence each other (such as by batch statistics)" if result.coupled else "do not influence each other"
    return [
        ("Coefficients", f"GSC in the squared convention, reduction {result.reduction!r}; {how}"),
        ("Samples", f"{result.num_samples}, one batch; samples {coupled}"),
        ("Numbers", f"parameters {', '.join(sorted(kinds))}; data {', '.join(sorted(given))}; norms in float64"),
        ("Mode", f"{'training' if model.training else 'evaluation'} (model.{'train' if model.training else 'eval'}())"),
        ("Interval of GSC", "95 %, for this network on this batch; only probes are random. Exact values have none."),
        (
            "Interval of the rate",
            "95 %, for networks drawn like this one (same architecture, width, batch size and initialization).",
        ),
        ("± in tables", "one standard error over the samples of the batch"),
        *(("Remark", remark) for remark in result.remarks),
    ]


def versions() -> list[tuple[str, str]]:
    """Return the versions of all that computed, and the date."""
    from gradscope import __version__

    return [
        ("Versions", f"gradscope {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("Machine", f"{platform.system()}, {platform.machine()}"),
        ("Date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def call(model: torch.nn.Module, path: str, options: Mapping[str, Any]) -> str:
    """Return the call that made the page, without the arguments that have their default."""
    given = [f"{name}={getattr(value, '__name__', repr(value))}" for name, value in options.items()]
    return f"gs.report({', '.join([type(model).__name__.lower(), 'data', repr(path), *given])})"


def verdicts(growth: pd.DataFrame) -> tuple[str, list[tuple[str, str]]]:
    """Return the headline of a sweep, and which networks have which verdict."""
    kinds = growth["verdict"].where(growth["rate"].notna(), "without a rate")
    names = growth["network"].astype(str).groupby(kinds, sort=False).agg(list)
    each = ", ".join(f"{len(of_kind)} {kind}" for kind, of_kind in names.items())
    return (
        f"{len(growth)} network{'s' * (len(growth) > 1)}: {each}",
        [(sentence(str(kind)).rstrip("."), ", ".join(of_kind)) for kind, of_kind in names.items()],
    )
