"""Training on a stream that continues from a position: the same frames, without reading the data before it."""

import itertools
from collections import Counter

import fsspec
import numpy as np
import pytest
from file_server import FileServer

from openvla_hf.data import TrainingStream, load, load_mixture, mix, remote, write_lerobot, write_rlds
from openvla_hf.data.readers import rlds
from openvla_hf.data.readers.lerobot import LeRobotSource
from openvla_hf.data.readers.rlds import RLDSSource
from openvla_hf.data.table_cache import cache_folder


def key(frame):
    return frame["dataset"], frame["episode_index"], frame["frame_index"], frame["epoch"]


def draw(stream, count, reader=0, readers=1, start=0):
    mine = TrainingStream(stream, reader, readers)
    mine.first_batch = start
    drawn = list(itertools.islice(mine, count))
    assert drawn[:start] == [{}] * start
    return drawn[start:]


@pytest.fixture
def write(make_episode, tmp_path):
    """Write episodes of the given lengths, two in each file."""

    def write(*lengths, name="arm"):
        episodes = [make_episode(index, steps=steps) for index, steps in enumerate(lengths)]
        return write_rlds(episodes, tmp_path / name, episodes_per_file=2).parent

    return write


@pytest.mark.parametrize("known", [True, False], ids=["with an index", "without an index"])
@pytest.mark.parametrize("shuffle_buffer", [0, 7, 1000])
@pytest.mark.parametrize(("readers", "lengths"), [(1, [3, 5, 4, 1, 6]), (2, [20, 3, 9, 4, 18, 2, 7]), (5, [40, 11])])
def test_any_position_continues_exactly(write, without_images, readers, lengths, shuffle_buffer, known):
    folder = write(*lengths)
    stream = load(folder, streaming=True, shuffle_buffer=shuffle_buffer)
    count = 2 * sum(lengths) + 20
    reader = readers - 1
    straight = list(map(key, draw(stream, count, reader, readers)))
    for start in range(1, count, 3 if known else 11):
        if not known:
            for file in cache_folder().glob("records-*"):
                file.unlink()
        resumed = load(folder, streaming=True, shuffle_buffer=shuffle_buffer)
        assert list(map(key, draw(resumed, count, reader, readers, start))) == straight[start:]


def test_a_mixture_continues_exactly_with_the_same_images(write, tmp_path):
    for name, lengths in {"one": [9, 4, 7], "two": [5, 5, 5, 5, 5, 5, 5], "three": [30, 2]}.items():
        write(*lengths, name=name)
    sizes = {"one": 20, "two": 35, "three": 32}

    def mixture():
        return load_mixture(
            {"one": 2.0, "two": 1.0, "three": 0.5}, tmp_path, streaming=True, shuffle_buffer=12, num_frames=sizes
        )

    straight = draw(mixture(), 240, 1, 3)
    for start in (1, 33, 120, 200):
        resumed = draw(mixture(), 240, 1, 3, start)
        assert list(map(key, resumed)) == list(map(key, straight[start:]))
        for frame, expected in zip(resumed, straight[start:], strict=True):
            np.testing.assert_array_equal(frame["image"], expected["image"])
            np.testing.assert_array_equal(frame["action"], expected["action"])


def test_the_datasets_of_a_mixture_divide_one_shuffle_buffer(write, tmp_path):
    sizes = {f"arm{index}": 40 for index in range(4)} | {"rare": 8}
    for name, size in sizes.items():
        write(*[8] * (size // 8), name=name)
    mixture = load_mixture(dict.fromkeys(sizes, 1.0), tmp_path, streaming=True, shuffle_buffer=42, num_frames=sizes)
    assert [part.shuffle_buffer for part, _ in mixture.parts] == [10, 10, 10, 10, 2]
    assert draw(mixture, 1)[0]["dataset"] in sizes


def test_an_index_of_changed_files_is_not_used(write, make_episode, tmp_path):
    folder = write(4, 4, 4, 4)
    draw(load(folder, streaming=True), 16)
    file = sorted(folder.rglob("*.tfrecord*"))[0]
    other = write_rlds([make_episode(7, steps=6), make_episode(8, steps=1)], tmp_path / "other")
    file.write_bytes(next(other.rglob("*.tfrecord*")).read_bytes())
    for start in (5, 6, 7, 12):
        drawn = draw(load(folder, streaming=True), 15, start=start)
        assert [frame["frame_index"] for frame in drawn] == [0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 0, 1, 2, 3][start:]


def test_a_damaged_index_is_made_again(write, without_images):
    folder = write(4, 4, 4, 4)
    straight = draw(load(folder, streaming=True), 17)
    index = next(cache_folder().glob("records-*"))
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(lines[0][:20] + lines[1])
    assert list(map(key, draw(load(folder, streaming=True), 17, start=10))) == list(map(key, straight[10:]))
    assert index.read_bytes().count(b"\n") == 3


def test_the_statistics_of_a_mixture_make_the_index_of_its_records(write, tmp_path, monkeypatch):
    names = ("dlr_sara_pour_converted_externally_to_rlds", "austin_sailor_dataset_converted_externally_to_rlds")
    for name in names:
        write(*[5] * 20, name=name)

    def mixture():
        return load_mixture(dict.fromkeys(names, 1.0), tmp_path, streaming=True, split="train[:90%]")

    straight = draw(mixture(), 61)
    parsed, parse = [], RLDSSource._parse
    monkeypatch.setattr(RLDSSource, "_parse", lambda *given: parsed.append(given[1]) or parse(*given))
    for file in cache_folder().glob("statistics-*"):
        file.unlink()
    for file in cache_folder().glob("records-*"):
        file.unlink()
    again = mixture()
    assert len(parsed) == 40
    parsed.clear()
    assert list(map(key, draw(again, 61, start=60))) == list(map(key, straight[60:]))
    assert len(parsed) == 1


def test_records_that_cannot_be_read_any_more_are_left_out_of_the_buffer(write, without_images, monkeypatch):
    def stream():
        return load(folder, streaming=True, shuffle_buffer=20, skip_bad_episodes=1.0)

    folder = write(*[8] * 8)
    draw(stream(), 64)
    lost, open_file = sorted(map(str, folder.rglob("*.tfrecord*")))[0], rlds.open_file

    def fail(fs, path, *more):
        if path == lost:
            raise OSError("Input/output error")
        return open_file(fs, path, *more)

    monkeypatch.setattr(remote, "DELAYS", ())
    monkeypatch.setattr(rlds, "open_file", fail)
    for start in (1, 20, 40, 60):
        resumed = draw(stream(), 140, start=start)
        assert {frame["episode_index"] for frame in resumed} == {2, 3, 4, 5, 6, 7}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(rlds, "PIECE", 2**12)
    monkeypatch.setattr(remote, "FIRST", 2**10)
    with FileServer(tmp_path) as server:
        yield server
    fsspec.filesystem("http").clear_instance_cache()


@pytest.mark.parametrize("shuffle_buffer", [0, 16])
def test_data_before_the_position_is_not_requested(server, make_episode, tmp_path, shuffle_buffer):
    for name in ("one", "two"):
        write_rlds([make_episode(index, steps=8) for index in range(20)], tmp_path / name, episodes_per_file=5)

    def mixture():
        parts = [
            (load(f"{server.url}/{name}", streaming=True, shuffle_buffer=shuffle_buffer), 1.0, 160)
            for name in ("one", "two")
        ]
        return mix(parts, seed=3)

    straight = draw(mixture(), 400)
    whole = server.sent.total()
    server.sent.clear()
    resumed = draw(mixture(), 400, start=380)
    assert list(map(key, resumed)) == list(map(key, straight[380:]))
    # The rows of a buffer are in records that were read some time ago.
    assert server.sent.total() < whole * (0.5 if shuffle_buffer else 0.15)


def test_episodes_of_lerobot_before_the_position_are_not_read(make_episode, tmp_path, monkeypatch):
    write_lerobot([make_episode(index) for index in range(10)], tmp_path / "arm")
    straight = draw(load(tmp_path / "arm", streaming=True), 60)
    read, read_one = Counter(), LeRobotSource._read
    monkeypatch.setattr(
        LeRobotSource,
        "_read",
        lambda source, shard, spec: read.update([shard.episode]) or read_one(source, shard, spec),
    )
    resumed = draw(load(tmp_path / "arm", streaming=True), 60, start=40)
    assert sorted(read) == list(range(40 // 6, 10))
    for frame, expected in zip(resumed, straight[40:], strict=True):
        np.testing.assert_array_equal(frame["image"], expected["image"])
