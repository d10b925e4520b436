"""Run a policy in the tabletop, many episodes at a time, and measure its success."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from .physics import MAX_STEP
from .scene import Observation, first_image


if TYPE_CHECKING:
    from .env import TabletopEnv


__all__ = [
    "CONDITIONS",
    "FIRST_UNSEEN_SEED",
    "TABLETOP_POLICY",
    "ModelPolicy",
    "Policy",
    "Rollout",
    "check_robot",
    "load_policy",
    "run_episodes",
    "success_by_task",
    "success_table",
]

# The checkpoint of the small policy that ships with the package.
TABLETOP_POLICY = Path(__file__).parent / "policy"
# Evaluation draws its seeds from here on; training stays below.
FIRST_UNSEEN_SEED = 1_000_000
# Observations (B, as the environment returns them) and instructions (B) -> actions (B, 7) in the robot's units, or
# chunks (B, K, 7) of actions to execute one after the other.
Policy = Callable[[Sequence[Any], Sequence[str]], np.ndarray]
CONDITIONS = {
    "as told": "the instruction names the target",
    "swapped": "the same scene, with the target's name exchanged for the distractor's",
    "black": "the policy sees a black image",
}


@dataclass
class Rollout:
    """One episode of a policy.

    Attributes:
        seed: Seed of the episode.
        task: Family of the task.
        instruction: The task in words.
        success: Whether the task was solved.
        moved_target: Whether the object that was moved last is the one that the instruction names.
        steps: Number of actions.
        frames: The first camera's frames, uint8 (224, 224, 3), first to last; empty unless they are kept.
        predictions: Number of times that the policy predicted an action or a chunk.
    """

    seed: int
    task: str
    instruction: str
    success: bool = False
    moved_target: bool = False
    steps: int = 0
    frames: list[np.ndarray] = field(default_factory=list)
    predictions: int = 0


@dataclass
class _Running:
    env: TabletopEnv
    rollout: Rollout
    observation: Observation
    planned: deque[np.ndarray] = field(default_factory=deque)


class ModelPolicy:
    """A model and its processor as a `Policy` that counts the cost of its actions.

    Attributes:
        cameras: Cameras whose images the model takes, or `None` for the fixed camera alone.
        state: Whether the model takes the robot's state.
        forward_passes: Passes of the language model so far, summed over the observations.
        seconds: Time spent in the processor and the model so far.
    """

    def __init__(self, model: Any, processor: Any, unnorm_key: str | None = None, execute: int | None = None):
        self.model, self.processor = model, processor
        self.unnorm_key, self.execute = unnorm_key, execute
        self.cameras: list[str] | None = processor.cameras
        self.state = processor.state_dim is not None
        self.forward_passes = 0
        self.seconds = 0.0

    def __call__(self, observations: Sequence[Observation], instructions: Sequence[str]) -> np.ndarray:
        """Predict the actions (B, 7) or chunks (B, K, 7) for observations and instructions."""
        start = time.perf_counter()
        inputs = self.processor(
            [self._images(one) for one in observations],
            instruction=list(instructions),
            state=np.stack([one["state"] for one in observations]) if self.state else None,
        )
        details = self.model.predict_action(**inputs, unnorm_key=self.unnorm_key, return_details=True)
        self.seconds += time.perf_counter() - start
        self.forward_passes += details.forward_passes * len(observations)
        return details.actions if details.actions.ndim == 2 else details.actions[:, : self.execute]

    def _images(self, observation: Observation) -> Any:
        """Return the images in the order in which the processor takes them."""
        if self.cameras is None or not isinstance(observation, dict):
            return first_image(observation)
        return [observation[camera] for camera in self.cameras]


def load_policy(model: Any, processor: Any, unnorm_key: str | None = None, execute: int | None = None) -> ModelPolicy:
    """Wrap a model and its processor in a function from observations and instructions to actions.

    Args:
        model: An `OpenVLAForActionPrediction`.
        processor: Its processor.
        unnorm_key: Name of the action statistics, if the model has several.
        execute: Number of a chunk's actions to execute before the model sees the next observation. By default, all.

    Raises:
        ValueError: If the statistics of the model's actions are those of another robot, or `execute` is below 1 or
            above the number of actions in a chunk.
    """
    horizon = model.config.action_horizon
    if execute is not None and not 1 <= execute <= horizon:
        raise ValueError(
            f"execute={execute} is not between 1 and {horizon}, the number of actions that the model predicts."
        )
    stats = model.get_action_stats(unnorm_key)
    check_robot(stats["q01"], stats["q99"])
    return ModelPolicy(model, processor, unnorm_key, execute)


def check_robot(low: Sequence[float], high: Sequence[float]) -> None:
    """Raise `ValueError` if the usual lowest and highest actions (A,) of a policy are not those of the tabletop."""
    # Metres, without rotation because the gripper points down.
    limits = np.array([MAX_STEP] * 3 + [0.0] * 3 + [1.0])
    bounds = np.array([low, high])
    if bounds.shape[1] != len(limits) or (np.abs(bounds) > limits + 1e-6).any():
        raise ValueError(
            f"The tabletop is not this policy's robot: the tabletop's hand moves by up to {MAX_STEP} m and does not "
            "rotate, but the statistics of this policy's actions exceed these limits. Evaluate the policy on recorded "
            "data instead (`openvla-hf evaluate --data`)."
        )


def run_episodes(
    policy: Policy,
    seeds: Iterable[int],
    *,
    tasks: Sequence[str] = ("put", "push"),
    condition: str = "as told",
    batch_size: int = 16,
    keep_frames: Callable[[int], bool] = lambda seed: False,
    cameras: Sequence[str] | None = None,
    state: bool = False,
) -> Iterator[Rollout]:
    """Run one episode for each seed, `batch_size` at a time, and yield each as it ends.

    A chunk is executed to its end before the policy predicts again, so the episodes of a batch need not predict at the
    same time.

    Args:
        policy: The policy to run, as `load_policy` returns it.
        seeds: One seed for each episode.
        tasks: Families to draw from.
        condition: One of `CONDITIONS`.
        batch_size: Episodes that run side by side; the policy predicts their actions in one batch.
        keep_frames: Given a seed, whether to keep the frames of its episode.
        cameras: Cameras that the policy observes, see `TabletopEnv`.
        state: Whether the policy observes the robot's state.

    Raises:
        ValueError: If the condition, a task or a camera is unknown.
        ImportError: If Gymnasium is not installed.
    """
    from .env import TabletopEnv

    if condition not in CONDITIONS:
        raise ValueError(f"Unknown condition {condition!r}; known: {', '.join(CONDITIONS)}.")
    waiting = deque(seeds)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < batch_size:
            seed = waiting.popleft()
            env = TabletopEnv(tasks, cameras=cameras, state=state)
            observation, info = env.reset(seed=seed, options={"swap_target": condition == "swapped"})
            running.append(_Running(env, Rollout(seed, info["task"], info["instruction"]), observation))
        _plan(policy, [one for one in running if not one.planned], condition == "black")
        still_running = []
        for one in running:
            if _step(one, keep_frames(one.rollout.seed)):
                yield one.rollout
            else:
                still_running.append(one)
        running = still_running


def _plan(policy: Policy, running: Sequence[_Running], blind: bool) -> None:
    """Predict the next action or chunk of each episode."""
    if not running:
        return
    seen = [_blacken(one.observation) if blind else one.observation for one in running]
    predicted = policy(seen, [one.rollout.instruction for one in running])
    for one, actions in zip(running, predicted, strict=True):
        one.planned.extend(np.atleast_2d(actions))
        one.rollout.predictions += 1


def _blacken(observation: Observation) -> Observation:
    """Return the observation with black images; the state stays as it is."""
    if not isinstance(observation, dict):
        return np.zeros_like(observation)
    return {name: value if name == "state" else np.zeros_like(value) for name, value in observation.items()}


def _step(running: _Running, keep_frames: bool) -> bool:
    """Execute the next planned action and return whether the episode has ended."""
    rollout = running.rollout
    if keep_frames:
        rollout.frames.append(first_image(running.observation))
    running.observation, _, terminated, truncated, info = running.env.step(running.planned.popleft())
    rollout.steps += 1
    if not (terminated or truncated):
        return False
    rollout.success = info["is_success"]
    rollout.moved_target = info["moved_object"] == running.env.task.target.name
    if keep_frames:
        rollout.frames.append(first_image(running.observation))
    return True


def success_by_task(rollouts: Iterable[Rollout]) -> dict[str, dict[str, float]]:
    """Return `{task: {"episodes", "success", "moved_target", "steps"}}`, rates in [0, 1], with an "all" row last."""
    groups: dict[str, list[Rollout]] = {}
    everything = list(rollouts)
    for rollout in everything:
        groups.setdefault(rollout.task, []).append(rollout)
    return {
        task: {
            "episodes": len(group),
            "success": float(np.mean([one.success for one in group])),
            "moved_target": float(np.mean([one.moved_target for one in group])),
            "steps": float(np.mean([one.steps for one in group])),
        }
        for task, group in [*sorted(groups.items()), ("all", everything)]
        if group
    }


def success_table(title: str, results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Make a table of `{condition: success_by_task(...)}`."""
    table = Table(title=title)
    for column in ("condition", "task", "episodes", "success", "moved the named object", "mean steps"):
        table.add_column(column, justify="left" if column in ("condition", "task") else "right")
    for condition, by_task in results.items():
        for task, row in by_task.items():
            table.add_row(
                condition,
                task,
                f"{row['episodes']:.0f}",
                f"{row['success']:.1%}",
                f"{row['moved_target']:.1%}",
                f"{row['steps']:.1f}",
                style="bold" if task == "all" else None,
                end_section=task == "all",
            )
    return table
