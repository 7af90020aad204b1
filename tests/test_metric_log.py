"""metric_log: every sink gets its data, a kill loses none, a resumed run logs each step once."""

import io
import json
import math
import os
import struct
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from sit_jax import metric_log, storage
from sit_jax.errors import UserError


def _log(workdir, start_step=0, *, tensorboard=False, wandb_project=None, config=None):
    return metric_log.MetricLog(
        workdir,
        start_step=start_step,
        tensorboard=tensorboard,
        wandb_project=wandb_project,
        config=config or {},
        run_name="a run",
    )


def _rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _events(folder):
    """Return the events in a folder's files, oldest file first.

    A record is: length, checksum, message, checksum.
    """
    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def _age(folder):
    """Rename the event files, so that a run in the same second does not reuse their names."""
    for path in folder.iterdir():
        path.rename(path.with_name("older-" + path.name))


def _scalars(events):
    return [
        (event.step, v.tag, v.simple_value)
        for event in events
        for v in event.summary.value
        if not v.image.width
    ]


def test_rows_hold_plain_numbers_and_are_written_at_once(tmp_path):
    log = _log(tmp_path)
    log.scalars(1, {"loss": np.float32(0.5), "images_per_s": 3})
    log.scalars(2, {"loss": math.nan, "grad_norm": math.inf})
    expected = [
        {"step": 1, "loss": 0.5, "images_per_s": 3.0},
        {"step": 2, "loss": None, "grad_norm": None},
    ]
    assert _rows(tmp_path) == expected  # before close: a kill loses no row
    log.close()
    log.close()
    assert _rows(tmp_path) == expected


def test_a_resumed_run_has_each_step_once(tmp_path):
    with _log(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.scalars(step, {"loss": step})
    with _log(tmp_path, start_step=2) as log:
        assert [row["step"] for row in _rows(tmp_path)] == [1, 2]
        for step in (3, 4, 5):
            log.scalars(step, {"loss": 10 * step})
    assert [(row["step"], row["loss"]) for row in _rows(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 30),
        (4, 40),
        (5, 50),
    ]


@pytest.mark.parametrize(
    "rest", [b'{"step": 2, "lo', b'{"step": 2}', b"\0\0\0\0", b'\xff\n[1]\n{"loss": 1}\n7\n']
)
def test_rows_that_a_kill_truncated_are_dropped(tmp_path, rest):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n' + rest)
    with _log(tmp_path, start_step=2) as log:
        log.scalars(3, {"loss": 3})
    assert _rows(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}]


def test_an_unknown_scalar_reaches_every_sink_and_the_line_by_its_name(tmp_path, wandb):
    metrics = {"loss": 0.5, "align_loss": 0.25}
    with _log(tmp_path, tensorboard=True, wandb_project="digits") as log:
        log.scalars(3, metrics)
    assert _rows(tmp_path) == [{"step": 3, "loss": 0.5, "align_loss": 0.25}]
    assert _scalars(_events(tmp_path / "tensorboard")) == [
        (3, "loss", 0.5),
        (3, "align_loss", 0.25),
    ]
    assert wandb.logged == [(3, metrics)]
    line = metric_log.format_line(3, 9, metrics)
    assert line == "step 3/9  loss  0.5000  align_loss 0.25"


def test_tensorboard_has_scalars_before_close_and_images(tmp_path):
    expected = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    log = _log(tmp_path, tensorboard=True)
    log.scalars(1, {"loss": 0.5})
    deadline = time.monotonic() + 20  # it takes about 1 s; by default tensorboardX takes 120 s
    while not _scalars(_events(tmp_path / "tensorboard")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _scalars(_events(tmp_path / "tensorboard")) == [(1, "loss", 0.5)]
    log.image(2, "samples", expected)
    log.close()
    (image,) = [
        v.image
        for event in _events(tmp_path / "tensorboard")
        for v in event.summary.value
        if v.image.width
    ]
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), expected
    )


def test_tensorboard_hides_steps_that_a_resumed_run_logs_again(tmp_path):
    with _log(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3, 4):
            log.scalars(step, {"loss": step})
    _age(tmp_path / "tensorboard")
    with _log(tmp_path, start_step=2, tensorboard=True) as log:
        log.scalars(3, {"loss": 30})
    # TensorBoard's rule: a session that starts at step s hides all earlier events of steps >= s.
    shown = []
    for event in _events(tmp_path / "tensorboard"):
        if event.session_log.status == event_pb2.SessionLog.START:
            shown = [row for row in shown if row[0] < event.step]
        shown += _scalars([event])
    assert shown == [(1, "loss", 1), (2, "loss", 2), (3, "loss", 30)]


def test_without_tensorboard_there_is_no_folder(tmp_path):
    _log(tmp_path).close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


class _FakeWandb(types.ModuleType):
    """A stand-in for wandb that records its calls."""

    class errors:
        Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished, self.refusal = [], [], 0, None

    def init(self, **arguments):
        if self.refusal:
            raise self.refusal
        self.inits.append(arguments)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, array):
        return ("image", array.shape)


@pytest.fixture
def wandb(monkeypatch):
    module = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_continues_its_wandb_run(tmp_path, wandb):
    config = {"train": {"steps": 4}}
    with _log(tmp_path, wandb_project="digits", config=config) as log:
        log.scalars(1, {"loss": 0.5})
        log.image(1, "samples", np.zeros((2, 3, 1), np.uint8))
    _log(tmp_path, start_step=1, wandb_project="digits", config=config).close()
    first, second = wandb.inits
    assert first == second
    assert first["id"] == (tmp_path / "wandb_id.txt").read_text().strip() != ""
    assert (first["project"], first["name"], first["config"], first["resume"]) == (
        "digits",
        "a run",
        config,
        "allow",
    )
    assert wandb.logged == [(1, {"loss": 0.5}), (1, {"samples": ("image", (2, 3, 1))})]
    assert wandb.finished == 2


def test_wandb_is_not_used_unless_a_project_is_given(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from the environment")
    _log(tmp_path).close()
    assert not wandb.inits and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_missing_wandb_is_a_one_line_error_and_changes_no_log(tmp_path, monkeypatch):
    with _log(tmp_path) as log:
        log.scalars(5, {"loss": 1})
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    with pytest.raises(
        UserError, match=r"'digits'.*not installed; pip install -e \"\.\[wandb\]\""
    ) as caught:
        _log(tmp_path, wandb_project="digits")
    assert "\n" not in str(caught.value)
    assert [row["step"] for row in _rows(tmp_path)] == [5]


def test_a_refusal_of_wandb_is_a_one_line_error(tmp_path, wandb):
    wandb.refusal = wandb.errors.Error("No API key\n  configured.")
    with pytest.raises(UserError, match=r"\(No API key configured\.\); run `wandb login`"):
        _log(tmp_path, wandb_project="digits")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder that storage takes for a bucket."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    monkeypatch.setattr(storage, "is_remote", lambda path: os.fspath(path).startswith(str(folder)))
    monkeypatch.setattr(metric_log.tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    return folder


def test_a_remote_log_is_copied_on_close_and_continues_when_resumed(remote, tmp_path):
    with _log(remote, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.scalars(step, {"loss": step})
        assert os.listdir(remote) == []  # less than a minute has passed
    with _log(remote, start_step=2, tensorboard=True) as log:
        log.scalars(3, {"loss": 30})
    assert [(row["step"], row["loss"]) for row in _rows(remote)] == [(1, 1), (2, 2), (3, 30)]
    assert _scalars(_events(remote / "tensorboard"))[-1] == (3, "loss", 30)
    assert os.listdir(tmp_path / "local") == []


def test_a_remote_log_is_copied_while_it_grows_and_a_failed_copy_is_retried(remote, monkeypatch):
    monkeypatch.setattr(metric_log, "_COPY_EVERY_S", 0.0)
    write, failures = storage.write_bytes, [OSError("network"), None, None]

    def flaky_write(path, data):
        if failure := failures.pop() if failures else None:
            raise failure
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", flaky_write)
    log = _log(remote)
    for step in (1, 2, 3):  # the third copy fails
        log.scalars(step, {"loss": step})
        log._mirror._copy.exception()  # waits for it
    assert [row["step"] for row in _rows(remote)] == [1, 2]
    log.scalars(4, {"loss": 4})
    log.close()
    assert [row["step"] for row in _rows(remote)] == [1, 2, 3, 4]


def test_a_missing_wandb_is_reported_for_a_remote_log_too(remote, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed"):
        _log(remote, wandb_project="digits")


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_only_its_lines_if_stderr_is_not_a_terminal(capsys):
    with metric_log.Progress(0, 10) as progress:
        progress.update(3)
        progress.write("a line")
    out, err = capsys.readouterr()
    assert (out, err) == ("a line\n", "")


def test_progress_counts_from_the_step_at_which_the_run_resumes(monkeypatch, capsys):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with metric_log.Progress(5, 10, unit="image") as progress:
        progress.update(7)
        progress.update(10)
        progress.write("a line")
    for text in ("5/10", "10/10", "image"):
        assert text in terminal.getvalue()
    assert capsys.readouterr().out == "a line\n"


def test_the_line_has_its_metrics_in_order_with_units():
    metrics = {
        "eta_s": 3725.4, "extra": 0.123456, "mfu": 0.4123, "flops_per_s": 1.2345e12,
        "images_per_s": 1234.56, "learning_rate": 1e-4, "grad_norm": 0.4567, "loss": 0.83123,
    }  # fmt: skip
    assert metric_log.format_line(1200, 400_000, metrics) == (
        "step   1200/400000  loss  0.8312  grad_norm   0.457  lr 1.00e-04   1,234.6 images/s"
        "  1.23 TFLOP/s  MFU 41.2 %  extra 0.1235  ETA 1:02:05"
    )


def test_the_columns_of_two_lines_are_aligned():
    first = metric_log.format_line(
        9, 1000, {"loss": 0.9, "grad_norm": 12.0, "images_per_s": 9.0, "flops_per_s": 1e9}
    )
    later = metric_log.format_line(
        1000, 1000, {"loss": 0.1, "grad_norm": 0.1, "images_per_s": 12345.0, "flops_per_s": 99.96e9}
    )
    assert len(first) == len(later)
    assert [first.index(name) for name in ("loss", "grad_norm", "images/s", "FLOP/s")] == [
        later.index(name) for name in ("loss", "grad_norm", "images/s", "FLOP/s")
    ]
    assert "ETA" not in first and "MFU" not in first


@pytest.mark.parametrize(
    "flops, text",
    [
        (0.0, "0.00 FLOP/s"),
        (999.4, "999 FLOP/s"),
        (999.6, "1.00 kFLOP/s"),
        (12.34e12, "12.3 TFLOP/s"),
        (2.5e18, "2.50 EFLOP/s"),
        (math.nan, "nan FLOP/s"),
    ],
)
def test_si_units(flops, text):
    assert metric_log.format_line(1, 1, {"flops_per_s": flops}).endswith(text)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (360_000, "100:00:00"), (math.inf, "-:--:--")],
)
def test_eta(seconds, text):
    assert metric_log.format_line(1, 1, {"eta_s": seconds}).endswith("ETA " + text)


@pytest.fixture
def full_disk(monkeypatch):
    """Let os.write take `room[0]` more bytes, then fail as on a full disk."""
    write = os.write
    room = [10**9]

    def limited(file, data):
        if not room[0]:
            raise OSError(28, "No space left on device")
        count = write(file, bytes(data)[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", limited)
    return room


@pytest.mark.parametrize("room", [0, 1, 30, 100, 333])
def test_a_full_disk_is_a_warning_and_no_row_is_lost_once_there_is_room(
    tmp_path, full_disk, capsys, room
):
    with _log(tmp_path, tensorboard=True) as log:
        log.scalars(1, {"loss": 1.0, "grad_norm": 2.0})
        full_disk[0] = room
        for step in range(2, 8):
            log.scalars(step, {"loss": 1.0 / step, "grad_norm": 2.0})
            log.image(step, "samples", np.zeros((4, 4, 1), np.uint8))
        full_disk[0] = 10**9
        log.flush()
        log.scalars(8, {"loss": 0.125, "grad_norm": 2.0})
    assert [row["step"] for row in _rows(tmp_path)] == list(range(1, 9))
    scalars = [(step, tag) for step, tag, _ in _scalars(_events(tmp_path / "tensorboard"))]
    assert [step for step, tag in scalars if tag == "loss"] == list(range(1, 9))
    assert [step for step, tag in scalars if tag == "grad_norm"] == list(range(1, 9))
    lines = capsys.readouterr().err.splitlines()
    for place in ("metrics.jsonl", "tensorboard/"):
        assert [line for line in lines if line.startswith(f"warning: {place}")] == [
            f"warning: {place} cannot be written (No space left on device); training goes on, and "
            "tries again",
            f"warning: {place} is written again, without a gap",
        ]


def test_rows_that_find_no_room_until_the_end_are_said_to_be_lost(tmp_path, full_disk, capsys):
    with _log(tmp_path, tensorboard=True) as log:
        full_disk[0] = 0
        log.scalars(1, {"loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert "warning: metrics.jsonl lacks its last rows (No space left on device)" in lines
    assert "warning: tensorboard/ lacks its last rows (No space left on device)" in lines


def test_a_step_that_is_not_a_number_is_dropped_with_its_row(tmp_path):
    rows = ['{"step": 1}', '{"step": null}', '{"step": "2"}', "{}", "[1]", "{", '{"step": true}']
    (tmp_path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    _log(tmp_path, start_step=5).close()
    assert _rows(tmp_path) == [{"step": 1}]
