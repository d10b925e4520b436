"""The robots of `benchmarks/pretraining.py`: their rows of the table and their conversions agree."""

import importlib.util
import sys
from pathlib import Path
from xml.etree import ElementTree

import datasets
import numpy as np
import pytest

from openvla_hf.data import load, write_rlds
from openvla_hf.data.open_x import add_table, known_table
from openvla_hf.data.whole_statistics import whole_statistics
from openvla_hf.modeling.action_tokenizer import normalize


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SEEDS = range(3)

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks are not installed")


@pytest.fixture(scope="module")
def pretraining():
    pytest.importorskip("gymnasium")
    spec = importlib.util.spec_from_file_location("pretraining", BENCHMARKS / "pretraining.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pretraining", module := importlib.util.module_from_spec(spec))
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def recorded(pretraining, tmp_path_factory):
    """The same episodes as each robot records them: robot -> frames in the standard form, and their statistics."""
    root, table, recorded = tmp_path_factory.mktemp("oxe"), known_table(), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        for name in ("datasets", "mixtures"):
            patch.setitem(table.__dict__, name, dict(getattr(table, name)))
        add_table(pretraining.ROWS)
        for name, arm in pretraining.ARMS.items():
            write_rlds(pretraining.record(arm(), SEEDS, noise=0.0), root / name)
            recorded[name] = list(load(root / name)), whole_statistics(root / name)["action"]
    return recorded


def test_recorded_actions_solve_the_episode_again_with_each_robot(pretraining, recorded):
    for name, arm in pretraining.ARMS.items():
        env = pretraining.ArmEnv(pretraining.TabletopEnv(pretraining.TASKS, hand_noise=0.0), arm())
        for seed in SEEDS:
            env.reset(seed=seed)
            outcomes = [env.step(frame["action"])[2] for frame in recorded[name][0] if frame["episode_index"] == seed]
            assert outcomes == [False] * (len(outcomes) - 1) + [True]


def test_the_rows_give_equal_actions_for_the_same_episodes(pretraining, recorded):
    actions = {name: np.stack([frame["action"] for frame in frames]) for name, (frames, _) in recorded.items()}
    units = {name: [arm.unit] * 3 + [1] * 4 for name, arm in pretraining.ARMS.items()}
    normalized = {name: normalize(actions[name], statistics) for name, (_, statistics) in recorded.items()}
    for name in pretraining.ARMS:
        np.testing.assert_allclose(actions[name] / units[name], actions["metre_arm"], atol=2e-7)
        np.testing.assert_allclose(normalized[name], normalized["metre_arm"], atol=1e-5)


def test_the_robots_record_other_actions_and_images(pretraining):
    episodes = {name: next(pretraining.record(arm(), SEEDS, noise=0.0)) for name, arm in pretraining.ARMS.items()}
    assert [len(frames[0]["action"]) for frames in episodes.values()] == [7, 8, 4]
    assert [frames[0]["state"] is None for frames in episodes.values()] == [True, False, True]
    metre, pose, millimetre = (frames[0]["image"] for frames in episodes.values())
    np.testing.assert_array_equal(pose, metre[::-1, ::-1])
    assert millimetre.shape == (192, 192, 3)
    assert millimetre.max() < metre.max()


def test_the_picture_has_a_curve_for_each_policy_and_robot(pretraining, tmp_path):
    curve = {name: [(32, 0.9), (64, 0.6)] for name in pretraining.ARMS}
    pretraining.draw({"mixture": curve, "pose_arm": curve}, tmp_path / "curves.svg")
    lines = [one for one in ElementTree.parse(tmp_path / "curves.svg").iter() if "clip-path" in one.attrib]
    assert len(lines) == 6
