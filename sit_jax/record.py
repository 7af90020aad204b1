"""Records: one example as a dict of arrays, which a data source passes to a codec.

A source chooses the names. Today's sources have an image and a label; another could have stored
latents or text. The spec of a record gives the shape and type of each array without reading any
data. A batch of records is a dict of the same names, whose arrays have a leading axis b.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]  # NumPy arrays, or NumPy scalars for shape ()


class ArraySpec(NamedTuple):
    """Shape and type of one array of a record."""

    shape: tuple[int, ...]
    dtype: type[np.generic]


RecordSpec = Mapping[str, ArraySpec]
