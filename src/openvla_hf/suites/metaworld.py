"""MetaWorld as a suite: 50 tasks of a Sawyer arm in MuJoCo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .suite import Protocol, Suite, choose_renderer


if TYPE_CHECKING:
    from .metaworld_env import MetaWorldEnv


__all__ = ["DIFFICULTIES", "INSTRUCTIONS", "MetaWorldSuite", "metaworld_suite"]

# Group -> tasks and their instructions. The groups by difficulty are those of Seo et al., "Masked World Models for
# Visual Control"; MetaWorld has no sentences of its own.
DIFFICULTIES: dict[str, dict[str, str]] = {
    "easy": {
        "button-press-v3": "press the button",
        "button-press-topdown-v3": "press the button from above",
        "button-press-topdown-wall-v3": "press the button from above, past the wall",
        "button-press-wall-v3": "press the button behind the wall",
        "coffee-button-v3": "press the button of the coffee machine",
        "dial-turn-v3": "turn the dial",
        "door-close-v3": "close the door",
        "door-lock-v3": "lock the door",
        "door-open-v3": "open the door",
        "door-unlock-v3": "unlock the door",
        "drawer-close-v3": "close the drawer",
        "drawer-open-v3": "open the drawer",
        "faucet-close-v3": "close the faucet",
        "faucet-open-v3": "open the faucet",
        "handle-press-v3": "press the handle down",
        "handle-press-side-v3": "press the handle down from the side",
        "handle-pull-v3": "pull the handle up",
        "handle-pull-side-v3": "pull the handle up from the side",
        "lever-pull-v3": "pull the lever up",
        "peg-unplug-side-v3": "pull the peg out",
        "plate-slide-v3": "slide the plate into the cabinet",
        "plate-slide-back-v3": "slide the plate back",
        "plate-slide-back-side-v3": "slide the plate back to the side",
        "plate-slide-side-v3": "slide the plate to the side into the cabinet",
        "reach-v3": "reach the red ball",
        "reach-wall-v3": "reach the red ball behind the wall",
        "window-close-v3": "close the window",
        "window-open-v3": "open the window",
    },
    "medium": {
        "basketball-v3": "put the ball into the basket",
        "bin-picking-v3": "move the cube to the other bin",
        "box-close-v3": "put the lid on the box",
        "coffee-pull-v3": "pull the mug away from the coffee machine",
        "coffee-push-v3": "push the mug under the coffee machine",
        "hammer-v3": "hammer the nail",
        "peg-insert-side-v3": "insert the peg into the hole",
        "push-wall-v3": "push the puck past the wall to the goal",
        "soccer-v3": "push the ball into the goal",
        "sweep-v3": "sweep the block off the table",
        "sweep-into-v3": "sweep the block into the hole",
    },
    "hard": {
        "assembly-v3": "put the ring on the peg",
        "hand-insert-v3": "put the block into the hole",
        "pick-out-of-hole-v3": "pick the puck out of the hole",
        "pick-place-v3": "put the puck at the goal",
        "push-v3": "push the puck to the goal",
        "push-back-v3": "push the block back to the goal",
    },
    "very_hard": {
        "shelf-place-v3": "put the block on the shelf",
        "disassemble-v3": "take the ring off the peg",
        "stick-pull-v3": "pull the thermos with the stick",
        "stick-push-v3": "push the thermos with the stick",
        "pick-place-wall-v3": "put the puck at the goal behind the wall",
    },
}
INSTRUCTIONS = {task: text for tasks in DIFFICULTIES.values() for task, text in tasks.items()}
STATE_NAMES = ("x", "y", "z", "opening")
ACTION_NAMES = ("dx", "dy", "dz", "effort")
# Actions go from -1 to 1; statistics of demonstrations may exceed this by rounding.
LIMIT = 1.0 + 1e-6

PROTOCOL = Protocol(
    episodes=50,
    first_seed=0,
    initial_states="the 50 of MetaWorld's benchmark MT1 with seed 0, in order",
    max_steps=500,
    cameras=("image",),
    image_size=224,
)


@dataclass(frozen=True)
class MetaWorldSuite(Suite):
    """MetaWorld, seen by one camera. See `MetaWorldEnv` for the observation and the action."""

    title: ClassVar[str] = "MetaWorld"
    # Demonstrations for training have the seeds from 50 on.
    most_episodes: ClassVar[int | None] = PROTOCOL.episodes

    def known_tasks(self) -> Mapping[str, tuple[str, ...]]:
        """Return the tasks and the groups by difficulty."""
        groups = {name: tuple(tasks) for name, tasks in DIFFICULTIES.items()}
        return groups | {task: (task,) for task in INSTRUCTIONS}

    def make(self, environment: str) -> MetaWorldEnv:
        """Build the environment of a task."""
        from .metaworld_env import MetaWorldEnv

        return MetaWorldEnv(environment, INSTRUCTIONS[environment], image_size=self.protocol.image_size)

    def check_installed(self) -> None:
        """Raise `ImportError` if MetaWorld is not installed, or MuJoCo can't render."""
        from . import metaworld_env  # noqa: F401

    def describe(self) -> dict[str, Any]:
        """Describe the suite in JSON types, with the library that renders its images."""
        return super().describe() | {"renderer": choose_renderer()}

    def check_policy(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Raise `ValueError` if the usual lowest and highest actions (A,) are not those of MetaWorld's arm."""
        if len(low) != len(ACTION_NAMES) or np.abs([low, high]).max() > LIMIT:
            raise ValueError(
                "MetaWorld is not this policy's robot: its actions have 4 dimensions from -1 to 1, but the statistics "
                "of this policy's actions differ. Fine-tune the policy on demonstrations of MetaWorld "
                "(`openvla-hf record --suite metaworld`)."
            )


def metaworld_suite() -> MetaWorldSuite:
    """Make the suite of all 50 tasks."""
    packages = ("openvla-hf", "gymnasium", "metaworld", "mujoco", "numpy")
    return MetaWorldSuite("metaworld", tuple(INSTRUCTIONS), PROTOCOL, state_dim=len(STATE_NAMES), packages=packages)
