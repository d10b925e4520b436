"""Published weight names <-> ours, as rules of transformers' own checkpoint conversion.

The rules of a tower are looked up by its class name and matched only below the tower's own path: an unanchored
rule for `qkv` or `norm1` would rewrite the language model too. Source patterns differ between the towers, because
transformers finds a converter by its pattern alone.
"""

from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming


class PrependZeroRow(ConversionOps):
    """(1, P, D) position embedding of the patches -> (1, 1 + P, D): the class token gets none."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Put a zero row before the patches."""
        (patches,) = next(iter(input_dict.values()))
        return {target_patterns[0]: torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Drop the row again."""
        return DropFirstRow()


class DropFirstRow(ConversionOps):
    """(1, 1 + P, D) -> (1, P, D)."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Drop the class token's row."""
        (positions,) = next(iter(input_dict.values()))
        return {target_patterns[0]: positions[:, 1:].contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        """Put a zero row in its place."""
        return PrependZeroRow()


class DropBatch(ConversionOps):
    """(1, P, D) -> (P, D)."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Drop the batch dimension."""
        (positions,) = next(iter(input_dict.values()))
        return {target_patterns[0]: positions.squeeze(0)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Add the batch dimension."""
        return AddBatch()


class AddBatch(ConversionOps):
    """(P, D) -> (1, P, D)."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Add the batch dimension."""
        (positions,) = next(iter(input_dict.values()))
        return {target_patterns[0]: positions.unsqueeze(0)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Drop the batch dimension."""
        return DropBatch()


def _renamings(table: dict[str, str]) -> list[WeightRenaming]:
    return [WeightRenaming(source, target) for source, target in table.items()]


def _qkv(attention: str) -> WeightConverter:
    return WeightConverter(
        rf"{attention}\.qkv",
        [f"{attention}.{name}_proj" for name in ("q", "k", "v")],
        operations=[Chunk(dim=0)],
    )


# Class name or model type -> rules, published first.
CONVERSIONS = {
    "openvla": _renamings({r"^language_model\.model\.": "language_model.", r"^language_model\.lm_head\.": "lm_head."}),
    "OpenVLADinov2Tower": [
        *_renamings(
            {
                r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
                r"^cls_token": "embeddings.cls_token",
                r"^reg_token": "embeddings.register_tokens",
                r"^pos_embed": "embeddings.pos_embed",
                r"^blocks\.": "encoder.layer.",
                r"\.attn\.qkv\.": ".attention.qkv.",
                r"\.attn\.proj\.": ".attention.o_proj.",
                r"\.ls1\.scale_factor": ".layer_scale1.lambda1",
                r"\.ls2\.scale_factor": ".layer_scale2.lambda1",
            }
        ),
        WeightConverter(r"embeddings\.pos_embed", "embeddings.position_embeddings", operations=[PrependZeroRow()]),
        _qkv("attention"),
    ],
    "OpenVLASiglipTower": [
        *_renamings(
            {
                r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
                r"^blocks\.": "encoder.layers.",
                r"\.norm1\.": ".layer_norm1.",
                r"\.norm2\.": ".layer_norm2.",
                r"\.attn\.qkv\.": ".self_attn.qkv.",
                r"\.attn\.proj\.": ".self_attn.out_proj.",
            }
        ),
        WeightConverter(r"^pos_embed", "embeddings.position_embedding.weight", operations=[DropBatch()]),
        _qkv("self_attn"),
    ],
}


def register_conversions() -> None:
    """Make `from_pretrained` apply the rules; safe to call again, also from a second copy of this module."""
    for name, rules in CONVERSIONS.items():
        register_checkpoint_conversion_mapping(name, rules, overwrite=True)


__all__ = ["CONVERSIONS", "register_conversions"]
