"""The study transformer_training on runs whose story is known, and on one run as it is recorded."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from experiments.archive import reference
from experiments.archive.tables import Collected
from experiments.studies import transformer_training as study
from experiments.studies.transformer_training import signals
from gradscope.frames import observed
from tests.experiments.studies.claimed import only
from tests.helpers import ROOT

STEPS = 40
RATES = (0.03, 0.3, 1.0, 2.0, 4.0)


def kept(seeds=8, lead=6, false=(), delay=4):
    """What is kept of runs: those at the rates 2 and 4 fail, warned of by the update; QK norm delays the failure."""
    parts = []
    for qk, lr, seed in itertools.product((False, True), RATES, range(seeds)):
        own = {"qk_norm": qk, "lr": lr, "seed": seed}
        found = dict.fromkeys(["failure_step", "nan_step", *(f"first_{name}" for name in signals.THRESHOLDS)], math.inf)
        if lr in study.decide.TOO_LARGE:
            found["failure_step"] = 20 + delay * qk + seed % 2
            found["first_update"] = found["failure_step"] - lead
            found["first_loss_jump"] = found["failure_step"] - 1
        found |= dict.fromkeys((f"first_{name}" for name in false), 1)
        parts += [observed(name, value, step=0, **own) for name, value in found.items()]
        wave = 1 + 0.01 * (-1) ** seed
        ends = {"loss": (6, 3), "gradient": (2, 1), "attention_logit": (6, 9 if qk else 900), "least_entropy": (1, 0.1),
                "weight_growth": (1, 3), "log10_gsc": (0, -2)}  # fmt: skip
        for name, (start, end) in ends.items():
            parts.append(observed(name, [start, end * wave], step=[0, STEPS - 1], **own))
    return Collected(pd.concat(parts, ignore_index=True), None, {})


def test_claims_of_a_signal_that_warns_early_and_of_one_that_warns_late():
    found = study.claims(kept())
    assert only(found, '"update" announces most failures at least').holds is True
    assert only(found, '"loss jump" announces most failures at least').holds is False
    assert only(found, '"update" is first').holds is True
    assert only(found, '"update" fires in less').holds is True
    assert not any("attention logit" in claim.says and "signal" in claim.says for claim in found)  # it never fired
    assert study.answer(kept()).startswith('The signal "loss jump" announces the divergence of 32 of 32 runs')


def test_a_signal_that_always_fires_announces_and_is_a_false_alarm():
    found = study.claims(kept(false=("gsc",)))
    assert only(found, '"GSC" announces most failures at least').holds is True
    assert only(found, '"GSC" fires in less').holds is False
    assert only(found, '"update" is first').holds is False


def test_movement_and_the_effect_of_the_norm():
    found = study.claims(kept())
    assert all(claim.holds is True for claim in found if claim.says.startswith("While a GPT learns"))
    logit = only(found, "smaller with QK norm")
    assert logit.holds is True and "-2 (no spread)" in logit.because
    later = only(found, "step size 2, runs with QK norm fail later")
    assert later.holds is True and "+4 (no spread)" in later.because
    assert only(study.claims(kept(delay=-3)), "step size 4, runs with QK norm fail later").holds is False
    assert "log10 of (last / first value)" in study.details(kept())


def test_runs_that_do_not_fail_count_with_the_number_of_steps():
    frame = signals.runs(kept(seeds=2).frame)
    frame.loc[(True, 2.0), "failure_step"] = math.inf
    assert study.decide.delay(frame, 2.0, STEPS).value == STEPS - 20.5


def recorded(qk, changes):
    """A run with two heads, two layers of weights and the embedding, as the monitor writes it."""
    flat = np.ones(STEPS)
    story = {"loss": 3 * flat, "logit": flat, "entropy": 0.5 * flat, "update": 0.1 * flat} | changes
    rows = [
        ("largest_attention_logit", "a", 0, story["logit"]), ("largest_attention_logit", "a", 1, 0.5 * flat),
        ("relative_attention_entropy", "a", 0, story["entropy"]), ("relative_attention_entropy", "a", 1, 0.9 * flat),
        ("update_to_weight", "w", -1, story["update"]), ("weight_norm", "w", -1, 2 * flat),
        ("gradient_norm", "w", -1, 3 * flat), ("gradient_norm", "v", -1, 4 * flat),
        ("gsc", "embedding", -1, 0.01 * flat),
    ]  # fmt: skip
    steps = {"step": np.arange(STEPS), "qk_norm": qk, "lr": 0.3, "seed": 0}
    parts = [
        pd.DataFrame({"quantity": name, "layer": layer, "head": head, "value": x, "log10_value": np.log10(x)} | steps)
        for name, layer, head, x in rows
    ]
    frame = pd.concat(parts, ignore_index=True)
    metrics = pd.DataFrame({"step": np.arange(STEPS) + 1, "train_loss": story["loss"]})
    return frame, metrics.assign(qk_norm=qk, lr=0.3, seed=0)


def test_steps_at_which_signals_fire_and_runs_fail():
    after = np.arange(STEPS)
    changes = {
        "loss": np.where(after >= 30, 12.0, np.where(after >= 20, 4.5, 3.0)),
        "logit": np.where(after >= 12, 1000.0, 1.0), "entropy": np.where(after >= 9, 1e-3, 0.5),
        "update": np.where(after >= 4, 0.6, 0.1),
    }  # fmt: skip
    runs = [recorded(qk, changes) for qk in (False, True)]
    collected = Collected(*(pd.concat(part, ignore_index=True) for part in zip(*runs, strict=True)), {})
    table = signals.series(collected.frame, collected.metrics)
    assert table["gradient"].unique() == pytest.approx([5.0])
    assert table["gsc"].unique() == pytest.approx([100.0])
    found = signals.runs(signals.condensed(collected).frame)
    names = ["failure_step", "first_loss_jump", "first_attention_logit", "first_entropy", "first_update", "nan_step"]
    # Only with QK norm, a logit of 1000 and an entropy of 1e-3 are beyond the limits.
    assert found.loc[(False, 0.3, 0), names].tolist() == [30, 20, math.inf, math.inf, 4, math.inf]
    assert found.loc[(True, 0.3, 0), names].tolist() == [30, 20, 12, 9, 4, math.inf]
    loss = signals.moving(signals.condensed(collected).frame, "loss")
    assert list(loss.columns) == list(range(0, STEPS, 3)) and loss.to_numpy()[0, [0, -1]].tolist() == [3.0, 12.0]


def test_the_published_results_are_those_of_the_configuration():
    found = reference.load(ROOT / "results" / "transformer_training")
    runs = signals.runs(found.frame)
    assert len(runs) == found.manifest["runs"] == 80 and 0 < np.isfinite(runs["failure_step"]).sum() < 80
    assert list(study.figures(found)) == ["leads", "warnings", "moving", "failures"]
    assert study.answer(found) and study.details(found)


def test_every_curve_of_training_has_a_band_from_the_lowest_seed_to_the_highest():
    axes = study.figures(kept())["moving"].axes
    assert [len(ax.collections) for ax in axes] == [len(RATES)] * 12
    logits = {False: axes[2], True: axes[5]}
    for qk, end in ((False, 900), (True, 9)):
        (band,) = logits[qk].collections[0].get_paths()
        assert {round(y, 9) for _, y in band.vertices} == {6, 0.99 * end, 1.01 * end}
        assert logits[qk].get_lines()[0].get_ydata().tolist() == [6, end]
