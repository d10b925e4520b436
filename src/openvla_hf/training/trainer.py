"""A `transformers.Trainer` for policies: loss on the action tokens, action metrics, complete checkpoints.

Shapes: B batch, T tokens, K supervised positions of the row that has the most, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_callback import ExportableState

from ..checkpoints.model_card import TRAINING_FILE
from ..data.streams import EvaluationStream, TrainingStream
from ..modeling.action_networks import action_fields
from ..modeling.checkpoint_files import ADAPTER_POLICY, STATISTICS_FILE
from .checkpoint_saving import WholeCheckpointTrainer, last_checkpoint
from .collator import IGNORED, ActionCollator
from .metrics import ActionMetrics
from .runs import check_steps
from .sharding import configure_sharding, in_its_own_class
from .throughput import Throughput, find_matrix_rate


class ActionTrainer(WholeCheckpointTrainer):
    """Fine-tune a policy on frames, with everything that `Trainer` and `TrainingArguments` offer.

    - Only supervised positions go through the LM head, and the loss is the mean over the action tokens (and stop
      tokens) of all processes and accumulated batches together.
    - `action_accuracy`, `action_l1` and `loss` (see `ActionMetrics`) are logged in training and evaluation, and for
      each dataset if there are several.
    - A stream restarts when it is exhausted, so its runs are measured in steps, not in epochs. Together, the workers
      of all processes draw its frames equally often. A resumed run skips the frames it has used without decoding them.
    - The throughput is logged (see `Throughput`).
    - Training stops at the first loss or gradient that is not finite. Weights whose loss is not finite are not saved.
    - A checkpoint is complete: adapter or model, statistics, processor and the record of the run. It is written to a
      temporary folder and gets its name when it is complete, so a killed run resumes from a complete checkpoint.

    Args:
        model: Model from `Recipe.prepare`.
        args: Arguments, for example from `Recipe.training_arguments`.
        data_collator: Makes batches of the frames; its statistics go into every checkpoint.
        train_dataset: Frames, as `openvla_hf.data.load` gives them.
        eval_collator: The same for evaluation, without augmentation; its processor goes into every checkpoint.
            `data_collator` by default.
        record: Content of `training.json` in every checkpoint, ready for JSON. Entries may be added until the run
            ends.
        decay_step: Step after which the learning rate drops to a tenth; 0 for never.
        matrix_rate: Operations per second of a GPU for matrix products, to log the share that is used; by default from
            `MATRIX_RATES`.
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
        decay_step: int = 0,
        matrix_rate: float | None = None,
        **kwargs: Any,
    ):
        configure_sharding(args, model)
        super().__init__(model=model, args=args, data_collator=data_collator, train_dataset=train_dataset, **kwargs)
        self.eval_collator = eval_collator or data_collator
        self.record = record or {}
        self.decay_step = decay_step
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_SamplesProgress)
        self.add_callback(_Epoch(data_collator))
        self.add_callback(StreamPosition())
        self.add_callback(_Intervals())
        self.add_callback(_BeforeStep(self.check_step))
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.throughput = Throughput(model, matrix_rate or find_matrix_rate(args.device, dtype))
        self.add_callback(self.throughput)
        self.model_accepts_loss_kwargs = True  # makes `Trainer` pass the number of supervised tokens to `compute_loss`
        self.label_names = ["labels"]
        self.can_return_loss = True
        vocabulary = self._policy.config.text_config.vocab_size
        stop_id = data_collator.processor.tokenizer.eos_token_id
        self.training_metrics, self.evaluation_metrics = (
            ActionMetrics(data_collator.action_tokenizer, vocabulary, stop_id, list(data_collator.norm_stats or ()))
            for _ in range(2)
        )
        self._last_batch: dict[str, torch.Tensor] | None = None
        self._step_loss = torch.zeros(())
        self._batches_of_step = 0
        self._checkpoint: Any = None
        self._resumed_step = 0

    @property
    def _policy(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    # Steps

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train to the last step. If the checkpoint has already reached it, only load the checkpoint.

        Raises:
            ValueError: The checkpoint has more steps than the run.
        """
        found = last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
        self._checkpoint = found or resume_from_checkpoint
        return super().train(self._checkpoint, *args, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """Compute the numbers of steps and epochs. A run that has no steps left gets no epochs.

        `Trainer` takes at least one step in an epoch.
        """
        epochs, *others, steps = super().set_initial_training_values(args, dataloader)
        resumes = self._checkpoint not in (None, False, True)
        self._resumed_step = check_steps(self._checkpoint, steps) if resumes else 0
        return (0 if self._resumed_step == steps else epochs), *others, steps

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Make the loader of the training data. Processes share a stream frame by frame instead of file by file."""
        if not isinstance(self.train_dataset, datasets.IterableDataset):
            return super().get_train_dataloader()
        args = self.args
        # The batch size that `auto_find_batch_size` has found, if it is on.
        batch_size = self.get_total_train_batch_size(args) // (args.gradient_accumulation_steps * args.world_size)
        stream = TrainingStream(self.train_dataset, args.process_index, args.world_size, batch_size)
        settings = self._loader_settings() | {"persistent_workers": args.dataloader_persistent_workers}
        return self._prepare_stream(DataLoader(stream, batch_size, collate_fn=self.data_collator, **settings))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Make a loader of evaluation data, without augmentation. Processes share a stream frame by frame.

        Args:
            eval_dataset: Frames, or the name of one of several sets; `self.eval_dataset` by default.
        """
        args = self.args
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        if data is None:
            raise ValueError("There are no frames to evaluate on. Give `eval_dataset`.")
        settings = self._loader_settings() | {"collate_fn": self.eval_collator}
        if isinstance(data, datasets.IterableDataset):
            stream = EvaluationStream(data, args.process_index, args.world_size)
            return self._prepare_stream(DataLoader(stream, args.eval_batch_size, **settings))
        loader = DataLoader(data, args.eval_batch_size, drop_last=args.dataloader_drop_last, **settings)
        return self.accelerator.prepare(loader)

    def _loader_settings(self) -> dict[str, Any]:
        args = self.args
        return {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "in_order": args.dataloader_in_order,
        }

    def _prepare_stream(self, loader: DataLoader) -> DataLoader:
        """Prepare a loader of this process's share of a stream; `Accelerator.prepare` would divide it again."""
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of the learning rate, which drops to a tenth after `decay_step` steps if that is set."""
        if not self.decay_step:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / (warmup + 1)) * (0.1 if step >= self.decay_step else 1.0)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    # Loss and metrics

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of the action tokens or of the chunk, and count the batch in the metrics."""
        loss, outputs, targets = self._forward(model, inputs, num_items_in_batch)
        if model.training:
            self._last_batch = inputs
        metrics = self.training_metrics if model.training else self.evaluation_metrics
        index = inputs.get("dataset_index")
        if outputs.logits is None:
            metrics.update_chunks(outputs.actions.detach(), inputs["actions"], targets, index)
        else:
            logits = outputs.logits.detach()
            metrics.update(logits.argmax(-1), targets, index, losses=token_losses(logits, targets))
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Return the loss of a batch, the model's outputs, and the target ids (B, K)."""
        given = {name: value for name, value in inputs.items() if name not in ("labels", "dataset_index")}
        if "actions" in inputs:
            targets = inputs["labels"][:, 1:]
            if self._policy.config.action_head == "diffusion":
                given |= self._draw_noise(inputs["actions"])
            outputs = model(**given, num_items_in_batch=num_items_in_batch)
            loss = outputs.loss
        else:
            positions, targets = supervised_positions(inputs["labels"])
            outputs = model(**given, logits_to_keep=positions, use_cache=False)
            loss = token_losses(outputs.logits, targets).sum()
            loss = loss / (targets.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is None:
            return loss, outputs, targets
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return loss, outputs, targets

    def _draw_noise(self, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Draw the noise and its levels for the chunks (B, K, A) of a batch.

        The draws differ between processes and batches. PyTorch's own generator has the same seed in all processes.
        """
        place = [self.args.seed, self.state.global_step, self.args.process_index, self._batches_of_step]
        self._batches_of_step += 1
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        levels = self._policy.config.diffusion_steps
        noise = {
            "noise": torch.randn(actions.shape, generator=generator),
            "timesteps": torch.randint(levels, (len(actions),), generator=generator),
        }
        return {name: tensor.to(actions.device) for name, tensor in noise.items()}

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the gradients of a batch, and add its loss to the step's for `check_step`."""
        self.throughput.add(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = self._step_loss.to(loss.device) + loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log figures, with the action metrics and the throughput of the training steps since the last log."""
        if "train_loss" in logs and self.state.global_step == self._resumed_step:
            return  # a summary of no steps
        if "loss" in logs:
            logs = self.training_metrics.take() | self.throughput.take() | logs
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, with the action metrics.

        Raises:
            ValueError: The loss is not finite.
        """
        self._batches_of_step = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self.evaluation_metrics.take(f"{metric_key_prefix}_"))
        loss = output.metrics.get(f"{metric_key_prefix}_loss", 0.0)
        self._require_finite(loss, "evaluation loss", f"after step {self.state.global_step}")
        return output

    # Runs that diverge

    def check_step(self) -> None:
        """Check the loss and the gradients of a step before the optimizer uses them.

        Raises:
            ValueError: One of them is not finite, in any process. The message names the last good checkpoint.
        """
        when = f"at step {self.state.global_step + 1}"
        # If the loss of one process is not finite, all processes must stop.
        loss = float(self.accelerator.reduce(self._step_loss, reduction="sum"))
        self._step_loss = torch.zeros_like(self._step_loss)
        self._batches_of_step = 0
        self._require_finite(loss, "loss", when)
        if self.accelerator.scaler is not None:  # the scaler skips steps whose gradients overflow
            return
        # Clipping to infinity changes nothing and returns the norm, even if processes shard the model.
        norm = self.accelerator.clip_grad_norm_(self.model_wrapped.parameters(), math.inf)
        if norm is not None:  # DeepSpeed does not always know the norm
            self._require_finite(float(norm), "gradient norm", when)

    def _require_finite(self, value: float, name: str, when: str) -> None:
        if math.isfinite(value):
            return
        checkpoint = last_checkpoint(self.args.output_dir)
        raise ValueError(
            f"The {name} is {value} {when}, so training stopped without saving. "
            + (f"The last good checkpoint is {checkpoint}. " if checkpoint else "No checkpoint had been saved. ")
            + "Start again in another folder with a lower learning rate."
        )

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, if its weights give a finite loss on the last training batch.

        Raises:
            ValueError: The loss is not finite.
        """
        self._check_weights()
        super().save_model(output_dir, _internal_call)

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Check the loss of the last batch with the current weights, which the optimizer has changed since."""
        if self._last_batch is None:
            return
        # In training mode: in evaluation mode bitsandbytes repacks the base's 4-bit weights on a CPU and rounds them.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            loss, _, _ = self._forward(self.model_wrapped, self._last_batch)
        loss = self.accelerator.reduce(loss, reduction="sum")
        self._require_finite(float(loss), "loss", f"after step {self.state.global_step}")

    def write_policy(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write the adapter or the model, the processor, the statistics and the record of the run, without pickles."""
        model = self.accelerator.unwrap_model(self.model)
        # The base contains the embeddings. peft would save them too if the head has an adapter.
        more = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        with in_its_own_class(model):
            if state_dict != {}:
                model.save_pretrained(folder, state_dict=state_dict, **more)
            elif isinstance(model, PeftModel):
                model.active_peft_config.save_pretrained(folder)
            else:
                custom_object_save(model, folder, config=model.config)
                model.config.save_pretrained(folder)
        self.eval_collator.processor.save_pretrained(folder)
        contents: dict[str, Any] = {STATISTICS_FILE: self.data_collator.norm_stats or self._policy.norm_stats}
        if isinstance(model, PeftModel) and self._policy.config.is_parallel:
            contents[ADAPTER_POLICY] = action_fields(self._policy.config)
        if self.record:
            contents[TRAINING_FILE] = self.record
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


class _SamplesProgress(ProgressCallback):
    """The progress bar of Trainer, in samples instead of steps."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *more: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, *more, **kwargs)
        if self.training_bar is not None:
            self.training_bar.unit = " samples"
            self.training_bar.unit_scale = args.train_batch_size * args.gradient_accumulation_steps * args.world_size


class _Intervals(TrainerCallback):
    """Make a resumed run save, evaluate and log at its own intervals instead of those of the checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        state.compute_steps(args, state.max_steps)


class _Epoch(TrainerCallback):
    """Pass the epoch to the collator before the workers of the epoch start."""

    def __init__(self, collator: ActionCollator):
        self.collator = collator

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.collator.set_epoch(int(state.epoch or 0))


class StreamPosition(TrainerCallback, ExportableState):
    """Let a stream continue where a resumed run stopped, in the order in which the run began.

    This happens before the workers start. Every checkpoint contains the order. `Trainer` itself skips the used rows
    of a table.

    Args:
        order: See `TrainingStream.order`.
    """

    def __init__(self, order: Sequence[int] | None = None):
        self.order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, train_dataloader: DataLoader, **__: Any
    ) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if not isinstance(stream := train_dataloader.dataset, TrainingStream):
            return
        readers = args.world_size * max(1, args.dataloader_num_workers)
        self.order = stream.order = tuple(saved["args"]["order"] or (readers, stream.batch_size))
        stream.first_batch = state.global_step * args.gradient_accumulation_steps

    def state(self) -> dict[str, Any]:
        """Return the order, which is the content of checkpoints."""
        return {"args": {"order": self.order}, "attributes": {}}


class _BeforeStep(TrainerCallback):
    """Call a function when the gradients of a step are complete and clipped."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.check()


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the cross entropy (B, K) of logits (B, K, V); 0 where the targets (B, K) are `IGNORED`."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets)


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where the labels are predicted, one position before each.

    Args:
        labels: Token ids or `IGNORED` (B, T).

    Returns:
        Positions and targets, both (B, K). Rows with fewer than K labels are padded with positions whose targets are
        ignored.
    """
    supervised = labels[:, 1:].ne(IGNORED)
    most = int(supervised.sum(1).max())
    # Stable, so that positions stay in order: the supervised ones come first.
    positions = supervised.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    targets = labels[:, 1:].gather(1, positions)
    return positions, targets


__all__ = ["ActionTrainer", "last_checkpoint", "supervised_positions"]
