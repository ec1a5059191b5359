"""The figure of `gradscope.diff`: the distance between two models at every layer, and the part due to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradscope.choices import checked
from gradscope.plots.drawing import axes, ink, legend, name_layers, next_colors
from gradscope.plots.rows import rows_of

MAKER = "gradscope.diff(a, b, data).to_frame()"
CURVES = {"local_distance": "given equal inputs", "distance": "whole difference"}


@checked
def difference(data: Any, *, ax: Axes | None = None) -> Axes:
    """Axes with the relative distance between the outputs of every layer in two models, on a logarithmic scale.

    The curve "whole difference" is the distance if both models get the same data.  The curve "given equal inputs" is
    the distance if the layer itself gets equal inputs in both models.  For the latter curve, gray steps show the
    distance that rounding errors explain.  Filled points mark distances larger than rounding explains in their own
    curve.  Let d be 1 % of the lowest gray step.  Distances below d, such as 0, are drawn at d.

    Arguments:
        data: A `gradscope.Difference` of two models, or its frame.
        ax: Where to draw; a new figure by default.

    >>> import copy, torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=3, width=8, generator=torch.Generator().manual_seed(0))
    >>> found = gs.diff(model, lambda copy: copy.double(), torch.ones(4, 8), measures=[])
    >>> difference(found).get_ylabel()
    'relative distance of the outputs'
    """
    rows = {name: rows_of(data, name, "rounding", "differs", maker=MAKER) for name in CURVES}
    held = rows["local_distance"]
    new, ax = ax is None, axes(ax)
    smallest = held["rounding"].min() / 100
    for (name, label), style in zip(CURVES.items(), next_colors(ax, 2), strict=True):
        own = rows[name].sort_values("index")
        height = np.clip(own["value"].to_numpy(dtype=np.float64), smallest, None)
        above = own["differs"].to_numpy(dtype=bool)
        ax.plot(own["index"], height, **style | {"marker": "none"}, linewidth=1, alpha=0.6)
        for chosen, face in ((~above, "none"), (above, style["color"])):
            points = {"color": style["color"], "markerfacecolor": face, "marker": "os"[name == "distance"]}
            ax.plot(own["index"][chosen], height[chosen], linestyle="none", markersize=5, **points)
        ax.plot([], [], color=style["color"], marker="os"[name == "distance"], markersize=5, label=label)
    ax.step(held["index"], held["rounding"], where="mid", color=ink(ax), alpha=0.4, label="explained by rounding")
    ax.set(yscale="log", ylabel="relative distance of the outputs", xlabel="layer, from the input")
    name_layers(ax.xaxis, held["index"].to_numpy(), held["layer"].tolist(), grow=new)
    legend(ax)
    return ax
