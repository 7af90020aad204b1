"""Logs of a run: JSONL, TensorBoard event files, Weights & Biases, log lines and a progress bar.

Only process 0 logs. A step number counts finished training steps; `start_step` is the one from
which a run resumes.
"""

import concurrent.futures
import contextlib
import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tqdm
from absl import logging
from etils import epath

from sit_jax import hosts, sinks, storage

_COPY_EVERY_S = 60.0


class MetricLog(contextlib.AbstractContextManager):
    """Sends a run's scalars and images to every sink; `close`, or leaving the `with`, flushes them.

    The sinks, under `workdir`, which must exist: metrics.jsonl always, tensorboard/ if
    `tensorboard`, and with a `wandb_project` a W&B run named `run_name` that shows `config`. The
    id of that run is kept in wandb_id.txt, so that a resumed run continues it. Rows that an earlier
    run logged after `start_step` are dropped, because a resumed run writes those steps again.
    A remote workdir cannot be appended to: there the logs grow in a local temporary folder, which
    is copied every minute and on close.

    Raises UserError if a W&B project is given and wandb is not installed or refuses.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        start_step: int,
        tensorboard: bool,
        wandb_project: str | None,
        config: dict,
        run_name: str,
    ):
        workdir = epath.Path(workdir)
        folder = workdir  # where the sinks write; a remote workdir gets copies
        self._mirror: _Mirror | None = None
        self._sinks: dict[str, sinks.Sink] = {}
        self._failing: set[str] = set()  # sinks that could not write the last time
        # Closes the sinks in reverse order, also if a later one cannot be opened.
        with contextlib.ExitStack() as stack:
            if not hosts.is_first():
                self._closing = stack.pop_all()
                return
            if storage.is_remote(workdir):
                temporary = tempfile.TemporaryDirectory(prefix="sit_jax_log_")
                folder = epath.Path(stack.enter_context(temporary))
                self._mirror = _Mirror(folder, workdir)
                stack.callback(_close, f"the copy of the logs in {workdir}", self._mirror)

            def add(place: str, sink: sinks.Sink) -> None:
                self._sinks[place] = sink
                stack.callback(_close, place, sink)

            if wandb_project:  # first: it may fail, and no other sink has dropped rows yet
                run_id = sinks.wandb_id(workdir / "wandb_id.txt")
                add(
                    "Weights & Biases",
                    sinks.Wandb(
                        folder,
                        project=wandb_project,
                        run_id=run_id,
                        run_name=run_name,
                        config=config,
                    ),
                )
            add("metrics.jsonl", sinks.Jsonl(folder / "metrics.jsonl", start_step))
            if tensorboard:
                add("tensorboard/", sinks.TensorBoard(folder / "tensorboard", start_step))
            self._closing = stack.pop_all()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log the named numbers of one step; a value may be anything that `float` accepts."""
        values = {name: float(value) for name, value in values.items()}
        for place, sink in self._sinks.items():
            self._try(place, functools.partial(sink.scalars, step, values))
        if self._mirror:
            self._mirror.tick()

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        """Log one uint8 image (c = 1 or 3) to TensorBoard and W&B."""
        for place, sink in self._sinks.items():
            self._try(place, functools.partial(sink.image, step, name, image_hwc))

    def flush(self) -> None:
        """Try again to write what could not be written."""
        for place in sorted(self._failing):
            self._try(place, self._sinks[place].flush)

    def _try(self, place: str, write: Callable[[], None]) -> None:
        """Write to a sink. A log that fails is a warning, and does not end or delay the run."""
        try:
            write()
        except Exception as error:  # wandb has errors of its own
            if place not in self._failing:
                self._failing.add(place)
                warn(
                    f"{place} cannot be written ({storage.reason(error)}); training goes on, and "
                    "tries again"
                )
            return
        if place in self._failing:
            self._failing.remove(place)
            warn(f"{place} is written again, without a gap")

    def close(self) -> None:
        """Flush and close every sink and the remote copy; a second call does nothing."""
        self._closing.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(place: str, sink: "sinks.Sink | _Mirror") -> None:
    """Close a sink. An error is a warning: the run itself is complete."""
    try:
        sink.close()
    except Exception as error:
        warn(f"{place} lacks its last rows ({storage.reason(error)})")


def warn(message: str) -> None:
    """Print a warning to stderr, above a progress bar."""
    # A terminal that is closed or a log file on a full disk does not end a run.
    with contextlib.suppress(OSError), tqdm.tqdm.external_write_mode(file=sys.stderr):
        print(f"warning: {message}", file=sys.stderr, flush=True)


class _Mirror:
    """Copies the logs in a local folder to a remote one, in a thread, so training never waits."""

    def __init__(self, local: epath.Path, remote: epath.Path):
        self._local = local
        self._remote = remote
        self._copied_sizes: dict[epath.Path, int] = {}
        self._last_s = time.monotonic()
        self._copy: concurrent.futures.Future | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        if (remote / "metrics.jsonl").exists():  # a resumed run appends to it
            storage.write_bytes(local / "metrics.jsonl", (remote / "metrics.jsonl").read_bytes())

    def tick(self) -> None:
        """Start a copy if a minute has passed and the last one is done; retry one that failed."""
        is_copying = self._copy is not None and not self._copy.done()
        if is_copying or time.monotonic() - self._last_s < _COPY_EVERY_S:
            return
        if self._copy and (error := self._copy.exception()):
            logging.warning("logs could not be copied to %s (%s); retrying", self._remote, error)
        self._last_s = time.monotonic()
        self._copy = self._thread.submit(self._copy_changed)

    def close(self) -> None:
        """Make the last copy, after one that is running. Raises its error if it fails."""
        with self._thread:
            self._thread.submit(self._copy_changed).result()

    def _copy_changed(self) -> None:
        for path in [*self._local.glob("metrics.jsonl"), *self._local.glob("tensorboard/*")]:
            data = path.read_bytes()
            # These files only grow: one of the same size has not changed.
            if self._copied_sizes.get(path) != len(data):
                target = self._remote / path.relative_to(self._local)
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.write_bytes(target, data)
                self._copied_sizes[path] = len(data)


class Progress(contextlib.AbstractContextManager):
    """A progress bar on stderr if that is a terminal; `write` prints lines above it."""

    def __init__(self, start_step: int, total_steps: int, *, unit: str = "step"):
        self._step = start_step
        self._bar = tqdm.tqdm(
            initial=start_step,
            total=total_steps,
            unit=unit,
            disable=hosts.tqdm_disabled(),
            dynamic_ncols=True,
        )

    def update(self, step: int) -> None:
        """Advance the bar to `step`."""
        self._bar.update(step - self._step)
        self._step = step

    def write(self, line: str) -> None:
        """Print a line to stdout, flushed, and redraw the bar below it."""
        # A terminal that is closed or a log file on a full disk does not end a run.
        with contextlib.suppress(OSError), tqdm.tqdm.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def close(self) -> None:
        """Stop updating the bar, and leave it on the screen."""
        self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


_COLUMNS: dict[str, Callable[[float], str]] = {
    "epoch": lambda value: f"epoch {value:5.2f}",
    "loss": lambda value: f"loss {value:7.4f}",
    "grad_norm": lambda value: f"grad_norm {value:7.3f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "images_per_s": lambda value: f"{value:8,.1f} images/s",
    "flops_per_s": lambda value: f"{_si(value):>6}FLOP/s",
    "mfu": lambda value: f"MFU {100 * value:4.1f} %",
}


def format_line(step: int, total_steps: int, metrics: dict[str, float]) -> str:
    """Return one line of text for a step, its columns aligned from line to line.

    The first columns are epoch, loss, grad_norm, learning_rate, images_per_s, flops_per_s (with an
    SI prefix) and mfu (a fraction, shown in %), as far as `metrics` has them. All other metrics
    follow as `name value`, and eta_s (seconds, shown as h:mm:ss) is last.
    """
    width = len(str(total_steps))
    parts = [f"step {step:{width}d}/{total_steps}"]
    parts += [column(metrics[name]) for name, column in _COLUMNS.items() if name in metrics]
    for name, value in metrics.items():
        if name not in _COLUMNS and name != "eta_s":
            parts.append(f"{name} {value:.4g}")
    if "eta_s" in metrics:
        parts.append(f"ETA {_duration(metrics['eta_s'])}")
    return "  ".join(parts)


def _si(value: float) -> str:
    """Return three significant digits and an SI prefix for a unit: 1.234e12 -> `1.23 T`."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:#.3g}".rstrip(".") + f" {prefixes[0]}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
