"""The launcher slurm: what it says of jobs that end without a result, with a real Slurm where there is one."""

import itertools
import time
from types import SimpleNamespace

import pytest

from benchmarks import slurm as campaign
from experiments.runs import names as run_names
from experiments.runs import outcomes as run_outcomes
from experiments.runs import slurm, workers
from tests.experiments.runs.dying import fails
from tests.experiments.runs.test_launches import dying, launch  # noqa: F401  a fixture

submitit = pytest.importorskip("submitit", reason="needs the extra slurm")
PARAMS = {"timeout_min": 7, "mem_gb": 2, "signal_delay_s": 30}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder of commands that hides those of a real Slurm; ``squeue`` prints a file, ``scancel`` notes its words."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in slurm.COMMANDS:
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >>{folder}/{name}.words\n/bin/cat {folder}/{name}.says\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(slurm, "SETTLING_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "SHORTEST_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "LONGEST_SECONDS", 0.5)
    return folder


def job(tmp_path, number="12_1"):
    """A job of submitit that has no result yet."""
    (tmp_path / number).mkdir(exist_ok=True)
    return submitit.SlurmJob(folder=tmp_path / "%j", job_id=number)


@pytest.mark.parametrize(
    "says, error, again",
    [
        ("12_0|RUNNING|None", "Slurm no longer knows job 12, which left no result", False),
        ("12_1|CANCELLED|None", "Slurm job 12 was cancelled", False),
        (
            "12_1|TIMEOUT|TimeLimit",
            "TimeoutError: the job reached its time limit (hydra.launcher.timeout_min=7)",
            False,
        ),
        ("12_1|OUT_OF_MEMORY|None", "job 12 ended without a result (OUT_OF_MEMORY); it asked for mem_gb=2", True),
        ("12_1|NODE_FAIL|NodeDown", "ended without a result (NODE_FAIL)", True),
        ("12_1|PENDING|PartitionTimeLimit", "cannot start job 12 (PartitionTimeLimit), which asks for mem_gb=2", False),
    ],
)
def test_a_job_without_a_result_has_a_reason(tmp_path, commands, says, error, again):
    (commands / "squeue.says").write_text(f"{says}\n")
    found, repeated = slurm.Queue(["12_0", "12_1"], PARAMS).wait(job(tmp_path))
    assert error in found and repeated is again
    assert (commands / "scancel.words").exists() == ("PENDING" in says)


def test_the_end_of_a_job_is_known_also_after_slurm_forgot_it(tmp_path, commands):
    queue = slurm.Queue(["12_0", "12_1"], PARAMS)
    (commands / "squeue.says").write_text("12_0|PENDING|PartitionConfig\n12_1|TIMEOUT|None\n")
    assert "cannot start" in queue.wait(job(tmp_path, "12_0"))[0]
    assert (commands / "scancel.words").read_text() == "--signal=KILL 12_0\n"  # others of the array may run
    (commands / "squeue.says").write_text("")
    assert queue.wait(job(tmp_path))[0].startswith("TimeoutError: ")
    queue.cancel()
    assert (commands / "scancel.words").read_text().splitlines()[1:] == ["--signal=KILL 12"]


def test_a_job_that_is_requeued_or_unknown_for_a_moment_is_waited_for(tmp_path, commands, capfd, monkeypatch):
    held = "12_1|PENDING|Nodes required for job are DOWN."
    says = ["12_1|NODE_FAIL|None", held, held, None, "12_1|RUNNING|None", "12_1|COMPLETED|None", "12_1|COMPLETED|None"]
    one, clock = job(tmp_path), [0.0]

    def sleep(seconds):
        clock[0] += 10.0
        (commands / "squeue.says").unlink()  # then squeue fails
        now = says[int(clock[0] / 10)]
        if now is not None:
            (commands / "squeue.says").write_text(f"{now}\n")
        else:
            (commands / "squeue.says").symlink_to(commands / "nothing")
        if clock[0] == 60.0:
            one.paths.result_pickle.touch()

    (commands / "squeue.says").write_text(f"{says[0]}\n")
    monkeypatch.setattr(slurm, "SETTLING_SECONDS", 15.0)
    monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    assert slurm.Queue(["12_1"], PARAMS).wait(one) is None
    said = capfd.readouterr().err
    assert said.count("Slurm holds job 12 back: Nodes required for job are DOWN. Ctrl-C") == 1
    assert said.count("Slurm does not answer (squeue)") == 1 and clock == [60.0]


def test_the_scheduler_is_asked_at_least_every_half_minute(commands, monkeypatch):
    monkeypatch.undo()  # of the short intervals
    monkeypatch.setenv("PATH", str(commands))
    (commands / "squeue.says").write_text("12_1|RUNNING|None\n")
    queue, clock, asked = slurm.Queue(["12_1"], PARAMS), [0.0], []
    monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    for clock[0] in range(0, 400, 2):
        queue._ask()
        if queue.asked == clock[0]:
            asked.append(clock[0])
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert gaps == sorted(gaps) and gaps[0] <= 4 and gaps[-1] == gaps[-2] == 30


def test_a_time_limit_below_the_warning_is_refused(launch, commands):  # noqa: F811
    said = (
        "Error: hydra.launcher.timeout_min=1 is too short: Slurm warns a job hydra.launcher.signal_delay_s=30 seconds"
    )
    code = launch("seed=0,1", "launcher=slurm", "hydra.launcher.timeout_min=1")[0]
    assert code.startswith(said) and "Set timeout_min to at least 2, or signal_delay_s=0" in code
    (commands / "squeue").unlink()
    (commands / "srun").unlink()
    code = launch("seed=0,1", "launcher=slurm")[0]
    assert "these commands are not found: srun, squeue. " in code and "use launcher=processes" in code


def test_a_warning_of_slurm_is_a_time_out(launch, tmp_path):  # noqa: F811
    code, said = launch(*dying("warned", "number=0,1"))
    assert code == 1 and "1 of 2 runs failed.\n  TimeoutError: the job reached its time limit" in said
    errors = {run_outcomes.Status.read(folder).error for folder in run_names.folders(tmp_path / "s")}
    assert errors == {None, f"TimeoutError: {slurm.TIMED_OUT}"}


def test_an_exception_outside_of_a_run_is_one_line(tmp_path):
    executor = submitit.LocalExecutor(tmp_path)
    executor.update_parameters(timeout_min=5)
    one = workers._Job(executor.submit(fails), None)
    assert one.results() == [None] and one.error == "ValueError: the last line" and one.died is None


@pytest.fixture(scope="module")
def node():
    """The only node of a real cluster."""
    try:
        return campaign.only_node()
    except RuntimeError as error:
        pytest.skip(f"needs a running Slurm cluster: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lists of seeds", "cancelled while pending", "Ctrl-C", "more memory than there is"])
def test_a_real_cluster(node, name):
    row = campaign.ended(name, campaign.SCENARIOS[name], node)
    assert row["right"], row
