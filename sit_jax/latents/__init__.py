"""What the network sees of an image: its pixels, or the latents of Stable Diffusion's autoencoder."""

from typing import Any

from sit_jax.latents.codec import PIXELS, Codec
from sit_jax.latents.sd_vae import open_sd_vae

CODECS = ("pixels", "sd-vae")


def open_codec(codec: str, **options: Any) -> Codec:
    """A codec by its name in CODECS. `options` are `open_sd_vae`'s; pixels have none."""
    return PIXELS if codec == "pixels" else open_sd_vae(**options)
