"""The registry of robots by name, and the robots that come with the package."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..modeling.known_names import check_name
from .adapters import Robot
from .feature_names import FirstOf
from .gripper import Gripper
from .motion import POSE_DIMS
from .open_x import dataset_robot, known_table


@dataclass(frozen=True)
class ReachedPoseRobot(Robot):
    """Robot whose action is the movement that it made, from one state to the next.

    The first frame is left out because it is empty in Bridge, and the last because no state follows it.
    """

    @property
    def converts(self) -> bool:
        """Always true."""
        return True

    @property
    def needs_whole_episodes(self) -> bool:
        """Always true."""
        return True

    @property
    def needs_state(self) -> bool:
        """Always true."""
        return True

    def convert(
        self, action: np.ndarray, state: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Convert actions as `Robot` does, with the reached poses in place of the recorded movements."""
        if state is None or state.shape[1] < 2 * POSE_DIMS:
            raise ValueError(f"the adapter {self.name!r} needs a state that begins with a pose of six numbers.")
        if len(action) < 3:
            raise ValueError(f"the adapter {self.name!r} needs at least 3 frames, but the episode has {len(action)}.")
        # Convert before the last step is dropped, since its gripper value decides how earlier ones settle.
        kept, standard, _ = super().convert(action[1:], state[1:])
        pose = state[1:, : 2 * POSE_DIMS]
        # As in the original, angles are subtracted as plain numbers, and `join` adds them.
        return kept[:-1] + 1, np.concatenate([np.diff(pose, axis=0), standard[:-1, 2 * POSE_DIMS :]], 1), state[1:-1]

    def join(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Add differences of poses, which gives the difference of the last pose from the first."""
        return np.concatenate([(first + second)[:, : 2 * POSE_DIMS], second[:, 2 * POSE_DIMS :]], axis=1)


_REGISTRY: dict[str, Robot] = {}


def register_robot(robot: Robot) -> Robot:
    """Register an adapter under its name. A later adapter of the same name replaces it."""
    _REGISTRY[robot.name] = robot
    return robot


def registered_robots() -> list[str]:
    """List the names of the registered robots."""
    return sorted(_REGISTRY)


def known_robots() -> list[str]:
    """List the names of the registered robots and of the datasets of Open X-Embodiment."""
    return sorted({*_REGISTRY, *known_table().datasets})


def find_robot(name: str) -> Robot:
    """Return the adapter of a name: the registered one, or else that of the dataset of Open X-Embodiment.

    Raises:
        ValueError: No adapter has this name, or the dataset can't be trained on.
    """
    check_name(name, known_robots(), "robot")
    return _REGISTRY[name] if name in _REGISTRY else dataset_robot(name)


def resolve_robot(robot: "Robot | str | None", dataset: str, **options: Any) -> Robot:
    """Return the adapter for a dataset.

    Args:
        robot: An adapter or its name. By default, the adapter registered under the dataset's name, or else the generic
            one, which takes the features as they are.
        dataset: Name of the dataset.
        options: Fields of `Robot` that override the adapter's where they are not `None`.

    Raises:
        ValueError: No adapter has this name, or an option does not fit the adapter.
    """
    if robot is None:
        robot = _REGISTRY.get(dataset, GENERIC)
    elif isinstance(robot, str):
        robot = find_robot(robot)
    given = {name: value for name, value in options.items() if value is not None}
    return replace(robot, **given) if given else robot


def describe_robot(robot: Robot) -> dict[str, str]:
    """Describe an adapter by its class and the fields that differ from their defaults, as text.

    A checkpoint stores the description, so that another adapter under the same name is noticed later. It leaves out
    `cameras`, since a checkpoint stores the features of the cameras that it read.
    """
    described = [field for field in fields(robot) if field.name != "cameras"]
    values = {field.name: repr(getattr(robot, field.name)) for field in described}
    defaults = {field.name: repr(field.default) for field in described}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    return {"class": type(robot).__name__, **changed}


def require_same_robot(name: str, description: dict[str, str]) -> None:
    """Require that the adapter of this name still matches a description from `describe_robot`.

    Raises:
        ValueError: No adapter has this name, or its adapter differs.
    """
    if name not in known_robots():
        raise ValueError(
            f"Training read the data with the robot {name!r}, which is not registered. Pass the Python file that "
            "registers it as `robots`."
        )
    now = describe_robot(find_robot(name))
    changed = sorted(key for key in description.keys() | now.keys() if description.get(key) != now.get(key))
    if changed:
        raise ValueError(
            f"Training read the data with another robot {name!r}, which differs in {', '.join(changed)}. Pass the "
            "Python file that registers the robot used in training as `robots`."
        )


# Takes the features as they are and scales every dimension.
GENERIC = register_robot(Robot("generic"))

TABLETOP = register_robot(
    Robot(
        "tabletop",
        action_dim=7,
        gripper=Gripper(open=1.0, closed=0.0),
        frequency=5.0,
        space="end_effector_delta",
    )
)
LIBERO = register_robot(
    Robot(
        "libero",
        camera=("observation.image", "observation.images.image", "image"),
        action=FirstOf("action", "actions"),
        action_dim=7,
        gripper=Gripper(open=-1.0, closed=1.0),
        frequency=20.0,
        space="end_effector_delta",
        cameras={
            "full_image": FirstOf("observation.image", "observation.images.image", "image"),
            "wrist_image": FirstOf(
                "observation.wrist_image", "observation.images.wrist_image", "observation.images.image2", "wrist_image"
            ),
        },
    )
)
for _suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"):
    # The published datasets, and their names in published statistics.
    register_robot(replace(LIBERO, name=_suite))
    register_robot(replace(LIBERO, name=f"{_suite}_no_noops"))
BRIDGE = register_robot(
    ReachedPoseRobot(
        "bridge_orig",
        camera=("observation.image_0", "observation.images.image_0"),
        action_dim=7,
        gripper=Gripper(open=1.0, closed=0.0, binarize=True),
        frequency=5.0,
        space="end_effector_delta",
        cameras={"full_image": FirstOf("observation.image_0", "observation.images.image_0")},
    )
)
# Two arms of six joints and a gripper each. All dimensions are scaled, and so are the grippers.
ALOHA = register_robot(
    Robot(
        "aloha",
        camera=FirstOf("observation.images.cam_high", "observation.images.top", "observation.image"),
        frequency=50.0,
        space="joint_positions",
        cameras={
            "full_image": FirstOf("observation.images.cam_high", "observation.images.top", "observation.image"),
            "left_wrist_image": FirstOf("observation.images.cam_left_wrist", "observation.left_wrist_image"),
            "right_wrist_image": FirstOf("observation.images.cam_right_wrist", "observation.right_wrist_image"),
        },
    )
)

__all__ = [
    "ALOHA",
    "BRIDGE",
    "GENERIC",
    "LIBERO",
    "TABLETOP",
    "FirstOf",
    "Gripper",
    "ReachedPoseRobot",
    "Robot",
    "describe_robot",
    "find_robot",
    "known_robots",
    "register_robot",
    "registered_robots",
    "require_same_robot",
    "resolve_robot",
]
