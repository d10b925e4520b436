"""Fine-tune a policy on demonstrations: everything that `openvla-hf finetune` does, in one call.

    from openvla_hf.training.finetune import FinetuneArguments, finetune

    finetune(FinetuneArguments(model="openvla/openvla-7b", data="lab/kitchen", output="outputs/kitchen"))

`check_run`, `build_trainer` and `train` are its steps.
"""

import copy
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import AutoProcessor, EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.utils import CONFIG_NAME

from ..checkpoints.describe import describe, refuse_adapter
from ..checkpoints.model_card import TRAINING_FILE, write_card
from ..checkpoints.preparation import describe_preparation
from ..data import Augmentation, compute_statistics
from ..data.feature_names import counted
from ..modeling.action_networks import add_action_networks
from ..modeling.checkpoint_files import ADAPTER_CONFIG, STATISTICS_FILE
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from .arguments import DEFAULT_SETTINGS, FinetuneArguments, TrainingData, TrainingMixture
from .checkpoint_saving import last_checkpoint, read_state
from .collator import ActionCollator, ChunkCollator
from .interrupt import SaveOnInterrupt
from .recipes import Recipe
from .recipes import recipe as find_recipe
from .run_frames import read_frames, read_statistics
from .runs import check_output, check_steps, run_settings
from .sharding import check_sharding
from .trainer import ActionTrainer


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a run.

    Args:
        figures: The last figures logged: loss, action accuracy, L1, and those of the evaluation if there was one.
        history: Every entry of the log, in order, each with its `step`.
    """

    figures: dict[str, float]
    history: list[dict[str, Any]]


def finetune(arguments: FinetuneArguments) -> FinetuneResult:
    """Fine-tune a policy and leave the result, with a model card, in the output folder.

    With `resume`, a run that is already complete is left as it is.

    Raises:
        ValueError: A setting is unknown or impossible, the data has no frames or does not fit the statistics, there
            is no checkpoint to resume from or its settings differ, or a loss or a gradient is not finite.
        ImportError: A tracker or a reader of the data is not installed.
        FileExistsError: The output folder contains a dataset or the checkpoint of another run.
        OSError: The base or the data can't be read, or the disk is full.
        KeyboardInterrupt: Ctrl-C was pressed; the message says where the run was saved.
    """
    if arguments.resume:
        _, args = check_run(arguments)
        if (result := _find_result(args)) is not None:
            if PartialState().is_main_process:
                logger.warning(
                    "%s already has %s. Give more with --steps (`max_steps`) to continue.",
                    arguments.output,
                    counted(args.max_steps, "step"),
                )
            return result
    return train(build_trainer(arguments), resume=arguments.resume)


def check_run(arguments: FinetuneArguments) -> tuple[Recipe, TrainingArguments]:
    """Check the settings, the trackers and the folder of a run before any data or weights are loaded.

    Returns:
        The recipe, and the arguments of the trainer.

    Raises:
        ValueError: A setting is unknown or impossible, the model is an adapter, or the run can't be resumed.
        ImportError: A tracker is not installed.
        FileExistsError: The output folder contains a dataset or the checkpoint of another run.
    """
    refuse_adapter(arguments.model)
    read_statistics(arguments)
    settings = {**DEFAULT_SETTINGS, **_evaluation_settings(arguments), **arguments.settings}
    if arguments.evaluates:
        settings.setdefault("eval_steps", settings["save_steps"])
    if "output_dir" in settings:
        raise ValueError("output_dir is not a setting of a run: give the folder as `output`.")
    of_recipe = {field.name for field in fields(Recipe)} & settings.keys()
    changes = {name: settings.pop(name) for name in of_recipe}
    chosen = arguments.recipe
    recipe = find_recipe(chosen, **changes) if isinstance(chosen, str) else replace(chosen, **changes)
    args = recipe.training_arguments(str(arguments.output), **settings)
    run = {
        "base_model": str(arguments.model),
        **_name_of_recipe(arguments),
        "arguments": _settings_to_keep(arguments, recipe, args),
        "weights": arguments.weights,
    }
    if isinstance(arguments.data, TrainingMixture):
        run["mixture"] = {one.options["name"]: {"weight": one.weight} for one in arguments.datasets}
    checkpoint = check_output(arguments.output, run, arguments.resume)
    if checkpoint is not None and args.max_steps > 0:  # otherwise, they depend on the data
        check_steps(checkpoint, args.max_steps)
    return recipe, args


def build_trainer(arguments: FinetuneArguments) -> ActionTrainer:
    """Check the run, load the data and the base model, and put them together with the recipe.

    Raises:
        ValueError: See `check_run`; or the recipe does not fit the model, or the data has no frames, does not fit the
            statistics or can't be split.
    """
    recipe, args = check_run(arguments)
    set_seed(recipe.seed)
    frames = read_frames(arguments, recipe.seed, recipe.load_options())
    norm_stats = read_statistics(arguments) or frames.statistics
    if norm_stats is None:
        # Computed once on each machine: the other processes read the cached result.
        with PartialState().local_main_process_first():
            norm_stats = compute_statistics(frames.train)
    setup = _infer_setup(frames.train, recipe, norm_stats)
    model = OpenVLAForActionPrediction.from_pretrained(
        arguments.model, **recipe.model_kwargs() | dict(arguments.model_kwargs)
    )
    if model.config.reasoning:
        raise ValueError(
            f"{arguments.model} is loaded with `reasoning=True`, but the data has no reasoning to learn from: leave "
            "out `reasoning=True` to train a policy that predicts only actions."
        )
    add_action_networks(model, setup.fields, "the recipe")
    model.norm_stats = norm_stats
    processor = AutoProcessor.from_pretrained(arguments.model)
    if setup.fields:
        processor.state_dim = model.config.proprio_dim
        # If the base already has these cameras, keep their order, which its weights have learned.
        if sorted(setup.cameras or []) != sorted(processor.cameras or []):
            processor.cameras = setup.cameras
    collator, eval_collator = _build_collators(model, processor, recipe, args.seed)
    return ActionTrainer(
        model=recipe.prepare(model),
        args=args,
        data_collator=collator,
        eval_collator=eval_collator,
        record={
            "base_model": str(arguments.model),
            "datasets": list(norm_stats),
            **_name_of_recipe(arguments),
            "preparation": describe_preparation(eval_collator.processor, model.config),
            "settings": _settings_for_card(recipe, args),
            "arguments": _settings_to_keep(arguments, recipe, args),
            "weights": arguments.weights,
            **frames.record,
        },
        train_dataset=frames.train,
        eval_dataset=frames.evaluation,
        decay_step=recipe.decay_step,
        matrix_rate=arguments.matrix_rate,
        callbacks=[EarlyStoppingCallback(arguments.patience)] if arguments.patience else None,
    )


def train(trainer: ActionTrainer, resume: bool = False) -> FinetuneResult:
    """Train, and save the result with a model card in the output folder.

    With `resume`, training continues from the last complete checkpoint. If no steps are left, its weights are the
    result.

    Raises:
        ValueError: There is no checkpoint to resume from, its settings or statistics differ, or a loss or a gradient
            is not finite.
        FileExistsError: The output folder contains a dataset or the checkpoint of another run.
        OSError: The disk is full.
        KeyboardInterrupt: Ctrl-C was pressed; the message says where the run was saved.
    """
    output, record = trainer.args.output_dir, trainer.record
    checkpoint = check_output(output, record, resume)
    if checkpoint is not None:
        check_sharding(checkpoint, trainer.is_fsdp_enabled)
        saved = json.loads(Path(checkpoint, STATISTICS_FILE).read_text(encoding="utf-8"))
        if saved != json.loads(json.dumps(trainer.data_collator.norm_stats)):
            raise ValueError(
                f"The statistics of the data differ from those that {checkpoint} was trained with, so its actions "
                "would change their meaning. Resume on the same data, or fine-tune its weights into another folder."
            )
    with SaveOnInterrupt() as interrupt:
        trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.stopped:
        raise KeyboardInterrupt(
            f"Stopped after step {trainer.state.global_step}, saved as {last_checkpoint(output)}. Continue with "
            "--resume (`resume=True`)."
        )
    steps = _steps_of_result(trainer)
    figures = _last_figures(trainer.state.log_history, steps)
    if steps < trainer.state.max_steps:
        record["settings"]["steps"] = f"{steps} (of up to {trainer.state.max_steps})"
    record |= {"figures": figures, "last_step": trainer.state.global_step}
    trainer.save_model(output)
    if trainer.args.should_save:
        card = write_card(Path(output), describe(output), output)
        Path(output, "README.md").write_text(card, encoding="utf-8")
    return FinetuneResult(figures, trainer.state.log_history)


# Settings


def _evaluation_settings(arguments: FinetuneArguments) -> dict[str, Any]:
    settings: dict[str, Any] = {"eval_strategy": "steps" if arguments.evaluates else "no"}
    if arguments.patience or arguments.keep_best:
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": arguments.keep_best or "loss"}
    if arguments.patience:
        # A resumed run continues the count of evaluations without an improvement.
        settings["restore_callback_states_from_checkpoint"] = True
    return settings


def _build_collators(
    model: OpenVLAForActionPrediction, processor: OpenVLAProcessor, recipe: Recipe, seed: int
) -> tuple[ActionCollator, ActionCollator]:
    """Build the collators for training and evaluation. The latter has the processor for prediction."""
    processor.strip_full_stop = True  # in training and prediction alike
    whole_image, for_prediction = copy.deepcopy(processor), copy.deepcopy(processor)
    whole_image.image_processor.center_crop_area = for_prediction.image_processor.center_crop_area = None
    augmentation = None
    if recipe.augment:
        augmentation = Augmentation(size=model.config.vision_config.image_size)
        for_prediction = augmentation.for_prediction(processor)
    shared: dict[str, Any] = {
        "action_tokenizer": model.action_tokenizer,
        "prompt_suffix_token_id": model.config.prompt_suffix_token_id,
        "norm_stats": model.norm_stats,
    }
    if model.config.is_parallel:
        collator: Any = functools.partial(ChunkCollator, config=model.config)
    else:
        collator = functools.partial(ActionCollator, normalization=model.config.action_normalization)
    return (
        collator(processor=whole_image, augment=augmentation, seed=seed, **shared),
        collator(processor=for_prediction, **shared),
    )


@dataclass(frozen=True)
class _PolicySetup:
    """Setup of a policy with new networks, inferred from the frames of a run.

    Args:
        fields: Fields of the config that the recipe sets.
        cameras: Names of the cameras, or `None` for one without a name.
    """

    fields: dict[str, Any]
    cameras: list[str] | None


def _infer_setup(frames: Dataset | IterableDataset, recipe: Recipe, norm_stats: Mapping[str, Any]) -> _PolicySetup:
    """Infer the cameras and the sizes of actions and states from the frames, for a recipe with new networks.

    Raises:
        ValueError: The datasets have actions or states of different sizes, or no state although the recipe uses it.
    """
    if recipe.action_head is None:
        return _PolicySetup({}, None)
    first = next(iter(frames))
    cameras = list(first["images"]) if "images" in first else None
    sizes = {}
    for part in ("action", "proprio") if recipe.use_state else ("action",):
        found = {name: len(of_one.get(part, {}).get("q01", ())) for name, of_one in norm_stats.items()}
        name, size = next(iter(found.items()))
        if not size:
            raise ValueError(
                f"The statistics of {name!r} have no state ('proprio'), but the recipe uses the robot's state. Give "
                "data with a state, or set use_state=false."
            )
        if other := next((one for one in found if found[one] != size), None):
            raise ValueError(
                f"The {part} of {name!r} has {size} dimensions, but that of {other!r} has {found[other]}. Train one "
                "policy for each, or use adapters that give both the same dimensions."
            )
        sizes[part] = size
    fields = recipe.action_fields(sizes["action"], len(cameras or [None]), sizes.get("proprio"))
    return _PolicySetup(fields, cameras)


def _name_of_recipe(arguments: FinetuneArguments) -> dict[str, str]:
    return {"recipe": arguments.recipe} if isinstance(arguments.recipe, str) else {}


def _settings_to_keep(arguments: FinetuneArguments, recipe: Recipe, args: TrainingArguments) -> dict[str, Any]:
    """Collect the settings that a resumed run must keep, including those that the order of the frames depends on."""
    return run_settings(recipe, args, arguments.patience) | arguments.order_of_frames


def _settings_for_card(recipe: Recipe, args: TrainingArguments) -> dict[str, Any]:
    """Collect the settings for the model card."""
    trained = ", ".join(recipe.trained)
    if recipe.uses_adapters:
        trained = f"adapters of rank {recipe.lora_rank}, alpha {recipe.lora_alpha}"
    chunk = {}
    if recipe.action_head is not None:
        trained += "; the networks of the action head, the state and FiLM in full"
        head = "action tokens" if recipe.action_head == "none" else f"{recipe.action_head} head"
        chunk["chunk"] = f"{counted(recipe.action_horizon, 'action')}, {head}{', FiLM' if recipe.use_film else ''}"
    decay = f", a tenth after {counted(recipe.decay_step, 'step')}" if recipe.decay_step else ""
    epochs = f"{args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)}"
    return {
        "trained": trained,
        **chunk,
        "frozen weights": "4 bits" if recipe.quantize else recipe.dtype,
        "steps": args.max_steps if args.max_steps > 0 else epochs,
        "samples per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}{decay}",
        "weight decay": args.weight_decay,
        "augmentation": "random crops and colours" if recipe.augment else "none",
        "seed": args.seed,
    }


# Results


def _find_result(args: TrainingArguments) -> FinetuneResult | None:
    """Return the result of a resumed run, or `None` if steps are left or the result was not saved after the last."""
    output = Path(args.output_dir)
    is_whole = any((output / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG))  # written last
    file = output / TRAINING_FILE
    record = json.loads(file.read_text(encoding="utf-8")) if is_whole and file.is_file() else {}
    if record.get("last_step") != args.max_steps:
        return None
    return FinetuneResult(record["figures"], read_state(str(last_checkpoint(output))).log_history)


def _steps_of_result(trainer: ActionTrainer) -> int:
    """Return the number of steps behind the final weights: that of the best checkpoint if it was loaded."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        return int(state.best_global_step)
    return state.global_step


def _last_figures(history: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Return the last value of each figure that was logged up to a step."""
    figures: dict[str, float] = {}
    for entry in history:
        if entry["step"] > steps:
            break
        numbers = {name: value for name, value in entry.items() if isinstance(value, (int, float))}
        # With a gradient scaler, a step that was skipped has an infinite gradient norm, which JSON can't represent.
        figures |= {name: value for name, value in numbers.items() if isfinite(value)}
    return figures


__all__ = [
    "FinetuneArguments",
    "FinetuneResult",
    "TrainingData",
    "build_trainer",
    "check_run",
    "finetune",
    "train",
]
