"""What frames contain: the cameras, the chunks of actions and the state, with the robot that converts the actions.

Letters in shapes: N frames of an episode, K actions of a chunk, A dimensions of an action.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from ..modeling.known_names import check_name
from .adapters import Robot
from .feature_names import Names
from .robots import resolve_robot


# Columns of the rows of every reader, apart from the images. `dataset` names the statistics of the action, and
# `action_mask` says which dimensions they scale.
NUMBERS = {
    "instruction": Value("string"),
    "action": List(Value("float64")),
    "action_mask": List(Value("bool")),
    "state": List(Value("float64")),
    "episode_index": Value("int64"),
    "frame_index": Value("int64"),
    "dataset": Value("string"),
}
# Columns of rows with one camera and without chunks.
FEATURES = Features({"image": Image(decode=False), **NUMBERS})
# What happens to the last frames of an episode, for which fewer than K actions are left.
CHUNK_ENDS = ("drop", "pad")
# Prefix of the columns of rows that contain the images of several cameras.
CAMERA_PREFIX = "images."
# Columns of rows for the statistics, which frames do not have: the last row of an episode contains the actions and
# states (N, A) and (N, S) of the N frames that are dropped after it, and the other rows are empty.
DROPPED_COLUMNS = ("dropped_actions", "dropped_states")

# Cameras by name, or the names alone.
Cameras = Sequence[str] | Mapping[str, Names]


@dataclass(frozen=True)
class FrameSpec:
    """How episodes become frames.

    Args:
        robot: Adapter.
        cameras: Names of the cameras in a frame, each with the features that it may be read from. Empty for the one
            image of a plain frame.
        chunk: Number of actions that a frame contains.
        chunk_end: Whether to "drop" the last frames of an episode, whose chunks are incomplete, or to "pad" their
            chunks with the last action.
        state: Whether every frame must have a state.
    """

    robot: Robot
    cameras: tuple[tuple[str, Names], ...] = ()
    chunk: int = 1
    chunk_end: str = "drop"
    state: bool = False

    def __post_init__(self) -> None:
        check_name(self.chunk_end, CHUNK_ENDS, "chunk_end")
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"chunk={self.chunk!r} is not a number of actions. Give a whole number of at least 1.")

    @property
    def needs_whole_episodes(self) -> bool:
        """Whether a frame depends on later frames of its episode."""
        return self.chunk > 1 or self.robot.needs_whole_episodes

    @property
    def drops_ends(self) -> bool:
        """Whether the last frames of each episode are left out."""
        return self.chunk > 1 and self.chunk_end == "drop"

    @property
    def camera_features(self) -> list[Names]:
        """Features that each camera may be read from; empty if the robot names no camera."""
        return [names for _, names in self.cameras] or ([self.robot.camera] if self.robot.camera else [])

    def describe_place(self, place: str) -> str:
        """Return a place in the data with the row of a table that the robot follows, if it does, for a message."""
        return f"{place}, read by {self.robot.table_row}" if self.robot.table_row else place

    def choose_cameras(self, available: Collection[str]) -> dict[str, str]:
        """Choose the cameras to read from a dataset's cameras.

        Returns:
            The dataset's camera for each column of the rows.

        Raises:
            ValueError: The dataset lacks a camera, or it has several and none is named.
        """
        if not self.cameras:
            return {"image": self.robot.choose_camera(available)}
        return {f"{CAMERA_PREFIX}{name}": self.robot.find_camera(names, available) for name, names in self.cameras}

    def wanted_columns(self, available: Collection[str]) -> list[str]:
        """List the columns of numbers to read.

        Raises:
            ValueError: The action, or a state that is needed, is missing from the dataset.
        """
        return self.robot.wanted_columns(available, self.state)

    @property
    def features(self) -> Features:
        """Columns of the rows."""
        images = [f"{CAMERA_PREFIX}{name}" for name, _ in self.cameras] or ["image"]
        columns = dict.fromkeys(images, Image(decode=False)) | NUMBERS
        if self.chunk > 1:
            columns["actions"] = List(List(Value("float64")), length=self.chunk)
        if self.drops_ends:
            columns |= dict.fromkeys(DROPPED_COLUMNS, List(List(Value("float64"))))
        elif self.chunk > 1:
            columns["chunk_mask"] = List(Value("bool"), length=self.chunk)
        return Features(columns)

    def require_frames(self, frames: Dataset, name: str) -> None:
        """Raise `ValueError` if a table is empty because all of its episodes are shorter than a chunk."""
        if self.drops_ends and not len(frames):
            raise ValueError(
                f"No episode of {name!r} has chunk={self.chunk} usable frames. Give a smaller chunk, or "
                "chunk_end='pad'."
            )

    def make_chunks(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make a chunk of actions for each frame: its own action and those of the frames after it.

        Args:
            actions: Actions of a whole episode (N, A).

        Returns:
            Chunks (N, K, A), where the last action is repeated after the end of the episode, and a mask (N, K) that is
            false for the repetitions.
        """
        steps = np.arange(len(actions))[:, None] + np.arange(self.chunk)
        return actions[np.minimum(steps, len(actions) - 1)], steps < len(actions)


def resolve_spec(
    robot: Robot | str | None,
    dataset: str,
    *,
    camera: str | None = None,
    every: int | None = None,
    drop_idle: bool | None = None,
    cameras: Cameras | None = None,
    chunk: int = 1,
    chunk_end: str = "drop",
    state: bool = False,
) -> FrameSpec:
    """Make the specification of a dataset's frames from the options of `load`.

    Raises:
        TypeError: `cameras` is a single name, or contains something other than names.
        ValueError: An option is not valid or does not fit the adapter, or `camera` and `cameras` are both given.
    """
    if camera is not None and cameras is not None:
        raise ValueError(f"camera={camera!r} and cameras={cameras!r} exclude each other. Give only one of them.")
    adapter = resolve_robot(robot, dataset, camera=camera, every=every, drop_idle=drop_idle)
    named = () if cameras is None else tuple(name_cameras(adapter, cameras).items())
    return FrameSpec(adapter, named, chunk, chunk_end, state)


def name_cameras(robot: Robot, cameras: Cameras) -> dict[str, Names]:
    """Return each camera's name in a frame with the features that it may be read from.

    Raises:
        TypeError: `cameras` is a single name, or contains something other than names.
        ValueError: `cameras` is empty or repeats a name.
    """
    if isinstance(cameras, str):
        raise TypeError(f"cameras={cameras!r} is a single name. Give a list of names, or camera={cameras!r}.")
    if wrong := [name for name in cameras if not isinstance(name, str)]:
        raise TypeError(f"cameras contains {wrong[0]!r}, which is not a name. Give the names of the cameras.")
    if not cameras or len({*cameras}) < len(cameras):
        raise ValueError(f"cameras={cameras!r} must contain at least one name, and each name once.")
    if isinstance(cameras, Mapping):
        # Names read from JSON are lists.
        return {name: feature if isinstance(feature, str) else tuple(feature) for name, feature in cameras.items()}
    return {name: robot.cameras.get(name, name) for name in cameras}


__all__ = [
    "CAMERA_PREFIX",
    "DROPPED_COLUMNS",
    "FEATURES",
    "NUMBERS",
    "Cameras",
    "FrameSpec",
    "name_cameras",
    "resolve_spec",
]
