"""Several processes, one run: how they find each other, speak with one voice, and agree on what only some can see.

Every process runs the same program; process 0 alone writes and prints. What every function here but `join`, `is_multiprocess`
and `is_first` does is collective: all processes must call it, in the same order. In one process all of it is free.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sit_jax.errors import UserError, check

# After so long without a sign of life a process counts as dead, and the others end. Not less: pinning a host's memory
# can keep a healthy process silent for most of a minute.
HEARTBEAT_TIMEOUT_S = 100
# So long an ending process waits for the others to end too, which is no wait at all unless one of them failed.
_SHUTDOWN_TIMEOUT_S = 30
_LAST_S = 2
_PATIENCE_S = 20
_WAITING = (
    "waiting for the other processes of this run, which all hosts must start with the same command; "
    "--no-distributed runs on this host alone"
)
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join(distributed: bool | None, *, preemptible: bool) -> None:
    """Makes this process one of a run's, where there are several. Before anything of jax that looks for devices.

    They are found by $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID together, or else by jax itself:
    on TPU VMs, under SLURM, Open MPI and Kubernetes. With JAX_PLATFORMS=cpu only the former counts, so that a test or a
    look on one host of a cluster stays alone. `distributed` True demands that others are found, False ignores them.
    With `preemptible`, SIGTERM becomes the notice that `multihost_utils.reached_preemption_sync_point` tells of.

    `UserError` if the variables are incomplete or no cluster is found. If the others do not come, jax ends the process
    after 300 s; a line says so long before.
    """
    if distributed is False or jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in _EXPLICIT if os.environ.get(name)}
    check(
        len(given) in (0, len(_EXPLICIT)),
        f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set; expected all of {', '.join(_EXPLICIT)}, or "
        "none to let jax find the cluster",
    )
    if not given and not distributed and os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    options = _explicit(given) if given else {}
    jax.config.update(
        "jax_enable_preemption_service", preemptible
    )  # it takes SIGTERM, which ends other jobs
    waiting = threading.Timer(_PATIENCE_S, print, [_WAITING], {"file": sys.stderr, "flush": True})
    waiting.start()
    try:
        jax.distributed.initialize(
            **options,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
        )
    except ValueError as error:  # jax's way to say that it knows of no cluster
        check(
            not distributed,
            f"--distributed, but no cluster is found ({error}); set {', '.join(_EXPLICIT)}, or leave it out",
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes of this run do not come together ({reason}); start one on every host, with the same "
            "command, or give --no-distributed to run on this host alone"
        ) from error
    finally:
        waiting.cancel()


def _explicit(given: dict[str, str]) -> dict[str, Any]:
    count, number = given["JAX_NUM_PROCESSES"], given["JAX_PROCESS_ID"]
    check(
        count.isdigit() and number.isdigit() and int(number) < int(count),
        f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={number}; expected a count, and a number from 0 to count - 1",
    )
    address = given["JAX_COORDINATOR_ADDRESS"]
    check(
        address.rpartition(":")[2].isdigit(),
        f"JAX_COORDINATOR_ADDRESS={address}; expected HOST:PORT of process 0, such as 10.0.0.1:8476",
    )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}


def is_multiprocess() -> bool:
    """Whether the run has more than one process; looks for devices only once `join` has found others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return not is_multiprocess() or jax.process_index() == 0


def tqdm_disabled() -> bool | None:
    """tqdm's `disable`: a bar is shown by process 0 alone, and only where stderr is a terminal."""
    return None if is_first() else True


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """What other processes print to stdout is dropped; errors and warnings are not."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def gather(value: Any) -> list[Any]:
    """What each process gives, by its number: anything JSON holds."""
    if not is_multiprocess():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    room = (
        2 ** int(max(sizes) - 1).bit_length()
    )  # a power of two: another size is another compilation
    rows = multihost_utils.process_allgather(np.pad(text, (0, room - len(text))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def run_on_all(function: Callable[[], Any]) -> Any:
    """`function()` in every process, which must not communicate in it; a `UserError` of any is raised in all."""
    if not is_multiprocess():
        return function()
    result, error = None, None
    try:
        result = function()
    except UserError as mistake:
        error = mistake
    errors = gather(str(error) if error else None)
    failed = [number for number, message in enumerate(errors) if message]
    if failed:
        where = (
            ""
            if len(failed) == len(errors)
            else f"on process {', '.join(map(str, failed))} of {len(errors)}: "
        )
        raise UserError(where + errors[failed[0]]) from error
    return result


def broadcast_from_first(function: Callable[[], Any]) -> Any:
    """`function()` in process 0 alone: its result, anything JSON holds, or its `UserError`, in all."""
    if not is_multiprocess():
        return function()
    return gather(run_on_all(lambda: function() if is_first() else None))[0]


def to_host(tree: Any) -> Any:
    """A tree of global arrays as NumPy arrays, whole in every process."""
    if not is_multiprocess():
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: (
            np.asarray(x)
            if x.is_fully_replicated
            else multihost_utils.process_allgather(x, tiled=True)
        ),
        tree,
    )


def check_same(what: str, values: dict[str, Any]) -> None:
    """`UserError` that names what differs between the processes' {name: value}, one per name."""
    first, *others = gather(values)
    for number, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        listed = ", ".join(
            f"{n} is {first.get(n)!r} on process 0 and {other.get(n)!r} there" for n in names[:8]
        )
        check(
            not names,
            f"process {number} has another {what}: {listed}; start all with the same command and the same files",
        )


def check_shared(folder: epath.PathLike) -> None:
    """`UserError` unless what process 0 writes into the folder is there for all of them."""
    if not is_multiprocess():
        return
    folder = epath.Path(folder)
    probe = folder / f".shared.{gather(uuid.uuid4().hex[:8])[0]}"
    if is_first():
        probe.write_bytes(b"")
    gather(None)
    seen = gather(probe.exists())
    if is_first():
        probe.unlink()
    blind = _numbers([not there for there in seen])
    check(
        not blind,
        f"{os.fspath(folder)!r} is another folder on process {blind} of {len(seen)} than on process 0; put the workdir "
        "on storage that all hosts share, such as NFS or gs://",
    )


def check_all_see(path: epath.PathLike) -> None:
    """`UserError` unless the file is there for all processes."""
    seen = gather(epath.Path(path).exists())
    blind = _numbers([not there for there in seen])
    check(
        not blind,
        f"{os.fspath(path)!r} is seen by process 0 and not by process {blind} of {len(seen)}; put the workdir on "
        "storage that all hosts share, such as NFS or gs://",
    )


def _numbers(flags: Sequence[bool]) -> str:
    return ", ".join(str(number) for number, flag in enumerate(flags) if flag)


def exit_message(error: Exception) -> str:
    """The last line of a process of several: who it was, and what that means for the run."""
    lost = isinstance(error, jax.errors.JaxRuntimeError)
    why = (
        "it lost another process (see what that one said), or its own device failed"
        if lost
        else str(error)
    )
    return (
        f"error: process {jax.process_index()} of {jax.process_count()} ends: {type(error).__name__}: {why}; "
        "the same command on all hosts continues from the newest whole checkpoint"
    )


def exit_now(status: int) -> None:
    """Ends a process of several: after an error the usual end would wait for others that wait for this one.

    Process 0 goes last, for without it the others are ended before they can speak.
    """
    if is_first():
        time.sleep(_LAST_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
