"""Any data set of episodes, local or on the Hub, as a `datasets.Dataset` or `IterableDataset` of frames.

A frame is a dict: `image` uint8 (H, W, 3), `instruction` str, `action` float64 (A,), `state` float64 (S,) or None,
`episode_index`, `frame_index`, `dataset` (the name that its statistics have) and `action_mask`, (A) bools, which
dimensions of the action statistics scale.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value, concatenate_datasets
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError
from datasets.fingerprint import Hasher
from datasets.utils import tqdm
from huggingface_hub import snapshot_download
from huggingface_hub.utils import WeakFileLock

from .adapters import Robot
from .feature_names import find_name
from .frames import (
    BAD_SHARE,
    FEATURES,
    BadEpisodeError,
    Episode,
    Losses,
    decode_frames,
    decode_image,
    encode_png,
    note_action,
    stack_rows,
    usable_rows,
)
from .readers.lerobot import INFO_FILE, LeRobotSource
from .readers.rlds import RLDSSource, find_version
from .robots import resolve_robot
from .streams import FrameStream


Source = LeRobotSource | RLDSSource
Frames: TypeAlias = Dataset | IterableDataset
Episodes = Iterable[Iterable[Mapping[str, Any]]]

INDEX_VERSION = 3
"""Part of the name of a cached table: a change of what is in it makes old ones unused."""
WRITE_ROWS = 1024
"""Rows that are gathered before they are written: few and large pieces are read faster."""
FOREIGN = {".hdf5": "HDF5", ".h5": "HDF5"} | dict.fromkeys((".zarr", ".zarr.zip", ".zgroup", "zarr.json"), "zarr")
"""Names of files and folders that only Python code can read, by their ending."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


def load(
    data: str | os.PathLike | Dataset | IterableDataset,
    robot: Robot | str | None = None,
    *,
    split: str = "train",
    name: str | None = None,
    camera: str | None = None,
    every: int | None = None,
    drop_idle: bool | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
    skip_bad_episodes: bool | float = False,
) -> Frames:
    """Loads a data set in any known format: LeRobot 3.x and 2.x, RLDS, or one of `datasets` with an Image column.

    Without `streaming`, the result is a table of all frames whose images are decoded when they are read: it can be
    indexed, shuffled and resumed exactly, and stays small. It is made in one pass and cached by the files' sizes and
    times. With `streaming`, nothing is kept: the result is read from front to back.

    Args:
        data: Folder, Hub id or URL, or a data set that is already loaded.
        robot: Adapter or its name; by default the one registered under the data set's name, else the generic one.
        split: Which split.
        name: Name that the statistics get; the data set's own by default.
        camera: The image to read instead of the adapter's.
        every: How many recorded frames become one, instead of the adapter's number: 5 makes 10 Hz of 50 Hz. Movements
            are joined, and of targets and grippers the last counts.
        drop_idle: Whether to leave out frames whose action moves nothing, instead of what the adapter says.
        streaming: Whether to give an `IterableDataset`; its shards are episodes (LeRobot) or files.
        shuffle_buffer: With `streaming`, encoded frames that are held to draw from.
        seed: Of the draws.
        skip_bad_episodes: Whether to go on without episodes that can't be used, up to a tenth of all or to the share
            that is given. Each is logged with its number. A table then takes the time to decode every image once.

    Raises:
        FileNotFoundError: there is nothing at `data`.
        ValueError: it has no known format, or lacks a split, a camera or a column.
        BadEpisodeError: an episode can't be used; the message names the file and the record. Or more are bad than may
            be skipped.
    """
    source = open_source(data, split, streaming)
    name = name or name_of(source, data)
    adapter = resolve_robot(robot, name, camera=camera, every=every, drop_idle=drop_idle)
    losses = _losses(skip_bad_episodes)
    if isinstance(source, Dataset) or not (streaming or isinstance(source, IterableDataset)):
        frames = read_table(source, adapter, name, losses, check=decode_image if losses.limit else None)
        return _with_names(frames, source, adapter, name)
    cache_key = None
    if isinstance(source, IterableDataset):
        rows = _adapt_stream(source, adapter, name, losses)
        stored = None if source is data else (source.info.splits or {}).get(split)
        recorded = stored and stored.num_examples
    else:
        source.check(adapter)
        losses.total = source.num_episodes
        arguments = {"shards": source.shards(), "source": source, "robot": adapter, "name": name, "losses": losses}
        rows = IterableDataset.from_generator(_generate, gen_kwargs=arguments)
        recorded = source.num_frames
        cache_key = functools.partial(_key_of, source, adapter, name, losses.limit)
    num_frames = None if recorded is None or adapter.drop_idle else -(-recorded // adapter.every)
    frames = FrameStream(rows, name, num_frames, losses, cache_key, shuffle_buffer=shuffle_buffer, seed=seed)
    return _with_names(frames, source, adapter, name)


def _with_names(frames: Frames, source: Source | Frames, robot: Robot, name: str) -> Frames:
    """The frames, with the names of the action's dimensions where the data set knows them, and the action's space."""
    has_names = not isinstance(source, (Dataset, IterableDataset))
    names = robot.name_dimensions(source.numbers, source.dimension_names) if has_names else None
    note_action(frames, name, names, robot.standard_space)
    return frames


def _losses(skip_bad_episodes: bool | float) -> Losses:
    share = BAD_SHARE if skip_bad_episodes is True else float(skip_bad_episodes)
    if not 0 <= share <= 1:
        raise ValueError(f"skip_bad_episodes={skip_bad_episodes} is not a share of the episodes: give at most 1.")
    return Losses(share)


def name_of(source: Source | Frames, data: str | os.PathLike | Frames) -> str:
    """The name that a data set gives itself, or that of the folder that it was opened from."""
    if not isinstance(source, (Dataset, IterableDataset)):
        return source.name
    folder = "" if isinstance(data, (Dataset, IterableDataset)) else os.path.basename(os.path.normpath(data))
    return source.info.dataset_name or folder.strip(".") or "data"


def read_table(
    source: Source | Dataset,
    robot: Robot,
    name: str,
    losses: Losses,
    check: Callable[[Any], Any] | None = None,
) -> Dataset:
    """A table of all frames, with what was lost noted in `losses`; `check` is called with each image."""
    if isinstance(source, Dataset):
        return _adapt_table(source, robot, name, losses, check)
    # At once, and not an episode at a time: no episode could be read.
    source.check(robot)
    losses.total = source.num_episodes

    def columns() -> Iterator[dict[str, Any]]:
        for shard in tqdm(source.shards(), desc=f"Reading {name}", unit=" shards"):
            yield from usable_rows(source.read(shard, robot), robot, name, losses, check)

    return _write_table(columns(), losses, name, _key_of(source, robot, name, losses.limit, check is not None))


def _key_of(source: Source, robot: Robot, name: str, limit: float, is_checked: bool = False) -> str:
    """A hash of what makes the frames: the files by their sizes and times, and how they are read."""
    stamps = [_stamp(source.fs, path) for path in source.files()]
    return Hasher.hash([INDEX_VERSION, stamps, source.split, robot, name, limit, is_checked])


def _stamp(fs: fsspec.AbstractFileSystem, path: str) -> tuple[Any, ...]:
    """What a file system knows of a file's version: the local one, the Hub, other servers."""
    try:
        info = fs.info(path)
    except FileNotFoundError:  # reported when the file is read
        info = {}
    return path, *(info.get(field) for field in ("size", "mtime", "blob_id", "ETag"))


def open_source(data: str | os.PathLike | Frames, split: str, streaming: bool) -> Source | Frames:
    """Recognises the format and reads the meta data.

    A path that exists is never looked up on the Hub, and neither is the name of a file of data.

    Raises:
        FileNotFoundError: there is nothing at `data`, or no data.
        ValueError: its format is not known, or there is no such split.
    """
    if isinstance(data, (Dataset, IterableDataset)):
        return data
    path = os.fspath(data)
    if "://" not in path and not os.path.exists(path):
        is_file = path.endswith((*FOREIGN, ".parquet"))
        if path.count("/") != 1 or path.startswith((".", "/", "~")) or is_file:
            raise FileNotFoundError(f"There is no data set at {path!r}: give a folder, a URL or a Hub id (user/name).")
        path = f"hf://datasets/{path}" if streaming else snapshot_download(path, repo_type="dataset")
    fs, root = fsspec.core.url_to_fs(path)
    prefix = f"{path.split('://')[0]}://" if "://" in path else ""
    if fs.exists(f"{root}/{INFO_FILE}"):
        return LeRobotSource(fs, root, split, prefix, inline=streaming)
    if version := find_version(fs, root):
        return RLDSSource(fs, version, split, inline=streaming)
    if fs.exists(f"{root}/state.json"):
        return datasets.load_from_disk(path)
    _refuse_foreign(fs, root)
    if fs.isfile(root):
        if not root.endswith(".parquet"):
            raise ValueError(f"{path!r} is a file, of which only parquet is read: give the folder of a data set.")
        return datasets.load_dataset("parquet", data_files={split: path}, split=split, streaming=streaming)
    try:
        return datasets.load_dataset(path.removeprefix("hf://datasets/"), split=split, streaming=streaming)
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise FileNotFoundError(f"{path!r} holds no data set of a known format: LeRobot, RLDS or parquet.") from error


def _refuse_foreign(fs: fsspec.AbstractFileSystem, root: str) -> None:
    """Raise `ValueError` for a checkpoint, and for formats in which every lab has a layout of its own."""
    names = [root, *(fs.ls(root, detail=False) if fs.isdir(root) else ())]
    if any(name.endswith(".safetensors") for name in names) and any(name.endswith("config.json") for name in names):
        raise ValueError(f"{root!r} is a checkpoint, not a data set: give the data set that it is to be tried on.")
    for ending, kind in FOREIGN.items():
        if any(name.rstrip("/").endswith(ending) for name in names):
            raise ValueError(
                f"{root!r} holds {kind} data, whose layouts differ from lab to lab: read its episodes with "
                "openvla_hf.data.from_episodes. The page docs/data.md has examples for ALOHA, robomimic and zarr."
            )


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
    """Frames of episodes that Python code makes.

    Args:
        episodes: An iterable of episodes, or a function that gives one, which can be read again and again. An episode
            is an iterable of dicts with `image`, `instruction`, `action`, and maybe `state`. An image is an array
            uint8 (H, W, 3), a PIL image, the bytes of an encoded image, or a function without arguments that gives
            one of these; of a stream, it is called when the frame is read.
        robot: See `load`.
        name: Name that the statistics get.
        cache_key: Name of these very episodes. What was made under it before is used again, by all processes and at
            every start, and `episodes` is not read: change the key when the episodes change.
        every: See `load`.
        drop_idle: See `load`.
        streaming: Whether to make frames as they are read (`episodes` is then a function); else they are made once
            and kept on disk, without loss.
        skip_bad_episodes: See `load`.

    Raises:
        BadEpisodeError: an episode can't be used; the message says which.
        TypeError: `streaming` without a function.
    """
    adapter = resolve_robot(robot, name, every=every, drop_idle=drop_idle)
    losses = _losses(skip_bad_episodes)
    key = None if cache_key is None else Hasher.hash([INDEX_VERSION, cache_key, adapter, name, losses.limit])
    if streaming:
        if not callable(episodes):
            raise TypeError("A stream starts over at every epoch: pass a function that gives the episodes.")
        arguments = {"make": episodes, "robot": adapter, "name": name, "losses": losses}
        rows = IterableDataset.from_generator(_generate_made, gen_kwargs=arguments)
        stream_key = None if key is None else functools.partial(str, key)
        stream = FrameStream(rows, name, losses=losses, cache_key=stream_key)
        note_action(stream, name, None, adapter.standard_space)
        return stream

    def columns() -> Iterator[dict[str, Any]]:
        made = _read_made(episodes() if callable(episodes) else episodes, encode_png)
        yield from usable_rows(made, adapter, name, losses, decode_image if losses.limit else None)
        losses.check(losses.read)

    table = _write_table(columns(), losses, name, key)
    note_action(table, name, None, adapter.standard_space)
    return table


def _read_made(episodes: Episodes, encode: Callable[[Any], Any]) -> Iterator[Episode | BadEpisodeError]:
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
            yield Episode(source, index, images, instructions, numbers)


def _generate_made(make: Callable[[], Episodes], robot: Robot, name: str, losses: Losses) -> Iterator[dict[str, Any]]:
    # Images stay as they are until they are read: what is not stored need not be encoded.
    for columns in usable_rows(_read_made(make(), lambda image: image), robot, name, losses):
        yield from _as_rows(columns)


def _generate(shards: list[Any], source: Source, robot: Robot, name: str, losses: Losses) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for columns in usable_rows(source.read(shard, robot), robot, name, losses):
            yield from _as_rows(columns)


def _as_rows(columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def cache_folder() -> Path:
    """Where tables and their statistics are kept: in the cache of `datasets`."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "openvla_hf"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _lock(path: Path) -> AbstractContextManager[Any]:
    """Held by the one process that makes a file of the cache, while the others wait for it."""
    locks = path.parent / "locks"
    locks.mkdir(exist_ok=True)
    return WeakFileLock(locks / f"{path.stem}.lock")


def _write_table(columns: Iterable[dict[str, Any]], losses: Losses, name: str, key: str | None) -> Dataset:
    """The table of the cache under `key`, which is written from the columns if it is not there.

    Without a key, the name of the table is a hash of what is in it.
    """
    folder = cache_folder()
    if key is None:
        path = _write_whole(columns, losses, folder, name)
    else:
        path = folder / f"{name}-{key}.arrow"
        with _lock(path):
            if not path.exists():
                _write_whole(columns, losses, folder, name, path)
        before = json.loads(path.with_suffix(".json").read_text())
        losses.bad_episodes, losses.skipped = before["bad_episodes"], before["skipped"]
        losses.without_instruction = before["without_instruction"]
    if losses.skipped:
        logger.warning(
            "%d bad episodes of %s are skipped, the first: %s", losses.skipped, name, losses.bad_episodes[0]
        )
    return Dataset.from_file(str(path)).with_transform(decode_frames)


def _write_whole(
    columns: Iterable[dict[str, Any]], losses: Losses, folder: Path, name: str, path: Path | None = None
) -> Path:
    """Write a table aside and then move it to its place: one that was cut short is never taken for a whole one."""
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        table, lost = Path(unfinished, "table.arrow"), Path(unfinished, "lost.json")
        _write_rows(table, columns)
        told = {field: getattr(losses, field) for field in ("bad_episodes", "skipped", "without_instruction")}
        lost.write_text(json.dumps(told))
        if path is None:
            with table.open("rb") as file:
                path = folder / f"{name}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.arrow"
        os.replace(lost, path.with_suffix(".json"))
        os.replace(table, path)
    return path


def _write_rows(path: Path, columns: Iterable[dict[str, Any]]) -> None:
    schema = FEATURES.arrow_schema
    waiting: list[pa.Table] = []

    def flush() -> None:
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
            waiting.clear()

    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for each in columns:
                waiting.append(pa.table(each, schema=schema))
                if sum(map(len, waiting)) >= WRITE_ROWS:
                    flush()
            flush()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(
            f"The table of the frames can't be written to {path} ({error}): free some space, or name a folder of "
            "another disk in HF_DATASETS_CACHE."
        ) from error


def _text_reader(name: str, feature: Any) -> Callable[[Any], str]:
    """What makes an instruction of a value of a column: a text as it is, a label by its name."""
    if isinstance(feature, ClassLabel):
        return lambda label: feature.int2str(int(label)) if label is not None and label >= 0 else ""
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "string_view"):
        raise ValueError(
            f"The column {name!r} holds {feature} and no text: name the instruction's column in the robot."
        )
    return lambda text: text or ""


def _refuse_to_convert_twice(data: Frames, robot: Robot) -> None:
    """Raise `ValueError` where the data are frames, whose actions are standard already, and the robot changes them."""
    if robot.converts and {*FEATURES} <= {*(data.column_names or ())}:
        raise ValueError(
            f"These frames were loaded before, so {robot.name!r} would convert their actions a second time: give what "
            "they were loaded from, or leave the robot out."
        )


def _adapt_table(
    data: Dataset, robot: Robot, name: str, losses: Losses, check: Callable[[Any], Any] | None
) -> Dataset:
    """Keep the images where they are, and compute the other columns."""
    _refuse_to_convert_twice(data, robot)
    camera = robot.choose_camera(_image_columns(data))
    images = data.with_format(None).select_columns([camera]).cast_column(camera, Image(decode=False))
    columns = robot.wanted_columns(data.column_names)
    instruction = find_name(robot.instruction, data.column_names, "instruction")
    read_text = _text_reader(instruction, data.features[instruction])
    ordering = [column for column in ("episode_index", "frame_index") if column in data.column_names]
    # float32 is the format's own choice for numbers of float64.
    table = data.select_columns([*columns, instruction, *ordering]).with_format("numpy", dtype=np.float64)[:]
    episode_of = np.asarray(table.get("episode_index", np.zeros(len(data))), np.int64)
    if robot.needs_whole_episodes and "episode_index" not in ordering:
        raise ValueError(f"The adapter {robot.name!r} needs whole episodes, but there is no column 'episode_index'.")
    starts = np.flatnonzero(np.concatenate(([True], episode_of[1:] != episode_of[:-1])))

    def episodes() -> Iterator[Episode | BadEpisodeError]:
        for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
            index = int(episode_of[start])
            place = f"{name}, episode {index}"
            texts = [read_text(text) for text in table[instruction][start:end]]
            try:
                numbers = {column: stack_rows(list(table[column][start:end]), column) for column in columns}
            except ValueError as error:
                yield BadEpisodeError(f"{place}: {error}")
            else:
                yield Episode(place, index, range(start, end), texts, numbers)  # type: ignore[arg-type]

    losses.total = len(starts)
    tables = []
    row_of: list[int] = []
    for rows in usable_rows(episodes(), robot, name, losses, check and _check_rows(images, check)):
        row_of += rows.pop("image")
        tables.append(rows)
    schema = FEATURES.arrow_schema.remove(0)
    numbers = Dataset(pa.concat_tables([schema.empty_table(), *(pa.table(each, schema=schema) for each in tables)]))
    if camera != "image":
        images = images.rename_column(camera, "image")
    if len(row_of) < len(data):
        images = images.select(row_of)
    return concatenate_datasets([images, numbers], axis=1).with_transform(decode_frames)


def _check_rows(images: Dataset, check: Callable[[Any], Any]) -> Callable[[int], None]:
    """A check of the image of a row; all images are checked now, and again only where their files change."""
    folder = cache_folder()
    stamps = [_stamp(*fsspec.core.url_to_fs(file)) for file in _files_of(images)]
    path = folder / f"damaged-{Hasher.hash([images._fingerprint, stamps])}.json"
    with _lock(path):
        if not path.exists():
            damaged = {}
            for row in tqdm(range(len(images)), desc="Decoding", unit=" images"):
                try:
                    check(next(iter(images[row].values())))
                except BadEpisodeError as error:
                    damaged[row] = str(error)
            path.write_text(json.dumps(damaged))
    known = json.loads(path.read_text())

    def check_row(row: int) -> None:
        if str(row) in known:
            raise BadEpisodeError(known[str(row)])

    return check_row


def _files_of(images: Dataset) -> list[str]:
    """The files that hold the images of a table, without those that the table holds itself."""
    files: set[str] = set()
    for batch in images.with_format("arrow").iter(batch_size=WRITE_ROWS):
        (references,) = batch.columns
        is_outside = pc.is_null(pc.struct_field(references, "bytes"))
        paths = pc.struct_field(references, "path").filter(is_outside).drop_null()
        # A fragment says where in the file an image is.
        files.update(path.partition("#")[0] for path in paths.to_pylist())
    return sorted(files)


def _adapt_stream(data: IterableDataset, robot: Robot, name: str, losses: Losses) -> IterableDataset:
    """Row by row: a bad one is left out by itself where bad episodes are skipped."""
    _refuse_to_convert_twice(data, robot)
    if robot.needs_whole_episodes:
        raise ValueError(f"The adapter {robot.name!r} needs whole episodes: load this data set without streaming.")
    if data.features is None:
        raise ValueError("The features of this stream are not known: give them to it, or load it without streaming.")
    camera = robot.choose_camera(_image_columns(data))
    columns = robot.wanted_columns(data.column_names)
    instruction = find_name(robot.instruction, data.column_names, "instruction")
    read_text = _text_reader(instruction, data.features[instruction])

    def adapt(row: dict[str, Any], index: int) -> dict[str, Any]:
        numbers = {column: np.asarray(row[column], np.float64)[None] for column in columns}
        losses.read += 1
        try:
            _, actions, states = robot.standardize(numbers, 1)
        except ValueError as error:
            losses.note(BadEpisodeError(f"{name}, row {index}: {error}"))
            return dict.fromkeys(FEATURES)  # without an instruction, so it is left out
        return {
            "image": row[camera],
            "instruction": read_text(row[instruction]),
            "action": actions[0],
            "action_mask": robot.mask(actions.shape[1]),
            "state": None if states is None else states[0],
            "episode_index": row.get("episode_index", 0),
            "frame_index": row.get("frame_index", index),
            "dataset": name,
        }

    data = data.cast_column(camera, Image(decode=False))
    return data.map(adapt, with_indices=True, remove_columns=data.column_names).filter(_has_instruction)


def _has_instruction(row: dict[str, Any]) -> bool:
    return bool(row["instruction"] and row["instruction"].strip())


def _image_columns(data: Frames) -> list[str]:
    return [name for name, feature in data.features.items() if isinstance(feature, Image)]


__all__ = ["Frames", "from_episodes", "load"]
