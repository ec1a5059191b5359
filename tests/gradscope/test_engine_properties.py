"""Properties of merging, of the exponent ledger and of the sweep, for random numbers of any size."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import gradscope as gs
from gradscope.backward.cotangents import Cotangents
from gradscope.backward.readings import lengths
from gradscope.backward.route import TrunkRoute
from gradscope.backward.sweep import rescale, sweep
from gradscope.coefficients.gains import Gain, Length
from gradscope.coefficients.reductions import Tally
from gradscope.estimates import Moments
from tests.helpers import noise, seeded

NUMBERS = st.floats(1e-3, 1e3)
few = settings(max_examples=40, deadline=None)


def same(a: Moments, b: Moments) -> None:
    a = a.at(b.exponent)
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12)
    np.testing.assert_allclose(a.m2, b.m2, rtol=1e-9, atol=1e-9 * np.max(np.square(b.mean)))


@few
@given(arrays(float, (9, 3), elements=NUMBERS), st.integers(1, 8), st.integers(1, 8), st.integers(-400, 400))
def test_moments_merge_in_any_order_and_grouping(values, first, second, shift):
    cuts = sorted({first, second})
    parts = [Moments.of(np.ldexp(part, -shift), shift) for part in np.split(values, cuts)]
    whole = Moments.of(values)
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merged.merge(part)
        same(merged, whole)
    if len(parts) == 3:
        same(parts[0].merge(parts[1].merge(parts[2])), parts[0].merge(parts[1]).merge(parts[2]))


@few
@given(arrays(float, (2, 3, 8), elements=NUMBERS), st.integers(1, 7), st.integers(-400, 400))
def test_tallies_of_two_batches_are_the_tally_of_one(squares, cut, shift):
    a, p, q = squares[:, 0], squares[:, 1], squares[:, 2]

    def tally(part, scale):
        gain = Gain.of(np.sqrt(a[:, None, part]) * 2.0**-scale, np.full((2, 1), scale), num_fixed=1, coupled=False)
        ends = [Length(x[:, part], np.zeros(2, dtype=int)) for x in (p, q)]
        num = len(range(*part.indices(8)))
        return Tally.of(gain, *ends, sizes=np.full(2, 5 * num), reduction="batch", batch_size=num)

    merged, whole = tally(slice(0, cut), shift).merge(tally(slice(cut, 8), -shift)), tally(slice(0, 8), 0)
    np.testing.assert_allclose(merged.log10_values, whole.log10_values, atol=1e-10)
    np.testing.assert_allclose(merged.log10_stderr_sample, whole.log10_stderr_sample, rtol=1e-6, atol=1e-9)


@few
@given(
    arrays(float, (4, 5), elements=st.floats(-1e60, 1e60).filter(lambda v: v == 0 or abs(v) > 1e-60)), st.integers(0, 3)
)
def test_rescaling_takes_out_an_exact_power_of_two(values, zero):
    values[zero] = 0
    cotangents = torch.from_numpy(values)
    scaled, exponents = rescale(cotangents)
    np.testing.assert_array_equal(np.ldexp(scaled.numpy(), exponents.numpy()[:, None]), values)
    rms = np.sqrt(np.mean(np.square(scaled.numpy()), axis=1))
    assert exponents[zero] == 0
    assert ((rms == 0) | ((rms > 0.49) & (rms <= 1.01))).all()


MODEL = nn.Sequential(*gs.models.MLP(depth=5, width=4, activation="tanh", generator=seeded()).double().layers)
CAPTURED = gs.capture(MODEL, noise(3, 4))


def read(cotangents, **options):
    start = Cotangents(CAPTURED.target, len(cotangents), 0, lambda a, b: cotangents[a:b].clone())
    return sweep(TrunkRoute(CAPTURED.graph, CAPTURED.units[:-1]), [start], lengths(3), **options)


@few
@given(st.integers(-900, 900), st.integers(1, 9), st.sampled_from([1, 2, 8, 128, None]), st.integers(0, 99))
def test_lengths_are_homogeneous_at_any_scale_and_stride(power, num, stride, seed):
    v = torch.randn(num, 3, 4, dtype=torch.float64, generator=seeded(seed))
    once, scaled = read(v), read(v * 2.0**power, strides=(stride, 1) if stride else (1,))
    for a, b in zip(once, scaled, strict=True):
        np.testing.assert_array_equal(np.ldexp(a.values, (a.exponents - b.exponents + power)[:, None]), b.values)


@few
@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 99))
def test_chunks_change_no_length(num, size, seed):
    v = torch.randn(num, 3, 4, dtype=torch.float64, generator=seeded(seed))
    whole, parts = read(v), read(v, widest=(1 << 40) // size)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(
            np.log2(a.values) + a.exponents[:, None], np.log2(b.values) + b.exponents[:, None], atol=1e-9
        )
    assert math.isfinite(float(whole[0].values.sum()))
