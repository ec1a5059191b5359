"""Every argument of a public function is checked in one place: odd values are refused, and usual ones are not."""

import inspect
import itertools
import json
import math
import os
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gradscope as gs
from gradscope.choices import ArgumentError, checked
from gradscope.coefficients import planning
from tests.helpers import ROOT, noise, seeded


def inferred(make):
    with torch.inference_mode():
        return make()


def model():
    return gs.models.MLP(depth=7, width=6, generator=seeded()).double()


def gsc(**options):
    return gs.gsc(model(), noise(4, 6), **options)


def test_odd_calls(tmp_path):
    command = [sys.executable, "-m", "benchmarks.odd_arguments", "--calls=150", "--seed=7", f"--output={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "odd_arguments.json").read_text())["outcomes"]
    assert {name: outcomes[name] for name in ("raw", "unnamed", "nan", "hang")} == {
        "raw": 0, "unnamed": 0, "nan": 0, "hang": 0,
    }, done.stdout  # fmt: skip
    assert outcomes["refused"] + outcomes["returned"] == 150


NUMBERS = {
    "numpy": np.float32(0.5), "tensor": torch.tensor(0.5), "array": np.array(0.5),
    "gradient": nn.Parameter(torch.tensor(0.5)),
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_numpy_and_torch_are_numbers(number):
    assert gs.meanfield.MeanField("tanh", number).weight_variance == 0.5
    assert gs.Estimate(2.0, 0.1).interval(number) == gs.Estimate(2.0, 0.1).interval(0.5)
    assert gsc().growth(margin=number) == gsc().growth(margin=0.5)


@pytest.mark.parametrize("whole", [3, 3.0, np.int32(3), torch.tensor(3), np.array(3)], ids=repr)
def test_whole_numbers(whole):
    assert gsc(probes=whole).num_probes.max() == 3
    assert len(gs.models.MLP(depth=whole, width=4).layers) == 3


@pytest.mark.parametrize("truth", [True, 1, np.True_, torch.tensor(True)], ids=repr)
def test_truths(truth):
    assert gs.models.MLP(depth=1, width=2, bias=truth).layers[0].linear.bias is not None


VALUES = {
    "list": [0.1, 1.0], "tuple": (0.1, 1.0), "array": np.array([0.1, 1.0]), "series": pd.Series([0.1, 1.0]),
    "tensor": torch.tensor([0.1, 1.0], dtype=torch.float64), "index": pd.Index([0.1, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_sequences_of_numbers(values):
    expected = gs.meanfield.critical_line("tanh", [0.1, 1.0])
    assert gs.meanfield.critical_line("tanh", values) == expected
    assert gs.meanfield.phase_diagram("tanh", values, [0.1]).weight_variances.tolist() == [0.1, 1.0]
    assert gs.frames.observed("balance", values)["value"].tolist() == [0.1, 1.0]
    kinks = gs.meanfield.gaussian(np.abs, 1.0, kinks=values)
    assert kinks == pytest.approx(math.sqrt(2 / math.pi), rel=1e-8)


def test_ranges_are_sequences():
    factories = OrderedDict(a=model)
    found = gs.compare_models(factories, noise(4, 6), seeds=range(2, 4), probes=2, progress=[].append)
    assert found.seeds == (2, 3)


class Place:
    """A path of another library."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Place])
def test_paths(kind, tmp_path):
    gsc().save(kind(tmp_path / "profile.parquet"))
    assert len(gs.frames.load(kind(tmp_path / "profile.parquet"))) == 8


class Method:
    def method(self, network, x):
        return network(x)

    __call__ = method


FORWARDS = {
    "function": lambda network, x: network(x), "partial": partial(lambda scale, network, x: network(x), 1.0),
    "object": Method(), "method": Method().method, "defaults": lambda network, x, scale=1.0: network(x),
    "star": lambda *args: args[0](args[1]), "builtin": torch.nn.Module.__call__,
}  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_callables_of_every_kind(forward):
    np.testing.assert_array_equal(gsc(forward=forward).log10_values, gsc().log10_values)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(noise(12, 6))


BATCHES = list(noise(12, 6).split(4))
STREAMS = {
    "list": lambda: BATCHES, "generator": lambda: (batch for batch in BATCHES), "iterator": lambda: iter(BATCHES),
    "loader": lambda: DataLoader(noise(12, 6), batch_size=4), "map": lambda: map(torch.clone, BATCHES),
    "labels": lambda: DataLoader(TensorDataset(noise(12, 6), torch.zeros(12)), batch_size=4),
    "iterable data set": lambda: DataLoader(Stream(), batch_size=4), "chain": lambda: itertools.chain(BATCHES),
}  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_finite_streams_are_measured_to_their_end(stream):
    found = gs.gsc(model(), stream())
    assert (found.num_batches, found.num_samples, found.stopped) == (3, 12, "end of data")


def endless():
    while True:
        yield noise(4, 6)


@pytest.mark.parametrize("stream", [endless, lambda: itertools.cycle(BATCHES), lambda: itertools.repeat(BATCHES[0])])
def test_an_endless_stream_ends_with_a_warning_that_names_the_line_of_the_user(stream, monkeypatch):
    monkeypatch.setattr(planning, "MOST_BATCHES", 5)
    with pytest.warns(
        UserWarning, match=r"data has no length, so it was measured up to 5 batches.*max_samples="
    ) as told:
        found = gs.gsc(model(), stream())
    assert (found.num_batches, found.stopped, told[0].filename) == (5, "5 batches", __file__)


def test_an_option_ends_an_endless_stream(monkeypatch):
    monkeypatch.setattr(planning, "MOST_BATCHES", 2)
    found = gs.gsc(model(), endless(), max_samples=20)
    assert (found.num_batches, found.stopped) == (5, "max_samples")


def summed(network, x):
    return network(x).sum()


LOSSES = pd.DataFrame({"step": [1], "loss": [1.0]})


def profile():
    return gsc().to_frame()


BAD = [
    (lambda: gs.report(model(), noise(4, 6), ""), "path must be the path of a file or folder, got ''"),
    (lambda: gs.report(model(), noise(4, 6), ".", check=False), "path must name a file, but . is a folder"),
    (lambda: gsc(max_samples="many"), "max_samples must be an integer of at least 1 or None, got 'many'"),
    (lambda: gsc(generator=0), "generator must be a torch.Generator or None, got 0"),
    (lambda: gsc(forward=lambda x: x), r"forward must be a function of 2 arguments or None, got function"),
    (lambda: gsc(target=3), "target must be a string or None, got 3"),
    (lambda: gsc(probes=10**6), 'probes must be at most 100,000, got 1000000: use probes="exact"'),
    (lambda: gsc().growth(margin=math.nan), "margin must be a finite number >= 0, got nan"),
    (lambda: gs.measure(model(), noise(4, 6), measures=[3]), r"measures .* each item a gradscope.Measure.*\[3\]"),
    (lambda: gs.meanfield.MeanField("tanh", 10**400), "weight_variance must be a finite number >= 0, got 1000"),
    (lambda: gs.meanfield.MeanField("tanh", 1.0).chi([]), r"q must be finite numbers >= 0, got \[\]"),
    (lambda: gs.meanfield.gaussian(lambda h: "x"), "function.* must map 3 numbers to 3 numbers"),
    (lambda: gs.models.MLP(depth=10**9, width=4), "depth must be an integer from 1 to 100,000, got 1000000000"),
    (lambda: gs.models.MLP(depth=1, width=10**6), r"more than 268,435,456 weights: choose a smaller width"),
    (lambda: gs.probes.sphere(2, 3, device="x"), "device must be a device of this machine, such as 'cpu', got 'x'"),
    (lambda: gs.probes.sphere(2**20, 2**20), "num \\* size must be at most"),
    (lambda: gs.measures.SignDiversity()([1]), r"values must be a dense tensor, .* got \[1\]"),
    (lambda: gs.frames.tidy({"layer": "a"}), "columns lacks 'index'"),
    (lambda: gs.frames.check(gs.frames.observed("a", 1.0).assign(index="x")), "Column 'index' .* numbers, got 'x'"),
    (lambda: gs.plots.theory([1], ax=gsc().plot()), r"predicted must be a Prediction, .* got \[1\]"),
    (lambda: gs.plots.learning(pd.DataFrame({"step": ["a"], "loss": 1.0}), "loss"), "Column 'step' .* got 'a'"),
    (lambda: gs.sinks.values_of(pd.DataFrame({"layer": ["a"]})), "lacks the columns 'quantity', 'value', 'log1"),
    (lambda: gs.gsc(nn.Linear(3, 3), noise(4, 6)), r"model cannot run on data of float64 \(4, 6\).*mat1 and mat2"),
    (lambda: gs.models.AlexNetA(dropout=100), r"dropout must be a number in \[0, 1\], got 100"),
    (lambda: gs.measures.SignDiversity()(torch.tensor(3)), r"at least two samples .* got shape \(\)"),
    (lambda: gs.Monitor(nn.Linear(6, 3), noise(4, 6), sinks=np.array(3.0)), "sinks must be a list .* got ndarray"),
    (lambda: gs.frames.load("missing/x.parquet"), "No such file, check path: 'missing/x.parquet'"),
    (lambda: gs.frames.save(gs.frames.observed("a", 1.0), "x" * 300 + ".csv"), "path must be the path of a file"),
    (lambda: gs.frames.observed([], [1.0, 2.0]), r"Column 'quantity' must hold 2 values of type str, got \[\]"),
    (lambda: gs.frames.observed("a", [1.0, 2.0], step=[1, 2, 3]), "Column 'step' must hold one value or 2, got"),
    (lambda: gs.report_frame(profile(), growth=profile()), "lacks the columns 'network', 'rate', 'verdict'; it has"),
    (lambda: gs.report_frame(profile(), theory=profile()), "The frame lacks the column 'network'; it has 'layer'"),
    (lambda: gs.report_frame(pd.DataFrame({"layer": ["a"]})), "The frame lacks the columns 'index', .*'quantity'"),
    (lambda: gs.plots.profile(profile().assign(layer=None)), "Column 'layer' of the frame must not hold nulls"),
    (lambda: gs.plots.profile(profile(), hue="layer"), "hue and style must name .* 'layer' varies in a curve"),
    (lambda: gs.plots.profile([]), "A plot takes a list or dict of at least one result"),
    (lambda: gs.plots.learning(LOSSES, "loss", hue=""), "The frame lacks the column ''; it has 'step', 'loss'"),
    (lambda: gs.plots.theory(profile(), [], ax=gsc().plot()), "keys must name at least one column"),
    (lambda: gs.Estimate(np.array(np.nan), 0.1), "mantissa must be a number other than NaN, got ndarray"),
    (lambda: gs.Estimate(1.0, 0.1, freedom=np.nan), "freedom must be a number other than NaN, got nan"),
    (lambda: gs.measures.PreactivationStd()(torch.tensor([[math.nan], [1.0]])), "'preactivation_std' is NaN, because"),
    (lambda: gs.measures.SignDiversity()(()), r"values must be a dense tensor, or for responses a pair .* got \(\)"),
    (lambda: gs.qm_norm([[1.0, math.nan]]), "qm_norm is not defined: a holds NaN"),
    (lambda: gs.testing.assert_qm_norm(np.ones((2, 3, 4)), 1), r"operator must be one matrix, got shape \(2, 3, 4\)"),
    (lambda: gs.LinearOperator((3, 3), noise, lambda u: None).dense(), r"rmatvec must return a tensor .* got None"),
    (lambda: gs.LinearOperator((4, 3), lambda v: v, noise).dense(), r"matvec must .* \(4,\), got .* shape \(3,\)"),
    (lambda: gs.nlc(model(), noise(4, 6), target="input"), "target must be a layer after the input, got 'input'"),
    (lambda: gs.nlc(model(), itertools.count()), "data has more than 2,000 batches, and NLC keeps all in memory"),
    (lambda: gs.compare(gs.models.MLP(depth=2, width=6), torch.zeros(4, 6)), "The data has the mean square 0; theory"),
    (lambda: gs.Monitor(model(), noise(4, 6)).load_state_dict({"steps": 3}), "it lacks 'recorded', 'alarms', 'first_l"),
    (lambda: gs.sinks.values_of(profile().assign(log10_value=None)), "Column 'log10_value' .* for the quantity 'gsc'"),
    (lambda: gs.sinks.Sinks(torch.tensor(3.0)), "sinks must be a list of objects with .* got Tensor"),
    (lambda: gs.sinks.Sinks([math]), "sinks must be a list of objects with .* got module"),
    (lambda: gs.initializers.he(inferred(lambda: torch.ones(2, 3))), "weight must be a torch.Tensor made outside inf"),
    (lambda: gs.measures.contrast(nn.LazyLinear(3), noise(4, 1, 2, 2)), r"\(LazyLinear\) is not initialized"),
    (lambda: gs.measures.argmax_agreement(nn.Identity(), noise(4, 1, 2, 2), (1, 0)), "outputs of the model must have"),
    (lambda: gs.measure(nn.Linear(6, 6).double(), noise(4, 6)), "No nonlinearity module was called in model Linear"),
    (lambda: gs.gsc(model(), noise(4, 6), loss_fn=nn.Identity()), "loss_fn must be a function of 2 arguments or None"),
    (lambda: gs.meanfield.gaussian(np.abs, shift=math.inf), "shift must be finite numbers, got inf"),
    (lambda: gs.meanfield.gaussian(np.square, shift=1e308), "standard deviation 1 and shift 1e.308 is not known"),
    (lambda: gs.meanfield.batch_moments("relu", 1e308), r"batch_size must be a whole number >= 4 or infinite, got 1"),
    (lambda: gs.meanfield.batch_moments("relu", 10**12), r"With batch_size=1e\+12: An expectation over a sphere"),
    (lambda: gs.meanfield.critical_line("tanh", np.ones((2, 2))), "lengths must be finite numbers >= 0 in one"),
    (lambda: gs.meanfield.weight_gain("tanh", 1e9, 0.1), "no weight variance with the rate chi_1 = 1e.09 for tanh"),
    (lambda: gs.meanfield.gsc_rate("tanh", bias_variance=1e308), r"at weight_variance=1 and bias_variance=1e\+308"),
    (lambda: gs.Monitor(model(), noise(4, 6)).step(torch.ones((), device="meta")), r"one loss, .* \(\) on meta: give"),
    (lambda: gs.compare(nn.Linear(6, 3).double(), noise(4, 6), forward=summed), r"Layer 'output' has shape \(\); th"),
    (lambda: gs.qm_norm(2**63), r"qm_norm needs nonempty matrices \(..., m, n\), got shape \(\)"),
    (lambda: gs.qm_norm(torch.eye(3).to_sparse()), "qm_norm needs a dense tensor, got layout torch.sparse_coo"),
    (lambda: gs.initializers.critical(nn.LazyLinear(3), "tanh"), r"\(LazyLinear\) is not initialized"),
    (lambda: gs.growth(3), "data must be a gradscope.Measured or a pandas.DataFrame or a sequence .* got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_odd_values_are_refused_in_one_sentence(call, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message) as caught:
        call()
    assert len(str(caught.value)) < 400


def test_a_large_dilution_leaves_the_skip_alone():
    assert gs.meanfield.residual_rate(1.5, 1e308) == 1.0


class Tracker:
    def __init__(self):
        self.received = []

    def log(self, values, step=None, commit=True):
        self.received.append((step, values))


def test_objects_with_other_methods_that_have_the_names_are_no_sinks(tmp_path):
    tracker = Tracker()
    gs.sinks.Sinks([tracker]).write(np.int64(3), {"loss": np.float32(0.5)})
    assert tracker.received == [(3, {"loss": 0.5})]
    with (tmp_path / "log.txt").open("w") as file, pytest.raises(TypeError, match="sinks must be a list of objects"):
        gs.sinks.Sinks([file])  # whose method `write` takes a text


def test_one_width_without_theory_is_drawn():
    rates = {"rate": 1.2, "rate_low": 1.1, "rate_high": 1.3}
    assert not gs.plots.convergence(pd.DataFrame({"width": [50], **rates})).texts


def test_a_checked_function_looks_like_itself():
    def half(number: int, *rest: str, **options: float) -> float:
        """Half."""
        return number / 2

    same = checked(half)
    assert (
        inspect.signature(same) == inspect.signature(half) and same.__doc__ == "Half." and same.__module__ == __name__
    )
    assert same(3, "a", scale=2) == 1.5
    with pytest.raises(ArgumentError, match="number must be an integer, got 'a'"):
        same("a")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'number'"):
        same()
