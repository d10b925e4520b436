"""Predict actions in the robot's units from observations.

Shapes: B batch, T tokens (image placeholders included), A action dimensions, N action bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Cache

from .action_decoding import (
    ActionPass,
    ActionTokens,
    CompiledActionPass,
    attention_reach,
    decode_actions,
)
from .action_tokenizer import (
    ActionTokenizer,
    action_dim,
    check_action_stats,
    check_statistics,
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
    prepare_prompts,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:  # a mixin, combined with a `PreTrainedModel`
    _Base = object


@dataclass
class ActionPrediction:
    """Result of `predict_action(return_details=True)`; rows with fewer dimensions than the longest end in NaN.

    actions: (B, A) float64, in the robot's units.
    normalized_actions: (B, A) float64 in [-1, 1].
    token_ids: (B, A) int64.
    probabilities: (B, A, N) float32 over the bins, lowest value first; `ActionTokenizer.bin_values` gives the values.
    entropy: (B, A) float32 in nats, of `probabilities`.
    forward_passes: Number of passes of the language model.
    """

    actions: np.ndarray
    normalized_actions: np.ndarray
    token_ids: np.ndarray
    probabilities: np.ndarray
    entropy: np.ndarray
    forward_passes: int


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
        """Largest number of tokens that every layer of the language model attends to."""
        return attention_reach(self.config.text_config)

    def decode_actions(self, token_ids: torch.Tensor | np.ndarray, unnorm_key: str | None = None) -> np.ndarray:
        """Decode action ids (..., A) to actions in the robot's units, float64 of the same shape."""
        stats = self._row_stats([unnorm_key])[0]
        normalized = self.action_tokenizer.decode(token_ids)
        if normalized.shape[-1:] != (action_dim(stats),):
            raise ValueError(
                f"`token_ids` has shape {normalized.shape}, but an action has {action_dim(stats)} dimensions: give "
                "one id for each on the last axis."
            )
        return unnormalize(normalized, stats)

    def _row_stats(self, keys: Sequence[str | None]) -> list[dict[str, Any]]:
        """Look up each row's statistics, and check them: the config may have changed after loading."""
        names = [resolve_key(self.norm_stats, key) for key in keys]
        in_use = {name: self.config.norm_stats[name] for name in dict.fromkeys(names)}  # type: ignore[index]
        check_statistics(in_use, "`norm_stats`")
        return [in_use[name]["action"] for name in names]

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | list[str] | None = None,
        *,
        stats: dict[str, Any] | None = None,
        constrained: bool = True,
        return_details: bool = False,
        draft_token_ids: torch.Tensor | np.ndarray | None = None,
        **decoding: Any,
    ) -> np.ndarray | ActionPrediction:
        """Predict the action for one observation or a batch.

        Args:
            input_ids: (B, T) prompts, with or without image placeholders, padded on either side. Tensors here and
                below may also be arrays or lists.
            pixel_values: (B, 3 * towers, H, W).
            attention_mask: (B, T), 1 for tokens and 0 for padding: ids of the config's `pad_token_id` at the ends of a
                row. All ones when left out, so rows with padding need their mask.
            unnorm_key: Name of the statistics that turn the action into robot units; a list gives each row its own.
            stats: Action statistics (`q01`, `q99`, `mask`) to use in place of the checkpoint's.
            constrained: Choose among the action ids only. `False` takes the best id of the whole vocabulary and clips
                it to the action ids, as the original code does.
            return_details: Return an `ActionPrediction`, which always has a batch dimension.
            draft_token_ids: (B, A) or (A,) guess of the action's ids, such as the last action's. The guess does not
                change the result; a better guess takes fewer passes of the language model.
            decoding: Arguments of `generate` (`do_sample`, `temperature`, ...); greedy by default.

        Returns:
            float64 (A,) for one observation, (B, A) for a batch, in the units of the statistics.

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
        # 2. Look up the statistics of each row
        keys = unnorm_key if isinstance(unnorm_key, (list, tuple)) else [unnorm_key] * rows
        if len(keys) != rows:
            raise ValueError(f"Got {len(keys)} `unnorm_key`s for {rows} observations: give one, or one for each.")
        row_stats = [check_action_stats(stats, "`stats`")] * rows if stats is not None else self._row_stats(keys)
        dims = [action_dim(one) for one in row_stats]
        check_prompt_length(self.config, attention_mask, max(dims))
        # 3. Decode the action's ids, one for each dimension
        device = self.device
        tokens: ActionTokens = decode_actions(
            self,
            input_ids.to(device),
            pixel_values.to(device, self.dtype),
            attention_mask.to(device),
            dims,
            constrained=constrained,
            draft_token_ids=draft_token_ids,
            **decoding,
        )
        # 4. Convert ids to bins, and bins to robot units
        token_ids = tokens.token_ids.cpu().numpy()
        _refuse_not_finite(token_ids, dims)
        normalized = self.action_tokenizer.decode(token_ids)
        actions = np.full(normalized.shape, np.nan)
        for row, (one, dim) in enumerate(zip(row_stats, dims, strict=True)):
            normalized[row, dim:] = np.nan
            actions[row, :dim] = unnormalize(normalized[row, :dim], one)
        if not return_details:
            return actions[0] if rows == 1 else actions
        log_probabilities = tokens.action_logits.float().log_softmax(-1)
        return ActionPrediction(
            actions=actions,
            normalized_actions=normalized,
            token_ids=token_ids,
            probabilities=log_probabilities.exp().cpu().numpy(),
            entropy=-(log_probabilities.exp() * log_probabilities).sum(-1).cpu().numpy(),
            forward_passes=tokens.forward_passes,
        )

    def action_stream(self, unnorm_key: str | list[str] | None = None) -> "ActionStream":
        """Start a control loop in which each action's tokens are the draft of the next."""
        return ActionStream(self, unnorm_key)

    def compile_for_actions(self, mode: str | None = None) -> None:
        """Compile the passes of `predict_action`, with CUDA graphs on a GPU; the first call of each size compiles.

        Prompts are padded to a few lengths, so that all instructions share a few graphs. If compilation fails, the
        first call warns, and the model predicts without compilation. A pickle or a copy of the model compiles again at
        its own first call. The limit on compiled shapes (`torch._dynamo.config.recompile_limit`) is raised for the
        whole process.

        Args:
            mode: Mode of `torch.compile`; by default "reduce-overhead" (CUDA graphs) on a GPU and "default" elsewhere.
        """
        mode = mode or ("reduce-overhead" if self.device.type == "cuda" else "default")
        self.action_pass, self.action_caches = CompiledActionPass(mode), {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the caches out of pickles and deep copies: the next call makes them again."""
        return super().__getstate__() | {"action_caches": {}}


def _refuse_not_finite(token_ids: np.ndarray, dims: Sequence[int]) -> None:
    """Raise `ValueError` if a row of ids (B, A) contains -1, decoding's mark for logits that are not finite."""
    spoilt = [row for row, dim in enumerate(dims) if (token_ids[row, :dim] < 0).any()]
    if spoilt:
        raise ValueError(
            f"The model's output is not finite for observation{'s' * (len(spoilt) > 1)} "
            f"{', '.join(map(str, spoilt))}: check `pixel_values` and the weights (including an adapter's) "
            "for NaN and infinity. A model in float16 may overflow: load it in bfloat16 or float32."
        )


class ActionStream:
    """Control loop of a robot, in which the tokens of the last action are the draft of the next.

    The actions equal those of `predict_action` and take fewer passes, since a robot's next action resembles its last.
    A batch is a group of robots that act in step.

    Example:
        ```python
        stream = model.action_stream("bridge_orig")
        for frame in camera:
            robot.step(stream.predict_action(**processor(frame, instruction=instruction)))
        stream.reset()  # a new episode
        ```

    Attributes:
        token_ids: (B, A) of the last action, or `None` at the start of an episode.
        forward_passes: Number of passes of the language model for the last action.
    """

    def __init__(self, model: ActionPredictionMixin, unnorm_key: str | list[str] | None = None):
        self.model, self.unnorm_key = model, unnorm_key
        self.reset()

    def reset(self) -> None:
        """Start an episode: forget the last action."""
        self.token_ids: np.ndarray | None = None
        self.forward_passes = 0

    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | list[str] | None = None,
        *,
        return_details: bool = False,
    ) -> Any:
        """Predict like `OpenVLAForActionPrediction.predict_action`; `unnorm_key` defaults to the stream's own."""
        input_ids = as_tensor("input_ids", input_ids)
        draft = self.token_ids
        if draft is not None and input_ids.shape[:1] != (len(draft),):  # another number of robots
            draft = None
        details = self.model.predict_action(
            input_ids,
            pixel_values,
            attention_mask,
            self.unnorm_key if unnorm_key is None else unnorm_key,
            draft_token_ids=draft,
            return_details=True,
        )
        self.token_ids, self.forward_passes = details.token_ids, details.forward_passes
        if return_details:
            return details
        return details.actions[0] if len(details.actions) == 1 else details.actions


__all__ = ["ActionPrediction", "ActionPredictionMixin", "ActionStream"]
