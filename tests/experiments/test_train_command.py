"""What `experiments.train` prints, writes and refuses, as a user meets it."""

import json
import re
import warnings

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

import gradscope as gs
from experiments import measure, train
from experiments.archive import collecting
from experiments.runs import locks, outcomes
from experiments.training import outputs, sinks
from experiments.training.records import read
from gradscope import frames
from tests.experiments.commands import run_main

pytest.importorskip("sklearn")
SMALL = [
    "model=mlp", "model.depth=3", "model.width=16", "model.activation=tanh", "data=digits", "train.max_steps=4",
    "train.batch_size=32", "train.log_every=1", "train.precision=float32", "monitor.every=2",
    "monitor.max_overhead=null", "device=cpu",
]  # fmt: skip
# The first update ruins the weights.
DIVERGING = ["model.activation=relu", "optimizer.lr=1e30", "train.schedule=constant"]


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    def train_with(*further, sweep=False, main=train.main, small=SMALL):
        arguments = [*["-m"] * sweep, *small, f"results={tmp_path}", *further]
        return run_main(main, capsys, monkeypatch, *arguments)

    return train_with


class Twice(nn.Module):
    """Calls one module two times."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second, self.last = nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.act(self.second(self.act(self.first(x.flatten(1))))))


def folder_of(tmp_path, sweep="train"):
    (folder,) = (path.parent for path in (tmp_path / sweep).glob("*/metrics.jsonl"))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_sinks_of_a_module_that_is_called_twice(command, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra sinks")
    pytest.importorskip("mlflow", reason="needs the extra sinks")
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    twice = ["model=custom", f"model._target_={__name__}.Twice", *SMALL[4:]]
    for _ in range(2):
        said, code = command("sinks=[tensorboard,mlflow]", "resume=none", small=twice)
        assert code is None, said
    folder = folder_of(tmp_path)
    client = MlflowClient(tracking_uri=(tmp_path / "train" / "mlruns").as_uri())
    new, old = client.search_runs([client.get_experiment_by_name("train").experiment_id])
    assert {run.info.status for run in (new, old)} == {"FINISHED"}  # resume=none is another run
    losses = [record["train_loss"] for record in read(folder / "metrics.jsonl")]
    assert [m.value for m in client.get_metric_history(new.info.run_id, "train_loss")] == losses
    assert {"log10_gsc/act", "log10_gsc/act-2"} <= new.data.metrics.keys()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train_loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("log10_gsc/act#2")] == [0, 2, 4]


@pytest.mark.filterwarnings("ignore::gradscope.MonitorWarning")
def test_a_run_that_diverges_leaves_its_tables(command, tmp_path):
    said, code = command(*DIVERGING)
    folder = folder_of(tmp_path)
    assert code == 1 and said.count("Stopped: The loss is") == 1 and "Traceback" not in said
    status = outcomes.Status.read(folder)
    assert status.state == outcomes.FAILED and "monitor.parquet" in status.files
    monitored, recorded = frames.load(folder / "monitor.parquet"), read(folder / "monitor.jsonl")
    assert sorted(set(monitored["step"])) == [record["step"] for record in recorded] == [0]
    assert set(monitored["activation"]) == {"relu"}
    found = collecting.collect(tmp_path / "train")
    assert found.manifest["runs"] == found.manifest["failed"] == 1 and len(found.frame) == len(monitored)


def test_the_records_of_training_up_to_an_error(tmp_path):
    cfg = OmegaConf.create({"sinks": []})
    with pytest.raises(KeyError) as caught, outputs.Outputs(cfg, tmp_path, Console(quiet=True), 9, None, {"a": 1}) as o:
        o.trained({"step": 1, "epoch": 0.5, "train_loss": 2.5, "images_per_second": 1.0})
        (tmp_path / "metrics.parquet").mkdir()  # so that the table cannot be written
        raise KeyError("the first error")
    assert "the first error" in str(caught.value) and any("metrics.parquet" in note for note in caught.value.__notes__)
    assert read(tmp_path / "metrics.jsonl")[0]["train_loss"] == 2.5
    (tmp_path / "metrics.parquet").rmdir()
    with outputs.Outputs(cfg, tmp_path, Console(quiet=True), 9, None, {"a": 1}) as o:
        o.trained({"step": 1, "epoch": 0.5, "train_loss": 2.5, "images_per_second": 1.0})
    assert pd.read_parquet(tmp_path / "metrics.parquet")[["train_loss", "a"]].values.tolist() == [[2.5, 1]]


def test_sinks_are_told_how_a_run_ended(tmp_path, monkeypatch):
    ended = []

    class Sink:
        def __init__(self, *arguments):
            pass

        def write(self, step, values):
            pass

        def close(self, error=None):
            ended.append(type(error))

    monkeypatch.setattr(sinks, "KNOWN", {"mine": ("", Sink)})
    cfg = OmegaConf.create({"sinks": ["mine"]})
    with outputs.Outputs(cfg, tmp_path, Console(quiet=True), 9, None, {}):
        pass
    with pytest.raises(gs.NonFiniteError), outputs.Outputs(cfg, tmp_path, Console(quiet=True), 9, None, {}):
        raise gs.NonFiniteError
    assert ended == [type(None), gs.NonFiniteError]


@pytest.mark.filterwarnings("default::gradscope.sinks.SinkWarning")
def test_a_sink_that_fails_stops_no_run(command, tmp_path, monkeypatch):
    class Gone:
        def __init__(self, *arguments):
            pass

        def write(self, step, values):
            raise ConnectionError("the server is gone")

    monkeypatch.setattr(sinks, "KNOWN", {"gone": ("", Gone)})
    said, code = command("sinks=[gone]")
    assert code is None and len(read(folder_of(tmp_path) / "metrics.jsonl")) == 4
    assert re.findall(r"^Warning: Sink \S*Gone failed: ConnectionError: the server is gone", said, re.M) and (
        said.count("failed") == 1
    )


@pytest.mark.filterwarnings("default")
def test_a_run_that_only_warns_goes_on(command, tmp_path):
    said, _ = command(*DIVERGING, "monitor.on_nonfinite=warn")
    assert len(re.findall(r"^Warning: The loss is \w+ at step 1: layer 'layers\.\d", said, re.M)) >= 1
    assert [record["step"] for record in read(folder_of(tmp_path) / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("default::gradscope.MonitorWarning")
def test_what_the_budget_left_out_is_said(command):
    assert "The monitor took" not in command()[0]
    said, _ = command("monitor.every=1", "monitor.max_overhead=1e-9", "train.max_steps=60")
    assert "Warning: The monitor took 21 of 61 scheduled records" in said and "max_overhead=1e-09" in said


def test_every_record_is_a_line_where_there_is_no_bar(command, tmp_path):
    said, _ = command()
    lines = re.findall(r"^step (\d) of 4  epoch [\d.]+  loss [\d.]+.*samples/s$", said, re.M)
    assert lines == ["1", "2", "3", "4"]
    place = f"sweep=train results={tmp_path}"
    draw = f"Draw: python -m experiments.collect {place} && python -m experiments.figures {place}"
    assert said.splitlines()[-2:] == [f"Run folder: {folder_of(tmp_path)}", draw]
    said, _ = command("train.log_every=2", "seed=1", sweep=True)  # many runs: a line per epoch
    assert re.findall(r"^step (\d) of 4", said, re.M) == ["4"]


def test_a_run_that_another_process_holds_is_one_line(command, tmp_path):
    command()
    folder = folder_of(tmp_path)
    with locks.locked(folder):
        said, code = command("resume=none")
    assert code == 1 and said == (
        f"Error: Another process is working on the run {folder}: wait until it ends, or follow it in its files.\n"
    )


def test_a_diverged_run_says_where_its_records_are(command, tmp_path):
    said, code = command(*DIVERGING)
    assert code == 1 and re.search(r"^Stopped: .*", said, re.M)
    assert f"{train.NEXT}\nRun folder: {folder_of(tmp_path)}\nDraw: python -m" in said


def test_a_mistake_is_told_without_a_traceback(command, tmp_path):
    said, code = command("monitor.batch_size=100000")
    (error,) = (tmp_path / "train").glob("*/error.txt")
    assert code == 1 and "Traceback (most" not in said
    assert said.splitlines()[-2:] == [
        "Error: monitor.batch_size must be between 1 and the 449 test images, got 100000.", f"Traceback: {error}",
    ]  # fmt: skip
    assert "Traceback (most recent call last)" in error.read_text()
    said, code = command("model.activation=nonsense", main=measure.main, small=["model.depth=3"])
    assert code == 1 and re.match(r"Error: activation must be one of .*\nTraceback: .*error.txt\n$", said)


def test_missing_images_are_told_with_data_that_can_be_trained_on(command, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSCOPE_DATA", str(tmp_path))
    said, code = command(small=["model=alexnet_b"])
    assert code == 1 and "no CIFAR-10 in" in said and "data=digits" in said


def test_a_study_that_sweeps_is_no_single_run(command):
    said, code = command("study=alexnet", small=[])
    assert code == 1 and "study=alexnet sweeps model, seed: add -m" in said
    said, code = command("study=alexnet", "model=alexnet_b", small=[])
    assert code == 1 and "study=alexnet sweeps seed: add -m" in said and "(seed=...)" in said
    said, code = command("study=trained_alexnet", small=[])
    assert code == 1 and "study=trained_alexnet sweeps model, seed" in said
    said, code = command("study=architectures", "seed=1", main=measure.main, small=[])
    assert code == 1 and "study=architectures sweeps model: add -m" in said
    one = ["study=architectures", "seed=1", "model=relu", "model.depth=3", "model.width=4", "matrix=false", "nlc=false"]
    said, code = command(*one, main=measure.main, small=[])
    assert code is None and "Run folder" in said


def test_warnings_are_printed_above_the_bar(tmp_path, monkeypatch):
    quiet = Console(quiet=True)
    with outputs.Outputs(OmegaConf.create({"sinks": []}), tmp_path, quiet, 9, None, {}) as o:
        printed = []
        monkeypatch.setattr(o.bar, "visible", True)
        monkeypatch.setattr(o.bar.console, "print", lambda text, **options: printed.append(text))
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            shown = outputs.warnings.showwarning
            shown(gs.MonitorWarning("dead"), gs.MonitorWarning, "file", 1)
        monkeypatch.setattr(o.bar, "visible", False)
    assert printed == ["Warning: dead"]


def test_the_manifest_says_what_the_machine_decided(command, tmp_path):
    command("train.precision=bfloat16")
    hardware = json.loads((folder_of(tmp_path) / "manifest.json").read_text())["hardware"]
    assert hardware["autocast"] == str(torch.bfloat16) and hardware["world_size"] == 1
