"""Convert training runs of Prismatic, the original's training code, to checkpoints of this package.

A run is a folder with `config.json`, `dataset_statistics.json` and `checkpoints/step-*.pt`. Like the original's own
converter, this one writes the published configuration: means and standard deviations of the pixels rounded to bfloat16
(0.484375 instead of the 0.485 of training), and the language model's defaults of transformers 4.40.1.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME

from .. import auto  # noqa: F401 - makes the Auto classes know OpenVLA
from ..modeling.checkpoint_files import STATISTICS_FILE, CheckpointFiles
from ..modeling.checkpoint_loading import statistics_in_file
from ..modeling.configuration_openvla import OpenVLAConfig
from ..modeling.known_names import check_name
from ..modeling.torch_files import read_torch_file
from ..new_folder import new_folder, require_new_folder
from ..processing.image_processing_openvla import (
    DINOV2_MEAN,
    DINOV2_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    OpenVLAImageProcessor,
)
from ..processing.processing_openvla import OpenVLAProcessor, read_published_fields
from .shard_writing import SHARD_BYTES, Shard, write_shards
from .transformers_internals import PartLoader


class BaseModel(NamedTuple):
    """Parts of the model that a run starts from, by their published names."""

    vision_backbone_id: str
    llm_backbone_id: str
    image_resize_strategy: str


# `vla.base_vlm` of a run's config -> its parts. Models with other towers or language models are not OpenVLA.
BASE_MODELS = {
    "prism-dinosiglip-224px+7b": BaseModel("dinosiglip-vit-so-224px", "llama2-7b-pure", "resize-naive"),
    "prism-dinosiglip-224px-controlled+7b": BaseModel("dinosiglip-vit-so-224px", "llama2-7b-pure", "resize-naive"),
    "prism-dinosiglip+7b": BaseModel("dinosiglip-vit-so-384px", "llama2-7b-pure", "resize-naive"),
    "prism-dinosiglip-controlled+7b": BaseModel("dinosiglip-vit-so-384px", "llama2-7b-pure", "resize-naive"),
    "prism-siglip+7b": BaseModel("siglip-vit-so400m-384px", "llama2-7b-pure", "resize-naive"),
    "prism-siglip-controlled+7b": BaseModel("siglip-vit-so400m-384px", "llama2-7b-pure", "resize-naive"),
    "dinosiglip-224px-resize-naive+7b": BaseModel("dinosiglip-vit-so-224px", "vicuna-v15-7b", "resize-naive"),
    "dinosiglip-384px-resize-naive+7b": BaseModel("dinosiglip-vit-so-384px", "vicuna-v15-7b", "resize-naive"),
    "dinosiglip-384px-letterbox+7b": BaseModel("dinosiglip-vit-so-384px", "vicuna-v15-7b", "letterbox"),
    "siglip-224px+7b": BaseModel("siglip-vit-so400m", "vicuna-v15-7b", "letterbox"),
    "siglip-384px-letterbox+7b": BaseModel("siglip-vit-so400m-384px", "vicuna-v15-7b", "letterbox"),
    "siglip-384px-resize-crop+7b": BaseModel("siglip-vit-so400m-384px", "vicuna-v15-7b", "resize-crop"),
    "siglip-384px-resize-naive+7b": BaseModel("siglip-vit-so400m-384px", "vicuna-v15-7b", "resize-naive"),
    "dinov2-224px+7b": BaseModel("dinov2-vit-l", "vicuna-v15-7b", "letterbox"),
}

# Runs have no tokenizer. These are public checkpoints with the same language model.
TOKENIZERS = {"llama2-7b-pure": "openvla/openvla-7b", "vicuna-v15-7b": "openvla/openvla-v01-7b"}

# Part of a run's weights -> name in a run (a pattern) -> published name, from which `weight_mapping` leads to ours.
RENAMINGS = {
    "vision_backbone": {
        r"^(dino_)?featurizer\.": "vision_backbone.featurizer.",
        r"^siglip_featurizer\.": "vision_backbone.fused_featurizer.",
        r"\.gamma$": ".scale_factor",
    },
    "projector": {
        r"^projector\.0\.": "projector.fc1.",
        r"^projector\.2\.": "projector.fc2.",
        r"^projector\.4\.": "projector.fc3.",
    },
    "llm_backbone": {r"^llm\.": "language_model."},
}

# Type of a tower -> mean and standard deviation of its pixels.
PIXELS = {
    "dinov2_with_registers": (DINOV2_MEAN, DINOV2_STD),
    "siglip_vision_model": (SIGLIP_MEAN, SIGLIP_STD),
}

CHECKPOINTS = "checkpoints"
STEP = re.compile(r"step-(\d+)-.*\.pt")
LATEST = "latest-checkpoint.pt"
DTYPES = ("bfloat16", "float16", "float32")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    checkpoint: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: str = "bfloat16",
    revision: str | None = None,
    token: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **config_overrides: Any,
) -> Path:
    """Write a training run of Prismatic as an ordinary checkpoint, with memory for about one shard.

    Args:
        source: Folder of the run, one of its `.pt` files, or a Hub id such as "openvla/openvla-7b-prismatic".
        destination: New or empty folder. Files appear in it once all are written.
        checkpoint: Name of the `.pt` file in the run's folder `checkpoints`. Defaults to the last step.
        tokenizer: Folder or Hub id of the tokenizer, since a run has none. Defaults to that of the published
            checkpoint with the same language model.
        dtype: Data type of the written weights: "bfloat16", "float16" or "float32".
        revision: Branch, tag or commit of a Hub id.
        token: Token for a private repository. Defaults to the stored one.
        on_progress: Called with the number of written shards and the number of all shards.
        config_overrides: Fields of the config that differ from the base model's. A dictionary as `vision_config`,
            `fused_vision_config` or `text_config` overrides single fields of that part.

    Returns:
        The folder.

    Raises:
        ValueError: The source is not a training run, its base model is unknown, its weights do not fit the config, or
            the `.pt` file contains more than tensors and plain values.
        FileExistsError: `destination` is not empty.
        OSError: A file is missing or damaged, or the tokenizer can't be loaded.
    """
    destination = Path(destination)
    require_new_folder(destination)
    check_name(dtype, DTYPES, "dtype")
    run, weights_file = _find_weights(source, checkpoint, {"revision": revision, "token": token})
    base = _base_model(run)
    statistics = statistics_in_file(run.read_json(STATISTICS_FILE), source)
    if statistics is None:
        raise OSError(f"{source} has no {STATISTICS_FILE}: copy it from the training run.")
    config = _config(base, statistics, config_overrides)
    processor = _processor(base, config, tokenizer or TOKENIZERS[base.llm_backbone_id], token)
    weights = read_weights(weights_file)
    groups = _groups(weights)

    torch_dtype: torch.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch_dtype)
    with new_folder(destination) as folder:
        model.save_pretrained(folder, state_dict={})  # config, code and statistics
        processor.save_pretrained(folder)
        shards = _shards(PartLoader(model, None, torch_dtype, source), weights, groups)
        write_shards(folder, shards, len(groups), on_progress)
    return destination


# Files of a run


def _find_weights(
    source: str | os.PathLike, checkpoint: str | None, hub_kwargs: dict[str, Any]
) -> tuple[CheckpointFiles, str]:
    """Find the files next to the run's config, and the path of its weights, downloaded if need be."""
    path = Path(source)
    if path.is_file():
        if checkpoint is not None:
            raise ValueError(f"{source} is a file: give the folder of the run with `checkpoint={checkpoint!r}`.")
        folders = [folder for folder in list(path.parents)[:2] if (folder / CONFIG_NAME).is_file()]
        return CheckpointFiles.locate(folders[0] if folders else path.parent), str(path)
    run = CheckpointFiles.locate(source, **hub_kwargs)
    if not run.is_whole and (config_file := run.find(CONFIG_NAME)) is not None:  # read the cached files as a folder
        run = CheckpointFiles.locate(Path(config_file).parent)
    beside = CheckpointFiles.locate(run.source, **run.hub_kwargs | {"subfolder": CHECKPOINTS})
    names = sorted(name for name in beside.names if name.endswith(".pt"))
    if not names:
        _base_model(run)  # raises the clearer error if this is not a run at all
        raise OSError(f"{source} has no `.pt` files in its folder `{CHECKPOINTS}`: copy them from the training run.")
    if checkpoint is not None:
        check_name(checkpoint, names, "checkpoint")
    found = beside.find(checkpoint or latest(names))
    assert found is not None  # it was listed
    return run, found


def latest(names: list[str]) -> str:
    """Return the file of the last step.

    Raises:
        ValueError: There are several files, and none has a name that training gives.
    """
    steps = {name: int(match[1]) for name in names if (match := STEP.fullmatch(name))}
    if steps:
        return max(steps, key=lambda name: steps[name])
    if LATEST in names or len(names) == 1:
        return LATEST if LATEST in names else names[0]
    raise ValueError(
        f"None of the checkpoints {', '.join(map(repr, names))} has a step in its name: choose one with `checkpoint=`."
    )


def _base_model(run: CheckpointFiles) -> BaseModel:
    config = run.read_json(CONFIG_NAME) or {}
    settings = config.get("vla")
    if not isinstance(settings, dict) or "base_vlm" not in settings:
        raise ValueError(
            f"{run.source} is not a training run of Prismatic: its {CONFIG_NAME} is missing or does not name a base "
            "model (`vla.base_vlm`)."
            + (" It already loads with `from_pretrained`." if config.get("model_type") == "openvla" else "")
        )
    check_name(settings["base_vlm"], BASE_MODELS, f"base model in {CONFIG_NAME} of {run.source}:")
    return BASE_MODELS[settings["base_vlm"]]


# Config and processor


def _config(base: BaseModel, statistics: dict[str, Any], overrides: Mapping[str, Any]) -> OpenVLAConfig:
    for name in overrides:
        check_name(name, OpenVLAConfig.__dataclass_fields__, "config field")
    fields: dict[str, Any] = {"vision_backbone_id": base.vision_backbone_id, "norm_stats": statistics, **overrides}
    pad_token_id = fields.get("pad_token_id", OpenVLAConfig.pad_token_id)
    fields["text_config"] = {"pad_token_id": pad_token_id} | dict(fields.get("text_config") or {})
    return OpenVLAConfig(**fields)


def _processor(
    base: BaseModel, config: OpenVLAConfig, tokenizer_source: str | os.PathLike, token: str | None
) -> OpenVLAProcessor:
    limit = config.text_config.max_position_embeddings
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_source, model_max_length=limit, token=token)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"Cannot load the tokenizer of {os.fspath(tokenizer_source)!r} ({reason}). A training run has none: give "
            "the folder or Hub id of a checkpoint with the same language model as `tokenizer=`."
        ) from error
    if tokenizer.pad_token is None:  # Llama's own, to which the original adds this token
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"The tokenizer of {os.fspath(tokenizer_source)!r} pads with id {tokenizer.pad_token_id}, but the model "
            f"pads with {config.pad_token_id}: give the tokenizer of a checkpoint with the same language model."
        )
    means, stds = zip(*(PIXELS[tower.model_type] for tower in config.vision_configs), strict=True)
    image_processor = OpenVLAImageProcessor(
        image_resize_strategy=base.image_resize_strategy,  # type: ignore[arg-type]
        size=config.vision_config.image_size,
        image_mean=means,
        image_std=stds,
        letterbox_fill=[int(255 * level) for level in means[0]],
    )
    return OpenVLAProcessor(
        image_processor,
        tokenizer,
        image_token_id=config.image_token_id,
        num_image_tokens=config.num_image_tokens,
        **read_published_fields({"llm_backbone_id": base.llm_backbone_id}),
    )


# Weights


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the weights of a run by their published names. Tensors stay in the file; the optimizer's state is left out.

    Raises:
        ValueError: A part of the model is missing, or a weight has a name that no rule of `RENAMINGS` knows.
        OSError: The file is damaged.
    """
    model = read_torch_file(path).get("model")
    parts = model if isinstance(model, dict) else {}
    weights = {}
    for part, renamings in RENAMINGS.items():
        tensors = parts.get(part)
        if not isinstance(tensors, dict) or not tensors:
            raise ValueError(
                f"{path} has no weights of {part!r}: give a checkpoint of the whole model, as the original's "
                "`vla-scripts/train.py` writes it."
            )
        for name, tensor in tensors.items():
            published = str(name)
            for pattern, replacement in renamings.items():
                published = re.sub(pattern, replacement, published)
            if not isinstance(tensor, torch.Tensor) or published == name:
                raise ValueError(f"{path} contains {name!r} in {part!r}, which is not a weight of OpenVLA.")
            weights[published] = tensor
    if unknown := [part for part, tensors in parts.items() if part not in RENAMINGS and tensors]:
        raise ValueError(f"{path} contains {unknown[0]!r}, which is not a part of OpenVLA.")
    return weights


def _groups(weights: dict[str, torch.Tensor]) -> list[list[str]]:
    """Group the names of the weights by about `SHARD_BYTES` in 16 bits."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if groups[-1] and size + 2 * tensor.numel() > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 2 * tensor.numel()
    return groups


def _shards(loader: PartLoader, weights: dict[str, torch.Tensor], groups: list[list[str]]) -> Iterator[Shard]:
    """Yield the tensors of each group by our names. Each group is freed before the next."""
    for names in groups:
        yield loader.load({name: weights[name] for name in names})
        loader.release()
    loader.check_complete()


__all__ = ["BASE_MODELS", "convert"]
