"""The label table of a file: whether its last row is the null label's.

With label dropout the reference's table has num_classes + 1 rows, the last for the null label.
Without (a dropout of 0, in variants of it) every row may be a class. Our table always has the null
row. A row of zeros then stands in its place: no label of the run refers to it, so its gradients,
moments and decay are zero, and it stays what it is.
"""

import dataclasses

import numpy as np

from convert.checkpoint_file import AdamWMoments, CheckpointFile, StateDict
from convert.names import LABEL_TABLE
from sit_jax.errors import check


def settle_null_row(
    path: str, source: CheckpointFile, num_classes: int | None
) -> tuple[CheckpointFile, bool]:
    """Return the content with a null row, and whether the file has one.

    `args` decide, if they record the classes or a dropout of 0. Otherwise the last row is taken for
    the null label's, unless `num_classes`, the flag, is the number of rows.

    Raises UserError if that would leave no class.
    """
    rows = source.ema[LABEL_TABLE].shape[0]
    recorded = source.args.get("num_classes")
    notes = []
    if source.record or recorded == rows - 1:
        has_null = True
    elif recorded == rows or source.args.get("class_dropout_prob") == 0:
        has_null = False
    else:
        has_null = num_classes != rows
        notes.append(
            f"the last of the {rows} rows of the label table is taken for the null label; if it "
            f"is a class, give --num_classes {rows}"
        )
    check(
        rows > has_null,
        f"{path}: the label table {LABEL_TABLE} has {rows} row; if it is a class, without a null "
        "label, give --num_classes 1",
    )
    if has_null:
        return dataclasses.replace(source, notes=(*source.notes, *notes)), True
    if num_classes not in (None, rows):
        return source, False  # a new table replaces it
    note = (
        f"each of the {rows} rows of the label table is a class and none the null label's: zeros "
        "stand there, and train.label_dropout is 0"
    )
    extended = dataclasses.replace(
        source,
        ema=_extended(source.ema),
        model=_extended(source.model) if source.model else None,
        settings=source.settings | {"train.label_dropout": 0.0},
        notes=(*source.notes, note),
    )
    return extended, False


def moments_with_null_row(moments: AdamWMoments) -> AdamWMoments:
    """Return the moments with a null row of zeros."""
    return dataclasses.replace(
        moments, exp_avg=_extended(moments.exp_avg), exp_avg_sq=_extended(moments.exp_avg_sq)
    )


def _extended(weights: StateDict) -> StateDict:
    """Return a state dict whose label table has a further row of zeros."""
    table = weights[LABEL_TABLE]

    def read() -> np.ndarray:
        values = table.read()
        return np.concatenate([values, np.zeros_like(values[:1])])

    shape = (*(rows + 1 for rows in table.shape[:1]), *table.shape[1:])
    return weights | {LABEL_TABLE: dataclasses.replace(table, shape=shape, read=read)}
