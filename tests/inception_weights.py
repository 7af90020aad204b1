"""Random weights of Inception: those of the golden arrays, made by their recipe."""

import functools
import zlib

import numpy as np

from sit_jax.metrics import inception

_DRAWS = {
    "conv.weight": lambda g: g * np.sqrt(2 / np.prod(g.shape[1:])),
    "bn.weight": lambda g: 1 + 0.1 * g,
    "bn.bias": lambda g: 0.1 * g,
    "bn.running_mean": lambda g: 0.1 * g,
    "bn.running_var": lambda g: np.exp(0.2 * g),
    "fc.weight": lambda g: g / np.sqrt(2048),
    "fc.bias": lambda g: 0.1 * g,
}


@functools.cache
def tensors():
    """Return {name in pytorch-fid's file: array}."""
    return {name: _draw(name, shape) for name, shape in inception.file_shapes().items()}


def _draw(name, shape):
    generator = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    kind = ".".join(name.split(".")[-2:])
    return _DRAWS[kind](generator.standard_normal(shape)).astype(np.float32)
