"""How pooling changes the response of feature maps to a shift of the image, for several shifts."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.archive.tables import Collected
from experiments.evidence.colors import COLORS
from experiments.evidence.means import Mean, all_of, errorbars, geometric_mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, told
from experiments.studies.convolution import measurement
from experiments.studies.convolution.measurement import RECTIFIED, SHIFTS
from experiments.studies.convolution.numbers import POOLED, FloatArray, averaged

__all__ = ["STUDY", "measure"]

WINDOW = 2
FIRST, LAST = SHIFTS[0], SHIFTS[-1]
POOLINGS = ("max", "average")
# A factor between 1 / SAME and SAME counts as no change. A change below SMALL counts as small.
SAME, SMALL = 1.05, 0.1


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator) -> pd.DataFrame:
    """`experiments.studies.convolution.measurement.pooling` for all shifts; ``generator`` is not used."""
    return measurement.pooling(model, x, SHIFTS)


def claims(collected: Collected) -> list[Claim]:
    """Whether pooling helps for every shift, whether it helps less for large shifts, and whether maps are invariant."""
    frame, made = collected.frame, []
    for pooling, shift in itertools.product(POOLINGS, SHIFTS):
        found, pixels = factor(frame, pooling, shift), "pixel" if shift == 1 else "pixels"
        says = f"After {POOLED[pooling]}, a map changes less under a shift by {shift} {pixels} than without pooling"
        because = f"factor (relative change of the pooled map / of the full map): {found}; claimed: factor below 1"
        made.append(Claim(says, found.below(1), because))
    for pooling in POOLINGS:
        ratio = fading(frame, pooling)
        says = f"{POOLED[pooling].capitalize()} helps less for shifts by {LAST} pixels than for shifts by {FIRST} pixel"
        made.append(
            Claim(
                says,
                ratio.above(1),
                f"factor for {LAST} pixels divided by factor for {FIRST} pixel: {ratio}; claimed: above 1",
            )
        )
    for pooling in POOLINGS:
        left = geometric_mean(changes(frame, pooling, FIRST))
        says = f"After {POOLED[pooling]}, a map is nearly invariant to a shift by {FIRST} pixel"
        because = f"relative change: {left}; nearly invariant: relative change below {SMALL:g}"
        made.append(Claim(says, left.below(SMALL), because))
    apart = [factor(frame, "subsampled", shift) for shift in SHIFTS]
    ends = f"{min(one.low for one in apart):.3f} and {max(one.high for one in apart):.3f}"
    nothing = f"Subsampling changes the response to every shift by at most {100 * (SAME - 1):.0f} %"
    same = all_of(*(one.between(1 / SAME, SAME) for one in apart))
    return [
        *made,
        Claim(
            nothing,
            same,
            f"the intervals of the factors (subsampled / full map) for all {len(SHIFTS)} shifts lie between {ends}",
        ),
    ]


def answer(collected: Collected) -> str:
    """Factors for the smallest and the largest shift, and the change that remains."""
    frame = collected.frame
    first, last = (
        listed(f"{factor(frame, pooling, shift).value:.2f} ({POOLED[pooling]})" for pooling in POOLINGS)
        for shift in (FIRST, LAST)
    )
    less = told(
        {POOLED[pooling]: fading(frame, pooling).above(1) for pooling in POOLINGS},
        "smaller for {};", "not smaller for {};", "undecided for {};",
    )  # fmt: skip
    left = {pooling: geometric_mean(changes(frame, pooling, FIRST)) for pooling in POOLINGS}
    values = listed(f"{mean.value:.2f} ({POOLED[pooling]})" for pooling, mean in left.items())
    nearly = "nearly" if all_of(*(mean.below(SMALL) for mean in left.values())) else "not nearly"
    return (
        "Pooling multiplies the relative change of a feature map (change under a shift of the image / distance between "
        f"the maps of two images) by {first} for a shift by {FIRST} pixel, and by {last} for a shift by {LAST} pixels. "
        f"Compared with the reduction for {FIRST} pixel, the reduction for {LAST} pixels is {less.rstrip(';')}. After "
        f"pooling, the relative change for a shift by {FIRST} pixel is {values}, so the map is {nearly} invariant "
        f"(nearly invariant: relative change below {SMALL:g})."
    )


def factor(frame: pd.DataFrame, pooling: str, shift: float) -> Mean:
    """The change of pooled maps divided by the change of full maps; intervals are simultaneous over all shifts."""
    return geometric_mean(changes(frame, pooling, shift) / changes(frame, "none", shift), comparisons=len(SHIFTS))


def fading(frame: pd.DataFrame, pooling: str) -> Mean:
    """The factor for the largest shift divided by the factor for the smallest shift, seed by seed."""
    first, last = (changes(frame, pooling, shift) / changes(frame, "none", shift) for shift in (FIRST, LAST))
    return geometric_mean(last / first)


def changes(frame: pd.DataFrame, pooling: str, shift: float) -> FloatArray:
    """For each seed, the change of a map divided by the distance between two images: a geometric mean over layers."""
    return averaged(frame[(frame["pooling"] == pooling) & (frame["shift"] == shift)], "layer")


def _figure(collected: Collected) -> Figure:
    """The change of each map and the factors of pooling, drawn against the shift."""
    frame, note = collected.frame, collected.manifest.get("note")
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.2), layout="constrained")
    lines: dict[str, Any] = {"markersize": 4, "capsize": 2, "linewidth": 1.2}
    for number, (pooling, words) in enumerate(POOLED.items()):
        style = lines | {"color": COLORS[number], "marker": "osD^"[number], "label": words}
        places = np.array(SHIFTS) + 0.08 * (number - 1.5)
        for ax, layer in zip(axes, RECTIFIED, strict=False):
            rows = frame[frame["layer"] == layer]
            errorbars(ax, places, [geometric_mean(changes(rows, pooling, shift)) for shift in SHIFTS], **style)
        if pooling != "none":
            errorbars(axes[2], places, [factor(frame, pooling, shift) for shift in SHIFTS], **style)
    for ax, layer in zip(axes, RECTIFIED, strict=False):
        ax.set_title(RECTIFIED[layer], fontsize=10)
        ax.set(ylabel="change / distance of two images", ylim=(0, None))
    axes[2].axhline(1, color="0.6", linewidth=0.8, zorder=0)
    axes[2].set(ylabel="change / change of the unchanged map")
    axes[2].set_title("both maps", fontsize=10)
    for ax in axes:
        sns.despine(ax=ax)
        ax.set(xlabel="shift of the image [pixels]", xticks=SHIFTS)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    data = f"CIFAR-10 ({note})" if note else "CIFAR-10"
    bars = f"mean over {frame['seed'].nunique()} seeds, bars: 95 % interval"
    figure.suptitle(f"Maps of AlexNet B at initialization, pooled; {data}; {bars}", fontsize=10)
    return figure


STUDY = Study(
    question="How much does pooling reduce the response of a feature map to a shift of the image?",
    use="""
Do not rely on a single pooling layer for invariance. Pooling lowers the response to small shifts, but hardly lowers the
response to large shifts. For shifts by one pixel, prefer average pooling. Subsampling a map does not help.
""",
    method=f"""
{{data.batch_size}} images of CIFAR-10 are shifted to the right by {", ".join(map(str, SHIFTS[:-1]))} or
{SHIFTS[-1]} pixels. Missing pixels are filled by mirroring the image. We measure the maps after the first two ReLUs of
an AlexNet B at initialization: the full map, every second pixel of every second row (**subsampling**), and the map
after {WINDOW} x {WINDOW} max or average pooling with stride {WINDOW}.

- The **relative change** of a map is the difference between the map before and after the shift of the image, divided
  by the distance between the maps of two images. Difference and distance are root mean squares over images.
- A **factor** is the relative change of the pooled or subsampled map, divided by that of the full map. For each seed,
  we take the geometric mean over the maps of both ReLUs.
""",
    how_sure="""
Intervals are 95 % Student's t intervals over {num_seeds} seeds, computed for logarithms. For each kind of pooling, the
intervals of the factors at all shifts are simultaneous (Bonferroni). Each seed draws other weights and other images.
The networks are not trained. If the image is shifted, the map after the second ReLU is shifted by half as many pixels,
because the first pooling of the network halves the width. The study [convolution](convolution.md) had measured a shift
by 1 pixel (also after training), so the factors for this shift were known before.
""",
    claims=claims,
    answer=answer,
    figures=lambda collected: {"pooling": _figure(collected)},
    captions={
        "pooling": "Change of two feature maps under a shift of the image, divided by the distance between the maps of "
        "two images. Third panel: this relative change for a pooled map, divided by that for the full map. Bars are "
        "95 % intervals over seeds; in the third panel, the intervals of each kind of pooling are simultaneous over "
        f"all {len(SHIFTS)} shifts. Points are shifted slightly sideways.",
    },
)
