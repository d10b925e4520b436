"""Episodes written as LeRobot 3.0 or RLDS, frame by frame: memory does not grow with their number."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..new_folder import new_folder
from .optional_packages import import_extra
from .readers.tfrecord import build_example, write_record
from .statistics import summarize


Episodes = Iterable[Iterable[Mapping[str, Any]]]

VIDEO_KEY = "observation.images.front"
KEY_FRAME_DISTANCE = 2
"""As LeRobot writes: any frame is at most one away from a key frame."""
CODECS = {"h264": ("libx264", "23"), "av1": ("libsvtav1", "30")}
"""Encoder and quality of each."""


def write_lerobot(
    episodes: Episodes,
    path: str | os.PathLike,
    *,
    frequency: float = 5.0,
    codec: str = "h264",
    action_names: Sequence[str] | None = None,
    state_names: Sequence[str] | None = None,
) -> Path:
    """Writes episodes as a LeRobot 3.0 folder with one data file and one video.

    Args:
        episodes: Each an iterable of frames with `image` (H, W, 3) uint8, `instruction`, `action`, and maybe `state`.
        path: New folder.
        frequency: Frames a second.
        codec: "h264" or "av1".
        action_names: Names of the action's numbers, such as "dx" or "left_elbow".
        state_names: Names of the state's numbers.

    Raises:
        FileExistsError: the folder has files.
        ValueError: there are no frames, or as many names as there are numbers are not given.
    """
    with new_folder(Path(path)) as root:
        _write_lerobot(episodes, root, frequency, codec, action_names, state_names)
    return Path(path)


def _write_lerobot(
    episodes: Episodes,
    root: Path,
    frequency: float,
    codec: str,
    action_names: Sequence[str] | None,
    state_names: Sequence[str] | None,
) -> None:
    av = import_extra("av", "data")
    files = {
        "data": root / "data/chunk-000/file-000.parquet",
        "episodes": root / "meta/episodes/chunk-000/file-000.parquet",
        "video": root / f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4",
    }
    for file in files.values():
        file.parent.mkdir(parents=True)
    tasks: dict[str, int] = {}
    records: list[dict[str, Any]] = []
    numbers: dict[str, list[np.ndarray]] = {}
    names = {"action": list(action_names or ()), "observation.state": list(state_names or ())}
    stream, writer, total = None, None, 0
    encoder, quality = CODECS[codec]
    with av.open(str(files["video"]), "w") as container:
        for index, episode in enumerate(episodes):
            rows: list[dict[str, Any]] = []
            for frame in episode:
                image = np.asarray(frame["image"])
                if stream is None:
                    rate = Fraction(frequency).limit_denominator(1000)
                    stream = container.add_stream(encoder, rate=rate, options={"crf": quality})
                    stream.height, stream.width = image.shape[:2]
                    stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", KEY_FRAME_DISTANCE
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                task = tasks.setdefault(frame["instruction"], len(tasks))
                if not total and not rows:
                    _check_names(frame, action=action_names, state=state_names)
                rows.append(_lerobot_row(frame, index, len(rows), total + len(rows), task, frequency))
            table = pa.Table.from_pylist(rows)
            writer = writer or pq.ParquetWriter(files["data"], table.schema)
            writer.write_table(table.cast(writer.schema))
            for name in ("action", "observation.state"):
                if name in table.column_names:
                    numbers.setdefault(name, []).append(np.array(table[name].to_pylist()))
            told = list(dict.fromkeys(row["task_index"] for row in rows))
            records.append(_lerobot_record(index, [list(tasks)[task] for task in told], total, len(rows), frequency))
            total += len(rows)
        if stream is None or writer is None:
            raise ValueError("There are no frames to write.")
        container.mux(stream.encode(None))
        size = (stream.height, stream.width, 3)
    writer.close()
    pq.write_table(pa.Table.from_pylist(records), files["episodes"])
    features = {VIDEO_KEY: _lerobot_feature("video", size, ["height", "width", "channel"])}
    features |= {
        name: _lerobot_feature("float32", (rows[0].shape[1],), names[name] or None) for name, rows in numbers.items()
    }
    features["timestamp"] = _lerobot_feature("float32", (1,))
    features |= {
        name: _lerobot_feature("int64", (1,)) for name in ("frame_index", "episode_index", "index", "task_index")
    }
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": len(records),
        "total_frames": total,
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": frequency,
        "splits": {"train": f"0:{len(records)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }
    # The instructions are the index: there LeRobot looks for them.
    pd.DataFrame({"task_index": list(tasks.values())}, index=list(tasks)).to_parquet(root / "meta/tasks.parquet")
    stats = {name: summarize(np.concatenate(rows)) | {"count": [total]} for name, rows in numbers.items()}
    (root / "meta/stats.json").write_text(json.dumps(stats, indent=2))
    (root / "meta/info.json").write_text(json.dumps(info, indent=2))


def _check_names(frame: Mapping[str, Any], **names: Sequence[str] | None) -> None:
    for key, given in names.items():
        size = np.size(frame[key]) if frame.get(key) is not None else 0
        if given is not None and len(given) != size:
            raise ValueError(f"{len(given)} names were given for the {size} numbers of the {key}.")


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


def _lerobot_record(episode: int, tasks: list[str], start: int, length: int, frequency: float) -> dict[str, Any]:
    video = f"videos/{VIDEO_KEY}"
    return {
        "episode_index": episode,
        "tasks": tasks,
        "length": length,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": start,
        "dataset_to_index": start + length,
        f"{video}/chunk_index": 0,
        f"{video}/file_index": 0,
        f"{video}/from_timestamp": start / frequency,
        f"{video}/to_timestamp": (start + length) / frequency,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
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
    """Writes episodes as an RLDS folder (`path/version`), with JPEG images, named as the last part of `path`.

    Args:
        episodes: As for `write_lerobot`.
        path: New folder.
        episodes_per_file: How many a TFRecord file holds.
        quality: Of the JPEGs, to 100.
        version: Name of the inner folder.

    Raises:
        FileExistsError: the folder has files.
        ValueError: there are no frames.
    """
    with new_folder(Path(path) / version) as root:
        _write_rlds(episodes, root, Path(path).name, episodes_per_file, quality, version)
    return Path(path) / version


def _write_rlds(episodes: Episodes, root: Path, name: str, episodes_per_file: int, quality: int, version: str) -> None:
    simplejpeg = import_extra("simplejpeg", "data")
    lengths: list[int] = []
    sizes: dict[str, tuple[int, ...]] = {}
    num_bytes = 0
    file: BinaryIO | None = None
    for index, episode in enumerate(episodes):
        frames = list(episode)
        if not frames:
            raise ValueError(f"Episode {index} has no frames to write.")
        if index % episodes_per_file == 0:
            if file is not None:
                file.close()
            # The number of files is part of their names, and known at the end.
            file = (root / f"{len(lengths):05d}").open("wb")
            lengths.append(0)
        images = [np.ascontiguousarray(frame["image"]) for frame in frames]
        columns = {"steps/action": np.stack([np.asarray(frame["action"], np.float32) for frame in frames])}
        if frames[0].get("state") is not None:
            columns["steps/observation/state"] = np.stack([np.asarray(frame["state"], np.float32) for frame in frames])
        sizes = {"steps/observation/image": images[0].shape} | {key: rows.shape[1:] for key, rows in columns.items()}
        order = np.arange(len(frames))
        payload = build_example(
            {
                "steps/observation/image": [simplejpeg.encode_jpeg(image, quality=quality) for image in images],
                "steps/language_instruction": [frame["instruction"].encode() for frame in frames],
                **columns,
                "steps/is_first": (order == 0).astype(np.int64),
                "steps/is_last": (order == len(frames) - 1).astype(np.int64),
            }
        )
        assert file is not None  # opened by the first episode
        write_record(file, payload)
        num_bytes += len(payload)
        lengths[-1] += 1
    if file is None:
        raise ValueError("There are no frames to write.")
    file.close()
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
    (root / "features.json").write_text(json.dumps(_rlds_features(sizes), indent=2))


def _rlds_features(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `features.json` of steps whose images and numbers have these shapes."""
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

    shape = {"dimensions": [str(size) for size in sizes["steps/observation/image"]]}
    image = {
        "pythonClassName": f"{package}.image_feature.Image",
        "image": {"shape": shape, "dtype": "uint8", "encodingFormat": "jpeg"},
    }
    observation = {"image": image}
    if "steps/observation/state" in sizes:
        observation["state"] = tensor("float32", sizes["steps/observation/state"])
    steps = {
        "observation": features_dict(observation),
        "action": tensor("float32", sizes["steps/action"]),
        "language_instruction": {"pythonClassName": f"{package}.text_feature.Text", "text": {}},
        "is_first": tensor("bool", ()),
        "is_last": tensor("bool", ()),
    }
    sequence = {"feature": features_dict(steps), "length": "-1"}
    return features_dict({"steps": {"pythonClassName": f"{package}.dataset_feature.Dataset", "sequence": sequence}})


__all__ = ["write_lerobot", "write_rlds"]
