"""The log line of an interval: every scalar of its steps by name, and the speed of the steps."""

import dataclasses

import pytest

from sit_jax import config as config_lib
from sit_jax.jobs import watcher
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.watcher import summarise_interval


def step(loss=1.0, finite=True, **scalars):
    values = {"grad_norm": 2.0, "learning_rate": 0.1, "skipped_images": 0}
    return {**values, "loss": loss, "finite": finite, **scalars}


def test_a_new_scalar_is_averaged_and_passed_on_by_its_name():
    steps = [step(align_loss=1.0), step(align_loss=4.0)]
    assert summarise_interval(steps)["align_loss"] == pytest.approx(2.5)


def test_known_scalars_come_first_and_in_their_order():
    summary = summarise_interval([step(align_loss=1.0)])
    assert list(summary) == ["loss", "grad_norm", "learning_rate", "align_loss"]


def test_the_learning_rate_is_the_last_and_skipped_images_are_summed():
    steps = [step(learning_rate=0.1, skipped_images=2), step(learning_rate=0.2, skipped_images=3)]
    summary = summarise_interval(steps)
    assert summary["learning_rate"] == 0.2 and summary["skipped_images"] == 5


def test_steps_that_are_not_finite_are_counted_and_left_out_of_the_means():
    steps = [step(loss=float("nan"), finite=False, learning_rate=0.3), step(loss=3.0)]
    summary = summarise_interval(steps)
    assert summary["loss"] == 3.0 and summary["skipped_updates"] == 1
    only_bad = summarise_interval(steps[:1])
    assert "loss" not in only_bad and only_bad["learning_rate"] == 0.3


def test_a_step_carried_over_from_an_older_checkpoint_may_lack_a_scalar():
    assert summarise_interval([step(), step(align_loss=4.0)])["align_loss"] == 4.0


class Clock:
    """A stand-in for time, and for the arrays of a step, which take 2 s on the device."""

    def __init__(self, waits):
        self.now = 0.0
        self.waits = waits  # whether a dispatch waits for its step, as on the CPU
        self.busy_until = 0.0

    def perf_counter(self):
        return self.now

    def dispatch(self):
        self.busy_until = max(self.now, self.busy_until) + 2.0
        if self.waits:
            self.now = self.busy_until
        return self.busy_until

    def wait(self, end):
        self.now = max(self.now, end)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(("every", "steps"), [(3, 9), (4, 9), (9, 9), (1, 4)])
def test_the_speed_counts_the_steps_whose_time_it_counts(monkeypatch, waits, every, steps):
    """Every line but one that comes with no time behind it says 8 images in 2 s."""
    clock = Clock(waits)

    class Array:
        def __init__(self, end):
            self.end = end

        def is_ready(self):
            return self.end <= clock.now

        def item(self):
            return 1.0

    class Log:
        speeds = []

        def scalars(self, step, values):
            self.speeds.append(values.get("images_per_s"))

        def write(self, line):
            pass

        def update(self, step):
            pass

    def read(pairs):
        for _, scalars in pairs:
            clock.wait(scalars["loss"].end)
        return pairs

    monkeypatch.setattr(watcher.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(watcher.jax, "device_get", read)
    monkeypatch.setattr(
        watcher.jax, "block_until_ready", lambda scalars: clock.wait(scalars["loss"].end)
    )
    overrides = [("train.batch", "8"), ("log.every", str(every)), ("train.steps", str(steps))]
    setup = set_up(config_lib.load("configs/digits.py", overrides))
    setup = dataclasses.replace(setup, images=899)
    log = Log()
    watch = watcher.Watcher(setup, log, log, {})
    names = ("loss", "grad_norm", "learning_rate", "finite")
    for step in range(1, steps + 1):
        array = Array(clock.dispatch())
        watch.add(step, dict.fromkeys(names, array))
    watch.write_due_line()
    speeds = [speed for speed in log.speeds if speed is not None]
    assert speeds and speeds == pytest.approx([4.0] * len(speeds))
    assert len(log.speeds) == -(-steps // every)
