"""Run a policy in the tabletop, many episodes at a time, and measure its success."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..suites.play import play
from ..suites.policies import ModelPolicy, model_policy
from ..suites.results import success_by_task, success_table
from ..suites.simulator import open_simulators
from ..suites.suite import Policy, Rollout
from .suite import CONDITIONS, FIRST_UNSEEN_SEED, check_robot, tabletop_suite


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
    return model_policy(tabletop_suite().with_protocol(execute=execute), model, processor, unnorm_key)


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
    suite = tabletop_suite(
        families=tuple(tasks), condition=condition, observed=None if cameras is None else tuple(cameras), state=state
    )
    with open_simulators(suite, batch_size, processes=False) as simulators:
        for _, rollout in play(policy, suite.episodes_of(seeds), simulators, lambda one: keep_frames(one.seed)):
            yield rollout
