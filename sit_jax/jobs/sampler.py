"""From a setup to a compiled sampler, and images from it a batch at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sit_jax import config as config_lib
from sit_jax import hosts, rng, sharding
from sit_jax.data.transforms import normalise
from sit_jax.errors import check
from sit_jax.image_io import sheet, to_uint8
from sit_jax.jobs.setup import Setup, call_with_batches, jit_for_batches, set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.sampling import ode, sde
from sit_jax.sampling.brownian import keyed_draw
from sit_jax.sampling.guidance import guide
from sit_jax.settings import Config, Sample
from sit_jax.transport.interval import Interval, ode_interval, sde_interval
from sit_jax.transport.prediction import Predict, velocity_and_score, velocity_field

Sampler = Callable[[Any, np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Guide:
    """The network that guidance leads away from, with its weights: `(params, x_bhwc, t_b, labels_b) -> like x_bhwc`."""

    step: int  # of its checkpoint
    network: Callable[..., jax.Array]
    params: Any


def make_sampler(setup: Setup, weak: Guide | None = None) -> Sampler:
    """`(params, indices_b, labels_b) -> (images_bfhwc in [-1, 1], evaluations)`, compiled once, trajectory and all.

    Image i depends on (sample.seed, i, its label) alone, whatever batch and devices it is made with. f counts
    sample.frames, or is 1: the finished image comes last. Guidance leads away from the null label, or from `weak`.
    """
    return _call(setup, weak, jit_sampler(setup, weak))


def jit_sampler(setup: Setup, weak: Guide | None = None) -> Callable:
    """The jitted function of `make_sampler`: `((params, weak's or None), codec_params, indices_b, labels_b)`."""
    options = setup.config.sample

    def run(params, codec_params, indices_b, labels_b):
        guided = _guided(setup, weak, params, labels_b)
        x_bhwc = rng.normal_by_index(options.seed, "sample", indices_b, setup.input_shape)
        x_bhwc = jax.lax.with_sharding_constraint(x_bhwc, sharding.batch_sharding(setup.mesh))
        if options.solver in sde.SOLVERS:
            x, evaluations = _solve_sde(setup, guided, x_bhwc, indices_b)
        else:
            x, evaluations = _solve_ode(setup, guided, x_bhwc, _interval(setup), options.frames)
        x_bfhwc = x if options.frames else x[:, None]
        images = setup.codec.decode(codec_params, x_bfhwc.reshape(-1, *setup.input_shape))
        return images.reshape(*x_bfhwc.shape[:2], *images.shape[1:]), evaluations

    return jit_for_batches(
        setup, run, (sharding.batch_sharding(setup.mesh), sharding.replicated(setup.mesh))
    )


def make_inverter(setup: Setup, weak: Guide | None = None) -> Callable:
    """`(params, indices_b, images_bhwc uint8, labels_b) -> (noise_bhwc, images_bhwc in [-1, 1], error_b, evaluations)`.

    Along the ODE of the sampler from each image to its noise, and back: `error_b` is the RMS difference that is left
    in what the network sees.
    """

    def run(params, codec_params, indices_b, images_bhwc, labels_b):
        guided = _guided(setup, weak, params, labels_b)
        keys_b = jax.vmap(lambda i: rng.key(setup.config.sample.seed, "posterior", i))(indices_b)
        x_bhwc = setup.codec.encode(codec_params, keys_b, normalise(images_bhwc))
        start, end = _interval(setup)
        noise_bhwc, there = _solve_ode(setup, guided, x_bhwc, (end, start))
        again_bhwc, back = _solve_ode(setup, guided, noise_bhwc, (start, end))
        error_b = jnp.sqrt(jnp.mean((again_bhwc - x_bhwc) ** 2, axis=(1, 2, 3)))
        return noise_bhwc, setup.codec.decode(codec_params, again_bhwc), error_b, there + back

    batch, one = sharding.batch_sharding(setup.mesh), sharding.replicated(setup.mesh)
    return _call(setup, weak, jit_for_batches(setup, run, (batch, batch, batch, one)))


def _guided(setup: Setup, weak: Guide | None, both_params: Any, labels_b: jax.Array) -> Predict:
    options, (params, weak_params) = setup.config.sample, both_params

    def conditional(x, t_b):
        return setup.network(params, x, t_b, labels_b)

    def unconditional(x, t_b):
        if weak:
            return weak.network(weak_params, x, t_b, labels_b)
        return setup.network(params, x, t_b, jnp.full_like(labels_b, setup.null_label))

    return guide(
        conditional, unconditional, options.cfg_scale, options.cfg_channels, options.cfg_interval
    )


def _call(setup: Setup, weak: Guide | None, compiled: Callable) -> Callable:
    call = call_with_batches(setup, compiled)
    return lambda params, *batch: call((params, weak.params if weak else None), *batch)


def _interval(setup: Setup) -> Interval:
    transport = setup.config.transport
    return ode_interval(setup.path, transport.prediction, transport.sample_eps)


def _solve_ode(
    setup: Setup, predict: Predict, x_bhwc: jax.Array, interval: Interval, frames: int | None = None
) -> tuple[jax.Array, jax.Array]:
    options = setup.config.sample
    return ode.solve(
        velocity_field(predict, setup.path, setup.config.transport.prediction),
        x_bhwc,
        interval,
        solver=options.solver,
        steps=options.grid,
        shift=options.time_shift,
        atol=options.atol,
        rtol=options.rtol,
        error_norm=options.error_norm,
        frames=frames,
    )


def _solve_sde(
    setup: Setup, predict: Predict, x_bhwc: jax.Array, indices_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    options, transport = setup.config.sample, setup.config.transport
    size = options.last_step_size if options.last_step != "none" else 0.0
    keys_b = jax.vmap(lambda i: rng.key(options.seed, "sample noise", i))(indices_b)
    return sde.solve(
        velocity_and_score(predict, setup.path, transport.prediction),
        setup.path,
        x_bhwc,
        sde_interval(
            setup.path, transport.prediction, options.diffusion_form, size, transport.sample_eps
        ),
        keyed_draw(keys_b, setup.input_shape),
        solver=options.solver,
        steps=options.grid,
        shift=options.time_shift,
        form=options.diffusion_form,
        norm=options.diffusion_norm,
        last_step=options.last_step,
        last_step_size=options.last_step_size,
        frames=options.frames,
    )


def labels_of(setup: Setup, indices: np.ndarray) -> np.ndarray:
    """The label of each sample index, int32: the chosen labels in turn, or the classes in turn."""
    labels = np.asarray(setup.config.sample.labels or range(setup.config.data.classes), np.int32)
    return labels[indices % len(labels)]


def sample_images(
    setup: Setup, sampler: Sampler, params: Any, indices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields (indices, uint8 images [b, f, h, w, c], network evaluations) a batch at a time.

    The last batch is padded, and cut again.
    """
    size = setup.config.sample.batch
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        padded = np.pad(chunk, (0, size - len(chunk)), mode="edge").astype(np.int32)
        images, evaluations = hosts.to_host(sampler(params, padded, labels_of(setup, padded)))
        images = images[: len(chunk)]
        bad = chunk[~np.isfinite(images[:, -1]).all(axis=(1, 2, 3))]
        check(
            not len(bad),
            f"samples {bad[:8].tolist()} are not finite; use more steps, looser tolerances or a lower cfg scale, "
            "or look whether training diverged",
        )
        yield chunk, to_uint8(images), int(evaluations)


def make_sheet(setup: Setup, images: np.ndarray) -> np.ndarray:
    return sheet(images, setup.config.sample.columns, scale=setup.config.sample.scale)


def open_guide(config: Config) -> Guide | None:
    """The newest checkpoint of the run that sample.guide names, for autoguidance (Karras et al., arXiv 2406.02507).

    It may be smaller and less trained, but must be of the same data and transport; `UserError` names what is not.
    """
    if config.sample.guide is None:
        return None
    folder = epath.Path(config.sample.guide)
    check(
        (folder / "config.json").exists(),
        f"sample.guide {config.sample.guide!r} holds no run; give a trained workdir",
    )
    theirs = config_lib.load(str(folder / "config.json"))
    shared = [key for key in config_lib.NETWORK if key != "model."]
    differing = [
        f"{key} is {new!r} there and {old!r} here"
        for key, (old, new) in config_lib.changes(config, theirs).items()
        if key.startswith(tuple(shared))
    ]
    check(
        not differing,
        f"sample.guide {config.sample.guide!r} cannot guide this run: {', '.join(differing)}",
    )
    setup = set_up(dataclasses.replace(config, model=theirs.model))
    step, params = restore_weights(setup, folder, config.sample.weights)
    return Guide(step, setup.network, params)


def sampler_name(options: Sample, step: int) -> str:
    """What a person knows a set of samples by."""
    return (
        f"step{step}-{options.weights}-{options.solver}-cfg{options.cfg_scale:g}-seed{options.seed}"
    )


def sampler_settings(config: Config, step: int, weak: Guide | None) -> dict[str, Any]:
    """All that the images of a sampler follow from."""
    settings = {
        "step": step,
        **dataclasses.asdict(config.sample),
        **dataclasses.asdict(config.transport),
    }
    if weak:
        settings["guide_step"] = weak.step
    for key in ("count", "batch", "columns", "scale"):  # these change no image
        del settings[key]
    if config.latents.codec != "pixels":
        settings["latents"] = dataclasses.asdict(dataclasses.replace(config.latents, batch=None))
    return settings
