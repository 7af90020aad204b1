"""The exception for a user's mistake; main prints it as one line and exits with status 2."""

import difflib
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

_LONGEST_LISTED_TABLE = 20  # a longer one would fill several lines of a terminal


class UserError(ValueError):
    """Bad input. The message is one line: the value, what was expected, and the remedy."""


def unknown_name(kind: str, name: object, table: Iterable[str]) -> UserError:
    """Return a `UserError` for a `name` that `table` lacks.

    The message suggests the nearest names and lists the table if it is short.
    """
    names = list(table)
    nearest = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    suggestion = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    if len(names) <= _LONGEST_LISTED_TABLE:
        listed = f"known: {', '.join(map(repr, names))}"
    else:
        listed = f"{len(names)} names are known"
    return UserError(f"unknown {kind} {name!r}; {suggestion}{listed}")


def check(condition: object, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require(value: T | None, message: str) -> T:
    """Return a value that must not be None. Raises `UserError(message)` if it is."""
    if value is None:
        raise UserError(message)
    return value
