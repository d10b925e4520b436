"""Actions <-> tokens, and robot units <-> [-1, 1]: the action decoder behind `unnorm_key`."""

import difflib
from typing import Any

import numpy as np
import torch


class ActionTokenizer:
    """Uniform bins over [-1, 1], each an id at the end of the vocabulary.

    `n_bins` edges give `n_bins - 1` centres: the two highest values share the last one. The id counts down from
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
        """Token ids (int64) of normalised actions, of the same shape; values outside [-1, 1] are clipped."""
        actions = np.asarray(actions)
        if not np.isfinite(actions).all():
            raise ValueError("Actions to encode must be finite: found NaN or infinity.")
        return (self.vocab_end - np.digitize(np.clip(actions, -1.0, 1.0), self.bins)).astype(np.int64)

    def decode(self, token_ids: np.ndarray | torch.Tensor) -> np.ndarray:
        """Normalised actions (float64) of token ids, of the same shape; ids that are no action clip to an end."""
        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.cpu().numpy()
        index = np.clip(self.vocab_end - np.asarray(token_ids) - 1, 0, self.n_bins - 2)
        return self.bin_centers[index]


def resolve_action_stats(norm_stats: dict[str, Any] | None, unnorm_key: str | None) -> dict[str, Any]:
    """Action statistics of one data set.

    Args:
        norm_stats: `{key: {"action": {...}, ...}}` as in `dataset_statistics.json`.
        unnorm_key: Which of them; may be `None` when there is just one.

    Raises:
        ValueError: No statistics, several and no key, or a key that is not among them (the nearest is named).
    """
    if not norm_stats:
        raise ValueError(
            "This checkpoint has no action statistics, so its actions can't be turned into robot units: put a "
            "`dataset_statistics.json` beside its weights, set `model.norm_stats`, or pass `stats=`."
        )
    options = ", ".join(repr(key) for key in norm_stats)
    if unnorm_key is None:
        if len(norm_stats) > 1:
            raise ValueError(f"This checkpoint has several action statistics: pass `unnorm_key=`, one of {options}.")
        unnorm_key = next(iter(norm_stats))
    if unnorm_key not in norm_stats:
        near = difflib.get_close_matches(str(unnorm_key), norm_stats, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown `unnorm_key` {unnorm_key!r}.{hint} This checkpoint has {options}.")
    return norm_stats[unnorm_key]["action"]


def action_dim(stats: dict[str, Any]) -> int:
    """Number of action dimensions that statistics describe."""
    return len(stats["q01"])


def _mask(stats: dict[str, Any]) -> np.ndarray:
    """Which dimensions are scaled; all, where the statistics do not say."""
    return np.asarray(stats.get("mask", np.ones(action_dim(stats))), dtype=bool)


def _read(stats: dict[str, Any], name: str) -> np.ndarray:
    if name not in stats:
        raise ValueError(f"These statistics lack {name!r}, they have {', '.join(map(repr, stats))}.")
    return np.asarray(stats[name], dtype=np.float64)


def normalize(values: np.ndarray, stats: dict[str, Any], kind: str = "bounds_q99") -> np.ndarray:
    """Robot units -> what the model is trained on, in float64.

    Args:
        values: (..., dims) actions or proprioception.
        stats: Their statistics.
        kind: "bounds_q99" (quantiles 0.01 and 0.99 to [-1, 1]; OpenVLA's), "bounds" (minimum and maximum) or
            "normal" (mean 0, deviation 1). With bounds, values beyond are clipped, and a dimension that never
            changes becomes 0, masked or not.
    """
    values, mask = np.asarray(values, dtype=np.float64), _mask(stats)
    if kind == "normal":
        return np.where(mask, (values - _read(stats, "mean")) / (_read(stats, "std") + 1e-8), values)
    if kind not in ("bounds", "bounds_q99"):
        raise ValueError(f"Unknown normalisation {kind!r}: it is 'bounds_q99', 'bounds' or 'normal'.")
    lowest, highest = _read(stats, "min"), _read(stats, "max")
    low, high = (_read(stats, "q01"), _read(stats, "q99")) if kind == "bounds_q99" else (lowest, highest)
    scaled = np.clip(2.0 * (values - low) / (high - low + 1e-8) - 1.0, -1.0, 1.0)
    return np.where(lowest == highest, 0.0, np.where(mask, scaled, values))


def unnormalize(actions: np.ndarray, stats: dict[str, Any]) -> np.ndarray:
    """Normalised actions (..., dims) -> robot units, in float64; unmasked dimensions (the gripper) pass through."""
    actions = np.asarray(actions, dtype=np.float64)
    low, high = _read(stats, "q01"), _read(stats, "q99")
    return np.where(_mask(stats), 0.5 * (actions + 1.0) * (high - low) + low, actions)


__all__ = ["ActionTokenizer", "action_dim", "normalize", "resolve_action_stats", "unnormalize"]
