"""LoRA adapters with the original's layer names, translated to ours.

Adapters published for the original code name timm's layers, whose attention has one layer for q, k and v. An adapter
of that layer equals three adapters, each with the shared A and a third of B.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import CONFIG_NAME

from .action_networks import action_fields, list_networks
from .checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_POLICY,
    ADAPTER_WEIGHTS,
    CheckpointFiles,
    read_json,
    unreadable_weights,
)
from .weight_mapping import RENAMINGS


PREFIX = "base_model.model."
PUBLISHED_PARTS = ("vision_backbone.", "projector.", "language_model.")
ADAPTED = re.compile(r"^(?P<layer>.+)\.(?P<side>lora_A|lora_B)\.weight$")
# Ending of the name of an adapted layer's whole weight, which older versions of peft also store for the head.
WHOLE = ".base_layer.weight"
# peft's name for all linear layers except the head.
ALL_LINEAR = "all-linear"
# Folder in which the original keeps the adapter of a checkpoint, after merging it into the weights.
MERGED_FOLDER = "lora_adapter"
# Largest accepted rounding error of merged 16-bit weights, as a share of the adapter's change.
MERGED_TOLERANCE = 0.5
# The original's layers of a tower's block.
BLOCK_PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
TOWER = re.compile(r"^(vision_backbone\.(?:fused_)?featurizer)\.(.+)$")


def is_published(names: list[str]) -> bool:
    """Return whether an adapter's weights have the original's names."""
    return any(name.removeprefix(PREFIX).startswith(PUBLISHED_PARTS) for name in names)


def our_name(model: nn.Module, name: str) -> str:
    """Return our name of a published weight; a fused qkv keeps its name."""
    tower = TOWER.match(name)
    if tower is None:
        rules, path, rest = "openvla", "", name
    else:
        path, rest = f"{tower[1]}.", tower[2]
        rules = type(model.get_submodule(f"model.{tower[1]}")).__name__
    for published, ours in RENAMINGS[rules].items():
        rest = re.sub(published, ours, rest)
    return rest if rest.startswith("lm_head.") else f"model.{path}{rest}"


def translate(model: nn.Module, config_file: str, weights_file: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write an adapter with our names into `folder`, and return the other weights in its file by our names.

    The other weights are whole weights of adapted layers, and weights of modules that were trained in full
    (`modules_to_save`).

    Args:
        model: Model that the adapter is for.
        config_file: `adapter_config.json`.
        weights_file: `adapter_model.safetensors`; published names are translated, ours are kept.
        folder: Folder to write both files into.

    Raises:
        ValueError: A weight matches no layer or has another shape, or a layer that the config names lacks its weights.
        OSError: The weights file is damaged.
    """
    config, source = _read_adapter(config_file, weights_file)
    published = is_published(list(source))
    unread = [re.compile(pattern) for pattern in model.model.vision_backbone._keys_to_ignore_on_load_unexpected or ()]
    layers = dict(model.named_modules())
    adapted: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in source.items():
        name = key.removeprefix(PREFIX)
        name = our_name(model, name) if published else name
        if published and any(pattern.search(name) for pattern in unread):
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                f"{weights_file} has {key!r} in {tensor.dtype}, but adapter weights must be floating-point numbers."
            )
        if name.endswith(WHOLE) or _is_trained_in_full(name, config):
            layer, _, kind = name.replace(WHOLE, ".weight").rpartition(".")
            expected = tuple(getattr(_layer(layers, layer, key), kind).shape)
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{weights_file} does not fit this model: {key!r} has the shape {tuple(tensor.shape)} instead of "
                    f"{expected}."
                )
            whole[f"{layer}.{kind}"] = tensor
            continue
        for path, part in split_fused(name, tensor):
            match = ADAPTED.match(path)
            if match is None:
                raise ValueError(
                    f"{weights_file} contains {key!r}, which is not a LoRA weight. Merge the adapter into its base "
                    "with the library that made it, and load the result."
                )
            _layer(layers, match["layer"], key)
            adapted[PREFIX + path] = part.to(model.dtype).contiguous()
    found = {ADAPTED.match(name.removeprefix(PREFIX))["layer"] for name in adapted}  # type: ignore[index]
    names = published_layers(model) if published else {name: [name] for name in linear_layers(layers)}
    wanted = {ours for name, group in names.items() if is_target(name, config) for ours in group} | found
    wanted = {name for name in wanted if not _is_trained_in_full(f"{name}.weight", config)}
    _check_sides(weights_file, adapted, wanted)
    in_full = _check_whole_weights(weights_file, whole, layers, found, config)
    _check_shapes(
        weights_file, adapted, {name: layers.get(f"{name}.base_layer", layers[name]) for name in found}, config
    )
    bases = {name.removesuffix(".weight"): weight for name, weight in whole.items() if name not in in_full}
    _refuse_merged_weights(layers, adapted, bases, config, weights_file)
    config["target_modules"] = sorted(found)
    config["auto_mapping"] = config["modules_to_save"] = None
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file(adapted, folder / ADAPTER_WEIGHTS)
    return whole


def add_trained_in_full(model: nn.Module, modules: Sequence[str], folder: Path) -> None:
    """Add the modules that were trained in full to an adapter that transformers saved without them.

    Args:
        model: Model with the adapter.
        modules: Names of the modules, as in `modules_to_save`.
        folder: Folder of the adapter.
    """
    config = read_json(folder / ADAPTER_CONFIG) | {"modules_to_save": list(modules)}
    weights = load_file(folder / ADAPTER_WEIGHTS)
    for name, weight in model.named_parameters():
        if _is_trained_in_full(name, config) and ".lora_" not in name:
            weights[PREFIX + name] = weight.detach().cpu().contiguous()
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    if list_networks(model):
        fields = json.dumps(action_fields(model.config), indent=2)
        (folder / ADAPTER_POLICY).write_text(fields, encoding="utf-8")


def _check_whole_weights(
    weights_file: str,
    whole: dict[str, torch.Tensor],
    layers: dict[str, nn.Module],
    found: set[str],
    config: dict[str, Any],
) -> set[str]:
    """Return the names of the weights that were trained in full.

    Raises:
        ValueError: One of these weights is missing, or another layer without an adapter has a whole weight.
    """
    names = [name for name in layers if name and _is_trained_in_full(f"{name}.weight", config)]
    in_full = {f"{name}.{kind}" for name in names for kind, _ in layers[name].named_parameters(recurse=False)}
    if missing := sorted(in_full - set(whole)):
        raise ValueError(
            f"{weights_file} does not fit this model: {len(missing)} weights of modules that were trained in full are "
            f"missing (for example {missing[0]!r}). Copy or download the adapter again."
        )
    if foreign := sorted({name.rpartition(".")[0] for name in set(whole) - in_full} - found):
        raise ValueError(
            f"{weights_file} contains a whole weight of {foreign[0]!r}, a layer without an adapter. Remove the "
            "weight, or merge the adapter into its base with the library that made it."
        )
    return in_full


def _is_trained_in_full(weight: str, config: dict[str, Any]) -> bool:
    """Return whether a weight belongs to a module that `modules_to_save` names, according to peft's rules."""
    return any(f".{name}." in f".{weight}" for name in config.get("modules_to_save") or ())


def _read_adapter(config_file: str, weights_file: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the config and weights of an adapter, and check that its layer names can be translated."""
    config = read_json(config_file)
    check_adapter_config(config, config_file)
    try:
        source = load_file(weights_file)
    except SafetensorError as error:
        raise unreadable_weights(weights_file, error) from error
    for patterns in ("alpha_pattern", "rank_pattern"):
        if is_published(list(source)) and config.get(patterns):
            raise ValueError(
                f"{config_file} has a {patterns!r} for the original's layers, which can't be translated. Remove it."
            )
    return config, source


def _check_sides(weights_file: str, adapted: dict[str, torch.Tensor], wanted: set[str]) -> None:
    """Raise `ValueError` if A or B of a layer is missing."""
    sides = [f"{PREFIX}{layer}.{side}.weight" for layer in sorted(wanted) for side in ("lora_A", "lora_B")]
    if missing := [name for name in sides if name not in adapted]:
        raise ValueError(
            f"{weights_file} does not fit this model: {len(missing)} weights of layers that {ADAPTER_CONFIG} names "
            f"are missing (for example {missing[0]!r}). Copy or download the adapter again."
        )


def _check_shapes(
    weights_file: str, adapted: dict[str, torch.Tensor], layers: dict[str, nn.Module], config: dict[str, Any]
) -> None:
    """Raise `ValueError` if A and B of a layer do not have the shapes of a rank in the config."""
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    for name, layer in sorted(layers.items()):
        shapes = [tuple(adapted[f"{PREFIX}{name}.{side}.weight"].shape) for side in ("lora_A", "lora_B")]
        rank = shapes[0][0] if shapes[0] else 0
        if rank not in ranks or shapes != _lora_shapes(layer, rank):
            raise ValueError(
                f"{weights_file} does not fit this model: the weights of {name!r} have the shapes {shapes[0]} and "
                f"{shapes[1]}, which are not those of rank {config.get('r')} for this layer."
            )


def refuse_merged(files: CheckpointFiles) -> None:
    """Raise `ValueError` for an adapter that the original keeps next to the weights into which it was merged.

    Args:
        files: Files of the adapter.
    """
    path = PurePath(str(files.source), files.hub_kwargs.get("subfolder", ""))
    if path.name != MERGED_FOLDER:
        return
    if "subfolder" in files.hub_kwargs:
        source, inner = str(files.source), PurePosixPath(files.hub_kwargs["subfolder"])
        beside = CheckpointFiles.locate(source, **files.hub_kwargs | {"subfolder": str(inner.parent)})
    else:
        source = str(path.parent)
        beside = CheckpointFiles.locate(source)
    if CONFIG_NAME in beside.names and any(name.endswith(".safetensors") for name in beside.names):
        raise ValueError(
            f"The weights of {source} already contain the adapter in its folder {MERGED_FOLDER!r}, and loading it "
            f"would apply it twice: load {source} without the adapter. If its weights are not merged, move the "
            "adapter to another folder."
        )


def _refuse_merged_weights(
    layers: dict[str, nn.Module],
    adapted: dict[str, torch.Tensor],
    bases: dict[str, torch.Tensor],
    config: dict[str, Any],
    weights_file: str,
) -> None:
    """Raise `ValueError` if a layer of the model equals its base weight in the adapter's file plus the change."""
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    for name, base in bases.items():
        weight = layers[name].weight
        a, b = (adapted[f"{PREFIX}{name}.lora_{side}.weight"].float() for side in "AB")
        if a.ndim > 2 or weight.is_meta or base.dtype == torch.uint8:
            continue
        change = scale * (b @ a)
        left = weight.detach().float().cpu() - base.float() - change
        if change.any() and left.norm() < MERGED_TOLERANCE * change.norm():
            raise ValueError(
                f"The weights of this model already contain the adapter in {weights_file} (see {name!r}), and loading "
                "it would apply it twice: use the model without the adapter."
            )


def check_adapter_config(config: dict[str, Any], where: str) -> None:
    """Raise `ValueError` if a field of an adapter's config that affects actions is missing or has a wrong value."""

    def is_names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)

    def is_layers(value: Any) -> bool:
        return value is None or _is_pattern(value) or is_names(value)

    def is_numbers(value: Any) -> bool:
        return value is None or (isinstance(value, dict) and all(map(_is_positive, value.values())))

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "peft_type": (lambda value: value == "LORA", "'LORA'"),
        "r": (lambda value: _is_positive(value) and isinstance(value, int), "a positive integer"),
        "lora_alpha": (_is_positive, "a positive number"),
        "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
        "fan_in_fan_out": (lambda value: isinstance(value, bool), "true or false"),
        "target_modules": (is_layers, "a regular expression or a list of names"),
        "exclude_modules": (is_layers, "a regular expression or a list of names"),
        "modules_to_save": (lambda value: value is None or is_names(value), "a list of names"),
        "rank_pattern": (is_numbers, "a map from names to positive numbers"),
        "alpha_pattern": (is_numbers, "a map from names to positive numbers"),
    }
    for name, (is_right, kind) in rules.items():
        if name in config and not is_right(config[name]):
            raise ValueError(f"{where} has {name}={config[name]!r:.80}, which must be {kind}. Correct the file.")
    if missing := [name for name in ("peft_type", "r", "lora_alpha") if name not in config]:
        raise ValueError(f"{where} lacks {missing[0]!r}: copy or download the adapter again.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def linear_layers(layers: dict[str, nn.Module]) -> list[str]:
    """List the layers that can have an adapter; the model may have adapters already."""
    return [
        name.removesuffix(".base_layer")
        for name, layer in layers.items()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
    ]


def published_layers(model: nn.Module) -> dict[str, list[str]]:
    """Map each of the original's layer names to our names."""
    names = [f"projector.{name}" for name, _ in model.model.projector.named_children() if name.startswith("fc")]
    for name, tower in model.model.vision_backbone.named_children():
        blocks = [f"blocks.{index}.{part}" for index in range(tower.config.num_hidden_layers) for part in BLOCK_PARTS]
        names += [f"vision_backbone.{name}.{part}" for part in ("patch_embed.proj", *blocks)]
    prefix = "model.language_model."
    names += [
        f"language_model.model.{name.removeprefix(prefix)}"
        for name in linear_layers(dict(model.named_modules()))
        if name.startswith(prefix)
    ]
    empty = torch.empty(3, 0)
    return {
        name: [path.removesuffix(".weight") for path, _ in split_fused(our_name(model, f"{name}.weight"), empty)]
        for name in [*names, "language_model.lm_head"]
    }


def is_target(name: str, config: dict[str, Any]) -> bool:
    """Return whether an adapter's config targets a layer, according to peft's rules."""

    def matches(patterns: Any) -> bool:
        if patterns == ALL_LINEAR:
            return not name.endswith("lm_head")
        if isinstance(patterns, str):
            return re.fullmatch(patterns, name) is not None
        return any(name == one or name.endswith(f".{one}") for one in patterns or ())

    chosen = config.get("layers_to_transform")
    if chosen is not None:
        index = re.search(r"\.(\d+)\.", name)
        if index is None or int(index[1]) not in ([chosen] if isinstance(chosen, int) else chosen):
            return False
    return matches(config.get("target_modules")) and not matches(config.get("exclude_modules"))


def split_fused(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Split a weight of a fused qkv layer into those of three layers; return any other weight unchanged."""
    if ".qkv." not in name:
        return [(name, tensor)]
    parts = tensor.chunk(3) if ".lora_B." in name else [tensor.clone() for _ in "qkv"]
    return [(name.replace(".qkv.", f".{each}_proj."), part) for each, part in zip("qkv", parts, strict=True)]


def _lora_shapes(layer: nn.Module, rank: int) -> list[tuple[int, ...]]:
    """Return the shapes of A and B."""
    outputs, *inputs = layer.weight.shape
    if isinstance(layer, nn.Linear):  # its weight may be packed
        outputs, inputs = layer.out_features, [layer.in_features]
    return [(rank, *inputs), (outputs, rank, *[1] * (len(inputs) - 1))]


def _layer(layers: dict[str, nn.Module], layer: str, key: str) -> nn.Module:
    """Look up the layer of an adapter's weight."""
    if layer not in layers:
        raise ValueError(
            f"Adapter weight {key!r} matches no layer of this model ({layer!r} does not exist). The adapter was made "
            "for another model."
        )
    return layers[layer]


__all__ = ["add_trained_in_full", "is_published", "our_name", "refuse_merged", "split_fused", "translate"]
