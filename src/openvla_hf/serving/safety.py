"""Limits on the movements that a robot makes for a policy, checked on the robot's own computer."""

from dataclasses import dataclass

import numpy as np


TOLERANCE = 1e-9
"""Metres or radians by which rounding may exceed a limit."""


class UnsafeAction(ValueError):
    """An action that a robot must not execute."""


@dataclass(frozen=True)
class SafetyLimits:
    """Limits on the actions of an end effector: dx, dy, dz in metres, three rotations in radians, and the gripper.

    Attributes:
        max_translation: Longest movement of one action in metres.
        max_rotation: Largest rotation of one action in radians, as the norm of its three rotations.
        low: (3,) lowest corner of the workspace in metres, in the frame of the robot's base.
        high: (3,) highest corner.
    """

    max_translation: float
    max_rotation: float
    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("max_translation", "max_rotation"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {getattr(self, name)}.")
        corners = np.array([self.low, self.high], dtype=np.float64)
        if corners.shape != (2, 3) or not np.isfinite(corners).all() or not (corners[0] < corners[1]).all():
            raise ValueError(
                f"`low` must be below `high` along x, y and z, three numbers each, got {self.low} and {self.high}."
            )

    def check(self, action: np.ndarray, position: np.ndarray) -> None:
        """Raise `UnsafeAction` if an action exceeds a limit.

        Args:
            action: (7,).
            position: (3,) of the end effector before the action, in metres.
        """
        action, position = self._read(action, position)
        for name, movement, limit, unit in (
            ("moves", action[:3], self.max_translation, "m"),
            ("rotates", action[3:6], self.max_rotation, "rad"),
        ):
            length = np.linalg.norm(movement)
            if length > limit + TOLERANCE:
                raise UnsafeAction(f"The action {name} by {length:.3f} {unit}; the limit is {limit:g} {unit}.")
        if not self._contains(position + action[:3]):
            raise UnsafeAction(
                f"The action moves to {(position + action[:3]).round(3).tolist()}, outside the workspace "
                f"{list(self.low)} to {list(self.high)}."
            )

    def clip(self, action: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the action (7,) with its movement and its rotation shortened to the limits, in the same directions.

        A movement out of the workspace ends at its wall.

        Args:
            action: (7,).
            position: (3,) of the end effector before the action, in metres.

        Raises:
            UnsafeAction: The action is not finite, or the end effector is outside the workspace already.
        """
        action, position = self._read(action, position)
        for part, limit in ((slice(0, 3), self.max_translation), (slice(3, 6), self.max_rotation)):
            length = np.linalg.norm(action[part])
            if length > limit:
                action[part] *= limit / length
        action[:3] = np.clip(position + action[:3], self.low, self.high) - position
        return action

    def _read(self, action: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copy both to float64, and check them for faults that clipping can't repair."""
        action, position = np.array(action, dtype=np.float64), np.array(position, dtype=np.float64)
        if action.shape != (7,) or position.shape != (3,):
            raise ValueError(
                f"An action must have 7 dimensions and a position 3, got shapes {action.shape} and {position.shape}."
            )
        if not (np.isfinite(action).all() and np.isfinite(position).all()):
            raise UnsafeAction(f"The action {action.tolist()} at position {position.tolist()} is not finite.")
        if not self._contains(position):
            raise UnsafeAction(
                f"The end effector is at {position.round(3).tolist()}, outside the workspace {list(self.low)} to "
                f"{list(self.high)}. Move it back before the policy acts."
            )
        return action, position

    def _contains(self, position: np.ndarray) -> bool:
        return bool((position >= np.subtract(self.low, TOLERANCE)).all()) and bool(
            (position <= np.add(self.high, TOLERANCE)).all()
        )


__all__ = ["SafetyLimits", "UnsafeAction"]
