import json

import numpy as np
import pytest
from running import random_weights

from openvla_hf.checkpoints.identity import digest_checkpoint
from openvla_hf.cli import main
from openvla_hf.evaluation.suites import find_suite
from openvla_hf.serving import Client
from openvla_hf.serving.episodes import check_server, play_served, run_served_episodes
from openvla_hf.serving.policy import ServedPolicy
from openvla_hf.suites.journal import JOURNAL_FILE
from openvla_hf.suites.metaworld import ACTION_NAMES
from openvla_hf.suites.play import play
from openvla_hf.suites.policies import model_policy
from openvla_hf.suites.simulator import open_simulators
from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED, TABLETOP_POLICY, load_policy, run_episodes
from openvla_hf.testing import tiny_config, tiny_processor


SEEDS = [FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + 2, FIRST_UNSEEN_SEED + 5]  # short episodes
LONG_SEED, LONG_STEPS = FIRST_UNSEEN_SEED + 3, 37


@pytest.fixture(scope="module")
def tabletop_policy():
    return ServedPolicy.load(str(TABLETOP_POLICY))


@pytest.fixture(scope="module")
def tabletop_server(serve, tabletop_policy):
    with serve(tabletop_policy, token="secret") as url:
        yield url


def outcome(episodes):
    return {one.seed: (one.task, one.instruction, one.success, one.moved_target, one.steps) for one in episodes}


def test_a_server_plays_the_same_episodes_as_its_policy_in_this_process(tabletop_server, tabletop_policy):
    here = run_episodes(load_policy(tabletop_policy.model, tabletop_policy.processor), SEEDS)
    with Client(tabletop_server, "secret") as client:
        there = list(run_served_episodes(client, SEEDS))
    assert sorted(one.seed for one in there) == list(SEEDS)
    assert outcome(there) == outcome(here)
    assert any(one.success for one in there)


def test_an_episode_of_metaworld_is_the_same_here_and_over_a_server_in_one_or_four_environments(metaworld, serve):
    suite = find_suite("metaworld").select(["drawer-open-v3"]).with_protocol(episodes=4, max_steps=8)
    ones = [1.0] * len(ACTION_NAMES)
    statistics = {"q01": [-one for one in ones], "q99": ones, "mask": [True] * len(ones)}
    config = tiny_config(norm_stats={"metaworld": {"action": statistics}})
    policy = ServedPolicy(random_weights(config), tiny_processor(config=config), "tiny/metaworld")

    def frames(environments, client=None):
        """Play four episodes, and return the images of each."""
        with open_simulators(suite, environments, processes=False) as simulators:
            if client is None:
                acting = model_policy(suite, policy.model, policy.processor)
                played = list(play(acting, suite.episodes(), simulators, lambda episode: True))
            else:
                played = list(
                    play_served(client, suite, suite.episodes(), simulators, keep_frames=lambda episode: True)
                )
        return {episode.seed: np.stack(rollout.frames).tobytes() for episode, rollout in played}

    alone = frames(1)
    assert len(set(alone.values())) == 4
    assert frames(4) == alone
    with serve(policy) as url, Client(url) as client:
        assert frames(1, client) == alone
        assert frames(4, client) == alone


def test_episodes_that_nobody_waits_for_end_early(tabletop_server):
    with Client(tabletop_server, "secret") as client:
        running = run_served_episodes(client, [SEEDS[0], LONG_SEED])
        first = next(running)
        running.close()
        assert client.round_trip.count < first.steps + LONG_STEPS


def test_evaluate_reports_the_success_of_a_server(tabletop_server, monkeypatch, capsys, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    command = ["evaluate", "--server", tabletop_server, "--condition", "swapped", "--episodes", "1"]
    assert main([*command, "--token-file", str(tmp_path / "token"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == TABLETOP_POLICY.name
    assert report["results"]["swapped"]["all"]["episodes"] == 1
    assert 0 < report["round_trip"]["median"] <= report["round_trip"]["longest"]
    monkeypatch.delenv("OPENVLA_HF_SERVER_TOKEN", raising=False)
    assert main(command) == 2
    assert "needs a token" in capsys.readouterr().err


def test_the_result_of_a_suite_says_how_the_server_acted(tabletop_server, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OPENVLA_HF_SERVER_TOKEN", "secret")
    command = ["evaluate", "--suite", "tabletop", "--episodes", "1", "--output", str(tmp_path), "--json"]
    assert main([*command, "--server", tabletop_server]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["server"]["default_unnorm_key"] == "tabletop"
    assert report["server"].keys() >= {"action_horizon", "temporal_ensemble", "gripper", "revision"}
    assert [report["server"][name] for name in ("engine", "device", "dtype")] == ["transformers", "cpu", "float32"]
    assert report["server"]["server_version"] == report["versions"]["openvla-hf"]
    assert report["center_crop_area"] is None
    assert report["checkpoint"] == digest_checkpoint(TABLETOP_POLICY)
    journal = tmp_path / JOURNAL_FILE
    journal.write_text(journal.read_text().replace(report["checkpoint"], "0" * 16))
    assert main([*command, "--server", tabletop_server]) == 2
    assert "another run, which differs in checkpoint" in capsys.readouterr().err
    journal.write_text(journal.read_text().replace("0" * 16, report["checkpoint"]).replace("float32", "bfloat16"))
    assert main([*command, "--server", tabletop_server]) == 2
    assert "another run, which differs in server (dtype: bfloat16 and float32)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model lab/model", "--model belongs to the policy: give it to `openvla-hf serve`."),
        ("--execute 2", "--execute belongs to the policy: give it to `openvla-hf serve`."),
        ("--data there", "--server is for the tabletop: leave out --data."),
        ("--frames 3", "--frames is for recorded data: give --data."),
    ],
)
def test_options_that_do_not_go_with_a_server_are_refused(options, message, capsys):
    assert main(["evaluate", "--server", "http://127.0.0.1:1", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_token_without_a_server_is_refused(tmp_path, capsys):
    (tmp_path / "token").write_text("secret\n")
    assert main(["evaluate", "--token-file", str(tmp_path / "token")]) == 2
    assert "--token-file is for a served policy: give --server." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"default_unnorm_key": None},
            "The server has no default statistics: give `unnorm_key=` with one of 'tabletop'",
        ),
        ({"unnorm_key": "bridge"}, "The server has no statistics 'bridge'"),
        (
            {"gripper": {"convention": "libero", "open": -1.0, "closed": 1.0}},
            "opens the gripper with -1 and closes it with 1",
        ),
        (
            {"cameras": [{"name": "cam_high"}]},
            "sees the cameras 'cam_high', but the tabletop's cameras are 'image', 'wrist'",
        ),
        ({"state_dim": 8}, "a state of 8 dimensions, but that of the tabletop has 4"),
        ({"action_bounds": {"tabletop": {"low": [-1.0] * 7, "high": [1.0] * 7}}}, "not this policy's robot"),
    ],
)
def test_a_server_for_another_robot_is_refused(tabletop_policy, changes, message):
    info = {**tabletop_policy.describe(), **changes}
    with pytest.raises(ValueError, match=message):
        check_server(info, changes.get("unnorm_key"))


def test_a_server_without_a_crop_plays_libero_only_with_a_policy_that_was_trained_without_one(tabletop_policy):
    bounds = {"tabletop": {"low": [-0.9] * 6 + [0.0], "high": [0.9] * 6 + [1.0]}}
    info = {**tabletop_policy.describe(), "action_bounds": bounds, "state_dim": None}
    suite = find_suite("libero_object")
    assert info["training_recorded"]
    check_server(info, suite=suite)
    info["training_recorded"] = False
    earlier = {name: value for name, value in info.items() if name != "training_recorded"}
    for described in (info, earlier):
        with pytest.raises(ValueError, match=r"crops images to 0\.9 of their area, but the server does not"):
            check_server(described, suite=suite)
    cropped = [{**info, "cameras": [{**info["cameras"][0], "center_crop_area": area}]} for area in (0.9, 0.8)]
    check_server(cropped[0], suite=suite)
    with pytest.raises(ValueError, match=r"crops images to 0\.9"):
        check_server(cropped[1], suite=suite)
