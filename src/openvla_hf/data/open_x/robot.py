"""The robot adapter of a dataset of the table."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ...modeling.known_names import unknown_name
from ..adapters import Robot, check_finite
from ..feature_names import INSTRUCTION_NAMES, Names, as_tuple, counted
from ..gripper import RANGE_SLACK, Gripper
from ..motion import TARGETS
from .steps import Assign, Swap, Trajectory, parse_value, run_steps, select_steps, set_field
from .table import ACTION_ENCODINGS, DatasetRow, find_row


# Encoding of actions that the original trains on -> space of `Robot`.
SPACES = {"EEF_POS": "end_effector_delta", "EEF_R6": None, "JOINT_POS_BIMANUAL": "joint_positions"}
INSTRUCTION = "language_instruction"
# Fields of cameras are given relative to it.
OBSERVATION = "observation."
# A frame is idle if every movement, normalised by the row's quantiles, is within this distance of zero.
IDLE = 1e-5
# Field that tracks the indices of the frames through the steps of a transform.
FRAME = "frame_index"


@dataclass(frozen=True, kw_only=True)
class TableRobot(Robot):
    """Adapter that reads a dataset as its row of the table says.

    Args:
        row: Row of the table.
    """

    row: DatasetRow

    @property
    def converts(self) -> bool:
        """Always true."""
        return True

    @property
    def needs_whole_episodes(self) -> bool:
        """Always true."""
        return True

    @property
    def table_row(self) -> str:
        """Place of the row."""
        return self.row.place

    @property
    def keeps_unlabelled(self) -> bool:
        """Always true, as in the original."""
        return True

    @property
    def declares_state(self) -> bool:
        """Whether the row has a state and is not one of the package's, which also read data without their state."""
        return bool(self.state) and self.row.is_added

    def choose_camera(self, cameras: Collection[str]) -> str:
        """Choose the row's first camera, or the one that replaces it. See `Robot.choose_camera`."""
        is_of_row = self.camera in self.cameras.values()
        return self.find_camera(self.camera, cameras) if is_of_row else super().choose_camera(cameras)

    def find_camera(self, wanted: Names, cameras: Collection[str]) -> str:
        """Find one of the row's cameras, or another camera. See `Robot.find_camera`."""
        if wanted not in self.cameras.values() or wanted in cameras:
            return super().find_camera(wanted, cameras)
        field = str(wanted).removeprefix(OBSERVATION)
        known = sorted(camera.removeprefix(OBSERVATION) for camera in cameras)
        raise unknown_name(f"{field!r} in the row's cameras", known, "field", nearest_to=field.rpartition(".")[2])

    def action_columns(self, available: Collection[str]) -> list[str]:
        """List the columns that the action is computed from.

        Raises:
            ValueError: A column is missing from the dataset.
        """
        return self._find_columns("transform", as_tuple(self.action), available)

    def state_columns(self, available: Collection[str], required: bool = False) -> list[str]:
        """List the columns that the state is computed from.

        The list is empty if the row or the dataset has no complete state, unless the state is required.

        Raises:
            ValueError: A state is required, but the row has none or a column is missing.
        """
        if not required and any(name not in available for name in self.state):
            return []
        if required and not self.state:
            raise ValueError(f"The dataset {self.name!r} has no state. Train without it.")
        return self._find_columns("state", as_tuple(self.state), available)

    def _find_columns(self, entry: str, columns: Collection[str], available: Collection[str]) -> list[str]:
        """Return the columns that an entry of the row names, or raise `ValueError` if one is missing."""
        for column in columns:
            if column not in available:
                # The transform may set the field that is meant.
                made = {column_name(field) for step in self.row.steps for field in step.fields} - {"action"}
                known = sorted({*available} | made)
                raise unknown_name(f"{column!r} in the row's {entry}", known, "field", nearest_to=column)
        return list(columns)

    def convert_columns(
        self, columns: dict[str, np.ndarray], length: int, require_state: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Run the row's transform on an episode's columns. See `Robot.convert_columns`."""
        value = parse_value(self.row.state) if self.state_columns(columns, require_state) else None
        steps, fields = select_steps(self.row.steps, {"action"} | (value.fields if value else set()))
        trajectory: Trajectory = {FRAME: np.arange(length)}
        for field in sorted(fields):
            column = np.asarray(columns[column_name(field)])
            if len(column) != length:
                raise ValueError(
                    f"{column_name(field)!r} has {counted(len(column), 'row')} for {counted(length, 'image')}."
                )
            trajectory = set_field(trajectory, field, column)
        standard = run_steps(steps, trajectory)
        action = _as_numbers(standard["action"])
        if action.shape[1:] != (self.action_dim,):
            found = action.shape[-1] if action.ndim > 1 else 1
            source = " + ".join(map(repr, self.action_columns(columns)))
            raise ValueError(
                f"the action from {source} has {counted(found, 'dimension')} after the transform, but the row's "
                f"action_encoding {self.row.action_encoding!r} has {self.action_dim}. Complete the transform, or give "
                "another action_encoding."
            )
        check_finite(action, self.action_columns(columns))
        self._check_gripper(action)
        state = _as_numbers(value.evaluate(standard)) if value else None
        if state is not None and not np.isfinite(state).all():
            if require_state:
                check_finite(state, self.state_columns(columns, require_state))
            state = None
        if self.recorded_space in TARGETS:
            action = action[np.minimum(np.arange(len(action)) + self.every - 1, len(action) - 1)]
        return standard[FRAME], action, state

    def _check_gripper(self, action: np.ndarray) -> None:
        """Raise `ValueError` if the gripper of an action (T, A) is not an opening from 0 (closed) to 1 (open)."""
        openings = action[:, self.gripper_dimensions(action.shape[1])].astype(np.float32)
        if not self.row.check_gripper or not openings.size:
            return
        lowest, highest = openings.min(), openings.max()
        if lowest < -RANGE_SLACK or highest > 1 + RANGE_SLACK:
            raise ValueError(
                f"after the transform, the gripper goes from {lowest:g} to {highest:g}, but 0 is closed "
                "and 1 is open. If the actions are joint positions, read them with a Robot of your own instead of a "
                "row; otherwise convert the gripper in the transform, for example with `clip` or `invert`."
            )

    def find_idle(self, actions: np.ndarray, states: np.ndarray | None) -> np.ndarray:
        """Return for each action (K, A) whether it moves nothing, by the row's quantiles if it gives any."""
        if not self.row.idle_q01:
            return super().find_idle(actions, states)
        span = np.subtract(self.row.idle_q99, self.row.idle_q01)
        return np.asarray((np.abs(2 * actions[:, : len(span)] / span) <= IDLE).all(1))

    def cameras_of_episode(self, cameras: dict[str, str], episode: int) -> dict[str, str]:
        """Return the cameras to read in an episode. A transform may swap two of them in half of the episodes."""
        for step in self.row.steps:
            pair = (column_name(step.first), column_name(step.second)) if isinstance(step, Swap) else ()
            if pair and np.random.default_rng(episode).random() <= Swap.SHARE:
                exchanged = dict(zip(pair, reversed(pair), strict=True))
                cameras = {name: exchanged.get(camera, camera) for name, camera in cameras.items()}
        return cameras


def dataset_robot(name: str) -> TableRobot:
    """Return the adapter of a dataset of the table.

    Raises:
        ValueError: The table has no such dataset, or the dataset can't be trained on.
    """
    row = find_row(name)
    if row.action_encoding not in SPACES:
        raise ValueError(
            f"The dataset {name!r} can't be trained on: its actions are the joint positions of one arm, and the "
            "original's loader refuses them too. Leave it out, or read it with a robot of your own."
        )
    if not row.cameras:
        raise ValueError(f"The dataset {name!r} can't be trained on: {row.place} names no cameras.")
    cameras: dict[str, Names] = {view: f"{OBSERVATION}{field}" for view, field in row.cameras.items()}
    state = sorted(select_steps(row.steps, parse_value(row.state).fields)[1]) if row.state else []
    return TableRobot(
        name,
        camera=next(iter(cameras.values())),
        action=tuple(map(column_name, sorted(select_steps(row.steps, {"action"})[1]))),
        state=tuple(map(column_name, state)),
        instruction=_instruction(row),
        action_dim=ACTION_ENCODINGS[row.action_encoding],
        gripper=None if row.action_encoding == "JOINT_POS_BIMANUAL" else Gripper(),
        frequency=row.frequency,
        space=SPACES[row.action_encoding],
        drop_idle=bool(row.idle_q01),
        cameras=cameras,
        row=row,
    )


def _instruction(row: DatasetRow) -> Names:
    """Return the feature with the instruction before the transform."""
    for step in row.steps:
        if isinstance(step, Assign) and step.target == INSTRUCTION:
            return column_name(step.value.parts[0].field)
    return INSTRUCTION_NAMES


def column_name(field: str) -> str:
    """Return the name that readers give a field, in which nested names and slashes look the same."""
    return field.replace("/", ".")


def _as_numbers(values: np.ndarray) -> np.ndarray:
    """Round numbers to float32, as the original does, and return them as float64."""
    return values.astype(np.float32).astype(np.float64)


__all__ = ["TableRobot", "dataset_robot"]
