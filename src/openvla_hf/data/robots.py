"""Robot adapters: which camera is seen, and how a data set's action becomes OpenVLA's.

OpenVLA's action of an end effector is dx, dy, dz (metres), droll, dpitch, dyaw (radians, extrinsic x-y-z) and the
gripper, 1 = open and 0 = closed. Other robots (joints, two arms) keep the dimensions that they have: say what their
numbers are in `Robot.space`.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .motion import DELTAS, POSE_DIMS, POSE_NAMES, TARGETS, find_idle, join_movements
from .rotations import ROTATIONS, matrix_to_euler


Names = str | tuple[str, ...]


class FirstOf(tuple[str, ...]):
    """Alternative names of one feature: the first that a dataset has is read."""

    def __new__(cls, *names: str) -> "FirstOf":
        """Names, the preferred one first."""
        return super().__new__(cls, names)

    def __getnewargs__(self) -> tuple[str, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(repr, self))})"


STATE_NAMES = FirstOf("observation.state", "state")
INSTRUCTION_NAMES = ("language_instruction", "observation.natural_language_instruction", "instruction", "task")
RANGE_SLACK = 0.05
"""Share of its range by which a gripper's value may lie outside, as sensors do."""


@dataclass(frozen=True)
class Gripper:
    """The values that a dataset writes for an open and a closed gripper.

    Args:
        open: Value of an open gripper.
        closed: Value of a closed gripper.
        binarize: Whether to replace values between the two by the one that the gripper reaches next (as for Bridge).
        dimensions: Where the grippers are in the action, after `Robot.select`: the last number by default; two arms
            of six joints have (6, 13). A robot without a gripper has ().
    """

    open: float = 1.0
    closed: float = 0.0
    binarize: bool = False
    dimensions: tuple[int, ...] = (-1,)

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
        camera: Feature with the image that the model sees; by default the only one. A tuple or `FirstOf` gives
            alternatives: one image is read.
        action: Feature with the action. The features of a tuple are concatenated in its order, and all must exist;
            `FirstOf` gives alternatives.
        state: Feature with the proprioception, named like `action`; a data set may have none.
        instruction: Feature with the text, where the format has no place of its own for it. A tuple or `FirstOf` gives
            alternatives.
        select: Which numbers of the action are taken, in which order; all by default.
        action_dim: How many numbers the data set's action must have.
        rotation: How the numbers after the position say a rotation, one of `ROTATIONS`; it becomes Euler angles.
        relative: Older form: `relative=False` means `space="end_effector_pose"`.
        gripper: What its values mean. Its dimensions are then not scaled by statistics.
        frequency: Recorded actions a second; with `every`, the robot acts as many times less often.
        space: What the numbers of the data set's action are. By default nothing is known, and they are taken as they
            are.

            - "end_effector_delta": movement of the end effector: position, rotation, and maybe the gripper.
            - "end_effector_pose": pose that the end effector is to reach, and maybe the gripper.
            - "joint_deltas": movement of the joints of one arm or several.
            - "joint_positions": positions that the joints are to reach.
        as_delta: Whether to replace targets by the movement to them from the state, whose first numbers must be a pose
            or joints in the same form. By default a pose is replaced, since OpenVLA's action is a movement, and joint
            positions are not.
        every: How many recorded frames become one: 5 makes 10 Hz of 50 Hz. The frame is the first of them; movements
            are joined, and of targets and grippers the last counts. The last frames of an episode may be fewer.
        drop_idle: Whether to leave out frames whose action moves nothing, after `every`.

    Raises:
        ValueError: `rotation` or `space` is unknown, or the fields contradict each other.
    """

    name: str
    camera: Names = ()
    action: Names = "action"
    state: Names = STATE_NAMES
    instruction: Names = INSTRUCTION_NAMES
    select: tuple[int, ...] | None = None
    action_dim: int | None = None
    rotation: str = "euler"
    relative: bool | None = None
    gripper: Gripper | None = None
    frequency: float | None = None
    space: str | None = None
    as_delta: bool | None = None
    every: int = 1
    drop_idle: bool = False

    def __post_init__(self) -> None:
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {self.rotation!r} is none of {', '.join(map(repr, ROTATIONS))}.")
        if self.space not in (None, *DELTAS, *TARGETS):
            raise ValueError(f"space {self.space!r} is not one of {_listed((*DELTAS, *TARGETS))}.")
        if self.relative is not None and self.space is not None:
            raise ValueError(f"space={self.space!r} replaces relative={self.relative}: leave relative out.")
        if self.as_delta is not None and self.recorded_space not in TARGETS:
            raise ValueError(
                f"as_delta={self.as_delta} is for recorded targets: give it with space='end_effector_pose' or "
                "space='joint_positions'."
            )
        if self.rotation != "euler" and not self.is_end_effector:
            raise ValueError(
                f"rotation={self.rotation!r} is for end effectors, but space={self.space!r} holds joints."
            )
        if self.every < 1:
            raise ValueError(f"every={self.every} is not a number of frames: give at least 1.")
        if (self.every > 1 or self.drop_idle) and self.recorded_space is None:
            asked = f"every={self.every}" if self.every > 1 else f"drop_idle={self.drop_idle}"
            raise ValueError(
                f"{asked} needs to know whether the actions are movements or targets, but the robot {self.name!r} "
                f"does not say: give a robot whose space is one of {_listed((*DELTAS, *TARGETS))}."
            )
        if (self.every > 1 or self.drop_idle) and self.recorded_space == "joint_deltas" and self.gripper is None:
            asked = f"every={self.every} adds" if self.every > 1 else f"drop_idle={self.drop_idle} measures"
            raise ValueError(
                f"{asked} the movements of joints, but the robot {self.name!r} does not say which numbers are "
                "grippers, which are not movements. Give gripper=Gripper(dimensions=...), with dimensions=() for a "
                "robot without a gripper."
            )
        if self.action_dim is not None and self.select is None:
            self._check_size(self.action_dim)

    @property
    def recorded_space(self) -> str | None:
        """Space of the data set's action, or `None` where nothing is known."""
        if self.relative is False:
            return "end_effector_pose"
        # A rotation that is to be converted says where the pose is.
        return self.space or (None if self.rotation == "euler" else "end_effector_delta")

    @property
    def is_end_effector(self) -> bool:
        """Whether the action begins with a position and a rotation."""
        return self.recorded_space in ("end_effector_delta", "end_effector_pose")

    @property
    def takes_difference(self) -> bool:
        """Whether the action is replaced by the movement to it from the state."""
        if self.as_delta is None:
            return self.recorded_space == "end_effector_pose"
        return self.as_delta

    @property
    def standard_space(self) -> str | None:
        """Space of the actions that `standardize` returns."""
        if not self.takes_difference:
            return self.recorded_space
        return "end_effector_delta" if self.is_end_effector else "joint_deltas"

    def name_dimensions(self, columns: Collection[str], names: Mapping[str, Sequence[str]]) -> list[str] | None:
        """The names of the standard action's dimensions, or `None` where the data set does not name them.

        Args:
            columns: The columns of numbers that the data set has.
            names: Of the numbers in a column, where they are known.

        Raises:
            ValueError: the action lacks a number that `select` asks for.
        """
        wanted = self.action_columns(columns)
        if any(column not in names for column in wanted):
            return None
        named = [name for column in wanted for name in names[column]]
        if self.select is not None:
            self._check_select(len(named))
            named = [named[index] for index in self.select]
        if self.is_end_effector and (self.takes_difference or self.rotation != "euler"):
            named = [*POSE_NAMES[str(self.standard_space)], *named[POSE_DIMS + ROTATIONS[self.rotation][0] :]]
        return named

    def choose_camera(self, cameras: Collection[str]) -> str:
        """The camera to read, out of those that a data set has.

        Raises:
            ValueError: it has none of the robot's, or several and the robot names none.
        """
        if not cameras:
            raise ValueError("There is no camera: the data set has no image of 8-bit colours.")
        if not self.camera and len(cameras) == 1:
            return next(iter(cameras))
        if not self.camera:
            raise ValueError(f"There are several cameras: pass camera=, one of {_listed(cameras)}.")
        return find_name(self.camera, cameras, "camera")

    def action_columns(self, available: Collection[str]) -> list[str]:
        """The columns that make up the action, in order, out of those that a data set has.

        Raises:
            ValueError: one is missing.
        """
        return _find_columns(self.action, available, "action")

    def state_columns(self, available: Collection[str]) -> list[str]:
        """The columns that make up the state, in order; none where there is no state and no action needs it.

        Raises:
            ValueError: one is missing.
        """
        if not self.needs_state and not any(name in available for name in as_tuple(self.state)):
            return []
        return _find_columns(self.state, available, "state")

    def wanted_columns(self, available: Collection[str]) -> list[str]:
        """The columns of numbers that `standardize` reads, out of those that a data set has.

        Raises:
            ValueError: the action, or a state that is needed, is missing.
        """
        return list(dict.fromkeys([*self.action_columns(available), *self.state_columns(available)]))

    @property
    def needs_state(self) -> bool:
        """Whether the action is made from the state."""
        return self.takes_difference

    @property
    def converts(self) -> bool:
        """Whether standard actions would be changed if they were read once more."""
        has_own_gripper = self.gripper is not None and (self.gripper.open, self.gripper.closed) != (1.0, 0.0)
        return self.takes_difference or self.rotation != "euler" or self.select is not None or has_own_gripper

    @property
    def needs_whole_episodes(self) -> bool:
        """Whether a frame's action is made from later frames of its episode too."""
        settles = self.gripper is not None and self.gripper.binarize
        return settles or self.every > 1 or self.drop_idle

    def gripper_dimensions(self, action_dim: int) -> list[int]:
        """Which of the dimensions of an action are grippers', so far as the robot says.

        Raises:
            ValueError: the robot names one that the action does not have.
        """
        if self.gripper is None:
            return []
        beyond = [index for index in self.gripper.dimensions if not -action_dim <= index < action_dim]
        if beyond:
            raise ValueError(f"the gripper is said to be at {beyond}, but the action has {action_dim} numbers.")
        return sorted({index % action_dim for index in self.gripper.dimensions})

    def mask(self, action_dim: int) -> list[bool]:
        """Which dimensions of the standard action statistics scale: all but known grippers."""
        grippers = self.gripper_dimensions(action_dim)
        return [index not in grippers for index in range(action_dim)]

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
        action = _join(columns, self.action_columns(columns), length)
        state_columns = self.state_columns(columns)
        state = _join(columns, state_columns, length) if state_columns else None
        _check_finite(action, self.action_columns(columns))
        if state is not None and not np.isfinite(state).all():
            if self.needs_state:
                _check_finite(state, state_columns)
            state = None  # a state that is not used costs no episode
        if self.action_dim is not None and action.shape[1] != self.action_dim:
            raise ValueError(
                f"the action has {action.shape[1]} dimensions, the adapter {self.name!r} is for {self.action_dim}."
            )
        if self.recorded_space in TARGETS:
            # The last target of the frames that become one, seen from the first of them.
            action = action[np.minimum(np.arange(length) + self.every - 1, length - 1)]
        return self._drop_idle(*self._resample(*self.convert(action, state)))

    def _resample(
        self, kept: np.ndarray, actions: np.ndarray, states: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Join each `every` consecutive frames into one, whose action has the effect of all of theirs."""
        if self.every == 1:
            return kept, actions, states
        starts = np.arange(0, len(actions), self.every)
        joined = actions[starts]
        if self.recorded_space in DELTAS:
            for offset in range(1, self.every):
                inside = starts + offset < len(actions)
                joined[inside] = self.join(joined[inside], actions[starts[inside] + offset])
        return kept[starts], joined, None if states is None else states[starts]

    def join(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Movements (N, A) that do what `first` and then `second` do; for subclasses to override."""
        return join_movements(first, second, str(self.standard_space), self.gripper_dimensions(first.shape[1]))

    def find_idle(self, actions: np.ndarray, states: np.ndarray | None) -> np.ndarray:
        """(K) whether each of an episode's standard actions (K, A) moves nothing."""
        return find_idle(actions, states, self.standard_space, self.gripper_dimensions(actions.shape[1]))

    def _drop_idle(
        self, kept: np.ndarray, actions: np.ndarray, states: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        if not self.drop_idle:
            return kept, actions, states
        moving = ~self.find_idle(actions, states)
        return kept[moving], actions[moving], None if states is None else states[moving]

    def convert(
        self, action: np.ndarray, state: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Checked actions (T, A') and states (T, S) to what `standardize` returns; for subclasses to override."""
        action = self.select_and_rotate(action, state)
        if self.gripper is not None:
            for dimension in self.gripper_dimensions(action.shape[1]):
                action[:, dimension] = self.gripper.to_openvla(action[:, dimension])
        return np.arange(len(action)), action, state

    def select_and_rotate(self, action: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """The selected numbers, in order, with rotations as Euler angles and targets as movements: (T, A).

        Raises:
            ValueError: the numbers do not fit the robot's space.
        """
        recorded = action.shape[1]
        if self.select is not None:
            self._check_select(recorded)
            action = action[:, list(self.select)]
        if self.is_end_effector:
            return self._convert_pose(action, state)
        if not self.takes_difference or state is None:
            return action.copy()
        if state.shape[1] < recorded:
            raise ValueError(
                f"as_delta=True needs the {recorded} joint positions in the state, which has {state.shape[1]} numbers."
            )
        start = state[:, :recorded] if self.select is None else state[:, :recorded][:, list(self.select)]
        grippers = self.gripper_dimensions(action.shape[1])
        difference = action - start
        difference[:, grippers] = action[:, grippers]
        return difference

    def _check_select(self, recorded: int) -> None:
        """Raise `ValueError` if `select` asks for a number that a recorded action of this size does not have."""
        beyond = [index for index in self.select or () if not -recorded <= index < recorded]
        if beyond:
            raise ValueError(f"select={self.select} asks for {beyond}, but the action has {recorded} numbers.")

    def _check_size(self, action_dim: int) -> None:
        """Raise `ValueError` if the robot is one end effector and an action of this size does not fit it."""
        pose_end = POSE_DIMS + ROTATIONS[self.rotation][0]
        if self.is_end_effector and self.gripper and self.gripper.dimensions and action_dim == pose_end:
            raise ValueError(
                f"the action has {action_dim} numbers, which are all of the pose, but the adapter {self.name!r} says "
                "what a gripper's values mean: leave gripper out."
            )
        if self.is_end_effector and not pose_end <= action_dim <= pose_end + 1:
            raise ValueError(
                f"the action has {action_dim} numbers, but {self.recorded_space!r} with rotation={self.rotation!r} "
                f"takes {pose_end}, or {pose_end + 1} with a gripper. Choose them with select=, or give joints and "
                "several arms as space='joint_positions' or space='joint_deltas'."
            )

    def _convert_pose(self, action: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        self._check_size(action.shape[1])
        size, to_matrix = ROTATIONS[self.rotation]
        pose_end = POSE_DIMS + size
        if not self.takes_difference and self.rotation == "euler":
            return action.copy()
        move, turn = action[:, :POSE_DIMS], to_matrix(action[:, POSE_DIMS:pose_end])
        if self.takes_difference and state is not None:
            if state.shape[1] < pose_end:
                raise ValueError(
                    f"the movement to a pose needs a state that begins with the {pose_end} numbers of a pose, but the "
                    f"state has {state.shape[1]}."
                )
            move = move - state[:, :POSE_DIMS]
            turn = turn @ to_matrix(state[:, POSE_DIMS:pose_end]).swapaxes(-1, -2)
        return np.concatenate([move, matrix_to_euler(turn), action[:, pose_end:]], axis=1)


@dataclass(frozen=True)
class ReachedPoseRobot(Robot):
    """The movement is what the robot did, from its state to the next; the first step, which is empty, is left out."""

    @property
    def converts(self) -> bool:
        """Always."""
        return True

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
        # Angles are plain differences, as in the original, so `join` adds them.
        return kept[:-1] + 1, np.concatenate([np.diff(pose, axis=0), standard[:-1, 2 * POSE_DIMS :]], 1), state[1:-1]

    def join(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Differences of poses add up to the difference of the last pose from the first."""
        return np.concatenate([(first + second)[:, : 2 * POSE_DIMS], second[:, 2 * POSE_DIMS :]], axis=1)


_REGISTRY: dict[str, Robot] = {}


def register_robot(robot: Robot) -> Robot:
    """Makes an adapter known by its name; a later one takes the name over."""
    _REGISTRY[robot.name] = robot
    return robot


def registered_robots() -> list[str]:
    """The names that are known."""
    return sorted(_REGISTRY)


def resolve_robot(robot: "Robot | str | None", dataset: str, **options: Any) -> Robot:
    """The adapter for a data set.

    Args:
        robot: An adapter or the name of one; by default the one that is registered under the data set's name, else
            the generic one, which takes the features as they are.
        dataset: The data set's name.
        options: Fields of `Robot` that replace the adapter's, where they are not `None`.

    Raises:
        ValueError: no adapter has this name (the nearest is named), or an option does not fit the adapter.
    """
    if robot is None:
        robot = _REGISTRY.get(dataset, GENERIC)
    elif isinstance(robot, str):
        robot = _REGISTRY[find_name(robot, _REGISTRY, "robot")]
    given = {name: value for name, value in options.items() if value is not None}
    return replace(robot, **given) if given else robot


def describe_robot(robot: Robot) -> dict[str, str]:
    """Describe how an adapter reads: its class, and the fields that differ from their defaults, as text.

    A checkpoint keeps the description, to notice later that another adapter has taken the name.
    """
    values = {field.name: repr(getattr(robot, field.name)) for field in fields(robot)}
    defaults = {field.name: repr(field.default) for field in fields(robot)}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    return {"class": type(robot).__name__, **changed}


def require_same_robot(name: str, description: dict[str, str]) -> None:
    """Check that the adapter of a name reads as it did when `describe_robot` described it.

    Raises:
        ValueError: No adapter has this name, or the one that has it reads differently.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"Training read the data with the robot {name!r}, which is not registered. Give the Python file that "
            "registers it with `robots`."
        )
    now = describe_robot(_REGISTRY[name])
    changed = sorted(key for key in description.keys() | now.keys() if description.get(key) != now.get(key))
    if changed:
        raise ValueError(
            f"Training read the data with another robot {name!r}, which differs in {', '.join(changed)}. Give the "
            "Python file that registers the one of the training with `robots`."
        )


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


def _find_columns(wanted: Names, available: Collection[str], kind: str) -> list[str]:
    """The columns that a robot names: one, the first of several alternatives, or all that are to be concatenated."""
    if isinstance(wanted, (str, FirstOf)):
        return [find_name(wanted, available, kind)]
    missing = [name for name in wanted if name not in available]
    if missing or not wanted:
        raise ValueError(
            f"{kind}={wanted!r} concatenates features, but there is no {_listed(missing or ['name'])}. "
            f"There are {_listed(available)}. For alternatives, write FirstOf('one name', 'another name')."
        )
    return list(wanted)


def _join(columns: dict[str, np.ndarray], names: list[str], length: int) -> np.ndarray:
    """(T, D) numbers of several columns side by side.

    Raises:
        ValueError: a column is not of the length T.
    """
    parts = []
    for name in names:
        column = np.asarray(columns[name], np.float64)
        if len(column) != length:
            raise ValueError(f"{name!r} has {len(column)} rows for {length} images.")
        parts.append(column.reshape(length, -1))
    return np.concatenate(parts, axis=1)


def _check_finite(values: np.ndarray, names: list[str]) -> None:
    finite = np.isfinite(values).all(-1)
    if not finite.all():
        named = " + ".join(map(repr, names))
        raise ValueError(f"{named} holds NaN or infinity at frame {int(np.flatnonzero(~finite)[0])}.")


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


GENERIC = register_robot(Robot("generic"))
"""Takes the features as they are, and scales every dimension."""

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
        space="end_effector_delta",
    )
)

__all__ = [
    "BRIDGE",
    "GENERIC",
    "LIBERO",
    "TABLETOP",
    "FirstOf",
    "Gripper",
    "Robot",
    "register_robot",
    "registered_robots",
]
