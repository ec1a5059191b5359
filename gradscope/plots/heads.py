"""Heat maps of attention heads: one row per layer, one column per head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from gradscope.choices import checked
from gradscope.plots.drawing import CellText, name_layers
from gradscope.plots.maps import MAX_ANNOTATED
from gradscope.plots.rows import finite_limits, one_network, rows_of

HEADS = "gradscope.attention(model, data)"
ENTROPY, LOGIT = "relative_attention_entropy", "largest_attention_logit"
MISSING_COLOR = "0.7"  # of heads that a layer does not have; not in the color maps
CELL, MOST = 0.34, 5.0  # inches: the side of a cell, and the largest one of a map
LEAST = (1.2, 2.0)  # inches: least height and width of a map, the latter for its title
BESIDE, BELOW = 3.6, 0.9  # inches for names and color bars, and for the lower axis


@checked
def attention(
    data: Any, quantities: Sequence[str] = (ENTROPY, LOGIT), *, axes: Sequence[Axes] | None = None
) -> tuple[Axes, ...]:
    """Axes with maps of statistics of attention heads, one map per quantity: layers (input on top) against heads.

    In maps of at most 12 layers and 12 heads, every cell shows its value.  Heads that a layer does not have are gray.

    Arguments:
        data: What `gradscope.attention` returns, its frame, a list of these (networks that differ in their seeds), or
            one record of a `gradscope.Monitor`.
        quantities: Names such as "relative_attention_entropy" (on a scale from 0 to 1), "largest_attention_logit",
            "first_key_share", "effective_keys".
        axes: Where to draw, one for each quantity; a new figure by default.

    Raises:
        ValueError: The frame lacks a column or rows of a quantity, networks differ in more than their seeds, or
            ``axes`` and ``quantities`` differ in number.

    >>> import torch, gradscope as gs
    >>> model = torch.nn.MultiheadAttention(8, 4, batch_first=True)
    >>> x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    >>> heads = gs.attention(model, x, forward=lambda model, x: model(x, x, x)[0])
    >>> [ax.get_title() for ax in attention(heads)]
    ['relative attention entropy', 'largest attention logit']
    """
    if not quantities:
        raise ValueError("quantities must name at least one quantity, such as largest_attention_logit; got none.")
    maps = []
    for quantity in quantities:
        rows = rows_of(data, quantity, "head", "value", maker=HEADS)
        rows = rows[rows["head"].notna()].drop(columns=["low", "high"], errors="ignore")
        one_network(rows, free=("head",))
        order = rows.drop_duplicates("layer").sort_values("index", kind="stable")["layer"]
        table = rows.astype({"head": int}).pivot_table(index="layer", columns="head", values="value", observed=True)
        maps.append(table.reindex(order))
    if new := axes is None:
        heights, widths = zip(*(np.clip(CELL * np.array(table.shape), LEAST, MOST) for table in maps), strict=True)
        size = sum(widths) + BESIDE, max(heights) + BELOW
        axes = plt.subplots(1, len(maps), figsize=size, layout="constrained", squeeze=False)[1][0]
    if len(axes) != len(maps):
        raise ValueError(f"axes must be one for each of {len(maps)} quantities, got {len(axes)}.")
    for ax, quantity, table in zip(axes, quantities, maps, strict=True):
        _draw(ax, quantity, table.to_numpy(dtype=np.float64))
        named = table is maps[0] or not table.index.equals(maps[0].index)  # equal names stand at the first map only
        name_layers(ax.yaxis, np.arange(len(table)) + 0.5, [str(layer) for layer in table.index], grow=new and named)
        if not named:
            ax.tick_params(left=False, labelleft=False)
    return tuple(axes)


def _draw(ax: Axes, quantity: str, values: np.ndarray) -> None:
    """Draw one map (layers, heads), with its numbers where there are few."""
    low, high = (0.0, 1.0) if quantity == ENTROPY else finite_limits(values, symmetric=False)
    colors, scale = plt.get_cmap().with_extremes(bad=MISSING_COLOR), Normalize(low, high)
    layers, heads = values.shape
    shown = ax.pcolormesh(np.ma.masked_invalid(values), cmap=colors, norm=scale)
    ax.set(xlim=(0, heads), ylim=(layers, 0), xlabel="head", title=quantity.replace("_", " "))
    name_layers(ax.xaxis, np.arange(heads) + 0.5, [str(head) for head in range(heads)])
    ax.tick_params(length=2)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(shown, ax=ax)
    if max(values.shape) > MAX_ANNOTATED:
        return
    cells = {cell: _short(value) for cell, value in np.ndenumerate(values) if np.isfinite(value)}
    for (row, column), text in cells.items():
        red, green, blue, _ = colors(scale(values[row, column]))
        bright = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18  # as far from black as from white
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": "x-small"}
        number = CellText(column + 0.5, row + 0.5, text, color="black" if bright else "white", **style)
        number.widest = max(cells.values(), key=len)
        ax.add_artist(number)


def _short(value: float) -> str:
    """A number in few characters.

    >>> [_short(value) for value in (0.123, 0.999, -3.21, 9.97, 812.0, 12345.0)]
    ['.12', '1.0', '-3.2', '10', '812', '1e4']
    """
    if abs(value) >= 1000:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    if abs(value) >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 0.995 else f"{value:.2f}".replace("0.", ".", 1)
