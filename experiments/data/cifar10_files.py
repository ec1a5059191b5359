"""CIFAR-10 (Krizhevsky, 2009), read from a folder with one of three layouts, which are tried in this order:

cifar-10-batches-bin/   data_batch_1.bin .. data_batch_5.bin, test_batch.bin     the official binary version
cifar-10-batches-py/    data_batch_1 .. data_batch_5, test_batch                 the official Python version
trainLabels.csv         and train/1.png .. train/50000.png                       the Kaggle version, no test labels
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import pickle
import pickletools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from experiments.data.download import download as fetch
from experiments.data.download import extract
from gradscope.files import size

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SHAPE = (3, 32, 32)
IMAGE_SIZE = 3 * 32 * 32
RECORD_SIZE = 1 + IMAGE_SIZE  # bytes: the label, then the red, green and blue planes row by row
BINARY = "cifar-10-batches-bin"
PYTHON = "cifar-10-batches-py"
KAGGLE = "trainLabels.csv"
TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCHES = ("test_batch",)
ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")  # as they are downloaded by hand
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
MOST_ARCHIVE = 200_000_000  # bytes; the official archive has 170 million
MOST_BATCH = 64 << 20  # bytes of a pickled batch; an official one has 31 million
MOST_NESTED = 100  # containers and calls in a pickle; an official batch has about ten
REPLACE = "Replace it with a fresh copy."


@dataclass(frozen=True)
class Split:
    """The training or the test images: ``images`` (N, 3, 32, 32) uint8 in RGB, ``labels`` (N,) int64 in 0..9."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def data_root() -> Path:
    """The data folder: the environment variable ``GRADSCOPE_DATA``, else ``gradscope`` in the user's cache folder."""
    if folder := os.environ.get("GRADSCOPE_DATA"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gradscope"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gradscope"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradscope"


def load(root: Path | None = None, *, train: bool, limit: int | None = None, download: bool = False) -> Split:
    """Read the training or the test images, in the order of the files.

    Arguments:
        root: Folder that contains one of the layouts; `data_root` by default.
        train: Whether to read the training images or the test images.
        limit: Read only the first ``limit`` images.
        download: If no layout is present, first download the official archive (about 170 MB) into ``root``.

    Raises:
        FileNotFoundError: ``root`` has no layout, a file is missing, or the layout has no test labels (Kaggle).
        ValueError: ``limit`` is out of range, or a file does not have the expected content.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all images, got {limit}.")
    root = data_root() if root is None else root
    readers = {BINARY: _read_binary, PYTHON: _read_python, KAGGLE: _read_kaggle}
    if download and not any((root / layout).exists() for layout in readers):
        archive = fetch(ARCHIVE_URL, root / "cifar-10-binary.tar.gz", md5=ARCHIVE_MD5, most=MOST_ARCHIVE)
        extract(archive, root / BINARY, [f"{name}.bin" for name in TRAIN_BATCHES + TEST_BATCHES])
        archive.unlink()
    for layout, read in readers.items():
        if (root / layout).exists():
            return read(root / layout, train, limit)
    if packed := [path for name in ARCHIVES if (path := root / name).is_file()]:
        raise FileNotFoundError(f"{packed[0]} is there but not unpacked: tar -xzf '{packed[0]}' -C '{root}'")
    raise FileNotFoundError(
        f"Found no CIFAR-10 in {root}.  Either\n"
        f"  1. put {BINARY}/, {PYTHON}/, or {KAGGLE} with train/ there, or set GRADSCOPE_DATA to their folder;\n"
        "  2. set data.download=true to download the official archive; or\n"
        "  3. use data=digits, which needs no files (data=noise to measure without training)."
    )


def _batch_paths(folder: Path, train: bool, suffix: str) -> list[Path]:
    paths = [folder / f"{name}{suffix}" for name in (TRAIN_BATCHES if train else TEST_BATCHES)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: add the file, or delete the folder and download it again.")
    return paths


def _num_wanted(limit: int | None, available: int, source: Path) -> int:
    if limit is not None and limit > available:
        raise ValueError(f"limit must be at most {available}, the number of images in {source}, got {limit}.")
    return available if limit is None else limit


def _read_binary(folder: Path, train: bool, limit: int | None) -> Split:
    paths = _batch_paths(folder, train, ".bin")
    counts = [_num_records(path) for path in paths]
    remaining = _num_wanted(limit, sum(counts), folder)
    batches = []
    for path, count in zip(paths, counts, strict=True):
        batches.append(_read_records(path, min(count, remaining)))
        remaining -= len(batches[-1])
    records = np.concatenate(batches)  # (N, 3073)
    return Split(records[:, 1:].reshape(-1, *IMAGE_SHAPE), records[:, 0].astype(np.int64))


def _num_records(path: Path) -> int:
    num_records, rest = divmod(path.stat().st_size, RECORD_SIZE)
    if rest:
        raise ValueError(
            f"{path}: the record at byte {num_records * RECORD_SIZE} has {rest} of {RECORD_SIZE} bytes, so the file is "
            f"truncated or not CIFAR-10.  {REPLACE}"
        )
    if not num_records:
        raise ValueError(f"{path} is empty.  {REPLACE}")
    return num_records


def _read_records(path: Path, count: int) -> npt.NDArray[np.uint8]:
    """The first ``count`` records, of shape (count, 3073)."""
    records = np.fromfile(path, np.uint8, count * RECORD_SIZE).reshape(count, RECORD_SIZE)
    if (bad := np.flatnonzero(records[:, 0] >= len(CLASSES))).size:
        raise ValueError(
            f"{path}: the label at byte {bad[0] * RECORD_SIZE} is {records[bad[0], 0]}, not in 0..9, so the file is "
            f"damaged or not CIFAR-10.  {REPLACE}"
        )
    return records


def _read_python(folder: Path, train: bool, limit: int | None) -> Split:
    batches = [_read_batch(path) for path in _batch_paths(folder, train, "")]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))  # (N, 3072) and (N,)
    num_images = _num_wanted(limit, len(labels), folder)
    return Split(images[:num_images].reshape(-1, *IMAGE_SHAPE), labels[:num_images])


def _read_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images of shape (N, 3072) and labels of shape (N,) from one pickled batch."""
    try:
        batch = load_pickle(path)
        data, labels = decode(batch[b"data"]), list(batch[b"labels"])
    except KeyError as error:
        raise ValueError(f"{path} has no key {error}: it is not a batch of CIFAR-10.") from error
    except Exception as error:  # damaged bytes can raise nearly any exception
        raise ValueError(f"{path} is not a batch of CIFAR-10: {error}.  {REPLACE}") from error
    if data.ndim != 2 or data.shape[1] != IMAGE_SIZE or not len(data):
        raise ValueError(f"{path}: data has shape {data.shape}, expected (N, {IMAGE_SIZE}) with N at least 1.")
    if len(labels) != len(data):
        raise ValueError(f"{path}: {len(labels)} labels for {len(data)} rows of data.")
    for row, label in enumerate(labels):
        if not isinstance(label, int) or label not in range(len(CLASSES)):
            raise ValueError(f"{path}: the label of row {row} is {label!r:.20}, not an integer in 0..9.")
    return data, np.array(labels, np.int64)


def _read_kaggle(table: Path, train: bool, limit: int | None) -> Split:
    if not train:
        raise FileNotFoundError(
            f"The Kaggle layout in {table.parent} has no labels of test images.  Use the training images, or put "
            f"{BINARY}/ or {PYTHON}/ into the same folder."
        )
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    if rows[:1] != [["id", "label"]] or len(rows) == 1:
        raise ValueError(f"{table} must have the header 'id,label' and at least one row below it.")
    num_images = _num_wanted(limit, len(rows) - 1, table)
    images, labels = [], []
    for number, row in enumerate(rows[1 : num_images + 1], start=2):
        line = f"{table}, line {number}"
        if len(row) != 2 or row[1] not in CLASSES:
            raise ValueError(
                f"{line}: expected 'id,label' with a label of {', '.join(CLASSES)}; got {','.join(row)!r}."
            )
        images.append(_read_png(table.parent / "train" / f"{row[0]}.png", line))
        labels.append(CLASSES.index(row[1]))
    return Split(np.stack(images), np.array(labels, np.int64))


def _read_png(path: Path, line: str) -> npt.NDArray[np.uint8]:
    """One image of shape (3, 32, 32).  ``line`` says which line of the table names the image."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            fits = image.size == (32, 32)  # asked before the pixels are decompressed
            shape = image.height, image.width, len(image.getbands())
            pixels = np.asarray(image) if fits else np.broadcast_to(np.uint8(0), shape)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing, but {line}, names it: complete the folder train/.") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises any of the three on damaged files
        raise ValueError(f"{path} ({line}) is not a readable PNG: {error}.  {REPLACE}") from error
    if pixels.shape != (32, 32, 3):
        raise ValueError(f"{path} ({line}) has pixels of shape {pixels.shape}, expected 32 x 32 RGB, (32, 32, 3).")
    return pixels.transpose(2, 0, 1)


class PickledArray:
    """Stands for a numpy array or dtype during unpickling; stores the arguments and the state from the file."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes that a pickle holds as text.  Other encodings could multiply their size."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it uses the forbidden encoding {encoding[:20]!r}")
    return codecs.encode(text, encoding)


def load_pickle(path: Path) -> Any:
    """The content of a pickled batch.  Its size, its nesting and its table of references are checked before."""
    size(path, MOST_BATCH)
    content = path.read_bytes()
    nested, highest = 0, len(content)
    for code, argument, _ in pickletools.genops(content):
        nested += code.name.startswith(("TUPLE", "EMPTY_", "REDUCE", "BUILD", "LIST", "DICT"))
        if nested > MOST_NESTED or code.name in ("EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            raise pickle.UnpicklingError("it has too many containers, or objects that are no arrays")
        if "PUT" in code.name and not 0 <= int(argument or 0) <= highest:
            raise pickle.UnpicklingError("it refers to an entry beyond its size")
    return ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


class ArrayUnpickler(pickle.Unpickler):
    """Loads plain values and numpy arrays; rejects every other global without importing it.

    Numpy's own functions are not called, because forged dtype flags could make numpy read bytes of the file as memory
    addresses of objects.
    """

    ADMITTED: ClassVar[dict[str, Callable[..., object]]] = {
        "numpy.core.multiarray._reconstruct": PickledArray,
        "numpy._core.multiarray._reconstruct": PickledArray,
        "numpy.ndarray": PickledArray,
        "numpy.dtype": PickledArray,
        "_codecs.encode": _latin1,  # bytes in pickle protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        """The replacement for an admitted global."""
        if f"{module}.{name}" not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it uses the forbidden global {module}.{name}, which could run code")
        return self.ADMITTED[f"{module}.{name}"]


def decode(array: PickledArray) -> npt.NDArray[np.uint8]:
    """The content of a pickled uint8 array."""
    _, shape, dtype, fortran, raw = array.state
    if dtype.args[0] not in ("u1", b"u1"):
        raise TypeError(f"data has dtype {dtype.args[0]!r}, expected uint8")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
