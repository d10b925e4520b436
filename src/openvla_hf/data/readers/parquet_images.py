"""Images in the rows of parquet files, read in place."""

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


class ImageTable:
    """An open parquet file with images in its rows, as `datasets.Image` stores them.

    Args:
        path: File or URL.

    Raises:
        OSError: The file is missing or damaged.
    """

    def __init__(self, path: str):
        self.path = path
        self.file = pq.ParquetFile(fsspec.open(path, "rb").open() if "://" in path else path)
        metadata = self.file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.ends = np.cumsum(sizes)

    def find(self, row: int) -> tuple[int, int]:
        """Return the row group that contains a row, and the row's number in this group.

        Raises:
            IndexError: The file has fewer rows.
        """
        group = int(np.searchsorted(self.ends, row, side="right"))
        if group == len(self.ends):
            raise IndexError(f"{self.path} has no row {row}, only {self.ends[-1] if len(self.ends) else 0} rows.")
        return group, row - int(self.ends[group - 1] if group else 0)

    def read_group(self, group: int, column: str) -> pa.ChunkedArray:
        """Read a column of a row group, the smallest part of a parquet file that can be read."""
        return self.file.read_row_group(group, columns=[column], use_threads=False)[column]


__all__ = ["ImageTable"]
