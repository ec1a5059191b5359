"""How often signals fire, against counts by hand on runs whose story is known."""

import itertools
import math

import numpy as np
import pytest

from experiments.studies.exploding_symptoms import signals
from experiments.studies.exploding_symptoms.alarms import Alarms
from tests.experiments.studies.symptom_stories import kept


def alarms_of(*runs):
    return Alarms.of(kept(*runs).frame, generator=np.random.default_rng(0))


def test_a_control_is_monitored_for_as_long_as_a_run_that_fails():
    failing = [{"model": f"bad{s}", "failure_step": step, "first_update": 3} for s, step in enumerate((5, 20, 40))]
    rings = (2, 10, 30, math.inf)
    controls = [{"model": f"good{s}", "first_update": step} for s, step in enumerate(rings)]
    runs = alarms_of(*failing, *controls)
    by_hand = np.mean([ring < step for ring, step in itertools.product(rings, (5, 20, 40))])
    assert runs.matched("update").value == pytest.approx(by_hand) and runs.false_alarms("update").count == 3
    assert runs.advantage("update").value == pytest.approx(1 - by_hand)
    assert np.isnan(alarms_of(*controls).matched("update").value)
    assert runs.fired == ["update"]


def test_the_resampled_pairs_are_those_of_plain_loops():
    generator = np.random.default_rng(3)
    runs = [
        {"model": f"net{m}", "lr": 0.1, "seed": s, "first_gsc": float(generator.integers(1, 50)),
         "failure_step": float(generator.integers(1, 50)) if generator.random() < 0.5 else math.inf}
        for m in range(6) for s in range(4)
    ]  # fmt: skip
    found = alarms_of(*runs)
    failed = np.isfinite(found.table["failure_step"].to_numpy())
    first, end = (found.table[name].to_numpy() for name in ("first_gsc", "failure_step"))
    matched, more = [], []
    for times in found.drawn[:300].astype(int):
        sample = np.repeat(np.arange(len(times)), times)
        controls, failing = sample[~failed[sample]], sample[failed[sample]]
        matched.append(np.mean([first[c] < end[f] for c in controls for f in failing]))
        more.append(np.mean(first[failing] < end[failing]) - matched[-1])
    short = Alarms(found.table, found.drawn[:300], found.signals)
    for between, values in ((short.matched("gsc"), matched), (short.advantage("gsc"), more)):
        np.testing.assert_allclose((between.low, between.high), np.percentile(values, [2.5, 97.5]))


def test_reliability_is_decided_by_the_interval():
    """Of 200 controls in as many cells: 5 %, 10 % and 20 % false alarms, against a limit of a tenth."""

    def control(number):
        rings = {"loss_jump": 10, "gradient_jump": 20, "update": 40}
        return {"model": f"net{number}"} | {f"first_{name}": 1 for name, count in rings.items() if number < count}

    found = alarms_of(*(control(number) for number in range(200)))
    assert found.reliable(0.1) == {"loss_jump": True, "gradient_jump": None, "update": False}
    assert found.reliable(0.01) == {"loss_jump": False, "gradient_jump": False, "update": False}
    assert all(found.reliable(0.5).values()) and "weight_growth" not in found.reliable(0.5)


def test_a_signal_that_fires_only_after_failures_was_not_tested():
    found = alarms_of({"model": "bad", "failure_step": 5, "first_gsc": 5, "first_update": 4}, {"model": "good"})
    assert found.fired == ["update"] and set(found.reliable(0.1)) == {"update"}
    assert set(signals.THRESHOLDS) > {"gsc", "update"}


def test_cells_are_networks_at_one_learning_rate():
    runs = [{"model": m, "lr": lr, "seed": s} for m in "ab" for lr in (0.1, 1.0) for s in range(3)]
    found = alarms_of(*runs)
    cells = found.table.groupby(level=["model", "lr"]).ngroup().to_numpy()
    assert len(np.unique(cells)) == 4
    for cell in range(4):
        assert (found.drawn[:, cells == cell] == found.drawn[:, cells == cell][:, :1]).all()
    assert (found.drawn.sum(axis=1) == 12).all()
