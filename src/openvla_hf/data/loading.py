"""Any dataset of episodes, local or on the Hub, as a `datasets.Dataset` or `IterableDataset` of frames.

A frame is a dict: `image` uint8 (H, W, 3), `instruction` str, `action` float64 (A,), `state` float64 (S,) or `None`,
`episode_index`, `frame_index`, `dataset` (the name of its statistics) and `action_mask`, (A,) bools that say which
dimensions of the action statistics scale. Several cameras give `images` by name instead of `image`. Chunks of K
actions add `actions` float64 (K, A) and, if they are padded, `chunk_mask`, (K,) bools.
"""

import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import datasets
import fsspec
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from huggingface_hub import snapshot_download

from ..modeling.checkpoint_files import HUB_ERRORS, hub_error
from .adapters import Robot
from .episodes import Losses, usable_columns
from .frame_spec import Cameras, FrameSpec, resolve_spec
from .frames import Frames, note_action, note_robot
from .open_x import known_table
from .plain_datasets import adapt_stream, adapt_table
from .readers.lerobot import INFO_FILE, LeRobotSource
from .readers.rlds import RLDSSource, find_version
from .remote import as_os_error, find_folder, url_prefix
from .robots import registered_robots
from .shard_rows import ShardRows
from .streams import FrameStream
from .table_cache import cached_table, file_version, make_key


Source = LeRobotSource | RLDSSource

# Endings of files and folders whose layouts differ from lab to lab.
FOREIGN = {".hdf5": "HDF5", ".h5": "HDF5"} | dict.fromkeys((".zarr", ".zarr.zip", ".zgroup", "zarr.json"), "zarr")


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
    cameras: Cameras | None = None,
    chunk: int = 1,
    chunk_end: str = "drop",
    state: bool = False,
) -> Frames:
    """Load a dataset in any known format: LeRobot 3.x and 2.x, RLDS, or `datasets` with an Image column.

    By default, the result is a table of all frames, whose images are decoded when they are read. The table stays
    small, and can be indexed, shuffled and resumed exactly. It is made in one pass and cached until a source file
    changes in size or modification time. With `streaming`, frames are read from front to back and nothing is stored.

    Args:
        data: Folder, Hub id or URL, or a dataset that is already loaded.
        robot: Adapter or its name, which can be that of a dataset of Open X-Embodiment. By default, the one registered
            under the dataset's name, or else the generic one. An RLDS folder with the name of a dataset of Open
            X-Embodiment is read as its row of the table says.
        split: Name of the split.
        name: Name for the statistics. By default, the dataset's own.
        camera: Camera to read instead of the adapter's.
        every: Number of recorded frames to merge into one, instead of the adapter's number. For example, 5 turns 50 Hz
            into 10 Hz. Movements are joined; targets and grippers take their last value.
        drop_idle: Whether to leave out frames whose action moves nothing, instead of the adapter's choice.
        streaming: Whether to return an `IterableDataset`. Its shards are episodes (LeRobot) or files.
        shuffle_buffer: With `streaming`, the number of encoded frames to keep in memory and draw from.
        seed: Seed of the draws.
        skip_bad_episodes: Whether to skip episodes that can't be used, up to a tenth of all or up to the given share.
            The log names each one. Making a table then takes longer, since it decodes every image once.
        cameras: Names of several cameras, whose images a frame has as `images`, a dict in this order. A name is one of
            the adapter's `cameras`, a camera of the dataset, or the last part of the name of such a camera. A dict
            gives the dataset's camera for each name. By default, a frame has the `image` of one camera.
        chunk: Number of actions to predict at once. Above 1, a frame has them as `actions` (chunk, A): its own action
            and those of the frames after it, once frames are merged and idle ones are left out. As in OpenVLA-OFT,
            only the end of the episode ends a chunk: the later actions may be of frames with another instruction or
            without one.
        chunk_end: What happens to the last `chunk - 1` frames of an episode: "drop" leaves them out, as OpenVLA-OFT
            does, and "pad" repeats the last action, with a `chunk_mask` (chunk,) that is false for the repetitions.
            With "drop", an episode of fewer than `chunk` frames gives no frames and does not count in the statistics.
        state: Whether every frame must have a state. A dataset without a state, a state with NaN and a state that
            changes its size are then errors.

    Raises:
        FileNotFoundError: There is nothing at `data`.
        ValueError: The format is unknown, or a split, a camera or a column is missing.
        BadEpisodeError: An episode can't be used (the message gives the file and the record), or more episodes are bad
            than may be skipped.
    """
    source = open_source(data, split, streaming)
    name = name or name_of(source, data)
    spec = resolve_spec(
        choose_robot(robot, source, name),
        name,
        camera=camera,
        every=every,
        drop_idle=drop_idle,
        cameras=cameras,
        chunk=chunk,
        chunk_end=chunk_end,
        state=state,
    )
    losses = Losses.allow(skip_bad_episodes)
    if isinstance(source, Dataset) or not (streaming or isinstance(source, IterableDataset)):
        frames = read_table(source, spec, name, losses, decode_all=losses.limit > 0)
        spec.require_frames(frames, name)
    elif isinstance(source, IterableDataset):
        rows = adapt_stream(source, spec, name, losses)
        stored = None if source is data else (source.info.splits or {}).get(split)
        count = _count_frames(stored and stored.num_examples, None, spec)
        frames = FrameStream(
            rows, name, count, losses, shuffle_buffer=shuffle_buffer, seed=seed, features=spec.features
        )
    else:
        frames = _open_stream(source, spec, name, losses, shuffle_buffer, seed)
    is_plain = isinstance(source, (Dataset, IterableDataset))
    adapter = spec.robot
    names = None if is_plain else adapter.name_dimensions(source.numbers, source.dimension_names)
    note_action(frames, name, names, adapter.standard_space)
    note_robot(frames, name, adapter.name)
    return frames


def try_first_episode(data: str | os.PathLike, robot: Robot | str | None = None, **options: Any) -> FrameStream | None:
    """Read the first usable episode of a LeRobot or RLDS dataset, to find mistakes before all of it is read.

    Nothing is read if `data` is in another format, is a Hub id, or does not exist.

    Args:
        data: Folder or URL.
        robot: See `load`.
        options: Further arguments of `load`.

    Returns:
        The stream of the dataset, or `None` if nothing is read.

    Raises:
        ValueError: The dataset lacks what is read.
        BadEpisodeError: The episode can't be used.
    """
    path = os.fspath(data)
    if "://" not in path and not os.path.isdir(path):
        return None
    source = open_source(path, options.get("split", "train"), streaming=True)
    if not isinstance(source, (LeRobotSource, RLDSSource)):
        return None
    stream = load(path, robot, **{**options, "streaming": True, "shuffle_buffer": 0})
    next(iter(stream.rows), None)
    return stream


def choose_robot(robot: Robot | str | None, source: Source | Frames, name: str) -> Robot | str | None:
    """Return the given robot, or else the dataset of Open X-Embodiment that an RLDS folder contains by its name.

    A dataset of the same name in another format has other features than those in the table.
    """
    is_row = name in known_table().datasets and name not in registered_robots() and isinstance(source, RLDSSource)
    return name if robot is None and is_row else robot


def name_of(source: Source | Frames, data: str | os.PathLike | Frames) -> str:
    """Return a dataset's own name, or the name of the folder from which it was opened."""
    if not isinstance(source, (Dataset, IterableDataset)):
        return source.name
    folder = "" if isinstance(data, (Dataset, IterableDataset)) else os.path.basename(os.path.normpath(data))
    return source.info.dataset_name or folder.strip(".") or "data"


def read_table(
    source: Source | Dataset, spec: FrameSpec, name: str, losses: Losses, decode_all: bool = False
) -> Dataset:
    """Make the table of all frames, or read it from the cache.

    Args:
        source: From `open_source`, not streaming.
        spec: Says how episodes become frames.
        name: Name of the dataset.
        losses: Records what is left out.
        decode_all: Whether to decode every image, to find the damaged ones.

    Raises:
        ValueError: The dataset lacks a feature that is read.
        BadEpisodeError: An episode can't be used, or more are bad than `losses` allow.
    """
    if isinstance(source, Dataset):
        return adapt_table(source, spec, name, losses, decode_all)
    source.check(spec)
    losses.total = source.num_episodes

    def columns() -> Iterator[dict[str, Any]]:
        shards = tqdm(source.shards(), desc=f"Reading {name}", unit=" shards")
        episodes = itertools.chain.from_iterable(source.read(shard, spec) for shard in shards)
        yield from usable_columns(episodes, spec, name, losses, source.images.read if decode_all else None)

    with closing(source):
        return cached_table(columns(), spec, losses, name, _make_key(source, spec, name, losses.limit, decode_all))


def _open_stream(
    source: Source, spec: FrameSpec, name: str, losses: Losses, shuffle_buffer: int, seed: int
) -> FrameStream:
    source.check(spec)
    losses.total = source.num_episodes
    rows = ShardRows(source, spec, name, losses)
    arguments = {"shards": rows.shards, "rows": rows}
    return FrameStream(
        IterableDataset.from_generator(_generate, gen_kwargs=arguments),
        name,
        _count_frames(source.num_frames, source.num_episodes, spec),
        losses,
        functools.partial(_make_key, source, spec, name, losses.limit),
        shuffle_buffer=shuffle_buffer,
        seed=seed,
        images=source.images,
        features=spec.features,
        shards=rows,
    )


def _generate(shards: list[Any], rows: ShardRows) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for _, each in rows.read(shard):
            yield from each


def _count_frames(recorded: int | None, episodes: int | None, spec: FrameSpec) -> int | None:
    """Return the number of frames after merging and dropping, or `None` if it is unknown."""
    if recorded is None or spec.robot.drop_idle:
        return None
    merged = -(-recorded // spec.robot.every)
    return max(0, merged - (spec.chunk - 1) * (episodes or 0)) if spec.drops_ends else merged


def _make_key(source: Source, spec: FrameSpec, name: str, limit: float, decode_all: bool = False) -> str:
    versions = [file_version(source.fs, path) for path in source.files()]
    return make_key(versions, source.split, spec, name, limit, decode_all)


def open_source(data: str | os.PathLike | Frames, split: str, streaming: bool) -> Source | Frames:
    """Recognise the format of a dataset and read its metadata.

    A path that exists is never looked up on the Hub, and neither is the name of a data file.

    Raises:
        FileNotFoundError: There is nothing at `data`, or it contains no data.
        OSError: A remote folder can't be read.
        ValueError: The format is unknown, or the split is missing.
    """
    if isinstance(data, (Dataset, IterableDataset)):
        return data
    with as_os_error(data):
        return _open(os.fspath(data), split, streaming)


def _open(path: str, split: str, streaming: bool) -> Source | Frames:
    if "://" not in path and not os.path.exists(path):
        is_file = path.endswith((*FOREIGN, ".parquet"))
        if path.count("/") != 1 or path.startswith((".", "/", "~")) or is_file:
            raise FileNotFoundError(f"There is no dataset at {path!r}. Give a folder, a URL or a Hub id (user/name).")
        path = f"hf://datasets/{path}" if streaming else _download(path)
    fs, root = find_folder(path)
    prefix = url_prefix(fs, root)
    if fs.exists(f"{root}/{INFO_FILE}"):
        return LeRobotSource(fs, root, split, prefix, inline=streaming)
    if version := find_version(fs, root):
        return RLDSSource(fs, version, split, prefix, inline=streaming)
    if fs.exists(f"{root}/state.json"):
        return datasets.load_from_disk(path)
    _refuse_foreign(fs, root)
    if fs.isfile(root):
        if not root.endswith(".parquet"):
            raise ValueError(f"{path!r} is not a parquet file. Give a parquet file or the folder of a dataset.")
        return datasets.load_dataset("parquet", data_files={split: path}, split=split, streaming=streaming)
    try:
        return datasets.load_dataset(path.removeprefix("hf://datasets/"), split=split, streaming=streaming)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path!r} does not contain a dataset in a known format (LeRobot, RLDS or parquet)."
        ) from error


def _download(repo: str) -> str:
    try:
        return snapshot_download(repo, repo_type="dataset")
    except HUB_ERRORS as error:
        raise hub_error(repo, "the files", error) from error


def _refuse_foreign(fs: fsspec.AbstractFileSystem, root: str) -> None:
    """Raise `ValueError` for a checkpoint, and for formats whose layouts differ from lab to lab."""
    names = [root, *(fs.ls(root, detail=False) if fs.isdir(root) else ())]
    if any(name.endswith(".safetensors") for name in names) and any(name.endswith("config.json") for name in names):
        raise ValueError(f"{root!r} is a checkpoint, not a dataset. Give a dataset.")
    for ending, kind in FOREIGN.items():
        if any(name.rstrip("/").endswith(ending) for name in names):
            raise ValueError(
                f"{root!r} contains {kind} data, whose layout differs from lab to lab. Read its episodes with "
                "openvla_hf.data.from_episodes; docs/data.md has examples for ALOHA, robomimic and zarr."
            )


__all__ = ["choose_robot", "load", "name_of", "open_source", "read_table", "try_first_episode"]
