"""The meaning of a gripper's recorded values, and their conversion to OpenVLA's: 1 is open and 0 is closed."""

from dataclasses import dataclass

import numpy as np


# A gripper counts as open above this opening.
GRIPPER_OPEN = 0.5
# Share of the range by which a recorded value may lie outside the range, as sensor readings do.
RANGE_SLACK = 0.05
# Openings this close to 0 or 1 count as closed or open; a gripper in between is still moving.
SETTLED = 0.05


@dataclass(frozen=True)
class Gripper:
    """The values that a dataset records for an open and a closed gripper.

    Args:
        open: Value of an open gripper.
        closed: Value of a closed gripper.
        binarize: Whether to replace each intermediate value with the end that the gripper reaches next, as for Bridge.
        dimensions: Indices of the grippers in the action, after `Robot.select`. The default is the last dimension. Use
            (6, 13) for two arms of six joints, and () for a robot without a gripper.
    """

    open: float = 1.0
    closed: float = 0.0
    binarize: bool = False
    dimensions: tuple[int, ...] = (-1,)

    def to_openvla(self, values: np.ndarray) -> np.ndarray:
        """Convert recorded values (T,) to openings, 1 = open and 0 = closed.

        Raises:
            ValueError: Values lie outside the range.
        """
        opening = (values - self.closed) / (self.open - self.closed)
        if opening.min() < -RANGE_SLACK or opening.max() > 1 + RANGE_SLACK:
            raise ValueError(
                f"the gripper's values go from {values.min():g} to {values.max():g}, but its adapter says "
                f"open={self.open:g} and closed={self.closed:g}."
            )
        return _settle(opening) if self.binarize else np.clip(opening, 0.0, 1.0)


def _settle(opening: np.ndarray) -> np.ndarray:
    """Replace intermediate openings (T,) with the next settled one, or with the nearer end if none follows."""
    settled = np.where(opening > 1 - SETTLED, 1.0, np.where(opening < SETTLED, 0.0, np.nan))
    following = float(opening[-1] > GRIPPER_OPEN)
    for index in range(len(settled) - 1, -1, -1):
        following = settled[index] = following if np.isnan(settled[index]) else settled[index]
    return settled


__all__ = ["GRIPPER_OPEN", "Gripper"]
