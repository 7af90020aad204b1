"""Every kind of image file gives the right pixels or is refused by name, within bounds."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sit_jax.data import transforms
from sit_jax.data.transforms import Decoding

DECODING = Decoding(max_pixels=2**16, exif_orientation=False)
RAMP = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
IN_8_BITS = np.rint(RAMP / 257)


def decode_rgb(data, decoding):
    return transforms.to_rgb(transforms.open_image(data, decoding), decoding)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(color_type, bits, rows, size=None):
    """Return a PNG of raw rows, which says that it has this (width, height)."""

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    width, height = size or rows.shape[1::-1]
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(values, bits, photometric=1, sample_format=1, order="<", width=64):
    """Return an uncompressed TIFF with one channel."""
    height = len(values)
    data = values.tobytes()
    tags = [
        (256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8),
        (277, 1), (278, height), (279, len(data)), (339, sample_format),
    ]  # fmt: skip
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", 8 + len(data)) + data + directory


def packed_12_bits(values):
    """Return rows of 12-bit values, two in three bytes, the high bits first."""
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    three = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    return three.astype(np.uint8).reshape(len(values), -1)


SIXTEEN_BITS = {
    "png": encoded(Image.fromarray(RAMP), "PNG"),
    "tiff": encoded(Image.fromarray(RAMP), "TIFF"),
    "tiff, deflate": encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_adobe_deflate"),
    "tiff, big-endian": tiff(RAMP.astype(">u2"), 16, order=">"),
    "tiff, white is zero": tiff(65535 - RAMP, 16, photometric=0),
    "tiff, 12 bits": tiff(packed_12_bits(RAMP >> 4), 12),
    "pgm": encoded(Image.fromarray(RAMP.astype(np.int32)), "PPM"),
    "pgm of 1023": b"P5 64 64 1023\n" + (RAMP >> 6).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_grey_of_more_than_8_bits_is_scaled_to_its_range(name):
    pixels = np.asarray(decode_rgb(SIXTEEN_BITS[name], DECODING)).astype(int)
    assert pixels.shape == (64, 64, 3) and (pixels == pixels[..., :1]).all()
    assert (pixels.min(), pixels.max()) == (0, 255)
    difference = np.abs(pixels[..., 0] - IN_8_BITS)
    fewer_bits = name in ("tiff, 12 bits", "pgm of 1023")
    assert difference.max() <= (1 if fewer_bits else 0)


@pytest.mark.parametrize(
    ("color_type", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["rgb", "grey, alpha", "rgb, alpha"]
)
def test_colour_of_16_bits_keeps_its_range(color_type, channels):
    rows = np.repeat(RAMP[..., None], channels, axis=2).astype(">u2")
    pixels = np.asarray(decode_rgb(png(color_type, 16, rows), DECODING)).astype(int)
    assert np.abs(pixels[..., 0] - IN_8_BITS).max() <= 1  # Pillow truncates to the high byte


UNKNOWN_RANGE = {
    "float tiff": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "float tiff in [0, 1]": encoded(Image.fromarray(RAMP.astype(np.float32) / 65535), "TIFF"),
    "pfm": encoded(Image.fromarray(RAMP.astype(np.float32)), "PPM"),
    "32-bit tiff": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "signed 16-bit tiff": tiff(RAMP.astype(np.int16), 16, sample_format=2),
}


@pytest.mark.parametrize("name", UNKNOWN_RANGE)
def test_values_without_a_known_white_are_refused(name):
    with pytest.raises(ValueError, match=r"mode '[IF]' do not say which one is white; convert it"):
        decode_rgb(UNKNOWN_RANGE[name], DECODING)


GREY = Image.fromarray(IN_8_BITS.astype(np.uint8))
COLOUR = Image.merge("RGB", [GREY, GREY.point(lambda v: v // 2), GREY.point(lambda v: 255 - v)])
MEAN = np.asarray(COLOUR).mean((0, 1))
IN_COLOUR = {
    "L": (encoded(GREY, "PNG"), np.full(3, MEAN[0]), 0),
    "LA": (encoded(GREY.convert("LA"), "PNG"), np.full(3, MEAN[0]), 0),
    "RGBA": (encoded(COLOUR.convert("RGBA"), "PNG"), MEAN, 0),
    "RGBX": (encoded(COLOUR.convert("RGBX"), "TIFF"), MEAN, 0),
    "CMYK jpeg": (encoded(COLOUR.convert("CMYK"), "JPEG"), MEAN, 1),
    "CMYK tiff": (encoded(COLOUR.convert("CMYK"), "TIFF"), MEAN, 1),
    "YCbCr tiff": (encoded(COLOUR.convert("YCbCr"), "TIFF"), MEAN, 3),
    "LAB tiff": (encoded(COLOUR.convert("LAB"), "TIFF"), MEAN, 2),
    "P": (encoded(COLOUR.quantize(256), "PNG"), MEAN, 3),
    "P bmp": (encoded(COLOUR.quantize(256), "BMP"), MEAN, 3),
    "PA": (encoded(COLOUR.convert("PA"), "TIFF"), MEAN, 3),
    "P, transparent": (encoded(COLOUR.quantize(256), "PNG", transparency=bytes(256)), MEAN, 3),
    "P, one transparent": (encoded(COLOUR.quantize(256), "PNG", transparency=3), MEAN, 3),
    "RGB, one transparent": (encoded(COLOUR, "PNG", transparency=(0, 0, 255)), MEAN, 0),
    "ppm": (encoded(COLOUR, "PPM"), MEAN, 0),
    "webp": (encoded(COLOUR, "WEBP", lossless=True), MEAN, 0),
}


@pytest.mark.parametrize("name", IN_COLOUR)
def test_every_other_mode_keeps_its_colours(name):
    data, mean, tolerance = IN_COLOUR[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_rgb(data, DECODING)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).mean((0, 1)), mean, atol=tolerance)


def test_black_and_white_and_premultiplied_alpha():
    pixels = np.asarray(decode_rgb(encoded(GREY.convert("1"), "PNG"), DECODING))
    assert set(np.unique(pixels)) == {0, 255}
    half = Image.new("RGBA", (8, 8), (200, 100, 50, 128)).convert("RGBa")
    pixels = np.asarray(transforms._as_rgb(half)).astype(int)
    assert np.abs(pixels - [200, 100, 50]).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_read(format):
    white = Image.new("RGB", (64, 64), "white")
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(white, format, save_all=True, append_images=[COLOUR], **options)
    assert np.asarray(decode_rgb(data, DECODING)).min() == 255


@pytest.mark.parametrize("format", ["EPS", "GIF", "ICO", "PCX", "TGA"])
def test_only_the_formats_of_the_folder_source_are_opened(format):
    data = encoded(COLOUR, format)
    with pytest.raises(ValueError, match="not an image of JPEG, PNG, WEBP, BMP, PPM, TIFF"):
        decode_rgb(data, DECODING)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_a_setting(format):
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 8, 16))  # its left quarter
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    data = encoded(stored, format, exif=exif)
    as_stored = np.asarray(decode_rgb(data, DECODING))
    turned = np.asarray(decode_rgb(data, Decoding(2**16, exif_orientation=True)))
    assert as_stored.shape == (16, 32, 3) and turned.shape == (32, 16, 3)
    np.testing.assert_array_equal(turned, np.rot90(as_stored, -1))
    without = encoded(stored, format)
    np.testing.assert_array_equal(
        decode_rgb(without, Decoding(2**16, exif_orientation=True)), decode_rgb(without, DECODING)
    )


@pytest.mark.parametrize("exif_orientation", [False, True])
def test_a_tiff_is_turned_once(exif_orientation):
    """Pillow obeys the orientation of a TIFF by itself."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(COLOUR, "TIFF", exif=exif)
    pixels = np.asarray(decode_rgb(data, Decoding(2**16, exif_orientation)))
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(COLOUR), -1))


def test_a_grey_image_of_16_bits_is_turned_as_well():
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    data = encoded(Image.fromarray(RAMP), "PNG", exif=exif)
    turned = np.asarray(decode_rgb(data, Decoding(2**16, exif_orientation=True)))
    np.testing.assert_array_equal(turned[..., 0], np.rot90(IN_8_BITS, 2))


def large_tiff(width, height):
    data = bytearray(tiff(np.zeros((1, 1), np.uint8), 8, width=1))
    for tag, value in ((256, width), (257, height)):
        at = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
        data[at : at + 4] = struct.pack("<I", value)
    return bytes(data)


BOMBS = {
    "png": lambda w, h: png(2, 8, np.zeros((1, 1, 3), np.uint8), (w, h)),
    "bmp": lambda w, h: (
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, w, h, 1, 24, *[0] * 6)
    ),
    "ppm": lambda w, h: f"P6 {w} {h} 255\n".encode(),
    "pgm": lambda w, h: f"P5 {w} {h} 65535\n".encode(),
    "tiff": large_tiff,
}


@pytest.mark.parametrize("size", [(257, 256), (10_000, 10_000), (13_000, 13_000)])
@pytest.mark.parametrize("name", BOMBS)
def test_an_image_that_is_too_large_is_not_decoded(name, size):
    data = BOMBS[name](*size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        message = f"{size[0]} x {size[1]} pixels, more than data.max_pixels=65536; raise it"
        with pytest.raises(ValueError, match=message):
            decode_rgb(data, DECODING)


def test_the_largest_image_is_read():
    data = encoded(Image.new("RGB", (256, 256), "white"), "PNG")
    assert decode_rgb(data, DECODING).size == (256, 256)
