"""LeRobot data sets, versions 3.0 (files of many episodes) and 2.x (files of one): parquet tables and videos."""

import functools
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
from ..adapters import Robot
from ..feature_names import as_tuple
from ..frames import BadEpisodeError, Episode, ImageReference, check_images, matrix
from .parquet_images import close_parquet_files
from .video import check_frame, close_videos


INFO_FILE = "meta/info.json"
LARGE_GROUP = 64 * 10**6
"""Bytes of images in a row group above which reading in random order is slow."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """An episode: its parquet file, and for each camera its video with the time at which the episode begins there."""

    episode: int
    path: str
    length: int
    videos: dict[str, tuple[str, float]]


class DataFile:
    """An open parquet file: its footer and its episode numbers are read once, however many episodes it holds.

    Args:
        fs: File system of the file.
        path: File.
        columns: What is read of each episode.

    Raises:
        ValueError: the file lacks a column.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, columns: list[str]):
        self.path, self.columns = path, columns
        self.file = pq.ParquetFile(path, filesystem=fs)
        missing = sorted({*columns, "episode_index"} - {*self.file.schema_arrow.names})
        if missing:
            raise ValueError(f"the column {', '.join(map(repr, missing))} is missing.")
        metadata = self.file.metadata
        self.sizes = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], int)
        self.ends = np.cumsum(self.sizes)
        episode_of = self.file.read(columns=["episode_index"])["episode_index"].to_numpy()
        self.rows = np.argsort(episode_of, kind="stable")
        self.episodes, self.starts = np.unique(episode_of[self.rows], return_index=True)
        self.groups: dict[int, pa.Table] = {}

    def find(self, episode: int) -> np.ndarray:
        """The numbers of an episode's rows, in the order in which they are stored; none if it is not in the file."""
        at = np.searchsorted(self.episodes, [episode, episode + 1])
        return self.rows[slice(*np.append(self.starts, len(self.rows))[at])]

    def largest_group(self, column: str) -> int:
        """Bytes of a column in the row group that has most."""
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
        """Rows by their rising numbers."""
        if not len(rows):
            return self.file.schema_arrow.empty_table().select(self.columns)
        group_of = np.searchsorted(self.ends, rows, side="right")
        groups, which = np.unique(group_of, return_inverse=True)
        # The next episode begins in the last of these row groups, or after it.
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


class LeRobotSource:
    """A LeRobot folder.

    Args:
        fs: File system of the folder.
        root: Folder with `meta/info.json`.
        split: Name of the split.
        prefix: What makes the file system's paths URLs, such as "hf://".
        inline: Whether images in the parquet files come as bytes; else as references into the files, for tables.

    Raises:
        ValueError: its version is not known, or there is no such split.
    """

    def __init__(
        self, fs: AbstractFileSystem, root: str, split: str = "train", prefix: str = "", inline: bool = False
    ):
        self.fs, self.root, self.prefix, self.split, self.inline = fs, root, prefix, split, inline
        self.name = root.rstrip("/").rsplit("/", 1)[-1]
        info = json.loads(fs.read_text(f"{root}/{INFO_FILE}"))
        self.version: str = info["codebase_version"].lstrip("v")
        if self.version.split(".")[0] not in ("2", "3"):
            raise ValueError(f"{root} is of LeRobot's version {self.version}; 2.x and 3.x are read: convert it.")
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
        self._file: DataFile | None = None
        self._is_warned = False
        # The files may have changed since they were opened.
        close_videos()
        close_parquet_files()

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens files of its own.
        return self.__dict__ | {"_file": None}

    @functools.cached_property
    def tasks(self) -> dict[int, str]:
        """Instructions by number."""
        if self.version.startswith("3"):
            path = f"{self.root}/meta/tasks.parquet"
            table = pq.read_table(path, filesystem=self.fs).to_pandas()
            texts = table.get("task", table.index)
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path} holds no instructions: neither its column 'task' nor its index is text.")
            return dict(zip(table["task_index"].tolist(), texts, strict=True))
        rows = self.fs.read_text(f"{self.root}/meta/tasks.jsonl").splitlines()
        return {row["task_index"]: row["task"] for row in map(json.loads, filter(None, rows))}

    def check(self, robot: Robot) -> None:
        """Raises `ValueError` where the data set, whatever the episode, lacks what the robot reads."""
        for name in as_tuple(robot.camera):
            if name in self.depth_maps and not {*as_tuple(robot.camera)} & {*self.cameras}:
                raise ValueError(f"{name!r} is a depth map: choose a camera with colours, one of {self.cameras}.")
        robot.choose_camera(self.cameras)
        _ = self.tasks  # read now: no episode is usable without

    @property
    def num_frames(self) -> int:
        """Frames of the split, as the metadata says."""
        if "total_frames" in self.info and len(self.episodes) == self.info.get("total_episodes"):
            return self.info["total_frames"]
        return sum(shard.length for shard in self.shards())

    @property
    def num_episodes(self) -> int:
        """Episodes of the split."""
        return len(self.episodes)

    def shards(self) -> list[Shard]:
        """The episodes of the split."""
        rows = self._episodes_v3() if self.version.startswith("3") else self._episodes_v2()
        return [row for row in rows if row.episode in self.episodes]

    def files(self) -> list[str]:
        """Every file that the frames depend on."""
        return [path for path in self.fs.find(self.root) if path.endswith((".parquet", ".mp4", ".json", ".jsonl"))]

    def read(self, shard: Shard, robot: Robot) -> Iterator[Episode | BadEpisodeError]:
        """The episode of a shard, or what is wrong with it."""
        try:
            yield self._read(shard, robot)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            yield BadEpisodeError(f"{shard.path}, episode {shard.episode}: {error}")

    def _read(self, shard: Shard, robot: Robot) -> Episode:
        camera = robot.choose_camera(self.cameras)
        names = robot.wanted_columns(self.numbers)
        is_video = camera in shard.videos
        stored = [*names, "task_index", "timestamp", *([] if is_video else [camera])]
        if self._file is None or self._file.path != shard.path or self._file.columns != stored:
            self._file = DataFile(self.fs, shard.path, stored)
            if not (is_video or self.inline or self._is_warned) and self._file.largest_group(camera) > LARGE_GROUP:
                self._is_warned = True
                logger.warning(
                    "%s: the images are in row groups of more than %d MB, and a frame that is drawn at random takes a "
                    "whole row group to read. Write the file with row_group_size=32, or convert the images to videos.",
                    shard.path,
                    LARGE_GROUP // 10**6,
                )
        rows = self._file.find(shard.episode)
        table = self._file.read(rows)
        if len(table) != shard.length:
            raise ValueError(f"there are {len(table)} rows, the meta data says {shard.length}.")
        if not shard.length:
            raise ValueError("the episode has length 0.")
        images: list[ImageReference]
        if is_video:
            video, start = shard.videos[camera]
            times = [start + time for time in table["timestamp"].to_pylist()]
            check_frame(video, max(times))
            images = [{"bytes": None, "path": f"{video}#t={time:.6f}"} for time in times]
        else:
            images = table[camera].to_pylist()
            check_images(image["bytes"] for image in images if image["bytes"] is not None)
            if not self.inline:
                places = [f"{self.prefix}{shard.path}#row={row}:{camera}" for row in rows.tolist()]
                images = [{"bytes": None, "path": place} for place in places]
        instructions = [self.tasks.get(task, "") for task in table["task_index"].to_pylist()]
        columns = {name: matrix(table[name], name) for name in names}
        return Episode(f"{shard.path}, episode {shard.episode}", shard.episode, images, instructions, columns)

    def _episodes_v3(self) -> list[Shard]:
        keys = [name for name in self.cameras if self.features[name]["dtype"] == "video"]
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        columns += [
            f"videos/{key}/{field}" for key in keys for field in ("chunk_index", "file_index", "from_timestamp")
        ]
        paths = sorted(self.fs.glob(f"{self.root}/meta/episodes/*/*.parquet"))
        rows = [row for path in paths for row in pq.read_table(path, columns=columns, filesystem=self.fs).to_pylist()]

        def file(template: str, prefix: str, row: dict[str, Any], **fields: Any) -> str:
            where = {name: row[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}
            return f"{self.root}/{template.format(**where, **fields)}"

        return [
            Shard(
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

    def _episodes_v2(self) -> list[Shard]:
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
                Shard(episode, f"{self.root}/{self.info['data_path'].format(**where)}", row["length"], videos)
            )
        return shards


def _names(feature: dict[str, Any]) -> list[str]:
    """Of a feature's numbers: a list, or lists by group; none where they do not name each number."""
    names = feature.get("names") or []
    if isinstance(names, dict):
        # By group, as in {"motors": [...]}; or the place of each name.
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
