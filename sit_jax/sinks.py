"""The places that a run's scalars and images are sent to: JSONL, TensorBoard, Weights & Biases."""

import itertools
import json
import math
import os
import socket
import struct
import time
import uuid
from typing import Any, Protocol

import numpy as np
from etils import epath

from sit_jax import storage
from sit_jax.errors import UserError


class Sink(Protocol):
    """One place to log to. Raises OSError if it cannot write now; `flush` tries again."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class _Appender:
    """A file that grows. What cannot be written, because the disk is full, is kept for later."""

    def __init__(self, path: epath.PathLike):
        # Unbuffered: os.write says how much was written, so that no byte is lost or doubled.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._kept = b""

    def write(self, data: bytes) -> None:
        self._kept += data
        self.flush()

    def flush(self) -> None:
        while self._kept:
            self._kept = self._kept[os.write(self._file, self._kept) :]

    def close(self) -> None:
        try:
            self.flush()
        finally:
            os.close(self._file)


class Jsonl:
    """A file with one JSON object per line."""

    def __init__(self, path: epath.Path, start_step: int):
        if path.exists():
            storage.write_bytes(path, _rows_up_to(start_step, path.read_bytes()))
        self._file = _Appender(path)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN: null keeps the row readable by every parser.
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False).encode() + b"\n")

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        """Ignore images, since the file holds only numbers, but write what was kept."""
        self.flush()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _rows_up_to(step: int, log: bytes) -> bytes:
    """Return the complete rows of a log up to `step`. A row without a whole step is dropped."""
    return b"".join(
        line + b"\n"
        for line, row in storage.json_rows(log)
        if type(row.get("step")) is int and row["step"] <= step
    )


class TensorBoard:
    """One event file per start of the run.

    Events are written here and not by tensorboardX's SummaryWriter, whose thread dies when the disk
    is full: training would then wait for its queue for ever.
    """

    def __init__(self, folder: epath.Path, start_step: int):
        import tensorboardX  # here, because it imports torch where that is installed
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._summary = tensorboardX.summary
        self._event = event_pb2.Event
        self._checksum = masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        names = itertools.chain([name], (f"{name}.{n}" for n in itertools.count(1)))
        self._file = _Appender(next(folder / n for n in names if not (folder / n).exists()))
        self._file.write(self._record(file_version="brain.Event:2"))
        # Makes TensorBoard hide the steps of older files that this run logs again.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write(self._record(step=start_step + 1, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        events = (self._summary.scalar(name, value) for name, value in values.items())
        self._file.write(b"".join(self._record(step=step, summary=event) for event in events))

    def image(self, step: int, name: str, image_hwc: np.ndarray) -> None:
        image = self._summary.image(name, image_hwc, dataformats="HWC")
        self._file.write(self._record(step=step, summary=image))

    def _record(self, **fields: Any) -> bytes:
        """Return an event as it is stored: its length, a checksum of that, itself, a checksum."""
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        parts = ((part, struct.pack("<I", self._checksum(part))) for part in (length, data))
        return b"".join(itertools.chain.from_iterable(parts))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Wandb:
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

    def flush(self) -> None:
        """Do nothing: W&B sends in processes of its own."""

    def close(self) -> None:
        self._run.finish()


def wandb_id(path: epath.Path) -> str:
    """Return the run id in the file; write a new one if the file does not exist."""
    if not path.exists():
        storage.write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()
