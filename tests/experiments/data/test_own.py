"""The user's data in files and datasets: what a model sees of them, and errors that name file and shape."""

import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from experiments import measure, train
from experiments.data import arrays, cifar10_files, folder, own
from tests.experiments.example_runs import composed

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 3, 6, 6), dtype=np.uint8)
CLASSES = np.arange(24) % 3
HERE = "tests.experiments.data.test_own"


def standardized(pixels, learned):
    """By hand, in float64."""
    mean, std = ((learned / 255).mean((0, 2, 3)), (learned / 255).std((0, 2, 3)))
    return (pixels / 255 - mean[:, None, None]) / std[:, None, None]


def write(root, pixels=PIXELS, classes=CLASSES):
    for number, (image, own_class) in enumerate(zip(pixels, classes, strict=True)):
        path = root / "abc"[own_class] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)


def test_a_folder_with_a_test_set_is_standardized_by_its_training_images(tmp_path):
    write(tmp_path / "train", PIXELS[:18], CLASSES[:18])
    write(tmp_path / "test", PIXELS[18:], CLASSES[18:])
    learned, test = train.images(composed("train", "data=folder", f"data.path={tmp_path}"), torch.device("cpu"))
    assert len(learned) == 18 and len(test) == 6
    for images, pixels in ((learned, PIXELS[:18]), (test, PIXELS[18:])):
        x, y = images.batch(torch.arange(len(images)))
        wanted = standardized(pixels, PIXELS[:18])
        for number, label in enumerate(y.tolist()):
            same = [np.allclose(x[number], one, atol=1e-5) for one in wanted]
            assert CLASSES[same.index(True)] == label and sum(same) == 1


def test_without_a_test_set_every_fourth_sample_is_tested_on(tmp_path):
    np.savez(tmp_path / "d.npz", x=PIXELS, y=CLASSES)
    cfg = composed("train", "data=arrays", f"data.path={tmp_path}/d.npz")
    learned, test = train.images(cfg, torch.device("cpu"))
    fourth = np.arange(24) % 4 == 3
    np.testing.assert_array_equal(test.images, PIXELS[fourth])
    np.testing.assert_array_equal(learned.labels, CLASSES[~fourth])
    cfg = composed("train", "data=arrays", f"data.path={tmp_path}/d.npz", "holdout=5")
    learned, test = train.images(cfg, torch.device("cpu"))
    assert len(test) == 5


def test_floats_are_taken_as_they_are(tmp_path):
    x = RNG.normal(size=(12, 7))
    np.savez(tmp_path / "d.npz", x_train=x, y_train=CLASSES[:12], x_test=x[:4] + 1, y_test=CLASSES[:4])
    cfg = composed("train", "data=arrays", f"data.path={tmp_path}/d.npz")
    learned, test = train.images(cfg, torch.device("cpu"))
    np.testing.assert_allclose(learned.batch(torch.arange(12), train.Augmentation(flip=True))[0], x, rtol=1e-6)
    np.testing.assert_allclose(test.batch(torch.arange(4))[0], x[:4] + 1, rtol=1e-6)
    mapped = learned.mapped(tmp_path, torch.device("cpu"))
    np.testing.assert_allclose(mapped.batch(torch.arange(12))[0], x, rtol=1e-6)


@pytest.mark.parametrize("kind", ["folder", "arrays", "npy"])
def test_files_are_measured_on(tmp_path, kind):
    write(tmp_path)
    np.savez(tmp_path / "d.npz", x=PIXELS)
    np.save(tmp_path / "d.npy", PIXELS)
    path = {"folder": tmp_path, "arrays": tmp_path / "d.npz", "npy": tmp_path / "d.npy"}[kind]
    data = [f"data={'arrays' if kind == 'npy' else kind}", f"data.path={path}", "data.batch_size=8"]
    cfg = composed("measure", *data, "model.depth=2", "model.width=5", "model.in_features=null")
    profile, frame = measure.measure_seeds(cfg, {"model": "mlp", "data": kind})
    assert profile.num_samples == 8 and set(frame["data"]) == {kind}


class Pairs(Dataset):
    def __init__(self, train: bool = True, side: int = 6):
        self.side, self.number = side, 16 if train else 8

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index].transpose(1, 2, 0)), int(CLASSES[index])


class Uneven(Pairs):
    def __getitem__(self, index):
        return torch.zeros(2, 3 + index % 2), 0


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2), 0


def tensors():
    return TensorDataset(torch.arange(40.0).reshape(8, 5), torch.arange(8) % 2)


def unlabeled():
    return torch.ones(4, 3)


def pair(batch_size):
    return torch.ones(batch_size, 4), torch.zeros(batch_size, dtype=torch.long)


def test_any_dataset_is_trained_on_and_measured_on():
    cfg = composed("train", "data=custom", f"data._target_={HERE}.Pairs", "data.side=6")
    learned, test = train.images(cfg, torch.device("cpu"))
    np.testing.assert_array_equal(learned.images, PIXELS[:16])
    np.testing.assert_allclose(test.batch(torch.arange(8))[0], standardized(PIXELS[:8], PIXELS[:16]), atol=1e-5)
    cfg = composed("train", f"data._target_={HERE}.tensors")  # over the keys of the default data
    learned, test = train.images(cfg, torch.device("cpu"))
    assert learned.images[:, 0].tolist() == [0, 5, 10, 20, 25, 30] and test.images[:, 0].tolist() == [15, 35]


@pytest.mark.parametrize("name", ["Pairs", "tensors", "pair", "unlabeled"])
def test_every_kind_of_result_is_measured_on(name):
    cfg = composed("measure", "data=custom", f"data._target_={HERE}.{name}", "data.batch_size=4", "model.depth=2",
                   "model.width=5", "model.in_features=null")  # fmt: skip
    assert measure.measure_seeds(cfg, {"model": "mlp", "data": "custom"})[0].num_samples == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Uneven", r"Uneven: item 1 has shape \(2, 4\) and dtype float32, earlier items \(2, 3\) and float32"),
        ("Stream", r"gave a Stream; needed is a tensor, a pair of arrays"),
        ("unlabeled", r"needs samples with labels, and data._target_=.*unlabeled has none"),
    ],
)
def test_datasets_that_cannot_be_used_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        train.images(composed("train", "data=custom", f"data._target_={HERE}.{name}"), torch.device("cpu"))


def test_arguments_that_are_missing_or_unknown_are_named():
    with pytest.raises(ValueError, match=r"Pairs takes no size; did you mean .side.\?"):
        own.given(Pairs, {"size": 3})
    with pytest.raises(ValueError, match=r"needs a value for path: data\.path="):
        own.given(folder, {})


def saved(path, **content):
    np.savez(path, **content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"z": PIXELS}, r"d\.npz has the arrays \['z'\], but needs x and y"),
        ({"x": PIXELS, "y": CLASSES[:5]}, r"labels have shape \(5,\) .* 24 samples need labels of shape \(24,\)"),
        ({"x": PIXELS, "y": CLASSES - 1}, r"whole numbers from 0"),
        ({"x": PIXELS, "y": CLASSES + 0.5}, r"dtype torch\.float64"),
        ({"x": PIXELS.transpose(0, 2, 3, 1)}, r"d\.npz, x has shape \(24, 6, 6, 3\); pixels .* need shape"),
        ({"x": PIXELS.astype(np.int32)}, r"d\.npz, x has dtype torch\.int32; save uint8 \(pixels\) or floats"),
        ({"x": np.array(["a", "b"])}, r"d\.npz, x has dtype <U1"),
        ({"x": np.array([[1.0, np.nan], [0, 0]])}, r"d\.npz, x: sample 0 holds a value that is NaN"),
        ({"x": np.array([{}, {}], dtype=object)}, r"d\.npz cannot be read as \.npz or \.npy"),
        ({"x": np.zeros(3)}, r"d\.npz, x has shape \(3,\)"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_used_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        arrays(str(saved(tmp_path / "d.npz", **content)))


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz: there is no such file"):
        arrays(str(tmp_path / "none.npz"))
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text\.npy cannot be read"):
        arrays(str(tmp_path / "text.npy"))
    with pytest.raises(FileNotFoundError, match="has no folders"):
        folder(str(tmp_path))
    write(tmp_path / "f")
    Image.fromarray(PIXELS[0].transpose(1, 2, 0)[:4]).save(tmp_path / "f" / "b" / "odd.png")
    with pytest.raises(
        ValueError, match=r"odd\.png has shape \(3, 4, 6\), but 000\.png has \(3, 6, 6\): set data\.size"
    ):
        folder(str(tmp_path / "f"))
    assert folder(str(tmp_path / "f"), size=8).images.shape == (25, 3, 8, 8)
    (tmp_path / "f" / "b" / "odd.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"odd\.png is not a readable image"):
        folder(str(tmp_path / "f"))
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(tmp_path / "f" / "b" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png is not a readable image: its mode is I;16"):
        folder(str(tmp_path / "f"))
    (tmp_path / "f" / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=r"empty has no images|odd\.png"):
        folder(str(tmp_path / "f"))


def test_a_model_that_cannot_take_the_samples_is_told_their_shape(tmp_path):
    np.savez(tmp_path / "d.npz", x=PIXELS[:, :1], y=CLASSES)
    cfg = composed("train", "model=resnet", "model.depth=8", "data=arrays", f"data.path={tmp_path}/d.npz")
    learned, _ = train.images(cfg, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"cannot take samples of shape \(1, 6, 6\) of the data"):
        train.network(cfg, learned, torch.device("cpu"))
    cfg = composed("train", "model=mlp", "model.in_features=7", "data=arrays", f"data.path={tmp_path}/d.npz")
    with pytest.raises(ValueError, match=r"7 features per sample, got 36\. model\.in_features=null takes the number"):
        train.network(cfg, learned, torch.device("cpu"))


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"])
def test_an_archive_that_is_not_unpacked_is_found(tmp_path, name):
    (tmp_path / name).touch()
    said = re.escape(f"{tmp_path / name} is there but not unpacked: tar -xzf '{tmp_path / name}' -C '{tmp_path}'")
    with pytest.raises(FileNotFoundError, match=said):
        cifar10_files.load(tmp_path, train=True)


def black(width, height):
    """A PNG of black pixels, written without holding them: a few kilobytes for any size."""
    rows = zlib.compressobj()
    packed = b"".join(rows.compress(bytes(1 + width)) for _ in range(height)) + rows.flush()
    parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in parts
    )


def test_an_image_with_too_many_pixels_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "0.png"
    path.write_bytes(black(8193, 8192))  # one column more than 2**26 pixels
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"0\.png is not .*: it has 8193 x 8192 pixels, more than 67108864\."):
        own.folder(str(tmp_path), size=4)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()
    monkeypatch.setattr(own, "MOST_PIXELS", 40 * 30)
    path.write_bytes(black(40, 30))
    assert own.folder(str(tmp_path), size=4).images.shape == (1, 3, 4, 4)
    path.write_bytes(black(41, 30))
    with pytest.raises(ValueError, match="it has 41 x 30 pixels, more than 1200"):
        own.folder(str(tmp_path), size=4)
