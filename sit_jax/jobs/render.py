"""Tables as Markdown, and figures as PNGs."""

import io
from collections.abc import Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown, each line with its line break."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_escape, line))} |\n" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib, in inches. It needs no display."""
    from matplotlib.figure import Figure  # here because it takes a second

    return Figure(figsize=(width, height), layout="constrained")


def figure_png(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
