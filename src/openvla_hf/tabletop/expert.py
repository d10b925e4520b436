"""The tabletop's scripted expert: its actions, its rollouts, and demonstrations to train on.

env = TabletopEnv()
env.reset(seed=0)
env.step(expert_action(env))
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .env import TabletopEnv, Task, push_axes
from .physics import CLOSED_RADIUS, GRASP_HEIGHT, MAX_STEP, Physics, distance
from .scene import Observation, Scene, TableObject, first_image


if TYPE_CHECKING:
    import gymnasium


__all__ = [
    "ACTION_GRID",
    "Frame",
    "demonstrated_action",
    "expert_action",
    "plan",
    "record_demonstrations",
    "rollout_expert",
]

# Demonstrated moves are rounded to multiples of this, metres: a policy can distinguish a few actions, but not 256.
ACTION_GRID = 0.01

# Share of the remaining distance that one step covers.
_GAIN = 0.75
# From the height for grasping to the height for hovering, metres.
_CLEARANCE = 0.085
# Stricter than the gripper and the goals require, metres, so that noise in the next step does no harm.
_ALIGNED = 0.014
# Where the closed hand comes down behind an object to push, metres from the object's centre.
_BEHIND = 0.058
# How far one step pushes, metres.
_STROKE = 0.03


def expert_action(env: TabletopEnv) -> np.ndarray:
    """Return the expert's action, float32 (7,). It depends only on the current state of `env`."""
    return plan(env.scene, env.task)


def plan(scene: Scene, task: Task) -> np.ndarray:
    """Return the expert's action, float32 (7,), for `task` in `scene`, regardless of earlier tasks.

    Heights follow a funnel: the hand is low only where it is aligned with its destination, and rises before it moves
    sideways. The action is therefore a continuous function of what the frame shows, except for the gripper.
    """
    hand, held = scene.gripper.position, scene.gripper.held
    if task.direction is not None:
        delta, is_open = _push(scene, task)
    elif held is not None and held is not task.target:
        delta, is_open = _put_down(scene, held)
    elif held is not None and task.family == "lift":
        delta, is_open = np.array([0.0, 0.0, MAX_STEP]), False
    elif held is not None:
        delta, is_open = _carry(scene, task, held)
    else:
        target = task.target.position
        low = float(target[2]) + GRASP_HEIGHT
        error = distance(hand, target)
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
    """Return a step (3,) towards `place` (2,), at height `low` where `error` is small and up to `high` elsewhere."""
    height = low + float(np.clip((error - tolerance) / 0.045, 0.0, 1.0)) * (high - low)
    climb = height - float(hand[2])
    sideways = (place - hand[:2]) * np.clip(1.0 - climb / 0.05, 0.0, 1.0)
    delta = _GAIN * np.append(sideways, climb)
    return delta * min(1.0, MAX_STEP / max(float(np.abs(delta).max()), 1e-9))


def _carry(scene: Scene, task: Task, held: TableObject) -> tuple[np.ndarray, bool]:
    """Carry the held object to its goal or base, and let go there."""
    tolerance, near = 0.008, _ALIGNED
    if task.goal is not None:
        place, support = task.goal.xy, task.goal.thickness
        tolerance, near = 0.014, 0.020  # a goal is wide
    elif task.base is not None:
        place, support = task.base.position[:2], task.base.top
    else:
        raise ValueError(f"A {task.family!r} task has no destination: set its goal or base.")
    hand = scene.gripper.position
    error = distance(hand, place)
    low = support + float(hand[2] - held.position[2])
    delta = _funnel(hand, place, error, low, low + _CLEARANCE, tolerance)
    return delta, bool(error < near and hand[2] - low < _ALIGNED)


def _put_down(scene: Scene, held: TableObject) -> tuple[np.ndarray, bool]:
    """Put the held object down where it is: it is not the target, or it should not be carried."""
    hand = scene.gripper.position
    low = Physics(scene).support(held) + float(hand[2] - held.position[2])
    return _funnel(hand, hand[:2], 0.0, low, low), bool(hand[2] - low < _ALIGNED)


def _push(scene: Scene, task: Task) -> tuple[np.ndarray, bool]:
    """Go behind the object, down, and along the direction, with a closed hand unless that would grasp an object."""
    hand, target = scene.gripper.position, task.target.position
    if scene.gripper.held is not None:
        return _put_down(scene, scene.gripper.held)
    along, across = push_axes(task.direction)
    offset = hand[:2] - target[:2]
    lead, side = float(offset @ along), float(offset @ across)
    contact = CLOSED_RADIUS + task.target.radius
    low, high = float(target[2]) + GRASP_HEIGHT + 0.003, float(target[2]) + GRASP_HEIGHT + _CLEARANCE

    # The hand may be low only in the lane behind the object. While it pushes, lead == -contact.
    error = abs(side) + max(0.0, lead + contact - 0.004) + max(0.0, -lead - 0.09)
    in_lane = float(np.clip(1.5 - error / 0.016, 0.0, 1.0))
    is_down = float(np.clip(1.5 - (hand[2] - low) / 0.02, 0.0, 1.0))
    stroke = in_lane * is_down
    place = target[:2] - along * _BEHIND
    ahead = hand[:2] - across * side + along * (_STROKE / _GAIN)
    delta = _funnel(hand, (1.0 - stroke) * place + stroke * ahead, error, low, high, tolerance=0.014)

    surrounds = scene.gripper.is_open and any(
        distance(thing.position, hand) < 0.04 and hand[2] < thing.top + 0.01 for thing in scene.objects
    )
    return delta, surrounds


@dataclass(frozen=True)
class Frame:
    """One step of the expert.

    Attributes:
        observation: What the environment returned: a frame, or a dict (see `TabletopEnv`).
        instruction: The task in words.
        action: The expert's action for this frame, float32 (7,): the label.
        executed: The action that was executed, float32 (7,): the label plus noise.
        task: Family of the task.
        success: Whether this step solved the task; on the last frame, the episode's outcome.
        state: The scene and the task, which the teaching of the shipped policy reads; a policy must not see them.
    """

    observation: Observation
    instruction: str
    action: np.ndarray
    executed: np.ndarray
    task: str
    success: bool
    state: tuple[Scene, Task]

    @property
    def image(self) -> np.ndarray:
        """The frame of the first camera, uint8 (224, 224, 3)."""
        return first_image(self.observation)


def rollout_expert(
    env: gymnasium.Env[Any, np.ndarray],
    seed: int,
    *,
    noise: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Frame]:
    """Run one episode with the expert and yield its steps.

    With `noise`, the executed actions differ from the labels, so that the data shows how to recover from mistakes (as
    in DART). Each step has its own noise, sometimes a larger offset lasts several steps, and rarely the gripper does
    the opposite. The episode is reproducible from `seed`.

    Args:
        env: A `TabletopEnv`, wrapped or not.
        seed: Seed of the episode and of its noise.
        noise: Standard deviation of the executed translation, metres; 0 executes the expert's own actions.
        options: Passed to `reset`.

    Raises:
        ValueError: If `noise` is negative.
        TypeError: If `env` does not wrap a `TabletopEnv`.
    """
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}.")
    table = env.unwrapped
    if not isinstance(table, TabletopEnv):
        raise TypeError(f"rollout_expert needs a TabletopEnv, got {type(table).__name__}.")
    rng = np.random.default_rng([seed, 1])
    shove, shove_left = np.zeros(3), 0
    observation, info = env.reset(seed=seed, options=dict(options or {}))
    done = False
    while not done:
        action = expert_action(table)
        state = copy.deepcopy((table.scene, table.task))  # together, because the task refers to objects of the scene
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
        yield Frame(observation, info["instruction"], action, executed, info["task"], bool(terminated), state)
        observation, done = following, terminated or truncated


def demonstrated_action(action: np.ndarray) -> np.ndarray:
    """Round an action (7,) of the expert as a policy learns it: its translation to multiples of `ACTION_GRID`."""
    rounded = np.array(action, dtype=np.float64)
    rounded[:3] = np.round(rounded[:3] / ACTION_GRID) * ACTION_GRID
    return rounded


def record_demonstrations(
    tasks: Sequence[str],
    seeds: Iterable[int],
    *,
    noise: float = 0.0075,
    cameras: Sequence[str] | None = None,
    state: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the expert's episodes as training data for `from_episodes`, `write_lerobot` and `write_rlds`.

    Each episode is a list of frames with `image` (224, 224, 3) uint8, `instruction`, and `action` (7,) float32. With
    `cameras`, frames have `images`, a dict from camera to frame, in place of `image`. With `state`, they have `state`
    (4,) float32, in metres. The actions are the expert's own, but the executed ones are noisy, as in `rollout_expert`,
    so that the data shows how to recover from mistakes. Failed episodes are left out.

    Args:
        tasks: Families to draw from, out of `TASKS`.
        seeds: One seed for each episode; evaluation uses seeds from `rollouts.FIRST_UNSEEN_SEED` on.
        noise: Standard deviation of the executed translation, metres.
        cameras: Cameras to record, out of `CAMERAS`.
        state: Whether to record the robot's state.

    Raises:
        ValueError: If a task or a camera is unknown or `noise` is negative.
    """
    for seed in seeds:
        env = TabletopEnv(tasks, hand_noise=0.0, cameras=cameras, state=state)
        frames = list(rollout_expert(env, seed, noise=noise))
        if frames[-1].success:
            yield [
                {
                    **_recorded(frame.observation, cameras),
                    "instruction": frame.instruction,
                    "action": demonstrated_action(frame.action).astype(np.float32),
                }
                for frame in frames
            ]


def _recorded(observation: Observation, cameras: Sequence[str] | None) -> dict[str, Any]:
    """Return the part of a recorded frame that an observation gives."""
    if not isinstance(observation, dict):
        return {"image": observation}
    state = {"state": observation["state"]} if "state" in observation else {}
    if cameras is None:
        return {"image": first_image(observation)} | state
    return {"images": {camera: observation[camera] for camera in cameras}} | state
