import itertools
from collections import Counter

import numpy as np
import pytest

from openvla_hf.data import (
    MIXTURES,
    compute_statistics,
    from_episodes,
    load,
    load_mixture,
    mix,
    write_lerobot,
    write_rlds,
)


def test_formats_mix_by_weight_and_size(make_episode, tmp_path):
    write_rlds([make_episode(index) for index in range(10)], tmp_path / "large")
    write_lerobot([make_episode(index, steps=20) for index in range(1)], tmp_path / "small")
    mixture = load_mixture({"large": 1.0, "small": 3.0}, tmp_path)
    counts = Counter(mixture["dataset"])
    # 60 frames of weight 1 and 20 of weight 3 are drawn equally often, and each frame at least once.
    assert 0.6 < counts["large"] / counts["small"] < 1.6
    for name, size in (("large", 60), ("small", 20)):
        drawn = {(f["episode_index"], f["frame_index"]) for f in mixture if f["dataset"] == name}
        assert len(drawn) == size
    assert mixture[0]["image"].shape == (64, 96, 3)
    assert set(compute_statistics(mixture)) == {"large", "small"}


def test_the_same_seed_mixes_alike(make_episode):
    one = from_episodes([make_episode(0, steps=20)], name="one")
    other = from_episodes([make_episode(1, steps=20)], name="other")
    first, again, different = (mix([(one, 1), (other, 1)], seed=seed)["dataset"] for seed in (0, 0, 1))
    assert list(first) == list(again) != list(different)


def test_mixed_streams_are_endless_and_continue_from_a_position(make_episode, tmp_path):
    write_rlds([make_episode(index) for index in range(4)], tmp_path / "one", episodes_per_file=1)
    write_lerobot([make_episode(index) for index in range(4)], tmp_path / "other")

    def stream():
        return load_mixture({"one": 3.0, "other": 1.0}, tmp_path, streaming=True, num_frames={"one": 24})

    mixture = stream()
    reading = iter(mixture)
    head = [next(reading) for _ in range(100)]
    assert 60 < sum(frame["dataset"] == "one" for frame in head) < 90
    position = mixture.state_dict()
    expected = list(itertools.islice(reading, 20))
    resumed = stream()
    resumed.load_state_dict(position)
    for frame, truth in zip(itertools.islice(resumed, 20), expected, strict=True):
        assert (frame["dataset"], frame["episode_index"], frame["frame_index"]) == (
            truth["dataset"], truth["episode_index"], truth["frame_index"])  # fmt: skip
        np.testing.assert_array_equal(frame["image"], truth["image"])


def test_streams_of_any_origin_mix(make_episode, tmp_path):
    made = from_episodes(lambda: [make_episode(7)], name="made", streaming=True)
    write_lerobot([make_episode(index) for index in range(2)], tmp_path / "arm")
    mixture = mix([(made, 2.0, 6), (load(tmp_path / "arm", streaming=True), 1.0)]).take(12)
    frames = list(mixture)
    assert {frame["dataset"] for frame in frames} == {"made", "arm"}
    truth = {(episode, step): make_episode(episode)[step]["image"] for episode in (0, 1) for step in range(6)}
    for frame in frames:
        if frame["dataset"] == "made":
            np.testing.assert_array_equal(frame["image"], make_episode(7)[frame["frame_index"]]["image"])
        else:
            assert (
                np.abs(frame["image"].astype(float) - truth[frame["episode_index"], frame["frame_index"]]).mean() < 6
            )


def test_bad_mixtures_are_refused(make_episode, tmp_path):
    table = from_episodes([make_episode(0)])
    stream = from_episodes(lambda: [make_episode(0)], streaming=True)
    with pytest.raises(ValueError, match="combine tables and streams"):
        mix([(table, 1.0), (stream, 1.0)])
    with pytest.raises(ValueError, match="above 0"):
        mix([(table, 0.0)])
    with pytest.raises(ValueError, match="'oxe_magic_soup_plus_minus'"):
        load_mixture("oxe", tmp_path)


def test_the_published_mixture_is_known():
    weights = MIXTURES["oxe_magic_soup_plus_minus"]
    assert Counter(weights.values()) == {1.0: 13, 2.0: 7, 0.2: 2, 0.1: 1, 3.0: 1, 0.8341046294: 1}


def test_a_permutation_of_a_table_continues_where_it_stopped(make_episode, tmp_path):
    write_rlds([make_episode(index) for index in range(4)], tmp_path / "arm")
    order = [(f["episode_index"], f["frame_index"]) for f in load(tmp_path / "arm").shuffle(seed=3)]
    again = load(tmp_path / "arm").shuffle(seed=3).skip(7)
    assert [(f["episode_index"], f["frame_index"]) for f in again] == order[7:]
