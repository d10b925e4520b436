"""RLDS data sets as Open X-Embodiment ships them (TFDS folders of sharded TFRecords), read without TensorFlow."""

import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from ..adapters import Robot
from ..feature_names import as_tuple, find_name
from ..frames import BadEpisodeError, Episode, ImageReference, check_images
from .tfrecord import Span, open_records, parse_example, read_records


DEFAULT_FILES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
STEPS = "steps/"
VERSION_FOLDER = re.compile(r"\d+\.\d+\.\d+")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feature:
    """Where a feature is in a record, and what it is.

    kind: "image", "text", "numbers", "label" (a number that has a name), or "unread".
    shape: Of a frame's numbers.
    dtype: Of numbers that are stored as bytes.
    encoding: How such bytes are compressed: "none" for numbers that are not stored as bytes, "bytes" or "zlib".
    names: Of labels, by number.
    problem: Why it is not read.
    """

    key: str
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    encoding: str = "none"
    names: tuple[str, ...] = ()
    problem: str = ""


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
    dimension_names: dict[str, list[str]] = {}  # noqa: RUF012 - TFDS has no place for them

    def __init__(self, fs: AbstractFileSystem, root: str, split: str = "train", inline: bool = False):
        self.fs, self.root, self.inline = fs, root, inline
        info = json.loads(fs.read_text(f"{root}/dataset_info.json"))
        self.name: str = info["name"]
        splits = {each["name"]: each for each in info["splits"]}
        self.split = find_name(split, splits, "split")
        self.files_of_split: dict[str, Any] = splits[self.split]
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise ValueError(
                f"{root} holds {info['fileFormat']} files, but only tfrecord is read. Convert it with "
                f"tensorflow-datasets: tfds convert_format --dataset_dir={root} --out_file_format=tfrecord "
                "--out_dir=NEW_FOLDER"
            )
        self.features = read_features(json.loads(fs.read_text(f"{root}/features.json")))
        for name, feature in self.features.items():
            path = f"{root}/{feature.key.replace('/', '-')}.labels.txt"
            if feature.kind == "label" and fs.exists(path):
                self.features[name] = replace(feature, names=tuple(filter(None, fs.read_text(path).splitlines())))
        self.cameras = self._named("image")
        self.texts = [*self._named("text"), *(name for name in self._named("label") if self.features[name].names)]
        self.numbers = [*self._named("numbers"), *self._named("label")]

    def check(self, robot: Robot) -> None:
        """Raises `ValueError` where the data set, whatever the episode, lacks what the robot reads."""
        unread = {name: self.features[name].problem for name in self._named("unread")}
        wanted = [(robot.camera, self.cameras), (robot.action, self.numbers), (robot.instruction, self.texts)]
        if robot.needs_state:
            wanted.append((robot.state, self.numbers))
        for names, readable in wanted:
            for name in as_tuple(names):
                if name in unread and not {*as_tuple(names)} & {*readable}:
                    raise ValueError(f"{name!r} can't be read: {unread[name]}.")
        if unread:
            listed = "; ".join(f"{name!r} ({problem})" for name, problem in unread.items())
            logger.warning("Features of %s that are not read: %s", self.name, listed)
        robot.choose_camera(self.cameras)
        find_name(robot.instruction, self.texts, "instruction")

    def _named(self, kind: str) -> list[str]:
        return [name for name, feature in self.features.items() if feature.kind == kind]

    @property
    def num_frames(self) -> int | None:
        """Frames of the split by the `dataset_statistics*.json` beside its files; None where there is no such file."""
        for path in self.fs.glob(f"{self.root}/dataset_statistics*.json"):
            statistics = json.loads(self.fs.read_text(path))
            statistics = statistics.get(self.name, statistics)
            if frames := statistics.get("num_transitions"):
                # The original's file is of all splits together, so the average length counts.
                return round(frames * self.num_episodes / (statistics.get("num_trajectories") or self.num_episodes))
        return None

    @property
    def num_episodes(self) -> int:
        """Episodes of the split."""
        return sum(int(length) for length in self.files_of_split["shardLengths"])

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
        read = 0
        try:
            for episode in self._read(shard, robot):
                read += 1
                yield episode
        except OSError as error:
            yield BadEpisodeError(f"{shard.path}: the file can't be read ({error}).", shard.length - read)

    def _read(self, shard: Shard, robot: Robot) -> Iterator[Episode | BadEpisodeError]:
        camera = robot.choose_camera(self.cameras)
        columns = robot.wanted_columns(self.numbers)
        instruction = find_name(robot.instruction, self.texts, "instruction")
        wanted = {name: self.features[name] for name in (camera, *columns, instruction)}
        keys = {feature.key for feature in wanted.values()}
        index, is_damaged = -1, False
        with self.fs.open(shard.path, "rb") as stored:
            file, is_compressed = open_records(stored)
            inline = self.inline or is_compressed  # a place in a compressed file is no use
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
                        [_image(shard.path, offset, payload, span, inline) for span in spans],
                        _texts(payload, values[wanted[instruction].key], wanted[instruction], length),
                        {
                            name: _numbers(name, payload, values[wanted[name].key], wanted[name], length)
                            for name in columns
                        },
                    )
                except ValueError as error:
                    yield BadEpisodeError(f"{source}: {error}")
                else:
                    yield episode
        if index + 1 < shard.length:
            lost = shard.length - index - 1
            reason = f"there are {index + 1} records and should be {shard.length}; download it again."
            reason = f"{lost} more records can't be found." if is_damaged else reason
            yield BadEpisodeError(f"{shard.path}: {reason}", lost)


def find_version(fs: AbstractFileSystem, path: str) -> str | None:
    """The folder of a TFDS data set with its files, or `None` if `path` is no such data set.

    Args:
        fs: File system of the folder.
        path: Folder `name/config/version`, or one above it; the newest version is taken.

    Raises:
        ValueError: there are several configurations.
    """
    if fs.exists(f"{path}/features.json"):
        return path
    found = [file.rsplit("/", 1)[0] for depth in ("*", "*/*") for file in fs.glob(f"{path}/{depth}/features.json")]
    versions = [folder for folder in found if VERSION_FOLDER.fullmatch(folder.rsplit("/", 1)[-1])]
    configurations = sorted({folder.rsplit("/", 1)[0] for folder in versions})
    if len(configurations) > 1:
        raise ValueError(f"There are several configurations, give one of {', '.join(map(repr, configurations))}.")
    return max(versions, key=_version, default=None)


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
    return {name: _read_feature(description, key)}


def _read_feature(description: dict[str, Any], key: str) -> Feature:
    if "image" in description:
        dtype = description["image"].get("dtype") or "uint8"
        if dtype != "uint8":
            return Feature(
                key, "unread", problem=f"it is an image of {dtype}, such as depth, and not of 8-bit colours"
            )
        return Feature(key, "image")
    if "classLabel" in description:
        return Feature(key, "label")
    tensor = description.get("tensor", {})
    if "text" in description or tensor.get("dtype") == "string":
        return Feature(key, "text")
    if not tensor:
        kind = description.get("pythonClassName", "unknown").rsplit(".", 1)[-1]
        return Feature(key, "unread", problem=f"features of the kind {kind} are not supported")
    shape = tuple(int(size) for size in tensor["shape"].get("dimensions", ()))
    if min(shape, default=1) < 0:
        return Feature(key, "unread", problem="its size differs from frame to frame")
    encoding = tensor.get("encoding") or "none"
    if encoding not in ("none", "bytes", "zlib"):
        return Feature(key, "unread", problem=f"its encoding {encoding!r} is not supported")
    return Feature(key, "numbers", shape, tensor["dtype"], encoding)


def _image(path: str, offset: int, payload: bytes, span: Span, inline: bool) -> ImageReference:
    start, end = span
    where = f"{path}#bytes={offset + start}-{offset + end}"
    return {"bytes": payload[start:end] if inline else None, "path": where}


def _numbers(name: str, payload: bytes, values: Any, feature: Feature, length: int) -> np.ndarray:
    """(T, D) numbers of an episode."""
    if feature.encoding != "none":
        values = _decode(name, [payload[start:end] for start, end in values], feature)
    size = int(np.prod(feature.shape))
    if len(values) != length * size:
        raise ValueError(f"{name!r} has {len(values)} numbers for {length} frames of {size}.")
    return values.reshape(length, size)


def _decode(name: str, encoded: list[bytes], feature: Feature) -> np.ndarray:
    """All numbers of tensors that are stored as bytes."""
    try:
        tensors = [zlib.decompress(each) for each in encoded] if feature.encoding == "zlib" else encoded
        return np.frombuffer(b"".join(tensors), np.dtype(feature.dtype).newbyteorder("<"))
    except (zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{name!r} does not hold {feature.dtype} numbers as {feature.encoding} ({error}).") from error


def _texts(payload: bytes, values: Any, feature: Feature, length: int) -> list[str]:
    """One text a frame; one text of the whole episode is every frame's."""
    if feature.kind == "label":  # -1 means that there is none
        texts = [feature.names[label] if 0 <= label < len(feature.names) else "" for label in values.tolist()]
    else:
        texts = [payload[start:end].decode(errors="replace") for start, end in values]
    texts = texts * length if len(texts) == 1 else texts
    if texts and len(texts) != length:
        raise ValueError(f"there are {len(texts)} instructions for {length} frames.")
    return texts or [""] * length


__all__ = ["RLDSSource", "find_version"]
