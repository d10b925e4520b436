"""RLDS datasets as Open X-Embodiment ships them (TFDS folders of sharded TFRecords), read without TensorFlow."""

import json
import logging
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from ..episodes import BadEpisodeError, ImageReference, RecordedEpisode, RecordPlace, UnreadableFileError
from ..feature_names import as_tuple, counted, find_name
from ..frame_spec import FrameSpec
from ..images import ImageReader, check_images
from ..open_x.primitives import decode_text
from ..remote import ForkSafe, describe, may_retry, open_file, read_errors
from .tfrecord import HEADER, Span, open_records, parse_example, read_records


# Bytes of a remote file to request at once.
PIECE = 8 * 2**20
DEFAULT_FILES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
STEPS = "steps/"
# A part of a split, such as train[:95%] or train[10:20].
PART_OF_SPLIT = re.compile(r"(?P<split>\w+)\[(?P<start>\d+%?)?:(?P<end>\d+%?)?\]")
# Smallest number of episodes of which the last 5% contain one.
DIVISIBLE = 11
VERSION_FOLDER = re.compile(r"\d+\.\d+\.\d+")

logger = logging.getLogger(__name__)


class EmptySplitError(ValueError):
    """A part of a split that contains no episodes."""


@dataclass(frozen=True)
class Feature:
    """A feature of the records.

    Attributes:
        key: Its key in a record.
        kind: "image", "text", "numbers", "label" (a number with a name), or "unread".
        shape: Shape of a frame's numbers.
        dtype: Type of numbers that are stored as bytes.
        encoding: "bytes" or "zlib" for numbers that are stored as bytes, plain or compressed; "none" for others.
        names: Names of labels, by number.
        problem: Why the feature is not read.
    """

    key: str
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    encoding: str = "none"
    names: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class RecordFile:
    """A file of episodes.

    Attributes:
        path: Path of the file.
        first_episode: Number of its first episode in the split.
        length: Its number of episodes.
        wanted: Numbers in the file of the episodes that belong to the split.
    """

    path: str
    first_episode: int
    length: int
    wanted: range

    @property
    def key(self) -> str:
        """What identifies the shard, in all splits that contain the same of its episodes."""
        is_whole = self.wanted == range(self.length)
        return self.path if is_whole else f"{self.path}[{self.wanted.start}:{self.wanted.stop}]"


class RLDSSource(ForkSafe):
    """A reader of one split of a TFDS folder.

    Args:
        fs: File system of the folder.
        root: Folder with `features.json`.
        split: Name of the split, or a part of its episodes in the notation of TFDS: "train[:95%]".
        prefix: Prefix that turns paths of the file system into URLs, such as "gs://".
        inline: Whether images are read as bytes, for streams. By default they become references into the files, for
            tables.

    Attributes:
        images: Reads the images of the episodes.
        splits: Names of all splits.

    Raises:
        ValueError: The split is missing or has no episodes, or the files are not TFRecords.
    """

    frequency: float | None = None

    def __init__(
        self, fs: AbstractFileSystem, root: str, split: str = "train", prefix: str = "", inline: bool = False
    ):
        super().__init__(fs)
        self.root, self.prefix, self.inline = root, prefix, inline
        self.images = ImageReader()
        self.dimension_names: dict[str, list[str]] = {}  # TFDS does not store them
        info = json.loads(fs.read_text(f"{root}/dataset_info.json"))
        self.name: str = info["name"]
        splits = {each["name"]: each for each in info["splits"]}
        self.split, self.splits = split, list(splits)
        part = PART_OF_SPLIT.fullmatch(split)
        self.split_of_files = find_name(part["split"] if part else split, splits, "split")
        self.files_of_split: dict[str, Any] = splits[self.split_of_files]
        total = sum(self._lengths)
        start, end = (part["start"], part["end"]) if part else (None, None)
        self.episodes = range(_boundary(start, total, 0), _boundary(end, total, total))
        if part and not self.episodes:
            raise EmptySplitError(
                f"The split {split!r} of {root} contains no episodes, since {total} is too few to divide."
            )
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise ValueError(
                f"{root} contains {info['fileFormat']} files, but only tfrecord is supported. Convert them with "
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
        # An instruction may also be stored as the code points of its characters.
        integers = [name for name in self._named("numbers") if self.features[name].dtype.startswith("int")]
        self.code_points = [name for name in integers if len(self.features[name].shape) == 1]

    def close(self) -> None:
        """Close all files."""
        self.images.close()

    def check(self, spec: FrameSpec) -> None:
        """Raise `ValueError` if the dataset lacks a feature that is read."""
        try:
            self._check(spec)
        except ValueError as error:
            raise ValueError(f"{spec.describe_place(self.prefix + self.root)}: {error}") from error

    def _check(self, spec: FrameSpec) -> None:
        robot = spec.robot
        requires_state = spec.state or robot.needs_state or robot.declares_state
        unread = {name: self.features[name].problem for name in self._named("unread")}
        wanted = [(names, self.cameras) for names in spec.camera_features]
        wanted += [(robot.action, self.numbers), (robot.instruction, [*self.texts, *self.code_points])]
        if requires_state:
            wanted.append((robot.state, self.numbers))
        for names, readable in wanted:
            for name in as_tuple(names):
                if name in unread and not {*as_tuple(names)} & {*readable}:
                    raise ValueError(f"{name!r} can't be read: {unread[name]}.")
        if unread:
            listed = "; ".join(f"{name!r} ({problem})" for name, problem in unread.items())
            logger.warning("Ignored features of %s: %s", self.name, listed)
        spec.choose_cameras(self.cameras)
        robot.action_columns(self.numbers)
        if requires_state:
            robot.state_columns(self.numbers, required=True)
        self._find_instruction(spec)

    def _find_instruction(self, spec: FrameSpec) -> str:
        names = spec.robot.instruction
        has_text = {*as_tuple(names)} & {*self.texts} or not {*as_tuple(names)} & {*self.code_points}
        return find_name(names, self.texts if has_text else self.code_points, "instruction")

    def _named(self, kind: str) -> list[str]:
        return [name for name, feature in self.features.items() if feature.kind == kind]

    @property
    def counts(self) -> dict[str, Any]:
        """`num_transitions` and `num_trajectories` of all splits from `dataset_statistics*.json` next to the files."""
        for path in self.fs.glob(f"{self.root}/dataset_statistics*.json"):
            statistics = json.loads(self.fs.read_text(path))
            statistics = statistics.get(self.name, statistics)
            if statistics.get("num_transitions"):
                return {name: statistics.get(name) for name in ("num_transitions", "num_trajectories")}
        return {}

    @property
    def num_frames(self) -> int | None:
        """Number of frames of the split from `counts`, or `None` if they are unknown."""
        return self.count_frames(self.counts)

    def count_frames(self, counts: Mapping[str, Any]) -> int | None:
        """Estimate the number of frames of the split from the `counts` of all splits. Without them, return `None`."""
        frames = counts.get("num_transitions")
        # An episode of the split has the average length.
        return frames and round(frames * self.num_episodes / (counts.get("num_trajectories") or self.num_episodes))

    @property
    def num_episodes(self) -> int:
        """Number of episodes of the split."""
        return len(self.episodes)

    @property
    def _lengths(self) -> list[int]:
        return [int(length) for length in self.files_of_split["shardLengths"]]

    def shards(self) -> list[RecordFile]:
        """List the files of the split."""
        lengths = self._lengths
        template = self.files_of_split.get("filepathTemplate") or DEFAULT_FILES
        shards, first_episode = [], 0
        for index, length in enumerate(lengths):
            parts = {
                "DATASET": self.name,
                "SPLIT": self.split_of_files,
                "FILEFORMAT": "tfrecord",
                "SHARD_INDEX": f"{index:05d}",
                "NUM_SHARDS": f"{len(lengths):05d}",
                "SHARD_X_OF_Y": f"{index:05d}-of-{len(lengths):05d}",
            }
            file = re.sub(r"\{(\w+)\}", lambda found, parts=parts: parts[found[1]], template)
            wanted = range(
                min(max(0, self.episodes.start - first_episode), length),
                min(max(0, self.episodes.stop - first_episode), length),
            )
            shards.append(RecordFile(f"{self.root}/{file}", first_episode, length, wanted))
            first_episode += length
        return [shard for shard in shards if shard.wanted]

    def files(self) -> list[str]:
        """List all files that the frames depend on."""
        return [f"{self.root}/features.json", *(shard.path for shard in self.shards())]

    def read(
        self, shard: RecordFile, spec: FrameSpec, start: RecordPlace | None = None
    ) -> Iterator[RecordedEpisode | BadEpisodeError]:
        """Yield the episodes of a file in order, with an error in place of each that can't be used.

        If the file can't be read, further attempts continue at the record that failed.

        Args:
            shard: File.
            spec: Says what is read.
            start: Place of the first record to read.
        """
        place, failures, failed_at = replace(start or RecordPlace()), 0, -1
        while True:
            try:
                yield from self._read(shard, spec, place)
                return
            except read_errors() as error:
                failures = failures + 1 if place.number == failed_at else 0
                failed_at = place.number
                if not may_retry(self.fs, shard.path, error, failures):
                    lost = shard.wanted.stop - max(place.number, shard.wanted.start)
                    yield UnreadableFileError(f"{shard.path}: the file can't be read ({describe(error)}).", lost)
                    return

    def _read(
        self, shard: RecordFile, spec: FrameSpec, place: RecordPlace
    ) -> Iterator[RecordedEpisode | BadEpisodeError]:
        is_damaged = False
        with open_file(self.fs, shard.path, PIECE) as stored:
            file, is_compressed = open_records(stored)
            inline = self.inline or is_compressed  # a compressed file can't be read from a position
            for record in read_records(file, shard.path, place):
                index = place.number - 1
                if index < shard.wanted.start:
                    continue
                if index == shard.wanted.stop < shard.length:
                    return
                if isinstance(record, BadEpisodeError):
                    is_damaged = True
                    yield record
                    continue
                source = f"{shard.path}, record {index}"
                offset, payload = record

                def refer(span: Span, offset: int = offset, payload: bytes = payload) -> ImageReference:
                    return _image(self.prefix + shard.path, offset, payload, span, inline)

                try:
                    episode = self._parse(source, shard.first_episode + index, payload, spec, refer)
                    episode.place = RecordPlace(index, offset - HEADER.size)
                except ValueError as error:
                    yield BadEpisodeError(f"{source}: {error}")
                else:
                    yield episode
        if place.number < shard.length:
            lost = shard.length - place.number
            reason = f"the file has {counted(place.number, 'record')} instead of {shard.length}. Download it again."
            reason = f"{counted(lost, 'more record')} can't be found." if is_damaged else reason
            yield BadEpisodeError(f"{shard.path}: {reason}", lost)

    def _parse(
        self, source: str, number: int, payload: bytes, spec: FrameSpec, refer: Callable[[Span], ImageReference]
    ) -> RecordedEpisode:
        """Read what is wanted from the record of an episode. `refer` makes the reference to an image."""
        cameras = spec.robot.cameras_of_episode(spec.choose_cameras(self.cameras), number)
        columns = spec.wanted_columns(self.numbers)
        instruction = self._find_instruction(spec)
        wanted = {name: self.features[name] for name in (*cameras.values(), *columns, instruction)}
        keys = {feature.key for feature in wanted.values()}
        values = parse_example(payload, keys.__contains__)
        missing = sorted(keys - {*values})
        if missing:
            raise ValueError(f"the record has no {' or '.join(map(repr, missing))}.")
        spans = {column: values[wanted[camera].key] for column, camera in cameras.items()}
        length = _check_spans(payload, spans)
        return RecordedEpisode(
            source,
            number,
            {column: list(map(refer, of_one)) for column, of_one in spans.items()},
            _texts(payload, values[wanted[instruction].key], wanted[instruction], length),
            {name: _numbers(name, payload, values[wanted[name].key], wanted[name], length) for name in columns},
        )


def _boundary(text: str | None, total: int, default: int) -> int:
    """Return the number of the episode at a boundary of a part. Halves are rounded to even, as in TFDS."""
    if text is None:
        return default
    exact = Fraction(int(text[:-1]) * total, 100) if text.endswith("%") else Fraction(int(text))
    return min(round(exact), total)


def split_for_training(splits: Collection[str]) -> tuple[str, str]:
    """Return the splits that the original trains and evaluates on."""
    return ("train", "val") if "val" in splits else ("train[:95%]", "train[95%:]")


def find_version(fs: AbstractFileSystem, path: str) -> str | None:
    """Find the folder with the files of a TFDS dataset, or return `None` if `path` is not such a dataset.

    Args:
        fs: File system of the folder.
        path: Folder `name/config/version`, or one above it, where the newest version is taken.

    Raises:
        ValueError: The dataset has several configurations.
    """
    if fs.exists(f"{path}/features.json"):
        return path
    found = [file.rsplit("/", 1)[0] for depth in ("*", "*/*") for file in fs.glob(f"{path}/{depth}/features.json")]
    versions = [folder for folder in found if VERSION_FOLDER.fullmatch(folder.rsplit("/", 1)[-1])]
    configurations = sorted({folder.rsplit("/", 1)[0] for folder in versions})
    if len(configurations) > 1:
        raise ValueError(f"{path} has several configurations. Give one of {', '.join(map(repr, configurations))}.")
    return max(versions, key=_version, default=None)


def _version(folder: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.rsplit("/", 1)[-1])]


def read_features(description: dict[str, Any], key: str = "") -> dict[str, Feature]:
    """Read the features of a `features.json` by dotted name, without the prefix "steps."."""
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
            return Feature(key, "unread", problem=f"it has {dtype} values, like a depth map, not 8-bit colours")
        return Feature(key, "image")
    if "classLabel" in description:
        return Feature(key, "label")
    tensor = description.get("tensor", {})
    if "text" in description or tensor.get("dtype") == "string":
        return Feature(key, "text")
    if not tensor:
        kind = description.get("pythonClassName", "unknown").rsplit(".", 1)[-1]
        return Feature(key, "unread", problem=f"features of type {kind} are not supported")
    shape = tuple(int(size) for size in tensor["shape"].get("dimensions", ()))
    if min(shape, default=1) < 0:
        return Feature(key, "unread", problem="its size differs from frame to frame")
    encoding = tensor.get("encoding") or "none"
    if encoding not in ("none", "bytes", "zlib"):
        return Feature(key, "unread", problem=f"its encoding {encoding!r} is not supported")
    return Feature(key, "numbers", shape, tensor["dtype"], encoding)


def _check_spans(payload: bytes, spans: Mapping[str, Any]) -> int:
    """Check the images of each camera, given by the places of their bytes, and return their number.

    Raises:
        ValueError: An image can't be decoded, or the cameras have different numbers of images.
    """
    lengths = {column: len(of_one) for column, of_one in spans.items()}
    if len({*lengths.values()}) > 1:
        raise ValueError(f"the cameras have different numbers of images: {lengths}.")
    for of_one in spans.values():
        check_images(memoryview(payload)[start:end] for start, end in of_one)
    return max(lengths.values())


def _image(path: str, offset: int, payload: bytes, span: Span, inline: bool) -> ImageReference:
    start, end = span
    where = f"{path}#bytes={offset + start}-{offset + end}"
    return {"bytes": payload[start:end] if inline else None, "path": where}


def _numbers(name: str, payload: bytes, values: Any, feature: Feature, length: int) -> np.ndarray:
    """Read the numbers of an episode, (T, D)."""
    if feature.encoding != "none":
        values = _decode(name, [payload[start:end] for start, end in values], feature)
    size = int(np.prod(feature.shape))
    if len(values) != length * size:
        raise ValueError(
            f"{name!r} has {counted(len(values), 'number')} instead of {length * size}: {size} for each of "
            f"{counted(length, 'frame')}."
        )
    return values.reshape(length, size)


def _decode(name: str, encoded: list[bytes], feature: Feature) -> np.ndarray:
    """Decode all numbers of tensors that are stored as bytes."""
    try:
        tensors = [zlib.decompress(each) for each in encoded] if feature.encoding == "zlib" else encoded
        return np.frombuffer(b"".join(tensors), np.dtype(feature.dtype).newbyteorder("<"))
    except (zlib.error, ValueError, TypeError) as error:
        raise ValueError(
            f"{name!r} can't be decoded as {feature.dtype} numbers in {feature.encoding} ({error})."
        ) from error


def _texts(payload: bytes, values: Any, feature: Feature, length: int) -> list[str]:
    """Read the text of each frame. A single text is repeated for all frames of the episode."""
    if feature.kind == "numbers":
        return decode_text(_numbers(feature.key, payload, values, feature, length)).tolist()
    if feature.kind == "label":  # -1 stands for a missing label
        texts = [feature.names[label] if 0 <= label < len(feature.names) else "" for label in values.tolist()]
    else:
        texts = [payload[start:end].decode(errors="replace") for start, end in values]
    texts = texts * length if len(texts) == 1 else texts
    if texts and len(texts) != length:
        raise ValueError(f"there are {len(texts)} instructions for {counted(length, 'frame')}.")
    return texts or [""] * length


__all__ = ["DIVISIBLE", "EmptySplitError", "RLDSSource", "find_version", "split_for_training"]
