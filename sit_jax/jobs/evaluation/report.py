"""A report of an evaluation as one file of Markdown and one of HTML, pictures included."""

import base64
import dataclasses
import html
from collections.abc import Sequence

from sit_jax.jobs.render import markdown_table

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { border: 1px solid #bbb; padding: 0.2rem 0.6rem }
td { font-variant-numeric: tabular-nums } img { max-width: 100% }
pre { background: #f4f4f4; padding: 0.6rem; overflow-x: auto }"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report. What is empty is left out."""

    title: str
    text: Sequence[str] = ()  # paragraphs
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    command: str = ""
    picture: bytes = b""  # a PNG


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the report as Markdown. Its pictures are data URLs, which GitHub does not show."""
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for paragraph in section.text:
            lines += ["", paragraph]
        if section.rows:
            lines += ["", markdown_table(section.header, section.rows).rstrip("\n")]
        if section.command:
            lines += ["", "```bash", section.command, "```"]
        if section.picture:
            lines += ["", f"![{section.title}]({_data_url(section.picture)})"]
    return "\n".join(lines) + "\n"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """Return the report as an HTML page that needs no other file."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
        if section.rows:
            parts += ["<table>", _html_row("th", section.header)]
            parts += [_html_row("td", row) for row in section.rows]
            parts.append("</table>")
        if section.command:
            parts.append(f"<pre>{html.escape(section.command)}</pre>")
        if section.picture:
            alt = html.escape(section.title, quote=True)
            parts.append(f'<img alt="{alt}" src="{_data_url(section.picture)}">')
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
