"""Target positions that are rotated over the samples of a large batch, against the exact blocks."""

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.transformers.rotation import SAMPLES, num_rotated, rotation
from tests.helpers import noise, seeded

B, T, C = 64, 4, 40  # so that "auto" is not exact, and three cotangents suffice


@pytest.mark.parametrize(("num_positions", "batch_size"), [(4, 64), (64, 256), (64, 96), (48, 100), (7, 60)])
def test_positions_are_probed_equally_often_and_in_different_samples(num_positions, batch_size):
    num = num_rotated(num_positions, batch_size)
    places = rotation(num, num_positions, batch_size, seeded())
    assert places.shape == (num, batch_size)
    counts = np.bincount(places.ravel(), minlength=num_positions)
    assert len(set(counts.tolist())) == 1 and counts[0] >= min(SAMPLES, num * batch_size / num_positions)
    if num <= num_positions:
        assert all(len(set(column)) == num for column in places.T.tolist())


class Causal(nn.Module):
    """Position t reads all positions up to t, with weights that depend on the sample."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        weights = torch.tril((x @ self.mix(x).mT / C).exp())
        return x + self.out(weights / weights.sum(-1, keepdim=True) @ x)


@pytest.mark.parametrize("reduction", ["batch", "mean"])
def test_blocks_are_unbiased_and_intervals_hold(reduction):
    torch.manual_seed(0)
    model, x = nn.Sequential(Causal(), Causal()), noise(B, T, C).float()
    exact = gs.gsc(model, x, positions="both", probes="exact", reduction=reduction)
    truth, runs = exact.blocks.log10_values[0], 100
    values, inside, totals = [], [], []
    for seed in range(runs):
        found = gs.gsc(model, x, positions="both", reduction=reduction, generator=seeded(seed))
        low, high = found.blocks.interval()
        values.append(10 ** found.blocks.log10_values[0])
        inside.append((low[0] <= truth) & (truth <= high[0]))
        totals.append((10**found.blocks.log10_values).sum((1, 2)) / 10 ** found.log10_values[:, 0])
    assert "Each target position was probed in 48 of 64 samples." in found.remarks
    np.testing.assert_allclose(totals, 1, rtol=1e-6)
    below = np.tril(np.ones((T, T), dtype=bool))
    error = np.std(values, axis=0) / np.sqrt(runs)
    assert (np.abs(np.mean(values, axis=0) - 10**truth)[below] < 4 * error[below]).all()
    assert np.isneginf(found.blocks.log10_values[0][~below]).all()
    coverage = np.mean(inside, axis=0)
    # The standard error of 95 % in 100 runs is 2.2 %; blocks share their probes.
    assert (coverage[below] > 0.87).all() and 0.92 <= coverage[below].mean() <= 0.98, coverage
    assert np.isnan(found.blocks.log10_stderr_sample[0][below]).all()
