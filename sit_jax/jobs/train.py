"""`--mode train`: trains, or continues, the run in a workdir."""

import contextlib
import functools
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils

from sit_jax import config as config_lib
from sit_jax import hosts, sharding, storage, train_state, train_step
from sit_jax.checkpoint import Checkpoints
from sit_jax.data import pipeline, sources, transforms
from sit_jax.errors import UserError, check
from sit_jax.image_io import encode_png
from sit_jax.jobs import sampler
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.jobs.watcher import Watcher
from sit_jax.jobs.workdir import make_workdir, newest_complete, weights_of
from sit_jax.metric_log import MetricLog, Progress
from sit_jax.settings import Config
from sit_jax.train_state import TrainState


def make_train_step(setup: Setup) -> Callable[[TrainState, dict, Any], tuple[TrainState, dict]]:
    """The jitted step: (state, batch of uint8 images and labels, codec's params) -> (state, metrics).

    It donates the state.
    """
    objective, schedule, train = setup.objective, setup.schedule, setup.config.train

    def loss(params, examples):
        return train_step.batch_loss(setup.network, objective, params, examples)

    def step(state, batch, codec_params):
        images = transforms.normalise(batch["image"])
        encode = functools.partial(setup.codec.encode, codec_params)
        examples = train_step.draw_examples(
            objective, encode, setup.config.seed, state.step, images, batch["label"]
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
        extra = {
            "learning_rate": jnp.asarray(learning_rate, jnp.float32),
            "skipped_images": batch["skipped"].sum(),
        }
        return state, metrics | extra

    def in_precision(*args):
        with jax.default_matmul_precision(setup.config.precision.matmul or "default"):
            return step(*args)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state)
    return jax.jit(
        in_precision, donate_argnums=0, out_shardings=(shardings, sharding.replicated(setup.mesh))
    )


def abstract_batch(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of what `open_batches` yields."""
    data, rows = setup.config.data, setup.config.train.batch
    image, label = (rows, data.image_size, data.image_size, data.channels), (rows,)
    shapes = {"image": (image, np.uint8), "label": (label, np.int32), "skipped": (label, np.int32)}
    split = sharding.batch_sharding(setup.mesh)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=split) for name, shape in shapes.items()}


def open_source(setup: Setup) -> sources.Source:
    """The config's data. `UserError` if it is not there or has other classes."""
    data = setup.config.data
    source = sources.open_source(
        data.source,
        path=data.path,
        image_size=data.image_size,
        channels=data.channels,
        split=data.split,
    )
    found = len(source.class_names)
    check(
        found == data.classes,
        f"data.classes is {data.classes}, but the {data.source} source has {found} classes; set data.classes={found}",
    )
    return source


@contextlib.contextmanager
def open_batches(
    setup: Setup, source: sources.Source, start: int
) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """Batches start, start + 1, ... on the devices, fetched ahead; leaving ends the readers."""
    data, size = setup.config.data, setup.config.train.batch
    dataset = pipeline.batches(
        source,
        seed=setup.config.seed,
        batch_size=size,
        flip=data.flip,
        skip_unreadable=data.skip_unreadable,
        rows=sharding.own_rows(setup.mesh, size),
    )
    with contextlib.closing(pipeline.iterate(dataset, start, workers=data.workers)) as batches:
        yield pipeline.prefetch_to_device(
            batches, lambda batch: sharding.put_batch(setup.mesh, batch, size)
        )


def restore_or_create(setup: Setup, checkpoints: Checkpoints) -> tuple[int, TrainState, dict]:
    """The step to continue from, its state and its note: the newest whole checkpoint, or fresh weights at step 0."""
    start = newest_complete(checkpoints)
    if start is None:
        return 0, setup.create_state(), {}
    target = setup.abstract_state
    step = sharding.put_replicated(setup.mesh, np.asarray(start, np.int32))
    if "opt_state" in checkpoints.stored(start):
        items = checkpoints.restore(start, target.items())
    else:  # weights alone, from convert.from_torch
        items = weights_of(checkpoints, start, {"params": target.params, "ema": target.ema})
        items["ema"] = jax.tree.map(jnp.copy, items["ema"])  # both are donated to the first step
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target.opt_state)
        items["opt_state"] = jax.jit(setup.optimizer.init, out_shardings=shardings)(items["params"])
    return start, TrainState(step=step, **items), checkpoints.note(start)


def open_checkpoints(config: Config, workdir: epath.Path) -> Checkpoints:
    keep = config.checkpoint
    return Checkpoints(
        workdir / "checkpoints", train_state.CHECKPOINT_ITEMS, keep.keep_last, keep.keep_every
    )


def fork(config: Config, source: epath.Path, workdir: epath.Path) -> None:
    """Makes `workdir` a new run at step 0 with the newest weights and EMA of the run in `source`, and fresh moments."""
    setup = set_up(config)
    taken, there = hosts.broadcast_from_first(
        lambda: [(folder / "checkpoints").exists() for folder in (workdir, source)]
    )
    check(not taken, f"--fork {str(workdir)!r} holds a run already; give a new folder")
    check(there, f"--workdir {str(source)!r} has no checkpoints to fork from")
    hosts.run_on_all(lambda: open_source(setup))  # data that is not there leaves no folder behind
    with open_checkpoints(config, source) as checkpoints:
        step = newest_complete(checkpoints)
        check(step is not None, f"--workdir {str(source)!r} holds no whole checkpoint to fork from")
        target = setup.abstract_state  # without the moments: another optimizer has others
        weights = weights_of(checkpoints, step, {"params": target.params, "ema": target.ema})
    fresh = setup.create_state()
    make_workdir(workdir)
    with open_checkpoints(config, workdir) as checkpoints:
        checkpoints.save(0, fresh.items() | weights, {"forked_from": f"{source}, step {step}"})
    print(f"forked step {step} of {source} into {workdir}")


def record_config(config: Config, workdir: epath.Path, step: int) -> None:
    """Writes workdir/config.json; what has changed since it was written is printed and kept in config_changes.jsonl."""
    recorded = workdir / "config.json"
    changes = (
        config_lib.changes(config_lib.load(str(recorded)), config) if recorded.exists() else {}
    )
    for key, (old, new) in changes.items():
        print(f"{key} changes from {old!r} to {new!r} at step {step}")
    if changes:
        history = workdir / "config_changes.jsonl"
        before = history.read_text() if history.exists() else ""
        storage.write_text(history, before + json.dumps({"step": step, "changes": changes}) + "\n")
    storage.write_text(recorded, config_lib.to_json(config))


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets. A second one ends the process at once: checkpoints survive that too.

    Among several processes SIGTERM is jax's own (`hosts.join`), which agrees with the others on a step to stop at;
    Ctrl-C becomes one, and the event is never set.
    """
    event, numbers = threading.Event(), (signal.SIGINT, signal.SIGTERM)
    if hosts.is_multiprocess():
        numbers = (signal.SIGINT,)

    def on_signal(number, frame):
        if hosts.is_multiprocess():
            signal.raise_signal(signal.SIGTERM)
        else:
            event.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(
                number, signal.SIG_DFL if handler is None else handler
            )  # None: jax's, not Python's


def run(config: Config, workdir: epath.Path, profile: tuple[int, int] | None = None) -> None:
    """Trains to train.steps. What is in the workdir is continued; a finished run says so and ends.

    SIGTERM and Ctrl-C, on any host, save and return after the step under way, or one soon after that all agree on.
    `profile` (a, b) writes a trace of steps a to b.
    """
    setup, steps = set_up(config), config.train.steps
    source, _ = hosts.run_on_all(lambda: open_source(setup)), setup.codec_params
    make_workdir(workdir)  # not sooner: a mistake in what is above leaves no folder behind
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signal())
        checkpoints = stack.enter_context(open_checkpoints(config, workdir))
        start, state, note = restore_or_create(setup, checkpoints)
        if start >= steps:
            print(f"{workdir} is already at step {start} of {steps}; raise train.steps to train on")
            return
        if profile:
            expected = f"expected one of {start + 1} to {steps}, which are to be trained"
            check(start < profile[0] <= steps, f"--profile starts at step {profile[0]}; {expected}")
        batches = stack.enter_context(open_batches(setup, source, start))
        first = hosts.run_on_all(lambda: next(batches))
        batches = itertools.chain(
            [first], batches
        )  # unreadable data stops here, before anything is written
        log = stack.enter_context(
            hosts.run_on_all(
                lambda: MetricLog(
                    workdir,
                    start_step=start,
                    tensorboard=config.log.tensorboard,
                    wandb_project=config.log.wandb_project,
                    config=config_lib.flatten(config),
                    run_name=workdir.name,
                )
            )
        )
        hosts.broadcast_from_first(lambda: record_config(config, workdir, start))
        print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        print(f"training from step {start} to {steps}", flush=True)
        progress = stack.enter_context(Progress(start, steps))
        loop = Loop(
            setup,
            workdir,
            checkpoints,
            log,
            progress,
            Watcher(setup, log, progress, note.get("log", {})),
        )
        reached = loop.run(state, batches, start, stop, profile)
        checkpoints.wait()
    if reached < steps:
        print(f"stopped at step {reached} of {steps}, saved; the same command continues")
    else:
        print(
            f"trained to step {steps}; sample with: python -m sit_jax.main --mode sample --workdir {workdir}"
        )


def start_profile(folder: epath.Path) -> None:
    """Starts a trace for TensorBoard's profile page and for Perfetto (perfetto_trace.json.gz)."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = (
        0  # it slows Python down several times: the trace would show itself
    )
    jax.profiler.start_trace(str(folder), create_perfetto_trace=True, profiler_options=options)


class Loop:
    """The training loop and its effects: lines, sheets, checkpoints, a trace."""

    def __init__(
        self,
        setup,
        workdir,
        checkpoints: Checkpoints,
        log: MetricLog,
        progress: Progress,
        watcher: Watcher,
    ):
        self._setup, self._workdir, self._checkpoints = setup, workdir, checkpoints
        self._log, self._progress, self._watcher = log, progress, watcher
        self._sampler = sampler.make_sampler(setup, sampler.open_guide(setup.config))
        self._saved: int | None = None  # the step last given to checkpoints

    def run(
        self,
        state: TrainState,
        batches: Iterator[dict],
        start: int,
        stop: threading.Event,
        profile: tuple | None,
    ) -> int:
        """Trains from `start` until train.steps or `stop`; returns the step it reached, whose state is being saved."""
        config, step_function = self._setup.config, make_train_step(self._setup)
        codec_params = self._setup.codec_params
        self._saved = start
        for step in range(start + 1, config.train.steps + 1):
            batch = next(batches)
            if profile and step == profile[0]:
                start_profile(self._workdir / "profile")
            state, metrics = step_function(state, batch, codec_params)
            self._watcher.add(step, metrics)
            stopping = (
                multihost_utils.reached_preemption_sync_point(step)
                if hosts.is_multiprocess()
                else stop.is_set()
            )
            last = step == config.train.steps or stopping
            if profile and profile[0] <= step and (last or step == profile[1]):
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                profile = None
            if last or step % config.checkpoint.every == 0:
                self._save(step, state)
            if config.log.sheet_every and (
                step == config.train.steps or step % config.log.sheet_every == 0
            ):
                with self._watcher.paused():
                    self._draw_sheet(step, state.ema)
            if last:
                break
        return step

    def _save(self, step: int, state: TrainState) -> None:
        if step == self._saved:
            return
        self._saved = step
        # The log's rows first: a run that is continued from here finds them all.
        self._watcher.write_due_line()
        note = {"config": config_lib.flatten(self._setup.config), "log": self._watcher.to_carry()}
        try:
            self._checkpoints.wait()
        except UserError as error:  # the save before this one failed: say so, and try again now
            self._progress.write(f"warning: {error}")
        self._checkpoints.save(step, state.items(), note)

    def _draw_sheet(self, step: int, ema: Any) -> None:
        indices = np.arange(self._setup.config.log.sheet_count)
        try:
            drawn = sampler.sample_images(self._setup, self._sampler, ema, indices)
            images = np.concatenate([images[:, -1] for _, images, _ in drawn])
        except UserError as error:  # a young model under strong guidance may have no finite sample: no reason to stop
            self._progress.write(f"no sheet at step {step}: {error}")
            return
        if not hosts.is_first():
            return
        image = sampler.make_sheet(self._setup, images)
        self._log.image(step, "samples", image)
        folder = self._workdir / "sheets"
        folder.mkdir(exist_ok=True)
        storage.write_bytes(folder / f"step_{step:08d}.png", encode_png(image))
