"""The datasets of Open X-Embodiment: a table of how each is read, and its interpreter.

Letters in shapes: T steps of a trajectory.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .robot import TableRobot, dataset_robot
from .steps import Trajectory, run_steps
from .table import DatasetRow, add_table, find_row, known_table


def standardize(name: str, trajectory: Mapping[str, Any], rng: np.random.Generator | None = None) -> Trajectory:
    """Bring a trajectory into the standard form, by the transform of its dataset.

    Args:
        name: Name of the dataset.
        trajectory: Nested dict of (T, ...) arrays under the dataset's own names.
        rng: Draws whether cameras change places, where a transform says so. By default, a new one.

    Returns:
        Nested dict of arrays, such as `action` (T', 7) and `language_instruction` (T',) with the T' steps that the
        transform keeps. The arrays of the given trajectory stay unchanged.

    Raises:
        ValueError: The table has no such dataset, or the trajectory lacks a field.
    """
    rng = np.random.default_rng() if rng is None else rng
    return run_steps(find_row(name).steps, dict(trajectory), rng.random)


__all__ = ["DatasetRow", "TableRobot", "add_table", "dataset_robot", "find_row", "known_table", "standardize"]
