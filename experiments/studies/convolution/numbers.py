"""Numbers of the study of convolution, read from the frame: one value per seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.studies.convolution.measurement import AFTER, BEFORE, CONNECTED, CONVOLUTIONAL

FloatArray = npt.NDArray[np.float64]
NAMES = {CONVOLUTIONAL: "AlexNet B", CONNECTED: "fully connected"}
WHEN = {BEFORE: "at initialization", AFTER: "after training"}
POOLED = {"none": "unchanged", "subsampled": "every second pixel", "max": "max pooling", "average": "average pooling"}


def by_seed(frame: pd.DataFrame, quantity: str, **columns: str | float) -> FloatArray:
    """The values of a quantity in the rows whose columns have the given values, in the order of the seeds."""
    rows = frame[frame["quantity"] == quantity]
    for name, value in columns.items():
        rows = rows[rows[name] == value]
    return rows.sort_values("seed")["value"].to_numpy(dtype=np.float64)


def change(frame: pd.DataFrame, network: str, training: str, shift: float = 1) -> FloatArray:
    """The change of the output under a shift, divided by the distance between the outputs for two images."""
    of = {"network": network, "training": training}
    return by_seed(frame, "invariance_error", shift=shift, **of) / by_seed(frame, "contrast", **of)


def training_factors(frame: pd.DataFrame, network: str) -> tuple[FloatArray, FloatArray]:
    """Factors by which training multiplies the numerator (response to a shift) and the denominator of `change`."""
    moved = [by_seed(frame, "invariance_error", training=when, shift=1, network=network) for when in WHEN]
    apart = [by_seed(frame, "contrast", training=when, network=network) for when in WHEN]
    return moved[1] / moved[0], apart[1] / apart[0]


def averaged(rows: pd.DataFrame, *columns: str) -> FloatArray:
    """For each seed, the geometric mean of the values over these columns."""
    logarithms = np.log(rows.pivot_table(index="seed", columns=list(columns), values="value", observed=True))
    return np.exp(logarithms.mean(axis=1)).to_numpy(dtype=np.float64)


def pooled(frame: pd.DataFrame, pooling: str) -> FloatArray:
    """The change of pooled maps per seed: geometric mean over four values (both layers, before and after training)."""
    rows = frame[(frame["quantity"] == "pooled_change") & (frame["pooling"] == pooling)]
    return averaged(rows, "layer", "training")


def neighbor_spread(frame: pd.DataFrame, axis: str) -> FloatArray:
    """Standard deviation over positions of the correlation r of neighbors, divided by 1 - r."""
    near: dict[str, str | float] = {"axis": axis, "place": 1}
    return by_seed(frame, "correlation_spread", **near) / (1 - by_seed(frame, "correlation", **near))
