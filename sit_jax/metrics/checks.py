"""What every metric asks of its features: a matrix, and no row that is not finite."""

import numpy as np

from sit_jax.errors import check

_LISTED = 5  # rows that a message names


def check_features(features_nd: np.ndarray, first_row: int = 0, what: str = "features") -> None:
    """Raise UserError unless the features are a matrix [n, d] of finite numbers.

    The message names the rows that are not finite; they are counted from `first_row`.
    """
    check(features_nd.ndim == 2, f"{what} have shape {features_nd.shape}; expected [images, width]")
    # A sum is finite only if every summand is, or if it overflows; the second test sorts that out.
    finite_n = np.isfinite(features_nd.sum(axis=1, dtype=np.float64))
    if finite_n.all():
        return
    bad = [row for row in np.flatnonzero(~finite_n) if not np.isfinite(features_nd[row]).all()]
    named = ", ".join(str(first_row + row) for row in bad[:_LISTED])
    more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    check(
        not bad,
        f"{what} are nan or inf in row {named}{more}; expected finite numbers: look at these "
        "images (counted from 0) and make them again",
    )


def check_same_width(a_nd: np.ndarray, b_md: np.ndarray) -> None:
    """Raise UserError unless two arrays have the same last axis, as one extractor gives."""
    check(
        a_nd.shape[-1] == b_md.shape[-1],
        f"features of width {a_nd.shape[-1]} and {b_md.shape[-1]}; expected the same width: use "
        "one extractor for both",
    )
