"""The monitor on real training: records, schedules, budgets, warnings, and the layer that is to blame."""

import io
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import gradscope as gs
from tests.helpers import noise


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first, self.act1, self.second = nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width)
        self.act2, self.last = nn.ReLU(), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.act2(self.second(self.act1(self.first(x)))))


def losses(output, labels):
    return functional.cross_entropy(output, labels, reduction="none")


def batches(num, seed=0):
    for step in range(num):
        x = noise(20, 6, seed=seed + step)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def train(model, monitor, num, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    recorded = []
    for number, (x, y) in enumerate(batches(num)):
        optimizer.zero_grad()
        loss = losses(model(x), y).mean()
        loss.backward()
        if monitor.step(loss, (x, y)):
            recorded.append(number)
        optimizer.step()
    return recorded


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().double()


def test_records_are_what_the_functions_give(model):
    x = noise(12, 6, seed=99)
    with gs.Monitor(model, x, every=4, probes="exact", max_overhead=None) as monitor:
        assert train(model, monitor, 9) == [0, 4, 8]
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    frame = monitor.to_frame()
    gs.frames.check(frame)
    assert set(frame["step"]) == {0, 4, 8} and frame["step"].is_monotonic_increasing
    # The record at step 8 was taken before the last update; take that back.
    last = frame[frame["step"] == 8]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name] + 0.1 * gradients[name])
    profile = gs.gsc(model, x, probes="exact")
    found = last[last["quantity"] == "gsc"].set_index("layer")["log10_value"]
    np.testing.assert_allclose(found, profile.log10_values[:, 0], atol=1e-9)
    for quantity, values in (
        ("weight_norm", {n: p.detach() for n, p in model.named_parameters()}),
        ("gradient_norm", gradients),
    ):
        row = last[last["quantity"] == quantity].set_index("layer")["value"]["second"]
        assert row == pytest.approx(math.hypot(*(float(values[f"second.{n}"].norm()) for n in ("weight", "bias"))))
    statistics = gs.measure(model, x)
    dead = statistics[(statistics["quantity"] == "dead_fraction")].set_index("layer")["value"]
    assert last[last["quantity"] == "dead_fraction"].set_index("layer")["value"].to_dict() == dead.to_dict()


def test_updates_between_records(model):
    monitor = gs.Monitor(model, noise(8, 6), every=5, max_overhead=None)
    before = torch.cat([model.first.weight.detach().flatten(), model.first.bias.detach()]).clone()
    monitor.step()
    with torch.no_grad():
        model.first.weight.mul_(1.1)
    for _ in range(5):
        monitor.step()
    after = torch.cat([model.first.weight.detach().flatten(), model.first.bias.detach()])
    frame = monitor.to_frame()
    update = frame[(frame["quantity"] == "update_to_weight") & (frame["layer"] == "first")]["value"]
    assert update.to_list() == pytest.approx([float((after - before).norm() / after.norm()) / 5])
    largest = frame[(frame["quantity"] == "update_max") & (frame["layer"] == "first")]["value"]
    assert largest.to_list() == pytest.approx([float((after - before).abs().max()) / 5])


def random_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2),
        nn.Linear(16, 3),
    ).double()  # fmt: skip


def test_a_monitored_run_trains_as_an_unmonitored_one():
    """The same weights, running statistics and random state, bit for bit."""
    watched, alone = random_net(), random_net()
    torch.manual_seed(1)
    train(watched, gs.Monitor(watched, noise(8, 6), every=1, max_overhead=None), 6)
    state = torch.get_rng_state()

    class Nothing:
        def step(self, loss, batch):
            return False

    torch.manual_seed(1)
    train(alone, Nothing(), 6)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(watched.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_records_at_the_same_weights_are_the_same():
    """Dropout is measured as it trains, and with the same masks in every record."""
    model = random_net()
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None)
    for _ in range(3):
        monitor.step()
        torch.rand(7)
    records = [frame.drop(columns="step").reset_index(drop=True) for _, frame in monitor.to_frame().groupby("step")]
    chosen = ["layer", "quantity", "value", "log10_value"]
    first, *others = (r[~r["quantity"].str.startswith("update")][chosen].reset_index(drop=True) for r in records)
    assert all(other.equals(first) for other in others) and len(others) == 2
    model[3].p = model[6].p = 0.0
    monitor.step()
    row = "quantity == 'gsc' and layer == '0'"
    without = monitor.to_frame().query(f"step == 3 and {row}")["log10_value"].item()
    assert abs(without - first.query(row)["log10_value"].item()) > 0.01


def test_cheap_statistics_between(model):
    monitor = gs.Monitor(model, noise(8, 6), every=6, statistics_every=2, max_overhead=None)
    assert train(model, monitor, 9) == [0, 2, 4, 6, 8]
    frame = monitor.to_frame()
    assert set(frame[frame["quantity"] == "gsc"]["step"]) == {0, 6}
    for quantity in ("preactivation_std", "gradient_rms", "weight_norm"):
        assert set(frame[frame["quantity"] == quantity]["step"]) == {0, 2, 4, 6, 8}


def test_gradient_statistics_of_the_training_batch(model):
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None)
    train(model, monitor, 1)
    frame = monitor.to_frame().set_index(["quantity", "layer"])["value"]
    for name in ("first", "second", "last"):
        module = model.get_submodule(name)
        # The update was w -= 0.1 g, so the weights of the record are these plus 0.1 g.
        g = torch.cat([p.grad.flatten() for p in module.parameters()])
        w = torch.cat([p.detach().flatten() for p in module.parameters()]) + 0.1 * g
        assert frame["gradient_rms", name] == pytest.approx(float(g.square().mean().sqrt()))
        assert frame["gradient_zero_fraction", name] == pytest.approx(float((g == 0).double().mean()))
        assert frame["gradient_to_weight", name] == pytest.approx(float(g.norm() / w.norm()))
        assert frame["weight_norm", name] == pytest.approx(float(w.norm()))


def test_accumulated_gradients_count_once(model):
    alone = Net().double()
    alone.load_state_dict(model.state_dict())
    x, y = next(batches(1))
    monitors = [gs.Monitor(m, noise(8, 6), every=1, max_overhead=None) for m in (model, alone)]
    losses(alone(x), y).mean().backward()
    for part in (slice(0, 10), slice(10, 20)):
        (losses(model(x[part]), y[part]).mean() / 2).backward()
    frames_ = []
    for monitor in monitors:
        monitor.step()
        frames_.append(monitor.to_frame())
    np.testing.assert_allclose(frames_[0]["log10_value"], frames_[1]["log10_value"], atol=1e-9)


def test_under_autocast_and_a_gradient_scaler():
    torch.manual_seed(0)
    model = Net()
    x, y = next(batches(1))
    x, probe = x.float(), noise(8, 6).float()
    expected = gs.gsc(model, probe, probes="exact").log10_values[:, 0]
    monitor = gs.Monitor(model, probe, every=1, probes="exact", max_overhead=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses(model(x), y).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        monitor.step(loss, (x, y))
    frame = monitor.to_frame()
    np.testing.assert_allclose(frame[frame["quantity"] == "gsc"]["log10_value"], expected, atol=1e-6)
    norm = frame[(frame["quantity"] == "gradient_norm") & (frame["layer"] == "last")]["value"].item()
    model.zero_grad()
    losses(model(x), y).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.last.parameters()]).norm()
    assert norm == pytest.approx(float(expected), rel=0.02)


def test_a_compiled_model(model):
    compiled = torch.compile(model, backend="aot_eager")
    probe = noise(8, 6)
    with pytest.warns(UserWarning, match="its eager original is measured"):
        monitor = gs.Monitor(compiled, probe, every=2, probes="exact", max_overhead=None)
    assert train(compiled, monitor, 3) == [0, 2]
    frame = monitor.to_frame()
    assert set(frame[frame["quantity"] == "gradient_norm"]["layer"]) == {"first", "second", "last"}
    assert torch.isfinite(compiled(probe)).all()  # still compiled, and still runs


def test_a_monitor_goes_on_from_its_state(model):
    kept = []
    first = gs.Monitor(model, noise(8, 6), every=2, max_overhead=None, report=kept.append)
    train(model, first, 3)
    state = first.state_dict()
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    second = gs.Monitor(model, noise(8, 6), every=2, max_overhead=None)
    second.load_state_dict(torch.load(buffer, weights_only=True), kept)
    assert train(model, second, 3) == [1]  # steps 3, 4, 5
    assert sorted(set(second.to_frame()["step"])) == [0, 2, 4]
    assert second.alarms.losses[:3] == first.alarms.losses and len(second.alarms.losses) == 6
    assert second.alarms.first_lengths == first.alarms.first_lengths


def test_logarithmic_schedule(model):
    monitor = gs.Monitor(model, noise(8, 6), every="log", max_overhead=None)
    assert train(model, monitor, 20) == [0, 1, 2, 4, 8, 16]


def test_the_budget_thins_the_schedule(model):
    # A clock on which a step of training takes a second, and a record one more.
    now = [0.0]

    def tick(*_):
        now[0] += 1.0

    options = {"report": tick, "clock": lambda: now[0]}
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=0.1, total_steps=2000, **options)
    model.register_forward_pre_hook(lambda module, args: tick() if len(args[0]) == 20 else None)  # a batch, no probes
    recorded = train(model, monitor, 200)
    assert recorded == [0, *range(19, 200, 10)]  # the n-th is due when training took 10 n seconds
    assert monitor.skipped == 200 - len(recorded) and monitor.overhead == pytest.approx(0.1)
    free = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None, **options)
    assert len(train(model, free, 5)) == 5 and free.skipped == 0


def test_a_loss_that_is_not_finite_names_the_layer(model, tmp_path):
    monitor = gs.Monitor(model, noise(8, 6), every=100, loss_fn=losses, save_to=tmp_path)
    x, y = next(batches(1))
    with torch.no_grad():
        model.second.weight[2, 3] = math.inf
    with pytest.raises(
        gs.NonFiniteError, match=r"(?s)The loss is (nan|inf).*the parameters of layer 'second'.*nonfinite.pt"
    ):
        monitor.step(losses(model(x), y).mean(), (x, y))
    saved = torch.load(tmp_path / "nonfinite.pt", weights_only=True)
    assert torch.equal(saved["batch"][0], x) and saved["model"]["second.weight"][2, 3] == math.inf
    assert saved["step"] == 0


def test_a_run_that_diverges_stops_with_a_layer_named():
    torch.manual_seed(0)
    model = Net()
    model.act1, model.act2 = nn.ReLU(), nn.ReLU()
    monitor = gs.Monitor(model, noise(8, 6).float(), every=1000, loss_fn=losses)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e12)
    with pytest.raises(
        gs.NonFiniteError, match=r"layer '\w+' is the first with NaN or Inf in its (forward|backward) pass"
    ):
        for x, y in batches(50):
            optimizer.zero_grad()
            loss = losses(model(x.float()), y).mean()
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", gs.MonitorWarning)
                monitor.step(loss, (x.float(), y))
            optimizer.step()


class Planted(Net):
    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        h = self.act1(self.first(x))
        if self.where == "forward":
            h = self.second(h) / 0.0
        elif self.where == "backward":
            h = self.second(torch.sqrt(0.0 * h + 0.0) + h)  # sqrt(0) has an infinite slope
        return self.last(self.act2(h))


def test_the_first_layer_and_its_direction():
    x, y = next(batches(1))
    torch.manual_seed(0)
    healthy = Net().double()
    assert gs.first_nonfinite(healthy, (x, y), loss_fn=losses) is None
    found = gs.first_nonfinite(Planted("forward").double(), (x, y), loss_fn=losses)
    assert (found.layer, found.direction, found.before) == ("act2", "forward", True)
    assert (
        str(found) == "code outside any module, before layer 'act2', is the first with NaN or Inf in its forward pass"
    )
    found = gs.first_nonfinite(Planted("backward").double(), (x, y), loss_fn=losses)
    assert (found.layer, found.direction, found.before) == ("act1", "backward", True)
    assert (
        str(found) == "code outside any module, after layer 'act1', is the first with NaN or Inf in its backward pass"
    )
    healthy.second.register_forward_hook(lambda m, args, out: out * math.inf)
    found = gs.first_nonfinite(healthy, (x, y), loss_fn=losses)
    assert (found.layer, found.direction, found.before) == ("second", "forward", False)


def test_a_batch_that_is_bad_itself_does_not_hide_the_loss(model):
    monitor = gs.Monitor(model, noise(8, 6), every=100, loss_fn=losses)
    x, y = next(batches(1))
    x[3, 2] = math.nan
    with pytest.raises(gs.NonFiniteError, match=r"The loss is nan.*the batch itself .*x holds 1 NaN .*at \(3, 2\)"):
        monitor.step(losses(model(x), y).mean(), (x, y))


def test_going_on_after_a_warning(model):
    monitor = gs.Monitor(model, noise(8, 6), every=100, on_nonfinite="warn")
    with pytest.warns(gs.MonitorWarning, match=r"The loss is nan at step 0: a second pass found no NaN.*loss_fn="):
        monitor.step(torch.tensor(math.nan), next(batches(1)))
    monitor.step(math.nan)  # once is enough
    assert monitor.steps == 2


@pytest.mark.parametrize("spoiled", ["one", "all"])
def test_a_network_that_has_diverged_is_watched_on_after_a_warning(model, spoiled):
    """Records lack what is not finite; with all weights gone there is nothing to record."""
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None, on_nonfinite="warn")
    monitor.step(1.0)
    with torch.no_grad():
        for parameter in [model.second.weight] if spoiled == "one" else model.parameters():
            parameter.fill_(math.nan)
    with pytest.warns(
        gs.MonitorWarning, match="cannot be measured at step 1: the parameters of layer '(first|second)'"
    ):
        monitor.step(1.0)
    monitor.step(1.0)
    frame = monitor.to_frame()
    after = frame[frame["step"] > 0]
    assert set(after["layer"]) == ({"first", "last"} if spoiled == "one" else set())
    assert "gsc" not in set(after["quantity"])


def test_a_network_whose_output_is_zero_is_watched_on_after_a_warning(model):
    """It may be one whose last layer begins at zero, and is healthy."""
    with torch.no_grad():
        for parameter in model.last.parameters():
            parameter.zero_()
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None)
    with pytest.warns(gs.MonitorWarning, match="zero output, step 0: The output of layer 'last' is zero for the whole"):
        monitor.step(1.0)
    monitor.step(1.0)  # said once
    frame = monitor.to_frame()
    assert "gsc" not in set(frame["quantity"]) and set(frame["step"]) == {0, 1}
    assert set(frame.loc[frame["quantity"] == "weight_norm", "layer"]) == {"first", "second", "last"}


def test_a_measurement_that_fails_for_another_reason_is_an_error(model):
    monitor = gs.Monitor(model, noise(8, 6), every=1, layers=["no_such_layer"], on_nonfinite="warn")
    with pytest.raises(ValueError, match="no_such_layer"):
        monitor.step(1.0)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda m: m.second.weight.data.mul_(20), r"weight growth at layer 'second', step 1: its weights are"),
        (lambda m: m.second.bias.data[:15].fill_(-20), "dead units at layer 'act2', step 1: 9[0-9] % of its units"),
    ],
    ids=["weights", "dead"],
)
def test_warnings_name_the_layer_once(model, prepare, message):
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None, layers=["first", "second"])
    monitor.step()
    prepare(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        monitor.step()
        monitor.step()
    assert [bool(re.search(message, str(warning.message))) for warning in seen].count(True) == 1


def test_many_layers_in_one_warning(model):
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None)
    with torch.no_grad():
        model.first.weight.mul_(30)
        model.second.weight.mul_(90)
        model.last.weight.mul_(50)
    with pytest.warns(
        gs.MonitorWarning,
        match=r"weight growth at layer 'second', step 0: its .* times as long .*; the same holds for 2 other layers",
    ):
        monitor.step()
    kinds = sorted((kind, layer) for kind, layer, _ in monitor.alarms.fired if kind == "weight growth")
    assert kinds == [("weight growth", layer) for layer in ("first", "last", "second")]


def test_exploding_and_jumping():
    deep = gs.models.MLP(depth=40, width=12, norm="batch", generator=torch.Generator().manual_seed(0))
    monitor = gs.Monitor(deep, noise(24, 12).float(), every=1, max_overhead=None)
    with pytest.warns(
        gs.MonitorWarning, match=r"exploding at layer '(input|layers.0)', step 0: its GSC is 10\^"
    ) as seen:
        monitor.step()
        monitor.step()
    assert len(seen) == 1
    calm = gs.Monitor(Net().double(), noise(8, 6), every=100)
    with pytest.warns(gs.MonitorWarning, match="loss jump at step 10: 50 after a median of 1"):
        for value in [1.0] * 10 + [50.0]:
            calm.step(torch.tensor(value))
    negative = gs.Monitor(Net().double(), noise(8, 6), every=100)
    for value in [-1.0, -2.0, -1.5, 0.5, -1.0, -2.0, 1.0]:  # a log-likelihood: nothing to take five times
        negative.step(torch.tensor(value))


def test_of_layers_that_nothing_passes_the_last_is_named():
    """No gradient passes the dead layer, so all below are equally extreme, and it is not their fault."""
    model = Net().double()
    model.act1 = nn.ReLU()
    with torch.no_grad():
        model.second.bias.fill_(-1e3)
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None, layers=["first", "act1", "second", "act2"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        monitor.step()
    assert [str(w.message) for w in seen if "vanishing" in str(w.message)] == [
        "vanishing at layer 'act2', step 0: its GSC is 0, the most extreme of all layers."
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, 'every must be a whole number >= 1 or "log", got 0'),
        ({"statistics_every": 1.5}, 'statistics_every must be a whole number >= 1 or "log" or None, got 1.5'),
        ({"probes": 5}, "probes must be a whole number from 1 to 4"),
        ({"max_overhead": 0}, r"max_overhead must be a number in \(0, 1\] or None"),
        ({"check_every": 0}, "check_every must be a whole number >= 1 or None, got 0"),
        ({"on_nonfinite": "stop"}, 'on_nonfinite must be "raise" or "warn"'),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        gs.Monitor(model, noise(8, 6), **options)
    with pytest.raises(ValueError, match=r"Nothing was recorded: call step\(\)"):
        gs.Monitor(model, noise(8, 6)).to_frame()


def rows(monitor, quantity, step):
    frame = monitor.to_frame()
    return frame[(frame["quantity"] == quantity) & (frame["step"] == step)].set_index("layer")["value"]


def backward(model):
    x, y = next(batches(1))
    model.zero_grad()
    losses(model(x), y).mean().backward()


def test_layers_are_monitored_as_they_are_at_each_step(model):
    """Unfrozen, frozen, replaced by another shape and added after the monitor was made."""
    model.first.requires_grad_(False)
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None)

    def step():
        backward(model)
        monitor.step(1.0)
        number = monitor.steps - 1
        expected = {
            name: math.hypot(*(float(p.grad.norm()) for p in module.parameters()))
            for name, module in model.named_children()
            if any(p.requires_grad for p in module.parameters())
        }
        assert rows(monitor, "gradient_norm", number).to_dict() == pytest.approx(expected)
        return set(rows(monitor, "update_to_weight", number).index)

    assert step() == set() and step() == {"second", "last"}
    model.first.requires_grad_(True)
    assert step() == {"second", "last"} and step() == {"first", "second", "last"}
    model.second.requires_grad_(False)
    model.second.weight.grad = model.second.bias.grad = None
    model.last = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)).double()
    backward(model)
    monitor.step(1.0)
    assert set(rows(monitor, "gradient_norm", 4).index) == {"first", "last.0", "last.1"}
    assert set(rows(monitor, "update_to_weight", 4).index) == {"first"}
    before = model.last[0].weight.detach().clone()
    with torch.no_grad():
        model.last[0].weight.mul_(30)
    backward(model)
    with pytest.warns(gs.MonitorWarning, match=r"weight growth at layer 'last\.0', step 5: .* (29|30)\.?\d* times"):
        monitor.step(1.0)
    moved = (29 * before).norm() / math.hypot(*(float(p.detach().norm()) for p in model.last[0].parameters()))
    assert rows(monitor, "update_to_weight", 5)["last.0"] == pytest.approx(float(moved))
    model.requires_grad_(False)  # as a discriminator is while the generator trains
    monitor.step(1.0)
    assert rows(monitor, "weight_norm", 6).empty and not rows(monitor, "gsc", 6).empty


def test_a_replaced_layer_whose_gradient_is_nan_is_named(model):
    monitor = gs.Monitor(model, noise(8, 6), every=100)
    model.last = nn.Linear(16, 3).double()
    model.last.weight.register_hook(lambda gradient: gradient * math.nan)
    backward(model)
    with pytest.raises(gs.NonFiniteError, match="layer 'last' is the first with NaN or Inf in its backward pass"):
        monitor.step(1.0, next(batches(1))[0])


def test_one_record_for_a_step(model):
    reported = []
    monitor = gs.Monitor(model, noise(8, 6), every=2, max_overhead=None, report=reported.append)
    train(model, monitor, 2)
    monitor.record()
    monitor.record()
    again = gs.Monitor(model, noise(8, 6), every=2, max_overhead=None)
    again.load_state_dict(monitor.state_dict(), reported)
    for each in (monitor, again):
        assert train(model, each, 3) == [2]  # steps 2, 3 and 4; step 2 has its record
        frame = each.to_frame()
        assert frame[(frame["quantity"] == "gsc") & (frame["layer"] == "input")]["step"].tolist() == [0, 2, 4]


def test_a_state_from_before_a_layer_was_unfrozen(model):
    model.first.requires_grad_(False)
    state = gs.Monitor(model, noise(8, 6), every=1).state_dict()
    model.first.requires_grad_(True)
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None)
    monitor.load_state_dict(state)
    monitor.step(1.0)
    assert set(rows(monitor, "weight_norm", 0).index) == {"first", "second", "last"}
    with torch.no_grad():
        model.first.weight.mul_(99)
    with pytest.warns(gs.MonitorWarning, match="weight growth at layer 'first', step 1"):
        monitor.step(1.0)


def test_masked_logits_are_no_reason_to_stop():
    """Invalid actions have logits of -inf: coefficients do not exist, and training goes on."""
    torch.manual_seed(0)

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.act(self.first(x))).masked_fill(torch.tensor([False, False, True]), -math.inf)

    model, x = Policy(), noise(8, 4).float()
    loss = -torch.distributions.Categorical(logits=model(x)).log_prob(torch.zeros(8)).mean()
    loss.backward()
    monitor = gs.Monitor(model, x, every=1, max_overhead=None)
    with pytest.warns(gs.MonitorWarning, match="cannot be measured at step 0: Layer 'output' is the first with NaN"):
        assert monitor.step(loss, x) and monitor.step(loss, x)
    assert set(monitor.to_frame()["quantity"]) >= {"preactivation_std", "gradient_norm"}
    with pytest.raises(gs.NonFiniteError, match="The loss is inf at step 2: a second pass found no NaN or Inf"):
        monitor.step(math.inf, x)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([(noise(8, 6), noise(8, 6))], TypeError, "data must be a tensor"),  # a loader
        ((noise(8, 6), noise(8, 6)), ValueError, "the labels would be ignored: give only the inputs"),
        (torch.empty(0, 6), ValueError, "The batch is empty"),
    ],
)
def test_a_probe_batch_that_is_no_batch_is_refused_at_once(data, error, message):
    data = DataLoader(data, batch_size=2) if isinstance(data, list) else data
    with pytest.raises(error, match=message):
        gs.Monitor(nn.Linear(6, 2), data)
