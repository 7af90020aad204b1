"""The table, the plot and the summary of losses over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sit_jax.jobs.render import figure_png, markdown_table, new_figure
from sit_jax.jobs.results import Row

MEASURED = ("model", "memoriser", "difference")  # by Monte Carlo, so with a standard error
KNOWN = ("class_affine", "affine", "zero")  # closed forms
MEANING = {
    "model": "training loss of the model",
    "memoriser": "loss of the best possible prediction for the training images, on the same draws. "
    "On the training images no network can reach less. On test images it is not a minimum: towards "
    "t=1 it predicts the nearest training image, and its loss grows without bound",
    "difference": "model minus memoriser: on the training images, the model's excess",
    "class_affine": "loss of the best affine map of each class",
    "affine": "loss of the best affine map",
    "zero": "loss of the output zero",
    "standard_error": "over the draws of images, noise and times",
}
_TITLES = {
    "difference": "model - memoriser",
    "class_affine": "affine of each class",
    "zero": "output zero",
}


def with_baselines(rows: Sequence[Row], known: Mapping[str, np.ndarray]) -> list[Row]:
    """Return the rows of a set in the order of the strata, with the closed forms added."""
    return [
        row | {key: float(values_s[row["stratum"]]) for key, values_s in known.items()}
        for row in sorted(rows, key=lambda row: row["stratum"])
    ]


def totals(rows: Sequence[Row], *, is_train: bool) -> dict[str, Any]:
    """Return the means over all strata, which are those over the training times.

    Test images have none of the memoriser, whose loss on them is infinite.
    """
    summary: dict[str, Any] = {"draws": sum(row["draws"] for row in rows)}
    for name in MEASURED if is_train else MEASURED[:1]:
        errors = np.array([row[f"{name}_error"] for row in rows])
        summary[name] = {
            "mean": float(np.mean([row[name] for row in rows])),
            "standard_error": float(np.sqrt((errors**2).sum()) / len(rows)),
        }
    for name in KNOWN:
        if name in rows[0]:
            summary[name] = float(np.mean([row[name] for row in rows]))
    return summary


def as_markdown(tables: Mapping[str, Sequence[Row]], summary: Mapping[str, Any]) -> str:
    """Return a table of losses over time for each set, with a last row for all times."""
    parts = []
    for name, rows in tables.items():
        keys = [key for key in (*MEASURED, *KNOWN) if key in rows[0]]
        header = ["times", *(_TITLES.get(key, key) for key in keys)]
        lines = []
        for row in rows:
            times = " to ".join(f"{t:.3f}" for t in row["t"])
            lines.append([times, *(_cell(row[key], row.get(f"{key}_error")) for key in keys)])
        lines.append(["all", *(_total(summary[name], key) for key in keys)])
        table = markdown_table(header, lines)
        parts.append(f"{name} images, split {summary[name]['split']!r}:\n\n{table}")
    return "\n".join(parts)


def as_text(summary: Mapping[str, Any]) -> str:
    """Return the totals in a few lines."""
    lines = []
    for name, total in summary.items():
        if name != "nearest":
            keys = [key for key in (*MEASURED, *KNOWN) if key in total]
            values = ", ".join(f"{_TITLES.get(key, key)} {_total(total, key)}" for key in keys)
            lines.append(f"{name} images: {values}")
    if nearest := summary.get("nearest"):
        medians = ", ".join(
            f"{nearest[kind]['quantiles']['0.5']:.4f} of {kind}"
            for kind in ("samples", "test images")
            if kind in nearest
        )
        lines.append(f"median distance to the nearest training image: {medians}")
        if "closer" in nearest:
            lines.append(
                f"samples closer to one than all but 1 % of test images: {nearest['closer']:.1%}"
            )
    return "\n".join(lines)


def _total(total: Mapping[str, Any], key: str) -> str:
    value = total.get(key)
    if isinstance(value, Mapping):
        return _cell(value["mean"], value["standard_error"])
    return "" if value is None else _cell(value)


def _cell(value: float, error: float | None = None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def plot(tables: Mapping[str, Sequence[Row]]) -> bytes:
    """Return a PNG of the losses over time, and of the model's excess with its standard errors.

    The output zero, far above, is left out.
    """
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    highest = 0.0
    for name, rows in tables.items():
        dashes = "-" if name == "train" else "--"
        t = [np.mean(row["t"]) for row in rows]
        for colour, key in enumerate(("model", "memoriser", "class_affine", "affine")):
            if key in rows[0]:
                label = f"{_TITLES.get(key, key)}, {name}"
                values = [row[key] for row in rows]
                left.plot(t, values, dashes, color=f"C{colour}", marker="o", ms=3, label=label)
                if key != "memoriser":  # whose loss on test images is too large to show
                    highest = max(highest, *values)
        values, errors = ([row[key] for row in rows] for key in ("difference", "difference_error"))
        right.errorbar(t, values, errors, ls=dashes, marker="o", ms=3, capsize=2, label=name)
    right.axhline(0, color="grey", ls=":")
    left.set(xlabel="t (0: noise, 1: data)", ylabel="training loss")
    left.set_ylim(0, 1.05 * highest)
    right.set(xlabel="t", ylabel="model - memoriser (train: the excess)")
    right.set_ylim(-highest, highest)
    left.legend(fontsize="x-small")
    right.legend(fontsize="x-small")
    return figure_png(figure)
