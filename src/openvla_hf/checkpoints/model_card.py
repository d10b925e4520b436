"""Write the model card of a repository, from the checkpoint and the files of its run.

Three files are read if they are next to the weights:

- `training.json`, written by `openvla-hf finetune`: `base_model` and `datasets`, the name of the `recipe`, `settings`
  and `figures` (name -> value), the `arguments` that a resumed run must share, how inputs are prepared
  (`preparation`), how the data are read (`reading`), which episodes were held out (`held_out`), and in the result of a
  run its `last_step`.
- `evaluation.json`: the output of `openvla-hf evaluate --json`, or the file that `openvla-hf evaluate --suite` writes,
  `{"results": {condition: {task: {"success", "episodes", ...}}}}`. `environment` names the environment, if it is not
  the tabletop.
- `quantization.json`: a list of rows, `{column: value}`, one for each format that was measured.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import PROCESSOR_NAME

from ..modeling.checkpoint_files import CheckpointFiles
from .describe import CheckpointInfo


RUN_FILES = TRAINING_FILE, EVALUATION_FILE, QUANTIZATION_FILE = "training.json", "evaluation.json", "quantization.json"
# Logged figures for the card: of training, of evaluation, and of single datasets.
FIGURE = re.compile(r"(eval_(\w+_)?)?(loss|action_accuracy|action_l1)(/.+)?")
TEMPLATE = Path(__file__).with_name("model_card_template.md")


def write_card(
    folder: Path,
    info: CheckpointInfo,
    repo_id: str,
    *,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
    token: str | None = None,
) -> str:
    """Write the text of the `README.md` of the checkpoint in `folder`.

    `repo_id` is the Hub id or the folder that the example loads. The other arguments are those of `push`. The card
    does not name a base model or a dataset that is a local folder.
    """
    training, evaluation, quantization = (
        _read_run_file(folder / name, default)
        for name, default in ((TRAINING_FILE, {}), (EVALUATION_FILE, {}), (QUANTIZATION_FILE, []))
    )
    base_model = base_model or info.base_model or training.get("base_model")
    inherited = license is None and base_model is not None
    license = _license_of(base_model, token) if license is None and base_model is not None else license
    base_model = base_model if is_hub_id(base_model) else None
    name = repo_id.split("/")[-1]
    oft = info.oft or {}
    cameras = _cameras(folder)
    images = oft.get("num_images", 1)
    uses_bounds = oft.get("action_normalization") == "bounds"
    data = ModelCardData(
        library_name="peft" if info.layout == "adapter" else "transformers",
        pipeline_tag="robotics",
        license=license,
        base_model=base_model,
        base_model_relation=_relation(info) if base_model else None,
        datasets=datasets or [name for name in training.get("datasets", []) if is_hub_id(name)] or None,
        tags=["openvla", "vision-language-action", "robotics"],
        model_name=name,
        eval_results=_results(evaluation),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        info=info,
        inherited=inherited,
        images=images,
        cameras=cameras,
        call="image" if images == 1 else f"[{', '.join(cameras or [f'image_{i + 1}' for i in range(images)])}]",
        chunk=oft.get("action_horizon", 1),
        state_dim=oft.get("proprio_dim"),
        bounds=("minimum", "maximum") if uses_bounds else ("1st percentile", "99th"),
        spaces=_action_spaces(info.statistics, ("min", "max") if uses_bounds else ("q01", "q99")),
        recipe=_recipe(training),
        evaluation=evaluation,
        has_intervals=all("low" in row for tasks in evaluation.get("results", {}).values() for row in tasks.values()),
        quantization=quantization,
    )
    return str(card)


def read_training(source: str | os.PathLike) -> dict[str, Any]:
    """Read `training.json` next to a policy. Returns an empty dictionary if there is none.

    Args:
        source: Folder or Hub id.

    Raises:
        ValueError: The file is damaged.
        OSError: The repository can't be reached.
    """
    return CheckpointFiles.locate(source).read_json(TRAINING_FILE) or {}


def copy_training(files: CheckpointFiles, folder: Path) -> None:
    """Copy the `training.json` of a policy, if it has one, to a folder with the same policy in another form."""
    if training := files.read_json(TRAINING_FILE):
        (folder / TRAINING_FILE).write_text(json.dumps(training, indent=2), encoding="utf-8")


def records_training(source: str) -> bool:
    """Return whether a folder has a record of how the policy's images were cropped in training.

    A repository on the Hub never has one, since `training.json` is not pushed.
    """
    training = read_training(source) if os.path.isdir(source) else {}
    return "preparation" in training or "augment" in training.get("arguments", {})


def _read_run_file(path: Path, default: Any) -> Any:
    """Read a JSON file with a value of the type of `default`, or return `default` if there is no file."""
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}). Write it again, or delete it.") from error
    if not isinstance(content, type(default)):
        kind = "an object" if isinstance(default, dict) else "a list"
        raise ValueError(f"{path.name} does not contain {kind}. Write it again, or delete it.")
    return content


def is_hub_id(name: str | None) -> bool:
    """Whether a name has the form of a Hub id and is not a local folder."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _license_of(base_model: str, token: str | None) -> str | None:
    """Read the license in the card of the base model. Returns `None` if there is none."""
    local = Path(base_model, "README.md")
    if not is_hub_id(base_model) and not local.is_file():
        return None
    try:
        card = ModelCard.load(local if local.is_file() else base_model, token=token, ignore_metadata_errors=True)
    except OSError:  # no card, no permission, no network
        return None
    return card.data.license


def _relation(info: CheckpointInfo) -> str:
    if info.layout == "adapter":
        return "adapter"
    return "quantized" if info.quantization else "finetune"


def _recipe(training: dict[str, Any]) -> dict[str, Any]:
    """Make the rows of the table about the training."""
    figures = {name: value for name, value in training.get("figures", {}).items() if FIGURE.fullmatch(name)}
    return {
        **({"recipe": training["recipe"]} if "recipe" in training else {}),
        **training.get("settings", {}),
        **{name.replace("_", " "): f"{value:.4g}" for name, value in figures.items()},
    }


def _results(evaluation: dict[str, Any]) -> list[EvalResult] | None:
    environment = evaluation.get("environment", "tabletop")
    results = [
        EvalResult(
            task_type="robotics",
            task_name="Robot manipulation",
            dataset_type=environment,
            dataset_name=f"{environment}, {condition}, task: {task}",
            dataset_config=condition,
            dataset_split=task,
            metric_type="success_rate",
            metric_name="Success rate",
            metric_value=round(row["success"], 4),
        )
        for condition, tasks in evaluation.get("results", {}).items()
        for task, row in tasks.items()
    ]
    return results or None


def _cameras(folder: Path) -> list[str] | None:
    """Read the names of the cameras, which the processor keeps."""
    return _read_run_file(folder / PROCESSOR_NAME, {}).get("cameras")


def _action_spaces(statistics: dict[str, Any], bounds: tuple[str, str]) -> list[dict[str, Any]]:
    """Make a row for each statistics key."""
    return [
        {
            "key": key,
            "low": _numbers(one["action"][bounds[0]]),
            "high": _numbers(one["action"][bounds[1]]),
            "dim": len(one["action"]["q01"]),
            "raw": [index for index, scaled in enumerate(one["action"].get("mask", [])) if not scaled],
            "transitions": one.get("num_transitions"),
            "trajectories": one.get("num_trajectories"),
        }
        for key, one in statistics.items()
    ]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


__all__ = ["copy_training", "is_hub_id", "read_training", "records_training", "write_card"]
