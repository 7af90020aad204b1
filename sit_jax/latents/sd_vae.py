"""Stable Diffusion's autoencoder as a codec: x is a draw from the posterior of an image's latents, times `scale`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sit_jax.errors import check
from sit_jax.latents import files
from sit_jax.latents.autoencoder import AutoencoderKL, abstract_params
from sit_jax.latents.codec import Codec, Shape

Apply = Callable[[dict, jax.Array], jax.Array]  # (params, x_b) -> y_b, each row by itself


def open_sd_vae(
    *,
    path: str | None,
    repo: str | None,
    revision: str | None,
    dtype: str,
    scale: float,
    batch: int,
    per_device: Callable[[Apply], Apply] = lambda apply: apply,
) -> Codec:
    """The codec of the files in a folder or a repository (`files.Source`).

    At most `batch` images go through the network at once on each device, so that memory does not grow with the batch;
    `per_device` lets each device of a mesh do its rows. float32 is full float32 on every chip. Weights are read by
    `load` alone.

    `UserError` for a file that is not there or describes another network.
    """
    source = files.Source(path, repo, revision)
    architecture = files.read_architecture(source, scale)
    vae = AutoencoderKL(architecture, jnp.dtype(dtype))

    def applied(method: Callable) -> Apply:
        def apply(params, x_bhwc):
            with jax.default_matmul_precision("highest"):
                return vae.apply({"params": params}, x_bhwc, method=method)

        return per_device(_in_batches(apply, batch))

    moments_of, images_of = applied(AutoencoderKL.encode), applied(AutoencoderKL.decode)

    def encode(params, keys_b, images_bhwc):
        mean, logvar = jnp.split(moments_of(params, images_bhwc), 2, axis=-1)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys_b)
        return scale * (mean + jnp.exp(logvar / 2) * noise)

    def shape(image: Shape) -> Shape:
        height, width, channels = image
        factor, wanted = architecture.factor, architecture.image_channels
        check(
            channels == wanted,
            f"data.channels is {channels}, but this VAE encodes {wanted}; set it to {wanted}",
        )
        check(
            height % factor == 0 and width % factor == 0,
            f"data.image_size is {height}, but one cell of this VAE is {factor} pixels; make it a multiple of {factor}",
        )
        return height // factor, width // factor, architecture.latent_channels

    abstract = abstract_params(architecture)
    return Codec(
        encode=encode,
        decode=lambda params, x_bhwc: images_of(params, x_bhwc / scale),
        shape=shape,
        abstract_params=abstract,
        load=lambda: files.read_params(source, abstract),
        scale=scale,
    )


def _in_batches(apply: Apply, size: int) -> Apply:
    """`apply` to equal parts of at most `size` rows, one after the other."""

    def run(params, x_b):
        rows = max(n for n in range(1, min(size, len(x_b)) + 1) if len(x_b) % n == 0)
        y_nb = jax.lax.map(
            lambda part_b: apply(params, part_b), x_b.reshape(-1, rows, *x_b.shape[1:])
        )
        return y_nb.reshape(len(x_b), *y_nb.shape[2:])

    return run
