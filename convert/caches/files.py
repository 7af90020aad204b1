"""Caches with one .npy or .npz file for each example: REPA's, and folders of moments."""

import collections
import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from convert.caches import class_labels
from convert.caches.arrays import read_arrays
from convert.caches.cache import NONE, SD_VAE, STD, Cache, find_axes, to_views
from sit_jax.errors import UserError, check

DATASET = "dataset.json"
REPA_FOLDER = "vae-sd"
_REPA_PREFIX = "img-mean-std-"
_EXTENSIONS = (".npy", ".npz")
# The names of an image's moments, and those of its mirror image, in .npz files of MAR.
_IMAGE, _MIRROR = "moments", "moments_flip"
_THREADS = 4
_READ_AHEAD = 64  # files
_LISTED_KINDS = 5


def open_repa(folder: str, labels_file: str | None) -> Cache:
    """Open REPA's data folder, or the folder vae-sd in it: mean and standard deviation, CHW.

    dataset.json has the labels, by file.
    """
    inner = os.path.join(folder, REPA_FOLDER)
    folder = inner if os.path.isdir(inner) else folder
    labels_file = labels_file or os.path.join(folder, DATASET)
    names, beside = list_files(folder, labels_file)
    for name in names:
        check(
            os.path.basename(name).startswith(_REPA_PREFIX) and name.endswith(".npy"),
            f"{os.path.join(folder, name)} is not one of REPA's {_REPA_PREFIX}*.npy; remove it, or "
            "give --layout moments and what its arrays are",
        )
    return _open(
        "repa", folder, names, labels_file, axes="chw", spread=STD, autoencoder=SD_VAE,
        beside=beside,
    )  # fmt: skip


def open_moments(folder: str, labels_file: str | None, axes: str | None, spread: str) -> Cache:
    """Open a folder of .npy or .npz files of moments whose second half is `spread`.

    A .npz file holds one array, or `moments` and `moments_flip`.
    """
    if labels_file is None:
        found = [name for name in class_labels.NAMES if os.path.exists(os.path.join(folder, name))]
        check(
            len(found) == 1,
            f"{folder!r} holds {' and '.join(found) or 'no ' + ', '.join(class_labels.NAMES)}; "
            f"give --labels FILE, or --labels {class_labels.FOLDERS} if each sub-folder is a class",
        )
        labels_file = os.path.join(folder, found[0])
    names, beside = list_files(folder, labels_file)
    return _open("moments", folder, names, labels_file, axes=axes, spread=spread, beside=beside)


def _open(
    layout: str,
    folder: str,
    names: Sequence[str],
    labels_file: str,
    *,
    axes: str | None,
    spread: str,
    **known: Any,
) -> Cache:
    """Open the files of these names below a folder; the first decides on the shape of all."""
    check(names, f"{folder!r} holds no .npy or .npz files; give the folder of the latents")
    if labels_file == class_labels.FOLDERS:
        labels: list[Any] = class_labels.folders_as_labels(folder, names)
    else:
        labels = class_labels.read_labels(labels_file, names)
    first = os.path.join(folder, names[0])
    arrays = _views_of(first)
    axes = find_axes(first, arrays[0].shape, axes)
    stored = arrays[0].shape
    height, width, channels = stored if axes == "hwc" else (*stored[1:], stored[0])
    check(
        spread == NONE or channels % 2 == 0,
        f"{first} has {channels} channels; expected an even number, the means and then the "
        f"{'standard deviations' if spread == STD else 'log variances'}",
    )

    def read(number: int) -> np.ndarray:
        name = os.path.join(folder, names[number])
        views = _views_of(name)
        shapes = [view.shape for view in views]
        check(
            shapes == [stored] * len(arrays),
            f"{name} has arrays of shape {[list(shape) for shape in shapes]}, where {first} has "
            f"{[list(stored)] * len(arrays)}; all files of a cache have the same",
        )
        views_hwm = (view if axes == "hwc" else view.transpose(1, 2, 0) for view in views)
        return to_views(name, views_hwm, spread)

    return Cache(
        layout=layout,
        shape=(height, width, channels if spread == NONE else channels // 2),
        mirrored=len(arrays) == 2,
        variance=spread != NONE,
        labels=labels,
        labels_file=labels_file if labels_file != class_labels.FOLDERS else folder,
        read=lambda numbers: _read_ahead(read, numbers),
        file_of=lambda number: os.path.join(folder, names[number]),
        details={"axes": axes, "spread": spread, "files": _fingerprint(names, labels)},
        **known,
    )


def _views_of(name: str) -> list[np.ndarray]:
    """Return the moments of the image, and those of its mirror image if the file has them."""
    arrays = read_arrays(name)
    if _IMAGE in arrays:
        found = [arrays.pop(key) for key in (_IMAGE, _MIRROR) if key in arrays]
    else:
        found = [arrays.popitem()[1]] if len(arrays) == 1 else []
    check(
        found and not arrays,
        f"{name} holds the arrays {', '.join(arrays) or '(none)'}; expected one, or {_IMAGE} and "
        f"{_MIRROR}",
    )
    for array in found:
        check(
            array.dtype.kind == "f" and array.size,
            f"{name} holds {array.dtype} numbers of shape {list(array.shape)}; expected moments as "
            "floats",
        )
    # Some writers keep the axis of a batch of one.
    return [array[0] if array.ndim == 4 and len(array) == 1 else array for array in found]


def _read_ahead(read: Callable[[int], np.ndarray], numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield read(number) in order, while threads read the next few files."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for number in numbers:
                waiting.append(threads.submit(read, number))
                if len(waiting) == _READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def list_files(folder: str, labels_file: str) -> tuple[list[str], str]:
    """Return the .npy and .npz files below a folder, sorted, and a phrase on all others.

    Names are relative to the folder, with forward slashes. The file of labels is neither. Hidden
    files and folders are not read.
    """
    files: list[str] = []
    beside: collections.Counter[str] = collections.Counter()
    seen: dict[tuple[int, int], str] = {}
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        identity = os.stat(parent)
        first = seen.setdefault((identity.st_dev, identity.st_ino), parent)
        check(
            first == parent,
            f"{parent} is a link to {first}, whose files would be read twice; remove the link",
        )
        beside["hidden folders"] += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = "" if parent == folder else os.path.relpath(parent, folder) + os.sep
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                beside["hidden files"] += 1
            elif extension not in _EXTENSIONS:
                beside[extension or "without extension"] += 1
            else:
                files.append((prefix + name).replace(os.sep, "/"))
    if labels_file != class_labels.FOLDERS:
        own = os.path.relpath(os.path.abspath(labels_file), os.path.abspath(folder))
        if (name := own.replace(os.sep, "/")) in files:
            files.remove(name)
        elif os.path.exists(labels_file) and not own.startswith(os.pardir):
            beside[os.path.splitext(own)[1].lower()] -= 1
    kinds = [f"{kind} ({count:,})" for kind, count in beside.most_common() if count > 0]
    return sorted(files), ", ".join(kinds[:_LISTED_KINDS])


def _refuse(error: OSError) -> None:
    raise UserError(
        f"{error.filename!r} cannot be listed ({error.strerror}); make it readable"
    ) from error


def _fingerprint(names: Sequence[str], labels: Sequence[Any]) -> str:
    """Return a digest of names and labels, so that a run does not continue with other ones."""
    return hashlib.sha256(json.dumps([names, labels]).encode()).hexdigest()[:16]
