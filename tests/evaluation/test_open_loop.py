import json

import numpy as np
import pytest

from openvla_hf.cli import main
from openvla_hf.data import Gripper, Robot, from_episodes, load, robots, write_lerobot
from openvla_hf.data.splits import describe_split, held_out_frames, read_split, sample_episodes, sample_frames
from openvla_hf.evaluation.open_loop import evaluate_open_loop, load_options, open_loop_table
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode


ARM = Robot("arm", gripper=Gripper(), frequency=5.0)


def recorded(episodes=2, steps=6, robot=ARM):
    return from_episodes([fake_episode(seed=seed, steps=steps) for seed in range(episodes)], robot, name="arm")


def predict(model, processor, frame, key="tiny"):
    return model.predict_action(**processor(frame["image"], instruction=frame["instruction"]), unnorm_key=key)


def test_errors_are_in_the_robots_units_for_each_dimension(tiny):
    model, processor = tiny()
    frames = recorded()
    done = []
    report = evaluate_open_loop(model, processor, frames, batch_size=5, progress=lambda *at: done.append(at))
    predicted = np.stack([predict(model, processor, frame) for frame in frames])
    actual = np.stack([frame["action"] for frame in frames])
    np.testing.assert_allclose(report.mean_absolute_error, np.abs(predicted - actual).mean(0), atol=1e-9)
    agreement = ((predicted[:, 6] > 0.5) == (actual[:, 6] > 0.5)).mean()
    assert report.gripper_agreement == pytest.approx(agreement)
    assert (report.dataset, report.episodes, report.frames) == ("arm", 2, 12)
    assert done == [(5, 12), (10, 12), (12, 12)]
    assert open_loop_table("arm", report, list("abcdefg")).row_count == 2 + 7 + 2


def test_a_policy_that_acts_as_recorded_is_perfect(tiny):
    model, processor = tiny()
    rows = [dict(frame) for frame in recorded()]
    own = [[{**row, "action": predict(model, processor, row)} for row in rows]]
    # The gripper's token stands for a number slightly different from 0 or 1.
    perfect = evaluate_open_loop(model, processor, from_episodes(own, Robot("arm"), name="own"))
    assert perfect.token_accuracy > 0.9
    assert perfect.l1 < 0.01
    assert max(perfect.mean_absolute_error) < 1e-6
    assert perfect.gripper_agreement is None
    far = evaluate_open_loop(model, processor, recorded())
    assert far.token_accuracy < perfect.token_accuracy
    assert far.l1 > perfect.l1


def test_the_statistics_of_the_data_are_taken_where_the_policy_knows_several(tiny):
    stats = {"q01": [0.0] * 7, "q99": [9.0] * 7, "min": [0.0] * 7, "max": [9.0] * 7, "mask": [True] * 7}
    norm_stats = {"tiny": {"action": BRIDGE_LIKE_STATS}, "arm": {"action": BRIDGE_LIKE_STATS | stats}}
    model, processor = tiny(norm_stats=norm_stats)
    frames = recorded(episodes=1, steps=2)
    by_name = evaluate_open_loop(model, processor, frames)
    assert by_name == evaluate_open_loop(model, processor, frames, "arm")
    assert by_name != evaluate_open_loop(model, processor, frames, "tiny")


def test_the_data_of_another_robot_are_refused(tiny):
    model, processor = tiny(norm_stats={"two": {"action": {name: v[:2] for name, v in BRIDGE_LIKE_STATS.items()}}})
    with pytest.raises(ValueError, match="arm has actions of 7 dimensions, but the policy's have 2"):
        evaluate_open_loop(model, processor, recorded())


def test_the_command_names_dimensions_as_the_data_do(tiny, tmp_path, capsys):
    model, processor = tiny()
    model.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    joints = [f"joint{index}" for index in range(7)]
    write_lerobot([fake_episode(seed=seed, steps=3) for seed in range(2)], tmp_path / "arm", action_names=joints)
    command = ["evaluate", "--model", str(tmp_path / "policy"), "--data", str(tmp_path / "arm"), "--split", "train"]
    assert main([*command, "--episodes", "1", "--frames", "2"]) == 0
    printed = capsys.readouterr().out
    assert "policy on arm (train)" in printed
    assert all(f"mean absolute error, {name}" in printed for name in joints)
    assert main([*command[:-2]]) == 2
    assert "has no record of held-out episodes" in capsys.readouterr().err


@pytest.fixture
def two_cameras(tiny, tmp_path):
    """A policy that predicts chunks from two cameras and the state, and a recording for it."""
    proprio = {"q01": [-1.0, -1.0], "q99": [1.0, 1.0]}
    fields = {"action_decoding": "parallel", "action_head": "l1", "action_horizon": 3, "action_dim": 7}
    model, processor = tiny(
        **fields,
        num_images=2,
        proprio_dim=2,
        norm_stats={"tiny": {"action": BRIDGE_LIKE_STATS, "proprio": proprio}},
    )
    processor.cameras = ["front", "wrist"]
    for one in (model, processor):
        one.save_pretrained(tmp_path / "policy")
    episodes = [fake_episode(seed=seed, steps=5) for seed in range(2)]
    for frame in (frame for episode in episodes for frame in episode):
        image = np.kron(frame.pop("image"), np.ones((2, 2, 1), np.uint8))
        frame |= {"images": {"wrist": image[::-1], "front": image}, "state": np.array([0.1, -0.2])}
    return model, processor, write_lerobot(episodes, tmp_path / "arm")


def test_chunks_are_compared_as_far_as_they_are_recorded(two_cameras):
    model, processor, data = two_cameras
    options = {"cameras": ["front", "wrist"], "state": True}
    for chunk, horizon in ((1, 1), (2, 2), (3, 3), (4, 3)):
        frames = load(data, chunk=chunk, **options)
        errors = []
        for frame in frames:
            inputs = processor(frame["images"], instruction=frame["instruction"], state=frame["state"])
            recorded = frame["actions"] if chunk > 1 else frame["action"][None]
            errors.append(np.abs(model.predict_action(**inputs)[:horizon] - recorded[:horizon]))
        report = evaluate_open_loop(model, processor, frames)
        np.testing.assert_allclose(report.mean_absolute_error, np.concatenate(errors).mean(0), atol=1e-6)


def test_repetitions_after_the_end_of_an_episode_are_not_compared(two_cameras):
    model, processor, data = two_cameras
    frames = load(data, **load_options(model, processor))
    assert len(frames) == 10
    pairs = []
    for frame in frames:
        inputs = processor(frame["images"], instruction=frame["instruction"], state=frame["state"])
        predicted = model.predict_action(**inputs)[frame["chunk_mask"]]
        pairs.append((predicted, frame["actions"][frame["chunk_mask"]]))
    predicted, actual = (np.concatenate(values) for values in zip(*pairs, strict=True))
    assert len(actual) == 2 * (3 + 3 + 3 + 2 + 1)
    report = evaluate_open_loop(model, processor, frames)
    np.testing.assert_allclose(report.mean_absolute_error, np.abs(predicted - actual).mean(0), atol=1e-6)


def test_frames_without_what_the_policy_sees_are_refused(two_cameras, tiny):
    model, processor, data = two_cameras
    with pytest.raises(ValueError, match=r"image of one camera, but .* with cameras=\['front', 'wrist'\]"):
        evaluate_open_loop(model, processor, load(data, camera="observation.images.front"))
    episode = [
        {**frame, "images": {"front": frame["image"], "wrist": frame["image"]}} for frame in fake_episode(steps=3)
    ]
    options = {"cameras": ["front", "wrist"]}
    for frame, state in zip(episode, ([0.1, 0.2], [0.1, np.nan], [0.1, 0.2]), strict=True):
        frame["state"] = np.array(state)
    with pytest.raises(ValueError, match="frames without a state, but the policy needs one of 2 numbers"):
        evaluate_open_loop(model, processor, from_episodes([episode], **options))
    for frame in episode:
        frame["state"] = np.zeros(3)
    with pytest.raises(ValueError, match="has states of 3 numbers, but the policy needs 2"):
        evaluate_open_loop(model, processor, from_episodes([episode], **options))
    assert load_options(*tiny()) == {}


def test_the_command_reads_what_a_policy_without_a_record_sees(two_cameras, capsys):
    model, processor, data = two_cameras
    command = ["evaluate", "--model", str(data.parent / "policy"), "--data", str(data), "--split", "train", "--json"]
    told = []
    for cameras in ([], ["--cameras", "front", "wrist"]):
        assert main([*command, *cameras]) == 0
        told.append(json.loads(capsys.readouterr().out))
    report = evaluate_open_loop(model, processor, load(data, **load_options(model, processor)))
    assert told[0] == told[1]
    assert told[0]["frames"] == 10
    assert told[0]["l1"] == pytest.approx(report.l1)
    assert main([*command, "--camera", "observation.images.front"]) == 2
    assert "have the image of one camera, but the policy sees several" in capsys.readouterr().err


def test_the_doctor_reads_the_cameras_and_the_state_that_a_policy_sees(two_cameras, capsys):
    model, processor, data = two_cameras
    policy = str(data.parent / "policy")
    command = ["doctor", str(data), "--model", policy, "--json"]
    told = []
    for cameras in ([], ["--cameras", "front", "wrist", "--state"]):
        assert main([*command, *cameras]) == 0
        told.append(json.loads(capsys.readouterr().out)["model"])
    report = evaluate_open_loop(model, processor, load(data, cameras=["front", "wrist"], state=True))
    assert told[0] == told[1]
    assert told[0]["l1"] == pytest.approx(report.l1)
    assert main([*command, "--camera", "observation.images.front"]) == 2
    assert "camera" in capsys.readouterr().err


def places(frames):
    return list(zip(frames.with_format(None)["episode_index"], frames.with_format(None)["frame_index"], strict=True))


def test_a_sample_is_fixed_by_its_seed_and_spread_over_the_episodes():
    frames = recorded(episodes=10, steps=7)
    sample = sample_frames(frames, 20, seed=3)
    assert len(sample) == len(set(places(sample))) == 20
    assert {episode for episode, _ in places(sample)} == set(range(10))
    assert len({index for _, index in places(sample)}) > 3, "always the same moment of an episode"
    assert places(sample) == places(sample_frames(frames, 20, seed=3))
    assert places(sample) != places(sample_frames(frames, 20, seed=4))
    assert places(sample_frames(frames, 1000)) == places(frames)
    some = places(sample_episodes(frames, 3, seed=1))
    assert len({episode for episode, _ in some}) == 3
    assert len(some) == 21
    assert some == places(sample_episodes(frames, 3, seed=1))


def test_the_episodes_held_out_are_found_again_in_the_same_data_alone():
    frames = recorded(episodes=10, steps=3)
    _, held_out = read_split(frames, 0.3, seed=5)
    split = describe_split(frames, held_out)
    assert split == {"arm": {"episodes": sorted({episode for episode, _ in places(held_out)}), "frames": 30}}
    assert places(held_out_frames(frames, split)) == places(held_out)
    with pytest.raises(ValueError, match=r"arm has 33 frames, but had 30 in training.*chunk, chunk_end and state\."):
        held_out_frames(recorded(episodes=11, steps=3), split)
    with pytest.raises(ValueError, match="Training held out no episodes of 'arm'"):
        held_out_frames(frames, {"other": split["arm"]})


def write_robots(folder, closed):
    file = folder / "robots.py"
    file.write_text(
        "from openvla_hf.data import Gripper, Robot, register_robot\n"
        f"register_robot(Robot('arm', gripper=Gripper(open=0, closed={closed}), space='end_effector_delta'))\n"
    )
    return ["--robots", str(file)]


def test_only_the_adapter_of_the_training_reads_the_data_for_the_evaluation(tiny, tmp_path, capsys, monkeypatch):
    registered = dict(robots._REGISTRY)
    monkeypatch.setattr(robots, "_REGISTRY", registered)
    model, processor = tiny()
    model.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    write_lerobot([fake_episode(seed=seed, steps=3) for seed in range(3)], tmp_path / "arm")
    data = ["--data", str(tmp_path / "arm")]
    train = ["finetune", "--model", str(tmp_path / "policy"), *data, "--eval-share", "0.3", "--workers", "0"]
    small = ["--steps", "1", "--set", "batch_size=2", "lora_rank=2", "dtype=float32"]
    assert main([*train, "--output", str(tmp_path / "out"), *write_robots(tmp_path, closed=1), *small]) == 0
    evaluate = ["evaluate", "--model", str(tmp_path / "out"), *data]
    assert main([*evaluate, "--json"]) == 0
    del registered["arm"]
    capsys.readouterr()
    assert main(evaluate) == 2
    assert "the robot 'arm', which is not registered. Pass the Python file" in capsys.readouterr().err
    assert main([*evaluate, *write_robots(tmp_path, closed=2)]) == 2
    printed = capsys.readouterr().err
    assert "another robot 'arm', which differs in gripper. Pass" in printed
    assert "as --robots." in printed
    assert main([*evaluate, *write_robots(tmp_path, closed=1), "--json"]) == 0
    assert main([*evaluate, "--robot", "generic", "--split", "train", "--json"]) == 0
