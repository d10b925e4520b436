"""transformers.Trainer for policies: loss on the action's tokens, action metrics, checkpoints that are complete.

Shapes: B batch, T tokens, K supervised positions of the row that has most, V vocabulary.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..checkpoints.model_card import TRAINING_FILE
from ..data.streams import EvaluationStream, TrainingStream
from ..modeling.checkpoint_files import STATISTICS_FILE
from ..modeling.folder_writing import UNFINISHED, written_whole
from .collator import IGNORED, ActionCollator


class ActionTrainer(Trainer):
    """Fine-tunes a policy on frames; everything that `Trainer` and `TrainingArguments` can do stays as it is.

    - Only supervised positions go through the LM head, and the loss is the mean over the action tokens (and stop
      tokens) of all processes and accumulated batches together.
    - `action_accuracy` (arg max over the vocabulary equals the label) and `action_l1` (mean distance of decoded,
      normalised actions) are logged in training and evaluation, and for each data set where there are several.
      The stop token does not count.
    - A stream starts over where it ends, so steps are counted and not epochs. All workers of all processes draw its
      frames equally often, and a resumed run passes over the frames that it has used without decoding them.
    - Training stops at the first loss or gradient that is not finite, and weights that make the loss so are not saved.
    - A checkpoint is complete: adapter or model, statistics, processor and model card. It is written aside and gets
      its name when nothing is missing, so a run that is killed resumes from one that is whole.

    Args:
        model: From `Recipe.prepare`.
        args: From `Recipe.training_arguments`, for instance.
        data_collator: What makes batches of the frames; its statistics go into every checkpoint.
        train_dataset: Frames, as `openvla_hf.data.load` gives them.
        eval_collator: The same for evaluation, without augmentation; its processor goes into every checkpoint.
            `data_collator` by default.
        record: What `training.json` in every checkpoint says of the run, ready for JSON. It may be added to until the
            run ends.
    """

    data_collator: ActionCollator

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data_collator: ActionCollator,
        train_dataset: Any = None,
        eval_collator: ActionCollator | None = None,
        record: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        args.logging_nan_inf_filter = False  # it would hide the losses that must end the run
        super().__init__(model=model, args=args, data_collator=data_collator, train_dataset=train_dataset, **kwargs)
        self.eval_collator = eval_collator or data_collator
        self.record = record or {}
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_SamplesProgress)
        self.add_callback(_RunPosition(data_collator))
        self.add_callback(_Intervals())
        self.model_accepts_loss_kwargs = True  # asks for the number of supervised tokens, which `compute_loss` takes
        self.label_names = ["labels"]
        self.can_return_loss = True
        tokenizer, config = data_collator.action_tokenizer, self._policy.config
        self._value_of_id = torch.from_numpy(tokenizer.decode(np.arange(config.text_config.vocab_size)))
        self._stop_id = data_collator.processor.tokenizer.eos_token_id
        self._dataset_names = list(data_collator.norm_stats or [None])
        # Of each data set: tokens, right ones, sum of distances.
        self._counts = torch.zeros(len(self._dataset_names), 3, dtype=torch.float64)
        self._last_batch: dict[str, torch.Tensor] | None = None
        self._step_loss = torch.zeros(())

    @property
    def _policy(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`; the processes share a stream by frames and not by whole files."""
        if not isinstance(self.train_dataset, datasets.IterableDataset):
            return super().get_train_dataloader()
        args = self.args
        stream = TrainingStream(self.train_dataset, args.process_index, args.world_size, self._train_batch_size)
        return self._load_stream(stream, self._train_batch_size, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer.get_eval_dataloader`, without augmentation; the processes share a stream by frames."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        if isinstance(data, datasets.IterableDataset):
            stream = EvaluationStream(data, self.args.process_index, self.args.world_size)
            return self._load_stream(stream, self.args.eval_batch_size, self.eval_collator)
        of_training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = of_training

    def _load_stream(
        self, stream: TrainingStream | EvaluationStream, batch_size: int, collator: ActionCollator
    ) -> DataLoader:
        """A loader of what is this process's own already, which accelerate must not share out once more."""
        args = self.args
        loader = DataLoader(
            stream,
            batch_size=batch_size,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    # Loss and metrics

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross entropy at the supervised positions alone."""
        inputs = dict(inputs)
        dataset_index = inputs.pop("dataset_index", None)
        positions, targets = supervised_positions(inputs.pop("labels"))
        outputs = model(**inputs, logits_to_keep=positions, use_cache=False)
        logits = outputs.logits.float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        if num_items_in_batch is None:
            loss = loss / targets.ne(IGNORED).sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        self._count(logits.detach().argmax(-1), targets, dataset_index)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As `Trainer.training_step`; the loss is checked when the gradients of the step are complete."""
        self._last_batch = inputs
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = self._step_loss.to(loss.device) + loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As `Trainer._get_grad_norm`, which runs in every process just before the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # A loss that is not finite in one process must stop all of them.
        loss = float(self.accelerator.reduce(self._step_loss, reduction="sum"))
        self._step_loss = torch.zeros_like(self._step_loss)
        when = f"at step {self.state.global_step + 1}"
        self._require_finite(loss, "loss", when)
        # DeepSpeed doesn't always know the norm, and a gradient scaler skips the steps whose gradients overflow.
        if grad_norm is not None and self.accelerator.scaler is None:
            self._require_finite(float(grad_norm), "gradient norm", when)
        return grad_norm

    def _require_finite(self, value: float, name: str, when: str) -> None:
        if math.isfinite(value):
            return
        checkpoint = last_checkpoint(self.args.output_dir)
        raise ValueError(
            f"The {name} is {value} {when}, so training stopped without saving. "
            + (f"The last good checkpoint is {checkpoint}. " if checkpoint else "No checkpoint had been saved. ")
            + "Start again in another folder with a lower learning rate."
        )

    def _count(self, predicted: torch.Tensor, targets: torch.Tensor, dataset_index: torch.Tensor | None) -> None:
        """Add a batch's ids (B, K) to the metrics."""
        is_action = targets.ne(IGNORED) & targets.ne(self._stop_id)
        values = self._value_of_id = self._value_of_id.to(targets.device)
        distance = (values[predicted] - values[targets.clamp(min=0)]).abs()
        of_rows = torch.stack(
            [(one * is_action).sum(1).double() for one in (torch.ones_like(distance), predicted == targets, distance)],
            dim=1,
        )
        if dataset_index is None:
            dataset_index = torch.zeros(len(targets), dtype=torch.long, device=targets.device)
        self._counts = self._counts.to(targets.device).index_add_(0, dataset_index, of_rows)

    def _take_metrics(self, prefix: str = "") -> dict[str, float]:
        """Metrics since the last call, over all processes."""
        counts = self.accelerator.reduce(self._counts, reduction="sum").cpu()
        self._counts = torch.zeros_like(self._counts)
        by_name = {f"/{name}": row for name, row in zip(self._dataset_names, counts, strict=True) if len(counts) > 1}
        metrics = {}
        for name, (tokens, right, distance) in {"": counts.sum(0), **by_name}.items():
            if tokens:
                metrics[f"{prefix}action_accuracy{name}"] = float(right / tokens)
                metrics[f"{prefix}action_l1{name}"] = float(distance / tokens)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the action metrics of the steps since the last one."""
        if "loss" in logs:
            logs = logs | self._take_metrics()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, with the action metrics."""
        of_training, self._counts = self._counts, torch.zeros_like(self._counts)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._take_metrics(f"{metric_key_prefix}_"))
        self._counts = of_training
        loss = output.metrics.get(f"{metric_key_prefix}_loss", 0.0)
        self._require_finite(loss, "evaluation loss", f"after step {self.state.global_step}")
        return output

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, if the weights still give a finite loss on the last batch of training."""
        self._check_weights()
        super().save_model(output_dir, _internal_call)

    @torch.no_grad()
    def _check_weights(self) -> None:
        """The loss of a step says nothing of the weights that the step makes: compute it again with them."""
        if self._last_batch is None:
            return
        of_training, self._counts = self._counts, torch.zeros_like(self._counts)
        # In training mode: in evaluation mode bitsandbytes repacks the base's 4-bit weights on a CPU and rounds them.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, self._prepare_inputs(self._last_batch)).detach()
        self._counts = of_training
        loss = self.accelerator.reduce(loss, reduction="sum")
        self._require_finite(float(loss), "loss", f"after step {self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Everything that makes the folder a policy: no part of it is a pickle."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        # The base's embeddings are in the base, also where the head has an adapter.
        more = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        statistics = self.data_collator.norm_stats or self._policy.norm_stats
        with written_whole(output_dir) as folder:
            model.save_pretrained(folder, state_dict=state_dict, **more)
            self.eval_collator.processor.save_pretrained(folder)
            contents = {STATISTICS_FILE: statistics} | ({TRAINING_FILE: self.record} if self.record else {})
            for name, content in contents.items():
                (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self._is_saving else run_dir

    _is_saving = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save aside, then give the folder its name: what is called a checkpoint is whole."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, final = run_dir / UNFINISHED / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # what the writers of files raise on a full disk
            raise OSError(
                f"{final} can't be written ({error.__cause__ or error}): free some space and resume, the checkpoints "
                "before it are whole."
            ) from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(aside):  # in every process: each loads it at the end
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
            if final.exists():  # of a run that went on from an earlier checkpoint
                final.rename(run_dir / UNFINISHED / "replaced")
            aside.rename(final)
            shutil.rmtree(run_dir / UNFINISHED)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: a checkpoint is pushed once it has its name."""


class _SamplesProgress(ProgressCallback):
    """The progress bar of Trainer, in samples."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *more: Any, **kwargs: Any) -> None:
        """The bar counts steps: let it show what they are in samples."""
        super().on_train_begin(args, state, *more, **kwargs)
        if self.training_bar is not None:
            self.training_bar.unit = " samples"
            self.training_bar.unit_scale = args.train_batch_size * args.gradient_accumulation_steps * args.world_size


class _Intervals(TrainerCallback):
    """Lets a resumed run save, evaluate and log as often as it is told, and not as the run before it was."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """The state comes from the checkpoint, with the intervals of then."""
        state.compute_steps(args, state.max_steps)


class _RunPosition(TrainerCallback):
    """Tells the collator, or the stream, which batch of the run an epoch begins with."""

    def __init__(self, collator: ActionCollator):
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, train_dataloader: DataLoader, **__: Any
    ) -> None:
        """Before the workers of the epoch start, each with a copy of the collator and the dataset.

        A table is entered where the run goes on. A stream is one epoch: its used frames are passed over.
        """
        first, stream = state.global_step * args.gradient_accumulation_steps, train_dataloader.dataset
        if isinstance(stream, TrainingStream):
            stream.first_batch, first = first, 0
        self.collator.start(first, args.process_index, args.world_size)


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the labels (B, T) are predicted, and what they are: both (B, K), K of the row that has most.

    A position is one before its label. Rows with fewer are filled up with their last position and ignored targets.
    """
    supervised = labels[:, 1:].ne(IGNORED)
    most = int(supervised.sum(1).max())
    # Stable, so that positions stay in order: the supervised ones come first.
    positions = supervised.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    targets = labels[:, 1:].gather(1, positions)
    return positions, targets


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint of a run, or `None`: what was being written when it ended has no name."""
    steps = {
        int(number): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.rsplit("-", 1)[1]).isdigit() and (path / TRAINER_STATE_NAME).is_file()
    }
    return str(steps[max(steps)]) if steps else None


__all__ = ["ActionTrainer", "last_checkpoint", "supervised_positions"]
