"""What people see of a training run: its lines, its bar, and the step at which it stopped making sense."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from sit_jax.errors import check
from sit_jax.jobs.preflight.chips import chip_of
from sit_jax.jobs.setup import Setup
from sit_jax.metric_log import MetricLog, Progress, format_line

Metrics = Mapping[str, float]


def summarise(steps: Sequence[Metrics]) -> dict[str, float]:
    """A log line's numbers: means over the finite steps, the last learning rate, and what was skipped, if anything."""
    finite = [step for step in steps if step["finite"]]
    summary = {
        name: float(np.mean([step[name] for step in finite]))
        for name in ("loss", "grad_norm")
        if finite
    }
    summary["learning_rate"] = steps[-1]["learning_rate"]
    if skipped := sum(step["skipped_images"] for step in steps):
        summary["skipped_images"] = skipped
    if len(finite) < len(steps):
        summary["skipped_updates"] = len(steps) - len(finite)
    return summary


def speed(setup: Setup, steps: int, seconds: float) -> dict[str, float]:
    """Images a second, FLOP/s of a device, and the share of its peak where that is known."""
    images_per_s = steps * setup.config.train.batch / seconds
    rates = {
        "images_per_s": images_per_s,
        "flops_per_s": images_per_s * setup.train_flops / jax.device_count(),
    }
    if chip := chip_of(jax.devices()[0].device_kind):
        rates["mfu"] = rates["flops_per_s"] / chip.peak_flops
    return rates


class Watcher:
    """Takes every step's metrics and logs a line per interval, read one step late so that no device waits for it."""

    def __init__(self, setup: Setup, log: MetricLog, progress: Progress, carried: Mapping):
        """`carried` is what `to_carry` gave when the run was last saved; {} at the start."""
        self._setup, self._log, self._progress = setup, log, progress
        self._known: list[Metrics] = list(carried.get("steps", []))  # of this interval, on the host
        self._skipped: int = carried.get("skipped_updates", 0)  # in the whole run
        self._pending: list[tuple[int, dict]] = []  # of this interval, still on the devices
        self._step = 0
        self._timed, self._began = 0, None  # steps since the last line, and when they began

    def add(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step just dispatched, after writing the line that fell due with the step before it."""
        self.write_due_line()
        if self._began is None:  # not sooner: the first step's dispatch compiles
            self._began = time.perf_counter()
        self._pending.append((step, metrics))
        self._step, self._timed = step, self._timed + 1
        self._progress.update(step)

    def write_due_line(self) -> None:
        """Logs the interval if the newest step ends it; waits for that step then, and only then."""
        total = self._setup.config.train.steps
        if not self._pending or (self._step % self._setup.config.log.every and self._step != total):
            return
        self.read()
        seconds = time.perf_counter() - self._began
        line = summarise(self._known) | speed(self._setup, self._timed, seconds)
        self._log.scalars(self._step, line)
        eta = {"eta_s": (total - self._step) * seconds / self._timed}
        self._progress.write(format_line(self._step, total, line | eta))
        self._known, self._timed, self._began = [], 0, time.perf_counter()

    def read(self) -> None:
        """Waits for the steps so far.

        `UserError` when more updates were not finite than train.skip_nonfinite allows.
        """
        for step, metrics in jax.device_get(self._pending):
            values = {name: value.item() for name, value in metrics.items()}
            self._known.append(values)
            self._skipped += not values["finite"]
            check(
                self._skipped <= self._setup.config.train.skip_nonfinite,
                f"step {step}: loss {values['loss']:g} and gradient norm {values['grad_norm']:g} are not both finite; "
                "the last checkpoint is kept. Try a lower optimizer.learning_rate, optimizer.clip_norm=1, "
                "model.qk_norm=True or precision.compute=float32 in a new --workdir, or pass over up to N such updates "
                "with train.skip_nonfinite=N",
            )
        self._pending = []

    def to_carry(self) -> dict:
        """What a continued run needs so that its log has neither gap nor double."""
        self.read()
        return {"steps": self._known, "skipped_updates": self._skipped}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        jax.block_until_ready(self._pending)
        began = time.perf_counter()
        yield
        if self._began is not None:
            self._began += time.perf_counter() - began
