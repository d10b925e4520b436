"""Recorded episodes as every reader yields them, their conversion to rows, and the count of bad ones.

Letters in shapes: T frames of an episode.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .feature_names import counted
from .frame_spec import DROPPED_COLUMNS, FrameSpec


# Largest share of the episodes that `skip_bad_episodes=True` skips.
BAD_SHARE = 0.1
# Number of episodes to assume while a dataset's total is unknown, until more are read.
FEW_EPISODES = 100

# `{"bytes": encoded image or None, "path": its place or None}`, as `datasets.Image` stores it.
ImageReference = Mapping[str, Any]
# Episodes from Python code, each an iterable of frames as `from_episodes` takes them.
Episodes = Iterable[Iterable[Mapping[str, Any]]]

logger = logging.getLogger(__name__)


@dataclass
class RecordPlace:
    """The place of a record in a file.

    Attributes:
        number: Number of the record.
        offset: Byte at which it begins, after decompression.
    """

    number: int = 0
    offset: int = 0


class BadEpisodeError(ValueError):
    """An episode can't be read or used. The message names the file and the record.

    Args:
        message: What is wrong, and where.
        episodes: Number of episodes that are lost for this reason.
    """

    def __init__(self, message: str, episodes: int = 1):
        super().__init__(message, episodes)
        self.episodes = episodes

    def __str__(self) -> str:
        return self.args[0]


class UnreadableFileError(BadEpisodeError):
    """A file can't be read now, but perhaps later."""


@dataclass
class RecordedEpisode:
    """An episode as it is stored, before a robot adapter converts it.

    Attributes:
        source: File and record, for messages.
        index: Number of the episode in its split.
        images: By column of the rows, references (T,) to the images.
        instructions: Texts (T,), empty where a frame has no instruction.
        columns: By name, numbers (T, ...) of the frames. Dots join nested names.
        place: Place of its record in the file.
    """

    source: str
    index: int
    images: Mapping[str, Sequence[ImageReference]]
    instructions: Sequence[str]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    place: RecordPlace = field(default_factory=RecordPlace)


@dataclass
class Losses:
    """The parts of a dataset that do not become frames.

    Attributes:
        limit: Largest share of the episodes that may be bad and skipped. With 0, the first bad episode raises an
            error.
        total: Number of episodes, or `None` if it is unknown.
        bad_episodes: For each skipped episode, why it can't be used.
        read: Number of episodes that were read so far.
        skipped: Number of bad episodes, including those that a missing file would have contained.
        without_instruction: Number of frames that are left out because they have no instruction.
    """

    limit: float = 0.0
    total: int | None = None
    bad_episodes: list[str] = field(default_factory=list)
    read: int = 0
    skipped: int = 0
    without_instruction: int = 0
    _known: set[Any] = field(default_factory=set, repr=False)

    @classmethod
    def allow(cls, skip_bad_episodes: bool | float) -> "Losses":
        """Start counting, with the limit that `load` takes.

        Raises:
            ValueError: The limit is not a share.
        """
        share = BAD_SHARE if skip_bad_episodes is True else float(skip_bad_episodes)
        if not 0 <= share <= 1:
            raise ValueError(
                f"skip_bad_episodes={skip_bad_episodes} is not a share of the episodes. Give a number from 0 to 1."
            )
        return cls(share)

    def note(self, error: BadEpisodeError, key: Any = None) -> None:
        """Record a bad episode and skip it, or raise the error.

        Args:
            error: What is wrong.
            key: Identifies the episode, for errors whose messages differ between its frames.

        Raises:
            BadEpisodeError: Bad episodes are not skipped, or more are bad than the limit allows.
        """
        if not self.limit:
            raise error
        key = key or str(error)
        if key in self._known:  # by an earlier pass over a stream
            return
        self._known.add(key)
        self.bad_episodes.append(str(error))
        self.skipped += error.episodes
        logger.warning("Skipped bad episode %d: %s", self.skipped, error)
        self.check(max(self.read, FEW_EPISODES) if self.total is None else self.total)

    def check(self, total: int) -> None:
        """Raise `BadEpisodeError` if several episodes, and a larger share of `total` than the limit, are bad."""
        if self.skipped > max(1, self.limit * total):
            raise BadEpisodeError(
                f"{self.skipped} of {total} episodes are bad, but at most {self.limit:.0%} may be skipped. Repair the "
                f"dataset, or give a larger share as skip_bad_episodes. The last error: {self.bad_episodes[-1]}"
            )


def usable_columns(
    episodes: Iterable[RecordedEpisode | BadEpisodeError],
    spec: FrameSpec,
    dataset: str,
    losses: Losses,
    check: Callable[[Any], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the columns of each usable episode's rows, and record the other episodes in `losses`.

    Args:
        episodes: Episodes in order, with an error in place of each that can't be read.
        spec: Says how they become frames.
        dataset: Name of the dataset.
        losses: Records what is left out.
        check: Called with each image. It raises `BadEpisodeError` if the image is damaged.
    """
    state_size = None
    too_short = 0
    for episode in episodes:
        losses.read += 1
        try:
            if isinstance(episode, BadEpisodeError):
                raise episode
            columns = _convert(episode, spec, dataset)
            if spec.state:
                state_size = _check_states(columns["state"], state_size, episode.source)
            if check is not None:
                _check_each(check, columns, episode)
        except BadEpisodeError as error:
            losses.note(error)
        else:
            losses.without_instruction += int((~_find_instructed(episode, spec)).sum())
            too_short += not columns["action"] and any(text.strip() for text in episode.instructions)
            yield columns
    if spec.drops_ends and too_short:
        logger.warning(
            "%s has %s shorter than chunk=%d. Such episodes give no frames and do not count in the statistics. Set "
            "chunk_end='pad' to use them.",
            dataset,
            counted(too_short, "episode"),
            spec.chunk,
        )


def usable_rows(
    episodes: Iterable[RecordedEpisode | BadEpisodeError], spec: FrameSpec, dataset: str, losses: Losses
) -> Iterator[dict[str, Any]]:
    """Yield the rows of each usable episode one by one; see `usable_columns`."""
    for columns in usable_columns(episodes, spec, dataset, losses):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def convert_episode(episode: RecordedEpisode, spec: FrameSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Convert the numbers of an episode, as `Robot.standardize` does.

    Raises:
        BadEpisodeError: The episode has no frames, a column is missing, or numbers have the wrong size, are not finite
            or lie outside their range.
    """
    length = len(episode.instructions)
    if not length:
        raise BadEpisodeError(f"{episode.source}: the episode has length 0.")
    try:
        return spec.robot.standardize(episode.columns, length, spec.state)
    except ValueError as error:
        raise BadEpisodeError(f"{spec.describe_place(episode.source)}: {error}") from error


def _convert(episode: RecordedEpisode, spec: FrameSpec, dataset: str) -> dict[str, Any]:
    """Convert an episode to the columns of its rows, without the frames that have no instruction.

    Raises:
        BadEpisodeError: The episode has no frames, a column is missing, or numbers have the wrong size, are not finite
            or lie outside their range.
    """
    kept, actions, states = convert_episode(episode, spec)
    instructed = _find_instructed(episode, spec)[kept]
    chunks, recorded = spec.make_chunks(actions)
    chosen = np.flatnonzero(instructed & (recorded.all(1) | (not spec.drops_ends)))
    columns = {
        **{column: [images[index] for index in kept[chosen]] for column, images in episode.images.items()},
        "instruction": [episode.instructions[index] for index in kept[chosen]],
        "action": list(actions[chosen]),
        "action_mask": [spec.robot.mask(actions.shape[1])] * len(chosen),
        "state": [None] * len(chosen) if states is None else list(states[chosen]),
        "episode_index": [episode.index] * len(chosen),
        "frame_index": kept[chosen].tolist(),
        "dataset": [dataset] * len(chosen),
    }
    if spec.chunk > 1:
        columns["actions"] = chunks[chosen].tolist()
    if spec.drops_ends:
        dropped = instructed & ~recorded.all(1)
        for column, values in zip(DROPPED_COLUMNS, (actions, states), strict=True):
            last = [] if values is None else values[dropped].tolist()
            columns[column] = [*[[]] * (len(chosen) - 1), last][: len(chosen)]
    elif spec.chunk > 1:
        columns["chunk_mask"] = recorded[chosen].tolist()
    return columns


def _find_instructed(episode: RecordedEpisode, spec: FrameSpec) -> np.ndarray:
    """Return for each frame whether it has an instruction, or can do without one, as (T,) bools."""
    instructed = np.array([bool(text.strip()) for text in episode.instructions], bool)
    return np.full_like(instructed, instructed.any()) if spec.robot.keeps_unlabelled else instructed


def check_state_size(states: Sequence[np.ndarray] | np.ndarray, expected: int | None) -> int | None:
    """Return the size of the states if there are any, or else the expected size.

    Raises:
        ValueError: The size is not the expected one, which `None` leaves open.
    """
    if not len(states):
        return expected
    if expected not in (None, len(states[0])):
        raise ValueError(
            f"the state has {counted(len(states[0]), 'number')}, but it has {expected} in earlier episodes."
        )
    return len(states[0])


def _check_states(states: Sequence[np.ndarray], expected: int | None, source: str) -> int | None:
    try:
        return check_state_size(states, expected)
    except ValueError as error:
        raise BadEpisodeError(f"{source}: {error}") from error


def _check_each(check: Callable[[Any], Any], columns: dict[str, Any], episode: RecordedEpisode) -> None:
    for column in episode.images:
        for image, frame in zip(columns[column], columns["frame_index"], strict=True):
            try:
                check(image)
            except BadEpisodeError as error:
                raise BadEpisodeError(f"{episode.source}, frame {frame}: {error}") from error


__all__ = [
    "BadEpisodeError",
    "Episodes",
    "ImageReference",
    "Losses",
    "RecordPlace",
    "RecordedEpisode",
    "UnreadableFileError",
    "check_state_size",
    "convert_episode",
    "usable_columns",
    "usable_rows",
]
