"""Frames: their columns, and how rows become frames when they are read.

A row is a frame whose image is still a reference; see `images`.

Letters in shapes: K actions of a chunk, A dimensions of an action, S of a state, H and W pixels.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset

from .episodes import BadEpisodeError
from .frame_spec import CAMERA_PREFIX, DROPPED_COLUMNS
from .images import ImageReader, to_pixels
from .motion import name_by_space


Frames: TypeAlias = Dataset | IterableDataset

# Columns that identify a frame.
PLACE = ("dataset", "episode_index", "frame_index")
# Prefixes of the lines in the description of frames.
NAMES, SPACE, ROBOT = "Action dimensions of", "Action space of", "Robot of"


class FrameDecoder:
    """Decode rows into frames, whose images and numbers are arrays.

    The images are uint8 (H, W, 3): `image`, or `images` by camera. The numbers are float64: `action` (A,), `actions`
    (K, A) and `state` (S,) or `None`. `chunk_mask` contains bools (K,).

    All decoders compare equal, since `datasets` keeps the transform of concatenated tables only if their transforms
    are equal.

    Args:
        images: Reads the images, and keeps files open.
    """

    def __init__(self, images: ImageReader | None = None):
        self.images = images or ImageReader()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrameDecoder)

    def __hash__(self) -> int:
        return hash(FrameDecoder)

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode a batch of rows, as a transform of `datasets`.

        Raises:
            BadEpisodeError: An image can't be read or decoded.
        """
        decoded = {name: values for name, values in rows.items() if not is_stored(name)}
        if "image" in rows:
            decoded["image"] = self._read_images(rows, "image")
        if cameras := [name for name in rows if name.startswith(CAMERA_PREFIX)]:
            names = [name.removeprefix(CAMERA_PREFIX) for name in cameras]
            images = zip(*(self._read_images(rows, camera) for camera in cameras), strict=True)
            decoded = {"images": [dict(zip(names, each, strict=True)) for each in images], **decoded}
        for name in ("action", "actions", "state"):
            if name in rows:
                decoded[name] = [None if row is None else np.array(row, np.float64) for row in rows[name]]
        if "chunk_mask" in rows:
            decoded["chunk_mask"] = [np.array(row, bool) for row in rows["chunk_mask"]]
        return decoded

    def decode_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Decode one row.

        Raises:
            BadEpisodeError: The image can't be read or decoded.
        """
        return {name: values[0] for name, values in self({name: [value] for name, value in row.items()}).items()}

    def _read_images(self, rows: dict[str, list[Any]], column: str) -> list[np.ndarray | None]:
        return [self._read_image(image, rows, index) for index, image in enumerate(rows[column])]

    def _read_image(self, image: Any, rows: dict[str, list[Any]], index: int) -> np.ndarray | None:
        if image is None:
            return None
        try:
            return self.images.read(image) if isinstance(image, Mapping) else to_pixels(image)
        except (OSError, ValueError) as error:
            where = ", ".join(f"{name} {rows[name][index]}" for name in PLACE if name in rows)
            raise BadEpisodeError(f"{where}: {error}" if where else str(error)) from error


def is_stored(column: str) -> bool:
    """Return whether a column of rows is not a column of frames."""
    return column.startswith(CAMERA_PREFIX) or column in DROPPED_COLUMNS


def decoded_features(features: Features) -> Features:
    """Return the columns of the frames that rows with these columns become; `datasets` can't infer them."""
    cameras = [name.removeprefix(CAMERA_PREFIX) for name in features if name.startswith(CAMERA_PREFIX)]
    images = {"images": {name: Image() for name in cameras}} if cameras else {"image": Image()}
    return Features(
        images | {name: kind for name, kind in features.items() if name != "image" and not is_stored(name)}
    )


def describe_contents(frames: Frames) -> str:
    """Describe the cameras and the chunks of frames, for a message."""
    features = frames.features if isinstance(frames, IterableDataset) else decoded_features(frames.features)
    cameras = f"the cameras {', '.join(features['images'])}" if "images" in features else "one camera"
    if "actions" not in features:
        return f"{cameras} and no chunks"
    return f"{cameras} and {'padded ' * ('chunk_mask' in features)}chunks of {features['actions'].length} actions"


def note_action(frames: Frames, dataset: str, names: list[str] | None, space: str | None) -> None:
    """Store the names and the space of a dataset's actions in the description of its frames.

    Mixtures join the descriptions of their datasets.

    Args:
        frames: Frames of the dataset.
        dataset: Name of the dataset.
        names: Names of the action's dimensions, if the dataset gives them.
        space: Space of the standard actions, if the robot gives it.
    """
    _note(frames, dataset, {NAMES: names, SPACE: space})


def note_robot(frames: Frames, dataset: str, robot: str) -> None:
    """Store the name of the adapter that read a dataset in the description of its frames."""
    _note(frames, dataset, {ROBOT: robot})


def read_robot(frames: Frames, dataset: str) -> str | None:
    """Return the name of the adapter that read a dataset, or `None` if it is unknown."""
    return _read_noted(frames, ROBOT).get(dataset)


def _note(frames: Frames, dataset: str, facts: dict[str, Any]) -> None:
    lines = [f"{begin} {json.dumps({dataset: value})}" for begin, value in facts.items() if value]
    frames.info.description = "\n".join([*frames.info.description.splitlines(), *lines])


def read_action_names(frames: Frames, dataset: str, action_dim: int) -> list[str] | None:
    """Read the names of the action's dimensions: the dataset's own, or else those of the action's space."""
    names, space = _read_noted(frames, NAMES).get(dataset), _read_noted(frames, SPACE).get(dataset)
    return names if names and len(names) == action_dim else name_by_space(space, action_dim)


def _read_noted(frames: Frames, begin: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in frames.info.description.splitlines():
        if line.startswith(begin):
            found |= json.loads(line.removeprefix(begin))
    return found


__all__ = [
    "FrameDecoder",
    "Frames",
    "decoded_features",
    "describe_contents",
    "is_stored",
    "note_action",
    "note_robot",
    "read_action_names",
    "read_robot",
]
