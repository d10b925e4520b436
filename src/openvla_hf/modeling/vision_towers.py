"""The vision towers, without the weights that OpenVLA never reads."""

import torch
from torch import nn
from transformers import (
    AutoModel,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from .film import add_film


class OpenVLADinov2Tower(Dinov2WithRegistersModel):
    """DINOv2 without the mask token and the final norm, which OpenVLA never reads."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        mask_token = self.embeddings.mask_token
        del self.embeddings.mask_token
        self.embeddings.register_buffer("mask_token", torch.zeros_like(mask_token), persistent=False)
        self.layernorm = nn.Identity()


class OpenVLASiglipTower(SiglipVisionModel):
    """SigLIP without the final norm and the pooling head."""

    def __init__(self, config: PreTrainedConfig):
        config.vision_use_head = False
        super().__init__(config)
        self.post_layernorm = nn.Identity()


TOWERS: dict[str, type[PreTrainedModel]] = {
    "dinov2_with_registers": OpenVLADinov2Tower,
    "siglip_vision_model": OpenVLASiglipTower,
}


def build_tower(config: PreTrainedConfig, film_width: int | None = None) -> PreTrainedModel:
    """Build a tower with all layers of its config.

    Args:
        config: Config of the tower.
        film_width: Width of the text embeddings that modulate the tower (FiLM); `None` for a tower without FiLM.

    Raises:
        ValueError: The tower does not support FiLM.
    """
    tower_class = TOWERS.get(config.model_type)
    tower = AutoModel.from_config(config) if tower_class is None else tower_class(config)
    if film_width is not None:
        add_film(tower, film_width)
    return tower


__all__ = ["TOWERS", "OpenVLADinov2Tower", "OpenVLASiglipTower", "build_tower"]
