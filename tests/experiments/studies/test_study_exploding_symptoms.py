"""The study exploding_symptoms on runs whose story is known."""

import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from scipy import stats

from experiments.archive import reference
from experiments.config import schema
from experiments.studies import exploding_symptoms as study
from experiments.studies.exploding_symptoms import signals
from tests.experiments.studies.claimed import only
from tests.experiments.studies.symptom_stories import STEPS, from_step, kept, together, told
from tests.helpers import ROOT


def story(num_failing=20, num_controls=20, false_alarms=0, lead=10):
    """Failures at step 30, warned of by the gradient; the update rings in every run.  Each run is a cell of its own."""
    failing = {"failure_step": 30, "nan_step": 32, "first_update": 2, "first_gradient_jump": 30 - lead}
    controls = [
        {"model": f"sane{number}", "first_update": 2} | ({"first_gradient_jump": 9} if number < false_alarms else {})
        for number in range(num_controls)
    ]
    return kept(*(failing | {"model": f"net{number}"} for number in range(num_failing)), *controls)


def verdicts(collected):
    claims = study.STUDY.claims(collected)
    return lambda *words: only(claims, *words)


# Words of claims.
ANNOUNCES, SILENT, TELLS = "announces most failures", "never fires", "fires more often"
RELIABLE, OTHER, EARLY, LATE = "Together, the reliable", "other than the loss", "first such signal", "after step 10"
LARGEST = "network with the largest GSC"


def test_claims_of_a_signal_that_is_always_right_and_of_one_that_always_fires():
    made = story(40, 40)
    found, says = verdicts(made), [claim.says for claim in study.STUDY.claims(made)]
    claim = found("gradient jump", ANNOUNCES)
    assert claim.holds is True and "40 of 40 runs" in claim.because and "lead: 10 steps (" in claim.because
    assert found('"update" announces').holds is True
    assert found("gradient jump", SILENT).holds is True and found("update", SILENT).holds is False
    assert found("gradient jump", TELLS).holds is True
    assert found("update", TELLS).holds is not True  # it fires in every run, failing or not
    because = (
        "fraction of failing runs in which it fires before the failure: 1.00; fraction of equally long "
        "parts of controls in which it fires: 1 ("
    )
    assert found("update", TELLS).because.startswith(because)
    first = found('"update" fires first')
    assert first.holds is True and 'false alarms of "update": 40 of 40 runs' in first.because
    assert found(RELIABLE).holds is True and "update" not in found(RELIABLE).because
    assert found(OTHER).holds is True and found(EARLY).holds is True and found(LATE).holds is True
    assert not any("weight growth" in one or one.startswith("GSC") for one in says)  # never fired: nothing is claimed


def test_the_answer_follows_the_runs():
    made = story(40, 40)
    answer, details = study.STUDY.answer(made), study.STUDY.details(made)
    assert answer.startswith('The signal "gradient jump" announces') and "(gradient jump) announce" in answer
    assert (
        details.startswith("Of 80 runs, 40 fail, in 40 of 80 combinations")
        and "update, in 40 of the failing runs" in details
    )
    assert "loss jump, weight growth, GSC and GSC jump" in details and "number as the failure" not in details
    assert "| update | 40 of 40 runs (91 to 100 %) | 40 | 28 steps (" in details
    assert "| 10 % | gradient jump | none | 40 of 40 runs (91 to 100 %) | 40 of 40 runs (91 to 100 %) |" in details
    louder = kept({"failure_step": 9, "first_loss_jump": 3}, *({"model": f"sane{n}"} for n in range(40)))
    assert "(loss jump) announce" in study.STUDY.answer(louder)
    assert "number as the failure" in study.STUDY.details(louder)


def test_one_run_more_or_less_does_not_turn_the_verdict():
    """3, 4 or 5 false alarms among 40 controls are undecided; what is claimed must hold for both readings."""
    for false_alarms in (3, 4, 5):
        found = verdicts(story(40, 40, false_alarms))
        assert found(RELIABLE).holds is None and found(EARLY).holds is None
        assert found(RELIABLE).because.startswith("0 of 40 runs") and "included: 40 of 40" in found(RELIABLE).because
        assert "| 10 % | none | gradient jump |" in study.STUDY.details(story(40, 40, false_alarms))
    found = verdicts(story(40, 40, 20))
    assert found(RELIABLE).holds is False and found(OTHER).holds is False and found(EARLY).holds is None


def test_claims_of_late_warnings():
    assert verdicts(story(40, 40, lead=4))(EARLY).holds is False
    assert verdicts(story(3, 3))("gradient jump", SILENT).holds is None


def test_alike_seeds_of_few_cells_are_no_evidence():
    """Two networks of fifty seeds, one warned and one not: half of a hundred runs, or of two cells."""
    runs = [
        {"model": model, "seed": seed, "failure_step": 30, "first_update": 9 if model == "warned" else math.inf}
        for model in ("warned", "missed", "missed2") for seed in range(50)
    ]  # fmt: skip
    claim = verdicts(kept(*runs, {"model": "sane"}))("update", ANNOUNCES)
    assert claim.because.startswith("50 of 150 runs (0 to 100 %)") and claim.holds is None


def test_the_network_that_explodes_most():
    calm, wild = {"model": "calm", "failure_step": 9}, {"model": "wild", "log10_gsc_at_start": 5.0}
    claim = verdicts(kept(calm, wild))(LARGEST)
    assert claim.holds is False
    assert claim.because.startswith("wild ") and "10^5.0" in claim.because and "0 of 1 runs" in claim.because
    assert verdicts(kept(calm, wild | {"failure_step": 3}))(LARGEST).holds is True


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
    everything = found("At equal learning rates")
    assert float(re.search(r"\d\.\d\d", everything.because)[0]) < round(np.mean(expected), 2)
    claim = found("without normalization")
    assert float(re.search(r"([\d.]+) \(", claim.because)[1]) == pytest.approx(np.mean(expected), abs=0.006)
    assert claim.holds is failing_larger


def test_false_alarms_where_something_was_learned():
    """The last loss counts, against half of ln 10."""
    losses = [np.r_[np.ones(STEPS - 1), last] for last in (1.14, 1.16, math.nan, 1e9)]
    runs = together(*(told(seed, loss=loss, update=from_step(9, 1.0)) for seed, loss in enumerate(losses)))
    found = signals.first_steps(signals.series(runs.frame, runs.metrics))
    assert len(signals.quiet(found)) == 2 and len(signals.quiet(found, learned=True)) == 1
    stuck = {"seed": 1, "model": "stuck", "last_loss": 2.0, "first_update": 3}
    claim = verdicts(kept(stuck, {"seed": 1, "model": "sane"}))("update", SILENT)
    assert re.findall(r"\d of \d runs \(.*?\)", claim.because) == [
        "1 of 2 runs (0 to 100 %)",
        "1 of 1 runs (21 to 100 %)",
    ]


def test_late_failures_are_decided_by_themselves():
    late = [{"model": f"net{s}", "failure_step": 11, "first_loss_jump": 9} for s in range(20)]
    soon = [{"model": f"net{s}", "lr": 3.0, "failure_step": 10} for s in range(20)]
    found = verdicts(kept(*late, *soon, *({"model": f"sane{s}"} for s in range(40))))
    assert found(RELIABLE).holds is None
    claim = found(LATE)
    assert claim.holds is True and claim.because.startswith("20 of 20 runs")
    assert found(OTHER).holds is False


def test_without_failures_and_without_controls():
    alone = story(0, 6)
    assert verdicts(alone)("update", ANNOUNCES).holds is None
    assert study.STUDY.answer(alone).startswith("None of 6 runs")
    assert verdicts(story(6, 0))("update", SILENT).holds is None
    assert study.STUDY.details(story(6, 0)) and study.STUDY.answer(kept({"failure_step": 9}))


def test_the_reference_results():
    published = reference.load(ROOT / "results" / "exploding_symptoms")
    runs = signals.runs(published.frame)
    failed = np.isfinite(runs["failure_step"])
    assert len(runs) == published.manifest["runs"] and 0 < failed.sum() < len(runs)
    ended = published.metrics["train_loss"].isna().groupby([published.metrics[key] for key in ("lr", "seed")]).sum()
    pd.testing.assert_series_equal(
        np.isfinite(runs["nan_step"]).groupby(level=["lr", "seed"]).sum(), ended, check_names=False
    )
    by_hand = [row["first_update"] < row["failure_step"] < math.inf for _, row in runs.iterrows()]
    claim = verdicts(published)("update", ANNOUNCES)
    assert claim.because.startswith(f"{sum(by_hand)} of {failed.sum()} runs")
    drawn = study.STUDY.figures(published)
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
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", ["study=exploding_symptoms"])
    assert (cfg.model.depth, cfg.model.width, cfg.train.max_steps) == (study.DEPTH, study.WIDTH, study.NUM_STEPS)
    assert (cfg.monitor.probes, cfg.monitor.batch_size) == (study.NUM_PROBES, study.NUM_IMAGES)
