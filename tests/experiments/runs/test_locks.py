"""Which process owns a run, and whether the run is done."""

import json
import os
import time

import pytest

from experiments.runs import locks, one_run, outcomes
from gradscope import files
from tests.experiments.example_runs import ELSEWHERE, configured, example, finished


def test_a_status_alone_makes_no_run_done(tmp_path):
    folder = finished(tmp_path, "one", example())
    assert outcomes.is_done(folder)
    for said in ({"files": []}, {"files": ["manifest.json"]}, {"files": "frame.parquet"}, {"seconds": "1"},
                 {"overrides": [1]}, {"error": 3}, {"value": "x"}, {"state": None}, {"schema": "2"}):  # fmt: skip
        assert not outcomes.is_done(finished(tmp_path, "one", example(), **said)), said
    finished(tmp_path, "one", example())
    (folder / "frame.parquet").unlink()
    assert not outcomes.is_done(folder)


def test_what_is_no_lock_holds_no_run(tmp_path):
    (tmp_path / "uv.lock").write_text(ELSEWHERE)
    with locks.locked(tmp_path) as mine:
        assert mine
    assert (tmp_path / "uv.lock").exists() and not locks.held(tmp_path)
    for words in ("17", "[]", '{"machine": 1}', '{"machine": "x", "pid": "y", "started": null}'):
        (tmp_path / "000003.lock").write_text(words)
        with locks.locked(tmp_path) as mine:
            assert mine, words


def test_a_machine_that_is_gone_is_watched_once(tmp_path):
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "000000.lock").write_text(ELSEWHERE)
    begin = time.monotonic()
    for number in range(4):
        with locks.locked(tmp_path / str(number), patience=0.5) as mine:
            assert mine
    assert 0.5 <= time.monotonic() - begin < 1.0
    # One that has been noted and beats again is watched again.
    lock = tmp_path / "0" / "000000.lock"
    lock.write_text(ELSEWHERE)
    begin = time.monotonic()
    with locks.locked(tmp_path / "0", patience=0.3) as mine:
        assert mine and time.monotonic() - begin >= 0.3


def written(folder, **owner):
    owner = {"machine": locks.machine(), "pid": os.getpid(), "started": locks.started(os.getpid())} | owner
    (folder / "000000.lock").write_text(json.dumps(owner))


def test_a_process_that_got_the_number_of_a_dead_owner_is_not_the_owner(tmp_path):
    written(tmp_path)
    with locks.locked(tmp_path) as mine:
        assert not mine and locks.held(tmp_path)
    written(tmp_path, started="1")
    assert not locks.held(tmp_path)
    with locks.locked(tmp_path) as mine:
        assert mine


def test_the_namespace_of_processes_and_the_boot_are_part_of_a_machine(tmp_path):
    host, boot, namespace = locks.machine().split(" ")
    for other in (f"other {boot} {namespace}", f"{host} other {namespace}", f"{host} {boot} 1"):
        written(tmp_path, machine=other, started="1")  # of a container with the same host name, say
        assert locks.held(tmp_path, locks.clock(tmp_path))
        with locks.locked(tmp_path, patience=0.2) as mine:
            assert mine


def test_an_owner_is_known_by_the_token_of_its_lock(tmp_path):
    with locks.locked(tmp_path):
        locks.confirm(tmp_path)
        (lock,) = tmp_path.iterdir()
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "of another process"}))
        with pytest.raises(locks.LostLockError):
            locks.confirm(tmp_path)
    assert lock.exists()


def test_a_silent_owner_elsewhere_does_not_run(tmp_path):
    lock = tmp_path / "000000.lock"
    lock.write_text(ELSEWHERE)
    assert locks.held(tmp_path, locks.clock(tmp_path))
    os.utime(lock, (time.time() - 2 * 86400,) * 2)
    assert not locks.held(tmp_path, locks.clock(tmp_path)) and [path.name for path in tmp_path.iterdir()] == [lock.name]


def test_a_lost_claim_leaves_the_run_to_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    cfg = configured("measure", f"results={tmp_path}")
    folder = tmp_path / "run"
    other = folder / "000001.lock"

    def lose():
        other.write_text(ELSEWHERE)
        return 1.0

    assert one_run.run_once(cfg, folder, [], lose, alone=False) is None
    assert outcomes.Status.read(folder) is None and other.exists() and not (folder / outcomes.ERROR).exists()
    with pytest.raises(locks.LostLockError, match="two"):
        one_run.run_once(cfg, tmp_path / "two", [], lambda: (tmp_path / "two" / "000000.lock").unlink(), alone=True)

    def replace():  # the other was done, and a third has a lock of the same name, which is neither beaten nor removed
        own.write_text(ELSEWHERE)
        os.utime(own, (0, 0))
        time.sleep(0.1)

    own = tmp_path / "three" / "000000.lock"
    with pytest.raises(locks.LostLockError):
        one_run.run_once(cfg, own.parent, [], replace, alone=True)
    assert own.read_text() == ELSEWHERE and own.stat().st_mtime == 0


def test_temporary_names_differ_also_in_one_process(tmp_path):
    names = {files.beside(tmp_path / "x.json").name for _ in range(1000)}
    assert len(names) == 1000 and all(name.startswith("x.json.") and name.endswith(".part") for name in names)
