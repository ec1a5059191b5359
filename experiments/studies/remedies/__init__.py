"""What helps against exploding gradients, and what it costs in nonlinearity."""

from __future__ import annotations

import math

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table, told
from experiments.studies.remedies import figures, numbers
from experiments.studies.remedies.measurement import BASELINES, FEWER, NONE, NUM_FITTED, NUM_OUTPUTS, measure
from experiments.studies.remedies.numbers import (
    EXACT,
    MEASURES,
    NAMES,
    REMEDIES,
    ROUNDING,
    TESTED,
    TWINS,
    Outcome,
    Outcomes,
)
from gradscope.coefficients.growth import MARGIN

__all__ = ["STUDY", "measure"]

DEPTH, WIDTH, BATCH_SIZE, NUM_SEEDS = 50, 100, 32, 16
# Smallest change of log10 GSC that counts: the growth over all layers at the largest rate that gradscope calls stable.
LEAST = DEPTH * math.log10(1 + MARGIN)
# Rates that differ by less count as equal: `gradscope.coefficients.growth` calls rates this close to 1 stable.
EQUAL = MARGIN
# The last layer is nearly linear if a remedy multiplies its linear fit error by less than KEPT.
KEPT = 0.1
# A remedy has no price if it removes growth and keeps more than the fraction MOSTLY of the nonlinearity of outputs.
MOSTLY = 0.5
SIGNIFICANCE = 0.05
NUM_TESTS = len(BASELINES) * len(TESTED)


def claims(collected: Collected) -> list[Claim]:
    """The claims about remedies, networks that repeat another network, the rate per layer, and the price."""
    found = numbers.outcomes(collected.frame)
    linear = found["relu_batch"]["looks_linear"]
    rates = {baseline: _same_rate(found, baseline) for baseline in BASELINES}
    return [
        # If "wider" keeps the rate per layer, it lowers GSC because there are fewer layers: not a second claim.
        *(c for (b, remedy), c in _all_lower(found).items() if not (remedy == "wider" and rates[b].holds)),
        *(_repeats(found, b, remedy) for b in BASELINES for remedy in TWINS[b] if (b, remedy) not in EXACT),
        *rates.values(),
        *(_keeps_layers(found["tanh_large"], remedy) for remedy in ("lecun", "lsuv")),
        *(_paid_for(found, baseline, measure) for baseline in BASELINES for measure in TESTED),
        Claim(
            "The looks-linear network is an affine map up to rounding",
            linear.affine,
            f"fraction of the variance of the outputs that no affine map of the inputs explains: at most "
            f"{linear.nonlinearity.max():.1g}; required: below {ROUNDING:g}",
            identity=True,
        ),
    ]


def answer(collected: Collected) -> str:
    """The number of remedies that help, the strongest remedies, and whether low growth costs nonlinearity."""
    found = numbers.outcomes(collected.frame)
    lowers, best = [claim.holds for claim in _all_lower(found).values()], []
    for baseline, by_remedy in found.items():
        least = min(numbers.remedies_of(baseline, by_remedy), key=lambda name: float(by_remedy[name].total.mean()))
        before, after = (by_remedy[name].total.mean() for name in (NONE, least))
        best.append(f'"{REMEDIES[least]}" for {NAMES[baseline]} (GSC from 10^{before:.1f} to 10^{after:.1f})')
    price = told(
        {(MEASURES[m], NAMES[b]): _paid_for(found, b, m).holds for m in TESTED for b in BASELINES},
        "supported for {};",
        "contradicted for {};",
        "undecided for {};",
    ).rstrip(";")  # fmt: skip
    return (
        f"{lowers.count(True)} of {len(lowers)} remedies lower GSC from input to output by a factor of more than "
        f"{10**LEAST:.1f}, at equal numbers of parameters (a remedy counts once for each network that it changes). "
        f"The strongest remedies, named as in the method, are {listed(best)}. "
        'The claim "remedies that leave less GSC leave less nonlinearity" is (in brackets: networks) '
        f"{price}."
    )


def details(collected: Collected) -> str:
    """Remedies that keep the nonlinearity, the correlation of GSC and NLC, and a table for each network."""
    found = numbers.outcomes(collected.frame)
    examples = [
        f'{NAMES[baseline]} with "{REMEDIES[remedy]}"'
        for baseline, by_remedy in found.items()
        for remedy in numbers.remedies_of(baseline, by_remedy)
        if means.mean(by_remedy[remedy].total).below(LEAST)
        and means.mean(by_remedy[remedy].nonlinearity / by_remedy[NONE].nonlinearity).above(MOSTLY)
    ]
    orders = (f"{numbers.correlation(b, own, 'nlc').value:.2f} for {NAMES[b]}" for b, own in found.items())
    parts = [
        f"Remedies with which log10 GSC from input to output is below {LEAST:.2f}, and which keep more than "
        f"{100 * MOSTLY:.0f} % of the unchanged network's nonlinearity of the outputs: {listed(examples)}. "
        f"The rank correlation of GSC and NLC, which is not tested, is {listed(orders)}."
    ]
    for baseline, by_remedy in found.items():
        head = [f"{NAMES[baseline]}: remedy", "log10 GSC, input to output", "growth rate of GSC per layer",
                "mean-field rate", "not affine", "last layer not linear", "NLC"]  # fmt: skip
        order = sorted(by_remedy, key=lambda remedy: -by_remedy[remedy].total.mean())
        parts.append(table(head, [_row(baseline, remedy, by_remedy[remedy]) for remedy in order]))
    parts.append("† In mean field, this network is the same as another network of its table.")
    return "\n\n".join(parts)


def _row(baseline: str, remedy: str, outcome: Outcome) -> list[str]:
    affine = f"below {ROUNDING:g}" if outcome.affine else str(means.mean(outcome.nonlinearity))
    theory = "" if math.isnan(outcome.theory) else f"{outcome.theory:.4f}"
    growth = str(means.mean(outcome.total)), str(means.mean(outcome.rate)), theory
    levels = str(means.geometric_mean(outcome.last_layer)), str(means.geometric_mean(outcome.nlc))
    return [f"{REMEDIES[remedy]}{'†' if remedy in TWINS[baseline] else ''}", *growth, affine, *levels]


def _change(found: Outcomes, baseline: str, remedy: str, other: str) -> Mean:
    """log10 GSC of a network minus log10 GSC of another network; intervals are simultaneous over all such changes."""
    comparisons = sum(len(by_remedy) - 1 for by_remedy in found.values())
    return means.mean(found[baseline][remedy].total - found[baseline][other].total, comparisons)


def _all_lower(found: Outcomes) -> dict[tuple[str, str], Claim]:
    """Whether each remedy lowers GSC. Remedies that repeat another network are left out."""
    return {(b, remedy): _lowers(found, b, remedy) for b in BASELINES for remedy in numbers.remedies_of(b, found[b])}


def _lowers(found: Outcomes, baseline: str, remedy: str) -> Claim:
    change = _change(found, baseline, remedy, NONE)
    before, after = found[baseline][NONE], found[baseline][remedy]
    return Claim(
        f'{NAMES[baseline]}: the remedy "{REMEDIES[remedy]}" lowers GSC from input to output',
        change.below(-LEAST),
        f"change of log10 GSC: {change:+}; required: change of log10 GSC below {-LEAST:.2f}; growth rate of GSC "
        f"per layer: {means.mean(after.rate)} instead of {before.rate.mean():.3f}",
    )


def _repeats(found: Outcomes, baseline: str, remedy: str) -> Claim:
    twin = TWINS[baseline][remedy]
    change = _change(found, baseline, remedy, twin)
    rate = means.mean(found[baseline][remedy].rate - found[baseline][twin].rate)
    same = "the unchanged network" if twin == NONE else f'"{twin}"'
    says = f'{NAMES[baseline]}: the remedy "{REMEDIES[remedy]}" gives the same GSC as {same}'
    because = (
        f"difference of log10 GSC: {change:+}; required: difference of log10 GSC within {LEAST:.2f} of 0; difference "
        f"of the growth rates per layer: {rate:+}"
    )
    return Claim(says, change.within(0.0, LEAST), because)


def _same_rate(found: Outcomes, baseline: str) -> Claim:
    difference = means.mean(found[baseline]["wider"].rate - found[baseline][NONE].rate)
    says = f"{NAMES[baseline]}: fewer and wider layers do not change the growth rate of GSC per layer"
    change = _change(found, baseline, "wider", NONE)
    because = (
        f"change of the growth rate of GSC per layer: {difference:+}; required: change of the rate within "
        f"{EQUAL:.2g} of 0; change of log10 GSC from input to output: {change:+}"
    )
    return Claim(says, difference.within(0.0, EQUAL), because)


def _keeps_layers(by_remedy: dict[str, Outcome], remedy: str) -> Claim:
    kept = means.geometric_mean(by_remedy[remedy].last_layer / by_remedy[NONE].last_layer)
    return Claim(
        f"tanh with {REMEDIES[remedy]} weights keeps its last layer nonlinear",
        kept.above(KEPT),
        f"linear fit error of the last layer with {REMEDIES[remedy]} weights, divided by the error with large weights: "
        f"{kept}; required: above {KEPT:g}",
    )


def _paid_for(found: Outcomes, baseline: str, measure: str) -> Claim:
    order, limit = numbers.correlation(baseline, found[baseline], measure), SIGNIFICANCE / NUM_TESTS
    return Claim(
        f"{NAMES[baseline]}: remedies that leave less GSC leave less nonlinearity of {MEASURES[measure]}",
        order.value > 0 if order.p < limit else None,
        f"rank correlation of GSC and this nonlinearity over {order.num} networks: {order.value:.2f}; p = "
        f"{order.p:.2g}; required for a decision: p below {limit:.2g}",
    )


STUDY = Study(
    question="What helps against exploding gradients, and what does it cost?",
    answer=answer,
    use="""
Reduce the depth, add skip connections, or change the initial weights or the normalization. The tables under "All
results" rank the remedies for each network by GSC. Also check the nonlinearity: a network that is only an affine map
can have GSC near 1, but is useless.
""",
    method=f"""
Three exploding networks have depth {DEPTH}, width {WIDTH} and a linear head with {NUM_OUTPUTS} outputs: tanh with
weight variance {BASELINES["tanh_large"]["weight_variance"]:g} / fan-in ("tanh with large weights"), ReLU with batch
normalization ("relu+batch"), and SELU ("selu"). They are measured on {BATCH_SIZE} samples of Gaussian noise with
{NUM_SEEDS} initializations. Each network is measured unchanged, and with one change at a time (a **remedy**). A remedy
changes the number of parameters by at most 1 %. The remedies are:

- **wider**: the number of layers is divided by {FEWER}, and the layers are widened to keep the number of parameters
- **residual**: half as many blocks with skip connections as the unchanged network has layers. A block with input f and
  weight matrices V and W computes f + V phi(norm(W f)). Here phi is the activation, and norm is the normalization
- **batch norm**, **layer norm**, **plain**: batch, layer or no normalization of the pre-activations
- **he**, **lecun**, **xavier**: Gaussian initial weights of variance 2 / fan-in, 1 / fan-in and
  2 / (fan-in + fan-out)
- **orthogonal**: orthogonal initial weights
- **critical**: Gaussian initial weights of the variance for which [χ₁](../glossary.md#theory) is 1 in mean field
  (arXiv:1611.01232)
- **looks linear**: no normalization, and initial weights that make a ReLU network linear (arXiv:1702.08591)
- **LSUV**: orthogonal initial weights, scaled until the outputs of each linear map have variance 1 (arXiv:1511.06422,
  `gradscope.initializers.lsuv`)

**Repeated networks.** Mean field describes networks of infinite width, for which only the variance of the weights
matters. So in mean field, some remedies give a network that equals another network of the study. It is a
**repetition** of this other network. The repetitions are:

- tanh (without biases): critical and orthogonal weights have the same variance as lecun weights.
- relu+batch: batch normalization cancels the scale of the weights. So in mean field, xavier, orthogonal and LSUV
  weights change nothing.
- selu: orthogonal and LSUV weights have the same variance as the unchanged weights.

Repetitions are marked † and not counted as remedies. Most are compared with the network that they repeat.

**No finding is counted twice.** Three repetitions have the same distribution of GSC as another network at every width,
not only in mean field. These three are not tested as claims:

- tanh: critical and lecun weights have the same distribution.
- relu+batch: xavier weights are distributed like the unchanged weights times a constant. Batch normalization cancels
  this constant, so xavier repeats the unchanged network.
- relu+batch: LSUV weights are orthogonal weights times a constant for each layer. Batch normalization cancels these
  constants, so LSUV repeats "orthogonal".

If "wider" does not change the rate per layer, it lowers GSC only because there are fewer layers. Then "wider lowers
GSC" would repeat this finding and is not listed as a claim.

**Growth** is log10 GSC (squared convention) from input to output. Growth per layer would be misleading, because
networks with equal numbers of parameters differ in depth. A remedy **lowers** GSC if the whole interval of the change
of log10 GSC is below -{LEAST:.2f}. The value {LEAST:.2f} is log10({1 + MARGIN:g}^{DEPTH}): the growth over {DEPTH}
layers at the largest rate that `gradscope.growth` calls stable, {1 + MARGIN:g}.

**Nonlinearity** is measured in three ways:

- *Not affine* (nonlinearity of the outputs): the fraction of the variance of the outputs that the best affine map of
  the inputs does not explain. It is measured on {NUM_FITTED} further samples of Gaussian noise, and corrected for the
  number of fitted parameters. It is 0 for an affine map, and 1 if an affine map explains nothing.
- *Last layer not linear* (linear fit error): for each neuron of the last hidden layer, a line is fitted to the
  activation as a function of the pre-activation. The linear fit error is the fraction of the variance of the
  activations that these lines do not explain.
- *NLC*: the nonlinearity coefficient (arXiv:1806.00179), which is 1 for an affine map.

**Price.** Does less growth cost nonlinearity? For each of the three networks, the unchanged network and its remedies
are ranked by growth and by nonlinearity (means over seeds). Spearman's rank correlation compares the two rankings. The
two-sided p value is exact (permutation test). Three networks with two measures of nonlinearity give {NUM_TESTS}
correlations, so p must be below {SIGNIFICANCE:g} / {NUM_TESTS}. Otherwise the claim is undecided. The third measure,
NLC, is not tested, because it is not independent of GSC: if outputs have mean 0, the square of NLC is nearly GSC.
""",
    how_sure="""
Intervals are 95 % Student's t intervals over initializations. Differences between networks are computed for each seed,
then averaged. In the tables, means of the linear fit error and of NLC are geometric. Intervals for changes of GSC are
simultaneous (Bonferroni). Two choices were made after a first look at the data: the limit for a change of log10 GSC,
and which networks count as repetitions. Each network has few remedies, so the tests of rank correlations may miss a
real correlation. The study covers one depth, one number of parameters and Gaussian noise, all at initialization. A
network that is nearly affine at initialization may become nonlinear during training.
""",
    claims=claims,
    figures=figures.draw,
    captions={
        "growth": "Growth of GSC with each remedy, one column per network. Top: input to output. Bottom: per layer. "
        "Dots: means with 95 % intervals over seeds. Square: the unchanged network. Strokes: mean-field predictions, "
        "where they exist.",
        "cost": "Three measures of nonlinearity (rows) against growth of GSC from input to output, for each network "
        "(column). Bars are 95 % intervals over seeds. Hollow markers: networks that are the same as another network "
        "in mean field (marked † in the tables). Black square: the unchanged network.",
    },
    details=details,
)
