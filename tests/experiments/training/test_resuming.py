"""Restarted training runs: what they resume from, what they delete, what they keep."""

import os
import signal
import time

import pytest
import torch
from hydra import compose, initialize_config_module
from rich.console import Console

from experiments import train
from experiments.runs import names, outcomes
from experiments.training import checkpoints, loop
from experiments.training.records import read
from tests.commands import Command
from tests.experiments.commands import run_main

pytest.importorskip("sklearn")
CPU = torch.device("cpu")
SMALL = [
    "model=mlp", "model.depth=3", "model.width=16", "model.activation=tanh", "data=digits", "train.max_steps=6",
    "train.batch_size=32", "train.log_every=2", "train.checkpoint_every=2", "train.precision=float32",
    "monitor.every=2", "monitor.max_overhead=null", "device=cpu",
]  # fmt: skip


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Train in ``tmp_path/train``; returns the printed text and the exit code."""

    def train_with(*further, sweep=False):
        arguments = [*["-m"] * sweep, *SMALL, f"results={tmp_path}", *further]
        return run_main(train.main, capsys, monkeypatch, *arguments)

    return train_with


def folder_of(tmp_path, sweep="train"):
    (folder,) = (entry for entry in (tmp_path / sweep).iterdir() if entry.name != "launches" and entry.is_dir())
    return folder


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder):
    return checkpoints.load(folder / "checkpoints", CPU)["model"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def killed_after(monkeypatch, steps):
    """Let the loop exit silently after ``steps`` steps, as SIGKILL would."""
    original, left = loop.update, [steps]

    def update(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise SystemExit(9)
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "update", update)


def test_a_finished_run_is_left_alone(command, tmp_path):
    said, code = command()
    folder = folder_of(tmp_path)
    before = content(folder)
    assert code is None and "Run folder" in said
    again, code = command()
    assert code is None and f"Already done at step 6; resume=none trains again.\nRun folder: {folder}" in again
    assert content(folder) == before


@pytest.mark.parametrize("fresh", ["resume=none", "rerun=true"])
def test_what_begins_anew_does_not_go_on_from_the_run_before(command, tmp_path, monkeypatch, fresh):
    command("train.keep=9")
    folder = folder_of(tmp_path)
    done, records = weights(folder), read(folder / "metrics.jsonl")
    (folder / "nonfinite.pt").write_bytes(b"of the run before")
    with monkeypatch.context() as patch:
        killed_after(patch, 1)  # before its first checkpoint
        assert command(fresh)[1] == 9
    assert not list(folder.rglob("*.pt")) and not outcomes.is_done(folder)
    assert read(folder / "metrics.jsonl") == []
    said, code = command()
    assert code is None and "Going on" not in said and "epoch" in said
    assert same(weights(folder), done)
    assert [r["train_loss"] for r in read(folder / "metrics.jsonl")] == [r["train_loss"] for r in records]


@pytest.mark.parametrize("mistake", ["sinks=[csv]", "monitor.probes=9", "monitor.batch_size=0", "model.out_features=2"])
def test_a_mistake_removes_nothing(command, tmp_path, mistake):
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", [*SMALL, "resume=none", mistake])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"of the run before")
    with pytest.raises(ValueError, match=mistake.partition("=")[0].rpartition(".")[2]):
        train.train(cfg, tmp_path, CPU, Console(quiet=True))
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["last.pt"]


def test_a_sweep_makes_done_runs_again_where_it_is_told_to(command, tmp_path):
    command("sweep=s")
    folder = folder_of(tmp_path, "s")
    before = (folder / "checkpoints" / "last.pt").stat().st_mtime_ns
    assert "epoch" not in command("sweep=s", sweep=True)[0]
    said, _ = command("sweep=s", "rerun=true", sweep=True)
    assert "epoch 0.14" in said and "Going on" not in said
    assert (folder / "checkpoints" / "last.pt").stat().st_mtime_ns > before and outcomes.is_done(folder)


def test_kept_checkpoints_are_of_this_run(tmp_path):
    for step in (800, 840, 100, 200):  # the run was taken back to an early step and went on from there
        checkpoints.save({"step": step}, tmp_path)
        checkpoints.keep(tmp_path, step, 2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000100.pt", "step-00000200.pt"]


def composed(*overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("train", [*SMALL, *overrides])


def test_how_often_it_is_saved_makes_no_other_run(tmp_path):
    where = f"results={tmp_path}"
    plain = names.folder(composed(where), SMALL)
    saved = ["train.keep=3", "train.checkpoint_every=7"]
    assert names.folder(composed(where, *saved), [*SMALL, *saved]) == plain
    assert "keep" not in plain.name and "checkpoint_every" not in plain.name
    assert names.folder(composed(where, "train.log_every=7"), SMALL) != plain  # another table of records


@pytest.mark.parametrize(
    ("number", "fresh"),
    [(signal.SIGINT, None), (signal.SIGINT, "resume=none"), (signal.SIGINT, "rerun=true"), (signal.SIGTERM, None)],
)
def test_an_interrupt_leaves_a_checkpoint_to_go_on_from(command, tmp_path, monkeypatch, number, fresh):
    command("sweep=whole")
    with monkeypatch.context() as patch:
        original, steps = loop.update, []

        def update(*arguments, **options):
            loss = original(*arguments, **options)
            steps.append(loss)
            if len(steps) == 3:  # checkpoints are at 2 and 4
                os.kill(os.getpid(), number)
            return loss

        patch.setattr(loop, "update", update)
        said, code = command(*[fresh] * (fresh is not None))
    without = " without resume=none and rerun=true" if fresh else ""
    assert code == 128 + number, said
    assert f"Interrupted after step 3 of 6; the same command{without} resumes from there." in said
    assert len(steps) == 3 and checkpoints.load(folder_of(tmp_path) / "checkpoints", CPU)["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    said, code = command()
    assert code is None and "Resuming at step 3 of 6." in said
    assert same(weights(folder_of(tmp_path)), weights(folder_of(tmp_path, "whole")))


def test_a_second_interrupt_does_not_wait(command, tmp_path, monkeypatch):
    def twice(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(loop, "update", twice)
    said, code = command()
    assert code == 130 and "resumes from there" not in said and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_the_test_repeats_only_the_test(command, tmp_path, monkeypatch, number):
    command("sweep=whole")
    with monkeypatch.context() as patch:
        original = loop.evaluate

        def evaluate(*arguments, **options):
            os.kill(os.getpid(), number)
            return original(*arguments, **options)

        patch.setattr(loop, "evaluate", evaluate)
        said, code = command()
    assert code == 128 + number and "Interrupted after step 6 of 6; the same command resumes from there." in said
    assert "Resume: python -m experiments.train " in said
    state = checkpoints.load(folder_of(tmp_path) / "checkpoints", CPU)
    assert state["step"] == 6 and [record["step"] for record in state["records"]][-1] < 6
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", lambda *arguments, **options: pytest.fail("it trained on"))
        _, code = command()
    assert code is None and same(weights(folder_of(tmp_path)), weights(folder_of(tmp_path, "whole")))
    timed = {"images_per_second"}
    ends = [read(folder_of(tmp_path, sweep) / "metrics.jsonl") for sweep in ("train", "whole")]
    assert len(ends[0]) == len(ends[1])
    for one, other in zip(*ends, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.parametrize(("saved", "number"), [(True, signal.SIGINT), (False, signal.SIGINT), (True, signal.SIGTERM)])
def test_a_long_step_ends_within_two_seconds(command, tmp_path, monkeypatch, saved, number):
    original, calls = loop.update, []

    def update(*arguments, **options):
        calls.append(time.monotonic())
        if len(calls) == (4 if saved else 1):  # a checkpoint is at 2
            os.kill(os.getpid(), number)
            time.sleep(60)
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "update", update)
    said, code = command()
    assert code == 128 + number and time.monotonic() - calls[-1] < 2.5
    wanted = "the same command resumes from the last checkpoint." if saved else "there is no checkpoint yet"
    assert f"Interrupted within a step; {wanted}" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_and_started_again_it_ends_with_the_same_weights(tmp_path):
    longer = ["train.max_steps=300", "train.checkpoint_every=5", "train.epochs=100", "monitor.every=100"]
    options = [*SMALL, *longer, f"results={tmp_path}"]
    process = Command("experiments.train", *options)
    begin = time.monotonic()
    while not list(tmp_path.glob("train/*/checkpoints/last.pt")) and time.monotonic() < begin + 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    cfg, folder = composed(*options[len(SMALL) :]), folder_of(tmp_path)
    assert 0 < checkpoints.load(folder / "checkpoints", CPU)["step"] < 300 and not outcomes.is_done(folder)
    for into in (folder, tmp_path / "whole"):
        train.train(cfg, into, CPU, Console(quiet=True))
    assert same(weights(folder), weights(tmp_path / "whole"))
    losses = [[r["train_loss"] for r in read(into / "metrics.jsonl")] for into in (folder, tmp_path / "whole")]
    assert losses[0] == losses[1] and len(losses[0]) >= 150
