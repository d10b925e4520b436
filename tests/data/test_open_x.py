import functools
import itertools
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from openvla_hf.cli.common import register_robots
from openvla_hf.data import MIXTURES, Robot, load, write_rlds
from openvla_hf.data.open_x import add_table, dataset_robot, find_row, known_table, standardize
from openvla_hf.data.open_x.primitives import follow_commands, quaternion_to_euler, settle_gripper
from openvla_hf.data.open_x.steps import parse_step, parse_value, select_steps
from openvla_hf.data.robots import BRIDGE, LIBERO, describe_robot, find_robot, require_same_robot
from openvla_hf.data.whole_statistics import whole_statistics
from openvla_hf.evaluation.doctor import examine, report_tables


REFUSED = {"berkeley_mvp_converted_externally_to_rlds", "berkeley_rpt_converted_externally_to_rlds", "roboset"}
WITHOUT_CAMERAS = {"ppgm", "ppgm_static", "ppgm_wrist"}
OWN = """
[transforms]
inverted = ["action = action[:6], action[-1:] | invert"]

[datasets.own_arm]
transform = "inverted"
cameras = { full_image = "image" }
state = "observation.state[:6], zeros(1), observation.state[-1:]"
frequency = 10

[mixtures.kitchens]
own_arm = 1.0
bridge_orig = 0.5
"""


@pytest.fixture
def own_table(tmp_path):
    """A file of one's own. What a test adds of it is forgotten afterwards."""
    table = known_table()
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    yield path
    table.datasets.pop("own_arm", None)
    table.mixtures.pop("kitchens", None)


def test_the_table_has_every_dataset_transform_and_mixture():
    table = known_table()
    assert len(table.datasets.keys() - WITHOUT_CAMERAS) == 75
    # A dataset is also a mixture of itself, which the table does not repeat.
    assert len({row.transform for row in table.datasets.values()}) > 40
    assert {len(table.mixtures[name]) for name in ("bridge", "oxe_magic_soup", "rtx_franka")} == {1, 23, 24}
    used = {dataset for mixture in table.mixtures.values() for dataset in mixture}
    assert used <= table.datasets.keys()
    assert MIXTURES is table.mixtures


def test_every_dataset_that_can_be_trained_on_has_a_robot():
    names = known_table().datasets.keys() - REFUSED - WITHOUT_CAMERAS
    for name in names:
        robot = find_robot(name)
        assert pickle.loads(pickle.dumps(robot)) == robot
        assert robot.camera
        assert robot.action
    assert dataset_robot("aloha1_fold_shirt_30_demos").mask(14) == [True] * 14
    assert dataset_robot("kuka").mask(7) == [True] * 6 + [False]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_joint_positions_are_refused_by_name(name, episodes, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}' can't be trained on: its actions are the joint positions"):
        find_robot(name)
    write_rlds(episodes[:1], tmp_path / name)
    with pytest.raises(ValueError, match="joint positions"):
        load(tmp_path / name)


def test_robots_that_were_known_before_stay_as_they_are():
    assert find_robot("bridge_orig") is BRIDGE
    assert find_robot("libero_spatial_no_noops") == replace(LIBERO, name="libero_spatial_no_noops")


def test_a_moving_gripper_takes_the_end_that_it_reaches_next():
    openings = np.array([0.5, 0.96, 0.5, 0.04, 0.95, 0.05], np.float32)
    assert settle_gripper(openings).tolist() == [1, 1, 0, 0, np.float32(0.05), np.float32(0.05)]
    assert settle_gripper(openings[:, None]).shape == (6, 1)


def test_a_commanded_gripper_keeps_the_state_of_its_last_command():
    assert follow_commands(np.array([0, 0.1, 0.2, 0, -1, 0], np.float32)).tolist() == [1, 1, 0, 0, 1, 1]
    assert follow_commands(np.array([0, -1], np.float32)).tolist() == [0, 1]
    assert follow_commands(np.zeros(2, np.float32)).tolist() == [1, 1]
    assert follow_commands(np.zeros(0, np.float32)).tolist() == []


def test_quaternions_become_euler_angles_also_at_the_pole():
    half = np.float32(np.sqrt(0.5))
    angles = quaternion_to_euler(np.array([[0, 0, 0, 1], [half, 0, 0, half], [0, half, 0, half]], np.float32))
    assert np.abs(angles - [[0, 0, 0], [np.pi / 2, 0, 0], [0, np.pi / 2, 0]]).max() < 1e-3


def test_a_field_moves_and_a_column_of_it_is_taken():
    image = {"image_with_depth": np.zeros((2, 4, 4, 1)), "robot_state": np.zeros((2, 15), np.float32)}
    action = {name: np.zeros((2, 3), np.float32) for name in ("world_vector", "rotation_delta")}
    action["gripper_closedness_action"] = np.zeros(2, np.float32)
    image["natural_language_instruction"] = np.array([b"go", b"go"], object)
    found = standardize("berkeley_autolab_ur5", {"observation": image, "action": action})
    assert found["observation"]["depth"].shape == (2, 4, 4, 1)
    assert "image_with_depth" not in found["observation"]
    assert found["action"].shape == (2, 7)


def test_only_the_steps_that_are_wanted_read_fields():
    steps, fields = select_steps(find_row("berkeley_autolab_ur5").steps, {"action"})
    assert len(steps) == 1
    assert fields == {"action.world_vector", "action.rotation_delta", "action.gripper_closedness_action"}


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"no field 'action\.world_vector'"):
        standardize("toto", {"action": {}})
    with pytest.raises(ValueError, match=r"no dataset 'totto'\. Did you mean 'toto'"):
        standardize("totto", {})


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_step, "action[:6]", "is not a step of a transform"),
        (parse_step, "drop_first x", "is not a step of a transform"),
        (parse_step, "action = action[:6, 0]", "is not a field"),
        (parse_step, "action = action | klip", "Did you mean 'clip'"),
        (parse_value, "zeros(8)", "only constants"),
        (parse_value, "action | clip(7)", "'clip' takes no number"),
        (parse_value, "action | decompress", r"'decompress' needs the number of columns, as in 'decompress\(7\)'"),
    ],
)
def test_what_is_not_in_the_notation_is_told(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[dataset.arm]\ncameras = {}", "Unknown section in .*Did you mean 'datasets'"),
        ("[datasets.arm]\ncamera = 'image'", r"\[datasets.arm\]: Unknown entry 'camera'. Did you mean 'cameras'"),
        ("[datasets.arm]\ntransform = 'droid_fine'", "Unknown transform 'droid_fine'"),
        ("[datasets.arm]\naction_encoding = 'EEF'", "Unknown action_encoding 'EEF'"),
        ("[datasets]\narm = 3", r"\[datasets.arm\]: 3 is not a row. Write the entries"),
        ("[datasets.arm]\ncameras = 'image'", r"\[datasets.arm\]: cameras is 'image'. Give names and fields"),
        ("[datasets.arm]\nstate = 3", r"\[datasets.arm\]: state is 3. Give a text"),
        ("[datasets.arm]\ntransform = [3]", r"\[datasets.arm\]: The transform is \[3\]. Give a list of steps"),
        ("[datasets.arm]\ncheck_gripper = 1", r"\[datasets.arm\]: check_gripper is 1. Give true or false"),
        ("[datasets.arm]\nfrequency = true", r"\[datasets.arm\]: frequency is True. Give a number"),
        ("[mixtures.soup]\nbridge_orig = 0", "weight 0. Give a number above 0"),
        ("[mixtures", "not valid TOML"),
    ],
)
def test_a_wrong_table_of_one_s_own_is_told(content, message, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        add_table(path)


def test_a_file_of_one_s_own_adds_a_dataset_that_loads_by_its_name(own_table, episodes, tmp_path):
    write_rlds(episodes, tmp_path / "own_arm")
    with pytest.raises(ValueError, match="Unknown robot 'own_arm'"):
        find_robot("own_arm")
    arguments = type("Arguments", (), {"robots": str(own_table), "robot": "own_arm"})
    register_robots(arguments)
    frames = load(tmp_path / "own_arm", state=True)
    recorded = np.array([frame["action"] for episode in episodes for frame in episode])
    actions = np.array(frames["action"][:])
    assert np.array_equal(actions[:, :6], recorded[:, :6])
    assert np.array_equal(actions[:, 6], 1 - recorded[:, 6])
    assert np.array(frames["state"][:])[:, 6].tolist() == [0.0] * len(frames)
    assert MIXTURES["kitchens"] == {"own_arm": 1.0, "bridge_orig": 0.5}

    report, _ = examine(tmp_path / "own_arm")
    assert report.table_row == f"[datasets.own_arm] in {own_table}"
    assert report.table_row in report_tables(report, list("abcdefg"))[0].title
    description = describe_robot(find_robot("own_arm"))
    require_same_robot("own_arm", description)
    with pytest.raises(ValueError, match="differs in row"):
        require_same_robot("own_arm", description | {"row": ""})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("action[:6], action[7]", r"'action' has 7 columns, so it has no column \[7\]"),
        ("action[-1]", "the action from 'action' has 1 dimension after the transform, but the row's action_encod"),
        ("action[:6]", r"the action from 'action' has 6 dimensions .* 'EEF_POS' has 7\. Complete the transform, or"),
        ("action[:3], action[3:6] | quaternion_to_euler, action[6]", "a quaternion has 4 columns"),
        ("action[:6], is_first[:1]", None),
    ],
)
def test_a_value_that_does_not_fit_the_episode_is_told_with_the_record(value, message, own_table, episodes, tmp_path):
    own_table.write_text(OWN.replace('"inverted"', f'["action = {value}"]'))
    add_table(own_table)
    write_rlds(episodes[:1], tmp_path / "own_arm")
    if message is None:
        assert len(load(tmp_path / "own_arm")[0]["action"]) == 7
        return
    with pytest.raises(ValueError, match=rf"record 0, read by \[datasets\.own_arm\] in {own_table}: {message}"):
        load(tmp_path / "own_arm")


def add_row(path, **entries):
    """Write a table with a row `own_arm` for data in the standard form, and add it."""
    row = {"cameras": {"full_image": "image"}, **entries}
    path.write_text("[datasets.own_arm]\n" + "\n".join(f"{name} = {write_value(each)}" for name, each in row.items()))
    add_table(path)


def write_value(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {json.dumps(each)}" for name, each in value.items()) + " }"
    return json.dumps(value)


OBSERVED = "observation.position = observation.state[:3]"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"cameras": {"full_image": "imag"}}, "'imag' in the row's cameras. Did you mean 'image'?"),
        (
            {"cameras": {"wrist": "observation.image"}},
            "'observation.image' in the row's cameras. Did you mean 'image'?",
        ),
        ({"transform": ["action = acton[:6], action[-1:]"]}, "'acton' in the row's transform. Did you mean 'action'?"),
        ({"state": "observation.sate"}, "'observation.sate' in the row's state. Did you mean 'observation.state'?"),
        (
            {"transform": [OBSERVED], "state": "observation.positon"},
            "'observation.positon' in the row's state. Did you mean 'observation.position'?",
        ),
        ({"state": "observation.state[:6], robot.joints"}, "'robot.joints' in the row's state."),
    ],
)
def test_a_field_that_the_data_lacks_is_refused_with_the_row(entries, message, own_table, episodes, tmp_path):
    add_row(own_table, **entries)
    write_rlds(episodes[:1], folder := tmp_path / "own_arm")
    by_name = functools.partial(load, cameras=[*entries.get("cameras", ["full_image"])])
    known = "'image'." if "cameras" in entries else "'action', "
    for read in (load, functools.partial(load, streaming=True), by_name, whole_statistics, examine):
        with pytest.raises(ValueError, match="Unknown field") as error:
            read(folder)
        place = f"{folder}/1.0.0, read by [datasets.own_arm] in {own_table}: Unknown field "
        assert str(error.value).startswith(f"{place}{message} Choose from {known}")


def test_a_camera_given_instead_of_the_row_s_is_told_by_its_own_name(own_table, episodes, tmp_path):
    add_row(own_table)
    write_rlds(episodes[:1], folder := tmp_path / "own_arm")
    assert load(folder, camera="observation.image")[0]["image"].shape == (64, 96, 3)
    for options in ({"camera": "observation.imag"}, {"cameras": ["observation.imag"]}):
        with pytest.raises(ValueError, match=r"Unknown camera 'observation.imag'\. Did you mean 'observation.image'"):
            load(folder, **options)


def test_joint_positions_in_an_ordinary_row_are_refused(own_table, make_episode, tmp_path):
    episodes = [make_episode(index) for index in range(4)]
    for frame in itertools.chain.from_iterable(episodes):
        frame["action"] = np.linspace(-0.55, 1.13, 7)
        frame.pop("state", None)
    episodes[3][0]["action"] = np.full(7, -0.55)
    add_row(own_table)
    write_rlds(episodes, folder := tmp_path / "own_arm")
    message = (
        r"\[datasets.own_arm\] in .*own.toml: after the transform, the gripper goes from 1.13 to 1.13, but .*joint"
    )
    with pytest.raises(ValueError, match=message):
        load(folder)
    with pytest.raises(ValueError, match=message):
        next(iter(load(folder, streaming=True)))
    with pytest.raises(ValueError, match=message):
        whole_statistics(folder)
    with pytest.raises(ValueError, match=f"no usable frame.*{message}"):
        examine(folder)
    with pytest.raises(ValueError, match=r"from -0\.55 to 1\.13"):
        load(folder, split="train[3:]")


def test_the_gripper_of_a_row_may_be_noisy_and_another_convention_is_declared(own_table, make_episode, tmp_path):
    episode = make_episode(0)
    for frame, value in zip(episode, (1.05, -0.05, 1.0, -1.0), strict=False):
        frame["action"] = np.append(np.zeros(6), value)
    write_rlds([episode], folder := tmp_path / "own_arm")
    add_row(own_table)
    with pytest.raises(ValueError, match=r"goes from -1 to 1\.05"):
        load(folder)
    for entries, expected in (
        ({"check_gripper": False}, [1.05, -0.05, 1, -1]),
        ({"transform": ["action = action[:6], action[-1:] | clip"]}, [1, 0, 1, 0]),
    ):
        add_row(own_table, **entries)
        assert [frame["action"][-1] for frame in load(folder)][:4] == np.float32(expected).tolist()
    episode[3]["action"][-1] = 0.0
    write_rlds([episode], noisy := tmp_path / "noisy" / "own_arm")
    add_row(own_table)
    assert [frame["action"][-1] for frame in load(noisy)][:4] == np.float32([1.05, -0.05, 1, 0]).tolist()


def test_columns_of_a_field_without_columns_are_not_steps():
    with pytest.raises(ValueError, match="'action' has one number in each step"):
        parse_value("action[-1]").evaluate({"action": np.zeros(7)})


def test_cameras_that_change_places_do_so_in_half_of_the_episodes():
    robot = dataset_robot("droid")
    cameras = {"image": "observation.exterior_image_1_left"}
    chosen = [robot.cameras_of_episode(cameras, episode)["image"] for episode in range(400)]
    assert 160 < chosen.count("observation.exterior_image_2_left") < 240
    assert Robot("arm").cameras_of_episode(cameras, 1) == cameras


def test_an_episode_is_read_from_the_camera_that_its_draw_gives(make_episode, own_table, tmp_path):
    own_table.write_text(OWN.replace('"inverted"', '["swap observation.image observation.other"]'))
    add_table(own_table)
    episodes = [make_episode(index) for index in range(6)]
    for episode in episodes:
        for frame in episode:
            frame["images"] = {"image": frame.pop("image"), "other": np.zeros((64, 96, 3), np.uint8)}
    write_rlds(episodes, tmp_path / "own_arm")
    robot = find_robot("own_arm")
    expected = [robot.cameras_of_episode({"image": "observation.image"}, index)["image"] for index in range(6)]
    assert len({*expected}) == 2
    for frames in (load(tmp_path / "own_arm"), load(tmp_path / "own_arm", streaming=True)):
        for frame in frames:
            is_other = frame["image"].max() < 20
            assert is_other == (expected[frame["episode_index"]] == "observation.other")


def test_a_partly_labelled_episode_keeps_its_unlabelled_frames(make_episode, own_table, tmp_path):
    add_table(own_table)
    episodes = [make_episode(0), make_episode(1, instruction="")]
    episodes[0][2]["instruction"] = ""
    write_rlds(episodes, tmp_path / "own_arm")
    assert {*load(tmp_path / "own_arm")["episode_index"]} == {0}
    assert load(tmp_path / "own_arm")["instruction"][2] == ""
    assert len(load(tmp_path / "own_arm", "generic")) == len(episodes[0]) - 1


def test_only_frames_without_any_motion_are_idle_in_droid():
    actions = np.zeros((3, 7))
    actions[1, 2], actions[2, 6] = 1e-3, 1
    assert dataset_robot("droid").find_idle(actions, None).tolist() == [True, False, True]
