"""Is the growth of GSC a layer a property of the architecture, whatever the depth and the width?"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gradscope as gs
from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, told
from experiments.studies.depth_width import figures as depth_width_figures
from experiments.studies.depth_width.numbers import FloatArray, Rates, all_rates, name, simultaneous

# The network of the question comes first.
NETWORKS = ("selu", "relu", "relu_layer", "relu_batch", "tanh", "tanh_layer", "tanh_batch")
DEPTHS, WIDTHS = (50, 100, 200), (100, 200, 400)
BATCH_SIZE, NUM_SOURCES, NUM_PROBES, NUM_SEEDS = 32, 10, 4, 39
# Initializations of the first look, and how often it was looked.
FIRST_SEEDS, LOOKS = 13, 2
# Of the log rate: a factor of e over the deepest network, whatever its rate.
TOLERANCE = 1 / max(DEPTHS)

QUESTION = "Does the growth of GSC a layer depend on the depth or on the width of the network?"
METHOD = f"""
{len(NETWORKS)} plain networks, each of the depths {listed(list(map(str, DEPTHS)))} and of the widths
{listed(list(map(str, WIDTHS)))}, on {BATCH_SIZE} samples of Gaussian noise, {NUM_SEEDS} initializations each. GSC
(squared convention) to the output is measured from {NUM_SOURCES} layers at equal distances by {NUM_PROBES} random
probes; the **rate** is its factor a layer, fitted over the half of the network nearer the output
(`gradscope.coefficients.growth`).
Rates are compared by their natural logarithms, because that is what adds up over layers.

**Within tolerance** means: the log rate lies within {TOLERANCE:g} of its mean over all sizes. A log rate that is off by
as much changes GSC by a factor of e over the deepest network, {max(DEPTHS)} layers. The means over the widths at each
depth, and over the depths at each width, are held against that tolerance with intervals that hold together at 95 %
(Student's t over seeds, paired, Bonferroni over the {len(DEPTHS)} and over {LOOKS} looks at the data): all inside,
within tolerance; one outside, not; else undecided.

**A dependence, however little,** is another question: the deepest networks against the shallowest, and the widest
against the narrowest, with intervals that hold together over both for all {len(NETWORKS)} networks and {LOOKS} looks.
It is found where the interval leaves out 0. Where it does not, nothing is found, which does not mean that there is
nothing.

**Mean field** (`gradscope.meanfield.gsc_rate`) is the limit of infinite width, at this batch size. Finite networks
should deviate from it by a constant over the width, so the log rate is also extrapolated: the line through the log
rates against 1 / width, at 0.
"""
HOW_SURE = f"""
Intervals are over initializations, Student's t, 95 %: each for itself in the table and for the limit of infinite width,
together where the method says so. A first look with {FIRST_SEEDS} initializations left the width of SELU undecided by a
hair; the number was then raised to {NUM_SEEDS}, for all networks and once, and comparisons turned from rates to log
rates. Intervals that decide hold at both looks. What the initializations after the first {FIRST_SEEDS} say by
themselves stands in the answer. Probes add little, because the noise of a probe is nearly the same in all layers far
from the output. The batch is smaller than every width; with batch normalization a batch larger than the width lowers
the rate. The steadiness of a rate says nothing of the first and last few layers, whose GSC may change by other factors.
"""


def measure(
    model: nn.Module, x: Tensor, *, generator: torch.Generator, num_probes: int, num_sources: int
) -> pd.DataFrame:
    """GSC to the last layer of an MLP from ``num_sources`` layers at equal distances, itself included."""
    depth = len(model.get_submodule("layers")._modules)
    if depth % num_sources:
        raise ValueError(f"num_sources={num_sources} layers at equal distances need a depth they divide, got {depth}.")
    step = depth // num_sources
    chosen = [f"layers.{number}" for number in range(step - 1, depth, step)]
    return gs.gsc(model, x, layers=chosen, probes=num_probes, generator=generator).to_frame()


def independent(deviations: FloatArray) -> bool | None:
    """Whether all means lie within the tolerance of 0; None where the intervals cannot tell."""
    low, high = simultaneous(deviations, LOOKS)
    if ((low > -TOLERANCE) & (high < TOLERANCE)).all():
        return True
    return False if ((low > TOLERANCE) | (high < -TOLERANCE)).any() else None


def figures(collected: Collected) -> dict[str, Figure]:
    """Rates of all sizes, their deviations from mean field against the width, and two networks layer by layer."""
    found = all_rates(collected.frame, NETWORKS)
    return {
        "rates": depth_width_figures.rates(found, TOLERANCE),
        "width": depth_width_figures.deviations(found),
        "profiles": depth_width_figures.profiles(collected.frame),
    }


def claims(collected: Collected) -> list[Claim]:
    """Depth and width for each network, within tolerance and at all, and the limit of infinite width."""
    found = all_rates(collected.frame, NETWORKS)
    return [
        *(_steady(network, "depth", rates) for network, rates in found.items()),
        *(_steady(network, "width", rates) for network, rates in found.items()),
        *(_dependent(network, "depth", found) for network in found),
        *(_dependent(network, "width", found) for network in found),
        *(_limit(network, rates) for network, rates in found.items()),
    ]


def answer(collected: Collected) -> str:
    """SELU first, as the question has it, then the others, and a table of all."""
    found = all_rates(collected.frame, NETWORKS)
    table = [
        "| network | rate a layer | mean field | log rate, deepest less shallowest | widest less narrowest | "
        "rate at infinite width |",
        "|---|---|---|---|---|---|",
    ]
    for network, rates in found.items():
        table.append(
            f"| {name(network)} | {rates.common:.4f} | {rates.theory:.4f} | {mean(_ends(rates, 'depth')):+.4f} | "
            f"{mean(_ends(rates, 'width')):+.4f} | {geometric_mean(np.exp(rates.lines[:, 0])):.4f} |"
        )
    others = {network: rates for network, rates in found.items() if network != "selu"}
    sentences = [
        _selu(found),
        "The other networks follow." if others else "",
        *(_verdicts(others, size) for size in ("depth", "width")),
        f"A dependence, however little, is found on the depth for {_dependents(found, 'depth')}; on the width for "
        f"{_dependents(found, 'width')}.",
    ]
    return f"{' '.join(filter(None, sentences))}\n\n" + "\n".join(table)


def _selu(found: dict[str, Rates]) -> str:
    """The network of the question in three sentences."""
    rates = found["selu"]
    parts = []
    for size, ends in (("depth", "deepest less the shallowest"), ("width", "widest less the narrowest")):
        change = _change(found, "selu", size)
        parts.append(
            f"Within {TOLERANCE:g} of the common log rate whatever the {size}: {_word(independent(_by(rates, size)))}; "
            f"the {ends} {change:+.4f}, {'a dependence' if _apart(change) else 'no dependence found'}."
        )
    again = len(rates.values) - FIRST_SEEDS
    if again > 1:
        words = [f"{_word(independent(_by(rates, size)[FIRST_SEEDS:]))} for the {size}" for size in ("depth", "width")]
        parts.append(f"The {again} initializations after the first look alone say: {', '.join(words)}.")
    return (
        f"SELU, the network of the question, grows by {rates.common:.4f} a layer in all sizes together (mean field "
        f"{rates.theory:.4f}). {' '.join(parts)}"
    )


def _by(rates: Rates, size: str) -> FloatArray:
    """Log rates by depth or by width, less the common mean."""
    return rates.by_depth if size == "depth" else rates.by_width


def _sizes(rates: Rates, size: str) -> tuple[int, ...]:
    return rates.depths if size == "depth" else rates.widths


def _word(holds: bool | None) -> str:
    return Claim("", holds, "").verdict


def _ends(rates: Rates, size: str) -> FloatArray:
    """Log rate at the largest size less that at the smallest, a seed each."""
    deviations = _by(rates, size)
    return np.asarray(deviations[:, -1] - deviations[:, 0])


def _change(found: dict[str, Rates], network: str, size: str) -> Mean:
    """The mean of `_ends`, with an interval that holds together with those of both sizes, all networks, and looks."""
    return mean(_ends(found[network], size), comparisons=2 * len(found) * LOOKS)


def _apart(change: Mean) -> bool:
    """Whether an interval leaves out 0."""
    return change.low > 0 or change.high < 0


def _steady(network: str, size: str, rates: Rates) -> Claim:
    deviations, sizes = _by(rates, size), _sizes(rates, size)
    low, high = simultaneous(deviations, LOOKS)
    parts = [
        f"{middle:+.4f} ({a:+.4f} to {b:+.4f}) at {number}"
        for middle, a, b, number in zip(deviations.mean(axis=0), low, high, sizes, strict=True)
    ]
    return Claim(
        f"The log rate of {name(network)} stays within tolerance whatever the {size}",
        independent(deviations),
        f"from the common mean {', '.join(parts)}; the tolerance is {TOLERANCE:g}",
    )


def _dependent(network: str, size: str, found: dict[str, Rates]) -> Claim:
    change, sizes = _change(found, network, size), _sizes(found[network], size)
    return Claim(
        f"The rate of {name(network)} depends on the {size}, however little",
        True if _apart(change) else None,
        f"log rate at {sizes[-1]} less that at {sizes[0]} {change:+.4f}",
    )


def _limit(network: str, rates: Rates) -> Claim:
    end, slope = mean(rates.lines[:, 0] - math.log(rates.theory)), mean(rates.lines[:, 1])
    return Claim(
        f"At infinite width the rate of {name(network)} is that of mean field, within tolerance",
        end.within(0.0, TOLERANCE),
        f"log rate extrapolated less mean field {end:+.4f}, the tolerance is {TOLERANCE:g}; at width n that and "
        f"{slope:+.2f} / n",
    )


def _verdicts(found: dict[str, Rates], size: str) -> str:
    """Which networks stay within tolerance whatever that size, in a sentence or more."""
    return told(
        {name(network): independent(_by(rates, size)) for network, rates in found.items()},
        f"Whatever the {size}, the log rate stays within tolerance for {{}}.",
        f"With the {size} it leaves the tolerance for {{}}.",
        f"Whether it stays within tolerance whatever the {size} is undecided for {{}}.",
    )


def _dependents(found: dict[str, Rates], size: str) -> str:
    """Networks whose rate depends on that size, with the difference in log rate."""
    changes = {network: _change(found, network, size) for network in found}
    parts = [f"{name(n)} ({change.value:+.4f})" for n, change in changes.items() if _apart(change)]
    return ", ".join(parts) or "none"


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
)
