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
    with pytest.raises(ValueError, match="num must be an integer of at least 1, got 0"):
        draw(0, 4)


CPU = torch.device("cpu")


def words(key, probe, sample, size):
    """The hash of one sample of a probe, in whole numbers of Python (Steele, Lea and Flood 2014)."""
    mask, found = 2**64 - 1, []
    for place in range(1, size + 1):
        z = (key + (probe * 2**40 + sample * size + place) * 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        found.append(z ^ (z >> 31))
    return found


def test_words_are_those_of_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert words(1234567, 0, 0, 4) == published
    found = probes.uniform(torch.tensor(1234567), range(1), 4, CPU)[0]
    signed = [word - 2**64 if word >= 2**63 else word for word in published]
    assert found.tolist() == [word / 2**63 for word in signed]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
def test_signs_are_the_bits_of_the_words_of_their_probe_and_sample(size):
    key, chosen, samples = 2**62 + 12345, range(2, 5), range(1, 9, 3)
    v = probes.signs(torch.tensor(key), chosen, samples, size, torch.float32, CPU)
    assert v.shape == (3, 3, size)
    for row, probe in zip(v, chosen, strict=True):
        for entries, sample in zip(row, samples, strict=True):
            bits = [word >> bit & 1 for word in words(key, probe, sample, -(-size // 64)) for bit in range(64)]
            assert entries.tolist() == [2 * bit - 1 for bit in bits[:size]]


def test_processes_that_take_turns_make_the_signs_of_one_process():
    key, of = torch.tensor(5), lambda samples: probes.signs(torch.tensor(5), range(2), samples, 70, torch.float64, CPU)
    together = torch.empty(2, 6, 70, dtype=torch.float64)
    for rank in range(3):
        together[:, rank::3] = of(range(rank, 6, 3))
    assert torch.equal(together, of(range(6)))
    assert torch.equal(probes.uniform(key, range(1, 6, 2), 9, CPU), probes.uniform(key, range(6), 9, CPU)[1::2])


def test_signs_are_fair_and_independent():
    num, size = 64, 1 << 14
    v = probes.signs(torch.tensor(11), range(num), range(16), size // 16, torch.float64, CPU).reshape(num, size)
    for shift in (0, 1, 2, 7, 8, 63, 64, 1024):  # places that are neighbors in a byte, a word or a sample
        product = (v[:, shift:] * v[:, : size - shift]).mean() if shift else v.mean()
        assert abs(float(product)) < 4 / (num * (size - shift)) ** 0.5
    correlation = v @ v.T / size**0.5 - size**0.5 * torch.eye(num, dtype=torch.float64)
    assert correlation.abs().max() < 5
    assert float(correlation.square().sum()) / (num * (num - 1)) == pytest.approx(
        1, abs=4 * (2 / (num * (num - 1) / 2)) ** 0.5
    )
    patterns = (v.reshape(-1, 8) > 0).double() @ 2.0 ** torch.arange(8, dtype=torch.float64)
    counts = torch.bincount(patterns.long(), minlength=256).double()
    statistic = float((counts - counts.mean()).square().sum() / counts.mean())
    assert abs(statistic - 255) < 4 * (2 * 255) ** 0.5
