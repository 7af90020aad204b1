"""image_io: the reference's rounding, lossless PNGs, and a folder that can be resumed."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from sit_jax import image_io
from sit_jax.errors import UserError


def _random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_to_uint8_truncates_and_clamps():
    # 127.5 x + 128 is 0.5 at -1 and 255.5 at 1: it is truncated and clamped, and never wraps.
    x = np.array([-9.0, -1.0, -0.9999, 0.0, 0.999 / 127.5, 1 / 127.5, 1.0, 9.0])
    np.testing.assert_array_equal(image_io.to_uint8(x), [0, 0, 0, 128, 128, 129, 255, 255])
    assert image_io.to_uint8(x).dtype == np.uint8


def test_to_uint8_inverts_the_scaling_to_the_model_range():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(image_io.to_uint8(pixels.astype(np.float32) / 127.5 - 1), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_decodes_to_the_same_pixels(channels):
    image = _random_images(5, 7, channels)
    decoded = Image.open(io.BytesIO(image_io.encode_png(image)))
    assert decoded.format == "PNG" and decoded.mode == {1: "L", 3: "RGB"}[channels]
    np.testing.assert_array_equal(np.asarray(decoded).reshape(image.shape), image)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_only_uint8_images_are_encoded_as_png(image):
    with pytest.raises(ValueError, match="a PNG takes uint8"):
        image_io.encode_png(image)


def test_a_sheet_holds_each_enlarged_image_in_its_cell_and_is_white_elsewhere():
    images = _random_images(5, 4, 3, 3) // 2  # without white pixels
    scale, pad, columns = 2, 3, 2
    grid = image_io.sheet(images, columns, scale=scale, pad=pad)
    assert grid.shape == (3 * (8 + pad) + pad, 2 * (6 + pad) + pad, 3) and grid.dtype == np.uint8
    background = grid.copy()
    for index, image in enumerate(images):
        top, left = pad + (index // columns) * (8 + pad), pad + (index % columns) * (6 + pad)
        cell = np.s_[top : top + 8, left : left + 6]
        for down in range(scale):
            for right in range(scale):
                np.testing.assert_array_equal(grid[cell][down::scale, right::scale], image)
        background[cell] = 255
    assert (background == 255).all()


def test_a_writer_knows_what_is_missing_after_a_restart(tmp_path):
    images = _random_images(4, 6, 6, 1)
    writer = image_io.ImageWriter(tmp_path / "run" / "images")
    for index in (0, 2):
        writer.write(index, images[index])
    (writer.folder / ".000001.png.12345678.tmp").write_bytes(b"half")  # left by a kill
    restarted = image_io.ImageWriter(writer.folder)
    assert restarted.missing(4) == [1, 3]
    assert restarted.missing(1) == []
    np.testing.assert_array_equal(
        np.asarray(Image.open(writer.folder / "000002.png")), images[2, ..., 0]
    )


def test_names_sort_and_may_have_more_than_six_digits(tmp_path):
    writer = image_io.ImageWriter(tmp_path)
    for index in (7, 1_234_567):
        writer.write(index, np.zeros((1, 1, 3), np.uint8))
    assert sorted(os.listdir(tmp_path)) == ["000007.png", "1234567.png"]


def test_an_image_whose_write_fails_is_still_missing(tmp_path, monkeypatch):
    writer = image_io.ImageWriter(tmp_path)

    def disk_full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UserError, match="000000.png cannot be written \\(No space left on device"):
        writer.write(0, np.zeros((2, 2, 1), np.uint8))
    assert writer.missing(1) == [0]


@pytest.mark.parametrize("data", [b"", b"PK", "half", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_image_is_named_with_the_remedy(tmp_path, data):
    writer = image_io.ImageWriter(tmp_path)
    writer.write(3, _random_images(1, 9, 9, 3)[0])
    path = tmp_path / "000003.png"
    path.write_bytes(path.read_bytes()[:90] if data == "half" else data)
    with pytest.raises(UserError, match="000003.png is damaged; delete it, and give the same"):
        writer.read(3)
