"""The declaration of a setting: its default, its law (the allowed values) and a phrase of help.

`settings.py` declares every setting with `setting` or `choice`. Validation, `--help-config`, the
tables in configs/README.md and the test that walks all keys are derived from these declarations.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sit_jax.errors import check, unknown_name


@dataclasses.dataclass(frozen=True)
class Law:
    """A condition on one value. `expected` completes the message "KEY is VALUE; expected ..."."""

    holds: Callable[[Any], bool]
    expected: str

    def check(self, key: str, value: Any) -> None:
        """Raise `UserError` unless the law holds. None and empty lists pass: types decide on them.

        Each element of a list must obey the law.
        """
        if isinstance(value, tuple):
            for element in value:
                check(self.holds(element), f"{key} holds {element}; expected {self.expected}")
        elif value is not None:
            check(self.holds(value), f"{key} is {value}; expected {self.expected}")

    def describe(self) -> str:
        """Return the allowed values in a few words, for help and tables."""
        return self.expected


@dataclasses.dataclass(frozen=True)
class Choice:
    """The value is one of these names."""

    names: tuple[str, ...]

    def check(self, key: str, value: Any) -> None:
        """Raise `UserError` with the nearest name, unless the value (or each element) is one."""
        for name in value if isinstance(value, tuple) else (value,):
            if name is not None and name not in self.names:
                raise unknown_name(key, name, self.names)

    def describe(self) -> str:
        """Return the names, separated by commas."""
        return ", ".join(self.names)


anything = Law(lambda value: True, "")  # whatever the type allows
positive = Law(lambda value: value > 0, "more than 0")
not_negative = Law(lambda value: value >= 0, "0 or more")
from_0_to_1 = Law(lambda value: 0 <= value <= 1, "a number from 0 to 1")
seed_range = Law(lambda value: 0 <= value < 2**32, "0 or more, and less than 2**32")


def setting(default: Any, law: Law | Choice, help: str) -> Any:
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
    law: Law | Choice
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
