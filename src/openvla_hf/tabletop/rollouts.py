"""Let a policy act in the tabletop, many episodes at a time, and count what it achieves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from .env import MAX_STEP, TabletopEnv


TABLETOP_POLICY = Path(__file__).parent / "policy"
"""The checkpoint of the small policy that ships with the package."""

FIRST_UNSEEN_SEED = 1_000_000
"""Evaluation draws its seeds from here on; training stays below."""

Policy = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]
"""Frames (B of (224, 224, 3) uint8) and instructions (B) -> actions (B, 7) in the robot's units."""

CONDITIONS = {
    "as told": "the instruction names the target",
    "swapped": "the same scene, with the target's name exchanged for the distractor's",
    "black": "the policy sees a black image",
}


@dataclass
class Episode:
    """What happened in one episode.

    success: Whether the instruction was carried out.
    moved_target: Whether the object that was moved last is the one that the instruction names.
    frames: What the camera saw, first to last; empty unless asked for.
    """

    seed: int
    task: str
    instruction: str
    success: bool = False
    moved_target: bool = False
    steps: int = 0
    frames: list[np.ndarray] = field(default_factory=list)


@dataclass
class _Running:
    env: TabletopEnv
    episode: Episode
    image: np.ndarray


def load_policy(model: Any, processor: Any, unnorm_key: str | None = None) -> Policy:
    """A model and its processor as a function from frames and instructions to actions.

    Raises:
        ValueError: The statistics of the model's actions are those of another robot.
    """
    stats = model.get_action_stats(unnorm_key)
    # Metres, and no rotation: the gripper points down.
    limits = np.array([MAX_STEP] * 3 + [0.0] * 3 + [1.0])
    bounds = np.array([stats["q01"], stats["q99"]])
    if bounds.shape[1] != len(limits) or (np.abs(bounds) > limits + 1e-6).any():
        raise ValueError(
            f"The tabletop is not this policy's robot: the tabletop's hand moves by up to {MAX_STEP} m and does not "
            "rotate, and the statistics of this policy's actions go beyond. Evaluate the policy on recorded data "
            "instead (`openvla-hf evaluate --data`)."
        )

    def act(images: Sequence[np.ndarray], instructions: Sequence[str]) -> np.ndarray:
        inputs = processor(list(images), instruction=list(instructions))
        return np.atleast_2d(model.predict_action(**inputs, unnorm_key=unnorm_key))

    return act


def run_episodes(
    policy: Policy,
    seeds: Iterable[int],
    *,
    tasks: Sequence[str] = ("put", "push"),
    condition: str = "as told",
    batch_size: int = 16,
    keep_frames: Callable[[int], bool] = lambda seed: False,
) -> Iterator[Episode]:
    """Play one episode for each seed, `batch_size` at a time, and yield them as they end.

    Args:
        policy: What acts.
        seeds: One for each episode.
        tasks: Families to draw from.
        condition: One of `CONDITIONS`.
        batch_size: Episodes that act in step, so that the policy predicts a batch.
        keep_frames: Which seeds' frames to keep.

    Raises:
        ValueError: Unknown condition.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"Unknown condition {condition!r}; known: {', '.join(CONDITIONS)}.")
    waiting = deque(seeds)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < batch_size:
            seed = waiting.popleft()
            env = TabletopEnv(tasks)
            image, info = env.reset(seed=seed, options={"swap_target": condition == "swapped"})
            running.append(_Running(env, Episode(seed, info["task"], info["instruction"]), image))
        seen = [np.zeros_like(one.image) if condition == "black" else one.image for one in running]
        actions = policy(seen, [one.episode.instruction for one in running])
        still_running = []
        for one, action in zip(running, actions, strict=True):
            episode = one.episode
            if keep_frames(episode.seed):
                episode.frames.append(one.image)
            one.image, _, terminated, truncated, info = one.env.step(action)
            episode.steps += 1
            if not (terminated or truncated):
                still_running.append(one)
                continue
            episode.success = info["is_success"]
            episode.moved_target = info["moved_object"] == one.env.task.target.name
            if keep_frames(episode.seed):
                episode.frames.append(one.image)
            yield episode
        running = still_running


def success_by_task(episodes: Iterable[Episode]) -> dict[str, dict[str, float]]:
    """`{task: {"episodes", "success", "moved_target", "steps"}}`, rates in [0, 1], with an "all" row last."""
    groups: dict[str, list[Episode]] = {}
    everything = list(episodes)
    for episode in everything:
        groups.setdefault(episode.task, []).append(episode)
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
    """`{condition: success_by_task(...)}` as a table."""
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
