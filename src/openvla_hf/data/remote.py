"""Files of any file system that fsspec knows: which package reads it, reading ahead, and further attempts."""

import io
import logging
import os
import pickle
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


# Pieces of a file to request before they are needed.
AHEAD = 2
# Pieces to keep in memory: the current one, those ahead, and one behind, since a video may go back a little.
HELD = AHEAD + 2
# Seconds to wait before each further attempt to read a file.
DELAYS = (1.0, 4.0, 16.0)
# Errors of connections that are not an `OSError`, by the module that defines them.
CONNECTION_ERRORS = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "httpx": "HTTPError",
}
# Errors of a local file system that another attempt does not change.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def find_folder(path: str | os.PathLike) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a folder or URL, and the folder's path in it.

    Raises:
        ImportError: The package for the URL's scheme is not installed. The message says how to install it.
        ValueError: The URL's scheme is unknown.
    """
    text = os.fspath(path)
    scheme = text.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(text)
    except ImportError as error:
        package = (error.__cause__ and cast(ImportError, error.__cause__).name) or error.name
        raise ImportError(
            f"Reading {scheme}:// needs the package {package}, which is not installed. Run `pip install {package}`.",
            name=package,
        ) from error
    except ValueError as error:
        if scheme in fsspec.available_protocols():
            raise
        raise ValueError(
            f"{scheme}:// in {text!r} is not a known scheme. Use a local folder, hf://, gs://, s3:// or https://."
        ) from error


def url_prefix(fs: AbstractFileSystem, root: str) -> str:
    """Return what turns a path of a file system into a URL: nothing for local paths, and for those that are URLs."""
    return "" if isinstance(fs, LocalFileSystem) or "://" in root else fs.unstrip_protocol("x").removesuffix("x")


class ForkSafe:
    """The owner of a file system, which makes it anew in a forked process: connections can't be shared.

    Args:
        fs: File system.
    """

    def __init__(self, fs: AbstractFileSystem):
        self._fs, self._process = fs, os.getpid()

    @property
    def fs(self) -> AbstractFileSystem:
        """The file system."""
        if self._process != os.getpid():
            self._fs, self._process = pickle.loads(pickle.dumps(self._fs)), os.getpid()
        return self._fs


class ReadAhead(io.RawIOBase):
    """A remote file that is read in large pieces. A thread requests the next pieces before they are needed.

    Args:
        fs: File system of the file.
        path: Path of the file.
        piece: Bytes to request at once. At most `HELD` pieces are in memory.

    Raises:
        OSError: The file can't be opened or read.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, piece: int):
        self._file, self.path, self.piece = fs.open(path, "rb", cache_type="none"), path, piece
        self.size: int | None = self._file.size
        if self.size is None:
            raise OSError("the server can't send a part of a file, or does not say how large the file is")
        self._at = 0
        self._thread = ThreadPoolExecutor(1)
        self._pieces: OrderedDict[int, Future[bytes]] = OrderedDict()

    def readable(self) -> bool:
        """Return `True`."""
        return True

    def seekable(self) -> bool:
        """Return `True`."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position. Nothing is read until it is needed."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size or 0}[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read bytes of one piece."""
        number, start = divmod(self._at, self.piece)
        if self._at >= (self.size or 0):
            return 0
        data = self._request(number).result()[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file, and drop the pieces."""
        if not self.closed:
            self._thread.shutdown(cancel_futures=True)
            self._file.close()
            self._pieces.clear()
        super().close()

    def _request(self, number: int) -> "Future[bytes]":
        last = ((self.size or 0) - 1) // self.piece
        # The needed piece is requested first, but it is dropped last.
        wanted = range(number, min(number + AHEAD, last) + 1)
        for each in wanted:
            if each not in self._pieces:
                self._pieces[each] = self._thread.submit(self._fetch, each * self.piece)
        for each in reversed(wanted):
            self._pieces.move_to_end(each)
        while len(self._pieces) > HELD:
            self._pieces.popitem(last=False)[1].cancel()
        return self._pieces[number]

    def _fetch(self, start: int) -> bytes:
        length = min(self.piece, (self.size or 0) - start)
        try:
            self._file.seek(start)
            data = self._file.read(length)
        except ValueError as error:  # by fsspec, if a server can't send a part of a file
            raise OSError(f"the server can't send a part of a file: {error}") from error
        if len(data) != length:
            raise OSError(f"the server sent {len(data)} instead of {length} bytes from byte {start}")
        return data


def open_file(fs: AbstractFileSystem, path: str, piece: int) -> BinaryIO:
    """Open a file to read it from front to back. A remote file is read ahead, see `ReadAhead`."""
    if isinstance(fs, LocalFileSystem):
        return fs.open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(ReadAhead(fs, path, piece)))


def read_errors() -> tuple[type[Exception], ...]:
    """Return the errors that mean that a file can't be read at the moment."""
    # Only a package that is already imported can raise its errors.
    modules = {name: sys.modules[name] for name in CONNECTION_ERRORS if name in sys.modules}
    return (OSError, *(getattr(module, CONNECTION_ERRORS[name]) for name, module in modules.items()))


def may_retry(fs: AbstractFileSystem, path: str, error: Exception, failures: int) -> bool:
    """Wait before another attempt to read a file, and return whether there is one.

    Args:
        fs: File system of the file.
        path: Path of the file.
        error: Why it can't be read.
        failures: Number of failed attempts before this one.
    """
    is_final = isinstance(fs, LocalFileSystem) and isinstance(error, FINAL)
    if is_final or failures >= len(DELAYS):
        return False
    logger.warning("%s can't be read (%s). Trying again in %.0f s.", path, describe(error), DELAYS[failures])
    time.sleep(DELAYS[failures])
    return True


def retry(fs: AbstractFileSystem, path: str, read: Callable[[], Result]) -> Result:
    """Read a file, with further attempts if it can't be read.

    Raises:
        OSError: The last attempt failed too.
    """
    failures = 0
    while True:
        try:
            return read()
        except read_errors() as error:
            if not may_retry(fs, path, error, failures):
                if isinstance(error, OSError):
                    raise
                raise OSError(describe(error)) from error
            failures += 1


def describe(error: Exception) -> str:
    """Return the message of an error, or its type if it has none."""
    return str(error) or type(error).__name__


__all__ = [
    "ForkSafe",
    "ReadAhead",
    "describe",
    "find_folder",
    "may_retry",
    "open_file",
    "read_errors",
    "retry",
    "url_prefix",
]
