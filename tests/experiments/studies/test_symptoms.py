"""Signals of exploding training against the monitor's own alarms, plain loops, and runs whose story is known."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from rich.console import Console

import gradscope as gs
from experiments import figures, train
from experiments.archive import reference
from experiments.archive.tables import Collected
from experiments.config import columns as config_columns
from experiments.evidence.study import condensed
from experiments.studies.exploding_symptoms import signals
from gradscope import frames
from gradscope.monitor.alarms import Alarms, MonitorWarning
from tests.experiments.studies.symptom_stories import STEPS, from_step, together, told


def firsts(**changes):
    return signals.first_steps(signals.series(*told(**changes))).iloc[0]


def test_a_run_without_symptoms():
    found = firsts()
    assert found["log10_gsc_at_start"] == pytest.approx(1) and found["last_loss"] == 1
    assert np.isinf(found.drop(["log10_gsc_at_start", "last_loss"])).all()


@pytest.mark.parametrize(
    ("quantity", "signal", "below", "above"),
    [
        ("loss", "loss_jump", 4.99, 5.01),
        ("gradient", "gradient_jump", 14.1, 14.2),  # with the other layer's 1: sqrt(200)
        ("update", "update", 0.099, 0.101),
        ("weights", "weight_growth", 9.99, 10.01),
        ("gsc", "gsc", 0.99e6, 1.01e6),
        ("gsc", "gsc_jump", 99.0, 101.0),
    ],
)
def test_each_signal_at_its_threshold(quantity, signal, below, above):
    normal = {"update": 0.01, "gsc": 10.0}.get(quantity, 1.0)
    assert np.isinf(firsts(**{quantity: from_step(17, below, normal)})[f"first_{signal}"])
    assert firsts(**{quantity: from_step(17, above, normal)})[f"first_{signal}"] == 17
    if signal.endswith("jump"):  # after four steps there is nothing yet to jump from
        assert np.isinf(firsts(**{quantity: np.where(np.arange(STEPS) == 4, above, normal)})[f"first_{signal}"])
        assert firsts(**{quantity: np.where(np.arange(STEPS) == 5, above, normal)})[f"first_{signal}"] == 5


def test_failure_and_nan():
    guessing = math.log(10)
    found = firsts(loss=np.r_[[guessing] * 20, 9.9 * guessing, 10.1 * guessing, 1.0, [math.nan] * 17])
    assert (found["failure_step"], found["nan_step"]) == (21, 23)
    found = firsts(loss=from_step(30, math.inf))
    assert (found["failure_step"], found["nan_step"]) == (30, 30)


@pytest.mark.parametrize("quantity", ["gradient", "weights", "update"])
def test_what_is_left_out_for_not_being_finite_is_large(quantity):
    signal = {"gradient": "gradient_jump", "weights": "weight_growth", "update": "update"}[quantity]
    normal = 0.01 if quantity == "update" else 1.0
    assert firsts(**{quantity: from_step(12, math.inf, normal)})[f"first_{signal}"] == 12


def test_signals_of_random_runs_are_the_alarms_of_the_monitor():
    generator = np.random.default_rng(0)
    seen = set()
    for seed in range(12):
        walk = np.cumsum(generator.normal(0, 0.8, (4, STEPS)), axis=1)
        loss, gradient, weights, gsc = np.exp(walk * [[0.4], [1], [0.5], [2.5]])
        frame, metrics = told(seed, loss=loss, gradient=gradient, weights=weights / weights[0], gsc=gsc)
        found = signals.first_steps(signals.series(frame, metrics)).iloc[0]
        alarms, expected = Alarms({"first": 2.0, "second": 1.0}), {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MonitorWarning)
            for step in range(STEPS):
                alarms.loss(loss[step], step)
                alarms.record(frame[frame["step"] == step], step)
        for kind, _, step in reversed(alarms.fired):
            expected[kind] = step
        for kind, name in (("loss jump", "loss_jump"), ("weight growth", "weight_growth"), ("exploding", "gsc")):
            assert found[f"first_{name}"] == expected.get(kind, math.inf)
            seen.add((kind, kind in expected))
        whole, largest = np.hypot(gradient, 1), np.maximum(gsc, 1)
        for values, name in ((whole, "gradient_jump"), (largest, "gsc_jump")):
            jumps = [s for s in range(5, STEPS) if values[s] > 10 * np.median(values[:s])]
            assert found[f"first_{name}"] == min(jumps, default=math.inf)
    assert len(seen) == 6  # each kind rang in some runs and was silent in others


def test_leads_count_only_what_came_before_the_failure():
    fails = from_step(20, math.inf) + np.where(np.arange(STEPS) == 18, 30.0, 0.0)
    collected = together(
        told(0, loss=fails, update=from_step(11, 1.0, 0.01), weights=from_step(18, 50.0)),
        told(1, loss=fails, gradient=from_step(19, 99.0), gsc=from_step(17, 1e7, 10.0)),
        told(2, update=from_step(3, 1.0, 0.01)),
    )
    found = signals.first_steps(signals.series(collected.frame, collected.metrics))
    assert found["failure_step"].tolist() == [18, 18, math.inf] and found["nan_step"].tolist() == [20, 20, math.inf]
    leads = signals.leads(found)
    assert leads["update"].tolist()[0] == 7 and leads["gsc"].tolist()[1] == 1
    assert leads.notna().sum().sum() == 3  # also the jump of GSC; weights grew at the failure, not before
    to_nan = signals.leads(found, "nan_step")
    assert to_nan["update"].tolist()[0] == 9 and to_nan["gsc_jump"].tolist()[1] == 3
    assert to_nan.notna().sum().sum() == 3
    rang = signals.quiet(found)
    assert len(rang) == 1 and rang.sum().sum() == 1 and rang["update"].all()


def test_what_is_kept_of_the_runs(tmp_path):
    fails, update = from_step(30, math.nan), from_step(2, 1.0, 0.01)
    failing = [told(seed, loss=fails, update=update, gradient=from_step(20, 99.0)) for seed in range(3)]
    late = told(0, model="late", loss=from_step(35, 1e9))  # the last to fail, but not by NaN
    once = signals.condensed(together(*failing, told(model="sane", update=update), late))
    reference.save(replace(once, manifest={"runs": 5}), tmp_path)
    again = reference.load(tmp_path)
    for collected in (once, again):
        runs = signals.runs(frames.check(collected.frame))
        assert runs["failure_step"].to_dict() == {
            ("late", 0.1, 0): 35, ("net", 0.1, 0): 30, ("net", 0.1, 1): 30, ("net", 0.1, 2): 30,
            ("sane", 0.1, 0): math.inf,
        }  # fmt: skip
        assert runs["first_gradient_jump"].tolist() == [math.inf, 20, 20, 20, math.inf]
        assert runs["first_update"].tolist() == [math.inf, 2, 2, 2, 2] and len(collected.metrics) == 5
        example = collected.frame[collected.frame["quantity"] == "loss"]
        assert example["seed"].unique().tolist() == [0] and example["model"].unique().tolist() == ["net"]
        assert example["step"].tolist() == list(range(30)) and (example["width"] == 50).all()


def test_figures_read_what_is_kept_of_runs(monkeypatch, tmp_path):
    everything = together(told(0, loss=from_step(30, math.nan)), told(1))
    everything = replace(everything, frame=everything.frame.assign(run="folder"))
    monkeypatch.setattr(figures.collecting, "load", lambda folder: everything)
    kept_of_it, folder = figures.read(figures.Config(study="exploding_symptoms", results=str(tmp_path)))
    assert folder == tmp_path / "exploding_symptoms" / "figures" and "run" not in kept_of_it.frame
    assert signals.runs(kept_of_it.frame)["failure_step"].tolist() == [30, math.inf]
    assert condensed("architectures", everything) is everything


def test_a_run_that_explodes(tmp_path, monkeypatch):
    """The losses are those that the monitor is shown, and weights grow as they do by hand."""
    shown, lengths = [], []

    class Spy(gs.Monitor):
        def step(self, loss=None, batch=None):
            shown.append(float(loss.detach()))
            weights = [[p.detach().double().norm() for p in m.parameters(recurse=False)] for m in self.model.modules()]
            lengths.append([float(torch.stack(own).norm()) for own in weights if own])
            return super().step(loss, batch)

    monkeypatch.setattr(gs, "Monitor", Spy)
    with initialize_config_module("conf", version_base="1.3"):
        words = ["study=exploding_symptoms", "model=selu", "optimizer.lr=0.3", "seed=7", "train.max_steps=12"]
        cfg = compose("train", words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MonitorWarning)
        columns = config_columns.columns(cfg, {"model": "selu", "data": "digits"})
        train.train(cfg, tmp_path, torch.device("cpu"), Console(quiet=True), columns)
    collected = Collected(frames.load(tmp_path / "monitor.parquet"), pd.read_parquet(tmp_path / "metrics.parquet"), {})
    table = signals.series(collected.frame, collected.metrics).droplevel(signals.KEYS)
    np.testing.assert_allclose(table["loss"], shown, rtol=1e-6)
    bad = [step for step, loss in enumerate(shown) if not loss <= 10 * math.log(10)]
    kept = signals.runs(signals.condensed(collected).frame).iloc[0]
    assert kept["failure_step"] == bad[0] and 0 < bad[0] < 12
    growth = np.max(np.array(lengths) / lengths[0], axis=1)
    np.testing.assert_allclose(table["weight_growth"].iloc[: bad[0]], growth[: bad[0]], rtol=1e-5)
