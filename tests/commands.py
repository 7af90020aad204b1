"""Call main as a user does, on a run so small that it takes about a second."""

import contextlib
import io
import json
import pathlib

import numpy as np
from etils import epath
from PIL import Image

from sit_jax import main, manifest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = str(ROOT / "configs" / "digits.py")


def flags(**settings):
    """Return the flags of settings written train__steps=4."""
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]


TINY = [
    "--config", DIGITS,
    *flags(
        model__depth=1, model__width=16, model__heads=2, train__batch=8, train__steps=4,
        optimizer__learning_rate=0.02, train__ema_decay=0.5,
        checkpoint__every=2, log__every=1, log__sheet_every=2, log__sheet_count=8,
        sample__steps=2, sample__count=8, sample__batch=8, sample__columns=5, sample__scale=3,
    ),
]  # fmt: skip
FOLDER = flags(data__source="folder", data__split="all", data__channels=3, data__classes=2)


def call(*arguments):
    """Return main's exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def succeed(*arguments):
    """Assert that main succeeds without a warning; return its stdout."""
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")
    return out


def refusal(*arguments):
    """Assert that main refuses in one line with exit status 2; return the line."""
    status, _, err = call(*arguments)
    assert status == 2, err
    assert err.startswith("error: "), err
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err


def record_as_trained_with(workdir, **settings):
    """Change settings, written train__steps=4, in config.json and in every checkpoint's note."""
    config = json.loads((workdir / "config.json").read_text())
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    (workdir / "config.json").write_text(json.dumps(config))
    for folder in (workdir / "checkpoints").iterdir():
        recorded = manifest.read(epath.Path(folder))
        path = folder / "note" / "metadata"
        note = json.loads(path.read_text())
        note["config"] |= {key.replace("__", "."): value for key, value in settings.items()}
        path.write_text(json.dumps(note))
        manifest.write(epath.Path(folder), recorded.step, recorded.run)


def snapshot(folder):
    """Return the contents of a folder by relative path; None if the folder does not exist.

    Files are bytes, and folders are None.
    """
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def rows(workdir):
    """Return the rows of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def pictures(folder):
    """Return the pixels of each PNG in the folder images/ of results by file name."""
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("images/0*.png")}


def write_images(folder, *names):
    """Write a plain image of its own colour for each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 9), (number, 100, 200)).save(folder / name)
