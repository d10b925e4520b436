"""From a prompt and an image to the ids of an action: greedy decoding over the action ids, and what it needs.

Shapes: B batch, P image patches, T tokens, A action dimensions, N action bins, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .configuration_openvla import OpenVLAConfig


if TYPE_CHECKING:
    from .modeling_openvla import OpenVLAForActionPrediction


@dataclass
class ActionTokens:
    """Decoded ids.

    token_ids: (B, A) int64.
    action_logits: (B, A, N) logits of the action ids, lowest action value first (the highest id).
    forward_passes: How often the language model ran.
    """

    token_ids: torch.Tensor
    action_logits: torch.Tensor
    forward_passes: int


def insert_image_tokens(
    config: OpenVLAConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Put the image placeholders after BOS in (B, T) ids that have none, and grow mask and labels with them."""
    patches, length = config.num_image_tokens, input_ids.shape[1]
    # Ids no longer than an image can't hold one; longer ones are looked at, outside a compiled graph.
    if length > patches and (torch.compiler.is_compiling() or bool((input_ids == config.image_token_id).any())):
        return input_ids, attention_mask, labels
    # BOS is the first token that is attended to: rows may be padded on the left.
    bos = input_ids.new_zeros(len(input_ids)) if attention_mask is None else attention_mask.long().argmax(dim=1)
    position = torch.arange(length + patches, device=input_ids.device).expand(len(input_ids), -1)
    bos = bos.unsqueeze(1)
    image = (position > bos) & (position <= bos + patches)
    source = torch.where(position > bos, position - patches, position).clamp(min=0)

    def grow(tensor: torch.Tensor | None, value: int) -> torch.Tensor | None:
        return None if tensor is None else tensor.gather(1, source).masked_fill(image, value)

    return grow(input_ids, config.image_token_id), grow(attention_mask, 1), grow(labels, -100)


def left_pad(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move padding on the right of (B, T) rows to their left, so that every row ends in its last token."""
    trailing = attention_mask.flip(1).long().argmax(dim=1, keepdim=True)
    source = (torch.arange(input_ids.shape[1], device=input_ids.device) - trailing) % input_ids.shape[1]
    return input_ids.gather(1, source), attention_mask.gather(1, source)


def append_prompt_suffix(
    config: OpenVLAConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """End every left-padded row (B, T) in the id that precedes an action; rows that do already are padded."""
    suffix = config.prompt_suffix_token_id
    if suffix is None:
        return input_ids, attention_mask
    lacking = input_ids[:, -1] != suffix
    if not bool(lacking.any()):
        return input_ids, attention_mask

    def grow(tensor: torch.Tensor, pad: int | None, value: int) -> torch.Tensor:
        appended = torch.nn.functional.pad(tensor, (0, 1), value=value)
        padded = torch.nn.functional.pad(tensor, (1, 0), value=pad)
        return torch.where(lacking.unsqueeze(1), appended, padded)

    return grow(input_ids, config.pad_token_id, suffix), grow(attention_mask, 0, 1)


class ActionIdsOnly(LogitsProcessor):
    """Leaves the action ids as the only choice of `generate`."""

    def __init__(self, first_id: int, end_id: int):
        self.first_id, self.end_id = first_id, end_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) scores -> the same, with -inf everywhere else."""
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, self.first_id : self.end_id] = scores[:, self.first_id : self.end_id]
        return allowed


def decode_actions(
    model: "OpenVLAForActionPrediction",
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor,
    num_tokens: int,
    constrained: bool = True,
    **generate_kwargs: Any,
) -> ActionTokens:
    """Decode `num_tokens` ids after left-padded prompts (B, T) with their placeholders in place.

    Greedy decoding runs here; anything else that `generate_kwargs` ask for goes through `generate`.
    """
    end_id = model.config.action_vocab_end
    first_id = end_id - model.config.n_action_bins
    do_sample = generate_kwargs.pop("do_sample", False)
    if do_sample or generate_kwargs:
        only = LogitsProcessorList([ActionIdsOnly(first_id, end_id)] if constrained else [])
        outputs = model.generate(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=do_sample,
            logits_processor=only,
            output_logits=True,
            return_dict_in_generate=True,
            **generate_kwargs,
        )
        logits = torch.stack(outputs.logits, dim=1)[..., first_id:end_id].flip(-1)
        if generate_kwargs.get("num_beams", 1) > 1:  # (B * beams, A, N): follow the beam of each row's token
            logits = logits[outputs.beam_indices, torch.arange(num_tokens, device=logits.device)]
        return ActionTokens(outputs.sequences[:, input_ids.shape[1] :], logits, num_tokens)

    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"input_ids": input_ids, "pixel_values": pixel_values}
    token_ids, action_logits, cache = [], [], None
    for _ in range(num_tokens):
        outputs = model(
            **inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, cache = outputs.logits[:, -1], outputs.past_key_values
        of_actions = logits[:, first_id:end_id]
        token = of_actions.argmax(-1) + first_id if constrained else logits.argmax(-1)
        token_ids.append(token)
        action_logits.append(of_actions.flip(-1))
        inputs = {"input_ids": token.unsqueeze(1)}
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(token), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return ActionTokens(torch.stack(token_ids, dim=1), torch.stack(action_logits, dim=1), num_tokens)


__all__ = ["ActionTokens", "append_prompt_suffix", "decode_actions", "insert_image_tokens", "left_pad"]
