"""Write episodes as LeRobot 3.0 or RLDS, one at a time, so that their images are never all in memory."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..new_folder import new_folder
from .episodes import Episodes
from .feature_names import listed
from .optional_packages import import_extra
from .readers.lerobot import INFO_FILE
from .readers.tfrecord import build_example, write_record
from .statistics import summarize


# Shape of a frame's part, by its name.
Shapes = dict[str, tuple[int, ...]]
# Name of the camera of frames with one `image`.
LEROBOT_CAMERA, RLDS_CAMERA = "front", "image"
# As in LeRobot: every frame is at most one frame away from a key frame.
KEY_FRAME_DISTANCE = 2
# Codec -> encoder and its quality setting (CRF).
CODECS = {"h264": ("libx264", "23"), "av1": ("libsvtav1", "30")}
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def write_lerobot(
    episodes: Episodes,
    path: str | os.PathLike,
    *,
    frequency: float = 5.0,
    codec: str = "h264",
    action_names: Sequence[str] | None = None,
    state_names: Sequence[str] | None = None,
) -> Path:
    """Write episodes as a LeRobot 3.0 folder with one data file and one video of each camera.

    Args:
        episodes: Episodes, each an iterable of frames with `image` (H, W, 3) uint8, `instruction`, `action` and
            optionally `state`. Frames of several cameras have `images`, a dict from a camera's name to its image, in
            place of `image`. All frames have the same cameras.
        path: New folder.
        frequency: Frames per second.
        codec: "h264" or "av1".
        action_names: Names of the action's dimensions, such as "dx" or "left_elbow".
        state_names: Names of the state's dimensions.

    Raises:
        FileExistsError: The folder is not empty.
        ValueError: There are no frames, the cameras of a frame differ from those of the first, or the number of names
            differs from the number of dimensions.
    """
    with new_folder(Path(path)) as root:
        _write_lerobot(episodes, root, frequency, codec, {"action": action_names, "state": state_names})
    return Path(path)


def _write_lerobot(
    episodes: Episodes, root: Path, frequency: float, codec: str, names: Mapping[str, Sequence[str] | None]
) -> None:
    place = {"chunk_index": 0, "file_index": 0}
    data, records_file = root / DATA_PATH.format(**place), root / "meta/episodes/chunk-000/file-000.parquet"
    for file in (data, records_file):
        file.parent.mkdir(parents=True)
    tasks: dict[str, int] = {}
    records: list[dict[str, Any]] = []
    numbers: dict[str, list[np.ndarray]] = {}
    writer, total = None, 0
    with _VideoWriters(root, frequency, codec) as videos:
        for index, episode in enumerate(episodes):
            rows: list[dict[str, Any]] = []
            for frame in episode:
                videos.add(_images_of(frame, LEROBOT_CAMERA))
                task = tasks.setdefault(frame["instruction"], len(tasks))
                if not total and not rows:
                    _check_names(frame, names)
                rows.append(_lerobot_row(frame, index, len(rows), total + len(rows), task, frequency))
            if not rows:
                raise ValueError(f"Episode {index} has no frames to write.")
            table = pa.Table.from_pylist(rows)
            writer = writer or pq.ParquetWriter(data, table.schema)
            writer.write_table(table.cast(writer.schema))
            for name in ("action", "observation.state"):
                if name in table.column_names:
                    numbers.setdefault(name, []).append(np.array(table[name].to_pylist()))
            used = list(dict.fromkeys(row["task_index"] for row in rows))
            named = [list(tasks)[task] for task in used]
            records.append(_lerobot_record(index, named, total, len(rows), frequency, list(videos.sizes)))
            total += len(rows)
        if writer is None:
            raise ValueError("There are no frames to write.")
    writer.close()
    pq.write_table(pa.Table.from_pylist(records), records_file)
    # LeRobot reads the instructions from the table's index.
    pd.DataFrame({"task_index": list(tasks.values())}, index=list(tasks)).to_parquet(root / "meta/tasks.parquet")
    stats = {name: summarize(np.concatenate(rows)) | {"count": [total]} for name, rows in numbers.items()}
    (root / "meta/stats.json").write_text(json.dumps(stats | videos.statistics, indent=2))
    widths = {name: rows[0].shape[1] for name, rows in numbers.items()}
    counts = {"total_episodes": len(records), "total_frames": total, "total_tasks": len(tasks)}
    info = _lerobot_info(counts, frequency, _lerobot_features(videos.sizes, widths, names))
    (root / INFO_FILE).write_text(json.dumps(info, indent=2))


def _images_of(frame: Mapping[str, Any], camera: str) -> Mapping[str, Any]:
    """Return a frame's images by camera; `camera` is the name of the only one."""
    return frame["images"] if "images" in frame else {camera: frame["image"]}


def _check_cameras(images: Mapping[str, Any], cameras: Collection[str]) -> None:
    if not images:
        raise ValueError("A frame has no images: give at least one camera.")
    if cameras and set(images) != set(cameras):
        raise ValueError(
            f"A frame has the cameras {listed(images)}, but the first frame has {listed(cameras)}. Give every frame "
            "the same cameras."
        )


class _VideoWriters:
    """Encode the images of each camera as a video below `root`."""

    def __init__(self, root: Path, frequency: float, codec: str):
        self.root, self.frequency, self.codec = root, frequency, codec
        self.writers: dict[str, _VideoWriter] = {}
        self.opened = ExitStack()

    def __enter__(self) -> "_VideoWriters":
        return self

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)

    @property
    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """Shape of the images of each video."""
        return {_video_key(camera): writer.size for camera, writer in self.writers.items()}

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Statistics of the images of each video."""
        return {_video_key(camera): writer.colours.summarize() for camera, writer in self.writers.items()}

    def add(self, images: Mapping[str, Any]) -> None:
        """Append a frame of each camera."""
        _check_cameras(images, self.writers)
        for camera, image in images.items():
            if camera not in self.writers:
                path = self.root / VIDEO_PATH.format(video_key=_video_key(camera), chunk_index=0, file_index=0)
                path.parent.mkdir(parents=True)
                writer = _VideoWriter(path, self.frequency, self.codec)
                self.writers[camera] = self.opened.enter_context(writer)
            self.writers[camera].add(image)


def _video_key(camera: str) -> str:
    return f"observation.images.{camera}"


class _VideoWriter:
    """Encode images (H, W, 3) uint8 as a video of the first image's size."""

    def __init__(self, path: Path, frequency: float, codec: str):
        self.av = import_extra("av", "data")
        self.rate = Fraction(frequency).limit_denominator(1000)
        self.encoder, self.quality = CODECS[codec]
        self.container = self.av.open(str(path), "w")
        self.stream: Any = None
        self.colours = _Colours()

    def __enter__(self) -> "_VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self.stream is not None:
            self.container.mux(self.stream.encode(None))
        self.container.close()

    @property
    def size(self) -> tuple[int, int, int]:
        """Shape of the images."""
        return self.stream.height, self.stream.width, 3

    def add(self, image: Any) -> None:
        """Append a frame."""
        pixels = np.asarray(image)
        if self.stream is None:
            self.stream = self.container.add_stream(self.encoder, rate=self.rate, options={"crf": self.quality})
            self.stream.height, self.stream.width = pixels.shape[:2]
            self.stream.pix_fmt, self.stream.codec_context.gop_size = "yuv420p", KEY_FRAME_DISTANCE
        self.container.mux(self.stream.encode(self.av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        self.colours.add(pixels)


class _Colours:
    """Statistics of the channels of images, from 0 to 1, which LeRobot's training expects in a dataset."""

    def __init__(self) -> None:
        self.images = 0
        self.counts = np.zeros((3, 256), np.int64)  # of each level in each channel

    def add(self, image: np.ndarray) -> None:
        """Count an image (H, W, 3) uint8."""
        self.images += 1
        for counts, channel in zip(self.counts, image.reshape(-1, 3).T, strict=True):
            counts += np.bincount(channel, minlength=256)

    def summarize(self) -> dict[str, Any]:
        """Return the statistics, each of shape (3, 1, 1), and the number of images."""
        levels, shares = np.arange(256) / 255, self.counts / self.counts.sum(1, keepdims=True)
        mean = shares @ levels
        std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
        found = [levels[counts > 0] for counts in self.counts]
        rows = {"min": [one[0] for one in found], "max": [one[-1] for one in found], "mean": mean, "std": std}
        return {name: np.reshape(row, (3, 1, 1)).tolist() for name, row in rows.items()} | {"count": [self.images]}


def _check_names(frame: Mapping[str, Any], names: Mapping[str, Sequence[str] | None]) -> None:
    for key, given in names.items():
        size = np.size(frame[key]) if frame.get(key) is not None else 0
        if given is not None and len(given) != size:
            raise ValueError(f"The {key} has {size} dimensions but {len(given)} names. Give one name for each.")


def _lerobot_row(
    frame: Mapping[str, Any], episode: int, frame_index: int, index: int, task: int, frequency: float
) -> dict[str, Any]:
    state = frame.get("state")
    return {
        **({} if state is None else {"observation.state": np.asarray(state, np.float32)}),
        "action": np.asarray(frame["action"], np.float32),
        "timestamp": np.float32(frame_index / frequency),
        "frame_index": frame_index,
        "episode_index": episode,
        "index": index,
        "task_index": task,
    }


def _lerobot_record(
    episode: int, tasks: list[str], start: int, length: int, frequency: float, videos: Sequence[str]
) -> dict[str, Any]:
    place = {
        "chunk_index": 0,
        "file_index": 0,
        "from_timestamp": start / frequency,
        "to_timestamp": (start + length) / frequency,
    }
    return {
        "episode_index": episode,
        "tasks": tasks,
        "length": length,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": start,
        "dataset_to_index": start + length,
        **{f"videos/{video}/{name}": value for video in videos for name, value in place.items()},
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def _lerobot_info(counts: dict[str, int], frequency: float, features: dict[str, Any]) -> dict[str, Any]:
    return {
        "codebase_version": "v3.0",
        "robot_type": None,
        **counts,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": frequency,
        "splits": {"train": f"0:{counts['total_episodes']}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def _lerobot_features(
    sizes: Mapping[str, tuple[int, ...]], widths: Mapping[str, int], names: Mapping[str, Sequence[str] | None]
) -> dict[str, Any]:
    """Describe the features: videos of these sizes, columns of these widths and names, and indices."""
    named = {column: list(names[column.removeprefix("observation.")] or ()) or None for column in widths}
    return {
        **{key: _lerobot_feature("video", size, ["height", "width", "channel"]) for key, size in sizes.items()},
        **{column: _lerobot_feature("float32", (width,), named[column]) for column, width in widths.items()},
        "timestamp": _lerobot_feature("float32", (1,)),
        **{name: _lerobot_feature("int64", (1,)) for name in ("frame_index", "episode_index", "index", "task_index")},
    }


def _lerobot_feature(dtype: str, shape: tuple[int, ...], names: list[str] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "names": names}


def write_rlds(
    episodes: Episodes,
    path: str | os.PathLike,
    *,
    episodes_per_file: int = 64,
    quality: int = 95,
    version: str = "1.0.0",
) -> Path:
    """Write episodes as an RLDS folder (`path/version`) with JPEG images. The last part of `path` names the dataset.

    Args:
        episodes: See `write_lerobot`.
        path: New folder.
        episodes_per_file: Number of episodes in a TFRecord file.
        quality: JPEG quality, up to 100.
        version: Name of the inner folder.

    Raises:
        FileExistsError: The folder is not empty.
        ValueError: There are no frames, or the cameras of a frame differ from those of the first.
    """
    with new_folder(Path(path) / version) as root:
        _write_rlds(episodes, root, Path(path).name, episodes_per_file, quality, version)
    return Path(path) / version


def _write_rlds(episodes: Episodes, root: Path, name: str, episodes_per_file: int, quality: int, version: str) -> None:
    lengths: list[int] = []
    images: Shapes = {}
    numbers: Shapes = {}
    num_bytes = 0
    for index, episode in enumerate(episodes):
        frames = list(episode)
        if not frames:
            raise ValueError(f"Episode {index} has no frames to write.")
        payload, images, numbers = _rlds_example(frames, quality, images)
        if index % episodes_per_file == 0:
            lengths.append(0)
        # Files are renamed at the end, since their names contain the number of files.
        with (root / f"{len(lengths) - 1:05d}").open("ab") as file:
            write_record(file, payload)
        num_bytes += len(payload)
        lengths[-1] += 1
    if not lengths:
        raise ValueError("There are no frames to write.")
    for index in range(len(lengths)):
        part = root / f"{index:05d}"
        part.rename(root / f"{name}-train.tfrecord-{index:05d}-of-{len(lengths):05d}")
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "shardLengths": [str(length) for length in lengths],
        "numBytes": str(num_bytes),
    }
    info = {"name": name, "version": version, "fileFormat": "tfrecord", "splits": [split]}
    (root / "dataset_info.json").write_text(json.dumps(info, indent=2))
    (root / "features.json").write_text(json.dumps(_rlds_features(images, numbers), indent=2))


def _rlds_example(
    frames: Sequence[Mapping[str, Any]], quality: int, cameras: Collection[str]
) -> tuple[bytes, Shapes, Shapes]:
    """Encode an episode, and return it with the shapes of its images by camera and of its numbers by key.

    `cameras` are those of earlier episodes.
    """
    simplejpeg = import_extra("simplejpeg", "data")
    images: dict[str, list[np.ndarray]] = {}
    for frame in frames:
        pictures = _images_of(frame, RLDS_CAMERA)
        _check_cameras(pictures, cameras or images)
        for camera, image in pictures.items():
            images.setdefault(camera, []).append(np.ascontiguousarray(image))
    pictures = {
        f"steps/observation/{camera}": [simplejpeg.encode_jpeg(image, quality=quality) for image in rows]
        for camera, rows in images.items()
    }
    columns = {"steps/action": np.stack([np.asarray(frame["action"], np.float32) for frame in frames])}
    if frames[0].get("state") is not None:
        columns["steps/observation/state"] = np.stack([np.asarray(frame["state"], np.float32) for frame in frames])
    order = np.arange(len(frames))
    payload = build_example(
        {
            **pictures,
            "steps/language_instruction": [frame["instruction"].encode() for frame in frames],
            **columns,
            "steps/is_first": (order == 0).astype(np.int64),
            "steps/is_last": (order == len(frames) - 1).astype(np.int64),
        }
    )
    numbers = {key: rows.shape[1:] for key, rows in columns.items()}
    return payload, {camera: rows[0].shape for camera, rows in images.items()}, numbers


def _rlds_features(images: Shapes, numbers: Shapes) -> dict[str, Any]:
    """Build the content of `features.json` for steps whose images and numbers have these shapes."""
    package = "tensorflow_datasets.core.features"

    def tensor(dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
        kind = "tensor_feature.Tensor" if shape else "scalar.Scalar"
        dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
        return {
            "pythonClassName": f"{package}.{kind}",
            "tensor": {"shape": dimensions, "dtype": dtype, "encoding": "none"},
        }

    def features_dict(features: dict[str, Any]) -> dict[str, Any]:
        return {"pythonClassName": f"{package}.features_dict.FeaturesDict", "featuresDict": {"features": features}}

    def image(shape: tuple[int, ...]) -> dict[str, Any]:
        dimensions = {"dimensions": [str(size) for size in shape]}
        return {
            "pythonClassName": f"{package}.image_feature.Image",
            "image": {"shape": dimensions, "dtype": "uint8", "encodingFormat": "jpeg"},
        }

    observation = {camera: image(shape) for camera, shape in images.items()}
    if "steps/observation/state" in numbers:
        observation["state"] = tensor("float32", numbers["steps/observation/state"])
    steps = {
        "observation": features_dict(observation),
        "action": tensor("float32", numbers["steps/action"]),
        "language_instruction": {"pythonClassName": f"{package}.text_feature.Text", "text": {}},
        "is_first": tensor("bool", ()),
        "is_last": tensor("bool", ()),
    }
    sequence = {"feature": features_dict(steps), "length": "-1"}
    return features_dict({"steps": {"pythonClassName": f"{package}.dataset_feature.Dataset", "sequence": sequence}})


__all__ = ["write_lerobot", "write_rlds"]
