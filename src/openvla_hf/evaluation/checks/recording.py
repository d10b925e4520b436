"""Compare a policy's actions with recorded ones."""

import numpy as np
from datasets import Dataset

from ...data.gripper import GRIPPER_OPEN
from ...modeling.action_tokenizer import BOUNDS_OF, action_dim
from ..open_loop import ComparedActions, agree_on_gripper, compare_actions, require_inputs
from .findings import Finding, Subject, failed, passed, skipped, warned
from .statistics import DECLARE, is_gripper, key_for, unscaled


GRIPPER, ACTIONS = "gripper on the data", "actions on the data"
# Frames that the policy acts on: half of them with an open gripper, if the data has as many of both.
FRAMES = 24
# Fewer frames are too few to compare with a constant action.
FEWEST_FRAMES = 8
# Share of balanced frames on which the policy's gripper is as recorded: below the first it is inverted, above the
# second it follows the recording. A policy that guesses is at 0.5.
INVERTED, GRIPPER_FOLLOWS = 0.35, 0.65
# Distance of the policy's actions from the recorded ones, divided by that of the best constant action. The tabletop's
# policy is at 0.2 to 0.4, and at 1.0 to 1.9 with a wrong prompt, turned images, mirrored heights or a dead tower.
FOLLOWS, IGNORES = 0.6, 1.0
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
    if problem := _find_gripper_problem(subject, key, compared, actions[:, grippers], declared):
        return problem, on_actions
    if not len(chosen):
        return skipped(GRIPPER, "The data's gripper is always open, or always closed."), on_actions
    balanced = compared if len(chosen) == FRAMES else compare(chosen)
    return _judge_gripper(agree_on_gripper(balanced, grippers).mean(), len(chosen)), on_actions


def _balance(is_open: np.ndarray) -> np.ndarray:
    """Choose up to `FRAMES` frames, half of them with an open gripper; none if it is always open or closed."""
    count = min(FRAMES // 2, int(is_open.sum()), int((~is_open).sum()))
    both = [np.flatnonzero(which) for which in (is_open, ~is_open)]
    return np.sort(np.concatenate([each[np.linspace(0, len(each) - 1, count).astype(int)] for each in both]))


def _find_gripper_problem(
    subject: Subject,
    key: str,
    compared: ComparedActions,
    values: np.ndarray,
    declared: list[int],
) -> Finding | None:
    """Find a mistake in the recorded values (T, G), the declaration or the scale of the grippers."""
    if not is_gripper(values.min(), values.max()):
        found = f"The data's gripper goes from {values.min():g} to {values.max():g}."
        return failed(GRIPPER, found, DECLARE)
    not_scaled = unscaled(subject.model.get_action_stats(key))
    if undeclared := [index for index in not_scaled if index not in declared]:
        found = f"The data does not say that dimension {undeclared[0]} is the gripper."
        return warned(GRIPPER, found, "Give a robot adapter that declares the gripper's values.")
    for index in declared:
        plain, scaled = (
            float(np.abs(one[:, index] - compared.recorded[:, index]).mean())
            for one in (compared.normalized, compared.predicted)
        )
        # A policy whose training did scale the gripper predicts -1 for closed, which is right only after scaling.
        if index not in not_scaled and plain < scaled:
            found = (
                f"The statistics scale dimension {index}, the gripper, but the policy predicts it unscaled: its mean "
                f"error is {scaled:.2f}, and {plain:.2f} without the scale."
            )
            return failed(GRIPPER, found, f"Set entry {index} of the `mask` of {key!r} to false.")
    return None


def _judge_gripper(agreement: float, count: int) -> Finding:
    found = f"The gripper is as recorded on {agreement:.0%} of {count} frames, half of which have it open."
    if agreement < INVERTED:
        fix = "Swap `open` and `closed` in the robot adapter of the data, or in what your robot does with the action."
        return failed(GRIPPER, f"Inverted. {found}", fix)
    if agreement < GRIPPER_FOLLOWS:
        fix = "Check that the data is like the policy's training data, and that its images are of the same cameras."
        return warned(GRIPPER, f"The policy does not follow the recording. {found}", fix)
    return passed(GRIPPER, found)


def _judge_actions(subject: Subject, key: str, compared: ComparedActions, grippers: list[int], count: int) -> Finding:
    """Judge the dimensions that the statistics scale and that are not grippers."""
    stats = subject.model.get_action_stats(key)
    low, high = (stats[bound] for bound in BOUNDS_OF[subject.config.action_normalization])
    moving = [index for index in range(action_dim(stats)) if index not in grippers and low[index] < high[index]]
    predicted, recorded = compared.normalized[:, moving], compared.expected[:, moving]
    constant = np.abs(recorded - np.median(recorded, axis=0)).mean() if moving else 0.0
    if not constant or count < FEWEST_FRAMES:
        return skipped(ACTIONS, f"The actions of {count} frames are too few or too alike to compare with.")
    distance = np.abs(predicted - recorded).mean() / constant
    found = (
        f"On {count} frames, the policy's actions are {distance:.2f} times as far from the recorded ones as the best "
        "constant action is."
    )
    fix = (
        "Check that the data is of the policy's own robot and task, that its images are of the same cameras, not "
        "turned or cropped, and that the key and the prompt are right."
    )
    correlations = _correlate(predicted, recorded)
    if (correlations < OPPOSITE).any():
        worst = int(correlations.argmin())
        fix = "Check the direction of this axis in the data and on the robot."
        found = (
            f"Dimension {moving[worst]} moves against the recording, with a correlation of {correlations[worst]:.2f}. "
            f"{found}"
        )
    if distance > IGNORES:
        return failed(ACTIONS, f"The policy does not follow the recording. {found}", fix)
    if distance > FOLLOWS or (correlations < OPPOSITE).any():
        return warned(ACTIONS, f"The policy hardly follows the recording. {found}", fix)
    return passed(ACTIONS, found)


def _correlate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the correlations (A,) of the columns of two arrays (N, A); 0 for a column that stands still."""
    first, second = (one - one.mean(0) for one in (first, second))
    deviations = first.std(0), second.std(0)
    moves = np.minimum(*deviations) > STILL
    return np.where(moves, (first * second).mean(0) / np.where(moves, deviations[0] * deviations[1], 1), 0.0)


__all__ = ["ACTIONS", "check_recording"]
