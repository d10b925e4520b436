"""Robot adapters: which camera is seen, and how a data set's action becomes OpenVLA's.

OpenVLA's action of an end effector is dx, dy, dz (metres), droll, dpitch, dyaw (radians, extrinsic x-y-z) and the
gripper, 1 = open and 0 = closed. Other robots (joints, two arms) keep the dimensions that they have.
"""

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np


Names = str | tuple[str, ...]
"""A feature's name, or several of which a data set has one: the first that it has is read."""

INSTRUCTION_NAMES = ("language_instruction", "observation.natural_language_instruction", "instruction", "task")
POSE_DIMS = 3
"""Where the rotation begins in an end effector's action or state, after the position."""
RANGE_SLACK = 0.05
"""Share of its range by which a gripper's value may lie outside, as sensors do."""


@dataclass(frozen=True)
class Gripper:
    """The values that a data set writes for an open and a closed gripper, in the last dimension of the action.

    binarize: whether to make what lies between them what the gripper becomes next (as for Bridge).
    """

    open: float = 1.0
    closed: float = 0.0
    binarize: bool = False

    def to_openvla(self, values: np.ndarray) -> np.ndarray:
        """(T) values of the data set to 1 = open, 0 = closed.

        Raises:
            ValueError: values outside the range.
        """
        opening = (values - self.closed) / (self.open - self.closed)
        if opening.min() < -RANGE_SLACK or opening.max() > 1 + RANGE_SLACK:
            raise ValueError(
                f"the gripper's values go from {values.min():g} to {values.max():g}, but its adapter says "
                f"open={self.open:g} and closed={self.closed:g}."
            )
        return _settle(opening) if self.binarize else np.clip(opening, 0.0, 1.0)


@dataclass(frozen=True)
class Robot:
    """How one data set is read.

    Args:
        name: The adapter's name.
        camera: Feature with the image that the model sees; by default the only one.
        action: Feature with the action.
        state: Feature with the proprioception; a data set may have none.
        instruction: Feature with the text, where the format has no place of its own for it.
        select: Which numbers of the action are taken, in which order; all by default.
        action_dim: How many numbers the data set's action must have.
        rotation: How the numbers after the position say a rotation, one of `ROTATIONS`; it becomes Euler angles.
        relative: Whether the action is a movement; else it is a pose, and the movement to it from the state, whose
            first numbers must be a pose in the same form, is taken.
        gripper: What its values mean. Then the last dimension is the gripper's and is not scaled by statistics.
        frequency: Actions a second.
    """

    name: str
    camera: Names = ()
    action: Names = "action"
    state: Names = ("observation.state", "state")
    instruction: Names = INSTRUCTION_NAMES
    select: tuple[int, ...] | None = None
    action_dim: int | None = None
    rotation: str = "euler"
    relative: bool = True
    gripper: Gripper | None = None
    frequency: float | None = None

    def __post_init__(self) -> None:
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {self.rotation!r} is none of {', '.join(map(repr, ROTATIONS))}.")

    def choose_camera(self, cameras: Collection[str]) -> str:
        """The camera to read, out of those that a data set has.

        Raises:
            ValueError: it has none of the robot's, or several and the robot names none.
        """
        if not self.camera and len(cameras) == 1:
            return next(iter(cameras))
        if not self.camera:
            raise ValueError(f"There are several cameras: pass camera=, one of {_listed(cameras)}.")
        return find_name(self.camera, cameras, "camera")

    def wanted_columns(self, available: Collection[str]) -> list[str]:
        """The columns of numbers that `standardize` reads, out of those that a data set has.

        Raises:
            ValueError: the action, or a state that is needed, is missing.
        """
        names = [find_name(self.action, available, "action")]
        if self.needs_state or any(name in available for name in as_tuple(self.state)):
            names.append(find_name(self.state, available, "state"))
        return names

    @property
    def needs_state(self) -> bool:
        """Whether the action is made from the state."""
        return not self.relative

    @property
    def needs_whole_episodes(self) -> bool:
        """Whether a frame's action is made from later frames of its episode too."""
        return self.gripper is not None and self.gripper.binarize

    def mask(self, action_dim: int) -> list[bool]:
        """Which dimensions of the standard action statistics scale: all but a known gripper."""
        return [True] * (action_dim - 1) + [self.gripper is None]

    def standardize(
        self, columns: dict[str, np.ndarray], length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """An episode's columns to OpenVLA's actions.

        Args:
            columns: (T, ...) numbers by name.
            length: T.

        Returns:
            Indices of the kept frames (K), their actions (K, A) float64, and states (K, S) float64 or `None`.

        Raises:
            ValueError: a column is missing or of the wrong length or size, or one that the actions are made from
                holds what is not finite. Other states that do count as none.
        """
        values = {}
        for index, name in enumerate(self.wanted_columns(columns)):
            column = np.asarray(columns[name], np.float64)
            column = column.reshape(len(column), -1)
            if len(column) != length:
                raise ValueError(f"{name!r} has {len(column)} rows for {length} images.")
            if not np.isfinite(column).all():
                if index > 0 and not self.needs_state:
                    continue  # a state that is not used costs no episode
                frame = int(np.flatnonzero(~np.isfinite(column).all(-1))[0])
                raise ValueError(f"{name!r} holds NaN or infinity at frame {frame}.")
            values[name] = column
        action, *states = values.values()
        state = states[0] if states else None
        if self.action_dim is not None and action.shape[1] != self.action_dim:
            raise ValueError(
                f"the action has {action.shape[1]} dimensions, the adapter {self.name!r} is for {self.action_dim}."
            )
        return self.convert(action, state)

    def convert(
        self, action: np.ndarray, state: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Checked actions (T, A') and states (T, S) to what `standardize` returns; for subclasses to override."""
        action = self.select_and_rotate(action, state)
        if self.gripper is not None:
            action[:, -1] = self.gripper.to_openvla(action[:, -1])
        return np.arange(len(action)), action, state

    def select_and_rotate(self, action: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """The selected numbers, in order, with a relative rotation as Euler angles: (T, A)."""
        if self.select is not None:
            beyond = [index for index in self.select if not -action.shape[1] <= index < action.shape[1]]
            if beyond:
                raise ValueError(f"select={self.select} asks for {beyond}, the action has {action.shape[1]} numbers.")
            action = action[:, list(self.select)]
        if self.relative and self.rotation == "euler":
            return action.copy()
        size, to_matrix = ROTATIONS[self.rotation]
        pose_end = POSE_DIMS + size
        if action.shape[1] < pose_end or (not self.relative and state is not None and state.shape[1] < pose_end):
            raise ValueError(f"a pose with rotation={self.rotation!r} takes {pose_end} numbers.")
        move, turn = action[:, :POSE_DIMS], to_matrix(action[:, POSE_DIMS:pose_end])
        if not self.relative and state is not None:
            move = move - state[:, :POSE_DIMS]
            turn = turn @ to_matrix(state[:, POSE_DIMS:pose_end]).swapaxes(-1, -2)
        return np.concatenate([move, matrix_to_euler(turn), action[:, pose_end:]], axis=1)


@dataclass(frozen=True)
class ReachedPoseRobot(Robot):
    """The movement is what the robot did, from its state to the next; the first step, which is empty, is left out."""

    @property
    def needs_whole_episodes(self) -> bool:
        """Always."""
        return True

    @property
    def needs_state(self) -> bool:
        """Always."""
        return True

    def convert(
        self, action: np.ndarray, state: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """As for `Robot`; the last frame, which no state follows, is left out too."""
        if state is None or state.shape[1] < 2 * POSE_DIMS:
            raise ValueError(f"the adapter {self.name!r} needs a state that begins with a pose of six numbers.")
        if len(action) < 3:
            raise ValueError(f"the adapter {self.name!r} needs at least 3 frames, the episode has {len(action)}.")
        # The gripper of the last step counts where it settles, so it is read before that step goes.
        kept, standard, _ = super().convert(action[1:], state[1:])
        pose = state[1:, : 2 * POSE_DIMS]
        return kept[:-1] + 1, np.concatenate([np.diff(pose, axis=0), standard[:-1, 2 * POSE_DIMS :]], 1), state[1:-1]


_REGISTRY: dict[str, Robot] = {}


def register_robot(robot: Robot) -> Robot:
    """Makes an adapter known by its name; a later one takes the name over."""
    _REGISTRY[robot.name] = robot
    return robot


def registered_robots() -> list[str]:
    """The names that are known."""
    return sorted(_REGISTRY)


def resolve_robot(robot: "Robot | str | None", dataset: str, camera: str | None = None) -> Robot:
    """The adapter for a data set.

    Args:
        robot: An adapter or the name of one; by default the one that is registered under the data set's name, else
            the generic one, which takes the features as they are.
        dataset: The data set's name.
        camera: The image to read instead of the adapter's.

    Raises:
        ValueError: no adapter has this name (the nearest is named).
    """
    if robot is None:
        robot = _REGISTRY.get(dataset, GENERIC)
    elif isinstance(robot, str):
        robot = _REGISTRY[find_name(robot, _REGISTRY, "robot")]
    return robot if camera is None else replace(robot, camera=camera)


def find_name(wanted: Names, available: Collection[str], kind: str) -> str:
    """The first of the names that is available.

    Raises:
        ValueError: none is (the nearest is named).
    """
    for name in as_tuple(wanted):
        if name in available:
            return name
    wanted_text = " or ".join(map(repr, as_tuple(wanted)))
    near = difflib.get_close_matches(as_tuple(wanted)[0], list(available), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"There is no {kind} {wanted_text}.{hint} There are {_listed(available)}.")


def as_tuple(names: Names) -> tuple[str, ...]:
    """One name or several, as several."""
    return (names,) if isinstance(names, str) else names


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def _settle(opening: np.ndarray) -> np.ndarray:
    """(T) openings to 0 and 1: one that is neither takes the next that is; at the end, the nearer."""
    settled = np.where(opening > 0.95, 1.0, np.where(opening < 0.05, 0.0, np.nan))
    following = float(opening[-1] > 0.5)
    for index in range(len(settled) - 1, -1, -1):
        following = settled[index] = following if np.isnan(settled[index]) else settled[index]
    return settled


def euler_to_matrix(angles: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw (..., 3), radians about fixed axes x, y, z, to rotations (..., 3, 3)."""
    (cr, cp, cy), (sr, sp, sy) = (np.moveaxis(part(angles), -1, 0) for part in (np.cos, np.sin))
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def matrix_to_euler(matrix: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) to roll, pitch, yaw (..., 3)."""
    pitch = np.arcsin(np.clip(-matrix[..., 2, 0], -1.0, 1.0))
    roll = np.arctan2(matrix[..., 2, 1], matrix[..., 2, 2])
    yaw = np.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return np.stack([roll, pitch, yaw], -1)


def axis_angle_to_matrix(vector: np.ndarray) -> np.ndarray:
    """Axis times angle in radians (..., 3) to rotations (..., 3, 3)."""
    half = np.linalg.norm(vector, axis=-1, keepdims=True) / 2
    # sin(a / 2) / a, which is 1/2 at 0.
    return quaternion_to_matrix(np.concatenate([vector * np.sinc(half / np.pi) / 2, np.cos(half)], -1))


def quaternion_to_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Quaternions x, y, z, w (..., 4) to rotations (..., 3, 3)."""
    x, y, z, w = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def six_numbers_to_matrix(numbers: np.ndarray) -> np.ndarray:
    """The first two columns of rotations (..., 6), made orthonormal, to rotations (..., 3, 3)."""
    first = numbers[..., :3] / np.linalg.norm(numbers[..., :3], axis=-1, keepdims=True)
    second = numbers[..., 3:] - (first * numbers[..., 3:]).sum(-1, keepdims=True) * first
    second /= np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], -1)


ROTATIONS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "euler": (3, euler_to_matrix),
    "axis_angle": (3, axis_angle_to_matrix),
    "quaternion_xyzw": (4, quaternion_to_matrix),
    "rotation_6d": (6, six_numbers_to_matrix),
}
"""How many numbers each takes, and how they become a matrix."""

GENERIC = Robot("generic")
"""Takes the features as they are, and scales every dimension."""

TABLETOP = register_robot(Robot("tabletop", action_dim=7, gripper=Gripper(open=1.0, closed=0.0), frequency=5.0))
LIBERO = register_robot(
    Robot(
        "libero",
        camera=("observation.image", "observation.images.image", "image"),
        action=("action", "actions"),
        action_dim=7,
        gripper=Gripper(open=-1.0, closed=1.0),
        frequency=20.0,
    )
)
for _suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"):
    # The published data sets, and their names in published statistics.
    register_robot(replace(LIBERO, name=_suite))
    register_robot(replace(LIBERO, name=f"{_suite}_no_noops"))
BRIDGE = register_robot(
    ReachedPoseRobot(
        "bridge_orig",
        camera=("observation.image_0", "observation.images.image_0"),
        action_dim=7,
        gripper=Gripper(open=1.0, closed=0.0, binarize=True),
        frequency=5.0,
    )
)

__all__ = ["BRIDGE", "GENERIC", "LIBERO", "TABLETOP", "Gripper", "Robot", "register_robot", "registered_robots"]
