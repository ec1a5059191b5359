"""What stride, padding and pooling do to GSC, measured on stacks of convolutions that share their weights."""

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

# Accepted deviation from mean field, a factor per layer.
TOLERANCE = 1.03


def claims(collected: Collected) -> list[Claim]:
    """Which kinds keep GSC, which lower it, and whether mean field predicts the factor."""
    frame, kept = collected.frame, f"a whole stack by less than {100 * (UNCHANGED - 1):.0f} %"
    totals = of.factors(frame)
    lowered = {
        "Zero padding lowers GSC from mid-stack to the output": factor(frame, "zeros", of.depth(frame) // 2),
        **{f"{WORDS[kind].capitalize()} lowers GSC": factor(frame, kind) for kind in POOLING},
        "Average pooling lowers GSC more than max pooling": geometric_mean(totals["average"] / totals["max"]),
    }
    made = [_near(frame, kind, f"GSC of {kept}", 1.0, UNCHANGED) for kind in KEEPING]
    made += [Claim(says, mean.below(1), f"factor: {mean:.3f}") for says, mean in lowered.items()]
    for kind in POOLING:
        own = of.predicted(frame, kind)
        margin = TOLERANCE ** (len(own) - 1)
        made.append(_near(frame, kind, "GSC by the factor that mean field predicts", float(own[0]), margin))
    return made


def _near(frame: pd.DataFrame, kind: str, says: str, expected: float, margin: float) -> Claim:
    found, low, high = factor(frame, kind), expected / margin, expected * margin
    because = f"factor: {found:.3f}; expected: {expected:.3f}; accepted: {low:.3f} to {high:.3f}"
    return Claim(f"{WORDS[kind].capitalize()} changes {says}", found.between(low, high), because)


def answer(collected: Collected) -> str:
    """Which kinds keep GSC, and by how much pooling lowers it."""
    found = {kind: factor(collected.frame, kind) for kind in (*KEEPING, *POOLING)}
    kept = [kind for kind in KEEPING if found[kind].between(1 / UNCHANGED, UNCHANGED)]
    text = []
    if kept:
        most = 100 * math.expm1(max(abs(math.log(found[kind].value)) for kind in kept))
        names = listed(WORDS[kind] for kind in kept)
        text.append(f"GSC over the whole stack changes by at most {most:.1f} % with {names}.")
    if others := [WORDS[kind] for kind in KEEPING if kind not in kept]:
        text.append(f"It is not shown to stay the same with {listed(others)}.")
    if lowered := [kind for kind in POOLING if found[kind].below(1)]:
        by = listed(f"{WORDS[kind]} by a factor of {1 / found[kind].value:.1f}" for kind in lowered)
        text.append(f"Pooling 2 x 2 in every stage lowers GSC: {by}.")
    return " ".join(text)


STUDY = Study(
    question="What do stride, padding and pooling do to the gradients of a convolutional network?",
    use="""
Choose stride and padding without regard to gradients: at initialization they hardly change GSC. Max pooling makes
gradients smaller relative to the activations, and average pooling much smaller. Averaging cancels most of a random
change, because the change differs within a window.
""",
    method=f"""
A stack is a chain of {{model.stages}} stages, each of {{model.convs}} convolutions 3 x 3 with ReLU, {{model.channels}}
channels, He's weights and no biases. The input is Gaussian noise of {SIDE} x {SIDE} pixels ({{data.batch_size}}
samples, {{probes}} probes, {{num_seeds}} seeds). The stacks of one seed have equal weights and inputs, and differ in
one thing:

- **circular**: on a torus, where opposite borders are joined. The other stacks are compared with this one.
- **valid**, **reflect** and **zeros**: without padding, with mirrored padding, and with zero padding.
- **strided**: the first convolution of every stage has stride 2, on a torus.
- **max**, **average**: 2 x 2 pooling at the end of every stage, on a torus.

Two stacks are compared by the ratio of their GSC from the input to the output, separately for each seed. So whatever a
seed does to all stacks alike cancels. The reported factor is the geometric mean of this ratio over seeds.

**Mean field** is the limit of many channels (J. Xiao et al., arXiv:1806.05393). The weights of a kernel are
independent, so a convolution with He's weights and its ReLU keeps GSC, whatever the stride. Zero padding makes some of
them ineffective at the border. Average pooling of m pixels multiplies GSC by 1 / (1 + (m - 1) rho), where rho is the
cosine similarity of two pixels; for equal pixels this is 1 / m. Max pooling passes each gradient to one pixel, which is
positive more often than the others. Its factor is 2 P(max h > 0) / (2 E[max(h, 0)^2]). White noise gives uncorrelated
pre-activations h, and each layer makes them more similar.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals of the logarithm over initializations and inputs. Mean field describes
infinitely many channels, so a deviation of {100 * (TOLERANCE - 1):.0f} % per layer is accepted. This margin was chosen
after trial runs. All inputs are white noise. Pixels of images are correlated, so on images average pooling lowers GSC
more, from the first stage on.
""",
    claims=claims,
    answer=answer,
    figures=figures.draw,
    captions={
        "total": "Factor by which stride, padding and pooling change GSC of the whole stack, relative to a torus. Dots "
        "are means with 95 % intervals, crosses are mean field. Factors in the gray band count as no change.",
        "layers": "GSC from every layer to the output. Left: stride and padding, relative to a torus. Others: both "
        "kinds of pooling. Bars are 95 % intervals over seeds, crosses are mean field.",
    },
)
