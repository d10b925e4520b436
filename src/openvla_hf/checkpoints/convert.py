"""Convert models of Prismatic, the original's training code, to checkpoints of this package.

A training run of OpenVLA is a folder with `config.json`, `dataset_statistics.json` and `checkpoints/step-*.pt`. Like
the original's own converter, this one writes the published configuration: means and standard deviations of the pixels
rounded to bfloat16 (0.484375 instead of the 0.485 of training), and the language model's defaults of transformers
4.40.1.

A vision-language model, from which such a run starts, has no statistics. It is written as it was trained.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME

from ..modeling.checkpoint_files import STATISTICS_FILE, CheckpointFiles
from ..modeling.checkpoint_loading import statistics_in_file
from ..modeling.configuration_openvla import PUBLISHED_VISION_BACKBONES, OpenVLAConfig
from ..modeling.known_names import check_name
from ..modeling.torch_files import read_torch_file
from ..new_folder import require_new_folder
from ..processing.image_processing_openvla import DINOV2_MEAN, DINOV2_STD, ResizeStrategy
from ..processing.processing_openvla import read_published_fields
from .export import TIMM_MODEL_IDS
from .policy_writing import DINOV2, DTYPES, PIXELS, Pixels, load_tokenizer, make_processor, write_policy
from .vision_weights import name_towers, read_tower


class BaseModel(NamedTuple):
    """Parts of the model that a run starts from, by their published names."""

    vision_backbone_id: str
    llm_backbone_id: str
    image_resize_strategy: str


# `vla.base_vlm` of a run's config, and name of a vision-language model on the Hub -> its parts. Models with other
# towers or language models are not OpenVLA.
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

# The repository of the vision-language models, each in a folder of its own.
BASE_REPOSITORY = "TRI-ML/prismatic-vlms"

# Neither has a tokenizer. These are public checkpoints with the same language model.
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

# Means and standard deviations in published checkpoints.
PUBLISHED_PIXELS: Pixels = {**PIXELS, DINOV2: (DINOV2_MEAN, DINOV2_STD)}
# Epsilon of the norms of Llama-2 and Vicuna 1.5. Published checkpoints of OpenVLA have another one.
LLAMA_2_NORM_EPS = 1e-5

ADVICE = (
    "A model of Prismatic has none: give the folder or Hub id of a checkpoint with the same language model as "
    "`tokenizer=`."
)
CHECKPOINTS = "checkpoints"
STEP = re.compile(r"step-(\d+)-.*\.pt")
LATEST = "latest-checkpoint.pt"


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
    """Write a training run or a vision-language model of Prismatic as an ordinary checkpoint.

    A vision-language model has no statistics of actions, so the checkpoint can be trained but can't act. Weights are
    read and written with memory for about one shard, and the towers' if the model's files leave them out.

    Args:
        source: Folder of a run or a model, one of its `.pt` files, a Hub id such as "openvla/openvla-7b-prismatic", or
            one of `BASE_MODELS`, the vision-language models on the Hub.
        destination: New or empty folder. Files appear in it once all are written.
        checkpoint: Name of the `.pt` file in the folder `checkpoints`. Defaults to the last step.
        tokenizer: Folder or Hub id of the tokenizer, since the source has none. Defaults to that of the published
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
        ValueError: The source is neither a training run nor a vision-language model, its base model is unknown, its
            weights do not fit the config, or the `.pt` file contains more than tensors and plain values.
        FileExistsError: `destination` is not empty.
        OSError: A file is missing or damaged, or the tokenizer or a tower can't be loaded.
    """
    destination = Path(destination)
    require_new_folder(destination)
    check_name(dtype, DTYPES, "dtype")
    run, weights_file = _find_weights(source, checkpoint, {"revision": revision, "token": token})
    base = _base_model(run)
    is_trained = _is_training_run(run)
    statistics = None
    if is_trained and (statistics := statistics_in_file(run.read_json(STATISTICS_FILE), source)) is None:
        raise OSError(f"{source} has no {STATISTICS_FILE}: copy it from the training run.")
    text_defaults = {} if is_trained else {"rms_norm_eps": LLAMA_2_NORM_EPS}
    config = _config(base, statistics, text_defaults, config_overrides)
    weights = read_weights(weights_file, may_lack_towers=not is_trained)
    if not any(name.startswith("vision_backbone.") for name in weights):
        weights |= _read_towers(base, config, token)
    processor = make_processor(
        config,
        _tokenizer(config, tokenizer or TOKENIZERS[base.llm_backbone_id], token),
        PUBLISHED_PIXELS if is_trained else PIXELS,
        base.image_resize_strategy,
        **read_published_fields({"llm_backbone_id": base.llm_backbone_id}),
    )
    write_policy(destination, config, processor, weights, dtype=dtype, source=source, on_progress=on_progress)
    return destination


# Files of a run


def _find_weights(
    source: str | os.PathLike, checkpoint: str | None, hub_kwargs: dict[str, Any]
) -> tuple[CheckpointFiles, str]:
    """Find the files next to the config, and the path of the weights, downloaded if need be."""
    path = Path(source)
    if path.is_file():
        if checkpoint is not None:
            raise ValueError(f"{source} is a file: give the folder of the run with `checkpoint={checkpoint!r}`.")
        folders = [folder for folder in list(path.parents)[:2] if (folder / CONFIG_NAME).is_file()]
        return CheckpointFiles.locate(folders[0] if folders else path.parent), str(path)
    if "+" in str(source) and path.name == str(source) and not path.exists():  # neither a folder nor a Hub id
        check_name(source, BASE_MODELS, "vision-language model")
        run = CheckpointFiles.locate(BASE_REPOSITORY, subfolder=str(source), **hub_kwargs)
    else:
        run = CheckpointFiles.locate(source, **hub_kwargs)
    if not run.is_whole and (config_file := run.find(CONFIG_NAME)) is not None:  # read the cached files as a folder
        run = CheckpointFiles.locate(Path(config_file).parent)
    beside = PurePosixPath(run.hub_kwargs.get("subfolder", ""), CHECKPOINTS)
    stored = CheckpointFiles.locate(run.source, **run.hub_kwargs | {"subfolder": str(beside)})
    names = sorted(name for name in stored.names if name.endswith(".pt"))
    if not names:
        _base_model(run)  # raises the clearer error if this is not a run at all
        raise OSError(f"{source} has no `.pt` files in its folder `{CHECKPOINTS}`: copy them from the training run.")
    if checkpoint is not None:
        check_name(checkpoint, names, "checkpoint")
    found = stored.find(checkpoint or latest(names))
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
    of_run, of_base = config.get("vla"), config.get("model")
    where = f"in {CONFIG_NAME} of {run.source}:"
    if isinstance(of_run, dict) and "base_vlm" in of_run:
        check_name(of_run["base_vlm"], BASE_MODELS, f"base model {where}")
        return BASE_MODELS[of_run["base_vlm"]]
    if isinstance(of_base, dict) and set(BaseModel._fields) <= of_base.keys():
        base = BaseModel(*(of_base[name] for name in BaseModel._fields))
        check_name(base.vision_backbone_id, PUBLISHED_VISION_BACKBONES, f"vision backbone {where}")
        check_name(base.llm_backbone_id, TOKENIZERS, f"language model {where}")
        check_name(base.image_resize_strategy, get_args(ResizeStrategy), f"image resize strategy {where}")
        return base
    raise ValueError(
        f"{run.source} is not a training run of Prismatic: its {CONFIG_NAME} is missing, or names neither a base "
        "model (`vla.base_vlm`) nor the parts of a vision-language model (`model.vision_backbone_id` and others)."
        + (" It already loads with `from_pretrained`." if config.get("model_type") == "openvla" else "")
    )


def _is_training_run(run: CheckpointFiles) -> bool:
    """Whether the files are those of a policy, rather than of a vision-language model."""
    return "vla" in (run.read_json(CONFIG_NAME) or {})


# Config and tokenizer


def _config(
    base: BaseModel,
    statistics: dict[str, Any] | None,
    text_defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> OpenVLAConfig:
    for name in overrides:
        check_name(name, OpenVLAConfig.__dataclass_fields__, "config field")
    fields: dict[str, Any] = {"vision_backbone_id": base.vision_backbone_id, "norm_stats": statistics, **overrides}
    pad_token_id = fields.get("pad_token_id", OpenVLAConfig.pad_token_id)
    fields["text_config"] = {"pad_token_id": pad_token_id, **text_defaults} | dict(fields.get("text_config") or {})
    return OpenVLAConfig(**fields)


def _tokenizer(config: OpenVLAConfig, source: str | os.PathLike, token: str | None) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(source, config.text_config.max_position_embeddings, ADVICE, token)
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"The tokenizer of {os.fspath(source)!r} pads with id {tokenizer.pad_token_id}, but the model pads with "
            f"{config.pad_token_id}: give the tokenizer of a checkpoint with the same language model."
        )
    return tokenizer


# Weights


def read_weights(path: str | os.PathLike, may_lack_towers: bool = False) -> dict[str, torch.Tensor]:
    """Read the weights of a run by their published names. Tensors stay in the file; the optimizer's state is left out.

    Args:
        path: A `.pt` file.
        may_lack_towers: Whether the weights of the vision towers may be missing, as in vision-language models whose
            towers were not trained.

    Raises:
        ValueError: A part of the model is missing, or a weight has a name that no rule of `RENAMINGS` knows.
        OSError: The file is damaged.
    """
    model = read_torch_file(path).get("model")
    parts = model if isinstance(model, dict) else {}
    weights = {}
    for part, renamings in RENAMINGS.items():
        tensors = parts.get(part)
        if tensors in (None, {}) and may_lack_towers and part == "vision_backbone":
            continue
        if not isinstance(tensors, dict) or not tensors:
            raise ValueError(
                f"{path} has no weights of {part!r}: give a checkpoint of the whole model, as the original's "
                "training scripts write it."
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


def _read_towers(base: BaseModel, config: OpenVLAConfig, token: str | None) -> dict[str, torch.Tensor]:
    """Read the pretrained towers with which a vision-language model was trained, and which its training left as is."""
    towers = []
    for timm_id, tower in zip(TIMM_MODEL_IDS[base.vision_backbone_id], config.vision_configs, strict=True):
        repository = f"timm/{timm_id}" if "." in timm_id else f"timm/{timm_id}.webli"
        towers.append(read_tower(repository, tower.model_type, tower.image_size, token))
    return name_towers(towers)


__all__ = ["BASE_MODELS", "convert"]
