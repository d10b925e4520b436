"""The tabletop as a suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from ..suites.suite import STATE, Episode, Observation, Protocol, Suite
from .physics import MAX_STEP
from .scene import CAMERAS, STATE_NAMES


if TYPE_CHECKING:
    from .env import TabletopEnv


__all__ = ["CONDITIONS", "FIRST_UNSEEN_SEED", "TabletopSuite", "check_robot", "tabletop_suite"]

# Evaluation draws its seeds from here on; training stays below.
FIRST_UNSEEN_SEED = 1_000_000
CONDITIONS = {
    "as told": "the instruction names the target",
    "swapped": "the same scene, with the target's name exchanged for the distractor's",
    "black": "the policy sees a black image",
}
FAMILIES = ("put", "push")
PROTOCOL = Protocol(
    episodes=200,
    first_seed=FIRST_UNSEEN_SEED,
    initial_states="the scene, the task and the noise of the hand are drawn from the seed",
    max_steps=80,
    cameras=CAMERAS,
)


@dataclass(frozen=True)
class TabletopSuite(Suite):
    """The tabletop, whose seed draws the family of an episode's task.

    Attributes:
        families: Families of tasks to draw from.
        condition: One of `CONDITIONS`.
        observed: Cameras in the observation, see `TabletopEnv`.
        state: Whether the robot's state is in the observation.
    """

    title: ClassVar[str] = "the tabletop"
    families: tuple[str, ...] = FAMILIES
    condition: str = "as told"
    observed: tuple[str, ...] | None = CAMERAS
    state: bool = True

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise ValueError(f"Unknown condition {self.condition!r}. Choose from {', '.join(CONDITIONS)}.")

    def known_tasks(self) -> Mapping[str, tuple[str, ...]]:
        """Return the families of tasks."""
        from .env import TASKS

        return dict.fromkeys(TASKS, ("tabletop",))

    def select(self, tasks: Sequence[str]) -> Self:
        """Return the suite that draws from these families of tasks."""
        self.check_tasks(tasks)
        return replace(self, families=tuple(tasks))

    def make(self, environment: str) -> TabletopEnv:
        """Build the environment."""
        from .env import TabletopEnv

        steps = self.protocol.settle_steps + self.protocol.max_steps
        return TabletopEnv(self.families, max_steps=steps, cameras=self.observed, state=self.state)

    def check_installed(self) -> None:
        """Raise `ImportError` if Gymnasium is not installed."""
        from . import env  # noqa: F401

    def reset_options(self) -> dict[str, Any]:
        """Name the distractor in the instruction if the condition says so."""
        return {"swap_target": self.condition == "swapped"}

    def show(self, observation: Observation) -> Observation:
        """Black out the images if the condition says so; the state stays as it is."""
        if self.condition != "black":
            return observation
        if not isinstance(observation, dict):
            return np.zeros_like(observation)
        return {name: value if name == STATE else np.zeros_like(value) for name, value in observation.items()}

    def check_policy(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Raise `ValueError` if the usual lowest and highest actions (A,) are not those of the tabletop."""
        check_robot(low, high)

    def episodes_of(self, seeds: Iterable[int]) -> list[Episode]:
        """List the episodes of these seeds."""
        return [Episode(environment, seed) for seed in seeds for environment in self.environments]

    def describe(self) -> dict[str, Any]:
        """Describe the suite in JSON types."""
        return super().describe() | {"tasks": list(self.families), "condition": self.condition}


def tabletop_suite(**fields: Any) -> TabletopSuite:
    """Make the suite of the tabletop; `fields` are those of `TabletopSuite`."""
    return TabletopSuite("tabletop", ("tabletop",), PROTOCOL, len(STATE_NAMES), **fields)


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
