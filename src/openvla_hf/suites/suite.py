"""A suite: the tasks of a benchmark, and a protocol that fixes what happens in each episode.

The process of a simulator imports this module, but does not need PyTorch. Functions that use other rooms therefore
import them when they are called.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from PIL import Image

from .gripper import GRIPPERS


if TYPE_CHECKING:
    import gymnasium


__all__ = [
    "Episode",
    "Observation",
    "Policy",
    "Protocol",
    "Rollout",
    "Suite",
    "choose_renderer",
    "first_image",
    "installed_version",
]

# The frame of the only camera, or a dict with the frame of each camera, uint8 (H, W, 3), and the state.
Observation = np.ndarray | dict[str, np.ndarray]
# Observations (B) and instructions (B) -> actions (B, A) in the robot's units, or chunks (B, K, A) of actions to
# execute one after the other.
Policy = Callable[[Sequence[Any], Sequence[str]], np.ndarray]
STATE = "state"
# Quality of the JPEG images in the datasets on which OpenVLA's LIBERO policies were trained.
JPEG_QUALITY = 95


def first_image(observation: Observation) -> np.ndarray:
    """Return the frame of the first camera in an observation."""
    return next(iter(observation.values())) if isinstance(observation, dict) else observation


@dataclass(frozen=True)
class Protocol:
    """Everything that fixes the episodes of a suite and what the policy sees.

    Attributes:
        episodes: Episodes of each environment.
        first_seed: Seed of the first episode; the following ones count up.
        initial_states: Where the initial states come from.
        max_steps: Steps after which an episode has failed.
        success: When an episode counts as a success.
        cameras: Cameras that the suite renders, the main one first.
        image_size: Pixels along a side of a rendered image.
        rotate: Whether images are rotated by 180 degrees.
        jpeg: Whether images are compressed as JPEG and decompressed.
        resize: Side to which images are resized with TensorFlow's lanczos3; `None` leaves the size to the processor.
        crop_area: Share of the area that the processor's centre crop keeps, unless the policy was trained with
            another; `None` leaves it to the processor.
        settle_steps: Steps with `settle_action` before the policy acts, in which objects come to rest.
        settle_action: Action of these steps.
        gripper: Name of the `GRIPPERS` convention in which the environment takes the last dimension of actions; `None`
            if actions go to the environment unchanged.
        execute: Actions of a chunk that are executed before the policy predicts again; `None` for all.
    """

    episodes: int
    first_seed: int
    initial_states: str
    max_steps: int
    success: str = "the environment reports success at any step, which ends the episode"
    cameras: tuple[str, ...] = ("image",)
    image_size: int = 224
    rotate: bool = False
    jpeg: bool = False
    resize: int | None = None
    crop_area: float | None = None
    settle_steps: int = 0
    settle_action: tuple[float, ...] = ()
    gripper: str | None = None
    execute: int | None = None

    def show(self, observation: Observation) -> Observation:
        """Return what the policy sees of an observation."""
        if not (self.rotate or self.jpeg or self.resize):
            return observation
        if not isinstance(observation, dict):
            return self._show_image(observation)
        return {name: one if name == STATE else self._show_image(one) for name, one in observation.items()}

    def _show_image(self, image: np.ndarray) -> np.ndarray:
        if self.rotate:
            image = image[::-1, ::-1]
        if self.jpeg:
            from ..data.images import decode_image

            # Pillow compresses exactly like TensorFlow, but decompresses with another transform.
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=JPEG_QUALITY)
            image = decode_image(file.getvalue())
        if self.resize is not None:
            from ..processing.image_resizing import resize_lanczos3

            image = resize_lanczos3(image, self.resize, self.resize)
        return np.ascontiguousarray(image)

    def execute_action(self, action: np.ndarray) -> np.ndarray:
        """Convert an action (A,) of the policy to the environment's."""
        if self.gripper is None:
            return action
        return np.append(action[:-1], GRIPPERS[self.gripper].convert(action[-1:]))


@dataclass(frozen=True, order=True)
class Episode:
    """An episode to play: the environment of a suite, and the seed of its `reset`."""

    environment: str
    seed: int


@dataclass
class Rollout:
    """One episode of a policy.

    Attributes:
        seed: Seed of the episode.
        task: Name of the task, or family of tasks.
        instruction: The task in words.
        success: Whether the task was solved.
        moved_target: Whether the object that was moved last is the one that the instruction names; `None` where the
            environment does not say so, as in other suites than the tabletop.
        moved_object: Name of the object that was moved last; `None` if no object was moved, or where the environment
            does not say so.
        steps: Number of actions.
        frames: The first camera's frames as the policy saw them, uint8 (H, W, 3), first to last; empty unless they are
            kept.
        predictions: Number of times that the policy predicted an action or a chunk.
    """

    seed: int
    task: str
    instruction: str
    success: bool = False
    moved_target: bool | None = None
    steps: int = 0
    frames: list[np.ndarray] = field(default_factory=list)
    predictions: int = 0
    moved_object: str | None = None


@dataclass(frozen=True)
class Suite(ABC):
    """A benchmark. Subclasses say how to build an environment, and which policies it takes.

    An environment is a Gymnasium environment that returns an observation (a frame, or a dict with a frame for each
    camera and `state`). The `info` of its `reset` and `step` has `task`, `instruction` and `is_success`.

    Attributes:
        title: Name of the benchmark in sentences.
        most_episodes: Number of initial states of each environment; `None` if it is not limited.
        name: Name of the suite, such as "metaworld".
        environments: Names of the environments to play, as `make` takes them.
        protocol: What fixes the episodes.
        state_dim: Dimensions of `state` in the observations.
        packages: Packages whose versions belong to a result.
    """

    title: ClassVar[str]
    most_episodes: ClassVar[int | None] = None
    name: str
    environments: tuple[str, ...]
    protocol: Protocol
    state_dim: int
    packages: tuple[str, ...] = ("openvla-hf", "gymnasium", "numpy")

    def known_tasks(self) -> Mapping[str, tuple[str, ...]]:
        """Return the names that `select` takes, and the environments of each: by default, that of the same name."""
        return {one: (one,) for one in self.environments}

    def select(self, tasks: Sequence[str]) -> Self:
        """Return the suite with the environments of these tasks or groups of tasks only.

        Raises:
            ValueError: A task is unknown.
        """
        self.check_tasks(tasks)
        known = self.known_tasks()
        return replace(self, environments=tuple(dict.fromkeys(one for task in tasks for one in known[task])))

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Raise `ValueError` if a task is unknown."""
        from ..modeling.known_names import check_name

        for task in tasks:
            check_name(task, self.known_tasks(), "task")

    def with_protocol(self, **changes: Any) -> Self:
        """Return the suite with another protocol: fields of `Protocol` that are not `None` replace the preset's.

        Raises:
            ValueError: There are not as many initial states as `episodes`.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if self.most_episodes is not None and given.get("episodes", 0) > self.most_episodes:
            raise ValueError(
                f"{self.title} has {self.most_episodes} initial states for each task, so {given['episodes']} episodes "
                f"are too many. Give at most {self.most_episodes}."
            )
        return replace(self, protocol=replace(self.protocol, **given))

    @abstractmethod
    def make(self, environment: str) -> gymnasium.Env[Any, np.ndarray]:
        """Build an environment.

        Raises:
            ImportError: A package of the suite is not installed.
        """

    def check_installed(self) -> None:  # noqa: B027 - most suites need no check
        """Raise `ImportError` if a package of the suite is not installed. A suite without such packages needs none."""

    def reset_options(self) -> dict[str, Any]:
        """Return the options of each `reset`."""
        return {}

    def show(self, observation: Observation) -> Observation:
        """Return what the policy sees of an observation."""
        return self.protocol.show(observation)

    @abstractmethod
    def check_policy(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Raise `ValueError` if the usual lowest and highest actions (A,) of a policy are not for this robot."""

    def check_cameras(self, cameras: Sequence[str]) -> None:
        """Raise `ValueError` if a policy takes a camera that the suite does not have."""
        if missing := set(cameras) - set(self.protocol.cameras):
            raise ValueError(
                f"The policy sees the cameras {', '.join(map(repr, sorted(missing)))}, but {self.title}'s cameras are "
                f"{', '.join(map(repr, self.protocol.cameras))}."
            )

    def episodes(self) -> list[Episode]:
        """List the episodes of the protocol."""
        first, count = self.protocol.first_seed, self.protocol.episodes
        return [Episode(one, seed) for one in self.environments for seed in range(first, first + count)]

    def describe(self) -> dict[str, Any]:
        """Describe the suite in JSON types. Two results are comparable if their descriptions are equal."""
        protocol = {name: list(one) if isinstance(one, tuple) else one for name, one in asdict(self.protocol).items()}
        return {"suite": self.name, "environments": list(self.environments), "protocol": protocol}

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that a result depends on, see `installed_version`.

        Raises:
            ImportError: A package of the suite is not installed.
        """
        self.check_installed()
        return {name: installed_version(name) for name in self.packages}


def choose_renderer() -> str:
    """Return the library with which MuJoCo renders, and choose software, which needs no display, if none is set.

    MuJoCo reads the variable when it is first imported.
    """
    return os.environ.setdefault("MUJOCO_GL", "osmesa")


def installed_version(package: str) -> str:
    """Return the version of an installed package, "unknown" for one that can be imported but has no metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
