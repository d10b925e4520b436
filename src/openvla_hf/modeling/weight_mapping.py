"""Published weight names <-> ours, as rules of transformers' own checkpoint conversion.

The rules of a tower are looked up by its class name and matched only below the tower's own path: an unanchored
rule for `qkv` or `norm1` would rewrite the language model too. Source patterns differ between the towers, because
transformers finds a converter by its pattern alone.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming


class Reshape(ConversionOps):
    """Apply a function to one tensor, and its inverse when saving in the published layout."""

    def __init__(
        self, function: Callable[[torch.Tensor], torch.Tensor], inverse: Callable[[torch.Tensor], torch.Tensor]
    ):
        self.function, self.inverse = function, inverse

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Apply the function to the one tensor that a rule collects."""
        (tensor,) = next(iter(input_dict.values()))
        return {target_patterns[0]: self.function(tensor)}

    @property
    def reverse_op(self) -> ConversionOps:
        """The inverse operation."""
        return Reshape(self.inverse, self.function)


def prepend_zero_row(patches: torch.Tensor) -> torch.Tensor:
    """Prepend zeros for the class token to the patches' position embedding: (1, P, D) -> (1, 1 + P, D)."""
    return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)


def drop_first_row(positions: torch.Tensor) -> torch.Tensor:
    """Drop the class token's position embedding: (1, 1 + P, D) -> (1, P, D)."""
    return positions[:, 1:].contiguous()


def drop_batch(positions: torch.Tensor) -> torch.Tensor:
    """Drop the batch dimension: (1, P, D) -> (P, D)."""
    return positions.squeeze(0)


def add_batch(positions: torch.Tensor) -> torch.Tensor:
    """Add a batch dimension: (P, D) -> (1, P, D)."""
    return positions.unsqueeze(0)


def _qkv(attention: str) -> WeightConverter:
    return WeightConverter(
        rf"{attention}\.qkv",
        [f"{attention}.{name}_proj" for name in ("q", "k", "v")],
        operations=[Chunk(dim=0)],
    )


# FiLM in the layers of a tower.
FILM = {r"\.scale\.": ".film_scale.", r"\.shift\.": ".film_shift."}
# Class name of a tower, or model type -> published name (a pattern) -> ours.
RENAMINGS: dict[str, dict[str, str]] = {
    "openvla": {r"^language_model\.model\.": "language_model.", r"^language_model\.lm_head\.": "lm_head."},
    "OpenVLADinov2Tower": {
        r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
        r"^cls_token": "embeddings.cls_token",
        r"^reg_token": "embeddings.register_tokens",
        r"^pos_embed": "embeddings.pos_embed",
        r"^blocks\.": "encoder.layer.",
        r"\.attn\.qkv\.": ".attention.qkv.",
        r"\.attn\.proj\.": ".attention.o_proj.",
        r"\.ls1\.scale_factor": ".layer_scale1.lambda1",
        r"\.ls2\.scale_factor": ".layer_scale2.lambda1",
        **FILM,
    },
    "OpenVLASiglipTower": {
        r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
        r"^blocks\.": "encoder.layers.",
        r"\.norm1\.": ".layer_norm1.",
        r"\.norm2\.": ".layer_norm2.",
        r"\.attn\.qkv\.": ".self_attn.qkv.",
        r"\.attn\.proj\.": ".self_attn.out_proj.",
        **FILM,
    },
}
# Conversions that change tensors, applied after the renamings.
CONVERTERS: dict[str, list[WeightConverter]] = {
    "OpenVLADinov2Tower": [
        WeightConverter(
            r"embeddings\.pos_embed",
            "embeddings.position_embeddings",
            operations=[Reshape(prepend_zero_row, drop_first_row)],
        ),
        _qkv("attention"),
    ],
    "OpenVLASiglipTower": [
        WeightConverter(
            r"^pos_embed", "embeddings.position_embedding.weight", operations=[Reshape(drop_batch, add_batch)]
        ),
        _qkv("self_attn"),
    ],
}
# The rules as transformers takes them. It may change these objects while it loads.
CONVERSIONS = {
    name: [*(WeightRenaming(*one) for one in renamings.items()), *CONVERTERS.get(name, [])]
    for name, renamings in RENAMINGS.items()
}


def convert_tower(tower_class: str, published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert published weights of a tower that `from_pretrained` does not load to our names and shapes.

    Args:
        tower_class: Class name of the tower.
        published: Weights by their names below the tower.
    """
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in published.items():
        for pattern, target in RENAMINGS[tower_class].items():
            name = re.sub(pattern, target, name)
        parts = {name: tensor}
        for rule in CONVERTERS[tower_class]:
            pattern = rule.source_patterns[0]
            if re.search(pattern, name):
                (operation,) = rule.operations
                converted = operation.convert({pattern: [tensor]}, rule.source_patterns, rule.target_patterns)
                parts = {re.sub(pattern, target, name): part for target, part in converted.items()}
        ours |= parts
    return ours


def register_conversions() -> None:
    """Make `from_pretrained` apply the rules; safe to call again, also from a second copy of this module."""
    for name, rules in CONVERSIONS.items():
        register_checkpoint_conversion_mapping(name, rules, overwrite=True)


__all__ = ["CONVERSIONS", "RENAMINGS", "convert_tower", "register_conversions"]
