"""MetaWorld as a suite. These tests run where MetaWorld is installed; see CONTRIBUTING.md."""

import json

import numpy as np
import pytest

from openvla_hf.cli import main
from openvla_hf.data import load
from openvla_hf.evaluation.suites import find_suite
from openvla_hf.suites.demonstrations import record_experts
from openvla_hf.suites.play import play
from openvla_hf.suites.simulator import open_simulators


pytestmark = pytest.mark.usefixtures("metaworld")

TASKS = ("drawer-open-v3", "faucet-close-v3")
STEPS = 6


@pytest.fixture(scope="module")
def suite():
    return find_suite("metaworld").select(TASKS).with_protocol(episodes=2)


def wave(observations, instructions):
    """Act depending only on the image."""
    level = np.array([one["image"][:, :100].mean() for one in observations])
    return np.stack([np.sin(level), np.cos(7 * level), np.sin(3 * level), np.cos(level)], axis=1)


def watch(suite, count, processes):
    """Play the episodes of a suite, and return the pictures of each."""
    with open_simulators(suite, count, processes) as simulators:
        played = play(wave, suite.episodes(), simulators, keep_frames=lambda episode: True)
        return {episode: np.stack(rollout.frames) for episode, rollout in played}


@pytest.fixture(scope="module")
def alone(suite):
    found = watch(suite.with_protocol(max_steps=STEPS), 1, processes=False)
    for pictures in found.values():
        assert pictures.shape == (STEPS + 1, 224, 224, 3)
        assert 40 < pictures.mean() < 220
        assert not np.array_equal(pictures[0], pictures[-1])
    return found


def replay(suite, episodes_of_actions):
    """Play recorded actions through the suite, and return the episodes."""
    played = []
    for episode, actions in episodes_of_actions.items():
        waiting = iter(actions)
        with open_simulators(suite, 1, processes=False) as simulators:
            played += play(lambda seen, told, waiting=waiting: next(waiting)[None], [episode], simulators)
    return [rollout for _, rollout in played]


def test_the_actions_of_an_expert_solve_the_episodes_of_the_suite(suite):
    """The figures for all experts and 50 episodes are in docs/benchmarks.md."""
    actions = {}
    for episode in suite.episodes():
        ((frames),) = record_experts(suite.select([episode.environment]), [episode.seed], noise=0.0)
        actions[episode] = [frame["action"] for frame in frames]
    rollouts = replay(suite, actions)
    assert all(one.success for one in rollouts)
    assert [one.steps for one in rollouts] == [len(one) for one in actions.values()]


@pytest.mark.parametrize(("count", "processes"), [(2, False), (2, True)], ids=["one process", "two processes"])
def test_the_same_seed_is_the_same_episode_with_two_environments(suite, alone, count, processes):
    short = suite.with_protocol(max_steps=STEPS)
    for episode, pictures in watch(short, count, processes).items():
        np.testing.assert_array_equal(pictures, alone[episode], err_msg=str(episode))


def test_the_images_of_an_environment_stay_the_same_when_another_one_closes(suite):
    env, other = (suite.make(task) for task in TASKS)
    other.reset(seed=0)
    before, _ = env.reset(seed=0)
    other.close()
    after, _ = env.reset(seed=0)
    env.close()
    np.testing.assert_array_equal(after["image"], before["image"])


def test_recorded_demonstrations_are_a_dataset_with_instructions(capsys, tmp_path):
    folder = tmp_path / "metaworld"
    command = ["record", str(folder), "--suite", "metaworld", "--task", *TASKS, "--episodes", "1", "--state", "--json"]
    assert main(command) == 0
    frames = load(json.loads(capsys.readouterr().out)["folder"])
    assert {frame["instruction"] for frame in (frames[0], frames[len(frames) - 1])} == {
        "open the drawer",
        "close the faucet",
    }
    assert np.abs(frames[0]["action"]).max() <= 1.0
    assert json.loads((folder / "meta/info.json").read_text())["features"]["action"]["names"] == [
        "dx",
        "dy",
        "dz",
        "effort",
    ]


def test_the_tabletop_has_only_cameras_of_its_own(capsys):
    assert main(["record", "new", "--suite", "metaworld", "--task", "reach-v3", "--cameras", "wrist"]) == 2
    assert "--cameras is for the tabletop: MetaWorld has one camera." in capsys.readouterr().err
