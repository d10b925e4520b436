"""OpenVLA: one or two vision towers, a projector, and a causal language model that predicts actions as tokens.

Shapes: B batch, P image patches, T tokens (image placeholders included), D width, V vocabulary,
K actions of a chunk, A action dimensions, S state dimensions, N action bins.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .action_decoding import ActionPass, action_pass
from .action_heads import ActionHead, DefaultLinear, InputProjector
from .action_prediction import ActionPrediction, ActionPredictionMixin
from .checkpoint_loading import CheckpointMixin
from .configuration_openvla import OpenVLAConfig
from .film import FilmDinov2Layer, FilmSiglipLayer, check_language_embedding
from .model_inputs import (
    check_image_tokens,
    check_pixel_values,
    check_prompt_length,
    check_proprio,
    insert_image_tokens,
)
from .parallel_decoding import (
    ParallelPass,
    bidirectional_mask,
    chunk_loss,
    lay_out,
    refuse_foreign_inputs,
)
from .vision_towers import TOWERS, build_tower
from .weight_mapping import register_conversions


register_conversions()


@dataclass
class OpenVLAModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of `OpenVLAModel`.

    image_hidden_states: (B, P, D) projected patches of the images given with this call.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class OpenVLACausalLMOutputWithPast(ModelOutput):
    """Outputs of `OpenVLAForActionPrediction`.

    loss: Mean cross entropy over the labels that are not -100.
    logits: (B, T, V). With parallel decoding without a head: (B, K * A + 1, V) of the slots and the stop token.
    image_hidden_states: (B, P, D) projected patches of the images given with this call.
    actions: (B, K, A) predicted normalised actions, with parallel decoding.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    actions: torch.Tensor | None = None


class OpenVLAPreTrainedModel(PreTrainedModel):
    """Base class of OpenVLA's modules."""

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: OpenVLAConfig, *inputs: Any, **kwargs: Any):
        # Arguments of `from_pretrained` may change a config after its fields were checked.
        config.check_action_fields()
        super().__init__(config, *inputs, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DefaultLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Accept only the current size, unlike `PreTrainedModel.resize_token_embeddings`.

        Raises:
            ValueError: The size differs, which would move the action ids: they are counted from the vocabulary's end.
        """
        rows = self.config.text_config.vocab_size
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != rows:
            raise ValueError(
                f"{wanted} token embeddings instead of {rows} would move the action ids, which are counted from the "
                f"end of the vocabulary: use the {self.config.pad_to_multiple_of} padded rows for new tokens."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)


class OpenVLAVisionBackbone(OpenVLAPreTrainedModel):
    """One or two towers, each built up to the block whose output is read."""

    main_input_name = "pixel_values"
    _no_split_modules = [FilmDinov2Layer.__name__, FilmSiglipLayer.__name__]  # noqa: RUF012

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.featurizer = self._build_tower("featurizer", config.vision_config)
        if config.fused_vision_config is not None:
            self.fused_featurizer = self._build_tower("fused_featurizer", config.fused_vision_config)
        self.post_init()

    def _build_tower(self, name: str, tower_config: PreTrainedConfig) -> PreTrainedModel:
        tower_config = copy.deepcopy(tower_config)
        published_layers = tower_config.num_hidden_layers
        tower_config.num_hidden_layers = self.config.vision_layers_built(tower_config)
        # Weights in published checkpoints that are never read.
        above = "|".join(str(i) for i in range(tower_config.num_hidden_layers, published_layers))
        unread = rf"vision_backbone\.{name}\.(norm\.|attn_pool\." + (
            rf"|encoder\.layers?\.({above})\.)" if above else ")"
        )
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), unread}  # type: ignore[has-type]
        return build_tower(tower_config, self.config.text_config.hidden_size if self.config.use_film else None)

    @property
    def towers(self) -> list[PreTrainedModel]:
        """The towers in the order of their channels in `pixel_values`."""
        return [self.featurizer] + ([self.fused_featurizer] if self.config.fused_vision_config is not None else [])

    def forward(self, pixel_values: torch.Tensor, language_embedding: torch.Tensor | None = None) -> torch.Tensor:
        """Encode images (B, 3 * towers * images, H, W) as patch tokens before the final norm.

        `language_embedding` (B, D) is the mean embedding of each row's text, for FiLM.

        Returns (B, images * P, sum of towers' widths), one image after the other.
        """
        check_pixel_values(self.config, pixel_values)
        check_language_embedding(self.config, language_embedding, len(pixel_values))
        film = {}
        if language_embedding is not None:
            film["language_embedding"] = language_embedding.repeat_interleave(self.config.num_images, dim=0)
        pixel_values = pixel_values.unflatten(1, (self.config.num_images, -1)).flatten(0, 1)
        features = []
        for tower, pixels in zip(self.towers, pixel_values.split(3, dim=1), strict=True):
            if isinstance(tower, tuple(TOWERS.values())):
                tokens = tower(pixel_values=pixels, **film).last_hidden_state  # type: ignore[operator]
            else:  # other towers have a final norm: read the hidden states before it
                tokens = tower(pixel_values=pixels, output_hidden_states=True, **film).hidden_states[-1]
            # Class and register tokens come first.
            features.append(tokens[:, -self.config.num_image_tokens :])
        return torch.cat(features, dim=-1).unflatten(0, (-1, self.config.num_images)).flatten(1, 2)


class OpenVLAProjector(nn.Module):
    """Vision features -> embeddings of the language model: three layers for fused towers, two for one."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        vision_width = sum(vision_config.hidden_size for vision_config in config.vision_configs)
        text_width = config.text_config.hidden_size
        fused = config.fused_vision_config is not None
        first_width = 4 * vision_width if fused else text_width
        self.fc1 = nn.Linear(vision_width, first_width)
        self.fc2 = nn.Linear(first_width, text_width)
        self.fc3 = nn.Linear(text_width, text_width) if fused else None
        self.act = ACT2FN[config.projector_hidden_act]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project features (B, P, vision width) to (B, P, D)."""
        hidden = self.fc2(self.act(self.fc1(features)))
        return hidden if self.fc3 is None else self.fc3(self.act(hidden))


class OpenVLAModel(OpenVLAPreTrainedModel):
    """Vision backbone, projector and language model, without the head."""

    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.vision_backbone = OpenVLAVisionBackbone(config)
        self.projector = OpenVLAProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        width = config.text_config.hidden_size
        self.proprio_projector = None if config.proprio_dim is None else InputProjector(config.proprio_dim, width)
        self.noisy_action_projector = InputProjector(1, width) if config.action_head == "diffusion" else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: torch.Tensor, language_embedding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed images (B, 3 * towers * images, H, W) as (B, images * P, D), one embedding for each patch.

        `language_embedding` (B, D) is the mean embedding of each row's text, for FiLM.
        """
        dtype = self.projector.fc1.bias.dtype
        if language_embedding is not None:
            language_embedding = language_embedding.to(dtype)
        return self.projector(self.vision_backbone(pixel_values.to(dtype), language_embedding))

    def get_prefix_features(
        self,
        pixel_values: torch.Tensor,
        proprio: torch.Tensor | None = None,
        language_embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed images (B, 3 * towers * images, H, W), then the normalised state (B, S), as (B, prefix, D).

        `language_embedding` (B, D) is the mean embedding of each row's text, for FiLM.
        """
        check_proprio(self.config, proprio, len(pixel_values))
        features = self.get_image_features(pixel_values, language_embedding)
        if self.proprio_projector is None:
            return features
        return torch.cat([features, self.proprio_projector(proprio).to(features).unsqueeze(1)], dim=1)

    def place_prefix(self, inputs_embeds: torch.Tensor, input_ids: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Put the embeddings of the prefix (B, prefix, D) in place of the placeholders in `input_ids` (B, T)."""
        placeholders = (input_ids == self.config.image_token_id).unsqueeze(-1).to(inputs_embeds.device)
        return inputs_embeds.masked_scatter(placeholders, prefix.to(inputs_embeds))

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        proprio: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed ids (B, T), with images and state at their placeholders, as (B, T, D); `forward` checks the inputs."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return inputs_embeds
        return self.place_prefix(inputs_embeds, input_ids, self.get_prefix_features(pixel_values, proprio))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        proprio: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OpenVLAModelOutputWithPast:
        """Scatter the images and the state over their placeholders in `input_ids` (B, T) and run the language model.

        `generate` repeats `proprio` (B, S) in every pass; only the pass with `pixel_values` reads it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("`pixel_values` need `input_ids`, whose placeholders mark the place of the image.")
            # Counting would break a compiled graph.
            if not torch.compiler.is_compiling():
                check_image_tokens(self.config, input_ids, len(pixel_values))
            prefix = self.get_prefix_features(pixel_values, proprio).to(inputs_embeds)
            image_features = prefix[:, : self.config.num_images * self.config.num_image_tokens]
            inputs_embeds = self.place_prefix(inputs_embeds, input_ids, prefix)
        if self.config.is_parallel:
            if past_key_values is not None:
                raise ValueError("A model with parallel decoding has no cache: leave `past_key_values` out.")
            if attention_mask is None:
                attention_mask = torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device)
            attention_mask = bidirectional_mask(self.config.text_config, inputs_embeds, attention_mask)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return OpenVLAModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class OpenVLAForActionPrediction(CheckpointMixin, ActionPredictionMixin, OpenVLAPreTrainedModel, GenerationMixin):
    """The policy: `predict_action` turns an image and an instruction into an action in the robot's units.

    Example:
        ```python
        model = AutoModel.from_pretrained("openvla/openvla-7b", dtype="auto", device_map="auto")
        processor = AutoProcessor.from_pretrained("openvla/openvla-7b")
        inputs = processor(image, instruction="pick up the red block")
        action = model.predict_action(**inputs, unnorm_key="bridge_orig")
        ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.model = OpenVLAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.action_head = None if config.action_head == "none" else ActionHead(config)
        self.action_pass: ActionPass = action_pass
        self.action_caches: dict[tuple, Cache] = {}  # reused by the next call of the same size
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the LM head."""
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, language_embedding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed images like `OpenVLAModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, language_embedding)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        proprio: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OpenVLACausalLMOutputWithPast:
        """Compute logits (B, T, V), and the loss if `labels` (B, T; -100 is ignored) are given.

        `input_ids` without image placeholders (from the original processor) get them after BOS. `logits_to_keep`
        selects the positions with logits: the number of last positions, an index, or positions (B, K) of each row.
        `proprio` (B, S) is the normalised state of the robots, if the model sees it.

        A model with parallel decoding takes prompts without actions. It predicts `actions` (B, K, A), and computes the
        loss if the targets `actions` are given: absolute errors (head "l1"), squared errors of the noise ("diffusion")
        or cross entropy ("none"), averaged over the actions where `action_mask` (B, K) is true.
        """
        if self.config.is_parallel:
            kwargs.pop("use_cache", None)
            foreign = {"inputs_embeds": inputs_embeds, "labels": labels, "past_key_values": past_key_values}
            foreign |= {"position_ids": position_ids, "logits_to_keep": logits_to_keep} | kwargs
            return self._forward_parallel(
                input_ids, pixel_values, attention_mask, proprio, actions, action_mask, **foreign
            )
        if actions is not None or action_mask is not None:
            raise ValueError("Only a model with parallel decoding learns from `actions`: pass `labels`.")
        if pixel_values is not None and input_ids is not None:
            input_ids, attention_mask, labels = insert_image_tokens(self.config, input_ids, attention_mask, labels)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            proprio=proprio,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
            hidden = hidden.take_along_dim(logits_to_keep.unsqueeze(-1), dim=1)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = hidden[:, kept]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return OpenVLACausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _forward_parallel(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        proprio: torch.Tensor | None,
        actions: torch.Tensor | None,
        action_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        **foreign: Any,
    ) -> OpenVLACausalLMOutputWithPast:
        refuse_foreign_inputs(foreign)
        if input_ids is None or pixel_values is None:
            raise ValueError("A model with parallel decoding needs both `input_ids` and `pixel_values`.")
        input_ids, mask = lay_out(self.config, input_ids, attention_mask, len(pixel_values))
        device = self.device
        parallel = ParallelPass(self, input_ids.to(device), pixel_values, mask.to(device), proprio)
        result = chunk_loss(self, parallel, actions, action_mask, num_items_in_batch, noise, timesteps)
        return OpenVLACausalLMOutputWithPast(loss=result.loss, logits=result.logits, actions=result.actions)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate like `GenerationMixin.generate`, with image placeholders added to ids that have none.

        The output contains the placeholders.

        Raises:
            ValueError: The prompt and `max_new_tokens` exceed the positions of the language model, or the model
                decodes in parallel.
        """
        if self.config.is_parallel:
            raise ValueError(
                "This model decodes actions in parallel and generates no text: call `predict_action` instead of "
                "`generate`."
            )
        input_ids = inputs if input_ids is None else input_ids
        if pixel_values is not None:
            input_ids, attention_mask, _ = insert_image_tokens(self.config, input_ids, attention_mask)
            kwargs["pixel_values"] = pixel_values
        if isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2 and input_ids.numel():
            is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            check_prompt_length(self.config, is_token, kwargs.get("max_new_tokens") or 1)
        return super().generate(input_ids, attention_mask=attention_mask, **kwargs)


OpenVLAForActionPrediction.register_for_auto_class("AutoModel")

__all__ = [
    "ActionPrediction",
    "OpenVLAForActionPrediction",
    "OpenVLAModel",
    "OpenVLAPreTrainedModel",
    "OpenVLAVisionBackbone",
]
