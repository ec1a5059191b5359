"""Pooling: how much less maps change under a shift of the image once they are pooled, shift by shift."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean
from experiments.evidence.study import Claim, Study
from experiments.studies.convolution import measurement
from experiments.studies.convolution.figures import FloatArray
from experiments.studies.convolution.measurement import RECTIFIED, SHIFTS
from experiments.studies.convolution.numbers import POOLED

# Of the configuration; the tests hold it against it.
NUM_IMAGES = 32
WINDOW = 2
POOLINGS = ("max", "average")
# A factor that counts as none, and a change that counts as small.
SAME, SMALL = 1.05, 0.1
NEARLY = {
    True: "It makes a map nearly invariant",
    False: "It makes no map nearly invariant",
    None: "Whether it makes a map nearly invariant is not decided",
}

QUESTION = "How much nearer to invariance does pooling bring a map, and for which shifts of the image?"
METHOD = f"""
The first two rectified maps of an AlexNet B at initialization, for {NUM_IMAGES} images of CIFAR-10 that are moved to
the right by {", ".join(map(str, SHIFTS))} pixels; pixels that come in mirror the image. The change of a map under the
shift, as a part of the distance of the maps of two images (both root mean square): as it is, every second pixel, and
after {WINDOW} x {WINDOW} max or average pooling with stride {WINDOW}. A factor is that of the change of the pooled map
over that of the map as it is, the geometric mean over the two maps, seed by seed. The factors of one kind of pooling
have {len(SHIFTS)} simultaneous intervals (Bonferroni).
"""
HOW_SURE = f"""
Intervals are over seeds, 95 %, Student's t of the logarithm: another initialization and other images. Networks are not
trained; what training does to pooled maps under the smallest shift is part of the study convolution. Shifts are
horizontal, windows {WINDOW} pixels wide, and a map after the first pooling is smaller, so that a shift of the image is
half as many of its pixels. A factor within {100 * (SAME - 1):.0f} % of 1 counts as none. The study was made after
pooled maps had been seen to change less under the smallest shift.
"""


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator) -> pd.DataFrame:
    """`experiments.studies.convolution.measurement.pooling` for all shifts; nothing of it is random."""
    return measurement.pooling(model, x, SHIFTS)


def figures(collected: Collected) -> dict[str, Figure]:
    """Changes against the shift, and factors."""
    return {"pooling": _figure(collected)}


def claims(collected: Collected) -> list[Claim]:
    """What is gained, shift by shift, whether less for larger shifts, and whether maps become nearly invariant."""
    frame = collected.frame
    return [
        *(_gains(frame, pooling, shift) for pooling in POOLINGS for shift in SHIFTS),
        *(_fades(frame, pooling) for pooling in POOLINGS),
        *(_invariant(frame, pooling) for pooling in POOLINGS),
        _subsampled(frame),
    ]


def answer(collected: Collected) -> str:
    """Factors by shift."""
    frame = collected.frame
    words = {
        True: "less is gained for larger shifts",
        False: "more is gained for larger shifts",
        None: "whether less is gained for larger shifts is not decided",
    }
    text = []
    for pooling in POOLINGS:
        gained = [str(shift) for shift in SHIFTS if _gains(frame, pooling, shift).holds]
        factors = ", ".join(f"{factor(frame, pooling, shift).value:.2f}" for shift in SHIFTS)
        left = geometric_mean(_changes(frame, pooling, SHIFTS[0])).value
        text.append(
            f"{POOLED[pooling].capitalize()} multiplies the change of a map by {factors} for shifts of "
            f"{', '.join(map(str, SHIFTS))} pixels; it surely lowers it for {', '.join(gained) or 'none'}, and "
            f"{words[_fades(frame, pooling).holds]}. {NEARLY[_invariant(frame, pooling).holds]}: under the smallest "
            f"shift it still changes by {left:.2f} of the distance of two images."
        )
    return " ".join(text)


def factor(frame: pd.DataFrame, pooling: str, shift: float) -> Mean:
    """Of the change of pooled maps over that of maps as they are."""
    return geometric_mean(_changes(frame, pooling, shift) / _changes(frame, "none", shift), comparisons=len(SHIFTS))


def _changes(frame: pd.DataFrame, pooling: str, shift: float) -> FloatArray:
    """Geometric mean over the maps, one a seed."""
    rows = frame[(frame["pooling"] == pooling) & (frame["shift"] == shift)]
    logarithms = np.log(rows.pivot_table(index="seed", columns="layer", values="value", observed=True))
    return np.exp(logarithms.mean(axis=1)).to_numpy(dtype=np.float64)


def _gains(frame: pd.DataFrame, pooling: str, shift: int) -> Claim:
    found = factor(frame, pooling, shift)
    pixels = "pixel" if shift == 1 else "pixels"
    return Claim(
        f"A map changes less under a shift by {shift} {pixels} after {POOLED[pooling]}",
        True if found.high < 1 else False if found.low > 1 else None,
        f"factor {found:.3f}",
    )


def _fades(frame: pd.DataFrame, pooling: str) -> Claim:
    first, last = SHIFTS[0], SHIFTS[-1]
    at_first, at_last = (_changes(frame, pooling, s) / _changes(frame, "none", s) for s in (first, last))
    found = geometric_mean(at_last / at_first)
    return Claim(
        f"{POOLED[pooling].capitalize()} gains less for a shift by {last} pixels than for one by {first}",
        True if found.low > 1 else False if found.high < 1 else None,
        f"factor at {last} over that at {first} {found:.3f}",
    )


def _invariant(frame: pd.DataFrame, pooling: str) -> Claim:
    found = geometric_mean(_changes(frame, pooling, SHIFTS[0]))
    return Claim(
        f"After {POOLED[pooling]} a map is nearly invariant to a shift by {SHIFTS[0]} pixel",
        True if found.high < SMALL else False if found.low > SMALL else None,
        f"change, of the distance of two images, {found:.3f}; small is below {SMALL:g}",
    )


def _subsampled(frame: pd.DataFrame) -> Claim:
    found = {shift: factor(frame, "subsampled", shift) for shift in SHIFTS}
    inside = [one.low > 1 / SAME and one.high < SAME for one in found.values()]
    outside = [one.high < 1 / SAME or one.low > SAME for one in found.values()]
    ends = f"{min(one.low for one in found.values()):.3f} to {max(one.high for one in found.values()):.3f}"
    return Claim(
        f"Taking every second pixel alone changes nothing by more than {100 * (SAME - 1):.0f} %, whatever the shift",
        True if all(inside) else False if any(outside) else None,
        f"intervals of the factors for {len(SHIFTS)} shifts within {ends}",
    )


def _figure(collected: Collected) -> Figure:
    frame, note = collected.frame, collected.manifest.get("note")
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.2), layout="constrained")
    colors = sns.color_palette("colorblind")
    for number, (pooling, words) in enumerate(POOLED.items()):
        style = {"color": colors[number], "marker": "osD^"[number], "markersize": 4, "capsize": 2, "linewidth": 1.2}
        places = np.array(SHIFTS) + 0.08 * (number - 1.5)
        for ax, layer in zip(axes, RECTIFIED, strict=False):
            rows = frame[frame["layer"] == layer]
            _line(ax, places, [geometric_mean(_changes(rows, pooling, shift)) for shift in SHIFTS], words, style)
        if pooling != "none":
            _line(axes[2], places, [factor(frame, pooling, shift) for shift in SHIFTS], words, style)
    for ax, layer in zip(axes, RECTIFIED, strict=False):
        ax.set_title(layer, fontsize=10)
        ax.set(ylabel="change / distance of two images", ylim=(0, None))
    axes[2].axhline(1, color="0.6", linewidth=0.8, zorder=0)
    axes[2].set(ylabel="change over that of the map as it is")
    axes[2].set_title(f"both maps; {len(SHIFTS)} simultaneous intervals", fontsize=10)
    for ax in axes:
        ax.set(xlabel="shift of the image [pixels]", xticks=SHIFTS)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    data = f"CIFAR-10 ({note})" if note else "CIFAR-10"
    figure.suptitle(
        f"Maps of AlexNet B at initialization, pooled; {data}; mean over {frame['seed'].nunique()} seeds, bars: 95 % "
        "interval",
        fontsize=10,
    )
    return figure


def _line(ax: Axes, places: FloatArray, means: list[Mean], label: str, style: dict[str, Any]) -> None:
    errors = [[one.value - one.low for one in means], [one.high - one.value for one in means]]
    ax.errorbar(places, [one.value for one in means], yerr=errors, label=label, **style)
    sns.despine(ax=ax)


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
)
