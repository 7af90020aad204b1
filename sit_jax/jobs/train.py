"""`--mode train`: trains, or continues, the run in a workdir."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath

from sit_jax import config as config_lib
from sit_jax import report, sharding, storage, train_state, train_step
from sit_jax.checkpoint import Checkpoints
from sit_jax.config import Config
from sit_jax.data import pipeline, sources, transforms
from sit_jax.errors import UserError, check
from sit_jax.image_io import encode_png
from sit_jax.jobs import sample
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.metric_log import MetricLog, Progress, format_line
from sit_jax.train_state import TrainState


def make_train_step(setup: Setup) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The jitted step: (state, batch of uint8 images and labels) -> (state, metrics). It donates the state."""
    objective, schedule, train = setup.objective, setup.schedule, setup.config.train

    def loss(params, examples):
        return train_step.batch_loss(setup.network, objective, params, examples)

    def step(state, batch):
        images = transforms.normalise(batch["image"])
        examples = train_step.draw_examples(
            objective, setup.codec, setup.config.seed, state.step, images, batch["label"]
        )
        learning_rate = schedule(state.step)
        state, metrics = train_step.update(
            state,
            examples,
            loss=loss,
            optimizer=setup.optimizer,
            ema_decay=train.ema_decay,
            accumulation=train.accumulation,
        )
        extra = {"learning_rate": jnp.asarray(learning_rate, jnp.float32), "skipped_images": batch["skipped"].sum()}
        return state, metrics | extra

    def in_precision(*args):
        with jax.default_matmul_precision(setup.config.precision.matmul or "default"):
            return step(*args)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(setup))
    return jax.jit(in_precision, donate_argnums=0, out_shardings=(shardings, sharding.replicated(setup.mesh)))


def abstract_state(setup: Setup) -> TrainState:
    return train_state.abstract(setup.init_params, setup.optimizer, setup.mesh)


def open_source(setup: Setup) -> sources.Source:
    """The config's data. `UserError` if it is not there or has other classes."""
    data = setup.config.data
    source = sources.open_source(
        data.source, path=data.path, image_size=data.image_size, channels=data.channels, split=data.split
    )
    found = len(source.class_names)
    check(
        found == data.classes,
        f"data.classes is {data.classes}, but the {data.source} source has {found} classes; set data.classes={found}",
    )
    return source


@contextlib.contextmanager
def open_batches(setup: Setup, source: sources.Source, start: int) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """Batches start, start + 1, ... on the devices, fetched ahead; leaving ends the readers."""
    data = setup.config.data
    dataset = pipeline.batches(
        source,
        seed=setup.config.seed,
        batch_size=setup.config.train.batch,
        flip=data.flip,
        skip_unreadable=data.skip_unreadable,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(pipeline.iterate(dataset, start, workers=data.workers)) as batches:
        yield pipeline.prefetch_to_device(batches, lambda batch: sharding.put_batch(setup.mesh, batch))


def restore_or_create(setup: Setup, checkpoints: Checkpoints) -> tuple[int, TrainState]:
    """The step to continue from and its state: the newest checkpoint, or fresh weights at step 0."""
    start = checkpoints.latest_step()
    if start is None:
        return 0, train_state.create(setup.init_params, setup.optimizer, setup.mesh)
    target = abstract_state(setup)
    step = jax.device_put(jnp.asarray(start, jnp.int32), target.step.sharding)
    return start, TrainState(step=step, **checkpoints.restore(start, target.items()))


def summarise(setup: Setup, steps: list[dict], seconds: float) -> dict[str, float]:
    """The log line of some steps that took `seconds`: mean loss and gradient norm, rates per device, skipped images."""
    metrics = {name: float(np.mean([step[name] for step in steps])) for name in ("loss", "grad_norm")}
    metrics["learning_rate"] = float(steps[-1]["learning_rate"])
    metrics["images_per_s"] = len(steps) * setup.config.train.batch / seconds
    metrics["flops_per_s"] = metrics["images_per_s"] * setup.train_flops / jax.device_count()
    if peak := report.peak_flops(jax.devices()[0].device_kind):
        metrics["mfu"] = metrics["flops_per_s"] / peak
    if skipped := sum(int(step["skipped_images"]) for step in steps):
        metrics["skipped_images"] = skipped
    return metrics


class Watcher:
    """What people see of a run: a bar, and a line per interval, read one step late so that no device waits for it."""

    def __init__(self, setup: Setup, log: MetricLog, progress: Progress):
        self._setup, self._log, self._progress = setup, log, progress
        self._every, self._total = setup.config.log.every, setup.config.train.steps
        self._steps: list[dict] = []  # metrics since the last line, still on the devices
        self._step = 0
        self._began: float | None = None

    def add(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step that has just been dispatched, after the line that the step before it was due."""
        self.write_due_line()
        if self._began is None:  # not sooner: the first step's dispatch compiles
            self._began = time.perf_counter()
        self._steps.append(metrics)
        self._step = step
        self._progress.update(step)

    def write_due_line(self) -> None:
        """Waits for the steps since the last line and logs their summary, if the newest step ends an interval."""
        step, total = self._step, self._total
        if not self._steps or (step % self._every and step != total):
            return
        steps = jax.device_get(self._steps)
        seconds = time.perf_counter() - self._began
        metrics = summarise(self._setup, steps, seconds)
        self._log.scalars(step, metrics)
        self._progress.write(format_line(step, total, metrics | {"eta_s": (total - step) * seconds / len(steps)}))
        self._steps, self._began = [], time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        jax.block_until_ready(self._steps)
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began


def run(config: Config, workdir: epath.Path) -> None:
    """Trains to train.steps. What is in the workdir is continued; a finished run says so and ends."""
    setup, steps = set_up(config), config.train.steps
    source = open_source(setup)
    storage.make_workdir(workdir)  # not sooner: a mistake in what is above leaves no folder behind
    keep = config.checkpoint.keep_last, config.checkpoint.keep_every
    items = train_state.CHECKPOINT_ITEMS
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", items, *keep))
        start, state = restore_or_create(setup, checkpoints)
        if start >= steps:
            print(f"{workdir} is already at step {start} of {steps}; raise train.steps to train on")
            return
        batches = stack.enter_context(open_batches(setup, source, start))
        batches = itertools.chain([next(batches)], batches)  # unreadable data stops here, before anything is written
        log = stack.enter_context(
            MetricLog(
                workdir,
                start_step=start,
                tensorboard=config.log.tensorboard,
                wandb_project=config.log.wandb_project,
                config=config_lib.flatten(config),
                run_name=workdir.name,
            )
        )
        storage.write_text(workdir / "config.json", config_lib.to_json(config))
        print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        print(f"training from step {start} to {steps}", flush=True)
        watcher = Watcher(setup, log, stack.enter_context(Progress(start, steps)))
        _train(setup, workdir, state, batches, range(start + 1, steps + 1), checkpoints, log, watcher)
        print(f"trained to step {steps}; sample with: python -m sit_jax.main --mode sample --workdir {workdir}")


def _train(setup, workdir, state, batches, steps, checkpoints, log, watcher) -> None:
    config, step_function, sampler = setup.config, make_train_step(setup), sample.make_sampler(setup)

    def falls_on(step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == steps[-1])

    for step in steps:
        state, metrics = step_function(state, next(batches))
        watcher.add(step, metrics)
        if falls_on(step, config.checkpoint.every):
            # The log's rows first: a run that is continued from here finds them all.
            watcher.write_due_line()
            checkpoints.save(step, state.items(), config_lib.to_json(config))
        if falls_on(step, config.log.sheet_every):
            with watcher.paused():
                _draw_sheet(setup, workdir, sampler, state.ema, step, log)
    watcher.write_due_line()


def _draw_sheet(
    setup: Setup, workdir: epath.Path, sampler: sample.Sampler, params: Any, step: int, log: MetricLog
) -> None:
    indices = np.arange(setup.config.log.sheet_count)
    try:
        images = np.concatenate([images for _, images in sample.sample_images(setup, sampler, params, indices)])
    except UserError as error:  # a young model under strong guidance may have no finite sample: no reason to stop
        print(f"no sheet at step {step}: {error}", file=sys.stderr)
        return
    image = sample.make_sheet(setup, images)
    log.image(step, "samples", image)
    folder = workdir / "sheets"
    folder.mkdir(exist_ok=True)
    storage.write_bytes(folder / f"step_{step:08d}.png", encode_png(image))
