"""An independent FiLM backbone that reads the published file directly, without merging its LoRA.

The code follows the original's order and timm's names, for tests at any size. It is checked against the recordings of
the original.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional


# The oldest supported version of transformers can't write published names.
needs_export = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23), reason="needs a newer transformers"
)


class PublishedTower:
    """A tower of a published `vision_backbone--N_checkpoint.pt`."""

    def __init__(self, weights: Mapping[str, torch.Tensor], prefix: str, heads: int):
        self.weights = {name[len(prefix) :]: one.float() for name, one in weights.items() if name.startswith(prefix)}
        self.heads = heads

    def __call__(self, pixel_values: torch.Tensor, language: torch.Tensor, blocks: int) -> torch.Tensor:
        """Encode (B, 3, H, W) with the first `blocks` blocks as patch tokens (B, P, D), given a mean (B, L)."""
        patch = self.weights["patch_embed.proj.base_layer.weight"].shape[-1]
        x = self.with_lora("patch_embed.proj", functional.conv2d, pixel_values, stride=patch).flatten(2).mT
        x = x + self.weights["pos_embed"]
        patches = x.shape[1]
        if "cls_token" in self.weights:
            prefix = torch.cat([self.weights["cls_token"], self.weights["reg_token"]], dim=1)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        for index in range(blocks):
            x = self.block(f"blocks.{index}", x, language)
        return x[:, -patches:]

    def block(self, name: str, x: torch.Tensor, language: torch.Tensor) -> torch.Tensor:
        gamma, beta = (self.linear(f"{name}.{kind}", language).unsqueeze(1) for kind in ("scale", "shift"))
        x = x + self.layer_scale(f"{name}.block.ls1", self.attention(name, self.norm(f"{name}.block.norm1", x)))
        x = x * (1 + gamma) + beta
        hidden = self.with_lora(f"{name}.block.mlp.fc1", functional.linear, self.norm(f"{name}.block.norm2", x))
        hidden = self.with_lora(f"{name}.block.mlp.fc2", functional.linear, functional.gelu(hidden))
        return x + self.layer_scale(f"{name}.block.ls2", hidden)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        qkv = self.with_lora(f"{name}.block.attn.qkv", functional.linear, x)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.with_lora(f"{name}.block.attn.proj", functional.linear, mixed.transpose(1, 2).flatten(2))

    def with_lora(self, name: str, layer: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        down, up = (self.weights[f"{name}.lora_{side}.default.weight"] for side in "AB")
        out = layer(x, self.weights[f"{name}.base_layer.weight"], self.weights[f"{name}.base_layer.bias"], **kwargs)
        return out + min(len(down), 16) / len(down) * layer(layer(x, down, **kwargs), up)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, eps=1e-6)

    def layer_scale(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights[f"{name}.scale_factor"] if f"{name}.scale_factor" in self.weights else x
