"""Decode a chunk of actions in one bidirectional pass (OpenVLA-OFT), and train models that decode this way.

The sequence of a row is: padding, BOS, patches of all images, state, diffusion time, prompt, one slot for each number
of the chunk, and the end-of-sequence token. Padding on the left puts the slots of all rows in the same columns. Slots
are zeros, or embeddings of noisy actions. Every token attends to all tokens of its row. The hidden state at each
position predicts the next position, so the last token of the prompt predicts the first slot.

Shapes: B batch, T tokens of the prompts with their prefix, L tokens of the sequence, D width, V vocabulary,
K actions of a chunk, A action dimensions, S state dimensions, N action bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .action_decoding import DecodedActions, greedy_ids
from .action_heads import embed_time, noise_schedule
from .configuration_openvla import OpenVLAConfig
from .film import mean_text_embedding
from .model_inputs import as_tensor, check_num_images, check_prompt_length, prepare_prompts


IGNORED = -100


@dataclass
class ChunkLoss:
    """Loss of a batch, and the predictions behind it.

    loss: () float32; `None` without targets.
    actions: (B, K, A) predicted normalised actions, float32.
    logits: (B, K * A + 1, V) of the slots and the stop token; `None` with an action head.
    """

    loss: torch.Tensor | None
    actions: torch.Tensor
    logits: torch.Tensor | None


def bidirectional_mask(
    text_config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor
) -> Any:
    """Build the mask that lets every position attend to every token of its row.

    The mask is never left out, even without padding: without one, attention would fall back to the causal mask.

    Args:
        text_config: Config of the language model.
        inputs_embeds: (B, L, D).
        attention_mask: (B, L), 1 for tokens and 0 for padding.

    Returns:
        A mask (B, 1, L, L) in the form that the attention implementation takes.

    Raises:
        ValueError: The attention implementation does not take such a mask.
    """
    rows, length = attention_mask.shape
    is_token = attention_mask.to(inputs_embeds.device, torch.bool)
    # transformers has a public setter for the attention implementation, but no public getter.
    implementation = text_config._attn_implementation
    if implementation == "sdpa":
        return is_token[:, None, None].expand(-1, -1, length, -1)
    if implementation == "eager":
        added = torch.zeros_like(is_token, dtype=inputs_embeds.dtype)
        added = added.masked_fill(~is_token, torch.finfo(inputs_embeds.dtype).min)
        return added[:, None, None].expand(-1, -1, length, -1)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return is_token[row, key]

        return create_block_mask(sees, rows, None, length, length, device=is_token.device)
    raise ValueError(
        f"The attention implementation {implementation!r} does not take the bidirectional mask of parallel decoding: "
        "load the model with `attn_implementation=` 'sdpa', 'eager' or 'flex_attention'."
    )


def lay_out(
    config: OpenVLAConfig, input_ids: Any, attention_mask: Any, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare prompts (B, T) for `rows` observations, and check that the slots after them fit the language model."""
    input_ids, attention_mask = prepare_prompts(config, input_ids, attention_mask)
    check_num_images(rows, len(input_ids))
    check_prompt_length(config, attention_mask, num_new_tokens(config))
    return input_ids, attention_mask


def refuse_foreign_inputs(inputs: dict[str, Any]) -> None:
    """Raise `ValueError` if one of these inputs is given: training with parallel decoding does not take them."""
    if given := [name for name, value in inputs.items() if value is not None and not _is_off(value)]:
        raise ValueError(
            f"A model with parallel decoding does not take `{given[0]}`: leave it out. Pass prompts without actions "
            "as `input_ids`, the normalised state as `proprio` and targets as `actions`."
        )


def _is_off(value: Any) -> bool:
    """Whether a value is False or 0, which libraries pass for unused options."""
    return isinstance(value, int) and not value


def num_new_tokens(config: OpenVLAConfig) -> int:
    """Return the number of tokens after a prompt: K * A slots, and the stop token if there is one."""
    assert config.action_dim is not None  # the config checks it
    return config.action_horizon * config.action_dim + config.action_stop_token


class ParallelPass:
    """Passes of the language model over the same observations.

    Args:
        model: The policy.
        input_ids: (B, T) prompts as `lay_out` returns them.
        pixel_values: (B, 3 * towers * images, H, W).
        attention_mask: (B, T).
        proprio: (B, S) normalised state, if the model sees it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor,
        proprio: torch.Tensor | None,
    ):
        self.model, self.config = model, model.config
        self.rows, self.prompt = input_ids.shape
        self.slots = self.config.action_horizon * self.config.action_dim
        length = self.prompt + num_new_tokens(self.config)
        if length > model.attention_reach:
            raise ValueError(
                f"Some layers of this language model attend to only {model.attention_reach} tokens, but parallel "
                f"decoding needs {length} in every layer: use a language model without a sliding window."
            )
        self.input_ids = input_ids
        self.token_embeds = model.get_input_embeddings()(input_ids)
        self.attention_mask = nn.functional.pad(attention_mask, (0, length - self.prompt), value=1)
        language = self._mean_text(attention_mask) if self.config.use_film else None
        self.prefix = model.model.get_prefix_features(pixel_values, proprio, language)

    def run(self, noisy: torch.Tensor | None = None, timesteps: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the hidden states (B, K * A, D) that predict the slots, and one more if a stop token follows.

        Args:
            noisy: (B, K, A) noisy actions, for a diffusion head.
            timesteps: (B,) noise levels of these actions.
        """
        prefix, slots = self.prefix, self.token_embeds.new_zeros(self.rows, self.slots, self.token_embeds.shape[-1])
        if noisy is not None and timesteps is not None:
            time = embed_time(timesteps, prefix.shape[-1]).to(prefix)
            prefix = torch.cat([prefix, time.unsqueeze(1)], dim=1)
            slots = self.model.model.noisy_action_projector(noisy.flatten(1).unsqueeze(-1)).to(slots)
        sequence = [self.model.model.place_prefix(self.token_embeds, self.input_ids, prefix), slots]
        if self.config.action_stop_token:
            sequence.append(self._stop_embedding())
        hidden = self.model.model(
            inputs_embeds=torch.cat(sequence, dim=1),
            attention_mask=self.attention_mask,
            position_ids=(self.attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, self.prompt - 1 : -1]

    def _mean_text(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Average the embeddings of each row's prompt and stop token, (B, D), for FiLM."""
        is_text = attention_mask.bool() & (self.input_ids != self.config.image_token_id)
        embeddings = self.token_embeds
        if self.config.action_stop_token:
            embeddings = torch.cat([embeddings, self._stop_embedding()], dim=1)
            is_text = nn.functional.pad(is_text, (0, 1), value=True)
        return mean_text_embedding(embeddings, is_text)

    def _stop_embedding(self) -> torch.Tensor:
        stop = torch.full((self.rows, 1), stop_token_id(self.config), device=self.input_ids.device)
        return self.model.get_input_embeddings()(stop)


def stop_token_id(config: OpenVLAConfig) -> int:
    """Return the id of the token after the slots."""
    stop = config.text_config.eos_token_id
    return stop[0] if isinstance(stop, list) else stop


def decode_chunk(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor,
    dims: Sequence[int],
    proprio: torch.Tensor | None,
    constrained: bool = True,
    initial_noise: Any = None,
    num_inference_steps: int | None = None,
    **unknown: Any,
) -> DecodedActions:
    """Decode the chunk of each row from prompts (B, T) as `lay_out` returns them.

    Args:
        model: The policy.
        input_ids: (B, T).
        pixel_values: (B, 3 * towers * images, H, W).
        attention_mask: (B, T).
        dims: Number of action dimensions in the statistics of each row.
        proprio: (B, S) normalised state, if the model sees it.
        constrained: Choose among the action ids only (policies without an action head).
        initial_noise: (B, K, A) or (K, A) noise that a diffusion head starts from; random by default.
        num_inference_steps: Number of denoising steps of a diffusion head. It must divide the number of training
            steps, which is the default.
        unknown: Other arguments, which raise an error.

    Raises:
        ValueError: An argument does not fit this model.
    """
    if unknown:
        them = "it" if len(unknown) == 1 else "them"
        raise ValueError(f"Parallel decoding does not take {', '.join(map(repr, unknown))}: leave {them} out.")
    if foreign := set(dims) - {model.config.action_dim}:
        raise ValueError(
            f"The statistics describe {min(foreign)} action dimensions, but this model predicts "
            f"{model.config.action_dim}: pass the `unnorm_key` of another dataset."
        )
    is_diffusion = model.config.action_head == "diffusion"
    if not is_diffusion and (initial_noise is not None or num_inference_steps is not None):
        raise ValueError(
            "`initial_noise` and `num_inference_steps` need a diffusion head, which this model lacks: leave them out."
        )
    parallel = ParallelPass(model, input_ids, pixel_values, attention_mask, proprio)
    if is_diffusion:
        steps = model.config.diffusion_steps if num_inference_steps is None else num_inference_steps
        return _denoise(parallel, _read_noise(model, initial_noise, len(input_ids)), steps)
    hidden = parallel.run()[:, : parallel.slots]
    if model.action_head is not None:
        return DecodedActions(model.action_head(hidden).float().cpu().double().numpy(), None, None, 1)
    shape = (len(hidden), model.config.action_horizon, model.config.action_dim)
    token_ids, highest, action_logits = greedy_ids(model, hidden, constrained)
    ids = token_ids.cpu().numpy().reshape(shape)
    normalized = model.action_tokenizer.decode(ids)
    normalized[~highest.isfinite().cpu().numpy().reshape(shape)] = np.nan
    return DecodedActions(normalized, ids, action_logits.unflatten(1, shape[1:]), 1)


def _read_noise(model: PreTrainedModel, noise: Any, rows: int) -> torch.Tensor:
    """Return the noise (B, K, A), float32, that sampling starts from."""
    shape = (rows, model.config.action_horizon, model.config.action_dim)
    if noise is None:
        return torch.randn(shape, device=model.device)
    noise = as_tensor("initial_noise", noise)
    if noise.shape not in (shape, shape[1:]) or not noise.isfinite().all():
        raise ValueError(f"`initial_noise` must be finite numbers of shape {shape}, got shape {tuple(noise.shape)}.")
    return noise.to(model.device, torch.float32).expand(shape)


def _denoise(parallel: ParallelPass, noisy: torch.Tensor, steps: int) -> DecodedActions:
    """Turn noise (B, K, A) into actions in `steps` passes."""
    schedule = noise_schedule(parallel.config.diffusion_steps)
    for timestep in schedule.timesteps(steps):
        hidden = parallel.run(noisy, torch.full((parallel.rows,), timestep, device=noisy.device))
        noise = parallel.model.action_head(hidden[:, : parallel.slots]).float()
        noisy = schedule.step(noisy, noise, timestep, steps)
    return DecodedActions(noisy.cpu().double().numpy(), None, None, steps)


def chunk_loss(
    model: PreTrainedModel,
    parallel: ParallelPass,
    actions: torch.Tensor | None,
    action_mask: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    noise: torch.Tensor | None = None,
    timesteps: torch.Tensor | None = None,
) -> ChunkLoss:
    """Predict the chunks of a batch, and compare them with their targets.

    Args:
        model: The policy.
        parallel: Passes over the observations of the batch.
        actions: (B, K, A) normalised targets; `None` to predict only.
        action_mask: (B, K), false for actions that do not count; all count by default.
        num_items_in_batch: Count to divide the summed loss by, instead of the batch's own count of action numbers
            (and of stop tokens, without a head).
        noise: (B, K, A) noise for the training step of a diffusion head; random by default.
        timesteps: (B,) noise levels for the training step of a diffusion head; random by default.
    """
    config = model.config
    if actions is not None:
        actions, action_mask = _read_targets(config, actions, action_mask, parallel.rows)
        actions, action_mask = actions.to(parallel.prefix.device), action_mask.to(parallel.prefix.device)
    if config.action_head == "none":
        return _token_loss(model, parallel, actions, action_mask, num_items_in_batch)
    if config.action_head == "l1":
        predicted = model.action_head(parallel.run()[:, : parallel.slots]).float()
        if actions is None:
            return ChunkLoss(None, predicted, None)
        errors = (predicted - actions).abs()
    else:
        if actions is None:
            raise ValueError(
                "A diffusion head has no loss without `actions`: call `predict_action` to sample actions."
            )
        schedule = noise_schedule(config.diffusion_steps)
        noise = torch.randn_like(actions) if noise is None else noise.to(actions)
        if timesteps is None:
            timesteps = torch.randint(0, schedule.steps, (parallel.rows,), device=actions.device)
        noisy = schedule.add_noise(actions, noise, timesteps)
        predicted_noise = model.action_head(parallel.run(noisy, timesteps)[:, : parallel.slots]).float()
        predicted = schedule.remove_noise(noisy, predicted_noise, timesteps)
        errors = (predicted_noise - noise).square()
    counts = action_mask.unsqueeze(-1).expand_as(errors)  # type: ignore[union-attr]
    total = counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return ChunkLoss(errors.where(counts, 0).sum() / total, predicted, None)


def _read_targets(
    config: OpenVLAConfig, actions: torch.Tensor, action_mask: torch.Tensor | None, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check targets (B, K, A) and their mask (B, K), which is all true by default."""
    shape = (rows, config.action_horizon, config.action_dim)
    if actions.shape != shape:
        raise ValueError(f"`actions` has shape {tuple(actions.shape)}, but this model needs {shape}.")
    if action_mask is None:
        action_mask = torch.ones(shape[:2], dtype=torch.bool, device=actions.device)
    if action_mask.shape != shape[:2] or action_mask.dtype != torch.bool:
        raise ValueError(
            f"`action_mask` must be bools of shape {shape[:2]}, got {action_mask.dtype} of shape "
            f"{tuple(action_mask.shape)}."
        )
    return actions.float(), action_mask


def _token_loss(
    model: PreTrainedModel,
    parallel: ParallelPass,
    actions: torch.Tensor | None,
    action_mask: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> ChunkLoss:
    """Compute the cross entropy between the logits of the slots and the stop token and the ids of the targets."""
    config = model.config
    logits = model.lm_head(parallel.run())
    ids = logits[:, : parallel.slots].detach().argmax(-1).unflatten(1, (-1, config.action_dim))
    predicted = torch.from_numpy(model.action_tokenizer.decode(ids)).to(logits.device, torch.float32)
    if actions is None or action_mask is None:
        return ChunkLoss(None, predicted, logits)
    targets = torch.from_numpy(model.action_tokenizer.encode(actions.detach().cpu())).to(logits.device)
    targets = targets.masked_fill(~action_mask.unsqueeze(-1), IGNORED).flatten(1)
    if config.action_stop_token:
        targets = nn.functional.pad(targets, (0, 1), value=stop_token_id(config))
    total = targets.ne(IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    summed = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return ChunkLoss(summed / total, predicted, logits)


__all__ = [
    "ChunkLoss",
    "ParallelPass",
    "bidirectional_mask",
    "chunk_loss",
    "decode_chunk",
    "lay_out",
    "num_new_tokens",
    "refuse_foreign_inputs",
]
