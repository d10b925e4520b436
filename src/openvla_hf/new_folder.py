"""Folders that must be new: existing files are never overwritten, and an interrupted write leaves nothing behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .modeling.folder_writing import UNFINISHED, written_whole


def require_new_folder(folder: str | os.PathLike) -> None:
    """Require that a folder does not exist or is empty.

    Raises:
        NotADirectoryError: `folder` is a file.
        FileExistsError: `folder` is not empty.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder. Give a new or empty folder.")
    if folder.exists() and any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Give a new or empty folder.")


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder whose files appear in `folder` once everything is written.

    Raises:
        NotADirectoryError: `folder` is a file.
        FileExistsError: `folder` is not empty, before or after everything is written.
        OSError: A file can't be written.
    """
    require_new_folder(folder)
    with written_whole(folder) as aside:
        yield aside
        require_new_folder(folder)


__all__ = ["new_folder", "require_new_folder"]
