"""Laws that hold for all numbers: norms, operators, estimates, moments, powers of two, and frames that come back."""

import math
from fractions import Fraction
from functools import reduce

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import gradscope as gs
from gradscope import frames
from gradscope.estimates import Moments
from gradscope.norms import power_of_two, sum_of_squares, vector_norms
from gradscope.operators import matrix
from tests.helpers import noise

always = settings(
    derandomize=True, deadline=None, max_examples=40, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip

SIZES = st.integers(1, 5)
POSITIVE = st.floats(1e-3, 1e3)
NONZERO = POSITIVE | st.floats(-1e3, -1e-3)
NUMBERS = st.just(0.0) | NONZERO
EXPONENTS = st.integers(-3000, 3000)


@st.composite
def matrices(draw, num=1):
    """``num`` matrices whose product, in this order, exists."""
    sides = [draw(SIZES) for _ in range(num + 1)]
    found = [torch.from_numpy(draw(arrays(np.float64, sides[k : k + 2], elements=NUMBERS))) for k in range(num)]
    return found if num > 1 else found[0]


def rotation(size, seed):
    return torch.linalg.qr(noise(size, size, seed=seed)).Q


def exactly(mantissa, exponent=0):
    return Fraction(float(mantissa)) * Fraction(2) ** int(exponent)


@always
@given(matrices(), st.integers(0, 99))
def test_rotations_of_either_side_keep_the_norm(A, seed):
    m, n = A.shape
    turned = rotation(m, seed) @ A @ rotation(n, seed + 100)
    assert float(gs.qm_norm(turned)) == pytest.approx(float(gs.qm_norm(A)), rel=1e-12)


@always
@given(matrices(), st.integers(-990, 990), NUMBERS)
def test_the_norm_is_homogeneous_and_exactly_so_for_powers_of_two(A, power, factor):
    norm = float(gs.qm_norm(A))
    assert float(gs.qm_norm(math.ldexp(1.0, power) * A)) == math.ldexp(norm, power)
    assert float(gs.qm_norm(factor * A)) == pytest.approx(abs(factor) * norm, rel=1e-13)


@always
@given(matrices())
def test_the_norm_of_the_transpose_counts_the_other_side(A):
    m, n = A.shape
    norm = float(gs.qm_norm(A))
    assert float(gs.qm_norm(A.T)) * math.sqrt(m) == pytest.approx(norm * math.sqrt(n), rel=1e-13)
    assert gs.qm_norm(matrix(A), probes="exact").value == pytest.approx(norm, rel=1e-13)


@always
@given(matrices(3), st.integers(0, 99))
def test_operators_obey_the_laws_of_matrices(factors, seed):
    A, B, C = factors
    a, b, c = map(matrix, factors)
    close = {"rtol": 1e-12, "atol": 1e-3}  # of products of three numbers up to 1000
    torch.testing.assert_close(((a @ b) @ c).dense(), A @ B @ C, **close)
    torch.testing.assert_close((a @ (b @ c)).dense(), A @ B @ C, **close)
    torch.testing.assert_close((a @ b @ c).T.dense(), (c.T @ b.T @ a.T).dense(), **close)
    assert torch.equal(a.T.T.dense(), A) and torch.equal(a.T.dense(), A.T)
    torch.testing.assert_close(a @ B, A @ B)
    u, v = noise(A.shape[0], seed=seed), noise(A.shape[1], seed=seed + 100)
    scale = float(A.norm() * u.norm() * v.norm())
    assert float(u @ (a @ v)) == pytest.approx(float((a.T @ u) @ v), abs=1e-13 * scale)


@always
@given(POSITIVE, POSITIVE, EXPONENTS, POSITIVE)
def test_estimates_at_any_exponent(mantissa, error, exponent, factor):
    estimate = gs.Estimate(mantissa, error, exponent, 3)
    assert estimate.log10_value == pytest.approx(math.log10(mantissa) + exponent * math.log10(2), rel=1e-12, abs=1e-12)
    scaled, root = estimate.scaled(factor), estimate.sqrt()
    assert scaled.log10_value == pytest.approx(estimate.log10_value + math.log10(factor), rel=1e-12, abs=1e-12)
    assert scaled.log10_stderr == pytest.approx(estimate.log10_stderr, rel=1e-12)
    assert root.log10_value == pytest.approx(estimate.log10_value / 2, rel=1e-12, abs=1e-12)
    assert root.log10_stderr == pytest.approx(estimate.log10_stderr / 2, rel=1e-12)
    squared = estimate.scaled(factor**2).sqrt()
    assert squared.log10_value == pytest.approx(root.scaled(factor).log10_value, rel=1e-12, abs=1e-12)
    # The same number written with another exponent.
    moved = gs.Estimate(math.ldexp(mantissa, 7), math.ldexp(error, 7), exponent - 7, 3)
    assert (moved.value, moved.stderr) == (estimate.value, estimate.stderr)
    assert moved.sqrt().log10_value == pytest.approx(root.log10_value, rel=1e-12, abs=1e-12)


@always
@given(st.lists(st.tuples(NONZERO, EXPONENTS, st.integers(0, 3)), min_size=1, max_size=12), st.randoms())
def test_moments_merge_in_any_order_and_grouping(stream, random):
    groups = [[item[:2] for item in stream if item[2] == label] for label in range(4)]
    parts = [Moments.of(*map(np.array, zip(*group, strict=True))) for group in groups if group]
    random.shuffle(parts)
    values = [exactly(*item[:2]) for item in stream]
    mean = sum(values) / len(values)
    m2 = sum((value - mean) ** 2 for value in values)
    size = max(map(abs, values))
    for merged in (
        reduce(Moments.merge, parts),
        reduce(lambda right, left: left.merge(right), reversed(parts)),
        Moments.of(*map(np.array, zip(*(item[:2] for item in stream), strict=True))),
    ):
        assert merged.count == len(stream)
        assert abs(exactly(merged.mean, merged.exponent) - mean) <= size / 10**14
        assert abs(exactly(merged.m2, 2 * merged.exponent) - m2) <= len(values) * size**2 / 10**13


@always
@given(arrays(np.float64, st.tuples(SIZES, SIZES), elements=NUMBERS), st.integers(-300, 300))
def test_norms_and_squares_at_any_scale(a, power):
    scaled = torch.from_numpy(a * 10.0**power)
    norms, exponent = vector_norms(scaled, 1)
    squares, same = sum_of_squares(scaled, 1)
    assert exponent == same and exponent.dtype == torch.int64
    for row, norm, square in zip(scaled, norms, squares, strict=True):
        expected = sum(exactly(x) ** 2 for x in row)
        for found in (exactly(norm, exponent) ** 2, exactly(square, 2 * exponent)):
            assert abs(found - expected) <= expected / 10**13


@always
@given(st.integers(-1022, 1023), st.integers(-1022, 1023), st.floats(1.0, 2.0, exclude_max=True))
def test_powers_of_two_form_an_exact_ledger(first, second, mantissa):
    one, other = (float(power_of_two(torch.tensor(e), torch.float64)) for e in (first, second))
    assert (exactly(one), exactly(other)) == (Fraction(2) ** first, Fraction(2) ** second)
    if -1022 <= first + second <= 1023:
        assert one * other == float(power_of_two(torch.tensor(first + second), torch.float64))
        assert mantissa * one * other == math.ldexp(mantissa, first + second)


WORDS = ["1.10", "1", "none", "NA", "nan", "None", "True", "layers.0", "a,b", 'a"b', " a ", "ü", "fc#2"]
NAMES = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=5)


@always
@given(
    st.lists(st.tuples(NAMES, st.floats(-900, 900), st.none() | st.floats(0, 1)), min_size=1, max_size=5),
    NAMES,
    st.none() | st.booleans(),
    st.sampled_from(["parquet", "csv"]),
)
@example([("1.10", 0.0, None)], "1.10", None, "csv")
@example([("NA", 0.0, None), ("none", 0.5, 0.1)], "True", True, "csv")
def test_frames_come_back_from_files(tmp_path, rows, target, coupled, suffix):
    names, logarithms, errors = zip(*rows, strict=True)
    frame = frames.tidy(
        {
            "layer": names, "index": range(len(rows)), "depth_from_output": range(len(rows))[::-1], "target": target,
            "quantity": "gsc", "log10_value": logarithms, "reduction": "batch", "coupled": coupled, "num_samples": 7,
            "log10_stderr_probe": [math.nan if error is None else error for error in errors],
            "log10_stderr_sample": math.nan, "num_probes": [None if error is None else 3 for error in errors],
        }
    )  # fmt: skip
    again = frames.load(frames.save(frame, tmp_path / f"frame.{suffix}"))
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
