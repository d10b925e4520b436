"""Describe a checkpoint from its configs and the headers of its weights files."""

import fnmatch
import os
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, hf_api

from ..modeling.action_tokenizer import action_dim, check_statistics
from ..modeling.checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_POLICY,
    HUB_ERRORS,
    OFT_FILES,
    STATISTICS_FILE,
    CheckpointFiles,
    hub_error,
    unreadable_weights,
)
from ..modeling.checkpoint_loading import named_base, refuse_training_run, statistics_in_file
from ..modeling.configuration_openvla import OFT_FIELDS, OpenVLAConfig
from ..modeling.oft_loading import PLATFORMS, fitting_platforms


DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass
class CheckpointInfo:
    """Description of a checkpoint, as returned by `describe`.

    Attributes:
        layout: "openvla-hf" (of this package), "published" (of the original code), "adapter" or "openvla-oft".
        files: File name -> size in bytes.
        vision_towers: One line for each vision tower. Empty for an adapter.
        language_model: One line, or `None` for an adapter.
        action_dims: Statistics key -> number of action dimensions.
        dtype: Data type of most weights.
        quantization: Quantisation method and bits, or `None`.
        parameters: Number of stored weights, or `None` if quantisation packs several weights into one number.
        size: Size of the weights files in bytes.
        base_model: Base model of an adapter, or `None` if its config does not name one.
        has_code: Whether the checkpoint loads without this package, with `trust_remote_code=True`.
        statistics: Action statistics. Empty for an adapter that uses those of its base model.
        statistics_file: File that holds the statistics, or `None`.
        oft: Fields of the config of a policy with parallel decoding, several images or a state, or `None` for plain
            OpenVLA. `platform` is the platform that the fields follow from, or `None` if the config states them.
            Unknown fields are missing.
    """

    layout: str
    files: dict[str, int] = field(repr=False)
    vision_towers: list[str]
    language_model: str | None
    action_dims: dict[str, int]
    dtype: str
    quantization: str | None
    parameters: int | None
    size: int
    base_model: str | None
    has_code: bool
    statistics: dict[str, Any] = field(repr=False)
    statistics_file: str | None
    oft: dict[str, Any] | None = None


def describe(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> CheckpointInfo:
    """Describe a checkpoint without loading its weights.

    Args:
        source: Folder or Hub id. Offline, the files in the cache are described.
        revision: Branch, tag or commit of a Hub id.
        token: Token for a private repository. Defaults to the stored one.

    Raises:
        ValueError: The source is not an OpenVLA checkpoint, has no weights in safetensors files, or its configs or
            statistics are damaged.
        OSError: The source can't be found or read.
    """
    files = CheckpointFiles.locate(source, revision=revision, token=token)
    config = files.read_json(CONFIG_NAME) or {}
    adapter = files.read_json(ADAPTER_CONFIG)
    refuse_training_run(source, config)
    if adapter is None and config.get("model_type") != OpenVLAConfig.model_type:
        raise ValueError(
            f"{source} is not an OpenVLA checkpoint: its {CONFIG_NAME} "
            + (
                f"is for {config['model_type']!r}."
                if "model_type" in config
                else "is missing or does not name a model."
            )
        )
    sizes = _sizes(files)
    weights = [name for name in sizes if name.endswith(".safetensors") and "/" not in name]
    components = [name for pattern in OFT_FILES for name in fnmatch.filter(files.names, pattern) if name in sizes]
    if not weights:
        raise ValueError(f"{source} has no safetensors files. Save the model again with `save_pretrained`.")
    counts: Counter[str] = sum((_count_weights(files, name) for name in weights), Counter())
    model = OpenVLAConfig.from_dict(config) if adapter is None else None
    # The file next to the weights takes precedence, as it does when loading.
    in_file = statistics_in_file(files.read_json(STATISTICS_FILE), source)
    in_config = check_statistics(model.norm_stats, f"{CONFIG_NAME} of {source}") if model and not in_file else None
    quantization = _quantization(config.get("quantization_config"))
    statistics = in_file or in_config or {}
    return CheckpointInfo(
        layout=_layout(sizes, config, adapter),
        files=sizes,
        vision_towers=[_tower(tower) for tower in model.vision_configs] if model else [],
        language_model=_language_model(model.text_config) if model else None,
        action_dims={key: action_dim(one["action"]) for key, one in statistics.items()},
        dtype=DTYPE_NAMES.get(counts.most_common(1)[0][0], counts.most_common(1)[0][0]),
        quantization=quantization,
        parameters=None if quantization else counts.total(),
        size=sum(sizes[name] for name in [*weights, *components]),
        base_model=named_base(adapter) if adapter else None,
        has_code=adapter is None and "configuration_openvla.py" in sizes,
        statistics=statistics,
        statistics_file=STATISTICS_FILE if in_file else CONFIG_NAME if in_config else None,
        oft=_oft_fields(components, config if adapter is None else files.read_json(ADAPTER_POLICY) or {}, statistics),
    )


def refuse_adapter(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> None:
    """Raise an error for an adapter, in steps that need a whole checkpoint.

    Raises:
        ValueError: The source is an adapter.
        OSError: The source can't be found or read.
    """
    names = CheckpointFiles.locate(source, revision=revision, token=token).names
    if CONFIG_NAME not in names and ADAPTER_CONFIG in names:
        raise ValueError(f"{source} is an adapter. Merge it first with `openvla-hf merge {source} NEW_FOLDER`.")


def _sizes(files: CheckpointFiles) -> dict[str, int]:
    """Return the names and sizes in bytes of the files of a folder, of a repository, or of its part in the cache."""
    if not _is_remote(files):
        paths = {name: files.find(name) for name in sorted(files.names)}
        return {name: os.path.getsize(path) for name, path in paths.items() if path is not None}
    try:
        found = hf_api().model_info(str(files.source), files_metadata=True, **_at_commit(files))
    except HUB_ERRORS as error:
        raise hub_error(str(files.source), "the files", error) from error
    return {file.rfilename: file.size or 0 for file in found.siblings or []}


def _count_weights(files: CheckpointFiles, name: str) -> Counter[str]:
    """Count the values of each data type in a weights file, from its header alone."""
    counts: Counter[str] = Counter()
    try:
        if _is_remote(files):
            header = hf_api().parse_safetensors_file_metadata(str(files.source), name, **_at_commit(files))
            for tensor in header.tensors.values():
                counts[tensor.dtype] += prod(tensor.shape)
        else:
            with safe_open(files.find(name), "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    tensor = file.get_slice(key)
                    counts[tensor.get_dtype()] += prod(tensor.get_shape())
    except (SafetensorError, SafetensorsParsingError) as error:
        raise unreadable_weights(f"{files.source}/{name}", error) from error
    except HUB_ERRORS as error:
        raise hub_error(str(files.source), name, error) from error
    return counts


def _is_remote(files: CheckpointFiles) -> bool:
    """Whether the files are on the Hub, and not only in a folder or in the cache."""
    return files.is_whole and not os.path.isdir(str(files.source))


def _at_commit(files: CheckpointFiles) -> dict[str, Any]:
    return {"revision": files.hub_kwargs["revision"], "token": files.hub_kwargs.get("token")}


def _layout(files: dict[str, int], config: dict[str, Any], adapter: dict[str, Any] | None) -> str:
    if any(fnmatch.filter(files, pattern) for pattern in OFT_FILES):
        return "openvla-oft"
    if adapter is not None:
        return "adapter"
    return "published" if "vision_backbone_id" in config else "openvla-hf"


def _oft_fields(components: list[str], config: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields of OpenVLA-OFT: those in the config, or those that follow from components and statistics."""
    stated = {name: config[name] for name in OFT_FIELDS if name in config}
    if stated or not components:
        return stated | {"platform": None} if stated else None
    kinds = {name.partition("--")[0] for name in components}
    fields: dict[str, Any] = {"action_decoding": "parallel", "action_head": "none"}
    if "action_head" in kinds:
        fields["action_head"] = "diffusion" if "noisy_action_projector" in kinds else "l1"
    for name, kind in (("action_dim", "action"), ("proprio_dim", "proprio")):
        dims = {len(one[kind]["q01"]) for one in statistics.values() if kind in one}
        if len(dims) == 1:
            fields[name] = dims.pop()
    fitting = fitting_platforms(fields)
    if "proprio_projector" not in kinds:
        fields["proprio_dim"] = None
    platform = fitting[0] if len(fitting) == 1 else None
    return (
        (PLATFORMS[platform] if platform else {})
        | fields
        | {
            "use_film": "vision_backbone" in kinds,
            "platform": platform,
        }
    )


def _tower(config: PreTrainedConfig) -> str:
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.image_size} px in patches of {config.patch_size}"
    )


def _language_model(config: PreTrainedConfig) -> str:
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"vocabulary {config.vocab_size}"
    )


def _quantization(config: dict[str, Any] | None) -> str | None:
    if config is None:
        return None
    if config["quant_method"] != "bitsandbytes":
        return config["quant_method"]
    return f"bitsandbytes 4-bit {config['bnb_4bit_quant_type']}" if config["load_in_4bit"] else "bitsandbytes 8-bit"


__all__ = ["CheckpointInfo", "describe", "refuse_adapter"]
