"""Columns of numbers as arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .feature_names import counted


def matrix(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Convert a column of lists, or of single numbers, to an array (N, D).

    Raises:
        ValueError: Rows are empty or differ in size. The message gives `name`.
    """
    if column.null_count:
        raise ValueError(f"{name!r} is empty in {counted(column.null_count, 'row')}.")
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        return column.to_numpy().reshape(-1, 1)
    sizes = sorted(pc.unique(pc.list_value_length(column)).to_pylist())
    if len(sizes) > 1:
        raise ValueError(
            f"{name!r} has rows of {' and '.join(map(str, sizes))} numbers: give every frame the same number."
        )
    return pc.list_flatten(column).to_numpy().reshape(len(column), -1)


def stack_rows(rows: Sequence[Any], name: str) -> np.ndarray:
    """Stack the numbers of an episode's frames, (T, ...).

    Raises:
        ValueError: Frames differ in shape, or some have no numbers. The message gives `name`.
    """
    missing = [frame for frame, row in enumerate(rows) if row is None]
    if 0 < len(missing) < len(rows):
        raise ValueError(f"{name!r} is missing at frame {missing[0]}.")
    shapes = [np.shape(row) for row in rows]
    for frame, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(f"{name!r} has shape {shape} at frame {frame}, but {shapes[0]} at frame 0.")
    return np.array(rows)


__all__ = ["matrix", "stack_rows"]
