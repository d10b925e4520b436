"""Write a policy whose weights come from the files of other models."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .. import auto  # noqa: F401 - makes the Auto classes know OpenVLA
from ..modeling.configuration_openvla import OpenVLAConfig
from ..new_folder import new_folder
from ..processing.image_processing_openvla import SIGLIP_MEAN, SIGLIP_STD, OpenVLAImageProcessor
from ..processing.processing_openvla import OpenVLAProcessor
from .shard_writing import SHARD_BYTES, Shard, write_shards
from .transformers_internals import PartLoader


DTYPES = ("bfloat16", "float16", "float32")
DINOV2, SIGLIP = "dinov2_with_registers", "siglip_vision_model"
"""Types of the vision towers."""

Pixels = Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]
"""Type of a tower -> mean and standard deviation of its pixels."""

PIXELS: Pixels = {
    DINOV2: (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)),
    SIGLIP: (SIGLIP_MEAN, SIGLIP_STD),
}
"""The values with which the towers were trained. Published OpenVLA rounds those of DINOv2."""


def load_tokenizer(
    source: str | os.PathLike, max_length: int, advice: str, token: str | None = None
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a language model, and give it the original's padding token if it has none.

    Args:
        source: Folder or Hub id.
        max_length: Longest input of the language model.
        advice: What to do if the tokenizer can't be loaded.
        token: Token for a private repository.

    Raises:
        OSError: There is no tokenizer, or it can't be loaded.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, model_max_length=max_length, token=token)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise OSError(f"Cannot load the tokenizer of {os.fspath(source)!r} ({reason}). {advice}") from error
    if tokenizer.pad_token is None:  # Llama's own, to which the original adds this token
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def make_processor(
    config: OpenVLAConfig,
    tokenizer: PreTrainedTokenizerFast,
    pixels: Pixels,
    resize_strategy: str = "resize-naive",
    **fields: Any,
) -> OpenVLAProcessor:
    """Make the processor of a policy.

    Args:
        config: Config of the policy.
        tokenizer: Its tokenizer.
        pixels: Mean and standard deviation of the pixels of each tower.
        resize_strategy: "resize-naive", "letterbox" or "resize-crop".
        fields: Further fields of `OpenVLAProcessor`, such as `prompt_template`.
    """
    means, stds = zip(*(pixels[tower.model_type] for tower in config.vision_configs), strict=True)
    image_processor = OpenVLAImageProcessor(
        image_resize_strategy=resize_strategy,  # type: ignore[arg-type]
        size=config.vision_config.image_size,
        image_mean=means,
        image_std=stds,
        letterbox_fill=[int(255 * level) for level in means[0]],
    )
    return OpenVLAProcessor(
        image_processor,
        tokenizer,
        image_token_id=config.image_token_id,
        num_image_tokens=config.num_image_tokens,
        **fields,
    )


def write_policy(
    destination: Path,
    config: OpenVLAConfig,
    processor: OpenVLAProcessor,
    weights: Mapping[str, torch.Tensor],
    *,
    dtype: str,
    source: str | os.PathLike,
    on_progress: Callable[[int, int], None],
) -> None:
    """Write config, code, processor and weights, with memory for about one shard besides `weights`.

    Args:
        destination: New or empty folder. Files appear in it once all are written.
        config: Config of the policy, with its statistics.
        processor: Processor of the policy.
        weights: Weights by their published names or ours. Tensors may be those of a mapped file.
        dtype: Data type of the written weights.
        source: Origin of the weights, for error messages.
        on_progress: Called with the number of written shards and the number of all shards.

    Raises:
        ValueError: A weight is missing, unexpected or of another shape than the config's.
        FileExistsError: `destination` is not empty.
        OSError: A file can't be written.
    """
    groups = _groups(weights)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch_dtype)
    with new_folder(destination) as folder:
        model.save_pretrained(folder, state_dict={})  # config, code and statistics
        processor.save_pretrained(folder)
        shards = _shards(PartLoader(model, None, torch_dtype, source), weights, groups)
        write_shards(folder, shards, len(groups), on_progress)


def _groups(weights: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Group the names of the weights by about `SHARD_BYTES` in 16 bits."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if groups[-1] and size + 2 * tensor.numel() > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 2 * tensor.numel()
    return groups


def _shards(loader: PartLoader, weights: Mapping[str, torch.Tensor], groups: list[list[str]]) -> Iterator[Shard]:
    """Yield the tensors of each group by our names. Each group is freed before the next."""
    for names in groups:
        yield loader.load({name: weights[name] for name in names})
        loader.release()
    loader.check_complete()


__all__ = ["DINOV2", "DTYPES", "PIXELS", "SIGLIP", "Pixels", "load_tokenizer", "make_processor", "write_policy"]
