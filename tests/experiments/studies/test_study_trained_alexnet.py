"""What the study of trained AlexNets says of movements that are known."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from experiments.archive import reference
from experiments.archive.tables import Collected
from experiments.studies import trained_alexnet as study
from gradscope import frames
from tests.helpers import ROOT

STEPS = np.arange(0, 81, 10)
AFTER = "After training the GSC of every unit of {} is within one order of magnitude of that before"
DURING = "At every record of training the GSC of every unit of {} is within one order of magnitude of that before"
FALLS = "By the end GSC of most units of {} has fallen"


def collected(paths, accuracies=((0.8, 0.81, 0.82), (0.7, 0.71, 0.72))):
    """Two networks with the movements ``paths`` = {layer: (seeds, steps)}; the second does not move."""
    parts, learned = [], []
    for number, model in enumerate(("moving", "still")):
        for seed in range(3):
            for index, (layer, values) in enumerate(paths.items()):
                logarithms = 0.3 * index + (
                    np.asarray(values)[seed] if model == "moving" else 1e-3 * (seed + 1) * STEPS / 80
                )
                columns = dict.fromkeys(frames.COLUMNS) | {"num_probes": 0, "num_samples": 8}
                columns |= {
                    "layer": layer,
                    "index": index,
                    "depth_from_output": max(2, len(paths) - 1) - index,
                    "quantity": "gsc",
                }
                columns |= {"log10_value": logarithms, "log10_stderr_probe": np.nan, "log10_stderr_sample": np.nan}
                made = frames.tidy(
                    {key: value for key, value in columns.items() if key not in ("value", "stderr_sample")}
                )
                parts.append(made.assign(model=model, seed=seed, step=STEPS))
            for step, accuracy in ((40, 0.1), (80, accuracies[number][seed]), (85, np.nan)):
                learned.append({"model": model, "seed": seed, "step": step, "epoch": 4.0, "test_accuracy": accuracy})
    return Collected(pd.concat(parts, ignore_index=True), pd.DataFrame(learned), {})


def path(end, spread=0.0):
    """A straight line from 0 to ``end``, its runs apart by ``spread`` at the end."""
    return [(end + spread * (seed - 1)) * STEPS / 80 for seed in range(3)]


def verdicts(*args):
    return {claim.says: claim for claim in study.claims(collected(*args))}


@pytest.mark.parametrize(
    ("end", "spread", "holds"),
    [
        (-0.5, 0.01, True),
        (0.5, 0.01, True),
        (-2.0, 0.01, False),
        (2.0, 0.01, False),
        (0.5, 1.0, None),
        (1.1, 0.5, None),
    ],
)
def test_one_order_of_magnitude_is_decided_by_the_interval(end, spread, holds):
    found = verdicts({"input": path(0.1), "conv": path(end, spread)})
    after = found[AFTER.format("moving")]
    assert after.holds is holds
    assert f"2 units, the farthest is the conv with log10 changed by {end:.2f}" in after.because
    assert found[AFTER.format("still")].holds is True
    assert found[DURING.format("moving")].holds is holds


@pytest.mark.parametrize(
    ("ends", "holds", "words"),
    [
        ((-0.3, -0.4, 0.2), True, "2 of 3 units have fallen in the mean, 2 with the whole interval; 1 have risen"),
        ((-0.3, 0.4, 0.2), False, "1 of 3 units have fallen in the mean, 1 with the whole interval; 2 have risen"),
    ],
)
def test_which_way_most_units_go(ends, holds, words):
    moved = dict(zip(("input", "conv1", "relu1", "logits"), (*ends, 0.0), strict=True))
    claim = verdicts({name: path(end, 0.01) for name, end in moved.items()})[FALLS.format("moving")]
    assert claim.holds is holds and words in claim.because
    unclear = verdicts({"input": path(-0.1, 1.0), "conv1": path(-0.3, 0.01), "logits": path(0)})[FALLS.format("moving")]
    assert unclear.holds is None


def test_the_answer_tells_what_rises_and_has_a_table_of_all_units():
    answer = study.answer(collected({"input": path(0.2, 0.01), "relu4": path(-0.5, 0.01)}))
    assert "the fourth ReLU (relu4) moved most and ends at 10^-0.50 times" in answer
    assert "rises only in the input of moving, +0.20 (" in answer
    assert "| relu4 | 2 (2 to 2) | 0.63 (" in answer and "| -0.50 (-0.52 to -0.48) | 2 (2 to 2) | 2 (" in answer
    falling = study.answer(collected({"input": path(-0.2, 0.01), "conv": [-v for v in path(0.3)]}))
    assert "rises only in the input of still" in falling and "input of moving" not in falling


def test_a_network_alone_has_no_rival():
    both = collected({"input": path(0.2, 0.01)})
    frame, metrics = (table[table["model"] == "moving"] for table in (both.frame, both.metrics))
    alone = Collected(frame, metrics, {})
    assert not any("accuracy" in claim.says for claim in study.claims(alone))
    assert study.answer(alone).startswith("moving reaches 81.0 % test accuracy in 4 epochs.")


def test_the_target_is_no_unit_that_could_move_and_step_0_no_record_after_it():
    found = verdicts({"input": path(0.1), "conv": path(0.2), "logits": path(3.0, 0.01)})
    assert "2 units, the farthest is the conv" in found[AFTER.format("moving")].because
    assert f"{2 * (len(STEPS) - 1)} intervals" in found[DURING.format("moving")].because


def test_how_far_runs_are_apart_before_and_after():
    """Deviations of runs at -1, 0, 1 and of three alike."""
    closing = [(seed - 1) * (1 - STEPS / 80) for seed in range(3)]
    answer = study.answer(collected({"input": closing}))
    assert "averaged over units, goes from 1.00 to 0.00. Of still" in answer


def test_an_excursion_counts_during_training_only():
    there_and_back = [np.where(STEPS == 40, 1.5, 0.0) + 0.01 * seed for seed in range(3)]
    found = verdicts({"input": path(0.1), "conv": there_and_back})
    assert found[AFTER.format("moving")].holds
    during = found[DURING.format("moving")]
    assert during.holds is False and "the conv at step 40" in during.because


def test_units_and_times():
    late = [np.where(STEPS > 60, 7.0, 0.0) + 0.01 * seed * STEPS for seed in range(3)]
    found = verdicts({"input": late, "conv": path(0.2)})
    assert found["The unit of moving that has moved most by the end is the same in every run"].holds
    early = "Most of the movement of the input's GSC of moving happens in the first quarter of training"
    assert found[early].holds is False
    quick = [np.where(STEPS > 0, 1.0, 0.0) * (1 + 0.01 * seed) for seed in range(3)]
    assert verdicts({"input": quick})[early].holds
    apart = [np.array([1, 0.1, 0.1])[seed] * STEPS / 80 for seed in range(3)]
    other = [np.array([0.1, 1, 1])[seed] * STEPS / 80 for seed in range(3)]
    where = verdicts({"input": apart, "conv": other})[
        "The unit of moving that has moved most by the end is the same in every run"
    ]
    assert where.holds is False and where.because == "the input by +1.00, the conv by +1.00, the conv by +1.00"


def test_accuracies_are_the_last_ones():
    says = "still reaches another test accuracy than moving with this recipe"
    claim = verdicts({"input": path(0.1)})[says]
    assert claim.holds and "moving 81.0 (" in claim.because and "difference -10.0 (-10.0 to -10.0)" in claim.because
    assert verdicts({"input": path(0.1)}, ((0.1, 0.5, 0.9), (0.2, 0.4, 0.8)))[says].holds is None


def test_the_reference_results():
    published = reference.load(ROOT / "results" / study.RESULTS)
    claims = {claim.says: claim for claim in study.claims(published)}
    assert len(claims) == 11
    gsc = published.frame.query("quantity == 'gsc' and model == 'alexnet_a_no_dropout' and layer == 'relu4'")
    ends = gsc.pivot(index="step", columns="seed", values="log10_value").iloc[[0, -1]].to_numpy()
    because = claims[AFTER.format("A without dropout")].because
    assert f"the fourth ReLU (relu4) with log10 changed by {(ends[1] - ends[0]).mean():.2f} (" in because
    figures = study.figures(published)
    assert list(figures) == ["gsc_over_training", "gsc_before_after", "learning", "gradient_norms"]
    for figure in figures.values():
        plt.close(figure)
    answer = study.answer(published)
    accuracy = published.metrics.dropna(subset="test_accuracy").groupby(["model", "seed"]).last()["test_accuracy"]
    for model, values in accuracy.groupby("model"):
        assert f"{study.NAMES[model]} reaches {100 * values.mean():.1f} %" in answer
