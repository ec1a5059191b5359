"""Records in memory: all of them, or fewer old ones once there are very many."""

import pickle
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.monitor import records
from gradscope.monitor.records import LEAST, Records
from tests.helpers import noise

TEN_ROWS = records.FRAME_BYTES + 10 * records.ROW_BYTES


def frame(step, rows=10):
    return pd.DataFrame({"step": [step] * rows})


def steps(kept):
    return [int(one["step"].iloc[0]) for one in kept]


def test_few_records_are_all_kept(monkeypatch):
    monkeypatch.setattr(records, "MOST_BYTES", 60 * TEN_ROWS)
    kept = Records(map(frame, range(60)))
    assert steps(kept) == list(range(60)) and kept.thinning == ""
    kept.add(frame(60))
    assert steps(kept) == list(range(0, 61, 2))
    kept.add(frame(61))
    assert steps(kept) == [*range(0, 61, 2), 61]  # the last one, too
    kept.add(frame(62))
    assert steps(kept) == list(range(0, 63, 2)) and len(kept) == 32
    assert "keeps 32 of 63 records" in kept.thinning


@pytest.mark.parametrize("num", [100, 1_000, 5_000])
def test_memory_is_bounded_and_kept_records_lie_at_equal_distances(monkeypatch, num):
    monkeypatch.setattr(records, "MOST_BYTES", 80 * TEN_ROWS)
    kept = Records(map(frame, range(num)))
    found = steps(kept)
    assert LEAST <= len(kept) <= 81
    assert found[0] == 0 and found[-1] == num - 1 and kept.last["step"].iloc[0] == num - 1
    assert len(set(np.diff(found[:-1]))) == 1 and np.diff(found)[-1] <= np.diff(found)[0]


def test_large_records_are_kept_all_the_same(monkeypatch):
    monkeypatch.setattr(records, "MOST_BYTES", 10)
    assert LEAST // 2 >= 20
    for num in range(1, 200):
        assert len(Records(map(frame, range(num)))) >= min(num, LEAST // 2)


def test_a_monitor_says_once_that_records_are_missing_and_loses_no_alarm(monkeypatch):
    monkeypatch.setattr(records, "MOST_BYTES", 1)
    torch.manual_seed(0)
    model, reported = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), []
    monitor = gs.Monitor(model, torch.randn(4, 3), every=1, max_overhead=None, report=reported.append)
    monitor.alarms.fired.append(("dead units", "1", 0))
    for _ in range(LEAST + 1):
        model(torch.ones(2, 3)).sum().backward()
        monitor.step()
    assert len(reported) == LEAST + 1
    with pytest.warns(gs.MonitorWarning, match=f"keeps 21 of {LEAST + 1} records in memory"):
        table = monitor.to_frame()
    assert table["step"].nunique() == 21 and monitor.alarms.fired == [("dead units", "1", 0)]
    monitor.close()  # warns no second time
    assert str(monitor).startswith(f"{LEAST + 1} steps, 21 records")


def trained(steps, **options):
    """A monitor after some steps of training, with a record at each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = gs.Monitor(model, noise(4, 3), every=1, probes=1, max_overhead=None, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(noise(4, 3, seed=step)).square().mean()
        loss.backward()
        monitor.step(loss)
        optimizer.step()
    return monitor


class Run:
    """A sink that keeps all it gets."""

    def __init__(self):
        self.steps = []

    def log(self, values, step):
        self.steps.append(step)


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_kept_records_hold_the_rows_they_had_and_sinks_receive_all(monkeypatch):
    steps = 14
    whole = trained(steps).to_frame()
    monkeypatch.setattr(records, "MOST_BYTES", 1)
    monkeypatch.setattr(records, "LEAST", 10)
    run = Run()
    found = trained(steps, sinks=[run]).to_frame()
    assert found["step"].unique().tolist() == [*range(0, steps, 2), steps - 1]
    expected = whole[whole["step"].isin(found["step"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert run.steps == list(range(steps))


def test_ten_thousand_records_of_a_small_network_take_as_little_memory_as_is_said():
    whole = trained(3).to_frame()
    one = whole[whole["step"] == 2].reset_index(drop=True)
    tracemalloc.start()
    copies = [pickle.loads(pickle.dumps(one)) for _ in range(20)]
    bytes_each = tracemalloc.get_traced_memory()[0] / len(copies)
    tracemalloc.stop()
    kept, most = Records(), 0
    for _ in range(10_000):
        kept.add(one)
        most = max(most, len(kept))
    assert most > 1_000 and most * bytes_each < 50e6


def test_what_is_not_a_record_does_not_grow_with_their_number():
    sizes = []
    for steps in (8, 24):
        monitor = trained(steps)
        monitor.alarms.losses = []  # the last 50
        sizes.append(len(pickle.dumps((monitor.state_dict(), monitor.schedule._costs, monitor.vitals._pending))))
    assert sizes[0] == sizes[1]
