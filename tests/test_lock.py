"""lock: one job at a time writes in a folder; a lock whose owner is dead is taken over."""

import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from sit_jax import lock, storage
from sit_jax.errors import UserError
from tests.commands import TINY, refusal, snapshot
from tests.processes import Processes

HOLD = """
import sys, time
from etils import epath
from sit_jax import lock
with lock.hold(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path):
    folder = epath.Path(tmp_path)
    in_use = pytest.raises(UserError, match=f"process {os.getpid()} on ")
    with lock.hold(folder), in_use, lock.hold(folder):
        pass
    with lock.hold(folder):
        pass
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_told_who_holds_it(tmp_path, holder):
    words = rf"is in use by process {holder.pid} on {socket.gethostname()}, since 20\d\d-"
    with pytest.raises(UserError, match=words), lock.hold(epath.Path(tmp_path)):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path, holder, how, capsys):
    holder.send_signal(how)
    holder.wait()
    with lock.hold(epath.Path(tmp_path)):
        assert f"taken over from process {holder.pid}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 3}', "null"])
def test_a_damaged_lock_file_is_no_obstacle(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with lock.hold(epath.Path(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_written_is_named_and_left_nowhere(tmp_path):
    """The limit on the size of a process's files fails a write as a full disk does."""
    words = re.escape(f"{tmp_path / lock.NAME} cannot be written (File too large)")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match=words), lock.hold(epath.Path(tmp_path)):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def leases(monkeypatch):
    """Use leases as in an object store, with short times."""
    monkeypatch.setattr(lock, "_lock_file", lambda path: None)
    monkeypatch.setattr(lock, "_BEAT_S", 0.05)
    monkeypatch.setattr(lock, "_LEASE_S", 0.4)
    monkeypatch.setattr(lock, "_POLL_S", 0.05)


def test_a_lease_that_is_renewed_is_refused(tmp_path, leases):
    folder = epath.Path(tmp_path)
    other = {**lock._self(), "host": "elsewhere"}
    ended = threading.Event()

    def renew():
        while not ended.wait(0.03):
            storage.write_text(folder / lock.NAME, json.dumps(other | {"beat": str(time.time())}))

    storage.write_text(folder / lock.NAME, json.dumps(other))
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="on elsewhere, since"), lock.hold(folder):
            pass
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(("host", "waits"), [("elsewhere", True), (socket.gethostname(), False)])
def test_a_lease_that_is_not_renewed_is_taken_over(tmp_path, leases, host, waits, capsys):
    folder = epath.Path(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    other = {**lock._self(), "host": host, "pid": dead.pid}
    storage.write_text(folder / lock.NAME, json.dumps(other))
    with lock.hold(folder):
        first = (tmp_path / lock.NAME).read_text()
        time.sleep(0.2)
        assert (tmp_path / lock.NAME).read_text() != first  # it is renewed
    out = capsys.readouterr().out
    assert f"taken over from process {dead.pid} on {host}" in out
    assert ("waiting up to" in out) == waits
    assert not list(tmp_path.iterdir())


def test_a_lease_that_somebody_took_ends_the_process(tmp_path):
    program = f"""
import sys, time
from etils import epath
from sit_jax import lock
lock._lock_file = lambda path: None
lock._BEAT_S = 0.05
with lock.hold(epath.Path(sys.argv[1])):
    (epath.Path(sys.argv[1]) / lock.NAME).write_text({json.dumps(lock._self())!r})
    time.sleep(60)
"""
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1 and f"was taken over by process {os.getpid()}" in process.stderr


SLOW = """
import sys, time
from sit_jax import main
from sit_jax.jobs import loop
run = loop.Loop.run

def wait(*arguments):
    print("waiting", flush=True)
    time.sleep(6)
    return run(*arguments)

loop.Loop.run = wait
sys.exit(main.main())
"""


@pytest.mark.slow
def test_a_second_training_run_is_refused_and_the_first_goes_on(tmp_path):
    workdir = tmp_path / "run"
    arguments = [*TINY, "--workdir", workdir, "--config.log.sheet_every=0"]
    first = Processes(
        tmp_path / "first", arguments, count=1, devices=1, program=("-c", SLOW), joined=False
    )
    end = time.monotonic() + 100
    while "waiting" not in first.printed() and time.monotonic() < end:
        time.sleep(0.05)
    before = snapshot(workdir)
    words = f"'{workdir}' is in use by process {first.children[0].pid} on "
    assert words in refusal(*arguments)
    assert words in refusal("--workdir", workdir, "--config.train.steps=9")
    after = snapshot(workdir)
    assert {name: after[name] for name in before} == before
    assert "trained to step 4" in first.succeed()
    assert not (pathlib.Path(workdir) / lock.NAME).exists()
