"""Inputs of the policy: checks, image placeholders, prompt suffix and padding.

Shapes: B batch, P image patches, T tokens.
"""

from typing import Any

import numpy as np
import torch

from .configuration_openvla import OpenVLAConfig


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint16, torch.int8, torch.uint8)


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """Convert lists and arrays, which a processor returns without `return_tensors="pt"`, to a tensor.

    Raises:
        ValueError: The value does not contain numbers, its rows differ in length, or its tensor is sparse or on
            "meta".
    """
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout != torch.strided:
            kind = 'a tensor on the device "meta"' if value.is_meta else "a sparse tensor"
            raise ValueError(f"`{name}` is {kind}: pass a dense tensor with values.")
        return value
    try:
        return torch.as_tensor(np.array(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` is neither a tensor nor an array of numbers whose rows are equally long: call the processor "
            'with `padding=True` and `return_tensors="pt"`.'
        ) from error


def prepare_prompts(
    config: OpenVLAConfig, input_ids: Any, attention_mask: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check prompts, and lay them out for decoding: images after the first token, prompt suffix, padding on the left.

    The placeholders in the result also cover the state and the diffusion time, if the model sees these.

    The ids are read once, as Python numbers on the CPU: a few hundred of them cost less there than a tensor operation
    for each check.

    Args:
        config: Config of the model.
        input_ids: (B, T) integers, with or without image placeholders, padded on either side.
        attention_mask: (B, T), 1 for tokens and 0 for padding; `None` for rows without padding.

    Returns:
        Ids and mask, int64 on the CPU. Each row ends in `prompt_suffix_token_id`, if the config has one.

    Raises:
        ValueError: The ids are not in this vocabulary, another model's processor made them, the mask does not mark one
            run of tokens in each row or hides ids other than padding, or the placeholders are incomplete.
    """
    ids = _read_ids(config, input_ids)
    is_token = _read_mask(attention_mask, ids)
    prompts = [_read_prompt(config, *one) for one in zip(range(len(ids)), ids, is_token, strict=True)]
    suffix = config.prompt_suffix_token_id
    missing = [config.image_token_id] * (config.num_prefix_tokens - _count_placeholders(config, prompts))
    width = ids.shape[1] + len(missing)
    if suffix is not None and any(prompt[-1] != suffix for prompt in prompts):
        width += 1
    rows = np.full((len(prompts), width), config.pad_token_id or 0)
    mask = np.zeros_like(rows)
    for row, prompt in enumerate(prompts):
        prompt[1:1] = missing
        if suffix not in (None, prompt[-1]):
            prompt.append(suffix)
        rows[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(rows), torch.from_numpy(mask)


def _read_ids(config: OpenVLAConfig, input_ids: Any) -> np.ndarray:
    """Read ids (B, T) as int64, and check that they are in the vocabulary."""
    input_ids = as_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype not in INTEGERS:
        raise ValueError(
            f"`input_ids` must be integers of shape (batch, tokens), got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}."
        )
    ids = input_ids.long().cpu().numpy()
    lowest, highest, vocab_size = ids.min(), ids.max(), config.text_config.vocab_size
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`input_ids` contains {lowest if lowest < 0 else highest}, but this model's ids end at {vocab_size - 1}: "
            "encode the prompt with the checkpoint's own processor."
        )
    return ids


def _read_mask(attention_mask: Any, ids: np.ndarray) -> np.ndarray:
    """Read which of the ids (B, T) are tokens, at least one in each row."""
    if attention_mask is None:
        return np.ones(ids.shape, bool)
    mask = as_tensor("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(
            f"`attention_mask` of shape {tuple(mask.shape)} does not fit `input_ids` of shape {ids.shape}: give 1 for "
            "each token and 0 for padding."
        )
    # numpy lacks some of torch's floating-point types.
    mask = (mask.double() if mask.is_floating_point() else mask).detach().cpu().numpy()
    is_token = mask == 1
    if not (is_token | (mask == 0)).all():
        raise ValueError("`attention_mask` must be 1 for tokens and 0 for padding, got other numbers.")
    if not is_token.any(1).all():
        raise ValueError(
            f"`attention_mask` is 0 everywhere in row {is_token.any(1).argmin()}: mark its tokens with 1."
        )
    return is_token


def _read_prompt(config: OpenVLAConfig, row: int, ids: np.ndarray, is_token: np.ndarray) -> list[int]:
    """Return the tokens among the ids (T,) of a row. The mask must hide all padding and nothing else."""
    pad, bos = config.pad_token_id, config.text_config.bos_token_id
    positions = is_token.nonzero()[0]
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 != len(positions):
        raise ValueError(
            f"`attention_mask` hides tokens in the middle of row {row}: set 0 only for padding, at the ends of a row."
        )
    prompt = ids.tolist()
    hidden = prompt[:first] + prompt[last + 1 :]
    prompt = prompt[first : last + 1]
    # If BOS and padding share an id, the first id of a row can be either.
    if pad not in (None, bos) and pad in (prompt[0], prompt[-1]):
        raise ValueError(
            f"Row {row} of `input_ids` contains padding (id {pad}) that `attention_mask` does not hide: pass the "
            "processor's `attention_mask` with its `input_ids`."
        )
    if pad is not None and (text := [one for one in hidden if one != pad]):
        raise ValueError(
            f"`attention_mask` hides id {text[0]} of row {row}, which is not padding (id {pad}): set 0 only for "
            "padding."
        )
    return prompt


def _placeholder_run(config: OpenVLAConfig) -> list[int]:
    """Return the placeholders of one observation's images."""
    return [config.image_token_id] * (config.num_images * config.num_image_tokens)


def _count_placeholders(config: OpenVLAConfig, prompts: list[list[int]]) -> int:
    """Return how many placeholders each prompt contains: none, those of its images, or those of the whole prefix.

    Placeholders must be side by side after the first token, or at the start of a prompt without BOS.
    """
    run = _placeholder_run(config)
    counts = [prompt.count(config.image_token_id) for prompt in prompts]
    if not any(counts):
        for row, prompt in enumerate(prompts):
            _refuse_other_placeholders(run, row, prompt)
        return 0
    if set(counts) == {config.num_prefix_tokens}:
        run = [config.image_token_id] * config.num_prefix_tokens
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        _check_placeholder_count(run, row, count)
        if run not in (prompt[: len(run)], prompt[1 : len(run) + 1]):
            raise ValueError(_scattered(row))
    return len(run)


def _refuse_other_placeholders(image: list[int], row: int, prompt: list[int]) -> None:
    """Raise `ValueError` if another id is where a processor puts placeholders: after BOS, or first without BOS."""
    for other in (prompt[: len(image)], prompt[1 : len(image) + 1]):
        if len(other) == len(image) > 1 and len(set(other)) == 1:
            raise ValueError(
                f"Row {row} of `input_ids` contains {other[0]} as image placeholders, but this model's id is "
                f"{image[0]}: use the checkpoint's own processor."
            )


def _check_placeholder_count(image: list[int], row: int, count: int) -> None:
    if count != len(image):
        raise ValueError(
            f"Either all rows of `input_ids` must have {len(image)} image placeholders (id {image[0]}), or none: "
            f"row {row} has {count}."
        )


def _scattered(row: int) -> str:
    return (
        f"The image placeholders of row {row} of `input_ids` are not side by side after the first token: pass the "
        "inputs as the processor returns them."
    )


def check_prompt_length(config: OpenVLAConfig, attention_mask: torch.Tensor, num_new_tokens: int) -> None:
    """Check that prompts, with placeholders, and the tokens after them fit the positions of the language model.

    Raises:
        ValueError: The longest prompt leaves too little room.
    """
    # Language models without a limit on positions lack this field.
    limit = getattr(config.text_config, "max_position_embeddings", None)
    room = attention_mask.shape[1] if limit is None else limit - num_new_tokens
    room += not config.is_parallel  # autoregressive decoding does not read the last token
    if attention_mask.shape[1] > room and (longest := int(attention_mask.sum(1).max())) > room:
        raise ValueError(
            f"A prompt of {longest} tokens, image included, and {num_new_tokens} new tokens exceed the {limit} "
            "positions of this language model: shorten the instruction."
        )


def check_pixel_values(config: OpenVLAConfig, pixel_values: torch.Tensor) -> None:
    """Check the shape of images (B, 3 * towers * images, H, W) against the config.

    Raises:
        ValueError: The number of images or channels, the height or the width is wrong.
    """
    channels = 3 * len(config.vision_configs)
    for side in {tower.image_size for tower in config.vision_configs}:
        if pixel_values.shape[1:] == (channels * config.num_images, side, side) and pixel_values.is_floating_point():
            continue
        images, rest = divmod(pixel_values.shape[1], channels) if pixel_values.ndim == 4 else (0, 0)
        if images and not rest and images != config.num_images:
            raise ValueError(
                f"`pixel_values` contains {images} image{'s' * (images > 1)} for each observation, but this model "
                f"sees {config.num_images}: give one image from each camera."
            )
        raise ValueError(
            f"`pixel_values` must be floating-point numbers of shape (batch, {channels * config.num_images}, {side}, "
            f"{side}), got {tuple(pixel_values.shape)} of {pixel_values.dtype}: prepare them with this checkpoint's "
            "own processor."
        )


def check_num_images(num_images: int, num_prompts: int) -> None:
    """Raise `ValueError` if images and prompts differ in number."""
    if num_images != num_prompts:
        observations = f"{num_images} observation{'s' * (num_images != 1)}"
        prompts = f"{num_prompts} prompt{'s' * (num_prompts != 1)}"
        raise ValueError(f"Got {observations} for {prompts}: pass one prompt for each observation.")


def check_proprio(config: OpenVLAConfig, proprio: torch.Tensor | None, rows: int) -> None:
    """Check the normalised state (B, S) against the config.

    Raises:
        ValueError: The state is missing, is not expected, or has the wrong shape.
    """
    if config.proprio_dim is None:
        if proprio is not None:
            raise ValueError("This model does not take a state: leave `proprio` and `state` out.")
    elif proprio is None:
        raise ValueError(
            f"The robot's state is missing: pass {config.proprio_dim} numbers for each observation, as "
            "`state` (robot units) to `predict_action` or `proprio` (normalised) to `forward`."
        )
    elif proprio.shape != (rows, config.proprio_dim):
        raise ValueError(
            f"`proprio` has shape {tuple(proprio.shape)}, but this model needs ({rows}, {config.proprio_dim}): one "
            "row of state dimensions for each observation."
        )


def read_state(config: OpenVLAConfig, state: Any, rows: int) -> np.ndarray:
    """Read the state (rows, S), or (S,) of one robot, as a new float64 array.

    Raises:
        ValueError: The shape is wrong, or a value is not finite.
    """
    tensor = as_tensor("state", state)
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.shape != (rows, config.proprio_dim):
        raise ValueError(
            f"`state` has shape {tuple(tensor.shape)}, but this model needs ({rows}, {config.proprio_dim}): one row "
            "of state dimensions for each observation."
        )
    values = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    if not np.isfinite(values).all():
        raise ValueError("`state` contains NaN or infinity: pass finite numbers in the robot's units.")
    return values


def check_image_tokens(config: OpenVLAConfig, input_ids: torch.Tensor, num_images: int) -> None:
    """Check that each row (B, T) has images, and the placeholders of the whole prefix side by side.

    Raises:
        ValueError: Images and rows differ in number, or a row does not have a placeholder for each embedding of the
            prefix, all side by side.
    """
    check_num_images(num_images, len(input_ids))
    prefix = [config.image_token_id] * config.num_prefix_tokens
    is_image = input_ids == config.image_token_id
    begins = is_image & ~torch.nn.functional.pad(is_image[:, :-1], (1, 0))
    for row, (count, runs) in enumerate(torch.stack([is_image.sum(1), begins.sum(1)], dim=1).tolist()):
        _check_placeholder_count(prefix, row, count)
        if runs > 1:
            raise ValueError(_scattered(row))


def insert_image_tokens(
    config: OpenVLAConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Insert the placeholders that ids (B, T) lack after BOS, and extend the mask and the labels with them.

    The ids contain no placeholders, those of the images (from the processor), or those of the whole prefix.
    """
    length, prefix = input_ids.shape[1], config.num_prefix_tokens
    if (
        torch.compiler.is_compiling()
    ):  # values can't be read, so ids no longer than the prefix count as ids without placeholders
        missing = 0 if length > prefix else prefix
    else:
        missing = prefix - int((input_ids == config.image_token_id).sum(1).max())
    if missing not in (prefix, prefix - len(_placeholder_run(config))) or not missing:
        return input_ids, attention_mask, labels
    # BOS is the first token that is attended to: rows may be padded on the left.
    bos = input_ids.new_zeros(len(input_ids)) if attention_mask is None else attention_mask.long().argmax(dim=1)
    position = torch.arange(length + missing, device=input_ids.device).expand(len(input_ids), -1)
    bos = bos.unsqueeze(1)
    image = (position > bos) & (position <= bos + missing)
    source = torch.where(position > bos, position - missing, position).clamp(min=0)

    def grow(tensor: torch.Tensor | None, value: int) -> torch.Tensor | None:
        return None if tensor is None else tensor.gather(1, source).masked_fill(image, value)

    return grow(input_ids, config.image_token_id), grow(attention_mask, 1), grow(labels, -100)


__all__ = [
    "as_tensor",
    "check_image_tokens",
    "check_num_images",
    "check_pixel_values",
    "check_prompt_length",
    "check_proprio",
    "insert_image_tokens",
    "prepare_prompts",
    "read_state",
]
