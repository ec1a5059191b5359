"""Claims of the study transformer_depth that compare measurement with mean-field theory."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from experiments.evidence import counts, means
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim
from experiments.evidence.words import listed
from experiments.studies.transformer_depth import numbers
from experiments.studies.transformer_depth.numbers import DEPTHS, NORMS, SCALED, name

# Tolerances: of a skip share; of the squared length of the stream, as a factor; of the mean of log10 GSC.
SHARE, LENGTH, GSC = 0.05, 1.1, 0.1
# The band of theory is meant for at least this fraction of single networks.
COVERED = 0.95
BRANCHES = ("attention", "mlp")


def claims(frame: pd.DataFrame) -> list[Claim]:
    """The claims about skip shares, lengths, the band, and the mean of log10 GSC."""
    return [claim(frame, norm) for claim in (shares, _lengths, band, _gsc) for norm in NORMS] + [_rises(frame)]


def shares(frame: pd.DataFrame, norm: str) -> Claim:
    """Whether theory predicts the skip share of every measured branch of the deepest networks."""
    errors = {
        (branch, block): column.to_numpy()
        for branch in BRANCHES
        for block, column in (
            numbers.shares(frame, norm, branch) - numbers.shares(frame, norm, branch, "_theory")
        ).items()
    }  # fmt: skip
    found = {place: means.mean(values, comparisons=len(errors)) for place, values in errors.items()}
    (branch, block), worst = max(found.items(), key=lambda pair: abs(pair[1].value))
    return Claim(
        f"With {name(norm)} and {DEPTHS[-1]} blocks, theory predicts the skip share of each measured branch within "
        f"{SHARE:g}",
        means.all_of(*(one.within(0.0, SHARE) for one in found.values())),
        f"largest of {len(found)} differences of the skip share (measured - theory): {worst:+}, in the {branch} branch "
        f"of block {block} (counted from 0); required of every difference: from -{SHARE:g} to {SHARE:g}",
    )


def band(frame: pd.DataFrame, norm: str) -> Claim:
    """Whether at least `COVERED` of the networks have GSC in the band of theory."""
    return Claim(
        f"With {name(norm)} and unscaled weights, GSC of at least {100 * COVERED:g} % of the networks lies in the "
        "band of theory",
        inside(frame, norm).above(COVERED),
        f"networks in the band: {inside(frame, norm)}; networks with scaled weights in the band (not part of the "
        f"claim): {inside(frame, norm, SCALED)}",
    )


def inside(frame: pd.DataFrame, norm: str, scale: str = numbers.UNIT) -> counts.Part:
    """The proportion of networks whose GSC lies in the band. Seeds are resampled, because depths share weights."""
    within = numbers.within_band(frame, norm, scale).stack()
    drawn = counts.draws(within.index.get_level_values("seed"), generator=np.random.default_rng(0))
    return counts.part(within, drawn)


def _lengths(frame: pd.DataFrame, norm: str) -> Claim:
    found = _differences(numbers.lengths(frame, norm), numbers.by_depth(frame, norm, "log10_square_growth_theory"))
    ratios = listed(f"{one:+} at depth {depth}" for depth, one in found.items())
    return Claim(
        f"With {name(norm)}, theory predicts the squared length of the residual stream within "
        f"{100 * (LENGTH - 1):.0f} %",
        means.all_of(*(one.within(0.0, math.log10(LENGTH)) for one in found.values())),
        f"log10 of (measured / predicted squared length): {ratios}; required at every depth: measured / predicted "
        f"from 1 / {LENGTH:g} to {LENGTH:g}, so log10 from -{math.log10(LENGTH):.3f} to {math.log10(LENGTH):.3f}",
    )


def _gsc(frame: pd.DataFrame, norm: str) -> Claim:
    found = _differences(numbers.totals(frame, norm), numbers.by_depth(frame, norm, "log10_gsc_theory"))
    return Claim(
        f"With {name(norm)}, theory predicts the mean of log10 GSC over networks within {GSC:g}",
        means.all_of(*(one.within(0.0, GSC) for one in found.values())),
        "mean of log10 GSC, measured - theory: "
        + listed(f"{one:+} at depth {depth}" for depth, one in found.items())
        + f"; required at every depth: difference from -{GSC:g} to {GSC:g}",
    )


def _differences(measured: pd.DataFrame, predicted: pd.DataFrame) -> dict[int, Mean]:
    """The mean difference at each depth; its intervals are simultaneous."""
    errors = measured - predicted
    return {int(depth): means.mean(errors[depth], comparisons=len(DEPTHS)) for depth in DEPTHS}


def _rises(frame: pd.DataFrame) -> Claim:
    """Whether the skip share grows with depth, as a growing residual stream implies."""
    ends = [numbers.shares(frame, "pre", branch).iloc[:, [0, -1]] for branch in BRANCHES]
    found = [means.mean(end.iloc[:, 1] - end.iloc[:, 0], comparisons=len(ends)) for end in ends]
    return Claim(
        f"With pre-norm, the skip share (see the method) is larger in the last of {DEPTHS[-1]} blocks than in the "
        "first",
        means.all_of(*(one.above(0.0) for one in found)),
        "skip share of the last block minus that of the first: "
        + listed(f"{one:+} ({branch})" for one, branch in zip(found, BRANCHES, strict=True)),
    )
