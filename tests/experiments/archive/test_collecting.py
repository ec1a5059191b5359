"""What is done with the runs of a sweep: collected, counted, watched, whatever state they are in."""

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import collect, status
from experiments.archive import collecting
from experiments.config import command_line
from experiments.config.command_line import parse
from experiments.files import write_json
from experiments.runs import locks, names, origin, outcomes
from gradscope import frames
from tests.commands import Command, run
from tests.experiments.example_runs import ELSEWHERE, SMALL, example, finished, of_schema


@pytest.fixture
def three(tmp_path):
    """A sweep of three runs, the last with records of training."""
    for number in range(3):
        finished(tmp_path / "s", f"run-{number:012d}", example(log10_value=[number, 0.7, 0.0]))
    pd.DataFrame({"step": [1, 2], "model": "mlp", "seed": 0}).to_parquet(
        tmp_path / "s" / "run-000000000002" / "metrics.parquet"
    )
    write_json(
        tmp_path / "s" / "run-000000000002" / "status.json",
        {"state": "done", "files": ["frame.parquet", "metrics.parquet"]},
    )
    return tmp_path / "s"


def counts(sweep):
    found = collecting.collect(sweep)
    rows = found.frame.groupby("run", observed=True)["log10_value"].max().to_dict()
    return {name: found.manifest[name] for name in ("runs", "stale", "unreadable")}, rows


def touch(folder):
    """The run is made again."""
    os.utime(folder / "status.json", (1, 1))


def test_other_schemas_are_left_out(three):
    of_schema(
        three / "run-000000000001" / "frame.parquet", 99, frames.load(three / "run-000000000001" / "frame.parquet")
    )
    found = collecting.collect(three)
    assert found.manifest["runs"] == 2 and found.manifest["stale"] == 1 and found.manifest["unreadable"] == 0
    assert set(found.frame["run"]) == {"run-000000000000", "run-000000000002"}
    assert "schema version 99" in collecting.unreadable(three)["run-000000000001"][1]
    for number in (0, 2):
        shutil.rmtree(three / f"run-{number:012d}")
    with pytest.raises(ValueError, match=r"\(1 stale\): run-000000000001: .*schema version 99"):
        collecting.collect(three)


def test_a_run_that_cannot_be_read_costs_that_run(three, capsys):
    (three / "run-000000000000" / "frame.parquet").write_bytes(b"PAR1 torn")
    lacking = pq.read_table(three / "run-000000000001" / "frame.parquet").drop_columns(["num_samples"])
    pq.write_table(lacking, three / "run-000000000001" / "frame.parquet")
    for number, change in enumerate((
        {"value": 3.0}, {"index": pd.array([0, None, 2], "Int64")}, {"index": "x"}, {"log10_value": math.nan},
    ), start=3):  # fmt: skip
        folder = finished(three, f"run-{number:012d}", example())
        frame = pd.read_parquet(folder / "frame.parquet").assign(**change)
        table = pa.Table.from_pandas(frame, preserve_index=False)
        said = {frames.METADATA_KEY: str(frames.SCHEMA_VERSION)}
        pq.write_table(table.replace_schema_metadata(said), folder / "frame.parquet")
    (finished(three, "run-000000000007", example()) / "frame.parquet").unlink()
    finished(three, "run-000000000008", example(), files=["manifest.json"])
    (three / "run-000000000002" / "metrics.parquet").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"No run of .* can be collected \(9 unreadable"):
        collecting.collect(three)
    finished(three, "run-000000000009", example())
    for _ in range(2):  # the same again, for nothing may depend on what was half collected
        assert counts(three) == ({"runs": 1, "stale": 0, "unreadable": 9}, {"run-000000000009": 1.5})
    why = {name: text for name, (_, text) in collecting.unreadable(three).items()}
    assert (
        why["run-000000000001"].endswith("lacks the columns ['num_samples'].")
        and "contradict" in why["run-000000000003"]
    )
    assert "(index)" in why["run-000000000004"] and "metrics.parquet" in why["run-000000000002"]
    assert "it has no frame" in why["run-000000000008"] and "No such file" in why["run-000000000007"]
    collect.main(collect.Config(results=str(three.parent), sweep="s"))
    assert "Left out: run-000000000000: frame.parquet: " in (text := capsys.readouterr().out) and "and 4 more." in text
    finished(three, "run-000000000000", example(log10_value=[2.5, 0.7, 0.0]))
    touch(three / "run-000000000000")
    assert counts(three)[1] == {"run-000000000000": 2.5, "run-000000000009": 1.5}


def test_columns_of_types_that_have_nothing_in_common_are_words(three):
    for number, tag in enumerate((1, "abc", 2.5, True)):
        finished(three, f"run-{number:012d}", example().assign(tag=tag, half=number / 2))
    frame = collecting.collect(three).frame
    assert frame.groupby("run", observed=True)["tag"].first().to_list() == ["1", "abc", "2.5", "true"]
    assert frame["half"].dtype == "float64"
    finished(three, "run-000000000004", example().assign(tag=7))
    assert set(collecting.collect(three).frame["tag"]) == {"1", "abc", "2.5", "true", "7"}


WHEN = ("before", "between", "after", "metrics")


@pytest.mark.parametrize("when", WHEN)
def test_a_killed_collect_is_made_good(three, when):
    """Killed before, between and after the two renames of the data, and between those of the records."""
    collecting.collect(three)
    finished(three, "run-000000000000", example(log10_value=[9.0, 0.7, 0.0]))
    touch(three / "run-000000000000")
    shutil.rmtree(three / "run-000000000001")
    code, *_ = run("tests.experiments.archive.killed_collect", str(three), str(WHEN.index(when)))
    assert code == -signal.SIGKILL
    assert {path.name for path in names.folders(three)} == {"run-000000000000", "run-000000000002"}
    for _ in range(2):
        found = collecting.collect(three)
        assert found.frame.groupby("run", observed=True)["log10_value"].max().to_dict() == {
            "run-000000000000": 9.0,
            "run-000000000002": 2.0,
        }
        assert len(found.frame) == 6 and len(found.metrics) == 2 and found.manifest["half_done"] == 0
    assert not [path for path in three.iterdir() if path.suffix in (".part", ".old", ".lock")]


@pytest.mark.parametrize("name", ["data", "metrics"])
def test_a_data_set_that_was_removed_is_made_again(three, name):
    first = collecting.collect(three)
    shutil.rmtree(three / name)
    again = collecting.collect(three)
    assert len(again.frame) == len(first.frame) == 9 and len(again.metrics) == 2


@pytest.mark.slow
def test_two_collect_at_once(three):
    for number in range(3, 40):
        finished(three, f"run-{number:012d}", example())
    command = ("experiments.collect", f"results={three.parent}", "sweep=s")
    for _ in range(2):
        both = [Command(*command) for _ in range(2)]
        outputs = [process.communicate(timeout=120)[0] for process in both]
        assert all(output.startswith("40 runs, 120 rows") for output in outputs), outputs
        for number in range(40):
            touch(three / f"run-{number:012d}")
    with locks.locked(three):  # while it is claimed, others wait
        waits = Command(*command)
        with pytest.raises(subprocess.TimeoutExpired):
            waits.communicate(timeout=5)
    assert "40 runs" in waits.communicate(timeout=240)[0]


@pytest.mark.parametrize("name", ["data", "metrics"])
def test_a_torn_data_set_is_made_again(three, name):
    first = collecting.collect(three)
    (path,) = (three / name).rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:100])
    again = collecting.collect(three)
    assert len(again.frame) == len(first.frame) == 9 and len(again.metrics) == 2


def test_files_of_another_make_cost_nothing(three):
    first = collecting.collect(three)
    write_json(three / "collected.json", {"collected": [1], "distinct": 3})
    write_json(three / "launches" / "1-1.plan.json", {})
    assert len(collecting.collect(three).frame) == len(first.frame) and not status.look(three).having("missing")


def test_a_sweep_of_failures_is_said_to_be_one(three):
    for number in range(3):
        write_json(three / f"run-{number:012d}" / "status.json", {"state": "failed", "error": "why"})
    with pytest.raises(FileNotFoundError, match="3 failed"):
        collecting.collect(three)


def test_a_full_disk_is_said_in_one_line(three, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks, "_acquire", full)
    monkeypatch.setattr(sys, "argv", ["collect", f"results={three.parent}", "sweep=s"])
    with pytest.raises(SystemExit, match=r"^Error: .*No space left on device"):
        command_line.run(collect.main, collect.Config)


def test_words_in_brackets_are_shown_as_they_are(three, capsys):
    why = "ValueError: activation '[/x]' is none of [relu]"
    write_json(three / "run-000000000001" / "status.json", {"state": "failed", "error": why})
    status.main(status.Config("s", str(three.parent)))
    assert why in capsys.readouterr().out.replace("\n", "")


def test_what_is_being_collected_is_not_read(three):
    assert collecting.load(three) is None and not list(three.glob("*.lock"))
    rows = len(collecting.collect(three).frame)
    found = []
    reader = threading.Thread(target=lambda: found.append(collecting.load(three)))
    with locks.locked(three):
        reader.start()
        reader.join(timeout=1.0)
        assert found == []
    reader.join(timeout=30)
    assert len(found[0].frame) == rows


def test_what_was_collected_is_read_where_nothing_can_be_written(three, monkeypatch):
    rows = len(collecting.collect(three).frame)

    def read_only(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks, "_acquire", read_only)
    assert len(collecting.load(three).frame) == rows


def launch(sweep, number, pid, age=0.0):
    """The file of a launch, last touched so long ago."""
    path = sweep / "launches" / f"{number}-{pid}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - age,) * 2)


def test_a_watch_ends_when_nothing_will_change(three):
    assert status.look(three).over
    planned = {f"{number:012d}": [f"run-{number:012d}"] for number in (0, 1, 8, 9)}
    write_json(three / "launches" / "1-1.plan.json", {"runs": planned})
    assert status.look(three).having("missing") and status.look(three).over  # no launch has it in hand
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    launch(three, time.time_ns(), int(dead.stdout), age=3600)
    assert status.look(three).over
    lock = three / "run-000000000008" / "000000.lock"
    lock.parent.mkdir()
    lock.write_text(ELSEWHERE)
    assert [one.folder for one in status.look(three).having("running")] == [lock.parent] and not status.look(three).over
    os.utime(lock, (time.time() - 2 * 86400,) * 2)
    assert [one.folder for one in status.look(three).having("half done")] == [lock.parent] and status.look(three).over
    launch(three, 2, int(dead.stdout))  # on whatever machine
    assert not status.look(three).over
    for name in ("run-000000000008", "run-000000000009"):
        finished(three, name, example())
    lock.unlink()
    assert status.look(three).over


def test_a_watch_lasts_as_long_as_the_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(status, "WATCH_SECONDS", 0.2)
    options = ("-m", *SMALL, "data.batch_size=4", "probes=2", "sweep=s", f"results={tmp_path}", "seed=range(4)")
    process = Command("experiments.measure", *options)
    try:
        while not any((tmp_path / "s" / "launches").glob("*.plan.json")):  # before the first run begins
            time.sleep(0.01)
        status.main(status.Config("s", str(tmp_path), watch=True))
        assert len(status.look(tmp_path / "s").having("done")) == 4
    finally:
        process.communicate(timeout=120)
    assert "none" in capsys.readouterr().out  # time left


def test_a_second_look_reads_what_has_changed(three, monkeypatch):
    read, original = [], outcomes.Status.read
    monkeypatch.setattr(outcomes.Status, "read", lambda folder: (read.append(folder.name), original(folder))[1])
    known = {}
    first = status.look(three, known)
    assert len(read) == 3 == len(first.having("done"))
    touch(three / "run-000000000001")
    (three / "run-000000000002" / "status.json").unlink()
    second = status.look(three, known)
    assert read[3:] == ["run-000000000001"]
    assert len(second.having("done")) == 2 and len(second.having("half done")) == 1


def test_status_names_what_cannot_be_read(three, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    (three / "run-000000000000" / "frame.parquet").write_bytes(b"PAR1 torn")
    collecting.collect(three)
    status.main(status.Config("s", str(three.parent)))
    said = capsys.readouterr().out
    assert "done, but not collected" in said and "frame.parquet:" in said
    touch(three / "run-000000000000")  # made again since
    status.main(status.Config("s", str(three.parent)))
    assert "not collected" not in capsys.readouterr().out


def test_a_sweep_below_results_comes_before_a_folder_of_that_name(three, capsys, monkeypatch):
    monkeypatch.chdir(three)
    (three / "s").mkdir()
    status.main(status.Config("s", str(three.parent)))
    assert f"{three.name}" in (said := capsys.readouterr().out) and "run-000000000000" in said
    status.main(status.Config(str(three), "nowhere"))
    assert "run-000000000000" in capsys.readouterr().out


def test_switches_and_help(three, capsys, monkeypatch):
    assert parse(collect.Config, ["--csv", "--sweep=x"]) == collect.Config(sweep="x", csv=True)
    for words, says in (("--sweep", "'--sweep' needs a value"), ("--cvs", "Unknown key 'cvs'; did you mean 'csv'")):
        with pytest.raises(ValueError, match=says):
            parse(collect.Config, [words])
    monkeypatch.setattr(sys, "argv", ["collect", f"results={three.parent}", "sweep=s", "--csv"])
    command_line.run(collect.main, collect.Config)
    assert len(frames.load(three / "collected.csv")) == 9
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["collect", "--help"])
    command_line.run(collect.main, collect.Config)
    said = capsys.readouterr().out
    assert "  csv=False" in said and "``csv``:" in said


def test_a_result_that_was_written_changes_no_code(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True)

    (tmp_path / "results").mkdir()
    for path in (tmp_path / "code.py", tmp_path / "results" / "data.csv"):
        path.write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    (tmp_path / "results" / "data.csv").write_text("after")
    found = origin.provenance.__wrapped__()
    assert found["dirty"] is False and len(found["commit"]) == 40
    (tmp_path / "code.py").write_text("after")
    assert origin.provenance.__wrapped__()["dirty"] is True


def test_without_git_nothing_is_known_of_changes(monkeypatch):
    monkeypatch.setattr(origin, "_git", lambda *_: None)
    found = origin.provenance(("torch",))  # other packages than those it was asked for before
    assert found["commit"] is None and found["dirty"] is None
