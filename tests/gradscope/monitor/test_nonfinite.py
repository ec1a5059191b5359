"""Which layer is to blame for a NaN, and what is left then: a name, evidence, and a good checkpoint."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from experiments.training import loop
from gradscope.monitor.nonfinite import BACKWARD, FORWARD
from gradscope.monitor.vitals import Vitals
from tests.experiments.training.test_loop import RECIPE, images, resumed
from tests.gradscope.monitor.test_monitor import losses
from tests.helpers import noise

FIRST = "is the first with NaN or Inf in its backward pass"


class Root(nn.Module):
    """h + sqrt(0 h): the forward pass is the identity, and the infinite slope times 0 makes a NaN of the gradient."""

    def forward(self, h):
        return h + torch.sqrt(0.0 * h)


class Lines(nn.Module):
    """The same in functional code after, or before, its only layer."""

    def __init__(self, after):
        super().__init__()
        self.inner, self.after = nn.Linear(6, 6), after

    def forward(self, h):
        return Root.forward(self, self.inner(h)) if self.after else self.inner(Root.forward(self, h))


class Twice(nn.Module):
    """One module called at a point where it is smooth, after a call where it is not."""

    def __init__(self):
        super().__init__()
        self.linear, self.sqrt = nn.Linear(6, 6), Sqrt()

    def forward(self, h):
        h = self.linear(h)
        return self.sqrt(1.0 + (h + self.sqrt(0.0 * h)).square())


class Sqrt(nn.Module):
    def forward(self, h):
        return torch.sqrt(h)


class Branches(nn.Module):
    """Two modules beside each other, both at fault: the backward pass comes to the second first."""

    def __init__(self):
        super().__init__()
        self.linear, self.one, self.two = nn.Linear(6, 6), Root(), Root()

    def forward(self, h):
        h = self.linear(h)
        return self.one(h) + self.two(h)


class InPlace(nn.Module):
    def forward(self, h):
        return h.sub_(h.detach()).sqrt_()


def chain(*at):
    """Eight modules, those at the given places with a gradient of NaN."""
    torch.manual_seed(0)
    return nn.Sequential(*(Root() if n in at else nn.Tanh() if n % 2 else nn.Linear(6, 6) for n in range(8))).double()


@pytest.mark.parametrize("place", range(8))
def test_a_gradient_is_traced_to_the_module_that_made_it(place):
    found = gs.first_nonfinite(chain(place), noise(5, 6))
    assert (found.layer, found.direction, found.before) == (str(place), BACKWARD, False)
    assert str(found) == f"layer '{place}' {FIRST}"
    found = gs.first_nonfinite(chain(place, 0), noise(5, 6))  # what lies below only receives it
    assert found.layer == str(place)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), Root()), nn.Linear(6, 6)), "layer '1.1'"),
        (lambda: nn.Sequential(nn.Linear(6, 6), Lines(after=True)), "code outside any module, after layer '1.inner',"),
        (lambda: nn.Sequential(nn.Linear(6, 6), Lines(after=False)), "layer '1'"),
        (Twice, "layer 'sqrt'"),
        (Branches, "layer 'two'"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), InPlace()), "layer '2'"),
    ],
    ids=["nested", "after a child", "before a child", "twice", "branches", "in place"],
)  # fmt: skip
def test_the_innermost_name_in_deeper_models(model, words):
    assert str(gs.first_nonfinite(model().double(), noise(5, 6))) == f"{words} {FIRST}"


def test_a_weight_gradient_that_overflows_by_itself():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e-20)
        model[0].weight.fill_(1.0)
    x, y = 1e25 * torch.ones(3, 4), torch.zeros(3)  # gradients 1e25 of the output, 1e5 of the input, 1e50 of the weight
    found = gs.first_nonfinite(model, (x, y), loss_fn=lambda output, labels: 1e25 * output.sum(1))
    assert (found.layer, found.direction, found.before) == ("1", BACKWARD, False)


def test_the_loss_function_is_blamed_for_what_it_makes():
    x, y = noise(5, 6), torch.zeros(5)
    found = gs.first_nonfinite(chain(), (x, y), loss_fn=lambda output, labels: torch.sqrt(0.0 * output.sum(1)))
    assert str(found) == f"the loss function {FIRST}" and found.direction == BACKWARD
    found = gs.first_nonfinite(chain(), (x, y), loss_fn=lambda output, labels: output.sum(1) / labels)
    assert str(found) == "the loss function is the first with NaN or Inf in its forward pass"
    assert found.direction == FORWARD


class Armed(Root):
    """`Root` from the given step of training on; the probe batch has another size, and does not count."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def forward(self, h):
        self.left -= len(h) == RECIPE.batch_size
        return super().forward(h) if self.left < 0 else h


def network(armed=10**9):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Armed(armed), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 4),
    )  # fmt: skip


def watched(model, data, **options):
    def loss_fn(output, labels):
        return functional.cross_entropy(output, labels, reduction="none")

    x, _ = data.batch(torch.arange(8))
    return gs.Monitor(model, x, **({"every": 100, "loss_fn": loss_fn} | options))


def finite(state):
    return all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_backward_pass_that_fails_stops_before_the_update(tmp_path):
    data, recipe = images(64), replace(RECIPE, checkpoint_every=1)
    model = network(armed=3)
    with pytest.raises(gs.NonFiniteError, match=f"^The gradient is not finite at step 3: layer '3' {FIRST}"):
        loop.train(model, data, None, recipe, tmp_path, monitor=watched(model, data, save_to=tmp_path))
    state = resumed(tmp_path)
    assert state["step"] == 3 and finite(state) and finite({"model": model.state_dict()})
    assert torch.load(tmp_path / "nonfinite.pt", weights_only=True)["step"] == 3
    loop.train(network(), data, None, recipe, tmp_path, state=state)  # and it goes on from there
    assert resumed(tmp_path)["step"] == 12


def test_no_checkpoint_of_numbers_that_are_not_finite(tmp_path):
    data, recipe = images(64), replace(RECIPE, checkpoint_every=1, log_every=100)
    with pytest.raises(
        gs.NonFiniteError, match=r"After step 4 '0\.weight' is not finite, so no checkpoint was written"
    ):
        loop.train(network(armed=3), data, None, recipe, tmp_path)
    assert resumed(tmp_path)["step"] == 3 and finite(resumed(tmp_path))
    model = network(armed=3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loop.train(model, data, data, recipe, tmp_path, monitor=watched(model, data, on_nonfinite="warn"))
    texts = [str(warning.message) for warning in seen]
    assert sum(text.startswith("The gradient is not finite at step 3") for text in texts) == 1
    assert sum("so no checkpoint was written" in text for text in texts) == 12 - 3
    assert resumed(tmp_path)["step"] == 3


def test_a_loss_that_is_not_finite_ends_a_run_without_a_monitor():
    recipe = replace(RECIPE, checkpoint_every=None, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e30))
    with pytest.raises(
        gs.NonFiniteError, match=r"The loss of steps 1 to 3 is nan; monitor.every=100 stops .* names the layer"
    ):
        loop.train(network(), images(64), None, recipe)


def test_a_probe_batch_whose_backward_pass_fails():
    model, message = chain(2), f"The probe batch cannot be measured at step 0: layer '2' {FIRST}"
    with pytest.raises(gs.NonFiniteError, match=message):
        gs.Monitor(model, noise(8, 6), every=1).step(1.0)
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None, on_nonfinite="warn")
    with pytest.warns(gs.MonitorWarning, match=message) as seen:
        monitor.step(1.0)
        monitor.step(1.0)
    assert len(seen) == 1
    quantities = set(monitor.to_frame()["quantity"])
    assert "gsc" not in quantities and {"preactivation_std", "weight_norm"} <= quantities


def test_the_last_record_does_not_fail_a_run_that_is_over():
    model = chain()
    monitor = gs.Monitor(model, noise(8, 6), every=1, max_overhead=None)
    monitor.step(1.0)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(gs.MonitorWarning, match="measured at step 1: the parameters of layer '0' hold NaN or Inf"):
        monitor.record()


def test_gradients_that_only_overflow_are_let_be():
    """A gradient scaler begins with a scale that is too large, and leaves such an update out."""
    model = chain().float()
    monitor = gs.Monitor(model, noise(8, 6).float(), every=100)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)  # finite, but not the square
    monitor.step(1.0)
    model[2].weight.grad[0, 0] = math.inf
    with pytest.warns(
        gs.MonitorWarning, match=r"^The gradient is not finite at step 1: a second pass found no NaN.*scaler"
    ):
        monitor.step(1.0)
    monitor.step(1.0)  # said once
    assert monitor.steps == 3


def test_a_number_that_is_read_late_says_so():
    """As on a device that a look would have to wait for."""
    model = chain()
    monitor = gs.Monitor(model, noise(8, 6), every=100, loss_fn=losses, check_every=4)
    monitor.step(1.0)  # step 0 has a record, so it is looked at
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    for loss in (1.0, math.nan, math.nan):
        monitor.step(loss)
    with pytest.raises(
        gs.NonFiniteError,
        match=r"The loss is nan at step 2: the parameters of layer '0' .* read 2 updates later.*check_every=1",
    ):
        monitor.step(math.nan)


def test_what_is_kept_is_read_in_order():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    vitals = Vitals(nn.ParameterList([weight]), every=3)
    vitals.keep(5, 1.5)
    weight.grad = torch.tensor([3.0, 4.0])
    vitals.keep(6, None)
    assert not vitals.due
    vitals.keep(7, torch.tensor(2.5, dtype=torch.float64))
    assert vitals.due
    assert [(v.step, v.loss, v.gradient) for v in vitals.read()] == [(5, 1.5, None), (6, None, 5.0), (7, 2.5, 5.0)]
    assert vitals.read() == [] and not vitals.due
    weight.grad = torch.sparse_coo_tensor([[1]], [math.inf], (2,), check_invariants=True)
    vitals.keep(8, None)
    assert vitals.read()[0].gradient == math.inf


def test_evidence_that_cannot_be_saved_does_not_hide_the_layer(tmp_path, monkeypatch):
    model = chain()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    (tmp_path / "file").touch()
    for folder, batch in ((tmp_path / "file", noise(5, 6)), (tmp_path, (noise(5, 6), lambda: None))):
        monitor = gs.Monitor(model, noise(8, 6), every=100, save_to=folder)
        with pytest.raises(
            gs.NonFiniteError,
            match=r"The loss is nan at step 0: the parameters of layer '2'.*could not be saved in .*\(",
        ):
            monitor.step(math.nan, batch)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr("gradscope.monitor.nonfinite.parallel", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monitor = gs.Monitor(model, noise(8, 6), every=100, save_to=tmp_path)
    with pytest.raises(gs.NonFiniteError, match=r"state are in .*nonfinite-rank1\.pt"):
        monitor.step(math.nan, noise(5, 6))
    assert torch.load(tmp_path / "nonfinite-rank1.pt", weights_only=True)["step"] == 0
