"""What an action does to the robot: movements one after the other, and actions that move nothing.

Letters in shapes: N actions of an episode, A dimensions of an action, S of a state.
"""

from collections.abc import Sequence

import numpy as np

from .rotations import euler_to_matrix, matrix_to_euler


DELTAS = ("end_effector_delta", "joint_deltas")
"""Spaces in which an action is a movement."""
TARGETS = ("end_effector_pose", "joint_positions")
"""Spaces in which an action is where the robot is to be."""
JOINTS = ("joint_deltas", "joint_positions")
"""Spaces of joints, whose numbers have one unit."""
POSE_DIMS = 3
"""Where the rotation begins in an end effector's action or state, after the position."""
POSE_NAMES = {
    "end_effector_delta": ("dx", "dy", "dz", "droll", "dpitch", "dyaw"),
    "end_effector_pose": ("x", "y", "z", "roll", "pitch", "yaw"),
}
"""Names of an end effector's standard dimensions, before the gripper."""

STILL = 0.01
"""A movement below this share of its range (quantiles 0.01 to 0.99) counts as none."""
STILL_FLOOR = 1e-4
"""Metres, radians or other units: a movement below it counts as none, whatever its range."""
GRIPPER_STILL = 0.01
"""A gripper, from 0 to 1, that changes by less than this stays as it is."""


def find_held(action_dim: int, space: str | None, grippers: Sequence[int]) -> list[int]:
    """The dimensions that say how something is to be and not how it moves: grippers, and all after an end effector."""
    after_pose = range(2 * POSE_DIMS, action_dim) if space in ("end_effector_delta", "end_effector_pose") else ()
    return sorted({*grippers, *after_pose})


def name_by_space(space: str | None, action_dim: int) -> list[str] | None:
    """Name the dimensions of a standard action without names: joints by number, `None` if nothing is known."""
    if space in JOINTS:
        return [f"a{index}" for index in range(action_dim)]
    names = [*POSE_NAMES.get(space or "", ()), "gripper"][:action_dim]
    return names if len(names) == action_dim >= 2 * POSE_DIMS else None


def join_movements(first: np.ndarray, second: np.ndarray, space: str, grippers: Sequence[int]) -> np.ndarray:
    """The movements that do what `first` and then `second` do, both (N, A); grippers are those of `second`."""
    joined = first + second
    if space == "end_effector_delta":
        rotation = slice(POSE_DIMS, 2 * POSE_DIMS)
        turn = euler_to_matrix(second[:, rotation]) @ euler_to_matrix(first[:, rotation])
        joined[:, rotation] = matrix_to_euler(turn)
    held = find_held(first.shape[1], space, grippers)
    joined[:, held] = second[:, held]
    return joined


def find_idle(
    actions: np.ndarray, states: np.ndarray | None, space: str | None, grippers: Sequence[int]
) -> np.ndarray:
    """(N) whether each action of an episode moves nothing and leaves the grippers as they were.

    Args:
        actions: (N, A).
        states: (N, S) or `None`. A target that stays where it is moves nothing only if the robot stands still too.
        space: Of the actions; where it is `None`, each number is taken for a movement.
        grippers: Their dimensions.
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
    """(N, D) by how much each row differs from the one before; the first row differs as the second does."""
    return np.diff(values, axis=0, prepend=2 * values[:1] - values[1:2] if len(values) > 1 else values)


def _is_still(movements: np.ndarray, space: str | None) -> np.ndarray:
    """(N) whether all of (N, D) movements are small; numbers of one unit are measured by one range."""
    if not movements.size:
        return np.ones(len(movements), bool)
    ranges = np.ptp(np.quantile(movements, (0.01, 0.99), axis=0), axis=0)
    units = 1 if space is None else len(ranges) if space in JOINTS else POSE_DIMS
    for start in range(0, len(ranges), units):
        ranges[start : start + units] = ranges[start : start + units].max()
    return (np.abs(movements) <= np.maximum(STILL_FLOOR, STILL * ranges)).all(1)
