import json
import subprocess
import sys

import numpy as np
import pytest

from openvla_hf.data import (
    Gripper,
    Robot,
    compute_statistics,
    frames,
    from_episodes,
    load,
    load_statistics,
    mix,
    save_statistics,
    write_rlds,
)


ARM = Robot("arm", gripper=Gripper())


def test_statistics_are_numpy_s_over_all_frames(episodes):
    actions = np.stack([frame["action"] for each in episodes for frame in each]).astype(np.float64)
    states = np.stack([frame["state"] for each in episodes for frame in each]).astype(np.float64)
    (name, found), = compute_statistics(from_episodes(episodes, ARM, name="arm")).items()  # fmt: skip
    assert name == "arm"
    assert found["num_transitions"] == 30
    assert found["num_trajectories"] == 5
    assert found["action"].pop("mask") == [True] * 6 + [False]
    for values, described in ((actions, found["action"]), (states, found["proprio"])):
        assert described == {
            "mean": values.mean(0).tolist(),
            "std": values.std(0).tolist(),
            "max": values.max(0).tolist(),
            "min": values.min(0).tolist(),
            "q01": np.quantile(values, 0.01, axis=0).tolist(),
            "q99": np.quantile(values, 0.99, axis=0).tolist(),
        }


def test_a_stream_has_the_statistics_of_the_table(episodes):
    stream = from_episodes(lambda: episodes, ARM, name="arm", streaming=True)
    assert compute_statistics(stream) == compute_statistics(from_episodes(episodes, ARM, name="arm"))


def test_statistics_of_a_stream_decode_no_image(episodes, tmp_path, monkeypatch):
    write_rlds(episodes, tmp_path / "arm")
    stream = load(tmp_path / "arm", ARM, streaming=True, shuffle_buffer=8)
    expected = compute_statistics(load(tmp_path / "arm", ARM))
    decoded = []
    monkeypatch.setattr(frames, "decode_image", lambda reference: decoded.append(reference))
    found = compute_statistics(stream)
    assert decoded == []
    assert found["arm"]["action"]["q99"] == expected["arm"]["action"]["q99"]
    assert found["arm"]["num_transitions"] == 30
    next(iter(stream))
    assert decoded, "who reads frames afterwards has their images"


def test_frames_that_a_mixture_draws_again_count_once(make_episode):
    one = from_episodes([make_episode(0, steps=30)], ARM, name="one")
    other = from_episodes([make_episode(1)], ARM, name="other")
    mixture = mix([(one, 1.0), (other, 50.0)])
    assert len(mixture) > 36
    assert compute_statistics(mixture) == compute_statistics(one) | compute_statistics(other)


def test_statistics_of_a_table_are_kept(episodes, tmp_path, cache):
    write_rlds(episodes, tmp_path / "arm")
    first = compute_statistics(load(tmp_path / "arm", ARM))
    (kept,) = cache.glob("statistics-*.json")
    assert json.loads(kept.read_text()) == first
    # What another process finds there is what it gets.
    kept.write_text(json.dumps({"arm": "kept"}))
    program = (
        "import sys, datasets; datasets.config.HF_DATASETS_CACHE = sys.argv[1]\n"
        "from openvla_hf.data import Gripper, Robot, compute_statistics, load\n"
        "print(compute_statistics(load(sys.argv[2], Robot('arm', gripper=Gripper()))))"
    )
    arguments = [sys.executable, "-c", program, str(cache.parent), str(tmp_path / "arm")]
    assert "'kept'" in subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    write_rlds(episodes[:3], tmp_path / "other")
    assert compute_statistics(load(tmp_path / "other", ARM, name="arm"))["arm"]["num_trajectories"] == 3


def test_statistics_of_states_are_of_those_that_there_are(episodes):
    episodes[1][3]["state"][2] = np.nan
    states = np.stack([f["state"] for index in (0, 2, 3, 4) for f in episodes[index]]).astype(np.float64)
    found = compute_statistics(from_episodes(episodes, ARM, name="arm"))["arm"]
    assert found["num_transitions"] == 30
    assert found["proprio"]["mean"] == states.mean(0).tolist()


def test_statistics_are_saved_as_the_published_file(episodes, tmp_path):
    statistics = compute_statistics(from_episodes(episodes, ARM))
    path = save_statistics(statistics, tmp_path)
    assert path.name == "dataset_statistics.json"
    assert json.loads(path.read_text()) == statistics == load_statistics(tmp_path)


def test_frames_without_a_state_have_no_proprio(episodes):
    bare = [[{key: frame[key] for key in ("image", "instruction", "action")} for frame in each] for each in episodes]
    assert "proprio" not in compute_statistics(from_episodes(bare))["episodes"]


def test_no_frames_is_an_error():
    with pytest.raises(ValueError, match="no frames"):
        compute_statistics(from_episodes([]))
