"""Small data sets prepared by tensorflow-datasets, offline, as ArrayRecord files."""

import contextlib
import functools
import io
import os

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from sit_jax.data.source import SourceOptions
from sit_jax.data.sources import SOURCES
from sit_jax.data.transforms import Decoding

CLASSES = ("ant", "bee", "cat")
MODES = ("RGB", "RGBA", "L", "CMYK")  # in turn; only the second is stored as PNG


@functools.cache
def picture(number):
    """Return the bytes of an image file of its own: noise, 20 to 60 pixels wide and high."""
    random = np.random.default_rng(number)
    width, height = random.integers(20, 61, 2)
    noise = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    mode = MODES[number % len(MODES)]
    image = Image.fromarray(noise).resize((int(width), int(height))).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG" if mode == "RGBA" else "JPEG")
    return file.getvalue()


def example(number):
    """Return an example of `FEATURES`, whose label is that of `label_of`."""
    return {"image": io.BytesIO(picture(number)), "label": label_of(number), "id": f"{number}"}


def label_of(number):
    """Return the label of an example: the three classes in turn."""
    return number % len(CLASSES)


FEATURES = {
    "image": tfds.features.Image(),
    "label": tfds.features.ClassLabel(names=CLASSES),
    "id": tfds.features.Text(),
}
SPLITS = {"train": range(23), "validation": range(23, 30)}


def prepare(
    data_dir,
    name="pets",
    *,
    version="1.0.0",
    config=None,
    splits=SPLITS,
    features=FEATURES,
    example=example,
    supervised=None,
    shards=4,
):
    """Prepare a data set in `data_dir` and return its folder.

    `splits` holds the numbers of each split, of which `example` makes the examples.
    """

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        # TFDS looks for checksums beside the code, and fails for a package without __init__.py.
        code_path = None
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=supervised,
            )

        def _split_generators(self, downloads):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for number in splits[split]:
                yield number, example(number)

    Builder.name = name
    builder = Builder(data_dir=os.fspath(data_dir), file_format="array_record")
    downloads = tfds.download.DownloadConfig(num_shards=shards)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(download_config=downloads)
    return builder.data_path


SIZE = 16  # of the images as `open_set` reads them
DECODING = Decoding(max_pixels=2**16, exif_orientation=False)


def open_set(path, name="pets", split="train", channels=3):
    """Open a data set as a source."""
    path = None if path is None else os.fspath(path)
    options = SourceOptions(path, name, split, SIZE, channels, DECODING)
    return SOURCES["tfds"].open(options)


def encoded(source):
    """Return the encoded image and the label of each record."""
    return [source.encoded(index) for index in range(len(source))]


def shard(data_dir, number, split="train"):
    """Return the file of a shard of the data set pets."""
    return data_dir / "pets/1.0.0" / f"pets-{split}.array_record-{number:05}-of-00004"
