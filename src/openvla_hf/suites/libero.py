"""LIBERO as five suites, with the protocol under which OpenVLA and OpenVLA-OFT published their results."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .gripper import is_opening
from .suite import Protocol, Suite, choose_renderer, installed_version


if TYPE_CHECKING:
    from .libero_env import LiberoEnv


__all__ = ["LIBERO_SUITES", "LiberoSuite", "libero_suite"]

# Suite -> number of tasks, and steps after which an episode has failed: a little more than the longest demonstration.
LIBERO_SUITES = {
    "libero_spatial": (10, 220),
    "libero_object": (10, 280),
    "libero_goal": (10, 300),
    "libero_10": (10, 520),
    "libero_90": (90, 400),
}
ACTION_DIM, STATE_DIM = 7, 8
INITIAL_STATES = 50
# A policy for LIBERO moves by up to about 1 in a step, which is 5 cm. One that predicts metres stays below this.
LEAST_REACH = 0.1
# While the objects of a scene come to rest, the arm stands still with an open gripper.
WAIT = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@dataclass(frozen=True)
class LiberoSuite(Suite):
    """One of LIBERO's suites, whose environments are named by the numbers of the tasks. See `LiberoEnv`."""

    title: ClassVar[str] = "LIBERO"
    most_episodes: ClassVar[int | None] = INITIAL_STATES

    def known_tasks(self) -> Mapping[str, tuple[str, ...]]:
        """Return the numbers of the tasks."""
        return {str(index): (str(index),) for index in range(LIBERO_SUITES[self.name][0])}

    def make(self, environment: str) -> LiberoEnv:
        """Build the environment of a task."""
        from .libero_env import LiberoEnv

        return LiberoEnv(self.name, int(environment), image_size=self.protocol.image_size)

    def check_installed(self) -> None:
        """Raise `ImportError` if LIBERO is not installed."""
        from . import libero_env  # noqa: F401

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages, and that of LIBERO under the name with which it was installed."""
        names = importlib.metadata.packages_distributions().get("libero", ["libero"])
        return super().versions() | {name: installed_version(name) for name in names}

    def describe(self) -> dict[str, Any]:
        """Describe the suite in JSON types, with the library that renders its images."""
        return super().describe() | {"renderer": choose_renderer()}

    def check_policy(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Raise `ValueError` if the usual lowest and highest actions (A,) are not those of a policy for LIBERO."""
        if len(low) != ACTION_DIM:
            raise ValueError(
                f"LIBERO is not this policy's robot: it takes actions of {ACTION_DIM} dimensions, but the policy "
                f"predicts {len(low)}. Evaluate the policy on the suite of its own robot, or on "
                "recordings with `--data`."
            )
        if not is_opening(low[-1], high[-1]):
            raise ValueError(
                f"The policy's gripper goes from {low[-1]:g} to {high[-1]:g}, but LIBERO's protocol converts a "
                "gripper of 1 for open and 0 for closed. Train the policy with a robot adapter that declares the "
                "gripper's recorded values."
            )
        if (reach := np.abs([low[:3], high[:3]]).max()) < LEAST_REACH:
            raise ValueError(
                f"The policy's translations do not exceed {reach:g}, as in metres, but a translation of 1 is 5 cm in "
                "LIBERO. Evaluate the policy on the suite of its own robot, or train it on LIBERO's demonstrations."
            )


def libero_suite(name: str) -> LiberoSuite:
    """Make one of `LIBERO_SUITES`."""
    tasks, max_steps = LIBERO_SUITES[name]
    protocol = Protocol(
        episodes=INITIAL_STATES,
        first_seed=0,
        initial_states="LIBERO's .pruned_init files: episode i has state i, and the fixtures' places of draw i after "
        "environment seed 0",
        max_steps=max_steps,
        cameras=("full_image", "wrist_image"),
        image_size=256,
        rotate=True,
        jpeg=True,
        resize=224,
        crop_area=0.9,
        settle_steps=10,
        settle_action=WAIT,
        gripper="libero",
    )
    packages = ("openvla-hf", "gymnasium", "robosuite", "mujoco", "numpy")
    return LiberoSuite(name, tuple(map(str, range(tasks))), protocol, STATE_DIM, packages)
