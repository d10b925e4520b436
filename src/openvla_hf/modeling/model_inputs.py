"""Inputs of the policy: checked, padded on the left, and with placeholders for the image.

Shapes: B batch, P image patches, T tokens.
"""

from typing import Any

import numpy as np
import torch

from .configuration_openvla import OpenVLAConfig


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint16, torch.int8, torch.uint8)


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """Turn the lists and arrays that a processor gives without `return_tensors="pt"` into a tensor.

    Raises:
        ValueError: The value does not hold numbers, its rows differ in length, or its tensor is sparse or on "meta".
    """
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout != torch.strided:
            kind = 'a tensor on the device "meta"' if value.is_meta else "a sparse tensor"
            raise ValueError(f"`{name}` is {kind}: pass a dense tensor that holds values.")
        return value
    try:
        return torch.as_tensor(np.array(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` is neither a tensor nor an array of numbers whose rows are equally long: call the processor "
            'with `padding=True` and `return_tensors="pt"`.'
        ) from error


def read_prompts(config: OpenVLAConfig, input_ids: Any, attention_mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Check ids and mask before the embedding reads them.

    Args:
        config: Of the model.
        input_ids: (B, T) integers.
        attention_mask: (B, T), 1 for tokens and 0 for padding; `None` for rows without padding.

    Returns:
        Both as int64 (B, T) on the CPU, where looking at values costs nothing.

    Raises:
        ValueError: The ids are not in this vocabulary, another model's processor made them, or the mask does not mark
            one run of tokens in each row.
    """
    input_ids = as_tensor("input_ids", input_ids).cpu()
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype not in INTEGERS:
        raise ValueError(
            f"`input_ids` must be integers of shape (batch, tokens), got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}."
        )
    input_ids = input_ids.long()
    lowest, highest = (int(one) for one in input_ids.aminmax())
    vocab_size = config.text_config.vocab_size
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`input_ids` contains {lowest if lowest < 0 else highest}, but this model's ids end at {vocab_size - 1}: "
            "encode the prompt with the checkpoint's own processor."
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    attention_mask = as_tensor("attention_mask", attention_mask).cpu()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} does not fit `input_ids` of shape "
            f"{tuple(input_ids.shape)}: give 1 for each token and 0 for padding."
        )
    is_token = attention_mask == 1
    if not bool((is_token | (attention_mask == 0)).all()):
        raise ValueError("`attention_mask` must be 1 for tokens and 0 for padding, got other numbers.")
    empty = [row for row, has_tokens in enumerate(is_token.any(1).tolist()) if not has_tokens]
    if empty:
        raise ValueError(f"`attention_mask` is 0 everywhere in row {empty[0]}: mark its tokens with 1.")
    for row, (ids, mask) in enumerate(zip(input_ids, is_token, strict=True)):
        _check_prompt(config, row, ids, mask)
    return input_ids, is_token.long()


def _check_prompt(config: OpenVLAConfig, row: int, input_ids: torch.Tensor, is_token: torch.Tensor) -> None:
    """Check which of the ids (T,) are tokens, and that no placeholder of another model is among them."""
    positions = is_token.nonzero().squeeze(1)
    if int(positions[-1] - positions[0]) + 1 != len(positions):
        raise ValueError(
            f"`attention_mask` hides tokens in the middle of row {row}: set 0 only for padding, at the ends of a row."
        )
    prompt = input_ids[is_token].tolist()
    bos, pad = config.text_config.bos_token_id, config.pad_token_id
    if pad not in (None, bos):  # one id for both says nothing about what a row begins with
        if pad in (prompt[0], prompt[-1]):
            raise ValueError(
                f"Row {row} of `input_ids` contains padding (id {pad}) that `attention_mask` does not hide: pass the "
                "processor's `attention_mask` with its `input_ids`."
            )
        if bos in input_ids[~is_token].tolist():
            raise ValueError(f"`attention_mask` hides the BOS token (id {bos}) of row {row}: set 0 only for padding.")
    # A processor puts the placeholders after BOS, or first where its tokenizer gives no BOS.
    patches = config.num_image_tokens
    for image in (prompt[:patches], prompt[1 : patches + 1]):
        if len(image) == patches > 1 and len(set(image)) == 1 and image[0] != config.image_token_id:
            raise ValueError(
                f"Row {row} of `input_ids` holds {image[0]} where this model's image placeholder is "
                f"{config.image_token_id}: use the checkpoint's own processor."
            )


def check_prompt_length(config: OpenVLAConfig, attention_mask: torch.Tensor, num_new_tokens: int) -> None:
    """Check that prompts, with placeholders, and the tokens after them fit the positions of the language model.

    Raises:
        ValueError: The longest prompt leaves too little room.
    """
    # Language models without a table or a range of positions have no such field.
    limit = getattr(config.text_config, "max_position_embeddings", None)
    longest = int(attention_mask.sum(1).max())
    if limit is not None and longest + num_new_tokens - 1 > limit:  # the last token is not read
        raise ValueError(
            f"A prompt of {longest} tokens, image included, and {num_new_tokens} new tokens exceed the {limit} "
            "positions of this language model: shorten the instruction."
        )


def check_pixel_values(config: OpenVLAConfig, pixel_values: torch.Tensor) -> None:
    """Check the shape of images (B, 3 * towers, H, W) against every tower.

    Raises:
        ValueError: The number of channels, the height or the width is another.
    """
    for tower in config.vision_configs:
        shape = (3 * len(config.vision_configs), tower.image_size, tower.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != shape or not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be floating-point numbers of shape (batch, {', '.join(map(str, shape))}), got "
                f"{tuple(pixel_values.shape)} of {pixel_values.dtype}: make them with this checkpoint's own processor."
            )


def check_image_tokens(
    config: OpenVLAConfig, input_ids: torch.Tensor, num_images: int, attention_mask: torch.Tensor | None = None
) -> None:
    """Check that each row (B, T) has an image and its placeholders side by side.

    Args:
        config: Of the model.
        input_ids: (B, T) with placeholders.
        num_images: How many images come with them.
        attention_mask: (B, T); with it, the placeholders must also follow the first token, and those that it hides
            do not count.

    Raises:
        ValueError: Images and rows differ in number, a row does not hold a placeholder for each patch, or other tokens
            are between or before them.
    """
    if num_images != len(input_ids):
        raise ValueError(f"Got {num_images} images for {len(input_ids)} prompts: give one image with each prompt.")
    is_image = input_ids == config.image_token_id
    before = torch.zeros_like(is_image)
    if attention_mask is not None:
        is_image = is_image & (attention_mask == 1)
        before = (is_image.cumsum(1) == 0) & (attention_mask == 1)
    begins = is_image & ~torch.nn.functional.pad(is_image[:, :-1], (1, 0))
    counts = torch.stack([is_image.sum(1), begins.sum(1), before.sum(1)], dim=1)
    for row, (count, runs, before_image) in enumerate(counts.tolist()):
        if count != config.num_image_tokens:
            raise ValueError(
                f"Every row of `input_ids` must hold {config.num_image_tokens} image placeholders (id "
                f"{config.image_token_id}), or all rows none: row {row} holds {count}."
            )
        if runs > 1 or before_image > 1:
            raise ValueError(
                f"The image placeholders of row {row} of `input_ids` are not side by side after the first token: use "
                "the inputs as the processor gives them."
            )


def insert_image_tokens(
    config: OpenVLAConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Put the image placeholders after BOS in (B, T) ids that have none, and grow mask and labels with them."""
    patches, length = config.num_image_tokens, input_ids.shape[1]
    if torch.compiler.is_compiling():  # values can't be looked at: ids no longer than an image have no placeholders
        has_placeholders = length > patches
    else:
        has_placeholders = bool((input_ids == config.image_token_id).any())
    if has_placeholders:
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


__all__ = [
    "append_prompt_suffix",
    "as_tensor",
    "check_image_tokens",
    "check_pixel_values",
    "check_prompt_length",
    "insert_image_tokens",
    "left_pad",
    "read_prompts",
]
