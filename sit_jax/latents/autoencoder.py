"""The autoencoder of latent diffusion, as diffusers' AutoencoderKL.

Rombach et al., arXiv 2112.10752, appendix G. Modules have the names that diffusers gives them, with
`_0` for `.0`, so that the tensors of a file are found by name.

Shape suffixes: b batch, h height, w width, c channels, t and u cells of the image (h*w).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sit_jax.precision import precision


@dataclasses.dataclass(frozen=True)
class VaeArchitecture:
    """The shape of an autoencoder.

    The defaults are those of the published stabilityai/sd-vae-ft-ema and -mse: 83,653,863
    parameters.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # from the image inwards
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 4
    image_channels: int = 3

    @property
    def factor(self) -> int:
        """Image pixels along one side of a latent cell."""
        return 2 ** (len(self.block_out_channels) - 1)


def _norm(groups: int, dtype: Any, name: str) -> nn.Module:
    """Return a GroupNorm with its statistics in float32 whatever the compute dtype."""
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def _conv(
    channels: int, size: int, dtype: Any, name: str | None = None, **spacing: Any
) -> nn.Module:
    return nn.Conv(
        channels, (size, size), dtype=dtype, precision=precision(dtype), name=name, **spacing
    )


class Resnet(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    channels: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        hidden = nn.silu(_norm(self.groups, self.dtype, "norm1")(x_bhwc))
        hidden = _conv(self.channels, 3, self.dtype, "conv1")(hidden)
        hidden = nn.silu(_norm(self.groups, self.dtype, "norm2")(hidden))
        hidden = _conv(self.channels, 3, self.dtype, "conv2")(hidden)
        if x_bhwc.shape[-1] != self.channels:
            x_bhwc = _conv(self.channels, 1, self.dtype, "conv_shortcut")(x_bhwc)
        return x_bhwc + hidden


class SpatialAttention(nn.Module):
    """Self-attention of one head over all cells of the image, with the softmax in float32.

    Not the `Attention` of the SiT, which has several heads and no norm of its own.
    """

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        b, h, w, c = x_bhwc.shape
        x_btc = _norm(self.groups, self.dtype, "group_norm")(x_bhwc).reshape(b, h * w, c)
        dense = functools.partial(nn.Dense, c, dtype=self.dtype, precision=precision(self.dtype))
        product = functools.partial(jnp.einsum, precision=precision(self.dtype))
        q_btc, k_btc, v_btc = (dense(name=f"to_{name}")(x_btc) for name in "qkv")
        logits_btu = product(
            "btc,buc->btu", q_btc * c**-0.5, k_btc, preferred_element_type=jnp.float32
        )
        out_btc = product("btu,buc->btc", jax.nn.softmax(logits_btu).astype(self.dtype), v_btc)
        return x_bhwc + dense(name="to_out_0")(out_btc).reshape(b, h, w, c)


class MidBlock(nn.Module):
    """The layers at the lowest resolution."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        channels = x_bhwc.shape[-1]
        x_bhwc = Resnet(channels, self.groups, self.dtype, name="resnets_0")(x_bhwc)
        x_bhwc = SpatialAttention(self.groups, self.dtype, name="attentions_0")(x_bhwc)
        return Resnet(channels, self.groups, self.dtype, name="resnets_1")(x_bhwc)


class Downsample(nn.Module):
    """A convolution that halves both sides."""

    dtype: Any

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        # Pad with zeros at the bottom and on the right only.
        padding = ((0, 1), (0, 1))
        return _conv(x_bhwc.shape[-1], 3, self.dtype, "conv", strides=2, padding=padding)(x_bhwc)


class Upsample(nn.Module):
    """Nearest-neighbour doubling of both sides, then a convolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        nearest = x_bhwc.repeat(2, axis=1).repeat(2, axis=2)
        return _conv(x_bhwc.shape[-1], 3, self.dtype, "conv")(nearest)


class Stage(nn.Module):
    """Resnets at one resolution, then the step to the next resolution."""

    channels: int
    layers: int
    groups: int
    dtype: Any
    resample: type[Downsample] | type[Upsample] | None

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        for layer in range(self.layers):
            x_bhwc = Resnet(self.channels, self.groups, self.dtype, name=f"resnets_{layer}")(x_bhwc)
        if self.resample is None:
            return x_bhwc
        name = {Downsample: "downsamplers_0", Upsample: "upsamplers_0"}[self.resample]
        return self.resample(self.dtype, name=name)(x_bhwc)


class Encoder(nn.Module):
    """Images -> moments of the posterior, before the last convolution."""

    architecture: VaeArchitecture
    dtype: Any

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        a = self.architecture
        x_bhwc = _conv(a.block_out_channels[0], 3, self.dtype, "conv_in")(x_bhwc)
        for i, channels in enumerate(a.block_out_channels):
            resample = Downsample if i + 1 < len(a.block_out_channels) else None
            stage = Stage(
                channels,
                a.layers_per_block,
                a.norm_num_groups,
                self.dtype,
                resample,
                name=f"down_blocks_{i}",
            )
            x_bhwc = stage(x_bhwc)
        x_bhwc = MidBlock(a.norm_num_groups, self.dtype, name="mid_block")(x_bhwc)
        x_bhwc = nn.silu(_norm(a.norm_num_groups, self.dtype, "conv_norm_out")(x_bhwc))
        return _conv(2 * a.latent_channels, 3, self.dtype, "conv_out")(x_bhwc)


class Decoder(nn.Module):
    """Latents, after the first convolution -> images."""

    architecture: VaeArchitecture
    dtype: Any

    @nn.compact
    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        a = self.architecture
        x_bhwc = _conv(a.block_out_channels[-1], 3, self.dtype, "conv_in")(x_bhwc)
        x_bhwc = MidBlock(a.norm_num_groups, self.dtype, name="mid_block")(x_bhwc)
        for i, channels in enumerate(reversed(a.block_out_channels)):
            resample = Upsample if i + 1 < len(a.block_out_channels) else None
            layers = a.layers_per_block + 1
            stage = Stage(
                channels, layers, a.norm_num_groups, self.dtype, resample, name=f"up_blocks_{i}"
            )
            x_bhwc = stage(x_bhwc)
        x_bhwc = nn.silu(_norm(a.norm_num_groups, self.dtype, "conv_norm_out")(x_bhwc))
        return _conv(a.image_channels, 3, self.dtype, "conv_out")(x_bhwc)


class AutoencoderKL(nn.Module):
    """Encoder and decoder.

    Activations and matmuls are in `dtype`; parameters, norms, softmax and outputs in float32.
    """

    architecture: VaeArchitecture
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.architecture, self.dtype)
        self.decoder = Decoder(self.architecture, self.dtype)
        self.quant_conv = _conv(2 * self.architecture.latent_channels, 1, self.dtype)
        self.post_quant_conv = _conv(self.architecture.latent_channels, 1, self.dtype)

    def encode(self, images_bhwc: jax.Array) -> jax.Array:
        """Return mean and log variance of the posterior of images in [-1, 1].

        They are concatenated along the channels.
        """
        moments_bhwc = self.quant_conv(self.encoder(images_bhwc)).astype(jnp.float32)
        mean, logvar = jnp.split(moments_bhwc, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, -30.0, 20.0)], axis=-1)

    def decode(self, z_bhwc: jax.Array) -> jax.Array:
        """Return images, about [-1, 1], of unscaled latents."""
        return self.decoder(self.post_quant_conv(z_bhwc)).astype(jnp.float32)

    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        """Encode and decode, which creates all parameters."""
        return self.decode(self.encode(images_bhwc)[..., : self.architecture.latent_channels])


@functools.cache
def abstract_params(architecture: VaeArchitecture) -> Any:
    """Return shapes and dtypes of the parameters."""
    factor = architecture.factor
    image_bhwc = jnp.zeros((1, factor, factor, architecture.image_channels))
    init = AutoencoderKL(architecture).init
    return jax.eval_shape(init, jax.random.key(0), image_bhwc)["params"]
