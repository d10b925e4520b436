"""Is this data set ready to train on? What the frames say about themselves, and what a model makes of them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.table import Table

from ..data.adapters import Robot
from ..data.columns import matrix
from ..data.episodes import Losses
from ..data.frames import Frames
from ..data.gripper import GRIPPER_OPEN
from ..data.loading import name_of, open_source, read_table
from ..data.motion import JOINTS, STILL, TARGETS, find_idle, name_by_space
from ..data.optional_packages import import_extra
from ..data.robots import resolve_robot
from ..data.statistics import compute_statistics
from ..modeling.action_tokenizer import ActionTokenizer, normalize


N_BINS = 256
SHORT_EPISODE = 5
"""Frames: fewer say little about a task."""
IDLE_SHARE, DUPLICATE_SHARE, CLIPPED_SHARE = 0.2, 0.2, 0.05
"""Of the frames, from which on it is worth a word."""
FOLLOWS = 0.5
"""An action nearer to the state than this share of the state's deviation is a target, not a movement."""
MOTIONLESS_SHARE = 0.1
"""Of the frames before the robot starts to move, from which on it is worth a word."""
SAME_IMAGE = 0.1
"""Mean difference in levels below which two images are one: compression moves a still image by less."""
FAR_OUT = 10.0
"""An action this many times outside its quantiles is a mistake in the recording, as a rule."""


@dataclass
class Report:
    """What was found; rates are shares in [0, 1], lists of numbers have one for each action dimension.

    warnings: What should be looked at before training, a sentence each.
    idle: Share of the actions that move nothing.
    names: Of the action's dimensions; `None` where neither the data nor the robot's space name them.
    follows_state: Dimensions whose action is about where the state is, as a target's.
    motionless_start: Share of the frames before the state of their episode changes; `None` where there is no state.
    clipped: Share of the values outside the quantiles that are mapped to [-1, 1] (or outside the model's).
    histograms: Counts in the 256 bins of the action tokens, lowest first, for each dimension.
    model: `token_accuracy` and `l1` (normalised) of a model on frames of the data, where one was given.
    """

    name: str
    robot: str
    episodes: int
    frames: int
    instructions: int
    shortest_episode: int
    median_episode: float
    longest_episode: int
    bad_episodes: list[str]
    frames_without_instruction: int
    idle: float
    duplicates: float
    lowest: list[float]
    highest: list[float]
    q01: list[float]
    q99: list[float]
    clipped: list[float]
    unused_dimensions: list[int]
    gripper_open: float | None
    frequency: float | None
    names: list[str] | None
    follows_state: list[int]
    motionless_start: float | None
    histograms: list[list[int]]
    model: dict[str, float] | None = None
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(
    data: str | os.PathLike | Frames,
    robot: Robot | str | None = None,
    *,
    split: str = "train",
    camera: str | None = None,
    every: int | None = None,
    drop_idle: bool | None = None,
    stats: dict[str, Any] | None = None,
    max_images: int = 500,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Report, Dataset]:
    """Examines a data set: all of its numbers, and some of its images.

    Args:
        data: See `load`.
        robot: See `load`.
        split: See `load`.
        camera: See `load`.
        every: See `load`.
        drop_idle: See `load`.
        stats: Action statistics that will normalise the actions (a model's); the data set's own by default.
        max_images: How many images are compared with the next one.
        progress: Called with the number of images read and their total.

    Returns:
        The report, and the frames.

    Raises:
        ValueError: the data has no usable frame, or another number of action dimensions than `stats`.
    """
    losses = Losses(limit=1.0)
    source = open_source(data, split, streaming=False)
    name = name_of(source, data)
    adapter = resolve_robot(robot, name, camera=camera, every=every, drop_idle=drop_idle)
    frames = read_table(source, adapter, name, losses)
    if not len(frames):
        reason = f" The first reason: {losses.bad_episodes[0]}" if losses.bad_episodes else ""
        raise ValueError(f"{name} has no usable frame.{reason}")
    own = compute_statistics(frames)[name]["action"]
    table = frames.select_columns(["action", "state", "episode_index", "instruction"]).with_format("arrow")[:]
    actions = matrix(table["action"], "action")
    states = None if table["state"].null_count else matrix(table["state"], "state")
    episode_of = table["episode_index"].to_numpy()
    if stats is not None and len(stats["q01"]) != actions.shape[1]:
        raise ValueError(
            f"{name} has actions of {actions.shape[1]} dimensions, the model's statistics {len(stats['q01'])}."
        )
    used = stats or own
    low, high = np.array(used["q01"]), np.array(used["q99"])
    scaled = np.array(used.get("mask", [True] * len(low)))
    outside = (actions < low) | (actions > high)
    starts = np.flatnonzero(np.concatenate(([True], episode_of[1:] != episode_of[:-1])))
    lengths = np.diff(np.append(starts, len(actions)))
    bins = ActionTokenizer().bins
    histograms = [
        np.bincount(np.digitize(column, bins) - 1, minlength=N_BINS).tolist() for column in normalize(actions, used).T
    ]
    source_frequency = None if isinstance(source, Dataset) else source.frequency
    follows = np.empty(0, int) if states is None else _follow_state(actions, states, adapter)
    space = adapter.standard_space
    if space is None and _are_most(follows, actions, adapter):
        space = TARGETS[-1]
    grippers = adapter.gripper_dimensions(actions.shape[1])
    episodes = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    idle = [find_idle(actions[each], None if states is None else states[each], space, grippers) for each in episodes]
    frequency = source_frequency or adapter.frequency
    names = None
    if not isinstance(source, Dataset):
        names = adapter.name_dimensions(source.numbers, source.dimension_names)
    report = Report(
        name=name,
        robot=adapter.name,
        episodes=len(lengths),
        frames=len(actions),
        instructions=len(set(table["instruction"].to_pylist())),
        shortest_episode=int(lengths.min()),
        median_episode=float(np.median(lengths)),
        longest_episode=int(lengths.max()),
        bad_episodes=losses.bad_episodes,
        frames_without_instruction=losses.without_instruction,
        idle=float(np.concatenate(idle).mean()),
        duplicates=_duplicates(frames, episode_of, max_images, progress),
        lowest=own["min"],
        highest=own["max"],
        q01=own["q01"],
        q99=own["q99"],
        clipped=np.where(scaled, outside.mean(0), 0.0).tolist(),
        unused_dimensions=np.flatnonzero(np.ptp(actions, axis=0) == 0).tolist(),
        gripper_open=float((actions[:, grippers] > GRIPPER_OPEN).mean()) if grippers else None,
        frequency=frequency / adapter.every if frequency else None,
        names=names if names and len(names) == actions.shape[1] else name_by_space(space, actions.shape[1]),
        follows_state=follows.tolist(),
        motionless_start=None if states is None else _motionless_start(states, episodes),
        histograms=histograms,
    )
    report.warnings = _warnings(report, adapter, actions, starts, source_frequency)
    return report, frames


def _follow_state(actions: np.ndarray, states: np.ndarray, robot: Robot) -> np.ndarray:
    """The dimensions, other than grippers', whose action is nearer to the state than the state is to its own mean.

    An action that was made relative to the state follows its reverse where it was a movement already.
    """
    shared = min(actions.shape[1], states.shape[1])
    actions, states = actions[:, :shared], states[:, :shared]
    sign = -1.0 if robot.takes_difference else 1.0
    near = np.sqrt(np.square(actions - sign * states).mean(0)) < FOLLOWS * states.std(0)
    return np.setdiff1d(np.flatnonzero(near), robot.gripper_dimensions(actions.shape[1]))


def _are_most(dimensions: np.ndarray, actions: np.ndarray, robot: Robot) -> bool:
    """Whether these are at least half of the dimensions that change, grippers left out."""
    changing = np.setdiff1d(np.flatnonzero(np.ptp(actions, axis=0)), robot.gripper_dimensions(actions.shape[1]))
    return len(dimensions) > 0 and 2 * len(dimensions) >= len(changing)


def _motionless_start(states: np.ndarray, episodes: Sequence[slice]) -> float:
    """Share of the frames before the state of their episode first differs from where it began."""
    ranges = np.ptp(np.quantile(states, (0.01, 0.99), axis=0), axis=0)
    motionless = 0
    for each in episodes:
        moved = (np.abs(states[each] - states[each][0]) > STILL * ranges).any(1)
        # The frame before the first change is the one that moves the robot.
        motionless += max(0, (int(moved.argmax()) if moved.any() else len(moved)) - 1)
    return motionless / len(states)


def _duplicates(frames: Dataset, episode_of: np.ndarray, limit: int, progress: Callable[[int, int], None]) -> float:
    """Share of images that are the next one of their episode again, in up to `limit` pairs in a few long runs."""
    pairs = np.flatnonzero(episode_of[:-1] == episode_of[1:])
    if not len(pairs):
        return 0.0
    # Runs rather than single pairs: a video is read fastest in sequence.
    runs = np.array_split(pairs, min(len(pairs), 10))
    chosen = np.concatenate([run[: max(1, limit // len(runs))] for run in runs])
    same, previous = 0, (-1, np.empty(0))
    for done, index in enumerate(chosen.tolist()):
        first = previous[1] if previous[0] == index else frames[index]["image"].astype(np.int16)
        second = frames[index + 1]["image"].astype(np.int16)
        same += first.shape == second.shape and np.abs(first - second).mean() < SAME_IMAGE
        previous = (index + 1, second)
        progress(done + 1, len(chosen))
    return same / len(chosen)


def _warnings(
    report: Report, robot: Robot, actions: np.ndarray, starts: np.ndarray, source_frequency: float | None
) -> list[str]:
    warnings = []
    if report.bad_episodes:
        count = len(report.bad_episodes)
        warnings.append(f"{count} episode(s) can't be used, the first: {report.bad_episodes[0]}")
    if report.frames_without_instruction:
        warnings.append(f"{report.frames_without_instruction} frames have no instruction and are left out.")
    if report.shortest_episode < SHORT_EPISODE:
        warnings.append(f"The shortest episode has {report.shortest_episode} frames: was it cut?")
    if report.idle > IDLE_SHARE:
        warnings.append(f"{report.idle:.0%} of the actions move nothing: a policy learns to stand still from them.")
    if report.motionless_start is not None and report.motionless_start > MOTIONLESS_SHARE:
        warnings.append(
            f"{report.motionless_start:.0%} of the frames come before the robot starts to move: consider "
            "drop_idle=True (--drop-idle)."
        )
    if _are_most(np.array(report.follows_state), actions, robot):
        warnings += _warn_of_targets(report, robot)
    elif robot.standard_space in TARGETS and report.motionless_start is not None:
        warnings.append(
            f"The robot {robot.name!r} says that actions are {robot.standard_space}, but they do not follow the "
            "state: are they movements?"
        )
    if report.duplicates > DUPLICATE_SHARE:
        warnings.append(f"{report.duplicates:.0%} of the images equal the one before: does the camera lag?")
    if report.unused_dimensions:
        warnings.append(f"The action dimensions {report.unused_dimensions} never change; they are trained to be 0.")
    for dimension, share in enumerate(report.clipped):
        if share > CLIPPED_SHARE:
            label = _label(report, dimension)
            warnings.append(f"{share:.0%} of the actions in {label} are clipped by the statistics.")
    span = np.array(report.q99) - np.array(report.q01)
    far = np.maximum(np.array(report.highest) - report.q99, np.array(report.q01) - report.lowest) > FAR_OUT * span
    for dimension in np.flatnonzero(far & (span > 0)).tolist():
        value = max((report.lowest[dimension], report.highest[dimension]), key=abs)
        reached = f"{_label(report, dimension)} reaches {value:g}, far outside its usual range: a recording error?"
        warnings.append(reached[0].upper() + reached[1:])
    if grippers := robot.gripper_dimensions(actions.shape[1]):
        begin_open = float((actions[starts][:, grippers] > GRIPPER_OPEN).mean())
        if begin_open < 0.5:
            warnings.append(f"Only {begin_open:.0%} of the episodes begin with an open gripper: is its sign right?")
        if report.gripper_open in (0.0, 1.0):
            warnings.append(f"The gripper is always {'open' if report.gripper_open else 'closed'}.")
    elif robot.gripper is None and actions.shape[1] == len("xyzrpyg") and robot.standard_space not in JOINTS:
        warnings.append("Nothing says what the gripper's values mean: give a robot whose adapter does, if it has one.")
    if source_frequency and robot.frequency and abs(source_frequency / robot.frequency - 1) > 0.05:
        warnings.append(f"The data is at {source_frequency:g} Hz, the robot {robot.name!r} at {robot.frequency:g} Hz.")
    if report.frequency is None:
        warnings.append("Nothing says how many actions a second there are; act at the rate of the recording.")
    return warnings


def _label(report: Report, dimension: int) -> str:
    return f"dimension {dimension}" + (f" ({report.names[dimension]})" if report.names else "")


def _warn_of_targets(report: Report, robot: Robot) -> list[str]:
    """What it means that most dimensions follow the state."""
    if robot.takes_difference:
        return [f"The recorded actions seem to be movements already, but {robot.name!r} takes them for targets."]
    if robot.standard_space in TARGETS:
        return []
    said = "" if robot.standard_space is None else f", but the robot {robot.name!r} says {robot.standard_space}"
    return [
        f"The action is about where the state is in the dimensions {report.follows_state}, as a target is{said}: give "
        "a robot with space='joint_positions' or space='end_effector_pose'."
    ]


def report_tables(report: Report, names: Sequence[str]) -> list[Table]:
    """The figures for a person; `names` are those of the action's dimensions."""
    facts = Table(title=f"{report.name}, read as {report.robot!r}", show_header=False)
    for fact in (
        ("episodes, frames, instructions", f"{report.episodes}, {report.frames}, {report.instructions}"),
        ("frames an episode", f"{report.shortest_episode} / {report.median_episode:g} / {report.longest_episode}"
                              "  (shortest, median, longest)"),
        ("frequency", f"{report.frequency:g} Hz" if report.frequency else "unknown"),
        ("idle actions", f"{report.idle:.1%}"),
        *([("before the robot starts to move", f"{report.motionless_start:.1%}")]
          if report.motionless_start is not None else []),
        ("images like the one before", f"{report.duplicates:.1%}"),
        ("bad episodes, frames without instruction",
         f"{len(report.bad_episodes)}, {report.frames_without_instruction}"),
        *([("gripper open", f"{report.gripper_open:.1%}")] if report.gripper_open is not None else []),
        *([("the model on these frames", f"token accuracy {report.model['token_accuracy']:.1%}, "
            f"L1 {report.model['l1']:.3f} ({report.model['frames']} frames)")] if report.model else []),
    ):  # fmt: skip
        facts.add_row(*fact)
    actions = Table(title="actions")
    for column in ("", "lowest", "1 %", "99 %", "highest", "clipped", "bins used"):
        actions.add_column(column, justify="right")
    for index, name in enumerate(names):
        values = (report.lowest[index], report.q01[index], report.q99[index], report.highest[index])
        used = sum(count > 0 for count in report.histograms[index])
        actions.add_row(name, *(f"{value:+.4g}" for value in values), f"{report.clipped[index]:.1%}", str(used))
    return [facts, actions]


def plot_actions(report: Report, path: str | os.PathLike, names: Sequence[str] | None = None) -> Path:
    """Draws how often each of the 256 bins is used, a panel for each dimension."""
    pyplot = import_extra("matplotlib.pyplot", "data")
    count = len(report.histograms)
    figure, axes = pyplot.subplots(
        count, 1, figsize=(8, 1.3 * count), sharex=True, squeeze=False, layout="constrained"
    )
    # The last bin holds 1 alone.
    edges = np.append(np.linspace(-1, 1, N_BINS), 1 + 2 / N_BINS)
    for dimension, (axis, counts) in enumerate(zip(axes[:, 0], report.histograms, strict=True)):
        axis.stairs(counts, edges, fill=True)
        # A logarithm above one frame and linear below, so that the bars stand on 0 and one frame is seen.
        axis.set_yscale("symlog", linthresh=1, linscale=0.5)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(names[dimension] if names else f"action {dimension}")
    axes[-1, 0].set_xlabel("normalised action; a bar is a token")
    figure.suptitle(f"{report.name}: {report.frames} frames")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)


__all__ = ["Report", "examine", "plot_actions", "report_tables"]
