"""Files of any file system that fsspec knows: which package reads it, reading ahead, and further attempts."""

import io
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


# Bytes of the first piece of a file that is read from a position, and how many times larger each further piece is.
FIRST, GROWTH = 2**16, 4
# Pieces of full size to request before they are needed.
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
    "httpx2": "HTTPError",
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


@dataclass(frozen=True)
class Piece:
    """A part of a file, which a thread requests."""

    start: int
    end: int
    data: "Future[bytes]"


class ReadAhead(io.RawIOBase):
    """A remote file that is read in pieces, whose size grows as long as it is read in order.

    Short reads from many positions therefore request little more than they need. Once the pieces have their full size,
    a thread requests the next ones before they are needed.

    Args:
        fs: File system of the file.
        path: Path of the file.
        largest: Bytes of a piece of full size. At most `HELD` pieces are in memory.

    Raises:
        OSError: The file can't be opened or read.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, largest: int):
        self._file, self.path, self.largest = fs.open(path, "rb", cache_type="none"), path, largest
        size: int | None = self._file.size
        if size is None:
            raise OSError("the server can't send a part of a file, or does not say how large the file is")
        self.size = size
        self._at = 0
        self._thread = ThreadPoolExecutor(1)
        # The piece that was used last is at the end.
        self._pieces: list[Piece] = []

    def readable(self) -> bool:
        """Return `True`."""
        return True

    def seekable(self) -> bool:
        """Return `True`."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position. Nothing is read until it is needed."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read bytes of one piece."""
        if self._at >= self.size:
            return 0
        piece = self._find(self._at) or self._request(self._at, FIRST)
        self._request_ahead(piece)
        data = piece.data.result()[self._at - piece.start : self._at - piece.start + len(buffer)]
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

    def _find(self, position: int) -> Piece | None:
        return next((piece for piece in self._pieces if piece.start <= position < piece.end), None)

    def _request(self, start: int, length: int) -> Piece:
        before = next((piece for piece in self._pieces if piece.end == start), None)
        length = length if before is None else GROWTH * (before.end - before.start)
        end = min(start + min(length, self.largest), self.size)
        piece = Piece(start, end, self._thread.submit(self._fetch, start, end))
        self._pieces.append(piece)
        return piece

    def _request_ahead(self, current: Piece) -> None:
        last = current
        for _ in range(AHEAD if current.end - current.start == self.largest else 0):
            if last.end < self.size:
                last = self._find(last.end) or self._request(last.end, self.largest)
                self._use(last)
        self._use(current)
        for dropped in self._pieces[:-HELD]:
            dropped.data.cancel()
        del self._pieces[:-HELD]

    def _use(self, piece: Piece) -> None:
        self._pieces.remove(piece)
        self._pieces.append(piece)

    def _fetch(self, start: int, end: int) -> bytes:
        try:
            self._file.seek(start)
            data = self._file.read(end - start)
        except ValueError as error:  # by fsspec, if a server can't send a part of a file
            raise OSError(f"the server can't send a part of a file: {error}") from error
        if len(data) != end - start:
            raise OSError(f"the server sent {len(data)} instead of {end - start} bytes from byte {start}")
        return data


def open_file(fs: AbstractFileSystem, path: str, largest: int) -> BinaryIO:
    """Open a file to read it from front to back. A remote file is read ahead, see `ReadAhead`."""
    if isinstance(fs, LocalFileSystem):
        return fs.open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(ReadAhead(fs, path, largest)))


def read_errors() -> tuple[type[Exception], ...]:
    """Return the errors that mean that a file can't be read at the moment."""
    # Only an imported package can raise its errors. One that is still being imported may not have defined them yet.
    errors = (getattr(sys.modules.get(name), error, None) for name, error in CONNECTION_ERRORS.items())
    return (OSError, *filter(None, errors))


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


@contextmanager
def as_os_error(path: str | os.PathLike) -> Iterator[None]:
    """Raise an error of a connection as an `OSError` that names the path."""
    try:
        yield
    except read_errors() as error:
        if isinstance(error, OSError):
            raise
        message = f"{os.fspath(path)} can't be read ({describe(error)}). Check the connection and try again."
        raise OSError(message) from error


def describe(error: Exception) -> str:
    """Return the message of an error, or its type if it has none."""
    return str(error) or type(error).__name__


__all__ = [
    "ForkSafe",
    "ReadAhead",
    "as_os_error",
    "describe",
    "find_folder",
    "may_retry",
    "open_file",
    "read_errors",
    "retry",
    "url_prefix",
]
