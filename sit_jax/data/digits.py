"""The digits of scikit-learn, a small data set that needs no download."""

import numpy as np

from sit_jax.data.source import ArraySource, SourceOptions
from sit_jax.errors import check, unknown_name

_SPLITS = {"train": slice(0, None, 2), "test": slice(1, None, 2), "all": slice(None)}


def open_digits(options: SourceOptions) -> ArraySource:
    """Open scikit-learn's 1,797 handwritten digits, 8x8 grey, which need no download.

    Even records are split "train", odd ones "test": fixed, with 86 to 93 of each class in both.
    """
    # Imported here because it takes a second and serves only this source.
    from sklearn.datasets import load_digits

    check(
        not options.path,
        f"data.path={options.path!r}, but the digits come with scikit-learn; leave it empty, or "
        "set data.source",
    )
    check(
        options.image_size == 8,
        f"data.image_size={options.image_size}, but the digits are 8x8; set it to 8",
    )
    check(
        options.channels == 1,
        f"data.channels={options.channels}, but the digits are grey; set it to 1",
    )
    if options.split not in _SPLITS:
        raise unknown_name("data.split", options.split, _SPLITS)
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    rows = _SPLITS[options.split]
    return ArraySource(images[rows], labels[rows], tuple(map(str, digits.target_names)))
