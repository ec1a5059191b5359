"""Sweeps that are killed, restarted, shared, and disturbed: nothing is lost, nothing is done twice."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from unittest import mock

import duckdb
import numpy as np
import pandas as pd
import polars
import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from benchmarks.kills import alive
from experiments import measure, rerun, seeds, status
from experiments.archive import collecting
from experiments.config import schema
from experiments.files import read_json, write_json
from experiments.runs import launches, locks, names, outcomes
from experiments.runs.plan import Composer, combinations
from gradscope import frames
from tests.commands import Command
from tests.experiments.example_runs import ELSEWHERE
from tests.helpers import ROOT

schema.register()
SMALL = ("model.depth=6", "model.width=8", "data.batch_size=8", "probes=2")


def start(results, *arguments, module="measure", **environment):
    options = ("-m", *SMALL, f"results={results}", "sweep=s")
    return Command(f"experiments.{module}", *options, *arguments, merged=True, **environment)


def sweep(results, *arguments, ok=True, **environment):
    """A sweep in this process, which has imported everything; returns what it printed."""
    command = ["measure", "-m", *SMALL, f"results={results}", "sweep=s", *arguments]
    said, code = io.StringIO(), 0
    with contextlib.ExitStack() as changed:
        changed.enter_context(mock.patch.object(sys, "argv", command))
        changed.enter_context(mock.patch.dict(os.environ, {"COLUMNS": "160", "NO_COLOR": "1", **environment}))
        changed.enter_context(contextlib.redirect_stdout(said))
        changed.enter_context(contextlib.redirect_stderr(said))
        names._known.cache_clear()  # as in a process of its own
        try:
            measure.main()
        except SystemExit as ended:
            code = ended.code
    output = said.getvalue() + (code if isinstance(code, str) else "")
    assert (code in (None, 0)) == ok, output
    return output


def states(results):
    """How every run ended, launch by launch."""
    paths = sorted((results / "s" / "launches").glob("*.jsonl"))
    return [[entry["state"] for entry in launches.ended(path)] for path in paths]


def done(results):
    return [folder for folder in names.folders(results / "s") if outcomes.is_done(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of four runs that is done."""
    results = tmp_path_factory.mktemp("finished")
    sweep(results, "seed=range(4)")
    return results


@pytest.fixture
def four(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def test_done_runs_are_skipped_and_broken_ones_made_again(four):
    before = {folder.name: frames.load(folder / "frame.parquet") for folder in done(four)}
    truncated, corrupt, deleted, _ = sorted(names.folders(four / "s"))
    (truncated / "frame.parquet").write_bytes((truncated / "frame.parquet").read_bytes()[:100])
    (corrupt / "status.json").write_text('{"state": "do')
    shutil.rmtree(deleted)
    (truncated / "checkpoints").mkdir()
    (truncated / "checkpoints" / "last.pt.123.part").write_bytes(b"half")
    sweep(four, "seed=range(4)")
    assert not list(four.rglob("*.part"))
    assert [sorted(s) for s in states(four)] == [["done"] * 4, ["done"] * 3 + ["skipped"]]
    after = {folder.name: frames.load(folder / "frame.parquet") for folder in done(four)}
    assert after.keys() == before.keys()
    for name, frame in before.items():
        pd.testing.assert_frame_equal(frame, after[name])
    sweep(four, "seed=range(4)", "rerun=true")
    assert states(four)[-1] == ["done"] * 4


def test_a_sweep_is_extended(four):
    sweep(four, "seed=range(6)")
    assert sorted(states(four)[-1]) == ["done"] * 2 + ["skipped"] * 4
    assert len(done(four)) == len(names.folders(four / "s")) == 6


def test_a_failure_costs_one_run(tmp_path):
    said = sweep(tmp_path, "model.activation=relu,nonsense,tanh", ok=False)
    assert states(tmp_path) == [["done", "failed", "done"]]
    assert "1 of 3 runs failed" in said and "activation must be one of linear, relu" in said
    (failed,) = [folder for folder in names.folders(tmp_path / "s") if not outcomes.is_done(folder)]
    text = (failed / "error.txt").read_text()
    assert "Traceback" in text and "seed: 0" in text and "activation: nonsense" in text
    assert outcomes.Status.read(failed).error.startswith("ValueError: activation must be one of")
    said = sweep(tmp_path, "model.activation=nonsense,relu", "on_error=stop", "rerun=true", ok=False)
    assert states(tmp_path)[-1] == ["failed"] and "no runs were started after the first failure" in said
    assert "on_error must be one of continue, stop, got 'maybe'" in sweep(
        tmp_path, "seed=1,2", "on_error=maybe", ok=False
    )


def test_two_launches_at_once_share_the_work(tmp_path):
    # One of them in other words: none is the default.
    both = [start(tmp_path, "seed=range(12)", *words) for words in ((), ("model.norm=none",))]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    counted = [state for launch in states(tmp_path) for state in launch]
    assert counted.count("done") == 12 == len(done(tmp_path)) == len(names.folders(tmp_path / "s"))
    assert len(counted) == 24


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, how",  # after SIGINT a launch kills its workers, so their runs are left as by SIGKILL
    [("serial", signal.SIGKILL), ("serial", signal.SIGINT), ("processes", signal.SIGINT)],
)
def test_a_sweep_that_is_killed_loses_nothing(finished, tmp_path, launcher, how):
    moment = random.Random(int(how))
    for _ in range(2 if launcher == "serial" else 1):
        process = start(tmp_path, "seed=range(10)", f"launcher={launcher}", GRADSCOPE_PROCESSES="2")
        begin = time.monotonic()
        while not list(tmp_path.glob("s/*/status.json")) and time.monotonic() < begin + 60:
            time.sleep(0.02)
        time.sleep(moment.uniform(0, 0.4))
        if how == signal.SIGKILL:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(how)
        process.communicate(timeout=240)
        assert running_in(process.pid) == []
    sweep(tmp_path, "seed=range(10)")
    assert len(done(tmp_path)) == len(names.folders(tmp_path / "s")) == 10
    counted = [state for launch in states(tmp_path) for state in launch]
    assert counted.count("done") >= 10 and "failed" not in counted
    alone = collecting.collect(finished / "s").frame
    frame = collecting.collect(tmp_path / "s").frame
    assert (
        sorted(frame["seed"].unique()) == list(range(10)) and not frame.duplicated(["seed", "layer", "quantity"]).any()
    )
    same = frame[frame["seed"] < 4].sort_values(["seed", "index", "quantity"])["log10_value"]
    np.testing.assert_array_equal(same, alone.sort_values(["seed", "index", "quantity"])["log10_value"])


def running_in(session):
    """Processes of a session that are alive, after a moment to end."""
    for _ in range(100):
        if not alive(session):
            return []
        time.sleep(0.1)
    return alive(session)


def test_a_lock_belongs_to_one(tmp_path):
    with locks.locked(tmp_path) as first:
        assert first and locks.held(tmp_path)
        with locks.locked(tmp_path) as second:
            assert not second
    assert not locks.held(tmp_path) and list(tmp_path.iterdir()) == []


def test_of_many_that_find_a_dead_owner_one_wins(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    words = {"machine": locks.machine(), "pid": int(dead.stdout), "started": "1"}
    won, together = [], threading.Barrier(8)

    def claim(folder):
        together.wait()
        with locks.locked(folder) as mine:
            won.append(mine)
            together.wait()

    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "000004.lock").write_text(json.dumps(words))
        won.clear()
        threads = [threading.Thread(target=claim, args=(folder,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won.count(True) == 1 and list(folder.iterdir()) == []


def test_an_owner_elsewhere_is_believed_while_it_beats(tmp_path):
    lock = tmp_path / "000000.lock"
    lock.write_text(ELSEWHERE)
    os.utime(lock, (0, 0))  # its clock is far behind
    stop = threading.Event()

    def beat():
        while not stop.wait(0.1):
            os.utime(lock)

    beats = threading.Thread(target=beat)
    beats.start()
    with locks.locked(tmp_path, patience=0.6) as mine:
        assert not mine
    stop.set()
    beats.join()
    with locks.locked(tmp_path, patience=0.6) as mine:
        assert mine


def test_a_lock_that_was_never_written_is_taken_over(tmp_path):
    (tmp_path / "000000.lock").touch()
    with locks.locked(tmp_path) as mine:
        assert mine


def test_collect_reads_what_is_new(four, monkeypatch):
    first = collecting.collect(four / "s")
    assert first.manifest["runs"] == 4 and first.manifest["config"]["seed"] == [0, 1, 2, 3]
    read = []
    original = collecting._read
    monkeypatch.setattr(collecting, "_read", lambda one, *most: (read.append(one.name), original(one, *most))[1])
    again = collecting.collect(four / "s")
    assert read == [] and len(again.frame) == len(first.frame)
    sweep(four, "seed=4")
    gone = names.folders(four / "s")[0]
    shutil.rmtree(gone)
    third = collecting.collect(four / "s")
    assert len(read) == 1 and third.manifest["runs"] == 4 and third.manifest["missing"] == 1
    assert gone.name not in set(third.frame["run"]) and set(third.frame["seed"]) == {1, 2, 3, 4}
    plain = pd.read_parquet(four / "s" / "data")
    assert len(plain) == len(third.frame) and set(plain["depth"]) == {6}


def test_status_counts_and_names(four, capsys):
    truncated, *_ = names.folders(four / "s")
    (truncated / "status.json").unlink()
    sweep(four, "seed=9", "model.activation=nonsense,relu", ok=False)
    shutil.rmtree(next(folder for folder in names.folders(four / "s") if "relu" in folder.name))
    progress = status.look(four / "s")
    assert Counter(one.state for one in progress.outcomes) == {"done": 3, "failed": 1, "half done": 1, "missing": 1}
    assert progress.left == 3 and progress.seconds_left > 0
    status.main(status.Config("s", str(four)))
    assert "activation must be" in capsys.readouterr().out
    with locks.locked(truncated):
        assert [one.folder for one in status.look(four / "s").having("running")] == [truncated]
    with pytest.raises(FileNotFoundError, match=r"nothing; existing sweeps: s"):
        status.main(status.Config("nothing", str(four)))


def test_the_data_set_is_read_by_other_libraries(four):
    frame = collecting.collect(four / "s").frame
    files = str(four / "s" / "data" / "*" / "*.parquet")
    total = frame["log10_value"].sum()
    table = polars.read_parquet(files, hive_partitioning=True)
    assert table.shape == frame.shape and set(table["model"]) == set(frame["model"])
    assert table["log10_value"].sum() == pytest.approx(total, rel=1e-12)
    query = f"select count(*), sum(log10_value), any_value(model) from read_parquet('{files}', hive_partitioning=true)"
    assert duckdb.sql(query).fetchall() == [(len(frame), pytest.approx(total, rel=1e-12), "mlp")]


def test_a_run_is_reproduced_or_not(four, capsys):
    folder = names.folders(four / "s")[0]
    manifest = read_json(folder / "manifest.json")
    del manifest["config"]["nlc"]  # as a run had it that is older than this key
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(SystemExit) as ended:
        rerun.main(rerun.Config(str(folder)))
    assert not ended.value.code and "Reproduced: equal bit for bit" in capsys.readouterr().out
    frame = frames.load(folder / "frame.parquet")
    frame.loc[3, "log10_value"] += 1e-6
    frame["value"] = 10.0 ** frame["log10_value"]
    frames.save(frame, folder / "frame.parquet")
    with pytest.raises(SystemExit) as ended:
        rerun.main(rerun.Config(str(folder)))
    assert (
        ended.value.code and "NOT reproduced: log10_value differs in 1 row, by up to 1e-06" in capsys.readouterr().out
    )
    frames.save(frame.iloc[:-1], folder / "frame.parquet")
    with pytest.raises(ValueError, match="other rows"):
        rerun.main(rerun.Config(str(folder)))
    with pytest.raises(FileNotFoundError, match="manifest"):
        rerun.main(rerun.Config(str(folder.parent)))


def test_many_seeds_in_one_run(finished, tmp_path):
    sweep(tmp_path, "seeds=4", "model.activation=relu,tanh")
    frame = collecting.collect(tmp_path / "s").frame
    alone = collecting.collect(finished / "s").frame
    order = ["seed", "index", "quantity"]
    relu = frame[frame["activation"] == "relu"].sort_values(order)["log10_value"]
    np.testing.assert_array_equal(relu, alone.sort_values(order)["log10_value"])
    assert "whole numbers, got" in sweep(tmp_path, "seeds=[1,1]", "model.bias=true,false", ok=False)


LINES = [
    ["model.depth=5,7", "seed=range(3)"],
    ["model=relu,tanh_batch,alexnet_b", "seed=choice(1,2)"],
    ["model=mlp", "model.activation=relu,tanh", "model.norm=batch"],
    ["matrix_layers=[layers.0,layers.1],[layers.2]", "matrix=true,false"],
    ["+extra={a:1},{b:2}", "probes=exact,4", "seed=1,2"],
    ["study=architectures", "model=selu,relu", "hydra.job.name=x"],
    ["model.in_features=null,12", "target=layers.0,null"],
    ["model=glob(tanh*)", "~mode"],
]


@pytest.mark.parametrize("line", LINES, ids=[" ".join(line) for line in LINES])
def test_composed_once_is_as_hydra_composes_it(line):
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(line)
        jobs = combinations(line, loader)
        assert [[list(job) for job in jobs]] == BasicSweeper.split_arguments(parsed, None)
        master = loader.load_configuration("measure", line, run_mode=RunMode.MULTIRUN)
        composer = Composer(loader)
        for job in [*jobs, *jobs[::-1]]:
            expected, found = (c.load_sweep_config(master, list(job)) for c in (loader, composer))
            a, b = (OmegaConf.to_container(c, resolve=False) for c in (expected, found))
            assert a == b
            assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)


def test_names_are_short_plain_and_never_twice(tmp_path):
    with initialize_config_module("conf", version_base="1.3"):
        cfgs = {n: compose("measure", [f"sweep='{n}'", f"results={tmp_path}"]) for n in ("Ä ß/…", "s")}
        other = compose("measure", ["launcher=processes", f"results={tmp_path}", "sweep=s"])
    name = names.folder(cfgs["s"], [f"model.init={'ü' * 300}", "launcher=slurm", "hydra/sweeper=basic"]).name
    assert len(name) <= 120 and name.isascii() and "slurm" not in name and "sweeper" not in name
    assert names.folder(cfgs["s"], ["seed=0"]).name == name  # the same configuration in other words
    assert names.folder(other, ["launcher=processes"]).name == name
    assert names.folder(cfgs["Ä ß/…"], []).parent == tmp_path / "Ä ß/…"


def test_a_long_name_shows_every_key(tmp_path):
    long = [f"model.init={'x' * 300}", f"data.shape=[{'1,' * 60}1]", "model.depth=17", "seed=3", "study=jacobian"]
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("measure", [f"results={tmp_path}", "sweep=s"])
    name = names.folder(cfg, long).name
    assert 110 < len(name) <= 120 and name.endswith(f"-{names.digest(cfg)}")
    kept = dict(part.split("=") for part in re.split(r",(?=[a-z])", name.rpartition("-")[0]))
    assert list(kept) == ["depth", "init", "seed", "shape"] and (kept["depth"], kept["seed"]) == ("17", "3")
    assert len(kept["init"]) == len(kept["shape"]) > 30  # cut alike
    many = [f"+extra.key_number_{number}=1" for number in range(20)]
    few = [f"key_number_{number}=1" for number in (0, 1, 10, 11, 12, 13)]
    assert names._readable(many, 107) == ",".join([*few, "+14"])
    assert names._readable(["model.width=2", "monitor.width=3", "model.depth=1"], 107) == (
        "depth=1,model.width=2,monitor.width=3"
    )


def test_a_full_disk_costs_runs_and_not_the_sweep(tmp_path):
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000));"
    limited += "import sys; sys.argv[0] = 'measure'; runpy.run_module('experiments.measure', run_name='__main__')"
    command = [sys.executable, "-c", limited, "-m", *SMALL, f"results={tmp_path}", "sweep=s", "seed=1,2"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=os.environ)
    assert process.returncode == 1 and "2 of 2 runs failed" in process.stderr, process.stderr
    assert "File too large" in process.stderr and done(tmp_path) == []
    assert not list(tmp_path.rglob("*.part"))
    sweep(tmp_path, "seed=1,2")
    assert len(done(tmp_path)) == 2


def test_folders_with_unusual_names(tmp_path):
    results = tmp_path / "Ergebnisse ü, 1=2"
    long = ",".join(f"layers.{n % 6}" for n in range(60))
    sweep(f"'{results}'", f"matrix_layers=[{long}]", "matrix=true", "seed=1,2")
    (one, two) = names.folders(results / "s")
    assert len(one.name) <= 120 and outcomes.is_done(one) and outcomes.is_done(two)
    assert collecting.collect(results / "s").manifest["runs"] == 2


@pytest.mark.parametrize("launcher", ["processes", "slurm_local"])
def test_launchers_give_the_same_numbers(finished, tmp_path, launcher):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    seeds = range(4 if launcher == "processes" else 1)
    counted = "+measurement._target_=tests.experiments.runs.dying.counts", f"seed=range({len(seeds)})"
    process = start(tmp_path, f"launcher={launcher}", *counted, GRADSCOPE_PROCESSES="2")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    found, alone = (collecting.collect(results / "s").frame for results in (tmp_path, finished))
    frame, alone = (of[(of["quantity"] == "gsc") & of["seed"].isin(seeds)] for of in (found, alone))
    order = ["seed", "index"]
    np.testing.assert_array_equal(frame.sort_values(order)["log10_value"], alone.sort_values(order)["log10_value"])
    assert {read_json(folder / "manifest.json")["hardware"]["num_threads"] for folder in done(tmp_path)} == {1}
    if launcher == "processes":  # each worker sets Hydra up once
        runs = list(found.loc[found["quantity"] == "number", "value"])
        assert len(runs) == 4 and runs.count(1) <= 2
    sweep(tmp_path, *counted)
    assert states(tmp_path)[-1] == ["skipped"] * len(seeds)  # how it was launched is no part of what it is


@pytest.mark.filterwarnings("ignore")
def test_optuna_is_told_the_growth_rate(tmp_path):
    pytest.importorskip("optuna", reason="needs the extra optuna")
    sweep(
        tmp_path, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "model.depth=12",
        "hydra.sweeper.direction=minimize", "model.weight_variance=interval(1.0,3.0)", "model.activation=tanh",
    )  # fmt: skip
    best = read_yaml(tmp_path / "s" / "optimization_results.yaml")
    values = {outcomes.Status.read(folder).value for folder in done(tmp_path)}
    assert len(values) == 3 and best["best_value"] == pytest.approx(min(values))


def read_yaml(path):
    return OmegaConf.to_container(OmegaConf.load(path))


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setattr(seeds.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(seeds.torch.cuda, "device_count", lambda: 3)
    dealt = []
    for number in range(4):
        monkeypatch.setattr(seeds, "_job", lambda number=number: number)
        dealt.append(str(seeds.device("auto")))
    assert dealt == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
