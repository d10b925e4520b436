"""Compare a policy's actions with recorded ones."""

from dataclasses import replace

import numpy as np
from datasets import Dataset

from ...data.gripper import GRIPPER_OPEN
from ...modeling.action_tokenizer import BOUNDS_OF, action_dim
from ..open_loop import ComparedActions, agree_on_gripper, compare_actions, require_inputs
from .findings import Finding, Subject, failed, passed, skipped, warned
from .statistics import DECLARE, GRIPPER_SLACK, is_gripper, key_for, unscaled


GRIPPER, ACTIONS = "gripper on the data", "actions on the data"
# Frames that the policy acts on: half of them with an open gripper, if the data has as many of both. The limits below
# are for this number.
FRAMES = 24
# Fewer balanced frames are too few to fail a policy.
FEWEST_BALANCED = 8
# Share of balanced frames on which the policy's gripper is as recorded: below the first it is inverted, above the
# second it follows the recording. A policy that guesses is at 0.5.
INVERTED, GRIPPER_FOLLOWS = 0.35, 0.65
# Error of the policy's actions, divided by that of the best constant action. The tabletop's policy is at 0.2 to 0.4,
# and at 1.0 to 1.7 with a wrong prompt, turned images, mirrored heights or a dead tower.
FOLLOWS, IGNORES = 0.6, 1.0
# Mean correlation with the recording below which there is no relation. Noise in the demonstrations can raise a good
# policy's error above that of a constant action, but a correlation remains. The mean of 6 dimensions errs by 0.09.
UNRELATED = 0.2
# A dimension moves against the recording below this correlation. With no relation, 24 frames give -0.6 to 0.6.
OPPOSITE = -0.6
# Standard deviation of normalised actions below which they stand still: about the width of a bin.
STILL = 0.01


def check_recording(subject: Subject, frames: Dataset) -> tuple[Finding, Finding]:
    """Compare the gripper and the other dimensions of the policy's actions with those of one dataset's frames."""
    key = key_for(subject, str(frames[0]["dataset"]))
    if key is None:
        reason = "The key of the statistics is not known."
        return skipped(GRIPPER, reason), skipped(ACTIONS, reason)
    try:
        require_inputs(subject.model, subject.processor, frames, key)
    except ValueError as error:
        return skipped(GRIPPER, str(error)), skipped(ACTIONS, str(error))
    actions = np.stack(frames.select_columns(["action"]).with_format("numpy")[:]["action"])
    declared = np.flatnonzero(~np.asarray(frames[0]["action_mask"], bool)).tolist()
    grippers = sorted({*declared, *unscaled(subject.model.get_action_stats(key))})
    chosen = _balance(actions[:, grippers[0]] > GRIPPER_OPEN) if grippers else np.array([], int)
    spread = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).astype(int)

    def compare(which: np.ndarray) -> ComparedActions:
        return compare_actions(subject.model, subject.processor, frames.select(which), key)

    compared = compare(spread if len(chosen) < FRAMES else chosen)
    on_actions = _judge_actions(subject, key, compared, grippers, len(spread))
    if not grippers:
        return skipped(GRIPPER, f"Neither {key!r} nor the data says which dimension is the gripper."), on_actions
    low, high = actions[:, grippers].min(), actions[:, grippers].max()
    if not is_gripper(low, high):
        return failed(GRIPPER, f"The data's gripper goes from {low:g} to {high:g}.", DECLARE), on_actions
    if not len(chosen):
        return skipped(GRIPPER, "The data's gripper is always open, or always closed."), on_actions
    balanced = compared if len(chosen) == FRAMES else compare(chosen)
    finding = _judge_gripper(subject, key, balanced, grippers, declared)
    if finding.status == "failed" and len(chosen) < FEWEST_BALANCED:
        finding = replace(finding, status="warned", found=f"On only {len(chosen)} frames: {finding.found}")
    return finding, on_actions


def _balance(is_open: np.ndarray) -> np.ndarray:
    """Choose up to `FRAMES` frames, half of them with an open gripper; none if it is always open or closed."""
    count = min(FRAMES // 2, int(is_open.sum()), int((~is_open).sum()))
    both = [np.flatnonzero(which) for which in (is_open, ~is_open)]
    return np.sort(np.concatenate([each[np.linspace(0, len(each) - 1, count).astype(int)] for each in both]))


def _judge_gripper(
    subject: Subject, key: str, balanced: ComparedActions, grippers: list[int], declared: list[int]
) -> Finding:
    """Judge the scale, the direction and the declaration of the grippers."""
    not_scaled = unscaled(subject.model.get_action_stats(key))
    for index in set(declared).difference(not_scaled):
        if problem := _find_scale(key, balanced, index):
            return problem
    agreement = agree_on_gripper(balanced, grippers).mean()
    opened = (balanced.recorded[:, grippers] > GRIPPER_OPEN).mean()
    found = (
        f"The gripper is as recorded in {agreement:.0%} of {len(balanced.recorded)} actions, of which {opened:.0%} "
        "have it open."
    )
    if agreement < INVERTED:
        fix = "Swap `open` and `closed` in the robot adapter of the data, or in what your robot does with the action."
        return failed(GRIPPER, f"Inverted. {found}", fix)
    if undeclared := sorted(set(not_scaled).difference(declared)):
        fix = "Name a robot adapter that declares the gripper's values (`--robot`, `robot=`)."
        return warned(GRIPPER, f"The data does not say that dimension {undeclared[0]} is the gripper. {found}", fix)
    if agreement < GRIPPER_FOLLOWS:
        fix = "Check that the data is like the policy's training data, and that its images are of the same cameras."
        return warned(GRIPPER, f"The policy does not follow the recording. {found}", fix)
    return passed(GRIPPER, found)


def _find_scale(key: str, balanced: ComparedActions, index: int) -> Finding | None:
    """Find a gripper that the statistics scale, but the policy predicts unscaled.

    Only closed frames tell, for which such a policy predicts 0, and one whose training scaled the gripper -1.
    """
    closed = balanced.recorded[:, index] <= GRIPPER_OPEN
    plain, scaled = (
        float(np.abs(one - balanced.recorded)[closed, index].mean()) if closed.any() else 0.0
        for one in (balanced.normalized, balanced.predicted)
    )
    if plain + GRIPPER_SLACK >= scaled:
        return None
    found = (
        f"The statistics scale dimension {index}, the gripper, but the policy predicts it unscaled: while it is "
        f"closed, the mean error is {scaled:.2f}, and {plain:.2f} without the scale."
    )
    return failed(GRIPPER, found, f"Set entry {index} of the `mask` of {key!r} to false.")


def _judge_actions(subject: Subject, key: str, compared: ComparedActions, grippers: list[int], count: int) -> Finding:
    """Judge the dimensions that the statistics scale and that are not grippers."""
    stats = subject.model.get_action_stats(key)
    low, high = (stats[bound] for bound in BOUNDS_OF[subject.config.action_normalization])
    moving = [index for index in range(action_dim(stats)) if index not in grippers and low[index] < high[index]]
    predicted, recorded = compared.normalized[:, moving], compared.expected[:, moving]
    constant = np.abs(recorded - np.median(recorded, axis=0)).mean() if moving else 0.0
    if not constant or count < FRAMES:
        return skipped(ACTIONS, f"The actions of {count} frames are too few or too alike to compare with.")
    distance = np.abs(predicted - recorded).mean() / constant
    correlations = _correlate(predicted, recorded)
    relation = correlations[correlations != 0].mean() if correlations.any() else 0.0
    found = (
        f"On {count} frames, the mean error of the policy's actions is {distance:.2f} times that of the best constant "
        f"action, and their mean correlation with the recording is {relation:.2f}."
    )
    fix = (
        "Check that the data is of the policy's own robot and task, that its images are of the same cameras, not "
        "turned or cropped, and that the key and the prompt are right."
    )
    if distance > IGNORES and relation < UNRELATED:
        return failed(ACTIONS, f"The policy does not follow the recording. {found}", fix)
    if correlations.min() < OPPOSITE:
        worst = int(correlations.argmin())
        against = f"Dimension {moving[worst]} moves against the recording (correlation {correlations[worst]:.2f})."
        return warned(ACTIONS, f"{against} {found}", "Check the direction of this axis in the data and on the robot.")
    if distance > FOLLOWS:
        fix += " Noisy demonstrations also raise the error."
        return warned(ACTIONS, f"The policy's actions are far from the recorded ones. {found}", fix)
    return passed(ACTIONS, found)


def _correlate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the correlations (A,) of the columns of two arrays (N, A); 0 for a column that stands still."""
    first, second = (one - one.mean(0) for one in (first, second))
    deviations = first.std(0), second.std(0)
    moves = np.minimum(*deviations) > STILL
    return np.where(moves, (first * second).mean(0) / np.where(moves, deviations[0] * deviations[1], 1), 0.0)


__all__ = ["ACTIONS", "check_recording"]
