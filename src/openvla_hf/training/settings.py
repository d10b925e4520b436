"""Names and values of settings, checked before anything is loaded."""

import math
from enum import Enum
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_origin

from transformers.integrations import get_reporting_integration_callbacks

from ..checkpoints.model_card import FIGURE
from ..modeling.known_names import check_name


PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "a string", NoneType: "null"}
"""Plain types of a setting, as errors name them."""
NUMBERS: dict[type, type] = {int: Integral, float: Real}

# Smallest valid value of a field of a recipe or of `TrainingArguments`.
AT_LEAST = {
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "lora_alpha", "action_horizon"), 1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "torch_empty_cache_steps"), 1),
    **dict.fromkeys(("lora_rank", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "decay_step"), 0),
    **dict.fromkeys(("seed", "data_seed", "dataloader_num_workers", "adam_beta1", "adam_beta2", "adam_epsilon"), 0),
    **dict.fromkeys(("lora_dropout", "logging_steps", "save_steps", "eval_steps", "eval_delay"), 0),
}
ABOVE_ZERO = ("num_train_epochs",)
# Values of `TrainingArguments.ddp_backend`, from its documentation.
DDP_BACKENDS = ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl")
BELOW_ONE = ("lora_dropout", "adam_beta1", "adam_beta2")


def check_value(name: str, value: Any, annotation: Any) -> None:
    """Check a value against the annotation and the range of its field.

    Args:
        name: Name of the field.
        value: Value to check.
        annotation: Type annotation of the field.

    Raises:
        ValueError: The value has another type or is out of range.
    """
    kinds = get_args(annotation) if get_origin(annotation) not in (list, tuple, dict) else (annotation,)
    kinds = kinds or (annotation,)
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if enums and isinstance(value, str):
        check_name(value, [member.value for member in enums[0]], name)
        return
    if get_origin(annotation) is tuple:  # names of modules, in a recipe
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
            raise ValueError(f'{name} must be a list of names such as ["lm_head"], got {value!r}.')
        return
    if all(kind in PLAIN for kind in kinds) and not any(_is_a(kind, value) for kind in kinds):
        raise ValueError(f"{name} must be {' or '.join(PLAIN[kind] for kind in kinds)}, got {value!r}.")
    if name == "ddp_backend" and value is not None:  # a wrong one would leave accelerate half initialised
        check_name(value, DDP_BACKENDS, name)
    if not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    if value < AT_LEAST.get(name, -math.inf):
        raise ValueError(f"{name} must be at least {AT_LEAST[name]}, got {value}.")
    if name in ABOVE_ZERO and value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}.")
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"max_steps must be at least 1, or -1 to train for num_train_epochs, got {value}.")
    if name == "label_smoothing_factor" and value != 0:
        raise ValueError(
            "label_smoothing_factor has no effect, because the loss is the plain cross entropy of the action tokens. "
            "Leave it out."
        )
    if name in BELOW_ONE and value >= 1:
        raise ValueError(f"{name} must be below 1, got {value}.")


def _is_a(kind: type, value: Any) -> bool:
    """Return whether a value has a plain type. An integer is also a number; a boolean is neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, NUMBERS.get(kind, kind))


def check_metric(name: str) -> None:
    """Raise `ValueError` if `metric_for_best_model` is not a figure that an evaluation logs."""
    if FIGURE.fullmatch(name) is None:
        raise ValueError(
            f"Unknown metric_for_best_model {name!r}. Use loss, action_accuracy or action_l1, or the figure of one "
            "dataset, such as action_l1/bridge_orig."
        )


def check_trackers(names: list[str]) -> None:
    """Check the trackers of `report_to`.

    Raises:
        ValueError: A tracker is unknown.
        ImportError: A tracker is not installed.
    """
    for name, callback in zip(names, get_reporting_integration_callbacks(names), strict=True):
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise ImportError(f"The tracker {name!r} can't be used: {error}") from error


__all__ = ["check_metric", "check_trackers", "check_value"]
