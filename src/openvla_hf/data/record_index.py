"""The index of a dataset's records: where each begins and how many rows it gives, found when it is read first."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np


# Columns of the records of a shard: the number of a record, its first byte, and its number of rows.
NUMBER, OFFSET, ROWS = range(3)

logger = logging.getLogger(__name__)


class RecordIndex:
    """A file of the cache with the records of each shard that was read to its end, to which all processes append.

    Only records that give rows are listed. A shard that has changed since is unknown.

    Args:
        path: File of the index.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, tuple[Any, np.ndarray]] = {}
        self._bytes_read = 0

    def find(self, shard: str, version: Any) -> np.ndarray | None:
        """Return the records of a shard, (records, 3), or `None` if they are unknown."""
        for refresh in (False, True):
            if refresh:
                self._read()
            known_version, records = self._known.get(shard, (None, None))
            if known_version == _plain(version):
                return records
        return None

    def add(self, shard: str, version: Any, records: np.ndarray) -> None:
        """Store the records of a shard. If the file can't be written, other processes read the shard themselves."""
        self._known[shard] = _plain(version), records
        line = json.dumps({"shard": shard, "version": version, "records": records.tolist()}, default=str) + "\n"
        # A single write to the end is not mixed with those of other processes, except on some network file systems.
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:
            logger.warning("The index of records can't be written to %s (%s).", self.path, error)

    def _read(self) -> None:
        """Read what was appended since the last time."""
        if not self.path.exists() or os.path.getsize(self.path) == self._bytes_read:
            return
        with self.path.open("rb") as file:
            file.seek(self._bytes_read)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self._bytes_read += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the shard is read again
                records = np.array(entry["records"], np.int64).reshape(-1, 3)
                self._known[entry["shard"]] = entry["version"], records


def _plain(version: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(version, default=str))


__all__ = ["NUMBER", "OFFSET", "ROWS", "RecordIndex"]
