"""Datasets with an Image column, in any format that `datasets` reads, as rows of frames."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, concatenate_datasets
from datasets.utils import tqdm

from .columns import stack_rows
from .datasets_internals import fingerprint
from .episodes import BadEpisodeError, Losses, RecordedEpisode, check_state_size, usable_columns
from .feature_names import find_name
from .frame_spec import NUMBERS, FrameSpec
from .frames import FrameDecoder, Frames
from .images import ImageReader
from .remote import find_folder
from .table_cache import WRITE_ROWS, cache_folder, file_version, lock, make_key, write_json


# Stands for the images of a row until the kept rows are known.
ROW = "row"


def adapt_table(data: Dataset, spec: FrameSpec, name: str, losses: Losses, decode_all: bool = False) -> Dataset:
    """Convert a table's columns to the robot's standard form, and keep its images where they are.

    Args:
        data: Table with Image columns, or frames.
        spec: Says how episodes become frames.
        name: Name of the dataset.
        losses: Records what is left out.
        decode_all: Whether to decode every image, to find the damaged ones.

    Raises:
        ValueError: The columns do not fit the robot.
    """
    _require_unconverted(data, spec)
    images = _select_images(data, spec)
    columns = spec.wanted_columns(data.column_names)
    instruction = find_name(spec.robot.instruction, data.column_names, "instruction")
    read_text = _text_reader(instruction, data.features[instruction])
    ordering = [column for column in ("episode_index", "frame_index") if column in data.column_names]
    # The numpy format would turn float64 into float32 by default.
    table = data.select_columns([*columns, instruction, *ordering]).with_format("numpy", dtype=np.float64)[:]
    episode_of = np.asarray(table.get("episode_index", np.zeros(len(data))), np.int64)
    if spec.needs_whole_episodes and "episode_index" not in ordering:
        raise ValueError(f"{_whole(spec)} needs whole episodes, but there is no column 'episode_index'.")
    starts = np.flatnonzero(np.concatenate(([True], episode_of[1:] != episode_of[:-1])))
    if spec.chunk > 1:
        if "frame_index" not in ordering:
            raise ValueError(
                f"{_whole(spec)} needs every frame of an episode in order, but there is no column 'frame_index'. Add "
                "one that counts the frames of each episode."
            )
        _require_order(episode_of, starts, np.asarray(table["frame_index"], np.int64))

    def episodes() -> Iterator[RecordedEpisode | BadEpisodeError]:
        for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
            index = int(episode_of[start])
            place = f"{name}, episode {index}"
            texts = [read_text(text) for text in table[instruction][start:end]]
            try:
                numbers = {column: stack_rows(list(table[column][start:end]), column) for column in columns}
            except ValueError as error:
                yield BadEpisodeError(f"{place}: {error}")
            else:
                yield RecordedEpisode(place, index, {ROW: range(start, end)}, texts, numbers)  # type: ignore[dict-item]

    losses.total = len(starts)
    tables = []
    row_of: list[int] = []
    for rows in usable_columns(episodes(), spec, name, losses, _row_check(images) if decode_all else None):
        row_of += rows.pop(ROW)
        tables.append(rows)
    kept = {column: kind for column, kind in spec.features.items() if column not in images.column_names}
    schema = Features(kept).arrow_schema
    numbers = Dataset(pa.concat_tables([schema.empty_table(), *(pa.table(each, schema=schema) for each in tables)]))
    if len(row_of) < len(data):
        images = images.select(row_of)
    return concatenate_datasets([images, numbers], axis=1).with_transform(FrameDecoder())


def _require_order(episode_of: np.ndarray, starts: np.ndarray, frame_of: np.ndarray) -> None:
    """Raise `ValueError` unless the rows of each episode are complete and in order, since chunks need both.

    The frame numbers of a table that kept every n-th frame increase by n.

    Args:
        episode_of: Number of the episode of each row, (N,).
        starts: Rows at which the number changes.
        frame_of: Number of the frame of each row, (N,).
    """
    numbers, counts = np.unique(episode_of[starts], return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"The rows of episode {numbers[counts > 1][0]} are not consecutive, so chunks can't be made. Sort the "
            "table, or give each episode its own number."
        )
    inside = np.setdiff1d(np.arange(1, len(frame_of)), starts)
    steps = frame_of[inside] - frame_of[inside - 1]
    if (steps <= 0).any():
        raise ValueError(
            f"The rows of episode {episode_of[inside[steps <= 0][0]]} are not in the order of 'frame_index', so "
            "chunks can't be made. Sort the table."
        )
    if len(steps) and len(jumps := inside[steps > steps.min()]):
        raise ValueError(
            f"Frames are missing from episode {episode_of[jumps[0]]}: 'frame_index' jumps from "
            f"{frame_of[jumps[0] - 1]} to {frame_of[jumps[0]]}, so chunks can't be made. Give the parts on each side "
            "of a gap their own episode numbers, or load the complete dataset."
        )


def _select_images(data: Dataset, spec: FrameSpec) -> Dataset:
    """Select the images of a table as references, in columns named as in rows."""
    cameras = spec.choose_cameras(_image_columns(data))
    parts = []
    for column, camera in cameras.items():
        images = data.with_format(None).select_columns([camera]).cast_column(camera, Image(decode=False))
        parts.append(images if column == camera else images.rename_column(camera, column))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts, axis=1)


def adapt_stream(data: IterableDataset, spec: FrameSpec, name: str, losses: Losses) -> IterableDataset:
    """Convert a stream to the robot's standard form row by row. A bad row counts as a bad episode.

    Args:
        data: Stream with Image columns, or frames.
        spec: Says how rows become frames.
        name: Name of the dataset.
        losses: Records what is left out.

    Raises:
        ValueError: The columns are unknown or do not fit the robot, or whole episodes are needed.
    """
    _require_unconverted(data, spec)
    if spec.needs_whole_episodes:
        raise ValueError(f"{_whole(spec)} needs whole episodes. Load this dataset without streaming.")
    if data.features is None:
        raise ValueError("The features of this stream are unknown. Define them, or load it without streaming.")
    robot, features = spec.robot, spec.features
    cameras = spec.choose_cameras(_image_columns(data))
    columns = spec.wanted_columns(data.column_names)
    instruction = find_name(robot.instruction, data.column_names, "instruction")
    read_text = _text_reader(instruction, data.features[instruction])

    state_size: int | None = None

    def adapt(row: dict[str, Any], index: int) -> dict[str, Any]:
        nonlocal state_size
        numbers = {column: np.asarray(row[column], np.float64)[None] for column in columns}
        losses.read += 1
        try:
            _, actions, states = robot.standardize(numbers, 1, spec.state)
            if spec.state and states is not None:
                state_size = check_state_size(states, state_size)
        except ValueError as error:
            losses.note(BadEpisodeError(f"{name}, row {index}: {error}"))
            return dict.fromkeys(features)  # dropped below, since it has no instruction
        return {
            **{column: row[camera] for column, camera in cameras.items()},
            "instruction": read_text(row[instruction]),
            "action": actions[0],
            "action_mask": robot.mask(actions.shape[1]),
            "state": None if states is None else states[0],
            # Each reader of a stream counts its own rows, so the number of a row does not identify a frame.
            "episode_index": row.get("episode_index"),
            "frame_index": row.get("frame_index"),
            "dataset": name,
        }

    for camera in cameras.values():
        data = data.cast_column(camera, Image(decode=False))
    return data.map(adapt, with_indices=True, remove_columns=data.column_names).filter(_has_instruction)


def _has_instruction(row: dict[str, Any]) -> bool:
    return bool(row["instruction"] and row["instruction"].strip())


def _image_columns(data: Frames) -> list[str]:
    return [name for name, feature in data.features.items() if isinstance(feature, Image)]


def _text_reader(name: str, feature: Any) -> Callable[[Any], str]:
    """Return a function that converts a value of a column to an instruction: a text, or the name of a label."""
    if isinstance(feature, ClassLabel):
        return lambda label: feature.int2str(int(label)) if label is not None and label >= 0 else ""
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "string_view"):
        raise ValueError(
            f"The column {name!r} contains {feature}, not text. Set the robot's `instruction` to a column of texts."
        )
    return lambda text: text or ""


def _whole(spec: FrameSpec) -> str:
    return f"chunk={spec.chunk}" if spec.chunk > 1 else f"The adapter {spec.robot.name!r}"


def _require_unconverted(data: Frames, spec: FrameSpec) -> None:
    """Raise `ValueError` if the data are frames, and reading them would convert or chunk their actions again."""
    columns = {*(data.column_names or ())}
    if not {*NUMBERS} <= columns:
        return
    if spec.robot.converts:
        raise ValueError(
            f"The actions of these frames are already converted, and {spec.robot.name!r} would convert them a second "
            "time. Load the original dataset instead, or leave the robot out."
        )
    if spec.chunk > 1 and "actions" in columns:
        raise ValueError("These frames already have chunks of actions. Load the original dataset instead.")


def _row_check(images: Dataset) -> Callable[[int], None]:
    """Return a function that checks a row's image. All images are decoded now, and again if their files change."""
    folder = cache_folder()
    versions = [file_version(*find_folder(file)) for file in _image_files(images)]
    path = folder / f"damaged-{make_key(fingerprint(images), versions)}.json"
    with lock(path):
        if not path.exists():
            damaged = {}
            with ImageReader() as reader:
                for row in tqdm(range(len(images)), desc="Decoding", unit=" images"):
                    try:
                        for image in images[row].values():
                            reader.read(image)
                    except BadEpisodeError as error:
                        damaged[row] = str(error)
            write_json(path, damaged)
    known = json.loads(path.read_text())

    def check(row: int) -> None:
        if str(row) in known:
            raise BadEpisodeError(known[str(row)])

    return check


def _image_files(images: Dataset) -> list[str]:
    """List the files outside a table from which its images are read."""
    files: set[str] = set()
    for batch in images.with_format("arrow").iter(batch_size=WRITE_ROWS):
        for references in batch.columns:
            is_outside = pc.is_null(pc.struct_field(references, "bytes"))
            paths = pc.struct_field(references, "path").filter(is_outside).drop_null()
            # The fragment after "#" gives the place in the file.
            files.update(path.partition("#")[0] for path in paths.to_pylist())
    return sorted(files)


__all__ = ["adapt_stream", "adapt_table"]
