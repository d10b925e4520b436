"""The names of a dataset's features, as robots give them and as they are found in a dataset."""

import difflib
from collections.abc import Collection

from ..modeling.known_names import unknown_name


Names = str | tuple[str, ...]


class FirstOf(tuple[str, ...]):
    """Alternative names of one feature, of which the first one in the dataset is read."""

    def __new__(cls, *names: str) -> "FirstOf":
        """Take the names in order of preference."""
        return super().__new__(cls, names)

    def __getnewargs__(self) -> tuple[str, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(repr, self))})"


STATE_NAMES = FirstOf("observation.state", "state")
INSTRUCTION_NAMES = ("language_instruction", "observation.natural_language_instruction", "instruction", "task")


def as_tuple(names: Names) -> tuple[str, ...]:
    """Return one name or several as a tuple."""
    return (names,) if isinstance(names, str) else names


def find_name(wanted: Names, available: Collection[str], kind: str) -> str:
    """Return the first of the wanted names that is available.

    Raises:
        ValueError: None is available. The message suggests the closest name.
    """
    for name in as_tuple(wanted):
        if name in available:
            return name
    names = as_tuple(wanted)
    raise unknown_name(" or ".join(map(repr, names)), sorted(available), kind, nearest_to=names[0])


def find_camera(wanted: Names, available: Collection[str]) -> str:
    """Return the first of the wanted cameras that is available, by its name or by the last part of its name.

    Raises:
        ValueError: None is available, or several names end in the same way.
    """
    for name in as_tuple(wanted):
        ending = [camera for camera in available if camera.endswith(f".{name}")]
        if name in available:
            return name
        if len(ending) > 1:
            raise ValueError(f"Several cameras are called {name!r}. Choose one of {listed(ending)}.")
        if ending:
            return ending[0]
    # Look for a typing error in the last parts of the names too.
    last_parts = {camera.rpartition(".")[2]: camera for camera in available}
    names = as_tuple(wanted)
    near = difflib.get_close_matches(names[0], last_parts, n=1)
    shown = " or ".join(map(repr, names))
    raise unknown_name(shown, sorted(available), "camera", nearest_to=last_parts[near[0]] if near else names[0])


def find_columns(wanted: Names, available: Collection[str], kind: str) -> list[str]:
    """Return the columns that a robot names: one, the first of several alternatives, or all to concatenate.

    Raises:
        ValueError: A column is missing.
    """
    if isinstance(wanted, (str, FirstOf)):
        return [find_name(wanted, available, kind)]
    missing = [name for name in wanted if name not in available]
    if missing or not wanted:
        raise ValueError(
            f"{kind}={wanted!r} concatenates features, but the dataset has no {listed(missing or ['name'])}. "
            f"Choose from {listed(available)}. For alternatives, write FirstOf('one name', 'another name')."
        )
    return list(wanted)


def listed(names: Collection[str]) -> str:
    """Return the names sorted and quoted, for a message."""
    return ", ".join(map(repr, sorted(names))) or "none"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


__all__ = [
    "INSTRUCTION_NAMES",
    "STATE_NAMES",
    "FirstOf",
    "Names",
    "as_tuple",
    "counted",
    "find_camera",
    "find_columns",
    "find_name",
    "listed",
]
