"""Reads the tensors of a torch.save file without torch, and without running anything that is in it.

Such a file is a zip: `data.pkl` holds the structure, `data/KEY` the raw storages. The unpickler below knows the
handful of names that a checkpoint is made of and refuses every other, so a hostile file cannot call anything.
"""

import argparse
import collections
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from sit_jax.errors import UserError

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_) -> np.ndarray:
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * storage.itemsize for s in strides], writeable=False
    )
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else -1
    if offset < 0 or min(strides, default=0) < 0 or last >= len(storage):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches past its storage of {len(storage)} elements")
    return np.array(view)


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        return np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), dtype, count)


def read_torch_file(path: str) -> Any:
    """What torch.save wrote, with numpy arrays for tensors. `UserError` for anything that is not such a file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise pickle.UnpicklingError("it holds no data.pkl")
            return _Unpickler(archive, names[0].removesuffix("/data.pkl")).load()
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is no readable PyTorch checkpoint ({error}); expected a file written by torch.save"
        ) from error
