"""Check the action statistics of a policy, alone and against a dataset."""

import itertools
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.utils import CONFIG_NAME

from ...data.statistics import compute_statistics
from ...modeling.action_tokenizer import BOUNDS_OF, action_dim, check_statistics
from ...modeling.checkpoint_files import OFT_FILES, STATISTICS_FILE
from .findings import Finding, Subject, failed, passed, skipped, warned


COMPUTE = "Put the `dataset_statistics.json` of the training next to the weights"
# Overlap of the ranges of two statistics: below the first they belong to different robots, above the second to one.
DIFFERENT, SAME = 0.3, 0.7
# The units or the direction of a dimension differ if the data is within the range of the statistics by less than the
# first share, or is narrower by the second: radians are 0.017 degrees. A short recording is narrow, but not as narrow.
APART, NARROW = 0.15, 0.02
# Relative difference of equal constants, one of which was stored in 32 bits.
ROUNDING = 1e-6
# Keys that a finding names.
LISTED = 5
# OpenVLA's gripper, 0 for closed and 1 for open, with readings a little outside.
GRIPPER_RANGE, GRIPPER_SLACK = (0.0, 1.0), 0.1
DECLARE = "OpenVLA's gripper is 0 for closed and 1 for open: declare the recorded values in the robot's adapter."


def check_numbers(norm_stats: Any, config: Any) -> Finding:
    """Check that statistics are present, finite and in order, and have the dimensions of the model.

    Args:
        norm_stats: Statistics by key, in any state.
        config: Config of the model.
    """
    name = "statistics"
    if not norm_stats:
        return failed(name, "The policy has none, so actions can't be turned into robot units.", f"{COMPUTE}.")
    try:
        check_statistics(norm_stats, "`norm_stats`")
    except ValueError as error:
        return failed(name, str(error), f"{COMPUTE}, or compute them again with `compute_statistics`.")
    for key, of_dataset in norm_stats.items():
        stats = of_dataset["action"]
        if config.action_dim not in (None, action_dim(stats)):
            found = f"{key!r} has {action_dim(stats)} action dimensions, but the policy has {config.action_dim}."
            return failed(name, found, f"{COMPUTE}.")
        if config.proprio_dim is not None and "proprio" not in of_dataset:
            return failed(name, f"{key!r} has no 'proprio', which the policy's state needs.", f"{COMPUTE}.")
        if config.proprio_dim not in (None, action_dim(of_dataset.get("proprio", stats))):
            dims = action_dim(of_dataset["proprio"])
            found = f"{key!r} has {dims} state dimensions, but the policy has {config.proprio_dim}."
            return failed(name, found, f"{COMPUTE}.")
        low, high = (np.array(stats[bound]) for bound in BOUNDS_OF[config.action_normalization])
        scaled = np.array(stats.get("mask", [True] * len(low)), bool)
        if not (scaled & (low < high)).any():
            found = f"All dimensions of {key!r} that are scaled are constant."
            return failed(name, found, f"{COMPUTE}.")
        ends = np.array([stats.get("min", low), stats.get("max", high)])
        if lost := np.flatnonzero(scaled & (low == high) & (ends[0] < ends[1])).tolist():
            found = f"Dimensions {lost} of {key!r} vary, but their bounds are equal, so the policy can't move them."
            return warned(name, found, "Check whether the robot rarely moves these dimensions, or their recording.")
    keys = [f"{key} ({action_dim(one['action'])})" for key, one in norm_stats.items()]
    return passed(name, f"Finite and in order: {_listed(keys)}.")


def _listed(items: list[str]) -> str:
    """Join the first items, and count the others."""
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def check_files(subject: Subject) -> Finding:
    """Check that the config and the file of statistics agree on the keys that both have."""
    name = "statistics files"
    in_config, in_file = subject.raw_config.get("norm_stats"), subject.files.read_json(STATISTICS_FILE)
    if not (in_config and in_file):
        return skipped(name, f"Only one of {CONFIG_NAME} and {STATISTICS_FILE} has statistics, or neither.")
    if subject.files.match(OFT_FILES):
        return skipped(name, f"The statistics of a published OpenVLA-OFT policy are those of {STATISTICS_FILE}.")
    fix = (
        f"If the statistics in {STATISTICS_FILE} are those of the training, save the policy again with "
        "`save_pretrained`, which writes them to both files. If not, delete the file."
    )
    try:
        check_statistics(in_config, CONFIG_NAME)
        check_statistics(in_file, STATISTICS_FILE)
    except ValueError as error:
        return failed(name, str(error), fix)
    shared = [key for key in in_file if key in in_config]
    if wrong := [key for key in shared if _contradict(in_config[key], in_file[key])]:
        found = (
            f"{CONFIG_NAME} and {STATISTICS_FILE} disagree on {_listed([repr(key) for key in wrong])}. This package "
            f"uses {STATISTICS_FILE}."
        )
        return failed(name, found, fix)
    return passed(name, "Both files have the same statistics." if shared else "The files have no key in common.")


def _contradict(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two statistics of the same key have different bounds or masks."""
    for kind in ("action", "proprio"):
        stats = [one.get(kind) or {} for one in (first, second)]
        for name in (*itertools.chain(*BOUNDS_OF.values()), "mask"):
            if all(name in one for one in stats):
                ours, others = (np.array(one[name], float) for one in stats)
                if ours.shape != others.shape or not np.allclose(ours, others):
                    return True
    return False


def check_gripper_range(subject: Subject) -> Finding:
    """Check that the dimensions that are not scaled, usually the gripper, are from 0 to 1, and no others."""
    name, stats_of, key = "gripper", subject.model.norm_stats, subject.key
    ranges: dict[str, tuple[float, float]] = {}
    for one in stats_of if key is None else [key]:
        stats = stats_of[one]["action"]
        low, high = ("min", "max") if "min" in stats and "max" in stats else ("q01", "q99")
        last = len(stats[low]) - 1
        # The record of a run says which robot declared its gripper.
        is_known = last in unscaled(stats) or bool(subject.training.get("reading"))
        if not is_known and (stats[low][last], stats[high][last]) == GRIPPER_RANGE:
            found = f"Dimension {last} of {one!r} goes from 0 to 1 like a gripper, but is scaled to -1 to 1."
            fix = "If it is a gripper that the training did not scale, set its entry of `mask` to false."
            return warned(name, found, fix)
        if grippers := unscaled(stats):
            ranges[one] = min(stats[low][index] for index in grippers), max(stats[high][index] for index in grippers)
    wrong = [one for one, ends in ranges.items() if not is_gripper(*ends)]
    if wrong:
        low_end, high_end = ranges[wrong[0]]
        found = f"The gripper of {wrong[0]!r}, which is not scaled, goes from {low_end:g} to {high_end:g}."
        return warned(name, found, DECLARE)
    if not ranges:
        return passed(name, "All dimensions are scaled, as for joint positions.")
    return passed(name, f"From {min(ranges.values())[0]:g} (closed) to {max(ranges.values())[1]:g} (open).")


def unscaled(stats: dict[str, Any]) -> list[int]:
    """Return the dimensions that are not scaled: the grippers, in OpenVLA's statistics."""
    return np.flatnonzero(~np.array(stats.get("mask", [True]), bool)).tolist()


def is_gripper(low: float, high: float) -> bool:
    """Return whether a range is that of OpenVLA's gripper."""
    return low >= GRIPPER_RANGE[0] - GRIPPER_SLACK and high <= GRIPPER_RANGE[1] + GRIPPER_SLACK


def check_key(subject: Subject, frames: Dataset) -> list[Finding]:
    """Compare the statistics of the frames of one dataset with those of the key, and find a key that fits better."""
    name = str(frames[0]["dataset"])
    own = compute_statistics(frames)[name]
    known = subject.model.norm_stats or {}
    key = key_for(subject, name)
    if key is None:
        fits = {one: overlap(known[one]["action"], own["action"]) for one in known}
        best = max(fits, key=lambda one: fits[one]) if fits else None
        nearest = f" {best!r} is the nearest." if best is not None else ""
        found = f"The policy has several keys, and none is that of the data.{nearest}"
        return [warned("key", found, "Name the key of the robot (`--unnorm-key`, `unnorm_key=`).")]
    kinds = [kind for kind in ("action", "proprio") if kind in known[key] and own.get(kind)]
    return [_compare(kind, key, known, own, name) for kind in kinds]


def key_for(subject: Subject, dataset: str) -> str | None:
    """Return the key of the statistics for a dataset; `None` if none is given, of its name, or the only one."""
    return subject.unnorm_key or (dataset if dataset in (subject.model.norm_stats or {}) else subject.key)


def _compare(kind: str, key: str, known: dict[str, Any], own: dict[str, Any], name: str) -> Finding:
    check = "key" if kind == "action" else "key of the state"
    dims = action_dim(known[key][kind]), action_dim(own[kind])
    if dims[0] != dims[1]:
        found = f"The {kind} statistics of {key!r} have {dims[0]} dimensions, but the data has {dims[1]}."
        return failed(check, found, "Give data from the policy's robot, or the key of this data.")
    fits = {one: overlap(known[one][kind], own[kind]) for one in known if kind in known[one]}
    best = max(fits, key=lambda one: fits[one])
    found = f"The ranges of {key!r} and of {name} overlap by {fits[key]:.0%}"
    apart, count = _find_apart(known[key][kind], own[kind])
    # A short recording of the robot also has a small overlap, but is within the range of the statistics.
    if (fits[key] < DIFFERENT and len(apart) > count / 2) or fits[best] > fits[key] + DIFFERENT:
        other = f", those of {best!r} by {fits[best]:.0%}" if best != key else ""
        fix = f"Pass unnorm_key={best!r}." if best != key else "Use the statistics of this data, or check its units."
        return failed(check, f"{found}{other}.", fix)
    if apart:
        found += f", but hardly in dimension {', '.join(map(str, apart))}"
    if apart or fits[key] < SAME:
        fix = "Check the units of the data, and that its robot adapter is that of the training."
        return warned(check, f"{found}.", fix if apart else f"{fix} A short recording also has a small overlap.")
    return passed(check, f"{found}.")


def overlap(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return the intersection of the ranges from q01 to q99 divided by their union, averaged over the dimensions.

    Statistics with another number of dimensions overlap by 0. Dimensions that are constant in both count if their
    values differ, and dimensions that are not scaled do not count.
    """
    if action_dim(first) != action_dim(second):
        return 0.0
    shared, union, counted = _intersect(first, second)
    return float((shared.clip(0)[counted] / union[counted]).mean()) if counted.any() else 1.0


def _intersect(first: dict[str, Any], second: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the intersection of two ranges (negative if they are apart), their union, and which dimensions count."""
    low, high = (np.array([one[bound] for one in (first, second)]) for bound in ("q01", "q99"))
    scaled = np.array(first.get("mask", [True] * low.shape[1]), bool)
    union = high.max(0) - low.min(0)
    return high.min(0) - low.max(0), union, scaled & (union > 0)


def _find_apart(known: dict[str, Any], own: dict[str, Any]) -> tuple[list[int], int]:
    """Find the dimensions in which data leaves the statistics' range or is far narrower, and count those compared.

    A constant within the range of the other is not compared.
    """
    shared, union, counted = _intersect(known, own)
    spans = [np.subtract(one["q99"], one["q01"]) for one in (known, own)]
    # An intersection of zero length is such a constant; in 32 bits, it may lie a little outside.
    counted &= np.abs(shared) > ROUNDING * union
    is_apart = (shared < APART * spans[1]) | (spans[1] < NARROW * spans[0])
    return np.flatnonzero(counted & is_apart).tolist(), int(counted.sum())


def check_instructions(subject: Subject, frames: Dataset) -> Finding:
    """Check whether the data's instructions reach the policy in the form of its training."""
    name = "instructions of the data"
    texts = sorted(set(frames.select_columns(["instruction"])[:]["instruction"]))
    stops = [one for one in texts if one.rstrip().endswith(".")]
    if stops and not subject.processor.strip_full_stop:
        found = f"{len(stops)} of {len(texts)} end in a full stop (for example {stops[0]!r}), which is kept."
        fix = "Set `strip_full_stop=True` of the processor, unless the policy was trained with full stops."
        return warned(name, found, fix)
    return passed(name, f"{len(texts)} instructions, for example {texts[0]!r}.")


__all__ = [
    "DECLARE",
    "check_files",
    "check_gripper_range",
    "check_instructions",
    "check_key",
    "check_numbers",
    "is_gripper",
    "key_for",
    "overlap",
    "unscaled",
]
