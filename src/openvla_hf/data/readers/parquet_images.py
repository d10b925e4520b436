"""Images in the rows of parquet files, read where they are."""

import functools
import os
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


OPEN_FILES = 8
"""Parquet files that a process keeps open, with their footers."""
HELD_GROUPS = 2
"""Row groups whose images a process holds: the smallest piece of a parquet file that can be read."""


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(path: str) -> tuple[pq.ParquetFile, np.ndarray]:
    """A file, and the row after each of its row groups."""
    file = pq.ParquetFile(fsspec.open(path, "rb").open() if "://" in path else path)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return file, np.cumsum(sizes)


@functools.lru_cache(maxsize=HELD_GROUPS)
def _read_group(path: str, group: int, column: str) -> pa.ChunkedArray:
    return _open(path)[0].read_row_group(group, columns=[column], use_threads=False)[column]


def close_parquet_files() -> None:
    """Forget what is open and held, such as before the files change."""
    _read_group.cache_clear()
    _open.cache_clear()


# A process that is forked shares the positions in its parent's files.
os.register_at_fork(before=close_parquet_files)


def read_row(path: str, row: int, column: str) -> dict[str, Any]:
    """The image in a row of a file, as `datasets.Image` stores it.

    Raises:
        OSError: The file is missing or damaged.
        IndexError: The file has fewer rows.
    """
    _, ends = _open(path)
    group = int(np.searchsorted(ends, row, side="right"))
    if group == len(ends):
        raise IndexError(f"{path} has {ends[-1] if len(ends) else 0} rows and no row {row}.")
    images = _read_group(path, group, column)
    return images[row - int(ends[group]) + len(images)].as_py()


__all__ = ["close_parquet_files", "read_row"]
