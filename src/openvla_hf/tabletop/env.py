"""The tabletop: a small, deterministic Gymnasium environment in NumPy and PIL.

Like OpenVLA, a policy for it takes one RGB frame (224, 224, 3) and one instruction, and returns one action (7,).
Importing this module registers `openvla_hf/Tabletop-v0`:

    env = gymnasium.make("openvla_hf/Tabletop-v0")
    image, info = env.reset(seed=0)
    image, reward, terminated, truncated, info = env.step(action)

With `cameras=("image", "wrist"), state=True`, the observation is a dict with both cameras' frames and the state of the
robot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .physics import MAX_STEP, TOP_HEIGHT, Physics, distance
from .scene import (
    CAMERAS,
    COLOURS,
    FINGER_OPEN,
    GOAL_KINDS,
    IMAGE_SIZE,
    SHAPES,
    STATE_NAMES,
    TABLE_HALF,
    Goal,
    Observation,
    Scene,
    TableGripper,
    TableObject,
    draw_scene,
    read_state,
)


try:
    import gymnasium
    from gymnasium import spaces
except ModuleNotFoundError as error:
    raise ImportError('The tabletop needs Gymnasium: run `pip install "openvla-hf[sim]"`.', name=error.name) from error


__all__ = [
    "CAMERAS",
    "DIRECTIONS",
    "ENV_ID",
    "HAND_NOISE",
    "MAX_STEP",
    "MAX_STEPS",
    "STATE_NAMES",
    "TASKS",
    "TabletopEnv",
    "Task",
]

ENV_ID = "openvla_hf/Tabletop-v0"
TASKS = ("put", "push", "stack", "lift")
# Steps before an episode is truncated: about three times as many as the expert needs to put an object somewhere.
MAX_STEPS = 80
# Standard deviation of the hand's position error in each step along each axis, metres.
HAND_NOISE = 0.004
# Unit vectors (x, y) as the camera sees them: `front` is towards the camera.
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "front": (0.0, -1.0),
    "back": (0.0, 1.0),
}

# Thresholds of success, metres. Objects are carried lower than `LIFT_HEIGHT`.
GOAL_RADIUS = 0.045
PUSH_DISTANCE = 0.08
LIFT_HEIGHT = 0.10
# How far an object must be from its start to count as moved, metres.
MOVED_DISTANCE = 0.03


@dataclass(frozen=True)
class Task:
    """The task of an episode.

    Attributes:
        family: One of `TASKS`.
        instruction: The task in words.
        target: The object to move.
        goal: Where to put the target; only for `put`.
        direction: Where to push the target, one of `DIRECTIONS`; only for `push`.
        base: The object to stack the target on; only for `stack`.
    """

    family: str
    instruction: str
    target: TableObject
    goal: Goal | None = None
    direction: str | None = None
    base: TableObject | None = None


class TabletopEnv(gymnasium.Env[Any, np.ndarray]):
    """Put, push, stack and lift coloured objects with a gripper that points down.

    The action (7,) contains dx, dy, dz in metres (each clipped to +-`MAX_STEP`), droll, dpitch, dyaw in radians
    (accepted and ignored: the gripper keeps pointing down), and the gripper (1 = open, 0 = closed, threshold 0.5). In
    each step the fingers act first. Then the hand moves, with a position error as on a real arm: `hand_noise`, drawn
    from the seed of the episode. The reward is 1 on success, which ends the episode, and 0 otherwise. The environment
    itself truncates episodes after `max_steps`.

    By default, the observation is the frame of the fixed camera, uint8 (224, 224, 3). With `cameras` or `state`, it is
    a dict with the frame of each camera under its name (`"image"` is the fixed camera, and `"wrist"` moves with the
    hand) and `state`, float32 (4,): x, y, z of the point between the fingertips, and the distance between the fingers
    (`STATE_NAMES`), in metres. The origin is the middle of the table's top, x points to the right in the image of the
    fixed camera, y away from it, and z up.

    The `info` of `reset` and `step` contains `instruction`, `task` (the family), `is_success`, and `moved_object`: the
    name of the object that was held last, or pushed last to at least 3 cm from its start, or None. `moved_the_target`
    says whether this is the object to move.

    Options of `reset`: `task` fixes the family. `swap_target` (bool) keeps the seed's scene and exchanges the target
    for the distractor, in the instruction and in the success criterion.

    Args:
        tasks: Families to draw from, out of `TASKS`.
        render_mode: None or `"rgb_array"`.
        max_steps: Steps before truncation.
        hand_noise: Standard deviation along each axis in each step, metres.
        cameras: Cameras to observe, out of `CAMERAS`.
        state: Whether to observe the robot's state.

    Raises:
        ValueError: If `tasks` or `cameras` is empty, a task, a camera or the render mode is unknown, a camera is named
            twice, `max_steps` is below 1, or `hand_noise` is negative.
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
        cameras: Sequence[str] | None = None,
        state: bool = False,
    ) -> None:
        if not tasks:
            raise ValueError(f"tasks is empty; choose from {', '.join(TASKS)}.")
        for family in tasks:
            _check_family(family)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"Unknown render_mode {render_mode!r}. Choose from None, 'rgb_array'.")
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
        frame = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        self.observation_space: spaces.Space[Any] = frame
        self.cameras = ("image",) if cameras is None else tuple(cameras)
        _check_cameras(self.cameras)
        self.state = state
        self._is_dict = cameras is not None or state
        if self._is_dict:
            parts: dict[str, spaces.Space[Any]] = dict.fromkeys(self.cameras, frame)
            self.observation_space = spaces.Dict(parts | ({"state": _STATE_SPACE} if state else {}))

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start a new episode; the class documents `options`.

        Raises:
            ValueError: If an option or a task is unknown.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        family = options.pop("task", None)
        swap = bool(options.pop("swap_target", False))
        if options:
            raise ValueError(f"Unknown reset options {sorted(options)}. Choose from 'task', 'swap_target'.")
        if family is None:
            family = self.tasks[int(self.np_random.integers(len(self.tasks)))]
        _check_family(family)
        self.scene, self.task = _sample_episode(self.np_random, family, swap)
        self._start = {thing.name: thing.position.copy() for thing in self.scene.objects}
        self._moved: str | None = None
        self._steps = 0
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute one action (7,); the class documents its dimensions.

        Raises:
            ValueError: If the action is not of shape (7,) or has a value that is not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,):
            raise ValueError(f"An action must have shape (7,), got {action.shape}.")
        if not np.isfinite(action).all():
            raise ValueError(f"An action must be finite, got {action.tolist()}.")
        before = {thing.name: thing.position.copy() for thing in self.scene.objects}
        physics = Physics(self.scene)
        physics.actuate(is_open=bool(action[6] >= 0.5))
        physics.move(np.clip(action[:3], -MAX_STEP, MAX_STEP) + self.np_random.normal(0.0, self.hand_noise, 3))
        self._note_moved(before)
        self._steps += 1
        success = self.is_success()
        truncated = not success and self._steps >= self.max_steps
        return self._observe(), float(success), success, truncated, self._info()

    def render(self) -> np.ndarray | None:
        """Return the current frame, uint8 (224, 224, 3), or None without a render mode."""
        return draw_scene(self.scene) if self.render_mode == "rgb_array" else None

    def is_success(self) -> bool:
        """Return whether the task is solved; except for `lift`, the hand must have let go of the target."""
        task, target = self.task, self.task.target
        is_held = self.scene.gripper.held is target
        if task.family == "lift":
            return is_held and float(target.position[2]) >= LIFT_HEIGHT
        if is_held:
            return False
        if task.goal is not None:
            return self.scene.gripper.is_open and distance(target.position, task.goal.xy) <= GOAL_RADIUS
        if task.base is not None:
            resting = abs(float(target.position[2]) - task.base.top) < 1e-6
            on_base = distance(target.position, task.base.position) <= task.base.radius
            return self.scene.gripper.is_open and resting and on_base
        along, across = push_axes(task.direction)
        shift = (target.position - self._start[target.name])[:2]
        advance = float(shift @ along)
        return advance >= PUSH_DISTANCE and abs(float(shift @ across)) <= advance

    def _observe(self) -> Observation:
        if not self._is_dict:
            return draw_scene(self.scene)
        frames = {camera: draw_scene(self.scene, camera) for camera in self.cameras}
        return frames | ({"state": read_state(self.scene)} if self.state else {})

    def _note_moved(self, before: Mapping[str, np.ndarray]) -> None:
        for thing in self.scene.objects:
            shifted = not np.array_equal(thing.position, before[thing.name])
            far = distance(thing.position, self._start[thing.name]) >= MOVED_DISTANCE
            if thing is self.scene.gripper.held or (shifted and far):
                self._moved = thing.name

    def _info(self) -> dict[str, Any]:
        return {
            "instruction": self.task.instruction,
            "task": self.task.family,
            "is_success": self.is_success(),
            "moved_object": self._moved,
            "moved_the_target": self._moved == self.task.target.name,
        }


def _check_family(family: str) -> None:
    if family not in TASKS:
        raise ValueError(f"Unknown task {family!r}. Choose from {', '.join(TASKS)}.")


def _check_cameras(cameras: tuple[str, ...]) -> None:
    if not cameras:
        raise ValueError(f"cameras is empty; choose from {', '.join(CAMERAS)}.")
    for camera in cameras:
        if camera not in CAMERAS:
            raise ValueError(f"Unknown camera {camera!r}. Choose from {', '.join(CAMERAS)}.")
    if len(set(cameras)) < len(cameras):
        raise ValueError(f"cameras={cameras} names a camera twice; give each once.")


def push_axes(direction: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the unit vectors (2,) along and across a direction of `DIRECTIONS`."""
    if direction is None:
        raise ValueError("This task has no direction.")
    x, y = DIRECTIONS[direction]
    return np.array([x, y]), np.array([-y, x])


_STATE_SPACE = spaces.Box(
    np.array([-TABLE_HALF[0], -TABLE_HALF[1], 0.0, 0.0], dtype=np.float32),
    np.array([*TABLE_HALF, TOP_HEIGHT, 2 * FINGER_OPEN], dtype=np.float32),
    dtype=np.float32,
)
_NAMES = [(colour, shape) for colour in COLOURS for shape in SHAPES]
_GOAL_NAMES = [(colour, kind) for colour in COLOURS for kind in GOAL_KINDS]
_STACKABLE = [(colour, shape) for colour, shape in _NAMES if shape != "ball"]
# Half extents in x and y of the region where objects stand at the start, metres.
_REACH = (0.20, 0.150)
# Length of the free path ahead of an object to push, metres.
_LANE = 0.12


def _sample_episode(rng: np.random.Generator, family: str, swap: bool) -> tuple[Scene, Task]:
    """Draw a random scene and its task. The scene does not depend on `swap`."""
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
    scene = Scene(objects, goals, TableGripper(start))

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
    """Draw different pairs of colour and shape: the target, the distractor, and sometimes a third object."""
    if family == "stack":
        cubes = [name for name in _NAMES if name[1] == "cube"]
        base = cubes[int(rng.integers(len(cubes)))]
        others = [name for name in _STACKABLE if name != base]
        return [others[k] for k in rng.choice(len(others), 2, replace=False)] + [base]
    count = 2 + int(rng.random() < 0.35)
    return [_NAMES[k] for k in rng.choice(len(_NAMES), count, replace=False)]


def _sample_places(rng: np.random.Generator, count: int, direction: str | None) -> np.ndarray:
    """Draw places for `count` objects and two goals, (count + 2, 2), metres, well apart from each other."""
    while True:
        places = rng.uniform(-1.0, 1.0, (count + 2, 2)) * _REACH
        places[count:] = np.clip(places[count:], [-0.185, -0.135], [0.185, 0.135])
        objects, goals = places[:count], places[count:]
        if distance(goals[0], goals[1]) < 0.145:
            continue
        if any(distance(thing, goal) < 0.105 for thing in objects for goal in goals):
            continue
        if any(_crowded(objects[i], objects[j]) for i in range(count) for j in range(i)):
            continue
        if direction is not None and not all(_has_lane(objects, index, direction) for index in (0, 1)):
            continue
        return places


def _crowded(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether a hand over one of two objects would touch or hide the other."""
    apart = distance(a, b)
    return apart < 0.11 or (abs(a[0] - b[0]) < 0.055 and apart < 0.16)


def _has_lane(objects: np.ndarray, index: int, direction: str) -> bool:
    """Return whether an object can be pushed: it needs room for the hand behind it and a free path ahead."""
    along, across = push_axes(direction)
    place = objects[index]
    behind, ahead = place - along * 0.07, place + along * (_LANE + 0.02)
    limits = np.array(TABLE_HALF)
    if (np.abs(behind) > limits - 0.01).any() or (np.abs(ahead) > limits - 0.02).any():
        return False
    others = np.delete(objects, index, axis=0) - place
    lead, side = others @ along, np.abs(others @ across)
    return not bool(((lead > -0.12) & (lead < _LANE + 0.06) & (side < 0.065)).any())


if ENV_ID not in gymnasium.registry:
    gymnasium.register(id=ENV_ID, entry_point="openvla_hf.tabletop.env:TabletopEnv")
