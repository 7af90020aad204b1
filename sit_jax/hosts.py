"""Several processes as one run: how they join, communicate and end.

Every process runs the same program; only process 0 writes and prints. Functions here are collective
unless marked "Not collective": every process must call them, in the same order. With one process
they cost nothing.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from sit_jax.errors import UserError, check

T = TypeVar("T")

# A process that sends no heartbeat for this long counts as dead, and the others end. Not less:
# pinning a host's memory can keep a healthy process silent for most of a minute.
HEARTBEAT_TIMEOUT_S = 100
# How long an exiting process waits for the others; they normally exit together.
_SHUTDOWN_TIMEOUT_S = 30
_FIRST_EXIT_DELAY_S = 2  # how much later than the others process 0 exits after an error
_JOIN_NOTICE_AFTER_S = 20
_JOIN_NOTICE = (
    "waiting for the other processes of this run, which all hosts must start with the same "
    "command; --no-distributed runs on this host only"
)
_CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join(distributed: bool | None, *, preemptible: bool) -> None:
    """Connect this process to the others of its run, if there are any.

    Call it before anything that makes jax look for devices. The others are found by the three
    variables $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID, or else by jax
    itself: on TPU VMs, under SLURM, Open MPI and Kubernetes. With JAX_PLATFORMS=cpu only the
    variables count, so that a test, or a quick look on one host of a cluster, runs by itself.
    `distributed` True requires that others are found, False ignores them. With `preemptible`,
    SIGTERM becomes the notice that `multihost_utils.reached_preemption_sync_point` reports.

    Raises UserError if the variables are incomplete or a required cluster is not found. If the
    others do not come, jax ends the process after 300 s; a notice is printed after 20 s.
    """
    if distributed is False or jax.distributed.is_initialized():
        return
    variables = {name: os.environ[name] for name in _CLUSTER_VARIABLES if os.environ.get(name)}
    check(
        len(variables) in (0, len(_CLUSTER_VARIABLES)),
        f"{' and '.join(variables)} {'is' if len(variables) == 1 else 'are'} set; expected all of "
        f"{', '.join(_CLUSTER_VARIABLES)}, or none to let jax find the cluster",
    )
    if not variables and not distributed and os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    cluster = _cluster(variables) if variables else {}
    # Only if preemptible: the service intercepts SIGTERM, which should end any other job.
    jax.config.update("jax_enable_preemption_service", preemptible)
    notice = threading.Timer(
        _JOIN_NOTICE_AFTER_S, print, [_JOIN_NOTICE], {"file": sys.stderr, "flush": True}
    )
    notice.start()
    try:
        jax.distributed.initialize(
            **cluster,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
        )
    except ValueError as error:  # raised if jax finds no cluster
        check(
            not distributed,
            f"--distributed, but no cluster is found ({error}); set "
            f"{', '.join(_CLUSTER_VARIABLES)}, or omit the flag",
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes of this run cannot connect to each other ({reason}); start one on "
            "every host, with the same command, or give --no-distributed to run on this host only"
        ) from error
    finally:
        notice.cancel()


def _cluster(variables: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of `jax.distributed.initialize`. Raises UserError for bad variables."""
    count = variables["JAX_NUM_PROCESSES"]
    number = variables["JAX_PROCESS_ID"]
    check(
        count.isdigit() and number.isdigit() and int(number) < int(count),
        f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={number}; expected a count, and a number "
        "from 0 to count - 1",
    )
    address = variables["JAX_COORDINATOR_ADDRESS"]
    check(
        address.rpartition(":")[2].isdigit(),
        f"JAX_COORDINATOR_ADDRESS={address}; expected HOST:PORT of process 0, such as "
        "10.0.0.1:8476",
    )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}


def is_multiprocess() -> bool:
    """Return True if the run has more than one process. Not collective.

    Makes jax look for devices only if `join` has found other processes.
    """
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Return True in process 0, the one that writes and prints. Not collective."""
    return not is_multiprocess() or jax.process_index() == 0


def tqdm_disabled() -> bool | None:
    """Return tqdm's `disable`. Not collective.

    Only process 0 shows a bar, and only if stderr is a terminal (which None means).
    """
    return None if is_first() else True


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Drop stdout of all processes but process 0; stderr stays. Not collective."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        yield


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in order. Each must be a JSON value."""
    if not is_multiprocess():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    # Padded to a power of two, because every new size compiles again.
    padded_size = 2 ** int(max(sizes) - 1).bit_length()
    rows = multihost_utils.process_allgather(np.pad(text, (0, padded_size - len(text))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def cores() -> int:
    """Return the number of cores that this process may use. Not collective."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Return the bytes of this machine's memory. Not collective."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sharers_of_cores() -> int:
    """Return the number of the run's processes that use this one's cores, itself included.

    Processes that are bound to cores of their own share none.
    """
    bound = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    place = [socket.gethostname(), bound]
    return gather(place).count(place)


def run_on_all(function: Callable[[], T]) -> T:
    """Call `function`, which must not communicate, in every process, and return its result.

    Raises UserError in all processes if the function does in any.
    """
    if not is_multiprocess():
        return function()
    result = None
    error = None
    try:
        result = function()
    except UserError as user_error:
        error = user_error
    messages = gather(str(error) if error else None)
    failed = [number for number, message in enumerate(messages) if message]
    if failed:
        numbers = ", ".join(map(str, failed))
        everywhere = len(failed) == len(messages)
        place = "" if everywhere else f"on process {numbers} of {len(messages)}: "
        raise UserError(place + messages[failed[0]]) from error
    return cast(T, result)


def broadcast_from_first(function: Callable[[], T]) -> T:
    """Call `function` in process 0 and return its result, a JSON value, in all processes.

    Raises its UserError in all of them.
    """
    if not is_multiprocess():
        return function()
    return gather(run_on_all(lambda: function() if is_first() else None))[0]


def to_host(tree: Any) -> Any:
    """Return a tree of global arrays as complete NumPy arrays in every process."""
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


def check_same(kind: str, values: dict[str, Any]) -> None:
    """Raise UserError unless {name: value} is the same in all processes. `kind` is a word for it.

    The message lists up to eight names that differ, with both values.
    """
    first, *others = gather(values)
    for number, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        listed = ", ".join(
            f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process "
            f"{number}"
            for name in names[:8]
        )
        check(
            not names,
            f"process {number} has a different {kind}: {listed}; start all with the same command "
            "and the same files",
        )


def check_shared(folder: epath.PathLike) -> None:
    """Raise UserError unless all processes see a file that process 0 writes into the folder."""
    if not is_multiprocess():
        return
    folder = epath.Path(folder)
    probe = folder / f".shared.{gather(uuid.uuid4().hex[:8])[0]}"
    if is_first():
        probe.write_bytes(b"")
    gather(None)  # a barrier: the file is written before anyone looks for it
    seen = gather(probe.exists())
    if is_first():
        probe.unlink()
    check(
        all(seen),
        f"{os.fspath(folder)!r} is a different folder on process {_without(seen)} of {len(seen)} "
        "than on process 0; put the workdir on storage that all hosts share, such as NFS or gs://",
    )


def check_all_see(path: epath.PathLike) -> None:
    """Raise UserError unless the file exists for all processes."""
    seen = gather(epath.Path(path).exists())
    check(
        all(seen),
        f"{os.fspath(path)!r} exists for process 0 but not for process {_without(seen)} of "
        f"{len(seen)}; put the workdir on storage that all hosts share, such as NFS or gs://",
    )


def _without(seen: Sequence[bool]) -> str:
    """Return the numbers of the processes that did not see a file."""
    return ", ".join(str(number) for number, sees in enumerate(seen) if not sees)


def exit_message(error: Exception) -> str:
    """Return the last line to print when an error ends one of several processes. Not collective."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        reason = "it lost another process (see that one's output), or its own device failed"
    else:
        reason = str(error)
    return (
        f"process {jax.process_index()} of {jax.process_count()} ends: "
        f"{type(error).__name__}: {reason}; the same command on all hosts continues from the "
        "newest complete checkpoint"
    )


def exit_now(status: int) -> NoReturn:
    """Exit without the usual barrier, which after an error would deadlock. Not collective.

    Process 0 exits last: it is the coordinator, and once it is gone jax ends the others, before
    they can print why they failed.
    """
    if is_first():
        time.sleep(_FIRST_EXIT_DELAY_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
