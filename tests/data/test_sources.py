"""Sources give the records and order that they document, and one line for each mistake."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sit_jax.data import sources
from sit_jax.data.source import SourceOptions, UnreadableImage
from sit_jax.data.transforms import Decoding
from sit_jax.errors import UserError

DIGITS = {"path": None, "image_size": 8, "channels": 1, "split": "train"}
FOLDER = {"image_size": 16, "channels": 3, "split": "all"}
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}


DECODING = Decoding(max_pixels=2**20, exif_orientation=False)


def open_source(name, *, path, image_size, channels, split, decoding=DECODING):
    options = SourceOptions(path, None, split, image_size, channels, decoding)
    return sources.SOURCES[name].open(options)


def write_image(path, color=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    Image.new(mode, (20, 18), color).save(data, FORMATS[path.suffix.lower()])
    path.write_bytes(data.getvalue())


def test_digits_are_scaled_to_bytes_and_split_by_parity():
    raw = load_digits()
    splits = {
        split: open_source("digits", **{**DIGITS, "split": split})
        for split in ("train", "test", "all")
    }
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 899,
        "test": 898,
        "all": 1797,
    }
    for split, index, row in (("train", 5, 10), ("test", 5, 11), ("all", 5, 5)):
        record = splits[split].read(index)
        assert record["image"].shape == (8, 8, 1) and record["image"].dtype == np.uint8
        assert record["label"].dtype == np.int32 and record["label"] == raw.target[row]
        np.testing.assert_array_equal(record["image"][..., 0], np.rint(raw.images[row] * 255 / 16))
    assert splits["all"].images.max() == 255
    assert splits["train"].class_names == tuple("0123456789")


# In torchvision's order: by class, then by full folder path ("sub-b" before "sub/deep"), then by
# file name, each sorted as strings.
FILES = [
    "Zebra/a.png",
    "ant/B.JPG",
    "ant/a.jpeg",
    "ant/a.png",
    "ant/sub/10.png",
    "ant/sub/9.Png",
    "ant/sub-b/1.WebP",
    "ant/sub/deep/0.jpg",
    "bee/linked/x.png",
]


def test_folder_lists_images_in_the_order_of_torchvision(tmp_path):
    root = tmp_path / "data"
    elsewhere = tmp_path / "elsewhere"
    for name in np.random.default_rng(0).permutation(FILES[:-1]):
        write_image(root / name)
    write_image(elsewhere / "x.png")
    (root / "bee").mkdir()
    os.symlink(elsewhere, root / "bee" / "linked")
    (root / "ant" / "notes.txt").write_text("not an image")
    (root / "top.png").write_bytes(b"files beside the class folders are not listed")

    source = open_source("folder", path=str(root), **FOLDER)
    assert [os.path.relpath(file, root) for file in source.files] == FILES
    assert source.class_names == ("Zebra", "ant", "bee")
    assert [int(source.read(i)["label"]) for i in range(len(source))] == [0] + [1] * 7 + [2]
    assert source.read(0)["label"].dtype == np.int32
    unpickled = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(unpickled.read(3)["image"], source.read(3)["image"])


def test_folder_crops_and_drops_alpha(tmp_path):
    write_image(tmp_path / "a" / "x.png", (200, 100, 50, 0), "RGBA")
    image = open_source("folder", path=str(tmp_path), **FOLDER).read(0)["image"]
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8([200, 100, 50]), (16, 16, 3)))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_unreadable_image_names_its_file(tmp_path, damage):
    path = tmp_path / "a" / "x.png"
    write_image(path)
    source = open_source("folder", path=str(tmp_path), **FOLDER)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30] if damage == "truncated" else b"garbage")
    with pytest.raises(UnreadableImage, match="x.png") as error:
        source.read(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("digits", {"image_size": 32}, "data.image_size=32.*8x8; set it to 8"),
        ("digits", {"channels": 3}, "data.channels=3.*set it to 1"),
        ("digits", {"split": "tran"}, "unknown data.split 'tran'; did you mean 'train'"),
        ("digits", {"path": "/data"}, "data.path='/data'.*leave it empty"),
        ("folder", {"path": ""}, "data.path is empty.*set it"),
        (
            "folder",
            {"path": "/no/such/folder"},
            "data.path='/no/such/folder' is not a folder; give",
        ),
        ("folder", {"path": "gs://bucket/x"}, "data.path='gs://bucket/x'.*mount the bucket"),
        ("folder", {"channels": 1}, "data.channels=1.*set it to 3"),
        ("folder", {"split": "train"}, "data.split='train'.*set it to 'all'"),
    ],
)
def test_bad_options_are_one_line(tmp_path, name, change, message):
    write_image(tmp_path / "a" / "x.png")
    options = DIGITS if name != "folder" else {**FOLDER, "path": str(tmp_path)}
    with pytest.raises(UserError, match=message) as error:
        open_source(name, **{**options, **change})
    assert "\n" not in str(error.value)


def test_folder_without_classes_and_classes_without_images(tmp_path):
    with pytest.raises(UserError, match="no sub-folders"):
        open_source("folder", path=str(tmp_path), **FOLDER)
    write_image(tmp_path / "full" / "x.png")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "x.gif").write_bytes(b"")
    with pytest.raises(
        UserError, match="1 class folders without images.*'hollow' .*gif.*; fill or remove"
    ):
        open_source("folder", path=str(tmp_path), **FOLDER)
