"""Assemble a policy to train: pretrained vision towers, a pretrained language model and a new projector."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME

from ..modeling.checkpoint_files import CheckpointFiles
from ..modeling.configuration_openvla import OpenVLAConfig
from ..modeling.known_names import check_name
from ..modeling.modeling_openvla import OpenVLAProjector
from ..new_folder import require_new_folder
from .policy_writing import DINOV2, DTYPES, PIXELS, SIGLIP, load_tokenizer, make_processor, write_policy
from .vision_weights import name_towers, read_safetensors, read_tower


# The number of rows of the embedding is a multiple of this, as in the original.
ROWS_MULTIPLE = 64
# Llama-2's empty piece, which precedes the action.
EMPTY_PIECE = "▁"
# Published names of the weights with one row for each token.
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
ADVICE = "Give a language model with a `tokenizer.json`."


class LanguageModel(NamedTuple):
    """A language model with rows for the padding token and the image placeholder.

    Args:
        config: Its config.
        tokenizer: Its tokenizer, with the original's padding token.
        weights: Its weights by their published names. Most are those of mapped files.
    """

    config: LlamaConfig
    tokenizer: PreTrainedTokenizerFast
    weights: dict[str, torch.Tensor]


def assemble(
    destination: str | os.PathLike,
    *,
    language_model: str | os.PathLike,
    dinov2: str | os.PathLike | None = None,
    siglip: str | os.PathLike | None = None,
    image_size: int = 224,
    dtype: str = "bfloat16",
    token: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a policy from the parts of OpenVLA, for `finetune` to train. It has no statistics, so it can't act yet.

    The projector, and the new rows of the language model's embedding and output layer, start from random values that
    are the same in every call. Without `dinov2` or `siglip`, the policy has a single tower.

    Args:
        destination: New or empty folder. Files appear in it once all are written.
        language_model: Folder or Hub id of a Llama model with its tokenizer, such as "meta-llama/Llama-2-7b-hf".
        dinov2: Folder or Hub id of a DINOv2 with registers, such as "timm/vit_large_patch14_reg4_dinov2.lvd142m" or
            "facebook/dinov2-with-registers-large".
        siglip: Folder or Hub id of a SigLIP model, such as "timm/vit_so400m_patch14_siglip_224.webli" or
            "google/siglip-so400m-patch14-224".
        image_size: Pixels along a side of the policy's images. Position embeddings of another size are interpolated.
        dtype: Data type of the written weights: "bfloat16", "float16" or "float32".
        token: Token for private repositories. Defaults to the stored one.
        on_progress: Called with the number of written shards and the number of all shards.

    Returns:
        The folder.

    Raises:
        ValueError: No tower is given, a part is another model, its weights do not fit its config, the towers have
            different numbers of patches, or the tokenizer does not fit.
        FileExistsError: `destination` is not empty.
        OSError: A part can't be found or read.
    """
    destination = Path(destination)
    require_new_folder(destination)
    check_name(dtype, DTYPES, "dtype")
    sources = {kind: source for kind, source in ((DINOV2, dinov2), (SIGLIP, siglip)) if source is not None}
    if not sources:
        raise ValueError("A policy needs a vision tower: give `dinov2`, `siglip` or both.")
    towers = [read_tower(source, kind, image_size, token) for kind, source in sources.items()]
    language = read_language_model(language_model, token)
    config = _config([tower.config for tower in towers], language)
    write_policy(
        destination,
        config,
        make_processor(config, language.tokenizer, PIXELS),
        name_towers(towers) | _new_projector(config) | language.weights,
        dtype=dtype,
        source=", ".join(os.fspath(source) for source in (*sources.values(), language_model)),
        on_progress=on_progress,
    )
    return destination


def _config(towers: list[PreTrainedConfig], language: LanguageModel) -> OpenVLAConfig:
    """Make the config of a policy without statistics. Its actions replace the last tokens of the text."""
    tokenizer = language.tokenizer
    config = OpenVLAConfig(
        vision_config=towers[0],
        fused_vision_config=towers[1] if len(towers) > 1 else None,
        text_config=language.config,
        image_token_index=_first_free_id(tokenizer),
        prompt_suffix_token_id=tokenizer.get_vocab().get(EMPTY_PIECE),
        # Special tokens that follow those of the text, such as Llama-3's, are left as they are.
        pad_to_multiple_of=language.config.vocab_size - tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
    )
    first = config.action_vocab_end - config.n_action_bins
    if taken := [one for one in tokenizer.all_special_ids if first <= one < config.action_vocab_end]:
        raise ValueError(
            f"The tokenizer's special token {tokenizer.convert_ids_to_tokens(taken[0])!r} has the id {taken[0]}, but "
            f"the actions need the ids {first} to {config.action_vocab_end - 1}: choose another language model."
        )
    return config


def read_language_model(source: str | os.PathLike, token: str | None = None) -> LanguageModel:
    """Read a Llama model, and add rows for the padding token and the image placeholder.

    Args:
        source: Folder or Hub id.
        token: Token for a private repository.

    Raises:
        ValueError: The source is not a Llama model or is quantised, its files lack the embedding, or its tokenizer
            does not fit.
        OSError: The source can't be found or read.
    """
    files = CheckpointFiles.locate(source, token=token)
    content = files.read_json(CONFIG_NAME)
    if content is None:
        raise OSError(f"{source} has no {CONFIG_NAME}: give a folder or Hub id of a Llama model.")
    if content.get("model_type") != LlamaConfig.model_type:
        raise ValueError(
            f"{source} is a model of type {content.get('model_type')!r}, but only models of type 'llama' can become a "
            "policy: choose a Llama model."
        )
    if content.get("quantization_config") is not None:
        raise ValueError(f"{source} is quantised: give the 16-bit model that it was made from.")
    config = LlamaConfig.from_dict(content)
    tokenizer = _read_tokenizer(source, config, token)
    weights = {f"language_model.{name}": tensor for name, tensor in read_safetensors(files).items()}
    if EMBEDDING not in weights:
        raise ValueError(f"The files of {source} lack the token embedding of a Llama model: download it again.")
    if config.tie_word_embeddings:  # OpenVLA's output layer is a layer of its own
        weights[HEAD] = weights[EMBEDDING]
    stored_rows = config.vocab_size
    config.vocab_size = -(-max(stored_rows, _first_free_id(tokenizer) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    config.tie_word_embeddings = False
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.dtype = config.architectures = None
    generator = torch.Generator().manual_seed(config.hidden_size)
    for name in (name for name in (EMBEDDING, HEAD) if name in weights):
        new = torch.empty(config.vocab_size - stored_rows, *weights[name].shape[1:])
        new.normal_(std=config.initializer_range, generator=generator)
        weights[name] = torch.cat([weights[name], new.to(weights[name].dtype)])
    return LanguageModel(config, tokenizer, weights)


def _read_tokenizer(source: str | os.PathLike, config: LlamaConfig, token: str | None) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a language model, check it, and give it the original's padding token.

    A padding token of its own, such as the end of the text, may mean something else in a text.
    """
    tokenizer = load_tokenizer(source, config.max_position_embeddings, ADVICE, token)
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    ids = [token_id for name, token_id in tokenizer.get_vocab().items() if name != tokenizer.pad_token]
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"The tokenizer of {source} has the id {max(ids)}, but its language model has only {config.vocab_size} "
            "ids: give a language model with its own tokenizer."
        )
    if tokenizer.eos_token_id is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        raise ValueError(
            f"The tokenizer of {source} has no end-of-sequence token, or does not begin a text with its "
            "beginning-of-sequence token, which OpenVLA needs: choose another language model."
        )
    return tokenizer


def _first_free_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the first id that no text contains: that of the image placeholder."""
    return 1 + max(tokenizer.get_vocab().values())


def _new_projector(config: OpenVLAConfig) -> dict[str, torch.Tensor]:
    """Make the weights of a projector by their published names, with the original's random values."""
    width = sum(tower.hidden_size for tower in config.vision_configs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)  # the original's seed
        projector = OpenVLAProjector(config)
    return {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}


__all__ = ["LanguageModel", "assemble", "read_language_model"]
