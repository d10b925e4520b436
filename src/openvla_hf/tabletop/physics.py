"""The tabletop's physics: a hand that carries, pushes and drops objects, without momentum.

Positions and lengths are in metres, in the world frame of `openvla_hf.tabletop.scene`.
"""

import math
from dataclasses import dataclass

import numpy as np

from .scene import FINGER_CLOSED, FINGER_LENGTH, FINGER_OPEN, TABLE_HALF, Scene, TableObject


__all__ = ["CLOSED_RADIUS", "GRASP_HEIGHT", "MAX_STEP", "TOP_HEIGHT", "Physics", "distance"]

# The largest translation along one axis in one step.
MAX_STEP = 0.04
# The fingertips' height above the bottom of a grasped object, and their lowest position.
GRASP_HEIGHT = 0.015
GRASP_RADIUS = 0.02
# The fingertips' highest position.
TOP_HEIGHT = 0.20
# A step is longer than an object's radius. Without substeps the hand would jump over objects.
SUBSTEPS = 4
CLOSED_RADIUS = FINGER_CLOSED + 0.005
FINGER_RADIUS = 0.006


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the distance between two points in the xy plane, metres."""
    return math.hypot(float(a[0] - b[0]), float(a[1] - b[1]))


class Physics:
    """Kinematics of one scene, which is changed in place.

    Held objects follow the hand, touched objects are pushed aside, and released objects drop straight down.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.gripper = scene.gripper

    def actuate(self, *, is_open: bool) -> None:
        """Open or close the fingers without moving the hand."""
        gripper = self.gripper
        if is_open:
            dropped, gripper.held = gripper.held, None
            gripper.is_open = True
            if dropped is not None:
                self._settle()
        elif gripper.is_open:
            gripper.is_open = False
            graspable = [thing for thing in self.scene.objects if self._between_fingers(thing)]
            if graspable:
                held = min(graspable, key=lambda thing: distance(thing.position, gripper.position))
                held.position[:2] = gripper.position[:2]
                gripper.held = held
        self._push(np.zeros(2))

    def move(self, translation: np.ndarray) -> None:
        """Move the hand by `translation` (3,), metres, as far as the table and the objects allow."""
        for _ in range(SUBSTEPS):
            self._advance(translation / SUBSTEPS)
        self._settle()

    def _advance(self, delta: np.ndarray) -> None:
        gripper, position = self.gripper, self.gripper.position
        before = position.copy()
        position[:2] = np.clip(position[:2] + delta[:2], [-limit for limit in TABLE_HALF], TABLE_HALF)
        floor = self._floor(float(before[2]))
        position[2] = np.clip(position[2] + delta[2], floor, TOP_HEIGHT)
        if gripper.held is not None:
            gripper.held.position += position - before
        self._push((position - before)[:2])

    def _between_fingers(self, thing: TableObject) -> bool:
        depth = float(self.gripper.position[2] - thing.position[2])
        near = distance(thing.position, self.gripper.position) <= GRASP_RADIUS
        return near and -0.005 <= depth <= 0.65 * thing.height

    def _floor(self, height: float) -> float:
        """Return how low the fingertips may go at the hand's xy, coming from `height`."""
        gripper = self.gripper
        if gripper.held is not None:
            depth = height - float(gripper.held.position[2])
            return max(self.support(gripper.held) + depth, GRASP_HEIGHT)
        lowest = GRASP_HEIGHT
        for thing in self.scene.objects:
            if distance(thing.position, gripper.position) > thing.radius:
                continue
            if gripper.is_open:  # the fingers straddle the object until the palm rests on it
                lowest = max(lowest, thing.top - 0.9 * FINGER_LENGTH)
            elif thing.top <= height + 1e-9:
                lowest = max(lowest, thing.top)
        return lowest

    def support(self, thing: TableObject) -> float:
        """Return the height of the surface below `thing`: another object's top, a goal, or the table."""
        height = 0.0
        for goal in self.scene.goals:
            if distance(thing.position, goal.xy) <= goal.half:
                height = max(height, goal.thickness)
        for other in self.scene.objects:
            if other is thing or other is self.gripper.held or other.top > thing.position[2] + 1e-6:
                continue
            if distance(thing.position, other.position) <= other.radius:
                height = max(height, other.top)
        return height

    def _settle(self) -> None:
        """Drop every object that is not held, and move it beside an object that it only half lands on."""
        for thing in sorted(self.scene.objects, key=lambda thing: float(thing.position[2])):
            if thing is self.gripper.held:
                continue
            support = self.support(thing)
            fell = thing.position[2] - support > 1e-6
            thing.position[2] = support
            if fell:
                for other in self.scene.objects:
                    if other is not thing and other is not self.gripper.held:
                        _displace(thing, _Obstacle.of(other), np.zeros(2))

    def _push(self, motion: np.ndarray) -> None:
        """Move the objects that the fingers or the held object touch out of the way, along `motion` (2,)."""
        gripper, (x, y, z) = self.gripper, self.gripper.position
        if gripper.held is not None:
            movers = [_Obstacle.of(gripper.held)]
        elif gripper.is_open:
            fingers = [np.array([x + side * FINGER_OPEN, y]) for side in (-1, 1)]
            movers = [_Obstacle(finger, FINGER_RADIUS, float(z), math.inf) for finger in fingers]
        else:
            movers = [_Obstacle(gripper.position, CLOSED_RADIUS, float(z), math.inf)]
        free = [thing for thing in self.scene.objects if thing is not gripper.held]
        for mover in movers:
            for thing in free:
                if not _displace(thing, mover, motion):
                    continue
                for other in free:  # a pushed object pushes its neighbour
                    if other is not thing:
                        _displace(other, _Obstacle.of(thing), motion)


@dataclass
class _Obstacle:
    """An upright cylinder that objects cannot overlap: its axis through `position`, and its extent, metres."""

    position: np.ndarray
    radius: float
    bottom: float
    top: float

    @classmethod
    def of(cls, thing: TableObject) -> "_Obstacle":
        return cls(thing.position, thing.radius, float(thing.position[2]), thing.top)


def _displace(thing: TableObject, obstacle: _Obstacle, motion: np.ndarray) -> bool:
    """Move `thing` until it no longer overlaps the obstacle.

    The object moves along `motion` (2,) if that leads away from the obstacle, so that a straight push stays straight.
    Otherwise it moves straight away from the obstacle.

    Returns:
        Whether the object moved.
    """
    offset = thing.position[:2] - obstacle.position[:2]
    gap = math.hypot(*offset)
    contact = obstacle.radius + thing.radius
    below, above = obstacle.top <= thing.position[2] + 0.002, obstacle.bottom >= thing.top - 0.002
    if gap >= contact - 1e-9 or below or above:
        return False
    speed = math.hypot(*motion)
    along = motion / speed if speed > 1e-9 else np.zeros(2)
    lead = float(offset @ along)
    if lead > 0:
        shift = along * (math.sqrt(lead**2 + contact**2 - gap**2) - lead)
    else:
        away = offset / gap if gap > 1e-6 else np.array([1.0, 0.0])
        shift = away * (contact - gap)
    limits = np.array(TABLE_HALF) - thing.radius
    thing.position[:2] = np.clip(thing.position[:2] + shift, -limits, limits)
    return True
