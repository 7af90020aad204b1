"""Logs of a run: JSONL, TensorBoard event files, Weights & Biases, log lines and a progress bar.

Only process 0 logs. A step number counts finished training steps; `start_step` is the one from
which a run resumes.
"""

import concurrent.futures
import contextlib
import json
import math
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Protocol

import numpy as np
import tqdm
from absl import logging
from etils import epath

from sit_jax import hosts, storage
from sit_jax.errors import UserError

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
        self._sinks: list[_Sink] = []
        # Closes the sinks in reverse order, also if a later one cannot be opened.
        with contextlib.ExitStack() as stack:
            if not hosts.is_first():
                self._closing = stack.pop_all()
                return
            if storage.is_remote(workdir):
                temporary = tempfile.TemporaryDirectory(prefix="sit_jax_log_")
                folder = epath.Path(stack.enter_context(temporary))
                self._mirror = _Mirror(folder, workdir)
                stack.callback(self._mirror.close)

            def add(sink: _Sink) -> None:
                self._sinks.append(sink)
                stack.callback(sink.close)

            if wandb_project:  # first: it may fail, and no other sink has dropped rows yet
                run_id = _wandb_id(workdir / "wandb_id.txt")
                add(
                    _Wandb(
                        folder,
                        project=wandb_project,
                        run_id=run_id,
                        run_name=run_name,
                        config=config,
                    )
                )
            add(_Jsonl(folder / "metrics.jsonl", start_step))
            if tensorboard:
                add(_TensorBoard(folder / "tensorboard", start_step))
            self._closing = stack.pop_all()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log the named numbers of one step; a value may be anything that `float` accepts."""
        values = {name: float(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.scalars(step, values)
        if self._mirror:
            self._mirror.tick()

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        """Log one uint8 image (c = 1 or 3) to TensorBoard and W&B."""
        for sink in self._sinks:
            sink.image(step, name, image_hwc)

    def close(self) -> None:
        """Flush and close every sink and the remote copy; a second call does nothing."""
        self._closing.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Sink(Protocol):
    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None: ...
    def close(self) -> None: ...


class _Jsonl:
    """A file with one JSON object per line, flushed after each."""

    def __init__(self, path: epath.Path, start_step: int):
        if path.exists():
            storage.write_bytes(path, _rows_up_to(start_step, path.read_bytes()))
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - close() does

    def scalars(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN: null keeps the row readable by every parser.
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        """Ignore images: the file holds only numbers."""

    def close(self) -> None:
        self._file.close()


def _rows_up_to(step: int, log: bytes) -> bytes:
    """Return the complete rows of a log up to `step`."""
    return b"".join(
        line + b"\n" for line, row in storage.json_rows(log) if row.get("step", math.inf) <= step
    )


class _TensorBoard:
    """One event file per start of the run.

    purge_step makes TensorBoard hide the steps of older files that this run logs again.
    """

    def __init__(self, folder: epath.Path, start_step: int):
        import tensorboardX  # here, because it imports torch where that is installed

        # By default two minutes of events stay in memory. A kill would lose them, and a resumed run
        # does not log the steps before its checkpoint again.
        self._writer = tensorboardX.SummaryWriter(
            str(folder), purge_step=start_step + 1, flush_secs=1
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        self._writer.add_image(name, image_hwc, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A W&B run. W&B ignores steps below its newest, so steps logged again do not appear twice."""

    def __init__(
        self, folder: epath.Path, *, project: str, run_id: str, run_name: str, config: dict
    ):
        try:
            import wandb  # an optional dependency, imported only if a project is given
        except ImportError as error:
            raise UserError(
                f"Weights & Biases project {project!r} is set, but the package wandb is not "
                'installed; pip install -e ".[wandb]", or leave the project empty'
            ) from error
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                name=run_name,
                config=config,
                resume="allow",
                dir=str(folder),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"Weights & Biases project {project!r} could not be opened ({reason}); "
                "run `wandb login`, set WANDB_MODE=offline, or leave the project empty"
            ) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image_hwc)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(path: epath.Path) -> str:
    """Return the run id in the file; write a new one if the file does not exist."""
    if not path.exists():
        storage.write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()


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
        with tqdm.tqdm.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def close(self) -> None:
        """Stop updating the bar, and leave it on the screen."""
        self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


_COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:7.4f}",
    "grad_norm": lambda value: f"grad_norm {value:7.3f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "images_per_s": lambda value: f"{value:8,.1f} images/s",
    "flops_per_s": lambda value: f"{_si(value):>6}FLOP/s",
    "mfu": lambda value: f"MFU {100 * value:4.1f} %",
}


def format_line(step: int, total_steps: int, metrics: dict[str, float]) -> str:
    """Return one line of text for a step, its columns aligned from line to line.

    The first columns are loss, grad_norm, learning_rate, images_per_s, flops_per_s (with an SI
    prefix) and mfu (a fraction, shown in %), as far as `metrics` has them. All other metrics follow
    as `name value`, and eta_s (seconds, shown as h:mm:ss) is last.
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
