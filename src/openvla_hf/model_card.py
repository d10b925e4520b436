"""The model card of a repository, made from the checkpoint and from what its run left beside it.

Three files may lie beside the weights:

- `training.json`: `base_model` and `datasets` (Hub ids), `recipe` and `figures` (name -> value).
- `evaluation.json`: what `openvla-hf evaluate --json` prints, `{"results": {condition: {task: {"success",
  "episodes", ...}}}}`; an `environment` names another place than the tabletop.
- `quantization.json`: a list of rows, `{column: value}`, one for each format that was measured.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .checkpoint_info import CheckpointInfo


RUN_FILES = TRAINING_FILE, EVALUATION_FILE, QUANTIZATION_FILE = "training.json", "evaluation.json", "quantization.json"
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
    """The text of the `README.md` of a repository; arguments as those of `hub.push`."""
    training, evaluation, quantization = (
        _read(folder / name, default)
        for name, default in ((TRAINING_FILE, {}), (EVALUATION_FILE, {}), (QUANTIZATION_FILE, []))
    )
    base_model = base_model or info.base_model or training.get("base_model")
    inherited = license is None and base_model is not None
    license = _license_of(base_model, token) if license is None and base_model is not None else license
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="peft" if info.layout == "adapter" else "transformers",
        pipeline_tag="robotics",
        license=license,
        base_model=base_model,
        base_model_relation=_relation(info) if base_model else None,
        datasets=datasets or training.get("datasets"),
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
        spaces=_action_spaces(info.statistics),
        training=training,
        evaluation=evaluation,
        quantization=quantization,
    )
    return str(card)


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def _license_of(base_model: str, token: str | None) -> str | None:
    """License in the card of the base model, or `None` where there is none to read."""
    try:
        return ModelCard.load(base_model, token=token).data.license
    except OSError:  # no card, no permission, no network
        return None


def _relation(info: CheckpointInfo) -> str:
    if info.layout == "adapter":
        return "adapter"
    return "quantized" if info.quantization else "finetune"


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


def _action_spaces(statistics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each statistics key."""
    return [
        {
            "key": key,
            "low": _numbers(one["action"]["q01"]),
            "high": _numbers(one["action"]["q99"]),
            "dim": len(one["action"]["q01"]),
            "raw": [index for index, scaled in enumerate(one["action"].get("mask", [])) if not scaled],
            "transitions": one.get("num_transitions"),
            "trajectories": one.get("num_trajectories"),
        }
        for key, one in statistics.items()
    ]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


__all__ = ["write_card"]
