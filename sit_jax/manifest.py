"""The manifest of a checkpoint: its step, its run, and the size and SHA-256 of every file.

It is written once the checkpoint is complete, and checked before the checkpoint is used.
"""

import hashlib
import json
from typing import NamedTuple

from etils import epath

from sit_jax import storage

NAME = "manifest.json"
_LARGEST = 2**26  # bytes of a manifest: hundreds of thousands of files
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


class Manifest(NamedTuple):
    """The content of a manifest. Earlier versions recorded neither step nor run."""

    step: int | None
    run: str | None
    files: dict[str, tuple[int, str]]  # relative name -> (bytes, SHA-256)


def write(folder: epath.Path, step: int, run: str) -> None:
    """Write the manifest of a complete checkpoint."""
    files = {
        name: {"bytes": path.stat().length, "sha256": storage.sha256(path)}
        for name, path in sorted(_files(folder).items())
    }
    text = json.dumps({"step": step, "run": run, "files": files}, indent=1)
    storage.write_text(folder / NAME, text)


def read(folder: epath.Path) -> Manifest:
    """Return the manifest in a folder.

    Raises FileNotFoundError if there is none, and one of _UNREADABLE if it is damaged.
    """
    path = folder / NAME
    size = path.stat().length
    if size > _LARGEST:
        raise ValueError(f"it has {size} bytes")
    content = json.loads(path.read_text())
    entries = content["files"] if "step" in content else content
    files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    return Manifest(content.get("step"), content.get("run"), files)


def problem(folder: epath.Path, step: int, run: str | None) -> str | None:
    """Return the reason why a step's folder cannot be used, in a few words; None if it can.

    `run` is the id of the run that the folder must belong to; None accepts any.
    """
    try:
        manifest = read(folder)
        return _mismatch(manifest, step, run) or _damage(folder, manifest)
    except FileNotFoundError as error:
        if (folder / NAME).exists():
            return f"{error.filename} has just been deleted"
        return "its manifest is missing, so the save did not finish"
    except _UNREADABLE as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"


def digest(folder: epath.Path, item: str) -> str:
    """Return a name for the content of one item of a checkpoint: 16 hexadecimal digits."""
    files = read(folder).files
    lines = [
        f"{name} {sha256}" for name, (_, sha256) in files.items() if name.startswith(f"{item}/")
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _mismatch(manifest: Manifest, step: int, run: str | None) -> str | None:
    if manifest.step not in (None, step):
        return f"it is the checkpoint of step {manifest.step}, under another name"
    if run is not None and manifest.run not in (None, run):
        return f"it is of another run, {manifest.run}, while this one is {run}"
    return None


def _damage(folder: epath.Path, manifest: Manifest) -> str | None:
    if not manifest.files:
        return "its manifest is empty"
    files = _files(folder)
    for name, (expected_size, _) in manifest.files.items():  # first, because it costs nothing
        if name not in files:
            return f"{name} is missing"
        size = files[name].stat().length
        if size != expected_size:
            return f"{name} has {size} bytes instead of {expected_size}"
    for name, (_, expected) in manifest.files.items():
        if storage.sha256(files[name]) != expected:
            return f"the content of {name} has changed"
    return None


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """Return every file below a folder except the manifest, by its relative name."""
    files: dict[str, epath.Path] = {}
    for path in folder.iterdir():
        if path.is_dir():
            files |= {f"{path.name}/{name}": file for name, file in _files(path).items()}
        elif path.name != NAME:
            files[path.name] = path
    return files
