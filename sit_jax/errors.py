"""The exception for a user's mistake; main prints it as one line and exits with status 2."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

_LONGEST_QUOTED = 100  # characters of a value
_LONGEST_LISTED_TABLE = 20  # a longer one would fill several lines of a terminal


class UserError(ValueError):
    """Bad input. The message is one line: the value, what was expected, and the remedy."""


def unknown_name(kind: str, name: object, table: Iterable[str]) -> UserError:
    """Return a `UserError` for a `name` that `table` lacks.

    The message suggests the nearest names and lists the table if it is short.
    """
    names = list(table)
    nearest = difflib.get_close_matches(brief(name).strip("'"), names, n=3, cutoff=0.5)
    suggestion = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    if len(names) <= _LONGEST_LISTED_TABLE:
        listed = f"known: {', '.join(map(repr, names))}"
    else:
        listed = f"{len(names)} names are known"
    return UserError(f"unknown {kind} {brief(name)}; {suggestion}{listed}")


def brief(value: object) -> str:
    """Return the value as a message quotes it: its repr, cut if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of 4,300 digits, a list in a list in a list ...
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= _LONGEST_QUOTED else f"{text[:_LONGEST_QUOTED]}..."


def check(condition: object, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require(value: T | None, message: str) -> T:
    """Return a value that must not be None. Raises `UserError(message)` if it is."""
    if value is None:
        raise UserError(message)
    return value


def check_tensors(
    source: str,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    remedy: str = "",
) -> None:
    """Compare the tensors of `source` with the expected ones, both as name -> shape.

    Raises UserError that names the missing, unexpected and mis-shaped tensors.
    """
    problems = [
        f"{name} is missing, expected shape {list(shape)}"
        for name, shape in expected.items()
        if name not in shapes
    ]
    problems += [
        f"{name} of shape {list(shape)} is unexpected"
        for name, shape in shapes.items()
        if name not in expected
    ]
    problems += [
        f"{name} has shape {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != tuple(shape)
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{source} does not fit: {'; '.join(problems[:4])}{more}{remedy}")
