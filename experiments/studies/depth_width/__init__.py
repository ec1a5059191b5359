"""Whether the growth rate of GSC depends only on the architecture, and not on depth and width."""

from __future__ import annotations

import itertools
import math

import numpy as np

from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean, verdict
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table, told
from experiments.studies.depth_width import figures
from experiments.studies.depth_width.measurement import FIRST_SEEDS, LOOKS, NETWORKS, TOLERANCE, measure
from experiments.studies.depth_width.numbers import SIZES, Rates, all_rates, name, simultaneous

__all__ = ["STUDY", "measure"]


def claims(collected: Collected) -> list[Claim]:
    """For each network: whether the rate stays within tolerance, depends on the size, and tends to mean field."""
    found, made = all_rates(collected), []
    for size, (network, rates) in itertools.product(SIZES, found.items()):
        means = zip(simultaneous(rates.by(size), LOOKS), rates.numbers(size)[:-1], strict=True)
        says = f"The log growth rate of GSC in {name(network)} stays within tolerance at every {size}"
        parts = listed(f"{one:+} for {size} {number}" for one, number in means)
        because = f"log rate minus the log rate at {size} {rates.numbers(size)[-1]}: {parts}"
        because = f"{because}; required: log rate at each smaller {size} within {TOLERANCE:g} of that at the largest"
        made.append(Claim(says, rates.within_tolerance(size), because))
    for size, (network, rates) in itertools.product(SIZES, found.items()):
        change, sizes = _change(found, network, size), rates.numbers(size)
        says = f"The growth rate of GSC in {name(network)} depends on the {size}"
        because = f"change of the log rate from {size} {sizes[0]} to {sizes[-1]}: {change:+}"
        rule = (
            "supported: the interval of the change, unrounded, excludes 0; contradicted: the interval contains 0 and "
            f"lies within {TOLERANCE:g} of 0"
        )
        made.append(Claim(says, _depends(change), f"{because}; {rule}"))
    for network, rates in found.items():
        end, slope = mean(rates.lines[:, 0] - math.log(rates.theory)), mean(rates.lines[:, 1])
        says = (
            f"Extrapolated to infinite width, the growth rate of GSC in {name(network)} agrees with mean field within "
            "tolerance"
        )
        because = f"extrapolated log rate minus log rate of mean field: {end:+}"
        limit = f"required: difference of the log rates within {TOLERANCE:g} of 0"
        line = f"slope of the log rate against 1 / width: {slope:+}"
        made.append(Claim(says, end.within(0, TOLERANCE), f"{because}; {limit}; {line}"))
    return made


def _change(found: dict[str, Rates], network: str, size: str) -> Mean:
    """The mean of `Rates.ends`; the interval is simultaneous over all networks, depth and width, and both analyses."""
    return mean(found[network].ends(size), comparisons=len(SIZES) * len(found) * LOOKS)


def _depends(change: Mean) -> bool | None:
    """True if the interval excludes 0; False if it contains 0 and lies within the tolerance; else None."""
    return verdict(change.above(0) is not None, change.within(0, TOLERANCE) is True)


def answer(collected: Collected) -> str:
    """In how many networks the rate is the same at every depth and every width, and the rate of the SELU network."""
    found, sentences = all_rates(collected), []
    for size in SIZES:
        verdicts = {name(network): rates.within_tolerance(size) for network, rates in found.items()}
        num, sizes = list(verdicts.values()).count(True), found["selu"].numbers(size)
        same = f"is the same within {100 * TOLERANCE:g} % in"
        kept = f"{same} {num} of {len(found)} networks ({{}});" if num < len(found) else f"{same} {{}};"
        words = told(verdicts, kept, "it changes by more in {};", "undecided: {};").rstrip(";")
        sentences.append(f"From {size} {sizes[0]} to {size} {sizes[-1]}, the growth rate of GSC per layer {words}.")
    rates = found["selu"]
    return (
        f"{' '.join(sentences)} In the largest SELU network, GSC grows by a factor of {rates.largest} per layer; "
        f"mean-field theory predicts {rates.theory:.4f}."
    )


def details(collected: Collected) -> str:
    """Verdicts from the seeds that were added after the first look, and results of all networks."""
    found = all_rates(collected)
    again, parts = len(found["selu"].values) - FIRST_SEEDS, []
    if again > 1:
        later = {size: Claim("", found["selu"].within_tolerance(size, FIRST_SEEDS), "").verdict for size in SIZES}
        words = [f'{verdict} for "at every {size}"' for size, verdict in later.items()]
        seeds = f"{again} seeds were added after the first look at the data. With these seeds alone, the claim that"
        rate = f"the log growth rate of GSC in {name('selu')} stays within tolerance"
        parts.append(f"{seeds} {rate} is {listed(words)}.")
    for size in SIZES:
        changes = {network: _change(found, network, size) for network in found}
        shown = [f"{name(network)} ({change.value:+.4f})" for network, change in changes.items() if _depends(change)]
        small = [name(network) for network, change in changes.items() if _depends(change) is False]
        parts.append(
            f"Networks whose rate is shown to depend on the {size} (in brackets: change of the log rate): "
            f"{listed(shown)}. Networks whose rate is shown to change by less than the tolerance, if at all: "
            f"{listed(small)}."
        )
    rows = []
    for network, rates in found.items():
        ends, limit = (f"{mean(rates.ends(size)):+}" for size in SIZES), geometric_mean(np.exp(rates.lines[:, 0]))
        rows.append([name(network), rates.largest, f"{rates.theory:.4f}", *ends, limit])
    columns = (f"change of the log rate from smallest to largest {size}" for size in SIZES)
    header = ["network", "rate of the largest network", "mean-field rate", *columns, "rate at infinite width"]
    return "\n\n".join([*parts, table(header, rows)])


STUDY = Study(
    question="Does the growth of GSC per layer depend on the depth or on the width of the network?",
    use="""
Measure the growth rate of an architecture on a small network. The claims below say which architectures have the same
rate, within tolerance, at all depths or all widths of this study. If mean-field theory covers the architecture, you can
use the mean-field rate without measuring. The error of the mean-field rate is about proportional to 1 / width.
""",
    method=f"""
We measure {len(NETWORKS)} plain networks, each with the depths {{model.depth}} and the widths {{model.width}}, on
{{data.batch_size}} samples of Gaussian noise, with {{num_seeds}} initializations each. GSC (squared convention) to the
output is measured from {{measurement.num_sources}} equally spaced layers with {{measurement.num_probes}} random probes.
The **rate** is the factor by which GSC grows per layer. It is fitted to all of these layers except the first and the
last (`gradscope.coefficients.growth`). Rarely, the fit leaves out one to three more layers near the output, because GSC
changes there by an outlying factor. The **log rate** is the natural logarithm of the rate.

A network is **within tolerance** over depth if its log rate at every depth differs by less than {TOLERANCE:g} from its
log rate at the largest depth. Each of these log rates is a mean over the widths. The whole interval of each difference
must lie within {TOLERANCE:g} of 0. Over width, the same definition holds with depth and width exchanged. Over the
{1 / TOLERANCE:.0f} layers of the deepest networks, a difference of {TOLERANCE:g} in the log rate changes GSC by a
factor of e.

Intervals are 95 % Student's t intervals over initializations. The data were analyzed {LOOKS} times: with the first
{FIRST_SEEDS} initializations, and with all {{num_seeds}}. For each network, the log rate at every smaller depth is
compared with the log rate at the largest depth. The intervals of these differences are simultaneous (Bonferroni) over
the smaller depths and over both analyses. The same holds for widths.

The claim that a rate **depends on the depth** compares the log rates at the smallest and the largest depth. It is
supported if the interval of their difference excludes 0, however small the difference. It is contradicted if the
interval contains 0 and lies within {TOLERANCE:g} of 0. The dependence on the width is tested in the same way. Intervals
of these differences are simultaneous over all {len(SIZES) * len(NETWORKS)} tests (depth and width of each network) and
over both analyses.

**Mean field** (`gradscope.meanfield.gsc_rate`) is the limit of infinite width. With batch normalization, the rate in
this limit depends on the batch size, which is {{data.batch_size}} here. The deviation of a finite network from mean
field should be proportional to 1 / width. To test the limit, we fit a line to the log rate as a function of 1 / width
(least squares), and extrapolate this line to 1 / width = 0.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals over initializations. Those in the table under "All results" and for infinite
width are not corrected for multiple comparisons. A first analysis of {FIRST_SEEDS} initializations could not decide
whether the SELU network is within tolerance at every width. Then the number of initializations was raised once, to
{{num_seeds}} for all networks, and log rates were compared instead of rates. For the SELU network, "All results" also
gives the verdicts of the added initializations alone.

Random probes add little error to a rate: their noise shifts log GSC of all layers far from the output by nearly the
same amount, and such a shift does not change the rate. The study covers one batch size, which is smaller than every
width. With batch normalization, a larger batch lowers the rate. In the first and last layers, GSC may grow at another
rate.
""",
    claims=claims,
    answer=answer,
    details=details,
    figures=figures.draw,
    captions={
        "rates": "Growth rate of GSC per layer against the depth, one panel per network, one color per width. The gray "
        "band is the tolerance around the rate at the largest depth and width. The dashed line is the mean-field "
        "prediction. Bars are 95 % intervals. Points are shifted slightly sideways.",
        "width": "Deviation from mean field: natural logarithm of (measured rate / mean-field rate), against 1 / "
        "width. The lines are least-squares fits, extrapolated to infinite width. Points of each network are shifted "
        "slightly sideways. Bars are 95 % intervals.",
        "profiles": "log10 GSC of selu and relu+batch minus the mean-field prediction (a straight line), against the "
        "distance from the output. One row per network, one column per depth. Where a curve is straight, the growth "
        "rate is constant. Bands are 95 % intervals over seeds.",
    },
)
