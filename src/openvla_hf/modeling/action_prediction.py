"""Predict actions in the robot's units from observations.

Shapes: B batch, T tokens (image placeholders included), K actions of a chunk, A action dimensions, S state dimensions,
N action bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Cache, PreTrainedTokenizerBase

from .action_decoding import (
    ActionPass,
    CompiledActionPass,
    DecodedActions,
    attention_reach,
    decode_actions,
)
from .action_stream import ActionStream, ChunkStream
from .action_tokenizer import (
    RANGE_MARGIN,
    ActionTokenizer,
    action_dim,
    check_action_stats,
    check_statistics,
    normalize_state,
    resolve_action_stats,
    resolve_key,
    unnormalize,
)
from .configuration_openvla import OpenVLAConfig
from .model_inputs import (
    as_tensor,
    check_num_images,
    check_pixel_values,
    check_prompt_length,
    check_proprio,
    prepare_prompts,
    read_state,
)
from .parallel_decoding import decode_chunk, num_new_tokens
from .reasoning import ReasonedActions, ReasoningStream, decode_reasoning


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:  # a mixin, combined with a `PreTrainedModel`
    _Base = object


@dataclass
class ActionPrediction:
    """Result of `predict_action(return_details=True)`; rows with fewer dimensions than the longest end in NaN.

    With parallel decoding, each shape has a further axis K after B.

    actions: (B, A) float64, in the robot's units.
    normalized_actions: (B, A) float64 in [-1, 1]; an action head may go beyond.
    token_ids: (B, A) int64; `None` with an action head.
    probabilities: (B, A, N) float32 over the bins, lowest value first; `ActionTokenizer.bin_values` gives the values.
        `None` with an action head.
    entropy: (B, A) float32 in nats, of `probabilities`; `None` with an action head.
    forward_passes: Number of passes of the language model.
    text: Reasoning of each row, if the model writes it before the action and a `tokenizer` was given; else `None`.
    reasoning_ids: Ids of the reasoning of each row, also without a tokenizer; `None` without reasoning.
    """

    actions: np.ndarray
    normalized_actions: np.ndarray
    token_ids: np.ndarray | None
    probabilities: np.ndarray | None
    entropy: np.ndarray | None
    forward_passes: int
    text: list[str] | None = None
    reasoning_ids: list[list[int]] | None = None


class ActionPredictionMixin(_Base):
    """Action statistics, `predict_action` and a control loop, for a model class."""

    config: OpenVLAConfig
    device: torch.device
    dtype: torch.dtype
    action_pass: ActionPass
    action_caches: dict[tuple, Cache]

    @property
    def norm_stats(self) -> dict[str, Any] | None:
        """`{key: {"action": {"q01", "q99", "mask", ...}, ...}}` of every dataset that the checkpoint knows."""
        return self.config.norm_stats

    @norm_stats.setter
    def norm_stats(self, value: dict[str, Any] | None) -> None:
        self.config.norm_stats = check_statistics(value, "`norm_stats`")

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Look up the action statistics of one dataset; raise `ValueError` if the key does not name one."""
        return resolve_action_stats(self.norm_stats, unnorm_key)

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Return the number of action dimensions of one dataset."""
        return action_dim(self.get_action_stats(unnorm_key))

    @cached_property
    def action_tokenizer(self) -> ActionTokenizer:
        """Converter between the action bins and ids of this checkpoint."""
        return ActionTokenizer(self.config.action_vocab_end, self.config.n_action_bins)

    @cached_property
    def attention_reach(self) -> int:
        """Number of tokens that every layer of the language model can attend to."""
        return attention_reach(self.config.text_config)

    def decode_actions(self, token_ids: torch.Tensor | np.ndarray, unnorm_key: str | None = None) -> np.ndarray:
        """Decode action ids (..., A) to actions in the robot's units, float64 of the same shape."""
        stats = self._row_stats([unnorm_key])[0]
        normalized = self.action_tokenizer.decode(token_ids)
        if normalized.shape[-1:] != (action_dim(stats),):
            raise ValueError(
                f"`token_ids` has shape {normalized.shape}, but an action has {action_dim(stats)} dimensions: give "
                "one id for each dimension, on the last axis."
            )
        return self._to_robot_units(normalized, stats)

    def _to_robot_units(self, normalized: np.ndarray, stats: dict[str, Any]) -> np.ndarray:
        margin = RANGE_MARGIN if self.config.is_parallel else 0.0
        return unnormalize(normalized, stats, self.config.action_normalization, margin)

    def _row_stats(self, keys: Sequence[str | None]) -> list[dict[str, Any]]:
        """Look up each row's statistics, and check them: the config may have changed after loading."""
        names = [resolve_key(self.norm_stats, key) for key in keys]
        in_use = {name: self.config.norm_stats[name] for name in dict.fromkeys(names)}  # type: ignore[index]
        check_statistics(in_use, "`norm_stats`")
        return [in_use[name]["action"] for name in names]

    def _normalize_state(self, state: Any, keys: Sequence[str | None]) -> torch.Tensor | None:
        """Normalise the state (B, S) or (S,) with the statistics of each row; `None` if the model does not see it."""
        if state is None or self.config.proprio_dim is None:
            check_proprio(self.config, state, len(keys))
            return None
        values = read_state(self.config, state, len(keys))
        for row, key in enumerate(keys):
            name = resolve_key(self.norm_stats, key)
            stats = self.config.norm_stats[name].get("proprio")  # type: ignore[index]
            if stats is None:
                raise ValueError(
                    f"The statistics of {name!r} have no 'proprio', so the state can't be normalised: compute the "
                    "statistics again, with the state."
                )
            check_action_stats(stats, f"`norm_stats`, 'proprio' of {name!r}")
            if action_dim(stats) != self.config.proprio_dim:
                raise ValueError(
                    f"The statistics of {name!r} describe {action_dim(stats)} state dimensions, but this model sees "
                    f"{self.config.proprio_dim}: pass the `unnorm_key` of another dataset."
                )
            values[row] = normalize_state(values[row], stats, self.config.action_normalization)
        return torch.from_numpy(values).to(self.dtype).to(self.device)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | list[str] | None = None,
        *,
        state: torch.Tensor | np.ndarray | None = None,
        stats: dict[str, Any] | None = None,
        constrained: bool = True,
        return_details: bool = False,
        draft_token_ids: torch.Tensor | np.ndarray | None = None,
        **decoding: Any,
    ) -> np.ndarray | ActionPrediction:
        """Predict the action, or a chunk of K actions with parallel decoding, for one observation or a batch.

        Args:
            input_ids: (B, T) prompts, with or without image placeholders, padded on either side. Tensors here and
                below may also be arrays or lists.
            pixel_values: (B, 3 * towers * images, H, W).
            attention_mask: (B, T), 1 for tokens and 0 for padding: ids of the config's `pad_token_id` at the ends of a
                row. Without a mask, all ids count as tokens, so rows with padding need one.
            unnorm_key: Name of the statistics that turn the action into robot units; a list gives each row its own.
            state: (B, S) or (S,) state of the robots in their own units, if the model sees it.
            stats: Action statistics (`q01`, `q99`, `mask`) to use in place of the checkpoint's.
            constrained: Choose among the action ids only. `False` takes the best id of the whole vocabulary and clips
                it to the action ids, as the original code does.
            return_details: Return an `ActionPrediction`, which always has a batch dimension.
            draft_token_ids: (B, A) or (A,) guess of the action's ids, such as the last action's. The guess does not
                change the result; a better guess takes fewer passes of the language model.
            decoding: Arguments of `generate` (`do_sample`, `temperature`, ...); greedy by default. A diffusion head
                takes `initial_noise` (B, K, A) or (K, A), random by default, and `num_inference_steps`, a divisor of
                the config's `diffusion_steps` (the default). A model that reasons takes `tokenizer` (for `text` in the
                details), `max_new_tokens` (1024 by default) and `reasoning_ids` (a list of ids for each row: the
                beginning of a text that the model continues).

        Returns:
            float64 (A,) for one observation, (B, A) for a batch, in the units of the statistics. With parallel
            decoding, the shapes are (K, A) and (B, K, A).

        Raises:
            ValueError: The statistics can't be resolved, an input does not fit this model, or the model's output is
                not finite.
        """
        # 1. Lay out the inputs: placeholders, prompt suffix, padding on the left
        input_ids, attention_mask = prepare_prompts(self.config, input_ids, attention_mask)
        rows = len(input_ids)
        pixel_values = as_tensor("pixel_values", pixel_values)
        check_pixel_values(self.config, pixel_values)
        check_num_images(len(pixel_values), rows)
        # 2. Look up the statistics of each row, and normalise the state
        keys = unnorm_key if isinstance(unnorm_key, (list, tuple)) else [unnorm_key] * rows
        if len(keys) != rows:
            raise ValueError(f"Got {len(keys)} `unnorm_key`s for {rows} observations: give one, or one for each.")
        row_stats = [check_action_stats(stats, "`stats`")] * rows if stats is not None else self._row_stats(keys)
        dims = [action_dim(one) for one in row_stats]
        proprio = self._normalize_state(state, keys)
        # 3. Decode each row's action or chunk
        device = self.device
        inputs = (input_ids.to(device), pixel_values.to(device, self.dtype), attention_mask.to(device))
        new_tokens = num_new_tokens(self.config) if self.config.is_parallel else max(dims)
        check_prompt_length(self.config, attention_mask, new_tokens)
        if draft_token_ids is not None:
            decoding["draft_token_ids"] = draft_token_ids
        decode: Callable[..., DecodedActions] = decode_chunk if self.config.is_parallel else decode_actions
        if self.config.reasoning:
            decode = decode_reasoning
        decoded = decode(self, *inputs, dims, proprio, constrained=constrained, **decoding)
        # 4. Convert normalised values to robot units
        normalized = decoded.normalized_actions
        _refuse_not_finite(normalized, dims)
        actions = np.full(normalized.shape, np.nan)
        for row, (one, dim) in enumerate(zip(row_stats, dims, strict=True)):
            normalized[row, ..., dim:] = np.nan
            actions[row, ..., :dim] = self._to_robot_units(normalized[row, ..., :dim], one)
        if return_details:
            return _details(actions, decoded)
        return actions[0] if rows == 1 else actions

    def action_stream(
        self,
        unnorm_key: str | list[str] | None = None,
        execute: int | None = None,
        ensemble: float | None = None,
        reuse_reasoning: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> ActionStream | ChunkStream | ReasoningStream:
        """Start a control loop.

        The loop is a `ChunkStream` with parallel decoding, a `ReasoningStream` for a model that reasons, and otherwise
        an `ActionStream`.

        Args:
            unnorm_key: As in `predict_action`.
            execute: Number of actions of a chunk that are played before the next prediction, see `ChunkStream`.
            ensemble: Decay of the temporal ensembling, see `ChunkStream`.
            reuse_reasoning: Number of actions for which a text is used, see `ReasoningStream`; 1 by default.
            tokenizer: The processor's tokenizer, which `ReasoningStream` needs to reuse a text.

        Raises:
            ValueError: An argument does not fit this model.
        """
        if not self.config.reasoning and (reuse_reasoning is not None or tokenizer is not None):
            raise ValueError("`reuse_reasoning` and `tokenizer` need a model with `reasoning=True`: leave them out.")
        for key in unnorm_key if isinstance(unnorm_key, (list, tuple)) else [unnorm_key]:
            if key is not None:
                self.get_action_stats(key)  # here rather than at the robot's first action
        if self.config.is_parallel:
            return ChunkStream(self, unnorm_key, execute, ensemble)
        if execute is not None or ensemble is not None:
            raise ValueError("`execute` and `ensemble` need a model that predicts chunks of actions: leave them out.")
        if self.config.reasoning:
            return ReasoningStream(self, unnorm_key, 1 if reuse_reasoning is None else reuse_reasoning, tokenizer)
        return ActionStream(self, unnorm_key)

    def compile_for_actions(self, mode: str | None = None) -> None:
        """Compile the passes of `predict_action`, with CUDA graphs on a GPU; the first call of each size compiles.

        Prompts are padded to a few lengths, so that all instructions share a few graphs. If compilation fails, the
        first call warns, and the model predicts without compilation. A pickle or a copy of the model compiles again at
        its own first call. The limit on compiled shapes (`torch._dynamo.config.recompile_limit`) is raised for the
        whole process.

        Args:
            mode: Mode of `torch.compile`; by default "reduce-overhead" (CUDA graphs) on a GPU and "default" elsewhere.

        Raises:
            ValueError: The model decodes in parallel, or writes its reasoning before the action.
        """
        if self.config.is_parallel or self.config.reasoning:
            raise ValueError(
                "This model decodes a chunk in one pass or writes a text first, but compiled passes only decode an "
                "action token by token: predict without `compile_for_actions`."
            )
        mode = mode or ("reduce-overhead" if self.device.type == "cuda" else "default")
        self.action_pass, self.action_caches = CompiledActionPass(mode), {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the caches out of pickles and deep copies: the next call makes them again."""
        return super().__getstate__() | {"action_caches": {}}


def _refuse_not_finite(normalized: np.ndarray, dims: Sequence[int]) -> None:
    """Raise `ValueError` if decoding marked a value of a row (B, ..., A) as not finite."""
    spoilt = [row for row, dim in enumerate(dims) if not np.isfinite(normalized[row, ..., :dim]).all()]
    if spoilt:
        raise ValueError(
            f"The model's output is not finite for observation{'s' * (len(spoilt) > 1)} "
            f"{', '.join(map(str, spoilt))}: check `pixel_values` and the weights (including an adapter's) "
            "for NaN and infinity. A model in float16 may overflow: load it in bfloat16 or float32."
        )


def _details(actions: np.ndarray, decoded: DecodedActions) -> ActionPrediction:
    """Add probabilities and entropies of the action ids, if there are any."""
    probabilities = entropy = None
    if decoded.action_logits is not None:
        log_probabilities = decoded.action_logits.float().log_softmax(-1)
        probabilities = log_probabilities.exp().cpu().numpy()
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).cpu().numpy()
    return ActionPrediction(
        actions=actions,
        normalized_actions=decoded.normalized_actions,
        token_ids=decoded.token_ids,
        probabilities=probabilities,
        entropy=entropy,
        forward_passes=decoded.forward_passes,
        text=decoded.text if isinstance(decoded, ReasonedActions) else None,
        reasoning_ids=decoded.reasoning_ids if isinstance(decoded, ReasonedActions) else None,
    )


__all__ = ["ActionPrediction", "ActionPredictionMixin"]
