"""Frames from episodes that Python code provides."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from datasets import IterableDataset

from .adapters import Robot
from .columns import stack_rows
from .episodes import BadEpisodeError, Episodes, Losses, RecordedEpisode, usable_columns, usable_rows
from .frames import Frames, note_action
from .images import ImageReader, encode_png
from .robots import resolve_robot
from .streams import FrameStream
from .table_cache import cached_table, make_key


def from_episodes(
    episodes: Episodes | Callable[[], Episodes],
    robot: Robot | str | None = None,
    *,
    name: str = "episodes",
    cache_key: str | None = None,
    every: int | None = None,
    drop_idle: bool | None = None,
    streaming: bool = False,
    skip_bad_episodes: bool | float = False,
) -> Frames:
    """Make frames from episodes that Python code provides.

    Args:
        episodes: An iterable of episodes, or a function that returns one at each call. An episode is an iterable of
            dicts with `image`, `instruction`, `action` and optionally `state`. An image is a uint8 array (H, W, 3), a
            PIL image, the bytes of an image file, or a function without arguments that returns one of these. A stream
            calls this function when the frame is read.
        robot: See `load`.
        name: Name for the statistics.
        cache_key: Name under which the frames are cached. Other processes and later runs then use the cached frames
            instead of reading `episodes`. Change the key whenever the episodes change.
        every: See `load`.
        drop_idle: See `load`.
        streaming: Whether to make each frame when it is read, for which `episodes` must be a function. By default, all
            frames are made now and stored losslessly on disk.
        skip_bad_episodes: See `load`.

    Raises:
        BadEpisodeError: An episode can't be used. The message gives its number.
        TypeError: `streaming` is set, but `episodes` is not a function.
    """
    adapter = resolve_robot(robot, name, every=every, drop_idle=drop_idle)
    losses = Losses.allow(skip_bad_episodes)
    key = None if cache_key is None else make_key(cache_key, adapter, name, losses.limit)
    frames: Frames
    if streaming:
        if not callable(episodes):
            raise TypeError(
                "With streaming, `episodes` must be a function, since every epoch reads them again. Pass a "
                "function that returns the episodes."
            )
        arguments = {"make": episodes, "robot": adapter, "name": name, "losses": losses}
        rows = IterableDataset.from_generator(_generate, gen_kwargs=arguments)
        frames = FrameStream(rows, name, losses=losses, cache_key=None if key is None else functools.partial(str, key))
    else:
        frames = cached_table(_encoded_columns(episodes, adapter, name, losses), losses, name, key)
    note_action(frames, name, None, adapter.standard_space)
    return frames


def _encoded_columns(
    episodes: Episodes | Callable[[], Episodes], robot: Robot, name: str, losses: Losses
) -> Iterator[dict[str, Any]]:
    made = _read(episodes() if callable(episodes) else episodes, encode_png)
    with ImageReader() as images:
        yield from usable_columns(made, robot, name, losses, images.read if losses.limit else None)
    losses.check(losses.read)


def _generate(make: Callable[[], Episodes], robot: Robot, name: str, losses: Losses) -> Iterator[dict[str, Any]]:
    # A stream stores nothing, so it does not encode images.
    yield from usable_rows(_read(make(), lambda image: image), robot, name, losses)


def _read(episodes: Episodes, encode: Callable[[Any], Any]) -> Iterator[RecordedEpisode | BadEpisodeError]:
    for index, frames in enumerate(episodes):
        source = f"episode {index}"
        images, instructions = [], []
        columns: dict[str, list[Any]] = {}
        try:
            for frame in frames:
                columns = columns or {key: [] for key in ("action", "state") if key in frame}
                images.append(encode(frame["image"]))
                instructions.append(frame["instruction"])
                for key, values in columns.items():
                    values.append(frame[key])
        except KeyError as error:
            yield BadEpisodeError(f"{source}: a frame lacks {error}.")
            continue
        except (OSError, ValueError) as error:
            yield BadEpisodeError(f"{source}, frame {len(images)}: {error}")
            continue
        try:
            numbers = {key: stack_rows(values, key) for key, values in columns.items()}
        except ValueError as error:
            yield BadEpisodeError(f"{source}: {error}")
        else:
            yield RecordedEpisode(source, index, images, instructions, numbers)


__all__ = ["from_episodes"]
