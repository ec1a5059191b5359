"""The hostile files.  A case changes the folder of a sweep with one sound run, and names the commands to run on it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import runpy
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

SOUND, BAD = "sound-000000000000", "bad-00000000000b"
MARKER = "outside-was-reached"
COLLECT = "experiments.collect results={place}/results sweep=s"
STATUS = "experiments.status sweep=s results={place}/results"
FIGURES = "experiments.figures sweep=s results={place}/results"
RERUN = f"experiments.rerun {{sweep}}/{BAD}"
READ, ALL = (COLLECT, STATUS), (COLLECT, STATUS, FIGURES)
RESUME = (
    "experiments.train model=mlp model.depth=4 model.width=6 model.in_features=null model.out_features=10 data=digits "
    "train.max_steps=1 train.batch_size=8 monitor.every=null results={place}/results sweep=t train.precision=float32"
)


@dataclass(frozen=True)
class Case:
    """``make`` changes a folder; ``run`` is the run that ``collect`` must name as left out, if any."""

    name: str
    make: Callable[[Path], None]
    commands: tuple[str, ...] = READ
    run: str | None = BAD


def bad(place: Path) -> Path:
    """A copy of the sound run, which a case spoils."""
    folder = place / "results" / "s" / BAD
    shutil.copytree(place / "results" / "s" / SOUND, folder)
    return folder


def table_case(name: str, change: Callable[[pa.Table], pa.Table], **options: Any) -> Case:
    """A frame that is changed; its schema version stays."""

    def make(place: Path) -> None:
        path = bad(place) / "frame.parquet"
        table = pq.read_table(path)
        pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path, **options)

    return Case(name, make)


def file_case(name: str, file: str, content: bytes | str | None, commands: tuple[str, ...] = READ,
              run: str | None = BAD) -> Case:  # fmt: skip
    """A file of a run with other bytes; None: a folder."""

    def make(place: Path) -> None:
        path = bad(place) / file
        path.unlink(missing_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return Case(name, make, commands, run)


def json_case(name: str, file: str, commands: tuple[str, ...] = READ, run: str | None = BAD, **changes: Any) -> Case:
    """A JSON file of a run with other values; keys with two underscores are nested."""

    def make(place: Path) -> None:
        path = bad(place) / file
        content = json.loads(path.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            inner = content
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        path.write_text(json.dumps(content))

    return Case(name, make, commands, run)


def made(change: Callable[[Path], None], run: str | None = BAD, commands: tuple[str, ...] = READ) -> Case:
    """A case named after the function that makes it."""
    return Case(change.__name__.strip("_").replace("_", " "), change, commands, run)


def repeated(table: pa.Table, name: str, value: Any) -> pa.Table:
    """The table with a constant column."""
    return table.append_column(name, pa.repeat(value, len(table)))


def replaced(table: pa.Table, name: str, value: Any) -> pa.Table:
    """The table with another constant in a column."""
    return table.set_column(table.column_names.index(name), name, pa.repeat(value, len(table)))


def _pipe_instead_of_a_frame(place: Path) -> None:
    path = bad(place) / "frame.parquet"
    path.unlink()
    os.mkfifo(path)


def _link_to_a_device(place: Path) -> None:
    path = bad(place) / "frame.parquet"
    path.unlink()
    path.symlink_to("/dev/zero")


def _pipe_instead_of_a_status(place: Path) -> None:
    path = bad(place) / "status.json"
    path.unlink()
    os.mkfifo(path)


def _sparse_2_gb(place: Path) -> None:
    with (bad(place) / "frame.parquet").open("wb") as file:
        file.write(b"PAR1")
        file.truncate(2 << 30)


def _sparse_2_gb_with_a_huge_footer(place: Path) -> None:
    with (bad(place) / "frame.parquet").open("wb") as file:
        file.write(b"PAR1")
        file.truncate(2 << 30)
        file.seek(0, 2)
        file.write(struct.pack("<I", (2 << 30) - 16) + b"PAR1")


def _sparse_2_gb_manifest(place: Path) -> None:
    with (bad(place) / "manifest.json").open("wb") as file:
        file.truncate(2 << 30)


def _run_folder_that_is_a_link(place: Path) -> None:
    shutil.copytree(place / "results" / "s" / SOUND, place / "outside" / "run")
    (place / "results" / "s" / BAD).symlink_to(place / "outside" / "run")


def _links_where_results_are_written(place: Path) -> None:
    sweep = place / "results" / "s"
    for name in ("data.part", "metrics.part", "data.old", "figures", "data"):
        (sweep / name).symlink_to(place / "outside")
    for name in ("collected.json", "collected.csv"):
        (sweep / name).symlink_to(place / "outside" / "kept.txt")


def _links_in_the_folder_of_figures(place: Path) -> None:
    (place / "results" / "s" / "figures").mkdir()
    for name in ("gsc.png", "gsc.svg", "growth.png", "growth.svg", "rates.png"):
        (place / "results" / "s" / "figures" / name).symlink_to(place / "outside" / "kept.txt")


def _names_that_control_the_terminal(place: Path) -> None:
    for name in (
        "\x1b]0;owned\x07-00000000000c",
        "[/b]-00000000000d",
        "\u202efdp-00000000000e",
        "\x9b31m-00000000000f",
    ):
        folder = place / "results" / "s" / name
        shutil.copytree(place / "results" / "s" / SOUND, folder)
        (folder / "frame.parquet").write_bytes(b"")
        (folder / "status.json").write_text(
            json.dumps({"state": "failed", "error": f"\x1b[2J[/b] {name}", "files": ["frame.parquet"]})
        )


def _damaged_index(place: Path) -> None:
    (place / "results" / "s" / "collected.json").write_text(
        json.dumps({"collected": {SOUND: 3}, "distinct": {"[1]": [1], "x": 2}, "unread": {"a": []}, "manifest": []})
    )


def _deep_index(place: Path) -> None:
    (place / "results" / "s" / "collected.json").write_text('{"collected":' * 50_000)


def _wrong_plans(place: Path) -> None:
    folder = place / "results" / "s" / "launches"
    folder.mkdir(exist_ok=True)
    for number, runs in enumerate(({"a": 3}, {"a": "words"}, {"a": [1, 2]}, [1], {"a": [["x"]]})):
        (folder / f"{number}-1.plan.json").write_text(json.dumps({"runs": runs}))
    (folder / "9-1.plan.json").write_text("[" * 100_000)
    (folder / "9-1.jsonl").symlink_to("/nowhere")


def _hostile_locks(place: Path) -> None:
    sweep = place / "results" / "s"
    (sweep / "000000.lock").mkdir()
    (sweep / BAD).mkdir()
    (sweep / BAD / "000000.lock").write_text(json.dumps({"machine": "x", "pid": 10**40, "started": "1"}))
    (sweep / BAD / "000001.lock").write_text("[" * 100_000)


def _many_models_and_columns(place: Path) -> None:
    for number in range(12):
        folder = place / "results" / "s" / f"many-{number:012x}"
        shutil.copytree(place / "results" / "s" / SOUND, folder)
        table = pq.read_table(folder / "frame.parquet")
        for column in range(150):
            table = repeated(table, f"c{number}_{column}", 1.0)
        pq.write_table(table, folder / "frame.parquet")
    (bad(place) / "frame.parquet").write_bytes(b"PAR1")


def _data_set_of_another(place: Path) -> None:
    sweep = place / "results" / "s"
    bad(place)
    (sweep / BAD / "frame.parquet").write_bytes(b"PAR1")
    (sweep / "data" / "model=%2e%2e").mkdir(parents=True)
    rows = pa.table({"layer": pa.DictionaryArray.from_arrays(pa.array([0] * 1000), ["x" * 1_000_000])})
    pq.write_table(rows, sweep / "data" / "model=%2e%2e" / "0.parquet")


def target(path: str, /, **arguments: Any) -> dict[str, Any]:
    """A group of a configuration that calls a function."""
    return {"_target_": path, **arguments}


class Evil:
    """Pickled, it creates the marker when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def checkpoint_case(name: str, write: Callable[[Path, Path], object]) -> Case:
    """A checkpoint from which a training run would resume."""

    def make(place: Path) -> None:
        module, *sys.argv[1:] = [word.format(place=place) for word in RESUME.split()]
        sys.modules.pop(module, None)
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        (run,) = (place / "results" / "t").glob("*/status.json")
        run.unlink()
        write(run.parent / "checkpoints" / "last.pt", place / MARKER)

    return Case(name, make, (RESUME,), None)


def _bomb(path: Path, _: Path) -> None:
    state = {"model": {"x": torch.zeros(1 << 28)}, "step": 1}
    plain = path.with_suffix(".plain")
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in source.infolist():
            packed.writestr(part.filename, source.read(part), zipfile.ZIP_DEFLATED)
    plain.unlink()


def images_case(name: str, file: str, content: Callable[[Path], bytes]) -> Case:
    """A data set of images with one hostile file."""
    command = "experiments.measure data=folder data.path={place}/images data.size=8 data.batch_size=2 model=mlp " \
              "model.in_features=null model.depth=3 results={place}/results sweep=u"  # fmt: skip

    def make(place: Path) -> None:
        (place / "images" / "a").mkdir(parents=True)
        (place / "images" / "a" / file).write_bytes(content(place))

    return Case(name, make, (command,), None)


def cifar_case(name: str, content: Callable[[Path], bytes]) -> Case:
    """A pickled batch of CIFAR-10."""
    command = "benchmarks.hostile.cifar {place}"

    def make(place: Path) -> None:
        folder = place / "cifar-10-batches-py"
        folder.mkdir()
        for number in range(1, 6):
            (folder / f"data_batch_{number}").write_bytes(content(place))

    return Case(name, make, (command,), None)


def png(width: int, height: int) -> bytes:
    """A PNG of black pixels, which compress to almost nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj()
    packed = b"".join(rows.compress(bytes(1 + 3 * width)) for _ in range(height)) + rows.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


DEEP = "[" * 100_000 + "]" * 100_000
RUNS = (
    table_case("a column called run", lambda t: repeated(t, "run", "x")),
    table_case("a column twice", lambda t: t.append_column("seed", t["seed"])),
    table_case("lists as values", lambda t: repeated(t, "a", 1).set_column(
        t.num_columns, "a", pa.array([[1, 2]] * len(t)))),
    table_case("binary values", lambda t: repeated(t, "a", b"\xff\x00")),
    table_case("a name of 400 letters", lambda t: repeated(t, "a" * 400, 1)),
    table_case("a model of 400 letters", lambda t: replaced(t, "model", "m" * 400)),
    table_case("a model in each row", lambda t: t.set_column(
        t.column_names.index("model"), "model", pa.array([f"m{i}" for i in range(len(t))]))),
    table_case("a model without a name", lambda t: replaced(t, "model", "")),
    table_case("words where numbers belong", lambda t: replaced(t, "index", "x")),
    table_case("a depth that is not whole", lambda t: replaced(t, "depth_from_output", 1.5)),
    table_case("NaN as values", lambda t: replaced(t, "value", float("nan"))),
    table_case("infinite layer numbers", lambda t: replaced(t, "index", float("inf"))),
    table_case("1,200 columns", lambda t: pa.table(
        {name: t[name] for name in t.column_names} | {f"c{i}": [0] * len(t) for i in range(1200)})),
    table_case("60 million rows", lambda t: pa.table(
        {name: pa.repeat(t[name][0], 60_000_000) for name in ("value", "model")}), compression="zstd"),
    table_case("a text of 1 MB in 5,000 rows", lambda t: pa.table({
        "model": pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), ["m" * 1_000_000])})),
    table_case("a compressed text of 300 MB", lambda t: pa.table(
        {"model": pa.repeat("m" * 1_000_000, 300)}), compression="zstd", use_dictionary=False),
    file_case("an empty frame", "frame.parquet", b""),
    file_case("garbage", "frame.parquet", bytes(range(256)) * 50),
    file_case("a folder where a file belongs", "frame.parquet", None),
    made(_pipe_instead_of_a_frame), made(_link_to_a_device), made(_sparse_2_gb), made(_sparse_2_gb_with_a_huge_footer),
    made(_sparse_2_gb_manifest), made(_run_folder_that_is_a_link, None),
    file_case("a deep manifest", "manifest.json", '{"a":' + DEEP + "}"),
    file_case("a manifest that is a list", "manifest.json", "[1]"),
    json_case("a time that is text", "manifest.json", seconds="long"),
    json_case("a mapping where others have a value", "manifest.json", run=None, config__seed={"a": {"b": 1}}),
    file_case("a deep status", "status.json", DEEP, run=None),
    file_case("a status of NaN", "status.json", '{"state":"done","seconds":NaN,"files":["frame.parquet"]}', run=None),
    json_case("a status of 1e308 seconds", "status.json", run=None, seconds=1e308),
    json_case("a status with an unknown state", "status.json", run=None, state=["done"]),
    made(_pipe_instead_of_a_status, None), made(_links_where_results_are_written, None, ALL),
    made(_links_in_the_folder_of_figures, None, ALL), made(_names_that_control_the_terminal, None, ALL),
    made(_damaged_index, None, ALL), made(_deep_index, None, ALL), made(_wrong_plans, None), made(_hostile_locks, None),
    made(_many_models_and_columns, commands=ALL), made(_data_set_of_another, commands=ALL),
)  # fmt: skip
TARGETS = tuple(
    json_case(f"rerun of {name}", "manifest.json", (RERUN,), None, config__measurement=target(name, **arguments))
    for name, arguments in (
        ("os.system", {"command": "touch outside/ran"}), ("torch.os.system", {"command": "true"}),
        ("torch.hub.load", {"repo_or_dir": "a/b", "model": "c"}), ("torch.load", {"f": "x.pt", "weights_only": False}),
        ("torch.utils.cpp_extension.load_inline", {"name": "x", "cpp_sources": "int x;"}),
        ("experiments.files.write_json", {"path": "x.json", "content": {}}),
        ("experiments.runs.origin.subprocess.run", {"args": ["true"]}), ("gradscope.frames.pd.read_pickle", {}),
        ("builtins.eval", {"source": "1"}),
    )
)  # fmt: skip
MANIFESTS = (
    json_case("rerun with an interpolation", "manifest.json", (RERUN,), None, config__dtype="${oc.env:HOME}"),
    json_case("rerun with a million threads", "manifest.json", (RERUN,), None, hardware__num_threads=10**6),
    json_case("rerun with wrong types", "manifest.json", (RERUN,), None, config__model=[1], choices__model=None),
    json_case("rerun with a nested seed", "manifest.json", (RERUN,), None, config__seed={"a": [1]}),
)
CHECKPOINTS = (
    checkpoint_case("a checkpoint that runs code", lambda path, marker: path.write_bytes(pickle.dumps(Evil(marker)))),
    checkpoint_case("a zipped checkpoint that runs code", lambda path, marker: torch.save({"a": Evil(marker)}, path)),
    checkpoint_case("an empty checkpoint", lambda path, _: path.write_bytes(b"")),
    checkpoint_case("a checkpoint without parts", lambda path, _: torch.save({"step": "x"}, path)),
    checkpoint_case("a checkpoint of another model", lambda path, _: torch.save(
        {**torch.load(path, weights_only=True), "model": {"x": torch.zeros(3)}}, path)),
    checkpoint_case("a compressed checkpoint of 1 GB", _bomb),
)  # fmt: skip
IMAGES = (
    images_case("an image of 12,000 x 12,000 pixels", "a.png", lambda _: png(12_000, 12_000)),
    images_case("PostScript as an image", "a.png", lambda place: (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({place}/{MARKER}) (w) file closefile\n".encode())),
    cifar_case("a batch that runs code", lambda place: pickle.dumps(Evil(place / MARKER))),
    cifar_case("a batch with a far reference", lambda _: b"\x80\x02Kr\xff\xff\xff\x7f.".replace(b"Kr", b"]r")),
    cifar_case("a deeply nested key", lambda _: b"\x80\x02}K\x01" + b"\x85" * 500_000 + b"K\x01s."),
    cifar_case("a text that is encoded again and again", lambda _: (
        b"\x80\x02c_codecs\nencode\n" + b"c_codecs\nencode\n" * 29 + b"X\x05\x00\x00\x00abcde"
        + b"X\x03\x00\x00\x00hex\x86R" * 30 + b".")),
)  # fmt: skip
CASES = [*RUNS, *TARGETS, *MANIFESTS, *CHECKPOINTS, *IMAGES]
