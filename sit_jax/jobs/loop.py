"""The training loop: it logs, draws sheets, saves checkpoints, writes a trace and stops cleanly."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sit_jax import config as config_lib
from sit_jax import hosts, storage
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import UserError
from sit_jax.image_io import encode_png
from sit_jax.jobs import sampler
from sit_jax.jobs.results import make_sheet
from sit_jax.jobs.setup import Setup
from sit_jax.jobs.training_scores import TrainingScores
from sit_jax.jobs.watcher import Watcher
from sit_jax.metric_log import MetricLog, Progress, warn
from sit_jax.train_state import TrainState

Step = Callable[[TrainState, dict, Any], tuple[TrainState, dict]]


class Loop:
    """Runs training steps and, between them, everything that needs the host."""

    def __init__(
        self,
        setup: Setup,
        workdir: epath.Path,
        checkpoints: Checkpoints,
        log: MetricLog,
        progress: Progress,
        watcher: Watcher,
        data: Mapping[str, Any],
        scores: TrainingScores | None,
        carried_scores: Mapping[str, Any],
    ):
        """Prepare to train. `data` describes the data set, for the checkpoints.

        `carried_scores` are what the checkpoint holds of earlier scores.
        """
        self._scores = scores
        self._carried_scores = carried_scores
        self._setup = setup
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._log = log
        self._progress = progress
        self._watcher = watcher
        self._data = data
        self._sampler = sampler.make_sampler(setup, sampler.open_guide(setup.config))
        self._saved: int | None = None  # the step last handed to checkpoints

    def run(
        self,
        train_step: Step,
        state: TrainState,
        batches: Iterator[dict],
        start: int,
        stop: threading.Event,
        profile: tuple[int, int] | None,
    ) -> int:
        """Train from `start` until the last step or `stop`.

        Returns the step reached; its state is being saved.
        """
        config = self._setup.config
        codec_params = self._setup.codec_params if self._setup.encodes_images else {}
        self._saved = start
        if start:  # that step has no scores yet if the run was stopped there
            self._score_if_due(start, state.ema)
        for step in range(start + 1, self._setup.steps + 1):
            # Dispatch the step. Nothing here waits for the devices.
            batch = next(batches)
            if profile and step == profile[0]:
                start_profile(self._workdir / "profile")
            state, scalars = train_step(state, batch, codec_params)
            # Log the interval that ended with the step before, which the devices have finished.
            self._watcher.add(step, scalars)
            # Stop at the same step on all hosts.
            is_last = step == self._setup.steps or _must_stop(step, stop)
            if profile and profile[0] <= step and (is_last or step == profile[1]):
                jax.block_until_ready(scalars)
                jax.profiler.stop_trace()
                profile = None
            is_stopping = is_last and step < self._setup.steps
            if not is_stopping:  # a run that goes on from here scores this step first
                self._score_if_due(step, state.ema)
            # Save, then draw a sheet of samples, which does not count as training time.
            if is_last or step % config.checkpoint.every == 0 or self._is_best(step):
                self._save(step, state)
            if self._is_sheet_due(step):
                with self._watcher.paused():
                    self._draw_sheet(step, state.ema)
            if is_last:
                return step
        return start

    def _is_sheet_due(self, step: int) -> bool:
        every = self._setup.config.log.sheet_every
        return bool(every) and (step == self._setup.steps or step % every == 0)

    def _score_if_due(self, step: int, ema: Any) -> None:
        """Log the scores of a step, and protect its checkpoint if they are the best so far."""
        if self._scores is None or not self._scores.is_due(step):
            return
        self._watcher.write_due_line()
        with self._watcher.paused():
            try:
                values = self._scores.compute(step, self._sampler, ema)
            except UserError as error:  # as for a sheet
                self._progress.write(f"no scores at step {step}: {error}")
                return
        self._log.scalars(step, values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        best = " (the best so far)" if self._is_best(step) else ""
        self._progress.write(f"step {step}: {shown}{best}")

    def _is_best(self, step: int) -> bool:
        best = self._scores.best if self._scores else None
        return best is not None and best.step == step

    def _save(self, step: int, state: TrainState) -> None:
        if step == self._saved:
            return
        self._saved = step
        # Log first, so that a run that continues from this checkpoint finds every row.
        self._watcher.write_due_line()
        self._log.flush()
        note = {
            "config": config_lib.flatten(self._setup.config),
            "data": self._data,
            "log": self._watcher.to_carry(),
        }
        # A run that goes on without scores keeps its best checkpoint.
        scores = self._scores.to_carry() if self._scores else self._carried_scores
        if scores:
            note["scores"] = scores
            self._checkpoints.protect(scores["best"]["step"] if scores["best"] else None)
        try:
            self._checkpoints.wait()
        except UserError as error:  # the previous save failed: warn, and try this one
            warn(str(error))
        self._checkpoints.save(step, state.items(), note)
        if self._scores:
            self._scores.write_best(self._workdir)

    def _draw_sheet(self, step: int, ema: Any) -> None:
        config = self._setup.config
        indices = np.arange(config.log.sheet_count)
        try:
            batches = sampler.sample_images(self._setup, self._sampler, ema, indices)
            images = np.concatenate([batch.images_bfhwc[:, -1] for batch in batches])
        except UserError as error:
            # Early in training, samples with strong guidance may not be finite. That need not end
            # the run.
            self._progress.write(f"no sheet at step {step}: {error}")
            return
        if not hosts.is_first():
            return
        image = make_sheet(config, images)
        self._log.image(step, "samples", image)
        folder = self._workdir / "sheets"
        try:
            folder.mkdir(exist_ok=True)
            storage.clean_up(folder)
            storage.write_bytes(folder / f"step_{step:08d}.png", encode_png(image))
        except (OSError, UserError) as error:  # the next one may find room
            warn(f"no sheet of step {step}: {error}")


def _must_stop(step: int, stop: threading.Event) -> bool:
    """Return True to stop after this step; all processes get the same answer."""
    if hosts.is_multiprocess():
        return multihost_utils.reached_preemption_sync_point(step)
    return stop.is_set()


def start_profile(folder: epath.Path) -> None:
    """Start a trace for TensorBoard's profile page and Perfetto (perfetto_trace.json.gz)."""
    options = jax.profiler.ProfileOptions()
    # Tracing slows Python down several times, so the trace would show mostly its own overhead.
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(folder), create_perfetto_trace=True, profiler_options=options)


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or Ctrl-C sets. A second signal ends the process at once.

    With several processes, jax handles SIGTERM (see `hosts.join`): it agrees with the others on a
    step to stop at. Ctrl-C is turned into SIGTERM there, and the event is never set.
    """
    event = threading.Event()
    numbers = [signal.SIGINT] if hosts.is_multiprocess() else [signal.SIGINT, signal.SIGTERM]

    def on_signal(number: int, frame: FrameType | None) -> None:
        if hosts.is_multiprocess():
            signal.raise_signal(signal.SIGTERM)
        else:
            event.set()
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield event
    finally:
        for number, handler in handlers.items():
            # None stands for a handler that was not installed from Python, such as jax's.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
