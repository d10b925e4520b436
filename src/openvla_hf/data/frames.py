"""What every reader gives: episodes, and frames as rows of one schema, with images that are decoded when read.

A row's image is bytes, or says where they are: `file#bytes=START-END` for a range of a file, `video.mp4#t=SECONDS` for
a frame of a video, `file.parquet#row=N:COLUMN` for a row of a parquet file. So a table of all frames is small,
whatever the images weigh.

Letters in shapes: T frames of an episode, A dimensions of an action, S of a state, H and W pixels.
"""

import importlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from .motion import name_by_space
from .readers.parquet_images import read_row


if TYPE_CHECKING:
    from .adapters import Robot

FEATURES = Features(
    {
        "image": Image(decode=False),
        "instruction": Value("string"),
        "action": List(Value("float64")),
        "action_mask": List(Value("bool")),
        "state": List(Value("float64")),
        "episode_index": Value("int64"),
        "frame_index": Value("int64"),
        "dataset": Value("string"),
    }
)
"""Of the rows of every reader: `dataset` names the statistics of the action, `action_mask` is what they scale."""
DECODED = Features({**FEATURES, "image": Image()})
"""Of frames, whose images are arrays. A stream must say what it gives, or `datasets` looks and can't tell."""

PLACE = ("dataset", "episode_index", "frame_index")
"""Columns that say which frame a row is."""
BAD_SHARE = 0.1
"""Largest share of the episodes that `skip_bad_episodes=True` skips."""
FEW_EPISODES = 100
"""Assumed of data that do not say how many episodes they have, until more are read."""
JPEG = b"\xff\xd8"
"""How such a file begins."""

ImageReference = Mapping[str, Any]
"""`{"bytes": encoded image or None, "path": where it is or None}`, as `datasets.Image` stores it."""

logger = logging.getLogger(__name__)


class BadEpisodeError(ValueError):
    """An episode that can't be read or used; the message names the file and the record.

    Args:
        message: What is wrong, and where.
        episodes: How many are lost for this reason.
    """

    def __init__(self, message: str, episodes: int = 1):
        super().__init__(message, episodes)
        self.episodes = episodes

    def __str__(self) -> str:
        return self.args[0]


@dataclass
class Episode:
    """An episode as it is stored, before a robot adapter reads it.

    source: File and record, for messages.
    index: Number of the episode in its split.
    images: (T) references.
    instructions: (T) texts; empty where there is none.
    columns: Numbers of each frame, (T, ...) by name; nested names are joined by dots.
    """

    source: str
    index: int
    images: Sequence[ImageReference]
    instructions: Sequence[str]
    columns: dict[str, np.ndarray] = field(default_factory=dict)


def episode_rows(episode: Episode, robot: "Robot", dataset: str) -> dict[str, Any]:
    """The columns of an episode's rows in the robot's standard form; frames without an instruction are left out.

    Raises:
        BadEpisodeError: there are no frames, a column is missing, or numbers are of the wrong size, not finite or
            out of their range.
    """
    if not len(episode.images):
        raise BadEpisodeError(f"{episode.source}: the episode has length 0.")
    try:
        kept, actions, states = robot.standardize(episode.columns, len(episode.images))
    except ValueError as error:
        raise BadEpisodeError(f"{episode.source}: {error}") from error
    told = np.array([bool(episode.instructions[index].strip()) for index in kept], bool)
    kept, actions = kept[told], actions[told]
    return {
        "image": [episode.images[index] for index in kept],
        "instruction": [episode.instructions[index] for index in kept],
        "action": list(actions),
        "action_mask": [robot.mask(actions.shape[1])] * len(kept),
        "state": [None] * len(kept) if states is None else list(states[told]),
        "episode_index": [episode.index] * len(kept),
        "frame_index": kept.tolist(),
        "dataset": [dataset] * len(kept),
    }


NAMES, SPACE = "Action dimensions of", "Action space of"
"""Each begins a line of the description of frames."""


def note_action(frames: Dataset | IterableDataset, dataset: str, names: list[str] | None, space: str | None) -> None:
    """Keep what is known of a data set's actions in the description of its frames, which mixtures gather.

    Args:
        frames: Of the data set.
        dataset: Its name.
        names: Of the dimensions of its actions, where it gives them.
        space: Of its standard actions, where the robot says it.
    """
    told = {NAMES: names, SPACE: space}
    lines = [f"{begin} {json.dumps({dataset: value})}" for begin, value in told.items() if value]
    frames.info.description = "\n".join([*frames.info.description.splitlines(), *lines])


def read_action_names(frames: Dataset | IterableDataset, dataset: str, action_dim: int) -> list[str] | None:
    """Read the names of the action's dimensions: those of the data set, or else those of the action's space."""
    names, space = _read_noted(frames, NAMES).get(dataset), _read_noted(frames, SPACE).get(dataset)
    return names if names and len(names) == action_dim else name_by_space(space, action_dim)


def _read_noted(frames: Dataset | IterableDataset, begin: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in frames.info.description.splitlines():
        if line.startswith(begin):
            found |= json.loads(line.removeprefix(begin))
    return found


_DECODES_IMAGES = ContextVar("decodes_images", default=True)


@contextmanager
def images_left_out() -> Iterator[None]:
    """Read frames with `image=None` inside this context, for callers that need only the numbers."""
    token = _DECODES_IMAGES.set(False)
    try:
        yield
    finally:
        _DECODES_IMAGES.reset(token)


def decode_frames(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Turns a batch of rows into frames: `image` uint8 (H, W, 3), `action` float64 (A,), `state` float64 (S,) or None.

    Raises:
        BadEpisodeError: an image can't be decoded.
    """
    decoded = dict(rows)
    if "image" in rows:
        wanted = _DECODES_IMAGES.get()
        decoded["image"] = [_image_of_row(rows, index) if wanted else None for index in range(len(rows["image"]))]
    for name in ("action", "state"):
        if name in rows:
            decoded[name] = [None if row is None else np.array(row, np.float64) for row in rows[name]]
    return decoded


def _image_of_row(rows: dict[str, list[Any]], index: int) -> np.ndarray | None:
    image = rows["image"][index]
    if image is None:  # read with its image left out
        return None
    try:
        return decode_image(image) if isinstance(image, Mapping) else read_image(image)
    except (OSError, ValueError) as error:
        where = ", ".join(f"{name} {rows[name][index]}" for name in PLACE if name in rows)
        raise BadEpisodeError(f"{where}: {error}" if where else str(error)) from error


def decode_frame(row: dict[str, Any]) -> dict[str, Any]:
    """One row as a frame; see `decode_frames`."""
    return {name: values[0] for name, values in decode_frames({name: [value] for name, value in row.items()}).items()}


def decode_image(reference: ImageReference) -> np.ndarray:
    """The image that a row refers to, uint8 (H, W, 3).

    Raises:
        BadEpisodeError: the bytes are no image, or the file does not hold them.
    """
    data, path = reference["bytes"], reference["path"]
    if data is None and "#t=" in path:
        from .readers.video import read_frame

        file, _, time = path.rpartition("#t=")
        return read_frame(file, float(time))
    try:
        data = _read_bytes(path) if data is None else data
    except (OSError, IndexError, pa.ArrowException) as error:
        raise BadEpisodeError(f"{path}: the image can't be read ({error}).") from error
    try:
        return _decode_jpeg(data) if data[:2] == JPEG else _decode_other(data)
    except (OSError, ValueError) as error:
        raise BadEpisodeError(f"{path or 'an image'}: the image can't be decoded ({error}).") from error


def _read_bytes(path: str) -> bytes:
    """The encoded image that a path refers to: a file, or a place in one."""
    file, _, fragment = path.rpartition("#")
    kind, _, value = fragment.partition("=")
    if file and kind == "bytes":
        start, end = map(int, value.split("-"))
        return _read_range(file, start, end)
    if file and kind == "row":
        row, _, column = value.partition(":")
        image = read_row(file, int(row), column)
        return image["bytes"] if image["bytes"] is not None else _read_range(image["path"], 0, None)
    return _read_range(path, 0, None)


def check_images(images: Iterable[bytes | memoryview]) -> None:
    """Reads the headers of encoded images, which takes far less time than to decode them.

    Raises:
        ValueError: an image can't be decoded; the message names its frame.
    """
    for frame, data in enumerate(images):
        try:
            if data[:2] == JPEG:
                import_extra("simplejpeg", "data").decode_jpeg_header(data)
            else:
                with PILImage.open(io.BytesIO(data)) as image:
                    _check_depth(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"the image of frame {frame} can't be decoded ({error}).") from error


def _read_range(path: str, start: int, end: int | None) -> bytes:
    with fsspec.open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else end - start)


def _decode_jpeg(data: bytes) -> np.ndarray:
    # As TensorFlow decodes by default, hence the levels that the original was trained on.
    return import_extra("simplejpeg", "data").decode_jpeg(data, fastdct=True, fastupsample=False)


def _decode_other(data: bytes) -> np.ndarray:
    return _as_rgb(PILImage.open(io.BytesIO(data)))


def _as_rgb(image: PILImage.Image) -> np.ndarray:
    _check_depth(image)
    return np.asarray(image.convert("RGB"))


def _check_depth(image: PILImage.Image) -> None:
    """Raise `ValueError` for an image that would be clipped to 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"its values have more than 8 bits (mode {image.mode}), as those of depth images have")


def matrix(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """A column of lists, or of single numbers, as (N, D).

    Raises:
        ValueError: rows are empty or differ in size; `name` says of what.
    """
    if column.null_count:
        raise ValueError(f"{name!r} is empty in {column.null_count} rows.")
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        return column.to_numpy().reshape(-1, 1)
    sizes = sorted(pc.unique(pc.list_value_length(column)).to_pylist())
    if len(sizes) > 1:
        raise ValueError(f"{name!r} has rows of {' and '.join(map(str, sizes))} numbers.")
    return pc.list_flatten(column).to_numpy().reshape(len(column), -1)


def stack_rows(rows: Sequence[Any], name: str) -> np.ndarray:
    """Stack the numbers of an episode's frames, (T, ...).

    Raises:
        ValueError: Frames differ in shape, or some have no numbers; `name` says of what.
    """
    missing = [frame for frame, row in enumerate(rows) if row is None]
    if 0 < len(missing) < len(rows):
        raise ValueError(f"{name!r} is missing at frame {missing[0]}.")
    shapes = [np.shape(row) for row in rows]
    for frame, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(f"{name!r} has shape {shape} at frame {frame}, but {shapes[0]} at frame 0.")
    return np.array(rows)


def read_image(image: Any) -> np.ndarray:
    """An image that Python code made, uint8 (H, W, 3).

    Args:
        image: Array, PIL image, bytes of an encoded image, or a function without arguments that gives one of these.

    Raises:
        ValueError: it is none of these, or would be clipped to 8 bits.
    """
    if callable(image):
        image = image()
    if isinstance(image, bytes):
        return decode_image({"bytes": image, "path": None})
    if isinstance(image, PILImage.Image):
        return _as_rgb(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"the image holds {pixels.dtype} values: give colours as uint8, from 0 to 255.")
    if pixels.ndim == 3 and pixels.shape[-1] == 3:
        return pixels
    try:
        return _as_rgb(PILImage.fromarray(pixels))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the image is of shape {pixels.shape}: give height, width and 3 colours.") from error


def encode_png(image: Any) -> ImageReference:
    """An image, as `read_image` takes it, as a reference that holds it without loss."""
    if callable(image):
        image = image()
    if isinstance(image, bytes):
        check_images([image])
        return {"bytes": image, "path": None}
    buffer = io.BytesIO()
    # Level 1 is as small as the default within a tenth for camera images, in a fraction of the time.
    PILImage.fromarray(read_image(image)).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def import_extra(module: str, extra: str) -> ModuleType:
    """A module of an optional dependency.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"This needs {module.partition('.')[0]}: pip install 'openvla-hf[{extra}]'"
        raise ImportError(message, name=error.name) from error


@dataclass
class Losses:
    """What of a data set does not become frames.

    limit: Largest share of the episodes that is skipped where they are bad; with 0, the first one raises.
    total: Number of episodes, or None where the data don't say.
    bad_episodes: Why each skipped one can't be used.
    read: Number of episodes that were read so far.
    skipped: Number of the bad ones, with those that a missing file would have held.
    without_instruction: Number of frames that are left out because nothing says what the robot is to do.
    """

    limit: float = 0.0
    total: int | None = None
    bad_episodes: list[str] = field(default_factory=list)
    read: int = 0
    skipped: int = 0
    without_instruction: int = 0
    _known: set[Any] = field(default_factory=set, repr=False)

    def note(self, error: BadEpisodeError, key: Any = None) -> None:
        """Note a bad episode to skip it, or raise the error.

        Args:
            error: What is wrong.
            key: Which episode it is, where a message does not say it once for all.

        Raises:
            BadEpisodeError: Bad episodes are not skipped, or there are more than the limit.
        """
        if not self.limit:
            raise error
        key = key or str(error)
        if key in self._known:  # met again by another pass over a stream
            return
        self._known.add(key)
        self.bad_episodes.append(str(error))
        self.skipped += error.episodes
        logger.warning("Skipped bad episode %d: %s", self.skipped, error)
        self.check(max(self.read, FEW_EPISODES) if self.total is None else self.total)

    def check(self, total: int) -> None:
        """Raise `BadEpisodeError` where more than the limit of `total` episodes is bad; one may always be."""
        if self.skipped > max(1, self.limit * total):
            raise BadEpisodeError(
                f"{self.skipped} of {total} episodes are bad, and at most {self.limit:.0%} are skipped. Repair the "
                f"data set, or give a larger share as skip_bad_episodes. The last one: {self.bad_episodes[-1]}"
            )


def usable_rows(
    episodes: Iterable[Episode | BadEpisodeError],
    robot: "Robot",
    dataset: str,
    losses: Losses,
    check: Callable[[Any], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Give the columns of the rows of each episode that can be used; what is lost is noted in `losses`.

    Args:
        episodes: Episodes in order, or what is wrong with them.
        robot: Adapter.
        dataset: Name of the data set.
        losses: Where losses are noted.
        check: Called with each image; it raises `BadEpisodeError` where the image is damaged.
    """
    for episode in episodes:
        losses.read += 1
        try:
            if isinstance(episode, BadEpisodeError):
                raise episode
            rows = episode_rows(episode, robot, dataset)
            if check is not None:
                _check_each(check, rows, episode.source)
        except BadEpisodeError as error:
            losses.note(error)
        else:
            losses.without_instruction += sum(not text.strip() for text in episode.instructions)
            yield rows


def _check_each(check: Callable[[Any], Any], rows: dict[str, Any], source: str) -> None:
    for image, frame in zip(rows["image"], rows["frame_index"], strict=True):
        try:
            check(image)
        except BadEpisodeError as error:
            raise BadEpisodeError(f"{source}, frame {frame}: {error}") from error


__all__ = ["DECODED", "FEATURES", "BadEpisodeError", "Episode", "decode_frames", "decode_image"]
