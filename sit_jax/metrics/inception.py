"""FID's Inception-v3: the network of 2015 whose features FID, sFID and the Inception Score use.

It is the network of Szegedy et al., arXiv 1512.00567, with three peculiarities of the TensorFlow
graph that FID is defined by: average pools leave the padding out of the count, the last block pools
by maximum, and there are 1008 classes. Names of parameters are those of pytorch-fid's file.

The batch norms are folded into the convolutions when the weights are read. Shape suffixes: b, h, w,
c as usual; hwio and oihw kernels.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIDE = 299  # pixels of the input
WIDTHS = {"pool": 2048, "spatial": 7 * 17 * 17, "logits": 1008}
_EPSILON = 1e-3  # of the batch norms
_SPATIAL_CHANNELS = 7  # the first channels of Mixed_6d, which ADM's sFID takes


def features(params: Any, x_bhwc: jax.Array) -> dict[str, jax.Array]:
    """Return the features of images [b, 299, 299, 3] in about [-1, 1], in full float32."""
    with jax.default_matmul_precision("highest"):
        # No mutable collections, so no tuple.
        return cast(dict[str, jax.Array], Inception().apply({"params": params}, x_bhwc))


class Conv(nn.Module):
    """A convolution with its folded batch norm, then ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        shape = (*self.kernel, x_bhwc.shape[-1], self.features)
        kernel_hwio = self.param("kernel", nn.initializers.zeros_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return nn.relu(_convolve(x_bhwc, kernel_hwio, self.stride, self.same) + bias)


def _convolve(x_bhwc: jax.Array, kernel_hwio: jax.Array, stride: int, same: bool) -> jax.Array:
    h, w = kernel_hwio.shape[:2]
    if (h, w) == (1, 1):  # a product of matrices, up to twice as fast on two CPU cores
        return x_bhwc @ kernel_hwio[0, 0]
    # For batches without any padding XLA takes a path on CPUs that is two to five times slower. So
    # a convolution without padding gets a row of zeros at the bottom, whose outputs are cut off.
    padding = ((h // 2, h // 2), (w // 2, w // 2)) if same else ((0, stride), (0, 0))
    y_bhwc = lax.conv_general_dilated(
        x_bhwc,
        kernel_hwio,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y_bhwc if same else y_bhwc[:, :-1]


def _reduce_3x3(reduce: Callable, x_bhwc: jax.Array, stride: int) -> jax.Array:
    """Reduce over windows of 3x3 without padding, one axis after the other.

    Three shifted slices for each axis are four times as fast as reduce_window on a CPU.
    """
    for axis in (1, 2):
        last = x_bhwc.shape[axis] - 3
        slices = [
            lax.slice_in_dim(x_bhwc, start, start + last + 1, stride, axis) for start in range(3)
        ]
        x_bhwc = functools.reduce(reduce, slices)
    return x_bhwc


def _max_pool(x_bhwc: jax.Array) -> jax.Array:
    """Halve the image: the maximum of 3x3 pixels at every other place."""
    return _reduce_3x3(jnp.maximum, x_bhwc, stride=2)


def _max_pool_same(x_bhwc: jax.Array) -> jax.Array:
    """Take the maximum around each pixel. The values are at least 0, as is the padding."""
    return _reduce_3x3(jnp.maximum, _padded(x_bhwc), stride=1)


def _average_pool_same(x_bhwc: jax.Array) -> jax.Array:
    """Average around each pixel, over the pixels that exist."""
    _, h, w, _ = x_bhwc.shape
    count_hw1 = np.outer(_neighbours(h), _neighbours(w))[..., None]
    return _reduce_3x3(jnp.add, _padded(x_bhwc), stride=1) * (1 / count_hw1)


def _padded(x_bhwc: jax.Array) -> jax.Array:
    return jnp.pad(x_bhwc, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _neighbours(size: int) -> np.ndarray:
    """Return how many of the pixels i - 1, i, i + 1 exist, for each i."""
    return np.convolve(np.ones(size, np.float32), np.ones(3, np.float32), "same")


def _chain(x_bhwc: jax.Array, *layers: Conv) -> jax.Array:
    for layer in layers:
        x_bhwc = layer(x_bhwc)
    return x_bhwc


def _join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class Mixed35(nn.Module):
    """A block at 35x35: branches of 1x1, 5x5, twice 3x3, and a pool."""

    pool: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(
            Conv(64, (1, 1), name="branch1x1")(x),
            _chain(x, Conv(48, (1, 1), name="branch5x5_1"), Conv(64, (5, 5), name="branch5x5_2")),
            _chain(
                x,
                Conv(64, (1, 1), name="branch3x3dbl_1"),
                Conv(96, (3, 3), name="branch3x3dbl_2"),
                Conv(96, (3, 3), name="branch3x3dbl_3"),
            ),
            Conv(self.pool, (1, 1), name="branch_pool")(_average_pool_same(x)),
        )


class Reduce35(nn.Module):
    """The block from 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(
            Conv(384, (3, 3), 2, same=False, name="branch3x3")(x),
            _chain(
                x,
                Conv(64, (1, 1), name="branch3x3dbl_1"),
                Conv(96, (3, 3), name="branch3x3dbl_2"),
                Conv(96, (3, 3), 2, same=False, name="branch3x3dbl_3"),
            ),
            _max_pool(x),
        )


class Mixed17(nn.Module):
    """A block at 17x17, with convolutions of 7x7 in two factors: rows and columns."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n = self.inner
        return _join(
            Conv(192, (1, 1), name="branch1x1")(x),
            _chain(
                x,
                Conv(n, (1, 1), name="branch7x7_1"),
                Conv(n, (1, 7), name="branch7x7_2"),
                Conv(192, (7, 1), name="branch7x7_3"),
            ),
            _chain(
                x,
                Conv(n, (1, 1), name="branch7x7dbl_1"),
                Conv(n, (7, 1), name="branch7x7dbl_2"),
                Conv(n, (1, 7), name="branch7x7dbl_3"),
                Conv(n, (7, 1), name="branch7x7dbl_4"),
                Conv(192, (1, 7), name="branch7x7dbl_5"),
            ),
            Conv(192, (1, 1), name="branch_pool")(_average_pool_same(x)),
        )


class Reduce17(nn.Module):
    """The block from 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(
            _chain(
                x,
                Conv(192, (1, 1), name="branch3x3_1"),
                Conv(320, (3, 3), 2, same=False, name="branch3x3_2"),
            ),
            _chain(
                x,
                Conv(192, (1, 1), name="branch7x7x3_1"),
                Conv(192, (1, 7), name="branch7x7x3_2"),
                Conv(192, (7, 1), name="branch7x7x3_3"),
                Conv(192, (3, 3), 2, same=False, name="branch7x7x3_4"),
            ),
            _max_pool(x),
        )


class Mixed8(nn.Module):
    """A block at 8x8, whose branches fork into a row and a column."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def fork(y: jax.Array, name: str) -> jax.Array:
            row = Conv(384, (1, 3), name=f"{name}a")(y)
            column = Conv(384, (3, 1), name=f"{name}b")(y)
            return _join(row, column)

        double = _chain(
            x, Conv(448, (1, 1), name="branch3x3dbl_1"), Conv(384, (3, 3), name="branch3x3dbl_2")
        )
        return _join(
            Conv(320, (1, 1), name="branch1x1")(x),
            fork(Conv(384, (1, 1), name="branch3x3_1")(x), "branch3x3_2"),
            fork(double, "branch3x3dbl_3"),
            Conv(192, (1, 1), name="branch_pool")(self.pool(x)),
        )


class Inception(nn.Module):
    """[b, 299, 299, 3] -> {"pool" [b, 2048], "spatial" [b, 2023], "logits" [b, 1008]}.

    `spatial` is flattened in the order h, w, c. The logits leave out the file's bias, as ADM's
    Inception Score does.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = Conv(32, (3, 3), 2, same=False, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), same=False, name="Conv2d_2a_3x3")(x)
        x = _max_pool(Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _max_pool(Conv(192, (3, 3), same=False, name="Conv2d_4a_3x3")(x))
        x = Mixed35(32, name="Mixed_5b")(x)
        x = Mixed35(64, name="Mixed_5c")(x)
        x = Mixed35(64, name="Mixed_5d")(x)
        x = Reduce35(name="Mixed_6a")(x)
        x = Mixed17(128, name="Mixed_6b")(x)
        x = Mixed17(160, name="Mixed_6c")(x)
        spatial = x = Mixed17(160, name="Mixed_6d")(x)
        x = Mixed17(192, name="Mixed_6e")(x)
        x = Reduce17(name="Mixed_7a")(x)
        x = Mixed8(_average_pool_same, name="Mixed_7b")(x)
        x = Mixed8(_max_pool_same, name="Mixed_7c")(x)
        pool_bc = x.mean(axis=(1, 2))
        kernel_io = self.param("fc", nn.initializers.zeros_init(), (2048, WIDTHS["logits"]))
        return {
            "pool": pool_bc,
            "spatial": spatial[..., :_SPATIAL_CHANNELS].reshape(len(x), -1),
            "logits": pool_bc @ kernel_io,
        }


def file_shapes() -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of pytorch-fid's file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (h, w, i, o) in _convolutions().items():
        shapes[f"{name}.conv.weight"] = (o, i, h, w)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (o,)
    classes = WIDTHS["logits"]
    return shapes | {"fc.weight": (classes, WIDTHS["pool"]), "fc.bias": (classes,)}


def _convolutions() -> dict[str, tuple[int, ...]]:
    """Return {name in the file: kernel shape} of every convolution, in the order of use."""
    x_bhwc = np.zeros((1, SIDE, SIDE, 3), np.float32)
    variables = jax.eval_shape(Inception().init, jax.random.key(0), x_bhwc)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {
        ".".join(key.key for key in path[:-1]): leaf.shape
        for path, leaf in leaves
        if path[-1].key == "kernel"
    }


def fold(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the parameters of `Inception` from the tensors of pytorch-fid's file."""
    params: dict[str, Any] = {"fc": np.ascontiguousarray(tensors["fc.weight"].T, np.float32)}
    for name in _convolutions():
        norm = {
            part: tensors[f"{name}.bn.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        }
        scale_o = norm["weight"] / np.sqrt(norm["running_var"] + _EPSILON)
        kernel_hwio = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale_o
        node = params
        for part in name.split("."):
            node = node.setdefault(part, {})
        node["kernel"] = np.ascontiguousarray(kernel_hwio, np.float32)
        node["bias"] = (norm["bias"] - norm["running_mean"] * scale_o).astype(np.float32)
    return params
