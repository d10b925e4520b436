"""Fine-tune a policy on a data set of frames: the steps behind `openvla-hf finetune`."""

import copy
import json
import os
from math import isfinite
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import AutoProcessor, EarlyStoppingCallback, TrainingArguments, set_seed

from ..checkpoints.describe import describe
from ..checkpoints.model_card import TRAINING_FILE, write_card
from ..data import Augmentation, compute_statistics, load_statistics
from ..data.splits import read_split
from ..modeling.checkpoint_loading import STATISTICS_FILE
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from .collator import ActionCollator
from .interrupt import SaveOnInterrupt
from .recipes import Recipe
from .runs import check_output, run_settings
from .trainer import ActionTrainer, last_checkpoint


def check_run(
    model_id: str | os.PathLike,
    output: str | os.PathLike,
    recipe: Recipe,
    *,
    resume: bool = False,
    patience: int | None = None,
    run: dict[str, Any] | None = None,
    **arguments: Any,
) -> TrainingArguments:
    """Check the settings, the trackers and the folder of a run before anything is loaded.

    Args:
        model_id: See `build_trainer`, as for the others.
        output: Folder of the checkpoints.
        recipe: What is trained, and how.
        resume: Whether the run in `output` is to be continued.
        patience: Evaluations without an improvement after which training stops; by default it does not.
        run: What a resumed run must share beside its settings, as far as it is known: `weights` (of the data sets).
        arguments: Of `TrainingArguments`; they win over the recipe's.

    Returns:
        The arguments of the run.

    Raises:
        ValueError: A setting has an unknown name or an impossible value, or the run can't be resumed with it.
        ImportError: A tracker is not installed.
        FileExistsError: The output folder holds a checkpoint of another run.
    """
    if "output_dir" in arguments:
        raise ValueError("The output folder is given as `output`, not as the setting output_dir.")
    args = recipe.training_arguments(os.fspath(output), **arguments)
    settings = run_settings(recipe, args, patience)
    check_output(output, {"base_model": str(model_id), "arguments": settings, **(run or {})}, resume)
    return args


def build_trainer(
    model_id: str | os.PathLike,
    train_data: Dataset | IterableDataset,
    output: str | os.PathLike,
    recipe: Recipe,
    *,
    eval_data: Dataset | IterableDataset | dict[str, Any] | None = None,
    norm_stats: dict[str, Any] | str | os.PathLike | None = None,
    run: dict[str, Any] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    patience: int | None = None,
    **arguments: Any,
) -> ActionTrainer:
    """Load the base and put model, data and recipe together.

    Args:
        model_id: Folder or Hub id of the base.
        train_data: Frames, as `openvla_hf.data.load` gives them.
        output: Folder of the checkpoints.
        recipe: What is trained, and how.
        eval_data: Frames to evaluate on, or several sets of them by name.
        norm_stats: Statistics by data set, or a file or folder that holds them; computed from `train_data` by default.
        run: What the model card is to say of the run, such as `datasets` and `recipe`.
        model_kwargs: More arguments of `from_pretrained` for the base.
        patience: Evaluations without an improvement after which training stops; by default it does not. It needs
            `load_best_model_at_end=True`, with which the result has the weights of the best checkpoint.
        arguments: Of `TrainingArguments`; they win over the recipe's.

    Raises:
        ValueError: The recipe does not fit the model, or the data have no frames, or a setting can't be.
    """
    set_seed(recipe.seed)
    args = recipe.training_arguments(os.fspath(output), **arguments)
    if norm_stats is None:
        # Once on each machine: the others read what the first has cached.
        with PartialState().local_main_process_first():
            norm_stats = compute_statistics(train_data)
    elif not isinstance(norm_stats, dict):
        norm_stats = load_statistics(norm_stats)
    model = OpenVLAForActionPrediction.from_pretrained(model_id, **recipe.model_kwargs() | (model_kwargs or {}))
    model.norm_stats = norm_stats
    processor = AutoProcessor.from_pretrained(model_id)
    processor.strip_full_stop = True  # in training and prediction alike
    whole_image, for_prediction = copy.deepcopy(processor), copy.deepcopy(processor)
    whole_image.image_processor.center_crop_area = for_prediction.image_processor.center_crop_area = None
    augmentation = None
    if recipe.augment:
        augmentation = Augmentation(size=model.config.vision_config.image_size)
        for_prediction = augmentation.for_prediction(processor)
    shared = {
        "action_tokenizer": model.action_tokenizer,
        "prompt_suffix_token_id": model.config.prompt_suffix_token_id,
        "norm_stats": norm_stats,
    }
    run = {
        "base_model": str(model_id),
        "datasets": list(norm_stats),
        "settings": _settings(recipe, args),
        "arguments": run_settings(recipe, args, patience),
        **(run or {}),
    }
    return ActionTrainer(
        model=recipe.prepare(model),
        args=args,
        data_collator=ActionCollator(whole_image, augment=augmentation, seed=args.seed, **shared),
        eval_collator=ActionCollator(for_prediction, **shared),
        run_files={TRAINING_FILE: json.dumps(run, indent=2)},
        train_dataset=train_data,
        eval_dataset=eval_data,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
    )


def _settings(recipe: Recipe, args: TrainingArguments) -> dict[str, Any]:
    """What a reader of the model card wants to know of a run."""
    adapters = f"adapters of rank {recipe.lora_rank}, alpha {recipe.lora_alpha}"
    return {
        "trained": adapters if recipe.uses_adapters else ", ".join(recipe.trained),
        "weights that stay": "4 bits" if recipe.quantize else recipe.dtype,
        "steps": args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "samples a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "weight decay": args.weight_decay,
        "augmentation": "random crops and colours" if recipe.augment else "none",
        "seed": args.seed,
    }


def finetune(trainer: ActionTrainer, resume: bool = False) -> dict[str, float]:
    """Train, from the last complete checkpoint with `resume`, and leave the result, with a card, in the output folder.

    Returns:
        The last figures logged: loss, action accuracy, L1, and those of the evaluation if there was one.

    Raises:
        ValueError: There is nothing to resume from, or it was trained with other settings or on other statistics, or
            a loss is not finite.
        FileExistsError: The output folder holds a checkpoint of another run.
        KeyboardInterrupt: Ctrl-C was pressed; a checkpoint is saved, and the message says how to go on.
    """
    output = trainer.args.output_dir
    run = json.loads(trainer.run_files[TRAINING_FILE])
    checkpoint = check_output(output, run, resume)
    if checkpoint is not None:
        saved = json.loads(Path(checkpoint, STATISTICS_FILE).read_text(encoding="utf-8"))
        if saved != json.loads(json.dumps(trainer.data_collator.norm_stats)):
            raise ValueError(
                f"The statistics of the data are not those that {checkpoint} was trained with, so its actions would "
                "change their meaning: resume on the same data, or fine-tune its weights into another folder."
            )
    with SaveOnInterrupt() as interrupt:
        trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.stopped:
        raise KeyboardInterrupt(
            f"Stopped after step {trainer.state.global_step}, saved as {last_checkpoint(output)}. Continue with "
            "--resume (`resume=True`)."
        )
    figures: dict[str, float] = {}
    steps = _steps_of_result(trainer)
    for entry in trainer.state.log_history:
        if entry["step"] > steps:
            break
        numbers = {name: value for name, value in entry.items() if isinstance(value, (int, float))}
        # With a gradient scaler, a step that was skipped has an infinite gradient norm, which JSON can't hold.
        figures |= {name: value for name, value in numbers.items() if isfinite(value)}
    if steps < trainer.state.max_steps:
        run["settings"]["steps"] = f"{steps} (of up to {trainer.state.max_steps})"
    trainer.run_files[TRAINING_FILE] = json.dumps(run | {"figures": figures}, indent=2)
    trainer.save_model(output)
    if trainer.args.should_save:
        card = write_card(Path(output), describe(output), output)
        Path(output, "README.md").write_text(card, encoding="utf-8")
    return figures


def _steps_of_result(trainer: ActionTrainer) -> int:
    """Steps after which the weights were as they are now: those of the best checkpoint, if it was loaded."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        return int(state.best_global_step)
    return state.global_step


__all__ = ["build_trainer", "check_run", "finetune", "read_split"]
