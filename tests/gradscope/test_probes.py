"""Random directions: second moments, orthogonality, reproducibility."""

import pytest
import torch

from gradscope import probes
from tests.helpers import noise, seeded

KINDS = [probes.rademacher, probes.sphere, probes.orthonormal]


@pytest.mark.parametrize("draw", KINDS)
def test_second_moment_is_the_identity(draw):
    num, size, repetitions = 2, 4, 20_000
    vectors = torch.cat([draw(num, size, generator=seeded(seed)) for seed in range(repetitions // num)])
    moment = vectors.T @ vectors / repetitions
    # Entries have standard deviation at most sqrt(3 / repetitions).
    assert (moment - torch.eye(size)).abs().max() < 5 * (3 / repetitions) ** 0.5


def test_lengths_and_values():
    assert set(probes.rademacher(50, 7, generator=seeded()).unique().tolist()) == {-1, 1}
    for draw in KINDS:
        torch.testing.assert_close(draw(5, 7, generator=seeded()).norm(dim=1), torch.full((5,), 7**0.5).double())


def test_orthonormal_probes_are_orthogonal_and_exact_when_complete():
    v = probes.orthonormal(5, 5, generator=seeded())
    torch.testing.assert_close(v @ v.T, 5 * torch.eye(5, dtype=torch.float64), atol=1e-13, rtol=0)
    A = noise(3, 5)
    assert float((A @ v.T).square().sum(0).mean()) == pytest.approx(float(A.square().sum()), rel=1e-13)
    with pytest.raises(ValueError, match="num=6, size=5"):
        probes.orthonormal(6, 5)


@pytest.mark.parametrize("draw", KINDS)
def test_a_generator_makes_them_reproducible_and_leaves_the_global_one_alone(draw):
    before = torch.get_rng_state()
    assert torch.equal(draw(3, 4, generator=seeded(7)), draw(3, 4, generator=seeded(7)))
    assert not torch.equal(draw(3, 4, generator=seeded(7)), draw(3, 4, generator=seeded(8)))
    assert torch.equal(before, torch.get_rng_state())
    assert draw(3, 4, generator=seeded(), dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="num=0, size=4"):
        draw(0, 4)
