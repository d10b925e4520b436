"""Robot adapters: which camera is read, and how a dataset's action becomes OpenVLA's.

OpenVLA's action of an end effector is dx, dy, dz (metres), droll, dpitch, dyaw (radians, extrinsic x-y-z) and the
gripper, 1 = open and 0 = closed. Other robots (joints, two arms) keep their own dimensions, whose meaning
`Robot.space` gives.

Letters in shapes: T frames of an episode, K frames that are kept, A dimensions of an action, S of a state.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .feature_names import (
    INSTRUCTION_NAMES,
    STATE_NAMES,
    Names,
    as_tuple,
    counted,
    find_camera,
    find_columns,
    find_name,
    listed,
)
from .gripper import Gripper
from .motion import DELTAS, POSE_DIMS, POSE_NAMES, TARGETS, convert_pose, find_idle, join_movements
from .rotations import ROTATIONS


@dataclass(frozen=True)
class Robot:
    """Adapter that says how to read a dataset of one robot.

    Args:
        name: Name of the adapter.
        camera: Feature with the image that the model sees. By default, the dataset's only camera. A tuple or `FirstOf`
            gives alternatives, of which the first available is read.
        action: Feature with the action. The features of a tuple are concatenated in its order, and all must exist;
            `FirstOf` gives alternatives.
        state: Feature with the proprioception, given in the same form as `action`. A dataset may have none.
        instruction: Feature with the instruction, for formats without a fixed place for it. A tuple or `FirstOf` gives
            alternatives.
        select: Indices of the numbers to take from the action, in order. By default, all.
        action_dim: Number of dimensions that the recorded action must have.
        rotation: Encoding of the rotation that follows the position, one of `ROTATIONS`. The rotation is converted to
            Euler angles.
        relative: Older form of `space`: `relative=False` means `space="end_effector_pose"`.
        gripper: Meaning of the gripper's values. If it is given, statistics leave the gripper's dimensions unscaled.
        frequency: Recorded actions per second. The robot acts at this rate divided by `every`.
        space: Meaning of the recorded action's numbers. By default it is unknown, and the numbers are kept as
            recorded.

            - "end_effector_delta": movement of the end effector: position, rotation, and maybe the gripper.
            - "end_effector_pose": pose for the end effector to reach, and maybe the gripper.
            - "joint_deltas": movement of the joints of one or several arms.
            - "joint_positions": positions for the joints to reach.
        as_delta: Whether to replace each target by the movement to it from the state, which must begin with a pose or
            joints in the same form. By default poses are replaced, since OpenVLA's action is a movement, and joint
            positions are not.
        every: Number of recorded frames to merge into one: 5 turns 50 Hz into 10 Hz. The first frame of each group is
            kept. Its action joins the group's movements or takes its last target, and grippers take their last value.
            The last group of an episode may be smaller.
        drop_idle: Whether to leave out frames whose action moves nothing, after merging by `every`.
        cameras: Features of several cameras by the names that policies give them, such as "full_image" and
            "wrist_image", in the order of the policy's images. Each is given in the same form as `camera`.
            `load(cameras=[...])` chooses from these names.

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
    cameras: Mapping[str, Names] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation {self.rotation!r} is not one of {', '.join(map(repr, ROTATIONS))}.")
        if self.space not in (None, *DELTAS, *TARGETS):
            raise ValueError(f"space {self.space!r} is not one of {listed((*DELTAS, *TARGETS))}.")
        if self.relative is not None and self.space is not None:
            raise ValueError(f"space={self.space!r} replaces relative={self.relative}, so leave relative out.")
        if self.as_delta is not None and self.recorded_space not in TARGETS:
            raise ValueError(
                f"as_delta={self.as_delta} applies only to recorded targets. Use it with space='end_effector_pose' or "
                "space='joint_positions'."
            )
        if self.rotation != "euler" and not self.is_end_effector:
            raise ValueError(
                f"rotation={self.rotation!r} is for end effectors, but space={self.space!r} is for joints."
            )
        if not isinstance(self.cameras, Mapping):
            raise ValueError(
                f"cameras={self.cameras!r} must give a feature for each name, such as "
                "{'wrist_image': 'observation.images.wrist'}."
            )
        if self.every < 1:
            raise ValueError(f"every={self.every} is not a number of frames. Give at least 1.")
        if (self.every > 1 or self.drop_idle) and self.recorded_space is None:
            asked = f"every={self.every}" if self.every > 1 else f"drop_idle={self.drop_idle}"
            raise ValueError(
                f"{asked} needs to know whether the actions are movements or targets, but the robot {self.name!r} "
                f"does not say. Set its space to one of {listed((*DELTAS, *TARGETS))}."
            )
        if (self.every > 1 or self.drop_idle) and self.recorded_space == "joint_deltas" and self.gripper is None:
            asked = f"every={self.every} adds" if self.every > 1 else f"drop_idle={self.drop_idle} measures"
            raise ValueError(
                f"{asked} the movements of joints, but the robot {self.name!r} does not say which numbers are "
                "grippers. Give gripper=Gripper(dimensions=...), with dimensions=() for a robot "
                "without a gripper."
            )
        if self.action_dim is not None and self.select is None:
            self._check_size(self.action_dim)

    @property
    def recorded_space(self) -> str | None:
        """Space of the recorded action, or `None` if it is unknown."""
        if self.relative is False:
            return "end_effector_pose"
        # A rotation to convert implies that the action begins with a pose.
        return self.space or (None if self.rotation == "euler" else "end_effector_delta")

    @property
    def is_end_effector(self) -> bool:
        """Whether the action begins with a position and a rotation."""
        return self.recorded_space in ("end_effector_delta", "end_effector_pose")

    @property
    def takes_difference(self) -> bool:
        """Whether each target is replaced by the movement to it from the state."""
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
        """Name the dimensions of the standard action, or return `None` if the dataset does not name them.

        Args:
            columns: The dataset's columns of numbers.
            names: By column, the names of its numbers where they are known.

        Raises:
            ValueError: The action lacks a number that `select` asks for.
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
        """Choose the camera to read from a dataset's cameras.

        Raises:
            ValueError: The dataset has none of the robot's cameras, or it has several and the robot names none.
        """
        if not cameras:
            raise ValueError("The dataset has no camera with 8-bit colours.")
        if not self.camera and len(cameras) == 1:
            return next(iter(cameras))
        if not self.camera:
            raise ValueError(
                f"The dataset has several cameras, {listed(cameras)}. Pass camera= with one of them, or cameras= for "
                "a policy that sees several."
            )
        return find_name(self.camera, cameras, "camera")

    def find_camera(self, wanted: Names, cameras: Collection[str]) -> str:
        """Find one of several cameras that a policy sees among a dataset's cameras; subclasses may override this.

        Args:
            wanted: Features that the camera may be read from.
            cameras: The dataset's cameras.

        Raises:
            ValueError: The dataset has none of the features.
        """
        return find_camera(wanted, cameras)

    def action_columns(self, available: Collection[str]) -> list[str]:
        """List the columns that make up the action, in order.

        Raises:
            ValueError: A column is missing from the dataset.
        """
        return find_columns(self.action, available, "action")

    def state_columns(self, available: Collection[str], required: bool = False) -> list[str]:
        """List the columns that make up the state, in order.

        The list is empty if the dataset has no state, unless the state is required or the action needs one.

        Raises:
            ValueError: A column is missing from the dataset.
        """
        if not (required or self.needs_state) and not any(name in available for name in as_tuple(self.state)):
            return []
        return find_columns(self.state, available, "state")

    def wanted_columns(self, available: Collection[str], require_state: bool = False) -> list[str]:
        """List the columns of numbers that `standardize` reads.

        Raises:
            ValueError: The action, or a state that is needed, is missing from the dataset.
        """
        return list(dict.fromkeys([*self.action_columns(available), *self.state_columns(available, require_state)]))

    @property
    def needs_state(self) -> bool:
        """Whether the action is computed from the state."""
        return self.takes_difference

    @property
    def declares_state(self) -> bool:
        """Whether a dataset that lacks the robot's state is an error."""
        return False

    @property
    def converts(self) -> bool:
        """Whether converting standard actions a second time would change them."""
        has_own_gripper = self.gripper is not None and (self.gripper.open, self.gripper.closed) != (1.0, 0.0)
        return self.takes_difference or self.rotation != "euler" or self.select is not None or has_own_gripper

    @property
    def needs_whole_episodes(self) -> bool:
        """Whether a frame's action depends on later frames of its episode."""
        settles = self.gripper is not None and self.gripper.binarize
        return settles or self.every > 1 or self.drop_idle

    @property
    def table_row(self) -> str | None:
        """Place of the row that the robot follows in a table of datasets, if it does."""
        return None

    @property
    def keeps_unlabelled(self) -> bool:
        """Whether frames without an instruction are kept if their episode has one."""
        return False

    def cameras_of_episode(self, cameras: dict[str, str], episode: int) -> dict[str, str]:
        """Return the dataset's camera for each column of an episode's rows; subclasses may override this."""
        return cameras

    def gripper_dimensions(self, action_dim: int) -> list[int]:
        """List the dimensions of an action that are known to be grippers.

        Raises:
            ValueError: The robot names a dimension that the action does not have.
        """
        if self.gripper is None:
            return []
        beyond = [index for index in self.gripper.dimensions if not -action_dim <= index < action_dim]
        if beyond:
            raise ValueError(
                f"Gripper.dimensions contains {beyond}, but the action has {counted(action_dim, 'number')}."
            )
        return sorted({index % action_dim for index in self.gripper.dimensions})

    def mask(self, action_dim: int) -> list[bool]:
        """Return for each dimension of the standard action whether statistics scale it: all but known grippers."""
        grippers = self.gripper_dimensions(action_dim)
        return [index not in grippers for index in range(action_dim)]

    def standardize(
        self, columns: dict[str, np.ndarray], length: int, require_state: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Convert an episode's columns to OpenVLA's actions.

        Args:
            columns: By name, numbers (T, ...).
            length: T.
            require_state: Whether a missing state is an error.

        Returns:
            Indices of the kept frames (K,), their actions (K, A) float64, and states (K, S) float64 or `None`.

        Raises:
            ValueError: A column is missing or has the wrong length or size, or a value that the actions are computed
                from is not finite. A state that is not finite but not needed is dropped instead.
        """
        return self._drop_idle(*self._resample(*self.convert_columns(columns, length, require_state)))

    def convert_columns(
        self, columns: dict[str, np.ndarray], length: int, require_state: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Convert columns as `standardize` does, before frames are merged or dropped; subclasses may override this."""
        action = _join(columns, self.action_columns(columns), length)
        state_columns = self.state_columns(columns, require_state)
        state = _join(columns, state_columns, length) if state_columns else None
        check_finite(action, self.action_columns(columns))
        if state is not None and not np.isfinite(state).all():
            if require_state or self.needs_state:
                check_finite(state, state_columns)
            state = None
        if self.action_dim is not None and action.shape[1] != self.action_dim:
            raise ValueError(
                f"the action has {counted(action.shape[1], 'dimension')}, but the adapter {self.name!r} is for "
                f"{self.action_dim}."
            )
        if self.recorded_space in TARGETS:
            # A merged group takes its last target, as seen from its first frame.
            action = action[np.minimum(np.arange(length) + self.every - 1, length - 1)]
        return self.convert(action, state)

    def _resample(
        self, kept: np.ndarray, actions: np.ndarray, states: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Merge groups of `every` consecutive frames into one each, whose action has the effect of all."""
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
        """Join movements `first` and then `second`, both (N, A), into one; subclasses may override this."""
        return join_movements(first, second, str(self.standard_space), self.gripper_dimensions(first.shape[1]))

    def find_idle(self, actions: np.ndarray, states: np.ndarray | None) -> np.ndarray:
        """Return for each of an episode's standard actions (K, A) whether it moves nothing, as (K,) bools."""
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
        """Convert checked actions (T, A') and states (T, S) as `standardize` does; subclasses may override this."""
        action = self.select_and_rotate(action, state)
        if self.gripper is not None:
            for dimension in self.gripper_dimensions(action.shape[1]):
                action[:, dimension] = self.gripper.to_openvla(action[:, dimension])
        return np.arange(len(action)), action, state

    def select_and_rotate(self, action: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """Select the numbers in order, and convert rotations to Euler angles and targets to movements: (T, A).

        Raises:
            ValueError: The numbers do not fit the robot's space.
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
            raise ValueError(
                f"select={self.select} asks for {beyond}, but the action has {counted(recorded, 'number')}."
            )

    def _check_size(self, action_dim: int) -> None:
        """Raise `ValueError` if the robot is one end effector and an action of this size does not fit it."""
        pose_end = POSE_DIMS + ROTATIONS[self.rotation][0]
        if self.is_end_effector and self.gripper and self.gripper.dimensions and action_dim == pose_end:
            raise ValueError(
                f"the action has {action_dim} numbers, which all belong to the pose, but the adapter {self.name!r} "
                "has a gripper. Leave gripper out."
            )
        if self.is_end_effector and not pose_end <= action_dim <= pose_end + 1:
            raise ValueError(
                f"the action has {counted(action_dim, 'number')}, but {self.recorded_space!r} with "
                f"rotation={self.rotation!r} takes {pose_end}, or {pose_end + 1} with a gripper. Choose them with "
                "select=. For joints or several arms, use space='joint_positions' or space='joint_deltas'."
            )

    def _convert_pose(self, action: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        self._check_size(action.shape[1])
        pose_end = POSE_DIMS + ROTATIONS[self.rotation][0]
        if not self.takes_difference and self.rotation == "euler":
            return action.copy()
        if not self.takes_difference or state is None:
            return convert_pose(action, self.rotation)
        if state.shape[1] < pose_end:
            raise ValueError(
                f"the movement to a pose needs a state that begins with the {pose_end} numbers of a pose, but the "
                f"state has {state.shape[1]}."
            )
        return convert_pose(action, self.rotation, start=state[:, :pose_end])


def _join(columns: dict[str, np.ndarray], names: list[str], length: int) -> np.ndarray:
    """Place the numbers of several columns side by side, (T, D).

    Raises:
        ValueError: A column does not have the length T.
    """
    parts = []
    for name in names:
        column = np.asarray(columns[name], np.float64)
        if len(column) != length:
            raise ValueError(f"{name!r} has {counted(len(column), 'row')} for {counted(length, 'image')}.")
        parts.append(column.reshape(length, -1))
    return np.concatenate(parts, axis=1)


def check_finite(values: np.ndarray, names: list[str]) -> None:
    """Raise `ValueError` if values (T, D) of the named columns are not finite."""
    finite = np.isfinite(values).all(-1)
    if not finite.all():
        named = " + ".join(map(repr, names))
        raise ValueError(f"{named} contains NaN or infinity at frame {int(np.flatnonzero(~finite)[0])}.")


__all__ = ["Robot", "check_finite"]
