"""How pooling changes the response of maps to a shift of the image, shift by shift."""

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
from experiments.evidence.means import Mean, all_of, errorbars, geometric_mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table, told
from experiments.studies.convolution import measurement
from experiments.studies.convolution.measurement import RECTIFIED, SHIFTS
from experiments.studies.convolution.numbers import POOLED, FloatArray, averaged

__all__ = ["STUDY", "measure"]

WINDOW = 2
FIRST, LAST = SHIFTS[0], SHIFTS[-1]
POOLINGS = ("max", "average")
# A factor that counts as none, and a change that counts as small.
SAME, SMALL = 1.05, 0.1


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator) -> pd.DataFrame:
    """`experiments.studies.convolution.measurement.pooling` for all shifts; ``generator`` is not used."""
    return measurement.pooling(model, x, SHIFTS)


def claims(collected: Collected) -> list[Claim]:
    """The gain for every shift, whether it falls with the shift, and whether maps become nearly invariant."""
    frame, made = collected.frame, []
    for pooling, shift in itertools.product(POOLINGS, SHIFTS):
        found, pixels = factor(frame, pooling, shift), "pixel" if shift == 1 else "pixels"
        says = f"A map changes less under a shift by {shift} {pixels} after {POOLED[pooling]}"
        made.append(Claim(says, found.below(1), f"factor {found:.3f}"))
    for pooling in POOLINGS:
        ratio = fading(frame, pooling)
        says = f"{POOLED[pooling].capitalize()} gains less for a shift by {LAST} pixels than for one by {FIRST}"
        made.append(Claim(says, ratio.above(1), f"factor at {LAST} over that at {FIRST} {ratio:.3f}"))
    for pooling in POOLINGS:
        left = geometric_mean(changes(frame, pooling, FIRST))
        says = f"After {POOLED[pooling]} a map is nearly invariant to a shift by {FIRST} pixel"
        because = f"change relative to the distance of two images {left:.3f}; small is below {SMALL:g}"
        made.append(Claim(says, left.below(SMALL), because))
    apart = [factor(frame, "subsampled", shift) for shift in SHIFTS]
    ends = f"{min(one.low for one in apart):.3f} to {max(one.high for one in apart):.3f}"
    nothing = (
        f"Taking every second pixel alone changes nothing by more than {100 * (SAME - 1):.0f} %, whatever the shift"
    )
    same, because = all_of(*(one.between(1 / SAME, SAME) for one in apart)), "the intervals of the factors for"
    return [*made, Claim(nothing, same, f"{because} {len(SHIFTS)} shifts lie within {ends}")]


def answer(collected: Collected) -> str:
    """Factors for the smallest and the largest shift, and the change that remains."""
    frame = collected.frame
    first, last = (
        listed(f"{factor(frame, pooling, shift).value:.2f} ({POOLED[pooling]})" for pooling in POOLINGS)
        for shift in (FIRST, LAST)
    )
    less = told(
        {POOLED[pooling]: fading(frame, pooling).above(1) for pooling in POOLINGS},
        "smaller for {}", "larger for {}", "undecided for {}",
    )  # fmt: skip
    left = {pooling: geometric_mean(changes(frame, pooling, FIRST)) for pooling in POOLINGS}
    values = listed(f"{mean.value:.2f} ({POOLED[pooling]})" for pooling, mean in left.items())
    nearly = "nearly" if all_of(*(mean.below(SMALL) for mean in left.values())) else "not nearly"
    return (
        f"Pooling multiplies the change of a map by {first} for a shift of the image by {FIRST} pixel, and by {last} "
        f"for a shift by {LAST} pixels. The gain for larger shifts is {less}. A shift by {FIRST} pixel still changes "
        f"the pooled map by {values} of the distance of two images, which is {nearly} invariant."
    )


def details(collected: Collected) -> str:
    """Factors for all shifts."""
    frame = collected.frame
    rows = [[shift, *(f"{factor(frame, pooling, shift):.3f}" for pooling in POOLINGS)] for shift in SHIFTS]
    return table(["shift [pixels]", *(f"factor of {POOLED[pooling]}" for pooling in POOLINGS)], rows)


def factor(frame: pd.DataFrame, pooling: str, shift: float) -> Mean:
    """The change of pooled maps over that of maps without pooling; one of the simultaneous intervals for all shifts."""
    return geometric_mean(changes(frame, pooling, shift) / changes(frame, "none", shift), comparisons=len(SHIFTS))


def fading(frame: pd.DataFrame, pooling: str) -> Mean:
    """The factor for the largest shift over that for the smallest, seed by seed."""
    first, last = (changes(frame, pooling, shift) / changes(frame, "none", shift) for shift in (FIRST, LAST))
    return geometric_mean(last / first)


def changes(frame: pd.DataFrame, pooling: str, shift: float) -> FloatArray:
    """The change of a map relative to the distance of two images, geometric mean over the maps; one per seed."""
    return averaged(frame[(frame["pooling"] == pooling) & (frame["shift"] == shift)], "layer")


def _figure(collected: Collected) -> Figure:
    """Changes of each map against the shift, and the factors of pooling."""
    frame, note = collected.frame, collected.manifest.get("note")
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.2), layout="constrained")
    colors = sns.color_palette("colorblind")
    lines: dict[str, Any] = {"markersize": 4, "capsize": 2, "linewidth": 1.2}
    for number, (pooling, words) in enumerate(POOLED.items()):
        style = lines | {"color": colors[number], "marker": "osD^"[number], "label": words}
        places = np.array(SHIFTS) + 0.08 * (number - 1.5)
        for ax, layer in zip(axes, RECTIFIED, strict=False):
            rows = frame[frame["layer"] == layer]
            errorbars(ax, places, [geometric_mean(changes(rows, pooling, shift)) for shift in SHIFTS], **style)
        if pooling != "none":
            errorbars(axes[2], places, [factor(frame, pooling, shift) for shift in SHIFTS], **style)
    for ax, layer in zip(axes, RECTIFIED, strict=False):
        ax.set_title(layer, fontsize=10)
        ax.set(ylabel="change / distance of two images", ylim=(0, None))
    axes[2].axhline(1, color="0.6", linewidth=0.8, zorder=0)
    axes[2].set(ylabel="change over that of the map as it is")
    axes[2].set_title(f"both maps; {len(SHIFTS)} simultaneous intervals", fontsize=10)
    for ax in axes:
        sns.despine(ax=ax)
        ax.set(xlabel="shift of the image [pixels]", xticks=SHIFTS)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    data = f"CIFAR-10 ({note})" if note else "CIFAR-10"
    bars = f"mean over {frame['seed'].nunique()} seeds, bars: 95 % interval"
    figure.suptitle(f"Maps of AlexNet B at initialization, pooled; {data}; {bars}", fontsize=10)
    return figure


STUDY = Study(
    question="How much nearer to invariance does pooling bring a map, and for which shifts of the image?",
    use="""
Do not count on a single pooling layer for invariance: it lowers the response to small shifts and hardly the response to
large ones. If shifts of a pixel matter, prefer average pooling over max pooling. Subsampling alone is of no help.
""",
    method=f"""
The first two rectified maps of an AlexNet B at initialization respond to {{data.batch_size}} images of CIFAR-10. The
images are shifted to the right by {", ".join(map(str, SHIFTS))} pixels; pixels that come in mirror the image. The
**change** of a map is divided by the distance of the maps of two images (both root mean square). It is measured for the
map as it is, for every second pixel, and after {WINDOW} x {WINDOW} max or average pooling with stride {WINDOW}.

A **factor** is the change of the pooled map over that of the map as it is: the geometric mean over the two maps, seed
by seed. The factors of one kind of pooling have {len(SHIFTS)} simultaneous intervals (Bonferroni).
""",
    how_sure=f"""
Intervals are over {{num_seeds}} seeds: 95 %, Student's t of the logarithm. A seed draws the initialization and the
images. Networks are not trained; the study [convolution](convolution.md) measures pooled maps after training. After the
first pooling a map is half as wide, so a shift of the image is half as many of its pixels. A factor within
{100 * (SAME - 1):.0f} % of 1 counts as no change. The study was planned after a smaller change of pooled maps under the
smallest shift had been seen.
""",
    claims=claims,
    answer=answer,
    details=details,
    figures=lambda collected: {"pooling": _figure(collected)},
    captions={
        "pooling": "Change of two maps under a shift of the image, relative to the distance of two images. The third "
        "panel shows the change of a pooled map over that of the map as it is. Bars are 95 % intervals over seeds.",
    },
)
