"""Attention heads in the records of a monitor, and the alarms of growing logits and collapsing entropy."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.monitor.alarms import Alarms
from tests.helpers import seeded
from tests.zoo import SMALL

QUANTITIES = ["relative_attention_entropy", "largest_attention_logit", "first_key_share"]


class Residual(nn.Module):
    """x + causal self-attention."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return x + self.attention(x, x, x, attn_mask=hidden, need_weights=False)[0]


def model(width=16):
    return nn.Sequential(nn.Embedding(40, width), Residual(width), Residual(width), nn.Linear(width, 40))


FIRST, LAST = "1.attention", "2.attention"


def distinct(num, generator):
    """Sequences of 12 different tokens, so that no two keys are equal."""
    return torch.stack([torch.randperm(40, generator=generator)[:12] for _ in range(num)])


def trained(factor, steps=24, every=4, **options):
    """A monitor of a training that multiplies q and k of the last block by ``factor`` after every step."""
    torch.manual_seed(0)
    network, generator = model(), seeded()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    probe = distinct(8, generator)
    with gs.Monitor(network, probe, every=every, max_overhead=None, **options) as monitor:
        for _ in range(steps):
            tokens = distinct(16, generator)
            loss = functional.cross_entropy(network(tokens)[:, :-1].flatten(0, 1), tokens[:, :-1].flatten())
            optimizer.zero_grad()
            loss.backward()
            monitor.step(loss, tokens)
            optimizer.step()
            with torch.no_grad():
                network[2].attention.in_proj_weight[:32] *= factor
    return monitor


def kinds(monitor):
    return {(kind, layer) for kind, layer, _ in monitor.alarms.fired}


def test_records_hold_the_heads_of_every_layer():
    monitor = trained(1.0, steps=9)
    rows = monitor.to_frame()
    rows = rows[rows["head"].notna()]
    assert rows["step"].unique().tolist() == [0, 4, 8] and rows["quantity"].unique().tolist() == QUANTITIES
    assert rows["layer"].unique().tolist() == [FIRST, LAST] and set(rows["head"]) == {0, 1}
    monitor.record()  # after the last step, so that `gs.attention` finds the same weights
    last = monitor.to_frame().query("step == 9 and head.notna()", engine="python")
    expected = gs.attention(monitor.model, monitor.data).to_frame()
    expected = expected[expected["quantity"].isin(QUANTITIES)]
    both = [frame.set_index(["layer", "head", "quantity"])["value"].sort_index() for frame in (last, expected)]
    np.testing.assert_allclose(*both, rtol=1e-12)


def test_scaled_queries_and_keys_cause_both_alarms():
    with pytest.warns(gs.MonitorWarning) as caught:
        monitor = trained(1.25)
    growth, collapse = (
        [str(w.message) for w in caught if kind in str(w.message)] for kind in ("logit growth", "entropy collapse")
    )
    assert growth[0].startswith("attention logit growth at head '2.attention:") and "has grown to" in growth[0]
    assert collapse[0].startswith("attention entropy collapse at head '2.attention:")
    heads = {layer for kind, layer in kinds(monitor) if kind.startswith("attention")}
    assert heads == {f"{LAST}:0", f"{LAST}:1"}


def test_a_healthy_training_causes_no_alarm():
    with warnings.catch_warnings():
        warnings.simplefilter("error", gs.MonitorWarning)
        assert kinds(trained(1.0, steps=60)) == set()


def heads(values, quantity):
    """Alarms of records in which one head has these values."""
    alarms = Alarms({})
    for step, value in enumerate(values):
        alarms.record(gs.frames.observed(quantity, value, layer="attn", head=3), step)
        alarms.load_state_dict(json.loads(json.dumps(alarms.state_dict())))  # as at a restart
    return [(kind, layer, step) for kind, layer, step in alarms.fired]


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
@pytest.mark.parametrize(
    "values, step",
    [
        ([5, 50, 99, 101, 500], 3),
        ([5, 50, 99], None),  # never above 100
        ([300, 310, 320, 300], None),  # large, but not grown, as with a sink of a pretrained model
        ([300, 601], 1),
        ([-20, 150], 1),
        ([5, 99, 98, 97], None),
    ],
)
def test_large_logits_that_grow(values, step):
    expected = [] if step is None else [("attention logit growth", "attn:3", step)]
    assert heads(values, "largest_attention_logit") == expected


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
@pytest.mark.parametrize(
    "values, step",
    [([0.9, 0.3, 0.03, 0.01], 3), ([0.15, 0.01], None), ([0.01, 0.01], None), ([0.1, 0.5, 0.0, 0.0], 2)],
)
def test_entropy_that_collapses(values, step):
    expected = [] if step is None else [("attention entropy collapse", "attn:3", step)]
    assert heads(values, "relative_attention_entropy") == expected


def test_the_warning_counts_the_other_heads():
    alarms = Alarms({})
    alarms.record(gs.frames.observed(QUANTITIES[0], [0.5] * 3, layer="attn", head=[0, 1, 2]), 0)
    with pytest.warns(gs.MonitorWarning, match=r"at head 'attn:1', .* fallen to 0.001, .*for 2 other heads"):
        alarms.record(gs.frames.observed(QUANTITIES[0], [0.002, 0.001, 0.01], layer="attn", head=[0, 1, 2]), 1)


@pytest.mark.parametrize("attention, recorded", [(None, True), (True, True), (False, False)])
def test_the_option_switches_heads_on_and_off(attention, recorded):
    frame = trained(1.0, steps=1, attention=attention).to_frame()
    assert frame["quantity"].isin(QUANTITIES).any() == recorded and ("head" in frame) == recorded


def test_networks_that_do_not_look_like_attention_are_not_searched():
    assert not gs.Monitor(gs.models.MLP(depth=3, width=6), torch.randn(4, 6)).attention


def test_attention_that_is_not_seen_is_said_once():
    network = SMALL["LSTM"]().model.float()
    monitor = gs.Monitor(network, torch.randn(3, 4, 3), every=1, max_overhead=None, attention=True)
    with pytest.warns(gs.MonitorWarning, match="no attention, step 0: No attention was seen in Recurrent") as caught:
        assert [monitor.step() for _ in range(3)] == [True] * 3
    assert sum("no attention" in str(w.message) for w in caught) == 1


class Sink:
    def write(self, step, values):
        self.values = values


def test_sinks_receive_the_extreme_head_of_a_layer():
    sink = Sink()
    monitor = trained(1.0, steps=1, sinks=[sink])
    rows = monitor.to_frame()
    for quantity, extreme in zip(QUANTITIES, (min, max, max), strict=True):
        own = rows[(rows["quantity"] == quantity) & (rows["layer"] == LAST)]["value"]
        assert len(own) == 2 and sink.values[f"{quantity}/{LAST}"] == extreme(own)
