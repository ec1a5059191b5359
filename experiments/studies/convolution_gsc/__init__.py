"""What stride, padding and pooling do to GSC, measured on stacks of convolutions with equal weights."""

from __future__ import annotations

import math

import pandas as pd

from experiments.archive.tables import Collected
from experiments.evidence.means import geometric_mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed
from experiments.studies.convolution_gsc import figures
from experiments.studies.convolution_gsc import numbers as of
from experiments.studies.convolution_gsc.numbers import KEEPING, POOLING, SIDE, UNCHANGED, WORDS, factor

# Accepted deviation from mean field, as a factor per layer.
TOLERANCE = 1.03


def claims(collected: Collected) -> list[Claim]:
    """Which kinds of stacks keep GSC, which lower GSC, and whether mean field predicts the factor."""
    frame = collected.frame
    kept = f"GSC differs from GSC of the reference by a factor of less than {UNCHANGED:g}"
    totals = of.factors(frame)
    lowered = {
        "Zero padding lowers GSC from the middle layer to the output": factor(frame, "zeros", of.depth(frame) // 2),
        **{f"{WORDS[kind].capitalize()} lowers GSC": factor(frame, kind) for kind in POOLING},
    }
    made = [_near(frame, kind, kept, 1.0, UNCHANGED) for kind in KEEPING]
    made += [Claim(says, mean.below(1), f"factor: {mean}; claimed: factor below 1") for says, mean in lowered.items()]
    ratio = geometric_mean(totals["average"] / totals["max"])
    because = f"GSC with average pooling divided by GSC with max pooling: {ratio}; claimed: quotient below 1"
    made.append(Claim("Average pooling lowers GSC more than max pooling", ratio.below(1), because))
    for kind in POOLING:
        own = of.predicted(frame, kind)
        margin = TOLERANCE ** (len(own) - 1)
        made.append(_near(frame, kind, "GSC changes by the factor that mean field predicts", float(own[0]), margin))
    return made


def _near(frame: pd.DataFrame, kind: str, says: str, expected: float, margin: float) -> Claim:
    found, low, high = factor(frame, kind), expected / margin, expected * margin
    because = f"factor: {found}; expected factor: {expected:.3f}; accepted factors: {low:.3f} to {high:.3f}"
    return Claim(f"With {WORDS[kind]}, {says}", found.between(low, high), because)


def answer(collected: Collected) -> str:
    """Which kinds of stacks keep GSC, and by which factor pooling lowers GSC."""
    found = {kind: factor(collected.frame, kind) for kind in (*KEEPING, *POOLING)}
    kept = [kind for kind in KEEPING if found[kind].between(1 / UNCHANGED, UNCHANGED)]
    text = []
    if kept:
        most = 100 * math.expm1(max(abs(math.log(found[kind].value)) for kind in kept))
        names = listed((WORDS[kind] for kind in kept), "or")
        text.append(
            "Compared with stride 1 and circular padding, GSC from input to output changes by at most "
            f"{most:.1f} % with {names}."
        )
    if others := [WORDS[kind] for kind in KEEPING if kind not in kept]:
        text.append(f"GSC is not shown to stay the same with {listed(others)}.")
    if lowered := [kind for kind in POOLING if found[kind].below(1)]:
        by = listed(f"{WORDS[kind]} by a factor of {1 / found[kind].value:.1f}" for kind in lowered)
        text.append(f"2 x 2 pooling in every stage lowers GSC: {by}.")
    return " ".join(text)


STUDY = Study(
    question="What do stride, padding and pooling do to the gradients of a convolutional network?",
    use="""
You can choose stride and padding without considering gradients, because both hardly change GSC at initialization.
Max pooling lowers GSC, and average pooling lowers GSC much more. Within a window, the values of a map
are similar, but random changes of these values have different signs. So averaging shrinks the changes more than the
map.
""",
    method=f"""
A stack is a chain of {{model.stages}} stages. Each stage has {{model.convs}} convolutions of size 3 x 3 with ReLU,
{{model.channels}} channels, He initialization and no biases. The input is Gaussian noise of {SIDE} x {SIDE} pixels
({{data.batch_size}} samples per seed, {{num_seeds}} seeds). GSC from input to output is estimated from {{probes}}
random vectors ([probes](../glossary.md)). We compare stacks with equal weights:

- **circular**: stride 1, no pooling, and circular padding, which joins opposite borders to a torus. This stack is the
  **reference**.
- **valid**, **reflect**, **zeros**: as the reference, but without padding (valid), with mirrored padding (reflect) or
  with zero padding (zeros).
- **strided**: as the reference, but the first convolution of every stage has stride 2.
- **max**, **average**: as the reference, with 2 x 2 pooling at the end of every stage.

The **factor** of a stack is its GSC, divided by GSC of the reference with the same seed. Both stacks have the same
weights and inputs, so effects of the seed that they share cancel. We report geometric means over seeds.

**Mean field** is the limit of many channels (J. Xiao et al., arXiv:1806.05393). The weights of a kernel are
independent, so a convolution with He initialization and ReLU does not change GSC, at any stride. Zero padding changes
GSC, because at the border some weights multiply zeros. Average pooling of m pixels multiplies GSC by
1 / (1 + (m - 1) rho). Here rho is the cosine similarity of the channel vectors at two pixels of a window. If all
pixels of a window are equal, the factor is 1 / m.

Let h_1, ..., h_m be the pre-activations in a window, with variance 1. Max pooling multiplies GSC by
P(max h_i > 0) / E[max(h_1, ..., h_m, 0)^2]. The numerator has this reason: max pooling passes each gradient
to the largest pixel of a window. This pixel is positive more often than others, so the ReLU before the pooling passes
more of the gradient. The denominator is the mean square of the pooled map. In the first layer, the pre-activations of a
window are uncorrelated, because the input is white noise. With every further layer, they become more similar.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals of log GSC over seeds, which differ in weights and inputs. The stacks have
finitely many channels, so we accept a deviation from mean field of {100 * (TOLERANCE - 1):.0f} % per layer (chosen
after trial runs). All inputs are white noise. In images, neighboring pixels are similar. So in the first
stages, averaging should shrink the map less than here, and average pooling should lower GSC more than here.
""",
    claims=claims,
    answer=answer,
    figures=figures.draw,
    captions={
        "total": "Factor of each stack: GSC from input to output, divided by GSC of the stack with circular padding "
        "(the torus). Dots are means with 95 % intervals. Crosses are mean field, drawn slightly above the dots. "
        "Factors in the gray band count as no change.",
        "layers": "GSC from every layer to the output. In the left panel, GSC is divided by GSC of the stack with "
        "circular padding (the torus), and points are shifted slightly sideways. The other panels show max pooling and "
        "average pooling. Bars are 95 % intervals over seeds. Crosses are mean field, for stacks where it "
        "predicts GSC other than 1.",
    },
)
