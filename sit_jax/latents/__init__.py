"""Codecs: the network sees pixels, or latents of Stable Diffusion's or another autoencoder."""

from collections.abc import Callable
from typing import NamedTuple

from sit_jax.latents.codec import Codec
from sit_jax.latents.pixels import open_pixels
from sit_jax.latents.sd_vae import PerDevice, VaeOptions, open_sd_vae
from sit_jax.latents.stored import open_stored


class CodecKind(NamedTuple):
    """How to open a codec, and a property that is known before that."""

    open: Callable[[VaeOptions, PerDevice], Codec]
    quantised: bool  # as in Codec


CODECS = {
    "pixels": CodecKind(lambda options, per_device: open_pixels(), quantised=True),
    "sd-vae": CodecKind(open_sd_vae, quantised=False),
    "stored": CodecKind(lambda options, per_device: open_stored(), quantised=False),
}
