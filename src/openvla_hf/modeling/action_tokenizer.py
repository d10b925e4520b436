"""Convert between actions and tokens, and between robot units and [-1, 1]."""

import math
from numbers import Real
from typing import Any

import numpy as np
import torch

from .known_names import check_name


# Pairs of bounds, the lower one first.
BOUNDS = ("q01", "q99", "min", "max")
# `action_normalization` of a config -> the statistics that map to -1 and 1.
BOUNDS_OF = {"q99": BOUNDS[:2], "bounds": BOUNDS[2:]}
# `action_normalization` of a config -> `kind` of `normalize`.
NORMALIZATION_KINDS = {"q99": "bounds_q99", "bounds": "bounds"}
RANGE_MARGIN = 1e-8


class ActionTokenizer:
    """Uniform bins over [-1, 1], each with an id at the end of the vocabulary.

    `n_bins` edges give `n_bins - 1` centres: the two highest values share the last one. Ids count down from
    `vocab_end`, so the lowest action has the highest id.

    Args:
        vocab_end: One past the highest action id (32000 for Llama-2).
        n_bins: Number of action ids.
    """

    def __init__(self, vocab_end: int = 32000, n_bins: int = 256):
        self.vocab_end = vocab_end
        self.n_bins = n_bins
        self.bins = np.linspace(-1.0, 1.0, n_bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0

    @property
    def first_id(self) -> int:
        """Lowest action id; the ids are `range(first_id, vocab_end)`."""
        return self.vocab_end - self.n_bins

    @property
    def bin_values(self) -> np.ndarray:
        """(n_bins,) value of each bin, lowest first; bin `i` has the id `vocab_end - 1 - i`."""
        return self.decode(self.vocab_end - 1 - np.arange(self.n_bins))

    def encode(self, actions: np.ndarray | torch.Tensor) -> np.ndarray:
        """Encode normalised actions as ids (int64) of the same shape; values outside [-1, 1] are clipped."""
        actions = np.asarray(actions)
        if not np.isfinite(actions).all():
            raise ValueError("Actions to encode must be finite: found NaN or infinity.")
        return (self.vocab_end - np.digitize(np.clip(actions, -1.0, 1.0), self.bins)).astype(np.int64)

    def decode(self, token_ids: np.ndarray | torch.Tensor) -> np.ndarray:
        """Decode ids to normalised actions (float64) of the same shape; other ids are clipped to the action ids.

        Raises:
            ValueError: The ids are not integers.
        """
        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.cpu().numpy()
        token_ids = np.asarray(token_ids)
        if token_ids.dtype.kind not in "iu":
            raise ValueError(f"Ids of action tokens must be integers, got {token_ids.dtype}.")
        index = np.clip(self.vocab_end - token_ids.astype(np.int64) - 1, 0, self.n_bins - 2)
        return self.bin_centers[index]


def check_statistics(norm_stats: Any, where: str) -> dict[str, Any] | None:
    """Check the action statistics of every dataset.

    Args:
        norm_stats: `{key: {"action": {...}, ...}}` as in `dataset_statistics.json`, or `None`.
        where: Origin of the statistics, for the message.

    Returns:
        `norm_stats`.

    Raises:
        ValueError: The statistics of a dataset are damaged, see `check_action_stats`.
    """
    if norm_stats is None:
        return None
    if not isinstance(norm_stats, dict):
        raise ValueError(f"{where} must map names of datasets to statistics, got {norm_stats!r:.80}.")
    for key, of_dataset in norm_stats.items():
        if not isinstance(of_dataset, dict) or "action" not in of_dataset:
            raise ValueError(f"{where} has no 'action' statistics for {key!r}: compute the statistics again.")
        check_action_stats(of_dataset["action"], f"{where}, 'action' of {key!r}")
    return norm_stats


def check_action_stats(stats: Any, where: str) -> dict[str, Any]:
    """Check that the action statistics of one dataset can turn every action into robot units.

    Args:
        stats: `q01` and `q99`, finite numbers for each dimension, with `q01 <= q99`. `min` and `max` of the same kind,
            `mean`, `std`, and `mask` (a truth value for each dimension) are optional.
        where: Origin of the statistics, for the message.

    Returns:
        `stats`.

    Raises:
        ValueError: One of them is missing, is not finite, has another length, or does not fit the others.
    """
    again = "Correct the statistics, or compute them again."
    if not isinstance(stats, dict):
        raise ValueError(f"{where}: action statistics must be a dictionary with 'q01' and 'q99', got {stats!r:.80}.")
    if missing := [name for name in ("q01", "q99") if name not in stats]:
        raise ValueError(
            f"{where}: {missing[0]!r} is missing (found {', '.join(map(repr, stats)) or 'nothing'}). {again}"
        )
    columns = {
        name: (_truth_values if name == "mask" else _numbers)(stats[name])
        for name in (*BOUNDS, "mean", "std", "mask")
        if name in stats
    }
    for name, values in columns.items():
        if values is None:
            kind = "truth values" if name == "mask" else "finite numbers"
            raise ValueError(f"{where}: {name!r} must be a list of {kind}, got {stats[name]!r:.120}. {again}")
        dims = len(columns["q01"] or ())
        if not values:
            raise ValueError(f"{where}: {name!r} is empty. {again}")
        if len(values) != dims:
            raise ValueError(f"{where}: {name!r} has {len(values)} values, but 'q01' has {dims}. {again}")
        if name == "std" and min(values) < 0:
            raise ValueError(f"{where}: 'std' must not be negative, got {stats[name]!r:.120}. {again}")
    for low, high in (BOUNDS[:2], BOUNDS[2:]):
        for index, (lower, upper) in enumerate(zip(columns.get(low) or (), columns.get(high) or (), strict=False)):
            if not 0 <= upper - lower < math.inf:
                problem = f"is above {high!r}" if lower > upper else f"and {high!r} are too far apart"
                problem = f"{low!r} {problem} in dimension {index} ({lower:g} and {upper:g})"
                raise ValueError(f"{where}: {problem}. {again}")
    return stats


def _listed(values: Any) -> list[Any] | None:
    """Convert a flat list, tuple, array or tensor to a list, and anything else to `None`."""
    if isinstance(values, (np.ndarray, torch.Tensor)):
        values = values.tolist()
    return list(values) if isinstance(values, (list, tuple)) else None


def _numbers(values: Any) -> list[float] | None:
    """Convert a list of finite numbers to floats, and anything else to `None`."""
    values = _listed(values)
    # Check the few types that occur, not each value, since this runs at every action.
    if values is None or not all(issubclass(kind, Real) and kind is not bool for kind in set(map(type, values))):
        return None
    try:
        numbers = list(map(float, values))
    except OverflowError:  # an integer beyond the range of floats
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _truth_values(values: Any) -> list[bool] | None:
    """Convert a list of truth values, or of 0 and 1, to bools, and anything else to `None`."""
    values = _listed(values)
    if values is None or not all(issubclass(kind, (Real, np.bool_)) for kind in set(map(type, values))):
        return None
    return [one == 1 for one in values] if all(one in (0, 1) for one in values) else None


def resolve_action_stats(norm_stats: dict[str, Any] | None, unnorm_key: str | None) -> dict[str, Any]:
    """Look up the action statistics of one dataset, which `check_statistics` must have checked.

    Args:
        norm_stats: `{key: {"action": {...}, ...}}` as in `dataset_statistics.json`.
        unnorm_key: Name of the dataset; may be `None` if there is only one.

    Raises:
        ValueError: See `resolve_key`.
    """
    key = resolve_key(norm_stats, unnorm_key)
    return norm_stats[key]["action"]  # type: ignore[index]


def resolve_key(norm_stats: dict[str, Any] | None, unnorm_key: str | None) -> str:
    """Resolve the name of the dataset whose statistics to use.

    Args:
        norm_stats: `{key: {"action": {...}, ...}}` as in `dataset_statistics.json`.
        unnorm_key: Name of the dataset; may be `None` if there is only one.

    Raises:
        ValueError: There are no statistics, there are several and no key, or the key is unknown.
    """
    if not norm_stats:
        raise ValueError(
            "This checkpoint has no action statistics, so its actions can't be turned into robot units: put a "
            "`dataset_statistics.json` next to its weights, set `model.norm_stats`, or pass `stats=`. If it has not "
            "learned to act yet, train it with `openvla-hf finetune`."
        )
    if unnorm_key is None and len(norm_stats) == 1:
        return next(iter(norm_stats))
    if unnorm_key is None:
        options = ", ".join(map(repr, norm_stats))
        raise ValueError(f"This checkpoint has several action statistics: pass `unnorm_key=`, one of {options}.")
    check_name(unnorm_key, norm_stats, "`unnorm_key`")
    return unnorm_key


def action_dim(stats: dict[str, Any]) -> int:
    """Return the number of action dimensions that statistics describe."""
    return len(stats["q01"])


def _mask(stats: dict[str, Any]) -> np.ndarray:
    """Return which dimensions are scaled; all of them by default."""
    return np.asarray(stats.get("mask", np.ones(action_dim(stats))), dtype=bool)


def _read(stats: dict[str, Any], name: str) -> np.ndarray:
    if name not in stats:
        raise ValueError(f"The action statistics lack {name!r} (found {', '.join(map(repr, stats))}).")
    return np.asarray(stats[name], dtype=np.float64)


def normalize(values: np.ndarray, stats: dict[str, Any], kind: str = "bounds_q99") -> np.ndarray:
    """Convert robot units to normalised values, in float64.

    Args:
        values: (..., dims) actions or proprioception.
        stats: Their statistics.
        kind: "bounds_q99" (quantiles 0.01 and 0.99 to [-1, 1], as in OpenVLA), "bounds" (minimum and maximum) or
            "normal" (mean 0, deviation 1). With bounds, values beyond them are clipped, and a dimension that never
            changes becomes 0, masked or not.
    """
    values, mask = np.asarray(values, dtype=np.float64), _mask(stats)
    if kind == "normal":
        return np.where(mask, (values - _read(stats, "mean")) / (_read(stats, "std") + 1e-8), values)
    if kind not in ("bounds", "bounds_q99"):
        raise ValueError(f"Unknown normalisation {kind!r}: give 'bounds_q99', 'bounds' or 'normal'.")
    lowest, highest = _read(stats, "min"), _read(stats, "max")
    low, high = (_read(stats, "q01"), _read(stats, "q99")) if kind == "bounds_q99" else (lowest, highest)
    scaled = np.clip(2.0 * (values - low) / (high - low + RANGE_MARGIN) - 1.0, -1.0, 1.0)
    return np.where(lowest == highest, 0.0, np.where(mask, scaled, values))


def unnormalize(actions: np.ndarray, stats: dict[str, Any], bounds: str = "q99", margin: float = 0.0) -> np.ndarray:
    """Convert normalised actions (..., dims) to robot units, in float64; keep unmasked dimensions (the gripper).

    Args:
        actions: (..., dims).
        stats: Their statistics.
        bounds: Statistics that correspond to -1 and 1: "q99" or "bounds" (minimum and maximum).
        margin: Number to add to the range, `RANGE_MARGIN` for OpenVLA-OFT.
    """
    actions = np.asarray(actions, dtype=np.float64)
    low, high = (_read(stats, name) for name in BOUNDS_OF[bounds])
    return np.where(_mask(stats), 0.5 * (actions + 1.0) * (high - low + margin) + low, actions)


def normalize_state(state: np.ndarray, stats: dict[str, Any], bounds: str = "q99") -> np.ndarray:
    """Convert the state (..., dims) from robot units to [-1, 1], in float64, as OpenVLA-OFT does for predictions.

    Args:
        state: (..., dims).
        stats: Its statistics.
        bounds: Statistics that correspond to -1 and 1: "q99" or "bounds" (minimum and maximum).

    Returns:
        Values clipped to [-1, 1]. Unlike in `normalize`, a dimension that never changes becomes -1 at its value.
    """
    state = np.asarray(state, dtype=np.float64)
    low, high = (_read(stats, name) for name in BOUNDS_OF[bounds])
    scaled = 2.0 * (state - low) / (high - low + RANGE_MARGIN) - 1.0
    return np.clip(np.where(_mask(stats), scaled, state), -1.0, 1.0)


__all__ = [
    "NORMALIZATION_KINDS",
    "RANGE_MARGIN",
    "ActionTokenizer",
    "action_dim",
    "check_action_stats",
    "check_statistics",
    "normalize",
    "normalize_state",
    "resolve_action_stats",
    "resolve_key",
    "unnormalize",
]
