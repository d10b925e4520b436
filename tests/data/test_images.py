"""Images by reference: which files are open, for how long, and in which process."""

import os
from multiprocessing import get_context

import numpy as np
import pytest
from datasets import concatenate_datasets

from openvla_hf.data import load, write_lerobot
from openvla_hf.data.images import OPEN_VIDEOS, ImageReader
from openvla_hf.data.recently_used import RecentlyUsed


def open_files():
    return len(os.listdir("/dev/fd"))


@pytest.fixture
def tables(make_episode, tmp_path):
    """Tables with more videos than a reader keeps open."""
    folders = [tmp_path / f"arm{index}" for index in range(OPEN_VIDEOS + 3)]
    for index, folder in enumerate(folders):
        write_lerobot([make_episode(index, steps=2)], folder)
    return [load(folder) for folder in folders]


def test_a_table_keeps_few_videos_open_and_closes_them_when_it_goes(tables):
    before = open_files()
    table = concatenate_datasets(tables)
    assert all(frame["image"].shape == (64, 96, 3) for frame in table)
    # The first table's decoder reads the images of all tables.
    assert open_files() <= before + OPEN_VIDEOS
    tables.clear()
    del table
    assert open_files() == before


def test_a_stream_closes_its_files_when_it_goes(make_episode, tmp_path):
    write_lerobot([make_episode(0), make_episode(1)], tmp_path / "arm")
    before = open_files()
    stream = load(tmp_path / "arm", streaming=True)
    assert len(list(stream)) == 12
    del stream
    assert open_files() == before


def test_a_reader_that_was_closed_reads_again(tables):
    reference = tables[0].with_format(None)[0]["image"]
    before = open_files()
    with ImageReader() as reader:
        image = reader.read(reference)
        assert open_files() > before
    assert open_files() == before
    np.testing.assert_array_equal(reader.read(reference), image)


def test_the_least_recently_used_is_dropped():
    kept, made = RecentlyUsed(2), []
    for key in "abacab":
        with kept.borrow(key, lambda key=key: made.append(key) or key):
            pass
    assert made == ["a", "b", "c", "b"]


def test_a_forked_process_makes_its_own():
    kept = RecentlyUsed(1)
    context = get_context("fork")
    results = context.SimpleQueue()

    def use(name):
        with kept.borrow("file", lambda: name) as used:
            return used

    def in_child():
        results.put(use("child"))
        kept.clear()
        results.put(use("opened again"))

    assert use("parent") == "parent"
    child = context.Process(target=in_child)
    child.start()
    child.join(60)
    assert [results.get(), results.get()] == ["child", "opened again"]
    assert use("parent again") == "parent"
