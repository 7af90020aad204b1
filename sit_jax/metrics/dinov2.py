"""DINOv2's ViT-L/14, whose class token FD-DINOv2 compares (Oquab et al., arXiv 2304.07193).

FD-DINOv2 is Stein et al., arXiv 2306.04675; their program dgm-eval, as it runs by default, decides
how images are prepared. Shape suffixes: b batch, t tokens (the class token, then patches row by
row), d width, s heads, h head width, f = (row, column, channel) of a patch, l layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.metrics import resize
from sit_jax.models.attention import einsum
from sit_jax.models.embeddings import patchify
from sit_jax.models.linear import Linear, SplitLinear

SIDE = 224  # pixels of the input
WIDTHS = {"pool": 1024}
_MEAN_C = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet
_STD_C = np.array([0.229, 0.224, 0.225], np.float32)
_EPSILON = 1e-6  # of the layer norms


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes of the network. `grid` is the side of the stored position embedding, in patches."""

    width: int = 1024
    depth: int = 24
    heads: int = 16
    patch: int = 14
    grid: int = 37


VIT_L = Architecture()


def prepare(x_bhwc: jax.Array) -> jax.Array:
    """Return images [b, h, w, 3] of 0 to 255 as the network's input [b, 224, 224, 3].

    They are resized in 8 bits, as Pillow does.
    """
    x_bhwc = resize.resize_as_uint8(x_bhwc, SIDE, resize.pillow_bicubic)
    return (x_bhwc / 255 - _MEAN_C) / _STD_C


def features(
    params: Any, x_bhwc: jax.Array, architecture: Architecture = VIT_L
) -> dict[str, jax.Array]:
    """Return the class token after the last norm, in full float32, as `pool` [b, d]."""
    with jax.default_matmul_precision("highest"):
        x_btd = ViT(architecture).apply({"params": params}, x_bhwc)
    return {"pool": cast(jax.Array, x_btd)[:, 0]}  # no mutable collections, so no tuple


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


class Block(nn.Module):
    """One layer, in scan's form: attention and MLP, each with a norm before and a scale after."""

    heads: int

    @nn.compact
    def __call__(self, x_btd: jax.Array, _: None) -> tuple[jax.Array, None]:
        b, t, d = x_btd.shape
        scales_2d = [self.param(name, nn.initializers.ones_init(), (d,)) for name in ("ls1", "ls2")]
        y_nd = _norm("norm1")(x_btd).reshape(b * t, d)
        qkv = SplitLinear((3, self.heads, d // self.heads), name="qkv")
        q_bsth, k_bsth, v_bsth = (
            part.reshape(b, t, self.heads, -1).transpose(0, 2, 1, 3) for part in qkv(y_nd)
        )
        y_nd = einsum(q_bsth, k_bsth, v_bsth).transpose(0, 2, 1, 3).reshape(b * t, d)
        x_btd += scales_2d[0] * Linear(d, name="proj")(y_nd).reshape(b, t, d)
        y_nd = _norm("norm2")(x_btd).reshape(b * t, d)
        y_nd = Linear(d, name="fc2")(nn.gelu(Linear(4 * d, name="fc1")(y_nd), approximate=False))
        return x_btd + scales_2d[1] * y_nd.reshape(b, t, d), None


class ViT(nn.Module):
    """[b, h, w, 3] -> [b, t, d], the tokens after the last norm."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        size = self.architecture
        patches_btf = patchify(x_bhwc, size.patch)
        b, t, f = patches_btf.shape
        x_btd = Linear(size.width, name="patch_embed")(patches_btf.reshape(b * t, f))
        class_d = self.param("cls_token", nn.initializers.zeros_init(), (size.width,))
        class_b1d = jnp.broadcast_to(class_d, (b, 1, size.width))
        x_btd = jnp.concatenate([class_b1d, x_btd.reshape(b, t, size.width)], axis=1)
        x_btd += self.param("pos_embed", nn.initializers.zeros_init(), (t + 1, size.width))
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=size.depth
        )
        x_btd, _ = stack(size.heads, name="blocks")(x_btd, None)
        return _norm("norm")(x_btd)


def file_shapes(architecture: Architecture = VIT_L) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of the published file."""
    d = architecture.width
    patch = architecture.patch
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, architecture.grid**2 + 1, d),
        "mask_token": (1, d),  # for training
        "patch_embed.proj.weight": (d, 3, patch, patch),
        "patch_embed.proj.bias": (d,),
    }
    for layer in range(architecture.depth):
        block: dict[str, tuple[int, ...]] = {"ls1.gamma": (d,), "ls2.gamma": (d,)}
        for name in ("norm1", "norm2"):
            block |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
        for name, (i, o) in _linear_layers(d).items():
            block |= {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


def _linear_layers(d: int) -> dict[str, tuple[int, int]]:
    """Return {name in a block of the file: (inputs, outputs)}."""
    return {
        "attn.qkv": (d, 3 * d),
        "attn.proj": (d, d),
        "mlp.fc1": (d, 4 * d),
        "mlp.fc2": (4 * d, d),
    }


def params_from_file(
    tensors: Mapping[str, np.ndarray], architecture: Architecture = VIT_L
) -> dict[str, Any]:
    """Return the parameters of `ViT` from the tensors of the published file.

    The position embedding is interpolated to the patches of a 224x224 image.
    """
    d = architecture.width

    def stacked(name: str) -> np.ndarray:
        return np.stack([tensors[f"blocks.{n}.{name}"] for n in range(architecture.depth)])

    def norm(weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
        return {"scale": weight, "bias": bias}

    blocks: dict[str, Any] = {
        name: norm(stacked(f"{name}.weight"), stacked(f"{name}.bias"))
        for name in ("norm1", "norm2")
    }
    blocks |= {name: stacked(f"{name}.gamma") for name in ("ls1", "ls2")}
    for name in _linear_layers(d):
        kernel_lio = np.ascontiguousarray(stacked(f"{name}.weight").swapaxes(1, 2))
        blocks[name.split(".")[1]] = {"kernel": kernel_lio, "bias": stacked(f"{name}.bias")}
    head = (3, architecture.heads, d // architecture.heads)
    blocks["qkv"] = {
        part: array.reshape(*array.shape[:-1], *head) for part, array in blocks["qkv"].items()
    }
    kernel_oihw = tensors["patch_embed.proj.weight"]
    return {
        "cls_token": tensors["cls_token"][0, 0],
        "pos_embed": _interpolated(tensors["pos_embed"][0], architecture),
        "patch_embed": {
            "kernel": np.ascontiguousarray(kernel_oihw.transpose(2, 3, 1, 0).reshape(-1, d)),
            "bias": tensors["patch_embed.proj.bias"],
        },
        "blocks": blocks,
        "norm": norm(tensors["norm.weight"], tensors["norm.bias"]),
    }


def _interpolated(position_td: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Return the position embedding of the patches of a 224x224 image, after the class token's."""
    grid = architecture.grid
    size = SIDE // architecture.patch
    position_yxd = position_td[1:].reshape(grid, grid, -1).astype(np.float64)
    weights_oi = _position_weights(grid, size)
    position_yxd = np.einsum("py,qx,yxd->pqd", weights_oi, weights_oi, position_yxd, optimize=True)
    patches_td = position_yxd.reshape(size**2, -1)
    return np.concatenate([position_td[:1], patches_td]).astype(np.float32)


def _position_weights(inputs: int, outputs: int) -> np.ndarray:
    """Return the weights [outputs, inputs] of PyTorch's bicubic interpolation (a = -3/4).

    As DINOv2 calls it: with the scale (outputs + 0.1) / inputs, and without antialiasing. Pixels
    beyond the border are those at the border.
    """
    places_o = (np.arange(outputs) + 0.5) * inputs / (outputs + 0.1) - 0.5
    weights_oi = np.zeros((outputs, inputs))
    for shift in range(-1, 3):
        pixels_o = np.floor(places_o).astype(int) + shift
        near_o = np.clip(pixels_o, 0, inputs - 1)
        weight_o = resize.cubic(np.abs(places_o - pixels_o), -0.75)
        np.add.at(weights_oi, (np.arange(outputs), near_o), weight_o)
    return weights_oi
