"""Models with random weights, for measuring without a checkpoint."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.initialization import no_init_weights

from ..modeling.configuration_openvla import OpenVLAConfig
from ..modeling.known_names import check_name
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..processing.processing_openvla import OpenVLAProcessor
from ..testing import BRIDGE_LIKE_STATS, tiny_processor, tiny_tokenizer


INSTRUCTION = "put the red block on the yellow plate"

SMALL_TOWERS: dict[str, dict[str, Any]] = {
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
    "fused_vision_config": {
        "hidden_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 269,
    },
}
# Fields of the sub-configs of models with random weights.
RANDOM_SIZES: dict[str, dict[str, Any]] = {
    # openvla-7b.
    "7b": {"text_config": {"max_position_embeddings": 2048}},
    # Half a billion parameters in the language model's layers, small towers and 16 patches. Reading weights takes most
    # of the time, as at 7B on a GPU. With 256 patches a CPU would be bound by arithmetic.
    "0.5b": {
        "vision_config": SMALL_TOWERS["vision_config"] | {"image_size": 56},
        "fused_vision_config": SMALL_TOWERS["fused_vision_config"] | {"image_size": 56},
        "text_config": {
            "hidden_size": 1536,
            "intermediate_size": 4096,
            "num_hidden_layers": 18,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        },
    },
    # The checkpoints in `tests/parity`.
    "tiny": SMALL_TOWERS
    | {
        "text_config": {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
    },
}


def random_config(size: str, text_config: Mapping[str, Any] | None = None, **fields: Any) -> OpenVLAConfig:
    """Make the config of one of `RANDOM_SIZES`.

    Args:
        size: Key of `RANDOM_SIZES`.
        text_config: Fields of the language model's config to override, such as `{"num_hidden_layers": 2}`.
        fields: Further fields of `OpenVLAConfig`, such as `num_images` or `proprio_dim`.

    Raises:
        ValueError: If the size is unknown.
    """
    check_name(size, RANDOM_SIZES, "size")
    sizes = copy.deepcopy(RANDOM_SIZES[size])
    sizes["text_config"] |= text_config or {}
    statistics = {"action": BRIDGE_LIKE_STATS}
    if (state := fields.get("proprio_dim")) is not None:
        statistics["proprio"] = {"q01": [-1.0] * state, "q99": [1.0] * state}
    return OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px", norm_stats={"random": statistics}, **sizes, **fields
    )


def random_model(
    size: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    text_config: Mapping[str, Any] | None = None,
    **fields: Any,
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Make a model with random weights, directly on the device and in its dtype, and its processor.

    Args:
        size: Key of `RANDOM_SIZES`.
        dtype: Type of the weights.
        device: Device of the weights.
        text_config: Fields of the language model's config to override, such as `{"num_hidden_layers": 2}`.
        fields: Further fields of `OpenVLAConfig`, such as `num_images` or `proprio_dim`.

    Raises:
        ValueError: If the size is unknown.
    """
    # With enough merges most words are one token each, as in Llama's vocabulary.
    tokenizer = tiny_tokenizer([INSTRUCTION], merges=500)
    config = random_config(size, text_config, pad_token_id=tokenizer.pad_token_id, **fields)
    with torch.device(device), no_init_weights():
        model = AutoModel.from_config(config, dtype=dtype).eval()
    torch.manual_seed(0)
    _randomize(model)
    return model, tiny_processor(tokenizer, config)


def chunk_model(model: OpenVLAForActionPrediction, horizon: int, head: str = "l1") -> OpenVLAForActionPrediction:
    """Make a model with parallel decoding that shares all weights of `model`. Only the action head is new.

    Args:
        model: A model that decodes token by token and has the statistics of a single robot.
        horizon: Actions in a chunk.
        head: "l1", or "none" for action tokens.
    """
    parallel = {"action_decoding": "parallel", "action_horizon": horizon, "action_head": head}
    config = OpenVLAConfig.from_dict(model.config.to_dict() | parallel | {"action_dim": model.get_action_dim()})
    with torch.device("meta"), no_init_weights():
        chunked = AutoModel.from_config(config, dtype=model.dtype).eval()
    for name, part in model.model.named_children():
        setattr(chunked.model, name, part)
    chunked.lm_head = model.lm_head
    if chunked.action_head is not None:
        chunked.action_head.to_empty(device=model.device)
        _randomize(chunked.action_head)
    return chunked


@torch.no_grad()
def _randomize(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
