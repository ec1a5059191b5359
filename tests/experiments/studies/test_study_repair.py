"""The study of repaired networks: its networks, its training, and claims that planted numbers decide."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from experiments.archive.tables import Collected
from experiments.data.batches import digits_8x8
from experiments.studies import repair
from experiments.studies.repair import BAD, CASES, REPAIRED, STANDARD, VARIANTS
from gradscope.frames import observed
from tests.helpers import seeded

OPTIONS = {"depth": 2, "width": 16}


def network(case, **options):
    return repair.network(case, **OPTIONS, generator=seeded(), **options)


@pytest.mark.parametrize("case", CASES)
def test_bad_and_standard_networks_differ_by_the_factors_that_the_page_states(case):
    bad, standard = (dict(network(case, standard=one).named_parameters()) for one in (False, True))
    factor = {"plain-large": 3.0, "plain-small": 0.1**0.5, "residual": 3.0, "transformer": 8.0}[case]
    for name, weight in bad.items():
        changed = "query" in name if case == "transformer" else name.endswith("linear.weight")
        torch.testing.assert_close(weight, standard[name] * (factor if changed else 1.0), msg=name)


def test_an_unknown_case_is_named():
    with pytest.raises(ValueError, match=r"case must be one of plain-large, .*, got 'wide'"):
        network("wide")


def test_training_is_that_of_a_loop_by_hand():
    model = network("plain-large", standard=True)
    digits = torch.randn(12, 64, generator=seeded(1)), torch.arange(12) % 10
    order = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [0, 8, 2, 11]])
    trained = repair.descend(model, digits, order, 0.1)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    speeds = [torch.zeros_like(w) for w in weights]
    names = [name for name, _ in model.named_parameters()]
    for chosen in order:
        output = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), digits[0][chosen])
        gradients = torch.autograd.grad(functional.cross_entropy(output, digits[1][chosen]), weights)
        speeds = [0.9 * speed + gradient for speed, gradient in zip(speeds, gradients, strict=True)]
        weights = [(w - 0.1 * v).detach().requires_grad_() for w, v in zip(weights, speeds, strict=True)]
    for expected, found in zip(weights, trained.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["plain-large", "transformer"])
def test_a_run_has_all_rows_and_a_repair_brings_gsc_nearer(case):
    model, x = network(case), digits_8x8(64, (), generator=seeded(2))
    before = [p.clone() for p in model.parameters()]
    frame = repair.measure(
        model, x, generator=seeded(3), case=case, **OPTIONS, steps=2, train_batch_size=8, learning_rates=[0.01, 0.1]
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    counts = frame.groupby("quantity").size()
    assert counts.to_dict() == {"distance": 2, "learning_rate": 3, "test_accuracy": 3, "train_loss": 3}
    distance = frame[frame["quantity"] == "distance"].set_index("variant")["value"]
    assert distance[REPAIRED] < distance[BAD]


def planted(losses, spread=0.05):
    """A frame in which the variants have these training losses, and accuracies of 1 minus a tenth of the loss."""
    generator = np.random.default_rng(0)
    parts = []
    for case in CASES:
        for seed in range(6):
            common = np.exp(spread * generator.standard_normal())
            for variant in VARIANTS:
                loss = losses[variant] * common * np.exp(0.1 * spread * generator.standard_normal())
                for name, value in (("train_loss", loss), ("test_accuracy", 1 - loss / 10), ("learning_rate", 0.1)):
                    parts.append(observed(name, value, variant=variant, case=case, seed=seed))
                if variant != STANDARD:
                    parts.append(observed("distance", loss, variant=variant, case=case, seed=seed))
    return Collected(pd.concat(parts, ignore_index=True), None, {})


PLANTED = {
    "repair helps": ({BAD: 1.0, REPAIRED: 0.5, STANDARD: 0.5}, [True, True, True, True]),
    "repair hurts": ({BAD: 0.5, REPAIRED: 1.0, STANDARD: 0.5}, [False, False, False, False]),
    "repair helps, standard is better": ({BAD: 1.0, REPAIRED: 0.5, STANDARD: 0.2}, [True, True, True, False]),
}


@pytest.mark.parametrize(("losses", "verdicts"), PLANTED.values(), ids=PLANTED)
def test_claims_of_planted_losses(losses, verdicts):
    collected = planted(losses)
    assert [claim.holds for claim in repair.STUDY.claims(collected)] == verdicts * len(CASES)
    worse = losses[REPAIRED] > losses[BAD]
    assert f"lowers the training loss of {0 if worse else 4} of 4" in repair.STUDY.answer(collected)


def test_no_difference_is_undecided():
    found = repair.STUDY.claims(planted(dict.fromkeys(VARIANTS, 0.5)))
    assert [claim.holds for claim in found[:4]] == [None, None, None, True]


def test_the_figure_shows_seeds_and_means():
    collected = planted({BAD: 1.0, REPAIRED: 0.5, STANDARD: 0.4})
    (figure,) = repair.STUDY.figures(collected).values()
    left = figure.axes[0]
    dots = [line for line in left.get_lines() if line.get_marker() == "."]
    frame = collected.frame.query("quantity == 'train_loss' and case == 'plain-large' and variant == 'bad'")
    assert sorted(dots[0].get_ydata()) == pytest.approx(sorted(frame["value"]))
    means = [container.lines[0] for container in left.containers]
    assert means[0].get_ydata()[0] == pytest.approx(float(np.exp(np.log(frame["value"]).mean())))
    assert len(dots) == 12 and len(means) == 3
    plt.close(figure)
