"""qm norms against SVDs, and sums of squares at scales where a naive sum fails."""

import itertools
import math
import re

import numpy as np
import pytest
import scipy.linalg
import torch

import gradscope as gs
from gradscope.norms import plain_norms, power_of_two, sum_of_squares
from gradscope.operators import matrix
from tests.helpers import noise, seeded


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (1, 3), (3, 1)])
def test_definition_by_singular_values_and_columns(shape):
    A = noise(*shape)
    expected = math.sqrt(np.square(scipy.linalg.svdvals(A.numpy())).sum() / shape[1])
    assert float(gs.qm_norm(A)) == pytest.approx(expected, rel=1e-13)
    assert float(gs.qm_norm(A.numpy())) == pytest.approx(expected, rel=1e-13)
    assert gs.qm_norm(matrix(A), probes="exact").value == pytest.approx(expected, rel=1e-13)
    assert gs.qm_norm(matrix(A), probes="exact").num_probes == 0


def test_batches_invariance_and_homogeneity():
    A, Q = noise(2, 3, 4, 6), torch.linalg.qr(noise(4, 4)).Q
    norms = gs.qm_norm(A)
    assert norms.shape == (2, 3)
    assert norms.dtype == torch.float64
    assert float(norms[1, 2]) == pytest.approx(float(gs.qm_norm(A[1, 2])), rel=1e-14)
    torch.testing.assert_close(gs.qm_norm(Q @ A), norms, rtol=1e-13, atol=0)
    torch.testing.assert_close(gs.qm_norm(-3 * A), 3 * norms, rtol=1e-14, atol=0)
    assert gs.qm_norm(A.float()).dtype == torch.float64


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e30, torch.float32), (1e-30, torch.float32), (1e200, torch.float64), (1e-200, torch.float64)],
)
def test_no_overflow_and_no_underflow(value, dtype):
    A = torch.full((3, 4), value, dtype=dtype)
    assert float(gs.qm_norm(A)) == pytest.approx(math.sqrt(3) * float(A[0, 0]), rel=1e-14)
    assert gs.qm_norm(matrix(A), probes="exact").log10_value == pytest.approx(
        math.log10(math.sqrt(3) * value), abs=1e-6
    )


@pytest.mark.parametrize("power", [1023.5, 1022.0, -1040.0])
def test_the_ends_of_float64(power):
    value = 2.0**1023 * 2.0 ** (power - 1023) if power > 0 else math.ldexp(1.0, int(power))
    A = value * torch.eye(3, dtype=torch.float64)
    assert float(gs.qm_norm(A)) == pytest.approx(value, rel=1e-9)
    estimate = gs.qm_norm(matrix(A), probes="exact")
    assert estimate.log10_value == pytest.approx(power * math.log10(2), abs=1e-6)


def test_a_product_that_overflows_is_an_error():
    with pytest.raises(ValueError, match="NaN or Inf"):
        gs.qm_norm(matrix(torch.full((3, 3), 1.5e308, dtype=torch.float64)), probes=8, generator=seeded())


def test_zero_and_complex_matrices():
    assert float(gs.qm_norm(torch.zeros(3, 4))) == 0
    A = torch.tensor([[3 + 4j, 0]])
    assert float(gs.qm_norm(A)) == pytest.approx(5 / math.sqrt(2))


def test_all_sign_vectors_give_the_square_without_luck():
    A = noise(5, 8)
    squares = [
        float((A @ torch.tensor(signs, dtype=torch.float64)).square().sum() / 8)
        for signs in itertools.product((-1, 1), repeat=8)
    ]
    assert np.mean(squares) == pytest.approx(float(gs.qm_norm(A)) ** 2, rel=1e-12)


@pytest.mark.parametrize("rank_one", [False, True])
def test_probed_norm_is_unbiased_in_its_square_and_knows_its_error(rank_one):
    A = noise(6, 1) @ noise(1, 9) if rank_one else noise(6, 9)
    truth = float(gs.qm_norm(A)) ** 2
    estimates = [gs.qm_norm(matrix(A), probes=64, generator=seeded(seed)) for seed in range(200)]
    squares = np.array([e.value**2 for e in estimates])
    assert abs(squares.mean() - truth) < 4 * squares.std() / math.sqrt(200)
    claimed = np.mean([e.stderr for e in estimates])
    # 200 repetitions know their standard deviation to 1/sqrt(400) = 5 %; skew adds a little.
    assert claimed == pytest.approx(np.std([e.value for e in estimates]), rel=0.15)
    assert all(e.num_probes == 64 for e in estimates)


def test_errors():
    for shape in ((3,), (0, 3)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            gs.qm_norm(torch.ones(shape))
    for ignored in ({"probes": 4}, {"generator": seeded()}):
        with pytest.raises(ValueError, match="LinearOperator"):
            gs.qm_norm(noise(2, 2), **ignored)
    for probes in (0, -1, 2.5, True, "some"):
        with pytest.raises(ValueError, match=f"probes.*{probes!r}"):
            gs.qm_norm(matrix(noise(2, 2)), probes=probes)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_sum_of_squares_by_leading_dimensions(scale):
    a = noise(3, 4, 5)
    for start in range(4):
        squares, exponent = sum_of_squares(a * scale, start_dim=start)
        dims = tuple(range(start, 3))
        expected = a.square().sum(dims) if dims else a.square()
        actual = squares * 4.0 ** (float(exponent) - math.log2(scale))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_powers_of_two_are_exact_over_all_normal_numbers(dtype):
    info = torch.finfo(dtype)
    low, high = round(math.log2(info.tiny)), math.floor(math.log2(float(info.max) / 2)) + 1
    exponents = torch.arange(low, min(high, 1023) + 1)
    actual = power_of_two(exponents, dtype).double()
    expected = torch.tensor([math.ldexp(1.0, int(e)) for e in exponents], dtype=torch.float64)
    assert torch.equal(actual, expected)
    assert float(power_of_two(torch.tensor(5000), dtype)) <= info.max


@pytest.mark.parametrize("room", [1, 7, 30, 10**4])
@pytest.mark.parametrize("start_dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_in_little_memory(room, start_dim, dtype):
    a = noise(4, 5, 6).to(dtype)
    expected = torch.linalg.vector_norm(a.double(), dim=tuple(range(start_dim, 3)))
    scratch = torch.empty(room, dtype=torch.float64)
    for given in (a, a.transpose(0, 2).contiguous().transpose(0, 2)):
        torch.testing.assert_close(plain_norms(given, start_dim, scratch), expected, rtol=1e-13, atol=0)
