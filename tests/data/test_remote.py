"""Remote folders: the frames of the local folder, few requests, and what happens if a server fails."""

import io
import itertools
import json
import logging
import shutil
import sys
from types import ModuleType

import fsspec
import numpy as np
import pytest
from file_server import FileServer
from torch.utils.data import DataLoader

from openvla_hf.data import BadEpisodeError, Robot, load, remote, write_lerobot, write_rlds
from openvla_hf.data.frame_spec import FrameSpec
from openvla_hf.data.readers import rlds
from openvla_hf.data.remote import HELD, ReadAhead, find_folder


FORMATS = {
    "lerobot": write_lerobot,
    "rlds": lambda episodes, path: write_rlds(episodes, path, episodes_per_file=2),
}
SHARD = {"lerobot": "file-000.parquet", "rlds": "rlds-train.tfrecord-00001-of-00003"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "DELAYS", (0.0, 0.0))
    with FileServer(tmp_path) as server:
        yield server
    fsspec.filesystem("http").clear_instance_cache()


@pytest.fixture(params=FORMATS)
def written(request, episodes, tmp_path):
    FORMATS[request.param](episodes, tmp_path / request.param)
    return request.param


def pixels(frames):
    return np.stack([frame["image"] for frame in frames])


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_over_http_gives_the_frames_of_the_local_folder(server, written, tmp_path, streaming):
    frames = load(f"{server.url}/{written}", streaming=streaming)
    local = load(tmp_path / written)
    np.testing.assert_array_equal(pixels(frames), pixels(local))
    assert [frame["instruction"] for frame in frames] == [frame["instruction"] for frame in local]


def test_a_server_need_not_list_folders(server, written, tmp_path):
    server.lists = False
    folder = {"lerobot": "lerobot", "rlds": "rlds/1.0.0"}[written]
    np.testing.assert_array_equal(
        pixels(load(f"{server.url}/{folder}", streaming=True)), pixels(load(tmp_path / written))
    )


def test_forked_workers_open_their_own_connections(server, written, tmp_path):
    stream = load(f"{server.url}/{written}", streaming=True)
    next(iter(stream))
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    drawn = sorted((frame["episode_index"], frame["frame_index"]) for frame in loader)
    assert drawn == [(frame["episode_index"], frame["frame_index"]) for frame in load(tmp_path / written)]


def test_records_are_requested_once_in_large_pieces(server, make_episode, tmp_path):
    write_rlds([make_episode(index) for index in range(20)], tmp_path / "arm")
    file = next((tmp_path / "arm").rglob("*.tfrecord*"))
    assert len(list(load(f"{server.url}/arm", streaming=True))) == 120
    assert server.requests[file.name] == 2  # a small first piece, and the rest
    assert server.sent[file.name] == file.stat().st_size


@pytest.mark.parametrize("size", [1, 999, 1000, 5500])
def test_a_file_that_is_read_ahead_holds_a_bounded_number_of_pieces(server, tmp_path, monkeypatch, size):
    monkeypatch.setattr(remote, "FIRST", 100)
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "data").write_bytes(content)
    file = ReadAhead(*find_folder(f"{server.url}/data"), largest=500)
    with io.BufferedReader(file, 64) as reader:
        while reader.tell() < size:
            start = reader.tell()
            assert reader.read(700) == content[start : start + 700]
            assert len(file._pieces) <= HELD
        for start in (0, size // 2, max(0, size - 10)):
            reader.seek(start)
            assert reader.read() == content[start:]
            assert len(file._pieces) <= HELD


@pytest.mark.parametrize("fault", ["failures", "cuts"])
@pytest.mark.parametrize("ending", [".parquet", ".mp4"])
def test_a_file_of_lerobot_is_read_again_after_a_failure(server, episodes, tmp_path, fault, ending):
    write_lerobot(episodes, tmp_path / "arm")
    stream = load(f"{server.url}/arm", streaming=True)
    setattr(server, fault, {f"file-000{ending}": 2})
    np.testing.assert_array_equal(pixels(stream), pixels(load(tmp_path / "arm")))


@pytest.mark.parametrize("fault", ["failures", "cuts"])
def test_a_shard_is_read_again_from_the_record_that_failed(server, episodes, tmp_path, fault, monkeypatch, caplog):
    monkeypatch.setattr(rlds, "PIECE", 1000)
    file = write_rlds(episodes, tmp_path / "arm") / "arm-train.tfrecord-00000-of-00001"
    stream = load(f"{server.url}/arm", streaming=True)
    reading = iter(stream)
    first = list(itertools.islice(reading, 8))
    setattr(server, fault, {file.name: 2})
    with caplog.at_level(logging.WARNING):
        frames = [*first, *reading]
    np.testing.assert_array_equal(pixels(frames), pixels(load(tmp_path / "arm")))
    assert f"{file.name} can't be read" in caplog.text
    assert "Trying again" in caplog.text


def test_a_stream_can_be_closed_while_a_package_for_connections_is_being_imported(episodes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", ModuleType("aiohttp"))  # as yet without `ClientError`
    source = rlds.RLDSSource(*find_folder(write_rlds(episodes, tmp_path / "arm")))
    frames = source.read(source.shards()[0], FrameSpec(Robot("raw")))
    next(frames)
    frames.close()


def test_a_shard_that_stays_unreadable_is_named_or_skipped_and_counted(server, written):
    strict, lenient = (load(f"{server.url}/{written}", streaming=True, skip_bad_episodes=share) for share in (0, 1.0))
    server.failures = {SHARD[written]: 1000}
    with pytest.raises(BadEpisodeError, match=SHARD[written]):
        list(strict)
    left = {frame["episode_index"] for frame in lenient}
    assert left == ({0, 1, 4} if written == "rlds" else set())
    assert lenient.losses.skipped == (2 if written == "rlds" else 5)


def test_a_server_without_ranges_is_refused(server, episodes, tmp_path):
    write_rlds(episodes, tmp_path / "arm")
    server.ranges = False
    with pytest.raises(BadEpisodeError, match=r"arm-train.*the server can't send a part of a file"):
        list(load(f"{server.url}/arm", streaming=True))


def test_a_remote_folder_that_is_missing_or_unreadable_is_named(server, episodes, tmp_path):
    write_rlds(episodes, tmp_path / "arm")
    with pytest.raises(FileNotFoundError, match=r"^'http://.*/none' does not contain a dataset in a known format"):
        load(f"{server.url}/none", streaming=True)
    server.failures = {"features.json": 0, "dataset_info.json": 1}
    with pytest.raises(
        OSError, match=r"^http://.*/arm can't be read \(503.*\)\. Check the connection and try again\.$"
    ):
        load(f"{server.url}/arm", streaming=True)


def test_the_package_of_a_scheme_is_named_if_it_is_missing(tmp_path):
    for scheme, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        message = (
            rf"^Reading {scheme}:// needs the package {package}, which is not installed. Run `pip install \w+`\.$"
        )
        with pytest.raises(ImportError, match=message):
            load(f"{scheme}://bucket/jaco_play", streaming=True)
    with pytest.raises(ValueError, match=r"^gsx:// in 'gsx://bucket/jaco_play' is not a known scheme\."):
        load("gsx://bucket/jaco_play", streaming=True)


def test_streams_of_repositories_on_the_hub_give_the_frames_of_the_local_folders(hub, episodes, tmp_path, run_python):
    for name, write in FORMATS.items():
        write(episodes, tmp_path / name)
        shutil.copytree(tmp_path / name, hub.root / "datasets/someone" / name)
    code = """if True:
        import sys
        from openvla_hf.data import load
        print([int(frame["image"].sum()) for name in sys.argv[1:] for frame in load(name, streaming=True)])
        """
    result = run_python(code, *(f"someone/{name}" for name in FORMATS), **hub.env)
    expected = [int(frame["image"].sum()) for name in FORMATS for frame in load(tmp_path / name)]
    assert json.loads(result.stdout) == expected


def test_a_stream_from_a_hub_that_does_not_answer_is_refused_with_its_name(hub, run_python):
    hub.faults["*"] = 0
    code = """if True:
        from openvla_hf.data import load
        try:
            load("someone/kitchn", streaming=True)
        except OSError as error:
            print(error)
        """
    message = run_python(code, **hub.env).stdout
    assert message.startswith("someone/kitchn can't be read (")
    assert message.endswith("). Check the connection and try again.\n")
