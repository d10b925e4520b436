"""Checks that a resumed run keeps its settings, its data and its output folder."""

import ast
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME

from ..checkpoints.model_card import TRAINING_FILE
from ..data.open_x import TableRobot
from ..modeling.checkpoint_files import ADAPTER_CONFIG
from .checkpoint_saving import last_checkpoint, read_state
from .recipes import Recipe


# Fields that divide a step's samples into batches. A resumed run may change them if the samples per step stay equal.
PER_DEVICE = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
# Arguments of `TrainingArguments` that affect learning besides a recipe's fields, or choose the best checkpoint.
OF_THE_RUN = (
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "data_seed"),
    *("metric_for_best_model", "greater_is_better"),
)
# Entry of `reading` that a resumed run may change.
CHANGEABLE = {"skip_bad_episodes"}
# Entries of `reading` that depend on the robot.
OF_ROBOT = {"adapter", "cameras"}
# Entries of a table's row that a resumed run may change. `OF_ROBOT` contains the cameras that are read.
CHANGEABLE_OF_ROW = {"cameras", "source"}
# Files that only a dataset has: LeRobot, RLDS (also in the folder above a version), `datasets`.
DATASET_FILES = ("meta/info.json", "features.json", "*/features.json", "state.json")
# Files that only a checkpoint has.
CHECKPOINT_FILES = (CONFIG_NAME, ADAPTER_CONFIG, "*.safetensors", "*.bin", "*.pt")


def run_settings(recipe: Recipe, args: TrainingArguments, patience: int | None = None) -> dict[str, Any]:
    """Collect the settings that must stay the same when a run is resumed.

    Some of them are in the optimizer's state, so a new value would be ignored. If the others changed, the checkpoint's
    record would describe only a part of its training.

    Args:
        recipe: Recipe of the run.
        args: Arguments of its trainer.
        patience: Evaluations without an improvement after which it stops.

    Returns:
        Name -> value, ready for JSON.
    """
    given = args.to_dict()
    of_recipe = {name: given.get(name, value) for name, value in asdict(recipe).items() if name not in PER_DEVICE}
    samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = of_recipe | {name: given[name] for name in OF_THE_RUN}
    settings |= {"samples_per_step": samples, "patience": patience}
    return json.loads(json.dumps(settings))


def check_output(output: str | os.PathLike, run: dict[str, Any], resume: bool) -> str | None:
    """Check that a run may write into a folder.

    Args:
        output: Folder of the run.
        run: `base_model` and `arguments` (see `run_settings`) as in `training.json`, and, if they are known, `recipe`
            (its name), `weights` (of the datasets), `mixture` (dataset -> `weight`), `held_out` (see
            `describe_split`) and `reading` (options of `load` by dataset).
        resume: Whether to continue from the folder's last checkpoint.

    Returns:
        The checkpoint to resume from, or `None` without `resume`.

    Raises:
        ValueError: The folder is the base model's, has no checkpoint to resume from, or its run had other settings.
        FileExistsError: The folder is a dataset, or contains a checkpoint that this run would overwrite.
    """
    folder = Path(output)
    if folder.exists() and Path(run["base_model"]).exists() and folder.samefile(run["base_model"]):
        raise ValueError(
            f"The output {output} is the base model itself. Give a new folder, or training would overwrite it."
        )
    if any(found for pattern in DATASET_FILES for found in folder.glob(pattern)):
        raise FileExistsError(f"The output {output} is a dataset. Give a new folder.")
    checkpoint = last_checkpoint(output)
    result = sorted(path.name for pattern in CHECKPOINT_FILES for path in folder.glob(pattern))
    if not resume:
        if checkpoint is not None:
            raise FileExistsError(f"{output} contains checkpoints of another run. Resume it, or give another folder.")
        if result:
            raise FileExistsError(f"{output} contains another checkpoint ({result[0]}). Give another folder.")
        return None
    if checkpoint is None:
        raise ValueError(f"{output} has no complete checkpoint to resume from. Leave out `resume` to start a new run.")
    _require_same_run(Path(checkpoint), run)
    if result:
        if not (folder / TRAINING_FILE).is_file():
            raise FileExistsError(
                f"{output} contains a checkpoint ({result[0]}) of another run. Move it to another folder."
            )
        _require_same_run(folder, run)
    return checkpoint


def check_steps(checkpoint: str | os.PathLike, steps: int) -> int:
    """Check that a checkpoint has no more steps than the run that resumes from it.

    Args:
        checkpoint: Folder of the checkpoint.
        steps: Last step of the run.

    Returns:
        The step of the checkpoint.

    Raises:
        ValueError: The checkpoint has more steps.
    """
    trained = read_state(checkpoint).global_step
    if trained > steps:
        raise ValueError(
            f"{checkpoint} has more steps than the {steps} of this run. Resume with at least {trained} as --steps "
            "(`max_steps`), or start a new run in another folder."
        )
    return trained


def _require_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Raise `ValueError` if `training.json` of a checkpoint contradicts the run."""
    file = checkpoint / TRAINING_FILE
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # Report another recipe before the settings that follow from it.
    pairs = {"recipe": (saved["recipe"], run["recipe"])} if "recipe" in saved and "recipe" in run else {}
    pairs |= {
        name: (saved["arguments"][name], value)
        for name, value in run["arguments"].items()
        if name in saved.get("arguments", {})
    }
    if "held_out" in run and run["held_out"] != saved.get("held_out", {}):
        raise ValueError(
            f"{checkpoint} was trained with different held-out episodes. Resume with the same data and the same share "
            "of held-out episodes, or start a new run in another folder."
        )
    if saved.get("mixture") and run.get("mixture"):
        _require_same_mixture(checkpoint, saved["mixture"], run["mixture"])
    elif "weights" in saved and "weights" in run:
        equal = set(saved["weights"] or ()) == {1}  # as without weights
        pairs["weights"] = None if equal else saved["weights"], run["weights"]
    if "base_model" in saved:
        pairs["base_model"] = _place(saved["base_model"]), _place(run["base_model"])
    pairs |= _compare_reading(saved.get("reading", {}), run.get("reading", {}))
    for name, (before, now) in pairs.items():
        if before != now:
            former = f"without `{name}`" if before is None else f"with {name}={before!r}"
            change = "leave it out" if now is None else f"change it to {now!r}"
            raise ValueError(
                f"{checkpoint} was trained {former}, and a resumed run can't {change}. "
                "Resume with the same settings, or start a new run in another folder."
            )
    _require_same_robots(checkpoint, saved.get("reading", {}), run.get("reading", {}))


def _require_same_mixture(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise `ValueError` if mixtures (dataset -> `weight`) have other datasets, weights or another order."""
    before, now = ({name: one["weight"] for name, one in mixture.items()} for mixture in (saved, current))
    changes = [f"{name!r} is missing" for name in before if name not in now]
    changes += [f"{name!r} is new" for name in now if name not in before]
    changes += [
        f"{name!r} has the weight {weight} instead of {before[name]}"
        for name, weight in now.items()
        if weight != before.get(name, weight)
    ]
    if not changes and [*before] != [*now]:
        changes = [f"the order of the datasets is {', '.join(now)} instead of {', '.join(before)}"]
    if changes:
        raise ValueError(
            f"The mixture differs from that of {checkpoint}: {'; '.join(changes)}. Resume with the former mixture, or "
            "start a new run in another folder."
        )


def _compare_reading(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of each option of `load` that differs for one of the datasets, in their order."""
    pairs = {}
    current = json.loads(json.dumps(current))
    for before, now in zip(saved.values(), current.values(), strict=False):  # other checks compare the datasets
        for name in sorted({*before, *now} - CHANGEABLE - OF_ROBOT):
            if before.get(name) != now.get(name):
                pairs[name] = before.get(name), now.get(name)
    return pairs


def _require_same_robots(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise `ValueError` if the robot or the table's row of a dataset has other fields or other cameras."""
    current = json.loads(json.dumps(current))
    for before, (source, now) in zip(saved.values(), current.items(), strict=False):
        old, new = _robot_fields(before), _robot_fields(now)
        changes = [
            f"{name} is {new.get(name, 'the default')} instead of {old.get(name, 'the default')}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
        if changes:
            raise ValueError(
                f"The dataset {source} is read differently than for {checkpoint}: {'; '.join(changes)}. Resume with "
                "the former robot or row, or start a new run in another folder."
            )


def _robot_fields(reading: dict[str, Any]) -> dict[str, str]:
    """Return the fields of a dataset's robot, the entries of its row, and its chosen cameras, as text."""
    fields = dict(reading.get("adapter") or {})
    if fields.get("class") == TableRobot.__name__:
        row: Any = ast.parse(fields.pop("row"), mode="eval").body
        entries = {entry.arg: ast.unparse(entry.value) for entry in row.keywords}
        fields |= {name: text for name, text in entries.items() if name not in CHANGEABLE_OF_ROW}
    return fields if reading.get("cameras") is None else fields | {"cameras": repr(reading["cameras"])}


def _place(model_id: str) -> str:
    """Return the real path of a folder, or a Hub id as it is."""
    return os.path.realpath(model_id) if os.path.exists(model_id) else model_id


__all__ = ["check_output", "check_steps", "run_settings"]
