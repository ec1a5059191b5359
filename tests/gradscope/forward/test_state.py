"""A model is left as it was: attributes, containers, generators and buffers, under Ctrl-C and with several threads."""

import contextlib
import copy
import itertools
import random
import re
import sys
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradscope as gs
from tests.helpers import noise


@dataclass
class Counter:
    calls: int = 0
    seen: list = field(default_factory=list)
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


class Keeping(nn.Module):
    """Changes something of every kind in each call, and its output depends on all of it."""

    shared: dict = {}  # noqa: RUF012 - the class itself keeps something

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, dtype=torch.float64), nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.hidden = [nn.BatchNorm1d(4, dtype=torch.float64)]  # not registered
        self.calls, self.cache, self.log, self.window = 0, {}, [], deque(maxlen=3)
        self.names, self.running, self.counts = {"start"}, torch.zeros(4), np.zeros(2)
        self.counter, self.nested = Counter(), {"inner": {"x": None}}
        self.dice, self.bits, self.source = random.Random(0), np.random.default_rng(0), torch.Generator()
        self.unused = None

    def forward(self, x):
        bias = self.cache.setdefault("bias", self.b[[3, 2, 1, 0]])  # keeps a graph
        self.calls += 1
        self.log.append(x)
        self.window.append(self.calls)
        self.names.add(self.calls)
        self.running += 1
        self.counts += 1
        self.counter.calls += 1
        self.counter.seen.append(x)
        self.counter.total += 1
        self.nested["inner"]["x"] = x
        self.made = bias
        self.unused = x
        self.shared["x"] = x
        number = self.dice.random() + self.bits.random() + random.random() + np.random.random()  # noqa: NPY002
        noise_ = torch.randn((), generator=self.source) + self.counter.total + self.running[0] + self.calls
        return torch.tanh(self.hidden[0](self.a(x)) + bias) * (number + noise_)


def contents(model: Keeping):
    return [
        model.calls, dict(model.cache), list(model.log), list(model.window), set(model.names), model.running.tolist(),
        model.counts.tolist(), model.counter.calls, list(model.counter.seen), model.counter.total.item(),
        model.nested["inner"]["x"], hasattr(model, "made"), model.unused, dict(Keeping.shared), model.dice.getstate(),
        str(model.bits.bit_generator.state), model.source.get_state().tolist(),
        model.hidden[0].running_mean.tolist(), random.getstate(), str(np.random.get_state()),  # noqa: NPY002
        torch.get_rng_state().tolist(),
    ]  # fmt: skip


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Keeping(), nn.Linear(4, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 2, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "measure",
    [
        gs.gsc,
        lambda model, x: gs.gsc(model, x, probes=gs.Deflated(1, 2)),
        gs.gsc_matrix,
        gs.parameter_gsc,
        gs.nlc,
        gs.measure,
        gs.first_nonfinite,
        gs.check,
    ],
    ids="gsc deflated matrix parameters nlc measure nonfinite check".split(),
)
def test_nothing_that_a_model_keeps_is_changed(measure):
    model, x = deep(), noise(6, 4)
    before = contents(model[0])
    result = measure(model, x)
    assert contents(model[0]) == before
    copy.deepcopy(model)
    if measure is gs.check:  # every pass sees the same state
        assert result.passed, str(result)


def test_a_model_with_a_state_is_measured_in_that_state():
    """Brute force: the Jacobian of the first call."""
    model, x = deep(), noise(6, 4)
    found = gs.gsc(model, x, probes="exact")
    random_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    twin = copy.deepcopy(model)

    def first_call(x):
        random.setstate(random_state[0])
        np.random.set_state(random_state[1])  # noqa: NPY002
        return copy.deepcopy(twin)(x)

    J = torch.autograd.functional.jacobian(first_call, x).double()
    f = first_call(x).detach()
    expected = J.square().sum() / x.numel() * x.square().sum() / f.square().sum()
    assert found["input"].value == pytest.approx(float(expected), rel=1e-9)
    Keeping.shared.clear()


class Counted:
    """A hook that remembers how often it was called."""

    calls = 0

    def __call__(self, *_):
        self.calls += 1


class Rearranging(nn.Module):
    """Changes names, places and order of what it holds, but not the objects."""

    def __init__(self, sizes_too):
        super().__init__()
        self.sizes_too = sizes_too
        self.a, self.first, self.empty = nn.Linear(4, 2, dtype=torch.float64), OrderedDict(x=1, y=2), []
        self.left, self.right, self.old = {"k": 1}, {}, object()
        self.register_buffer("one", torch.zeros(2))
        self.register_buffer("two", torch.ones(2))

    def forward(self, x):
        self.first.move_to_end("x")
        self.new = self.__dict__.pop("old")
        if not self.sizes_too:
            return self.a(x)
        self.right.update([self.left.popitem()])
        self.empty.append(self.new)
        del self.one
        self.two = self.two + 1
        self.register_buffer("one", torch.full((2,), 3.0), persistent=False)
        return self.a(x)


@pytest.mark.parametrize("sizes_too", [False, True])
def test_names_places_and_order_are_restored(sizes_too):
    model, hook = Rearranging(sizes_too), Counted()
    model.a.register_forward_hook(hook)
    parts = (model.__dict__, model.first, model.left, model.right, model._buffers)
    before, buffers = [list(part.items()) for part in parts], {n: b.clone() for n, b in model.named_buffers()}
    gs.gsc(model, noise(3, 4))
    for part, entries in zip(parts, before, strict=True):
        assert [key for key, _ in part.items()] == [key for key, _ in entries]
        assert all(value is kept for value, (_, kept) in zip(part.values(), entries, strict=True))
    assert (model.empty, model._non_persistent_buffers_set, hook.calls) == ([], set(), 0)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


class KeepingBackward(nn.Module):
    """Changes itself in the backward pass: a hook keeps gradients, and a checkpointed part runs again."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.calls, self.seen = nn.Linear(4, 4), nn.Linear(4, 3), 0, []
        self.b = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.act = nn.Tanh()
        self.act.register_full_backward_hook(lambda module, inputs, outputs: setattr(self, "kept", outputs))
        self.double()

    def part(self, h):
        self.calls += 1
        return self.b(h)

    def forward(self, x):
        h = self.act(self.a(x))
        h.register_hook(self.seen.append)
        return self.c(h + checkpoint(self.part, h, use_reentrant=False))


INITIAL = KeepingBackward()
BACKWARD = {
    "gsc": gs.gsc,
    "matrix": gs.gsc_matrix,
    "parameters": gs.parameter_gsc,
    "nlc": gs.nlc,
    "measure": lambda model, x: gs.measure(model, (x, x), loss_fn=lambda output, labels: output.square().sum(1)),
    "depth": lambda model, x: gs.effective_depth(model, x, initial=INITIAL),
    "nonfinite": gs.first_nonfinite,
    "check": gs.check,
    "coupled": lambda model, x: gs.capture(model.eval(), x).coupled,
    "describe": lambda model, x: str(gs.capture(model, x).describe()),
    "dense": lambda model, x: gs.capture(model, x).jacobian("a", "c").dense(),
    "J v": lambda model, x: gs.capture(model, x).jacobian("a", "c").matvec(torch.ones(24, dtype=x.dtype)),
    "J^T u": lambda model, x: gs.capture(model, x).jacobian("a", "c").rmatvec(torch.ones(18, dtype=x.dtype)),
}


@pytest.mark.filterwarnings("ignore:Only 2 layers lie on the trunk")
@pytest.mark.parametrize("caller", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize("measure", BACKWARD.values(), ids=BACKWARD.keys())
def test_no_backward_pass_changes_the_model(measure, caller):
    torch.manual_seed(0)
    model, x = KeepingBackward(), noise(6, 4)
    before = copy.deepcopy(model.state_dict())
    with caller():
        result = measure(model, x)
    assert (model.calls, model.seen, hasattr(model, "kept")) == (0, [], False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    if measure is gs.check:
        assert result.passed, str(result)


def test_a_capture_leaves_what_the_model_became_since():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), noise(6, 4).float()
    captured = gs.capture(model, x)
    model.stage, model[1].momentum = "fine-tuning", 0.5
    model(x)  # moves the running statistics
    kept = copy.deepcopy(model.state_dict())
    assert captured.coupled
    captured.jacobian("0", "2").rmatvec(torch.ones(24))
    assert (model.stage, model[1].momentum) == ("fine-tuning", 0.5)
    torch.testing.assert_close(dict(model.state_dict()), dict(kept), rtol=0, atol=0)


def test_every_pass_of_a_measurement_starts_from_the_same_state():
    """The forward pass, passes that find directions, and a layer that runs again in the backward pass."""
    seen = []

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            seen.append((self.calls, float(self.count)))
            self.calls, self.count = self.calls + 1, self.count + 1
            return super().forward(x)

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = Counting(4, 4), nn.Linear(4, 4)
            self.inner.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            return self.last(checkpoint(self.inner, x, use_reentrant=False))

    model = Again()
    gs.gsc(model, noise(6, 4).float(), probes=gs.Deflated(1, 1))
    assert len(seen) > 3 and set(seen) == {(0, 0.0)}
    assert model.inner.calls == 0 and float(model.inner.count) == 0


def test_what_a_measurement_cannot_restore_is_reported():
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.cache = nn.Linear(4, 4), torch.zeros(1 << 19)

        def forward(self, x):
            self.cache += 1
            return self.a(x)

    report = gs.check(Big().double(), noise(3, 4))
    assert "changed: attribute cache" in str(report)


LAZY = [
    lambda: nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)),
    lambda: nn.Sequential(nn.LazyBatchNorm1d()),
]


@pytest.mark.parametrize("make", LAZY)
@pytest.mark.parametrize(
    "name", ["gsc", "gsc_matrix", "nlc", "parameter_gsc", "Monitor", "check", "first_nonfinite", "capture", "measure"]
)
def test_lazy_modules_are_refused_before_anything_is_drawn(name, make):
    state, model = torch.get_rng_state(), make()
    with pytest.raises(ValueError, match=r"'0' \(Lazy\w+\) is not initialized: call the model once, model\(x\)"):
        getattr(gs, name)(model, torch.ones(6, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert nn.parameter.is_lazy(next(iter(model[0].parameters())))


class Growing(nn.Module):
    def __init__(self, registered):
        super().__init__()
        self.a, self.b, self.registered = nn.Linear(4, 4), None, registered

    def forward(self, x):
        if self.b is None:
            self.b = nn.Linear(4, 2) if self.registered else nn.Parameter(torch.randn(4, 2))
        h = torch.tanh(self.a(x))
        return self.b(h) if self.registered else h @ self.b


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("measure", [gs.gsc, gs.first_nonfinite])
def test_layers_that_a_first_call_builds_are_refused(measure, registered):
    model, state, x = Growing(registered), torch.get_rng_state(), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"made 'b' during the pass, .* call the model once, model\(x\)"):
        measure(model, x)
    assert (model.b, set(model._modules), set(model._parameters)) == (None, {"a"}, set())
    assert torch.equal(state, torch.get_rng_state())
    model(x)
    assert measure(model, x) is None or True


def test_a_call_in_another_thread_is_refused_and_leaves_the_model_right():
    model, x, caught = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), noise(6, 4), []

    class Calling(nn.Module):
        def forward(self, x):
            def train():
                try:
                    model(x.detach())
                except RuntimeError as error:
                    caught.append(error)

            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=train)
                thread.start()
                thread.join()
            return x

    outer = nn.Sequential(model, Calling())
    expected, before = gs.gsc(model, x).log10_values[0], copy.deepcopy(model.state_dict())
    np.testing.assert_allclose(gs.gsc(outer, x).log10_values[0], expected, atol=1e-12)
    assert re.search(r"Layer '0' was called while another thread measures this model: .*deepcopy", str(caught[0]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in outer.modules())


def recorded(model, x):
    with gs.Monitor(model, x, probes="exact") as monitor:
        monitor.record()
    frame = monitor.to_frame()
    return frame.loc[frame["quantity"] == "gsc", "log10_value"].to_numpy()


def coefficients(model, x):
    return gs.gsc(model, x).log10_values


@pytest.mark.parametrize("measures", [[coefficients] * 3, [coefficients, recorded]], ids=["gsc", "gsc and monitor"])
def test_threads_that_measure_one_model_get_the_numbers_of_one_thread(measures):
    torch.manual_seed(0)
    parts = [part for _ in range(8) for part in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))]
    model, x, found = nn.Sequential(*parts).double(), noise(6, 8), {n: [] for n, _ in enumerate(measures)}
    expected, before = [measure(model, x) for measure in measures], copy.deepcopy(model.state_dict())
    state, interval = torch.get_rng_state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=lambda n=n, own=own: found[n].extend(own(model, x) for _ in range(3)))
            for n, own in enumerate(measures)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for n, numbers in enumerate(expected):
        assert len(found[n]) == 3
        for each in found[n]:
            np.testing.assert_array_equal(each, numbers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_weights_that_another_thread_changes_are_a_clear_refusal():
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double(), noise(6, 4)

    def step(fraction):
        with torch.no_grad():
            model[1].weight.add_(1)

    with pytest.raises(RuntimeError, match=r"Parameter '1\.weight' was changed during the measurement"):
        gs.gsc(model, x, probes=200, progress=step)


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.log = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), []

    def forward(self, x):
        self.log.append(x)
        gs.tap(x, "tapped")
        return checkpoint(self.inside, x, use_reentrant=False)


def interrupted(run, at: int) -> bool:
    """Run with a KeyboardInterrupt at the at-th line that gradscope or contextlib runs; False if it came too late."""
    count = itertools.count()

    def trace(frame, event, arg):
        if not ("gradscope" in frame.f_code.co_filename or "contextlib" in frame.f_code.co_filename):
            return None
        if event in ("line", "call") and next(count) == at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return next(count) > at


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # while Python closes a generator
def test_ctrl_c_at_any_moment_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Recomputed(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, before = noise(4, 4), copy.deepcopy(model.state_dict())
    gs.gsc(model, x, probes=2)  # the first checkpoint imports parts of torch, which must not be interrupted
    buffers, state, threads = dict(model.named_buffers()), torch.get_rng_state(), threading.active_count()
    at, steps, done = 0, 0, False
    while not done:
        done = not interrupted(lambda: gs.gsc(model, x, probes=2), at)
        where = f"interrupted at line {at}"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), where
        assert all(buffers[name] is buffer for name, buffer in model.named_buffers()), where
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), where
        assert (model[2].log, torch.is_grad_enabled()) == ([], True), where
        assert torch.equal(state, torch.get_rng_state()), where
        at, steps = at + 1 + steps // 4, steps + 1
    assert steps > 50
    assert threading.active_count() == threads
    gs.gsc(model, x, probes=2)
