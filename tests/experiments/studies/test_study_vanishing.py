"""The study of vanishing gradients against the chain rule, in closed form, and on frames of known factors."""

import functools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import gradscope as gs
from experiments.archive.tables import Collected
from experiments.evidence.means import geometric_mean
from experiments.studies import vanishing
from experiments.studies.vanishing import chains, numbers
from gradscope import frames
from gradscope.frames import observed
from tests.experiments.studies.claimed import only
from tests.helpers import noise, seeded

DEPTH = 12
# A factor a layer of every network, and of the sigmoid network with larger weights.
STEADY = dict.fromkeys(numbers.NETWORKS, 1.0)
LARGER = {2: 0.4, 4: 0.6, 8: 0.9, 16: 1.3}


def sigmoid_network(**kwargs):
    arguments = {"depth": 4, "width": 12, "activation": "sigmoid", "out_features": 3} | kwargs
    return gs.models.MLP(**arguments, generator=seeded(0)).double()


@pytest.fixture(scope="module")
def frame():
    return vanishing.measure(sigmoid_network(), noise(16, 12), generator=seeded(1))


def test_the_chain_by_hand_is_the_derivative():
    def loss(weights):
        a = chains.INPUT
        for w in weights:
            a = 1 / (1 + math.exp(-w * a))
        return 0.5 * (chains.TARGET - a) ** 2

    by_hand = chains.by_hand(chains.INPUT, chains.TARGET, chains.WEIGHTS)
    assert by_hand["E"] == pytest.approx(loss(chains.WEIGHTS), rel=1e-14)
    assert list(by_hand)[:3] == ["a1", "a2", "y"]
    for k, name in enumerate(chains.DERIVATIVES):
        h, ends = 1e-5, []
        for sign in (1, -1):
            moved = list(chains.WEIGHTS)
            moved[k] += sign * h
            ends.append(loss(moved))
        assert by_hand[name] == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-7)


def test_by_hand_and_measured_agree_sign_and_all(frame):
    found = frame[frame["quantity"] == "by_autograd"].set_index("layer")["value"]
    by_hand = chains.by_hand(chains.INPUT, chains.TARGET, chains.WEIGHTS)
    assert found[chains.DERIVATIVES[0]] > 0 > found[chains.DERIVATIVES[2]]
    for name in chains.DERIVATIVES:
        assert found[name] == pytest.approx(by_hand[name], rel=1e-14)
    assert frame.loc[frame["quantity"] == "relative_difference", "value"].max() < 1e-14
    table = chains.by_hand_table(frame)
    assert f"| a1 | {by_hand['a1']:.10g} |  |" in table
    assert f"| dE/dw3 | {by_hand['dE/dw3']:.10g} | {by_hand['dE/dw3']:.10g} |" in table


def test_chains(frame):
    """With w = 8, b = -4 the units stay at 1/2, of slope 8 / 4; with w = 1 factors are multiplied here."""
    plain, held = chains.LONG
    number = np.arange(1, chains.UNITS + 1)
    np.testing.assert_allclose(chains.rows(frame, "log10_chain", held), number * math.log10(2), rtol=1e-12)
    h, total, expected = 0.5, 0.0, []
    for _ in number:
        h = 1 / (1 + math.exp(-h))
        total += math.log10(h * (1 - h))
        expected.append(total)
    np.testing.assert_allclose(chains.rows(frame, "log10_chain", plain), expected, rtol=1e-12)
    np.testing.assert_allclose(chains.rows(frame, "log10_chain_bound", plain), -number * math.log10(4))
    assert chains.excess(frame, plain) < 0 and chains.last(frame, "log10_chain", plain) == pytest.approx(total)


@pytest.mark.parametrize("scale", [1, 8])
def test_gradients_of_layers_are_those_of_autograd(frame, scale):
    model = sigmoid_network()
    with torch.no_grad():
        for layer in model.layers:
            layer.linear.weight *= scale
    y = torch.randint(3, (16,), generator=seeded(1))
    torch.nn.functional.cross_entropy(model(noise(16, 12)), y).backward()
    rows = frame[(frame["quantity"] == "gradient_norm") & (frame["weight_scale"] == scale)].set_index("layer")["value"]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert rows[name] == pytest.approx(float(module.weight.grad.norm()), rel=1e-10)


def test_only_a_plain_sigmoid_network_gets_larger_weights_and_chains(frame):
    assert set(frame["weight_scale"]) == {1, *numbers.SCALES}
    for other in ({"norm": "layer"}, {"activation": "tanh"}):
        own = vanishing.measure(sigmoid_network(**other), noise(16, 12), generator=seeded(1))
        assert set(own["weight_scale"]) == {1}
        assert set(own["quantity"]) == {"gradient_norm", "gsc", "preactivation_std"}


def test_mean_field_of_a_sigmoid_layer_is_the_expectation_by_sampling():
    """v E[s'^2] where the length settles: half a million draws."""
    z, q = np.random.default_rng(0).normal(size=500_000), 1.0
    for _ in range(50):
        q = 4 * np.mean(1 / (1 + np.exp(-math.sqrt(q) * z)) ** 2)
    s = 1 / (1 + np.exp(-math.sqrt(q) * z))
    assert numbers.in_theory(2) == pytest.approx(2 * math.sqrt(np.mean((s * (1 - s)) ** 2)), rel=2e-3)


def with_factors(networks=None, larger=None, gsc=0.1, chain=-0.7, spread=0.01):
    """A frame whose gradients change by these factors a layer, its two seeds apart by ``spread``."""
    parts = [part.copy() for part in measured_chains()]
    held = list(chains.LONG)[1]
    for part in parts:
        chosen = (part["quantity"] == "log10_chain") & (part["layer"] == held)
        part.loc[chosen, "value"] = chain * part.loc[chosen, "index"]
    parts = [part.assign(seed=0, activation="sigmoid", norm="none", weight_scale=1) for part in parts]
    cases = [(key, 1, factor) for key, factor in (STEADY | (networks or {})).items()]
    cases += [(numbers.SIGMOID, scale, factor) for scale, factor in (LARGER | (larger or {})).items()]
    columns = {"seed": [], "activation": [], "norm": [], "weight_scale": []}
    slopes = {"gradient_norm": [], "gsc": []}
    for (activation, norm), scale, factor in cases:
        for seed in range(2):
            for name, value in zip(columns, (seed, activation, norm, scale), strict=True):
                columns[name].append(value)
            slopes["gradient_norm"].append(-math.log10(factor) + spread * (seed - 0.5))
            slopes["gsc"].append(math.log10(gsc) + 1e-3 * seed)
    plain = [number for number, scale in enumerate(columns["weight_scale"]) if scale == 1]
    parts.append(profiles("gradient_norm", slopes["gradient_norm"], np.arange(DEPTH), "layers.{}.linear", columns))
    of_plain = {name: [values[number] for number in plain] for name, values in columns.items()}
    growth = [slopes["gsc"][number] for number in plain]
    parts.append(profiles("gsc", growth, np.arange(DEPTH, -1, -1), "layers.{}", of_plain))
    parts.append(observed("preactivation_std", [0.5] * len(plain), index=DEPTH, **of_plain))
    return Collected(pd.concat(parts, ignore_index=True), None, {})


@functools.cache
def measured_chains():
    return [chains.compared(), *(chains.long_chain(name) for name in chains.LONG)]


def profiles(quantity, slopes, steps, names, columns):
    """One tidy frame of networks whose logarithms change by a slope each step."""
    index, num = np.arange(len(steps)), len(slopes)
    frame = frames.tidy(
        {
            "layer": [names.format(k) for k in index] * num, "index": np.tile(index, num),
            "depth_from_output": np.tile(index[::-1], num), "target": "head" if quantity == "gsc" else None,
            "quantity": quantity, "log10_value": np.concatenate([slope * steps for slope in slopes]),
            "log10_stderr_probe": np.nan, "log10_stderr_sample": np.nan, "num_samples": 8,
        }
    )  # fmt: skip
    return frame.assign(**{name: np.repeat(values, len(index)) for name, values in columns.items()})


def test_the_factor_a_layer_and_its_joint_interval():
    made = with_factors({("tanh", "none"): 0.5}).frame
    expected = geometric_mean(0.5 * 10.0 ** np.array([0.005, -0.005]), comparisons=len(numbers.NETWORKS))
    found = numbers.rate(made, "tanh", "none")
    assert (found.value, found.low, found.high) == pytest.approx((0.5, expected.low, expected.high))
    assert numbers.layers(made) == DEPTH


QUARTER, GSC, CHAIN, LARGEST, SMALLEST = (
    ("a quarter or less",),
    ("GSC",),
    ("for any weights",),
    ("256 / n",),
    ("4 / n",),
)


def verdicts(*args, **kwargs):
    claims = vanishing.STUDY.claims(with_factors(*args, **kwargs))
    return lambda *words: only(claims, *words).verdict


def keeps(network):
    return (f"In the network {network}, gradient norms",)


def test_claims_follow_the_factors():
    tight, decided = {"spread": 1e-4}, (QUARTER, GSC, CHAIN, LARGEST, SMALLEST)
    found = verdicts({numbers.SIGMOID: 0.2, ("relu", "batch"): 2.0}, **tight)
    assert {found(*claim) for claim in decided} == {"supported"}
    assert found(*keeps("sigmoid")) == found(*keeps("relu+batch")) == "contradicted"
    assert found(*keeps("selu+layer")) == "supported"
    assert found("by hand") == found("with weight 1") == "checked"
    other = verdicts({numbers.SIGMOID: 0.3}, {2: 0.2, 16: 0.9}, gsc=1.3, chain=0.1, **tight)
    assert {other(*claim) for claim in decided} == {"contradicted"}
    unclear = verdicts({numbers.SIGMOID: 0.25, ("tanh", "none"): 10 ** (1 / DEPTH)}, {2: 0.25, 16: 1.0}, **tight)
    assert {unclear(*claim) for claim in (QUARTER, LARGEST, SMALLEST, keeps("tanh"))} == {"undecided"}


def test_the_answer_follows_the_verdicts():
    made = with_factors({numbers.SIGMOID: 0.2, ("relu", "batch"): 2.0}, spread=1e-4)
    yes, details = vanishing.STUDY.answer(made), vanishing.STUDY.details(made)
    assert yes.startswith("Yes") and "not decide alone" in yes and "1.300 for 256 / n" in details
    assert vanishing.STUDY.answer(with_factors({numbers.SIGMOID: 0.3}, spread=1e-4)).startswith("No")
    bound = with_factors({numbers.SIGMOID: 0.2, ("sigmoid", "batch"): 0.2}, {2: 0.2}, spread=1e-4)
    assert "not decide alone" not in vanishing.STUDY.answer(bound)
    unclear = with_factors({numbers.SIGMOID: 0.25})
    assert "cannot tell" in vanishing.STUDY.answer(unclear)


def test_figures_hold_what_the_frame_says():
    drawn = vanishing.STUDY.figures(with_factors({numbers.SIGMOID: 0.2}, spread=1e-4))
    points = drawn["weights"].axes[0].get_lines()[0]
    np.testing.assert_allclose(points.get_xdata(), [1, 4, 16, 64, 256])
    np.testing.assert_allclose(points.get_ydata().astype(float), [0.2, *LARGER.values()], rtol=1e-6)
    for figure in drawn.values():
        plt.close(figure)
