"""CIFAR-10 in three layouts, written here from the published format descriptions with random images."""

import functools
import hashlib
import os
import pickle
import re
import struct
import sys
import tarfile
import threading
from collections.abc import Callable
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from experiments.data import cifar10_files
from experiments.data.download import _fetch

NUM_IMAGES = {
    "data_batch_1": 3,
    "data_batch_2": 1,
    "data_batch_3": 2,
    "data_batch_4": 2,
    "data_batch_5": 4,
    "test_batch": 3,
}
NUM_TRAIN = 12
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

REAL_DATA = Path(os.environ.get("GRADSCOPE_DATA", "unset"))

Batch = tuple[npt.NDArray[np.uint8], list[int]]  # images (N, 3, 32, 32), labels


def random_batches() -> dict[str, Batch]:
    generator = np.random.default_rng(0)
    return {
        name: (generator.integers(0, 256, (count, 3, 32, 32), np.uint8), generator.integers(0, 10, count).tolist())
        for name, count in NUM_IMAGES.items()
    }


def split_of(batches: dict[str, Batch], train: bool) -> Batch:
    chosen = [batch for name, batch in batches.items() if (name != "test_batch") == train]
    return np.concatenate([images for images, _ in chosen]), [label for _, labels in chosen for label in labels]


BATCHES = random_batches()


def write_binary(root: Path) -> Path:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for name, (images, labels) in BATCHES.items():
        records = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    return folder


def write_python(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, (images, labels) in BATCHES.items():
        (folder / name).write_bytes(python2_pickle(images.reshape(len(images), -1), labels))
    return folder


def write_kaggle(root: Path) -> Path:
    folder = root / "train"
    folder.mkdir()
    images, labels = split_of(BATCHES, train=True)
    for i, image in enumerate(images, start=1):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.png")
    rows = [f"{i},{CLASSES[label]}\n" for i, label in enumerate(labels, start=1)]
    (root / "trainLabels.csv").write_text("id,label\n" + "".join(rows))
    return folder


def python2_pickle(data: npt.NDArray[np.uint8], labels: list[int], dtype: bytes = b"u1") -> bytes:
    """Opcode by opcode what Python 2 wrote for {'data': array, 'labels': list}, with its byte strings."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def integers(*values: int) -> bytes:
        return b"".join(b"J" + struct.pack("<i", value) for value in values)

    kind = b"cnumpy\ndtype\n(" + text(dtype) + integers(0, 1) + b"tR"
    kind += b"(" + integers(3) + text(b"|") + b"NNN" + integers(-1, -1, 0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integers(0) + b"t" + text(b"b") + b"tR"
    array += b"(" + integers(1) + b"(" + integers(*data.shape) + b"t" + kind + b"\x89" + text(data.tobytes()) + b"tb"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](" + integers(*labels) + b"eu."


@pytest.mark.parametrize(
    ("write", "train"),
    [(write_binary, True), (write_binary, False), (write_python, True), (write_python, False), (write_kaggle, True)],
)
def test_every_layout_gives_the_images_and_labels_that_went_in(
    write: Callable[[Path], Path], train: bool, tmp_path: Path
) -> None:
    write(tmp_path)
    images, labels = split_of(BATCHES, train)
    for limit in (None, 1, 2, len(labels)):
        split = cifar10_files.load(tmp_path, train=train, limit=limit)
        np.testing.assert_array_equal(split.images, images[:limit], strict=True)
        np.testing.assert_array_equal(split.labels, np.array(labels[:limit], np.int64), strict=True)


def test_layouts_are_looked_for_in_order(tmp_path: Path) -> None:
    write_kaggle(tmp_path)
    python = write_python(tmp_path)
    binary = write_binary(tmp_path)
    (python / "test_batch").unlink()
    assert len(cifar10_files.load(tmp_path, train=False).labels) == 3
    for path in binary.iterdir():
        path.unlink()
    binary.rmdir()
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py/test_batch is missing"):
        cifar10_files.load(tmp_path, train=False)


def test_class_names() -> None:
    assert list(cifar10_files.CLASSES) == CLASSES


# Where the data is


def test_the_environment_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GRADSCOPE_DATA", "~/data")
    assert cifar10_files.data_root() == tmp_path / "data"
    (tmp_path / "data").mkdir()
    write_binary(tmp_path / "data")
    assert len(cifar10_files.load(train=True).labels) == NUM_TRAIN


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, "home/.cache/gradscope"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/gradscope"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/gradscope"),
        ("win32", {}, "home/AppData/Local/gradscope"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/gradscope"),
    ],
)
@pytest.mark.parametrize("unset", ["", None])
def test_the_default_is_the_cache_folder(
    platform: str,
    environment: dict[str, str],
    folder: str,
    unset: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GRADSCOPE_DATA", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
        if unset is not None:
            monkeypatch.setenv(name, unset)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(sys, "platform", platform)
    assert cifar10_files.data_root() == tmp_path / folder


def test_missing_data_names_the_folder_and_three_ways_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no CIFAR-10 in {re.escape(str(tmp_path))}") as error:
        cifar10_files.load(tmp_path, train=True)
    for way_out in ("cifar-10-batches-bin/", "GRADSCOPE_DATA", "data.download=true", "data=digits"):
        assert way_out in str(error.value)


# How many


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_below_one(limit: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"limit must be at least 1.* got {limit}"):
        cifar10_files.load(tmp_path, train=True, limit=limit)


@pytest.mark.parametrize("write", [write_binary, write_python, write_kaggle])
def test_a_limit_above_what_there_is(write: Callable[[Path], Path], tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"limit must be at most 12, .* got 13"):
        cifar10_files.load(tmp_path, train=True, limit=NUM_TRAIN + 1)


def test_a_limit_reads_no_other_records(tmp_path: Path) -> None:
    binary = write_binary(tmp_path)
    for name in ("data_batch_1.bin", "data_batch_5.bin"):
        overwrite(binary / name, 2 * 3073, 77)  # would be refused if it were read
    assert len(cifar10_files.load(tmp_path, train=True, limit=2).labels) == 2


def test_a_limit_reads_no_other_png(tmp_path: Path) -> None:
    (write_kaggle(tmp_path) / "3.png").unlink()
    assert len(cifar10_files.load(tmp_path, train=True, limit=2).labels) == 2


# The binary layout


def overwrite(path: Path, offset: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] = value
    path.write_bytes(content)


def test_binary_batch_missing(tmp_path: Path) -> None:
    (write_binary(tmp_path) / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.bin is missing"):
        cifar10_files.load(tmp_path, train=True, limit=1)
    assert len(cifar10_files.load(tmp_path, train=False).labels) == 3


def test_binary_batch_truncated(tmp_path: Path) -> None:
    path = write_binary(tmp_path) / "data_batch_5.bin"
    path.write_bytes(path.read_bytes()[:-73])
    with pytest.raises(ValueError, match=r"data_batch_5.bin: the record at byte 9219 has 3000 of 3073 bytes"):
        cifar10_files.load(tmp_path, train=True, limit=1)


def test_binary_batch_empty(tmp_path: Path) -> None:
    (write_binary(tmp_path) / "data_batch_2.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data_batch_2.bin is empty"):
        cifar10_files.load(tmp_path, train=True)


def test_binary_label_out_of_range(tmp_path: Path) -> None:
    overwrite(write_binary(tmp_path) / "data_batch_5.bin", 2 * 3073, 10)
    with pytest.raises(ValueError, match=r"data_batch_5.bin: the label at byte 6146 is 10, not in 0..9"):
        cifar10_files.load(tmp_path, train=True)


# The Python layout

ROWS = BATCHES["test_batch"][0].reshape(3, 3072)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_pickled_by_python_3(protocol: int, order: str, tmp_path: Path) -> None:
    data = np.array(ROWS, order="F" if order == "F" else "C")
    (write_python(tmp_path) / "test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": [0, 9, 5]}, protocol))
    split = cifar10_files.load(tmp_path, train=False)
    np.testing.assert_array_equal(split.images, BATCHES["test_batch"][0])
    assert split.labels.tolist() == [0, 9, 5]


class Call:
    """Pickles as a call of ``function``, which runs when an ordinary unpickler reads it."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "source", "name"),
    [
        (os.system, "touch {}", f"{os.system.__module__}.system"),
        (eval, "__import__('pathlib').Path('{}').touch()", "builtins.eval"),
        (pickle.loads, None, "_pickle.loads"),
    ],
)
def test_a_pickle_never_runs_code(
    function: Callable[..., object], source: str | None, name: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    inner = pickle.dumps(Call(os.system, f"touch {marker}"))
    content = pickle.dumps({b"data": Call(function, source.format(marker) if source else inner), b"labels": []}, 3)
    pickle.loads(content)
    assert marker.exists(), "the pickle is harmless, so it tests nothing"
    marker.unlink()

    (write_python(tmp_path) / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=rf"test_batch is not a batch .* forbidden global {name}"):
        cifar10_files.load(tmp_path, train=False)
    assert not marker.exists()


def test_a_pickle_cannot_pass_its_bytes_off_as_objects(tmp_path: Path) -> None:
    (write_python(tmp_path) / "test_batch").write_bytes(python2_pickle(ROWS, [0, 1, 2], dtype=b"O8"))
    with pytest.raises(ValueError, match=r"test_batch is not a batch .* data has dtype b'O8', expected uint8"):
        cifar10_files.load(tmp_path, train=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": ROWS}, r"test_batch has no key b'labels': it is not a batch of CIFAR-10"),
        ({b"labels": [0, 1, 2]}, r"test_batch has no key b'data'"),
        ({b"data": ROWS.astype(np.float32), b"labels": [0, 1, 2]}, r"data has dtype 'f4', expected uint8"),
        ({b"data": ROWS[:, 1:], b"labels": [0, 1, 2]}, r"test_batch: data has shape \(3, 3071\), expected \(N, 3072\)"),
        ({b"data": ROWS[0], b"labels": [0]}, r"test_batch: data has shape \(3072,\)"),
        ({b"data": ROWS, b"labels": [0, 1]}, r"test_batch: 2 labels for 3 rows of data"),
        ({b"data": ROWS, b"labels": [0, 10, 2]}, r"test_batch: the label of row 1 is 10, not an integer in 0..9"),
        ({b"data": ROWS, b"labels": [0, 1, -1]}, r"the label of row 2 is -1"),
        ({b"data": ROWS, b"labels": ["cat", 1, 2]}, r"the label of row 0 is 'cat'"),
        ({b"data": ROWS, b"labels": 3}, r"test_batch is not a batch of CIFAR-10"),
        ({b"data": b"raw", b"labels": []}, r"test_batch is not a batch of CIFAR-10"),
        ([ROWS, [0, 1, 2]], r"test_batch is not a batch of CIFAR-10"),
    ],
)
def test_python_batch_with_wrong_content(batch: object, message: str, tmp_path: Path) -> None:
    (write_python(tmp_path) / "test_batch").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(ValueError, match=message):
        cifar10_files.load(tmp_path, train=False)


@pytest.mark.parametrize("size", [0, 1, 40, 5000, -1])
def test_python_batch_truncated(size: int, tmp_path: Path) -> None:
    path = write_python(tmp_path) / "test_batch"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"test_batch is not a batch of CIFAR-10"):
        cifar10_files.load(tmp_path, train=False)


def test_python_batch_empty(tmp_path: Path) -> None:
    (write_python(tmp_path) / "test_batch").write_bytes(python2_pickle(ROWS[:0], []))
    with pytest.raises(ValueError, match=r"test_batch: data has shape \(0, 3072\), .* with N at least 1"):
        cifar10_files.load(tmp_path, train=False)


def test_python_batch_missing(tmp_path: Path) -> None:
    (write_python(tmp_path) / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4 is missing"):
        cifar10_files.load(tmp_path, train=True)


# The Kaggle layout


def test_kaggle_has_no_test_split(tmp_path: Path) -> None:
    write_kaggle(tmp_path)
    with pytest.raises(FileNotFoundError, match="no labels of test images"):
        cifar10_files.load(tmp_path, train=False)


def test_kaggle_image_missing(tmp_path: Path) -> None:
    (write_kaggle(tmp_path) / "7.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"7.png is missing, .*trainLabels.csv, line 8"):
        cifar10_files.load(tmp_path, train=True)


@pytest.mark.parametrize(
    ("mode", "size", "shape"),
    [("RGB", (16, 32), (32, 16, 3)), ("L", (32, 32), (32, 32)), ("RGBA", (32, 32), (32, 32, 4))],
)
def test_kaggle_image_of_wrong_size_or_mode(
    mode: str, size: tuple[int, int], shape: tuple[int, ...], tmp_path: Path
) -> None:
    Image.new(mode, size).save(write_kaggle(tmp_path) / "7.png")
    message = rf"7.png \(.*trainLabels.csv, line 8\) has pixels of shape {re.escape(str(shape))}, expected 32 x 32 RGB"
    with pytest.raises(ValueError, match=message):
        cifar10_files.load(tmp_path, train=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda png: b"",
        lambda png: png[:20],
        lambda png: png[:300],
        lambda png: png.replace(b"\0\0\0\x0dIHDR", b"\0\0\0\x01IHDR"),
        lambda png: png.replace(png[png.index(b"IDAT") - 4 :][:4], b"\0\0\0\x40"),
    ],
    ids=["empty", "header only", "truncated", "short header", "short data"],
)
def test_kaggle_image_damaged(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write_kaggle(tmp_path) / "7.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"7.png \(.*trainLabels.csv, line 8\) is not a readable PNG"):
        cifar10_files.load(tmp_path, train=True)


def test_kaggle_image_of_another_format(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(write_kaggle(tmp_path) / "7.png", "JPEG")
    with pytest.raises(ValueError, match=r"7.png \(.*trainLabels.csv, line 8\) is not a readable PNG"):
        cifar10_files.load(tmp_path, train=True)


@pytest.mark.parametrize("row", ["2,fish", "2", "2,cat,3", ""])
def test_kaggle_row_without_a_known_class(row: str, tmp_path: Path) -> None:
    write_kaggle(tmp_path)
    (tmp_path / "trainLabels.csv").write_text(f"id,label\n1,cat\n{row}\n3,dog\n")
    with pytest.raises(ValueError, match=rf"trainLabels.csv, line 3: .* got '{row}'"):
        cifar10_files.load(tmp_path, train=True)


@pytest.mark.parametrize("content", ["", "id,label\n", "1,cat\n2,dog\n"])
def test_kaggle_table_without_header_or_rows(content: str, tmp_path: Path) -> None:
    (tmp_path / "trainLabels.csv").write_text(content)
    with pytest.raises(ValueError, match=r"trainLabels.csv must have the header 'id,label' and at least one row"):
        cifar10_files.load(tmp_path, train=True)


# The download


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_download_fetches_unpacks_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(write_binary(tmp_path), "cifar-10-batches-bin")
    root = tmp_path / "new" / "root"
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(cifar10_files, "ARCHIVE_URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        monkeypatch.setattr(cifar10_files, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        monkeypatch.setattr(cifar10_files, "fetch", _fetch)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        split = cifar10_files.load(root, train=True, download=True)
        thread.join()
    np.testing.assert_array_equal(split.images, split_of(BATCHES, train=True)[0])
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-bin"]
    assert {path.stem for path in (root / "cifar-10-batches-bin").iterdir()} == set(BATCHES)


@pytest.mark.parametrize("write", [write_binary, write_python, write_kaggle])
def test_download_is_left_alone_where_a_layout_is_present(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setattr(cifar10_files, "fetch", lambda *_, **__: pytest.fail("tried to download"))
    assert len(cifar10_files.load(tmp_path, train=True, download=True).labels) == NUM_TRAIN


def test_the_archive_is_the_official_one_over_https() -> None:
    assert cifar10_files.ARCHIVE_URL == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert cifar10_files.ARCHIVE_MD5 == "c32a1d4ab5d03f1284b67883e8d87530"


# The real data


@pytest.mark.skipif(
    not any((REAL_DATA / layout).is_dir() for layout in ("cifar-10-batches-bin", "cifar-10-batches-py")),
    reason="GRADSCOPE_DATA names no folder with CIFAR-10 in its binary or Python layout",
)
@pytest.mark.parametrize(("train", "num_images"), [(True, 50_000), (False, 10_000)])
def test_the_real_data_is_balanced(train: bool, num_images: int) -> None:
    split = cifar10_files.load(REAL_DATA, train=train)
    assert split.images.shape == (num_images, 3, 32, 32)
    assert np.bincount(split.labels).tolist() == [num_images // 10] * 10
    assert 110 < split.images.mean() < 130
