import pickle
from dataclasses import replace

import numpy as np
import pytest

from openvla_hf.data import FirstOf, Gripper, Robot, register_robot, registered_robots
from openvla_hf.data.robots import BRIDGE, GENERIC, LIBERO, resolve_robot
from openvla_hf.data.rotations import (
    axis_angle_to_matrix,
    euler_to_matrix,
    matrix_to_euler,
    quaternion_to_axis_angle,
)


def standardize(robot, action, state=None):
    columns = {"action": np.asarray(action)} | ({} if state is None else {"observation.state": np.asarray(state)})
    return robot.standardize(columns, len(action))


def test_a_registered_robot_is_found_by_its_name_and_its_datasets_name():
    arm = register_robot(Robot("test_arm", camera="wrist", gripper=Gripper(open=0.0, closed=0.8)))
    assert "test_arm" in registered_robots()
    assert resolve_robot("test_arm", "anything") is arm
    assert resolve_robot(None, "test_arm") is arm
    assert resolve_robot(None, "unknown_data") is GENERIC
    assert resolve_robot(None, "libero_spatial_no_noops").gripper == LIBERO.gripper


def test_the_gripper_becomes_1_for_open_and_0_for_closed_and_is_not_scaled():
    action = np.zeros((3, 7))
    action[:, -1] = [-1, 0, 1]
    _, actions, _ = standardize(LIBERO, action)
    assert actions[:, -1].tolist() == [1.0, 0.5, 0.0]
    assert LIBERO.mask(7) == [True] * 6 + [False]
    assert GENERIC.mask(7) == [True] * 7


def test_a_gripper_outside_its_range_is_refused():
    action = np.zeros((2, 7))
    action[1, -1] = -1
    with pytest.raises(ValueError, match=r"from -1 to 0.*open=1 and closed=0"):
        standardize(Robot("arm", gripper=Gripper()), action)


def test_numbers_are_taken_in_the_order_of_the_adapter():
    _, actions, _ = standardize(Robot("arm", select=(2, 0, -1)), [[1.0, 2.0, 3.0, 4.0]])
    assert actions.tolist() == [[3.0, 1.0, 4.0]]
    with pytest.raises(ValueError, match=r"asks for \[9\]"):
        standardize(Robot("arm", select=(9,)), [[1.0, 2.0]])


@pytest.mark.parametrize("rotation", ["euler", "axis_angle", "quaternion_xyzw", "rotation_6d"])
def test_an_absolute_pose_becomes_the_movement_to_it(rotation):
    rng = np.random.default_rng(0)
    angles = rng.uniform(-0.6, 0.6, (2, 4, 3))
    here, there = euler_to_matrix(angles)
    position = rng.normal(size=(2, 4, 3))

    def encode(matrix):
        if rotation == "euler":
            return matrix_to_euler(matrix)
        if rotation == "rotation_6d":
            return np.concatenate([matrix[..., 0], matrix[..., 1]], -1)
        # The trace gives the angle, and the antisymmetric part the axis.
        angle = np.arccos((np.trace(matrix, axis1=-2, axis2=-1) - 1) / 2)[:, None]
        axis = np.stack([matrix[:, 2, 1] - matrix[:, 1, 2], matrix[:, 0, 2] - matrix[:, 2, 0],
                         matrix[:, 1, 0] - matrix[:, 0, 1]], -1) / (2 * np.sin(angle))  # fmt: skip
        if rotation == "axis_angle":
            return axis * angle
        return np.concatenate([axis * np.sin(angle / 2), np.cos(angle / 2)], -1)

    gripper = np.ones((4, 1))
    action = np.concatenate([position[1], encode(there), gripper], 1)
    state = np.concatenate([position[0], encode(here)], 1)
    _, actions, _ = standardize(Robot("arm", rotation=rotation, relative=False), action, state)
    assert actions.shape == (4, 7)
    np.testing.assert_allclose(actions[:, :3], position[1] - position[0], atol=1e-12)
    np.testing.assert_allclose(euler_to_matrix(actions[:, 3:6]) @ here, there, atol=1e-9)
    np.testing.assert_array_equal(actions[:, 6], 1.0)


def test_the_axis_angle_of_a_quaternion_is_robosuites():
    # From `quat2axisangle` of robosuite 1.4.0, which keeps the sign of w: the second angle is larger than pi.
    quaternions = np.array(
        [
            [0.2, -0.4, 0.1, 0.888819441731559],
            [0.2, -0.4, 0.1, -0.888819441731559],
            [0.5, 0.5, 0.5, -0.5],
            [0.9990234375, 0.03125, -0.0078125, -0.03],
            [0.0, 0.0, 0.0, 1.0],
            [0.0, 0.0, 0.0, -1.0],
            [0.0, 0.0, 0.0, 1.0000001],
        ]
    )
    expected = [
        [0.41551638183330436, -0.8310327636666087, 0.20775819091665218],
        [2.3266905015557278, -4.6533810031114555, 1.1633452507778639],
        [2.4183991523122907, 2.4183991523122907, 2.4183991523122907],
        [3.1999153791762915, 0.10009510472496709, -0.025023776181241773],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
    vectors = quaternion_to_axis_angle(quaternions)
    np.testing.assert_allclose(vectors, expected, rtol=1e-14)
    np.testing.assert_array_equal(quaternion_to_axis_angle(quaternions[1]), vectors[1])


def test_a_rotation_by_zero_is_the_identity():
    np.testing.assert_allclose(axis_angle_to_matrix(np.zeros(3)), np.eye(3))


def test_an_absolute_action_needs_a_state():
    with pytest.raises(ValueError, match=r"Unknown state 'observation\.state' or 'state'"):
        standardize(Robot("arm", relative=False), np.zeros((2, 7)))


def test_bridge_takes_the_reached_pose_and_drops_the_first_step_and_the_last():
    rng = np.random.default_rng(0)
    state = rng.normal(size=(6, 7))
    action = rng.normal(size=(6, 7))
    action[:, -1] = [0, 1.0, 0.5, 0.5, 0.0, 0.6]
    kept, actions, states = standardize(BRIDGE, action, state)
    assert kept.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(actions[:, :6], state[2:, :6] - state[1:-1, :6])
    # Values between open and closed count as the end that the gripper reaches next.
    assert actions[:, -1].tolist() == [1.0, 0.0, 0.0, 0.0]
    np.testing.assert_array_equal(states, state[1:-1])
    with pytest.raises(ValueError, match="at least 3 frames"):
        standardize(BRIDGE, action[:2], state[:2])


def test_a_wrong_rotation_is_refused():
    with pytest.raises(ValueError, match="'quaternion' is not one of 'euler'"):
        Robot("arm", rotation="quaternion")


BIMANUAL = np.arange(28.0).reshape(2, 14) / 10


def test_fourteen_joints_are_never_read_as_a_pose():
    with pytest.raises(ValueError, match=r"14 numbers.*takes 6, or 7 with a gripper.*'joint_positions'"):
        Robot("two_arms", action_dim=14, relative=False)
    for space in ("end_effector_pose", "end_effector_delta"):
        with pytest.raises(ValueError, match="14 numbers"):
            standardize(Robot("two_arms", space=space), BIMANUAL, BIMANUAL)


def test_joint_targets_stay_as_recorded_unless_differences_are_asked_for():
    state = BIMANUAL - 0.25
    joints = Robot("two_arms", space="joint_positions")
    np.testing.assert_array_equal(standardize(joints, BIMANUAL, state)[1], BIMANUAL)
    _, actions, _ = standardize(replace(joints, as_delta=True), BIMANUAL, state)
    np.testing.assert_allclose(actions, 0.25, atol=1e-12)


def test_the_grippers_of_two_arms_are_not_differences_and_not_scaled():
    action, state = BIMANUAL.copy(), BIMANUAL - 0.25
    action[:, [6, 13]] = [[0.0, 0.08], [0.08, 0.0]]
    gripper = Gripper(open=0.08, closed=0.0, dimensions=(6, 13))
    two_arms = Robot("two_arms", space="joint_positions", as_delta=True, gripper=gripper)
    _, actions, _ = standardize(two_arms, action, state)
    np.testing.assert_array_equal(actions[:, [6, 13]], [[0.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(np.delete(actions, [6, 13], 1), 0.25, atol=1e-12)
    assert np.flatnonzero(np.logical_not(two_arms.mask(14))).tolist() == [6, 13]
    with pytest.raises(ValueError, match=r"dimensions contains \[13\], but the action has 7"):
        standardize(replace(two_arms, as_delta=None), action[:, :7], state)


def test_differences_of_joints_follow_the_selected_order():
    select = Robot("arm", space="joint_positions", as_delta=True, select=(2, 0))
    _, actions, _ = standardize(select, [[1.0, 2.0, 3.0]], [[0.5, 0.0, 1.0, 9.0]])
    assert actions.tolist() == [[2.0, 0.5]]
    with pytest.raises(ValueError, match="needs the 3 joint positions in the state, which has 2"):
        standardize(select, [[1.0, 2.0, 3.0]], [[0.5, 0.0]])


def test_an_absolute_pose_may_stay_one():
    action = np.arange(14.0).reshape(2, 7) / 10
    _, actions, _ = standardize(Robot("arm", space="end_effector_pose", as_delta=False), action)
    np.testing.assert_array_equal(actions, action)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": "joints"}, "space 'joints' is not one of 'end_effector_delta'"),
        ({"space": "joint_positions", "relative": False}, "leave relative out"),
        ({"space": "joint_deltas", "as_delta": True}, "as_delta=True applies only to recorded targets"),
        ({"as_delta": False}, "as_delta=False applies only to recorded targets"),
        ({"space": "joint_positions", "rotation": "axis_angle"}, "rotation='axis_angle' is for end effectors"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Robot("arm", **fields)


def test_the_features_of_a_tuple_are_concatenated_in_its_order():
    columns = {"b": np.array([[3.0], [4.0]]), "a": np.array([[1.0, 2.0], [5.0, 6.0]]), "c": np.array([7.0, 8.0])}
    robot = Robot("arm", action=("a", "c", "b"), state=("b", "a"))
    _, actions, states = robot.standardize(columns, 2)
    assert actions.tolist() == [[1.0, 2.0, 7.0, 3.0], [5.0, 6.0, 8.0, 4.0]]
    assert states.tolist() == [[3.0, 1.0, 2.0], [4.0, 5.0, 6.0]]
    assert sorted(robot.wanted_columns(columns)) == ["a", "b", "c"]


def test_a_missing_feature_of_a_tuple_is_named_and_not_passed_over():
    with pytest.raises(ValueError, match=r"concatenates features, but the dataset has no 'gripper'.*FirstOf"):
        Robot("arm", action=("action", "gripper")).standardize({"action": np.zeros((2, 6))}, 2)
    with pytest.raises(ValueError, match="the dataset has no 'joints'"):
        Robot("arm", state=("state", "joints")).standardize({"action": np.zeros((2, 6)), "state": np.zeros((2, 6))}, 2)


def test_a_rotation_is_not_taken_for_a_gripper():
    with pytest.raises(ValueError, match="6 numbers, which all belong to the pose"):
        standardize(Robot("arm", space="end_effector_delta", gripper=Gripper()), np.zeros((2, 6)))


def test_names_of_dimensions_follow_the_conversion_of_the_numbers():
    names = {"a": ["one", "two"], "b": ["three"]}
    assert Robot("arm", action=("b", "a")).name_dimensions(names, names) == ["three", "one", "two"]
    assert Robot("arm", action="a", select=(1,)).name_dimensions(names, names) == ["two"]
    assert Robot("arm", action=("a", "c")).name_dimensions([*names, "c"], names) is None
    pose = {"action": ["x", "y", "z", "qx", "qy", "qz", "qw", "grip"]}
    robot = Robot("arm", space="end_effector_pose", rotation="quaternion_xyzw")
    assert robot.name_dimensions(pose, pose) == ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "grip"]
    absolute = replace(robot, as_delta=False)
    assert absolute.name_dimensions(pose, pose) == ["x", "y", "z", "roll", "pitch", "yaw", "grip"]


def test_selecting_a_number_beyond_the_named_ones_is_refused():
    with pytest.raises(ValueError, match=r"select=\(0, 99\) asks for \[99\], but the action has 2 numbers"):
        Robot("arm", select=(0, 99)).name_dimensions(["action"], {"action": ["one", "two"]})


def test_alternatives_are_written_as_such():
    robot = Robot("arm", action=FirstOf("action", "actions"))
    for name in robot.action:
        assert robot.wanted_columns([name]) == [name]
    assert robot.wanted_columns(["actions", "action"]) == ["action"]
    assert pickle.loads(pickle.dumps(robot)) == robot


def test_joined_movements_end_where_the_single_ones_do():
    rng = np.random.default_rng(0)
    action = np.concatenate([rng.normal(size=(12, 3)), rng.uniform(-0.4, 0.4, (12, 3)), rng.random((12, 1))], 1)
    robot = Robot("arm", space="end_effector_delta", gripper=Gripper())
    kept, actions, states = standardize(replace(robot, every=5), action, np.arange(12)[:, None])
    assert kept.tolist() == states[:, 0].tolist() == [0, 5, 10]
    np.testing.assert_allclose(
        actions[:, :3], [action[0:5, :3].sum(0), action[5:10, :3].sum(0), action[10:, :3].sum(0)]
    )
    turn = np.eye(3)
    for angles in action[:, 3:6]:
        turn = euler_to_matrix(angles) @ turn
    joined = np.eye(3)
    for angles in actions[:, 3:6]:
        joined = euler_to_matrix(angles) @ joined
    np.testing.assert_allclose(joined, turn, atol=1e-12)
    np.testing.assert_array_equal(actions[:, 6], action[[4, 9, 11], 6])


def test_joined_targets_are_the_last_ones_seen_from_the_first_frame():
    target = np.arange(24.0).reshape(12, 2)
    state = target - 1.5
    joints = Robot("arm", space="joint_positions", every=5)
    _, actions, states = standardize(joints, target, state)
    np.testing.assert_array_equal(actions, target[[4, 9, 11]])
    np.testing.assert_array_equal(states, state[[0, 5, 10]])
    _, actions, _ = standardize(replace(joints, as_delta=True), target, state)
    np.testing.assert_allclose(actions, target[[4, 9, 11]] - state[[0, 5, 10]])
    _, actions, _ = standardize(replace(joints, space="joint_deltas", gripper=Gripper(dimensions=())), target)
    np.testing.assert_allclose(actions.sum(0), target.sum(0))


def test_joined_poses_are_the_movement_to_the_last_one():
    rng = np.random.default_rng(0)
    pose = np.concatenate([rng.normal(size=(6, 3)), rng.uniform(-0.4, 0.4, (6, 3))], 1)
    _, actions, _ = standardize(Robot("arm", space="end_effector_pose", every=3), pose, pose)
    np.testing.assert_allclose(actions[:, :3], pose[[2, 5], :3] - pose[[0, 3], :3])
    reached = euler_to_matrix(actions[:, 3:]) @ euler_to_matrix(pose[[0, 3], 3:])
    np.testing.assert_allclose(reached, euler_to_matrix(pose[[2, 5], 3:]), atol=1e-12)


def test_joined_reached_poses_are_the_difference_of_their_ends():
    rng = np.random.default_rng(0)
    state, action = rng.normal(size=(8, 7)), np.zeros((8, 7))
    action[:, -1] = [0, 1, 1, 0, 0, 1, 0, 0]
    kept, actions, _ = standardize(replace(BRIDGE, every=3), action, state)
    assert kept.tolist() == [1, 4]
    np.testing.assert_allclose(actions[:, :6], state[[4, 7], :6] - state[[1, 4], :6])
    assert actions[:, -1].tolist() == [0.0, 0.0]


def test_idle_frames_are_dropped_but_not_a_gripper_that_moves_slowly():
    action = np.zeros((10, 7))
    action[[0, 1, 8], 0] = 0.02
    action[:, -1] = [1, 1, 1, 1, 0.9, 0.6, 0.3, 0, 0, 0]
    robot = Robot("arm", space="end_effector_delta", gripper=Gripper(), drop_idle=True)
    kept, actions, _ = standardize(robot, action)
    assert kept.tolist() == [0, 1, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(actions, action[kept])
    # An unchanged target is idle only while the robot stands still.
    target = np.array([0.0, 0.0, 0.5, 0.5, 0.5, 0.5])[:, None]
    state = np.array([0.0, 0.0, 0.0, 0.3, 0.5, 0.5])[:, None]
    joints = Robot("arm", space="joint_positions", drop_idle=True)
    assert standardize(joints, target, state)[0].tolist() == [2, 3, 4]


def test_frames_are_joined_and_dropped_only_where_the_space_is_known():
    for option in ({"every": 5}, {"drop_idle": True}):
        with pytest.raises(ValueError, match=r"movements or targets, but the robot 'generic' does not say"):
            resolve_robot(None, "anything", **option)
        with pytest.raises(ValueError, match=r"movements or targets"):
            Robot("arm", **option)
    with pytest.raises(ValueError, match="every=0 is not a number of frames"):
        Robot("arm", every=0)


def test_movements_of_joints_are_joined_and_dropped_only_where_the_grippers_are_known():
    for option in ({"every": 3}, {"drop_idle": True}):
        with pytest.raises(ValueError, match=r"'arm' does not say which numbers are grippers.*dimensions=\(\)"):
            Robot("arm", space="joint_deltas", **option)
    action = [[0.1, 1.0]] * 3
    _, actions, _ = standardize(Robot("arm", space="joint_deltas", every=3, gripper=Gripper()), action)
    np.testing.assert_allclose(actions, [[0.3, 1.0]])
    no_gripper = Robot("arm", space="joint_deltas", every=3, gripper=Gripper(dimensions=()))
    np.testing.assert_allclose(standardize(no_gripper, action)[1], [[0.3, 3.0]])
