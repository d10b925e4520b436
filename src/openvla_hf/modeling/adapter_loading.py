"""Adapters (LoRA) of the original's layer names, written again with ours.

Adapters published for the original code name timm's layers, with q, k and v in one. What was learnt for such a layer
is the same for three: each has the shared A and its third of B.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.core_model_loading import WeightRenaming

from .checkpoint_files import ADAPTER_CONFIG
from .weight_mapping import CONVERSIONS


ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PUBLISHED_PARTS = ("vision_backbone.", "projector.", "language_model.")
ADAPTED = re.compile(r"^(?P<layer>.+)\.(?P<side>lora_A|lora_B)\.weight$")
# A whole weight below an adapter: the head's, which older versions of peft store too.
WHOLE = ".base_layer.weight"
TOWER = re.compile(r"^(vision_backbone\.(?:fused_)?featurizer)\.(.+)$")


def is_published(names: list[str]) -> bool:
    """Whether an adapter's weights have the original's names."""
    return any(name.removeprefix(PREFIX).startswith(PUBLISHED_PARTS) for name in names)


def our_name(model: nn.Module, name: str) -> str:
    """The name that a published weight has here, whole qkv aside."""
    tower = TOWER.match(name)
    if tower is None:
        rules, path, rest = "openvla", "", name
    else:
        path, rest = f"{tower[1]}.", tower[2]
        rules = type(model.get_submodule(f"model.{tower[1]}")).__name__
    for rule in CONVERSIONS[rules]:
        if isinstance(rule, WeightRenaming):
            # An untouched copy: transformers may have used the rule's own patterns up.
            rest = re.sub(rule._original_source_patterns[0], rule._original_target_patterns[0], rest)
    return rest if rest.startswith("lm_head.") else f"model.{path}{rest}"


def translate(model: nn.Module, config_file: str, weights_file: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write an adapter with our names into `folder`, and give the whole weights that came with it, by our names.

    Args:
        model: What the adapter is for.
        config_file: `adapter_config.json`.
        weights_file: `adapter_model.safetensors`; published names are translated, ours are taken as they are.
        folder: Gets both files.

    Raises:
        ValueError: A weight finds no layer, or its shape does not fit.
    """
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    source = load_file(weights_file)
    published = is_published(list(source))
    for patterns in ("alpha_pattern", "rank_pattern"):
        if published and config.get(patterns):
            raise ValueError(f"{config_file} has a {patterns!r} for the original's layers, which can't be translated.")
    unread = [re.compile(pattern) for pattern in model.model.vision_backbone._keys_to_ignore_on_load_unexpected or ()]
    layers = dict(model.named_modules())
    adapted: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in source.items():
        name = key.removeprefix(PREFIX)
        name = our_name(model, name) if published else name
        if published and any(pattern.search(name) for pattern in unread):
            continue
        if name.endswith(WHOLE):
            whole[name.removesuffix(WHOLE)] = _checked(layers, name.removesuffix(WHOLE), key, tensor)
            continue
        for path, part in _split(name, tensor):
            match = ADAPTED.match(path)
            _checked(layers, match["layer"] if match else path, key)
            if match is None:
                raise ValueError(f"{weights_file} holds {key!r}, which is no LoRA weight: it can't be loaded.")
            adapted[PREFIX + path] = part.to(model.dtype).contiguous()
    config["target_modules"] = sorted({ADAPTED.match(name.removeprefix(PREFIX))["layer"] for name in adapted})  # type: ignore[index]
    config["auto_mapping"] = None
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file(adapted, folder / ADAPTER_WEIGHTS)
    return whole


def _split(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A weight of a fused qkv layer as those of three layers; any other as it is."""
    if ".qkv." not in name:
        return [(name, tensor)]
    parts = tensor.chunk(3) if ".lora_B." in name else [tensor.clone() for _ in "qkv"]
    return [(name.replace(".qkv.", f".{each}_proj."), part) for each, part in zip("qkv", parts, strict=True)]


def _checked(layers: dict[str, nn.Module], layer: str, key: str, tensor: Any = None) -> Any:
    """The tensor, if there is such a layer."""
    if layer not in layers:
        raise ValueError(
            f"The adapter's weight {key!r} finds no place: the model has no layer {layer!r}. It was made for another "
            "model, or is no OpenVLA adapter."
        )
    return tensor


__all__ = ["ADAPTER_WEIGHTS", "translate"]
