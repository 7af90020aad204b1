"""The parts that all converters share: argument parser, one-line errors, and atomic output."""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from etils import epath
from safetensors import SafetensorError

from sit_jax import lock, report, runtime, storage
from sit_jax.errors import UserError, check

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # of weights; the content decides
_MARGIN = 10**7  # bytes of free space required beyond the size of the arrays


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as UserError instead of printing its usage and exiting."""

    def parse_known_args(self, *arguments: Any) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Parse, and expand a leading ~ in the paths, which all texts are but a name in a list."""
        flags, unknown = super().parse_known_args(*arguments)
        for name, value in vars(flags).items():
            if isinstance(value, str):
                setattr(flags, name, storage.expand(name, value))
        return flags, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser(
    module: str, description: str, epilog: str | None = None, *, overwrites: bool = True
) -> argparse.ArgumentParser:
    """Return a parser for `python -m convert.MODULE`, with --overwrite unless it has no use."""
    converter_parser = _Parser(
        f"python -m convert.{module}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    if overwrites:
        converter_parser.add_argument(
            "--overwrite",
            action="store_true",
            help="replace an existing output; the old one is kept until the new one is complete",
        )
    return converter_parser


def run(main: Callable[[Sequence[str]], None]) -> int:
    """Run a converter and return its exit status: 0, or 2 after a one-line error on stderr."""
    import jax

    # Convert on the CPU: a training run may be using this machine's accelerator.
    jax.config.update("jax_platforms", "cpu")
    runtime.fix_numerics()
    try:
        main(sys.argv[1:])
        return 0
    except Exception as error:
        line = report.failure_line(error)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2


def check_input(path: str) -> None:
    """Raise UserError unless the path is a regular file. A pipe would wait for ever."""
    check(os.path.exists(path), f"{path!r} does not exist; expected a .pt or .safetensors file")
    if not os.path.isdir(path):
        check(os.path.isfile(path), f"{path!r} is not a regular file; copy it into one")
        return
    if os.path.exists(os.path.join(path, "config.json")) and "checkpoints" in os.listdir(path):
        raise UserError(f"{path!r} is a workdir of this project; sample it, or train on, as it is")
    files = [name for name in sorted(os.listdir(path)) if name.lower().endswith(_SUFFIXES)]
    inside = f"a file in it: {', '.join(files[:4])}" if files else "a .pt or .safetensors file"
    raise UserError(f"{path!r} is a folder; give {inside}")


def check_output(out: str, overwrite: bool) -> None:
    """Raise UserError if `out` is remote, or already exists and `overwrite` is not set.

    First completes or removes what a conversion to the same path that was killed has left.
    """
    path = epath.Path(out)
    storage.clean_up(path.parent, path.name)
    check(
        not storage.is_remote(path),
        f"{out!r} is not on a local disk; convert into a local folder and copy the result",
    )
    check(
        overwrite or not path.exists(),
        f"{out!r} already exists; give another name, or --overwrite to replace it",
    )


@contextlib.contextmanager
def output(out: str, size: int, overwrite: bool) -> Iterator[epath.Path]:
    """Yield a temporary path beside `out`, a file or workdir of about `size` bytes.

    The temporary path is renamed to `out` when the block ends, and removed if the block fails.

    Raises UserError if `out` already exists and `overwrite` is not set, is a folder other than a
    workdir, is in use by a run that is training, or cannot be written. First completes or removes
    what a conversion to the same path that was killed has left.
    """
    check_output(out, overwrite)
    path = epath.Path(out)
    check(
        not path.is_dir() or (path / "config.json").exists(),
        f"{out!r} is a folder but not a workdir, so --overwrite does not replace it; "
        "give another name",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        needed = size + size // 20 + _MARGIN
        free = shutil.disk_usage(path.parent).free
        check(
            needed <= free,
            f"{out!r} needs about {needed / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free; "
            "make room or give another location",
        )
        with contextlib.ExitStack() as stack:
            if path.is_dir():  # a run may be training in it
                stack.enter_context(lock.hold(path))
            yield stack.enter_context(storage.beside(path))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{out!r} could not be written ({reason}); make room or give another location; "
            "the incomplete output has been removed"
        ) from error
