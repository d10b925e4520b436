"""Demonstrations of MetaWorld's scripted experts, as data for training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .metaworld import MetaWorldSuite


__all__ = ["record_episode", "record_experts"]

# How often a shove begins, how much stronger than the noise it is, and how long it lasts at least and at most, steps.
SHOVE_RATE, SHOVE_SCALE, SHOVE_STEPS = 0.04, 2.5, (2, 5)


def record_experts(
    suite: MetaWorldSuite, seeds: Iterable[int], *, noise: float = 0.35, state: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """Yield the experts' episodes as training data for `from_episodes`, `write_lerobot` and `write_rlds`.

    Each episode is a list of frames with `image` (size, size, 3) uint8, `instruction`, `action` (4,) float32, and with
    `state=True`, `state` (4,) float32. The actions are the expert's own, but the executed ones are noisy, so that the
    data shows how to recover from mistakes. Failed episodes are left out.

    Args:
        suite: The suite with the tasks to record. Each task is recorded with each seed, one task after the other.
        seeds: Seeds of the episodes. Evaluation uses seeds 0 to 49.
        noise: Standard deviation of the noise in the executed translation; 1 is the largest translation of an action.
        state: Whether to record the robot's state.

    Raises:
        ValueError: `noise` is negative.
        ImportError: MetaWorld is not installed.
    """
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}.")
    seeds = list(seeds)
    for task in suite.environments:
        env = suite.make(task)
        for seed in seeds:
            frames, success = record_episode(env, seed, noise)
            if success:
                yield (
                    frames
                    if state
                    else [{name: value for name, value in frame.items() if name != "state"} for frame in frames]
                )
        env.close()


def record_episode(env: Any, seed: int, noise: float) -> tuple[list[dict[str, Any]], bool]:
    """Record an episode of an expert.

    Args:
        env: A `MetaWorldEnv`.
        seed: Seed of the episode and of its noise.
        noise: See `record_experts`.

    Returns:
        The frames, and whether the episode succeeded.
    """
    rng = np.random.default_rng([seed, 1])
    observation, info = env.reset(seed=seed)
    frames: list[dict[str, Any]] = []
    shove, left = np.zeros(3), 0
    done = False
    while not done:
        action = env.expert_action()
        frames.append({**observation, "instruction": info["instruction"], "action": action})
        if left == 0 and rng.random() < SHOVE_RATE:
            shove, left = rng.normal(0.0, SHOVE_SCALE * noise, 3), int(rng.integers(*SHOVE_STEPS, endpoint=True))
        executed = action + np.append(rng.normal(0.0, noise, 3) + shove * (left > 0), 0.0)
        left = max(0, left - 1)
        observation, _, terminated, truncated, info = env.step(executed)
        done = terminated or truncated
    return frames, bool(info["is_success"])
