"""The declaration of a setting: its default, its law (the allowed values) and a phrase of help.

`settings.py` declares every setting with `setting` or `choice`. Validation, `--help-config`, the
tables in configs/README.md and the test that walks all keys are derived from these declarations.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sit_jax.errors import brief, check, unknown_name


@dataclasses.dataclass(frozen=True)
class Between:
    """A number from `low` to `high`, both included, so neither infinite nor NaN."""

    low: float
    high: float

    def check(self, key: str, value: Any) -> None:
        """Raise `UserError` unless the value, or each element of a list, lies between the ends.

        None passes: the type decides on it.
        """
        verb = "holds" if isinstance(value, tuple) else "is"
        for number in value if isinstance(value, tuple) else (value,):
            check(
                number is None or self.low <= number <= self.high,
                f"{key} {verb} {brief(number)}; expected {self.describe()}",
            )

    def describe(self) -> str:
        """Return both ends."""
        return f"{_number(self.low)} to {_number(self.high)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


@dataclasses.dataclass(frozen=True)
class Anything:
    """Whatever the type allows, which is text, or true and false."""

    def check(self, key: str, value: Any) -> None:
        """Accept the value."""

    def describe(self) -> str:
        """Return an empty text, since the type says everything."""
        return ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of these names."""

    names: tuple[str, ...]

    def check(self, key: str, value: Any) -> None:
        """Raise `UserError` with the nearest name, unless the value (or each element) is one."""
        for name in value if isinstance(value, tuple) else (value,):
            if name is not None and name not in self.names:
                raise unknown_name(key, name, self.names)

    def describe(self) -> str:
        """Return the names, separated by commas."""
        return ", ".join(self.names)


@dataclasses.dataclass(frozen=True)
class UserPath:
    """The path of a file or folder. `config` expands a leading ~."""

    def check(self, key: str, value: Any) -> None:
        """Accept the value: whether it exists is known where it is opened."""

    def describe(self) -> str:
        """Return that it is a path, and the meaning of ~."""
        return "a path; a leading ~ is the home folder"


anything = Anything()
user_path = UserPath()
Law = Between | Choice | UserPath | Anything


def setting(default: Any, law: Law, help: str) -> Any:
    """Declare a field of a settings dataclass. `help` is a phrase, without a full stop."""
    return dataclasses.field(default=default, metadata={"law": law, "help": help})


def choice(default: Any, names: Iterable[str], help: str) -> Any:
    """Declare a field whose value, or each of whose elements, is a name in a table."""
    return setting(default, Choice(tuple(names)), help)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting as it was declared."""

    key: str  # dotted
    type: Any
    default: Any
    law: Law
    help: str


def declared(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a settings class and of the classes inside it."""
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from declared(field.type, f"{prefix}{field.name}.")
        else:
            yield Setting(
                key=prefix + field.name,
                type=field.type,
                default=field.default,
                law=field.metadata["law"],
                help=field.metadata["help"],
            )


def in_group(key: str, group: Sequence[str]) -> bool:
    """Return True if a group such as ("train.steps", "sample.") lists the key or its section."""
    return key in group or key.partition(".")[0] + "." in group
