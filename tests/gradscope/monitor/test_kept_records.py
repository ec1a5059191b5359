"""Records in memory: all of them, or fewer old ones once there are very many."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.monitor import records
from gradscope.monitor.records import LEAST, Records


def frame(step, rows=10):
    return pd.DataFrame({"step": [step] * rows})


def steps(kept):
    return [int(one["step"].iloc[0]) for one in kept]


def test_few_records_are_all_kept(monkeypatch):
    monkeypatch.setattr(records, "MOST_ROWS", 10 * 60)
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
    monkeypatch.setattr(records, "MOST_ROWS", 10 * 80)
    kept = Records(map(frame, range(num)))
    found = steps(kept)
    assert LEAST <= len(kept) <= 81
    assert found[0] == 0 and found[-1] == num - 1 and kept.last["step"].iloc[0] == num - 1
    assert len(set(np.diff(found[:-1]))) == 1 and np.diff(found)[-1] <= np.diff(found)[0]


def test_large_records_are_kept_all_the_same(monkeypatch):
    monkeypatch.setattr(records, "MOST_ROWS", 10)
    assert LEAST // 2 >= 20
    for num in range(1, 200):
        assert len(Records(map(frame, range(num)))) >= min(num, LEAST // 2)


def test_a_monitor_says_once_that_records_are_missing_and_loses_no_alarm(monkeypatch):
    monkeypatch.setattr(records, "MOST_ROWS", 1)
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
