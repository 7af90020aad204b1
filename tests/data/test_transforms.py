"""The crop equals the PyTorch reference bit for bit; the scaling agrees up to rounding."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from sit_jax.data import transforms
from sit_jax.latents.pixels import normalise

DECODING = transforms.Decoding(max_pixels=2**22, exif_orientation=False)
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ARRAYS = np.load(GOLDEN / "crop.npz")
CASES = json.loads((GOLDEN / "crop.golden.json").read_text())["cases"]


def decode_rgb(data, decoding):
    return transforms.to_rgb(transforms.open_image(data, decoding), decoding)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_decoding_cropping_and_scaling_equal_the_reference(case):
    image = decode_rgb(ARRAYS[case["file"]].tobytes(), DECODING)
    np.testing.assert_array_equal(np.asarray(image), ARRAYS[case["rgb"]])
    for size, expected in case["outputs"].items():
        crop = transforms.center_crop(image, int(size))
        assert crop.dtype == np.uint8
        np.testing.assert_array_equal(crop, ARRAYS[expected["crop"]])
        normalised = normalise(crop)
        assert normalised.dtype == np.float32
        # The reference rounds x/255 before it subtracts 0.5. That error is at most 2**-25, and the
        # last division doubles it.
        reference = ARRAYS[expected["normalised_chw"]].transpose(1, 2, 0)
        np.testing.assert_allclose(normalised, reference, rtol=0, atol=2**-24)


def test_an_image_of_exactly_twice_the_size_is_halved_by_the_box_filter():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    means = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3))
    np.testing.assert_allclose(transforms.center_crop(Image.fromarray(pixels), 16), means, atol=1)


def test_normalise_in_jit_stays_in_range_and_agrees_with_numpy():
    levels = np.arange(256, dtype=np.uint8)
    on_device = jax.jit(normalise)(levels)
    assert on_device.dtype == np.float32
    np.testing.assert_allclose(on_device, normalise(levels), rtol=0, atol=2**-23)
    assert on_device[0] == -1 and on_device[255] == 1
    np.testing.assert_array_equal(on_device, -on_device[::-1])


def test_bytes_that_are_not_an_image_give_the_same_error_each_time():
    messages = set()
    for _ in range(2):
        with pytest.raises(ValueError, match="not an image") as error:
            decode_rgb(b"\xff\xd8 no jpeg", DECODING)
        messages.add(str(error.value))
    assert len(messages) == 1


def test_a_mirror_swaps_left_and_right():
    image = np.arange(2 * 3 * 1, dtype=np.uint8).reshape(2, 3, 1)
    expected = [[2, 1, 0], [5, 4, 3]]
    np.testing.assert_array_equal(transforms.mirror(image)[..., 0], expected)


@pytest.mark.parametrize(("shape", "size"), [((1, 2000), 256), ((2000, 1), 256), ((3, 9000), 512)])
def test_an_image_that_would_be_scaled_to_gigabytes_is_refused(shape, size):
    image = Image.new("RGB", shape)
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} pixels are too long and thin"):
        transforms.center_crop(image, size)
    assert transforms.center_crop(image, 8).shape == (8, 8, 3)


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10)])
def test_a_long_strip_is_cropped(shape):
    assert transforms.center_crop(Image.new("RGB", shape), 256).shape == (256, 256, 3)
