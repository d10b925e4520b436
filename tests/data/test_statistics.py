import json

import numpy as np
import pytest

from openvla_hf.data import (
    Gripper,
    Robot,
    compute_statistics,
    from_episodes,
    load,
    load_statistics,
    mix,
    save_statistics,
    write_lerobot,
    write_rlds,
)
from openvla_hf.data.readers import rlds


NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "grip"]
ARM = Robot("arm", gripper=Gripper())


def test_statistics_equal_numpys_over_all_frames(episodes):
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


def test_statistics_of_a_stream_decode_no_image(episodes, tmp_path, decoded):
    write_rlds(episodes, tmp_path / "arm")
    stream = load(tmp_path / "arm", ARM, streaming=True, shuffle_buffer=8)
    expected = compute_statistics(load(tmp_path / "arm", ARM))
    decoded.clear()
    found = compute_statistics(stream)
    assert decoded == []
    assert found["arm"]["action"]["q99"] == expected["arm"]["action"]["q99"]
    assert found["arm"]["num_transitions"] == 30
    next(iter(stream))
    assert decoded, "reading frames afterwards still decodes images"


def test_frames_that_a_mixture_draws_again_count_once(make_episode):
    one = from_episodes([make_episode(0, steps=30)], ARM, name="one")
    other = from_episodes([make_episode(1)], ARM, name="other")
    mixture = mix([(one, 1.0), (other, 50.0)])
    assert len(mixture) > 36
    assert compute_statistics(mixture) == compute_statistics(one) | compute_statistics(other)


def test_statistics_of_a_table_are_cached(episodes, tmp_path, cache, run_python):
    write_rlds(episodes, tmp_path / "arm")
    first = compute_statistics(load(tmp_path / "arm", ARM))
    (kept,) = cache.glob("statistics-*.json")
    assert json.loads(kept.read_text()) == first
    # Another process reads what is cached.
    kept.write_text(json.dumps({"arm": {"action": {"q01": []}, "note": "kept"}}))
    program = (
        "import sys, datasets; datasets.config.HF_DATASETS_CACHE = sys.argv[1]\n"
        "from openvla_hf.data import Gripper, Robot, compute_statistics, load\n"
        "print(compute_statistics(load(sys.argv[2], Robot('arm', gripper=Gripper()))))"
    )
    assert "'kept'" in run_python(program, cache.parent, tmp_path / "arm").stdout
    write_rlds(episodes[:3], tmp_path / "other")
    assert compute_statistics(load(tmp_path / "other", ARM, name="arm"))["arm"]["num_trajectories"] == 3


def test_statistics_of_states_cover_the_states_that_exist(episodes):
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


def count_reads(monkeypatch):
    """List the files that are read as TFRecords."""
    read = []
    read_records = rlds.read_records
    monkeypatch.setattr(
        rlds, "read_records", lambda file, path, *place: read.append(path) or read_records(file, path, *place)
    )
    return read


def test_statistics_of_a_stream_are_cached_until_its_files_change(episodes, tmp_path, monkeypatch):
    write_rlds(episodes, tmp_path / "arm", episodes_per_file=1)
    write_rlds(episodes[:3], tmp_path / "other")
    read = count_reads(monkeypatch)

    def statistics():
        one = load(tmp_path / "arm", ARM, streaming=True)
        return compute_statistics(mix([(one, 1.0, 30), (load(tmp_path / "other", streaming=True), 1.0, 18)]))

    first = statistics()
    assert len(read) == 6
    assert statistics() == first
    alone = compute_statistics(load(tmp_path / "arm", ARM, streaming=True, shuffle_buffer=4))
    assert alone["arm"]["action"]["q99"] == first["arm"]["action"]["q99"]
    assert len(read) == 6, "a dataset has the same statistics alone and in a mixture"
    (tmp_path / "other" / "1.0.0").rename(tmp_path / "other" / "0.9.0")
    write_rlds(episodes, tmp_path / "new")
    (tmp_path / "new" / "1.0.0").rename(tmp_path / "other" / "1.0.0")
    assert statistics()["new"]["num_trajectories"] == 5


def test_statistics_of_python_episodes_are_cached_under_a_key(episodes):
    calls = []

    def make():
        calls.append(1)
        return episodes

    for key, expected in ((None, 2), ("a", 3), ("b", 4)):
        for _ in range(2):
            compute_statistics(from_episodes(make, ARM, name="arm", streaming=True, cache_key=key))
        assert len(calls) == expected


def test_statistics_are_read_from_a_file_or_its_folder(episodes, tmp_path):
    statistics = compute_statistics(from_episodes(episodes, ARM))
    path = save_statistics(statistics, tmp_path)
    assert load_statistics(path) == load_statistics(tmp_path) == statistics
    for text, problem in (
        ("{", "is not valid JSON"),
        ('{"mean": [1]}', "does not contain"),
        ("{}", "does not contain"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            load_statistics(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_statistics_contain_the_names_of_dimensions(make_episode, tmp_path, streaming):
    parts = []
    for name, names in (("named", NAMES), ("other", NAMES[::-1]), ("nameless", None)):
        write_lerobot([make_episode(0), make_episode(1)], tmp_path / name, action_names=names)
        parts.append(load(tmp_path / name, streaming=streaming))
    mixture = mix([(part, 1.0) for part in parts])
    for _ in range(2):  # first computed, then from the cache
        statistics = compute_statistics(mixture)
        assert {name: one["action"].get("names") for name, one in statistics.items()} == {
            "named": NAMES,
            "other": NAMES[::-1],
            "nameless": None,
        }
    if not streaming:
        assert compute_statistics(parts[0].select([0, 1]))["named"]["action"]["names"] == NAMES


END_EFFECTOR = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("space", "names"),
    [("joint_positions", [f"a{index}" for index in range(7)]), ("end_effector_delta", END_EFFECTOR), (None, None)],
)
def test_actions_without_names_are_named_by_the_robots_space(make_episode, tmp_path, streaming, space, names):
    robot = Robot("arm", space=space)
    write_lerobot([make_episode(0)], tmp_path / "arm")
    made = from_episodes(lambda: [make_episode(0)], robot, name="arm", streaming=streaming)
    for data in (load(tmp_path / "arm", robot, streaming=streaming), made):
        assert compute_statistics(data)["arm"]["action"].get("names") == names
