"""FiLM: vision towers whose features are modulated by the instruction, as in OpenVLA-OFT+.

In every layer, between attention and MLP, the mean embedding of the text scales and shifts each feature of every
patch: `x * (1 + gamma) + beta`, where gamma and beta are linear functions of the mean embedding.

Shapes: B batch, T tokens, P patches (class and register tokens included), D width of the tower, L width of the
language model.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersLayer,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from .configuration_openvla import OpenVLAConfig
from .weight_mapping import convert_tower


# LoRA of a published FiLM backbone has alpha = min(rank, 16).
LARGEST_ALPHA = 16


def mean_text_embedding(embeddings: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """Average the embeddings of each row's text.

    The text is every token of a row except images, state, actions and padding: BOS, the prompt, and EOS after the
    action slots. The original also averages the padding of a training batch, so that a row's mean depends on the
    longest prompt in the batch. Here it does not depend on the other rows.

    Args:
        embeddings: (B, T, L).
        is_text: (B, T), true for text.

    Returns:
        (B, L).
    """
    weights = is_text.to(embeddings).unsqueeze(-1)
    return (embeddings * weights).sum(1) / weights.sum(1)


def check_language_embedding(config: OpenVLAConfig, language_embedding: torch.Tensor | None, rows: int) -> None:
    """Check the mean embedding of the text (B, L) against the config.

    Raises:
        ValueError: The embedding is missing, is not expected, or has the wrong shape.
    """
    if not config.use_film:
        if language_embedding is not None:
            raise ValueError("The towers of this model have no FiLM: leave `language_embedding` out.")
        return
    shape = (rows, config.text_config.hidden_size)
    if language_embedding is None or language_embedding.shape != shape:
        given = "is missing" if language_embedding is None else f"has shape {tuple(language_embedding.shape)}"
        raise ValueError(
            f"The text modulates the towers of this model (FiLM), but `language_embedding` {given}: pass the mean "
            f"embedding of each row's text, of shape {shape}."
        )


class FilmLayer(nn.Module):
    """Mixin that adds FiLM to a tower's layer in transformers."""

    film_scale: nn.Linear
    film_shift: nn.Linear

    def add_film(self, width: int, text_width: int) -> None:
        """Add the two projections, (L) -> (D)."""
        self.film_scale = nn.Linear(text_width, width)
        self.film_shift = nn.Linear(text_width, width)

    def start_as_identity(self, device: torch.device, dtype: torch.dtype) -> None:
        """Set the projections to zeros, so that the layer starts out like one without FiLM."""
        for projection in (self.film_scale, self.film_shift):
            projection.to(device, dtype)
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def modulate(self, hidden_states: torch.Tensor, language_embedding: torch.Tensor) -> torch.Tensor:
        """Scale and shift features (B, P, D) by the mean embedding of the text (B, L)."""
        gamma, beta = self.film_scale(language_embedding), self.film_shift(language_embedding)
        return hidden_states * (1 + gamma.unsqueeze(1)) + beta.unsqueeze(1)


class FilmDinov2Layer(FilmLayer, Dinov2WithRegistersLayer):
    """Layer of DINOv2 with FiLM between attention and MLP."""

    def __init__(self, config: PreTrainedConfig, text_width: int):
        super().__init__(config)
        self.add_film(config.hidden_size, text_width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        language_embedding: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Transform (B, P, D), given the mean embedding of the text (B, L)."""
        attended, _ = self.attention(self.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(attended))
        hidden_states = self.modulate(hidden_states, language_embedding)
        return hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states))))


class FilmSiglipLayer(FilmLayer, SiglipEncoderLayer):
    """Layer of SigLIP with FiLM between attention and MLP."""

    def __init__(self, config: PreTrainedConfig, text_width: int):
        super().__init__(config)
        self.add_film(config.hidden_size, text_width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        language_embedding: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Transform (B, P, D), given the mean embedding of the text (B, L)."""
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = self.modulate(hidden_states + attended, language_embedding)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


FILM_LAYERS: dict[type[nn.Module], type[FilmLayer]] = {
    Dinov2WithRegistersLayer: FilmDinov2Layer,
    SiglipEncoderLayer: FilmSiglipLayer,
}


def add_film(tower: PreTrainedModel, text_width: int) -> None:
    """Replace the layers of a tower with FiLM layers that keep their weights.

    Raises:
        ValueError: The tower is neither DINOv2 nor SigLIP.
    """
    names = [name for name, module in tower.named_modules() if type(module) in FILM_LAYERS]
    if not names:
        raise ValueError(
            f"`use_film` supports the towers DINOv2 and SigLIP, but this model has a tower of type "
            f"{tower.config.model_type!r}."
        )
    for name in names:
        layer = tower.get_submodule(name)
        film_layer = FILM_LAYERS[type(layer)](tower.config, text_width).train(layer.training)
        film_layer.load_state_dict(layer.state_dict(), strict=False, assign=True)
        tower.set_submodule(name, film_layer)


def film_backbone_weights(
    backbone: PreTrainedModel, published: Mapping[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    """Convert the vision backbone that the original saves next to a checkpoint with FiLM.

    Args:
        backbone: Backbone with FiLM that the weights are for.
        published: Content of `vision_backbone--N_checkpoint.pt`: all weights of the backbone, with an unmerged LoRA.
        source: Name of the file, for error messages.

    Returns:
        A weight for every parameter of the backbone. Weights that had a LoRA are float32.

    Raises:
        ValueError: A LoRA is incomplete, or the weights do not fit this backbone.
    """
    merged = merge_lora(published, source)
    ours: dict[str, torch.Tensor] = {}
    for tower_name, tower in backbone.named_children():
        prefix = f"vision_backbone.{tower_name}."
        of_tower = {name[len(prefix) :]: merged.pop(name) for name in list(merged) if name.startswith(prefix)}
        try:
            converted = convert_tower(type(tower).__name__, of_tower)
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"{source} is damaged: a weight of the {tower_name} has the wrong number of dimensions."
            ) from error
        ours |= {f"{prefix}{name}": tensor for name, tensor in converted.items()}
    unread = [re.compile(pattern) for pattern in backbone._keys_to_ignore_on_load_unexpected or ()]
    read = {
        name.removeprefix("vision_backbone."): tensor
        for name, tensor in (ours | merged).items()
        if not any(pattern.search(name) for pattern in unread)
    }
    expected = dict(backbone.named_parameters())
    for problem, names in (("lacks", expected.keys() - read), ("contains the unknown weight", read.keys() - expected)):
        if names:
            raise ValueError(
                f"{source} {problem} {min(names)!r}: it is not the FiLM vision backbone of this checkpoint."
            )
    for name, parameter in expected.items():
        if read[name].shape != parameter.shape:
            raise ValueError(
                f"{source} belongs to another model: {name!r} has the shape {tuple(read[name].shape)} instead of "
                f"{tuple(parameter.shape)}."
            )
    return read


def merge_lora(published: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Merge the LoRA of a published FiLM backbone into its weights, under the names of a plain published backbone.

    The original scales B A by alpha / rank, with alpha = min(rank, 16), and does not save these two numbers. The rank
    is the number of rows of A.

    Args:
        published: Weights by their names in `vision_backbone--N_checkpoint.pt`.
        source: Name of the file, for error messages.

    Returns:
        Weights by names such as `vision_backbone.featurizer.blocks.0.attn.qkv.weight`. Weights with LoRA are float32.

    Raises:
        ValueError: A LoRA has no base weight, or its parts do not fit together.
    """
    merged = {}
    for name, tensor in published.items():
        layer, is_lora, _ = name.partition(".lora_")
        if is_lora:
            if f"{layer}.base_layer.weight" not in published:
                raise ValueError(f"{source} contains {name!r}, but lacks the weight of this layer.")
            continue
        if name.endswith(".base_layer.weight"):
            tensor = tensor.float() + _lora_delta(published, name.removesuffix(".base_layer.weight"), tensor, source)
        merged[name.replace(".base_layer.", ".").replace(".block.", ".")] = tensor
    return merged


def _lora_delta(published: Mapping[str, torch.Tensor], layer: str, weight: torch.Tensor, source: str) -> torch.Tensor:
    """Return the change that LoRA makes to the weight of a linear layer or a convolution."""
    try:
        a, b = (published[f"{layer}.lora_{side}.default.weight"].float() for side in "AB")
    except KeyError as error:
        raise ValueError(f"{source} lacks {error.args[0]!r}: copy or download it again.") from error
    rank = a.shape[0] if a.ndim else 0
    outputs, *inputs = weight.shape or (0,)
    if not rank or a.shape != (rank, *inputs) or b.shape != (outputs, rank, *[1] * len(inputs[1:])):
        raise ValueError(
            f"{source} is damaged: the LoRA of {layer!r} has the shapes {tuple(b.shape)} and {tuple(a.shape)}, which "
            f"do not fit a weight of shape {tuple(weight.shape)}."
        )
    return (min(rank, LARGEST_ALPHA) / rank) * (b.flatten(1) @ a.flatten(1)).view_as(weight)


__all__ = [
    "FilmDinov2Layer",
    "FilmSiglipLayer",
    "add_film",
    "check_language_embedding",
    "film_backbone_weights",
    "mean_text_embedding",
    "merge_lora",
]
