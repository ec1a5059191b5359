"""Files from elsewhere: nothing in them is run, each bad run is left out and named, and nothing else is written."""

import io
import json
import math
import os
import pickle
import re
import urllib.error
import urllib.request

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from experiments import collect, rerun, status, targets
from experiments.archive import collecting, tables
from experiments.archive.manifests import Distinct
from experiments.data import cifar10_files, download
from experiments.files import write_json
from experiments.runs import locks, names, outcomes
from experiments.terminal import PlainConsole
from experiments.training import checkpoints, records
from gradscope import files, frames
from tests.experiments.example_runs import example, finished

RUN = "run-00000000000{}"
DEEP = "[" * 100_000


@pytest.fixture
def sweep(tmp_path):
    """A sweep of one sound run, and one to be spoiled."""
    for number in range(2):
        finished(tmp_path / "s", RUN.format(number), example())
    return tmp_path / "s"


def spoiled(sweep, change, **options):
    path = sweep / RUN.format(1) / "frame.parquet"
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path, **options)


def why(sweep):
    """The reason why the spoiled run is left out; the other one is collected."""
    assert set(collecting.collect(sweep).frame["run"]) == {RUN.format(0)}
    return collecting.unreadable(sweep)[RUN.format(1)][1]


CHANGES = {
    "a column 'run'": lambda t: t.append_column("run", pa.repeat("x", len(t))),
    "the column 'seed' more than once": lambda t: t.append_column("seed", t["seed"]),
    "'a' holds list<.*>, not": lambda t: t.append_column("a", pa.array([[1]] * len(t))),
    "has 400 letters": lambda t: t.append_column("a" * 400, pa.repeat(1, len(t))),
    "must hold one name": lambda t: t.set_column(t.column_names.index("model"), "model", pa.array(list("abc"))),
    "at most 80": lambda t: t.set_column(t.column_names.index("model"), "model", pa.repeat("m" * 300, len(t))),
    "more than 256": lambda t: pa.table({n: t[n] for n in t.column_names} | {f"c{i}": [0] * 3 for i in range(1000)}),
    "MB of memory": lambda t: pa.table({"model": pa.repeat("m", 40_000_000), "x": pa.repeat(1, 40_000_000)}),
    "MB of memory.*": lambda t: pa.table(
        {"model": pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["m" * 1_000_000])}
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", CHANGES)
def test_a_hostile_frame_costs_that_run(sweep, reason, monkeypatch):
    spoiled(sweep, CHANGES[reason], compression="zstd")
    found = why(sweep)
    assert re.search(reason, found) and len(found) <= 400


def test_what_is_no_file_is_not_waited_for(sweep):
    path = sweep / RUN.format(1) / "frame.parquet"
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in why(sweep)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2 << 30)
    os.utime(path.parent / "status.json", (1, 1))
    assert "2,147 MB" in why(sweep)


@pytest.mark.parametrize("text", ['{"a":' * 60 + "1" + "}" * 60, DEEP, "[1]", '{"seconds": "x"}', '{"seconds": NaN}'])
def test_a_hostile_manifest_costs_that_run(sweep, text):
    (sweep / RUN.format(1) / "manifest.json").write_text(text)
    assert why(sweep).startswith("manifest.json: ")


@pytest.mark.parametrize("said", [{"seconds": math.nan}, {"seconds": 1e308}, {"state": "odd"}, {"value": math.nan}])
def test_a_status_that_no_run_writes_counts_for_nothing(sweep, said):
    write_json(sweep / RUN.format(1) / "status.json", {"state": "done", "files": ["frame.parquet"]} | said)
    assert outcomes.Status.read(sweep / RUN.format(1)) is None
    assert status.look(sweep).seconds_left == 0
    assert why(sweep) == "status.json is damaged"


def test_a_key_may_be_a_mapping_in_one_run_only():
    for order in ((0, 1), (1, 0)):
        distinct = Distinct({})
        for number in order:
            distinct.add(({"config": {"a": 1}}, {"config": {"a": {"b": 2}}})[number])
        assert distinct.together() == {"config": {"a": {"": 1, "b": 2}}}


def test_nothing_is_written_through_links(sweep, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for name in ("data", "data.part", "data.old", "metrics.part"):
        (sweep / name).symlink_to(outside)
    (sweep / "collected.json").symlink_to(outside / "kept")
    (sweep / RUN.format(2)).symlink_to(sweep / RUN.format(0))
    assert len(collecting.collect(sweep).frame) == 6
    assert [path.name for path in outside.iterdir()] == ["kept"] and (outside / "kept").read_text() == "kept"
    assert [folder.name for folder in names.folders(sweep)] == [RUN.format(0), RUN.format(1)]


def test_a_name_from_elsewhere_leads_nowhere(tmp_path):
    place = tmp_path / "launches" / "names" / "0123456789ab"
    place.parent.mkdir(parents=True)
    for text in ("../../x-0123456789ab", "x-ba9876543210", "", "x" * 5000):
        place.write_text(text)
        assert names.agreed(tmp_path, "0123456789ab", "mine-0123456789ab") == "mine-0123456789ab"
    place.write_text("a=1-0123456789ab")
    assert names.agreed(tmp_path, "0123456789ab", "mine-0123456789ab") == "a=1-0123456789ab"


def test_hostile_locks_and_plans_are_passed_over(sweep):
    (sweep / "000000.lock").mkdir()
    lock = sweep / RUN.format(1) / "000000.lock"
    lock.write_text(json.dumps({"machine": locks.machine(), "pid": 10**40, "started": "1"}))
    assert not locks.held(lock.parent)
    for number, runs in enumerate(({"a": 3}, {"a": [1]}, [2])):
        write_json(sweep / "launches" / f"{number}-1.plan.json", {"runs": runs})
    (sweep / "launches" / "9-1.jsonl").symlink_to("/nowhere")
    assert len(collecting.collect(sweep).frame) == 6 and not status.look(sweep).having("missing")


def test_files_cannot_control_the_terminal(sweep, capsys):
    name = "\x1b]0;own\x07[bold]\u202e-00000000000c"
    (finished(sweep, name, example()) / "frame.parquet").write_bytes(b"\x1b[2J")
    write_json(sweep / RUN.format(1) / "status.json", {"state": "failed", "error": "\x1b[2J[/b] \u202e:smile:"})
    collect.main(collect.Config(results=str(sweep.parent), sweep="s"))
    status.main(status.Config("s", str(sweep.parent)))
    said = capsys.readouterr().out
    assert not any(c in said for c in "\x1b\x07\u202e")
    assert "[bold]" in said and "[/b]" in said and ":smile:" in said and r"\x1b]0;own" in said
    console = PlainConsole(file=io.StringIO())
    console.print("Run folder: /a[/b]/\x1b[1m")
    assert console.file.getvalue() == "Run folder: /a[/b]/\\x1b[1m\n"


@pytest.mark.parametrize("text", ["", "a,a\n1,2\n", "," * 5000 + "\n", "layer\n\x00\xff\n", "a\nb\n"])
def test_a_hostile_csv_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError):
        frames.load(path)


def test_numbers_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match="'index' holds numbers that are not whole"):
        frames.typed(example().astype({"index": "float64"}).assign(index=1.5))
    with pytest.raises(ValueError, match="'layer' more than once"):
        frames.check(pd.concat([example(), example()[["layer"]]], axis=1))


FOREIGN = (
    "os.system", "torch.os.system", "torch.hub.load", "torch.load", "torch.nn.init.os.system", "torch.nn.F",
    "torch.utils.cpp_extension.load", "torch.nn.functional.boolean_dispatch", "torch.optim.Any",
    "gradscope.frames.save",
    "experiments.files.write_json", "experiments.data.os.system", "gradscope.models.mlp.Any", "torch.jit.load",
    "torch.nn.modules.lazy.LazyModuleMixin", "torch.nn.NoSuchLayer", 3, None, "torch.nn.Linear.__init__",
)  # fmt: skip


def test_what_rerun_calls_without_a_question():
    for name in ("gradscope.models.mlp.MLP", "torch.optim.AdamW", "experiments.data.noise", "torch.nn.Linear"):
        assert targets.unknown({"a": {"_target_": name}}) == []
    for name in FOREIGN:
        assert targets.unknown({"a": [{"b": {"_target_": name}}]}) == [str(name)]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("measurement", {"_target_": "os.mkdir", "path": "ran"}, r"names os\.mkdir, .*add --trust"),
        ("dtype", "${oc.env:HOME}", "has an interpolation"),
        ("seed", {"a": 1}, "seed"),
    ],
)
def test_rerun_refuses(tmp_path, key, value, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = finished(tmp_path, "x", example())
    manifest = {
        "choices": {"model": "mlp", "data": "noise"},
        "versions": {"torch": "1"},
        "hardware": {"num_threads": 1},
    }
    write_json(folder / "manifest.json", manifest | {"config": {"dtype": "float32", key: value}})
    with pytest.raises(ValueError, match=says):
        rerun.main(rerun.Config(str(folder)))
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoints_and_records_run_nothing(tmp_path):
    for write in (lambda path: path.write_bytes(pickle.dumps(Evil(tmp_path / "ran"))),
                  lambda path: torch.save({"a": Evil(tmp_path / "ran")}, path)):  # fmt: skip
        write(tmp_path / "last.pt")
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            checkpoints.load(tmp_path, torch.device("cpu"))
    torch.save({"step": "x"}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"no checkpoint of a run \(model, optimizer, step"):
        checkpoints.resume(tmp_path, torch.device("cpu"))
    for text in (DEEP + "\n{}\n", "[1]\n", '{"step": "x"}\n'):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(ValueError, match="line 1"):
            records.read(tmp_path / "x.jsonl")
    assert not (tmp_path / "ran").exists()


PICKLES = {
    "forbidden global": lambda path: pickle.dumps(Evil(path)),
    "beyond its size": lambda path: b"\x80\x02]r\xff\xff\xff\x7f.",
    "too many containers": lambda path: b"\x80\x02}K\x01" + b"\x85" * 100_000 + b"K\x01s.",
    "forbidden encoding 'hex'": lambda path: b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
}


@pytest.mark.parametrize("reason", PICKLES)
def test_a_hostile_pickle_is_refused(tmp_path, reason):
    (tmp_path / "x").write_bytes(PICKLES[reason](tmp_path / "ran"))
    with pytest.raises(pickle.UnpicklingError, match=reason):
        cifar10_files.load_pickle(tmp_path / "x")
    assert not (tmp_path / "ran").exists()


def test_a_download_stays_with_https():
    handler, request = download._SameScheme(), urllib.request.Request("https://a.org/x")
    with pytest.raises(urllib.error.URLError, match=r"redirects to http://a\.org/y, which is not https"):
        handler.redirect_request(request, None, 302, "Found", {}, "http://a.org/y")
    assert handler.redirect_request(request, None, 302, "Found", {}, "https://a.org/y").full_url == "https://a.org/y"


def test_a_large_text_that_is_legal_is_read(tmp_path, monkeypatch):
    """Longer tables are read by way of dictionaries; what they hold is the same."""
    frame = pd.concat([example().assign(model="mlp", tag=f"t{number}") for number in range(700)], ignore_index=True)
    path = frames.save(frame, tmp_path / "x.parquet")
    plain = frames.load(path)
    monkeypatch.setenv(files.LIMIT, "1.5")
    assert len(frame) * path.stat().st_size > files.limit()
    assert frames.load(path).equals(plain)
    table = tables.of_runs([tables.read_frame(path)], ["x"], frames.SCHEMA)
    assert table.drop_columns(["run"]).equals(pq.read_table(path).replace_schema_metadata(None))
    monkeypatch.setenv(files.LIMIT, "0.1")
    with pytest.raises(files.TooLargeError, match=f"set {files.LIMIT}"):
        frames.load(path)
