import json

import numpy as np
import pytest

from openvla_hf.data import Gripper, Robot, compute_statistics, from_episodes, load_statistics, save_statistics


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
