"""Models with random weights, for measuring without a checkpoint."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
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


def random_config(size: str, text_config: Mapping[str, Any] | None = None) -> OpenVLAConfig:
    """Make the config of one of `RANDOM_SIZES`.

    Args:
        size: Key of `RANDOM_SIZES`.
        text_config: Fields of the language model's config to override, such as `{"num_hidden_layers": 2}`.

    Raises:
        ValueError: If the size is unknown.
    """
    check_name(size, RANDOM_SIZES, "size")
    sizes = copy.deepcopy(RANDOM_SIZES[size])
    sizes["text_config"] |= text_config or {}
    return OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px", norm_stats={"random": {"action": BRIDGE_LIKE_STATS}}, **sizes
    )


def random_model(
    size: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    text_config: Mapping[str, Any] | None = None,
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Make a model with random weights, directly on the device and in its dtype, and its processor.

    Args:
        size: Key of `RANDOM_SIZES`.
        dtype: Type of the weights.
        device: Device of the weights.
        text_config: Fields of the language model's config to override, such as `{"num_hidden_layers": 2}`.

    Raises:
        ValueError: If the size is unknown.
    """
    config = random_config(size, text_config)
    with torch.device(device), no_init_weights():
        model = AutoModel.from_config(config, dtype=dtype).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    # With enough merges most words are one token each, as in Llama's vocabulary.
    return model, tiny_processor(tiny_tokenizer([INSTRUCTION], merges=500), config)
