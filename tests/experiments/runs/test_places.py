"""Where runs lie: links to other disks and to nothing, odd names of folders, full disks, containers."""

import errno
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import collect, measure, status, train
from experiments.archive import collecting
from experiments.config import command_line
from experiments.runs import locks, names, outcomes
from gradscope import files
from tests.experiments.commands import run_main
from tests.experiments.example_runs import example, finished
from tests.experiments.runs.test_sweeps import SMALL
from tests.experiments.training import test_resuming as training
from tests.experiments.training.disk import full_disk
from tests.helpers import ROOT

UNREADABLE = Path("/proc/self/mem")  # opens as a file, and reading its first byte is an input/output error


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """A command with results in ``tmp_path/r``, or elsewhere; returns what it printed, and its exit code."""

    def called(main, *arguments, results=tmp_path / "r"):
        names._known.cache_clear()
        return run_main(main, capsys, monkeypatch, *arguments, f"results='{results}'")

    return called


@pytest.fixture
def disk(tmp_path):
    """A folder on another disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_checkpoints_may_lie_on_another_disk(command, tmp_path, disk, monkeypatch):
    pytest.importorskip("sklearn")
    assert command(train.main, *training.SMALL)[1] is None
    run = training.folder_of(tmp_path / "r")
    whole = training.weights(run)
    shutil.move(run / "checkpoints", disk / "c")
    (run / "checkpoints").symlink_to(disk / "c")
    (disk / "c" / "mine.pt").touch()
    for arguments, said in (([], "Resuming at step 4 of 6"), (["resume=none"], "step 2 of 6")):
        with monkeypatch.context() as patched:  # a run that is killed after four steps
            training.killed_after(patched, 4)
            assert command(train.main, *training.SMALL, "resume=none")[1] == 9
        (disk / "c" / "last.pt.0123456789ab.part").touch()
        output, code = command(train.main, *training.SMALL, *arguments)
        assert code is None and said in output and training.same(training.weights(run), whole)
        assert sorted(path.name for path in (disk / "c").iterdir()) == ["best.pt", "last.pt", "mine.pt"]
    assert (run / "checkpoints").is_symlink()


@pytest.mark.parametrize("link", ["r", "r/s"])
def test_a_link_to_nothing_is_named(command, tmp_path, link):
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to("/nowhere/x")
    said, code = command(measure.main, "-m", *SMALL, "sweep=s", "seed=0,1")
    assert code == 1 and f"the link {tmp_path / link} leads to /nowhere/x, which does not exist" in said
    said, code = command(measure.main, *SMALL, "sweep=s")
    assert code == 1 and f"the link {tmp_path / link} leads to /nowhere/x, which does not exist" in said


def test_checkpoints_that_lead_to_nothing_are_named(command, tmp_path):
    pytest.importorskip("sklearn")
    command(train.main, *training.SMALL)
    run = training.folder_of(tmp_path / "r")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to("/nowhere/x")
    said, code = command(train.main, *training.SMALL, "resume=none")
    assert code == 1
    assert re.search(r"the link .*/checkpoints leads to /nowhere/x, which does not exist\); there is no earlier", said)
    assert "Free disk space" not in said


def test_a_sweep_in_a_folder_with_an_odd_name(command, tmp_path):
    results = tmp_path / "a #b=c: d"
    assert command(measure.main, "-m", *SMALL, "sweep=s", "seed=0,1", results=results)[1] is None
    for main, config in ((collect.main, collect.Config), (status.main, status.Config)):
        main(command_line.parse(config, [f"results={results}", "sweep=s"]))
    assert collecting.load(results / "s").manifest["runs"] == 2


def test_a_full_disk_is_named_by_the_lock_and_left_without_a_lock(tmp_path):
    finished(tmp_path, "run-000000000000", example())
    for folder in (tmp_path, tmp_path / "new"):
        said = rf"the lock {folder}/000000.lock cannot be written"
        with full_disk(0), pytest.raises(OSError, match=said) as raised, locks.locked(folder):
            raise AssertionError
        assert raised.value.errno == errno.EFBIG and not list(folder.glob("*.lock"))
    with full_disk(0), pytest.raises(OSError, match=rf"the lock {tmp_path}/000000.lock"):
        collecting.collect(tmp_path)
    assert collecting.collect(tmp_path).manifest["runs"] == 1


@pytest.mark.skipif(not UNREADABLE.exists(), reason="this system has no /proc")
def test_a_lock_that_cannot_be_read_is_believed_for_its_lease(tmp_path):
    with pytest.raises(OSError, match="Input/output error"):
        files.read_text(UNREADABLE)
    (tmp_path / "000000.lock").symlink_to(UNREADABLE)
    assert locks.held(tmp_path, UNREADABLE.stat().st_mtime + 1)
    assert not locks.held(tmp_path, UNREADABLE.stat().st_mtime + 2 * locks.PATIENCE_SECONDS)
    with locks.locked(tmp_path, patience=0.2) as mine:
        assert mine
    assert list(tmp_path.iterdir()) == []


def in_namespace(*command):
    """A process that is number 1 in a PID namespace of its own, as in a container, with the same host name."""
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable]
    return subprocess.Popen(
        [*apart, *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


LOCKED = """
import sys
from pathlib import Path
from experiments.runs import locks
for patience in sys.argv[2:]:
    sys.stdin.readline()
    with locks.locked(Path(sys.argv[1]), patience=float(patience)) as mine:
        print(mine, flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def namespaces():
    """Skips the test if this process cannot make a PID namespace."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    tried = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"unshare makes no PID namespace here: {tried.stderr.strip()}")


@pytest.mark.usefixtures("namespaces")
def test_two_containers_with_one_host_name_do_not_take_each_others_runs(tmp_path):
    first, second = (in_namespace("-c", LOCKED, tmp_path, *patience) for patience in (["30"], ["30", "0.5"]))

    def answer(process, lines):
        process.stdin.write(lines * "\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    with first, second:
        assert answer(first, 1) == "True"
        (lock,) = tmp_path.iterdir()
        assert json.loads(lock.read_text())["pid"] == 1 and locks.held(tmp_path)
        assert answer(second, 1) == "False"  # it sees a heartbeat
        first.kill()
        assert answer(second, 2) == "True"  # it sees none
        assert [path.name for path in tmp_path.iterdir()] == ["000001.lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_launch_in_another_container_waits(tmp_path):
    sleeping = ("+measurement._target_=tests.experiments.runs.dying.sleeps", "+measurement.number=1")
    launch = ("-m", "experiments.measure", "-m", *SMALL, *sleeping, "+measurement.seconds=20", f"results={tmp_path}")
    with in_namespace(*launch, "sweep=s") as first:
        begin = time.monotonic()
        while not list(tmp_path.glob("s/*/*.lock")) and time.monotonic() < begin + 120:
            time.sleep(0.1)
        with in_namespace(*launch, "sweep=s") as second:
            said = second.communicate(timeout=240)[0]
        assert first.wait(240) == second.returncode == 0
    assert "s: waiting for 1 runs of another launch." in said
    (run,) = names.folders(tmp_path / "s")
    assert outcomes.is_done(run)
