"""Whether the growth of GSC per layer is a property of the architecture, whatever the depth and the width."""

from __future__ import annotations

import itertools
import math

import numpy as np

from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table, told
from experiments.studies.depth_width import figures
from experiments.studies.depth_width.measurement import FIRST_SEEDS, LOOKS, NETWORKS, TOLERANCE, measure
from experiments.studies.depth_width.numbers import SIZES, Rates, all_rates, name, simultaneous

__all__ = ["STUDY", "measure"]


def claims(collected: Collected) -> list[Claim]:
    """For each network: steadiness within tolerance, any dependence on size, and the limit of infinite width."""
    found, made = all_rates(collected), []
    for size, (network, rates) in itertools.product(SIZES, found.items()):
        means = zip(simultaneous(rates.by(size), LOOKS), rates.numbers(size), strict=True)
        says = f"The log rate of {name(network)} stays within tolerance whatever the {size}"
        parts = ", ".join(f"{one:+.4f} at {number}" for one, number in means)
        because = f"from the common mean {parts}; the tolerance is {TOLERANCE:g}"
        made.append(Claim(says, rates.within_tolerance(size), because))
    for size, (network, rates) in itertools.product(SIZES, found.items()):
        change, sizes = _change(found, network, size), rates.numbers(size)
        says = f"The rate of {name(network)} depends on the {size}, however little"
        because = f"log rate at {sizes[-1]} less that at {sizes[0]} {change:+.4f}"
        made.append(Claim(says, _depends(change) or None, because))
    for network, rates in found.items():
        end, slope = mean(rates.lines[:, 0] - math.log(rates.theory)), mean(rates.lines[:, 1])
        says = f"At infinite width the rate of {name(network)} is that of mean field, within tolerance"
        because = f"extrapolated log rate less mean field {end:+.4f}, the tolerance is {TOLERANCE:g}"
        made.append(Claim(says, end.within(0, TOLERANCE), f"{because}; at width n it is that plus {slope:+.2f} / n"))
    return made


def _change(found: dict[str, Rates], network: str, size: str) -> Mean:
    """The mean of `Rates.ends`, with an interval that holds together with those of all networks, sizes and looks."""
    return mean(found[network].ends(size), comparisons=len(SIZES) * len(found) * LOOKS)


def _depends(change: Mean) -> bool:
    return change.above(0) is not None


def answer(collected: Collected) -> str:
    """The network of the question in three sentences."""
    found = all_rates(collected)
    rates = found["selu"]
    steady = told(
        {size: rates.within_tolerance(size) for size in SIZES},
        "stays within the tolerance whatever the {},", "leaves the tolerance with the {},",
        "is not shown to stay within the tolerance whatever the {},",
    ).rstrip(",")  # fmt: skip
    ends = {"depth": "from the shallowest to the deepest networks", "width": "from the narrowest to the widest"}
    changes = []
    for size, words in ends.items():
        change = _change(found, "selu", size)
        shows = "a" if _depends(change) else "no"
        changes.append(f"by {change:+.4f} {words}, which shows {shows} dependence on the {size}")
    return (
        f"GSC of SELU, the network of the question, grows by {rates.common:.4f} per layer over all sizes (mean field "
        f"{rates.theory:.4f}). Its log rate {steady} (tolerance {TOLERANCE:g}). It changes {listed(changes)}."
    )


def details(collected: Collected) -> str:
    """The seeds after the first look, the other networks, and a table of all."""
    found = all_rates(collected)
    again, sentences = len(found["selu"].values) - FIRST_SEEDS, []
    if again > 1:
        later = {size: Claim("", found["selu"].within_tolerance(size, FIRST_SEEDS), "").verdict for size in SIZES}
        words = [f"{verdict} for the {size}" for size, verdict in later.items()]
        sentences.append(f"SELU within tolerance, by the {again} seeds after the first look alone: {listed(words)}.")
    for size in SIZES:
        verdicts = {name(network): rates.within_tolerance(size) for network, rates in found.items()}
        sentences.append(told(
            verdicts, f"Whatever the {size}, the log rate stays within tolerance for {{}}.",
            f"It leaves the tolerance with the {size} for {{}}.", "This is undecided for {}.",
        ))  # fmt: skip
    for size in SIZES:
        changes = {network: _change(found, network, size) for network in found}
        shown = [f"{name(network)} ({change.value:+.4f})" for network, change in changes.items() if _depends(change)]
        sentences.append(f"A dependence on the {size}, however little, is found for: {listed(shown)}.")
    rows = [
        [
            name(network), f"{rates.common:.4f}", f"{rates.theory:.4f}",
            *(f"{mean(rates.ends(size)):+.4f}" for size in SIZES), f"{geometric_mean(np.exp(rates.lines[:, 0])):.4f}",
        ]
        for network, rates in found.items()
    ]  # fmt: skip
    header = ["network", "rate per layer", "mean field", "log rate, deepest less shallowest", "widest less narrowest"]
    return f"{' '.join(sentences)}\n\n{table([*header, 'rate at infinite width'], rows)}"


STUDY = Study(
    question="Does the growth of GSC per layer depend on the depth or on the width of the network?",
    use="""
Measure the growth rate of an architecture on a small version of the network. Where the claims below are supported, the
rate carries over to larger sizes within the tolerance. Use the mean-field rate where theory covers the network. Expect
deviations from it that shrink like one over the width.
""",
    method=f"""
There are {len(NETWORKS)} plain networks, each with the depths {{model.depth}} and the widths {{model.width}}. They are
measured on {{data.batch_size}} samples of Gaussian noise, with {{num_seeds}} initializations each. GSC (squared
convention) to the output is measured from {{measurement.num_sources}} layers at equal distances with
{{measurement.num_probes}} random probes. The **rate** is its factor per layer, fitted over the half of the network
nearer the output (`gradscope.coefficients.growth`). Rates are compared by their natural logarithms.

**Within tolerance** means that the log rate differs from its mean over all sizes by less than {TOLERANCE:g}, which
changes GSC by a factor of e over the deepest network. This holds for the mean at each depth, or each width, if all
intervals lie inside. Intervals hold together at 95 % (Student's t over seeds, paired, Bonferroni over the sizes and
over {LOOKS} looks at the data).

**A dependence, however little,** is found if the deepest networks differ from the shallowest, or the widest from the
narrowest. The intervals hold together over both comparisons, all {len(NETWORKS)} networks and {LOOKS} looks. To find
none does not prove that there is none.

**Mean field** (`gradscope.meanfield.gsc_rate`) is the limit of infinite width at this batch size. Finite networks
should deviate from it by a constant over the width. Therefore the log rate is also extrapolated, by its least-squares
line against 1 / width, to 0.
""",
    how_sure=f"""
Intervals are over initializations: 95 %, Student's t. In the table and for infinite width each interval holds by
itself. The first look with {FIRST_SEEDS} initializations left the width of SELU just undecided. The number was then
raised to {{num_seeds}}, once and for all networks, and rates were replaced by log rates. The details give the verdict
of the later initializations alone.

Probes add little error, because their noise is nearly the same in all layers far from the output. The batch is smaller
than every width; with batch normalization, a larger batch lowers the rate. A steady rate says nothing about the first
and last few layers.
""",
    claims=claims,
    answer=answer,
    details=details,
    figures=figures.draw,
    captions={
        "rates": "Growth rate of GSC per layer against the depth, one panel per network, one color per width. The gray "
        "band is the tolerance around the mean over all sizes. The dashed line is mean field. Bars are 95 % intervals.",
        "width": "Log rate per layer less that of mean field, against 1 / width. Lines are least squares and end at "
        "infinite width. Bars are 95 % intervals.",
        "profiles": "log10 GSC less the straight line of mean field, against the distance from the output. A straight "
        "line is a steady rate.",
    },
)
