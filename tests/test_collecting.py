"""What is done with runs afterwards: repeated, collected, counted, whatever state they are in."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_module
from rich.console import Console

from experiments import arguments, claims, collect, config, guard, launches, ledger, measure, rerun, run, status, train
from experiments import manifest as manifests
from experiments.arguments import parse
from experiments.differences import differences
from experiments.files import read_json, write_json
from experiments.manifest import manifest
from gradscope import frames

ROOT = Path(__file__).parent.parent
config.register()
CHOICES = {"model": "mlp", "data": "noise", "optimizer": "sgd"}
SMALL = ("model.depth=4", "model.width=6")
TRAINING = (
    "model=mlp", "data=digits", "model.out_features=10", "train.max_steps=3", "train.batch_size=16",
    "train.log_every=1", "train.checkpoint_every=null", "train.precision=float32", "monitor.every=1",
    "monitor.batch_size=8", "monitor.max_overhead=null",
)  # fmt: skip


def configured(name, *overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose(name, [*SMALL, *overrides])


def example(**changes):
    columns = {
        "layer": ["a", "b", "c"], "index": [0, 1, 2], "depth_from_output": [2, 1, 0], "target": "c", "quantity": "gsc",
        "log10_value": [1.5, 0.7, 0.0], "log10_stderr_probe": [0.01, 0.02, 0.0], "log10_stderr_sample": 0.1,
        "reduction": "batch", "coupled": False, "num_probes": 8, "num_samples": 10,
    }  # fmt: skip
    return frames.tidy(columns | changes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a measurement, to be left as it is."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    cfg = configured("measure", "data.batch_size=8", "probes=2", "statistics=[preactivation_std,preactivation_mean]")
    frames.save(measure.measure_seeds(cfg, CHOICES)[1], folder / "frame.parquet")
    write_json(folder / "manifest.json", manifest(cfg, CHOICES, 1.0))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    cfg = configured("train", *TRAINING)
    train.train(cfg, folder, run.device(cfg.device), Console(quiet=True), run.columns(cfg, CHOICES))
    write_json(folder / "manifest.json", manifest(cfg, CHOICES, 1.0))
    return folder


def test_a_measurement_is_repeated_bit_for_bit(measured):
    assert rerun.again(measured).found == ()


CHANGES = {
    "log10_stderr_probe": 0.5, "num_probes": 77, "index": 3, "depth_from_output": 9, "reduction": "mean",
    "num_samples": 3, "coupled": True,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_no_column_of_the_schema_goes_unseen(name):
    before, after = example(), example(**{name: CHANGES[name]})
    assert [one.column for one in differences(before, after)] == [name]


def test_differences_are_measured_on_the_scale_of_a_logarithm():
    (log, value) = differences(example(), example(log10_value=[1.5, 0.7 + 1e-6, 0.0]))[::-1]
    assert {log.column, value.column} == {"value", "log10_value"}
    assert log.largest == pytest.approx(1e-6) == value.largest and log.num_rows == 1
    assert "layer b, target c, quantity gsc: 0.7" in str(log if log.column == "log10_value" else value)
    up, down, none = (example(log10_value=[x, 0.7, 0.0]) for x in (math.inf, -math.inf, 1.0))
    assert differences(up, up) == [] == differences(up, up.copy())
    for one, other in ((up, down), (up, none), (down, none)):
        assert all(found.largest == math.inf for found in differences(one, other))
    signed = {"log10_value": [math.nan] * 3, "stderr_sample": [0.0, 0.0, 0.5], "quantity": "cosine"}
    before = example(value=[-1000.0, 2.0, 1e-9], **signed)
    after = example(value=[-1001.0, 2.0, -1e-9], **signed)
    (found,) = differences(before, after)
    assert found.num_rows == 2 and found.largest == pytest.approx(math.log10(1001 / 1000))
    (found,) = differences(before, example(value=[1000.0, 2.0, 1e-9], **signed))
    assert found.largest == math.inf
    last_bit = example(value=[np.nextafter(-1000.0, 0), 2.0, 1e-9], **signed)
    assert 0 < differences(before, last_bit)[0].largest < 1e-15


def test_a_beyond_float64_value_is_what_its_logarithm_says():
    found = differences(example(log10_value=[308.2, 0, 0]), example(log10_value=[308.3, 0, 0]))
    assert max(one.largest for one in found) == pytest.approx(0.1)


def test_a_run_that_differs_is_named(measured, tmp_path, monkeypatch):
    frame = frames.load(measured / "frame.parquet")
    after = frame.copy()
    after.loc[2, "num_probes"] = 5
    monkeypatch.setattr(measure, "measure_seeds", lambda cfg, choices: (None, after))
    with pytest.raises(SystemExit) as ended:
        rerun.main([str(measured)])
    assert ended.value.code
    text = str(rerun.again(measured))
    assert "NOT reproduced: num_probes differs in 1 row, by up to inf" in text and "2 then, 5 now" in text
    monkeypatch.setattr(rerun, "_allowed", lambda *_: (1e-3, "another processor"))
    after = frame.copy()
    after["log10_stderr_probe"] += 1e-4
    assert str(rerun.again(measured)).startswith("Reproduced: log10_stderr_probe differs in")
    after = frame.iloc[:-1]
    with pytest.raises(ValueError, match="The repeated run has other rows"):
        rerun.again(measured)


def test_a_training_is_repeated_bit_for_bit(trained, tmp_path):
    assert rerun.again(trained).found == ()


def test_records_of_training_are_compared(trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    tables = {name: rerun._tables(folder, name)[name] for name in ("metrics.parquet", "monitor.parquet")}
    monkeypatch.setattr(rerun, "_trained", lambda cfg, choices: tables)
    metrics = tables["metrics.parquet"].copy()
    metrics.loc[1, "train_loss"] *= 1.1
    metrics.assign(images_per_second=1.0).to_parquet(folder / "metrics.parquet")
    (found,) = rerun.again(folder).found
    assert found.column == "train_loss" and found.largest == pytest.approx(math.log10(1.1)) and "step " in found.where
    # The monitor may have left records out, for want of time, and there may have been none.
    monitor = tables["monitor.parquet"]
    late = monitor[monitor["step"] != 1].copy()
    since = (late["step"] == 2) & (late["quantity"] == "update_to_weight")  # of two steps then, of one now
    assert since.any()
    late.loc[since, "log10_value"] += 0.2
    late["value"] = late["value"].where(~since, 10.0 ** late["log10_value"])
    frames.save(late, folder / "monitor.parquet")
    assert [one.column for one in rerun.again(folder).found] == ["train_loss"]
    (folder / "monitor.parquet").unlink()
    assert [one.column for one in rerun.again(folder).found] == ["train_loss"]
    (folder / "metrics.parquet").unlink()
    with pytest.raises(SystemExit, match=r"has no metrics\.parquet to compare with; the run did not come to its end"):
        rerun.main([str(folder)])


def of_schema(path, version, frame):
    """A frame as another version of the schema would have written it."""
    frames.save(frame, path)
    table = pq.read_table(path)
    if version == 1:
        table = table.drop_columns(["stderr_sample"])
    kept = {key: value for key, value in table.schema.metadata.items() if key != frames.METADATA_KEY}
    says = {} if version == 1 else {frames.METADATA_KEY: str(version)}
    pq.write_table(table.replace_schema_metadata(kept | says), path)
    return path


def test_a_file_says_which_schema_it_has(tmp_path):
    path = frames.save(example(), tmp_path / "x.parquet")
    assert pq.read_schema(path).metadata[frames.METADATA_KEY] == b"2"
    assert list(frames.load(path).columns) == list(frames.COLUMNS)
    path = frames.save(example(), tmp_path / "x.csv")
    assert set(pd.read_csv(path)["schema_version"]) == {2}
    assert list(frames.load(path).columns) == list(frames.COLUMNS)
    one = frames.load(of_schema(tmp_path / "one.parquet", 1, example()))
    assert one["stderr_sample"].isna().all() and list(one["log10_value"]) == [1.5, 0.7, 0.0]
    reads = r"is a frame of schema 99, and this version of gradscope reads 1 to 2: .* \(rerun=true\)"
    with pytest.raises(frames.SchemaError, match=reads):
        frames.load(of_schema(tmp_path / "new.parquet", 99, example()))
    path.write_text(path.read_text().replace(",2\n", ",99\n"))
    with pytest.raises(frames.SchemaError, match=reads):
        frames.load(path)


ELSEWHERE = json.dumps({"host": "elsewhere", "pid": 1, "started": "1"})


def finished(sweep, name, frame, **said):
    """The folder of a run that is done."""
    folder = sweep / name
    frames.save(frame.assign(model="mlp", seed=0), folder / "frame.parquet")
    write_json(folder / "manifest.json", {"config": {"seed": 0}, "seconds": 1.0})
    status = {"state": "done", "files": ["frame.parquet", "manifest.json"], "overrides": [name]} | said
    write_json(folder / "status.json", status)
    return folder


def test_a_status_alone_makes_no_run_done(tmp_path):
    folder = finished(tmp_path, "one", example())
    assert ledger.is_done(folder)
    for said in ({"files": []}, {"files": ["manifest.json"]}, {"files": "frame.parquet"}, {"seconds": "1"},
                 {"overrides": [1]}, {"error": 3}, {"value": "x"}, {"state": None}, {"schema": "2"}):  # fmt: skip
        assert not ledger.is_done(finished(tmp_path, "one", example(), **said)), said
    finished(tmp_path, "one", example())
    (folder / "frame.parquet").unlink()
    assert not ledger.is_done(folder)


def test_what_is_no_lock_holds_no_run(tmp_path):
    (tmp_path / "uv.lock").write_text(ELSEWHERE)
    with claims.claimed(tmp_path) as mine:
        assert mine
    assert (tmp_path / "uv.lock").exists() and not claims.owned(tmp_path)
    for words in ("17", "[]", '{"host": 1}', '{"host": "x", "pid": "y", "started": null}'):
        (tmp_path / "000003.lock").write_text(words)
        with claims.claimed(tmp_path) as mine:
            assert mine, words


def test_a_machine_that_is_gone_is_watched_once(tmp_path):
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "000000.lock").write_text(ELSEWHERE)
    begin = time.monotonic()
    for number in range(4):
        with claims.claimed(tmp_path / str(number), patience=0.5) as mine:
            assert mine
    assert 0.5 <= time.monotonic() - begin < 1.0
    # One that has been noted and beats again is watched again.
    lock = tmp_path / "0" / "000000.lock"
    lock.write_text(ELSEWHERE)
    begin = time.monotonic()
    with claims.claimed(tmp_path / "0", patience=0.3) as mine:
        assert mine and time.monotonic() - begin >= 0.3


def test_a_silent_owner_elsewhere_does_not_run(tmp_path):
    lock = tmp_path / "000000.lock"
    lock.write_text(ELSEWHERE)
    assert claims.owned(tmp_path)
    os.utime(lock, (time.time() - 2 * 86400,) * 2)
    assert not claims.owned(tmp_path) and [path.name for path in tmp_path.iterdir()] == [lock.name]


def test_a_lost_claim_leaves_the_run_to_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    cfg = configured("measure", f"results={tmp_path}")
    folder = tmp_path / "run"
    other = folder / "000001.lock"

    def lose():
        other.write_text(ELSEWHERE)
        return 1.0

    assert guard.carry_out(cfg, folder, [], lose, alone=False) is None
    assert ledger.Status.read(folder) is None and other.exists()
    with pytest.raises(claims.LostClaimError, match=r"two was lost to another process, which found no sign of life"):
        guard.carry_out(cfg, tmp_path / "two", [], lambda: (tmp_path / "two" / "000000.lock").unlink(), alone=True)

    def replace():  # the other was done, and a third has a lock of the same name, which is neither beaten nor removed
        own.write_text(ELSEWHERE)
        os.utime(own, (0, 0))
        time.sleep(0.1)

    own = tmp_path / "three" / "000000.lock"
    with pytest.raises(claims.LostClaimError):
        guard.carry_out(cfg, own.parent, [], replace, alone=True)
    assert own.read_text() == ELSEWHERE and own.stat().st_mtime == 0


def test_temporary_names_are_of_one_process_of_one_machine(tmp_path, monkeypatch):
    names = set()
    for host, pid in (("a", 1), ("a", 2), ("b", 1)):
        monkeypatch.setattr(frames.socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(frames.os, "getpid", lambda pid=pid: pid)
        names.add(frames.beside(tmp_path / "x.json").name)
    assert len(names) == 3 and all(name.startswith("x.json.") and name.endswith(".part") for name in names)


@pytest.fixture
def three(tmp_path):
    """A sweep of three runs, the last with records of training."""
    for number in range(3):
        finished(tmp_path / "s", f"run-{number}", example(log10_value=[number, 0.7, 0.0]))
    pd.DataFrame({"step": [1, 2], "model": "mlp", "seed": 0}).to_parquet(tmp_path / "s" / "run-2" / "metrics.parquet")
    write_json(
        tmp_path / "s" / "run-2" / "status.json", {"state": "done", "files": ["frame.parquet", "metrics.parquet"]}
    )
    return tmp_path / "s"


def counts(sweep):
    found = collect.collect(sweep)
    rows = found.frame.groupby("run", observed=True)["log10_value"].max().to_dict()
    return {name: found.manifest[name] for name in ("runs", "stale", "unreadable")}, rows


def touch(folder):
    """The run is made again."""
    os.utime(folder / "status.json", (1, 1))


def test_old_schemas_are_collected_and_newer_ones_left_out(three):
    of_schema(three / "run-0" / "frame.parquet", 1, frames.load(three / "run-0" / "frame.parquet"))
    of_schema(three / "run-1" / "frame.parquet", 99, frames.load(three / "run-1" / "frame.parquet"))
    write_json(three / "run-0" / "status.json", read_json(three / "run-0" / "status.json") | {"schema": 1})
    found = collect.collect(three)
    assert found.manifest["runs"] == 2 and found.manifest["stale"] == 1 and found.manifest["unreadable"] == 0
    assert set(found.frame["run"]) == {"run-0", "run-2"} and found.frame["stderr_sample"].isna().all()
    assert "schema 99" in collect.unreadable(three)["run-1"][1]
    for number in (0, 2):
        shutil.rmtree(three / f"run-{number}")
    with pytest.raises(
        ValueError, match=r"can be collected \(1 stale\): run-1: .* of schema 99(.|\n)* rerun=true makes"
    ):
        collect.collect(three)


def test_a_run_that_cannot_be_read_costs_that_run(three, capsys):
    (three / "run-0" / "frame.parquet").write_bytes(b"PAR1 torn")
    lacking = pq.read_table(three / "run-1" / "frame.parquet").drop_columns(["num_samples"])
    pq.write_table(lacking, three / "run-1" / "frame.parquet")
    for number, change in enumerate((
        {"value": 3.0}, {"index": pd.array([0, None, 2], "Int64")}, {"index": "x"}, {"log10_value": math.nan},
    ), start=3):  # fmt: skip
        folder = finished(three, f"run-{number}", example())
        frame = pd.read_parquet(folder / "frame.parquet").assign(**change)
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), folder / "frame.parquet")
    (finished(three, "run-7", example()) / "frame.parquet").unlink()
    finished(three, "run-8", example(), files=["manifest.json"])
    (three / "run-2" / "metrics.parquet").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"No run of .* can be collected \(9 unreadable"):
        collect.collect(three)
    finished(three, "run-9", example())
    for _ in range(2):  # the same again, for nothing may depend on what was half collected
        assert counts(three) == ({"runs": 1, "stale": 0, "unreadable": 9}, {"run-9": 1.5})
    why = {name: text for name, (_, text) in collect.unreadable(three).items()}
    assert why["run-1"].endswith("lacks the columns ['num_samples'].") and "contradict" in why["run-3"]
    assert "nulls where there may be none (index)" in why["run-4"] and "metrics.parquet" in why["run-2"]
    assert "it has no frame" in why["run-8"] and "No such file" in why["run-7"]
    collect.main(collect.Config(results=str(three.parent), sweep="s"))
    assert "Left out: run-0: frame.parquet: " in (text := capsys.readouterr().out) and "and 4 more." in text
    finished(three, "run-0", example(log10_value=[2.5, 0.7, 0.0]))
    touch(three / "run-0")
    assert counts(three)[1] == {"run-0": 2.5, "run-9": 1.5}


def test_columns_of_types_that_have_nothing_in_common_are_words(three):
    for number, tag in enumerate((1, "abc", 2.5, True)):
        finished(three, f"run-{number}", example().assign(tag=tag, half=number / 2))
    frame = collect.collect(three).frame
    assert frame.groupby("run", observed=True)["tag"].first().to_list() == ["1", "abc", "2.5", "true"]
    assert frame["half"].dtype == "float64"
    finished(three, "run-4", example().assign(tag=7))
    assert set(collect.collect(three).frame["tag"]) == {"1", "abc", "2.5", "true", "7"}


WHEN = ("before", "between", "after", "metrics")


@pytest.mark.parametrize("when", WHEN)
def test_a_killed_collect_is_made_good(three, when):
    """Killed before, between and after the two renames of the data, and between those of the records."""
    collect.collect(three)
    finished(three, "run-0", example(log10_value=[9.0, 0.7, 0.0]))
    touch(three / "run-0")
    shutil.rmtree(three / "run-1")
    script = f"""
import os, signal
from pathlib import Path
from experiments import collect
original, calls = Path.rename, []
def rename(path, target):
    calls.append(path.name)
    if len(calls) > {WHEN.index(when)}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, target)
Path.rename = rename
collect.collect(Path({str(three)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in launches.folders(three)} == {"run-0", "run-2"}
    for _ in range(2):
        found = collect.collect(three)
        assert found.frame.groupby("run", observed=True)["log10_value"].max().to_dict() == {"run-0": 9.0, "run-2": 2.0}
        assert len(found.frame) == 6 and len(found.metrics) == 2 and found.manifest["half_done"] == 0
    assert not [path for path in three.iterdir() if path.suffix in (".part", ".old", ".lock")]


@pytest.mark.parametrize("name", ["data", "metrics"])
def test_a_data_set_that_was_removed_is_made_again(three, name):
    first = collect.collect(three)
    shutil.rmtree(three / name)
    again = collect.collect(three)
    assert len(again.frame) == len(first.frame) == 9 and len(again.metrics) == 2


def test_two_collect_at_once(three):
    for number in range(3, 40):
        finished(three, f"run-{number}", example())
    command = [sys.executable, "-m", "experiments.collect", f"results={three.parent}", "sweep=s"]
    for _ in range(3):
        both = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)
        ]
        outputs = [process.communicate(timeout=120)[0] for process in both]
        assert all(output.startswith("40 runs, 120 rows") for output in outputs), outputs
        for number in range(40):
            touch(three / f"run-{number}")
    with claims.claimed(three):  # while it is claimed, others wait
        waits = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            waits.communicate(timeout=5)
    assert "40 runs" in waits.communicate(timeout=60)[0]


def launch(sweep, number, pid, age=0.0):
    """The file of a launch, last touched so long ago."""
    path = sweep / "launches" / f"{number}-{pid}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - age,) * 2)


def test_a_watch_ends_when_nothing_will_change(three):
    assert status.look(three).over
    write_json(three / "plan.json", {"runs": [["run-0"], ["run-1"], ["run-8"], ["run-9"]]})
    assert status.look(three).missing and status.look(three).over  # no launch has it in hand
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    launch(three, time.time_ns(), int(dead.stdout), age=3600)
    assert status.look(three).over
    launch(three, 1, os.getpid(), age=3600)  # its number belongs to a process that is younger
    assert status.look(three).over
    lock = three / "run-8" / "000000.lock"
    lock.parent.mkdir()
    lock.write_text(ELSEWHERE)
    assert status.look(three).running == [lock.parent] and not status.look(three).over
    os.utime(lock, (time.time() - 2 * 86400,) * 2)
    assert status.look(three).half == [lock.parent] and status.look(three).over
    launch(three, 2, int(dead.stdout))  # on another machine, say
    assert not status.look(three).over
    launch(three, 2, int(dead.stdout), age=3600)
    launch(three, time.time_ns(), os.getpid(), age=3600)
    assert not status.look(three).over
    for name in ("run-8", "run-9"):
        finished(three, name, example())
    lock.unlink()
    assert status.look(three).over


def test_a_watch_lasts_as_long_as_the_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(status, "WATCH_SECONDS", 0.2)
    command = [sys.executable, "-m", "experiments.measure", "-m", *SMALL, "data.batch_size=4", "probes=2", "sweep=s"]
    process = subprocess.Popen([*command, f"results={tmp_path}", "seed=range(4)"], cwd=ROOT, start_new_session=True)
    try:
        while not (tmp_path / "s" / "plan.json").exists():  # before the first run begins
            time.sleep(0.01)
        status.main(["s", "--results", str(tmp_path), "--watch"])
        assert len(status.look(tmp_path / "s").done) == 4
    finally:
        process.communicate(timeout=120)
    assert "none" in capsys.readouterr().out  # time left


def test_a_second_look_reads_what_has_changed(three, monkeypatch):
    read, original = [], ledger.Status.read
    monkeypatch.setattr(ledger.Status, "read", lambda folder: (read.append(folder.name), original(folder))[1])
    known = {}
    first = status.look(three, known)
    assert len(read) == 3 == len(first.done)
    touch(three / "run-1")
    (three / "run-2" / "status.json").unlink()
    second = status.look(three, known)
    assert read[3:] == ["run-1", "run-2"] and len(second.done) == 2 and len(second.half) == 1


def test_status_names_what_cannot_be_read(three, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (three / "run-0" / "frame.parquet").write_bytes(b"PAR1 torn")
    collect.collect(three)
    status.main(["s", "--results", str(three.parent)])
    said = capsys.readouterr().out
    assert "done, but not collected" in said and "frame.parquet:" in said
    touch(three / "run-0")  # made again since
    status.main(["s", "--results", str(three.parent)])
    assert "not collected" not in capsys.readouterr().out


def test_a_sweep_below_results_comes_before_a_folder_of_that_name(three, capsys, monkeypatch):
    monkeypatch.chdir(three)
    (three / "s").mkdir()
    status.main(["s", "--results", str(three.parent)])
    assert f"{three.name}" in (said := capsys.readouterr().out) and "run-0" in said
    status.main([str(three), "--results", "nowhere"])
    assert "run-0" in capsys.readouterr().out


def test_every_key_of_a_training_is_a_column():
    cfg = configured(
        "train", "model=mlp", "optimizer=adamw", "train.augmentation.crop=1", "+extra={a:{lr:2}}", "+tag=x"
    )
    choices = CHOICES | {"optimizer": "adamw", "study": None, "launcher": "serial", "hydra/launcher": "basic"}
    found = run.columns(cfg, choices)
    assert list(found)[:3] == ["model", "data", "optimizer"] and found["optimizer"] == "adamw"
    assert found["lr"] == cfg.optimizer.lr and found["betas"] == "[0.9, 0.999]" and found["extra.a.lr"] == 2
    assert found["crop"] == 1 and found["flip"] is True and found["every"] == 100 and found["tag"] == "x"
    assert (found["batch_size"], found["data.batch_size"], found["monitor.batch_size"]) == (128, 100, 32)
    assert not {"study", "launcher", "results", "device", "_target_", "sinks"} & found.keys()
    swept = {path for path, _ in run._leaves((), run.OmegaConf.to_container(cfg)) if path[0] not in run.PLACE_KEYS}
    assert len(swept) + 3 == len(found)  # and the three choices


def test_every_key_of_a_measurement_is_a_column():
    cfg = configured(
        "measure", "matrix_layers=[layers.0,layers.1]", "data.shape=[3,2]", "+measurement={_target_:a.b,num_probes:8}"
    )
    found = run.columns(cfg, CHOICES)
    assert found["matrix_layers"] == '["layers.0", "layers.1"]' and found["shape"] == "[3, 2]"
    assert found["statistics"] == '["preactivation_std", "sign_diversity"]' and found["probes"] == "auto"
    assert found["measurement.num_probes"] == 8 and not frames.COLUMNS.keys() & found.keys()


def test_switches_and_help(three, capsys, monkeypatch):
    assert parse(collect.Config, ["--csv", "--sweep=x"]) == collect.Config(sweep="x", csv=True)
    for words, says in (("--sweep", "'--sweep' needs a value"), ("--cvs", "Unknown key 'cvs'; did you mean 'csv'")):
        with pytest.raises(ValueError, match=says):
            parse(collect.Config, [words])
    monkeypatch.setattr(sys, "argv", ["collect", f"results={three.parent}", "sweep=s", "--csv"])
    arguments.run(collect.main, collect.Config)
    assert len(frames.load(three / "collected.csv")) == 9
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["collect", "--help"])
    arguments.run(collect.main, collect.Config)
    said = capsys.readouterr().out
    assert "Many runs -> one Parquet data set" in said and "  csv=False" in said and "``csv``: also" in said


def test_without_git_nothing_is_known_of_changes(monkeypatch):
    monkeypatch.setattr(manifests, "_git", lambda *_: None)
    found = manifests.provenance(("torch",))  # other packages than those it was asked for before
    assert found["commit"] is None and found["dirty"] is None
