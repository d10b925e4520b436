"""What a checkpoint is, told by its configs and the headers of its weights files."""

import os
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..modeling.action_tokenizer import action_dim, check_statistics
from ..modeling.checkpoint_files import (
    ADAPTER_CONFIG,
    HUB_ERRORS,
    STATISTICS_FILE,
    hub_error,
    read_json,
    unreadable_weights,
)
from ..modeling.checkpoint_loading import OFT_FILES, named_base, statistics_in_file
from ..modeling.configuration_openvla import OpenVLAConfig


DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass
class CheckpointInfo:
    """A checkpoint, by its configs and the headers of its weights files.

    layout: "openvla-hf" (ours), "published" (the original's), "adapter", or "openvla-oft".
    files: Name -> size in bytes.
    vision_towers: One line each; empty for an adapter, whose base has them.
    language_model: One line, or `None` for an adapter.
    action_dims: Statistics key -> number of action dimensions.
    dtype: Of most weights.
    quantization: Method and bits, or `None`.
    parameters: Stored weights; `None` where quantisation packs several into one number.
    size: Bytes of the weights files.
    base_model: What an adapter belongs to, or `None` where its config does not say so.
    has_code: Whether it loads without this package, by `trust_remote_code=True`.
    statistics: As in `dataset_statistics.json`; empty for an adapter that acts with those of its base.
    statistics_file: The file that they are from, or `None`.
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


def describe(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> CheckpointInfo:
    """Say what a checkpoint is without loading its weights.

    Args:
        source: Folder or Hub id; offline, what is in the cache of it.
        revision: Branch, tag or commit of a Hub id.
        token: For a private repository; the stored one by default.

    Raises:
        ValueError: It is not an OpenVLA checkpoint, has no weights in safetensors files, or its configs or statistics
            are damaged.
        OSError: It can't be found or read.
    """
    place = _open(source, revision, token)
    config = place.read_json(CONFIG_NAME) or {}
    adapter = place.read_json(ADAPTER_CONFIG)
    if adapter is None and config.get("model_type") != OpenVLAConfig.model_type:
        raise ValueError(
            f"{source} is not an OpenVLA checkpoint: its {CONFIG_NAME} "
            + (
                f"is for {config['model_type']!r}."
                if "model_type" in config
                else "is missing or does not name a model."
            )
        )
    weights = [name for name in place.files if name.endswith(".safetensors")]
    if not weights:
        raise ValueError(f"{source} has no weights in safetensors files, and no others are read.")
    counts: Counter[str] = Counter()
    for name in weights:
        for dtype, count in place.read_header(name):
            counts[dtype] += count
    model = OpenVLAConfig.from_dict(config) if adapter is None else None
    # As in loading: the file beside the weights comes first.
    in_file = statistics_in_file(place.read_json(STATISTICS_FILE), source)
    in_config = check_statistics(model.norm_stats, f"{CONFIG_NAME} of {source}") if model and not in_file else None
    quantization = _quantization(config.get("quantization_config"))
    statistics = in_file or in_config or {}
    return CheckpointInfo(
        layout=_layout(place.files, config, adapter),
        files=place.files,
        vision_towers=[_tower(tower) for tower in model.vision_configs] if model else [],
        language_model=_language_model(model.text_config) if model else None,
        action_dims={key: action_dim(one["action"]) for key, one in statistics.items()},
        dtype=DTYPES.get(counts.most_common(1)[0][0], counts.most_common(1)[0][0]),
        quantization=quantization,
        parameters=None if quantization else counts.total(),
        size=sum(place.files[name] for name in weights),
        base_model=named_base(adapter) if adapter else None,
        has_code=adapter is None and "configuration_openvla.py" in place.files,
        statistics=statistics,
        statistics_file=STATISTICS_FILE if in_file else CONFIG_NAME if in_config else None,
    )


def refuse_adapter(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> None:
    """Require whole weights, for a step that an adapter alone can't take.

    Raises:
        ValueError: It is an adapter.
        OSError: It can't be found or read.
    """
    place = _open(source, revision, token)
    if CONFIG_NAME not in place.files and ADAPTER_CONFIG in place.files:
        raise ValueError(f"{source} is an adapter: merge it first with `openvla-hf merge {source} NEW_FOLDER`.")


def _open(source: str | os.PathLike, revision: str | None, token: str | None) -> "_Folder | _Repository":
    if not Path(source).is_dir() and constants.is_offline_mode():
        try:
            source = snapshot_download(str(source), revision=revision, local_files_only=True)
        except HUB_ERRORS as error:
            raise hub_error(str(source), "the files", error) from error
    return _Folder(Path(source)) if Path(source).is_dir() else _Repository(str(source), revision, token)


@dataclass
class _Folder:
    path: Path

    @property
    def files(self) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in sorted(self.path.iterdir()) if entry.is_file()}

    def read_json(self, name: str) -> Any:
        path = self.path / name
        return read_json(path) if path.is_file() else None

    def read_header(self, name: str) -> list[tuple[str, int]]:
        """(dtype, number of values) of every tensor of a weights file."""
        try:
            with safe_open(self.path / name, "pt") as file:
                slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 - no dict
                return [(tensor.get_dtype(), prod(tensor.get_shape())) for tensor in slices]
        except SafetensorError as error:
            raise unreadable_weights(self.path / name, error) from error


class _Repository:
    def __init__(self, repo_id: str, revision: str | None, token: str | None):
        self.api = HfApi(token=token)
        try:
            found = self.api.model_info(repo_id, revision=revision, files_metadata=True)
        except HUB_ERRORS as error:
            raise hub_error(repo_id, "the files", error) from error
        self.files = {one.rfilename: one.size or 0 for one in found.siblings or []}
        self.repo_id, self.commit = repo_id, found.sha

    def read_json(self, name: str) -> Any:
        if name not in self.files:
            return None
        try:
            path = hf_hub_download(self.repo_id, name, revision=self.commit, token=self.api.token)
        except HUB_ERRORS as error:
            raise hub_error(self.repo_id, name, error) from error
        return read_json(path)

    def read_header(self, name: str) -> list[tuple[str, int]]:
        """(dtype, number of values) of every tensor of a weights file."""
        try:
            header = self.api.parse_safetensors_file_metadata(self.repo_id, name, revision=self.commit)
        except SafetensorsParsingError as error:
            raise unreadable_weights(f"{self.repo_id}/{name}", error) from error
        except HUB_ERRORS as error:
            raise hub_error(self.repo_id, name, error) from error
        return [(tensor.dtype, prod(tensor.shape)) for tensor in header.tensors.values()]


def _layout(files: dict[str, int], config: dict[str, Any], adapter: dict[str, Any] | None) -> str:
    if any(fnmatch(name, pattern) for name in files for pattern in OFT_FILES):
        return "openvla-oft"
    if adapter is not None:
        return "adapter"
    return "published" if "vision_backbone_id" in config else "openvla-hf"


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
