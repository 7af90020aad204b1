"""Help on settings, derived from their declarations.

--help-config prints it as text. `python -m sit_jax.settings_help` writes it as tables into
configs/README.md, which a test compares with the declarations.
"""

import dataclasses
import textwrap
import types
import typing
from typing import Any

from etils import epath

from sit_jax import storage
from sit_jax.errors import UserError, unknown_name
from sit_jax.laws import Choice, Setting, declared
from sit_jax.settings import Config

_WIDTH = 96
_BEGIN = "<!-- settings tables: generated -->"
_END = "<!-- end of settings tables -->"
_GENERAL = "general"  # the settings outside any section


def sections() -> dict[str, str]:
    """Return {section: one line about its settings}."""
    summaries = {_GENERAL: "Settings outside the sections."}
    for field in dataclasses.fields(Config):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            summaries[field.name] = (field.type.__doc__ or "").split("\n")[0]
    return summaries


def settings_of(name: str) -> list[Setting]:
    """Return the settings of a section, or the one with this key. Raises `UserError` for others."""
    entries = list(declared(Config))
    if name == _GENERAL:
        return [entry for entry in entries if "." not in entry.key]
    chosen = [entry for entry in entries if entry.key == name or entry.key.startswith(f"{name}.")]
    if not chosen:
        known = [*sections(), *(entry.key for entry in entries)]
        error = unknown_name("section or setting", name, known)
        raise UserError(f"{error}; --help-config lists the sections")
    return chosen


def as_text(section: str) -> str:
    """Return the help of a section or of one setting, or for "" the list of sections."""
    if not section:
        lines = ["Sections of settings; --help-config SECTION explains the settings of one.", ""]
        lines += [f"  {name:<11} {summary}" for name, summary in sections().items()]
        return "\n".join(lines)
    entries = settings_of(section)
    wrap = textwrap.TextWrapper(
        _WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
    )
    paragraphs = [sections()[section]] if section in sections() else []
    for entry in entries:
        lines = [f"--config.{entry.key}={shown(entry.default)}"]
        lines += wrap.wrap(entry.help) + wrap.wrap(allowed(entry))
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def as_markdown() -> str:
    """Return a Markdown table of each section."""
    parts = []
    for section, summary in sections().items():
        lines = [
            f"### `{section}`",
            "",
            summary,
            "",
            "| setting | default | values | meaning |",
            "|---|---|---|---|",
        ]
        for entry in settings_of(section):
            default = f"`{shown(entry.default)}`"
            cells = (f"`{entry.key}`", default, allowed(entry), entry.help)
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def with_tables(document: str) -> str:
    """Return the document with the tables between its two markers."""
    before, _, remainder = document.partition(_BEGIN)
    _, _, after = remainder.partition(_END)
    return f"{before}{_BEGIN}\n\n{as_markdown()}\n\n{_END}{after}"


def shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "()"
    return str(value)


def allowed(entry: Setting) -> str:
    """Return the values that a setting may have, in a few words."""
    kind = type_name(entry.type)
    law = entry.law.describe()
    if isinstance(entry.law, Choice):
        is_list = typing.get_origin(entry.type) is tuple
        prefix = "one or more of: " if is_list else ""
        suffix = ", none" if isinstance(entry.type, types.UnionType) else ""
        return prefix + law + suffix
    return f"{kind}: {law}" if law else kind


_TYPE_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def type_name(kind: Any) -> str:
    """Return the name of a setting's type."""
    if isinstance(kind, types.UnionType):  # X | None
        return f"{_TYPE_NAMES[typing.get_args(kind)[0]]} or none"
    if typing.get_origin(kind) is tuple:
        return f"list of {_TYPE_NAMES[typing.get_args(kind)[0]].replace('number', 'numbers')}"
    return _TYPE_NAMES[kind]


if __name__ == "__main__":
    readme = epath.Path("configs/README.md")
    storage.write_text(readme, with_tables(readme.read_text()))
