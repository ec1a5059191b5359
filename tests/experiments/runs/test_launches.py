"""How a launch of a sweep ends: its exit code, its messages, and what it leaves behind."""

import errno
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from benchmarks.kills import alive
from experiments import measure, status
from experiments.archive import collecting
from experiments.config import command_line, schema
from experiments.program import PARENT
from experiments.runs import launches, locks, workers
from experiments.runs import names as run_names
from experiments.runs import outcomes as run_outcomes
from tests.experiments.runs.test_sweeps import SMALL, running_in, start

schema.register()
FAILING = ("mode=train,nonsense", "seed=0,1")


@pytest.fixture
def launch(tmp_path, monkeypatch, capfd):
    """A sweep in this process: its exit code, and what it printed."""

    def launched(*arguments):
        monkeypatch.setattr(sys, "argv", ["measure", "-m", *SMALL, f"results={tmp_path}", "sweep=s", *arguments])
        code = 0
        try:
            command_line.run_hydra(measure.main)
        except SystemExit as ended:
            code = ended.code
        return code, capfd.readouterr().err + (code if isinstance(code, str) else "")

    return launched


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_failures_are_counted_where_a_key_is_globbed(launch):
    code, said = launch("model=glob(tanh*)", "mode=train,nonsense")
    assert code == 1 and "s: 3 of 6 runs failed." in said and "mode must be train or eval" in said


def test_a_launch_that_cannot_begin_says_so(launch, tmp_path, monkeypatch):
    (tmp_path / "s").write_text("a file where the folder should be")
    assert launch("seed=1,2") == (f"cannot write to {tmp_path}/s: Not a directory",) * 2
    (tmp_path / "s").unlink()
    monkeypatch.setattr(launches, "write_json", full)
    assert launch("seed=1,2")[0] == f"cannot write to {tmp_path}/s: No space left on device"


def test_torn_lines_of_a_launch_cost_only_progress(launch, monkeypatch, tmp_path):
    original = launches.note

    def torn(folder, *arguments, **options):
        with launches.current().open("a") as file:
            file.write('{"run": "a", "sta\n[]\n')
        original(folder, *arguments, **options)

    monkeypatch.setattr(launches, "note", torn)
    code, said = launch(*FAILING)
    assert code == 1 and "2 of 4 runs failed" in said
    (path,) = (tmp_path / "s" / "launches").glob("*.jsonl")
    assert [entry["state"] for entry in launches.ended(path)] == ["done", "done", "failed", "failed"]


def test_workers_that_know_no_launch_are_counted_all_the_same(launch, monkeypatch):
    monkeypatch.setattr(launches, "current", lambda: None)
    code, said = launch(*FAILING)
    assert code == 1 and "2 of 4 runs failed" in said


def test_a_launch_is_named_by_the_configuration(launch, tmp_path, monkeypatch):
    seen = []
    original = launches.current
    monkeypatch.setattr(launches, "current", lambda: (seen.append(original()), original())[1])
    assert launch("seed=0,1")[0] == 0
    (path,) = (tmp_path / "s" / "launches").glob("*.jsonl")
    assert set(seen) == {path.resolve()} and launches.VARIABLE not in os.environ


def test_a_full_disk_still_has_a_table(launch, monkeypatch):
    monkeypatch.setattr(launches.os, "write", full)
    code, said = launch(*FAILING)
    assert code == 1 and "2 of 4 runs failed" in said and "mode must be" in said
    monkeypatch.setattr(run_outcomes, "write_json", full)
    code, said = launch("seed=5,6", "on_error=stop")
    assert code == 1 and "ended without a status" in said and "no runs were started" in said


def folder(tmp_path, *overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return run_names.folder(compose("measure", [*SMALL, f"results={tmp_path}", "sweep=s", *overrides]), overrides)


def test_a_run_folder_that_cannot_be_written(launch, tmp_path, monkeypatch):
    where = folder(tmp_path, "seed=1")
    where.write_text("a file where the folder should be")
    code, said = launch("seed=1,2")
    assert code == 1 and "1 of 2 runs failed" in said and f"cannot write to {where}: File exists" in said
    monkeypatch.setattr(sys, "argv", ["measure", *SMALL, f"results={tmp_path}", "sweep=s", "seed=1"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit, match=r"Error: cannot write to .*: File exists"):
        measure.main()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder(launch, tmp_path):
    where = folder(tmp_path, "seed=1")
    where.mkdir(parents=True)
    where.chmod(0o500)
    code, said = launch("seed=1,2")
    assert code == 1 and f"cannot write to {where}: Permission denied" in said


def test_what_cannot_be_composed_is_said_in_short(launch, tmp_path):
    code, said = launch("model.depth=5,deep")
    assert code == "Error: 'model.depth=deep': model.depth must be a whole number."
    assert "Traceback" not in said
    code, said = launch("model.deep=5,6")
    assert code == "Error: Unknown key 'model.deep'; did you mean 'model.depth'?"
    assert launch("seed=1,2", "on_error=maybe")[0] == "Error: on_error must be one of continue, stop, got 'maybe'."
    assert launches.planned(tmp_path / "s") == {}


def test_torchrun_and_a_sweep(launch, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "only train uses several processes: start this command without torchrun" in launch("seed=1,2")[0]


def test_missing_is_what_is_planned_and_has_no_folder(launch, tmp_path):
    for arguments in (["matrix=true"], ["matrix=True", "device=cpu"], ["rerun=true", "matrix=true"]):
        assert launch("seed=1,2", *arguments)[0] == 0
    assert [one.state for one in run_outcomes.states(tmp_path / "s")] == ["done"] * 2
    assert len(launches.planned(tmp_path / "s")) == 2
    shutil.rmtree(run_names.folders(tmp_path / "s")[0])
    (missing,) = status.look(tmp_path / "s").having(run_outcomes.MISSING)
    assert missing.name.lower().endswith("seed=1,matrix=true")
    assert collecting.collect(tmp_path / "s").manifest["missing"] == 1


def test_one_configuration_one_name(tmp_path):
    together, names, digest = threading.Barrier(8), [], "0123456789ab"

    def ask(number):
        together.wait()
        names.append(run_names.agreed(tmp_path, digest, f"{number}-{digest}"))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 1 and len(names) == 8
    assert [path.name for path in (tmp_path / "launches" / "names").iterdir()] == [digest]


def test_done_runs_are_not_sent_to_a_cluster(launch, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    assert launch("seed=range(2)")[0] == 0
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (commands / name).write_text(f'#!/bin/sh\ncp "$1" {commands}/sent\nexit 1\n')
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    said = "Error: The cluster refused the jobs, which ask for cpus_per_task=1, mem_gb=2, timeout_min=60: sbatch failed"
    assert launch("seed=range(5)", "launcher=slurm")[0].startswith(said)
    assert "#SBATCH --array=0-2%3" in (commands / "sent").read_text()


def test_jobs_that_would_all_begin_at_once_are_capped(monkeypatch):
    local = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.submitit_launcher", reason="needs slurm")
    assert workers.most_at_once(local.LocalLauncher()) == os.cpu_count()
    monkeypatch.setenv("GRADSCOPE_PROCESSES", "3")
    assert workers.most_at_once(local.LocalLauncher()) == 3 and workers.most_at_once(local.SlurmLauncher()) is None


def test_runs_of_another_launch_are_waited_for(launch, tmp_path, monkeypatch):
    where, begun, asked, original = folder(tmp_path, "seed=1"), threading.Event(), threading.Event(), locks.held

    def held(where, *arguments, **options):
        found = original(where, *arguments, **options)
        if not arguments:  # a launch that waits
            asked.set()
        return found

    monkeypatch.setattr(locks, "held", held)

    def other():
        with locks.locked(where):
            begun.set()
            asked.wait(120)  # and leaves it half done

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    code, said = launch("seed=1,2")
    thread.join()
    assert code == 0 and "s: waiting for 1 runs of another launch." in said and run_outcomes.is_done(where)


def test_what_is_raised_around_a_run_is_a_failure_also_of_one_that_was_done(launch, tmp_path, monkeypatch):
    assert launch("seed=1,2")[0] == 0
    monkeypatch.setattr(measure, "run_once", full)
    code, said = launch("seed=1,2", "rerun=true")
    assert code == 1 and "s: 2 of 2 runs failed.\n  OSError: [Errno 28] No space left on device" in said
    monkeypatch.setattr(measure, "run_once", lambda *arguments, **options: None)
    code, said = launch("seed=1,2", "rerun=true")
    assert code == 1 and "s: 2 of 2 runs were not started." in said


@pytest.mark.parametrize("nothing", ["model=glob(zzz*)", "seed=range(5,3)"])
def test_a_sweep_without_runs_is_none(launch, nothing):
    assert f"{nothing} gives no value, so the sweep has no runs" in launch(nothing)[0]


@pytest.mark.parametrize("name, part", [("s/data", "data"), ("metrics", "metrics"), ("s/data.old", "data.old")])
def test_names_that_mean_something_else_are_refused(launch, tmp_path, monkeypatch, name, part):
    said = f"Error: sweep={name}: {part!r} is reserved"
    assert said in launch(f"sweep={name}", "seed=0,1")[0]
    monkeypatch.setattr(sys, "argv", ["measure", *SMALL, f"results={tmp_path}", f"sweep={name}"])
    with pytest.raises(SystemExit, match=re.escape(said)):
        measure.main()
    assert not list(tmp_path.rglob("*.parquet"))


def test_what_is_no_run_is_not_counted(launch, tmp_path):
    assert launch("seed=0,1")[0] == 0 and launch("seed=0", "sweep=s/inner")[0] == 0
    for name in ("notes", ".ipynb_checkpoints"):
        (tmp_path / "s" / name).mkdir()
    progress = status.look(tmp_path / "s")
    assert [one.state for one in progress.outcomes] == ["done"] * 2 and len(
        status.look(tmp_path / "s" / "inner").outcomes
    ) == 1


def test_a_sweep_says_what_is_done(launch):
    assert launch("seed=0,1") == (0, "s: all 2 runs are done.\n")
    assert launch("seed=range(3)") == (0, "s: all 3 runs are done, 2 of them from earlier launches.\n")


def test_what_hydra_knows_of_a_run(launch, tmp_path):
    assert launch("+tag=${hydra:runtime.choices.model}", "model=tanh,selu")[0] == 0
    assert set(collecting.collect(tmp_path / "s").frame["tag"]) == {"tanh", "selu"}
    # The number of a run is another with each launch, and the place of a sweep is asked for before there are runs.
    assert re.match(
        r"Error: seed: .*job.num.* \(.*mode=train\)$", launch("seed=${hydra:job.num}", "mode=train,eval")[0]
    )
    assert launch("sweep=${hydra:job.name}", "seed=0,1")[0].startswith("Error: sweep: ")


@pytest.mark.parametrize("asked", ["abc", "0", "-3", "1.5"])
def test_a_number_of_processes_is_checked(launch, monkeypatch, asked):
    monkeypatch.setenv("GRADSCOPE_PROCESSES", asked)
    said = f"Error: GRADSCOPE_PROCESSES must be a positive number (or -1: one per core), got {asked!r}."
    assert launch("seed=0,1")[0] == said


@pytest.mark.parametrize("asked", ["abc", "-1", "0"])
def test_a_size_of_batches_is_checked(launch, asked):
    code, _ = launch("seed=0,1", f"hydra.sweeper.max_batch_size={asked}")
    assert code.startswith("Error: hydra.sweeper.max_batch_size must be a positive number, got ")


def test_keys_of_mixed_types_have_a_digest(launch):
    code, said = launch("seed=0,1", "+extra=[{b:3,1:4}]")
    assert code == 0, said


def test_many_different_errors_are_cut(capfd):
    outcomes = [run_outcomes.Outcome(f"run{number}", "", "failed", error=f"error {number}") for number in range(30)]
    run_outcomes.print_summary("s", outcomes, False)
    said = capfd.readouterr().err
    assert "error 9\n" in said and "error 10\n" not in said and "and 20 other errors" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["data.shape=[3,2]", "model.in_features=5"], "Error: This MLP needs 5 features per sample, got 6."),
        (
            [
                "model=custom",
                "model._target_=torch.nn.Linear",
                "+model.in_features=5",
                "+model.out_features=2",
                "data.shape=[6]",
            ],
            "Error: The model cannot run on data of float32 (100, 6)",
        ),
        (["model=custom", "model._target_=tests.experiments.runs.dying.Nope"], "Nope"),
    ],
)
def test_a_single_run_that_fails_says_the_message_alone(tmp_path, monkeypatch, capfd, arguments, said):
    small = SMALL if "model=custom" not in arguments else ()
    monkeypatch.setattr(sys, "argv", ["measure", *small, f"results={tmp_path}", "sweep=s", *arguments])
    with pytest.raises(SystemExit) as ended:
        measure.main()
    assert said in ended.value.code and "\nTraceback: " in ended.value.code
    assert "Traceback" not in capfd.readouterr().err


def test_a_refused_study_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure", "study=architectures", f"results={tmp_path}"])
    with pytest.raises(SystemExit, match="add -m"):
        measure.main()
    assert list(tmp_path.iterdir()) == []


def dying(name, *arguments):
    return [
        f"+measurement._target_=tests.experiments.runs.dying.{name}",
        *(f"+measurement.{argument}" for argument in arguments),
    ]


def test_an_interrupted_sweep_ends_in_one_line(launch):
    before = signal.getsignal(signal.SIGINT)
    code, said = launch(*dying("interrupts", "number=0,1,2"))
    (line,) = said.splitlines()
    assert code == 130 and line.startswith("s: stopped by SIGINT; 1 of 3 runs are done")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("launcher, numbers", [("processes", "0,1,2"), ("slurm_local", "1")])
def test_a_killed_process_costs_its_run_only(tmp_path, launcher, numbers):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    process = start(
        tmp_path, f"launcher={launcher}", *dying("kills", f"number={numbers}", f"marks='{tmp_path}'"),
        GRADSCOPE_PROCESSES="2",
    )  # fmt: skip
    output, _ = process.communicate(timeout=240)
    statuses = [
        run_outcomes.Status.read(path) for path in run_names.folders(tmp_path / "s") if run_outcomes.is_done(path)
    ]
    done = sorted(word[-1] for status in statuses for word in status.overrides if "number=" in word)
    assert done == [number for number in numbers.split(",") if number != "2"], output
    assert process.returncode == ("2" in numbers), output
    if "2" in numbers:
        assert "s: 1 of 3 runs failed.\n  killed by a signal, or out of memory\n" in output
    assert "Traceback (most" not in output and running_in(process.pid) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, how",
    [("processes", signal.SIGTERM), ("processes", signal.SIGKILL), ("slurm_local", signal.SIGINT)],
)
def test_a_signal_leaves_no_process(tmp_path, launcher, how):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    process = start(
        tmp_path, f"launcher={launcher}", *dying("sleeps", "number=1", "seconds=60"), GRADSCOPE_PROCESSES="2"
    )
    begin = time.monotonic()
    while not list(tmp_path.glob("s/*/*.lock")) and time.monotonic() < begin + 120:
        time.sleep(0.05)
    running = alive(process.pid)
    assert len(running) > 1
    if launcher == "processes":  # workers end with the launch also while they start
        given = [Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in running]
        assert sum(f"{PARENT}={process.pid}" in words for words in given) >= 1
    process.send_signal(how)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how), output
    assert running_in(process.pid) == []
    if how != signal.SIGKILL:
        assert "0 of 1 runs are done" in output and "Traceback" not in output


def searched(tmp_path, *arguments):
    """Exit code and lines of a search of two parameters, four runs."""
    pytest.importorskip("optuna", reason="needs the extra optuna")
    process = start(
        tmp_path, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=0", "model.weight_variance=interval(1.0,3.0)", *arguments,
    )  # fmt: skip
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.splitlines()


def test_a_search_survives_runs_that_fail(tmp_path):
    code, lines = searched(tmp_path, "mode=choice(train,nonsense)")
    states = [
        entry["state"] for path in (tmp_path / "s" / "launches").glob("*.jsonl") for entry in launches.ended(path)
    ]
    assert len(states) == 4 and {"done", "failed"} <= set(states)
    assert code == 1 and lines.count(f"s: {states.count('failed')} of 4 runs failed.") == 1


def test_a_search_in_which_every_run_fails_says_why(tmp_path):
    code, lines = searched(tmp_path, "mode=nonsense")
    at = lines.index("s: 4 of 4 runs failed.")
    assert code == 1 and "mode must be train or eval, got 'nonsense'" in lines[at + 1]


def test_a_single_run_goes_by_the_name_that_was_put_down(tmp_path):
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("measure", [*SMALL, f"results={tmp_path}", "sweep=s"])
    first = run_names.folder(cfg, ["seed=0"])
    run_names._known.cache_clear()  # as in another process, before there is a folder
    assert run_names.folder(cfg, ["mode=train"]) == first and first.name.startswith("seed=0-")


def test_an_interrupted_run_ends_in_one_line(tmp_path, monkeypatch, capsys):
    single = ["measure", *SMALL, f"results={tmp_path}", "sweep=s", *dying("interrupts", "number=1")]
    monkeypatch.setattr(sys, "argv", single)
    with pytest.raises(SystemExit) as ended:
        measure.main()
    assert ended.value.code == 130
    assert len(capsys.readouterr().err.splitlines()) == 1
    (folder,) = run_names.folders(tmp_path / "s")
    assert list(folder.iterdir()) == []  # neither a status nor a lock
