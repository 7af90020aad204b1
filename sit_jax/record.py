"""A record is all that passes from a data source to a codec: a dict of arrays, one example.

A source chooses the names: an image and a label today, stored latents or text in others. Its spec
says the shape and type of each array without reading any. A batch of records is a dict of the
same names whose arrays have a leading axis b.
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
