"""Compiles the sampler of a setup, and draws images with it a batch at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sit_jax import config as config_lib
from sit_jax import hosts, rng, sharding
from sit_jax.data.source import short_digest
from sit_jax.errors import check, require
from sit_jax.image_io import to_uint8
from sit_jax.jobs.setup import Setup, call_with_batches, jit_for_batches, set_up
from sit_jax.jobs.workdir import Weights, restore_weights
from sit_jax.laws import in_group
from sit_jax.models.sit import in_compute_dtype
from sit_jax.sampling import guidance, ode, sde
from sit_jax.sampling.brownian import keyed_draw
from sit_jax.settings import Config, Sample, get
from sit_jax.transport.interval import Interval, ode_interval, sde_interval
from sit_jax.transport.prediction import Predict, velocity_and_score, velocity_field

# (params, indices_b, condition) -> (images_bfhwc in [-1, 1], x_bfhwc, evaluations). x is what the
# codec decoded to images; None for a codec with a decoder.
Sampler = Callable[[Any, np.ndarray, Any], tuple[jax.Array, jax.Array | None, jax.Array]]


class Samples(NamedTuple):
    """A batch of samples."""

    indices: np.ndarray
    images_bfhwc: np.ndarray  # uint8; of a codec without a decoder, false colours
    x_bfhwc: np.ndarray | None  # of a codec without a decoder
    evaluations: int  # of the network


@dataclasses.dataclass(frozen=True)
class Guide:
    """A weaker network to guide away from, with its weights.

    `network` is that of `setup`, for `weights`.
    """

    weights: Weights
    setup: Setup

    def network(self, local: Setup) -> Callable[..., jax.Array]:
        """Return (params, x_bhwc, t_b, condition) -> like x_bhwc, to run where `local` runs."""
        setup = dataclasses.replace(self.setup, is_per_device=local.is_per_device)
        return setup.network_for("sampling")


def make_sampler(setup: Setup, guide: Guide | None = None) -> Sampler:
    """Return a `Sampler`.

    It is compiled once, with the entire trajectory on the devices. Image i depends only on
    (sample.seed, i, its condition), not on the batch or the devices. f is sample.frames,
    or 1; the finished image comes last. Guidance points away from the null condition, or from
    `guide`.
    """
    return _call_with_guide(setup, guide, jit_sampler(setup, guide))


def jit_sampler(setup: Setup, guide: Guide | None = None) -> Callable:
    """Return the jitted function of `make_sampler`.

    Its arguments are ((params, the guide's params or None), codec_params, indices_b, condition).
    """

    def sample(params: Any, codec_params: Any, indices_b: jax.Array, condition: Any) -> Any:
        seed = setup.config.sample.seed
        noise_bhwc = rng.normal_by_index(seed, "sample", indices_b, setup.input_shape)
        return _sample_from_noise(
            setup, guide, params, codec_params, noise_bhwc, indices_b, condition
        )

    return jit_for_batches(setup, sample, _sampler_shardings(setup))


def make_sampler_from_noise(setup: Setup, guide: Guide | None = None) -> Callable:
    """Return a sampler like `make_sampler` of (params, noise_bhwc, indices_b, condition)."""

    def sample(params: Any, codec_params: Any, *batch: Any) -> Any:
        return _sample_from_noise(setup, guide, params, codec_params, *batch)

    compiled = jit_for_batches(setup, sample, _sampler_shardings(setup))
    return _call_with_guide(setup, guide, compiled)


def _sampler_shardings(setup: Setup) -> Any:
    batch = sharding.batch_sharding(setup.mesh)
    return batch, None if setup.codec.has_decoder else batch, sharding.replicated(setup.mesh)


def _sample_from_noise(
    setup: Setup,
    guide: Guide | None,
    params: Any,
    codec_params: Any,
    noise_bhwc: jax.Array,
    indices_b: jax.Array,
    condition: Any,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    options = setup.config.sample

    def solve(local: Setup, both_params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        noise_bhwc, indices_b, condition = batch
        guided = _guided(local, guide, both_params, condition)
        if options.solver in sde.SOLVERS:
            return _solve_sde(local, guided, noise_bhwc, indices_b)
        return _solve_ode(local, guided, noise_bhwc, _interval(local), options.frames)

    if _is_solved_per_device(setup):
        local = dataclasses.replace(setup, is_per_device=True)
        run = sharding.solve_per_device(setup.mesh, functools.partial(solve, local))
    else:
        run = functools.partial(solve, setup)
    x_bhwc = jax.lax.with_sharding_constraint(noise_bhwc, sharding.batch_sharding(setup.mesh))
    x, evaluations = run(params, (x_bhwc, indices_b, condition))
    x_bfhwc = x if options.frames else x[:, None]
    # The codec decodes all frames as one batch: [b, f, h, w, c] -> [b*f, h, w, c] and back.
    images = setup.codec.decode(codec_params, x_bfhwc.reshape(-1, *setup.input_shape))
    images_bfhwc = images.reshape(*x_bfhwc.shape[:2], *images.shape[1:])
    return images_bfhwc, None if setup.codec.has_decoder else x_bfhwc, evaluations


def _is_solved_per_device(setup: Setup) -> bool:
    """Return True if no device needs anything of another one, neither parameters nor errors."""
    options = setup.config.sample
    is_coupled = (
        options.solver in ode.ADAPTIVE and not options.grid and options.error_norm == "batch"
    )
    return sharding.is_data_parallel(setup.mesh) and not is_coupled


def make_inverter(setup: Setup, guide: Guide | None = None) -> Callable:
    """Return a function of (params, indices_b, records, condition), from images to noise and back.

    It follows the sampler's ODE from each image to its noise and back. It returns (noise_bhwc,
    images_bhwc in [-1, 1], error_b, evaluations). `error_b` is the RMS difference of the
    network's input before and after.
    """

    def invert(
        params: Any, codec_params: Any, indices_b: jax.Array, records: Any, condition: Any
    ) -> Any:
        guided = _guided(setup, guide, params, condition)
        seed = setup.config.sample.seed
        keys_b = jax.vmap(lambda i: rng.key(seed, "posterior", i))(indices_b)
        x_bhwc = setup.codec.encode(codec_params, keys_b, records)
        start, end = _interval(setup)
        noise_bhwc, evaluations_to_noise = _solve_ode(setup, guided, x_bhwc, (end, start))
        again_bhwc, evaluations_to_data = _solve_ode(setup, guided, noise_bhwc, (start, end))
        error_b = jnp.sqrt(jnp.mean((again_bhwc - x_bhwc) ** 2, axis=(1, 2, 3)))
        images_bhwc = setup.codec.decode(codec_params, again_bhwc)
        return noise_bhwc, images_bhwc, error_b, evaluations_to_noise + evaluations_to_data

    batch = sharding.batch_sharding(setup.mesh)
    shardings = (batch, batch, batch, sharding.replicated(setup.mesh))
    return _call_with_guide(setup, guide, jit_for_batches(setup, invert, shardings))


def _guided(setup: Setup, guide: Guide | None, both_params: Any, condition: Any) -> Predict:
    """Return the network with guidance, for `both_params` = (params, the guide's or None)."""
    options = setup.config.sample
    params = in_compute_dtype(both_params[0], setup.model.dtype)
    null = setup.conditioning.null_like(condition)
    network = functools.partial(setup.network_for("sampling"), params)

    def conditional(x: jax.Array, t_b: jax.Array) -> jax.Array:
        return network(x, t_b, condition)

    if guide:
        guide_params = in_compute_dtype(both_params[1], guide.setup.model.dtype)
        weaker = functools.partial(guide.network(setup), guide_params)
        both = guidance.in_two_calls(conditional, lambda x, t_b: weaker(x, t_b, condition))
    elif guidance.is_faster_in_one_call(setup.platform):
        both = guidance.in_one_call(network, condition, null)
    else:
        both = guidance.in_two_calls(conditional, lambda x, t_b: network(x, t_b, null))
    low, high = options.cfg_interval
    return guidance.with_guidance(
        conditional, both, options.cfg_scale, options.cfg_channels, (low, high)
    )


def _call_with_guide(setup: Setup, guide: Guide | None, compiled: Callable) -> Callable:
    call = call_with_batches(setup, compiled)
    guide_params = guide.weights.params if guide else None
    return lambda params, *batch: call((params, guide_params), *batch)


def _interval(setup: Setup) -> Interval:
    transport = setup.config.transport
    return ode_interval(setup.path, transport.prediction, transport.sample_eps)


def _solve_ode(
    setup: Setup, predict: Predict, x_bhwc: jax.Array, interval: Interval, frames: int | None = None
) -> tuple[jax.Array, jax.Array]:
    velocity = velocity_field(predict, setup.path, setup.config.transport.prediction)
    return ode.solve(velocity, x_bhwc, interval, setup.config.sample.ode, frames)


def _solve_sde(
    setup: Setup, predict: Predict, x_bhwc: jax.Array, indices_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    options = setup.config.sample
    transport = setup.config.transport
    last_step_size = options.last_step_size if options.last_step != "none" else 0.0
    keys_b = jax.vmap(lambda i: rng.key(options.seed, "sample noise", i))(indices_b)
    interval = sde_interval(
        setup.path,
        transport.prediction,
        options.diffusion_form,
        last_step_size,
        transport.sample_eps,
    )
    return sde.solve(
        velocity_and_score(predict, setup.path, transport.prediction),
        setup.path,
        x_bhwc,
        interval,
        keyed_draw(keys_b, setup.input_shape),
        options.sde,
        options.frames,
    )


def labels_of(setup: Setup, indices: np.ndarray) -> np.ndarray:
    """Return the label of each sample index, int32, as sample.label_draw says.

    Without sample.labels they are of all classes. A label of sample.labels_file is that of the
    sample with its number.
    """
    options = setup.config.sample
    labels = setup.sample_labels
    if options.label_draw == "random":
        return labels[rng.integers_by_index(options.seed, "sample label", indices, len(labels))]
    return labels[indices % len(labels)]


def check_decoder(setup: Setup) -> None:
    """Raise `UserError` unless samples are images: false colours cannot be scored."""
    check(
        setup.codec.has_decoder,
        f"latents.codec {setup.config.latents.codec!r} has no decoder, so that samples are not "
        "images to score; set latents.codec to the autoencoder of the latents, or decode "
        "samples.npz and give the images as --samples of --mode evaluate",
    )


def check_label_count(setup: Setup, key: str = "sample.count") -> None:
    """Raise `UserError` if sample.labels_file has fewer labels than the samples of a setting."""
    options = setup.config.sample
    count = len(hosts.run_on_all(lambda: setup.sample_labels))
    wanted = get(setup.config, key)
    check(
        options.labels_file is None or count >= wanted,
        f"sample.labels_file {options.labels_file!r} holds {count:,} labels, but {key} is "
        f"{wanted:,}; give a label for each sample, or lower {key}",
    )


def sample_images(
    setup: Setup, sampler: Sampler, params: Any, indices: np.ndarray
) -> Iterator[Samples]:
    """Yield samples a batch at a time.

    The last batch is padded to the size of the others, and its padding dropped. Raises
    `UserError` if a sample is not finite.
    """
    size = setup.sample_batch
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        padded = np.pad(chunk, (0, size - len(chunk)), mode="edge").astype(np.int32)
        condition = setup.conditioning.from_records({"label": labels_of(setup, padded)})
        images, x, evaluations = hosts.to_host(sampler(params, padded, condition))
        images = images[: len(chunk)]
        x = None if x is None else x[: len(chunk)]
        check_finite(images[:, -1], chunk)
        yield Samples(chunk, to_uint8(images), x, int(evaluations))


def whole_microbatches(
    setup: Setup, missing: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which samples to draw for those that are missing: (indices_n, is_missing_n).

    A microbatch, the rows of a device in one call, is always the same samples in the same order,
    so that kills and other numbers of devices leave no trace in the rounding. Past `count`, the
    last sample stands in.
    """
    size = setup.sample_batch // sharding.batch_shards(setup.mesh)
    microbatches = np.unique(missing // size)
    indices = (microbatches[:, None] * size + np.arange(size)).ravel()
    return np.minimum(indices, count - 1), np.isin(indices, missing)


def to_latents(note: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """Return latents in the units of their autoencoder: z = x / scale + shift, float32.

    x is [..., c]. `note` is the checkpoint's. Raises `UserError` if the run was not trained on
    stored latents.
    """
    scale, shift = _latent_units(note)
    return x / scale + shift


def from_latents(note: Mapping[str, Any], z: np.ndarray) -> np.ndarray:
    """Return x = scale (z - shift), the inverse of `to_latents`."""
    scale, shift = _latent_units(note)
    return scale * (z - shift)


def _latent_units(note: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    latents = require(
        note.get("data", {}).get("latents"),
        "the checkpoint does not record the scale of its latents, since it was not trained on "
        "stored ones; set latents.codec to the autoencoder of the run",
    )
    return np.asarray(latents["scale"], np.float32), np.asarray(latents["shift"], np.float32)


def check_finite(images_bhwc: np.ndarray, indices: np.ndarray) -> None:
    """Raise `UserError` that names the samples which are not finite."""
    bad = indices[~np.isfinite(images_bhwc).all(axis=(1, 2, 3))]
    check(
        not len(bad),
        f"samples {bad[:8].tolist()} are not finite; use more steps, looser tolerances or a lower "
        "cfg scale, or check whether training diverged",
    )


def open_guide(config: Config) -> Guide | None:
    """Return the newest checkpoint of the run that sample.guide names, or None.

    It is for autoguidance (Karras et al., arXiv 2406.02507). The run may be smaller and less
    trained, but must have the same data and transport: otherwise raises `UserError` that names the
    differences.
    """
    if config.sample.guide is None:
        return None
    folder = epath.Path(config.sample.guide)
    check(
        (folder / "config.json").exists(),
        f"sample.guide {config.sample.guide!r} is not a run; give a trained workdir",
    )
    guide_config = config_lib.read_recorded(folder / "config.json")
    differences = [
        f"{key} is {new!r} there and {old!r} here"
        for key, (old, new) in config_lib.changes(config, guide_config).items()
        if in_group(key, config_lib.SPACE)
    ]
    check(
        not differences,
        f"sample.guide {config.sample.guide!r} cannot guide this run: {', '.join(differences)}; "
        "give a run with the same data and transport",
    )
    setup = set_up(dataclasses.replace(config, model=guide_config.model, train=guide_config.train))
    return Guide(restore_weights(setup, folder, config.sample.weights), setup)


def sampler_name(options: Sample, step: int) -> str:
    """Return a readable name for the samples of these options."""
    return (
        f"step{step}-{options.weights}-{options.solver}-cfg{options.cfg_scale:g}-seed{options.seed}"
    )


def sampler_settings(setup: Setup, weights: Weights, guide: Guide | None) -> dict[str, Any]:
    """Return everything that a sampler's images depend on."""
    settings = {"step": weights.step, "checkpoint": weights.digest, **drawing_settings(setup)}
    if guide:
        settings["guide"] = {"step": guide.weights.step, "checkpoint": guide.weights.digest}
    return settings | setup.codec_settings()


def drawing_settings(setup: Setup) -> dict[str, Any]:
    """Return what a sampler's images depend on besides weights."""
    config = setup.config
    settings: dict[str, Any] = {
        "sample": dataclasses.asdict(config.sample),
        "transport": dataclasses.asdict(config.transport),
        "precision": {"compute": config.precision.compute, "matmul": setup.matmul("sampling")},
    }
    sample = settings["sample"]
    # The digest names the checkpoint, and the others change no image.
    for key in ("checkpoint", "count", "batch", "microbatch", "format", "columns", "scale"):
        if key != "scale" or not config.sample.frames:  # but strips of frames are enlarged
            del sample[key]
    if sample["label_draw"] == "balanced":  # as earlier versions, which had neither setting
        del sample["label_draw"]
    if sample.pop("labels_file") is not None:
        sample["labels_file"] = short_digest(setup.sample_labels.tobytes())
    return settings
