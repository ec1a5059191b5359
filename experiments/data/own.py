"""The user's data: a folder of images per class, arrays in files, or any dataset.  The contract is in docs/data.md."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments import targets
from experiments.data.images import Images

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Formats of Pillow for these.  Others could start a program: Pillow reads PostScript with Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MOST_PIXELS = 1 << 26  # of one image, which takes four times as many bytes
MOST_UNPACKED, MOST_RATIO = 1 << 29, 50  # bytes of the arrays in a file, unless the file has a fiftieth of them
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # modes of Pillow with at most 8 bits per channel
OPTIONAL = ("batch_size", "shape", "download", "generator", "train")  # given to a function only if it takes them
TEST_EVERY = 4  # data without a test set: every fourth sample is tested on


def folder(path: str, size: int | None = None, train: bool | None = None) -> Images:
    """The RGB images of ``path/CLASS/``, or of ``path/train/CLASS/`` and ``path/test/CLASS/``; classes in sorted order.

    ``size``: resize every image to ``size`` x ``size`` pixels; without it, all images must have one size.  ``train``:
    only the training or only the test images.  Images are standardized per channel, by the mean and the standard
    deviation of the training images.
    """
    root = Path(path).expanduser()
    split = {name: root / name for name in ("train", "test") if (root / name).is_dir()}
    classes = _classes(split.get("train", root))
    learned = _read_folder(split.get("train", root), classes, size)
    if train is not False or not split:
        return _part(_standardized(learned, learned), train, split=bool(split))
    if "test" not in split:
        raise FileNotFoundError(f"data.path={path} has a folder train/ but no test/: add it, or set holdout=N.")
    if unknown := sorted({*_classes(split["test"])} - {*classes}):
        raise ValueError(f"{split['test'] / unknown[0]}: there is no such class in {split['train']}.")
    return _standardized(_read_folder(split["test"], classes, size), learned)


def arrays(path: str, labels: str | None = None, train: bool | None = None) -> Images:
    """Samples of an ``.npz`` file (x, y, or x_train, y_train, x_test, y_test) or an ``.npy`` file (with ``labels``).

    Bytes are pixels: (N, C, H, W) or (N, H, W), standardized per channel.  Floats, (N, ...), are taken as they are.
    """
    file = Path(path).expanduser()
    content = _load(file)
    if isinstance(content, np.ndarray):
        content = {"x": content} | ({} if labels is None else {"y": _load(Path(labels).expanduser())})
    split = "x_train" in content
    names = ("x_train", "y_train") if split else ("x", "y")
    if names[0] not in content:
        raise ValueError(
            f"{file} has the arrays {sorted(content)}, but needs x and y, or x_train, y_train, x_test, y_test."
        )
    learned = _images(content[names[0]], content.get(names[1]), f"{file}, {names[0]}")
    if train is not False or not split:
        return _part(_standardized(learned, learned), train, split=split)
    if "x_test" not in content:
        raise ValueError(f"{file} has x_train but no x_test: add it, or set holdout=N.")
    return _standardized(_images(content["x_test"], content.get("y_test"), f"{file}, x_test"), learned)


def given(make: Callable[..., Any], arguments: Mapping[str, Any], **further: Any) -> Any:
    """What ``make`` returns for these arguments; those in `OPTIONAL` are given only if it takes them."""
    known = targets.parameters(make)
    if known is None:  # a class written in C has no signature
        return make(**{key: value for key, value in arguments.items() if key not in OPTIONAL})
    values = {key: value for key, value in {**arguments, **further}.items() if key in known or key not in OPTIONAL}
    if "generator" in known and "generator" not in values and known["generator"].default is inspect.Parameter.empty:
        raise ValueError(
            f"data._target_={getattr(make, '__name__', make)} draws a batch without labels, and training needs "
            "samples with labels: use data=cifar10, digits, folder, arrays or custom."
        )
    targets.check(make, values, "data")
    return make(**values)


def batch(found: Any, batch_size: int, generator: torch.Generator, name: str) -> Tensor:
    """A random batch of what the function ``name`` returned: a tensor is the batch itself."""
    if isinstance(found, Tensor):
        return found
    if isinstance(found, tuple):
        found = _images(found[0], None, name)
    number = _length(found, name)
    if not 1 <= batch_size <= number:
        raise ValueError(f"data.batch_size must be between 1 and the {number} samples of {name}, got {batch_size}.")
    chosen = torch.randperm(number, generator=generator)[:batch_size]
    if isinstance(found, Images):
        return found.batch(chosen)[0]
    images = _of_dataset(found, name, chosen.tolist(), labeled=False)
    return _standardized(images, images).batch(torch.arange(batch_size))[0]


def sets(
    make: Callable[..., Any], arguments: Mapping[str, Any], name: str, holdout: int | None
) -> tuple[Images, Images]:
    """Training and test samples with labels; without a test set of its own, every fourth sample is tested on."""
    splits = "train" in (targets.parameters(make) or {})
    flags: tuple[dict[str, bool], ...] = ({"train": True}, {"train": False}) if splits and not holdout else (
        {"train": True} if splits else {},)  # fmt: skip
    parts = [_labeled(given(make, arguments, **flag), name) for flag in flags]
    learned = _standardized(parts[0], parts[0])
    if holdout:
        return learned.split(holdout)
    learned, test = (learned, _standardized(parts[1], parts[0])) if splits else (
        _part(learned, True), _part(learned, False))  # fmt: skip
    if test.images.shape[1:] != learned.images.shape[1:]:
        shapes = f"{tuple(test.images.shape[1:])}, training samples {tuple(learned.images.shape[1:])}"
        raise ValueError(f"{name}: test samples have shape {shapes}.")
    if int(test.labels.max()) > int(learned.labels.max()):
        raise ValueError(f"{name}: the test set has class {int(test.labels.max())}, which no training sample has.")
    return learned, test


def _labeled(found: Any, name: str) -> Images:
    if isinstance(found, tuple) and len(found) > 1:
        found = _images(found[0], found[1], name)
    if not isinstance(found, (Images, Tensor, tuple)):
        found = _of_dataset(found, name, range(_length(found, name)), labeled=True)
    if not isinstance(found, Images) or (found.labels < 0).any():
        raise ValueError(
            f"experiments.train needs samples with labels, and {name} has none: use data=cifar10, digits, folder or "
            "arrays, or a dataset of pairs (sample, class)."
        )
    return found


def _part(images: Images, train: bool | None, split: bool = False) -> Images:
    """All samples, or those to train on, or those to test on."""
    if train is None or split:
        return images
    tested = torch.arange(len(images)) % TEST_EVERY == TEST_EVERY - 1
    if not tested.any():
        raise ValueError(f"There are {len(images)} samples: without a test set, at least {TEST_EVERY} are needed.")
    return images.chosen(~tested if train else tested)


def _standardized(images: Images, learned: Images) -> Images:
    """Pixels with the moments of ``learned`` per channel, unless they are known; floats as they are."""
    if images.images.dtype != torch.uint8 or learned.mean:
        return images.with_moments(learned.mean, learned.std)
    pixels = learned.images.double().transpose(0, 1).flatten(1) / 255
    std = pixels.std(dim=1, correction=0)
    return images.with_moments(tuple(pixels.mean(dim=1).tolist()), tuple(torch.where(std > 0, std, 1.0).tolist()))


def _images(x: Any, y: Any, name: str) -> Images:
    """Checked samples and labels; labels are -1 if there are none."""
    try:
        values = torch.as_tensor(np.asarray(x))
    except TypeError as error:
        raise ValueError(f"{name} has dtype {np.asarray(x).dtype}; save uint8 (pixels) or floats.") from error
    if values.dtype == torch.uint8 and values.ndim == 3:
        values = values[:, None]
    shape = tuple(values.shape)
    if values.dtype != torch.uint8 and not values.is_floating_point():
        raise ValueError(f"{name} has dtype {values.dtype}; save uint8 (pixels) or floats.")
    if values.dtype == torch.uint8 and (values.ndim != 4 or (shape[1] not in (1, 3) and shape[3] in (1, 3))):
        raise ValueError(f"{name} has shape {shape}; pixels (uint8) need shape (N, C, H, W) or (N, H, W).")
    if values.ndim < 2 or not values.numel():
        raise ValueError(f"{name} has shape {shape}; samples need shape (N, features) or (N, C, H, W), N at least 1.")
    if values.is_floating_point() and not values.isfinite().all():
        bad = int((~values.flatten(1).isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{name}: sample {bad} holds a value that is NaN or infinite.")
    labels = torch.full((len(values),), -1) if y is None else torch.as_tensor(np.asarray(y))
    if labels.shape == (len(values), 1):
        labels = labels[:, 0]
    if labels.shape != values.shape[:1] or labels.is_floating_point() or (y is not None and (labels < 0).any()):
        raise ValueError(
            f"{name}: labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; {shape[0]} samples need labels "
            f"of shape ({shape[0]},), whole numbers from 0."
        )
    values = values if values.dtype == torch.uint8 else values.float()
    return Images(values, labels.long(), (), ())


def _of_dataset(dataset: Any, name: str, chosen: Any, labeled: bool) -> Images:
    """The chosen items of a dataset: pairs (sample, class), or samples alone if no labels are needed."""
    samples: list[np.ndarray[Any, Any]] = []
    labels = []
    for index in chosen:
        item = dataset[index]
        parts = item if isinstance(item, (tuple, list)) else (item,)
        sample = np.asarray(parts[0])
        if isinstance(parts[0], Image.Image):
            sample = sample[None] if sample.ndim == 2 else sample.transpose(2, 0, 1)
        if samples and (sample.shape, sample.dtype) != (samples[0].shape, samples[0].dtype):
            raise ValueError(
                f"{name}: item {index} has shape {sample.shape} and dtype {sample.dtype}, earlier items "
                f"{samples[0].shape} and {samples[0].dtype}; add a transform that gives all one shape."
            )
        if labeled and len(parts) < 2:
            raise ValueError(f"{name}: item {index} is a {type(item).__name__}, not a pair (sample, class).")
        samples.append(sample)
        labels.append(np.asarray(parts[1]).item() if labeled else 0)
    return _images(np.stack(samples), np.array(labels), name)


def _length(dataset: Any, name: str) -> int:
    try:
        number = len(dataset)
    except TypeError as error:
        what = type(dataset).__name__
        raise ValueError(f"{name} gave a {what}; needed is a tensor, a pair of arrays (samples, classes), or a "
                         "torch.utils.data.Dataset with a length.") from error  # fmt: skip
    if not number or (not isinstance(dataset, Images) and not hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"{name} gave a {type(dataset).__name__} with {number} samples; needed is a dataset with items."
        )
    return int(number)


def _load(file: Path) -> Any:
    """The array of an .npy file, or the arrays of an .npz file."""
    if not file.is_file():
        raise FileNotFoundError(f"data.path={file}: there is no such file; data=arrays reads .npz and .npy files.")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > max(MOST_UNPACKED, MOST_RATIO * file.stat().st_size):
                raise ValueError(f"its arrays have {unpacked / 1e6:,.0f} MB, more than {MOST_RATIO} times the file")
        content = np.load(file, allow_pickle=False)
        return content if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except Exception as error:  # damaged bytes can raise nearly any exception
        reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} cannot be read as .npz or .npy; write it with numpy.savez ({reason}).") from error


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise FileNotFoundError(f"data.path={root}: there is no such folder; it needs one folder of images per class.")
    classes = sorted(one.name for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not classes:
        raise FileNotFoundError(
            f"data.path={root} has no folders; put the images of each class in a folder of its own."
        )
    return classes


def _read_folder(root: Path, classes: list[str], size: int | None) -> Images:
    pixels, labels, first = [], [], None
    for number, name in enumerate(classes):
        paths = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"{root / name} has no images ({', '.join(SUFFIXES)}).")
        for path in paths:
            values = _pixels(path, size)
            first = first or (path, values.shape)
            if values.shape != first[1]:
                raise ValueError(
                    f"{path} has shape {values.shape}, but {first[0].name} has {first[1]}: set data.size=N to resize "
                    "all images to N x N pixels."
                )
            pixels.append(values)
            labels.append(number)
    # Classes alternate, so that every part of the data has samples of each.
    place = np.concatenate([np.arange(labels.count(number)) / labels.count(number) for number in range(len(classes))])
    order = np.argsort(place, kind="stable")
    return _images(np.stack(pixels)[order], np.array(labels)[order], str(root))


def _pixels(path: Path, size: int | None) -> np.ndarray[Any, Any]:
    """One image of shape (3, H, W)."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS}")
            if image.mode not in MODES:
                raise ValueError(f"its mode is {image.mode}, and only 8 bits per channel are read")
            rgb = image.convert("RGB")
    except Exception as error:  # Pillow raises nearly any exception on damaged files
        raise ValueError(f"{path} is not a readable image: {error}.") from error
    return np.asarray(rgb if size is None else rgb.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
