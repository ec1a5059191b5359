"""Whether a repeated run is the same, and what a frame on disk says of itself."""

import math
import shutil
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from experiments import measure, rerun, seeds, train
from experiments.archive.differences import differences
from experiments.config import columns, command_line
from experiments.files import read_json, write_json
from experiments.runs import manifest, names
from gradscope import frames
from tests.experiments.example_runs import CHOICES, configured, example, of_schema

TRAINING = (
    "model=mlp", "data=digits", "model.out_features=10", "train.max_steps=3", "train.batch_size=16",
    "train.log_every=1", "train.checkpoint_every=null", "train.precision=float32", "monitor.every=1",
    "monitor.batch_size=8", "monitor.max_overhead=null",
)  # fmt: skip


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
    train.train(cfg, folder, seeds.device(cfg.device), Console(quiet=True), columns.columns(cfg, CHOICES))
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
        rerun.main(rerun.Config(str(measured)))
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


def test_a_damaged_folder_is_named(measured, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"no run folder .*run\."):
        rerun.main(rerun.Config(str(folder)))
    shutil.copytree(measured, folder)
    content = (folder / "frame.parquet").read_bytes()
    middle = len(content) // 3
    (folder / "frame.parquet").write_bytes(content[:middle] + b"x" * 2000 + content[middle + 2000 :])
    with pytest.raises((OSError, ValueError), match="run"):
        rerun.main(rerun.Config(str(folder)))
    write_json(folder / "manifest.json", {"choices": {}})
    monkeypatch.setattr(sys, "argv", ["rerun", str(folder)])
    with pytest.raises(SystemExit, match=r"^Error: .*run has no complete manifest"):
        command_line.run(rerun.main, rerun.Config, positional="folder")


def test_a_training_is_repeated_bit_for_bit(trained, tmp_path):
    assert rerun.again(trained).found == ()


def test_the_budget_that_a_rerun_sets_aside_is_no_difference(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    content = read_json(folder / "manifest.json")
    content["config"]["monitor"]["max_overhead"] = 0.03
    write_json(folder / "manifest.json", content)
    pd.read_parquet(folder / "metrics.parquet").assign(max_overhead=0.03).to_parquet(folder / "metrics.parquet")
    frames.save(frames.load(folder / "monitor.parquet").assign(max_overhead=0.03), folder / "monitor.parquet")
    assert rerun.again(folder).found == ()


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
    since = (late["step"] == 2) & late["quantity"].str.startswith("update")  # of two steps then, of one now
    assert since.any()
    late.loc[since, "log10_value"] += 0.2
    late["value"] = late["value"].where(~since, 10.0 ** late["log10_value"])
    frames.save(late, folder / "monitor.parquet")
    assert [one.column for one in rerun.again(folder).found] == ["train_loss"]
    (folder / "monitor.parquet").unlink()
    assert [one.column for one in rerun.again(folder).found] == ["train_loss"]
    (folder / "metrics.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no metrics\.parquet"):
        rerun.main(rerun.Config(str(folder)))


def test_a_file_says_which_schema_it_has(tmp_path):
    path = frames.save(example(), tmp_path / "x.parquet")
    assert pq.read_schema(path).metadata[frames.METADATA_KEY] == b"2"
    assert list(frames.load(path).columns) == list(frames.COLUMNS)
    path = frames.save(example(), tmp_path / "x.csv")
    assert set(pd.read_csv(path)["schema_version"]) == {2}
    assert list(frames.load(path).columns) == list(frames.COLUMNS)
    reads = r"schema version 99, .* measure again \(rerun=true\)"
    with pytest.raises(frames.SchemaError, match=reads):
        frames.load(of_schema(tmp_path / "new.parquet", 99, example()))
    path.write_text(path.read_text().replace(",2\n", ",99\n"))
    with pytest.raises(frames.SchemaError, match=reads):
        frames.load(path)


def test_every_key_of_a_training_is_a_column():
    cfg = configured(
        "train", "model=mlp", "optimizer=adamw", "train.augmentation.crop=1", "+extra={a:{lr:2}}", "+tag=x"
    )
    choices = CHOICES | {"optimizer": "adamw", "study": None, "launcher": "serial", "hydra/launcher": "basic"}
    found = columns.columns(cfg, choices)
    assert list(found)[:3] == ["model", "data", "optimizer"] and found["optimizer"] == "adamw"
    assert found["lr"] == cfg.optimizer.lr and found["betas"] == "[0.9, 0.999]" and found["extra.a.lr"] == 2
    assert found["crop"] == 1 and found["flip"] is True and found["every"] == 100 and found["tag"] == "x"
    assert (found["batch_size"], found["data.batch_size"], found["monitor.batch_size"]) == (128, 100, 32)
    assert not {"study", "launcher", "results", "device", "_target_", "sinks"} & found.keys()
    assert found["model._target_"].endswith(".MLP") and found["optimizer._target_"] == "torch.optim.AdamW"
    leaves = {path for path, _ in columns._leaves((), names.OmegaConf.to_container(cfg))}
    swept = {path for path in leaves if not {path[0], ".".join(path)} & {*names.PLACE_KEYS}}
    assert ("train", "checkpoint_every") in leaves - swept
    assert len(swept) + 3 == len(found)  # and the three choices


def test_every_key_of_a_measurement_is_a_column():
    cfg = configured(
        "measure", "matrix_layers=[layers.0,layers.1]", "data.shape=[3,2]", "+measurement={_target_:a.b,num_probes:8}"
    )
    found = columns.columns(cfg, CHOICES)
    assert found["matrix_layers"] == '["layers.0", "layers.1"]' and found["shape"] == "[3, 2]"
    assert found["config.target"] is None and found["config.reduction"] == "batch"
    named = columns.columns(configured("measure", "+layer=L", "+run=3", "+step=1"), CHOICES)
    assert (named["config.layer"], named["config.run"], named["config.step"]) == ("L", 3, 1) and "run" not in named
    assert found["statistics"] == '["preactivation_std", "sign_diversity"]' and found["probes"] == "auto"
    assert found["measurement.num_probes"] == 8 and not frames.COLUMNS.keys() & found.keys()
    assert found["measurement._target_"] == "a.b" and found["data._target_"] == "experiments.data.noise"
