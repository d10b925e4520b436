"""Frames from episodes that Python code provides."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import IterableDataset

from .adapters import Robot
from .columns import stack_rows
from .episodes import BadEpisodeError, Episodes, Losses, RecordedEpisode, usable_columns, usable_rows
from .feature_names import listed
from .frame_spec import Cameras, FrameSpec, resolve_spec
from .frames import Frames, note_action
from .images import ImageReader, encode_png
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
    cameras: Cameras | None = None,
    chunk: int = 1,
    chunk_end: str = "drop",
    state: bool = False,
) -> Frames:
    """Make frames from episodes that Python code provides.

    Args:
        episodes: An iterable of episodes, or a function that returns one at each call. An episode is an iterable of
            dicts with `image`, `instruction`, `action` and optionally `state`. For several cameras, it has `images`, a
            dict of images by camera, instead of `image`. An image is a uint8 array (H, W, 3), a PIL image, the bytes
            of an image file, or a function without arguments that returns one of these. A stream calls this function
            when the frame is read.
        robot: See `load`.
        name: Name for the statistics.
        cache_key: Name under which the frames are cached. Other processes and later runs then use the cached frames
            instead of reading `episodes`. Change the key whenever the episodes change.
        every: See `load`.
        drop_idle: See `load`.
        streaming: Whether to make each frame when it is read, for which `episodes` must be a function. By default, all
            frames are made now and stored losslessly on disk.
        skip_bad_episodes: See `load`.
        cameras: See `load`.
        chunk: See `load`.
        chunk_end: See `load`.
        state: See `load`.

    Raises:
        BadEpisodeError: An episode can't be used. The message gives its number.
        TypeError: `streaming` is set, but `episodes` is not a function.
    """
    spec = resolve_spec(
        robot,
        name,
        every=every,
        drop_idle=drop_idle,
        cameras=cameras,
        chunk=chunk,
        chunk_end=chunk_end,
        state=state,
    )
    losses = Losses.allow(skip_bad_episodes)
    key = None if cache_key is None else make_key(cache_key, spec, name, losses.limit)
    frames: Frames
    if streaming:
        if not callable(episodes):
            raise TypeError(
                "With streaming, `episodes` must be a function, since every epoch reads them again. Pass a "
                "function that returns the episodes."
            )
        arguments = {"make": episodes, "spec": spec, "name": name, "losses": losses}
        rows = IterableDataset.from_generator(_generate, gen_kwargs=arguments)
        content_key = None if key is None else functools.partial(str, key)
        frames = FrameStream(rows, name, losses=losses, cache_key=content_key, features=spec.features)
    else:
        frames = cached_table(_encoded_columns(episodes, spec, name, losses), spec, losses, name, key)
        spec.require_frames(frames, name)
    note_action(frames, name, None, spec.robot.standard_space)
    return frames


def _encoded_columns(
    episodes: Episodes | Callable[[], Episodes], spec: FrameSpec, name: str, losses: Losses
) -> Iterator[dict[str, Any]]:
    made = _read(episodes() if callable(episodes) else episodes, spec, encode_png)
    with ImageReader() as images:
        yield from usable_columns(made, spec, name, losses, images.read if losses.limit else None)
    losses.check(losses.read)


def _generate(make: Callable[[], Episodes], spec: FrameSpec, name: str, losses: Losses) -> Iterator[dict[str, Any]]:
    # A stream stores nothing, so it does not encode images.
    yield from usable_rows(_read(make(), spec, lambda image: image), spec, name, losses)


def _read(
    episodes: Episodes, spec: FrameSpec, encode: Callable[[Any], Any]
) -> Iterator[RecordedEpisode | BadEpisodeError]:
    for index, frames in enumerate(episodes):
        source = f"episode {index}"
        images: dict[str, list[Any]] = {}
        instructions: list[str] = []
        columns: dict[str, list[Any]] = {}
        try:
            for frame in frames:
                columns = columns or {key: [] for key in ("action", "state") if key in frame}
                for column, image in _choose_images(frame, spec).items():
                    images.setdefault(column, []).append(encode(image))
                instructions.append(frame["instruction"])
                for key, values in columns.items():
                    values.append(frame[key])
        except KeyError as error:
            yield BadEpisodeError(f"{source}: a frame lacks {error}.")
            continue
        except (OSError, ValueError) as error:
            yield BadEpisodeError(f"{source}, frame {len(instructions)}: {error}")
            continue
        try:
            numbers = {key: stack_rows(values, key) for key, values in columns.items()}
        except ValueError as error:
            yield BadEpisodeError(f"{source}: {error}")
        else:
            yield RecordedEpisode(source, index, images, instructions, numbers)


def _choose_images(frame: Mapping[str, Any], spec: FrameSpec) -> dict[str, Any]:
    """Return the images to read by column of the rows.

    Raises:
        KeyError: The frame has no images.
        ValueError: The frame lacks a camera, or it has several and none is named.
    """
    if not spec.cameras and "image" not in frame and "images" in frame:
        raise ValueError(
            f"the images of several cameras are given. Pass cameras=, a list of {listed(frame['images'])}."
        )
    if not spec.cameras:
        return {"image": frame["image"]}
    return {column: frame["images"][camera] for column, camera in spec.choose_cameras(frame["images"]).items()}


__all__ = ["from_episodes"]
