"""Tables of frames on disk, in the cache of `datasets`. Each is written once and reused until its source changes."""

import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher
from huggingface_hub.utils import WeakFileLock

from .episodes import Losses
from .frame_spec import FrameSpec
from .frames import FrameDecoder


# Part of every key: increase it when the content of tables changes, so that old tables are not read.
TABLE_VERSION = 3
# Rows to write at once: large pieces are read faster.
WRITE_ROWS = 1024
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Counts of `Losses` that are stored next to a table.
STORED_LOSSES = ("bad_episodes", "skipped", "without_instruction")

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the cache folder of tables and statistics, and create it if it is missing."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "openvla_hf"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lock(path: Path) -> AbstractContextManager[Any]:
    """Return a lock that lets one process write a file of the cache while the others wait."""
    locks = path.parent / "locks"
    locks.mkdir(exist_ok=True)
    return WeakFileLock(locks / f"{path.stem}.lock")


def make_key(*parts: Any) -> str:
    """Hash everything that a table depends on."""
    return Hasher.hash([TABLE_VERSION, *parts])


def file_version(fs: fsspec.AbstractFileSystem, path: str) -> tuple[Any, ...]:
    """Return the path of a file with its size and its time or hash, which together identify the file's version."""
    try:
        info = fs.info(path)
    except FileNotFoundError:  # reading it reports the error
        info = {}
    return path, *(info.get(field) for field in ("size", "mtime", "blob_id", "ETag"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file of the cache. It appears when it is complete, so that no process reads an incomplete one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        complete = Path(unfinished, path.name)
        complete.write_text(json.dumps(content), encoding="utf-8")
        os.replace(complete, path)


def cached_table(
    columns: Iterable[dict[str, Any]], spec: FrameSpec, losses: Losses, name: str, key: str | None
) -> Dataset:
    """Return the table of a key, written from the columns on a cache miss.

    Args:
        columns: Columns of the rows of each episode. On a cache hit they are not read.
        spec: Gives the types of the columns.
        losses: Receives the counts of what the table leaves out.
        name: Name of the dataset, for the file.
        key: From `make_key`. Without a key, the table is always written and named after a hash of its content.
    """
    folder, schema = cache_folder(), spec.features.arrow_schema
    if key is None:
        path = _write_table(columns, schema, losses, folder, name)
    else:
        path = folder / f"{name}-{key}.arrow"
        with lock(path):
            if not path.exists():
                _write_table(columns, schema, losses, folder, name, path)
        for field, value in json.loads(path.with_suffix(".json").read_text()).items():
            setattr(losses, field, value)
    if losses.skipped:
        logger.warning("Skipped bad episodes of %s: %d. The first: %s", name, losses.skipped, losses.bad_episodes[0])
    return Dataset.from_file(str(path)).with_transform(FrameDecoder())


def _write_table(
    columns: Iterable[dict[str, Any]],
    schema: pa.Schema,
    losses: Losses,
    folder: Path,
    name: str,
    path: Path | None = None,
) -> Path:
    """Write a table to a temporary folder and move it into place, so that an incomplete one is never read."""
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        table = Path(unfinished, "table.arrow")
        _write_rows(table, columns, schema)
        if path is None:
            with table.open("rb") as file:
                path = folder / f"{name}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.arrow"
        write_json(path.with_suffix(".json"), {field: getattr(losses, field) for field in STORED_LOSSES})
        os.replace(table, path)
    return path


def _write_rows(path: Path, columns: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    waiting: list[pa.Table] = []

    def flush() -> None:
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
            waiting.clear()

    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for each in columns:
                waiting.append(pa.table(each, schema=schema))
                if sum(map(len, waiting)) >= WRITE_ROWS:
                    flush()
            flush()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(
            f"The table of frames can't be written to {path} ({error}). Free some space, or set HF_DATASETS_CACHE to "
            "a folder on another disk."
        ) from error


__all__ = ["cache_folder", "cached_table", "file_version", "lock", "make_key", "write_json"]
