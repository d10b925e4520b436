"""Measure how close a policy's actions are to recorded ones. The policy sees recorded images and never acts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from rich.table import Table

from ..data.gripper import GRIPPER_OPEN
from ..data.loading import load
from ..data.robots import require_same_robot
from ..data.splits import held_out_frames, sample_episodes, sample_frames
from ..modeling.action_tokenizer import NORMALIZATION_KINDS, normalize
from ..processing.observations import read_frame_images


@dataclass(frozen=True)
class OpenLoopReport:
    """The distance between predicted and recorded actions.

    Attributes:
        dataset: Name of the dataset.
        episodes: Number of episodes that the frames are from.
        frames: Number of frames.
        mean_absolute_error: One number for each action dimension, in the robot's units.
        l1: Mean absolute error of the normalised actions, over all dimensions.
        token_accuracy: Share of the action tokens that equal those of the recorded action.
        gripper_agreement: Share of the frames on which the gripper is opened or closed as recorded; `None` if the data
            does not say which dimension is the gripper.
    """

    dataset: str
    episodes: int
    frames: int
    mean_absolute_error: list[float]
    l1: float
    token_accuracy: float
    gripper_agreement: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)


def load_recorded(data: str, training: dict[str, Any], **options: Any) -> Dataset:
    """Load recorded episodes in the same way as the training of a policy.

    Args:
        data: Folder, URL or Hub id of the dataset.
        training: Content of the policy's `training.json`; see `read_training`.
        options: Options of `load` to use in place of those of the training, where `camera` and `cameras` replace each
            other. Without `split`, the frames are those that the training held out.

    Raises:
        ValueError: Training read several datasets but not this one, or the robot adapter that training used is not
            registered here or differs.
    """
    reading = _find_reading(data, training.get("reading", {}))
    adapter = reading.pop("adapter", None)
    if adapter is not None and options.get("robot") in (None, reading["robot"]):
        require_same_robot(reading["robot"], adapter)
    for given, other in (("camera", "cameras"), ("cameras", "camera")):
        if given in options:
            reading.pop(other, None)
    frames = load(data, **reading | options)
    return frames if "split" in options else held_out_frames(frames, training["held_out"])


def load_options(model: Any, processor: Any) -> dict[str, Any]:
    """Return the options of `load` for frames with a policy's inputs and actions: none for plain OpenVLA."""
    options: dict[str, Any] = {} if processor.cameras is None else {"cameras": processor.cameras}
    if processor.state_dim is not None:
        options["state"] = True
    if model.config.action_horizon > 1:
        options |= {"chunk": model.config.action_horizon, "chunk_end": "pad"}
    return options


def _find_reading(data: str, readings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Find the options with which training read a dataset, by its path, or by its name if it was moved."""
    if len(readings) <= 1:
        return dict(next(iter(readings.values()), {"split": "train"}))
    moved = [known for known in readings if Path(known).name == Path(data).name]
    if data not in readings and len(moved) != 1:
        raise ValueError(f"{data} is not one of the training datasets. Choose from {', '.join(readings)}.")
    return dict(readings[data if data in readings else moved[0]])


@dataclass(frozen=True)
class ComparedActions:
    """Predicted and recorded actions, (N, A) each: one for each frame, or for each recorded action of its chunk.

    Attributes:
        predicted: Predicted actions, in the robot's units.
        recorded: Recorded actions, in the robot's units.
        normalized: Predicted actions, normalised.
        expected: Recorded actions, normalised.
        equal_tokens: Whether the tokens are equal; for predicted numbers, whether their bins are.
        episodes: Index of the episode of each action, (N,).
    """

    predicted: np.ndarray
    recorded: np.ndarray
    normalized: np.ndarray
    expected: np.ndarray
    equal_tokens: np.ndarray
    episodes: np.ndarray


def evaluate_open_loop(
    model: Any,
    processor: Any,
    frames: Dataset,
    unnorm_key: str | None = None,
    *,
    max_episodes: int | None = None,
    max_frames: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> OpenLoopReport:
    """Predict the actions of recorded frames, and measure their distance from the recorded ones.

    Args:
        model: A policy.
        processor: Its processor.
        frames: Frames of one dataset, as `openvla_hf.data.load` returns them. If they have no `actions`, only the
            first action of each predicted chunk is compared. Actions whose `chunk_mask` is false are not compared.
        unnorm_key: Name of the action statistics; by default the dataset's name, if the model has statistics for it.
        max_episodes: Largest number of episodes to evaluate on, drawn by `seed`; all by default.
        max_frames: Largest number of frames to evaluate on, spread over the episodes; all by default.
        seed: Seed of the samples.
        batch_size: Frames in a batch.
        progress: Called with the number of evaluated frames and their total.

    Raises:
        ValueError: There are no frames, their actions do not have as many dimensions as the policy's, or they lack the
            cameras or the state that the policy sees.
    """
    if not len(frames):
        raise ValueError("There are no frames to evaluate on.")
    if max_episodes is not None:
        frames = sample_episodes(frames, max_episodes, seed)
    if max_frames is not None:
        frames = sample_frames(frames, max_frames, seed)
    dataset = str(frames[0]["dataset"])
    if unnorm_key is None and dataset in model.norm_stats:
        unnorm_key = dataset
    require_inputs(model, processor, frames, unnorm_key)
    compared = compare_actions(model, processor, frames, unnorm_key, batch_size=batch_size, progress=progress)
    grippers = np.flatnonzero(~np.asarray(frames[0]["action_mask"], dtype=bool))
    return OpenLoopReport(
        dataset=dataset,
        episodes=len(np.unique(compared.episodes)),
        frames=len(frames),
        mean_absolute_error=np.abs(compared.predicted - compared.recorded).mean(0).tolist(),
        l1=float(np.abs(compared.normalized - compared.expected).mean()),
        token_accuracy=float(compared.equal_tokens.mean()),
        gripper_agreement=float(agree_on_gripper(compared, grippers).mean()) if len(grippers) else None,
    )


def agree_on_gripper(compared: ComparedActions, grippers: Any) -> np.ndarray:
    """Return whether each gripper, given by its dimension, is opened or closed as recorded, (N, G)."""
    return (compared.predicted[:, grippers] > GRIPPER_OPEN) == (compared.recorded[:, grippers] > GRIPPER_OPEN)


def require_inputs(model: Any, processor: Any, frames: Dataset, unnorm_key: str | None) -> None:
    """Check that frames have actions of the policy's dimensions, the cameras and the state that it sees.

    Raises:
        ValueError: One of these is missing or has other dimensions.
    """
    dataset, dims = str(frames[0]["dataset"]), len(model.get_action_stats(unnorm_key)["q01"])
    if len(frames[0]["action"]) != dims:
        raise ValueError(
            f"{dataset} has actions of {len(frames[0]['action'])} dimensions, but the policy's have {dims}. Give data "
            "from the policy's robot, or the adapter that reads them as in training."
        )
    if processor.cameras is not None and len(processor.cameras) > 1 and "images" not in frames[0]:
        raise ValueError(
            f"The frames of {dataset} have the image of one camera, but the policy sees several. Load the data with "
            f"cameras={processor.cameras}."
        )
    if processor.state_dim is None:
        return
    states = frames.select_columns(["state"]).with_format("arrow")[:]["state"]
    for size in pc.unique(pc.list_value_length(states)).to_pylist():
        if size is None:
            raise ValueError(
                f"{dataset} has frames without a state, but the policy needs one of {processor.state_dim} numbers. "
                "Load the data with state=True to see where it is missing."
            )
        if size != processor.state_dim:
            raise ValueError(
                f"{dataset} has states of {size} numbers, but the policy needs {processor.state_dim}. Give data from "
                "the policy's robot, or the adapter that reads them as in training."
            )


def compare_actions(
    model: Any,
    processor: Any,
    frames: Dataset,
    unnorm_key: str | None,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ComparedActions:
    """Predict the actions of frames that `require_inputs` accepts; for the arguments, see `evaluate_open_loop`."""
    compared = []
    for start in range(0, len(frames), batch_size):
        batch = [frames[index] for index in range(start, min(start + batch_size, len(frames)))]
        compared.append(_compare(model, processor, batch, unnorm_key))
        progress(start + len(batch), len(frames))
    return ComparedActions(*(np.concatenate(values) for values in zip(*compared, strict=True)))


def _compare(
    model: Any, processor: Any, batch: Sequence[dict[str, Any]], unnorm_key: str | None
) -> tuple[np.ndarray, ...]:
    """Return the fields of `ComparedActions` for B frames."""
    stats = model.get_action_stats(unnorm_key)
    images = [read_frame_images(frame, processor.cameras, "A frame") for frame in batch]
    states = {} if processor.state_dim is None else {"state": np.stack([frame["state"] for frame in batch])}
    inputs = processor(images, instruction=[frame["instruction"] for frame in batch], **states)
    details = model.predict_action(**inputs, unnorm_key=unnorm_key, return_details=True)
    recorded = np.stack([frame["actions"] if "actions" in frame else frame["action"][None] for frame in batch])
    count, dims = min(recorded.shape[1], model.config.action_horizon), recorded.shape[2]
    everything = np.ones(recorded.shape[1], bool)
    is_recorded = np.stack([frame.get("chunk_mask", everything) for frame in batch])[:, :count]

    def first_actions(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(batch), -1, dims)[:, :count][is_recorded]

    recorded, predicted = first_actions(recorded), first_actions(details.actions)
    normalized = first_actions(details.normalized_actions)
    expected = normalize(recorded, stats, NORMALIZATION_KINDS[model.config.action_normalization])
    tokenizer = model.action_tokenizer
    token_ids = tokenizer.encode(normalized) if details.token_ids is None else first_actions(details.token_ids)
    episodes = np.repeat([frame["episode_index"] for frame in batch], is_recorded.sum(1))
    return predicted, recorded, normalized, expected, token_ids == tokenizer.encode(expected), episodes


def open_loop_table(title: str, report: OpenLoopReport, names: Sequence[str]) -> Table:
    """Make a table of a report; `names` are those of the action's dimensions."""
    table = Table(title=title, show_header=False)
    table.add_row("episodes, frames", f"{report.episodes}, {report.frames}", end_section=True)
    for name, error in zip(names, report.mean_absolute_error, strict=True):
        table.add_row(f"mean absolute error, {name}", f"{error:.4g}")
    table.add_section()
    table.add_row("L1, normalised", f"{report.l1:.4f}")
    table.add_row("token accuracy", f"{report.token_accuracy:.1%}")
    if report.gripper_agreement is not None:
        table.add_row("gripper as recorded", f"{report.gripper_agreement:.1%}")
    return table


__all__ = [
    "ComparedActions",
    "OpenLoopReport",
    "agree_on_gripper",
    "compare_actions",
    "evaluate_open_loop",
    "load_options",
    "load_recorded",
    "open_loop_table",
    "require_inputs",
]
