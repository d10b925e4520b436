"""What robots take to open and to close the gripper, where a policy predicts 1 for open and 0 for closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


__all__ = ["GRIPPERS", "GripperConvention", "is_opening"]

HALF_OPEN = 0.5


@dataclass(frozen=True)
class GripperConvention:
    """What a robot expects as the last dimension of an action, where the policy predicts 1 for open and 0 for closed.

    Attributes:
        open: Value of an open gripper.
        closed: Value of a closed gripper.
        binary: Whether values in between become one of the two.
        convert: Function from predicted values to the robot's.
    """

    open: float
    closed: float
    binary: bool
    convert: Callable[[np.ndarray], np.ndarray]


GRIPPERS = {
    "policy": GripperConvention(1.0, 0.0, False, lambda opening: opening),
    "binary": GripperConvention(1.0, 0.0, True, lambda opening: (opening > HALF_OPEN).astype(np.float64)),
    # As in the original's evaluation: scale to [-1, 1], take the sign and invert it.
    "libero": GripperConvention(-1.0, 1.0, True, lambda opening: -np.sign(2 * opening - 1)),
}


def is_opening(low: float, high: float) -> bool:
    """Return whether a gripper whose usual values go from `low` to `high` is 1 for open and 0 for closed."""
    # A gripper in metres would count as closed forever. One that the data never opens is at 0.
    return low >= -0.01 and high <= 1.01 and not 0.01 < high <= HALF_OPEN
