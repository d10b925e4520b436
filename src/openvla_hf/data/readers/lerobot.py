"""LeRobot datasets: parquet tables and videos, each with many episodes in version 3.0 and with one in 2.x."""

import functools
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from ...modeling.known_names import check_name
from ..columns import matrix
from ..episodes import BadEpisodeError, ImageReference, RecordedEpisode, RecordPlace, UnreadableFileError
from ..feature_names import as_tuple, counted
from ..frame_spec import FrameSpec
from ..images import ImageReader, check_images
from ..recently_used import RecentlyUsed
from ..remote import ForkSafe, retry


INFO_FILE = "meta/info.json"
# Bytes of images in a row group above which reading in random order is slow.
LARGE_GROUP = 64 * 10**6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeFiles:
    """The files of an episode.

    Attributes:
        episode: Number of the episode.
        path: Its parquet file.
        length: Its number of frames.
        videos: By camera, the video and the time in seconds at which the episode begins in it.
    """

    episode: int
    path: str
    length: int
    videos: dict[str, tuple[str, float]]

    @property
    def key(self) -> str:
        """What identifies the shard."""
        return f"{self.path}, episode {self.episode}"


class DataFile:
    """An open parquet file, whose footer and episode numbers are read once for all of its episodes.

    Args:
        fs: File system of the file.
        path: Path of the file.
        columns: Columns to read for each episode.

    Raises:
        ValueError: The file lacks a column.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, columns: list[str]):
        self.columns = columns
        self.file = pq.ParquetFile(path, filesystem=fs)
        missing = sorted({*columns, "episode_index"} - {*self.file.schema_arrow.names})
        if missing:
            raise ValueError(f"the file has no column {' or '.join(map(repr, missing))}.")
        metadata = self.file.metadata
        self.sizes = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], int)
        self.ends = np.cumsum(self.sizes)
        episode_of = self.file.read(columns=["episode_index"])["episode_index"].to_numpy()
        self.rows = np.argsort(episode_of, kind="stable")
        self.episodes, self.starts = np.unique(episode_of[self.rows], return_index=True)
        self.groups: dict[int, pa.Table] = {}

    def find(self, episode: int) -> np.ndarray:
        """Return the row numbers of an episode in the order of storage, or none if the file lacks the episode."""
        at = np.searchsorted(self.episodes, [episode, episode + 1])
        return self.rows[slice(*np.append(self.starts, len(self.rows))[at])]

    def largest_group(self, column: str) -> int:
        """Return the size in bytes of a column in the row group where it is largest."""
        groups = (self.file.metadata.row_group(group) for group in range(len(self.sizes)))
        return max(
            sum(
                part.total_uncompressed_size
                for part in map(group.column, range(group.num_columns))
                if part.path_in_schema.startswith(f"{column}.")
            )
            for group in groups
        )

    def read(self, rows: np.ndarray) -> pa.Table:
        """Read rows by their numbers, which must be in ascending order."""
        if not len(rows):
            return self.file.schema_arrow.empty_table().select(self.columns)
        group_of = np.searchsorted(self.ends, rows, side="right")
        groups, which = np.unique(group_of, return_inverse=True)
        # Keep these row groups, since the next episode may begin in the last of them.
        kept = self.groups
        self.groups = {
            group: kept[group] if group in kept else self.file.read_row_group(group, columns=self.columns)
            for group in groups.tolist()
        }
        table = pa.concat_tables(self.groups.values())
        sizes = self.sizes[groups]
        places = rows - (self.ends - self.sizes)[group_of] + (np.cumsum(sizes) - sizes)[which]
        if places[-1] - places[0] + 1 == len(places):
            return table.slice(places[0], len(places))
        return table.take(places)


class LeRobotSource(ForkSafe):
    """A reader of one split of a LeRobot folder.

    It keeps the last data file and the last few videos open; `close` closes them.

    Args:
        fs: File system of the folder.
        root: Folder with `meta/info.json`.
        split: Name of the split.
        prefix: Prefix that turns paths of the file system into URLs, such as "hf://".
        inline: Whether images in the parquet files are read as bytes, for streams. By default they become references
            into the files, for tables.

    Attributes:
        images: Reads the images of the episodes.

    Raises:
        ValueError: The version is not supported, or the split is missing.
    """

    def __init__(
        self, fs: AbstractFileSystem, root: str, split: str = "train", prefix: str = "", inline: bool = False
    ):
        super().__init__(fs)
        self.root, self.prefix, self.split, self.inline = root, prefix, split, inline
        self.name = root.rstrip("/").rsplit("/", 1)[-1]
        info = json.loads(fs.read_text(f"{root}/{INFO_FILE}"))
        self.version: str = info["codebase_version"].lstrip("v")
        if self.version.split(".")[0] not in ("2", "3"):
            raise ValueError(f"{root} is in LeRobot's format {self.version}. Convert it to 2.x or 3.x.")
        self.info: dict[str, Any] = info
        self.frequency: float | None = info["fps"]
        self.features: dict[str, Any] = info["features"]
        images = [name for name, feature in self.features.items() if feature["dtype"] in ("video", "image")]
        self.depth_maps = [name for name in images if _is_depth_map(self.features[name])]
        self.cameras = [name for name in images if name not in self.depth_maps]
        self.numbers = [name for name in self.features if name not in images]
        self.dimension_names = {name: named for name in self.numbers if (named := _names(self.features[name]))}
        splits = info.get("splits") or {"train": f"0:{info['total_episodes']}"}
        check_name(split, splits, "split")
        start, end = splits[split].split(":")
        self.episodes = range(int(start), int(end))
        self.images = ImageReader()
        self._data_file: RecentlyUsed[DataFile] = RecentlyUsed(1)

    def close(self) -> None:
        """Close all files."""
        self.images.close()
        self._data_file.clear()

    @functools.cached_property
    def tasks(self) -> dict[int, str]:
        """Instructions by number."""
        if self.version.startswith("3"):
            path = f"{self.root}/meta/tasks.parquet"
            table = pq.read_table(path, filesystem=self.fs).to_pandas()
            texts = table.get("task", table.index)
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path} has no instructions: neither its column 'task' nor its index contains text.")
            return dict(zip(table["task_index"].tolist(), texts, strict=True))
        rows = self.fs.read_text(f"{self.root}/meta/tasks.jsonl").splitlines()
        return {row["task_index"]: row["task"] for row in map(json.loads, filter(None, rows))}

    def check(self, spec: FrameSpec) -> None:
        """Raise `ValueError` if the dataset lacks a camera or a state that is read."""
        for names in spec.camera_features:
            for name in as_tuple(names):
                if name in self.depth_maps and not {*as_tuple(names)} & {*self.cameras}:
                    raise ValueError(f"{name!r} is a depth map. Choose a colour camera, one of {self.cameras}.")
        spec.choose_cameras(self.cameras)
        if spec.state or spec.robot.declares_state:
            spec.robot.state_columns(self.numbers, required=True)
        _ = self.tasks  # read now, since every episode needs them

    @property
    def num_frames(self) -> int:
        """Number of frames of the split, from the metadata."""
        if "total_frames" in self.info and len(self.episodes) == self.info.get("total_episodes"):
            return self.info["total_frames"]
        return sum(shard.length for shard in self.shards())

    @property
    def num_episodes(self) -> int:
        """Number of episodes of the split."""
        return len(self.episodes)

    def shards(self) -> list[EpisodeFiles]:
        """List the episodes of the split."""
        rows = self._episodes_v3() if self.version.startswith("3") else self._episodes_v2()
        return [row for row in rows if row.episode in self.episodes]

    def files(self) -> list[str]:
        """List all files that the frames depend on; without the videos if a server lists no folders."""
        listed = [path for path in self.fs.find(self.root) if path.endswith((".parquet", ".mp4", ".json", ".jsonl"))]
        return listed or [f"{self.root}/{INFO_FILE}", *sorted({shard.path for shard in self.shards()})]

    def read(
        self, shard: EpisodeFiles, spec: FrameSpec, start: RecordPlace | None = None
    ) -> Iterator[RecordedEpisode | BadEpisodeError]:
        """Yield the episode of a shard, or the error if it can't be used. A shard is a single record."""
        try:
            yield retry(self.fs, shard.path, lambda: self._read(shard, spec))
        except OSError as error:
            yield UnreadableFileError(f"{shard.key}: {error}")
        except (ValueError, KeyError, pa.ArrowException) as error:
            yield BadEpisodeError(f"{shard.key}: {error}")

    def _read(self, shard: EpisodeFiles, spec: FrameSpec) -> RecordedEpisode:
        cameras = spec.choose_cameras(self.cameras)
        names = spec.wanted_columns(self.numbers)
        stored = [camera for camera in dict.fromkeys(cameras.values()) if camera not in shard.videos]
        read = [*names, "task_index", "timestamp", *stored]
        with self._data_file.borrow((shard.path, *read), lambda: DataFile(self.fs, shard.path, read)) as file:
            if not self.inline and shard.episode == self.episodes.start:
                for camera in stored:
                    self._warn_of_large_groups(file, camera, shard.path)
            rows = file.find(shard.episode)
            table = file.read(rows)
        if len(table) != shard.length:
            raise ValueError(f"the episode has {counted(len(table), 'row')}, but the metadata says {shard.length}.")
        if not shard.length:
            raise ValueError("the episode has length 0.")
        images = {
            column: self._stored_images(table, camera, shard.path, rows)
            if camera in stored
            else self._video_frames(table, *shard.videos[camera])
            for column, camera in cameras.items()
        }
        instructions = [self.tasks.get(task, "") for task in table["task_index"].to_pylist()]
        columns = {name: matrix(table[name], name) for name in names}
        return RecordedEpisode(shard.key, shard.episode, images, instructions, columns)

    def _video_frames(self, table: pa.Table, video: str, start: float) -> list[ImageReference]:
        """List the frames of a video in which the episode begins at `start` (seconds)."""
        times = [start + time for time in table["timestamp"].to_pylist()]
        self.images.check_video(video, max(times))
        return [{"bytes": None, "path": f"{video}#t={time:.6f}"} for time in times]

    def _stored_images(self, table: pa.Table, camera: str, path: str, rows: np.ndarray) -> list[ImageReference]:
        """List the images in these rows of a parquet file."""
        images = table[camera].to_pylist()
        check_images(image["bytes"] for image in images if image["bytes"] is not None)
        if self.inline:
            return images
        return [{"bytes": None, "path": f"{self.prefix}{path}#row={row}:{camera}"} for row in rows.tolist()]

    def _warn_of_large_groups(self, file: DataFile, camera: str, path: str) -> None:
        if file.largest_group(camera) > LARGE_GROUP:
            logger.warning(
                "%s: the row groups contain more than %d MB of images, and reading any frame reads a whole row group. "
                "Write the file with row_group_size=32, or convert the images to videos.",
                path,
                LARGE_GROUP // 10**6,
            )

    def _episodes_v3(self) -> list[EpisodeFiles]:
        keys = [name for name in self.cameras if self.features[name]["dtype"] == "video"]
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        columns += [
            f"videos/{key}/{field}" for key in keys for field in ("chunk_index", "file_index", "from_timestamp")
        ]
        paths = sorted(self.fs.glob(f"{self.root}/meta/episodes/*/*.parquet")) or list(self._numbered_metadata())
        rows = [row for path in paths for row in pq.read_table(path, columns=columns, filesystem=self.fs).to_pylist()]

        def file(template: str, prefix: str, row: dict[str, Any], **fields: Any) -> str:
            where = {name: row[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}
            return f"{self.root}/{template.format(**where, **fields)}"

        return [
            EpisodeFiles(
                row["episode_index"],
                file(self.info["data_path"], "data", row),
                row["length"],
                {
                    key: (
                        self.prefix + file(self.info["video_path"], f"videos/{key}", row, video_key=key),
                        row[f"videos/{key}/from_timestamp"],
                    )
                    for key in keys
                },
            )
            for row in rows
        ]

    def _numbered_metadata(self) -> Iterator[str]:
        """Find the files of the metadata by their numbers, for a server that lists no folders."""
        for chunk in itertools.count():
            for number in itertools.count():
                path = f"{self.root}/meta/episodes/chunk-{chunk:03d}/file-{number:03d}.parquet"
                if not self.fs.exists(path):
                    break
                yield path
            if not number:
                return

    def _episodes_v2(self) -> list[EpisodeFiles]:
        keys = [name for name in self.cameras if self.features[name]["dtype"] == "video"]
        rows = map(json.loads, filter(None, self.fs.read_text(f"{self.root}/meta/episodes.jsonl").splitlines()))
        shards = []
        for row in rows:
            episode = row["episode_index"]
            where = {"episode_chunk": episode // self.info["chunks_size"], "episode_index": episode}
            videos = {
                key: (f"{self.prefix}{self.root}/{self.info['video_path'].format(**where, video_key=key)}", 0.0)
                for key in keys
            }
            shards.append(
                EpisodeFiles(episode, f"{self.root}/{self.info['data_path'].format(**where)}", row["length"], videos)
            )
        return shards


def _names(feature: dict[str, Any]) -> list[str]:
    """List the names of a feature's dimensions, which may be stored by group, or none unless each has a name."""
    names = feature.get("names") or []
    if isinstance(names, dict):
        # The values are lists of names by group, as in {"motors": [...]}, or the indices of the names.
        groups = names.values()
        if all(isinstance(group, int) for group in groups):
            names = sorted(names, key=names.__getitem__)
        else:
            names = [name for group in groups if isinstance(group, list) for name in group]
    count = int(np.prod(feature.get("shape") or [0]))
    return list(map(str, names)) if len(names) == count else []


def _is_depth_map(feature: dict[str, Any]) -> bool:
    info = feature.get("info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


__all__ = ["INFO_FILE", "LeRobotSource"]
