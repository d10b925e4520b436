"""Check whether a dataset is ready to train on, from its numbers, some of its images, and a model's errors on it."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.table import Table

from ..data.adapters import Robot
from ..data.columns import matrix
from ..data.episodes import Losses
from ..data.frame_spec import Cameras, resolve_spec
from ..data.frames import Frames
from ..data.gripper import GRIPPER_OPEN
from ..data.loading import choose_robot, name_of, open_source, read_table
from ..data.motion import JOINTS, STILL, TARGETS, find_idle, name_by_space
from ..data.optional_packages import import_extra
from ..data.statistics import compute_statistics
from ..modeling.action_tokenizer import ActionTokenizer, normalize


N_BINS = 256
# Episodes with fewer frames are too short to show a task.
SHORT_EPISODE = 5
# Shares of the frames above which there is a warning.
IDLE_SHARE, DUPLICATE_SHARE, CLIPPED_SHARE, MOTIONLESS_SHARE = 0.2, 0.2, 0.05, 0.1
# An action is a target, not a movement, if its distance from the state is below this share of the state's deviation.
FOLLOWS = 0.5
# Two images are equal if their mean difference in levels is below this: compression changes a still image by less.
SAME_IMAGE = 0.1
# An action that lies outside its usual range by this many times the range is probably a recording error.
FAR_OUT = 10.0
# Largest relative difference between the rates of the data and of the robot.
RATE_TOLERANCE = 0.05


@dataclass
class Report:
    """Findings of `examine`. Rates are shares in [0, 1]; lists of numbers have one entry per action dimension.

    Attributes:
        name: Name of the dataset.
        robot: Name of the adapter that read it.
        episodes: Number of usable episodes.
        frames: Number of frames.
        instructions: Number of different instructions.
        shortest_episode: Length in frames.
        median_episode: Length in frames.
        longest_episode: Length in frames.
        bad_episodes: Why each unusable episode was skipped.
        frames_without_instruction: Number of frames that were left out because they have no instruction.
        idle: Share of the actions that move nothing.
        duplicates: Share of the compared images that equal the image before.
        lowest: Smallest value.
        highest: Largest value.
        q01: First percentile.
        q99: 99th percentile.
        clipped: Share of the values outside the quantiles (the data's, or the model's) that are mapped to [-1, 1].
        unused_dimensions: Dimensions that never change.
        gripper_open: Share of the gripper values that mean open; `None` without a gripper.
        frequency: Actions per second; `None` if unknown.
        names: Names of the dimensions; `None` if neither the data nor the robot's space gives them.
        follows_state: Dimensions whose action is close to the state, as a target's.
        motionless_start: Share of the frames before the state of their episode changes; `None` without states.
        histograms: Counts in the 256 bins of the action tokens, lowest first, for each dimension.
        model: `frames`, `token_accuracy` and `l1` (normalised) of a model on the data, if one was given.
        warnings: One or two sentences for each problem to look at before training.
        table_row: Row of the table of Open X-Embodiment that the adapter follows; `None` for other adapters.
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
    table_row: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
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
    cameras: Cameras | None = None,
    state: bool = False,
) -> tuple[Report, Dataset]:
    """Examine a dataset: all of its numbers, and some of its images.

    Args:
        data: See `load`.
        robot: See `load`.
        split: See `load`.
        camera: See `load`.
        every: See `load`.
        drop_idle: See `load`.
        stats: Action statistics that will normalise the actions, such as a model's; the dataset's own by default.
        max_images: Largest number of images to compare with the next one.
        progress: Called with the number of compared images and their total.
        cameras: See `load`. The images of each camera are compared.
        state: See `load`. The states are then examined too.

    Returns:
        The report, and the frames.

    Raises:
        ValueError: If the data has no usable frame, or its actions do not have as many dimensions as `stats`.
    """
    losses = Losses(limit=1.0)
    source = open_source(data, split, streaming=False)
    name = name_of(source, data)
    robot = choose_robot(robot, source, name)
    spec = resolve_spec(robot, name, camera=camera, every=every, drop_idle=drop_idle, cameras=cameras, state=state)
    adapter = spec.robot
    frames = read_table(source, spec, name, losses)
    if not len(frames):
        reason = f" The first reason: {losses.bad_episodes[0]}" if losses.bad_episodes else ""
        raise ValueError(f"{name} has no usable frame.{reason}")
    numbers = _Numbers.of(frames)
    if stats is not None and len(stats["q01"]) != numbers.dims:
        raise ValueError(
            f"The actions of {name} have {numbers.dims} dimensions, but the model's statistics have "
            f"{len(stats['q01'])}. Give data from the model's robot."
        )
    statistics = compute_statistics(frames)[name]
    own = statistics["action"]
    recorded_rate = names = None
    if not isinstance(source, Dataset):
        recorded_rate = source.frequency
        names = adapter.name_dimensions(source.numbers, source.dimension_names)
    rate = recorded_rate or adapter.frequency
    report = Report(
        name=name,
        robot=adapter.name,
        table_row=adapter.table_row,
        bad_episodes=losses.bad_episodes,
        frames_without_instruction=losses.without_instruction,
        duplicates=_duplicates(frames, numbers.episode_of, max_images, progress),
        lowest=own["min"],
        highest=own["max"],
        q01=own["q01"],
        q99=own["q99"],
        frequency=rate / adapter.every if rate else None,
        **_count(numbers),
        **_compare_with_bins(numbers.actions, stats or own),
        **_judge_motion(numbers, adapter, names),
    )
    report.warnings = _warnings(report, adapter, numbers, recorded_rate)
    if state:
        report.warnings += _warn_of_states(statistics["proprio"])
    return report, frames


@dataclass
class _Numbers:
    """Everything in the frames except images: N frames of A action dimensions and S state dimensions.

    Attributes:
        actions: (N, A).
        states: (N, S), or `None` if a frame has none.
        episode_of: Episode of each frame, (N,).
        instructions: Instruction of each frame.
    """

    actions: np.ndarray
    states: np.ndarray | None
    episode_of: np.ndarray
    instructions: list[str]

    @classmethod
    def of(cls, frames: Dataset) -> "_Numbers":
        table = frames.select_columns(["action", "state", "episode_index", "instruction"]).with_format("arrow")[:]
        return cls(
            actions=matrix(table["action"], "action"),
            states=None if table["state"].null_count else matrix(table["state"], "state"),
            episode_of=table["episode_index"].to_numpy(),
            instructions=table["instruction"].to_pylist(),
        )

    @property
    def dims(self) -> int:
        return self.actions.shape[1]

    @property
    def starts(self) -> np.ndarray:
        """First frame of each episode, (E,)."""
        return np.flatnonzero(np.concatenate(([True], self.episode_of[1:] != self.episode_of[:-1])))

    @property
    def episodes(self) -> list[slice]:
        """Frames of each episode."""
        ends = [*self.starts[1:].tolist(), len(self.actions)]
        return [slice(start, end) for start, end in zip(self.starts.tolist(), ends, strict=True)]


def _count(numbers: _Numbers) -> dict[str, Any]:
    """Count episodes, frames and instructions, as fields of a report."""
    lengths = [episode.stop - episode.start for episode in numbers.episodes]
    return {
        "episodes": len(lengths),
        "frames": len(numbers.actions),
        "instructions": len(set(numbers.instructions)),
        "shortest_episode": min(lengths),
        "median_episode": float(np.median(lengths)),
        "longest_episode": max(lengths),
    }


def _compare_with_bins(actions: np.ndarray, stats: dict[str, Any]) -> dict[str, Any]:
    """Compare actions (N, A) with the range and the bins of the action tokens, as fields of a report."""
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    scaled = np.array(stats.get("mask", [True] * len(low)))
    outside = (actions < low) | (actions > high)
    bins = ActionTokenizer().bins
    return {
        "clipped": np.where(scaled, outside.mean(0), 0.0).tolist(),
        "unused_dimensions": np.flatnonzero(np.ptp(actions, axis=0) == 0).tolist(),
        "histograms": [
            np.bincount(np.digitize(column, bins) - 1, minlength=N_BINS).tolist()
            for column in normalize(actions, stats).T
        ],
    }


def _judge_motion(numbers: _Numbers, robot: Robot, names: list[str] | None) -> dict[str, Any]:
    """Compare actions with states, and find idle frames and the gripper's values, as fields of a report."""
    actions, states, episodes = numbers.actions, numbers.states, numbers.episodes
    follows = np.empty(0, int) if states is None else _follow_state(actions, states, robot)
    space = robot.standard_space
    if space is None and _are_most(follows, actions, robot):
        space = TARGETS[-1]
    grippers = robot.gripper_dimensions(numbers.dims)
    idle = [find_idle(actions[each], None if states is None else states[each], space, grippers) for each in episodes]
    return {
        "idle": float(np.concatenate(idle).mean()),
        "follows_state": follows.tolist(),
        "motionless_start": None if states is None else _motionless_start(states, episodes),
        "gripper_open": float((actions[:, grippers] > GRIPPER_OPEN).mean()) if grippers else None,
        "names": names if names and len(names) == numbers.dims else name_by_space(space, numbers.dims),
    }


def _follow_state(actions: np.ndarray, states: np.ndarray, robot: Robot) -> np.ndarray:
    """Find the dimensions, except grippers, whose action is nearer to the state than the state is to its own mean.

    If the state was subtracted from an action that was already a movement, the result follows the negative state.
    """
    shared = min(actions.shape[1], states.shape[1])
    actions, states = actions[:, :shared], states[:, :shared]
    sign = -1.0 if robot.takes_difference else 1.0
    near = np.sqrt(np.square(actions - sign * states).mean(0)) < FOLLOWS * states.std(0)
    return np.setdiff1d(np.flatnonzero(near), robot.gripper_dimensions(actions.shape[1]))


def _are_most(dimensions: np.ndarray, actions: np.ndarray, robot: Robot) -> bool:
    """Return whether these are at least half of the dimensions that change, without grippers."""
    changing = np.setdiff1d(np.flatnonzero(np.ptp(actions, axis=0)), robot.gripper_dimensions(actions.shape[1]))
    return len(dimensions) > 0 and 2 * len(dimensions) >= len(changing)


def _motionless_start(states: np.ndarray, episodes: Sequence[slice]) -> float:
    """Return the share of the frames before the state of their episode first differs from its start."""
    ranges = np.ptp(np.quantile(states, (0.01, 0.99), axis=0), axis=0)
    motionless = 0
    for each in episodes:
        moved = (np.abs(states[each] - states[each][0]) > STILL * ranges).any(1)
        # The frame before the first change is the one that moves the robot.
        motionless += max(0, (int(moved.argmax()) if moved.any() else len(moved)) - 1)
    return motionless / len(states)


def _duplicates(frames: Dataset, episode_of: np.ndarray, limit: int, progress: Callable[[int, int], None]) -> float:
    """Return the share of images that equal the next one of their episode, among up to `limit` pairs.

    With several cameras, it is the share of the camera that has the most equal images.
    """
    pairs = np.flatnonzero(episode_of[:-1] == episode_of[1:])
    if not len(pairs):
        return 0.0
    # Runs of consecutive pairs, because a video is read fastest in sequence.
    runs = np.array_split(pairs, min(len(pairs), 10))
    chosen = np.concatenate([run[: max(1, limit // len(runs))] for run in runs])
    same: dict[str, int] = {}
    previous: tuple[int, dict[str, np.ndarray]] = (-1, {})
    for done, index in enumerate(chosen.tolist()):
        first = previous[1] if previous[0] == index else _pictures(frames[index])
        second = _pictures(frames[index + 1])
        for camera, image in first.items():
            is_same = image.shape == second[camera].shape and np.abs(image - second[camera]).mean() < SAME_IMAGE
            same[camera] = same.get(camera, 0) + is_same
        previous = (index + 1, second)
        progress(done + 1, len(chosen))
    return max(same.values()) / len(chosen)


def _pictures(frame: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the images of a frame by camera, with a type that can be subtracted."""
    images = frame["images"] if "images" in frame else {"image": frame["image"]}
    return {camera: image.astype(np.int16) for camera, image in images.items()}


def _warnings(report: Report, robot: Robot, numbers: _Numbers, recorded_rate: float | None) -> list[str]:
    return [
        *_warn_of_episodes(report),
        *_warn_of_motion(report, robot, numbers.actions),
        *_warn_of_values(report),
        *_warn_of_gripper(report, robot, numbers),
        *_warn_of_rate(report, robot, recorded_rate),
    ]


def _warn_of_episodes(report: Report) -> Iterator[str]:
    if report.bad_episodes:
        yield f"{len(report.bad_episodes)} episode(s) cannot be used. The first reason: {report.bad_episodes[0]}"
    if report.frames_without_instruction:
        yield f"{report.frames_without_instruction} frames have no instruction and are left out."
    if report.shortest_episode < SHORT_EPISODE:
        yield f"The shortest episode has {report.shortest_episode} frames. Check that it was not cut off."
    if report.duplicates > DUPLICATE_SHARE:
        yield (
            f"{report.duplicates:.0%} of the images equal the image before them. Check whether the camera lags behind "
            "the actions."
        )


def _warn_of_motion(report: Report, robot: Robot, actions: np.ndarray) -> Iterator[str]:
    if report.idle > IDLE_SHARE:
        yield f"{report.idle:.0%} of the actions move nothing. A policy trained on them learns to stand still."
    if report.motionless_start is not None and report.motionless_start > MOTIONLESS_SHARE:
        yield (
            f"{report.motionless_start:.0%} of the frames come before the robot starts to move. Consider "
            "drop_idle=True (--drop-idle)."
        )
    if _are_most(np.array(report.follows_state), actions, robot):
        yield from _warn_of_targets(report, robot)
    elif robot.standard_space in TARGETS and report.motionless_start is not None:
        yield (
            f"The robot {robot.name!r} declares its actions as {robot.standard_space}, but they do not follow the "
            "state. Check whether they are movements."
        )


def _warn_of_targets(report: Report, robot: Robot) -> Iterator[str]:
    """Warn if most dimensions follow the state, but the robot does not declare targets."""
    if robot.takes_difference:
        yield (
            f"The robot {robot.name!r} subtracts the state from the recorded actions, but they already look like "
            "movements. Give a robot that declares movements."
        )
    elif robot.standard_space not in TARGETS:
        declared = f" instead of {robot.standard_space!r}" if robot.standard_space else ""
        yield (
            f"The actions look like targets: in dimensions {report.follows_state} they stay close to the state. Give "
            f"a robot with space='joint_positions' or space='end_effector_pose'{declared}."
        )


def _warn_of_values(report: Report) -> Iterator[str]:
    if report.unused_dimensions:
        yield (
            f"Action dimensions {report.unused_dimensions} are constant. The policy is trained to predict 0 "
            "(normalised) for them."
        )
    for dimension, share in enumerate(report.clipped):
        if share > CLIPPED_SHARE:
            yield f"The statistics clip {share:.0%} of the values of {_label(report, dimension)}."
    for dimension, value in _find_far_out(report.lowest, report.q01, report.q99, report.highest):
        label = _label(report, dimension)
        yield f"{label[0].upper()}{label[1:]} reaches {value:g}, far outside its usual range. Check the recording."


def _warn_of_states(stats: dict[str, list[float]]) -> Iterator[str]:
    if constant := np.flatnonzero(np.ptp([stats["min"], stats["max"]], axis=0) == 0).tolist():
        yield f"State dimensions {constant} are constant. Check whether they were recorded."
    for dimension, value in _find_far_out(stats["min"], stats["q01"], stats["q99"], stats["max"]):
        yield f"State dimension {dimension} reaches {value:g}, far outside its usual range. Check the recording."


def _find_far_out(lowest: Any, q01: Any, q99: Any, highest: Any) -> list[tuple[int, float]]:
    """List the dimensions with values far outside their quantiles, each with its value."""
    span = np.subtract(q99, q01)
    far = np.maximum(np.subtract(highest, q99), np.subtract(q01, lowest)) > FAR_OUT * span
    found = np.flatnonzero(far & (span > 0)).tolist()
    return [(dimension, max((lowest[dimension], highest[dimension]), key=abs)) for dimension in found]


def _warn_of_gripper(report: Report, robot: Robot, numbers: _Numbers) -> Iterator[str]:
    if grippers := robot.gripper_dimensions(numbers.dims):
        begin_open = float((numbers.actions[numbers.starts][:, grippers] > GRIPPER_OPEN).mean())
        if begin_open < 0.5:
            yield (
                f"Only {begin_open:.0%} of the episodes begin with an open gripper. Check whether the robot's adapter "
                "has open and closed the right way round."
            )
        if report.gripper_open in (0.0, 1.0):
            yield f"The gripper is always {'open' if report.gripper_open else 'closed'}."
    elif robot.gripper is None and numbers.dims == len("xyzrpyg") and robot.standard_space not in JOINTS:
        yield (
            "The meaning of the gripper's values is unknown. If the robot has a gripper, give an adapter that "
            "declares it."
        )


def _warn_of_rate(report: Report, robot: Robot, recorded_rate: float | None) -> Iterator[str]:
    if recorded_rate and robot.frequency and abs(recorded_rate / robot.frequency - 1) > RATE_TOLERANCE:
        yield f"The data is at {recorded_rate:g} Hz, but the robot {robot.name!r} is at {robot.frequency:g} Hz."
    if report.frequency is None:
        yield "The number of actions per second is unknown. Act at the rate of the recording."


def _label(report: Report, dimension: int) -> str:
    return f"dimension {dimension}" + (f" ({report.names[dimension]})" if report.names else "")


def report_tables(report: Report, names: Sequence[str]) -> list[Table]:
    """Make tables of a report; `names` are those of the action's dimensions."""
    facts = Table(title=f"{report.name}, read as {report.table_row or repr(report.robot)}", show_header=False)
    for fact in (
        ("episodes, frames, instructions", f"{report.episodes}, {report.frames}, {report.instructions}"),
        ("frames per episode", f"{report.shortest_episode} / {report.median_episode:g} / {report.longest_episode}"
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
    for column in ("", "lowest", "1%", "99%", "highest", "clipped", "bins used"):
        actions.add_column(column, justify="right")
    for index, name in enumerate(names):
        values = (report.lowest[index], report.q01[index], report.q99[index], report.highest[index])
        used = sum(count > 0 for count in report.histograms[index])
        actions.add_row(name, *(f"{value:+.4g}" for value in values), f"{report.clipped[index]:.1%}", str(used))
    return [facts, actions]


def plot_actions(report: Report, path: str | os.PathLike, names: Sequence[str] | None = None) -> Path:
    """Draw how often each of the 256 bins is used, with a panel for each dimension, into an image file."""
    pyplot = import_extra("matplotlib.pyplot", "data")
    count = len(report.histograms)
    figure, axes = pyplot.subplots(
        count, 1, figsize=(8, 1.3 * count), sharex=True, squeeze=False, layout="constrained"
    )
    # The last bin contains only the value 1.
    edges = np.append(np.linspace(-1, 1, N_BINS), 1 + 2 / N_BINS)
    for dimension, (axis, counts) in enumerate(zip(axes[:, 0], report.histograms, strict=True)):
        axis.stairs(counts, edges, fill=True)
        # Logarithmic above one frame and linear below, so that bars start at 0 and a single frame is visible.
        axis.set_yscale("symlog", linthresh=1, linscale=0.5)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(names[dimension] if names else f"action {dimension}")
    axes[-1, 0].set_xlabel("normalised action; each bar is a token")
    figure.suptitle(f"{report.name}: {report.frames} frames")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)


__all__ = ["Report", "examine", "plot_actions", "report_tables"]
