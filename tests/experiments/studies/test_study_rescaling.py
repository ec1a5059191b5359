"""The study of networks in other units against exact identities and an optimizer of torch."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

import gradscope as gs
from experiments.archive.tables import Collected
from experiments.studies import rescaling
from tests.experiments.studies.claimed import only
from tests.helpers import noise, seeded


def network(depth=4, activation="relu", **kwargs):
    kwargs = {"out_features": 3} | kwargs
    return gs.models.MLP(depth=depth, width=12, activation=activation, generator=seeded(0), **kwargs).double()


def values(frame, quantity, **columns):
    rows = frame[frame["quantity"] == quantity]
    for name, value in columns.items():
        rows = rows[rows[name] == value]
    return rows["value"].to_numpy()


def measured(factor, **kwargs):
    arguments = {"steps": 5, "learning_rate": 0.05} | kwargs
    return rescaling.measure(network(), noise(16, 12), generator=seeded(1), factor=factor, **arguments)


def test_rescaled_layers_carry_the_factor_of_their_depth():
    model, x = network(), noise(16, 12)
    other, factors = rescaling.rescaled(model, 2.0)
    assert factors == [1 / 16, 2, 2, 2, 2]
    ours, theirs = x, x
    for number, (layer, twin) in enumerate(zip(model.layers, other.layers, strict=True)):
        ours, theirs = layer(ours), twin(theirs)
        assert torch.equal(theirs, ours * 2.0 ** (number - 4))
    assert torch.equal(other(x), model(x))


def test_powers_of_two_train_bit_for_bit_and_others_to_rounding():
    assert not values(measured(2.0), "loss_difference").any()
    assert values(measured(1.5), "loss_difference").max() < 1e-13
    apart = measured(2.0)
    assert abs(values(apart, "loss", variant=rescaling.SAME_RATE) - values(apart, "loss", variant="plain")).max() > 1e-6


def test_descent_is_that_of_a_torch_optimizer():
    model, x = network(), noise(16, 12)
    labels = torch.arange(16) % 3
    rates = [0.1, 0.2, 0.05, 0.1, 0.3]
    losses = rescaling.descend(model, x, labels, rates, steps=4)
    assert torch.equal(model(x), network()(x)), "the model is left as it is"
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(model.parameters(), rates, strict=True)]
    optimizer = torch.optim.SGD(groups)
    for expected in losses:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), labels)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        loss.backward()
        optimizer.step()


def test_a_descent_that_leaves_the_range_of_numbers_ends():
    losses = rescaling.descend(network(), noise(16, 12), torch.arange(16) % 3, [1e200] * 5, steps=6)
    assert len(losses) == 7 and np.isfinite(losses[0]) and losses[-1] == np.inf
    assert rescaling._distance([1.0, np.inf], [1.0, np.inf]).tolist() == [0.0, np.inf]


def test_raw_gradients_are_those_of_finite_differences():
    model, x, labels = network(depth=2), noise(3, 12), torch.tensor([0, 2, 1])
    lengths = rescaling.raw_gradients(model, x, labels)
    h = model.layers[0](x).detach()
    gradient = torch.zeros_like(h)
    for place in np.ndindex(*h.shape):
        ends = []
        for sign in (1, -1):
            moved = h.clone()
            moved[place] += sign * 1e-6
            ends.append(functional.cross_entropy(model.head(model.layers[1](moved)), labels).item())
        gradient[place] = (ends[0] - ends[1]) / 2e-6
    assert lengths[0] == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_gradients_grow_and_coefficients_stay():
    frame = measured(4.0)
    plain, other = (values(frame, "log10_raw_gradient", variant=v) for v in (rescaling.PLAIN, rescaling.RESCALED))
    np.testing.assert_allclose(10 ** (other - plain), [4.0**4, 4.0**3, 4.0**2, 4.0])
    assert abs(values(frame, "ratio_error")).max() < 1e-12
    assert abs(values(frame, "gsc_difference")).max() < 1e-12
    coefficients = [values(frame, "gsc", variant=v) for v in (rescaling.PLAIN, rescaling.RESCALED)]
    np.testing.assert_allclose(*coefficients, rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (network(activation="tanh"), "Only a ReLU network"),
        (network(norm="layer"), "Only a ReLU network"),
        (network(out_features=None), "Only a ReLU network"),
        (network(bias=True), "Only a ReLU network"),
        (torch.nn.Linear(12, 3), "got Linear"),
    ],
)
def test_what_cannot_be_rescaled_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        rescaling.measure(model, noise(4, 12), generator=seeded(1), factor=2.0, steps=1, learning_rate=0.1)


@pytest.fixture(scope="module")
def collected():
    runs = [measured(factor, learning_rate=0.02).assign(factor=factor, seed=0) for factor in (1.5, 4.0)]
    runs += [run.assign(seed=1, value=run["value"] * 1.001) for run in runs]  # a second seed, near the first
    return Collected(pd.concat(runs, ignore_index=True), None, {})


def changed(collected, quantity, value, variant=None):
    """The frame with another value wherever this quantity stands."""
    frame = collected.frame.copy()
    chosen = frame["quantity"] == quantity
    frame.loc[chosen if variant is None else chosen & (frame["variant"] == variant), "value"] = value
    return Collected(frame, None, {})


def test_claims_and_answer_of_what_is_measured(collected):
    found = {claim.says: claim.verdict for claim in rescaling.STUDY.claims(collected)}
    assert list(found.values()) == ["checked", "checked", "checked", "supported", "contradicted"]
    answer = rescaling.STUDY.answer(collected)
    assert answer.startswith("No.") and "R = 4 per layer" in answer


@pytest.mark.parametrize(("quantity", "place"), [("loss_difference", 0), ("ratio_error", 1), ("gsc_difference", 2)])
def test_an_identity_that_fails_is_a_contradiction(collected, quantity, place):
    broken = changed(collected, quantity, 1e-3)
    verdicts = [claim.verdict for claim in rescaling.STUDY.claims(broken)]
    assert [verdict == "contradicted" for verdict in verdicts[:3]] == [number == place for number in range(3)]
    assert not rescaling.STUDY.answer(broken).startswith("No.")
    (figure,) = rescaling.STUDY.figures(broken).values()
    titles = [ax.get_title() for ax in figure.axes]
    words = (
        "training, step sizes rescaled: they differ",
        "raw gradients: not as R says",
        "coefficients: they differ",
    )
    assert words[place] in titles
    plt.close(figure)


def test_a_loss_that_jumps_or_stays_is_no_learning(collected):
    assert only(rescaling.STUDY.claims(changed(collected, "loss", 2.0, rescaling.PLAIN)), "learns").holds is None
    frame = collected.frame
    rising = changed(collected, "loss", 2.0 + 0.2 * frame["index"], rescaling.PLAIN)
    claim = only(rescaling.STUDY.claims(rising), "learns")
    assert claim.holds is False and "10.0 %" in claim.because


def test_the_figure_has_bands_of_one_standard_deviation(collected):
    (figure,) = rescaling.STUDY.figures(collected).values()
    plain = collected.frame.query("quantity == 'loss' and variant == 'plain' and factor == 4")
    loss = plain[plain["index"] == 5]["value"]
    top = max(path.vertices[:, 1].max() for path in figure.axes[2].collections[0].get_paths())
    first = plain[plain["index"] == 0]["value"]
    assert top == pytest.approx(first.mean() + first.std())
    assert figure.axes[2].get_lines()[0].get_ydata()[5] == pytest.approx(loss.mean())
    plt.close(figure)
