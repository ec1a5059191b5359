"""Do intervals hold what they promise?  Replayed from exact Jacobians, so that thousands of repetitions cost seconds."""

import numpy as np
import pytest
import torch

import gradscope as gs
from gradscope.inputs import as_batch
from gradscope.intervals import probe_interval, sample_margin
from gradscope.models.alexnet import AlexNetA
from gradscope.models.mlp import MLP
from gradscope.reductions import Gain, Length, Tally
from gradscope.subspace import Rerun, find_subspaces
from tests.helpers import seeded

REPETITIONS = 2000


def networks():
    selu = MLP(depth=50, width=100, activation="selu", generator=seeded()).double()
    batch = MLP(depth=20, width=20, activation="relu", norm="batch", generator=seeded()).double()
    alexnet = AlexNetA(generator=seeded()).double().eval()
    return {
        "selu": (selu, (32, 100), ("input", "layers.30", "layers.48")),
        "relu+batch": (batch, (16, 20), ("input", "layers.9", "layers.18")),
        "alexnet_a": (alexnet, (8, 3, 32, 32), ("input", "flatten")),
    }


def grams(captured, name):
    """J J^T, sample by sample (B, d, d) where samples are independent, else of the batch (1, B d, B d)."""
    operator, B = captured.jacobian(name, captured.target.name), captured.batch_size
    d = operator.shape[0] // B
    if captured.coupled:
        J = operator.T.dense().T[None]
    else:
        eye = torch.eye(d, dtype=torch.float64)
        J = torch.stack([operator.rmatvec(e.repeat(B)).reshape(B, -1) for e in eye], dim=1)
    return (J @ J.transpose(1, 2)).numpy()


def replay(gram, q, num, rng):
    """|v^T J|, shape (REPETITIONS, rank + num, samples), of directions q and of random signs in their complement."""
    samples, d, _ = gram.shape
    complement = np.eye(d) - np.swapaxes(q, 1, 2) @ q
    rest = complement @ gram @ complement
    fixed = np.einsum("sid,sde,sie->is", q, gram, q)
    squares = np.empty((REPETITIONS, num, samples))
    for sample in range(samples):
        v = rng.integers(0, 2, size=(REPETITIONS * num, d)) * 2.0 - 1
        squares[:, :, sample] = ((v @ rest[sample]) * v).sum(axis=1).reshape(REPETITIONS, num)
    fixed = np.broadcast_to(fixed, (REPETITIONS, *fixed.shape))
    return np.sqrt(np.maximum(np.concatenate([fixed, squares], axis=1), 0))


@pytest.mark.parametrize("network", ["selu", "relu+batch", "alexnet_a"])
def test_coverage_with_few_and_many_probes(network):
    model, shape, names = networks()[network]
    x = torch.randn(*shape, dtype=torch.float64, generator=seeded(1))
    captured = gs.capture(model, x)
    rerun = Rerun(model, as_batch(x, forward=None, loss_fn=None), None, None, captured.source_names)
    target = captured.target
    (subspace,) = find_subspaces(
        rerun, {target.name: target.shape}, 3, coupled=captured.coupled, generator=seeded(2)
    ).values()
    q = subspace.reshape(3, 1 if captured.coupled else shape[0], -1).transpose(0, 1).numpy()
    rng = np.random.default_rng(0)
    ones = Length(np.ones((REPETITIONS, shape[0])), np.zeros(REPETITIONS, dtype=int))
    for name in names:
        gram = grams(captured, name)
        truth = np.log10(np.trace(gram, axis1=1, axis2=2).sum())
        for directions in (q[:, :0], q):
            for num in (4, 48):
                norms = replay(gram, directions, num, rng)
                gain = Gain.of(
                    norms,
                    np.zeros(norms.shape[:2], dtype=int),
                    num_fixed=directions.shape[1],
                    coupled=captured.coupled,
                )
                tally = Tally.of(gain, ones, ones, sizes=np.ones(REPETITIONS), reduction="batch", batch_size=shape[0])
                low, high = probe_interval(
                    tally.log10_values, tally.log10_stderr_cautious, tally.fixed_share, tally.probe_freedom, 0.95
                )
                coverage = np.mean((low <= truth) & (truth <= high))
                assert 0.93 <= coverage <= 0.97, (name, directions.shape[1], num, coverage)
