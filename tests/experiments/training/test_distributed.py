"""Two processes train the same network as one process."""

import json
import signal
import socket
import time

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import kills
from experiments.runs import names, outcomes
from experiments.training.distributed import Ranks
from gradscope import frames
from tests.commands import Command, run

OPTIONS = [
    "model=mlp", "model.depth=4", "model.width=32", "model.out_features=10", "model.activation=tanh", "data=digits",
    "train.max_steps=24", "train.batch_size=64", "train.log_every=4", "train.precision=float32", "train.clip=1.0",
    "train.augmentation.crop=2", "optimizer.lr=0.02", "monitor.every=8", "monitor.probes=exact",
    "monitor.max_overhead=null", "train.checkpoint_every=8", "train.keep=3",
]  # fmt: skip


def trained(folder, *launcher):
    module, *words = [*launcher, "experiments.train", *OPTIONS, f"results={folder}"]
    code, out, err = run(module, *words)
    assert code == 0, out + err
    (run_folder,) = names.folders(folder / "train")
    return out, run_folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    pytest.importorskip("sklearn")
    _, alone = trained(tmp_path / "one")
    torchrun = ("torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m")
    said, together = trained(tmp_path / "two", *torchrun)
    assert said.count("Run folder") == 1 and alone.name == together.name
    one, two = (pd.read_parquet(folder / "metrics.parquet") for folder in (alone, together))
    assert one["step"].tolist() == two["step"].tolist() == [4, 8, 12, 16, 20, 21, 24]
    np.testing.assert_allclose(one["train_loss"], two["train_loss"], rtol=1e-5)
    np.testing.assert_allclose(one["test_loss"], two["test_loss"], rtol=1e-5)
    assert one["test_accuracy"].dropna().iloc[-1] > 0.5
    states = [torch.load(folder / "checkpoints" / "last.pt", weights_only=True) for folder in (alone, together)]
    for name, weight in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], weight, rtol=1e-4, atol=1e-6)
    watched = [frames.load(folder / "monitor.parquet") for folder in (alone, together)]
    assert (watched[0][["step", "layer", "quantity"]] == watched[1][["step", "layer", "quantity"]]).all(axis=None)
    np.testing.assert_allclose(watched[0]["log10_value"], watched[1]["log10_value"], atol=2e-4)
    assert set(watched[0]["num_samples"][watched[0]["quantity"] == "gsc"]) == {32}
    assert [json.loads((f / "manifest.json").read_text())["hardware"]["world_size"] for f in (alone, together)] == [
        1,
        2,
    ]

    # Killed after step 16 and started again, both processes end with the same weights, bit for bit.
    last, earlier = (together / "checkpoints" / name for name in ("last.pt", "step-00000016.pt"))
    earlier.replace(last)
    (together / "status.json").unlink()
    said, _ = trained(tmp_path / "two", *torchrun)
    assert "Resuming at step 16 of 24." in said
    again = torch.load(last, weights_only=True)
    assert again["step"] == 24 and all(torch.equal(w, again["model"][name]) for name, w in states[1]["model"].items())
    assert pd.read_parquet(together / "metrics.parquet")["train_loss"].tolist() == two["train_loss"].tolist()


SHORT = (
    "model=custom", "model._target_=tests.experiments.runs.dying.Network", "data=digits", "train.batch_size=64",
    "train.precision=float32", "monitor.every=null", "num_threads=1",
)  # fmt: skip


def started(folder, *arguments, mark=""):
    """A training with two processes."""
    torchrun = ("--nproc-per-node=2", f"--master-port={free_port()}", "-m", "experiments.train")
    return Command(
        "torch.distributed.run", *torchrun, *SHORT, f"results={folder}", *arguments, merged=True, **{kills.MARK: mark}
    )


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize(
    "rank, killed, reason",
    [
        (1, "false", "process 1 has failed: RuntimeError: the reason"),
        (1, "true", "another process of this training has ended without a message"),
    ],
)
def test_the_error_of_one_process_is_the_error_of_all(tmp_path, rank, killed, reason):
    pytest.importorskip("sklearn")
    process = started(tmp_path, f"+model.rank={rank}", "+model.steps=3", f"+model.kills={killed}")
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 1 and f"Error: {reason}" in said and "gloo" not in said
    assert killed == "true" or said.index("the reason") < said.index("elastic")
    (folder,) = names.folders(tmp_path / "train")
    assert outcomes.Status.read(folder).error.startswith(f"LostProcessError: {reason}")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_no_process_outlives_torchrun(tmp_path, moment):
    pytest.importorskip("sklearn")
    process = started(tmp_path, "+model.rank=-1", "+model.steps=0", "train.epochs=10000", mark=str(tmp_path))
    begin = time.monotonic()
    while time.monotonic() < begin + 240 and (
        len(kills.alive(process.pid, str(tmp_path))) < 3
        or (moment == "training" and not list(tmp_path.glob("train/*/metrics.jsonl")))
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    begin = time.monotonic()
    while kills.alive(process.pid, str(tmp_path)) and time.monotonic() < begin + 60:  # 2 s on an idle machine
        time.sleep(0.1)
    assert kills.alive(process.pid, str(tmp_path)) == []


def test_a_batch_that_cannot_be_shared():
    assert [Ranks(rank, 3).share(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match=r"train\.batch_size=10 .* multiple of the number of processes, 3"):
        Ranks(0, 3).share(10)
