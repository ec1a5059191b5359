"""Factors by which stride, padding and pooling change GSC, read from the frame."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.evidence.means import Mean, geometric_mean
from experiments.studies.convolution_gsc.stacks import FloatArray, expected_log10_gsc

SIDE = 16  # of the images, in pixels
REFERENCE = "circular"
KEEPING = ("strided", "valid", "reflect", "zeros")
POOLING = ("max", "average")
WORDS = {
    "strided": "stride 2", "valid": "no padding", "reflect": "mirrored padding", "zeros": "zero padding",
    "max": "max pooling", "average": "average pooling", "circular": "torus",
}  # fmt: skip
# GSC counts as unchanged if its factor is between 1 / UNCHANGED and UNCHANGED.
UNCHANGED = 1.1


def factors(frame: pd.DataFrame, place: int = 0) -> pd.DataFrame:
    """GSC from layer ``place`` (0: input) divided by GSC of the torus with the same seed; shape (seeds, kinds)."""
    rows = frame[(frame["quantity"] == "gsc") & (frame["layer"] == ("input" if place == 0 else f"conv{place}"))]
    table = rows.pivot_table(index="seed", columns="kind", values="log10_value", observed=True)
    return 10 ** table.sub(table[REFERENCE], axis=0)


def factor(frame: pd.DataFrame, kind: str, place: int = 0) -> Mean:
    """The geometric mean of `factors` over seeds."""
    return geometric_mean(factors(frame, place)[kind])


def depth(frame: pd.DataFrame) -> int:
    """Number of convolutions."""
    return int(frame["stages"].iloc[0] * frame["convs"].iloc[0])


def predicted(frame: pd.DataFrame, kind: str) -> FloatArray:
    """GSC from the input and from every layer to the output, by mean field."""
    stages, convs = (int(frame[name].iloc[0]) for name in ("stages", "convs"))
    return np.asarray(10 ** expected_log10_gsc(kind, side=SIDE, stages=stages, convs=convs))


def profile(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """log10 GSC from the input and from every layer to the output, as a table (layers, seeds)."""
    rows = frame[(frame["quantity"] == "gsc") & (frame["kind"] == kind)]
    table = rows.pivot_table(index=["index", "layer"], columns="seed", values="log10_value", observed=True)
    return table.droplevel("index")
