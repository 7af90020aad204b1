"""Turns the results of gpu_speed.py into tables in Markdown."""

from collections.abc import Sequence

import numpy as np

from sit_jax.models.sizes import forward_flops, size_by_name
from tests.benchmarks import gpu_kernels
from tests.benchmarks.torch_speed import CHANNELS, INPUT

_TITLES = {
    "training": ("training step", "ms", "images/s"),
    "sampling": ("guided sampling, Euler", "ms per evaluation", "images x evaluations / s"),
}
# Forward passes that a unit costs: a backward pass takes two; guidance needs two networks.
_PASSES = {"training": 3, "sampling": 2}


def quartiles(values: Sequence[float], digits: int) -> str:
    """Return the median and the quartiles as text."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:,.{digits}f} ({low:,.{digits}f}..{high:,.{digits}f})"


def rival(row: dict, rows: Sequence[dict]) -> dict | None:
    """Return our row that a row of PyTorch is compared with, or None.

    It is of the same number format, or of bfloat16 where there is none; and of the same batch, or
    the largest.
    """
    ours = [one for one in rows if one["side"] == "ours" and one["part"] == row["part"]]
    if row["part"] == "sampling":
        ours = [one for one in ours if one["batch"] == row["batch"]]
    order = [(one["format"] == row["format"], one["batch"] == row["batch"]) for one in ours]
    ranked = sorted(zip(order, (one["batch"] for one in ours), range(len(ours)), strict=True))
    return ours[ranked[-1][2]] if ranked else None


def ratios(row: dict, ours: dict) -> np.ndarray:
    """Return how many times as many images a second ours computes, by pairs of turns."""
    count = min(len(row["ms"]), len(ours["ms"]))
    theirs, mine = (np.array(one["ms"][:count]) / one["batch"] for one in (row, ours))
    return theirs / mine


def speed_table(results: dict, part: str) -> str:
    """Return the table of a part, or "" if nothing of it was timed."""
    rows = [row for row in results["rows"] if row["part"] == part and row["ms"]]
    if not rows:
        return ""
    what, milliseconds, rate = _TITLES[part]
    flops = forward_flops(size_by_name(results["model"]), INPUT, CHANNELS, False) * _PASSES[part]
    lines = [
        f"| {what} | batch | {milliseconds} | {rate} | TFLOP/s | compilation | peak memory "
        "| speed of ours relative to it |",
        "|---" * 8 + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["format"], -row["batch"], row["side"])):
        per_second = row["batch"] / np.median(row["ms"]) * 1e3
        ours = rival(row, rows) if row["side"] != "ours" else None
        ratio = quartiles(ratios(row, ours), 2) if ours else ""
        if ours and (ours["batch"], ours["format"]) != (row["batch"], row["format"]):
            ratio += f", of {ours['format']} at {ours['batch']}"
        remat = "" if row["remat"] == "dots" else f", remat {row['remat']}"
        lines.append(
            f"| {row['side']} {row['format']}{remat} | {row['batch']} | {quartiles(row['ms'], 2)} "
            f"| {per_second:,.1f} | {per_second * flops / 1e12:.1f} | {row['compile_s']:.1f} s "
            f"| {row['peak_gib']:.1f} GiB | {ratio} |"
        )
    return "\n".join(lines)


def profile_table(results: dict) -> str:
    """Return the table of milliseconds by kind of kernel, or "" if nothing was profiled."""
    columns = ("total", *gpu_kernels.KINDS, "idle")
    lines = [
        f"| ms per step or evaluation | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in results["rows"]:
        if profile := row.get("profile"):
            name = f"{row['side']} {row['part']} {row['format']} @{row['batch']}"
            cells = " | ".join(f"{profile[column]:.2f}" for column in columns)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def report(results: dict) -> str:
    """Return everything that a person wants to read of the results."""
    card = results["card"]
    memory = f", {card['memory_gib']:.0f} GiB" if card["memory_gib"] else ""
    head = (
        f"{card['device']}{memory}; jax {card['jax']}, torch "
        f"{card['torch']}, Python {card['python']}; {results['model']} on {INPUT}x{INPUT}x"
        f"{CHANNELS}; median (quartiles)."
    )
    notes = "\n".join(f"- {note}" for note in results["notes"])
    tables = [speed_table(results, part) for part in _TITLES]
    return "\n\n".join(filter(None, [head, *tables, profile_table(results), notes])) + "\n"
