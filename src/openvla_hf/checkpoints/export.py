"""Export to the published layout, which the original code and inference engines with their own OpenVLA load.

`from_pretrained` reads it back. The layout also holds weights that OpenVLA never uses: the last blocks, final norms
and pooling heads of the towers. This package does not keep them. They are written as zeros, with norm weights of one,
so that these blocks pass their input on, and code that reads a later block still sees the trained features.

A model that decodes in parallel is written as the original code of OpenVLA-OFT saves it: the head and the projectors
are in separate files, and the fields that this code takes from the command line are also in `config.json`.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from .. import auto  # noqa: F401 - makes the Auto classes know OpenVLA
from ..modeling.checkpoint_files import STATISTICS_FILE
from ..modeling.configuration_openvla import OFT_FIELDS, PUBLISHED_VISION_BACKBONES, OpenVLAConfig
from ..modeling.modeling_openvla import OpenVLAForActionPrediction
from ..new_folder import new_folder, require_new_folder
from ..processing.image_processing_openvla import LANCZOS3, OpenVLAImageProcessor
from ..processing.oft_presets import IMAGE_FIELDS, PLATFORMS
from ..processing.processing_openvla import PURE_PROMPT, VICUNA_PROMPT, OpenVLAProcessor
from .describe import describe, refuse_adapter
from .published_weights import published_state_dict, write_components


# Version of transformers that the original runs on. Values that its LlamaConfig has by default are not stored.
PUBLISHED_TRANSFORMERS = "4.40.1"
PUBLISHED_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# The repository with the original code, so that an exported folder needs no copy.
PUBLISHED_CODE = "openvla/openvla-7b--"

_DINOV2 = "vit_large_patch14_reg4_dinov2.lvd142m"
TIMM_MODEL_IDS = {
    "dinosiglip-vit-so-224px": [_DINOV2, "vit_so400m_patch14_siglip_224"],
    "dinosiglip-vit-so-384px": [_DINOV2, "vit_so400m_patch14_siglip_384"],
    "dinov2-vit-l": [_DINOV2],
    "siglip-vit-so400m": ["vit_so400m_patch14_siglip_224"],
    "siglip-vit-so400m-384px": ["vit_so400m_patch14_siglip_384"],
    "siglip-vit-b16-224px": ["vit_base_patch16_siglip_224"],
    "siglip-vit-b16-256px": ["vit_base_patch16_siglip_256"],
    "siglip-vit-b16-384px": ["vit_base_patch16_siglip_384"],
}

# Prompt -> the original's names of the language model.
LANGUAGE_MODELS = {
    PURE_PROMPT: {"llm_backbone_id": "llama2-7b-pure", "hf_llm_id": "meta-llama/Llama-2-7b-hf"},
    VICUNA_PROMPT: {"llm_backbone_id": "vicuna-v15-7b", "hf_llm_id": "lmsys/vicuna-7b-v1.5"},
}

# Values that are fixed in the original code and have no field in the layout.
FIXED_FIELDS = {
    "vision_feature_layer": -2,
    "projector_hidden_act": "gelu",
    "image_token_index": 32001,
    "prompt_suffix_token_id": 29871,
}


def export(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    max_shard_size: str = "7GB",
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Write a checkpoint in the published layout.

    Args:
        source: Folder or Hub id of a checkpoint with 16- or 32-bit weights. The data type stays as it is.
        destination: New or empty folder. Files appear in it once all are written.
        max_shard_size: Largest size of a weights file.
        revision: Branch, tag or commit of a Hub id.
        token: Token for a private repository. Defaults to the stored one.

    Returns:
        The folder.

    Raises:
        ValueError: The original code can't express the checkpoint: it is an adapter, is quantised, or has other
            towers, another language model or another prompt.
        FileExistsError: `destination` is not empty.
    """
    folder = Path(destination)
    require_new_folder(folder)
    refuse_adapter(source, revision=revision, token=token)
    found = describe(source, revision=revision, token=token)
    if found.quantization is not None:
        raise ValueError(
            f"{source} is quantised ({found.quantization}), which the published layout does not support. Export the "
            "16-bit checkpoint that it was made from."
        )
    hub: dict[str, Any] = {"revision": revision, "token": token}
    processor = AutoProcessor.from_pretrained(source, **hub)
    model = OpenVLAForActionPrediction.from_pretrained(source, dtype="auto", **hub)
    config = published_config(model, processor)

    with new_folder(folder) as aside:
        save_torch_state_dict(published_state_dict(model), aside, max_shard_size=max_shard_size)
        write_components(model, aside)
        processor.tokenizer.save_pretrained(aside)
        _restore_tokenizer_files(aside, processor.tokenizer)
        _write_json(aside / "preprocessor_config.json", published_image_processor(processor.image_processor))
        _write_json(
            aside / "generation_config.json",
            {
                "_from_model_config": True,
                "bos_token_id": model.config.text_config.bos_token_id,
                "eos_token_id": model.config.text_config.eos_token_id,
                "pad_token_id": model.config.pad_token_id,
                "transformers_version": PUBLISHED_TRANSFORMERS,
            },
        )
        if model.norm_stats:
            _write_json(aside / STATISTICS_FILE, model.norm_stats)
        _write_json(aside / "config.json", config)
    return folder


# Configs


def published_config(model: OpenVLAForActionPrediction, processor: OpenVLAProcessor) -> dict[str, Any]:
    """Make the published `config.json` of a model, with the fields of the original code."""
    config = model.config
    for name, value in FIXED_FIELDS.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but the original code only supports {value!r}: this model "
                "can't be exported."
            )
    if processor.prompt_template not in LANGUAGE_MODELS:
        raise ValueError(
            f"The original code has no prompt like {processor.prompt_template!r}: this model can't be exported."
        )
    image_processor = processor.image_processor
    oft_fields = _oft_fields(config)
    if oft_fields:
        _warn_of_oft(processor)
    else:
        _warn_of_image_fields(image_processor)
    backbone_id = _vision_backbone_id(config)
    fused = config.fused_vision_config is not None
    towers = config.vision_configs
    return {
        "arch_specifier": "no-align+fused-gelu-mlp" if fused else "no-align+gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {
            "AutoConfig": f"{PUBLISHED_CODE}configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": f"{PUBLISHED_CODE}modeling_prismatic.OpenVLAForActionPrediction",
        },
        **LANGUAGE_MODELS[processor.prompt_template],
        "image_resize_strategy": image_processor.image_resize_strategy,
        "image_sizes": [tower.image_size for tower in towers],
        "llm_max_length": config.text_config.max_position_embeddings,
        "model_type": "openvla",
        "n_action_bins": config.n_action_bins,
        "norm_stats": model.norm_stats,
        "output_projector_states": False,
        "pad_to_multiple_of": config.pad_to_multiple_of,
        "pad_token_id": config.pad_token_id,
        "text_config": _published_text_config(config.text_config, model.dtype),
        "timm_model_ids": TIMM_MODEL_IDS[backbone_id],
        "timm_override_act_layers": [None] * len(towers),
        "torch_dtype": _name(model.dtype),
        "transformers_version": PUBLISHED_TRANSFORMERS,
        "use_fused_vision_backbone": fused,
        "vision_backbone_id": backbone_id,
        **oft_fields,
    }


def _oft_fields(config: OpenVLAConfig) -> dict[str, Any]:
    """Return the fields of OpenVLA-OFT, or nothing for a plain model. The original ignores them."""
    if config.is_parallel:
        return {name: getattr(config, name) for name in OFT_FIELDS}
    if config.num_images > 1 or config.proprio_dim is not None:
        raise ValueError(
            "The original code sees several images or a state only with parallel decoding: this model can't be "
            "exported."
        )
    return {}


def _warn_of_image_fields(image_processor: OpenVLAImageProcessor) -> None:
    """Warn of image processing that only the original's evaluation scripts apply."""
    if image_processor.center_crop_area is not None:
        warnings.warn(
            f"The published layout does not store the centre crop of area {image_processor.center_crop_area}. Pass "
            "`--center_crop True` to the original's evaluation scripts.",
            stacklevel=4,
        )
    if image_processor.resample == LANCZOS3:
        warnings.warn(
            "The published layout does not store `resample='lanczos3'`, so bicubic was written. The original's "
            "evaluation scripts resize with Lanczos-3 in any case.",
            stacklevel=4,
        )


def _warn_of_oft(processor: OpenVLAProcessor) -> None:
    """Warn of image processing or cameras other than those with which an OpenVLA-OFT checkpoint is read back."""
    image_processor = processor.image_processor
    for name, value in IMAGE_FIELDS.items():
        if getattr(image_processor, name) != value:
            warnings.warn(
                f"The published layout does not store `{name}={getattr(image_processor, name)!r}`: the evaluation of "
                f"OpenVLA-OFT, and `AutoProcessor.from_pretrained`, use {value!r}.",
                stacklevel=4,
            )
    if processor.cameras is not None and tuple(processor.cameras) not in [one.cameras for one in PLATFORMS.values()]:
        warnings.warn(
            f"The published layout does not store the names of the cameras ({', '.join(processor.cameras)}): pass "
            "`cameras=` to `AutoProcessor.from_pretrained`.",
            stacklevel=4,
        )


def _vision_backbone_id(config: OpenVLAConfig) -> str:
    def fields(tower: PreTrainedConfig) -> dict[str, Any]:
        return {key: value for key, value in tower.to_dict().items() if key != "dtype"}

    ours = [fields(tower) for tower in config.vision_configs]
    for backbone_id, towers in PUBLISHED_VISION_BACKBONES.items():
        published = OpenVLAConfig(vision_config=towers[0], fused_vision_config=towers[1])
        if [fields(tower) for tower in published.vision_configs] == ours:
            return backbone_id
    sizes = ", ".join(f"{tower.model_type} {tower.hidden_size} wide" for tower in config.vision_configs)
    raise ValueError(
        f"The original code does not support these vision towers ({sizes}), so this model can't be exported. It "
        f"supports {', '.join(PUBLISHED_VISION_BACKBONES)}."
    )


def _published_text_config(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    fields = config.to_dict()
    rope = fields.get("rope_parameters") or {}
    common = {"model_type": "llama", "mlp_bias": False, "head_dim": config.hidden_size // config.num_attention_heads}
    if rope.get("rope_type") != "default" or any(fields.get(name) != value for name, value in common.items()):
        raise ValueError("The original code only runs plain Llama models: this language model can't be exported.")
    fields["rope_theta"] = rope["rope_theta"]
    changed = {key: fields[key] for key, default in PUBLISHED_LLAMA_DEFAULTS.items() if fields[key] != default}
    return {"model_type": "llama", "torch_dtype": _name(dtype), **changed}


def published_image_processor(image_processor: OpenVLAImageProcessor) -> dict[str, Any]:
    """Make the published `preprocessor_config.json`. The original code reads `tvf_*`, with one entry per tower."""
    height, width = image_processor.size["height"], image_processor.size["width"]
    towers = len(image_processor.image_mean)
    strategy = image_processor.image_resize_strategy
    letterbox = strategy == "letterbox"
    resample = image_processor.resample
    resample = Image.Resampling.BICUBIC if isinstance(resample, str) else Image.Resampling(resample)
    resize = {
        "antialias": True,
        "interpolation": int(resample),
        "max_size": None,
        "size": [height, width] if strategy == "resize-naive" else height,
    }
    code = f"{PUBLISHED_CODE}processing_prismatic."
    return {
        "auto_map": {
            "AutoImageProcessor": f"{code}PrismaticImageProcessor",
            "AutoProcessor": f"{code}PrismaticProcessor",
        },
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": strategy,
        "input_sizes": [[3, height, width]] * towers,
        "interpolations": [resample.name.lower()] * towers,
        "means": image_processor.image_mean,
        "processor_class": "PrismaticProcessor",
        "stds": image_processor.image_std,
        "tvf_crop_params": [{"output_size": [height, width]}] * towers,
        "tvf_do_letterbox": letterbox,
        "tvf_letterbox_fill": image_processor.letterbox_fill if letterbox else None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": mean, "std": std}
            for mean, std in zip(image_processor.image_mean, image_processor.image_std, strict=True)
        ],
        "tvf_resize_params": [resize] * towers,
        "use_fused_vision_backbone": towers == 2,
    }


def _restore_tokenizer_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer's files readable for the original's old libraries."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # These libraries expect each merge as a string.
    content["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]
    _write_json(path, content)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": token.special,
                }
                for token_id, token in tokenizer.added_tokens_decoder.items()
            },
            "auto_map": {"AutoProcessor": f"{PUBLISHED_CODE}processing_prismatic.PrismaticProcessor"},
            "bos_token": tokenizer.bos_token,
            "clean_up_tokenization_spaces": False,
            "eos_token": tokenizer.eos_token,
            "model_max_length": tokenizer.model_max_length,
            "pad_token": tokenizer.pad_token,
            "padding_side": "right",
            "processor_class": "PrismaticProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": tokenizer.unk_token,
            "use_default_system_prompt": False,
        },
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["export"]
