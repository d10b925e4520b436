"""LeRobot's statistics of a dataset as those of OpenVLA, and its gripper as OpenVLA's."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from openvla_hf.serving.policy import GRIPPERS


BOUNDS = (("q01", "q99"), ("min", "max"))
NAMES = ("q01", "q99", "min", "max", "mean", "std")
PARTS = {ACTION: "action", OBS_STATE: "proprio"}
"""Feature of LeRobot -> part of OpenVLA's statistics."""


def to_opening(values: np.ndarray, gripper: str) -> np.ndarray:
    """Convert a robot's gripper to OpenVLA's, which is 1 for open and 0 for closed."""
    convention = GRIPPERS[gripper]
    return (values - convention.closed) / (convention.open - convention.closed)


def summarize_dataset(
    dataset_stats: Mapping[str, Mapping[str, Any]], gripper: str
) -> dict[str, dict[str, list[float]]]:
    """Return the statistics of actions and states, `{"action": {"q01": [...], ..., "mask": [...]}, "proprio": ...}`.

    The last dimension of actions is converted to OpenVLA's gripper. It is not scaled if its values are then between 0
    and 1; all other dimensions are.

    Raises:
        ValueError: The dataset has no quantiles.
    """
    found = {}
    for feature, part in PARTS.items():
        if feature not in dataset_stats:
            continue
        given = dataset_stats[feature]
        if missing := [name for name in NAMES if name not in given]:
            raise ValueError(
                f"The statistics of {feature!r} have no {missing[0]!r}, which OpenVLA normalises with. Add the "
                "quantiles to the dataset with LeRobot's script `augment_dataset_quantile_stats`."
            )
        found[part] = {name: np.asarray(given[name], dtype=np.float64) for name in NAMES}
    _convert_gripper(found["action"], gripper)
    is_opening = found["action"]["min"][-1] >= 0 and found["action"]["max"][-1] <= 1
    found["action"]["mask"] = np.append(np.ones(len(found["action"]["min"]) - 1), not is_opening)
    return {part: {name: row.tolist() for name, row in rows.items()} for part, rows in found.items()}


def _convert_gripper(action: dict[str, np.ndarray], gripper: str) -> None:
    scale = abs(GRIPPERS[gripper].open - GRIPPERS[gripper].closed)
    for low, high in BOUNDS:
        action[low][-1], action[high][-1] = np.sort(to_opening(np.array([action[low][-1], action[high][-1]]), gripper))
    action["mean"][-1] = to_opening(action["mean"][-1], gripper)
    action["std"][-1] /= scale


def read_statistics(statistics: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, list[Any]]]:
    """Return the statistics of `summarize_dataset` as OpenVLA reads them, whose mask has truth values."""
    return {
        part: {name: [bool(one) for one in row] if name == "mask" else list(row) for name, row in rows.items()}
        for part, rows in statistics.items()
    }


__all__ = ["read_statistics", "summarize_dataset", "to_opening"]
