"""Where a run's numbers go: JSONL, TensorBoard event files, Weights & Biases; and the line and bar people watch.

All of it is silent but in process 0. Steps count finished training steps; `start_step` is the one a run resumes from.
"""

import concurrent.futures
import contextlib
import json
import math
import sys
import tempfile
import time
import uuid
from typing import Protocol

import numpy as np
import tqdm
from absl import logging
from etils import epath

from sit_jax import hosts, storage
from sit_jax.errors import UserError

_COPY_EVERY_S = 60.0


class MetricLog(contextlib.AbstractContextManager):
    """Sends a run's scalars and pictures to every sink that is on; `close` (or leaving the `with`) completes them.

    Under `workdir` (which must exist): metrics.jsonl always; tensorboard/ if `tensorboard`; with a `wandb_project` also
    a W&B run called `run_name` that shows `config`, its id kept in wandb_id.txt so that a resumed run is the same one.
    Whatever an earlier run logged after `start_step` is dropped: a resumed run writes those steps again.
    A remote workdir cannot be appended to: logs grow in a local temporary folder, copied every minute and on close.

    Raises `UserError` if W&B is asked for and is not installed or refuses.
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
        workdir = folder = epath.Path(workdir)
        self._mirror = None
        self._sinks: list[_Sink] = []
        with (
            contextlib.ExitStack() as stack
        ):  # closes what was opened, last first, also if a later sink fails
            if not hosts.is_first():
                self._closing = stack.pop_all()
                return
            if storage.is_remote(workdir):
                folder = epath.Path(
                    stack.enter_context(tempfile.TemporaryDirectory(prefix="sit_jax_log_"))
                )
                self._mirror = _Mirror(folder, workdir)
                stack.callback(self._mirror.close)

            def add(sink: _Sink) -> None:
                self._sinks.append(sink)
                stack.callback(sink.close)

            if wandb_project:  # first: the one that can refuse, before the others drop any row
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
        """Logs numbers of one step; anything `float` takes will do."""
        values = {name: float(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.scalars(step, values)
        if self._mirror:
            self._mirror.tick()

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        """Logs one uint8 picture (c = 1 or 3) where pictures can be shown: TensorBoard and W&B."""
        for sink in self._sinks:
            sink.image(step, name, image_hwc)

    def close(self) -> None:
        """Completes every sink, and the remote copy; a second call does nothing."""
        self._closing.close()

    def __exit__(self, *_) -> None:
        self.close()


class _Sink(Protocol):
    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None: ...
    def close(self) -> None: ...


class _Jsonl:
    """One JSON object a line, flushed as it is written."""

    def __init__(self, path: epath.Path, start_step: int):
        if path.exists():
            storage.write_bytes(path, _rows_up_to(start_step, path.read_bytes()))
        self._file = open(path, "a", buffering=1, encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        # JSON knows no NaN: null keeps the row readable by every parser.
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        """A picture is no number."""

    def close(self) -> None:
        self._file.close()


def _rows_up_to(step: int, log: bytes) -> bytes:
    """The whole rows of a log up to `step`."""
    return b"".join(
        line + b"\n" for line, row in storage.json_rows(log) if row.get("step", math.inf) <= step
    )


class _TensorBoard:
    """An event file per start of the run; purge_step hides what older files hold of the steps that are done again."""

    def __init__(self, folder: epath.Path, start_step: int):
        import tensorboardX  # here, as it imports torch where that is installed

        # By default two minutes of events wait in memory; a kill would lose them, and a resumed run does not redo them.
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
    """A W&B run. It ignores steps below its newest: what a resumed run logs again is not doubled there either."""

    def __init__(
        self, folder: epath.Path, *, project: str, run_id: str, run_name: str, config: dict
    ):
        try:
            import wandb  # not in the base installation, and never imported unless asked for
        except ImportError as error:
            raise UserError(
                f"Weights & Biases project {project!r} is set, but the package wandb is not installed; "
                'pip install -e ".[wandb]", or leave the project empty'
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
    """The id in that file, which is written if it is not there."""
    if not path.exists():
        storage.write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()


class _Mirror:
    """Copies the logs of a local folder to a remote one, in the background so that training never waits for it."""

    def __init__(self, local: epath.Path, remote: epath.Path):
        self._local, self._remote = local, remote
        self._copied_sizes: dict[epath.Path, int] = {}
        self._last_s = time.monotonic()
        self._copy: concurrent.futures.Future | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        if (remote / "metrics.jsonl").exists():  # a resumed run goes on with it
            storage.write_bytes(local / "metrics.jsonl", (remote / "metrics.jsonl").read_bytes())

    def tick(self) -> None:
        """Starts a copy if a minute has passed and the last one is done; one that failed is tried again."""
        if time.monotonic() - self._last_s < _COPY_EVERY_S or (
            self._copy and not self._copy.done()
        ):
            return
        if self._copy and (error := self._copy.exception()):
            logging.warning(
                "logs could not be copied to %s (%s); trying again", self._remote, error
            )
        self._last_s = time.monotonic()
        self._copy = self._thread.submit(self._copy_changed)

    def close(self) -> None:
        """Makes the last copy, after one that is under way; raises what fails it."""
        with self._thread:
            self._thread.submit(self._copy_changed).result()

    def _copy_changed(self) -> None:
        for path in [*self._local.glob("metrics.jsonl"), *self._local.glob("tensorboard/*")]:
            data = path.read_bytes()
            if self._copied_sizes.get(path) != len(
                data
            ):  # these files only grow: an equal size is an equal file
                target = self._remote / path.relative_to(self._local)
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.write_bytes(target, data)
                self._copied_sizes[path] = len(data)


class Progress(contextlib.AbstractContextManager):
    """A progress bar on stderr when that is a terminal, nothing otherwise; `write` prints lines past it."""

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
        """Moves the bar to `step`."""
        self._bar.update(step - self._step)
        self._step = step

    def write(self, line: str) -> None:
        """Prints a line to stdout, at once also into a pipe, and redraws the bar below it."""
        with tqdm.tqdm.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

    def __exit__(self, *_) -> None:
        self.close()


_COLUMNS = {
    "loss": lambda value: f"loss {value:7.4f}",
    "grad_norm": lambda value: f"grad_norm {value:7.3f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "images_per_s": lambda value: f"{value:8,.1f} images/s",
    "flops_per_s": lambda value: f"{_si(value):>6}FLOP/s",
    "mfu": lambda value: f"MFU {100 * value:4.1f} %",
}


def format_line(step: int, total_steps: int, metrics: dict[str, float]) -> str:
    """One line for people, columns aligned from line to line.

    Known names come first: loss, grad_norm, learning_rate, images_per_s, flops_per_s (SI units), mfu (a fraction,
    shown in %); others follow as `name value`; eta_s (seconds, shown h:mm:ss) comes last. Missing names are left out.
    """
    width = len(str(total_steps))
    others = [name for name in metrics if name not in _COLUMNS and name != "eta_s"]
    parts = [f"step {step:{width}d}/{total_steps}"]
    parts += [column(metrics[name]) for name, column in _COLUMNS.items() if name in metrics]
    parts += [f"{name} {metrics[name]:.4g}" for name in others]
    parts += [f"ETA {_duration(metrics['eta_s'])}"] if "eta_s" in metrics else []
    return "  ".join(parts)


def _si(value: float) -> str:
    """Three significant digits and an SI prefix, ready for a unit: 1.234e12 -> `1.23 T`."""
    for prefix in ["", "k", "M", "G", "T", "P"]:
        if not abs(value) >= 999.5:  # so written that NaN stops here too
            break
        value /= 1000
    else:
        prefix = "E"
    return f"{value:#.3g}".rstrip(".") + f" {prefix}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
