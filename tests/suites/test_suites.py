"""Suites: the same seed gives the same episode however it is played, and a killed evaluation goes on."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openvla_hf import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla_hf.checkpoints.identity import digest_checkpoint
from openvla_hf.cli import main
from openvla_hf.evaluation.suites import Evaluation, compare_runs, find_suite
from openvla_hf.suites.journal import JOURNAL_FILE, Journal, read_journal
from openvla_hf.suites.libero import LiberoSuite
from openvla_hf.suites.libero_states import read_states
from openvla_hf.suites.metaworld import MetaWorldSuite
from openvla_hf.suites.play import play
from openvla_hf.suites.policies import model_policy
from openvla_hf.suites.results import compare_results, mcnemar, newcombe, wilson
from openvla_hf.suites.simulator import Simulator, open_simulators
from openvla_hf.suites.simulator import _serve as serve
from openvla_hf.suites.suite import Episode, Rollout
from openvla_hf.tabletop.rollouts import TABLETOP_POLICY
from openvla_hf.tabletop.suite import TabletopSuite, tabletop_suite
from openvla_hf.testing import tiny_config, tiny_processor


EPISODES = 4


def wander(observations, instructions):
    """Act depending only on the first image and the instruction."""
    level = np.array([one["image"].mean() for one in observations]) / 255
    level = level + np.array([len(text) for text in instructions])
    rest = [*np.zeros((3, len(level))), (level * 10).astype(int) % 2]
    return np.stack([0.03 * np.sin(level), 0.03 * np.cos(7 * level), np.full_like(level, -0.01), *rest], axis=1)


@pytest.fixture(scope="module")
def suite():
    return tabletop_suite().with_protocol(episodes=EPISODES, max_steps=12)


def run(suite, count, processes=False, stop_after=None, policy=wander, **options):
    """Play an evaluation in a folder and return its result, or stop after some episodes."""
    evaluation = Evaluation(suite, {"model": "wander"}, **options)
    with open_simulators(suite, count, processes) as simulators:
        running = evaluation.play(lambda episodes, keep: play(policy, episodes, simulators, keep))
        for number, _ in enumerate(running, start=1):
            if number == stop_after:
                return None
    return evaluation.result()


@pytest.fixture(scope="module")
def alone(suite, tmp_path_factory):
    """An evaluation with one environment in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(suite, 1, folder=folder)


def test_processes_and_one_environment_give_the_same_episodes(suite, alone, tmp_path):
    run(suite, 2, processes=True, folder=tmp_path)
    assert read_journal(tmp_path)[1] == read_journal(alone[0])[1]


def test_four_environments_and_one_give_the_same_table(suite, alone, tmp_path):
    assert run(suite, 4, folder=tmp_path)["results"] == alone[1]["results"]


class GlobalRandom:
    """An environment whose initial state comes from NumPy's global generator, as those of LIBERO and MetaWorld do."""

    def reset(self, seed, options):
        np.random.seed(seed)
        time.sleep(0.01)  # another thread runs meanwhile
        value = np.random.random()
        return np.full((1, 1, 3), value), {"task": "draw", "instruction": "draw"}

    def close(self):
        pass


@dataclass(frozen=True)
class RandomSuite(TabletopSuite):
    def make(self, environment):
        return GlobalRandom()


def test_episodes_that_start_in_several_threads_have_the_initial_states_of_their_seeds():
    suite = RandomSuite(**vars(tabletop_suite()))

    def first_value(seed):
        simulator = Simulator(suite)
        simulator.start(Episode("tabletop", seed))
        return simulator.view().observation[0, 0, 0]

    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(first_value, range(8)))
    assert drawn == [np.random.RandomState(seed).random() for seed in range(8)]


@dataclass(frozen=True)
class WithoutAssets(TabletopSuite):
    def make(self, environment):
        raise OSError("The assets are missing: download them.")


def test_an_error_in_a_process_of_an_environment_reaches_the_caller():
    suite = WithoutAssets(**vars(tabletop_suite()))
    ours, theirs = multiprocessing.Pipe()
    ours.send(("start", Episode("tabletop", 0), False))
    ours.send(None)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        serve(suite, theirs)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    error = ours.recv()
    assert isinstance(error, OSError)
    assert str(error) == "The assets are missing: download them."


def test_a_killed_evaluation_goes_on_and_gives_the_same_table(suite, alone, tmp_path):
    run(suite, 1, folder=tmp_path, stop_after=2)
    assert not (tmp_path / "evaluation.json").exists()
    journal = tmp_path / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-7])  # killed while it wrote the second episode
    played = []
    evaluation = Evaluation(suite, {"model": "wander"}, tmp_path)
    with open_simulators(suite, 1, processes=False) as simulators:
        played = list(evaluation.play(lambda episodes, keep: play(wander, episodes, simulators, keep)))
    assert len(played) == EPISODES - 1
    assert evaluation.result() == alone[1]


KILLED = """
import itertools, os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_suites import run, tabletop_suite, wander
folder, episodes, last_call = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
calls = itertools.count(1)

def die(observations, instructions):
    if next(calls) == last_call:
        os.kill(os.getpid(), signal.SIGKILL)
    return wander(observations, instructions)

run(tabletop_suite().with_protocol(episodes=episodes, max_steps=12), 2, policy=die, folder=folder)
"""


@pytest.mark.slow
def test_an_evaluation_whose_process_is_killed_gives_the_same_table(alone, interpreters, offline, tmp_path, suite):
    arguments = (str(Path(__file__).parent), str(tmp_path), str(EPISODES), "17")
    assert interpreters.run("-c", KILLED, *arguments, env=offline).returncode == -signal.SIGKILL
    assert 0 < len(read_journal(tmp_path)[1]) < EPISODES
    assert run(suite, 2, folder=tmp_path) == alone[1]


KILLED_WHILE_IT_DRAWS = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from test_suites import run, tabletop_suite
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a longer file ends the process
run(tabletop_suite().with_protocol(episodes=1, max_steps=12), 1, folder=sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_evaluation_leaves_no_broken_picture(interpreters, offline, tmp_path):
    arguments = (str(Path(__file__).parent), str(tmp_path))
    killed = interpreters.run("-c", KILLED_WHILE_IT_DRAWS, *arguments, env=offline)
    assert killed.returncode == -signal.SIGXFSZ
    assert [path.stat().st_size for path in tmp_path.rglob("*.gif")] == [4096]  # in the folder of unfinished files
    assert not list(tmp_path.glob("episodes/*.gif"))


def test_a_journal_that_ends_at_any_byte_keeps_the_episodes_before_it(alone, tmp_path):
    content = (alone[0] / JOURNAL_FILE).read_bytes()
    run_description, rollouts = read_journal(alone[0])
    ends = [index for index, byte in enumerate(content) if byte == ord("\n")]
    for size in {0, 5, *(end + shift for end in ends for shift in (-9, 0, 1))}:
        (tmp_path / JOURNAL_FILE).write_bytes(content[:size])
        kept = Journal(tmp_path, run_description).rollouts
        assert len(kept) == max(content[:size].count(b"\n") - 1, 0)
        assert kept.items() <= rollouts.items()


def test_a_folder_with_another_run_is_refused(suite, alone):
    with pytest.raises(ValueError, match=r"another run, which differs in protocol \(max_steps: \d+ and 13\)"):
        Evaluation(suite.with_protocol(max_steps=13), {"model": "wander"}, alone[0])
    with pytest.raises(ValueError, match="another run, which differs in model"):
        Evaluation(suite, {"model": "other"}, alone[0])


def test_another_training_in_the_same_folder_is_another_checkpoint(tmp_path):
    for name in ("config.json", "dataset_statistics.json"):
        shutil.copy(TABLETOP_POLICY / name, tmp_path)
    weights = np.random.default_rng(0).integers(256, size=300_000, dtype=np.uint8)
    (tmp_path / "model.safetensors").write_bytes(weights)
    digest = digest_checkpoint(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    assert digest_checkpoint(tmp_path) == digest
    (tmp_path / "model.safetensors").write_bytes(weights ^ 1)
    assert digest_checkpoint(tmp_path) != digest
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text("{}")
    assert digest_checkpoint(tmp_path) != digest


def test_episodes_of_other_versions_are_not_continued(suite, alone, tmp_path):
    described, rollouts = read_journal(alone[0])
    earlier = Journal(tmp_path, described | {"versions": described["versions"] | {"numpy": "1.0"}})
    for episode, rollout in rollouts.items():
        earlier.add(episode, rollout)
    with pytest.raises(ValueError, match=r"another run, which differs in versions \(numpy: 1.0 and "):
        Evaluation(suite, {"model": "wander"}, tmp_path)


def test_a_journal_that_does_not_record_all_settings_is_not_continued(tmp_path):
    Journal(tmp_path, {"model": "wander"})
    with pytest.raises(ValueError, match="an older run, which does not record device, renderer"):
        Journal(tmp_path, {"model": "wander", "device": "cuda", "renderer": "egl"})
    with pytest.raises(ValueError, match="differs in device: None and cuda, model: wander and reach"):
        Journal(tmp_path, {"model": "reach", "device": "cuda"})


@pytest.mark.parametrize("name", ["metaworld", "libero_10"])
def test_more_episodes_than_initial_states_are_refused(name):
    assert len(find_suite(name).with_protocol(episodes=50).episodes()) % 50 == 0
    with pytest.raises(ValueError, match="has 50 initial states for each task, so 51 episodes are too many"):
        find_suite(name).with_protocol(episodes=51)


def test_the_result_names_the_protocol_and_the_versions(alone):
    result = json.loads((alone[0] / "evaluation.json").read_text())
    assert result == alone[1]
    assert result["protocol"]["max_steps"] == 12
    assert result["versions"]["gymnasium"]
    row = result["results"]["as told"]["all"]
    assert row["episodes"] == EPISODES
    assert row["low"] <= row["success"] <= row["high"]


def test_the_first_failures_are_shown(alone):
    shown = sorted(path.name for path in (alone[0] / "episodes").iterdir())
    assert len([name for name in shown if name.startswith("failure-tabletop-")]) == 3


class Recorder:
    """An environment that counts its steps in its images, and keeps the actions that it gets."""

    def __init__(self, cameras=("image",), solved_after=10**9):
        self.cameras, self.solved_after = cameras, solved_after

    def reset(self, seed, options):
        self.actions = []
        return self._observe(), {"task": "count", "instruction": "count"}

    def step(self, action):
        self.actions.append(action)
        info = {"task": "count", "instruction": "count", "is_success": len(self.actions) > self.solved_after}
        return self._observe(), 0.0, False, False, info

    def close(self):
        pass

    def _observe(self):
        return {name: np.full((8, 8, 3), len(self.actions) % 256, np.uint8) for name in self.cameras}


@dataclass(frozen=True)
class RecordedSuite(TabletopSuite):
    env: Recorder = field(default_factory=Recorder)

    def make(self, environment):
        return self.env


def test_settling_actions_come_first_and_the_gripper_is_converted():
    wait = (0.0,) * 6 + (-1.0,)
    suite = RecordedSuite(**vars(tabletop_suite())).with_protocol(
        episodes=1, max_steps=3, settle_steps=2, settle_action=wait, gripper="libero", execute=2
    )
    predictions = iter([[[0.1, 1.0], [0.2, 0.2], [0.3, 1.0]], [[0.4, 0.9], [0.5, 0.9], [0.6, 0.9]]])
    with open_simulators(suite, 1, processes=False) as simulators:
        ((_, rollout),) = play(lambda seen, told: np.array([next(predictions)]), suite.episodes(), simulators)
    assert (rollout.steps, rollout.predictions) == (3, 2)
    given = [action.tolist() for action in suite.env.actions]
    assert given == [list(wait), list(wait), [0.1, -1.0], [0.2, 1.0], [0.4, -1.0]]


def test_initial_states_of_libero_are_read_without_running_code(tmp_path):
    states = np.arange(12.0).reshape(3, 4)
    path = tmp_path / "task.pruned_init"
    torch.save(states, path, pickle_protocol=2)
    np.testing.assert_array_equal(read_states(path), states)

    torch.save({"states": states, "code": os.getcwd}, path)
    with pytest.raises(ValueError, match=r"task\.pruned_init is not an array of LIBERO's initial states"):
        read_states(path)


def test_the_gripper_of_a_policy_is_converted_to_liberos():
    protocol = find_suite("libero_spatial").protocol  # the model opens with 1, LIBERO with -1
    assert protocol.execute_action(np.append(np.zeros(6), 1.0))[-1] == -1.0
    assert protocol.execute_action(np.append(np.zeros(6), 0.0))[-1] == 1.0


# Smallest and largest usual actions (q01 and q99) of LIBERO's demonstrations as OpenVLA-OFT's code reads them.
LIBERO_LOW = [-0.28, -0.39, -0.94, -0.17, -0.35, -0.36, 0.0]
LIBERO_HIGH = [0.22, 0.53, 0.94, 0.17, 0.25, 0.45, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (LIBERO_LOW[:6], LIBERO_HIGH[:6], "it takes actions of 7 dimensions, but the policy predicts 6"),
        ([*LIBERO_LOW[:6], -1.0], LIBERO_HIGH, "The policy's gripper goes from -1 to 1, but LIBERO's protocol"),
        ([*LIBERO_LOW[:6], 0.0], [*LIBERO_HIGH[:6], 0.04], "The policy's gripper goes from 0 to 0.04"),
        ([-0.03] * 3 + LIBERO_LOW[3:], [0.02] * 3 + LIBERO_HIGH[3:], "The policy's translations do not exceed 0.03"),
    ],
)
def test_libero_refuses_a_policy_for_another_robot(low, high, message):
    suite = find_suite("libero_object")
    suite.check_policy(LIBERO_LOW, LIBERO_HIGH)
    with pytest.raises(ValueError, match=message):
        suite.check_policy(low, high)


@pytest.fixture(scope="module")
def libero_policy(tmp_path_factory):
    """The folder of a tiny policy for LIBERO, without a centre crop."""
    statistics = {"q01": LIBERO_LOW, "q99": LIBERO_HIGH, "mask": [True] * 6 + [False]}
    config = tiny_config(norm_stats={"libero_object": {"action": statistics}})
    folder = tmp_path_factory.mktemp("libero")
    OpenVLAForActionPrediction(config).save_pretrained(folder)
    tiny_processor(config=config).save_pretrained(folder)
    return folder


def test_a_processor_without_a_crop_gets_that_of_the_protocol_and_another_is_refused(libero_policy, caplog):
    suite = find_suite("libero_object")
    model, processor = (one.from_pretrained(libero_policy) for one in (OpenVLAForActionPrediction, OpenVLAProcessor))

    def crop(**known):
        return model_policy(suite, model, processor, **known).processor.image_processor.center_crop_area

    assert crop() == 0.9
    assert processor.image_processor.center_crop_area is None
    assert [record.message for record in caplog.records] == [
        "The policy's processor has no centre crop, so images are cropped to 0.9 of their area, as in the protocol of "
        "LIBERO."
    ]
    assert crop(is_trained_crop=True) is None
    processor.image_processor.center_crop_area = 0.8
    with pytest.raises(ValueError, match=r"crops images to 0\.8 of their area, but the protocol of LIBERO to 0\.9"):
        crop()
    assert crop(is_trained_crop=True) == 0.8
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("is_trained_here", "crop"), [(False, 0.9), (True, None)])
def test_a_run_on_libero_records_how_the_policy_ran(
    is_trained_here, crop, libero_policy, capsys, monkeypatch, tmp_path
):
    folder = shutil.copytree(libero_policy, tmp_path / "policy")
    if is_trained_here:
        (folder / "training.json").write_text('{"arguments": {"augment": false}}')
    env = Recorder(("full_image", "wrist_image"), solved_after=10)
    monkeypatch.setattr(LiberoSuite, "check_installed", lambda suite: None)
    monkeypatch.setattr(LiberoSuite, "versions", lambda suite: {"mujoco": "3.3.0"})
    monkeypatch.setattr(LiberoSuite, "make", lambda suite, environment: env)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    command = ["evaluate", str(folder), "--suite", "libero_object", "--task", "0", "--episodes", "1", "--json"]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    told = {name: result[name] for name in ("center_crop_area", "device", "dtype", "renderer")}
    assert told == {"center_crop_area": crop, "device": "cpu", "dtype": "float32", "renderer": "egl"}
    assert result["policy_versions"].keys() == {"torch", "transformers"}
    assert len(env.actions) == 11
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert main(command) == 2
    assert "another run, which differs in renderer" in capsys.readouterr().err


def test_groups_and_tasks_of_metaworld_are_chosen_by_name():
    suite = find_suite("metaworld")
    assert len(suite.environments) == 50
    assert {name: len(suite.select([name]).environments) for name in ("easy", "medium", "hard", "very_hard")} == {
        "easy": 28,
        "medium": 11,
        "hard": 6,
        "very_hard": 5,
    }
    assert suite.select(["reach-v3", "hard", "push-v3"]).environments[0] == "reach-v3"
    with pytest.raises(ValueError, match=r"Unknown task 'push-v2'\. Did you mean 'push-v3'"):
        suite.select(["push-v2"])
    with pytest.raises(ValueError, match="MetaWorld is not this policy's robot"):
        suite.check_policy([-1.0] * 7, [1.0] * 7)
    with pytest.raises(ValueError, match="Unknown suite 'metaword'"):
        find_suite("metaword")


def test_frames_of_long_episodes_are_thinned():
    suite = RecordedSuite(**vars(tabletop_suite())).with_protocol(episodes=1, max_steps=200)
    with open_simulators(suite, 1, processes=False) as simulators:
        ((_, rollout),) = play(lambda seen, told: np.zeros((1, 7)), suite.episodes(), simulators, lambda episode: True)
    assert [frame[0, 0, 0] for frame in rollout.frames] == list(range(0, 201, 2))


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(0, 50, 0.0, 0.0713), (50, 50, 0.9287, 1.0), (485, 500, 0.9511, 0.9817), (7, 10, 0.3968, 0.8922)],
)
def test_wilsons_interval_has_its_published_bounds(successes, episodes, low, high):
    np.testing.assert_allclose(wilson(successes, episodes), (low, high), atol=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "p_value"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (2, 10, 0.038574), (10, 2, 0.038574)]
)
def test_mcnemars_test_is_exact(first, second, p_value):
    assert mcnemar(first, second) == pytest.approx(p_value, abs=1e-6)


def test_newcombes_interval_of_a_difference_contains_it_as_often_as_it_says():
    size = 30
    cells = [
        (a, b, c, size - a - b - c)
        for a in range(size + 1)
        for b in range(size + 1 - a)
        for c in range(size + 1 - a - b)
    ]
    intervals = np.array([newcombe(*cell) for cell in cells])
    ways = [math.factorial(size) / math.prod(map(math.factorial, cell)) for cell in cells]
    for shares in ((0.5, 0.2, 0.1, 0.2), (0.25, 0.25, 0.25, 0.25), (0.6, 0.02, 0.3, 0.08), (0.1, 0.05, 0.05, 0.8)):
        chances = ways * np.prod(np.power(shares, cells), axis=1)
        difference = shares[2] - shares[1]
        contains = (intervals[:, 0] <= difference) & (difference <= intervals[:, 1])
        assert chances.sum() == pytest.approx(1.0)
        assert 0.93 < chances[contains].sum() < 0.975


def test_newcombes_interval_of_a_difference_is_right_at_its_limits():
    low, high = newcombe(181, 9, 6, 4)
    assert newcombe(181, 6, 9, 4) == pytest.approx((-high, -low))
    assert newcombe(10, 0, 0, 0)[0] == pytest.approx(wilson(10, 10)[0] - 1)
    low, high = newcombe(0, 0, 50, 0)
    assert 0.85 < low < wilson(50, 50)[0]
    assert high == 1


def test_policies_are_compared_on_the_same_episodes(suite, alone, tmp_path, capsys):
    journal = Journal(tmp_path, read_journal(alone[0])[0] | {"model": "better"})
    for episode, rollout in read_journal(alone[0])[1].items():
        rollout.success = True
        journal.add(episode, rollout)
    names, results = compare_runs(alone[0], tmp_path)
    assert names == ("wander", "better")
    assert results["all"].only_second == EPISODES - results["all"].both
    assert results["all"].difference == results["all"].only_second / EPISODES
    assert results["all"].low < results["all"].difference <= results["all"].high
    assert main(["evaluate", "--compare", str(alone[0]), str(tmp_path)]) == 0
    assert "wander (A) and better (B)" in capsys.readouterr().out
    assert main(["evaluate", "--compare", str(alone[0]), str(tmp_path / "nowhere")]) == 2
    assert "has no episodes.jsonl" in capsys.readouterr().err
    rollouts = read_journal(alone[0])[1]
    with pytest.raises(ValueError, match=r"^1 episode is in only one"):
        compare_results(rollouts, {**rollouts, Episode("tabletop", 1): Rollout(1, "put", "put it")})


def test_evaluations_under_other_protocols_are_not_compared(suite, alone, tmp_path):
    run(suite.with_protocol(max_steps=2), 4, folder=tmp_path)
    with pytest.raises(ValueError, match="differ in protocol"):
        compare_runs(alone[0], tmp_path)


def test_evaluations_of_other_episodes_or_versions_are_not_compared(alone, tmp_path):
    described, rollouts = read_journal(alone[0])
    Journal(tmp_path / "newer", described | {"versions": described["versions"] | {"numpy": "9.0"}})
    with pytest.raises(ValueError, match=r"differ in versions \(numpy: [\d.]+ and 9\.0\)"):
        compare_runs(alone[0], tmp_path / "newer")
    journal = Journal(tmp_path / "told", described)
    for episode, rollout in rollouts.items():
        journal.add(episode, replace(rollout, instruction="wait"))
    with pytest.raises(ValueError, match=r"^Episode 1000000 of tabletop has .* instruction 'wait' in "):
        compare_runs(alone[0], tmp_path / "told")


def test_a_damaged_journal_names_its_file(alone, tmp_path):
    lines = (alone[0] / JOURNAL_FILE).read_text().splitlines()
    (tmp_path / JOURNAL_FILE).write_text("\n".join([lines[0], "{broken}", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / JOURNAL_FILE} is damaged")):
        read_journal(tmp_path)


@pytest.mark.slow
def test_evaluate_plays_a_suite_and_a_second_run_has_nothing_left_to_play(capsys, tmp_path):
    command = ["evaluate", "--suite", "tabletop", "--episodes", "2", "--output", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["suite"] == result["environment"] == "tabletop"
    assert result["checkpoint"] == digest_checkpoint(TABLETOP_POLICY)
    assert result["policy_versions"]["torch"]
    assert result["results"]["as told"]["all"]["episodes"] == 2
    before = os.stat(tmp_path / "out" / JOURNAL_FILE).st_mtime_ns
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert os.stat(tmp_path / "out" / JOURNAL_FILE).st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--suite metaworld --condition black", "--condition is for the tabletop."),
        ("--suite tabletop --data there", "--suite is for the tabletop: leave out --data."),
        ("--suite nowhere", "Unknown suite 'nowhere'"),
        ("--output there", "--output is for a suite: give --suite."),
        ("--envs 2", "--envs is for a suite: give --suite."),
        ("--suite metaworld", "MetaWorld is not this policy's robot"),
    ],
)
def test_options_that_do_not_go_with_a_suite_are_refused(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MetaWorldSuite, "check_installed", lambda suite: None)
    assert main(["evaluate", *options.split()]) == 2
    assert message in capsys.readouterr().err


WITHOUT = """
import sys
from openvla_hf.cli import main
for package, suite in (("metaworld", "metaworld"), ("libero", "libero_10")):
    sys.modules[package] = None
    print(main(["evaluate", "--suite", suite, "--model", sys.argv[1]]))
"""


def test_a_suite_without_its_package_says_how_to_install_it_before_it_reads_the_policy(run_python, tmp_path):
    (tmp_path / "config.json").write_text("damaged")
    result = run_python(WITHOUT, tmp_path)
    assert result.stdout.split() == ["2", "2"]
    metaworld, libero = result.stderr.splitlines()
    assert metaworld == 'openvla-hf: MetaWorld is not installed: run `pip install "openvla-hf[metaworld]"`.'
    assert libero.startswith('openvla-hf: LIBERO is not installed: run `pip install "openvla-hf[libero]"`')


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [("hf-libero", {"hf-libero": "0.3"}), ("libero-plus", {"libero-plus": "0.3"}), (None, {"libero": "unknown"})],
)
def test_the_result_names_the_version_of_libero_however_it_was_installed(
    distribution, expected, monkeypatch, tmp_path
):
    for name in filter(None, ("robosuite", "mujoco", distribution)):
        folder = tmp_path / f"{name.replace('-', '_')}-0.3.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n")
        (folder / "top_level.txt").write_text("libero\n" if name == distribution else f"{name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(LiberoSuite, "check_installed", lambda suite: None)
    versions = find_suite("libero_goal").versions()
    assert {name: version for name, version in versions.items() if "libero" in name} == expected
    assert versions["robosuite"] == "0.3"


@pytest.mark.parametrize(
    ("options", "seeds"),
    [
        ("--task put --episodes 3 --first-seed 999998", "1000000 to 1000000"),
        ("--task put --episodes 1 --first-seed 999999", None),
        ("--suite metaworld --task reach-v3 --episodes 9 --first-seed 45", "45 to 49"),
        ("--suite metaworld --task reach-v3 --episodes 1", None),
    ],
)
def test_recording_warns_of_the_seeds_of_the_evaluation(options, seeds, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr("openvla_hf.data.write_lerobot", lambda episodes, destination, **settings: destination)
    assert main(["record", str(tmp_path / "demos"), *options.split()]) == 0
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == (seeds is not None)
    assert all(one.startswith(f"Seeds {seeds} belong") for one in warnings)
