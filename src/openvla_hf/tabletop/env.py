"""A tabletop to act in: a small, deterministic Gymnasium environment in NumPy and PIL, with its expert.

One RGB frame (224, 224, 3) and one instruction in, one action (7,) out: the interface of OpenVLA. Importing
this module registers `openvla_hf/Tabletop-v0`:

    env = gymnasium.make("openvla_hf/Tabletop-v0")
    image, info = env.reset(seed=0)
    image, reward, terminated, truncated, info = env.step(expert_action(env.unwrapped))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from openvla_hf.tabletop.scene import (
    COLOURS,
    FINGER_CLOSED,
    FINGER_LENGTH,
    FINGER_OPEN,
    GOAL_KINDS,
    IMAGE_SIZE,
    SHAPES,
    TABLE_HALF,
    Goal,
    Gripper,
    Scene,
    TableObject,
    draw_scene,
)


__all__ = [
    "ACTION_GRID",
    "DIRECTIONS",
    "ENV_ID",
    "HAND_NOISE",
    "MAX_STEP",
    "MAX_STEPS",
    "TASKS",
    "Frame",
    "TabletopEnv",
    "Task",
    "demonstrated_action",
    "expert_action",
    "plan",
    "record_demonstrations",
    "rollout_expert",
]

ENV_ID = "openvla_hf/Tabletop-v0"
TASKS = ("put", "push", "stack", "lift")
MAX_STEP = 0.04
"""Largest translation along one axis in one step, metres."""
MAX_STEPS = 80
"""Steps after which an episode is truncated: about three times what the expert takes to put a thing somewhere."""
HAND_NOISE = 0.004
"""How far the hand ends up from where it is sent, in each step along each axis, metres (standard deviation)."""
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "front": (0.0, -1.0),
    "back": (0.0, 1.0),
}
"""Unit vectors (x, y) as the camera sees them: `front` comes towards it."""

GRASP_HEIGHT = 0.015  # fingertips above the bottom of what they grasp; also the lowest they go
TOP_HEIGHT = 0.20
GRASP_RADIUS = 0.02
GOAL_RADIUS = 0.045
PUSH_DISTANCE = 0.08
MOVED_DISTANCE = 0.03
LIFT_HEIGHT = 0.10  # higher than anything is carried to be put somewhere
SUBSTEPS = 4  # a step is longer than an object's radius: without these the hand would jump over things
CLOSED_RADIUS = FINGER_CLOSED + 0.005
FINGER_RADIUS = 0.006


@dataclass(frozen=True)
class Task:
    """What is asked for in an episode.

    `target` is the object to move. `goal` is set for `put`, `direction` for `push`, `base` for `stack`, none of them
    for `lift`.
    """

    family: str
    instruction: str
    target: TableObject
    goal: Goal | None = None
    direction: str | None = None
    base: TableObject | None = None


class TabletopEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Put, push, stack and lift coloured objects with a gripper that points down.

    Observation: the camera's frame, uint8 (224, 224, 3). Action (7,): dx, dy, dz in metres (each clipped to
    +-`MAX_STEP`), droll, dpitch, dyaw in radians (accepted and ignored: the gripper keeps pointing down), and
    the gripper, 1 = open, 0 = closed (threshold 0.5). The fingers act first, then the hand moves, and as with any
    real arm not exactly as far as it was told: by `hand_noise`, drawn from the seed of the episode. Reward is 1 on
    success, which ends the episode, else 0; the environment itself truncates after `max_steps`.

    `info` of `reset` and `step` holds `instruction`, `task` (the family), `is_success`, and `moved_object`:
    the name of the object last held, or last shifted to 3 cm or more from where it started, or None.

    Options of `reset`: `task` fixes the family; `swap_target` (bool) keeps the seed's scene and exchanges the
    target for the distractor, in the instruction and in what counts as success.

    Args:
        tasks: Families to draw from, out of `TASKS`.
        render_mode: None or `"rgb_array"`.
        max_steps: Steps before truncation.
        hand_noise: Standard deviation along each axis in each step, metres.

    Raises:
        ValueError: For an unknown task or render mode, no task at all, `max_steps` below 1, or negative noise.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 - Gymnasium's own declaration

    scene: Scene
    task: Task

    def __init__(
        self,
        tasks: Sequence[str] = ("put", "push"),
        *,
        render_mode: str | None = None,
        max_steps: int = MAX_STEPS,
        hand_noise: float = HAND_NOISE,
    ) -> None:
        if not tasks:
            raise ValueError(f"tasks is empty; choose from {', '.join(TASKS)}.")
        for family in tasks:
            _check_family(family)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"Unknown render_mode {render_mode!r}; known: None, 'rgb_array'.")
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
        if hand_noise < 0:
            raise ValueError(f"hand_noise must not be negative, got {hand_noise}.")
        self.hand_noise = hand_noise
        self.tasks = tuple(tasks)
        self.render_mode = render_mode
        self.max_steps = max_steps
        limit = np.array([MAX_STEP] * 3 + [math.pi] * 3 + [1.0], dtype=np.float32)
        self.action_space = spaces.Box(np.append(-limit[:6], np.float32(0.0)), limit, dtype=np.float32)
        self.observation_space = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Lay a new table; see the class for `options`.

        Raises:
            ValueError: For an unknown option or task.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        family = options.pop("task", None)
        swap = bool(options.pop("swap_target", False))
        if options:
            raise ValueError(f"Unknown reset options {sorted(options)}; known: 'task', 'swap_target'.")
        if family is None:
            family = self.tasks[int(self.np_random.integers(len(self.tasks)))]
        _check_family(family)
        self.scene, self.task = _sample_episode(self.np_random, family, swap)
        self._start = {thing.name: thing.position.copy() for thing in self.scene.objects}
        self._moved: str | None = None
        self._steps = 0
        return draw_scene(self.scene), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act once; see the class for the action.

        Raises:
            ValueError: If the action is not of shape (7,) or holds a value that is not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,):
            raise ValueError(f"An action has shape (7,), got {action.shape}.")
        if not np.isfinite(action).all():
            raise ValueError(f"An action must be finite, got {action.tolist()}.")
        before = {thing.name: thing.position.copy() for thing in self.scene.objects}
        physics = _Physics(self.scene)
        physics.actuate(is_open=bool(action[6] >= 0.5))
        physics.move(np.clip(action[:3], -MAX_STEP, MAX_STEP) + self.np_random.normal(0.0, self.hand_noise, 3))
        self._note_moved(before)
        self._steps += 1
        success = self.is_success()
        truncated = not success and self._steps >= self.max_steps
        return draw_scene(self.scene), float(success), success, truncated, self._info()

    def render(self) -> np.ndarray | None:
        """The current frame, (224, 224, 3) uint8, in mode `rgb_array`; None without a render mode."""
        return draw_scene(self.scene) if self.render_mode == "rgb_array" else None

    def is_success(self) -> bool:
        """Whether the target is where the instruction wants it, and in the hand only if that is what it wants."""
        task, target = self.task, self.task.target
        is_held = self.scene.gripper.held is target
        if task.family == "lift":
            return is_held and float(target.position[2]) >= LIFT_HEIGHT
        if is_held:
            return False
        if task.goal is not None:
            return self.scene.gripper.is_open and _distance(target.position, task.goal.xy) <= GOAL_RADIUS
        if task.base is not None:
            resting = abs(float(target.position[2]) - task.base.top) < 1e-6
            on_base = _distance(target.position, task.base.position) <= task.base.radius
            return self.scene.gripper.is_open and resting and on_base
        along, across = _frame_of(task.direction)
        shift = (target.position - self._start[target.name])[:2]
        advance = float(shift @ along)
        return advance >= PUSH_DISTANCE and abs(float(shift @ across)) <= advance

    def _note_moved(self, before: Mapping[str, np.ndarray]) -> None:
        for thing in self.scene.objects:
            shifted = not np.array_equal(thing.position, before[thing.name])
            far = _distance(thing.position, self._start[thing.name]) >= MOVED_DISTANCE
            if thing is self.scene.gripper.held or (shifted and far):
                self._moved = thing.name

    def _info(self) -> dict[str, Any]:
        return {
            "instruction": self.task.instruction,
            "task": self.task.family,
            "is_success": self.is_success(),
            "moved_object": self._moved,
        }


def _check_family(family: str) -> None:
    if family not in TASKS:
        raise ValueError(f"Unknown task {family!r}; known: {', '.join(TASKS)}.")


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Distance in the xy plane, metres."""
    return math.hypot(float(a[0] - b[0]), float(a[1] - b[1]))


def _frame_of(direction: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors along and across a direction of push."""
    if direction is None:
        raise ValueError("This task has no direction.")
    x, y = DIRECTIONS[direction]
    return np.array([x, y]), np.array([-y, x])


# --- Physics ----------------------------------------------------------------------------------------------


class _Physics:
    """Kinematics of one scene: things are carried, shoved aside, or drop straight down, without momentum."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.gripper = scene.gripper

    def actuate(self, *, is_open: bool) -> None:
        """Open or close the fingers where the hand is."""
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
                held = min(graspable, key=lambda thing: _distance(thing.position, gripper.position))
                held.position[:2] = gripper.position[:2]
                gripper.held = held
        self._shove(np.zeros(2))

    def move(self, translation: np.ndarray) -> None:
        """Move the hand by `translation` (3,), metres, as far as the table and what stands on it allow."""
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
        self._shove((position - before)[:2])

    def _between_fingers(self, thing: TableObject) -> bool:
        depth = float(self.gripper.position[2] - thing.position[2])
        near = _distance(thing.position, self.gripper.position) <= GRASP_RADIUS
        return near and -0.005 <= depth <= 0.65 * thing.height

    def _floor(self, height: float) -> float:
        """How low the fingertips may go at the hand's xy, coming from `height`."""
        gripper = self.gripper
        if gripper.held is not None:
            depth = height - float(gripper.held.position[2])
            return max(self.support(gripper.held) + depth, GRASP_HEIGHT)
        lowest = GRASP_HEIGHT
        for thing in self.scene.objects:
            if _distance(thing.position, gripper.position) > thing.radius:
                continue
            if gripper.is_open:  # fingers on either side: the palm is what stops on it
                lowest = max(lowest, thing.top - 0.9 * FINGER_LENGTH)
            elif thing.top <= height + 1e-9:
                lowest = max(lowest, thing.top)
        return lowest

    def support(self, thing: TableObject) -> float:
        """Height of what is below `thing`: another object within half a size, a goal, or the table."""
        height = 0.0
        for goal in self.scene.goals:
            if _distance(thing.position, goal.xy) <= goal.half:
                height = max(height, goal.thickness)
        for other in self.scene.objects:
            if other is thing or other is self.gripper.held or other.top > thing.position[2] + 1e-6:
                continue
            if _distance(thing.position, other.position) <= other.radius:
                height = max(height, other.top)
        return height

    def _settle(self) -> None:
        """Let go of what nothing holds: it drops straight down, and beside what it only half meets."""
        for thing in sorted(self.scene.objects, key=lambda thing: float(thing.position[2])):
            if thing is self.gripper.held:
                continue
            support = self.support(thing)
            fell = thing.position[2] - support > 1e-6
            thing.position[2] = support
            if fell:
                for other in self.scene.objects:
                    if other is not thing and other is not self.gripper.held:
                        contact = thing.radius + other.radius
                        _displace(thing, other.position, contact, np.zeros(2), float(other.position[2]), other.top)

    def _shove(self, motion: np.ndarray) -> None:
        """Move what the fingers, or the held object, run into out of the way, along `motion` (2,)."""
        gripper, (x, y, z) = self.gripper, self.gripper.position
        if gripper.held is not None:
            held = gripper.held
            movers = [(held.position, held.radius, float(held.position[2]), held.top)]
        elif gripper.is_open:
            fingers = [np.array([x + side * FINGER_OPEN, y]) for side in (-1, 1)]
            movers = [(finger, FINGER_RADIUS, float(z), math.inf) for finger in fingers]
        else:
            movers = [(gripper.position, CLOSED_RADIUS, float(z), math.inf)]
        free = [thing for thing in self.scene.objects if thing is not gripper.held]
        for point, radius, bottom, top in movers:
            for thing in free:
                if not _displace(thing, point, radius + thing.radius, motion, bottom, top):
                    continue
                for other in free:  # what is shoved shoves its neighbour
                    if other is not thing:
                        contact = thing.radius + other.radius
                        _displace(other, thing.position, contact, motion, float(thing.position[2]), thing.top)


def _displace(
    thing: TableObject, point: np.ndarray, contact: float, motion: np.ndarray, bottom: float, top: float
) -> bool:
    """Move `thing` until it is `contact` metres from `point`, if something from `bottom` to `top` is there.

    It goes along `motion` when that leads away from `point`, so that a straight push stays straight, and
    otherwise straight away from it. Returns whether it moved.
    """
    offset = thing.position[:2] - point[:2]
    gap = math.hypot(*offset)
    if gap >= contact - 1e-9 or bottom >= thing.top - 0.002 or top <= thing.position[2] + 0.002:
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


# --- Episodes ---------------------------------------------------------------------------------------------

_NAMES = [(colour, shape) for colour in COLOURS for shape in SHAPES]
_GOAL_NAMES = [(colour, kind) for colour in COLOURS for kind in GOAL_KINDS]
_STACKABLE = [(colour, shape) for colour, shape in _NAMES if shape != "ball"]
_REACH = (0.20, 0.150)
"""Where objects stand at the start: half extents in x and y, metres."""
_LANE = 0.12


def _sample_episode(rng: np.random.Generator, family: str, swap: bool) -> tuple[Scene, Task]:
    """Draw a scene and its task. The scene does not depend on `swap`."""
    names = _sample_names(rng, family)
    goal_names = [_GOAL_NAMES[k] for k in rng.choice(len(_GOAL_NAMES), 2, replace=False)]
    direction = str(rng.choice(list(DIRECTIONS))) if family == "push" else None
    places = _sample_places(rng, len(names), direction)
    objects = [
        TableObject(colour, shape, np.append(place, 0.0))
        for (colour, shape), place in zip(names, places, strict=False)
    ]
    goals = [
        Goal(colour, kind, float(place[0]), float(place[1]))
        for (colour, kind), place in zip(goal_names, places[len(names) :], strict=True)
    ]
    start = rng.uniform([-0.20, -0.16, 0.10], [0.20, 0.14, 0.16])
    scene = Scene(objects, goals, Gripper(start))

    target = objects[1 if swap else 0]
    if family == "put":
        return scene, Task(family, f"put the {target.name} on the {goals[0].name}", target, goal=goals[0])
    if family == "push":
        return scene, Task(family, f"push the {target.name} to the {direction}", target, direction=direction)
    if family == "lift":
        return scene, Task(family, f"lift the {target.name}", target)
    base = objects[2]
    return scene, Task(family, f"stack the {target.name} on the {base.name}", target, base=base)


def _sample_names(rng: np.random.Generator, family: str) -> list[tuple[str, str]]:
    """Colours and shapes, no pair twice: the target, the distractor, and a third object or none."""
    if family == "stack":
        cubes = [name for name in _NAMES if name[1] == "cube"]
        base = cubes[int(rng.integers(len(cubes)))]
        others = [name for name in _STACKABLE if name != base]
        return [others[k] for k in rng.choice(len(others), 2, replace=False)] + [base]
    count = 2 + int(rng.random() < 0.35)
    return [_NAMES[k] for k in rng.choice(len(_NAMES), count, replace=False)]


def _sample_places(rng: np.random.Generator, count: int, direction: str | None) -> np.ndarray:
    """Places for `count` objects and two goals, (count + 2, 2), metres, well apart from each other."""
    while True:
        places = rng.uniform(-1.0, 1.0, (count + 2, 2)) * _REACH
        places[count:] = np.clip(places[count:], [-0.185, -0.135], [0.185, 0.135])
        objects, goals = places[:count], places[count:]
        if _distance(goals[0], goals[1]) < 0.145:
            continue
        if any(_distance(thing, goal) < 0.105 for thing in objects for goal in goals):
            continue
        if any(_crowded(objects[i], objects[j]) for i in range(count) for j in range(i)):
            continue
        if direction is not None and not all(_has_lane(objects, index, direction) for index in (0, 1)):
            continue
        return places


def _crowded(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a hand over one of two objects would get in the way of the other, or hide much of it."""
    apart = _distance(a, b)
    return apart < 0.11 or (abs(a[0] - b[0]) < 0.055 and apart < 0.16)


def _has_lane(objects: np.ndarray, index: int, direction: str) -> bool:
    """Whether an object can be pushed: room for the hand behind it, and a free way ahead."""
    along, across = _frame_of(direction)
    place = objects[index]
    behind, ahead = place - along * 0.07, place + along * (_LANE + 0.02)
    limits = np.array(TABLE_HALF)
    if (np.abs(behind) > limits - 0.01).any() or (np.abs(ahead) > limits - 0.02).any():
        return False
    others = np.delete(objects, index, axis=0) - place
    lead, side = others @ along, np.abs(others @ across)
    return not bool(((lead > -0.12) & (lead < _LANE + 0.06) & (side < 0.065)).any())


# --- Expert -----------------------------------------------------------------------------------------------

_GAIN = 0.75
_CLEARANCE = 0.085  # from grasping up to hovering, metres
_ALIGNED = 0.014  # tighter than what the gripper and the goals allow: noise in between must not spoil it
_BEHIND = 0.058  # where the closed hand comes down, before an object to push, metres from its centre
_STROKE = 0.03


def expert_action(env: TabletopEnv) -> np.ndarray:
    """The scripted expert's action, float32 (7,), for the current state of `env` alone (no hidden phase)."""
    return plan(env.scene, env.task)


def plan(scene: Scene, task: Task) -> np.ndarray:
    """What the expert does, float32 (7,), when it is told `task` in `scene`, whatever it was told before.

    Heights follow a funnel: the hand is low only where it is aligned with where it goes, and rises before it
    moves sideways. So the action is a continuous function of what the frame shows, but for the gripper.
    """
    hand, held = scene.gripper.position, scene.gripper.held
    if task.direction is not None:
        delta, is_open = _expert_push(scene, task)
    elif held is not None and held is not task.target:
        delta, is_open = _expert_let_go(scene, held)
    elif held is not None and task.family == "lift":
        delta, is_open = np.array([0.0, 0.0, MAX_STEP]), False
    elif held is not None:
        delta, is_open = _expert_carry(scene, task, held)
    else:
        target = task.target.position
        low = float(target[2]) + GRASP_HEIGHT
        error = _distance(hand, target)
        delta = _funnel(hand, target[:2], error, low, low + _CLEARANCE)
        ready = scene.gripper.is_open and error < _ALIGNED and abs(hand[2] - low) < _ALIGNED
        is_open = not ready
    action = np.zeros(7, dtype=np.float32)
    action[:3] = delta
    action[6] = float(is_open)
    return action


def _funnel(
    hand: np.ndarray, place: np.ndarray, error: float, low: float, high: float, tolerance: float = 0.008
) -> np.ndarray:
    """A step (3,) towards `place` (2,), at height `low` where `error` is small and up to `high` elsewhere."""
    height = low + float(np.clip((error - tolerance) / 0.045, 0.0, 1.0)) * (high - low)
    climb = height - float(hand[2])
    sideways = (place - hand[:2]) * np.clip(1.0 - climb / 0.05, 0.0, 1.0)
    delta = _GAIN * np.append(sideways, climb)
    return delta * min(1.0, MAX_STEP / max(float(np.abs(delta).max()), 1e-9))


def _expert_carry(scene: Scene, task: Task, held: TableObject) -> tuple[np.ndarray, bool]:
    tolerance, near = 0.008, _ALIGNED
    if task.goal is not None:
        place, support = task.goal.xy, task.goal.thickness
        tolerance, near = 0.014, 0.020  # a goal is wide
    elif task.base is not None:
        place, support = task.base.position[:2], task.base.top
    else:
        raise ValueError(f"A {task.family} task has no place to carry to.")
    hand = scene.gripper.position
    error = _distance(hand, place)
    low = support + float(hand[2] - held.position[2])
    delta = _funnel(hand, place, error, low, low + _CLEARANCE, tolerance)
    return delta, bool(error < near and hand[2] - low < _ALIGNED)


def _expert_let_go(scene: Scene, held: TableObject) -> tuple[np.ndarray, bool]:
    """Put down, right where it is, what should not be in the hand."""
    hand = scene.gripper.position
    low = _Physics(scene).support(held) + float(hand[2] - held.position[2])
    return _funnel(hand, hand[:2], 0.0, low, low), bool(hand[2] - low < _ALIGNED)


def _expert_push(scene: Scene, task: Task) -> tuple[np.ndarray, bool]:
    """Go behind the object, down, and along; closed, unless that would grasp something."""
    hand, target = scene.gripper.position, task.target.position
    if scene.gripper.held is not None:
        return _expert_let_go(scene, scene.gripper.held)
    along, across = _frame_of(task.direction)
    offset = hand[:2] - target[:2]
    lead, side = float(offset @ along), float(offset @ across)
    contact = CLOSED_RADIUS + task.target.radius
    low, high = float(target[2]) + GRASP_HEIGHT + 0.003, float(target[2]) + GRASP_HEIGHT + _CLEARANCE

    # Low is right only in the lane behind the object; pushing, the hand sits at lead == -contact.
    error = abs(side) + max(0.0, lead + contact - 0.004) + max(0.0, -lead - 0.09)
    in_lane = float(np.clip(1.5 - error / 0.016, 0.0, 1.0))
    is_down = float(np.clip(1.5 - (hand[2] - low) / 0.02, 0.0, 1.0))
    stroke = in_lane * is_down
    place = target[:2] - along * _BEHIND
    ahead = hand[:2] - across * side + along * (_STROKE / _GAIN)
    delta = _funnel(hand, (1.0 - stroke) * place + stroke * ahead, error, low, high, tolerance=0.014)

    surrounds = scene.gripper.is_open and any(
        _distance(thing.position, hand) < 0.04 and hand[2] < thing.top + 0.01 for thing in scene.objects
    )
    return delta, surrounds


# --- Demonstrations ---------------------------------------------------------------------------------------

ACTION_GRID = 0.01
"""What demonstrated moves are rounded to, metres: a few actions that can be told apart, rather than 256 that can't."""


@dataclass(frozen=True)
class Frame:
    """One step of a demonstration.

    Attributes:
        image: What the policy sees, uint8 (224, 224, 3).
        instruction: What it is told.
        action: What the expert does here, float32 (7,): the label.
        executed: What was done, float32 (7,): the label plus noise.
        task: Family of the task.
        success: Whether this step solved the task; the last frame's tells the episode's outcome.
        state: The scene that the image shows, and the task: more than a policy may see.
    """

    image: np.ndarray
    instruction: str
    action: np.ndarray
    executed: np.ndarray
    task: str
    success: bool
    state: tuple[Scene, Task]


def rollout_expert(
    env: gymnasium.Env[np.ndarray, np.ndarray],
    seed: int,
    *,
    noise: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Frame]:
    """Play one episode with the expert and yield its steps.

    With `noise` (standard deviation of the translation, metres) what is executed differs from the label, so
    that the data holds the way back from mistakes (as in DART): each step is jittered, now and then a shove
    lasts several steps, and rarely the gripper does the opposite. It is reproducible from `seed`.

    Args:
        env: A `TabletopEnv`, wrapped or not.
        seed: Seed of the episode and of its noise.
        noise: Metres; 0 executes the expert's own actions.
        options: Passed to `reset`.

    Raises:
        ValueError: If `noise` is negative.
        TypeError: If `env` is not a `TabletopEnv` inside.
    """
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}.")
    table = env.unwrapped
    if not isinstance(table, TabletopEnv):
        raise TypeError(f"rollout_expert needs a TabletopEnv, got {type(table).__name__}.")
    rng = np.random.default_rng([seed, 1])
    shove, shove_left = np.zeros(3), 0
    image, info = env.reset(seed=seed, options=dict(options or {}))
    done = False
    while not done:
        action = expert_action(table)
        state = copy.deepcopy((table.scene, table.task))  # together: the task refers to things of the scene
        executed = action.copy()
        if noise > 0:
            if shove_left == 0 and rng.random() < 0.04:
                shove, shove_left = rng.normal(0.0, 2.5 * noise, 3), int(rng.integers(2, 5))
            executed[:3] += rng.normal(0.0, noise, 3)
            if shove_left:
                executed[:3] += shove
                shove_left -= 1
            if rng.random() < 0.01:
                executed[6] = 1.0 - executed[6]
        following, _, terminated, truncated, _ = env.step(executed)
        yield Frame(image, info["instruction"], action, executed, info["task"], bool(terminated), state)
        image, done = following, terminated or truncated


def demonstrated_action(action: np.ndarray) -> np.ndarray:
    """The expert's action as a policy is to learn it, (7,): moves in steps of `ACTION_GRID`."""
    rounded = np.array(action, dtype=np.float64)
    rounded[:3] = np.round(rounded[:3] / ACTION_GRID) * ACTION_GRID
    return rounded


def record_demonstrations(
    tasks: Sequence[str], seeds: Iterable[int], *, noise: float = 0.0075
) -> Iterator[list[dict[str, Any]]]:
    """The expert's episodes as data to learn from, for `from_episodes`, `write_lerobot` and `write_rlds`.

    Each is a list of frames with `image` (224, 224, 3) uint8, `instruction`, and `action` (7,) float32. The actions
    are what the expert does there; what is executed is `noise` metres (standard deviation) off, as in
    `rollout_expert`, so the data show the way back from mistakes. Episodes that fail are left out.

    Args:
        tasks: Families to draw from, out of `TASKS`.
        seeds: One for each episode; evaluation uses those from `rollouts.FIRST_UNSEEN_SEED` on.
        noise: Of what is executed.

    Raises:
        ValueError: For an unknown task or negative noise.
    """
    for seed in seeds:
        frames = list(rollout_expert(TabletopEnv(tasks, hand_noise=0.0), seed, noise=noise))
        if frames[-1].success:
            yield [
                {
                    "image": frame.image,
                    "instruction": frame.instruction,
                    "action": demonstrated_action(frame.action).astype(np.float32),
                }
                for frame in frames
            ]


if ENV_ID not in gymnasium.registry:
    gymnasium.register(id=ENV_ID, entry_point="openvla_hf.tabletop.env:TabletopEnv")
