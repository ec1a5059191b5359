"""What the study of trained AlexNets says of movements that are known."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from experiments.archive import labels, reference
from experiments.archive.tables import Collected
from experiments.studies import trained_alexnet as study
from gradscope import frames
from tests.experiments.studies.claimed import only
from tests.helpers import ROOT

STEPS = np.arange(0, 81, 10)
# Words of claims about a network.
AFTER, DURING, FALLS = "After training", "At every record", "is lower"


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
    claims = study.STUDY.claims(collected(*args))
    return lambda word, model="moving": only(claims, word, f" {model} ")


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
    after = found(AFTER)
    assert after.holds is holds
    assert after.because.startswith("2 units") and float(re.search(r"the conv, (\S+) \(", after.because)[1]) == end
    assert found(AFTER, "still").holds is True
    assert found(DURING).holds is holds


@pytest.mark.parametrize(
    ("ends", "holds", "counts"),
    [((-0.3, -0.4, 0.2), True, ["2", "3", "2", "1"]), ((-0.3, 0.4, 0.2), False, ["1", "3", "1", "2"])],
)
def test_which_way_most_units_go(ends, holds, counts):
    """Units whose mean has fallen, all units, and those whose whole interval has fallen or risen."""
    moved = dict(zip(("input", "conv1", "relu1", "logits"), (*ends, 0.0), strict=True))
    claim = verdicts({name: path(end, 0.01) for name, end in moved.items()})(FALLS)
    assert claim.holds is holds and re.findall(r"\d+", claim.because) == counts
    unclear = verdicts({"input": path(-0.1, 1.0), "conv1": path(-0.3, 0.01), "logits": path(0)})(FALLS)
    assert unclear.holds is None


def test_the_answer_names_what_moves_and_the_details_have_all_units():
    made = collected({"input": path(0.2, 0.01), "relu4": path(-0.5, 0.01)})
    answer, details = study.STUDY.answer(made), study.STUDY.details(made)
    assert "10^-0.50 in the fourth ReLU (relu4) of moving" in answer and "1 of 2 units of moving" in answer
    assert "except for a rise in the input of moving, +0.200 (" in details
    assert "| relu4 | 1.995 (" in details and "| 0.631 (" in details
    assert "| -0.500 (-0.525 to -0.475) | 1.995 (" in details
    falling = study.STUDY.details(collected({"input": path(-0.2, 0.01), "conv": [-v for v in path(0.3)]}))
    assert "except for a rise in the input of still" in falling and "input of moving" not in falling


def test_a_network_alone_has_no_rival():
    both = collected({"input": path(0.2, 0.01)})
    frame, metrics = (table[table["model"] == "moving"] for table in (both.frame, both.metrics))
    alone = Collected(frame, metrics, {})
    assert not any("accuracy" in claim.says for claim in study.STUDY.claims(alone))
    assert study.STUDY.answer(alone).startswith("moving reaches 81.0 %")


def test_the_target_is_no_unit_that_could_move_and_step_0_no_record_after_it():
    found = verdicts({"input": path(0.1), "conv": path(0.2), "logits": path(3.0, 0.01)})
    assert found(AFTER).because.startswith("2 units") and "the conv" in found(AFTER).because
    assert found(DURING).because.startswith(f"intervals, one for each unit and record: {2 * (len(STEPS) - 1)};")


def test_how_far_runs_are_apart_before_and_after():
    """Deviations of runs at -1, 0, 1 and of three alike."""
    closing = [(seed - 1) * (1 - STEPS / 80) for seed in range(3)]
    assert "from 1.00 to 0.00 for moving" in study.STUDY.details(collected({"input": closing}))


def test_an_excursion_counts_during_training_only():
    there_and_back = [np.where(STEPS == 40, 1.5, 0.0) + 0.01 * seed for seed in range(3)]
    found = verdicts({"input": path(0.1), "conv": there_and_back})
    assert found(AFTER).holds
    during = found(DURING)
    assert during.holds is False and "the conv at step 40" in during.because


def test_units_and_times():
    same, early = "the same in every run", "first quarter"
    late = [np.where(STEPS > 60, 7.0, 0.0) + 0.01 * seed * STEPS for seed in range(3)]
    found = verdicts({"input": late, "conv": path(0.2)})
    assert found(same).holds and found(early).holds is False
    quick = [np.where(STEPS > 0, 1.0, 0.0) * (1 + 0.01 * seed) for seed in range(3)]
    assert verdicts({"input": quick})(early).holds
    apart = [np.array([1, 0.1, 0.1])[seed] * STEPS / 80 for seed in range(3)]
    other = [np.array([0.1, 1, 1])[seed] * STEPS / 80 for seed in range(3)]
    where = verdicts({"input": apart, "conv": other})(same)
    assert where.holds is False and where.because.endswith(": the input by +1.00, the conv by +1.00, the conv by +1.00")


def test_accuracies_are_the_last_ones():
    claim = verdicts({"input": path(0.1)})("accuracy", "still")
    assert claim.holds and "moving: 81.0 (" in claim.because and "difference: -10 (" in claim.because
    assert verdicts({"input": path(0.1)}, ((0.1, 0.5, 0.9), (0.2, 0.4, 0.8)))("accuracy", "still").holds is None


def test_the_reference_results():
    published = reference.load(ROOT / "results" / study.STUDY.results)
    claims = study.STUDY.claims(published)
    assert len(claims) == 11
    gsc = published.frame.query("quantity == 'gsc' and model == 'alexnet_a_no_dropout' and layer == 'relu4'")
    ends = gsc.pivot(index="step", columns="seed", values="log10_value").iloc[[0, -1]].to_numpy()
    because = only(claims, AFTER, "AlexNet A without dropout").because
    assert f"the fourth ReLU (relu4), {(ends[1] - ends[0]).mean():.1f} (" in because
    figures = study.STUDY.figures(published)
    assert list(figures) == ["gsc_over_training", "gsc_before_after", "learning", "gradient_norms"]
    for figure in figures.values():
        plt.close(figure)
    answer = study.STUDY.answer(published)
    accuracy = published.metrics.dropna(subset="test_accuracy").groupby(["model", "seed"]).last()["test_accuracy"]
    for model, values in accuracy.groupby("model"):
        assert f"{labels.NAMES[model]} reaches {100 * values.mean():.1f} %" in answer
