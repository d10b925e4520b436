"""Check the action statistics of a policy, alone and against a dataset."""

import itertools
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.utils import CONFIG_NAME

from ...data.gripper import GRIPPER_OPEN
from ...data.statistics import compute_statistics
from ...modeling.action_tokenizer import BOUNDS_OF, action_dim, check_statistics
from ...modeling.checkpoint_files import OFT_FILES, STATISTICS_FILE
from ..open_loop import evaluate_open_loop
from .findings import Finding, Subject, failed, passed, skipped, warned


COMPUTE = "Put the `dataset_statistics.json` of the training next to the weights"
# Overlap of the ranges of two statistics: below the first they belong to different robots, above the second to one.
DIFFERENT, SAME = 0.3, 0.7
# OpenVLA's gripper, 0 for closed and 1 for open, with readings a little outside.
GRIPPER_RANGE, GRIPPER_SLACK = (0.0, 1.0), 0.1
DECLARE = "OpenVLA's gripper is 0 for closed and 1 for open: declare the recorded values in the robot's adapter."
# Share of balanced frames on which the policy's gripper is as recorded: below the first it is inverted, above the
# second it follows the recording. A policy that guesses is at 0.5.
INVERTED, FOLLOWS = 0.35, 0.65
# Frames with an open gripper, and as many with a closed one, that the policy acts on.
GRIPPER_FRAMES = 12


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
    keys = ", ".join(f"{key} ({action_dim(one['action'])})" for key, one in list(norm_stats.items())[:5])
    more = "" if len(norm_stats) <= len(keys.split(", ")) else f" and {len(norm_stats) - 5} more"
    return passed(name, f"Finite and in order: {keys}{more}.")


def check_files(subject: Subject) -> Finding:
    """Check that the config and the file of statistics agree on the keys that both have."""
    name = "files of statistics"
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
        named = ", ".join(map(repr, wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        found = f"{CONFIG_NAME} and {STATISTICS_FILE} disagree on {named}. This package uses {STATISTICS_FILE}."
        return failed(name, found, fix)
    keys = "1 key" if len(shared) == 1 else f"{len(shared)} keys"
    return passed(name, f"They agree on {keys}." if shared else "They have no key in common.")


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
    """Check that the dimensions that are not scaled, usually the gripper, are from 0 to 1."""
    name, stats_of, key = "gripper", subject.model.norm_stats, subject.key
    ranges: dict[str, tuple[float, float]] = {}
    for one in stats_of if key is None else [key]:
        stats = stats_of[one]["action"]
        low, high = ("min", "max") if "min" in stats and "max" in stats else ("q01", "q99")
        if grippers := _unscaled(stats):
            ranges[one] = min(stats[low][index] for index in grippers), max(stats[high][index] for index in grippers)
    wrong = [one for one, ends in ranges.items() if not _is_gripper(*ends)]
    if wrong:
        low_end, high_end = ranges[wrong[0]]
        found = f"The gripper of {wrong[0]!r}, which is not scaled, goes from {low_end:g} to {high_end:g}."
        return warned(name, found, DECLARE)
    if not ranges:
        return passed(name, "All dimensions are scaled, as for joint positions.")
    return passed(name, f"From {min(ranges.values())[0]:g} (closed) to {max(ranges.values())[1]:g} (open).")


def _unscaled(stats: dict[str, Any]) -> list[int]:
    """Return the dimensions that are not scaled: the grippers, in OpenVLA's statistics."""
    return np.flatnonzero(~np.array(stats.get("mask", [True]), bool)).tolist()


def _is_gripper(low: float, high: float) -> bool:
    return low >= GRIPPER_RANGE[0] - GRIPPER_SLACK and high <= GRIPPER_RANGE[1] + GRIPPER_SLACK


def check_key(subject: Subject, frames: Dataset) -> list[Finding]:
    """Compare the statistics of the frames of one dataset with those of the key, and find a key that fits better."""
    name = str(frames[0]["dataset"])
    own = compute_statistics(frames)[name]
    known = subject.model.norm_stats or {}
    key = _key_for(subject, name)
    if key is None:
        fits = {one: overlap(known[one]["action"], own["action"]) for one in known}
        best = max(fits, key=lambda one: fits[one]) if fits else None
        nearest = f" {best!r} is the nearest." if best is not None else ""
        return [
            skipped("key", f"The policy has several keys, and none is that of the data.{nearest} Pass `unnorm_key`.")
        ]
    kinds = [kind for kind in ("action", "proprio") if kind in known[key] and own.get(kind)]
    return [_compare(kind, key, known, own, name) for kind in kinds]


def _key_for(subject: Subject, dataset: str) -> str | None:
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
    if fits[key] < DIFFERENT or fits[best] > fits[key] + DIFFERENT:
        other = f", those of {best!r} by {fits[best]:.0%}" if best != key else ""
        fix = f"Pass unnorm_key={best!r}." if best != key else "Use the statistics of this data, or check its units."
        return failed(check, f"{found}{other}.", fix)
    if fits[key] < SAME:
        return warned(
            check, f"{found}.", "Check the units of the data, and that its robot adapter is that of the training."
        )
    return passed(check, f"{found}.")


def overlap(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return the intersection of the ranges from q01 to q99 divided by their union, averaged over the dimensions.

    Statistics with another number of dimensions overlap by 0. Dimensions that are constant in both count if their
    values differ, and dimensions that are not scaled do not count.
    """
    if action_dim(first) != action_dim(second):
        return 0.0
    low, high = (np.array([one[bound] for one in (first, second)]) for bound in ("q01", "q99"))
    scaled = np.array(first.get("mask", [True] * low.shape[1]), bool)
    union = high.max(0) - low.min(0)
    shared = np.clip(high.min(0) - low.max(0), 0, None)
    counted = scaled & (union > 0)
    return float((shared[counted] / union[counted]).mean()) if counted.any() else 1.0


def check_gripper_on(subject: Subject, frames: Dataset) -> Finding:
    """Compare the gripper of the data with its range, and with the policy's predictions."""
    name = "gripper on the data"
    key = _key_for(subject, str(frames[0]["dataset"]))
    actions = np.stack(frames.select_columns(["action"]).with_format("numpy")[:]["action"])
    if key is None or action_dim(subject.model.get_action_stats(key)) != actions.shape[1]:
        return skipped(name, "The key of the statistics is not known, or has other dimensions.")
    grippers = _unscaled(subject.model.get_action_stats(key))
    if not grippers:
        return skipped(name, f"{key!r} scales all dimensions.")
    if subject.config.proprio_dim is not None and len(frames[0]["state"]) != subject.config.proprio_dim:
        return skipped(name, "The policy sees a state of other dimensions than the data's.")
    values = actions[:, grippers]
    if not _is_gripper(values.min(), values.max()):
        found = f"The data's gripper goes from {values.min():g} to {values.max():g}."
        return failed(name, found, DECLARE)
    if np.asarray(frames[0]["action_mask"])[grippers].any():
        found = f"The data does not say that dimension {grippers[0]} is the gripper."
        return warned(name, found, "Give a robot adapter that declares the gripper's values.")
    is_open = values[:, 0] > GRIPPER_OPEN
    count = min(GRIPPER_FRAMES, int(is_open.sum()), int((~is_open).sum()))
    if not count:
        return skipped(name, "The data's gripper is always open, or always closed.")
    balanced = [np.flatnonzero(which) for which in (is_open, ~is_open)]
    chosen = np.concatenate([each[np.linspace(0, len(each) - 1, count).astype(int)] for each in balanced])
    report = evaluate_open_loop(subject.model, subject.processor, frames.select(np.sort(chosen)), key)
    agreement = report.gripper_agreement
    assert agreement is not None
    found = f"The gripper is as recorded on {agreement:.0%} of {len(chosen)} frames, half of which have it open."
    if agreement < INVERTED:
        fix = "Swap `open` and `closed` in the robot adapter of the data, or in what your robot does with the action."
        return failed(name, f"Inverted. {found}", fix)
    if agreement < FOLLOWS:
        fix = "Check that the data is like the policy's training data, and that its images are of the same cameras."
        return warned(name, f"The policy does not follow the recording. {found}", fix)
    return passed(name, found)


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
    "check_files",
    "check_gripper_on",
    "check_gripper_range",
    "check_instructions",
    "check_key",
    "check_numbers",
    "overlap",
]
