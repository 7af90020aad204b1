"""`--mode sample`: images from a run's newest checkpoint, as single PNGs and one sheet."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from sit_jax import rng, sharding, storage, train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import check
from sit_jax.image_io import ImageWriter, encode_png, sheet, to_uint8
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.sampling import ode, sde
from sit_jax.sampling.brownian import keyed_draw
from sit_jax.sampling.guidance import guide
from sit_jax.settings import Config
from sit_jax.transport.interval import ode_interval, sde_interval
from sit_jax.transport.prediction import Predict, velocity_and_score, velocity_field

Sampler = Callable[[Any, np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]


def make_sampler(setup: Setup) -> Sampler:
    """`(params, indices_b, labels_b) -> (images_bhwc in [-1, 1], evaluations)`, compiled once, trajectory and all.

    Image i depends on (sample.seed, i, its label) alone, whatever batch and devices it is made with.
    """
    compiled = jit_sampler(setup)
    return lambda params, *rows: compiled(params, *sharding.put_batch(setup.mesh, rows))


def jit_sampler(setup: Setup) -> Callable:
    """The jitted function of `make_sampler`, which takes indices and labels that lie on the devices."""
    options = setup.config.sample

    def run(params, indices_b, labels_b):
        def predict(y_b):
            return lambda x, t_b: setup.network(params, x, t_b, y_b)

        null_b = jnp.full_like(labels_b, setup.null_label)
        guided = guide(
            predict(labels_b), predict(null_b), options.cfg_scale, options.cfg_channels, options.cfg_interval
        )
        x_bhwc = rng.normal_by_index(options.seed, "sample", indices_b, setup.input_shape)
        x_bhwc = jax.lax.with_sharding_constraint(x_bhwc, sharding.batch_sharding(setup.mesh))
        solve = _solve_sde if options.solver in sde.SOLVERS else _solve_ode
        x_bhwc, evaluations = solve(setup, guided, x_bhwc, indices_b)
        return setup.codec.decode(x_bhwc), evaluations

    def in_precision(*args):
        with jax.default_matmul_precision(setup.config.precision.matmul or "highest"):
            return run(*args)

    images_and_count = sharding.batch_sharding(setup.mesh), sharding.replicated(setup.mesh)
    return jax.jit(in_precision, out_shardings=images_and_count)


def _solve_ode(setup: Setup, predict: Predict, x_bhwc: jax.Array, indices_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    options, transport = setup.config.sample, setup.config.transport
    return ode.solve(
        velocity_field(predict, setup.path, transport.prediction),
        x_bhwc,
        ode_interval(setup.path, transport.prediction, transport.sample_eps),
        solver=options.solver,
        steps=options.steps,
        shift=options.time_shift,
        atol=options.atol,
        rtol=options.rtol,
        error_norm=options.error_norm,
    )


def _solve_sde(setup: Setup, predict: Predict, x_bhwc: jax.Array, indices_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    options, transport = setup.config.sample, setup.config.transport
    size = options.last_step_size if options.last_step != "none" else 0.0
    keys_b = jax.vmap(lambda i: rng.key(options.seed, "sample noise", i))(indices_b)
    return sde.solve(
        velocity_and_score(predict, setup.path, transport.prediction),
        setup.path,
        x_bhwc,
        sde_interval(setup.path, transport.prediction, options.diffusion_form, size, transport.sample_eps),
        keyed_draw(keys_b, setup.input_shape),
        solver=options.solver,
        steps=options.steps,
        form=options.diffusion_form,
        norm=options.diffusion_norm,
        last_step=options.last_step,
        last_step_size=options.last_step_size,
    )


def labels_of(setup: Setup, indices: np.ndarray) -> np.ndarray:
    """The label of each sample index, int32: the chosen labels in turn, or the classes in turn."""
    labels = np.asarray(setup.config.sample.labels or range(setup.config.data.classes), np.int32)
    return labels[indices % len(labels)]


def sample_images(
    setup: Setup, sampler: Sampler, params: Any, indices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields (indices, uint8 images, network evaluations) a batch at a time; the last one is padded, and cut again."""
    size = setup.config.sample.batch
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        padded = np.pad(chunk, (0, size - len(chunk)), mode="edge").astype(np.int32)
        images, evaluations = jax.device_get(sampler(params, padded, labels_of(setup, padded)))
        images = images[: len(chunk)]
        bad = chunk[~np.isfinite(images).all(axis=(1, 2, 3))]
        check(
            not len(bad),
            f"samples {bad[:8].tolist()} are not finite; use more steps, looser tolerances or a lower cfg scale, "
            "or look whether training diverged",
        )
        yield chunk, to_uint8(images), int(evaluations)


def make_sheet(setup: Setup, images: np.ndarray) -> np.ndarray:
    return sheet(images, setup.config.sample.columns, scale=setup.config.sample.scale)


def newest_whole(checkpoints: Checkpoints) -> int | None:
    """The newest step that can be trusted, after a warning for each newer one that cannot."""
    step, problems = checkpoints.newest_whole()
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return step


def restore_weights(setup: Setup, workdir: epath.Path) -> tuple[int, Any]:
    """The newest checkpoint's step, and its EMA or raw parameters as sample.weights says.

    `UserError` if there is none.
    """
    which = {"ema": "ema", "raw": "params"}[setup.config.sample.weights]
    folder = workdir / "checkpoints"
    check(folder.exists(), f"--workdir {str(workdir)!r} has no checkpoints; train first, with --mode train")
    target = getattr(train_state.abstract(setup.init_params, setup.optimizer, setup.mesh), which)
    with Checkpoints(folder, train_state.CHECKPOINT_ITEMS) as checkpoints:
        step = newest_whole(checkpoints)
        check(step is not None, f"{str(folder)!r} holds no whole checkpoint; train first, with --mode train")
        return step, checkpoints.restore(step, {which: target})[which]


def run(config: Config, workdir: epath.Path) -> None:
    """Writes workdir/samples/NAME/{000000.png, ..., sheet.png, settings.json}; what is there is not made again."""
    setup = set_up(config)
    step, params = restore_weights(setup, workdir)
    settings = {"step": step, **dataclasses.asdict(config.sample), **dataclasses.asdict(config.transport)}
    for key in ("count", "batch", "columns", "scale"):  # these change no image
        del settings[key]
    text = json.dumps(settings, indent=2)
    options = config.sample
    name = f"step{step}-{options.weights}-{options.solver}-cfg{options.cfg_scale:g}-seed{options.seed}"
    folder = workdir / "samples" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    writer = ImageWriter(storage.make_workdir(folder))
    storage.write_text(folder / "settings.json", text + "\n")
    missing = np.asarray(writer.missing(config.sample.count))
    print(f"sampling {len(missing)} of {config.sample.count} images from step {step} into {folder}", flush=True)
    with tqdm(total=len(missing), unit="image", disable=None) as bar:
        for indices, images, evaluations in sample_images(setup, make_sampler(setup), params, missing):
            for index, image in zip(indices, images, strict=True):
                writer.write(int(index), image)
            bar.update(len(indices))
            bar.set_postfix(evaluations=evaluations)
    shown = [writer.read(index) for index in range(min(config.sample.count, config.log.sheet_count))]
    storage.write_bytes(folder / "sheet.png", encode_png(make_sheet(setup, np.stack(shown))))
    if len(missing):
        print(f"{evaluations} evaluations of the velocity" + (", two networks each" if options.cfg_scale > 1 else ""))
    print(f"sheet: {folder / 'sheet.png'}")
