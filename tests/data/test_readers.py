"""Tables and streams give the frames that were written, in every format."""

import gzip
import io
import itertools
import json
import logging
import pickle
import shutil
import time
import zlib
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets
from datasets.distributed import split_dataset_by_node
from fsspec.implementations.local import LocalFileSystem
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from openvla_hf.data import (
    BadEpisodeError,
    Gripper,
    Robot,
    TrainingStream,
    from_episodes,
    load,
    python_episodes,
    write_lerobot,
    write_rlds,
)
from openvla_hf.data.frame_spec import FrameSpec
from openvla_hf.data.images import OPEN_VIDEOS, encode_png
from openvla_hf.data.readers import lerobot
from openvla_hf.data.readers.lerobot import LeRobotSource
from openvla_hf.data.readers.tfrecord import build_example, parse_example, read_records, write_record
from openvla_hf.data.robots import GENERIC
from openvla_hf.data.table_cache import write_json
from openvla_hf.testing import fake_episode


STEPS = 6  # of each of the five episodes
# Largest mean difference in levels of lossy images.
LOSSY = 6.0

FORMATS = {
    "lerobot_h264": lambda episodes, path: write_lerobot(episodes, path, codec="h264"),
    "lerobot_av1": lambda episodes, path: write_lerobot(episodes, path, codec="av1"),
    "rlds": lambda episodes, path: write_rlds(episodes, path, episodes_per_file=2),
}


@pytest.fixture(params=FORMATS)
def written(request, episodes, tmp_path):
    folder = tmp_path / request.param
    FORMATS[request.param](episodes, folder)
    return folder


def identical(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[key], other[key]) if isinstance(one[key], np.ndarray) else one[key] == other[key]
        for key in one
    )


def test_a_table_holds_the_frames_that_were_written(written, episodes):
    frames = load(written)
    expected = [(index, step, frame) for index, each in enumerate(episodes) for step, frame in enumerate(each)]
    assert len(frames) == len(expected)
    for frame, (index, step, truth) in zip(frames, expected, strict=True):
        assert (frame["episode_index"], frame["frame_index"]) == (index, step)
        assert frame["instruction"] == truth["instruction"]
        assert frame["dataset"] == written.name
        assert frame["action"].dtype == np.float64
        np.testing.assert_array_equal(frame["action"], truth["action"])
        np.testing.assert_array_equal(frame["state"], truth["state"])
        assert frame["image"].shape == (64, 96, 3)
        assert frame["image"].dtype == np.uint8
        # If the bar is one step off, the difference is far larger.
        assert np.abs(frame["image"].astype(float) - truth["image"]).mean() < LOSSY


def test_a_stream_gives_the_frames_of_the_table(written):
    table, stream = load(written), load(written, streaming=True)
    assert isinstance(table, Dataset)
    assert isinstance(stream, IterableDataset)
    assert all(identical(one, other) for one, other in zip(stream, table, strict=True))


def test_frames_can_be_read_in_any_order(written):
    frames = load(written)
    in_order = [frame["image"] for frame in frames]
    for index in np.random.default_rng(0).permutation(len(frames)).tolist():
        np.testing.assert_array_equal(frames[index]["image"], in_order[index])


def test_a_stream_continues_from_a_saved_position(written):
    stream = load(written, streaming=True)
    everything = list(stream)
    reading = iter(stream)
    for _ in range(8):
        next(reading)
    position = json.loads(json.dumps(stream.state_dict()))
    resumed = load(written, streaming=True)
    resumed.load_state_dict(position)
    assert all(identical(one, other) for one, other in zip(resumed, everything[8:], strict=True))


def test_ranks_and_workers_share_the_frames_without_overlap(written):
    stream = load(written, streaming=True)

    def keys(frames):
        return [(frame["episode_index"], frame["frame_index"]) for frame in frames]

    ranks = [keys(split_dataset_by_node(stream, rank, 2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == keys(stream)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(keys(loader)) == keys(stream)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_start_while_videos_are_open(make_episode, tmp_path, start):
    """With more videos than a process keeps open, a worker must drop those of its parent without waiting forever."""
    count = OPEN_VIDEOS + 2
    for index in range(count):
        write_lerobot([make_episode(index, steps=3)], tmp_path / f"arm{index}")
    frames = concatenate_datasets([load(tmp_path / f"arm{index}") for index in range(count)])
    expected = [frame["image"] for frame in frames]
    loader = DataLoader(frames, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=60)
    for image, frame in zip(expected, loader, strict=True):
        np.testing.assert_array_equal(frame["image"], image)


def test_a_shuffled_stream_gives_every_frame_once_in_another_order(written):
    keys = [(f["episode_index"], f["frame_index"]) for f in load(written, streaming=True, shuffle_buffer=8, seed=1)]
    again = [(f["episode_index"], f["frame_index"]) for f in load(written, streaming=True, shuffle_buffer=8, seed=1)]
    assert keys == again != sorted(keys)
    assert sorted(keys) == [(index, step) for index in range(5) for step in range(STEPS)]


def test_a_stream_reads_a_remote_file_system(written):
    memory = fsspec.filesystem("memory")
    memory.put(str(written), f"/{written.name}", recursive=True)
    remote = load(f"memory:///{written.name}", streaming=True)
    assert all(identical(one, other) for one, other in zip(remote, load(written), strict=True))
    memory.rm(f"/{written.name}", recursive=True)


def test_a_table_is_read_once_and_again_after_a_change(episodes, tmp_path, cache, monkeypatch):
    write_rlds(episodes, tmp_path / "arm")
    assert len(load(tmp_path / "arm")) == 5 * STEPS
    before = set(cache.iterdir())
    assert len(load(tmp_path / "arm")) == 5 * STEPS
    assert set(cache.iterdir()) == before
    (record,) = (tmp_path / "arm").rglob("*.tfrecord-*")
    record.write_bytes(record.read_bytes() * 2)
    assert len(load(tmp_path / "arm")) == 10 * STEPS


def test_each_split_has_its_own_table(episodes, tmp_path):
    write_lerobot(episodes, tmp_path / "arm")
    info = tmp_path / "arm/meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"splits": {"train": "0:3", "val": "3:5"}}))
    assert set(load(tmp_path / "arm")["episode_index"]) == {0, 1, 2}
    assert set(load(tmp_path / "arm", split="val")["episode_index"]) == {3, 4}


def test_lerobots_instructions_are_also_read_from_a_column(episodes, tmp_path):
    write_lerobot(episodes, tmp_path / "arm")
    tasks = tmp_path / "arm/meta/tasks.parquet"
    table = pq.read_table(tasks).to_pandas()
    assert table.index.tolist()[0] == "move the bar 0"
    table.rename_axis("task").reset_index().to_parquet(tasks)
    assert load(tmp_path / "arm")["instruction"][0] == "move the bar 0"
    table.reset_index(drop=True).to_parquet(tasks)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"tasks\.parquet has no instructions"):
            load(tmp_path / "arm", streaming=streaming, skip_bad_episodes=True)


class CountingFileSystem(LocalFileSystem):
    """Local files that count how often each is opened, which reads the footer of a parquet file."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.opened = Counter()

    def _open(self, path, mode="rb", **options):
        self.opened[Path(path).name] += 1
        return super()._open(path, mode, **options)


@pytest.mark.parametrize("row_group", [None, 4, 1000])
def test_the_footer_of_a_lerobot_file_is_read_once_however_many_episodes_it_holds(make_episode, tmp_path, row_group):
    count = 12
    write_lerobot([make_episode(index) for index in range(count)], tmp_path / "arm")
    data = tmp_path / "arm/data/chunk-000/file-000.parquet"
    if row_group is not None:  # an episode in several row groups, or all episodes in one
        pq.write_table(pq.read_table(data), data, row_group_size=row_group)
    fs = CountingFileSystem()
    source = LeRobotSource(fs, str(tmp_path / "arm"))
    shards = source.shards()
    fs.opened.clear()
    episodes = [episode for shard in shards for episode in source.read(shard, FrameSpec(GENERIC))]
    assert fs.opened[data.name] == 1
    for index, episode in enumerate(episodes):
        truth = np.array([frame["action"] for frame in make_episode(index)])
        np.testing.assert_array_equal(episode.columns["action"], truth)
        assert episode.instructions == [f"move the bar {index}"] * STEPS
    assert pickle.loads(pickle.dumps(source)).shards() == shards


def test_the_rows_of_a_lerobot_episode_may_lie_apart(episodes, tmp_path):
    write_lerobot(episodes, tmp_path / "arm")
    data = tmp_path / "arm/data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    before = load(tmp_path / "arm")
    pq.write_table(table.take(np.argsort(table["frame_index"], kind="stable")), data, row_group_size=7)
    assert all(identical(one, other) for one, other in zip(load(tmp_path / "arm"), before, strict=True))


def add_to_rlds(folder, descriptions, values):
    """Add features to the steps of a written RLDS folder: their descriptions, and the values of each episode."""
    path = next(folder.rglob("features.json"))
    features = json.loads(path.read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps |= descriptions
    path.write_text(json.dumps(features))
    for file in folder.rglob("*.tfrecord-*"):
        with file.open("rb") as stored:
            payloads = [payload for _, payload in read_records(stored, str(file))]
        with file.open("wb") as changed:
            for payload in payloads:
                found = parse_example(payload, lambda name: True)
                known = {
                    name: each if isinstance(each, np.ndarray) else [payload[slice(*span)] for span in each]
                    for name, each in found.items()
                }
                write_record(changed, build_example(known | {f"steps/{name}": each for name, each in values.items()}))


def tensor(dtype, shape, encoding):
    return {"tensor": {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": dtype, "encoding": encoding}}


@pytest.mark.parametrize(("encoding", "encode"), [("bytes", bytes), ("zlib", zlib.compress)])
def test_rlds_tensors_that_are_stored_as_bytes_are_read(episodes, tmp_path, encoding, encode):
    write_rlds(episodes, tmp_path / "arm")
    joints = np.random.default_rng(0).normal(size=(STEPS, 2, 2)).astype(np.float64)
    stored = [encode(each.tobytes()) for each in joints]
    add_to_rlds(tmp_path / "arm", {"joints": tensor("float64", (2, 2), encoding)}, {"joints": stored})
    frames = load(tmp_path / "arm", Robot("arm", action="joints"))
    np.testing.assert_array_equal(np.stack([frame["action"] for frame in frames]), [*joints.reshape(STEPS, 4)] * 5)
    add_to_rlds(tmp_path / "arm", {}, {"joints": [b"damaged"] * STEPS})
    with pytest.raises(BadEpisodeError, match=rf"'joints' can't be decoded as float64 numbers in {encoding}"):
        load(tmp_path / "arm", Robot("arm", action="joints"))


def test_rlds_class_labels_are_numbers_and_by_their_names_instructions(episodes, tmp_path):
    folder = write_rlds(episodes, tmp_path / "arm")
    labels = {"task_id": np.array([0, 1, 1, 1, 0, -1])}
    add_to_rlds(tmp_path / "arm", {"task_id": {"classLabel": {"numClasses": "2"}}}, labels)
    frames = load(tmp_path / "arm", Robot("arm", state="task_id"))
    assert [frame["state"][0] for frame in frames.select(range(STEPS))] == labels["task_id"].tolist()
    with pytest.raises(ValueError, match="Unknown instruction 'task_id'"):
        load(tmp_path / "arm", Robot("arm", instruction="task_id"))
    (folder / "steps-task_id.labels.txt").write_text("push\npull\n")
    frames = load(tmp_path / "arm", Robot("arm", instruction="task_id"))
    assert frames["instruction"][:5] == ["push", "pull", "pull", "pull", "push"], "the last has no label"


def test_rlds_code_points_are_an_instruction(episodes, tmp_path):
    write_rlds(episodes, tmp_path / "arm")
    codes = np.array([[*map(ord, text.ljust(6, "\0"))] for text in ("é", "go", "go", "on", "stop!!", "go")])
    add_to_rlds(tmp_path / "arm", {"codes": tensor("int32", (6,), "none")}, {"codes": codes})
    for streaming in (False, True):
        frames = list(load(tmp_path / "arm", Robot("arm", instruction="codes"), streaming=streaming))
        assert [frame["instruction"] for frame in frames[:STEPS]] == ["é", "go", "go", "on", "stop!!", "go"]


def test_a_depth_image_is_refused_as_camera(episodes, tmp_path, caplog):
    write_rlds(episodes, tmp_path / "rlds")
    depth = {"image": {"shape": {"dimensions": ["8", "8", "1"]}, "dtype": "uint16", "encodingFormat": "png"}}
    add_to_rlds(tmp_path / "rlds", {"depth": depth}, {"depth": [b"png"] * STEPS})
    write_lerobot(episodes, tmp_path / "lerobot")
    info = tmp_path / "lerobot/meta/info.json"
    described = json.loads(info.read_text())
    video = described["features"]["observation.images.front"]
    described["features"]["depth"] = video | {"info": {"video.is_depth_map": True}}
    info.write_text(json.dumps(described))
    for name, message in (("rlds", "'depth' can't be read: it has uint16 values"), ("lerobot", "a depth map")):
        for streaming in (False, True):
            with pytest.raises(ValueError, match=message):
                load(tmp_path / name, camera="depth", streaming=streaming)
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path / "rlds")) == 5 * STEPS, "the only other camera is read"
    assert "'depth' (it has uint16 values" in caplog.text


def test_rlds_features_that_are_not_read_are_named(episodes, tmp_path, caplog):
    write_rlds(episodes, tmp_path / "arm")
    descriptions = {
        "sound": {"pythonClassName": "tensorflow_datasets.core.features.audio_feature.Audio", "audio": {}},
        "points": tensor("float32", (-1, 3), "none"),
    }
    add_to_rlds(tmp_path / "arm", descriptions, {})
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "arm")
    assert "'sound' (features of type Audio are not supported)" in caplog.text
    with pytest.raises(ValueError, match="'points' can't be read: its size differs from frame to frame"):
        load(tmp_path / "arm", Robot("arm", action="points"))


def test_compressed_tfrecords_are_read(episodes, tmp_path):
    write_rlds(episodes, tmp_path / "arm")
    before = list(load(tmp_path / "arm"))
    file = tfrecord(tmp_path / "arm")
    data = file.read_bytes()
    file.write_bytes(gzip.compress(data))
    for streaming in (False, True):
        frames = load(tmp_path / "arm", streaming=streaming)
        assert all(identical(one, other) for one, other in zip(frames, before, strict=True))
    file.write_bytes(gzip.compress(data)[:-100])
    with pytest.raises(BadEpisodeError, match="the GZIP file is damaged"):
        load(tmp_path / "arm")


def test_the_configurations_of_a_tfds_folder(episodes, tmp_path):
    for name in ("wrist", "front"):
        for version in ("1.0.0", "1.10.0", "1.9.0"):
            write_rlds(episodes[: 1 + (version == "1.10.0")], tmp_path / "arm" / name, version=version)
    for path, count in (("wrist", 2), ("wrist/1.9.0", 1)):
        assert len(load(tmp_path / "arm" / path)) == count * STEPS
    with pytest.raises(ValueError, match=r"several configurations. Give one of '.*arm/front', '.*arm/wrist'"):
        load(tmp_path / "arm")
    shutil.rmtree(tmp_path / "arm/wrist")
    assert len(load(tmp_path / "arm")) == 2 * STEPS


@pytest.mark.parametrize("file_format", ["array_record", "parquet", "riegeli"])
def test_other_files_of_tfds_are_refused_with_the_command_that_converts_them(episodes, tmp_path, file_format):
    info = write_rlds(episodes, tmp_path / "arm") / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": file_format}))
    with pytest.raises(ValueError, match=rf"{file_format} files.*tfds convert_format --dataset_dir=.*tfrecord"):
        load(tmp_path / "arm")


def test_rlds_without_an_instruction_lists_the_available_texts(episodes, tmp_path):
    write_rlds(episodes, tmp_path / "arm")
    silent = Robot("arm", instruction="annotation")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"Unknown instruction 'annotation'.*'language_instruction'"):
            load(tmp_path / "arm", silent, streaming=streaming, skip_bad_episodes=True)


def test_the_table_does_not_hold_the_images(make_episode, tmp_path, cache):
    write_rlds([make_episode(0, steps=8)] * 40, tmp_path / "arm")
    load(tmp_path / "arm")
    assert sum(path.stat().st_size for path in cache.iterdir()) < 600 * 40 * 8


def keep_images_in_parquet(folder, episodes, row_group_size):
    """Turn a LeRobot folder with a video into one whose images are in the parquet file."""
    info_file, data_file = folder / "meta/info.json", next((folder / "data").rglob("*.parquet"))
    info = json.loads(info_file.read_text())
    camera = next(name for name, feature in info["features"].items() if feature["dtype"] == "video")
    info["features"][camera]["dtype"] = "image"
    info_file.write_text(json.dumps(info))
    images = [encode_png(frame["image"]) for each in episodes for frame in each]
    table = pq.read_table(data_file)
    column = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(table.append_column(camera, column), data_file, row_group_size=row_group_size)
    shutil.rmtree(folder / "videos")
    return data_file


@pytest.mark.parametrize("row_group_size", [4, STEPS, 1000])
def test_images_in_parquet_files_stay_where_they_are(episodes, tmp_path, cache, row_group_size):
    rng = np.random.default_rng(0)
    for each in episodes:
        for frame in each:
            frame["image"] = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    write_lerobot(episodes, tmp_path / "arm")
    file = keep_images_in_parquet(tmp_path / "arm", episodes, row_group_size)
    table, stream = load(tmp_path / "arm"), load(tmp_path / "arm", streaming=True)
    truth = [frame["image"] for each in episodes for frame in each]
    assert sum(path.stat().st_size for path in cache.glob("*.arrow")) < file.stat().st_size / 10
    for index in rng.permutation(len(truth)).tolist():
        np.testing.assert_array_equal(table[index]["image"], truth[index])
    assert all(identical(one, other) for one, other in zip(stream, table, strict=True))
    loader = DataLoader(table, batch_size=None, num_workers=2)
    assert all(np.array_equal(frame["image"], image) for frame, image in zip(loader, truth, strict=True))
    table = load(tmp_path / "arm")  # with no open files
    file.unlink()
    with pytest.raises(BadEpisodeError, match=rf"episode_index 0, frame_index 0: .*{file.name}#row=0:.*can't be read"):
        table[0]


def test_large_row_groups_of_images_give_a_warning(episodes, tmp_path, monkeypatch, caplog):
    write_lerobot(episodes, tmp_path / "arm")
    file = keep_images_in_parquet(tmp_path / "arm", episodes, row_group_size=2 * STEPS)
    size = len(encode_png(episodes[0][0]["image"])["bytes"])
    for limit, told in ((2 * STEPS * size // 2, True), (2 * STEPS * size * 2, False)):
        monkeypatch.setattr(lerobot, "LARGE_GROUP", limit)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(tmp_path / "arm", skip_bad_episodes=told)  # makes another table
        assert (f"{file.name}: the row groups contain more than" in caplog.text) == told


def test_plain_datasets_with_an_image_column(episodes):
    rows = [
        {**frame, "episode_index": i, "frame_index": t} for i, e in enumerate(episodes) for t, frame in enumerate(e)
    ]
    plain = from_columns(rows)
    frames = load(plain, name="plain")
    assert len(frames) == len(rows)
    for frame, row in zip(frames, rows, strict=True):
        np.testing.assert_array_equal(frame["image"], row["image"])
        np.testing.assert_array_equal(frame["action"], row["action"])
        assert frame["episode_index"] == row["episode_index"]
    streamed = load(plain.to_iterable_dataset(num_shards=3), name="plain", streaming=True)
    assert all(identical(one, other) for one, other in zip(streamed, frames, strict=True))


def from_columns(rows):
    features = {
        "image": Image(),
        "instruction": Value("string"),
        "action": List(Value("float32")),
        "state": List(Value("float32")),
        "episode_index": Value("int32"),
        "frame_index": Value("int32"),
    }
    return Dataset.from_dict({key: [row[key] for row in rows] for key in features}, features=Features(features))


def test_episodes_made_by_python_come_back_unchanged(episodes):
    for frames in (from_episodes(episodes), from_episodes(lambda: iter(episodes), streaming=True)):
        for frame, truth in zip(frames, [frame for each in episodes for frame in each], strict=True):
            np.testing.assert_array_equal(frame["image"], truth["image"])
            np.testing.assert_array_equal(frame["action"], truth["action"])
    with pytest.raises(TypeError, match="function"):
        from_episodes(episodes, streaming=True)


def test_images_that_python_makes_are_read_one_at_a_time_and_never_clipped(episodes):
    read = []

    def lazily(frame):
        read.append(len(read))
        return frame["image"]

    def lazy():
        return ([{**frame, "image": partial(lazily, frame)} for frame in each] for each in episodes)

    frames = iter(from_episodes(lazy, streaming=True))
    np.testing.assert_array_equal(next(frames)["image"], episodes[0][0]["image"])
    assert len(read) <= 2 < STEPS
    for made in (from_episodes(lazy), from_episodes(lambda: (iter(each) for each in lazy()))):
        assert all(identical(one, other) for one, other in zip(made, from_episodes(episodes), strict=True))

    buffer = io.BytesIO()
    PILImage.fromarray(episodes[0][0]["image"]).save(buffer, format="PNG")
    for image in (buffer.getvalue(), PILImage.open(buffer)):
        (frame,) = from_episodes([[{**episodes[0][0], "image": image}]])
        np.testing.assert_array_equal(frame["image"], episodes[0][0]["image"])

    depth = np.full((64, 96), 3000, np.uint16)
    for image, message in (
        (depth, "uint16 values. Give colours as uint8"),
        (PILImage.fromarray(depth), "more than 8 bits"),
        (np.zeros((64, 96, 3)), "float64 values"),
        (np.zeros((2, 64, 96, 3), np.uint8), r"shape \(2, 64, 96, 3\)\. Give height, width and 3 colours"),
    ):
        bad = [[{**episodes[0][0], "image": image}]]
        with pytest.raises(BadEpisodeError, match=rf"episode 0, frame 0: .*{message}"):
            from_episodes(bad)
        with pytest.raises(BadEpisodeError, match=message):
            list(from_episodes(lambda bad=bad: bad, streaming=True))


def test_a_depth_image_in_a_file_is_never_clipped(episodes, tmp_path):
    folder = write_rlds(episodes, tmp_path / "arm")
    buffer = io.BytesIO()
    PILImage.fromarray(np.full((64, 96), 3000, np.uint16)).save(buffer, format="PNG")
    image = {"image": {"shape": {"dimensions": ["64", "96", "1"]}, "dtype": "uint8", "encodingFormat": "png"}}
    add_to_rlds(folder.parent, {"depth": image}, {"depth": [buffer.getvalue()] * STEPS})
    with pytest.raises(BadEpisodeError, match=r"record 0: the image of frame 0 .*more than 8 bits"):
        load(tmp_path / "arm", camera="depth")
    rows = [{**frame, "episode_index": 0, "frame_index": step} for step, frame in enumerate(episodes[0])]
    rows[2]["image"] = PILImage.open(buffer)
    frames = load(from_columns(rows))
    assert frames[1]["image"].shape == (64, 96, 3)
    with pytest.raises(BadEpisodeError, match=r"frame_index 2: .*more than 8 bits"):
        frames[2]


def test_episodes_under_a_key_are_encoded_once(episodes, monkeypatch):
    encoded = []
    monkeypatch.setattr(python_episodes, "encode_png", lambda image: encoded.append(image) or encode_png(image))
    tables = [from_episodes(lambda: iter(episodes), cache_key="first") for _ in range(3)]
    assert len(encoded) == 5 * STEPS
    assert all(identical(one, other) for one, other in zip(tables[0], tables[2], strict=True))
    assert len(from_episodes(episodes[:2], cache_key="second")) == 2 * STEPS
    assert len(from_episodes(episodes, cache_key="first", name="other")) == 5 * STEPS
    assert len(encoded) == 12 * STEPS


def make_slowly(output):
    """Make a table, and write a line for each episode and the length of the table."""

    def episodes():
        for _ in range(4):
            file.write("made\n")
            time.sleep(0.05)
            yield [{"image": np.zeros((8, 8, 3), np.uint8), "instruction": "push", "action": np.zeros(7)}]

    with output.open("w") as file:
        print(len(from_episodes(episodes, cache_key="same")), file=file)


def test_processes_that_start_together_make_a_table_once(cache, tmp_path):
    outputs = [tmp_path / "one", tmp_path / "other"]
    processes = [get_context("fork").Process(target=make_slowly, args=(output,)) for output in outputs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    told = [output.read_text().split() for output in outputs]
    assert sorted(told, key=len) == [["4"], ["made"] * 4 + ["4"]]


def test_labels_of_plain_datasets_are_instructions_by_their_names(episodes):
    rows = [
        {**frame, "episode_index": i, "frame_index": t} for i, e in enumerate(episodes) for t, frame in enumerate(e)
    ]
    labels = ["push", "pull"]
    plain = from_columns(rows).remove_columns("instruction")
    labelled = plain.add_column("instruction", [row["episode_index"] % 2 for row in rows])
    with pytest.raises(ValueError, match=r"column 'instruction' contains .*int64.*, not text"):
        load(labelled)
    labelled = labelled.cast_column("instruction", ClassLabel(names=labels))
    for data in (labelled, labelled.to_iterable_dataset()):
        frames = list(load(data, streaming=not isinstance(data, Dataset)))
        assert [frame["instruction"] for frame in frames] == [labels[row["episode_index"] % 2] for row in rows]


def test_actions_are_never_converted_twice(episodes):
    poses = Robot("poses", space="end_effector_pose", gripper=Gripper())
    frames = from_episodes(episodes, poses)
    for robot in (poses, "libero", "bridge_orig"):
        with pytest.raises(ValueError, match="would convert them a second time"):
            load(frames, robot)
        with pytest.raises(ValueError, match="would convert them a second time"):
            load(from_episodes(lambda: episodes, poses, streaming=True), robot)
    again = load(frames, "tabletop", name="episodes")  # keeps movements unchanged
    assert all(identical(one, other) for one, other in zip(again, frames, strict=True))


def test_frames_without_an_instruction_are_left_out(make_episode, tmp_path):
    write_rlds([make_episode(0), make_episode(1, instruction=" ")], tmp_path / "arm")
    assert {frame["episode_index"] for frame in load(tmp_path / "arm")} == {0}


def test_a_lower_rate_and_no_pauses_in_every_format(written, episodes):
    options = {"robot": "tabletop", "every": 2, "drop_idle": True}
    frames = load(written, **options)
    expected = from_episodes(episodes, **options, name=written.name)
    assert len(frames) == len(expected) == 5 * STEPS // 2
    for one, other in zip(frames, expected, strict=True):
        assert one["frame_index"] == other["frame_index"]
        np.testing.assert_allclose(one["action"], other["action"], atol=1e-7)
        assert np.abs(one["image"].astype(float) - other["image"]).mean() < LOSSY
    assert all(
        identical(one, other) for one, other in zip(load(written, **options, streaming=True), frames, strict=True)
    )


def test_an_episode_that_never_moves_gives_no_frame_without_its_pauses(make_episode):
    still = [{**frame, "action": np.zeros(7)} for frame in make_episode(0)]
    frames = from_episodes([still, make_episode(1)], "tabletop", drop_idle=True)
    assert set(frames["episode_index"]) == {1}


# Damaged data: the error names the file and the record, and the episode can be skipped.


def tfrecord(folder):
    return next(folder.rglob("*.tfrecord-00000*"))


def test_a_truncated_tfrecord(episodes, tmp_path, caplog):
    write_rlds(episodes, tmp_path / "arm", episodes_per_file=3)
    file = tfrecord(tmp_path / "arm")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadEpisodeError, match=rf"{file.name}, record 2.*cut short"):
        load(tmp_path / "arm")
    with pytest.raises(BadEpisodeError, match=rf"{file.name}, record 2.*cut short"):
        list(load(tmp_path / "arm", streaming=True))
    with caplog.at_level(logging.WARNING):
        frames = load(tmp_path / "arm", skip_bad_episodes=True)
    assert set(frames["episode_index"]) == {0, 1, 3, 4}
    assert "Skipped bad episode 1" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "arm", skip_bad_episodes=True)
    assert "Skipped bad episodes of" in caplog.text, "a cached table also reports what it lacks"
    streamed = load(tmp_path / "arm", streaming=True, skip_bad_episodes=True)
    assert {frame["episode_index"] for frame in streamed} == {0, 1, 3, 4}


def test_a_tfrecord_cut_between_two_records(episodes, tmp_path):
    write_rlds(episodes[:2], tmp_path / "short")
    write_rlds(episodes, tmp_path / "arm")
    tfrecord(tmp_path / "arm").write_bytes(tfrecord(tmp_path / "short").read_bytes())
    with pytest.raises(BadEpisodeError, match="the file has 2 records instead of 5"):
        load(tmp_path / "arm")
    assert set(load(tmp_path / "arm", skip_bad_episodes=0.6)["episode_index"]) == {0, 1}


def test_a_flipped_bit_in_a_tfrecord(episodes, tmp_path):
    write_rlds(episodes, tmp_path / "arm")
    file = tfrecord(tmp_path / "arm")
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadEpisodeError, match=r"record 0.*checksum"):
        load(tmp_path / "arm")
    assert set(load(tmp_path / "arm", skip_bad_episodes=True)["episode_index"]) == {1, 2, 3, 4}


@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_a_damaged_video(episodes, tmp_path, keep):
    write_lerobot(episodes, tmp_path / "arm")
    video = next((tmp_path / "arm").rglob("*.mp4"))
    data = video.read_bytes()
    video.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(BadEpisodeError, match=rf"file-000.parquet, episode 0: .*{video.name}"):
        load(tmp_path / "arm")
    with pytest.raises(BadEpisodeError, match="2 of 5 episodes are bad, but at most 10% may be skipped"):
        load(tmp_path / "arm", skip_bad_episodes=True)


def test_a_video_that_lacks_frames(episodes, tmp_path, caplog):
    write_lerobot(episodes[:2], tmp_path / "short")
    write_lerobot(episodes, tmp_path / "arm")
    before = load(tmp_path / "arm")
    video = next((tmp_path / "arm").rglob("*.mp4"))
    video.write_bytes(next((tmp_path / "short").rglob("*.mp4")).read_bytes())
    with pytest.raises(BadEpisodeError, match=rf"episode 2: .*{video.name}: there is no frame at 3.400 s"):
        load(tmp_path / "arm")
    with caplog.at_level(logging.WARNING):
        frames = load(tmp_path / "arm", skip_bad_episodes=0.6)
    assert "Skipped bad episode 3" in caplog.text
    assert set(frames["episode_index"]) == {0, 1}
    assert len(list(load(tmp_path / "arm", streaming=True, skip_bad_episodes=0.6))) == len(frames) == 2 * STEPS
    assert frames[len(frames) - 1]["image"].shape == (64, 96, 3)
    with pytest.raises(BadEpisodeError, match=rf"{video.name}.*no frame at"):
        before[len(before) - 1]


def test_a_missing_column(episodes, tmp_path):
    write_lerobot(episodes, tmp_path / "arm")
    file = next((tmp_path / "arm/data").rglob("*.parquet"))
    pq.write_table(pq.read_table(file).drop_columns(["action"]), file)
    with pytest.raises(BadEpisodeError, match=r"file-000.parquet, episode 0: .*'action'"):
        load(tmp_path / "arm")


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_actions_that_are_not_finite(episodes, tmp_path, write):
    episodes[1][3]["action"][2] = np.nan
    write(episodes, tmp_path / "arm")
    with pytest.raises(BadEpisodeError, match=r"(record|episode) 1: 'action' contains NaN or infinity at frame 3"):
        load(tmp_path / "arm")
    assert set(load(tmp_path / "arm", skip_bad_episodes=True)["episode_index"]) == {0, 2, 3, 4}


def test_a_state_that_is_not_finite_counts_as_none_where_no_action_needs_it(episodes):
    episodes[1][3]["state"][2] = np.nan
    frames = from_episodes(episodes)
    assert len(frames) == 5 * STEPS
    assert {frame["episode_index"] for frame in frames if frame["state"] is None} == {1}
    with pytest.raises(BadEpisodeError, match="episode 1: 'state' contains NaN or infinity at frame 3"):
        from_episodes(episodes, Robot("poses", relative=False))


def test_a_file_that_is_not_an_image(episodes, tmp_path):
    write_rlds(episodes, tmp_path / "arm")
    file = tfrecord(tmp_path / "arm")
    with file.open("rb") as stored:
        records = [payload for _, payload in read_records(stored, str(file))]
    image = records[1].find(b"\xff\xd8")
    records[1] = records[1][:image] + b"??" + records[1][image + 2 :]
    with file.open("wb") as damaged:
        for payload in records:
            write_record(damaged, payload)
    for streaming in (False, True):
        with pytest.raises(BadEpisodeError, match=rf"{file.name}, record 1: the image of frame 0 can't be decoded"):
            list(load(tmp_path / "arm", streaming=streaming))
        frames = load(tmp_path / "arm", streaming=streaming, skip_bad_episodes=True)
        assert {frame["episode_index"] for frame in frames} == {0, 2, 3, 4}


@pytest.fixture
def damaged_frame(episodes, tmp_path):
    """Write an RLDS folder in which the first image of episode 1 has a valid header but can't be decoded."""
    write_rlds(episodes, tmp_path / "arm")
    file = tfrecord(tmp_path / "arm")
    with file.open("rb") as stored:
        records = [payload for _, payload in read_records(stored, str(file))]
    # Overwrite the entropy-coded part of the first image, after its last header (start of scan).
    scan = records[1].find(b"\xff\xda") + 14
    records[1] = records[1][:scan] + b"\xff\xd9" * 20 + records[1][scan + 40 :]
    with file.open("wb") as damaged:
        for payload in records:
            write_record(damaged, payload)
    return tmp_path / "arm"


def test_an_image_that_is_damaged_within_names_its_frame(damaged_frame):
    where = r"dataset arm, episode_index 1, frame_index 0: .*tfrecord-00000.*#bytes="
    for streaming in (False, True):
        with pytest.raises(BadEpisodeError, match=where):
            list(load(damaged_frame, streaming=streaming))


def test_grippers_that_settle_need_whole_episodes(episodes):
    rows = [
        {**frame, "episode_index": i, "frame_index": t} for i, e in enumerate(episodes) for t, frame in enumerate(e)
    ]
    settling = Robot("settling", gripper=Gripper(binarize=True))
    with pytest.raises(ValueError, match=r"needs whole episodes\. Load this dataset without streaming"):
        load(from_columns(rows).to_iterable_dataset(), settling, streaming=True)
    with pytest.raises(ValueError, match="no column 'episode_index'"):
        load(from_columns(rows).remove_columns("episode_index"), settling)
    assert len(load(from_columns(rows), settling)) == len(rows)


def test_a_bad_row_of_a_plain_stream(episodes, caplog):
    rows = [
        {**frame, "episode_index": i, "frame_index": t} for i, e in enumerate(episodes) for t, frame in enumerate(e)
    ]
    rows[8]["action"] = np.full(7, np.nan, np.float32)
    plain = from_columns(rows).to_iterable_dataset()
    with pytest.raises(BadEpisodeError, match="data, row 8: 'action' contains NaN"):
        list(load(plain, streaming=True))
    with caplog.at_level(logging.WARNING):
        assert len(list(load(plain, streaming=True, skip_bad_episodes=True))) == len(rows) - 1
    assert "row 8" in caplog.text


@pytest.mark.parametrize(("apart", "is_much"), [(15, False), (5, True)])
def test_bad_rows_of_a_plain_stream_are_skipped_up_to_a_limit(make_episode, apart, is_much):
    rows = [{**make_episode(0)[0], "episode_index": 0, "frame_index": index} for index in range(300)]
    for row in rows[::apart]:
        row["action"] = np.full(7, np.nan, np.float32)
    stream = load(from_columns(rows).to_iterable_dataset(), streaming=True, skip_bad_episodes=True)
    if is_much:
        with pytest.raises(BadEpisodeError, match="11 of 100 episodes are bad"):
            list(stream)
    else:
        assert len(list(stream)) == 280


def test_an_episode_of_length_0(episodes):
    with pytest.raises(BadEpisodeError, match="episode 5: the episode has length 0"):
        from_episodes([*episodes, []])
    assert len(from_episodes([[], *episodes], skip_bad_episodes=True)) == 5 * STEPS


def test_a_stored_episode_of_length_0(episodes, tmp_path):
    write_rlds(episodes, tmp_path / "rlds")
    names = ("observation/image", "language_instruction")
    nothing = {f"steps/{name}": [] for name in names} | {
        "steps/action": np.empty(0),
        "steps/observation/state": np.empty(0),
    }
    with tfrecord(tmp_path / "rlds").open("ab") as file:
        write_record(file, build_example(nothing))
    write_lerobot(episodes, tmp_path / "lerobot")
    data, meta = ((tmp_path / "lerobot" / name / "chunk-000/file-000.parquet") for name in ("data", "meta/episodes"))
    rows, episode = pq.read_table(data), pq.read_table(meta)
    pq.write_table(rows.filter(pc.not_equal(rows["episode_index"], 4)), data)
    lengths = pa.array([*episode["length"].to_pylist()[:4], 0])
    pq.write_table(episode.set_column(episode.column_names.index("length"), "length", lengths), meta)
    for name, where, left in (("rlds", "record 5", 5), ("lerobot", "episode 4", 4)):
        with pytest.raises(BadEpisodeError, match=f"{where}: the episode has length 0"):
            load(tmp_path / name)
        assert len(load(tmp_path / name, skip_bad_episodes=True)) == left * STEPS


def test_an_action_of_another_size_than_the_adapters(written):
    with pytest.raises(BadEpisodeError, match=r"7 dimensions.*for 14"):
        load(written, robot=Robot("two_arms", action_dim=14))


def test_errors_about_wrong_names_list_the_right_ones(written, tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'libero'"):
        load(written, robot="librero")
    with pytest.raises(ValueError, match="Unknown camera 'wrist'"):
        load(written, camera="wrist")
    with pytest.raises(ValueError, match="Unknown split 'val'"):
        load(written, split="val")
    with pytest.raises(FileNotFoundError, match="no dataset"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["demos.hdf5", "lab/demos.hdf5", "lab/demos.h5", "lab/demos.zarr"])
def test_hdf5_and_zarr_are_never_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no dataset at '{name}'"):
        load(name)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"data")
    for data in (name, path, path.parent):
        with pytest.raises(ValueError, match=r"(HDF5|zarr) data.*from_episodes.*docs/data.md"):
            load(data)


def test_a_path_that_exists_is_never_looked_up_on_the_hub(episodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab/empty").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="'lab/empty' does not contain a dataset in a known format"):
        load("lab/empty")
    (tmp_path / "lab/notes.txt").write_text("data")
    with pytest.raises(ValueError, match=r"'lab/notes.txt' is not a parquet file"):
        load("lab/notes.txt")
    rows = [{**frame, "episode_index": 0, "frame_index": step} for step, frame in enumerate(episodes[0])]
    from_columns(rows).to_parquet("lab/plain.parquet")
    for streaming in (False, True):
        assert len(list(load("lab/plain.parquet", streaming=streaming))) == STEPS


def test_a_table_that_could_not_be_written_whole_is_not_used(episodes, tmp_path, cache, full_disk):
    write_rlds(episodes, tmp_path / "arm")
    with full_disk(), pytest.raises(OSError, match=r"table\.arrow.*too large.*HF_DATASETS_CACHE"):
        load(tmp_path / "arm")
    assert [path.name for path in cache.iterdir()] == ["locks"]
    assert len(load(tmp_path / "arm")) == 5 * STEPS


def test_a_json_file_of_the_cache_is_whole_or_missing(cache, full_disk):
    cache.mkdir(parents=True, exist_ok=True)
    with full_disk(), pytest.raises(OSError, match="too large"):
        write_json(cache / "damaged.json", {"0": "x" * 5000})
    assert list(cache.iterdir()) == []
    write_json(cache / "damaged.json", {"0": "x"})
    assert json.loads((cache / "damaged.json").read_text()) == {"0": "x"}


def test_skipped_episodes_are_those_whose_frames_are_damaged(damaged_frame, caplog):
    folder = damaged_frame
    with caplog.at_level(logging.WARNING):
        table = load(folder, skip_bad_episodes=True)
    assert {frame["episode_index"] for frame in table} == {0, 2, 3, 4}
    assert "Skipped bad episode 1: " in caplog.text
    assert "record 1, frame 0: " in caplog.text
    # A stream has already given other frames of the episode, so only the damaged frame is left out.
    stream = load(folder, streaming=True, skip_bad_episodes=True)
    keys = [(frame["episode_index"], frame["frame_index"]) for frame in [*stream, *stream]]
    assert keys == 2 * [(index, step) for index in range(5) for step in range(STEPS) if (index, step) != (1, 0)]
    assert stream.losses.skipped == 1
    trained = itertools.islice(TrainingStream(stream), 2 * 5 * STEPS)
    assert (1, 0) not in [(frame["episode_index"], frame["frame_index"]) for frame in trained]


def test_damaged_images_of_a_plain_dataset_are_skipped(episodes, decoded):
    rows = [
        {**frame, "episode_index": i, "frame_index": t} for i, e in enumerate(episodes) for t, frame in enumerate(e)
    ]
    plain = from_columns(rows).cast_column("image", Image(decode=False))
    images = plain["image"][:]
    images[8] = {"bytes": images[8]["bytes"][:60], "path": None}
    plain = plain.remove_columns("image").add_column("image", images).cast_column("image", Image())
    for _ in range(2):
        table = load(plain, name="plain", skip_bad_episodes=True)
        assert set(table.with_format(None)["episode_index"]) == {0, 2, 3, 4}
    assert len(decoded) == len(rows), "images are checked once"


def test_images_of_frames_that_were_loaded_before_are_checked(episodes, tmp_path):
    write_rlds(episodes, tmp_path / "arm")
    assert len(load(load(tmp_path / "arm"), skip_bad_episodes=True)) == 5 * STEPS


def test_a_damaged_image_file_that_is_repaired_is_no_longer_skipped(episodes, tmp_path, decoded):
    rows = [
        {**frame, "episode_index": i, "frame_index": t} for i, e in enumerate(episodes) for t, frame in enumerate(e)
    ]
    for number, row in enumerate(rows):
        PILImage.fromarray(row["image"]).save(tmp_path / f"{number}.png")
        row["image"] = str(tmp_path / f"{number}.png")
    plain = from_columns(rows)
    whole = (tmp_path / "8.png").read_bytes()
    (tmp_path / "8.png").write_bytes(whole[:60])
    for _ in range(2):
        assert set(load(plain, skip_bad_episodes=True).with_format(None)["episode_index"]) == {0, 2, 3, 4}
    assert len(decoded) == len(rows), "images are checked once"
    (tmp_path / "8.png").write_bytes(whole)
    assert len(load(plain, skip_bad_episodes=True)) == len(rows)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("streaming", [False, True])
def test_missing_files_are_skipped_up_to_a_limit(episodes, tmp_path, caplog, write, streaming):
    write(episodes, tmp_path / "arm")
    file = next((tmp_path / "arm").rglob("*.mp4"), None) or tfrecord(tmp_path / "arm")
    file.unlink()
    with pytest.raises(BadEpisodeError, match=file.name):
        list(load(tmp_path / "arm", streaming=streaming))
    with pytest.raises(BadEpisodeError, match=r"2 of 5 episodes are bad, but at most 10%.*skip_bad_episodes"):
        list(load(tmp_path / "arm", streaming=streaming, skip_bad_episodes=True))
    with caplog.at_level(logging.WARNING):
        frames = load(tmp_path / "arm", streaming=streaming, skip_bad_episodes=1.0)
        # The video holds all five episodes, and the TFRecord file the first two.
        assert len(list(frames)) == (3 * STEPS if "tfrecord" in file.name else 0)
    assert f"Skipped bad episode {2 if 'tfrecord' in file.name else 5}: " in caplog.text


def test_bad_episodes_of_python_are_skipped_up_to_a_limit(episodes):
    with pytest.raises(BadEpisodeError, match="2 of 7 episodes are bad"):
        from_episodes([[], *episodes, []], skip_bad_episodes=True)
    assert len(from_episodes([[], *episodes, []], skip_bad_episodes=0.3)) == 5 * STEPS
    with pytest.raises(ValueError, match=r"skip_bad_episodes=2 is not a share"):
        from_episodes(episodes, skip_bad_episodes=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_episode_whose_image_function_fails_to_read_is_bad(episodes, streaming):
    def read_damaged_chunk():
        raise OSError("the chunk is damaged")

    episodes[1][2]["image"] = read_damaged_chunk
    with pytest.raises(BadEpisodeError, match=r"frame(_index)? 2: the chunk is damaged"):
        list(from_episodes(lambda: episodes, streaming=streaming))
    kept = list(from_episodes(lambda: episodes, streaming=streaming, skip_bad_episodes=0.5))
    # In a stream, only the damaged frame is left out.
    assert len(kept) == (5 * STEPS - 1 if streaming else 4 * STEPS)


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ([0.0] * 6, r"'action' has shape \(6,\) at frame 2, but \(7,\) at frame 0"),
        (None, "'action' is missing at frame 2"),
    ],
)
def test_an_episode_with_an_action_of_another_size_is_bad(episodes, action, problem):
    episodes[1][2]["action"] = action
    rows = [
        {**frame, "episode_index": i, "frame_index": t} for i, e in enumerate(episodes) for t, frame in enumerate(e)
    ]
    for read in (partial(from_episodes, episodes), partial(load, from_columns(rows))):
        with pytest.raises(BadEpisodeError, match=f"episode 1: {problem}"):
            read()
        assert set(read(skip_bad_episodes=0.5)["episode_index"]) == {0, 2, 3, 4}


# Samples that other libraries wrote.


@pytest.mark.parametrize("folder", ["lerobot_v3_h264", "lerobot_v3_libsvtav1", "lerobot_v21_av1"])
def test_samples_of_lerobot_hold_the_frames_of_the_plain_dataset(samples, folder):
    # The plain dataset has MetaWorld's gripper commands: -1 = open, 1 = closed.
    metaworld = Robot("metaworld", gripper=Gripper(open=-1.0, closed=1.0))
    plain = load(samples / "hf_parquet", robot=metaworld)
    frames = load(samples / folder)
    assert len(frames) == len(plain) == 457
    images = [frame["image"].astype(float) for frame in plain]
    for index, (one, other) in enumerate(zip(frames, plain.remove_columns("image"), strict=True)):
        np.testing.assert_allclose(one["action"], other["action"], atol=1e-6)
        np.testing.assert_array_equal(one["state"], other["state"])
        for key in ("instruction", "episode_index", "frame_index"):
            assert one[key] == other[key]
        error, of_a_wrong_one = (np.abs(one["image"] - images[(index + ahead) % 457]).mean() for ahead in (0, 40))
        assert error < LOSSY < of_a_wrong_one


def test_samples_of_tfds_hold_the_frames_of_the_plain_dataset(samples):
    plain = load(samples / "hf_parquet", robot=Robot("metaworld", gripper=Gripper(open=-1.0, closed=1.0)))
    of = {}
    for index, (text, frame) in enumerate(zip(plain["instruction"], plain["frame_index"], strict=True)):
        of[text, frame] = index
    for split in ("train", "val"):
        frames = load(samples / "rlds" / "bridge_orig", GENERIC, camera="observation.image_0", split=split)
        for frame in frames:
            truth = plain[of[frame["instruction"], frame["frame_index"]]]
            np.testing.assert_array_equal(frame["state"], truth["state"])
            if frame["frame_index"]:
                np.testing.assert_allclose(frame["action"], truth["action"], atol=1e-6)
            assert np.abs(frame["image"].astype(float) - truth["image"]).mean() < LOSSY


@pytest.mark.parametrize("write", [write_lerobot, write_rlds])
def test_an_interrupted_recording_leaves_nothing(write, tmp_path):
    def episodes():
        yield fake_episode(steps=3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(episodes(), tmp_path / "recordings" / "kitchen")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    write([fake_episode(steps=3)], tmp_path / "recordings" / "kitchen")
    assert len(load(tmp_path / "recordings" / "kitchen")) == len(fake_episode(steps=3))


@pytest.mark.parametrize("write", [write_lerobot, write_rlds])
def test_recordings_without_frames_are_refused(write, episodes, tmp_path):
    with pytest.raises(ValueError, match=r"There are no frames to write\."):
        write([], tmp_path / "out")
    for recorded in ([[]], [episodes[0], []]):
        with pytest.raises(ValueError, match=rf"Episode {len(recorded) - 1} has no frames to write\."):
            write(recorded, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))
