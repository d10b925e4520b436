"""Images by reference: encoded bytes, or a place in a file that is read when the image is needed.

The place of an image is `file#bytes=START-END` for a range of a file, `video.mp4#t=SECONDS` for a frame of a video,
`file.parquet#row=N:COLUMN` for a row of a parquet file, or a whole file. This keeps a table of all frames small even
if the images are large.
"""

import io
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from .episodes import BadEpisodeError, ImageReference
from .optional_packages import import_extra
from .readers.parquet_images import ImageTable
from .readers.video import Video
from .recently_used import RecentlyUsed
from .remote import find_folder, retry


# Videos to keep open, each with a decoder and its reference frames.
OPEN_VIDEOS = 4
# Parquet files to keep open, with their footers.
OPEN_TABLES = 8
# Row groups to keep in memory with all their images.
HELD_GROUPS = 2
# The first bytes of a JPEG file.
JPEG = b"\xff\xd8"

Read = TypeVar("Read")


class ImageReader:
    """Read images by reference, and keep the last few videos and parquet files open.

    Threads may share a reader: no two of them use the same open file at the same time. Each process opens its own
    files. `close`, or the end of a `with` block, closes them; reading opens them again.
    """

    def __init__(self) -> None:
        self._videos: RecentlyUsed[Video] = RecentlyUsed(OPEN_VIDEOS)
        self._tables: RecentlyUsed[ImageTable] = RecentlyUsed(OPEN_TABLES)
        self._groups: RecentlyUsed[pa.ChunkedArray] = RecentlyUsed(HELD_GROUPS)

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for kept in (self._videos, self._tables, self._groups):
            kept.clear()

    def read(self, reference: ImageReference) -> np.ndarray:
        """Return the referenced image, uint8 (H, W, 3).

        Raises:
            BadEpisodeError: The file can't be read, or its bytes are not an image.
        """
        data, path = reference["bytes"], reference["path"]
        if data is None and "#t=" in path:
            file, _, time = path.rpartition("#t=")
            return _retry(file, lambda: self._read_video(file, float(time)))
        try:
            data = _retry(path, lambda: self._read_bytes(path)) if data is None else data
        except (OSError, IndexError, pa.ArrowException) as error:
            raise BadEpisodeError(f"{path}: the image can't be read ({error}).") from error
        try:
            return decode_image(data)
        except (OSError, ValueError) as error:
            raise BadEpisodeError(f"{path or 'an image'}: the image can't be decoded ({error}).") from error

    def check_video(self, path: str, time: float) -> None:
        """Require that a video shows a frame at `time` (seconds), without decoding it.

        Raises:
            BadEpisodeError: The file is missing or is not a video, or the video ends before `time`.
        """
        with self._videos.borrow(path, lambda: Video(path)) as video:
            video.check(time)

    def _read_video(self, path: str, time: float) -> np.ndarray:
        with self._videos.borrow(path, lambda: Video(path)) as video:
            return video.read(time)

    def _read_bytes(self, path: str) -> bytes:
        file, _, fragment = path.rpartition("#")
        kind, _, value = fragment.partition("=")
        if file and kind == "bytes":
            start, end = map(int, value.split("-"))
            return _read_range(file, start, end)
        if file and kind == "row":
            row, _, column = value.partition(":")
            image = self._read_row(file, int(row), column)
            return image["bytes"] if image["bytes"] is not None else _read_range(image["path"], 0, None)
        return _read_range(path, 0, None)

    def _read_row(self, path: str, row: int, column: str) -> ImageReference:
        with self._tables.borrow(path, lambda: ImageTable(path)) as table:
            group, place = table.find(row)
            with self._groups.borrow((path, group, column), lambda: table.read_group(group, column)) as images:
                return images[place].as_py()


def _read_range(path: str, start: int, end: int | None) -> bytes:
    if "://" in path:
        fs, file_path = find_folder(path)
        return fs.cat_file(file_path, start=start, end=end)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else end - start)


def _retry(path: str, read: Callable[[], Read]) -> Read:
    """Read from a file, with further attempts if it is remote."""
    return retry(*find_folder(path.partition("#")[0]), read) if "://" in path else read()


def decode_image(data: bytes) -> np.ndarray:
    """Decode the bytes of an image file, uint8 (H, W, 3).

    Raises:
        OSError: The bytes are not an image.
        ValueError: The image is damaged or has more than 8 bits.
    """
    if data[:2] == JPEG:
        # TensorFlow's default settings give the exact levels that the original was trained on.
        return import_extra("simplejpeg", "data").decode_jpeg(data, fastdct=True, fastupsample=False)
    return _as_rgb(Image.open(io.BytesIO(data)))


def check_images(images: Iterable[bytes | memoryview]) -> None:
    """Check the headers of encoded images, which takes far less time than decoding.

    Raises:
        ValueError: An image can't be decoded. The message gives its frame.
    """
    for frame, data in enumerate(images):
        try:
            if data[:2] == JPEG:
                import_extra("simplejpeg", "data").decode_jpeg_header(data)
            else:
                with Image.open(io.BytesIO(data)) as image:
                    _check_depth(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"the image of frame {frame} can't be decoded ({error}).") from error


def _as_rgb(image: Image.Image) -> np.ndarray:
    _check_depth(image)
    return np.asarray(image.convert("RGB"))


def _check_depth(image: Image.Image) -> None:
    """Raise `ValueError` for an image that would be clipped to 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"its values have more than 8 bits (mode {image.mode}), like those of depth images")


def to_pixels(image: Any) -> np.ndarray:
    """Convert an image from Python code to uint8 (H, W, 3).

    Args:
        image: Array, PIL image, bytes of an image file, or a function without arguments that returns one of these.

    Raises:
        OSError: A function fails to read the image.
        ValueError: The image is none of these, can't be decoded, or would be clipped to 8 bits.
    """
    if callable(image):
        image = image()
    if isinstance(image, bytes):
        try:
            return decode_image(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"the image can't be decoded ({error}).") from error
    if isinstance(image, Image.Image):
        return _as_rgb(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"the image has {pixels.dtype} values. Give colours as uint8, from 0 to 255.")
    if pixels.ndim == 3 and pixels.shape[-1] == 3:
        return pixels
    try:
        return _as_rgb(Image.fromarray(pixels))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the image has shape {pixels.shape}. Give height, width and 3 colours.") from error


def encode_png(image: Any) -> ImageReference:
    """Encode an image losslessly, as a reference that contains its bytes. Takes the same images as `to_pixels`.

    Raises:
        OSError: A function fails to read the image.
        ValueError: The image can't be converted or decoded.
    """
    if callable(image):
        image = image()
    if isinstance(image, bytes):
        check_images([image])
        return {"bytes": image, "path": None}
    buffer = io.BytesIO()
    # For camera images, level 1 gives files at most a tenth larger than the default in a fraction of the time.
    Image.fromarray(to_pixels(image)).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


__all__ = ["ImageReader", "check_images", "decode_image", "encode_png", "to_pixels"]
