"""Frames: their columns, and how rows become frames when they are read.

A row is a frame whose image is still a reference; see `images`.

Letters in shapes: A dimensions of an action, S of a state, H and W pixels.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from .episodes import BadEpisodeError
from .images import ImageReader, to_pixels
from .motion import name_by_space


Frames: TypeAlias = Dataset | IterableDataset

# Columns of the rows of every reader. `dataset` names the statistics of the action, and `action_mask` says which
# dimensions they scale.
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
# Columns of frames, whose images are arrays. `datasets` can't infer them from a stream.
DECODED = Features({**FEATURES, "image": Image()})
# Columns that identify a frame.
PLACE = ("dataset", "episode_index", "frame_index")
# Prefixes of the lines in the description of frames.
NAMES, SPACE = "Action dimensions of", "Action space of"


class FrameDecoder:
    """Decode rows into frames: `image` uint8 (H, W, 3), `action` float64 (A,), `state` float64 (S,) or `None`.

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
        decoded = dict(rows)
        if "image" in rows:
            decoded["image"] = [self._read_image(rows, index) for index in range(len(rows["image"]))]
        for name in ("action", "state"):
            if name in rows:
                decoded[name] = [None if row is None else np.array(row, np.float64) for row in rows[name]]
        return decoded

    def decode_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Decode one row.

        Raises:
            BadEpisodeError: The image can't be read or decoded.
        """
        return {name: values[0] for name, values in self({name: [value] for name, value in row.items()}).items()}

    def _read_image(self, rows: dict[str, list[Any]], index: int) -> np.ndarray | None:
        image = rows["image"][index]
        if image is None:
            return None
        try:
            return self.images.read(image) if isinstance(image, Mapping) else to_pixels(image)
        except (OSError, ValueError) as error:
            where = ", ".join(f"{name} {rows[name][index]}" for name in PLACE if name in rows)
            raise BadEpisodeError(f"{where}: {error}" if where else str(error)) from error


def note_action(frames: Frames, dataset: str, names: list[str] | None, space: str | None) -> None:
    """Store the names and the space of a dataset's actions in the description of its frames.

    Mixtures join the descriptions of their datasets.

    Args:
        frames: Frames of the dataset.
        dataset: Name of the dataset.
        names: Names of the action's dimensions, if the dataset gives them.
        space: Space of the standard actions, if the robot gives it.
    """
    facts = {NAMES: names, SPACE: space}
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


__all__ = ["DECODED", "FEATURES", "FrameDecoder", "Frames", "note_action", "read_action_names"]
