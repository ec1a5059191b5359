"""Whether GSC of a transformer grows exponentially or as a power of its depth, by the place of the norm."""

from __future__ import annotations

import pandas as pd

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import table
from experiments.studies.transformer_depth import figures, numbers, theory
from experiments.studies.transformer_depth.measurement import measure
from experiments.studies.transformer_depth.numbers import DEPTHS, NORMS, POWER, SCALED, UNIT, WINDOW, name

__all__ = ["STUDY", "measure"]

# Late growth per block divided by early growth: accepted distance from 1 (an exponential) and from `POWER`.
TOLERANCE, POWER_TOLERANCE = 0.2, 0.1
# Largest change of log10 GSC from depth 24 to 96 that counts as no growth.
FLAT = 0.1
# Largest log10 GSC over all blocks that counts as no explosion, as in the study residual.
KEEPS = 1.0
# Equal additions to the squared length, per block: their ratio in the two parts of the window, and its tolerance.
ADDED = (WINDOW[2] - WINDOW[1]) / (WINDOW[1] - WINDOW[0])
ADDED_TOLERANCE = 0.1 * ADDED
BARS = "Bars are 95 % intervals over seeds. Points are shifted slightly sideways."


def claims(collected: Collected) -> list[Claim]:
    """The claims about growth with depth, scaled weights, the length of the stream, and theory."""
    frame = collected.frame
    return [
        *(_grows(frame, norm) for norm in NORMS),
        _exponential(frame, "post"),
        _slower(frame, "pre"),
        _power(frame, "pre"),
        _larger(frame),
        *(_flat(frame, norm) for norm in NORMS),
        _adds(frame),
        *(_no_explosion(frame, norm) for norm in NORMS),
        *theory.claims(frame),
    ]


def answer(collected: Collected) -> str:
    """GSC over all blocks with each norm, with scaled weights, and beside theory."""
    frame = collected.frame
    deepest = {norm: means.mean(numbers.totals(frame, norm)[DEPTHS[-1]]) for norm in NORMS}
    scaled = [means.mean(numbers.totals(frame, norm, SCALED)[DEPTHS[-1]]) for norm in NORMS]
    exponential, power = _exponential(frame, "post").verdict, _power(frame, "pre").verdict
    band = " and ".join(f"{theory.inside(frame, norm)} with {name(norm)}" for norm in NORMS)
    return (
        f"The claim of exponential growth with post-norm is {exponential}, and the claim of growth as a power of the "
        f"depth with pre-norm is {power}; over the {DEPTHS[-1]} blocks of a GPT at initialization, log10 GSC is "
        f"{deepest['post']} with post-norm and {deepest['pre']} with pre-norm. If the initial weights that write into "
        f"the residual stream are scaled by 1 / sqrt(2 depth), log10 GSC is {scaled[1]} with post-norm and "
        f"{scaled[0]} with pre-norm. GSC is in the range in which mean-field theory expects at least "
        f"95 % of networks, in {band}."
    )


def details(collected: Collected) -> str:
    """A table of log10 GSC by depth."""
    frame = collected.frame
    rows = [
        [name(norm), "1" if scale == UNIT else "1 / sqrt(2 depth)",
         *(means.mean(numbers.totals(frame, norm, scale)[depth]) for depth in DEPTHS)]
        for scale in (UNIT, SCALED)
        for norm in NORMS
    ]  # fmt: skip
    header = ["norm", "scale of residual weights", *(f"depth {depth}" for depth in DEPTHS)]
    return f"log10 GSC from the embedding to the logits:\n\n{table(header, rows)}"


def _contrast(frame: pd.DataFrame, norm: str, ratio: float) -> Mean:
    """The mean of (late growth - ratio * early growth), with the sign for which both are growth and not decay.

    Unlike a ratio of seeds, it has no small denominator.
    """
    early, late = numbers.early_and_late(frame, norm)
    sign = 1.0 if early.mean() > 0 else -1.0
    return means.mean(sign * (late - ratio * early))


def _between(frame: pd.DataFrame, norm: str, low: float, high: float) -> bool | None:
    """Whether late growth, divided by early growth, is between two bounds."""
    above, below = _contrast(frame, norm, low).above(0.0), _contrast(frame, norm, high).below(0.0)
    return means.all_of(above, below)


def _because(frame: pd.DataFrame, norm: str) -> str:
    early, late = numbers.early_and_late(frame, norm)
    ratio = means.mean(late).value / means.mean(early).value
    return (
        f"growth of log10 GSC per block: early (depth {WINDOW[0]} to {WINDOW[1]}) {means.mean(early)}, late (depth "
        f"{WINDOW[1]} to {WINDOW[2]}) {means.mean(late)}; late / early: {ratio:.2f}"
    )


def _grows(frame: pd.DataFrame, norm: str) -> Claim:
    found = numbers.totals(frame, norm)
    change = means.mean(found[WINDOW[2]] - found[WINDOW[0]])
    because = (
        f"log10 GSC at depth {WINDOW[2]} minus log10 GSC at depth {WINDOW[0]}: {change:+}; claimed: difference above 0"
    )
    return Claim(f"With {name(norm)}, GSC grows with depth", change.above(0.0), because)


def _exponential(frame: pd.DataFrame, norm: str) -> Claim:
    holds = _between(frame, norm, 1 - TOLERANCE, 1 + TOLERANCE)
    because = f"{_because(frame, norm)}; exponential: ratio from {1 - TOLERANCE:g} to {1 + TOLERANCE:g}"
    return Claim(f"With {name(norm)}, GSC grows or decays exponentially with depth", holds, because)


def _slower(frame: pd.DataFrame, norm: str) -> Claim:
    holds = _contrast(frame, norm, 1 - TOLERANCE).below(0.0)
    says = f"With {name(norm)}, GSC grows or decays more slowly than an exponential"
    return Claim(says, holds, f"{_because(frame, norm)}; more slowly: ratio below {1 - TOLERANCE:g}")


def _power(frame: pd.DataFrame, norm: str) -> Claim:
    holds = _between(frame, norm, POWER - POWER_TOLERANCE, POWER + POWER_TOLERANCE)
    exponent = means.mean(numbers.exponents(frame, norm))
    return Claim(
        f"With {name(norm)}, GSC is a power of the depth",
        holds,
        f"{_because(frame, norm)}; power: ratio from {POWER - POWER_TOLERANCE:.2f} to {POWER + POWER_TOLERANCE:.2f}; "
        f"exponent of the power from depth {WINDOW[1]} to {WINDOW[2]}: {exponent}",
    )  # fmt: skip


def _larger(frame: pd.DataFrame) -> Claim:
    pre, post = (numbers.totals(frame, norm)[DEPTHS[-1]] for norm in ("pre", "post"))
    return Claim(
        f"Over {DEPTHS[-1]} blocks, GSC grows more with post-norm than with pre-norm",
        means.mean(post - pre).above(0.0),
        f"log10 GSC: {means.mean(post)} with post-norm, {means.mean(pre)} with pre-norm",
    )


def _flat(frame: pd.DataFrame, norm: str) -> Claim:
    found = numbers.totals(frame, norm, SCALED)
    change = means.mean(found[WINDOW[2]] - found[WINDOW[1]])
    return Claim(
        f"With {name(norm)} and residual weights scaled by 1 / sqrt(2 depth), GSC does not grow with depth",
        change.within(0.0, FLAT),
        f"log10 GSC at depth {WINDOW[2]} minus log10 GSC at depth {WINDOW[1]}: {change:+}; no growth: difference "
        f"within {FLAT:g} of 0",
    )


def _no_explosion(frame: pd.DataFrame, norm: str) -> Claim:
    found = means.mean(numbers.totals(frame, norm)[DEPTHS[-1]])
    return Claim(
        f"Exploratory: with {name(norm)}, GSC neither explodes nor vanishes over {DEPTHS[-1]} blocks",
        found.within(0.0, KEEPS),
        f"log10 GSC: {found}; required: log10 GSC within {KEEPS:g} of 0",
    )


def _adds(frame: pd.DataFrame) -> Claim:
    ratio = means.mean(numbers.added(frame, "pre"))
    return Claim(
        "With pre-norm, each block adds the same amount to the squared length of the residual stream",
        ratio.within(ADDED, ADDED_TOLERANCE),
        f"squared length added from depth {WINDOW[1]} to {WINDOW[2]}, divided by that from depth {WINDOW[0]} to "
        f"{WINDOW[1]}: {ratio}; equal amounts per block: {ADDED:g}, accepted from "
        f"{ADDED - ADDED_TOLERANCE:g} to {ADDED + ADDED_TOLERANCE:g}",
    )


STUDY = Study(
    question="Does GSC of a transformer grow exponentially or as a power of its depth?",
    answer=answer,
    use="""
Scale the initial weights that write into the residual stream by 1 / sqrt(2 depth), as
`gs.models.GPT(residual_scale="depth")` does. GSC then stays near 1 at all measured depths, and varies less between
networks than without this scaling.
""",
    method=f"""
`gs.models.GPT` has width {{model.width}}, {{model.heads}} heads, GELU, LayerNorm, weights of variance 1 / fan_in, no
biases, and an embedding with mean square 1. Its input is {{data.batch_size}} windows of {{data.length}} bytes of
Python's documentation (`data=text`). Each of {{num_seeds}} seeds has its own weights and windows. We measure GSC from
the embedding to the logits, with {{measurement.num_probes}} random vectors ([probes](../glossary.md)), in networks of
{", ".join(map(str, DEPTHS[:-1]))} and {DEPTHS[-1]} blocks. The depth is the number of blocks.

A block has two branches f, attention and MLP. A branch turns the residual stream x into x + f(norm(x)) (**pre-norm**)
or norm(x + f(x)) (**post-norm**). By the law of the study [residual](residual.md), the skip connection divides
GSC - 1 of a branch by k^2 + 1. Here k is the length of x divided by the length of the output of f.

- With post-norm, k is the same in every block. So we expected every block to multiply GSC by the same factor. Over many
  blocks, this gives an exponential of the depth.
- With pre-norm, the residual stream grows, and k^2 in block l is proportional to l. So we expected block l to multiply
  GSC by about 1 + c / l with a constant c. Over many blocks, this gives a power of the depth.

**Exponential or power.** "Early" is the growth of log GSC per block from depth {WINDOW[0]} to {WINDOW[1]}, and "late"
is the growth per block from depth {WINDOW[1]} to {WINDOW[2]}. The ratio late / early is 1 for an exponential and
{POWER:.2f} for a power of the depth. Growth counts as exponential if the ratio is within {TOLERANCE:g} of 1, and as a
power if it is within {POWER_TOLERANCE:g} of {POWER:.2f}. For a single seed, "early" can be near zero, so the ratio of
single seeds is not averaged. Instead, to compare the ratio with a limit r, we average (late minus r times early)
over seeds and test the sign of this mean.

**Scaled weights.** We also measure networks whose residual weights are scaled by 1 / sqrt(2 depth), as in GPT-2. These
are the initial weights that write into the residual stream. We say that GSC does not grow with depth if log10 GSC
changes by less than {FLAT:g} from depth {WINDOW[1]} to {WINDOW[2]}.

**Theory.** `GPT.mean_field(x)` predicts GSC for infinite width ([theory](../theory.md#transformers)). The prediction
uses the variances of the weights of each network, and the lengths and correlations of its embeddings. We compare three
quantities with theory:

- the **skip share** of a branch (`gs.residual`): the squared Frobenius norm of the Jacobian of the skip connection,
  divided by that of skip connection and branch together. It is measured in blocks 0, 1, 3, 7, 15, 31, 63 and 95 of the
  deepest networks (counted from 0);
- the **squared length**: the squared Euclidean norm of the residual stream after the last branch (with post-norm,
  before the normalization), divided by that of the embedding;
- GSC. Theory expects GSC of at least {100 * theory.COVERED:g} % of single networks in a range, the **band of theory**.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals over seeds. They cover random weights, windows and probes. If a claim about
theory has several intervals, they are simultaneous (Bonferroni). All networks are at initialization, with one kind of
MLP, one kind of norm and one length of text. Their width is small, and GSC depends on the width (study
[depth_width](depth_width.md)). We expected a power or an exponential of the depth because of results for multilayer
perceptrons, which have no attention.

Claims and thresholds are those of an earlier sweep with other seeds (0 to 7), which measured GSC to the last block
instead of the logits. Exploratory claims were added after that sweep. Tolerances for theory were set after theory was
compared with two networks of depth {DEPTHS[0]} (other seeds). At first, the claims that GSC is an exponential or a
power of the depth were about growth only. After a pilot with narrow networks, decay was added to these claims.

**Networks without normalization are left out.** Their residual stream grows exponentially with the depth. So in deep
networks without normalization, float32 cannot represent the attention scores precisely enough: GSC in float32 and GSC
in float64 differ by orders of magnitude. Only the earlier sweep contained networks without normalization. It tested
the claim that their GSC does not explode, and contradicted this claim for the shallowest of them.
""",
    claims=claims,
    figures=figures.draw,
    captions={
        "growth": "GSC from the embedding to the logits of a GPT against its depth, with pre- and post-norm. The depth "
        f"axis is linear in the left panel and logarithmic in the right panel. {BARS}",
        "scaled": "GSC from the embedding to the logits of a GPT whose weights into the residual stream are scaled by "
        f"1 / sqrt(2 depth). {BARS}",
        "theory": "GSC from the embedding to the logits, against the number of blocks. Dots are single networks, and "
        "lines are mean-field theory. Theory expects at least 95 % of single networks in the shaded band.",
        "skips": f"Skip share of branches in networks of {DEPTHS[-1]} blocks: squared norm of the Jacobian of the "
        f"skip connection, divided by that of skip connection and branch together. Lines are mean-field theory. {BARS}",
        "lengths": "Squared length of the residual stream after the last branch (with post-norm, before the "
        f"normalization), divided by that of the embedding. Lines are mean-field theory. {BARS}",
    },
    details=details,
    condensed=numbers.condensed,
)
