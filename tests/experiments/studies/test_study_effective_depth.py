"""The study of effective depth: what it measures, on a network that is known; what it claims, on frames made up."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import gradscope as gs
from experiments.archive import reference
from experiments.archive.tables import Collected
from experiments.data import batches
from experiments.studies import effective_depth as asked
from experiments.studies.effective_depth import figures as drawn
from experiments.studies.effective_depth import measurement, numbers
from experiments.studies.effective_depth.measurement import TOLERANCES
from gradscope import frames
from gradscope.frames import observed
from tests.helpers import ROOT

OPTIONS = {"steps": 6, "train_batch_size": 16}


def network(**options):
    make = {"depth": 3, "width": 8, "activation": "selu", "in_features": 64, "out_features": 10} | options
    return gs.models.MLP(**make, generator=torch.Generator().manual_seed(0))


def measured(model, **options):
    x = batches.digits_8x8(8, (64,), generator=torch.Generator().manual_seed(1))
    return measurement.measure(model, x, generator=torch.Generator().manual_seed(2), **(OPTIONS | options))


def test_digits_are_standardized_and_labeled():
    pixels, labels = batches.digits_8x8_with_labels()
    assert pixels.shape == (1797, 64) and labels.shape == (1797,)
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-5) and float(pixels.std()) == pytest.approx(1, abs=1e-3)
    # The first digits of the set are 0, 1, 2, ...; a zero has an empty middle.
    assert labels[:10].tolist() == list(range(10))
    assert pixels[0].reshape(8, 8)[3:5, 3:5].max() < pixels[0].max() / 2


def test_the_rate_with_the_lowest_loss_is_kept_and_the_network_left_alone():
    model = network()
    before = copy.deepcopy(model.state_dict())
    frame = frames.check(measured(model, learning_rates=[1e-6, 1e-2, 1e6]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    values = frame.groupby("quantity")["value"].first()
    assert values["learning_rate"] == 1e-2
    pixels, labels = batches.digits_8x8_with_labels()
    training = torch.arange(len(labels)) % 4 != 3
    at_first = torch.nn.functional.cross_entropy(model(pixels[training]), labels[training])
    assert values["train_loss"] < float(at_first.detach()) - 0.3 and 0 <= values["test_accuracy"] <= 1
    steps = frame[frame["quantity"] == "effective_depth"]["step"].unique().tolist()
    assert steps == [1, 2, 4, 6]
    final = frame[(frame["quantity"] == "effective_depth") & (frame["step"] == 6)].set_index("tolerance")["value"]
    shares = frame[frame["quantity"] == "contribution"].set_index("index")["log10_value"]
    for tolerance in TOLERANCES:
        assert final[tolerance] == shares[shares >= math.log10(tolerance)].index.max()
    taylor = frame[frame["quantity"] == "taylor_loss"].set_index("index")["value"]
    assert len(taylor) == 5 and taylor[0] == pytest.approx(taylor[1])  # the head is linear


def test_a_training_that_fails_is_a_result():
    frame = frames.check(measured(network(), learning_rates=[1e9]))
    assert frame["quantity"].tolist() == ["train_loss"] and np.isinf(frame["value"]).all()


def test_descent_is_that_of_torch_by_hand():
    model, digits = network(), batches.digits_8x8_with_labels()
    order = torch.arange(64).reshape(2, 32)
    states = measurement.descend(model, digits, order, 0.01)
    by_hand, velocity = copy.deepcopy(model), [torch.zeros_like(p) for p in model.parameters()]
    for chosen in order:
        loss = torch.nn.functional.cross_entropy(by_hand(digits[0][chosen]), digits[1][chosen])
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for weight, v, gradient in zip(by_hand.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(gradient)
                weight.sub_(0.01 * v)
    for ours, theirs in zip(states[-1].parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


PLAIN, SKIPS = ("tanh", "layer", "none"), ("tanh", "layer", "identity")
INDEPENDENT = (
    "If Jacobians of layers before training and their changes by training had independent directions, the effective "
    "depth of every network would change by at most 1 layer"
)


def made_up(depth_used, replaced, *, seeds=4, failed=()):
    """A frame in which networks use so many layers and stand so many replaced ones, one layer more in odd seeds."""
    parts = []
    for (key, depth), used in depth_used.items():
        for seed in range(seeds):
            tight, numbered = TOLERANCES[0], [("train_loss", 0.1, 8, math.nan), ("test_accuracy", 0.9, 8, math.nan)]
            for step, part in ((1, 0.25), (8, 1.0)):
                more = seed % 2 if step == 8 else 0
                ends = (f"effective_depth{end}" for end in ("", "_low", "_high"))
                numbered += [(quantity, part * used + more, step, tight) for quantity in ends]
                numbered.append(("effective_depth", 1.0, step, TOLERANCES[1]))
            numbered.append(("independent_depth", used + seed % 2, 8, tight))
            quantities, values, steps, tolerances = map(list, zip(*numbered, strict=True))
            rows = [observed(quantities, values, step=steps, tolerance=tolerances)]
            rows.append(observed("change", np.ones(depth), index=np.arange(1, depth + 1), step=8))
            losses = np.where(np.arange(depth + 1) <= replaced[key, depth], 0.5, 5.0)
            rows.append(observed("taylor_loss", losses, index=np.arange(depth + 1), step=8))
            rows.append(observed("contribution", np.ones(3), index=np.arange(3), step=8))
            columns = dict(zip(numbers.NETWORK, (*key, depth), strict=True))
            parts.append(pd.concat(rows).assign(seed=seed, **columns))
    for key, depth in failed:
        columns = dict(zip(numbers.NETWORK, (*key, depth), strict=True))
        parts.append(observed("train_loss", math.inf, step=8).assign(seed=0, **columns))
    return SimpleNamespace(frame=pd.concat(parts, ignore_index=True), metrics=None, manifest={})


def verdicts(collected):
    return {claim.says: claim.verdict for claim in asked.claims(collected)}


def test_claims_follow_what_was_put_in():
    used = {(PLAIN, 10): 9, (PLAIN, 50): 40, (SKIPS, 10): 6, (SKIPS, 50): 8}
    stands = {(PLAIN, 10): 1, (PLAIN, 50): 3, (SKIPS, 10): 5, (SKIPS, 50): 47}
    found = verdicts(made_up(used, stands, failed=[(("selu", "none", "identity"), 50)]))
    assert found["tanh+layer, depth 50: the effective depth is below half the number of layers"] == "contradicted"
    residual = "tanh+layer, residual, depth 50"
    assert found[f"{residual}: the effective depth is below half the number of layers"] == "supported"
    equal = "in every run, the effective depth equals the number of layers (10 including the head)"
    assert found[f"tanh+layer, depth 10: {equal}"] == "contradicted"
    assert found["tanh+layer, depth 50: the effective depth grows during training"] == "supported"
    assert found["tanh+layer, depth 50: the effective depth is larger than at depth 10"] == "supported"
    assert found["tanh+layer, depth 50: skip connections increase the effective depth"] == "contradicted"
    replaced = "a first-order expansion can replace more than half of the layers"
    assert found[f"tanh+layer, depth 50: {replaced}"] == "contradicted"
    assert found[f"{residual}: {replaced}"] == "supported"
    assert found[INDEPENDENT] == "supported"


def test_claims_turn_with_the_frame():
    used = {(PLAIN, 10): 4, (PLAIN, 50): 8, (SKIPS, 10): 4, (SKIPS, 50): 40}
    stands = {(PLAIN, 10): 9, (PLAIN, 50): 45, (SKIPS, 10): 9, (SKIPS, 50): 2}
    collected = made_up(used, stands)
    found = verdicts(collected)
    assert found["tanh+layer, depth 50: the effective depth is below half the number of layers"] == "supported"
    assert found["tanh+layer, depth 50: skip connections increase the effective depth"] == "supported"
    frame = collected.frame
    apart = frame["quantity"] == "independent_depth"
    other = SimpleNamespace(frame=frame.assign(value=frame["value"] + 5 * apart), metrics=None, manifest={})
    assert verdicts(other)[INDEPENDENT] == "contradicted"


def test_what_is_kept_of_a_frame_decides_the_same():
    used = {(PLAIN, 10): 9, (PLAIN, 50): 40, (SKIPS, 10): 6, (SKIPS, 50): 8}
    collected = Collected(made_up(used, dict.fromkeys(used, 3)).frame, None, {})
    tiny = observed("contribution", np.ones(1), index=9, step=8).assign(log10_value=-40.0, value=1e-40)
    own = collected.frame.iloc[0][[*numbers.NETWORK, "seed"]].to_dict()
    more = Collected(pd.concat([collected.frame, tiny.assign(**own)], ignore_index=True), None, {})
    kept = asked.condensed(more)
    assert len(kept.frame) == len(asked.condensed(collected).frame) < len(collected.frame)
    assert asked.claims(kept) == asked.claims(collected)


def test_replaceable_counts_up_to_the_first_that_suffers():
    used, stands = {(PLAIN, 10): 9, (PLAIN, 50): 40}, {(PLAIN, 10): 10, (PLAIN, 50): 7}
    runs = numbers.Runs(made_up(used, stands).frame)
    assert runs.replaceable((*PLAIN, 10)).tolist() == [10] * 4  # never
    assert runs.replaceable((*PLAIN, 50)).tolist() == [7] * 4


def test_the_details_name_what_failed():
    used, stands = {(PLAIN, 10): 9, (PLAIN, 50): 40}, {(PLAIN, 10): 10, (PLAIN, 50): 7}
    text = asked.details(made_up(used, stands, failed=[(("selu", "none", "identity"), 50)]))
    assert 'with every learning rate: "selu, residual, depth 50".' in text
    assert "| tanh+layer, depth 50 | 50 | 90.0 | 40.5 (" in text


def test_the_committed_frame_tells_effective_depth_from_its_own_contributions():
    """What was recorded beside each other in a run agrees: shares with depths."""
    runs = numbers.Runs(reference.load(ROOT / "results" / "effective_depth").frame)
    for key in runs.trained:
        rows = runs.rows(key, "contribution")
        reached = rows[rows["log10_value"] >= math.log10(TOLERANCES[0])].groupby("seed")["index"].max()
        np.testing.assert_array_equal(reached, runs.final(key))


def test_a_line_ends_where_a_seed_has_no_share():
    """A mean over the seeds that are left would jump up."""
    runs = numbers.Runs(reference.load(ROOT / "results" / "effective_depth").frame)
    plain, _ = drawn.contributions(runs).axes
    line = next(line for line in plain.get_lines() if line.get_label() == "relu+layer")
    key = next(key for key in runs.deep if key[:3] == ("relu", "layer", "none"))
    table = runs.rows(key, "contribution").pivot_table(index="index", columns="seed", values="log10_value")
    whole = table.dropna()
    assert len(whole) < len(table) and table.shape[1] == 5
    np.testing.assert_array_equal(line.get_xdata(), whole.index)
    np.testing.assert_allclose(line.get_ydata(), whole.mean(axis=1))
