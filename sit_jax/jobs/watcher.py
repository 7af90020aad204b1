"""The visible output of a training run: log lines, the progress bar, and where it diverged."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sit_jax.errors import check
from sit_jax.jobs.preflight.chips import chip_of
from sit_jax.jobs.setup import Setup
from sit_jax.metric_log import MetricLog, Progress, format_line

Scalars = Mapping[str, float]  # of one step, on the host

# How the scalars of an interval's steps become one number. Others are averaged over finite steps.
_SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "learning_rate": lambda values: values[-1],
    "skipped_images": sum,
}
_OMITTED_AT_0 = ("skipped_images",)
_FIRST = ("loss", "grad_norm", "learning_rate")  # in this order; others follow by name


def summarise_interval(steps: Sequence[Scalars]) -> dict[str, float]:
    """Return the numbers of a log line: every scalar of the steps by its name.

    "finite" becomes "skipped_updates", the number of steps that were not finite, if any.
    """
    finite = [step for step in steps if step["finite"]]
    names = [*_FIRST, *sorted(steps[-1].keys() - {*_FIRST, "finite"})]
    summary = {}
    for name in names:
        summarised = steps if name in _SUMMARIES else finite
        # A step carried over from an older checkpoint may lack a scalar that is new.
        values = [step[name] for step in summarised if name in step]
        if values:
            summary[name] = _SUMMARIES.get(name, _mean)(values)
    for name in _OMITTED_AT_0:
        if not summary.get(name):
            summary.pop(name, None)
    if len(finite) < len(steps):
        summary["skipped_updates"] = len(steps) - len(finite)
    return summary


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def speed(setup: Setup, steps: int, seconds: float) -> dict[str, float]:
    """Return images per second, FLOP/s per device, and the share of its peak if that is known."""
    images_per_s = steps * setup.config.train.batch / seconds
    flops_per_s = images_per_s * setup.train_flops / jax.device_count()
    rates = {"images_per_s": images_per_s, "flops_per_s": flops_per_s}
    if chip := chip_of(jax.devices()[0].device_kind):
        rates["mfu"] = flops_per_s / chip.peak_flops
    return rates


def epoch(setup: Setup, step: int) -> float:
    """Return the passes over the data that a step has completed, whole and part."""
    assert setup.images, "the data are open"
    return step * setup.config.train.batch / setup.images


class Watcher:
    """Takes every step's scalars and logs a line per interval.

    It reads them one step late, so that no device waits for the host.
    """

    def __init__(self, setup: Setup, log: MetricLog, progress: Progress, carried: Mapping):
        """Continue from `carried`, the result of `to_carry` at the last save; {} at the start."""
        self._setup = setup
        self._log = log
        self._progress = progress
        self._on_host: list[Scalars] = list(carried.get("steps", []))  # of this interval
        self._on_device: list[tuple[int, dict]] = []  # of this interval, not yet read
        self._skipped: int = carried.get("skipped_updates", 0)  # in the entire run
        self._step = 0
        # When the clock was last read, and the last step that had ended by then.
        self._clock: tuple[float, int] | None = None

    def add(self, step: int, scalars: dict[str, jax.Array]) -> None:
        """Take the scalars of a step just dispatched, after writing a line due before it."""
        # On a CPU, where a dispatch waits, the new step has ended as well.
        has_ended = scalars["loss"].is_ready()  # type: ignore[attr-defined]  # not in jax's stubs
        self.write_due_line(step if has_ended else None)
        if self._clock is None:  # only now: the first step compiles
            jax.block_until_ready(scalars)
            self._clock = time.perf_counter(), step
        self._on_device.append((step, scalars))
        self._step = step
        self._progress.update(step)

    def write_due_line(self, ended: int | None = None) -> None:
        """Log the interval if the newest step ends it. Waits for the devices only then.

        `ended` is a later step that has ended too, if there is one.
        """
        total = self._setup.steps
        is_due = self._step % self._setup.config.log.every == 0 or self._step == total
        if self._clock is None or not self._on_device or not is_due:
            return
        self.read()
        began, first = self._clock
        last = ended or self._step
        now = time.perf_counter()
        line = {"epoch": epoch(self._setup, self._step), **summarise_interval(self._on_host)}
        eta = {}
        if last > first:  # else no step lies between two readings of the clock
            line |= speed(self._setup, last - first, now - began)
            eta["eta_s"] = (total - self._step) * (now - began) / (last - first)
        self._log.scalars(self._step, line)
        self._progress.write(format_line(self._step, total, line | eta))
        self._on_host = []
        self._clock = time.perf_counter(), last

    def read(self) -> None:
        """Wait for the steps so far and read their scalars.

        Raises `UserError` if more updates were not finite than train.skip_nonfinite allows.
        """
        for step, scalars in jax.device_get(self._on_device):
            values = {name: value.item() for name, value in scalars.items()}
            self._on_host.append(values)
            self._skipped += not values["finite"]
            check(
                self._skipped <= self._setup.config.train.skip_nonfinite,
                f"step {step}: loss {values['loss']:g} and gradient norm {values['grad_norm']:g} "
                "are not both finite; the last checkpoint is kept. Try a lower "
                "optimizer.learning_rate, optimizer.clip_norm=1, model.qk_norm=True or "
                "precision.compute=float32 in a new --workdir, or skip up to N such updates with "
                "train.skip_nonfinite=N",
            )
        self._on_device = []

    def to_carry(self) -> dict[str, Any]:
        """Return the state that a continued run needs to log without a gap or a duplicate."""
        self.read()
        return {"steps": self._on_host, "skipped_updates": self._skipped}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside from the training time."""
        jax.block_until_ready(self._on_device)
        began = time.perf_counter()
        yield
        if self._clock is not None:
            clock, step = self._clock
            self._clock = clock + time.perf_counter() - began, step
