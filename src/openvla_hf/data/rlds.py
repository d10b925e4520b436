"""RLDS data sets as Open X-Embodiment ships them (TFDS folders of sharded TFRecords), read without TensorFlow."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from .frames import BadEpisodeError, Episode, ImageReference, check_images
from .robots import Robot, find_name
from .tfrecord import Span, parse_example, read_records


DEFAULT_FILES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
STEPS = "steps/"


@dataclass(frozen=True)
class Feature:
    """Where a feature is in a record, and what it is: "image", "text" or the shape of its numbers."""

    key: str
    kind: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A file, the number of its first episode in the split, and how many it has."""

    path: str
    first_episode: int
    length: int


class RLDSSource:
    """One split of a TFDS folder.

    Args:
        fs: File system of the folder.
        root: Folder with `features.json`.
        split: Name of the split.
        inline: Whether images come as bytes; else as references into the files, for tables of local data.

    Raises:
        ValueError: there is no such split, or the files are of another format.
    """

    frequency: float | None = None

    def __init__(self, fs: AbstractFileSystem, root: str, split: str = "train", inline: bool = False):
        self.fs, self.root, self.inline = fs, root, inline
        info = json.loads(fs.read_text(f"{root}/dataset_info.json"))
        self.name: str = info["name"]
        splits = {each["name"]: each for each in info["splits"]}
        self.split = find_name(split, splits, "split")
        self.files_of_split: dict[str, Any] = splits[self.split]
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise ValueError(f"{root} holds {info['fileFormat']} files; only tfrecord is read.")
        self.features = read_features(json.loads(fs.read_text(f"{root}/features.json")))
        self.cameras = self._named("image")

    def check(self, robot: Robot) -> None:
        """Raises `ValueError` where the data set, whatever the episode, lacks what the robot reads."""
        robot.choose_camera(self.cameras)
        find_name(robot.instruction, self._named("text"), "instruction")

    def _named(self, kind: str) -> list[str]:
        return [name for name, feature in self.features.items() if feature.kind == kind]

    def shards(self) -> list[Shard]:
        """The files of the split."""
        lengths = [int(length) for length in self.files_of_split["shardLengths"]]
        template = self.files_of_split.get("filepathTemplate") or DEFAULT_FILES
        shards, first_episode = [], 0
        for index, length in enumerate(lengths):
            parts = {
                "DATASET": self.name,
                "SPLIT": self.split,
                "FILEFORMAT": "tfrecord",
                "SHARD_INDEX": f"{index:05d}",
                "NUM_SHARDS": f"{len(lengths):05d}",
                "SHARD_X_OF_Y": f"{index:05d}-of-{len(lengths):05d}",
            }
            file = re.sub(r"\{(\w+)\}", lambda found, parts=parts: parts[found[1]], template)
            shards.append(Shard(f"{self.root}/{file}", first_episode, length))
            first_episode += length
        return shards

    def files(self) -> list[str]:
        """Every file that the frames depend on."""
        return [f"{self.root}/features.json", *(shard.path for shard in self.shards())]

    def read(self, shard: Shard, robot: Robot) -> Iterator[Episode | BadEpisodeError]:
        """The episodes of a file, and what can't be read of it, in order."""
        camera = robot.choose_camera(self.cameras)
        columns = robot.wanted_columns(self._named("numbers"))
        instruction = find_name(robot.instruction, self._named("text"), "instruction")
        wanted = {name: self.features[name] for name in (camera, *columns, instruction)}
        keys = {feature.key for feature in wanted.values()}
        index, is_damaged = -1, False
        with self.fs.open(shard.path, "rb") as file:
            for index, record in enumerate(read_records(file, shard.path)):
                if isinstance(record, BadEpisodeError):
                    is_damaged = True
                    yield record
                    continue
                source = f"{shard.path}, record {index}"
                offset, payload = record
                try:
                    values = parse_example(payload, keys.__contains__)
                    missing = sorted(keys - {*values})
                    if missing:
                        raise ValueError(f"it lacks {', '.join(map(repr, missing))}.")
                    spans = values[wanted[camera].key]
                    length = len(spans)
                    check_images(memoryview(payload)[start:end] for start, end in spans)
                    episode = Episode(
                        source,
                        shard.first_episode + index,
                        [self._image(shard.path, offset, payload, span) for span in spans],
                        _texts(payload, values[wanted[instruction].key], length),
                        {name: _shaped(name, values[wanted[name].key], wanted[name], length) for name in columns},
                    )
                except ValueError as error:
                    yield BadEpisodeError(f"{source}: {error}")
                else:
                    yield episode
        if index + 1 < shard.length and not is_damaged:
            yield BadEpisodeError(
                f"{shard.path}: there are {index + 1} records and should be {shard.length}; download it again."
            )

    def _image(self, path: str, offset: int, payload: bytes, span: Span) -> ImageReference:
        start, end = span
        where = f"{path}#bytes={offset + start}-{offset + end}"
        return {"bytes": payload[start:end] if self.inline else None, "path": where}


def find_version(fs: AbstractFileSystem, path: str) -> str | None:
    """The folder of a TFDS data set with its files: `path`, or the newest version in it; `None` if it is no such."""
    folders = [path, *sorted(fs.glob(f"{path}/*.*.*"), key=_version, reverse=True)]
    return next((folder for folder in folders if fs.exists(f"{folder}/features.json")), None)


def _version(folder: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.rsplit("/", 1)[-1])]


def read_features(description: dict[str, Any], key: str = "") -> dict[str, Feature]:
    """The features of a `features.json` by dotted name, those of steps without "steps."."""
    if "featuresDict" in description:
        features: dict[str, Feature] = {}
        for name, inner in description["featuresDict"]["features"].items():
            features |= read_features(inner, f"{key}/{name}" if key else name)
        return features
    if "sequence" in description:
        return read_features(description["sequence"]["feature"], key)
    name = key.removeprefix(STEPS).replace("/", ".")
    if "image" in description:
        return {name: Feature(key, "image")}
    if "text" in description:
        return {name: Feature(key, "text")}
    tensor = description.get("tensor", {})
    if tensor.get("dtype") == "string":
        return {name: Feature(key, "text")}
    if tensor and tensor.get("encoding", "none") == "none":
        shape = tuple(int(size) for size in tensor["shape"].get("dimensions", ()))
        return {name: Feature(key, "numbers", shape)}
    return {}


def _shaped(name: str, values: Any, feature: Feature, length: int) -> np.ndarray:
    size = int(np.prod(feature.shape))
    if len(values) != length * size:
        raise ValueError(f"{name!r} has {len(values)} numbers for {length} frames of {size}.")
    return values.reshape(length, size)


def _texts(payload: bytes, spans: Any, length: int) -> list[str]:
    """One text a frame; one text of the whole episode is every frame's."""
    texts = [payload[start:end].decode(errors="replace") for start, end in spans]
    texts = texts * length if len(texts) == 1 else texts
    if texts and len(texts) != length:
        raise ValueError(f"there are {len(texts)} instructions for {length} frames.")
    return texts or [""] * length


__all__ = ["RLDSSource", "find_version"]
