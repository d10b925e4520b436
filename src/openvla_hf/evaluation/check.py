"""Find silent mistakes of a policy: inputs that are ignored, wrong masks, statistics, prompts, images and adapters.

report = check("outputs/kitchen", data="lab/kitchen")
assert report.passed, report.failures
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from rich.table import Table
from rich.text import Text
from transformers.utils import CONFIG_NAME

from ..checkpoints.model_card import TRAINING_FILE
from ..data.loading import load
from ..modeling.action_tokenizer import resolve_key
from ..modeling.checkpoint_files import ADAPTER_CONFIG, OFT_FILES, STATISTICS_FILE, CheckpointFiles
from ..modeling.checkpoint_loading import refuse_training_run
from ..modeling.configuration_openvla import OpenVLAConfig
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.image_processing_openvla import iterate_images
from ..processing.observations import read_frame_images
from ..processing.processing_openvla import OpenVLAProcessor
from ..tabletop.scene import Goal, Scene, TableGripper, TableObject, draw_scene
from .checks.behaviour import ACTION_DIM, Probe, check_inputs, check_loop, check_mask
from .checks.code import check_code
from .checks.findings import Finding, Status, Subject, failed, skipped
from .checks.preparation import check_agreement, check_images, check_prompt
from .checks.recording import ACTIONS, check_recording
from .checks.statistics import (
    check_files,
    check_gripper_range,
    check_instructions,
    check_key,
    check_numbers,
)
from .checks.weights import check_adapter, check_positions, check_weights
from .open_loop import load_options


# Tasks of the probe. The second is about other objects and another movement.
INSTRUCTIONS = ("put the red cube on the yellow plate", "open the top drawer")
# Arguments of `from_pretrained` for the model and the processor.
OF_BOTH = ("platform", "action_decoding", "reasoning")
# Checks that need inputs of the model.
OF_INPUTS = ("image", "vision tower", "instruction", "decoding loop")
COLOURS: dict[Status, str] = {"passed": "green", "warned": "yellow", "failed": "red", "skipped": "bright_black"}


@dataclass
class CheckReport:
    """Findings of `check`.

    Attributes:
        model: Folder or Hub id of the policy; `None` for a policy in memory.
        data: Name of the dataset that the policy was compared with, if one was given.
        findings: One for each check, in a fixed order.
    """

    model: str | None
    data: str | None
    findings: list[Finding]

    @property
    def failures(self) -> list[Finding]:
        """The findings of mistakes."""
        return [one for one in self.findings if one.status == "failed"]

    @property
    def passed(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        counts = Counter(one.status for one in self.findings)
        return asdict(self) | {"passed": self.passed, "counts": {status: counts[status] for status in COLOURS}}


def check(
    source: str | os.PathLike,
    *,
    data: str | os.PathLike | Dataset | None = None,
    image: Any = None,
    instruction: str | None = None,
    unnorm_key: str | None = None,
    loading: dict[str, Any] | None = None,
    **reading: Any,
) -> CheckReport:
    """Check a checkpoint, and whether a dataset fits it.

    Args:
        source: Folder or Hub id of a checkpoint or an adapter.
        data: Recorded episodes of the policy's robot: a folder, a URL, a Hub id or a loaded dataset.
        image: See `check_policy`.
        instruction: See `check_policy`.
        unnorm_key: See `check_policy`.
        loading: Arguments of `from_pretrained` for the model, such as `dtype` and `device_map`; `platform`,
            `action_decoding` and `reasoning` are also for the processor.
        reading: Options of `load` for the data.

    Raises:
        ValueError: The source is not an OpenVLA checkpoint, an argument is wrong, or the data can't be read.
        OSError: There is no such checkpoint, dataset or image.
    """
    files = CheckpointFiles.locate(source)
    config = files.read_json(CONFIG_NAME) or {}
    _refuse_foreign(files, config)
    code = check_code(files, _layout(files, config))
    loading = loading or {}
    try:
        model = OpenVLAForActionPrediction.from_pretrained(source, **loading)
        processor = OpenVLAProcessor.from_pretrained(
            source, **{name: value for name, value in loading.items() if name in OF_BOTH}
        )
    except (OSError, ValueError) as error:
        return CheckReport(os.fspath(source), None, [*_explain(error, files, config), code])
    frames, name = None, None
    if data is not None:
        options = load_options(model, processor)
        if "camera" in reading:
            options.pop("cameras", None)
        frames = load(data, **options | reading)
        name = str(frames[0]["dataset"])
    report = check_policy(
        model, processor, source, frames=frames, image=image, instruction=instruction, unnorm_key=unnorm_key
    )
    return CheckReport(report.model, name, [*report.findings, code])


def check_policy(
    model: Any,
    processor: Any,
    source: str | os.PathLike | None = None,
    *,
    frames: Dataset | None = None,
    image: Any = None,
    instruction: str | None = None,
    unnorm_key: str | None = None,
) -> CheckReport:
    """Check a policy that is loaded.

    Args:
        model: An `OpenVLAForActionPrediction`.
        processor: Its processor.
        source: Folder or Hub id that both were loaded from, whose files say how the policy was trained.
        frames: Frames of one dataset, as `openvla_hf.data.load` returns them.
        image: Image to show to every camera, as the processor takes it. By default, one of the data, or a frame of the
            tabletop.
        instruction: Task to give to the policy.
        unnorm_key: Name of the statistics that the robot uses, if the policy has several.

    Raises:
        ValueError: The key is unknown, or the image can't be used.
        OSError: There is no such image.
    """
    if unnorm_key is not None and model.norm_stats:
        resolve_key(model.norm_stats, unnorm_key)
    files = CheckpointFiles.locate(source)
    config, training = (files.read_json(name) or {} for name in (CONFIG_NAME, TRAINING_FILE))
    subject = Subject(model, processor, files, unnorm_key, config, training)
    images, instructions = _choose_images(image, frames, processor), _choose_instructions(instruction, frames)
    probe = Probe(subject, images, *instructions)
    findings = list(_check_policy(subject, probe))
    if frames is not None:
        fits = all(one.status != "failed" for one in findings if one.check in ("statistics", "processor and model"))
        can_act = fits and np.isfinite(probe.reference).all()
        findings += _check_on_data(subject, frames) if can_act else [skipped("data", "See the failures above.")]
    return CheckReport(None if source is None else os.fspath(source), None, findings)


def _check_policy(subject: Subject, probe: Probe) -> Iterator[Finding]:
    """Run the checks that need no data."""
    yield check_weights(subject)
    yield check_positions(subject)
    yield check_adapter(subject)
    yield (numbers := check_numbers(subject.model.norm_stats, subject.config))
    yield check_files(subject)
    yield skipped("gripper", "See the statistics.") if numbers.status == "failed" else check_gripper_range(subject)
    yield (agreement := check_agreement(subject))
    yield from check_prompt(subject)
    yield from check_images(subject)
    yield check_mask(subject)
    if agreement.status == "failed":
        yield from (skipped(name, "The processor does not fit the model.") for name in OF_INPUTS)
        return
    yield from check_inputs(probe)
    known = numbers.status != "failed" and subject.key is not None
    yield check_loop(probe, subject.model.get_action_dim(subject.key) if known else ACTION_DIM)


def _check_on_data(subject: Subject, frames: Dataset) -> Iterator[Finding]:
    """Run the checks that compare the policy with data."""
    yield check_instructions(subject, frames)
    keys = check_key(subject, frames)
    yield from keys
    gripper, actions = check_recording(subject, frames)
    yield gripper
    fits = all(one.status != "failed" for one in keys)
    yield actions if fits else skipped(ACTIONS, "See the failure of the key.")


def _refuse_foreign(files: CheckpointFiles, config: dict[str, Any]) -> None:
    """Raise `ValueError` if the files are not those of a checkpoint or an adapter."""
    refuse_training_run(files.source, config)
    is_adapter = not config and ADAPTER_CONFIG in files.names
    if not is_adapter and config.get("model_type") != OpenVLAConfig.model_type:
        raise ValueError(
            f"{files.source} is not an OpenVLA checkpoint: its {CONFIG_NAME} is missing or for another model."
        )


def _layout(files: CheckpointFiles, config: dict[str, Any]) -> str:
    if not config:
        return "adapter"
    return "published" if "vision_backbone_id" in config or files.match(OFT_FILES) else "openvla-hf"


def _explain(error: Exception, files: CheckpointFiles, config: dict[str, Any]) -> Iterator[Finding]:
    """Turn an error of loading into findings."""
    yield failed("loading", str(error), "Correct the checkpoint as the message says, and check it again.")
    statistics = files.read_json(STATISTICS_FILE) or config.get("norm_stats")
    if statistics:
        yield check_numbers(statistics, OpenVLAConfig())
    yield skipped("other checks", "The checkpoint does not load.")


def _choose_images(image: Any, frames: Dataset | None, processor: Any) -> list[np.ndarray]:
    """Return the images (H, W, 3) that the policy sees, one for each camera."""
    if image is None and frames is not None:
        images = read_frame_images(frames[0], processor.cameras, "The first frame")
        return images if isinstance(images, list) else [images]
    one = _draw_table() if image is None else np.asarray(next(iterate_images(image)))
    return [one] * len(processor.cameras or [None])


def _draw_table() -> np.ndarray:
    """Draw a frame of the tabletop, (224, 224, 3)."""
    objects = [TableObject("red", "cube", np.array([-0.05, 0.05, 0.0])), TableObject("green", "ball", np.zeros(3))]
    hand = TableGripper(np.array([0.1, 0.1, 0.12]))
    return draw_scene(Scene(objects, [Goal("yellow", "plate", 0.05, -0.1)], hand))


def _choose_instructions(instruction: str | None, frames: Dataset | None) -> tuple[str, str]:
    """Return two different tasks, those of the data if it has several."""
    known = [] if frames is None else sorted(set(frames.select_columns(["instruction"])[:]["instruction"]))
    candidates = [*([instruction] if instruction is not None else []), *known, *INSTRUCTIONS]
    first, second, *_ = dict.fromkeys(candidates)
    return first, second


def check_table(report: CheckReport) -> Table:
    """Make a table of a report."""
    table = Table(title=report.model)
    for column in ("check", "result", "found"):
        table.add_column(column)
    for one in report.findings:
        found = Text(one.found if one.fix is None else f"{one.found}\n")
        if one.fix is not None:
            found.append(one.fix, style="italic")
        table.add_row(one.check, Text(one.status, style=COLOURS[one.status]), found)
    return table


__all__ = ["CheckReport", "Finding", "check", "check_policy", "check_table"]
