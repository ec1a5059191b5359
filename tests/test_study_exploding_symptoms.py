"""Symptoms of exploding training against the monitor's own alarms, plain loops, and runs whose story is known."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from scipy import stats

import gradscope as gs
from experiments import figures, reference, run, symptoms, train
from experiments.collect import Collected
from experiments.studies import exploding_symptoms as study
from experiments.study import condensed
from gradscope import frames
from gradscope.alarms import Alarms, MonitorWarning
from tests.symptom_stories import kept

ROOT = Path(__file__).parent.parent
STEPS = 40


def recorded(quantity, layer, values):
    """Rows as the monitor has them: what is not finite is left out."""
    values = np.asarray(values, dtype=float)
    steps = np.flatnonzero(np.isfinite(values))
    rows = {"layer": layer, "quantity": quantity, "value": values[steps], "log10_value": np.log10(values[steps])}
    return pd.DataFrame(rows | {"step": steps})


def told(seed=0, model="net", lr=0.1, **changes):
    """A run in which nothing happens but ``changes``: {quantity: values over steps}."""
    flat = np.ones(STEPS)
    story = {"loss": flat, "gradient": flat, "update": 0.01 * flat, "weights": flat, "gsc": 10 * flat} | changes
    parts = [
        recorded("gradient_norm", "first", story["gradient"]), recorded("gradient_norm", "second", flat),
        recorded("weight_norm", "first", 2 * np.asarray(story["weights"])), recorded("weight_norm", "second", flat),
        recorded("update_to_weight", "first", story["update"]).query("step > 0"),
        recorded("gsc", "first", story["gsc"]), recorded("gsc", "second", flat),
    ]  # fmt: skip
    frame = pd.concat(parts, ignore_index=True).assign(model=model, lr=lr, seed=seed, width=50)
    metrics = pd.DataFrame({"model": model, "lr": lr, "seed": seed, "step": np.arange(STEPS) + 1})
    return frame, metrics.assign(train_loss=story["loss"])


def together(*runs):
    return Collected(*(pd.concat(parts, ignore_index=True) for parts in zip(*runs, strict=True)), {})


def firsts(**changes):
    return symptoms.first_steps(symptoms.series(*told(**changes))).iloc[0]


def from_step(step, value, before=1.0):
    return np.where(np.arange(STEPS) >= step, value, before)


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
        found = symptoms.first_steps(symptoms.series(frame, metrics)).iloc[0]
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
    found = symptoms.first_steps(symptoms.series(collected.frame, collected.metrics))
    assert found["failure_step"].tolist() == [18, 18, math.inf] and found["nan_step"].tolist() == [20, 20, math.inf]
    leads = symptoms.leads(found)
    assert leads["update"].tolist()[0] == 7 and leads["gsc"].tolist()[1] == 1
    assert leads.notna().sum().sum() == 3  # also the jump of GSC; weights grew at the failure, not before
    to_nan = symptoms.leads(found, "nan_step")
    assert to_nan["update"].tolist()[0] == 9 and to_nan["gsc_jump"].tolist()[1] == 3
    assert to_nan.notna().sum().sum() == 3
    rang = symptoms.quiet(found)
    assert len(rang) == 1 and rang.sum().sum() == 1 and rang["update"].all()


def story(num_failing=20, num_controls=20, false_alarms=0, lead=10):
    """Failures at step 30, warned of by the gradient; the update rings in every run.  Each run is a cell of its own."""
    failing = {"failure_step": 30, "nan_step": 32, "first_update": 2, "first_gradient_jump": 30 - lead}
    controls = [
        {"model": f"sane{number}", "first_update": 2} | ({"first_gradient_jump": 9} if number < false_alarms else {})
        for number in range(num_controls)
    ]
    return kept(*(failing | {"model": f"net{number}"} for number in range(num_failing)), *controls)


def verdicts(collected):
    return {claim.says: claim for claim in study.claims(collected)}


def test_what_is_kept_of_the_runs(tmp_path):
    fails, update = from_step(30, math.nan), from_step(2, 1.0, 0.01)
    failing = [told(seed, loss=fails, update=update, gradient=from_step(20, 99.0)) for seed in range(3)]
    late = told(0, model="late", loss=from_step(35, 1e9))  # the last to fail, but not by NaN
    once = symptoms.condensed(together(*failing, told(model="sane", update=update), late))
    reference.save(replace(once, manifest={"runs": 5}), tmp_path)
    again = reference.load(tmp_path)
    for collected in (once, again):
        runs = symptoms.runs(frames.check(collected.frame))
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
    monkeypatch.setattr(figures.collect, "load", lambda folder: everything)
    kept_of_it, folder = figures.read(figures.Config(study="exploding_symptoms", results=str(tmp_path)))
    assert folder == tmp_path / "exploding_symptoms" / "figures" and "run" not in kept_of_it.frame
    assert symptoms.runs(kept_of_it.frame)["failure_step"].tolist() == [30, math.inf]
    assert condensed("architectures", everything) is everything


TRUST = "Some trusty signal warns of most failures"
OTHER = "Exploratory: some trusty signal other than the loss jump warns of most failures"
EARLY = "Where a trusty signal warns, the first is mostly 5 steps or more before the failure"
TELLS = "Exploratory: {} rings more often before a failure than in a control watched as long"


def test_claims_of_a_signal_that_is_always_right_and_of_one_that_always_rings():
    found = verdicts(story(40, 40))
    claim = found["gradient jump warns before the failure in most runs that fail"]
    assert claim.holds is True and "40 of 40 runs" in claim.because
    assert "median lead 10 (10 to 10) steps" in claim.because
    assert found["update warns before the failure in most runs that fail"].holds is True
    assert found["gradient jump is silent in most runs that do not fail"].holds is True
    assert found["update is silent in most runs that do not fail"].holds is False
    assert found[TELLS.format("gradient jump")].holds is True
    assert found[TELLS.format("update")].holds is not True  # it rings in every run, failing or not
    assert found[TELLS.format("update")].because.startswith("1.00 of the failing runs, 1.00 (1.00 to 1.00)")
    first = next(claim for says, claim in found.items() if "the update is the first to warn" in says)
    assert first.holds is True and "false alarm in 40 of 40 runs" in first.because
    assert found[TRUST].holds is True and "update" not in found[TRUST].because
    assert found[OTHER].holds is True and found[EARLY].holds is True
    assert found["Exploratory: the same of failures after step 10"].holds is True
    assert not any("weight growth" in says or "GSC warns" in says for says in found)  # never rang: nothing is claimed


def test_the_answer_follows_the_runs():
    answer = study.answer(story(40, 40))
    assert answer.startswith(
        "Of 80 runs 40 fail, in 40 of 80 cells of network and learning rate; 40 of them come to a loss that is not "
        "finite, 2 (2 to 2) steps later."
    )
    assert "First of all signals is most often update, in 40 runs" in answer
    assert (
        "Trusty, with false alarms surely in less than 10 % of the controls: gradient jump; undecided: none." in answer
    )
    assert "Never heard, so not tested here: loss jump, weight growth, GSC, GSC jump" in answer
    assert "The loss jump is the failure itself" not in answer
    assert (
        "| update | 40 of 40 runs (91 to 100 %) | 40 | 28 (28 to 28) steps | 30 (30 to 30) steps | 40 of 40" in answer
    )
    assert "| 10 % | gradient jump | none | 40 of 40 runs (91 to 100 %) | 40 of 40 runs (91 to 100 %) |" in answer
    louder = study.answer(kept({"failure_step": 9, "first_loss_jump": 3}, *({"model": f"sane{n}"} for n in range(40))))
    assert "surely in less than 10 % of the controls: loss jump" in louder
    assert "The loss jump is the failure itself at a lower threshold." in louder


def test_one_run_more_or_less_does_not_turn_trust():
    """3, 4 or 5 false alarms among 40 controls are undecided; what is claimed must hold for both readings."""
    for false_alarms in (3, 4, 5):
        found = verdicts(story(40, 40, false_alarms))
        assert found[TRUST].holds is None and found[EARLY].holds is None
        assert (
            found[TRUST].because.startswith("0 of 40 runs")
            and "with the undecided signals 40 of 40" in found[TRUST].because
        )
        assert "undecided: gradient jump" in study.answer(story(40, 40, false_alarms))
    found = verdicts(story(40, 40, 20))
    assert found[TRUST].holds is False and found[OTHER].holds is False and found[EARLY].holds is None


def test_claims_of_late_warnings():
    assert verdicts(story(40, 40, lead=4))[EARLY].holds is False
    assert verdicts(story(3, 3))["gradient jump is silent in most runs that do not fail"].holds is None


def test_alike_seeds_of_few_cells_are_no_evidence():
    """Two networks of fifty seeds, one warned and one not: half of a hundred runs, or of two cells."""
    runs = [
        {"model": model, "seed": seed, "failure_step": 30, "first_update": 9 if model == "warned" else math.inf}
        for model in ("warned", "missed", "missed2") for seed in range(50)
    ]  # fmt: skip
    claim = verdicts(kept(*runs, {"model": "sane"}))["update warns before the failure in most runs that fail"]
    assert claim.because.startswith("50 of 150 runs (0 to 100 %)") and claim.holds is None


def test_the_network_that_explodes_most():
    calm, wild = {"model": "calm", "failure_step": 9}, {"model": "wild", "log10_gsc_at_start": 5.0}
    says = "Exploratory: the network with the largest GSC at step 0 fails in some of these runs"
    claim = verdicts(kept(calm, wild))[says]
    assert claim.holds is False
    assert claim.because.startswith(
        "wild, which has the largest GSC at step 0 (10^5.0 on average), fails in 0 of 1 runs"
    )
    assert claim.because in study.answer(kept(calm, wild))
    assert verdicts(kept(calm, wild | {"failure_step": 3}))[says].holds is True


@pytest.mark.parametrize("failing_larger", [True, False, None])
def test_the_ranking_by_gsc_is_the_statistic_of_mann_and_whitney(failing_larger):
    generator, runs, expected = np.random.default_rng(1), [], []
    shift = {True: 2.0, False: -2.0, None: 0.0}[failing_larger]
    for seed in range(5):
        starts = generator.integers(1, 6, 12).astype(float)
        bad = np.arange(12) < 5
        starts[bad] += shift
        statistic = stats.mannwhitneyu(starts[bad], starts[~bad]).statistic
        expected.append(statistic / (bad.sum() * (~bad).sum()))
        for number in range(12):
            failure = {"failure_step": 9} if bad[number] else {}
            runs.append({"model": f"net{number}", "seed": seed, "log10_gsc_at_start": starts[number]} | failure)
        # At this rate there is no pair.
        runs.append({"model": "net0", "seed": seed, "lr": 0.01, "log10_gsc_at_start": 9})
    normed = [{"model": "normed", "seed": seed, "log10_gsc_at_start": 99} for seed in range(5)]  # would win every pair
    found = verdicts(kept(*runs, *normed))
    everything = found["At a given learning rate the networks with larger GSC at step 0 are those that fail"]
    assert float(everything.because.split("part of ")[1].split()[0]) < round(np.mean(expected), 2)
    claim = found["Exploratory: the same among networks without normalization"]
    assert f"in a part of {np.mean(expected):.2f} (" in claim.because
    assert claim.holds is failing_larger


def test_false_alarms_where_something_was_learned():
    """The last loss counts, against half of ln 10."""
    losses = [np.r_[np.ones(STEPS - 1), last] for last in (1.14, 1.16, math.nan, 1e9)]
    runs = together(*(told(seed, loss=loss, update=from_step(9, 1.0)) for seed, loss in enumerate(losses)))
    found = symptoms.first_steps(symptoms.series(runs.frame, runs.metrics))
    assert len(symptoms.quiet(found)) == 2 and len(symptoms.quiet(found, learned=True)) == 1
    stuck = {"seed": 1, "model": "stuck", "last_loss": 2.0, "first_update": 3}
    claim = verdicts(kept(stuck, {"seed": 1, "model": "sane"}))["update is silent in most runs that do not fail"]
    assert claim.because == "1 of 2 runs (0 to 100 %); of those that learned 1 of 1 runs (21 to 100 %)"


def test_late_failures_are_decided_by_themselves():
    late = [{"model": f"net{s}", "failure_step": 11, "first_loss_jump": 9} for s in range(20)]
    soon = [{"model": f"net{s}", "lr": 3.0, "failure_step": 10} for s in range(20)]
    found = verdicts(kept(*late, *soon, *({"model": f"sane{s}"} for s in range(40))))
    assert found[TRUST].holds is None
    claim = found["Exploratory: the same of failures after step 10"]
    assert claim.holds is True and claim.because.startswith("20 of 20 runs")
    assert found[OTHER].holds is False


def test_without_failures_and_without_controls():
    alone = story(0, 6)
    assert verdicts(alone)["update warns before the failure in most runs that fail"].holds is None
    assert study.answer(alone).startswith("None of 6 runs fails.")
    assert verdicts(story(6, 0))["update is silent in most runs that do not fail"].holds is None


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
        columns = run.columns(cfg, {"model": "selu", "data": "digits"})
        train.train(cfg, tmp_path, torch.device("cpu"), Console(quiet=True), columns)
    collected = Collected(frames.load(tmp_path / "monitor.parquet"), pd.read_parquet(tmp_path / "metrics.parquet"), {})
    table = symptoms.series(collected.frame, collected.metrics).droplevel(symptoms.KEYS)
    np.testing.assert_allclose(table["loss"], shown, rtol=1e-6)
    bad = [step for step, loss in enumerate(shown) if not loss <= 10 * math.log(10)]
    kept = symptoms.runs(symptoms.condensed(collected).frame).iloc[0]
    assert kept["failure_step"] == bad[0] and 0 < bad[0] < 12
    growth = np.max(np.array(lengths) / lengths[0], axis=1)
    np.testing.assert_allclose(table["weight_growth"].iloc[: bad[0]], growth[: bad[0]], rtol=1e-5)


def test_the_reference_results():
    published = reference.load(ROOT / "results" / "exploding_symptoms")
    runs = symptoms.runs(published.frame)
    failed = np.isfinite(runs["failure_step"])
    assert len(runs) == published.manifest["runs"] and 0 < failed.sum() < len(runs)
    ended = published.metrics["train_loss"].isna().groupby([published.metrics[key] for key in ("lr", "seed")]).sum()
    pd.testing.assert_series_equal(
        np.isfinite(runs["nan_step"]).groupby(level=["lr", "seed"]).sum(), ended, check_names=False
    )
    by_hand = [row["first_update"] < row["failure_step"] < math.inf for _, row in runs.iterrows()]
    claim = verdicts(published)["update warns before the failure in most runs that fail"]
    assert claim.because.startswith(f"{sum(by_hand)} of {failed.sum()} runs")
    drawn = study.figures(published)
    assert list(drawn) == ["warnings", "leads", "one_run", "failures"]
    bars = [patch.get_height() for patch in drawn["warnings"].axes[0].patches]
    assert len(bars) == 3 * 5  # GSC above its threshold was never heard
    assert bars[2] == pytest.approx(100 * sum(by_hand) / failed.sum())
    dots = [line for line in drawn["leads"].axes[0].lines if line.get_marker() == "o"]
    assert [np.mean(line.get_ydata()) for line in dots] == pytest.approx(range(5))  # equal leads on both sides of a row
    for line in dots:
        points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        assert len(set(points)) == len(points) and np.ptp(line.get_ydata()) < 0.9
    for figure in drawn.values():
        plt.close(figure)


def test_sizes_are_those_of_the_configuration():
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", ["study=exploding_symptoms"])
    assert (cfg.model.depth, cfg.model.width, cfg.train.max_steps) == (study.DEPTH, study.WIDTH, study.NUM_STEPS)
    assert (cfg.monitor.probes, cfg.monitor.batch_size) == (study.NUM_PROBES, study.NUM_IMAGES)
