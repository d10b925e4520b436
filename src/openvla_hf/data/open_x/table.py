"""The table of datasets and mixtures in `table.toml`, which files of the same format can extend."""

import difflib
import functools
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...modeling.known_names import check_name
from .steps import Step, parse_step, parse_value


TABLE_FILE = Path(__file__).with_name("table.toml")
SECTIONS = ("transforms", "datasets", "mixtures")
STATE_ENCODINGS = ("POS_EULER", "POS_QUAT", "JOINT", "JOINT_BIMANUAL")
# Encoding of actions -> number of dimensions.
ACTION_ENCODINGS = {"EEF_POS": 7, "EEF_R6": 10, "JOINT_POS": 8, "JOINT_POS_BIMANUAL": 14}
BUCKET = "gs://gresearch/robotics"
# Entry of a row that is not a text -> type of its value, and how an error names it.
ENTRY_TYPES: dict[str, tuple[Any, str]] = {
    "transform": ((str, list), "the name of a transform or a list of steps"),
    "cameras": (Mapping, 'names and fields, such as { full_image = "image" }'),
    "frequency": ((int, float), "a number"),
    "idle_q01": (list, "a list of numbers"),
    "idle_q99": (list, "a list of numbers"),
    "check_gripper": (bool, "true or false"),
}


@dataclass(frozen=True)
class DatasetRow:
    """A row of the table; `table.toml` describes the entries.

    Attributes:
        name: Name of the dataset.
        transform: Steps that bring a trajectory into the standard form.
        cameras: Name in a policy -> field of the observation.
        state: Value of the state after the transform, or an empty text.
        state_encoding: Meaning of the state's numbers, or an empty text.
        action_encoding: Meaning of the action's numbers.
        frequency: Actions per second.
        idle_q01: Quantiles 0.01 that normalise movements to find idle frames, or none.
        idle_q99: Quantiles 0.99.
        source: Where to get the data, or an empty text if this is unknown.
        table: File that contains the row.
        check_gripper: Whether the gripper's values after the transform must lie between 0 (closed) and 1 (open).
    """

    name: str
    transform: tuple[str, ...] = ()
    cameras: Mapping[str, str] = field(default_factory=dict, hash=False)
    state: str = ""
    state_encoding: str = ""
    action_encoding: str = "EEF_POS"
    frequency: float | None = None
    idle_q01: tuple[float, ...] = ()
    idle_q99: tuple[float, ...] = ()
    source: str = ""
    table: str = field(default="", repr=False)
    # Checkpoints store the text of a row, and this entry changes no number.
    check_gripper: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        check_name(self.action_encoding, ACTION_ENCODINGS, "action_encoding")
        if self.state_encoding:
            check_name(self.state_encoding, STATE_ENCODINGS, "state_encoding")
        for step in self.transform:
            parse_step(step)
        if self.state:
            parse_value(self.state)

    @property
    def steps(self) -> list[Step]:
        """Steps of the transform."""
        return list(map(parse_step, self.transform))

    @property
    def is_added(self) -> bool:
        """Whether the row comes from another file than the package's table."""
        return self.table != _short_path(TABLE_FILE)

    @property
    def place(self) -> str:
        """Where the row is, for a person to look it up."""
        return f"[datasets.{self.name}] in {self.table}"


@dataclass(frozen=True)
class Table:
    """Datasets and mixtures by name."""

    datasets: dict[str, DatasetRow]
    mixtures: dict[str, dict[str, float]]


@functools.cache
def known_table() -> Table:
    """Return the table of the package, with the rows that `add_table` has added."""
    return read_table(TABLE_FILE)


def add_table(path: str | os.PathLike) -> Table:
    """Add the datasets and mixtures of a file. They replace entries of the same name.

    Args:
        path: File in the format of `table.toml`. Its transforms can be those of the package, by name, or its own.

    Returns:
        The datasets and mixtures of the file.

    Raises:
        ValueError: The file is not valid.
    """
    table, added = known_table(), read_table(Path(path))
    table.datasets.update(added.datasets)
    table.mixtures.update(added.mixtures)
    return added


def read_table(path: Path) -> Table:
    """Read a file in the format of `table.toml`.

    Raises:
        OSError: The file can't be read.
        ValueError: The file is not valid. The message names the entry.
    """
    content = _parse_file(path)
    for section, entries in content.items():
        check_name(section, SECTIONS, f"section in {path}")
        if not isinstance(entries, Mapping):
            raise ValueError(f"{path}: {section} is not a section. Write it as [{section}].")
    transforms = content.get("transforms", {})
    if path != TABLE_FILE:
        transforms = _parse_file(TABLE_FILE)["transforms"] | transforms
    datasets = {}
    for name, entries in content.get("datasets", {}).items():
        try:
            datasets[name] = _read_row(name, entries, transforms, path)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, [datasets.{name}]: {error}") from error
    mixtures = {name: check_weights(name, weights) for name, weights in content.get("mixtures", {}).items()}
    return Table(datasets, mixtures)


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error


def _read_row(name: str, entries: Any, transforms: Mapping[str, list[str]], path: Path) -> DatasetRow:
    known = [each.name for each in fields(DatasetRow) if each.name not in ("name", "table")]
    if not isinstance(entries, Mapping):
        raise ValueError(f"{entries!r} is not a row. Write the entries of the dataset below [datasets.{name}].")
    for entry, value in entries.items():
        check_name(entry, known, "entry")
        expected, description = ENTRY_TYPES.get(entry, (str, "a text"))
        if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
            raise ValueError(f"{entry} is {value!r}. Give {description}.")
    transform = entries.get("transform", [])
    if isinstance(transform, str):
        check_name(transform, transforms, "transform")
        transform = transforms[transform]
    if not isinstance(transform, list) or not all(isinstance(step, str) for step in transform):
        raise ValueError(f"The transform is {transform!r}. Give a list of steps, each a text.")
    values: dict[str, Any] = {
        entry: tuple(value) if isinstance(value, list) else value for entry, value in entries.items()
    }
    values |= {"transform": tuple(transform), "table": _short_path(path)}
    values.setdefault("source", f"{BUCKET}/{name}" if path == TABLE_FILE else "")
    return DatasetRow(name, **values)


def _short_path(path: Path) -> str:
    """Return a path, shortened to `openvla_hf/...` for the package's own table."""
    return str(path.relative_to(TABLE_FILE.parents[3]) if path == TABLE_FILE else path)


def check_weights(name: str, weights: Any) -> dict[str, float]:
    """Check that the content of a mixture is weights by dataset, and return it.

    Raises:
        ValueError: The content is something else, or a weight is not above 0.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"The mixture {name!r} does not give weights by dataset, such as {{'bridge_orig': 1.0}}.")
    if {*weights} & {"datasets", "mixtures"}:
        raise ValueError(
            f"{name!r} is a table of datasets, and not the weights of a mixture. Give it as the robots (`--robots`), "
            "and one of its mixtures by name."
        )
    for dataset, weight in weights.items():
        if isinstance(weight, str):
            raise ValueError(
                f"The mixture {name!r} gives {dataset!r} the weight {weight!r}, which is text. Write the number "
                "without quotes."
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
            raise ValueError(f"The mixture {name!r} gives {dataset!r} the weight {weight!r}. Give a number above 0.")
    return dict(weights)


def find_row(name: str) -> DatasetRow:
    """Return the row of a dataset.

    Raises:
        ValueError: The table has no such dataset. The message suggests the closest name.
    """
    datasets = known_table().datasets
    if name not in datasets:
        near = difflib.get_close_matches(name, datasets, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"The table of Open X-Embodiment has no dataset {name!r}.{hint}")
    return datasets[name]


__all__ = ["ACTION_ENCODINGS", "DatasetRow", "add_table", "check_weights", "find_row", "known_table"]
