"""Panels of a figure, in rows of so many."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def panels(num: int, in_a_row: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with ``num`` axes of so many inches, ``in_a_row`` beside each other at most."""
    columns = min(in_a_row, num)
    rows = -(-num // columns)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for ax in axes.flat[num:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:num])
