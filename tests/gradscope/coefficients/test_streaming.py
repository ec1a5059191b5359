"""Data-set-level coefficients: a stream says what one great batch says, in any grouping, and on any number of ranks."""

import itertools
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradscope as gs
from gradscope.models.mlp import MLP
from tests.bruteforce import stages
from tests.helpers import ROOT, noise, seeded


def mlp(**options):
    return MLP(**{"depth": 4, "width": 6, "activation": "selu", "generator": seeded(), **options}).double()


@pytest.mark.parametrize("reduction", ["batch", "mean", "geometric"])
@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 1, 4, 6], [4, 4, 4]])
def test_a_stream_says_what_one_great_batch_says(reduction, sizes):
    x = noise(12, 6)
    whole = gs.gsc(mlp(), x, probes="exact", reduction=reduction)
    stream = gs.gsc(mlp(), list(x.split(sizes)), probes="exact", reduction=reduction)
    np.testing.assert_allclose(stream.log10_values, whole.log10_values, atol=1e-12)
    np.testing.assert_allclose(stream.log10_stderr_sample, whole.log10_stderr_sample, atol=1e-12)
    assert stream.num_samples == 12
    assert stream.stopped == "end of data"
    assert stream.complete


def test_a_matrix_streams_too():
    x = noise(12, 6)
    whole = gs.gsc_matrix(mlp(), x, probes="exact")
    stream = gs.gsc_matrix(mlp(), iter(x.split(5)), probes="exact")
    np.testing.assert_allclose(stream.log10_values, whole.log10_values, atol=1e-12)


def test_coupled_batches_are_counted_as_such():
    model, x = mlp(norm="batch", activation="relu"), noise(24, 6)
    batches = x.split(6)
    stream = gs.gsc(model, list(batches), probes="exact")
    parts = [gs.gsc(model, batch, probes="exact") for batch in batches]
    # From the definition: squared lengths add up over batches, whose Jacobian is block diagonal.
    names = [name for name in stream.layers if name != "input"]
    lengths = [[float(f.square().sum()) for f in stages(model, names, batch)] for batch in batches]
    for row, name in enumerate(stream.layers[:-1]):
        p, q = (np.array([length[i] for length in lengths]) for i in (row, -1))
        a = np.array([part[name].value for part in parts]) * q / p  # |J|^2 / (B d), batch by batch
        assert stream[name].value == pytest.approx(a.sum() / len(parts) * p.sum() / q.sum(), rel=1e-10)
    assert np.isfinite(stream.log10_stderr_sample).all()
    assert stream.coupled


def test_the_interval_of_a_coupled_stream_counts_batches_not_samples():
    model, batches = mlp(norm="batch", activation="relu"), noise(72, 6).split(6)
    stream = gs.gsc(model, list(batches), probes="exact")
    margins = np.subtract(*stream.interval(0.95)[::-1])[:-1, 0] / 2
    names = [name for name in stream.layers if name != "input"]
    lengths = np.array([[float(f.square().sum()) for f in stages(model, names, batch)] for batch in batches])
    for row, name in enumerate(stream.layers[:-1]):
        p, q = lengths[:, row], lengths[:, -1]
        a = np.array([gs.gsc(model, batch, probes="exact")[name].value for batch in batches]) * q / p
        d = a / a.mean() + p / p.mean() - q / q.mean() - 1
        concentration = np.sum(d**4) / np.sum(d**2) ** 2 - 1 / 12
        freedom = min(11, max(2, 1 / concentration - 1))
        spread = stats.t.ppf(0.975, freedom) * d.std(ddof=1) / math.sqrt(12)
        s, z = np.log(a).std(ddof=1), stats.norm.ppf(1 - 1 / 12)
        w, kept = math.log(1 + (math.exp(s**2) - 1) / 12), stats.norm.cdf(z - s)
        below = math.log(1 + (math.exp(s**2) * stats.norm.cdf(z - 2 * s) / kept**2 - 1) / 12)
        lognormal = stats.t.ppf(0.975, 11) * math.sqrt(min(w + w**2 / 4, below + math.log(kept) ** 2))
        assert margins[row] * math.log(10) == pytest.approx(max(spread, lognormal), rel=1e-7)
    # Nine batches do not show a heavy tail, though they hold 54 samples.
    low, high = gs.gsc(model, list(batches[:9]), probes="exact").interval()
    assert np.isnan(low[:-1]).all() and np.isnan(high[:-1]).all()


def test_a_loader_with_labels():
    x = noise(12, 6)
    loader = DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=5)
    model = mlp(out_features=3)
    assert gs.gsc(model, loader, probes="exact").num_samples == 12
    loss = nn.CrossEntropyLoss(reduction="none")
    stream = gs.gsc(model, loader, loss_fn=loss)
    whole = gs.gsc(model, (x, torch.arange(12) % 3), loss_fn=loss)
    np.testing.assert_allclose(stream.log10_values, whole.log10_values, atol=1e-12)


def test_the_sampling_error_of_a_stream_is_what_repetitions_show():
    model = mlp(depth=2)
    values, errors = [], []
    for seed in range(200):
        x = noise(60, 6, seed=seed)
        profile = gs.gsc(model, list(x.split(20)), probes=2, generator=seeded(seed))
        values.append(profile.log10_values[0, 0])
        errors.append(math.hypot(profile.log10_stderr_probe[0, 0], profile.log10_stderr_sample[0, 0]))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.15)


def test_the_interval_of_a_stream_holds_the_errors_of_probes_and_samples():
    # 24 times one sample: the choice of samples adds next to nothing, and all of the error is that of the probes.
    stream = gs.gsc(mlp(), list(noise(1, 6).expand(24, 6).split(8)), probes=2, generator=seeded(4))
    probe, sample = stream.log10_stderr_probe[:-1, 0], stream.log10_stderr_sample[:-1, 0]
    margin = np.subtract(*stream.interval()[::-1])[:-1, 0] / 2
    assert (probe > 0.01).all() and (sample < probe / 2).all()
    assert stream.relative_error == pytest.approx(np.hypot(probe, sample).max() * math.log(10), rel=1e-9)
    assert (margin >= stats.t.ppf(0.975, 23) * np.hypot(probe, sample) * (1 - 1e-9)).all()


def test_rtol_ends_a_stream():
    model = mlp(depth=2)
    endless = (noise(16, 6, seed=seed) for seed in itertools.count())
    profile = gs.gsc(model, endless, rtol=0.05)
    assert profile.stopped == "rtol reached"
    assert profile.relative_error <= 0.05
    tighter = gs.gsc(model, (noise(16, 6, seed=seed) for seed in itertools.count()), rtol=0.03)
    assert tighter.num_samples > 2 * profile.num_samples


@pytest.mark.parametrize(("size", "num"), [(4, 32), (40, 120)])
def test_rtol_ends_no_stream_before_three_batches_and_thirty_samples(size, num):
    endless = (noise(size, 6, seed=seed) for seed in itertools.count())
    assert gs.gsc(mlp(depth=2), endless, rtol=0.9).num_samples == num


def test_budgets_end_a_stream():
    def endless():
        return (noise(16, 6, seed=seed) for seed in itertools.count())

    assert [gs.gsc(mlp(), endless(), max_samples=num).num_samples for num in (40, 48)] == [48, 48]
    timed = gs.gsc(mlp(), endless(), max_seconds=0.2)
    assert timed.stopped == "max_seconds"
    with pytest.warns(UserWarning, match=r"rtol of 1e-06 was not reached; the reason is 'max_samples'\. The largest"):
        short = gs.gsc(mlp(), endless(), rtol=1e-6, max_samples=40)
    assert short.relative_error > 1e-6
    with pytest.warns(UserWarning, match=r"not reached; the reason is 'end of data'\. .* after 8 samples"):
        gs.gsc(mlp(), [noise(8, 6)], rtol=1e-3)


def test_an_interrupted_stream_returns_what_it_has():
    def interrupted(after):
        for seed in range(after):
            yield noise(8, 6, seed=seed)
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match=r"Interrupted: the result holds the 3 batches measured so far"):
        profile = gs.gsc(mlp(), interrupted(3), probes="exact")
    assert not profile.complete
    expected = gs.gsc(mlp(), [noise(8, 6, seed=seed) for seed in range(3)], probes="exact")
    np.testing.assert_array_equal(profile.log10_values, expected.log10_values)
    with pytest.raises(KeyboardInterrupt):
        gs.gsc(mlp(), interrupted(0))


@pytest.mark.parametrize("rtol", [0, -0.1, 1, 1.5, math.nan])
def test_rtol_out_of_range(rtol):
    with pytest.raises(ValueError, match=r"rtol must be a number between 0 and 1, such as 0\.05 or 0\.95 or None, got"):
        gs.gsc(mlp(), noise(8, 6), rtol=rtol)


def test_budgets_out_of_range():
    with pytest.raises(ValueError, match=r"max_samples must be an integer of at least 1 or None, got 0"):
        gs.gsc(mlp(), [noise(8, 6)], max_samples=0)
    with pytest.raises(ValueError, match=r"max_seconds must be a finite number > 0 or None, got -1"):
        gs.gsc(mlp(), [noise(8, 6)], max_seconds=-1)


@pytest.mark.parametrize("measure", [gs.gsc, gs.gsc_matrix])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"probes": 4, "rtol": 0.1}, "rtol"),
        ({"probes": "exact", "rtol": 0.1}, "rtol"),
        ({"max_samples": 5}, "max_samples"),
        ({"max_seconds": 5.0}, "max_seconds"),
    ],
)
def test_arguments_that_a_single_batch_would_ignore(measure, options, name):
    with pytest.raises(ValueError, match=name):
        measure(mlp(), noise(8, 6), **options)


@pytest.mark.parametrize("empty", [[], iter(()), DataLoader(TensorDataset(torch.empty(0, 6)))], ids=type)
def test_a_stream_of_nothing(empty):
    with pytest.raises(ValueError, match=r"data yields no batch\. Is the iterator exhausted, or the loader empty\?"):
        gs.gsc(mlp(), empty)


def test_samples_of_unequal_shapes():
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Tanh(), nn.Conv1d(2, 2, 1)).double()
    with pytest.raises(ValueError, match=r"layer 'input' has shape \(2, 8\) in one batch and \(2, 9\) in another"):
        gs.gsc(model, iter([noise(3, 2, 8), noise(3, 2, 9)]))


def test_layers_that_only_some_batches_pass():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

        def forward(self, x):
            return self.head((self.left if x.sum() > 0 else self.right)(x))

    x = noise(4, 6).abs()
    with pytest.raises(ValueError, match=r"do not pass through the same layers: 'left', 'right' appear in only some"):
        gs.gsc(Routed(), iter([x, -x]))


def test_a_last_batch_of_one_sample_beside_coupled_ones():
    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, x):
            h = self.linear(x)
            return h - h.mean(dim=0) / 2

    with pytest.raises(ValueError, match=r"influence each other in one batch but not in another: .* leave it out"):
        gs.gsc(Centered(), [noise(4, 6), noise(1, 6)])


RANK = """
import pickle, sys
import torch, torch.distributed as dist
import gradscope as gs
from gradscope.models.mlp import MLP
from tests.helpers import noise, seeded
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
batches = noise(24, 6).split(4)
model = MLP(depth=4, width=6, activation="selu", generator=seeded()).double()
profile = gs.gsc(model, list(batches[rank::2]), probes="exact")
drawn = gs.gsc(model, [noise(24, 6)[rank::2]], probes=gs.Deflated(2, 2))
found = profile.log10_values, profile.log10_stderr_sample, profile.num_samples, drawn.log10_values
pickle.dump(found, open(sys.argv[3 + rank], "wb"))
dist.destroy_process_group()
"""


def test_two_processes_say_what_one_says(tmp_path):
    files = [tmp_path / "0.pkl", tmp_path / "1.pkl"]
    arguments = [str(tmp_path / "store"), *map(str, files)]
    root = ROOT
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, str(rank), *arguments], cwd=root)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (pickle.loads(file.read_bytes()) for file in files)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    alone = gs.gsc(mlp(), list(noise(24, 6).split(4)), probes="exact")
    np.testing.assert_allclose(first[0], alone.log10_values, atol=1e-12)
    np.testing.assert_allclose(first[1], alone.log10_stderr_sample, atol=1e-12)
    assert first[2] == second[2] == 24
    drawn = gs.gsc(mlp(), [noise(24, 6)], probes=gs.Deflated(2, 2))
    np.testing.assert_allclose(first[3], drawn.log10_values, atol=1e-12)
