"""The steps of a transform: their notation, described in `table.toml`, and what they do to a trajectory.

A trajectory is a nested dict of (T, ...) arrays. Fields are named by their path, as in "observation.state".
"""

import functools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from ...modeling.known_names import check_name
from ..feature_names import counted
from .primitives import PRIMITIVES, decompress


Trajectory: TypeAlias = dict[str, Any]

# The one field whose steps `drop_first` keeps.
METADATA = "traj_metadata"
FIELD = r"[\w./]+"
ASSIGNMENT = re.compile(rf"({FIELD}) = (.+)")
COMMAND = re.compile(rf"(drop_first|drop_last) (\d+)|(rename|swap) ({FIELD}) ({FIELD})")
CONSTANT = re.compile(r"(zeros|ones)\((\d+)\)")
COLUMNS = re.compile(rf"({FIELD})(?:\[(-?\d+)\]|\[(-?\d*):(-?\d*)\])?")
CALL = re.compile(r"(\w+)(?:\((\d+)\))?")


@dataclass(frozen=True)
class Part:
    """A part of a value: columns of a field with functions to apply to them, or constants.

    Attributes:
        field: Path of the field, or an empty text for constants.
        columns: Columns to take, or `None` for all.
        functions: Functions to apply in order.
        constants: The constants.
    """

    field: str = ""
    columns: slice | int | None = None
    functions: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()
    constants: tuple[float, ...] = ()

    def evaluate(self, trajectory: Trajectory) -> np.ndarray:
        """Return the part of a trajectory, (T, ...).

        Raises:
            ValueError: The trajectory has no such field or column.
        """
        values = get_field(trajectory, self.field)
        if self.columns is not None:
            if values.ndim < 2:  # the last axis would be the steps
                raise ValueError(f"{self.field!r} has one number in each step, so it has no columns to take.")
            size = values.shape[-1]
            if isinstance(self.columns, int) and not -size <= self.columns < size:
                raise ValueError(
                    f"{self.field!r} has {counted(size, 'column')}, so it has no column [{self.columns}]."
                )
            values = values[..., self.columns]
        for function in self.functions:
            values = function(values)
        return values


@dataclass(frozen=True)
class Value:
    """Parts to join on the last axis."""

    parts: tuple[Part, ...]

    @property
    def fields(self) -> set[str]:
        """Paths of the fields that the value is computed from."""
        return {part.field for part in self.parts if part.field}

    def evaluate(self, trajectory: Trajectory) -> np.ndarray:
        """Return the value in a trajectory, (T, ...). Constants take the type of the other parts."""
        values = [part.evaluate(trajectory) if part.field else None for part in self.parts]
        known = [each for each in values if each is not None]
        if len(values) == 1:
            return known[0]
        joined = [
            np.tile(np.array(part.constants, known[0].dtype), (len(known[0]), 1)) if each is None else each
            for part, each in zip(self.parts, values, strict=True)
        ]
        return np.concatenate([each[:, None] if each.ndim == 1 else each for each in joined], axis=-1)


@dataclass(frozen=True)
class Assign:
    """Set a field to a value."""

    target: str
    value: Value

    @property
    def fields(self) -> set[str]:
        """Fields that the step sets."""
        return {self.target}

    def apply(self, trajectory: Trajectory, draw: Callable[[], float]) -> Trajectory:
        """Return the trajectory with the field."""
        return set_field(trajectory, self.target, self.value.evaluate(trajectory))

    def sources(self, wanted: set[str]) -> set[str] | None:
        """Return the fields that the wanted ones come from, or `None` if this step does not change them."""
        return wanted - {self.target} | self.value.fields if self.target in wanted else None


@dataclass(frozen=True)
class Drop:
    """Leave out steps of a trajectory.

    Attributes:
        steps: Steps to keep.
        kept: Name of a field that keeps all its steps.
    """

    steps: slice
    kept: str = ""
    fields: ClassVar[set[str]] = set()

    def apply(self, trajectory: Trajectory, draw: Callable[[], float]) -> Trajectory:
        """Return the trajectory without the steps."""
        return {
            name: value if name == self.kept else map_fields(value, lambda values: values[self.steps])
            for name, value in trajectory.items()
        }

    def sources(self, wanted: set[str]) -> set[str]:
        """Return the wanted fields, all of which this step changes."""
        return wanted


@dataclass(frozen=True)
class Rename:
    """Move a field."""

    source: str
    target: str

    @property
    def fields(self) -> set[str]:
        """Fields that the step sets."""
        return {self.target}

    def apply(self, trajectory: Trajectory, draw: Callable[[], float]) -> Trajectory:
        """Return the trajectory with the field in its new place."""
        moved = get_field(trajectory, self.source)
        return set_field(remove_field(trajectory, self.source), self.target, moved)

    def sources(self, wanted: set[str]) -> set[str] | None:
        """Return the fields that the wanted ones come from, or `None` if this step does not change them."""
        return wanted - {self.target} | {self.source} if self.target in wanted else None


@dataclass(frozen=True)
class Swap:
    """Swap two fields in half of the trajectories, by a draw from [0, 1)."""

    SHARE: ClassVar[float] = 0.5

    first: str
    second: str

    @property
    def fields(self) -> set[str]:
        """Fields that the step sets."""
        return {self.first, self.second}

    def apply(self, trajectory: Trajectory, draw: Callable[[], float]) -> Trajectory:
        """Return the trajectory with the fields swapped, or unchanged."""
        if draw() > self.SHARE:
            return trajectory
        first, second = (get_field(trajectory, field) for field in (self.first, self.second))
        return set_field(set_field(trajectory, self.first, second), self.second, first)

    def sources(self, wanted: set[str]) -> set[str] | None:
        """Return the fields that the wanted ones come from, or `None` if this step does not change them."""
        both = {self.first, self.second}
        return wanted | both if wanted & both else None


Step: TypeAlias = Assign | Drop | Rename | Swap


@functools.cache
def parse_step(text: str) -> Step:
    """Parse a step.

    Raises:
        ValueError: The text is not a step, or it names an unknown function.
    """
    if assignment := ASSIGNMENT.fullmatch(text):
        return Assign(assignment[1], parse_value(assignment[2]))
    command = COMMAND.fullmatch(text)
    if command is None:
        raise ValueError(
            f"{text!r} is not a step of a transform. Write 'FIELD = VALUE', 'drop_first N', 'drop_last N', "
            "'rename FIELD FIELD' or 'swap FIELD FIELD'."
        )
    drop, count, exchange, first, second = command.groups()
    if drop == "drop_first":
        return Drop(slice(int(count), None), METADATA)
    if drop == "drop_last":
        return Drop(slice(None, -int(count) or None))
    return Rename(first, second) if exchange == "rename" else Swap(first, second)


@functools.cache
def parse_value(text: str) -> Value:
    """Parse a value.

    Raises:
        ValueError: A part is not valid, or all parts are constants.
    """
    value = Value(tuple(_parse_part(part.strip()) for part in text.split(",")))
    if not value.fields:
        raise ValueError(f"{text!r} contains only constants, so its number of steps is unknown. Add a field.")
    return value


def _parse_part(text: str) -> Part:
    if constant := CONSTANT.fullmatch(text):
        return Part(constants=(float(constant[1] == "ones"),) * int(constant[2]))
    head, *calls = text.split(" | ")
    field = COLUMNS.fullmatch(head)
    if field is None:
        raise ValueError(f"{head!r} is not a field or columns of one. Write for example 'action[:6]'.")
    name, index, start, end = field.groups()
    columns: slice | int | None = int(index) if index else None
    if start is not None:
        columns = slice(*(int(each) if each else None for each in (start, end)))
    return Part(name, columns, tuple(map(_parse_call, calls)))


def _parse_call(text: str) -> Callable[[np.ndarray], np.ndarray]:
    call = CALL.fullmatch(text)
    name, width = call.groups() if call else (text, None)
    check_name(name, PRIMITIVES, "function")
    function = PRIMITIVES[name]
    if function is not decompress:
        if width:
            raise ValueError(f"The function {name!r} takes no number. Write it without '({width})'.")
        return function
    if not width:
        raise ValueError(f"The function {name!r} needs the number of columns, as in '{name}(7)'.")
    return functools.partial(function, width=int(width))


def run_steps(steps: Iterable[Step], trajectory: Trajectory, draw: Callable[[], float] = random.random) -> Trajectory:
    """Run steps on a trajectory, without changing the given one.

    Args:
        steps: Steps in order.
        trajectory: Nested dict of (T, ...) arrays.
        draw: Returns a random number from [0, 1) at each call.

    Raises:
        ValueError: The trajectory lacks a field.
    """
    for step in steps:
        trajectory = step.apply(trajectory, draw)
    return trajectory


def select_steps(steps: Sequence[Step], wanted: set[str]) -> tuple[list[Step], set[str]]:
    """Select the steps that some fields depend on.

    Returns:
        The steps in order, and the paths of the fields that they read.
    """
    selected: list[Step] = []
    for step in reversed(steps):
        sources = step.sources(wanted)
        if sources is not None:
            selected.append(step)
            wanted = sources
    return selected[::-1], wanted


# Fields by their path


def get_field(trajectory: Mapping[str, Any], path: str) -> Any:
    """Return a field.

    Raises:
        ValueError: The trajectory has no such field.
    """
    found: Any = trajectory
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise ValueError(f"the trajectory has no field {path!r}.")
        found = found[name]
    return found


def set_field(trajectory: Mapping[str, Any], path: str, value: Any) -> Trajectory:
    """Return a copy of a trajectory with one field set."""
    name, _, rest = path.partition(".")
    inner = trajectory.get(name)
    changed = set_field(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value
    return {**trajectory, name: changed}


def remove_field(trajectory: Mapping[str, Any], path: str) -> Trajectory:
    """Return a copy of a trajectory without one field."""
    name, _, rest = path.partition(".")
    if rest:
        return {**trajectory, name: remove_field(trajectory[name], rest)}
    return {key: value for key, value in trajectory.items() if key != name}


def map_fields(value: Any, function: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Apply a function to every array of a nested dict."""
    if isinstance(value, Mapping):
        return {name: map_fields(inner, function) for name, inner in value.items()}
    return function(value)


__all__ = ["Step", "Trajectory", "parse_step", "parse_value", "run_steps", "select_steps", "set_field"]
