"""The figure of a coordinate check: sizes of activations, gradients or updates against width or depth."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradscope.choices import checked
from gradscope.plots.drawing import axes, curve, graded, label_ends, name_layers, short_names
from gradscope.plots.rows import rows_of, summary

MAKER = "gradscope.coordinate_check(factory, data).to_frame()"
LENGTHS = {
    "activation_rms": "RMS of activations",
    "activation_change_rms": "RMS change of activations",
    "activation_gradient_rms": "RMS gradient of activations",
    "update_effect_rms": "RMS effect of the update",
    "update_rms": "RMS update of parameters",
    "gsc": "GSC (squared convention)",
}


@checked
def coordinates(
    data: Any,
    quantity: str = "activation_change_rms",
    *,
    step: int | None = None,
    axis: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Axes with a quantity of each layer, such as the size of its activations or updates, against width or depth.

    Both scales are logarithmic, so a quantity that grows as width^p or depth^p gives a line of slope p, the layer's
    exponent.  Lines are means over seeds, and bands reach one standard deviation to each side.  Thick lines are layers
    whose exponent differs from the expected one.  Labels hold the exponents, with the verdict if it is not "agrees".

    Arguments:
        data: What `gradscope.coordinate_check` returns, or its frame.  The figure of a frame has no exponents or
            verdicts.
        quantity: One of these names.  activation_rms: root mean square (RMS) of the layer's output.
            activation_change_rms: RMS of the change of this output since initialization.  activation_gradient_rms: RMS
            of the gradient of the loss with respect to this output.  update_effect_rms: as activation_change_rms, but
            the layer gets the same input as at initialization, so only its own parameters have changed.  update_rms:
            RMS of the change of the layer's parameters since initialization.  gsc: GSC with respect to the output of
            the network.
        step: Number of optimizer steps before the measurement; by default the largest one in the frame.
        axis: "width" or "depth"; by default the first one in the frame.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: The frame lacks a column, or rows of this quantity, axis and step.

    >>> import numpy as np, pandas as pd, gradscope as gs
    >>> lengths = {"layer": ["a", "a"], "log10_value": [0.0, 1.0], "depth_from_output": 0, "num_samples": 1, "index": 1}
    >>> frame = gs.frames.tidy({**lengths, "quantity": "update_rms"}).assign(axis="width", size=[8, 16], step=1, seed=0)
    >>> ax = coordinates(frame, "update_rms")
    >>> ax.get_xlabel(), ax.texts[0].get_text()
    ('width', 'a')
    """
    rows = rows_of(data, quantity, "axis", "size", "step", "seed", "log10_value", maker=MAKER)
    axis = str(rows["axis"].iloc[0]) if axis is None else axis
    step = int(rows["step"].max()) if step is None else step
    rows = rows[(rows["axis"] == axis) & (rows["step"] == step)]
    if rows.empty:
        raise ValueError(f"The frame has no rows of {quantity!r} for axis={axis!r} and step={step}.")
    exponents = getattr(data, "exponents", None)
    if exponents is not None:
        own = (exponents["axis"] == axis) & (exponents["quantity"] == quantity) & (exponents["step"] == step)
        exponents = exponents[own].set_index("layer")
    ax = axes(ax)
    layers = rows.drop_duplicates("layer").sort_values("index")["layer"].tolist()
    ends = []
    for layer, name, color in zip(layers, short_names(layers), graded(ax, len(layers)), strict=True):
        points = summary(rows[rows["layer"] == layer].drop(columns="layer"), "size", "log10_value")
        verdict, text = "", name
        if exponents is not None and np.isfinite(exponent := exponents.loc[layer, "exponent"]):
            verdict = exponents.loc[layer, "verdict"]
            text += f": {exponent:.2f}" + ("" if verdict in ("", "agrees") else f", {verdict}")
        curve(ax, points["size"], points, color=color, linewidth=2.5 if verdict == "differs" else 1.2, marker="o", ms=3)
        if np.isfinite(last := points["mean"].iloc[-1]):
            ends.append((text, points["size"].iloc[-1], last, color))
    sizes = sorted(rows["size"].unique())
    ax.set_xscale("log")
    ax.minorticks_off()
    name_layers(ax.xaxis, sizes, [str(size) for size in sizes])
    when = "at initialization" if step == 0 else f"after {step} step{'s' * (step != 1)}"
    ax.set(xlabel=axis, ylabel=rf"$\log_{{10}}$ {LENGTHS.get(quantity, quantity)}, {when}")
    label_ends(ax, ends)
    return ax
