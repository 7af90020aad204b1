"""What the three converters have in common: one line for a mistake, and an output that is there whole or not at all."""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

from etils import epath
from safetensors import SafetensorError

from sit_jax import storage
from sit_jax.errors import UserError, check

_MARGIN = 10**7  # bytes beside the numbers


def parser(module: str, description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        f"python -m convert.{module}", description=description, allow_abbrev=False
    )
    made.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the output, which stays until the new is whole",
    )

    def refuse(message: str) -> None:
        raise UserError(f"{message}; see python -m convert.{module} --help")

    made.error = refuse
    return made


def run(main: Callable[[Sequence[str]], None]) -> int:
    """The exit status of a converter: 0, or 2 after one line on stderr for a mistake of the user's."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator here may be busy with a training run
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def output(out: str, size: int, overwrite: bool) -> Iterator[epath.Path]:
    """Yields where to write the file or workdir `out`, of about `size` bytes; it takes its name when the block ends.

    `UserError` if it exists and is not to be overwritten, or cannot be written.
    """
    path = epath.Path(out)
    check(
        not storage.is_remote(path),
        f"{out!r} is not on a local disk; convert into a folder there and copy it",
    )
    check(
        overwrite or not path.exists(),
        f"{out!r} exists; give another name, or --overwrite to replace it",
    )
    replaceable = not path.is_dir() or (path / "config.json").exists()
    check(
        replaceable,
        f"{out!r} is a folder but no workdir, so --overwrite leaves it alone; give another name",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        needed = size + size // 20 + _MARGIN
        check(
            needed <= free,
            f"{out!r} needs about {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there; make room",
        )
        with storage.beside(path) as new:
            yield new
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{out!r} could not be written ({reason}); make room or give another place; nothing of it is left behind"
        ) from error
