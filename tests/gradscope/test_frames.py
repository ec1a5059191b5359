"""The schema: what goes out comes back, and what does not fit is refused."""

import math

import numpy as np
import pandas as pd
import pytest

from gradscope import frames


def example(**changes) -> pd.DataFrame:
    columns = {
        "layer": ["a", "b", "c"], "index": [0, 1, 2], "depth_from_output": [2, 1, 0], "target": "c", "quantity": "gsc",
        "log10_value": [336.2512345678901, 3.14159265358979, 0.0], "log10_stderr_probe": [0.01, math.nan, 0.0],
        "log10_stderr_sample": [math.nan, 0.02, 0.0], "reduction": "batch", "coupled": True,
        "num_probes": [32, 1, 0], "num_samples": 100,
    }  # fmt: skip
    return frames.tidy(columns | changes)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_round_trip(tmp_path, suffix):
    frame = example().assign(norm=["none", "NA", "batch"], seed=3)
    path = frames.save(frame, tmp_path / f"frame.{suffix}")
    again = frames.load(path)
    pd.testing.assert_frame_equal(again[list(frames.COLUMNS)], frame[list(frames.COLUMNS)], rtol=1e-13)
    assert list(again["norm"]) == ["none", "NA", "batch"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_statistics_without_target_or_coupling(tmp_path, suffix):
    frame = example(target=None, reduction=None, coupled=None, quantity="sign_diversity")
    again = frames.load(frames.save(frame, tmp_path / f"frame.{suffix}"))
    assert again["target"].isna().all()
    assert again["coupled"].isna().all()


def test_values_follow_the_logarithm_beyond_float64():
    frame = example(log10_value=[400.0, -400.0, -math.inf])
    np.testing.assert_array_equal(frame["value"], [math.inf, 0, 0])
    assert list(example().columns) == list(frames.COLUMNS)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="'target'"):
        frames.check(example().drop(columns="target"))
    with pytest.raises(ValueError, match="'log10_value' holds 1 nulls"):
        frames.check(example().assign(log10_value=[1.0, math.nan, 0.0]))
    with pytest.raises(ValueError, match="contradict each other"):
        frames.check(example().assign(value=1.0))
    with pytest.raises(ValueError, match=r"saved as \.parquet or \.csv, got 'frame\.xls'"):
        frames.save(example(), tmp_path / "frame.xls")
    with pytest.raises(ValueError, match=r"read from \.parquet or \.csv"):
        frames.load(tmp_path / "frame.xls")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_intervals_are_optional_and_contain_the_value(tmp_path, suffix):
    ends = {"log10_low": [336.0, math.nan, 0.0], "log10_high": [336.5, math.nan, 0.0]}
    frame = example(**ends)
    assert list(frame.columns) == [*frames.COLUMNS, *frames.OPTIONAL]
    again = frames.load(frames.save(frame, tmp_path / f"frame.{suffix}"))
    np.testing.assert_array_equal(again[[*ends]], frame[[*ends]])
    for name in ends:
        with pytest.raises(ValueError, match="do not contain"):
            example(**ends | {name: [336.2, math.nan, -1.0 if name == "log10_high" else 1.0]})


def test_defaults():
    columns = {"layer": "a", "index": [1, 2], "depth_from_output": 0, "quantity": "x", "num_samples": 3}
    frame = frames.tidy({**columns, "log10_value": [0.0, 1.0]})
    assert frame["value"].tolist() == [1, 10] and frame["num_probes"].tolist() == [0, 0]
    nulls = ["target", "reduction", "coupled", "log10_stderr_probe", "log10_stderr_sample", "stderr_sample"]
    assert frame[nulls].isna().all(axis=None)
    signed = frames.tidy({**columns, "value": [-1.0, 2.0], "stderr_sample": 0.5})
    assert signed["log10_value"].isna().all() and signed["stderr_sample"].tolist() == [0.5, 0.5]


def test_names_of_layers_survive_every_file(tmp_path):
    names = [
        "1.10",
        "1.1",
        "01",
        "1e5",
        "NA",
        "null",
        "None",
        "True",
        "nan",
        "inf",
        "a,b",
        'a"b',
        "(input)",
        "x#2",
        "h[1]",
    ]
    frame = frames.observed("balance", np.arange(1.0, 16.0), layer=names, index=np.arange(15))
    for name in ("frame.csv", "frame.parquet"):
        loaded = frames.load(frames.save(frame, tmp_path / name))
        assert list(loaded.layer) == names
        assert loaded.equals(frame)


def test_tables_of_notebooks_leave_out_columns_that_hold_nothing():
    table = pd.DataFrame({"layer": ["a", "b"], "value": [0.0, math.nan], "odd": ["", ""], "error": [math.nan] * 2})
    shown = frames.notebook("text", table)
    assert "<th>layer</th>" in shown and "<th>value</th>" in shown
    assert "odd" not in shown and "error" not in shown
