"""Records of a run, TensorBoard and MLflow, and images from a memory-mapped file."""

import math
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.data.images import Augmentation, Images
from experiments.training import sinks
from experiments.training.records import Records, read
from gradscope.sinks import values_of
from tests.experiments.training.disk import full_disk


def test_each_record_is_there_at_once_and_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = Records(path, [{"step": 1}])
    records.append({"step": 2, "loss": math.nan, "norm": math.inf, "values": [1.5, math.nan]})
    expected = [{"step": 1}, {"step": 2, "loss": None, "norm": "inf", "values": [1.5, None]}]
    assert read(path) == expected  # not closed yet
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read(path) == expected
    records.close()
    Records(path, read(path)[:1]).close()
    assert read(path) == [{"step": 1}] and read(tmp_path / "none.jsonl") == []
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1, is not JSON"):
        read(path)


def test_a_full_disk_is_reported_with_the_path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = Records(path, [{"step": 1}])
    with full_disk(100):
        with pytest.raises(OSError, match=rf"{re.escape(str(path))} \(.*File too large"):
            records.append({"step": 2, "text": "x" * 200})
        with pytest.raises(OSError, match=rf"{re.escape(str(path))} \(.*File too large"):
            records.close()
    assert read(path) == [{"step": 1}]


FRAME = pd.DataFrame(
    {
        "quantity": ["gsc", "gradient_norm"], "layer": ["conv1", "conv1"], "value": [100.0, 0.5],
        "log10_value": [2.0, math.log10(0.5)],
    }
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra sinks")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = sinks.make(["tensorboard"], tmp_path, {})
    for step in (6, 7, 8):
        killed.write(step, {"train_loss": 9.0 - step})
    killed.close(KeyboardInterrupt())
    sink = sinks.make(["tensorboard"], tmp_path, {}, begin=7)  # a run that resumes at step 7
    sink.write(7, sinks.of_record({"step": 7, "train_loss": 1.25, "test_accuracy": None}))
    sink.write(8, values_of(FRAME))
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "train_loss": [(6, 3.0), (7, 1.25)],
        "log10_gsc/conv1": [(8, 2.0)],
        "gradient_norm/conv1": [(8, 0.5)],
    }


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path):
    pytest.importorskip("mlflow", reason="needs the extra sinks")
    from mlflow import MlflowClient

    folder = tmp_path / "mysweep" / "a run"
    sink = sinks.make(["mlflow"], folder, {"seed": 3, "train": {"epochs": 4}})
    sink.write(7, {"train_loss": 1.25})
    sink.write(9, {"train_loss": 1.0} | values_of(FRAME))
    sink.close()
    client = MlflowClient(tracking_uri=(tmp_path / "mysweep" / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("mysweep")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "a run" and found.info.status == "FINISHED"
    assert found.data.params == {"seed": "3", "train.epochs": "4"}
    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert [(m.step, m.value) for m in history] == [(7, 1.25), (9, 1.0)]
    assert found.data.metrics["log10_gsc/conv1"] == 2.0
    assert (folder / "mlflow_run.txt").read_text() == found.info.run_id


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError(), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_goes_on_with_the_same_run(tmp_path, error, status):
    pytest.importorskip("mlflow", reason="needs the extra sinks")
    from mlflow import MlflowClient

    folder = tmp_path / "s" / "run"
    for value in (1.0, 2.0):  # the second is a resumed run with another resume option
        sink = sinks.make(["mlflow"], folder, {"resume": value})
        sink.write(1, {"gsc/act#2 a": value})
        sink.close(error)
    client = MlflowClient(tracking_uri=(tmp_path / "s" / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    assert found.info.status == status and found.data.params == {"resume": "1.0"}
    assert [m.value for m in client.get_metric_history(found.info.run_id, "gsc/act-2 a")] == [1.0, 2.0]
    (folder / "mlflow_run.txt").write_text("lost")
    sinks.make(["mlflow"], folder, {}).close()
    assert len(client.search_runs([found.info.experiment_id])) == 2


@pytest.mark.filterwarnings("ignore")
def test_runs_that_begin_at_once_share_an_experiment(tmp_path):
    pytest.importorskip("mlflow", reason="needs the extra sinks")
    from mlflow import MlflowClient

    together = threading.Barrier(4)

    def begin(number):
        together.wait()
        sinks.make(["mlflow"], tmp_path / "s" / str(number), {}).close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin, range(4)))
    client = MlflowClient(tracking_uri=(tmp_path / "s" / "mlruns").as_uri())
    named = [experiment for experiment in client.search_experiments() if experiment.name == "s"]
    assert len(named) == 1 and len(client.search_runs([named[0].experiment_id])) == 4


def test_a_tracker_gets_project_name_and_configuration(tmp_path, monkeypatch):
    """A recorded package with the calls that wandb and trackio have in common."""
    calls = []

    class Run:
        def __init__(self, name):
            self.name = f"{name} anew"  # trackio changes a name that is taken

        def log(self, metrics, step=None):
            calls.append((metrics, step))

        def finish(self):
            calls.append("finished")

    package = types.ModuleType("trackio")
    package.init = lambda **options: calls.append(options) or Run(options["name"])
    monkeypatch.setitem(sys.modules, "trackio", package)
    for begin, name, resume in ((0, "run", "never"), (7, "run anew", "allow"), (0, "run", "never")):
        sink = sinks.make(["trackio"], tmp_path / "sweep" / "run", {"seed": 3}, begin)
        sink.write(7, {"loss": 0.5})
        sink.close()
        expected = {"project": "sweep", "name": name, "config": {"seed": 3}, "resume": resume}
        assert calls == [expected, ({"loss": 0.5}, 7), "finished"]
        calls.clear()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"sinks=\[wandb\] needs a package .*: pip install \"wandb\""):
        sinks.make(["wandb"], tmp_path, {})


def test_an_unknown_sink(tmp_path):
    with pytest.raises(ValueError, match=r"sinks must be .* got 'csv'"):
        sinks.make(["csv"], tmp_path, {})


def plain(num=20):
    pixels = torch.randint(256, (num, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images(pixels, torch.arange(num))


def test_a_mapped_file_gives_the_same_batches(tmp_path):
    data, cache, cpu = plain(), tmp_path / "cache", torch.device("cpu")
    mapped = data.mapped(cache, cpu)
    (path,) = cache.iterdir()
    np.testing.assert_array_equal(np.fromfile(path, dtype=np.uint8), data.images.numpy().ravel())
    indices, augmentation = torch.tensor([3, 19, 0]), Augmentation(crop=2, cutout=2)
    for a, b in zip(data.batch(indices, augmentation, 5), mapped.batch(indices, augmentation, 5), strict=True):
        assert torch.equal(a, b)
    written = path.stat().st_mtime_ns
    data.mapped(cache, cpu)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(b"torn")
    assert torch.equal(data.mapped(cache, cpu).images, data.images)
    other = replace(data, images=255 - data.images)  # the same number of bytes, with other content
    assert torch.equal(other.mapped(cache, cpu).images, other.images)
    assert torch.equal(data.mapped(cache, cpu).images, data.images)


def test_shares_of_a_batch_are_what_the_whole_batch_holds():
    data, indices, augmentation = plain(), torch.randperm(20)[:12], Augmentation(crop=2, cutout=2)
    whole = data.batch(indices, augmentation, 5)
    shares = [data.batch(indices, augmentation, 5, slice(first, first + 4)) for first in (0, 4, 8)]
    for n in range(2):
        assert torch.equal(whole[n], torch.cat([share[n] for share in shares]))


def test_a_part_held_out():
    learned, held = plain().split(5)
    assert held.labels.tolist() == [15, 16, 17, 18, 19] and len(learned) == 15
    with pytest.raises(ValueError, match=r"holdout must be between 1 and 19 images, got 20"):
        plain().split(20)


def test_digits_with_labels():
    pytest.importorskip("sklearn")
    learned, test = Images.digits(train=True), Images.digits(train=False)
    assert (len(learned), len(test)) == (1348, 449) and learned.images.shape[1:] == (3, 32, 32)
    x, y = learned.batch(torch.arange(1348))
    assert abs(float(x.mean())) < 1e-3 and float(x.std()) == pytest.approx(1, abs=1e-3)
    assert sorted(y.unique().tolist()) == list(range(10))
