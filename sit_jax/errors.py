"""The one exception a user's mistake raises: main prints it as a single line and exits with status 2."""

import difflib
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Bad input. The message is one line: the value, what was expected, and what to do about it."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """A `UserError` for a name that is in no table; it names the nearest, and lists a short table."""
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    # A table longer than a few lines of a terminal helps nobody.
    listed = (
        f"known: {', '.join(map(repr, known))}"
        if len(known) <= 20
        else f"{len(known)} names are known"
    )
    return UserError(f"unknown {kind} {name!r}; {hint}{listed}")


def check(condition: object, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require(value: T | None, message: str) -> T:
    """Return a value that must not be None. Raises `UserError(message)` if it is."""
    if value is None:
        raise UserError(message)
    return value
