"""Colors of figures, all readable on white and with common kinds of color blindness."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np

# The palette "colorblind" of seaborn without its pale pink and yellow, and with darker colors.  Brown, which is near
# to the second color, comes late.
COLORS = (
    *("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#332288"),
    *("#ca9161", "#949494", "#882255", "#2f8fc9", "#999933", "#117733"),
)


def ordered(num: int) -> list[Any]:
    """Colors of ``num`` ordered values, from dark to light."""
    return list(mpl.colormaps["viridis"](np.linspace(0, 0.68, num)))
