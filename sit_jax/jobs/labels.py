"""Class labels of samples, from a file."""

import io

import numpy as np
from etils import epath

from sit_jax import storage
from sit_jax.data.npz import DAMAGE, LABELS
from sit_jax.errors import UserError, check


def read_labels(path: str, classes: int) -> np.ndarray:
    """Return the labels of a file, int32 [n]: text, .npy, or .npz with `arr_1` or `labels`.

    Raises `UserError` if it cannot be read, or a label is not a class.
    """
    try:
        labels = _read(epath.Path(path))
    except DAMAGE as error:
        raise UserError(
            f"sample.labels_file {path!r} cannot be read ({storage.reason(error)}); give whole "
            "numbers as text, as an .npy file, or as arr_1 or labels of an .npz file"
        ) from error
    check(
        labels.ndim == 1 and len(labels) and labels.dtype.kind in "iu",
        f"sample.labels_file {path!r} holds {labels.dtype} of shape {labels.shape}; expected whole "
        "numbers [n]",
    )
    is_class = (labels >= 0) & (labels < classes)
    first = int(np.argmin(is_class))
    check(
        is_class.all(),
        f"sample.labels_file {path!r}: label {first} is {labels[first]}; expected 0 to "
        f"{classes - 1} (data.classes)",
    )
    return labels.astype(np.int32)


def _read(path: epath.Path) -> np.ndarray:
    data = path.read_bytes()
    if path.suffix not in (".npy", ".npz"):
        return np.array([int(word) for word in data.decode().split()], np.int64)
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        name = next((name for name in LABELS if name in loaded.files), None)
        if name is None:
            raise ValueError(f"it holds {', '.join(loaded.files) or 'nothing'}")
        return loaded[name]
