"""Stable Diffusion's autoencoder as a codec: x is `scale` times a draw from the posterior."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from sit_jax.errors import check
from sit_jax.latents import files, posterior
from sit_jax.latents.autoencoder import AutoencoderKL, VaeArchitecture, abstract_params
from sit_jax.latents.codec import Codec, Records, Shape
from sit_jax.latents.pixels import normalise
from sit_jax.record import RecordSpec

Apply = Callable[[Any, jax.Array], jax.Array]  # (params, x_b) -> y_b, each row by itself
PerDevice = Callable[[Apply], Apply]


@dataclasses.dataclass(frozen=True)
class VaeOptions:
    """Where the files are (see `files.VaeFiles`) and how the network runs."""

    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    scale: float = 0.18215
    batch: int = 8
    matmul: str = "highest"


def open_sd_vae(options: VaeOptions, per_device: PerDevice = lambda apply: apply) -> Codec:
    """Return the codec of the files in a folder or a repository.

    At most `options.batch` images pass through the network at once on each device, so memory does
    not grow with the batch. `per_device` lets each device of a mesh process its own rows. With
    matmul "highest", float32 means full float32 on every chip. Only `load` reads weights.

    Raises `UserError` for a file that does not exist or that describes another network.
    """
    source = files.VaeFiles(options.path, options.repo, options.revision)
    architecture = files.read_architecture(source, options.scale)
    vae = AutoencoderKL(architecture, jnp.dtype(options.dtype))
    scale = options.scale

    def applied(method: Callable) -> Apply:
        def apply(params: Any, x_bhwc: jax.Array) -> jax.Array:
            with jax.default_matmul_precision(options.matmul):
                y_bhwc = vae.apply({"params": params}, x_bhwc, method=method)
            return cast(jax.Array, y_bhwc)  # no mutable collections, so no tuple

        return per_device(_in_batches(apply, options.batch))

    moments_of = applied(AutoencoderKL.encode)
    images_of = applied(AutoencoderKL.decode)

    def moments(params: Any, records: Records) -> jax.Array:
        return moments_of(params, normalise(records["image"]))

    def encode(params: Any, keys_b: jax.Array, records: Records) -> jax.Array:
        if "moments" in records:
            return posterior.draw_stored(keys_b, records)
        return scale * posterior.draw(keys_b, moments(params, records))

    abstract = abstract_params(architecture)
    return Codec(
        encode=encode,
        decode=lambda params, x_bhwc: images_of(params, x_bhwc / scale),
        shape=functools.partial(_shape, architecture),
        abstract_params=abstract,
        load=lambda: files.read_params(source, abstract),
        quantised=False,
        scale=scale,
        moments=moments,
        encoder=lambda params: {name: params[name] for name in ("encoder", "quant_conv")},
    )


def _shape(architecture: VaeArchitecture, spec: RecordSpec) -> Shape:
    if "moments" in spec:
        return _stored_shape(architecture, spec)
    height, width, channels = spec["image"].shape
    factor = architecture.factor
    image_channels = architecture.image_channels
    check(
        channels == image_channels,
        f"data.channels is {channels}, but this VAE encodes {image_channels}; set it to "
        f"{image_channels}",
    )
    check(
        height % factor == 0 and width % factor == 0,
        f"data.image_size is {height}, but one cell of this VAE is {factor} pixels; make it a "
        f"multiple of {factor}",
    )
    return height // factor, width // factor, architecture.latent_channels


def _stored_shape(architecture: VaeArchitecture, spec: RecordSpec) -> Shape:
    height, width, moments = spec["moments"].shape
    channels = moments // 2
    expected = architecture.latent_channels
    check(
        channels == expected,
        f"data.channels is {channels}, but the latents of this VAE have {expected}; set it to "
        f"{expected}, or latents.codec=stored for those of another autoencoder",
    )
    return height, width, channels


def _in_batches(apply: Apply, size: int) -> Apply:
    """Apply to equal parts of at most `size` rows, one after the other."""

    def run(params: Any, x_b: jax.Array) -> jax.Array:
        rows = max(n for n in range(1, min(size, len(x_b)) + 1) if len(x_b) % n == 0)
        parts_nb = x_b.reshape(-1, rows, *x_b.shape[1:])
        y_nb = jax.lax.map(lambda part_b: apply(params, part_b), parts_nb)
        return y_nb.reshape(len(x_b), *y_nb.shape[2:])

    return run
