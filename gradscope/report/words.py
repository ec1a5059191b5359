"""Sentences of the page: the verdict, what it means and what to do, what the numbers rest on, how they were made."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import torch

from gradscope.coefficients.growth import Growth
from gradscope.coefficients.profiles import Matrix
from gradscope.comparing.models import interval_text
from gradscope.report.tables import number, supported

EXPLODING, VANISHING = "exploding", "vanishing"
AGAINST = "against"  # added to a verdict on the rate that does not hold for the whole network
HEADLINES = {
    EXPLODING: "▲ Gradients explode with depth",
    VANISHING: "▼ Gradients vanish with depth",
    "stable": "● Gradients neither explode nor vanish with depth",
    "undecided": "■ Undecided whether gradients grow or shrink with depth",
    "": "■ No growth rate",
    EXPLODING + AGAINST: "◆ Gradients grow from layer to layer, but not over the whole network",
    VANISHING + AGAINST: "◆ Gradients shrink from layer to layer, but not over the whole network",
}
MEANING = {
    EXPLODING: "A small random change of a layer, relative to the size of the layer, grows on its way to the output. "
    "Relative to the layers, gradients grow in the same way on their way back to the input.",
    VANISHING: "A small random change of a layer, relative to the size of the layer, shrinks on its way to the "
    "output. Relative to the layers, gradients shrink in the same way on their way back to the input.",
    "stable": "From layer to layer, the relative size of a small random change stays about the same. "
    "This alone does not make a network healthy: it may be nearly linear, or ignore its input.",
    "undecided": "The 95 % interval of the rate contains a bound between two verdicts, so more data are needed.",
    "": "The coefficients below are valid, but they give no growth rate.",
    EXPLODING + AGAINST: "The rate describes the layers that repeat. Other layers make up for this growth, so "
    "nothing explodes at this depth.",
    VANISHING + AGAINST: "The rate describes the layers that repeat. Other layers make up for this decrease, so "
    "nothing vanishes at this depth.",
}
DEEPER = "Before you add layers of the same kind, measure the deeper network."
ACTIONS = {
    EXPLODING: "Reduce the depth, add skip connections, or change weights or normalization. Then look at the linear "
    "fit error of the layers: a network that is nearly linear has no growth, but is useless.",
    VANISHING: "Look for saturated or dead units in the table of layers. Then change weights, normalization or "
    "activation, or add skip connections.",
    "stable": "Nothing has to change because of growth. Look at sign diversity, pre-activation std and linear fit "
    "error in the table of layers.",
    "undecided": "Measure more networks that differ in their seed only, and give all results to gs.growth.",
    "": "Read the coefficients of single layers below.",
    EXPLODING + AGAINST: f"Nothing has to change at this depth. {DEEPER}",
    VANISHING + AGAINST: f"Nothing has to change at this depth. {DEEPER}",
}
# A fit that leaves out at most this many layers contains the first ones, or nearly so.
FEW_LEFT_OUT = 3
REPEATED = (
    "The rate was fitted to nearly all layers. If the first ones differ from the others, choose the layers that "
    "repeat, with layers= of gs.gsc."
)

GSC = (
    "Change the output of a layer a little, at random. GSC is the factor by which the squared relative size of this "
    "change has grown (above 1) or shrunk (below 1) when it reaches the target, the last layer."
)


def factor(log10_value: float, low: float = math.nan, high: float = math.nan) -> str:
    """Return a factor with its 95 % interval, given as log10, with as many digits as the interval supports.

    >>> factor(math.log10(0.125)), factor(8.4312, 8.40, 8.46), factor(-math.inf)
    ('0.1250', '10^8.431 (95 % interval 10^8.400 to 10^8.460)', '0')
    """
    if math.isinf(log10_value):
        return "0" if log10_value < 0 else "∞"
    powers = bool(abs(log10_value) >= 3)
    ends = [value if powers else 10**value for value in (log10_value, low, high)]
    half = (ends[2] - ends[1]) / 2
    sure = 1e-9 * abs(ends[0]) < half < math.inf
    value, low_end, high_end = (f"{'10^' * powers}{supported(e, half) if sure else number(e, 4)}" for e in ends)
    return f"{value} (95 % interval {low_end} to {high_end})" if sure else value


def against(verdict: str, log10_low: float, log10_high: float) -> bool:
    """Return whether GSC of the whole network, given by its interval, is not on the side of 1 that the rate is on."""
    return (verdict == EXPLODING and log10_low <= 0) or (verdict == VANISHING and log10_high >= 0)


def verdict(rows: pd.DataFrame, growth: Growth | None, reason: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the verdict, the headline, and pairs of a word and a sentence, for GSC to one target.

    The headline holds GSC of the whole network beside the verdict, which is one on the rate.  The verdict is "" if
    there is no rate, or if the rate and the whole network lie on different sides of 1.
    """
    kind = growth.verdict if growth else ""
    first, target, num = rows.iloc[0], rows["layer"].iloc[-1], len(rows) - 1
    value, low, high = (float(first[name]) for name in ("log10_value", "log10_low", "log10_high"))
    facts = [("Rate", _rate(growth, target, num) if growth else reason)]
    exact = " It is exact." if low == high else " Its error is unknown." if math.isnan(low) else ""
    total = f"GSC from {first['layer']} to {target}, the target, is {factor(value, low, high)}.{exact}"
    if mixed := against(kind, *((value, value) if math.isnan(low) else (low, high))):
        change = rows["log10_value"].diff().iloc[1:] * (1 if kind == EXPLODING else -1)
        place = int(change.to_numpy().argmax()) + 1
        before, after = (factor(rows["log10_value"].iloc[p]) for p in (place - 1, place))
        where = rows["layer"].iloc[place]
        total += f" The largest step against the rate is at {where}: GSC is {before} before it and {after} after it."
    said = kind + AGAINST * mixed
    advice = [ACTIONS[said], sentence(growth.advice) if growth else ""]
    if growth and kind == "undecided" and num - growth.num_rows <= FEW_LEFT_OUT:
        advice.append(REPEATED)
    facts += [
        ("Whole network", total),
        ("Meaning", MEANING[said]),
        ("What to do", " ".join(filter(None, advice))),
    ]
    return (
        "" if mixed else kind,
        f"{HEADLINES[said]}: GSC of the network is {factor(value, low, high).partition(' ')[0]}",
        facts,
    )


def _rate(growth: Growth, target: str, num: int) -> str:
    """Return sentences on the rate, on what it was fitted to, and on a curve that bends."""
    interval = interval_text(growth.rate, growth.rate_low, growth.rate_high).replace("(", "(95 % interval ")
    text = f"With every layer further from {target}, GSC is multiplied by {interval}."
    if growth.num_rows < num:
        text += f" This rate was fitted to {growth.num_rows} of {num} layers, those nearer to {target}."
    if growth.curved:
        text += f" The curve bends: further away the rate is a different one (p = {growth.curved_p:.1g})."
    return text


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
        f"({number(low['log10_value'], 3)}). A straight line is exponential growth."
    )
    if (known["log10_low"] < known["log10_high"]).any():
        text += " The band is the 95 % interval."
    if zero := len(rows) - len(known):
        text += f" Not drawn, because GSC is zero or not finite: {zero} layer{'s' * (zero > 1)}."
    return text + (" The dashed line is mean-field theory." if theory else "")


def pairs(matrix: Matrix) -> str:
    """Return the text alternative of a heat map of all pairs."""
    size = len(matrix.sources)
    return (
        f"log10 GSC from every layer (column) to every later layer (row), {size} times {size}. Orange is growth, blue "
        f"is shrinking. {_errors(matrix)}"
    )


def _errors(result: Matrix) -> str:
    """Return a sentence on the errors of coefficients."""
    if not (probes := int(result.num_probes.max())):
        return "All values are exact."
    text, error = f"Estimated from {probes} random probe{'s' * (probes > 1)}", result.relative_error
    if (np.isnan(result.log10_stderr_probe) & np.isfinite(result.log10_values)).any() or math.isnan(error):
        return f"{text}; the errors are unknown, at least in part."
    return f"{text}; the largest relative standard error is {error:.2g}."


def basis(result: Matrix, model: torch.nn.Module, inputs: Sequence[torch.Tensor], rate: bool) -> list[tuple[str, str]]:
    """Return what the coefficients of a model, and with ``rate`` the growth rate, rest on."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    given = {str(t.dtype).removeprefix("torch.") for t in inputs}
    coupled = "influence each other, such as by batch statistics" if result.coupled else "do not influence each other"
    facts = [
        ("Coefficients", f"GSC in the squared convention. The batch counts as one long vector. {_errors(result)}"),
        ("Samples", f"{result.num_samples} in one batch. Samples {coupled}."),
        ("Numbers", f"Parameters: {_listed(kinds)}. Data: {_listed(given)}. Norms: float64."),
        ("Mode", f"{'Training: model.train()' if model.training else 'Evaluation: model.eval()'}."),
    ]
    if result.num_probes.any():
        facts.append(("Interval of GSC", "95 %, for this network on this batch: only the probes are random."))
    if rate:
        drawn = "same architecture, width, batch size and initialization"
        facts.append(("Interval of the rate", f"95 %, for networks drawn like this one: {drawn}."))
    return facts + [("Remark", remark) for remark in result.remarks]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


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
    totals = growth.get("log10_gsc", pd.Series(math.nan, growth.index))
    mixed = [
        f"{row['network']} ({factor(row['total'])})"
        for row in growth.assign(total=totals).to_dict("records")
        if against(row["verdict"], row["total"], row["total"])
    ]
    beware = "Rate and whole network differ: GSC of the network lies on the other side of 1 for "
    each = ", ".join(f"{len(of_kind)} {kind}" for kind, of_kind in names.items())
    return (
        f"{len(growth)} network{'s' * (len(growth) > 1)}: {each}",
        [(sentence(str(kind)).rstrip("."), ", ".join(of_kind)) for kind, of_kind in names.items()]
        + ([("Beware", f"{beware}{', '.join(mixed)}.")] if mixed else []),
    )
