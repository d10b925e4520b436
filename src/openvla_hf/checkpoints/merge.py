"""Merge an adapter into its base model, to get a checkpoint without an adapter."""

import os
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from ..modeling.checkpoint_files import CheckpointFiles
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..new_folder import new_folder, require_new_folder
from .model_card import copy_training


# Relative difference between the outputs before and after merging: the effect of rounding alone, and the largest one
# accepted. In between, the limit is half of the adapter's own effect, since losing an update changes far more.
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.005, torch.bfloat16: 0.01}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
PROBE_TOKENS = 32


def merge_adapter(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    device_map: Any = None,
    **config_overrides: Any,
) -> float:
    """Merge an adapter into its base model, layer by layer in place, and save the result with its processor.

    The outputs (logits, or the actions of an action head) are compared before and after merging. Nothing is written if
    they differ too much.

    Args:
        adapter: Folder or Hub id of the adapter.
        output: New or empty folder.
        base: Folder or Hub id of the base model, in 16 bits or more. Defaults to the one that the adapter names.
        dtype: Data type of the weights in memory. Defaults to that of the base model.
        max_shard_size: Largest size of a weights file. Beside the model, at most one file is in memory.
        device_map: Where to put the model, as in `from_pretrained`.
        config_overrides: Fields of the base model's config.

    Returns:
        The relative difference of the outputs.

    Raises:
        ValueError: The base model is quantised, or the outputs change.
        OSError: A file is missing or damaged, or `output` is not empty.
    """
    output = Path(output)
    require_new_folder(output)
    kwargs = {"dtype": dtype, "device_map": device_map, **config_overrides}
    if base is None:
        model = OpenVLAForActionPrediction.from_pretrained(adapter, **kwargs)
    else:
        model = OpenVLAForActionPrediction.from_pretrained(base, **kwargs)
        model.load_adapter(os.fspath(adapter))
    if model.config.to_dict().get("quantization_config") is not None:
        raise ValueError(
            f"The base model of {adapter} is quantised, and merging into quantised weights would lose the "
            "adapter's changes. Give the 16-bit checkpoint with `base=`."
        )
    processor = _processor(adapter, base or model.config.name_or_path)

    before = _output(model)
    model.disable_adapters()
    effect = _relative(_output(model), before)
    model.enable_adapters()
    merge_layers(model)
    after = _output(model)
    difference = _relative(after, before)
    limit = min(TOLERANCE[model.dtype], max(ROUNDING[model.dtype], effect / 2))
    if not difference <= limit:
        raise ValueError(
            f"Merging {adapter} would change the model: its outputs differ by {difference:.1%} (limit "
            f"{limit:.1%}), so nothing was written. Try `dtype='float32'`."
        )
    with new_folder(output) as merged:
        model.save_pretrained(merged, max_shard_size=max_shard_size)
        processor.save_pretrained(merged)
        copy_training(CheckpointFiles.locate(adapter), merged)
    return difference


@torch.no_grad()
def merge_layers(model: OpenVLAForActionPrediction) -> None:
    """Add every adapter to the weight of its layer, and restore the plain layer."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in adapted:
        plain: nn.Module = layer.get_base_layer()
        weight = plain.weight.data
        delta = sum(layer.get_delta_weight(each).float() for each in layer.active_adapters)  # type: ignore[attr-defined]
        weight.copy_((weight.float() + delta).to(weight.dtype))  # summed in float32, rounded once
        model.set_submodule(name, plain)
    model.delete_adapter(list(model.peft_config))


def _relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output - expected).norm() / expected.norm()).item()


@torch.no_grad()
def _output(model: OpenVLAForActionPrediction) -> torch.Tensor:
    """Return the logits, or the actions of an action head, for a random observation that is the same in every call."""
    generator, config = torch.Generator().manual_seed(0), model.config
    size, channels = config.vision_config.image_size, 3 * len(config.vision_configs) * config.num_images
    input_ids = torch.randint(3, model.action_tokenizer.first_id, (1, PROBE_TOKENS), generator=generator)
    inputs = {
        "input_ids": input_ids.to(model.device),
        "pixel_values": torch.randn(1, channels, size, size, generator=generator).to(model.device, model.dtype),
    }
    if config.proprio_dim is not None:
        inputs["proprio"] = torch.rand(1, config.proprio_dim, generator=generator).to(model.device)
    if config.action_head == "diffusion":  # the estimate of the actions from noise at one level
        shape = (1, config.action_horizon, config.action_dim or 0)
        inputs |= {name: torch.randn(shape, generator=generator).to(model.device) for name in ("actions", "noise")}
        inputs["timesteps"] = torch.full((1,), config.diffusion_steps // 2, device=model.device)
    outputs = model(**inputs)
    return (outputs.actions if outputs.logits is None else outputs.logits).float()


def _processor(adapter: str | os.PathLike, base: str | os.PathLike) -> Any:
    """Load the adapter's processor, which has the centre crop of its training, or else that of the base model."""
    files = CheckpointFiles.locate(adapter)
    has_own = any(files.find(name) is not None for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME))
    return AutoProcessor.from_pretrained(adapter if has_own else base)


__all__ = ["merge_adapter", "merge_layers"]
