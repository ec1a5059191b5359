"""The study of pooling against a map whose answer is known, and claims of frames whose truth is known."""

from collections import OrderedDict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments.archive.tables import Collected
from experiments.studies import pooling
from experiments.studies.convolution.measurement import RECTIFIED, SHIFTS
from gradscope.frames import observed
from gradscope.measures import shifted
from tests.helpers import seeded


def test_changes_of_pooled_maps_by_hand():
    """An identity in place of the convolutions: the maps are the images."""
    one = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(one.weight)
    model = nn.Sequential(OrderedDict(conv1=one, relu1=nn.ReLU(), conv2=nn.Identity(), relu2=nn.ReLU()))
    x = torch.rand(6, 1, 16, 16, generator=seeded(0))
    frame = pooling.measure(model, x, generator=seeded(1))
    assert len(frame) == 2 * 4 * len(SHIFTS)
    for shift in SHIFTS:
        f, moved = (nn.functional.avg_pool2d(images, 2).flatten(1) for images in (x, shifted(x, (shift, 0))))
        typical = (f[:, None] - f[None]).square().sum(dim=2).sum() / (len(x) * (len(x) - 1))
        expected = float(((f - moved).square().sum(dim=1).mean() / typical).sqrt())
        rows = frame[(frame["pooling"] == "average") & (frame["shift"] == shift)]
        assert rows["value"].tolist() == pytest.approx([expected, expected], rel=1e-4)


def told(noise=0.001, **factors):
    """A frame with known factors of each kind of pooling: one number, or one a shift."""
    known = {"none": 1.0, "subsampled": 1.0, "max": 0.8, "average": 0.6} | factors
    generator, parts = np.random.default_rng(1), []
    for seed in range(5):
        for layer in RECTIFIED:
            for name, factor in known.items():
                values = 0.1 * np.array(SHIFTS) * factor * np.exp(noise * generator.normal(size=len(SHIFTS)))
                parts.append(
                    observed("pooled_change", values, layer=layer, shift=SHIFTS).assign(pooling=name, seed=seed)
                )
    return Collected(pd.concat(parts, ignore_index=True), None, {})


def holds(collected):
    return {claim.says: claim.holds for claim in pooling.claims(collected)}


GAINS, FADES = "After max pooling, a map changes less under a shift by 3 pixels", "Max pooling helps less for shifts by"
INVARIANT = "After max pooling, a map is nearly invariant to a shift by 1 pixel"
SECOND = "Subsampling"
RISING, FALLING = (np.linspace(*ends, len(SHIFTS)) for ends in ((0.5, 0.9), (0.9, 0.5)))


@pytest.mark.parametrize(
    ("story", "claim", "expected"),
    [
        ({}, GAINS, True),
        ({"max": 1.2}, GAINS, False),
        ({"max": 1.0, "noise": 0.05}, GAINS, None),
        ({"max": RISING}, FADES, True),
        ({"max": FALLING}, FADES, False),
        ({"noise": 0.05}, FADES, None),
        ({}, INVARIANT, True),  # 0.08 under the smallest shift
        ({"max": 2.0}, INVARIANT, False),
        ({"max": 1.0, "noise": 0.05}, INVARIANT, None),
        ({}, SECOND, True),
        ({"subsampled": 1.2}, SECOND, False),
        ({"noise": 0.2}, SECOND, None),  # a wide interval is no agreement
    ],
)
def test_claims_of_frames_whose_truth_is_known(story, claim, expected):
    assert [verdict for says, verdict in holds(told(**story)).items() if says.startswith(claim)] == [expected]


def test_the_answer_and_the_figure_follow_the_frame():
    collected = told(noise=1e-6, max=RISING, average=[0.5, 0.5, 1.5, 1.5, 1.5, 1.5])
    changed, gained, left = pooling.answer(collected).split(". ")
    assert "0.50 (max pooling) and 0.50 (average pooling)" in changed and "0.90 (max pooling) and 1.50" in changed
    assert "smaller for max pooling and average pooling" in gained
    assert "0.05 (max pooling)" in left and "so the map is nearly invariant" in left
    assert "0.20 (max pooling)" in pooling.answer(told(max=2.0)) and "not nearly" in pooling.answer(told(max=2.0))
    drawn = pooling.STUDY.figures(collected)["pooling"]
    container = next(c for c in drawn.axes[2].containers if c.get_label() == "max pooling")
    assert container.lines[0].get_ydata() == pytest.approx(RISING, rel=1e-4)
    plt.close(drawn)
