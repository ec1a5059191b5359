"""What helps against exploding gradients, and what it costs in nonlinearity."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import told
from experiments.studies.remedies import figures as remedy_figures
from experiments.studies.remedies.measurement import BASELINES, FEWER, NONE, NUM_FITTED, NUM_OUTPUTS
from experiments.studies.remedies.measurement import measure as measure
from experiments.studies.remedies.numbers import (
    MEASURES,
    NAMES,
    REMEDIES,
    ROUNDING,
    TESTED,
    TWINS,
    Outcome,
    Outcomes,
    correlation,
    left,
    level,
    outcomes,
    percent,
    remedies_of,
    theory_of,
)
from gradscope.coefficients.growth import EXPLODING_RATE

DEPTH, WIDTH, BATCH_SIZE, NUM_SEEDS = 50, 100, 32, 16
# log10 GSC: what a rate at the edge of no growth makes of all layers.  Less is not worth the name of a remedy.
LEAST = DEPTH * math.log10(EXPLODING_RATE)
# Rates that differ by less are called equal: what `gradscope.coefficients.growth` takes for no growth.
EQUAL = EXPLODING_RATE - 1
# Part of the baseline's linear fit error of the last layer below which its layers are called nearly linear, as in the
# study of architectures.
KEPT = 0.1
# A remedy that keeps so much of the nonlinearity of the outputs and takes the growth is an example against its price.
MOSTLY = 0.5
SIGNIFICANCE = 0.05
NUM_TESTS = len(BASELINES) * len(TESTED)

QUESTION = "What helps against exploding gradients, and what does it cost?"
METHOD = f"""
Three networks that explode, depth {DEPTH} and width {WIDTH} with a linear head of {NUM_OUTPUTS} outputs: tanh with
weight variance {BASELINES["tanh_large"]["weight_variance"]:g} / fan-in, ReLU with batch normalization, and SELU;
{BATCH_SIZE} samples of Gaussian noise, {NUM_SEEDS} initializations. Each is measured as it is and with one thing
changed, the number of parameters equal within 1 %:

- **wider**: {FEWER} times fewer layers, as much wider
- **residual**: unit skips f + V phi(W f), two linear maps a block, half as many blocks
- **batch**, **layer**: normalization of the pre-activations; **plain**: without the normalization there was
- **he**, **lecun**, **xavier** (in square layers the same as lecun), **orthogonal**, **critical** (chi_1 = 1 by mean
  field, arXiv:1611.01232), **looks linear** (without normalization, arXiv:1702.08591), and **LSUV**: orthonormal, then
  each layer divided by the deviation of its output over a batch (arXiv:1511.06422, `gradscope.initializers.lsuv`)

**Not all of them are remedies of their own.** Of weights mean field knows the variance alone. For tanh without biases
critical is lecun to the last digit of its law, and orthogonal has the same variance; batch normalization undoes every
scale, so that xavier, orthogonal and LSUV leave the network as it is; and LSUV sets for SELU what SELU is made to have.
These are marked †, held against the network they repeat, and left out wherever remedies are counted.

What counts is log10 GSC (squared convention) from input to output, because parameters are equal and layers are not;
the rate a layer or block stands beside it, with mean field where it has one. A remedy **lowers** GSC if it lowers
log10 GSC by {LEAST:.2f} or more, which is what a rate of {EXPLODING_RATE:g}, the edge of what
`gradscope.coefficients.growth` calls no growth, makes of {DEPTH} layers: the whole interval must lie beyond. The
intervals of these changes hold together (Bonferroni over all of them).

Little growth alone is no merit: an affine map has none. **Nonlinearity** is measured by the part of the variance of the
outputs that the best affine map of the inputs leaves over, on {NUM_FITTED} further samples, corrected for the size of
the fit (0: the network is an affine map; 1: nothing in it is affine, as in chaos, too); by the same of the last layer's
nonlinearity, a line for each neuron; and by the nonlinearity coefficient, NLC (arXiv:1806.00179; 1 for an affine map).
Whether **little growth is paid for** is a question about remedies, not about seeds: Spearman's rank correlation of
growth and nonlinearity over the networks, means over seeds, and the part of all orders of them that correlate as much
(exact, two-sided). A correlation counts where that part is below {SIGNIFICANCE:g} / {NUM_TESTS}, for there are
{NUM_TESTS} of them. NLC is shown and not tested: on such data its square is GSC from input to output but for the mean
of the outputs, which it takes off, and where there is none (tanh) the two go together by construction.
"""
HOW_SURE = """
Intervals are over initializations, Student's t, differences paired by seed (NLC: of the geometric mean); 95 % in the
tables, and 95 % for all changes of GSC together where claims are decided. The least change that counts was set after a
first look at the data, when any change of known sign counted, and so were the networks that are counted once. Remedies
were chosen and not drawn, and are few for each network: an order that does not count here may be real. One depth, one
number of parameters, Gaussian noise, at initialization: nothing here says how the networks train, and a network
that is nearly affine at first need not stay so. The remedies are not combined.
"""


def figures(collected: Collected) -> dict[str, Figure]:
    """How much each remedy lowers, and what is left of nonlinearity."""
    found = outcomes(collected.frame)
    return {"growth": remedy_figures.growth(found), "cost": remedy_figures.cost(found)}


def claims(collected: Collected) -> list[Claim]:
    """Every remedy for every network, those that repeat another, then what lowers the rate itself, and the price."""
    found = outcomes(collected.frame)
    linear = found["relu_batch"]["looks_linear"]
    return [
        *(_lowers(found, b, remedy) for b in BASELINES for remedy in remedies_of(b, found[b])),
        *(_repeats(found, b, remedy) for b in BASELINES for remedy in TWINS[b]),
        *(_same_rate(found, b) for b in BASELINES),
        *(_keeps_layers(found["tanh_large"], remedy) for remedy in ("lecun", "lsuv")),
        *(_paid_for(found, b, measure) for b in BASELINES for measure in TESTED),
        Claim(
            "A looks-linear network is an affine map up to rounding",
            linear.affine,
            f"the best affine map leaves {linear.nonlinearity.max():.1g} of the variance at most, rounding is below "
            f"{ROUNDING:g}; of the last layer's lines leave {mean(linear.last_layer):.2f}",
        ),
    ]


def answer(collected: Collected) -> str:
    """A table for each network."""
    found = outcomes(collected.frame)
    parts = [_summary(found)]
    for baseline, by_remedy in found.items():
        table = [
            f"| {NAMES[baseline]} | log10 GSC, input to output | rate a layer | mean field | not affine | "
            "last layer not linear | NLC |",
            "|---|---|---|---|---|---|---|",
        ]
        for remedy, outcome in sorted(by_remedy.items(), key=lambda item: -item[1].total.mean()):
            table.append(
                f"| {REMEDIES[remedy]}{'†' if remedy in TWINS[baseline] else ''} | {mean(outcome.total):.2f} | "
                f"{mean(outcome.rate):.3f} | {theory_of(outcome)} | {left(outcome)} | "
                f"{geometric_mean(outcome.last_layer):.1g} | {geometric_mean(outcome.nlc):.3g} |"
            )
        parts.append("\n".join(table))
    parts.append("† To mean field the same network as another of the table, see the method.")
    return "\n\n".join(parts)


def _summary(found: Outcomes) -> str:
    """The answer in sentences, each by its verdicts."""
    shown = []
    for baseline, by_remedy in found.items():
        least = min(remedies_of(baseline, by_remedy), key=lambda remedy: float(by_remedy[remedy].total.mean()))
        kinds = dict.fromkeys(remedy for remedy in (NONE, "wider", "residual", least) if remedy in by_remedy)
        shown.append(f"{NAMES[baseline]}: {', '.join(_in_short(remedy, by_remedy[remedy]) for remedy in kinds)}")
    lowers = {
        (NAMES[b], REMEDIES[remedy]): _lowers(found, b, remedy).holds
        for b in BASELINES
        for remedy in remedies_of(b, found[b])
    }
    helped = sum(holds is True for holds in lowers.values())
    orders = {NAMES[b]: correlation(b, by_remedy, "nlc").value for b, by_remedy in found.items()}
    nlc = ", ".join(f"rank correlation {value:.2f} for {name}" for name, value in orders.items())
    sentences = [
        "log10 GSC from input to output at equal parameters, with the part of the outputs' variance that is not affine "
        f"in brackets. {'; '.join(shown)}.",
        f"GSC falls by more than {LEAST:.2f} with {helped} of {len(lowers)} remedies.",
        told(lowers, "", "It does not for {}.", "It is undecided for {}."),
        told(
            {NAMES[b]: _same_rate(found, b).holds for b in BASELINES},
            f"Fewer and wider layers leave the rate a layer as it is, within {EQUAL:.2g}, for {{}}: there are fewer of "
            "them to grow.",
            "They change the rate a layer for {}.",
            "Whether they change it is undecided for {}.",
        ),
        told(
            {(NAMES[b], REMEDIES[remedy]): _repeats(found, b, remedy).holds for b in BASELINES for remedy in TWINS[b]},
            f"Some are no remedies of their own, with the GSC of the network they repeat, within {LEAST:.2f}: {{}}.",
            "Though mean field does not tell them from another network, their GSC differs: {}.",
            "Whether they repeat another network, as mean field says, is undecided: {}.",
        ),
        told(
            {(NAMES[b], MEASURES[m]): _paid_for(found, b, m).holds for b in BASELINES for m in TESTED},
            "That little growth is paid for, the less of it the less nonlinearity, holds in the order of the remedies "
            "for {}.",
            "The less growth, the more nonlinearity for {}.",
            "It is undecided for {}.",
        ),
        f"NLC, whose square is GSC but for the mean of the outputs, is no test of that ({nlc}).",
        _counterexamples(found),
    ]
    return " ".join(filter(None, sentences))


def _in_short(remedy: str, outcome: Outcome) -> str:
    return f"{REMEDIES[remedy]} {outcome.total.mean():.1f} ({percent(outcome)})"


def _counterexamples(found: Outcomes) -> str:
    """Remedies that leave hardly any growth and most of the nonlinearity of the outputs, by all three measures."""
    parts = []
    for baseline, by_remedy in found.items():
        before = by_remedy[NONE]
        most = max(by_remedy, key=lambda remedy: level(by_remedy[remedy], "last_layer"))
        for remedy in remedies_of(baseline, by_remedy):
            after = by_remedy[remedy]
            if mean(after.total).below(LEAST) and mean(after.nonlinearity / before.nonlinearity).above(MOSTLY):
                other = "the most of all" if remedy == most else f"instead of {level(before, 'last_layer'):.1g}"
                parts.append(
                    f"{NAMES[baseline]} with {REMEDIES[remedy]} has log10 GSC {mean(after.total):.2f}, and "
                    f"{percent(after)} of it is not affine, NLC {level(after, 'nlc'):.3g}, linear fit error of the "
                    f"last layer {level(after, 'last_layer'):.1g} ({other})"
                )
    if not parts:
        return f"No remedy takes the growth and keeps more than {100 * MOSTLY:.0f} % of what is not affine."
    return f"Examples against a price: {'; '.join(parts)}."


def _change(found: Outcomes, baseline: str, remedy: str, other: str) -> Mean:
    """Of log10 GSC against another network; one of the intervals that hold together."""
    comparisons = sum(len(by_remedy) - 1 for by_remedy in found.values())
    return mean(found[baseline][remedy].total - found[baseline][other].total, comparisons)


def _lowers(found: Outcomes, baseline: str, remedy: str) -> Claim:
    change = _change(found, baseline, remedy, NONE)
    before, after = found[baseline][NONE], found[baseline][remedy]
    return Claim(
        f"{NAMES[baseline]}: {REMEDIES[remedy]} lowers GSC from input to output",
        change.below(-LEAST),
        f"log10 GSC changes by {change:+.2f}, what counts is {-LEAST:.2f}; rate {mean(after.rate):.3f} instead of "
        f"{before.rate.mean():.3f}",
    )


def _repeats(found: Outcomes, baseline: str, remedy: str) -> Claim:
    twin = TWINS[baseline][remedy]
    change = _change(found, baseline, remedy, twin)
    rate = mean(found[baseline][remedy].rate - found[baseline][twin].rate)
    return Claim(
        f"{NAMES[baseline]}: {REMEDIES[remedy]} has the GSC of {'the network as it is' if twin == NONE else twin}",
        change.within(0.0, LEAST),
        f"log10 GSC differs by {change:+.2f}, what counts is {LEAST:.2f}; the rate by {rate:+.3f}",
    )


def _same_rate(found: Outcomes, baseline: str) -> Claim:
    difference = mean(found[baseline]["wider"].rate - found[baseline][NONE].rate)
    return Claim(
        f"{NAMES[baseline]}: fewer and wider layers leave the rate a layer as it is",
        difference.within(0.0, EQUAL),
        f"the rate changes by {difference:+.3f}; equal is within {EQUAL:.2g}",
    )


def _keeps_layers(by_remedy: dict[str, Outcome], remedy: str) -> Claim:
    kept = geometric_mean(by_remedy[remedy].last_layer / by_remedy[NONE].last_layer)
    return Claim(
        f"tanh with {REMEDIES[remedy]} weights keeps its layers nonlinear",
        kept.above(KEPT),
        f"linear fit error of the last layer {kept:.2g} of that with large weights; nearly linear is below {KEPT:g}",
    )


def _paid_for(found: Outcomes, baseline: str, measure: str) -> Claim:
    order = correlation(baseline, found[baseline], measure)
    return Claim(
        f"{NAMES[baseline]}: the less a remedy leaves of GSC, the less of nonlinearity, by {MEASURES[measure]}",
        order.value > 0 if order.p < SIGNIFICANCE / NUM_TESTS else None,
        f"rank correlation {order.value:.2f} over {order.num} networks, p = {order.p:.2g}; what counts is below "
        f"{SIGNIFICANCE / NUM_TESTS:.2g}",
    )


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
)
