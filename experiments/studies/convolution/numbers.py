"""TODO docstring."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.studies.convolution.measurement import AFTER, BEFORE

WHEN = {BEFORE: "at initialization", AFTER: "after training"}
POOLED = {"none": "as it is", "subsampled": "every second pixel", "max": "max pooling", "average": "average pooling"}


def by_seed(frame: pd.DataFrame, quantity: str, **columns: str | float) -> npt.NDArray[np.float64]:
    """The values of a quantity where the columns have these values, in the order of the seeds."""
    rows = frame[frame["quantity"] == quantity]
    for name, value in columns.items():
        rows = rows[rows[name] == value]
    return rows.sort_values("seed")["value"].to_numpy(dtype=np.float64)


def change(frame: pd.DataFrame, network: str, training: str, shift: float) -> npt.NDArray[np.float64]:
    """Of the output under a shift, as a part of the distance of the outputs for two images; one a seed."""
    of = {"network": network, "training": training}
    return by_seed(frame, "invariance_error", shift=shift, **of) / by_seed(frame, "contrast", **of)
