import numpy as np
import pytest

from openvla_hf.data import Gripper, Robot, register_robot, registered_robots
from openvla_hf.data.robots import (
    BRIDGE,
    GENERIC,
    LIBERO,
    axis_angle_to_matrix,
    euler_to_matrix,
    matrix_to_euler,
    resolve_robot,
)


def standardize(robot, action, state=None):
    columns = {"action": np.asarray(action)} | ({} if state is None else {"observation.state": np.asarray(state)})
    return robot.standardize(columns, len(action))


def test_a_registered_robot_is_found_by_its_name_and_by_its_data_set_s():
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


def test_a_gripper_outside_its_range_is_told():
    action = np.zeros((2, 7))
    action[1, -1] = -1
    with pytest.raises(ValueError, match=r"from -1 to 0.*open=1 and closed=0"):
        standardize(Robot("arm", gripper=Gripper()), action)


def test_numbers_are_taken_in_the_order_that_the_adapter_says():
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
        # The angle's cosine is in the trace, its axis in what is antisymmetric.
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


def test_no_turn_is_the_identity():
    np.testing.assert_allclose(axis_angle_to_matrix(np.zeros(3)), np.eye(3))


def test_an_absolute_action_needs_a_state():
    with pytest.raises(ValueError, match=r"no state 'observation\.state' or 'state'"):
        standardize(Robot("arm", relative=False), np.zeros((2, 7)))


def test_bridge_takes_the_reached_pose_and_drops_the_first_step_and_the_last():
    rng = np.random.default_rng(0)
    state = rng.normal(size=(6, 7))
    action = rng.normal(size=(6, 7))
    action[:, -1] = [0, 1.0, 0.5, 0.5, 0.0, 0.6]
    kept, actions, states = standardize(BRIDGE, action, state)
    assert kept.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(actions[:, :6], state[2:, :6] - state[1:-1, :6])
    # What lies between open and closed counts as what the gripper becomes.
    assert actions[:, -1].tolist() == [1.0, 0.0, 0.0, 0.0]
    np.testing.assert_array_equal(states, state[1:-1])
    with pytest.raises(ValueError, match="at least 3 frames"):
        standardize(BRIDGE, action[:2], state[:2])


def test_a_wrong_rotation_is_told():
    with pytest.raises(ValueError, match="'quaternion' is none of 'euler'"):
        Robot("arm", rotation="quaternion")
