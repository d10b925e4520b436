"""Read pretrained vision towers from the Hub, in the layout of transformers or of timm.

The weights get the names and shapes of this package's towers. Position embeddings of another image size are
interpolated as timm does, which the original code uses. Shapes: P patches, D width.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, Dinov2WithRegistersModel, PreTrainedConfig, PreTrainedModel, SiglipVisionModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..modeling.checkpoint_files import CheckpointFiles, unreadable_weights
from ..modeling.checkpoint_loading import refuse_foreign_files
from ..modeling.known_names import check_name
from ..modeling.vision_towers import TOWERS
from ..modeling.weight_mapping import convert_tower
from .policy_writing import DINOV2, SIGLIP
from .transformers_internals import PartLoader


class Tower(NamedTuple):
    """A vision tower.

    Args:
        config: Its config, at the image size that it is read for.
        weights: Its float32 weights by our names below the tower.
    """

    config: PreTrainedConfig
    weights: dict[str, torch.Tensor]


# timm's architecture -> number of attention heads, which the weights don't show. All of them use the exact GELU.
ARCHITECTURES = {
    DINOV2: {
        "vit_small_patch14_reg4_dinov2": 6,
        "vit_base_patch14_reg4_dinov2": 12,
        "vit_large_patch14_reg4_dinov2": 16,
    },
    SIGLIP: {
        "vit_base_patch16_siglip_224": 12,
        "vit_base_patch16_siglip_256": 12,
        "vit_base_patch16_siglip_384": 12,
        "vit_so400m_patch14_siglip_224": 16,
        "vit_so400m_patch14_siglip_384": 16,
    },
}
# Arguments of timm's models that the weights show, or that do not change the patches' features.
SHOWN_BY_WEIGHTS = {
    "img_size", "patch_size", "embed_dim", "depth", "mlp_ratio", "reg_tokens", "num_classes", "global_pool",
}  # fmt: skip

# Type of a tower -> types of the configs that contain one, and the class that reads it.
CLASSES: dict[str, tuple[tuple[str, ...], type[PreTrainedModel]]] = {
    DINOV2: (("dinov2_with_registers",), Dinov2WithRegistersModel),
    SIGLIP: (("siglip", "siglip_vision_model"), SiglipVisionModel),
}
# Fields of a tower's config that its features depend on.
FIELDS = {
    DINOV2: ("mlp_ratio", "num_register_tokens", "use_swiglu_ffn", "qkv_bias"),
    SIGLIP: ("intermediate_size",),
}
COMMON_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "num_channels",
    "hidden_act", "layer_norm_eps",
)  # fmt: skip
NAMES = {DINOV2: "DINOv2 with registers", SIGLIP: "SigLIP"}
POSITIONS = {DINOV2: "embeddings.position_embeddings", SIGLIP: "embeddings.position_embedding.weight"}

# Beginnings of the names of weights that OpenVLA never reads, in transformers and in timm.
UNREAD = ("embeddings.mask_token", "layernorm.", "post_layernorm.", "head.")
UNREAD_IN_TIMM = ("norm.", "attn_pool.")
# Weights of a whole SigLIP that are not those of its vision tower.
BESIDE_THE_TOWER = ("text_model.", "logit_")


def read_tower(source: str | os.PathLike, model_type: str, image_size: int, token: str | None = None) -> Tower:
    """Read a vision tower for images of one size.

    Args:
        source: Folder or Hub id, such as "timm/vit_large_patch14_reg4_dinov2.lvd142m" or
            "google/siglip-so400m-patch14-224".
        model_type: `DINOV2` or `SIGLIP`.
        image_size: Pixels along a side of the images.
        token: Token for a private repository.

    Raises:
        ValueError: The source is another model, its weights do not fit its config, or `image_size` is smaller than a
            patch.
        OSError: The source can't be found or read, or has no weights in safetensors files.
    """
    files = CheckpointFiles.locate(source, token=token)
    content = files.read_json(CONFIG_NAME)
    if content is None:
        raise OSError(f"{source} has no {CONFIG_NAME}: give a folder or Hub id of a {NAMES[model_type]} model.")
    if "architecture" in content:
        tower = _read_timm(files, content, model_type)
    else:
        tower = _read_transformers(files, content, model_type)
    patch = tower.config.patch_size
    if image_size < patch:
        raise ValueError(
            f"The patches of {source} are {patch} pixels wide, so `image_size={image_size}` is too small: choose "
            f"another size, such as {16 * patch}."
        )
    name = POSITIONS[model_type]
    positions = tower.weights[name] if model_type == DINOV2 else tower.weights[name].unsqueeze(0)
    others = 1 if model_type == DINOV2 else 0  # the class token's row
    patches = resize_positions(positions[:, others:], image_size // patch, source)
    positions = torch.cat([positions[:, :others], patches], dim=1)
    tower.config.image_size = image_size
    tower.weights[name] = positions if model_type == DINOV2 else positions.squeeze(0)
    return tower


def name_towers(towers: Sequence[Tower]) -> dict[str, torch.Tensor]:
    """Return the weights of a policy's towers by our names."""
    return {
        f"model.vision_backbone.{name}.{key}": tensor
        for name, tower in zip(("featurizer", "fused_featurizer"), towers, strict=False)
        for key, tensor in tower.weights.items()
    }


def resize_positions(positions: torch.Tensor, side: int, source: str | os.PathLike) -> torch.Tensor:
    """Interpolate the position embeddings (1, P, D) of a square of patches to (1, side * side, D).

    Raises:
        ValueError: P is not a square.
    """
    old = math.isqrt(positions.shape[1])
    if old * old != positions.shape[1]:
        raise ValueError(
            f"The position embedding of {source} has {positions.shape[1]} patches, which are not a square: give a "
            "model for square images."
        )
    if old == side:
        return positions
    grid = positions.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def read_safetensors(files: CheckpointFiles) -> dict[str, torch.Tensor]:
    """Read the weights of a model by their names. Tensors stay in the files until they are used.

    Raises:
        OSError: There are no weights in safetensors files, or one can't be read.
        ValueError: The index names other files.
    """
    refuse_foreign_files(files)
    index = files.read_json(SAFE_WEIGHTS_INDEX_NAME)
    weights: dict[str, torch.Tensor] = {}
    for name in sorted({*index["weight_map"].values()}) if index else [SAFE_WEIGHTS_NAME]:
        path = files.find(name)
        if path is None:
            raise OSError(
                f"{files.source} has no {name}, and only safetensors files are read: give a model with these files."
            )
        try:
            weights |= load_file(path)
        except SafetensorError as error:
            raise unreadable_weights(f"{files.source}/{name}", error) from error
    return weights


def _read_transformers(files: CheckpointFiles, content: dict[str, Any], model_type: str) -> Tower:
    """Read a tower by its class in transformers, which knows the names in older files."""
    config_types, model_class = CLASSES[model_type]
    if content.get("model_type") not in config_types:
        raise ValueError(
            f"{files.source} is a model of type {content.get('model_type')!r}, not {NAMES[model_type]}: give a model "
            f"of type {' or '.join(map(repr, config_types))}, or one of timm's."
        )
    fields = content.get("vision_config", content)
    stated = model_class.config_class.from_dict({**fields, "model_type": model_type})
    # Files of older versions have further fields, which would distinguish this tower from the original's.
    config = _make_config(model_type, {name: getattr(stated, name) for name in (*COMMON_FIELDS, *FIELDS[model_type])})
    stored = {
        name: tensor for name, tensor in read_safetensors(files).items() if not name.startswith(BESIDE_THE_TOWER)
    }
    with torch.device("meta"):
        model = model_class(stated)
    loader = PartLoader(model, None, torch.float32, str(files.source))
    weights, _ = loader.load(stored)
    loader.check_complete()
    return Tower(config, {name: tensor for name, tensor in weights.items() if not name.startswith(UNREAD)})


def _read_timm(files: CheckpointFiles, content: dict[str, Any], model_type: str) -> Tower:
    """Read a tower in timm's layout. Its sizes follow from the shapes of the weights."""
    architecture, arguments = content["architecture"], content.get("model_args") or {}
    known = ARCHITECTURES[model_type]
    check_name(architecture, known, f"{NAMES[model_type]} architecture in {CONFIG_NAME} of {files.source}:")
    if unknown := sorted(arguments.keys() - SHOWN_BY_WEIGHTS - {"num_heads"}):
        raise ValueError(
            f"{CONFIG_NAME} of {files.source} changes {unknown[0]!r} of {architecture!r}, which OpenVLA's tower does "
            "not support: give the unchanged model."
        )
    stored = read_safetensors(files)
    weights = {
        name.replace(".gamma", ".scale_factor"): tensor.float()
        for name, tensor in stored.items()
        if not name.startswith(UNREAD_IN_TIMM)
    }
    try:
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        mlp_width = len(weights["blocks.0.mlp.fc1.bias"])
        patches = weights["pos_embed"].shape[1]
        registers = weights["reg_token"].shape[1] if model_type == DINOV2 else 0
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{files.source} does not have the weights of {architecture!r} (for example {error}): download it again."
        ) from error
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))}
    heads = arguments.get("num_heads", known[architecture])
    fields = {"hidden_size": width, "num_hidden_layers": len(blocks), "num_attention_heads": heads}
    fields |= {"image_size": math.isqrt(patches) * patch, "patch_size": patch, "hidden_act": "gelu"}
    if model_type == DINOV2:
        fields |= {"mlp_ratio": mlp_width // width, "num_register_tokens": registers}
    else:
        fields |= {"intermediate_size": mlp_width}
    return Tower(_make_config(model_type, fields), convert_tower(TOWERS[model_type].__name__, weights))


def _make_config(model_type: str, fields: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **fields, **({"vision_use_head": False} if model_type == SIGLIP else {}))


__all__ = ["Tower", "name_towers", "read_safetensors", "read_tower", "resize_positions"]
