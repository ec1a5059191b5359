"""Maps of attention heads hold the numbers of the frame, in the right cells and without overlap."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope import plots
from gradscope.plots.drawing import CellText

mpl.use("Agg")
ENTROPY, LOGIT = "relative_attention_entropy", "largest_attention_logit"


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def table(layers, heads, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 0.9, (layers, heads))


def frame(values, scale=1.0):
    """Heads of layers; layer names sort otherwise than their order."""
    layers = [f"h.{len(values) - n}.attn" for n in range(len(values))]
    rows = [
        gs.frames.observed(quantity, factor * row, layer=layer, index=n + 1, head=list(range(len(row))))
        for quantity, factor in ((ENTROPY, 1.0), (LOGIT, scale))
        for n, (layer, row) in enumerate(zip(layers, values, strict=True))
    ]
    return pd.concat(rows, ignore_index=True)


def cells(ax):
    return np.ma.filled(ax.collections[0].get_array().astype(float), np.nan)


@pytest.mark.parametrize("shape", [(12, 12), (2, 2), (1, 8), (20, 3)])
def test_maps_hold_layers_and_heads_in_order(shape):
    values = table(*shape)
    first, second = plots.attention(frame(values, 50.0))
    np.testing.assert_allclose(cells(first), values)
    np.testing.assert_allclose(cells(second), 50 * values)
    assert first.get_ylim() == (shape[0], 0) and first.collections[0].get_clim() == (0, 1)
    names = [text.get_text() for text in first.get_yticklabels()]
    assert names[0] == f"h.{shape[0]}.attn" and names[-1] == "h.1.attn"
    numbers = [text for text in first.get_children() if isinstance(text, CellText)]
    assert len(numbers) == (values.size if max(shape) <= 12 else 0)


@pytest.mark.parametrize("shape", [(12, 12), (2, 2)])
def test_no_text_overlaps_another(shape):
    axes = plots.attention(frame(table(*shape), 900.0))
    figure = axes[0].figure
    figure.canvas.draw()
    texts = [t for ax in axes for t in [ax.title, *ax.get_xticklabels(), *ax.get_yticklabels(), *ax.findobj(CellText)]]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 2 * shape[0] * shape[1]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_heads_that_a_layer_does_not_have_are_empty():
    rows = frame(table(2, 3))
    rows = rows[~((rows["layer"] == "h.1.attn") & (rows["head"] == 2))]
    assert np.isnan(cells(plots.attention(rows)[0])).tolist() == [[False] * 3, [False, False, True]]


def test_seeds_are_averaged_and_other_columns_are_not():
    values = [table(2, 3, seed) for seed in range(2)]
    np.testing.assert_allclose(cells(plots.attention([frame(v) for v in values])[0]), np.mean(values, 0))
    records = pd.concat([frame(v).assign(step=step) for step, v in enumerate(values)])
    with pytest.raises(ValueError, match=r"Column 'step' varies.*frame\[frame\['step'\] == 0\]"):
        plots.attention(records)
    np.testing.assert_allclose(cells(plots.attention(records[records["step"] == 1])[0]), values[1])


def test_results_and_records_are_drawn():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)).eval()
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    result, ax = gs.attention(model, x), plt.figure().subplots()
    (drawn,) = result.plot(quantities=["first_key_share"], axes=[ax])
    rows = result.to_frame().query("quantity == 'first_key_share'")
    assert drawn is ax and cells(ax)[0].tolist() == rows["value"].tolist()
    monitor = gs.Monitor(model, x, layers="*")
    monitor.step()
    assert cells(plots.attention(monitor)[0]).shape == (1, 2)


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match="no rows of quantity 'entropy'"):
        plots.attention(frame(table(2, 2)), ["entropy"])
    with pytest.raises(ValueError, match=r"lacks the column 'head'.*gradscope.attention\(model, data\)"):
        plots.attention(frame(table(2, 2)).drop(columns="head"))
    with pytest.raises(ValueError, match="Column 'head' of the frame must hold numbers, got 'a'"):
        plots.attention(frame(table(2, 2)).assign(head="a"))
    with pytest.raises(ValueError, match="quantities must name at least one"):
        plots.attention(frame(table(2, 2)), [])
    with pytest.raises(ValueError, match="axes must be one for each of 2 quantities, got 1"):
        plots.attention(frame(table(2, 2)), axes=[plt.figure().subplots()])
