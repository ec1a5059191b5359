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
from experiments.studies.remedies.numbers import MEASURES, NAMES, REMEDIES, ROUNDING, TESTED, TWINS, Outcome, Outcomes
from gradscope.coefficients.growth import EXPLODING_RATE

__all__ = ["STUDY", "measure"]

DEPTH, WIDTH, BATCH_SIZE, NUM_SEEDS = 50, 100, 32, 16
# Smallest change of log10 GSC that counts: that of a rate at the edge of no growth, over all layers.
LEAST = DEPTH * math.log10(EXPLODING_RATE)
# Rates that differ by less are equal; `gradscope.coefficients.growth` calls so small a growth stable.
EQUAL = EXPLODING_RATE - 1
# Linear fit error of the last layer, relative to that without a remedy, below which layers are nearly linear.
KEPT = 0.1
# A remedy that removes growth and keeps this part of the nonlinearity of the outputs is an example against a price.
MOSTLY = 0.5
SIGNIFICANCE = 0.05
NUM_TESTS = len(BASELINES) * len(TESTED)


def claims(collected: Collected) -> list[Claim]:
    """Every remedy for every network, those that repeat another network, the rate per layer, and the price."""
    found = numbers.outcomes(collected.frame)
    linear = found["relu_batch"]["looks_linear"]
    return [
        *_all_lower(found),
        *(_repeats(found, b, remedy) for b in BASELINES for remedy in TWINS[b]),
        *(_same_rate(found, b) for b in BASELINES),
        *(_keeps_layers(found["tanh_large"], remedy) for remedy in ("lecun", "lsuv")),
        *_all_paid_for(found).values(),
        Claim(
            "A looks-linear network is an affine map up to rounding",
            linear.affine,
            f"variance not explained by the best affine map: at most {linear.nonlinearity.max():.1g}; rounding: "
            f"below {ROUNDING:g}; in the last layer, lines do not explain: {means.mean(linear.last_layer):.2f}",
        ),
    ]


def answer(collected: Collected) -> str:
    """How many remedies help, which helps most, and whether little growth has a price."""
    found = numbers.outcomes(collected.frame)
    lowers, best = [claim.holds for claim in _all_lower(found)], []
    for baseline, by_remedy in found.items():
        least = min(numbers.remedies_of(baseline, by_remedy), key=lambda name: float(by_remedy[name].total.mean()))
        before, after = (by_remedy[name].total.mean() for name in (NONE, least))
        best.append(f"{NAMES[baseline]} from {before:.1f} to {after:.1f} ({REMEDIES[least]})")
    price = told(
        {key: claim.holds for key, claim in _all_paid_for(found).items()},
        "less growth goes with less nonlinearity for {};", "less growth goes with more nonlinearity for {};",
        "the order is undecided for {};",
    )  # fmt: skip
    return (
        f"Of {len(lowers)} remedies at equal parameters, {lowers.count(True)} lower log10 GSC from input to output by "
        f"more than {LEAST:.2f}. The largest reductions are: {listed(best)}. By rank correlation over the "
        f"remedies, {price.rstrip(';')}."
    )


def details(collected: Collected) -> str:
    """Examples against a price, why NLC is not tested, and a table for each network."""
    found = numbers.outcomes(collected.frame)
    examples = [
        f"{NAMES[baseline]} with {REMEDIES[remedy]}"
        for baseline, by_remedy in found.items()
        for remedy in numbers.remedies_of(baseline, by_remedy)
        if means.mean(by_remedy[remedy].total).below(LEAST)
        and means.mean(by_remedy[remedy].nonlinearity / by_remedy[NONE].nonlinearity).above(MOSTLY)
    ]
    orders = (f"{numbers.correlation(b, own, 'nlc').value:.2f} for {NAMES[b]}" for b, own in found.items())
    parts = [
        f"Remedies that remove the growth and keep more than {100 * MOSTLY:.0f} % of the nonlinearity of the outputs: "
        f"{listed(examples)}. The rank correlation of GSC and NLC, which is not a test, is {listed(orders)}."
    ]
    for baseline, by_remedy in found.items():
        head = [NAMES[baseline], "log10 GSC, input to output", "rate per layer", "mean field", "not affine",
                "last layer not linear", "NLC"]  # fmt: skip
        order = sorted(by_remedy, key=lambda remedy: -by_remedy[remedy].total.mean())
        parts.append(table(head, [_row(baseline, remedy, by_remedy[remedy]) for remedy in order]))
    parts.append("† In mean field, this network equals another one in the table; see the method.")
    return "\n\n".join(parts)


def _row(baseline: str, remedy: str, outcome: Outcome) -> list[str]:
    affine = f"below {ROUNDING:g}" if outcome.affine else f"{means.mean(outcome.nonlinearity):.2f}"
    theory = "" if math.isnan(outcome.theory) else f"{outcome.theory:.4f}"
    growth = f"{means.mean(outcome.total):.2f}", f"{means.mean(outcome.rate):.3f}", theory
    levels = f"{means.geometric_mean(outcome.last_layer):.1g}", f"{means.geometric_mean(outcome.nlc):.3g}"
    return [f"{REMEDIES[remedy]}{'†' if remedy in TWINS[baseline] else ''}", *growth, affine, *levels]


def _change(found: Outcomes, baseline: str, remedy: str, other: str) -> Mean:
    """Change of log10 GSC from another network, with simultaneous intervals over all changes."""
    comparisons = sum(len(by_remedy) - 1 for by_remedy in found.values())
    return means.mean(found[baseline][remedy].total - found[baseline][other].total, comparisons)


def _all_lower(found: Outcomes) -> list[Claim]:
    """Of all remedies except those that repeat another network."""
    return [_lowers(found, b, remedy) for b in BASELINES for remedy in numbers.remedies_of(b, found[b])]


def _lowers(found: Outcomes, baseline: str, remedy: str) -> Claim:
    change = _change(found, baseline, remedy, NONE)
    before, after = found[baseline][NONE], found[baseline][remedy]
    return Claim(
        f"{NAMES[baseline]}: {REMEDIES[remedy]} lowers GSC from input to output",
        change.below(-LEAST),
        f"change of log10 GSC: {change:+.2f}; limit: {-LEAST:.2f}; rate: {means.mean(after.rate):.3f} instead of "
        f"{before.rate.mean():.3f}",
    )


def _repeats(found: Outcomes, baseline: str, remedy: str) -> Claim:
    twin = TWINS[baseline][remedy]
    change = _change(found, baseline, remedy, twin)
    rate = means.mean(found[baseline][remedy].rate - found[baseline][twin].rate)
    says = f"{NAMES[baseline]}: {REMEDIES[remedy]} has the GSC of {'the unchanged network' if twin == NONE else twin}"
    because = f"difference of log10 GSC: {change:+.2f}; limit: {LEAST:.2f}; difference of the rate: {rate:+.3f}"
    return Claim(says, change.within(0.0, LEAST), because)


def _same_rate(found: Outcomes, baseline: str) -> Claim:
    difference = means.mean(found[baseline]["wider"].rate - found[baseline][NONE].rate)
    says = f"{NAMES[baseline]}: fewer and wider layers do not change the rate per layer"
    because = f"change of the rate: {difference:+.3f}; equal: within {EQUAL:.2g}"
    return Claim(says, difference.within(0.0, EQUAL), because)


def _keeps_layers(by_remedy: dict[str, Outcome], remedy: str) -> Claim:
    kept = means.geometric_mean(by_remedy[remedy].last_layer / by_remedy[NONE].last_layer)
    return Claim(
        f"tanh with {REMEDIES[remedy]} weights keeps its layers nonlinear",
        kept.above(KEPT),
        f"linear fit error of the last layer divided by that with large weights: {kept:.2g}; nonlinear: above {KEPT:g}",
    )


def _all_paid_for(found: Outcomes) -> dict[tuple[str, str], Claim]:
    return {(NAMES[b], MEASURES[measure]): _paid_for(found, b, measure) for b in BASELINES for measure in TESTED}


def _paid_for(found: Outcomes, baseline: str, measure: str) -> Claim:
    order, limit = numbers.correlation(baseline, found[baseline], measure), SIGNIFICANCE / NUM_TESTS
    return Claim(
        f"{NAMES[baseline]}: remedies that leave less GSC leave less nonlinearity, by {MEASURES[measure]}",
        order.value > 0 if order.p < limit else None,
        f"rank correlation over {order.num} networks: {order.value:.2f}; p = {order.p:.2g}; limit of p: {limit:.2g}",
    )


STUDY = Study(
    question="What helps against exploding gradients, and what does it cost?",
    answer=answer,
    use="""
Reduce the depth, add skip connections, or change weights or normalization. The tables below rank the remedies for each
network. Check the nonlinearity, too: an affine map has no growth, but it is useless.
""",
    method=f"""
Three exploding networks have depth {DEPTH}, width {WIDTH} and a linear head with {NUM_OUTPUTS} outputs: tanh with
weight variance {BASELINES["tanh_large"]["weight_variance"]:g} / fan-in, ReLU with batch normalization, and SELU. They
are measured on {BATCH_SIZE} samples of Gaussian noise with {NUM_SEEDS} initializations. Each is measured unchanged and
with one change. Numbers of parameters are equal within 1 %. The changes are:

- **wider**: {FEWER} times fewer layers, which are wider
- **residual**: unit skips f + V phi(W f), two linear maps per block, half as many blocks
- **batch**, **layer**: normalization of the pre-activations; **plain**: no normalization
- **he**, **lecun**, **xavier** (in square layers the same as lecun), **orthogonal**, **critical** (chi_1 = 1 in mean
  field, arXiv:1611.01232), **looks linear** (without normalization, arXiv:1702.08591), and **LSUV** (arXiv:1511.06422,
  `gradscope.initializers.lsuv`)

**Repeated networks.** In mean field, weights matter only by their variance, so some changes give the same network. For
tanh without biases, critical equals lecun, and orthogonal has the same variance. Batch normalization undoes every
scale, so xavier, orthogonal and LSUV leave the network unchanged. SELU already has the variance that LSUV sets. These
changes are marked †, compared with the network they repeat, and not counted as remedies.

**Growth** is log10 GSC (squared convention) from input to output, because networks with equal parameters differ in
depth. A remedy **lowers** GSC if the whole interval of the change is below -{LEAST:.2f}. This is the growth over
{DEPTH} layers at the rate {EXPLODING_RATE:g}, the largest rate that `gradscope.coefficients.growth` calls stable.

**Nonlinearity** is measured in three ways. "Not affine" is the fraction of the variance of the outputs that the best
affine map of the inputs does not explain, on {NUM_FITTED} further samples, corrected for the size of the fit. It is 0
for an affine map and 1 in chaos. "Last layer not linear" is this fraction for the activations of the last layer, with
one line per neuron. The third is the nonlinearity coefficient, NLC (arXiv:1806.00179); it is 1 for an affine map.

**Price.** Growth and nonlinearity are compared by Spearman's rank correlation over the networks (means over seeds). The
p value is the fraction of all orders that correlate as strongly (exact, two-sided). There are {NUM_TESTS} correlations,
so p must be below {SIGNIFICANCE:g} / {NUM_TESTS}. NLC is not tested: on such data, its square is nearly GSC.
""",
    how_sure="""
Intervals are 95 % Student's t intervals over initializations, with differences paired by seed. The mean of NLC is
geometric. Intervals for changes of GSC are simultaneous (Bonferroni). Two choices were made after a first look at the
data: the smallest change that counts, and which networks repeat others. There are few remedies per network, so a rank
correlation that is undecided here may be real. The study covers one depth, one number of parameters and Gaussian noise,
all at initialization. A network that is nearly affine at first may become nonlinear in training.
""",
    claims=claims,
    figures=figures.draw,
    captions={
        "growth": "Growth of GSC from input to output (top) and per layer (bottom), by remedy; one column per network.",
        "cost": "Three measures of nonlinearity (rows) against growth, one column per network.",
    },
    details=details,
)
