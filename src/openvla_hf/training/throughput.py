"""Throughput of a training run: samples and tokens a second, and the share of the matrix rate of the GPUs."""

import time
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from .recipes import LANGUAGE_MODEL, PROJECTOR, VISION


# Operations per second of dense bfloat16 matrix products, from the makers' data sheets, by a part of the name that
# PyTorch gives the GPU. The first match counts.
MATRIX_RATES = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


class Throughput(TrainerCallback):
    """Measure the throughput of the steps between two logs, without evaluation and saving.

    - `samples_per_second` and `tokens_per_second`: of all processes together. Tokens are the positions of the language
      model, including those of the images and without padding.
    - `mfu`: operations of the linear layers (see `training_operations`) as a share of the matrix rate of all GPUs.

    Args:
        model: Prepared by a recipe, see `Recipe.prepare`.
        matrix_rate: Operations per second of one GPU, or `None` to leave out `mfu`.
    """

    def __init__(self, model: nn.Module, matrix_rate: float | None):
        self.of_sample, self.of_token = training_operations(model)
        self.matrix_rate = matrix_rate
        self.counts = torch.zeros(2)
        self.seconds = 0.0
        self._since = time.perf_counter()

    def add(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count the samples and the tokens of a batch."""
        mask = inputs["attention_mask"]
        # Actions of a chunk have positions of their own.
        tokens = mask.sum() + (inputs["labels"].numel() if "actions" in inputs else 0)
        self.counts = self.counts.to(mask.device) + torch.stack([torch.full_like(tokens, len(mask)), tokens])

    def take(self) -> dict[str, float]:
        """Return the figures since the last call, and start again."""
        samples, tokens = reduce(self.counts, reduction="sum").tolist()
        seconds, self.seconds = self.seconds, 0.0
        self.counts = torch.zeros_like(self.counts)
        if not seconds:
            return {}
        figures = {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}
        if self.matrix_rate is not None:
            operations = samples * self.of_sample + tokens * self.of_token
            figures["mfu"] = operations / seconds / (self.matrix_rate * PartialState().num_processes)
        return figures

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def _leave_out_time(self) -> None:
        self._since = time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._leave_out_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Add the time of a step."""
        self._count_time()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Leave out the time of an evaluation."""
        self._leave_out_time()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leave out the time of saving."""
        self._leave_out_time()


def training_operations(model: nn.Module) -> tuple[float, float]:
    """Count the operations of the linear layers in a training step, for each sample and each token.

    A layer takes part in one matrix product of the forward pass. In the backward pass, it takes part in another if
    something before it or in it is trained, and in a third if its weight is trained. Attention scores, the LM head and
    the recomputation of gradient checkpointing do not count.

    Args:
        model: Prepared by a recipe, see `Recipe.prepare`.

    Returns:
        Operations of the vision towers and the projector for a sample, and of the language model for a token.
    """
    policy = model.get_base_model() if isinstance(model, PeftModel) else model
    operations, backward = [], False
    for name in (*VISION, *PROJECTOR, LANGUAGE_MODEL[0]):
        part = policy.get_submodule(name)
        backward = backward or any(parameter.requires_grad for parameter in part.parameters())
        layers = [layer for layer in part.modules() if isinstance(layer, nn.Linear)]
        operations.append(
            sum(
                2 * layer.in_features * layer.out_features * (1 + backward + layer.weight.requires_grad)
                for layer in layers
            )
        )
    vision, projector, text = operations
    return (vision + projector) * policy.config.num_image_tokens * policy.config.num_images, text


def find_matrix_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations per second of a GPU for matrices of 16 bits, or `None` if they are not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in MATRIX_RATES.items() if part in name), None)


__all__ = ["MATRIX_RATES", "Throughput", "find_matrix_rate", "training_operations"]
