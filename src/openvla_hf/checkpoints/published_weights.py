"""Weights in the published layout, by the original's names.

Weights that OpenVLA never uses (last blocks, final norms and pooling heads of the towers) are zeros, with norm weights
of one. The components of OpenVLA-OFT are in separate files.
"""

import re
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..modeling.oft_loading import HEAD_PREFIXES, MODULES, PARALLEL_PREFIX, PATHS, SUFFIX
from .transformers_internals import revert_weight_conversion


# Layers with LoRA in the vision backbone that the original saves for FiLM, and the rank that its evaluation scripts
# expect unless `--lora_rank` gives another.
FILM_LORA_LAYERS = re.compile(r"(.*\.(?:qkv|proj|fc1|fc2|q|kv))\.(weight|bias)")
FILM_LORA_RANK = 32
FILM_WEIGHT = re.compile(r"\.(scale|shift)\.(weight|bias)$")
# Takes the place of the training step in the names of component files, as in files that the original writes.
STEP = "latest"


def published_state_dict(model: OpenVLAForActionPrediction) -> dict[str, torch.Tensor]:
    """Return the tensors of the published layout, sorted by name. Tensors that are only renamed share their memory."""
    tensors = {name: tensor for name, tensor in _published_backbone(model).items() if not FILM_WEIGHT.search(name)}
    for prefix, module in (
        ("projector.", model.model.projector),
        ("language_model.model.", model.model.language_model),
        ("language_model.lm_head.", model.lm_head),
    ):
        tensors |= {prefix + key: tensor for key, tensor in module.state_dict().items()}
    return dict(sorted(tensors.items()))


def published_film_backbone(model: OpenVLAForActionPrediction) -> dict[str, torch.Tensor]:
    """Return the vision backbone of a model with FiLM, as the original saves it in a separate file.

    The original loads this file into a backbone whose layers have a LoRA. The weights are complete without it, so the
    LoRA is written as zeros.
    """
    tensors = {}
    for name, tensor in _published_backbone(model).items():
        if not FILM_WEIGHT.search(name):
            name = re.sub(r"(\.blocks\.\d+\.)", r"\1block.", name)
        adapted = FILM_LORA_LAYERS.fullmatch(name)
        if adapted is None:
            tensors[name] = tensor
            continue
        layer, kind = adapted.groups()
        tensors[f"{layer}.base_layer.{kind}"] = tensor
        if kind == "weight":
            outputs, *inputs = tensor.shape
            tensors[f"{layer}.lora_A.default.weight"] = tensor.new_zeros(FILM_LORA_RANK, *inputs)
            tensors[f"{layer}.lora_B.default.weight"] = tensor.new_zeros(
                outputs, FILM_LORA_RANK, *[1] * len(inputs[1:])
            )
    return tensors


def _published_backbone(model: OpenVLAForActionPrediction) -> dict[str, torch.Tensor]:
    tensors = {}
    backbone = model.model.vision_backbone
    names = ("featurizer", "fused_featurizer")
    for name, tower, config in zip(names, backbone.towers, model.config.vision_configs, strict=False):
        read = _published_tower(tower)
        for key, tensor in (read | _never_read(read, config)).items():
            tensors[f"vision_backbone.{name}.{key}"] = tensor
    return tensors


def _published_tower(tower: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = tower.state_dict()
    positions, class_token = "embeddings.position_embeddings", "embeddings.cls_token"
    if class_token in state:
        # The layout has no position embedding for the class token, so it is added to the token itself.
        state[class_token] = state[class_token] + state[positions][:, :1]
    published = revert_weight_conversion(tower, state)
    if "pos_embed" not in published:
        raise ImportError(
            f"transformers {transformers.__version__} can't write the published names of weights: run "
            "`pip install -U transformers`."
        )
    # A view of our whole table, so copy the part that is saved.
    published["pos_embed"] = published["pos_embed"].clone()
    return published


def _never_read(read: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Make the weights that are never read: later blocks, the final norm and SigLIP's pooling head."""
    block_names = [re.fullmatch(r"blocks\.(\d+)\.(.+)", key) for key in read]
    last = max(int(match[1]) for match in block_names if match)
    shapes: dict[str, tuple[int, ...]] = {f"norm.{kind}": (config.hidden_size,) for kind in ("weight", "bias")}
    for index in range(last + 1, config.num_hidden_layers):
        for match in block_names:
            if match and int(match[1]) == last:
                shapes[f"blocks.{index}.{match[2]}"] = read[match[0]].shape
    if config.model_type == "siglip_vision_model":
        width, mlp = config.hidden_size, config.intermediate_size
        shapes["attn_pool.latent"] = (1, 1, width)
        shapes |= {f"attn_pool.norm.{kind}": (width,) for kind in ("weight", "bias")}
        for name, outputs, inputs in (
            ("q", width, width),
            ("kv", 2 * width, width),
            ("proj", width, width),
            ("mlp.fc1", mlp, width),
            ("mlp.fc2", width, mlp),
        ):
            shapes |= {f"attn_pool.{name}.weight": (outputs, inputs), f"attn_pool.{name}.bias": (outputs,)}
    like = next(iter(read.values()))
    return {
        key: (like.new_ones if re.search(r"norm\d?\.weight$", key) else like.new_zeros)(shape)
        for key, shape in shapes.items()
    }


def write_components(model: OpenVLAForActionPrediction, folder: Path) -> None:
    """Write each component of OpenVLA-OFT that a model has to a separate file; a plain model has none."""
    for component, state in component_states(model).items():
        torch.save(state, folder / f"{component}--{STEP}{SUFFIX}")


def component_states(model: OpenVLAForActionPrediction) -> dict[str, dict[str, torch.Tensor]]:
    """Return the content of each component's file.

    As in published checkpoints, the action head has the data type of the model, and the projectors are float32.
    """
    modules = dict(model.named_modules())
    states: dict[str, dict[str, torch.Tensor]] = {}
    for component, names in MODULES.items():
        path = PATHS[component]
        if path.removesuffix(".") not in modules:
            continue
        is_head = component == "action_head"
        prefix = PARALLEL_PREFIX + (HEAD_PREFIXES[model.config.action_head] if is_head else "")
        states[component] = {
            f"{prefix}{published}.{kind}": (tensor if is_head else tensor.float()).clone()
            for published, ours in names.items()
            for kind, tensor in modules[f"{path}{ours}"].state_dict().items()
        }
    if model.config.use_film:
        states["vision_backbone"] = {name: tensor.clone() for name, tensor in published_film_backbone(model).items()}
    return states


__all__ = ["component_states", "published_film_backbone", "published_state_dict", "write_components"]
