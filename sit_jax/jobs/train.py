"""`--mode train`: train, or continue, the run in a workdir."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath

from sit_jax import config as config_lib
from sit_jax import hosts, optimizer, sharding, storage
from sit_jax import train_step as step_lib
from sit_jax.checkpoint import Checkpoints
from sit_jax.data.source import Source
from sit_jax.errors import UserError, check, require
from sit_jax.jobs.data import (
    changed_label,
    check_encoder,
    check_same_classes,
    check_same_latents,
    describe,
    open_batches,
    open_source,
)
from sit_jax.jobs.data_card import write_card
from sit_jax.jobs.job import Flag, Job, Overrides
from sit_jax.jobs.loop import Loop, stop_signal
from sit_jax.jobs.setup import (
    Setup,
    check_sample_batch,
    check_train_batch,
    in_precision,
    set_up,
)
from sit_jax.jobs.training_scores import TrainingScores
from sit_jax.jobs.watcher import Watcher
from sit_jax.jobs.workdir import (
    check_trained_with,
    newest_step,
    open_checkpoints,
    open_for_writing,
    recorded_settings,
    restore_items,
)
from sit_jax.metric_log import MetricLog, Progress
from sit_jax.settings import Config
from sit_jax.train_state import TrainState

_LARGEST_INITIAL_SHARE = 0.1  # of the initial weights in the EMA, without a word


def make_train_step(setup: Setup) -> Callable[[TrainState, dict, Any], tuple[TrainState, dict]]:
    """Return the jitted step: (state, batch of records, codec_params) -> (state, scalars).

    It donates the state.
    """
    setup = dataclasses.replace(setup, is_training=True)
    objective = setup.objective
    schedule = setup.schedule
    train = setup.config.train

    def loss(params: Any, examples: step_lib.Examples) -> tuple[jax.Array, step_lib.Scalars]:
        return step_lib.batch_loss(setup.network, objective, params, examples)

    # Profiles and HLO show this name.
    def train_step(state: TrainState, batch: dict, codec_params: Any) -> tuple[TrainState, dict]:
        encode = functools.partial(setup.codec.encode, codec_params)
        seed = setup.config.seed
        examples = step_lib.draw_examples(objective, encode, seed, state.step, batch)
        # At the optimizer's own count: after skipped updates it is less than the step.
        count = optimizer.update_count(state.opt_state)
        learning_rate = jnp.asarray(schedule(count), jnp.float32)
        state, scalars = step_lib.update(
            state,
            examples,
            loss=loss,
            optimizer=setup.optimizer,
            ema_decay=train.ema_decay,
            accumulation=train.accumulation,
        )
        scalars["learning_rate"] = learning_rate
        scalars["skipped_images"] = batch["skipped"].sum()
        return state, scalars

    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state)
    return jax.jit(
        in_precision(train_step, setup.matmul("training")),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(setup.mesh)),
        compiler_options=setup.compiler_options,
    )


def restore_or_create(
    setup: Setup, workdir: epath.Path, checkpoints: Checkpoints
) -> tuple[int, TrainState, dict]:
    """Return the step to continue from, its state and its note.

    They come from the newest complete checkpoint, or are fresh weights at step 0. Raises
    `UserError` if the checkpoint was trained with other settings, or if all checkpoints are lost.
    """
    start = newest_step(checkpoints)
    if start is None:
        check(
            not checkpoints.has_trained(),
            f"{str(workdir)!r} has been trained, but none of its checkpoints can be used; restore "
            "its folder checkpoints/ from a copy, or give another --workdir to start from step 0",
        )
        return 0, setup.create_state(), {}
    note = checkpoints.note(start)
    check_trained_with(note, start, setup.config, workdir)
    target = setup.abstract_state
    step = sharding.put_replicated(setup.mesh, np.asarray(start, np.int32))
    if "opt_state" in checkpoints.stored(start):
        is_clipped = setup.config.optimizer.clip_norm is not None
        recorded = recorded_settings(note, workdir) or {}
        was_clipped = recorded.get("optimizer.clip_norm") is not None
        stored = optimizer.with_clipping(target.opt_state, is_clipped, was_clipped)
        items = checkpoints.restore(start, target.items() | {"opt_state": stored})
        items["opt_state"] = optimizer.with_clipping(items["opt_state"], was_clipped, is_clipped)
    else:  # only weights, from convert.from_torch
        weights = {"params": target.params, "ema": target.ema}
        items = restore_items(checkpoints, start, weights)
        # The first step donates both, so they must not share memory.
        items["ema"] = jax.tree.map(jnp.copy, items["ema"])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target.opt_state)
        init = jax.jit(setup.optimizer.init, out_shardings=shardings)
        items["opt_state"] = init(items["params"])
    return start, TrainState(step=step, **items), note


def fork(config: Config, source: epath.Path, workdir: epath.Path) -> None:
    """Create a new run in `workdir`, at step 0, from the newest weights and EMA in `source`.

    The optimizer's moments start from scratch. If that cannot be done, raises `UserError`
    before anything is written.
    """
    setup = _set_up(config)
    target_exists, source_exists = hosts.broadcast_from_first(
        lambda: [
            any((workdir / name).exists() for name in ("checkpoints", "run.json")),
            (source / "checkpoints").exists(),
        ]
    )
    check(not target_exists, f"--fork {str(workdir)!r} holds a run already; give a new folder")
    check(source_exists, f"--workdir {str(source)!r} has no checkpoints to fork from")
    data = hosts.run_on_all(lambda: open_source(setup))  # missing data must leave no folder behind
    with open_checkpoints(config, source) as checkpoints:
        step = require(
            newest_step(checkpoints),
            f"--workdir {str(source)!r} holds no complete checkpoint to fork from",
        )
        target = setup.abstract_state
        # Not the moments: the config may have a different optimizer.
        weights = restore_items(checkpoints, step, {"params": target.params, "ema": target.ema})
        if other := changed_label(checkpoints.note(step), data):
            print(f"the fork trains on other classes than the weights: {other}")
    fresh = setup.create_state()
    with open_for_writing(workdir), open_checkpoints(config, workdir) as checkpoints:
        note = {
            "forked_from": f"{source}, step {step}",
            "config": config_lib.flatten(config),
            "data": describe(data),
        }
        checkpoints.save(0, fresh.items() | weights, note)
    print(f"forked step {step} of {source} into {workdir}")


def _set_up(config: Config) -> Setup:
    setup = set_up(config)
    _check_batches(setup)
    return setup


def _check_batches(setup: Setup) -> None:
    check_train_batch(setup)
    if setup.config.log.sheet_every or setup.config.log.scores_every:
        check_sample_batch(setup)


def record_config(
    config: Config, workdir: epath.Path, step: int, changes: Mapping[str, tuple[Any, Any]]
) -> None:
    """Write workdir/config.json, and append changes to config_changes.jsonl."""
    if changes:
        history = workdir / "config_changes.jsonl"
        before = history.read_text() if history.exists() else ""
        row = json.dumps({"step": step, "changes": changes})
        storage.write_text(history, f"{before}{row}\n")
    storage.write_text(workdir / "config.json", config_lib.to_json(config))


def describe_start(
    setup: Setup,
    source: Source,
    state: TrainState,
    start: int,
    note: Mapping[str, Any],
    changes: Mapping[str, tuple[Any, Any]],
) -> Iterator[str]:
    """Yield a line for each change since the checkpoint, and for each effect that may surprise.

    `note` is the checkpoint's; without one, the weights are fresh.
    """
    for key, (old, new) in changes.items():
        yield f"{key} changes from {old!r} to {new!r} at step {start}"
    config = setup.config
    old_optimizer = dataclasses.replace(
        config.optimizer,
        **{
            key.removeprefix("optimizer."): old
            for key, (old, _) in changes.items()
            if key.startswith("optimizer.")
        },
    )
    old_train = dataclasses.replace(
        config.train,
        **{
            key: changes[f"train.{key}"][0]
            for key in ("steps", "epochs")
            if f"train.{key}" in changes
        },
    )
    images = note.get("data", {}).get("images", len(source))
    old_steps = old_train.total_steps(images)
    count = int(optimizer.update_count(state.opt_state)) if start else 0
    old_rate = float(optimizer.make_schedule(old_optimizer, old_steps)(count))
    new_rate = float(setup.schedule(count))
    if start and not math.isclose(old_rate, new_rate, rel_tol=1e-6):
        yield (
            f"the learning rate at step {start} changes from {old_rate:.3g} to {new_rate:.3g}: a "
            f"{config.optimizer.schedule} schedule over {setup.steps} steps"
        )
    share = config.train.ema_decay**setup.steps
    if not note and share > _LARGEST_INITIAL_SHARE:
        yield (
            f"after {setup.steps} steps the EMA still holds {share:.0%} of the initial, "
            f"random weights, so samples of it are noisy: train.ema_decay is "
            f"{config.train.ema_decay:g}; set a smaller one, or sample.weights=raw"
        )
    if len(source) < config.train.batch:
        yield (
            f"the data set's {len(source):,} images are fewer than train.batch "
            f"{config.train.batch}: a step sees images more than once"
        )
    if images != len(source):
        yield (
            f"the data set had {images:,} images and has {len(source):,} now: from step {start} "
            "on, images come in another order"
        )


def train(config: Config, workdir: epath.Path, profile: tuple[int, int] | None = None) -> None:
    """Train to the last step, from the newest checkpoint if the workdir has one.

    SIGTERM and Ctrl-C, on any host, save and return after the current step; with several hosts, a
    few steps later. `profile` (a, b) writes a trace of steps a to b.
    """
    setup, source = _open_data(_set_up(config))
    steps = setup.steps
    if setup.encodes_images or config.log.sheet_every or config.log.scores_every:
        _ = setup.codec_params  # read now, so that an error leaves no folder behind
        check_encoder(setup, source)
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_for_writing(workdir))
        stop = stack.enter_context(stop_signal())
        checkpoints = stack.enter_context(open_checkpoints(config, workdir))
        start, state, note = restore_or_create(setup, workdir, checkpoints)
        check_same_classes(note, source)
        check_same_latents(note, source)
        if start >= steps:
            length = "steps" if config.train.epochs is None else "epochs"
            print(
                f"{workdir} is already at step {start} of {steps}; raise train.{length} to train on"
            )
            return
        if profile:
            check(
                start < profile[0] <= steps,
                f"--profile starts at step {profile[0]}; expected one of {start + 1} to {steps}, "
                "which are to be trained",
            )
        carried_scores = note.get("scores", {})
        scores = None
        if config.log.scores_every:
            scores = TrainingScores(setup, carried_scores)
        batches = stack.enter_context(open_batches(setup, source, start))
        # Unreadable data stops the run here, before anything is written.
        first = hosts.run_on_all(lambda: next(batches))
        batches = itertools.chain([first], batches)
        log = stack.enter_context(hosts.run_on_all(lambda: _open_log(config, workdir, start)))
        recorded = recorded_settings(note, workdir)
        changes = {} if recorded is None else config_lib.changes_since(recorded, config)
        for line in describe_start(setup, source, state, start, note, changes):
            print(line)
        hosts.broadcast_from_first(lambda: record_config(config, workdir, start, changes))
        hosts.broadcast_from_first(lambda: write_card(setup, source, workdir))
        print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        print(f"training from step {start} to {steps}", flush=True)
        progress = stack.enter_context(Progress(start, steps))
        watcher = Watcher(setup, log, progress, note.get("log", {}))
        loop = Loop(
            setup,
            workdir,
            checkpoints,
            log,
            progress,
            watcher,
            describe(source),
            scores,
            carried_scores,
        )
        reached = loop.run(make_train_step(setup), state, batches, start, stop, profile)
        checkpoints.wait()
    if reached < steps:
        print(f"stopped at step {reached} of {steps}, saved; the same command continues")
    else:
        command = f"python -m sit_jax.main --mode sample --workdir {workdir}"
        print(f"trained to step {steps}; sample with: {command}")


def _open_data(setup: Setup) -> tuple[Setup, Source]:
    """Open the data and return the setup with its number of images, so that it knows its steps."""
    source = hosts.run_on_all(lambda: open_source(setup))
    hosts.check_same("data set", {"images": len(source)})
    opened = dataclasses.replace(setup, images=len(source))
    steps = hosts.run_on_all(lambda: opened.steps)
    train = setup.config.train
    if train.epochs is not None:
        print(
            f"{train.epochs:g} epochs of {len(source):,} images in batches of {train.batch}: "
            f"{steps:,} steps"
        )
    return opened, source


def _open_log(config: Config, workdir: epath.Path, start: int) -> MetricLog:
    return MetricLog(
        workdir,
        start_step=start,
        tensorboard=config.log.tensorboard,
        wandb_project=config.log.wandb_project,
        config=config_lib.flatten(config),
        run_name=workdir.name,
    )


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Train the run in `workdir`, or with --fork a new one from its weights."""
    if flags.fork:
        fork(config, workdir, epath.Path(flags.fork))
        workdir = epath.Path(flags.fork)
    train(config, workdir, steps_to_profile(flags.profile))


def steps_to_profile(text: str | None) -> tuple[int, int] | None:
    """Return (100, 110) for "100:110". Raises `UserError` for other text; None stays None."""
    if text is None:
        return None
    steps = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    if not steps or not 0 < int(steps[1]) <= int(steps[2]):
        raise UserError(f"--profile is {text!r}; expected two steps FIRST:LAST such as 100:110")
    return int(steps[1]), int(steps[2])


def _check_flags(flags: argparse.Namespace, overrides: Overrides) -> None:
    check(flags.fork != "", "--fork is empty; expected a new folder such as runs/fork")
    steps_to_profile(flags.profile)


JOB = Job(
    run,
    "train, or continue the run in the workdir",
    memory="train.batch, raise train.accumulation, or set model.remat=full",
    check_batches=_check_batches,
    flags=(
        Flag(
            "fork",
            "train a new run in NEWDIR from the weights in the workdir",
            "NEWDIR",
            is_path=True,
        ),
        Flag("profile", "write a trace of these steps to WORKDIR/profile", "FIRST:LAST"),
    ),
    check=_check_flags,
)
