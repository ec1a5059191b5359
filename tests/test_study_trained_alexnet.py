"""What the study of trained AlexNets says of movements that are known."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from experiments import reference
from experiments.collect import Collected
from experiments.studies import trained_alexnet as study
from gradscope import frames

ROOT = Path(__file__).parent.parent
STEPS = np.arange(0, 81, 10)
AFTER = "After training the {} of every unit of {} is within one order of magnitude of that before"
DURING = "The {} of {} is within one order of magnitude of that before at every record during training"


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
                columns |= {"layer": layer, "index": index, "depth_from_output": 2 - index, "quantity": "gsc"}
                columns |= {"log10_value": logarithms, "log10_stderr_probe": np.nan, "log10_stderr_sample": np.nan}
                made = frames.tidy(
                    {key: value for key, value in columns.items() if key not in ("value", "stderr_sample")}
                )
                parts.append(made.assign(model=model, seed=seed, step=STEPS))
            for step, accuracy in ((40, 0.1), (80, accuracies[number][seed]), (85, np.nan)):
                learned.append({"model": model, "seed": seed, "step": step, "test_accuracy": accuracy})
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
    after = found[AFTER.format("GSC", "moving")]
    assert after.holds is holds
    assert f"2 units, the farthest is conv with log10 changed by {end:.2f}" in after.because
    assert found[AFTER.format("GSC", "still")].holds is True
    assert found[DURING.format("GSC", "moving")].holds is holds


@pytest.mark.parametrize(("end", "squared", "plain"), [(-1.5, False, True), (-2.5, False, False), (-0.5, True, True)])
def test_an_order_of_magnitude_depends_on_the_convention(end, squared, plain):
    """Half of the logarithm is that of the square root."""
    found = verdicts({"input": path(0.1), "conv": path(end, 0.01)})
    for says in (AFTER, DURING):
        assert found[says.format("GSC", "moving")].holds is squared
        assert found[says.format("GSC without the square", "moving")].holds is plain
        assert f"{end / 2:.2f} (" in found[says.format("GSC without the square", "moving")].because


def test_the_target_is_no_unit_that_could_move_and_step_0_no_record_after_it():
    found = verdicts({"input": path(0.1), "conv": path(0.2), "logits": path(3.0, 0.01)})
    assert "2 units, the farthest is conv" in found[AFTER.format("GSC", "moving")].because
    assert f"{2 * (len(STEPS) - 1)} intervals" in found[DURING.format("GSC", "moving")].because


def test_how_far_runs_are_apart_before_and_after():
    """Deviations of runs at -1, 0, 1 and of three alike."""
    closing = [(seed - 1) * (1 - STEPS / 80) for seed in range(3)]
    answer = study.answer(collected({"input": closing}))
    assert "averaged over units, goes from 1.00 to 0.00. still" in answer


def test_an_excursion_counts_during_training_only():
    there_and_back = [np.where(STEPS == 40, 1.5, 0.0) + 0.01 * seed for seed in range(3)]
    found = verdicts({"input": path(0.1), "conv": there_and_back})
    assert found[AFTER.format("GSC", "moving")].holds
    during = found[DURING.format("GSC", "moving")]
    assert during.holds is False and "conv at step 40" in during.because


def test_extreme_coefficients_units_and_times():
    late = [np.where(STEPS > 60, 7.0, 0.0) + 0.01 * seed * STEPS for seed in range(3)]
    found = verdicts({"input": late, "conv": path(0.2)})
    assert found["GSC of moving passes the monitor's threshold of 10^6, up or down, at no record"].holds is False
    assert found["GSC of still passes the monitor's threshold of 10^6, up or down, at no record"].holds
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
    assert where.holds is False and where.because == "input by +1.00, conv by +1.00, conv by +1.00"


def test_accuracies_are_the_last_ones():
    says = "still reaches another test accuracy than moving with this recipe"
    claim = verdicts({"input": path(0.1)})[says]
    assert claim.holds and "moving 81.0 (" in claim.because and "difference -10.0 (-10.0 to -10.0)" in claim.because
    assert verdicts({"input": path(0.1)}, ((0.1, 0.5, 0.9), (0.2, 0.4, 0.8)))[says].holds is None


def test_the_reference_results():
    published = reference.load(ROOT / "results" / study.RESULTS)
    assert len(study.claims(published)) == 15
    gsc = published.frame.query("quantity == 'gsc' and model == 'alexnet_a_no_dropout' and layer == 'relu4'")
    ends = gsc.pivot(index="step", columns="seed", values="log10_value").iloc[[0, -1]].to_numpy()
    change = f"{(ends[1] - ends[0]).mean():.2f} ("
    assert change in next(
        c.because for c in study.claims(published) if c.says == AFTER.format("GSC", gsc["model"].iloc[0])
    )
    figures = study.figures(published)
    assert list(figures) == ["gsc_over_training", "gsc_before_after", "learning", "gradient_norms"]
    for figure in figures.values():
        plt.close(figure)
    answer = study.answer(published)
    accuracy = published.metrics.dropna(subset="test_accuracy").groupby(["model", "seed"]).last()["test_accuracy"]
    for model, values in accuracy.groupby("model"):
        assert f"{model} reaches {100 * values.mean():.1f} % test accuracy" in answer
