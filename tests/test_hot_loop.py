"""The training loop makes no implicit transfer and waits for no step before the next is running."""

import dataclasses
import threading

import jax
import pytest

from sit_jax import config as config_lib
from sit_jax.jobs import train, watcher
from sit_jax.jobs.data import open_batches, open_source
from sit_jax.jobs.loop import Loop
from sit_jax.jobs.setup import set_up

STEPS, EVERY, SAVE = 9, 2, 5
CONFIG = config_lib.load(
    "configs/digits.py",
    [
        ("model.depth", "1"), ("model.width", "16"), ("model.heads", "2"),
        ("train.batch", "8"), ("sample.batch", "8"),
        ("train.steps", str(STEPS)), ("log.every", str(EVERY)), ("checkpoint.every", str(SAVE)),
        ("log.sheet_every", "0"),
    ],
)  # fmt: skip


class Recorder:
    """A stand-in for checkpoints, log and progress that records its calls."""

    def __init__(self, events):
        self.events = events

    def save(self, step, items, note):
        self.events.append(("save", step))

    def wait(self):
        pass

    def flush(self):
        pass

    def scalars(self, step, values):
        self.events.append(("line", step))

    def write(self, line):
        pass

    def update(self, step):
        pass


@pytest.fixture
def events(monkeypatch):
    """The actions of the loop, in order.

    They are ("dispatch", k), ("read", newest step read), ("line", k) and ("save", k).
    """
    found, read, make = [], jax.device_get, train.make_train_step

    def recording_get(tree):
        if tree:
            found.append(("read", tree[-1][0]))
        return read(tree)

    def recording_step(setup):
        function, count = make(setup), iter(range(1, STEPS + 1))

        def step(*args):
            found.append(("dispatch", next(count)))
            return function(*args)

        return step

    monkeypatch.setattr(watcher.jax, "device_get", recording_get)
    monkeypatch.setattr(train, "make_train_step", recording_step)
    return found


def make_loop(events):
    setup, recorder = dataclasses.replace(set_up(CONFIG), images=899), Recorder(events)
    state = setup.create_state()
    return (
        setup,
        state,
        Loop(
            setup,
            None,
            recorder,
            recorder,
            recorder,
            watcher.Watcher(setup, recorder, recorder, {}),
            {},
            None,
            {},
        ),
    )


def run(events):
    setup, state, loop = make_loop(events)
    with (
        open_batches(setup, open_source(setup), 0) as batches,
        jax.transfer_guard("disallow"),
    ):
        assert (
            loop.run(train.make_train_step(setup), state, batches, 0, threading.Event(), None)
            == STEPS
        )


def test_metrics_are_read_after_the_next_step_is_dispatched_and_nothing_is_transferred(events):
    run(events)
    for i, (what, step) in enumerate(events):
        # Except that a save waits for its step, and the last step has no next one.
        if what == "read" and step not in (SAVE, STEPS):
            assert ("dispatch", step + 1) in events[:i]
    assert [step for what, step in events if what == "line"] == [2, 4, 6, 8, 9]
    assert [step for what, step in events if what == "save"] == [SAVE, STEPS]
    reads = [step for what, step in events if what == "read"]
    assert reads == [2, 4, 5, 6, 8, 9]


def test_the_guard_around_the_loop_refuses_implicit_transfers():
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match="Disallowed host-to-device transfer"),
    ):
        jax.numpy.add(jax.numpy.zeros(3), 1.0)
