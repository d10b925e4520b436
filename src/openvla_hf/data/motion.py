"""Arithmetic on actions: joined movements, movements between poses, and actions that move nothing.

Letters in shapes: N actions of an episode, A dimensions of an action, S of a state.
"""

from collections.abc import Sequence

import numpy as np

from .rotations import ROTATIONS, euler_to_matrix, matrix_to_euler


# Spaces in which an action is a movement.
DELTAS = ("end_effector_delta", "joint_deltas")
# Spaces in which an action is a target to reach.
TARGETS = ("end_effector_pose", "joint_positions")
# Spaces of joints, whose numbers all have one unit.
JOINTS = ("joint_deltas", "joint_positions")
# Size of a position, which the rotation follows in an end effector's action or state.
POSE_DIMS = 3
# Names of an end effector's standard dimensions, before the gripper.
POSE_NAMES = {
    "end_effector_delta": ("dx", "dy", "dz", "droll", "dpitch", "dyaw"),
    "end_effector_pose": ("x", "y", "z", "roll", "pitch", "yaw"),
}

# A movement below this share of its range (quantiles 0.01 to 0.99) counts as none.
STILL = 0.01
# A movement below this (metres, radians or other units) counts as none, whatever its range.
STILL_FLOOR = 1e-4
# A gripper opening, from 0 to 1, that changes by less than this counts as unchanged.
GRIPPER_STILL = 0.01


def find_held(action_dim: int, space: str | None, grippers: Sequence[int]) -> list[int]:
    """List the dimensions that are states, not movements: grippers, and all after an end effector's pose."""
    after_pose = range(2 * POSE_DIMS, action_dim) if space in ("end_effector_delta", "end_effector_pose") else ()
    return sorted({*grippers, *after_pose})


def name_by_space(space: str | None, action_dim: int) -> list[str] | None:
    """Name the dimensions of a standard action by its space, or return `None` if the space does not name them."""
    if space in JOINTS:
        return [f"a{index}" for index in range(action_dim)]
    names = [*POSE_NAMES.get(space or "", ()), "gripper"][:action_dim]
    return names if len(names) == action_dim >= 2 * POSE_DIMS else None


def join_movements(first: np.ndarray, second: np.ndarray, space: str, grippers: Sequence[int]) -> np.ndarray:
    """Join movements `first` and then `second`, both (N, A), into one; grippers are those of `second`."""
    joined = first + second
    if space == "end_effector_delta":
        rotation = slice(POSE_DIMS, 2 * POSE_DIMS)
        turn = euler_to_matrix(second[:, rotation]) @ euler_to_matrix(first[:, rotation])
        joined[:, rotation] = matrix_to_euler(turn)
    held = find_held(first.shape[1], space, grippers)
    joined[:, held] = second[:, held]
    return joined


def convert_pose(action: np.ndarray, rotation: str, start: np.ndarray | None = None) -> np.ndarray:
    """Convert the rotations of end-effector actions to Euler angles, and poses to movements where `start` is given.

    Args:
        action: Actions (N, 3 + R + rest) whose rotation has R numbers.
        rotation: Encoding of the rotations, one of `ROTATIONS`.
        start: Poses (N, 3 + R) that the movements start from.

    Returns:
        Actions (N, 3 + 3 + rest).
    """
    size, to_matrix = ROTATIONS[rotation]
    pose_end = POSE_DIMS + size
    position, turn = action[:, :POSE_DIMS], to_matrix(action[:, POSE_DIMS:pose_end])
    if start is not None:
        position = position - start[:, :POSE_DIMS]
        turn = turn @ to_matrix(start[:, POSE_DIMS:pose_end]).swapaxes(-1, -2)
    return np.concatenate([position, matrix_to_euler(turn), action[:, pose_end:]], axis=1)


def find_idle(
    actions: np.ndarray, states: np.ndarray | None, space: str | None, grippers: Sequence[int]
) -> np.ndarray:
    """Return for each action of an episode whether it moves nothing and leaves the grippers unchanged, as (N,) bools.

    Args:
        actions: Actions (N, A).
        states: States (N, S) or `None`. An unchanged target counts as idle only if the robot stands still too.
        space: Space of the actions. If it is `None`, each number counts as a movement.
        grippers: Dimensions of the grippers.
    """
    held = find_held(actions.shape[1], space, grippers)
    moving = np.delete(actions, held, axis=1)
    if space in TARGETS:
        still = _is_still(_steps(moving), space)
        if states is not None:
            still &= _is_still(_steps(states), None)
    else:
        still = _is_still(moving, space)
    return still & (np.abs(_steps(actions[:, held])) <= GRIPPER_STILL).all(1)


def _steps(values: np.ndarray) -> np.ndarray:
    """Return the change of each row from the one before, (N, D). The first row takes the second row's change."""
    return np.diff(values, axis=0, prepend=2 * values[:1] - values[1:2] if len(values) > 1 else values)


def _is_still(movements: np.ndarray, space: str | None) -> np.ndarray:
    """Return for each row of movements (N, D) whether all are small, (N,). Numbers of one unit share a range."""
    if not movements.size:
        return np.ones(len(movements), bool)
    ranges = np.ptp(np.quantile(movements, (0.01, 0.99), axis=0), axis=0)
    units = 1 if space is None else len(ranges) if space in JOINTS else POSE_DIMS
    for start in range(0, len(ranges), units):
        ranges[start : start + units] = ranges[start : start + units].max()
    return (np.abs(movements) <= np.maximum(STILL_FLOOR, STILL * ranges)).all(1)
