"""Build tiny models, processors and episodes offline in milliseconds, for tests, notebooks and examples."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .checkpoints.published_weights import published_film_backbone
from .modeling.checkpoint_files import STATISTICS_FILE
from .modeling.configuration_openvla import OpenVLAConfig
from .modeling.modeling_openvla import OpenVLAForActionPrediction
from .modeling.oft_loading import HEAD_PREFIXES, MODULES, PARALLEL_PREFIX, PLATFORMS, SUFFIX
from .processing.image_processing_openvla import OpenVLAImageProcessor
from .processing.oft_presets import PLATFORMS as OFT_CAMERAS
from .processing.processing_openvla import PURE_PROMPT, OpenVLAProcessor


N_ACTION_BINS = 256
PADDED_ROWS = 64
BRIDGE_LIKE_STATS: dict[str, Any] = {
    "mean": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5],
    "std": [0.01, 0.014, 0.013, 0.03, 0.03, 0.08, 0.5],
    "min": [-0.4, -0.14, -0.22, -0.5, -0.42, -0.63, 0.0],
    "max": [0.4, 0.25, 0.22, 0.3, 0.34, 0.63, 1.0],
    "q01": [-0.03, -0.04, -0.04, -0.08, -0.09, -0.2, 0.0],
    "q99": [0.03, 0.04, 0.04, 0.08, 0.09, 0.2, 1.0],
    "mask": [True] * 6 + [False],
}


def tiny_tokenizer(
    texts: Iterable[str] = ("pick up the red block",), merges: int = 64, phrases: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer in the layout of OpenVLA's: text, 256 action ids, `<PAD>`, `<image>`.

    Args:
        texts: Instructions whose words become tokens.
        merges: Largest number of tokens beyond the 256 bytes and the three special tokens.
        phrases: Groups of words that are one token each.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3 + 256 + merges,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((PURE_PROMPT.format(instruction=text) for text in texts), trainer)
    tokenizer.add_tokens(list(phrases))
    tokenizer.add_tokens([f"<action_{i}>" for i in range(N_ACTION_BINS)])
    tokenizer.add_special_tokens(["<PAD>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<PAD>",
        padding_side="left",
        model_max_length=2048,
    )


def tiny_config(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    image_size: int = 56,
    patch_size: int = 14,
    vision_width: int = 32,
    vision_layers: int = 3,
    text_width: int = 64,
    text_layers: int = 2,
    heads: int = 2,
    fused: bool = True,
    norm_stats: dict[str, Any] | None = None,
    **fields: Any,
) -> OpenVLAConfig:
    """Build a config of the real classes at a size that runs in milliseconds.

    Args:
        tokenizer: Tokenizer whose ids the config uses; `tiny_tokenizer()` by default.
        image_size: Pixels along a side of both towers' input.
        patch_size: Pixels along a side of a patch.
        vision_width: Width of each tower; the MLPs are four times as wide.
        vision_layers: Published depth of each tower; the last block is not built.
        text_width: Width of the language model.
        text_layers: Layers of the language model.
        heads: Attention heads of the language model and of each tower.
        fused: Whether there are two towers (DINOv2 and SigLIP), or SigLIP alone.
        norm_stats: Action statistics; those of one dataset named "tiny" by default.
        fields: Further fields of `OpenVLAConfig`, such as `num_images` or `action_head`.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    tower = {
        "hidden_size": vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    dinov2 = {"model_type": "dinov2_with_registers", **tower}
    siglip = {
        "model_type": "siglip_vision_model",
        "intermediate_size": 4 * vision_width,
        "hidden_act": "gelu",
        "vision_use_head": False,
        **tower,
    }
    pad_id = tokenizer.pad_token_id
    return OpenVLAConfig(
        vision_config=dinov2 if fused else siglip,
        fused_vision_config=siglip if fused else None,
        text_config={
            "model_type": "llama",
            # <PAD> is the first of the padded rows.
            "vocab_size": pad_id + PADDED_ROWS,
            "hidden_size": text_width,
            "intermediate_size": 8 * text_width // 3,
            "num_hidden_layers": text_layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": pad_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        prompt_suffix_token_id=None,
        pad_to_multiple_of=PADDED_ROWS,
        pad_token_id=pad_id,
        norm_stats=norm_stats if norm_stats is not None else {"tiny": {"action": BRIDGE_LIKE_STATS}},
        **fields,
    )


def tiny_processor(
    tokenizer: PreTrainedTokenizerFast | None = None, config: OpenVLAConfig | None = None
) -> OpenVLAProcessor:
    """Build the processor for a `tiny_config`; the config is made for `tokenizer` by default.

    Several cameras are named "camera_0", "camera_1" and so on.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    config = config or tiny_config(tokenizer)
    image_processor = OpenVLAImageProcessor(size=config.vision_config.image_size)
    if config.fused_vision_config is None:
        image_processor.image_mean, image_processor.image_std = [[0.5] * 3], [[0.5] * 3]
    return OpenVLAProcessor(
        image_processor,
        tokenizer,
        image_token_id=config.image_token_id,
        num_image_tokens=config.num_image_tokens,
        cameras=[f"camera_{index}" for index in range(config.num_images)] if config.num_images > 1 else None,
        state_dim=config.proprio_dim,
    )


def fake_episode(
    seed: int = 0, steps: int = 5, instruction: str = "pick up the red block", size: int = 64
) -> list[dict[str, Any]]:
    """Make the frames of a random episode: `image` (size, size, 3) uint8, `instruction`, `action` (7,) float64."""
    rng = np.random.default_rng(seed)
    low, high = np.array(BRIDGE_LIKE_STATS["q01"]), np.array(BRIDGE_LIKE_STATS["q99"])
    actions = rng.uniform(low, high, size=(steps, len(low)))
    actions[:, -1] = actions[:, -1].round()
    images = rng.integers(0, 256, size=(steps, size, size, 3), dtype=np.uint8)
    return [
        {"image": image, "instruction": instruction, "action": action}
        for image, action in zip(images, actions, strict=True)
    ]


def write_tiny_oft(
    folder: str | os.PathLike, *, platform: str = "libero", head: str = "l1", proprio: bool = True, **components: Any
) -> Path:
    """Write a tiny OpenVLA-OFT checkpoint with random weights, in the layout of the original code.

    Args:
        folder: Folder to write into.
        platform: Robot, see `write_oft_components`.
        head: "l1", "diffusion" or "none".
        proprio: Whether the policy sees the robot's state.
        components: Other arguments of `write_oft_components`.

    Returns:
        The folder. Its statistics have the key "tiny".
    """
    torch.manual_seed(0)
    config = tiny_config()
    model = OpenVLAForActionPrediction(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    processor = tiny_processor(config=config)
    cameras = OFT_CAMERAS[platform].cameras
    processor.cameras = list(cameras if head != "none" or proprio else cameras[:1])
    processor.state_dim = PLATFORMS[platform]["proprio_dim"] if proprio else None
    processor.save_pretrained(folder)
    return write_oft_components(folder, config, platform=platform, head=head, proprio=proprio, **components)


def write_oft_components(
    folder: str | os.PathLike,
    config: OpenVLAConfig,
    *,
    platform: str = "libero",
    head: str = "l1",
    proprio: bool = True,
    film: bool = False,
    step: str = "latest",
) -> Path:
    """Write components of OpenVLA-OFT with random weights, and statistics, into the folder of a plain checkpoint.

    Args:
        folder: Folder of the checkpoint.
        config: Its config.
        platform: Robot, whose dimensions the action head, the projector of the state and the statistics have.
        head: "l1", "diffusion", or "none" for a policy that predicts action tokens.
        proprio: Whether the policy sees the robot's state. Without head and state there are no further files.
        film: Whether the instruction modulates the vision towers, whose weights are then in a further file.
        step: Training step in the names of the files.

    Returns:
        The folder. Its statistics have the key "tiny".
    """
    folder, preset = Path(folder), PLATFORMS[platform]
    statistics = {"action": _tiny_statistics(preset["action_dim"]), "proprio": _tiny_statistics(preset["proprio_dim"])}
    (folder / STATISTICS_FILE).write_text(json.dumps({"tiny": statistics}), encoding="utf-8")
    torch.manual_seed(1)
    width, dims = config.text_config.hidden_size, preset["action_dim"]
    projectors = {"proprio_projector": preset["proprio_dim"]} if proprio else {}
    if head == "diffusion":
        projectors["noisy_action_projector"] = 1
    states = {
        name: {**_tiny_layer("fc1", width, inputs), **_tiny_layer("fc2", width, width)}
        for name, inputs in projectors.items()
    }
    if head != "none":
        sizes = {"layer_norm1": (dims * width,), "fc1": (width, dims * width), "fc2": (dims, width)}
        states["action_head"] = {
            key: tensor.bfloat16()
            for module in MODULES["action_head"]
            for key, tensor in _tiny_layer(
                HEAD_PREFIXES[head] + module,
                *sizes.get(module, (width,) if module.endswith(("ffn.0", "layer_norm2")) else (width, width)),
            ).items()
        }
    files = {name: {PARALLEL_PREFIX + key: tensor for key, tensor in state.items()} for name, state in states.items()}
    if film:
        with_film = OpenVLAConfig.from_dict(
            config.to_dict() | {"use_film": True, "action_decoding": "parallel", "action_dim": dims}
        )
        backbone = published_film_backbone(OpenVLAForActionPrediction(with_film))
        files["vision_backbone"] = {key: 0.15 * torch.randn(tensor.shape) for key, tensor in backbone.items()}
    for name, state in files.items():
        torch.save(state, folder / f"{name}--{step}{SUFFIX}")
    return folder


def _tiny_layer(name: str, *sizes: int) -> dict[str, torch.Tensor]:
    """Make the weight (of the given sizes) and the bias of a layer."""
    return {f"{name}.weight": 0.15 * torch.randn(sizes), f"{name}.bias": 0.15 * torch.randn(sizes[:1])}


def _tiny_statistics(dims: int) -> dict[str, Any]:
    """Make statistics of `dims` dimensions, of which the last is a gripper."""
    bounds = {"q01": -0.5, "q99": 0.5, "min": -1.0, "max": 1.0, "mean": 0.0, "std": 0.3}
    statistics: dict[str, Any] = {
        name: [value * (1 + index / 10) for index in range(dims)] for name, value in bounds.items()
    }
    return statistics | {"mask": [True] * (dims - 1) + [False]}
