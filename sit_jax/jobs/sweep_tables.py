"""The rows of a sweep as tables and as a plot."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sit_jax.jobs.evaluation.scores import MEASURES
from sit_jax.jobs.render import figure_png, markdown_table, new_figure

# These identify a row.
KEY = (
    "step",
    "weights",
    "solver",
    "steps",
    "rtol",
    "diffusion_form",
    "cfg_scale",
    "cfg_first",
    "cfg_last",
)
_FORMATS = {"evaluations": "{:g}", "networks": "{:g}", "seconds": "{:.1f}"}
_FORMATS |= {name: measure.format for name, measure in MEASURES.items()}
_LOG_SCALE = ("frechet", "fid", "sfid", "fd_dinov2")


def label(row: Mapping[str, Any]) -> str:
    """Return a readable name for a row."""
    steps = f"rtol {row['rtol']:g}" if row["steps"] is None else f"{row['steps']} steps"
    return f"{_series(row)} cfg {_guidance(row)}, {steps}, {row['weights']} {row['step']}"


def _guidance(row: Mapping[str, Any]) -> str:
    if row["cfg_first"] in (None, 0) and row["cfg_last"] in (None, 1):
        return f"{row['cfg_scale']:g}"
    return f"{row['cfg_scale']:g} in {row['cfg_first']:g}..{row['cfg_last']:g}"


def _series(row: Mapping[str, Any]) -> str:
    parts = [row["solver"], row["diffusion_form"], "adaptive" if row["rtol"] else None]
    return " ".join(part for part in parts if part)


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return a header and one line per row. Columns that do not apply are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return the rows as a Markdown table, without the columns that are empty in all of them."""
    columns = [name for name in columns if any(row[name] is not None for row in rows)]

    def cell(name: str, value: Any) -> str:
        return "" if value is None else _FORMATS.get(name, "{}").format(value)

    return markdown_table(columns, [[cell(name, row[name]) for name in columns] for row in rows])


def best_rows(rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> Iterator[str]:
    """Yield a line for each measure: its best value, and the row that has it."""
    for name in measures:
        measure = MEASURES[name]
        choose = min if measure.better == "lower" else max
        best = choose(rows, key=lambda row: row[name])
        yield f"best {measure.label}: {measure.format.format(best[name])}, {label(best)}"


def plot(
    rows: Sequence[Mapping[str, Any]], measures: Sequence[str], floor: Mapping[str, float]
) -> bytes:
    """Return a PNG of each measure, a line for each solver and set of weights.

    They are drawn against network evaluations, with a column of panels for each guidance; or, if
    there are more guidance scales than costs, against the scale, in one column. `floor` has
    measures of real images.
    """
    scales = {row["cfg_scale"] for row in rows}
    against_scale = len(scales) > len({(row["steps"], row["rtol"]) for row in rows})
    x = "cfg_scale" if against_scale else "networks"
    panels: dict[str, list] = {}
    for row in sorted(rows, key=lambda row: row["cfg_scale"]):
        panels.setdefault("" if against_scale else f"cfg {_guidance(row)}", []).append(row)
    figure = new_figure(6 * max(len(panels), 2), 4 * len(measures))
    axes = figure.subplots(len(measures), len(panels), sharex=True, sharey="row", squeeze=False)
    for column, (title, in_panel) in enumerate(panels.items()):
        for name, points in _lines(in_panel, rows, x):
            for axis, measure in zip(axes[:, column], measures, strict=True):
                values = [point[measure] for point in points]
                axis.plot([point[x] for point in points], values, marker="o", ms=3, label=name)
        axes[0, column].set(title=title, xscale="linear" if against_scale else "log")
        axes[-1, column].set(xlabel="guidance scale" if against_scale else "network evaluations")
        for axis, measure in zip(axes[:, column], measures, strict=True):
            if measure in floor:
                axis.axhline(floor[measure], color="grey", ls=":", label="halves of real images")
        axes[0, column].legend(fontsize="x-small")
    for axis, name in zip(axes[:, 0], measures, strict=True):
        scale = "log" if name in _LOG_SCALE else "linear"
        axis.set(ylabel=MEASURES[name].label, yscale=scale)
    return figure_png(figure)


def _lines(
    in_panel: Iterable[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], x: str
) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield (name, rows in the order of x) of each line of a panel.

    A name says only what differs between `rows`.
    """
    many_weights = len({(row["step"], row["weights"]) for row in rows}) > 1
    series: dict[str, list] = {}
    for row in in_panel:
        name = _series(row)
        if x == "cfg_scale":
            name += f" {row['steps'] or row['rtol']}"
            if row["cfg_first"] is not None:
                name += f" {row['cfg_first']:g}..{row['cfg_last']:g}"
        if many_weights:
            name += f", {row['weights']} {row['step']}"
        series.setdefault(name, []).append(row)
    for name, points in series.items():
        yield name, sorted(points, key=lambda row: row[x])
