"""Models that write their reasoning before the action (Embodied Chain-of-Thought).

The text has the parts TASK (in the prompt), PLAN, VISIBLE OBJECTS, SUBTASK REASONING, SUBTASK, MOVE REASONING, MOVE,
GRIPPER POSITION and ACTION. The action's ids and the end-of-sequence token follow.

Shapes: B batch (robots that act in step), T tokens (image placeholders included), A action dimensions, N action bins,
V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from .action_decoding import DecodedActions
from .configuration_openvla import OpenVLAConfig
from .model_inputs import as_tensor, check_prompt_length


MAX_NEW_TOKENS = 1024
"""Largest number of tokens in a text with its action, as in the original."""
CHANGING_PARTS = (" MOVE REASONING:", " GRIPPER POSITION:")
"""Parts that depend on the current image. The text before the first of them stays valid for a few steps."""
SHOWN_CHARACTERS = 80
"""Number of characters at the end of a text that an error shows."""


@dataclass
class ReasonedActions(DecodedActions):
    """Decoded actions and the reasoning of each row.

    reasoning_ids: The ids before the action, without the prompt.
    text: These ids as text; `None` without a tokenizer.
    """

    reasoning_ids: list[list[int]]
    text: list[str] | None


class ActionLogits(LogitsProcessor):
    """Record the logits of the action ids at each step of `generate`.

    Attributes:
        of_actions: (B, N) for each step, NaN in rows where any logit is not finite.
    """

    def __init__(self, first_id: int, end_id: int):
        self.first_id, self.end_id = first_id, end_id
        self.of_actions: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record scores (B, V), and return them without NaN: on a GPU, sampling from NaN would abort the process."""
        is_finite = scores.amax(-1, keepdim=True).isfinite()
        self.of_actions.append(scores[:, self.first_id : self.end_id].masked_fill(~is_finite, torch.nan))
        return scores.nan_to_num()


def decode_reasoning(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor,
    dims: Sequence[int],
    proprio: torch.Tensor | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reasoning_ids: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int | None = None,
    constrained: bool = True,
    **generate_kwargs: Any,
) -> ReasonedActions:
    """Generate a text and an action for each left-padded prompt (B, T) with its placeholders in place.

    Args:
        model: The policy.
        input_ids: (B, T).
        pixel_values: Images that replace the placeholders.
        attention_mask: (B, T).
        dims: Number of action dimensions of each row.
        proprio: Normalised state, if the model sees it.
        tokenizer: The processor's tokenizer, which decodes the text.
        reasoning_ids: Beginning of each row's reasoning, which the model continues.
        max_new_tokens: Largest number of tokens in a text with its action; by default 1024, or fewer if the model's
            positions do not allow as many.
        constrained: Has no effect, since text needs the whole vocabulary.
        generate_kwargs: Arguments of `generate`, except those for beam search.

    Raises:
        ValueError: A row has no action, or an argument does not fit.
    """
    for name in ("draft_token_ids", "num_beams", "num_return_sequences", "stop_strings"):
        if generate_kwargs.get(name) is not None:
            raise ValueError(
                f"A model that writes its reasoning before the action does not take `{name}`: leave it out."
            )
    written = [list(map(int, ids)) for ids in reasoning_ids] if reasoning_ids is not None else [[]] * len(input_ids)
    input_ids, attention_mask = append_ids(model.config, input_ids, attention_mask, written)
    if max_new_tokens is None:
        limit = getattr(model.config.text_config, "max_position_embeddings", None)
        room = MAX_NEW_TOKENS if limit is None else limit - int(attention_mask.sum(1).max()) + 1
        max_new_tokens = max(min(MAX_NEW_TOKENS, room), max(dims))
    check_prompt_length(model.config, attention_mask, max_new_tokens)
    first_id, end_id = model.action_tokenizer.first_id, model.action_tokenizer.vocab_end
    recorded = ActionLogits(first_id, end_id)
    others = LogitsProcessorList(generate_kwargs.pop("logits_processor", None) or [])
    try:
        sequences = model.generate(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            proprio=proprio,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([recorded, *others]),
            eos_token_id=model.config.text_config.eos_token_id,
            **{"do_sample": False} | generate_kwargs | {"return_dict_in_generate": False},
        )
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        if not generate_kwargs:
            raise
        names = ", ".join(map(repr, generate_kwargs))
        raise ValueError(f"`generate` rejected {names}: {str(error).rstrip('.')}.") from error
    generated = sequences[:, input_ids.shape[1] :].cpu().numpy()
    logits = torch.stack(recorded.of_actions[: generated.shape[1]], dim=1)  # (B, T, N)
    starts: list[int | None] = []
    for row, (ids, dim) in enumerate(zip(generated, dims, strict=True)):
        text = _until_end(model.config, ids)
        is_spoilt = bool(logits[row, : len(text) + 1].isnan().any())
        starts.append(None if is_spoilt else find_action(text, dim, first_id, end_id, row, tokenizer))
    return _gather(model, generated, starts, written, logits, max(dims), tokenizer)


def append_ids(
    config: OpenVLAConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor, new_ids: Sequence[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append ids to each left-padded row (B, T), and pad on the left again.

    Raises:
        ValueError: The number of rows differs, or an id does not stand for text.
    """
    if len(new_ids) != len(input_ids):
        raise ValueError(
            f"Got `reasoning_ids` for {len(new_ids)} rows, but {len(input_ids)} observations: give a list of ids for "
            "each observation."
        )
    if any(
        not 0 <= one < config.text_config.vocab_size or one == config.image_token_id for ids in new_ids for one in ids
    ):
        raise ValueError("`reasoning_ids` contains ids that are not text: pass those of an earlier prediction.")
    if not any(new_ids):
        return input_ids, attention_mask
    rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    rows = [torch.cat([row, row.new_tensor(new)]) for row, new in zip(rows, new_ids, strict=True)]
    width = max(map(len, rows))
    padded = input_ids.new_full((len(rows), width), config.pad_token_id or 0)
    mask = attention_mask.new_zeros(padded.shape)
    for index, row in enumerate(rows):
        padded[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return padded, mask


def _until_end(config: OpenVLAConfig, ids: np.ndarray) -> np.ndarray:
    """Cut generated ids (T,) before the end-of-sequence token."""
    ends = np.isin(ids, config.text_config.eos_token_id).nonzero()[0]
    return ids[: ends[0]] if len(ends) else ids


def find_action(
    ids: np.ndarray,
    dim: int,
    first_id: int,
    end_id: int,
    row: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Return where the action begins in a text: at the last `dim` ids of the action range.

    Other ids may follow the action, but none may be within it: stray action ids in the text must not complete an
    action that was cut off.

    Args:
        ids: (T,) generated ids before the end-of-sequence token.
        dim: Number of action dimensions.
        first_id: Lowest action id.
        end_id: One past the highest action id.
        row: Index of the observation, for the error.
        tokenizer: Decodes the text for the error.

    Raises:
        ValueError: The text contains no whole action.
    """
    positions = ((ids >= first_id) & (ids < end_id)).nonzero()[0]
    last = positions[-dim:]
    if len(last) == dim and last[-1] - last[0] == dim - 1:
        return int(last[0])
    shown = (
        "Pass `tokenizer=processor.tokenizer` to see the text."
        if tokenizer is None
        else (f"The text ends in {tokenizer.decode(ids.tolist())[-SHOWN_CHARACTERS:]!r}.")
    )
    raise ValueError(
        f"The model wrote {len(ids)} tokens without a whole action of {dim} dimensions for observation {row}. {shown} "
        "Raise `max_new_tokens` if the text was cut off, or check that checkpoint and prompt are for reasoning."
    )


def _gather(
    model: PreTrainedModel,
    generated: np.ndarray,
    starts: Sequence[int | None],
    written: list[list[int]],
    logits: torch.Tensor,
    dim: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ReasonedActions:
    """Collect the ids and logits of the actions, and the texts before them.

    Args:
        model: The policy.
        generated: (B, T) generated ids.
        starts: Where the action of each row begins; `None` if the logits before it are not finite.
        written: Ids of each row's reasoning in the prompt.
        logits: (B, T, N) of the action ids at each step.
        dim: Largest number of action dimensions. A row with fewer dimensions has other ids after its own.
        tokenizer: Decodes the texts.
    """
    first = np.array([start or 0 for start in starts])
    steps = np.minimum(first[:, None] + np.arange(dim), generated.shape[1] - 1)  # (B, A)
    token_ids = np.take_along_axis(generated, steps, axis=1)
    index = torch.from_numpy(steps).to(logits.device).unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    normalized = model.action_tokenizer.decode(token_ids)
    normalized[[start is None for start in starts]] = np.nan
    reasoning_ids = [
        before + ids[:start].tolist() for before, ids, start in zip(written, generated, first, strict=True)
    ]
    return ReasonedActions(
        normalized_actions=normalized,
        token_ids=token_ids,
        action_logits=logits.gather(1, index).flip(-1),
        forward_passes=generated.shape[1],
        reasoning_ids=reasoning_ids,
        text=None if tokenizer is None else [tokenizer.decode(ids, skip_special_tokens=True) for ids in reasoning_ids],
    )


def lasting_part(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the reasoning before the first part that depends on the current image; none without one."""
    ids = list(ids)
    text = tokenizer.decode(ids)
    found = [position for part in CHANGING_PARTS if (position := text.find(part)) >= 0]
    if not found:
        return []
    count = bisect_right(range(len(ids) + 1), min(found), key=lambda count: len(tokenizer.decode(ids[:count])))
    return ids[: count - 1]


class ReasoningStream:
    """Control loop of a robot whose model writes its reasoning before each action.

    The text up to MOVE REASONING (task, plan, objects, subtask) stays valid for a few steps. With `reuse_reasoning=5`,
    the model writes a whole text at every fifth step. In between, it keeps this part of the last text and writes only
    the rest, in far fewer passes. A batch is a group of robots that act in step.

    Example:
        ```python
        stream = model.action_stream("bridge_orig", reuse_reasoning=5, tokenizer=processor.tokenizer)
        for frame in camera:
            robot.step(stream.predict_action(**processor(frame, instruction=instruction)))
        stream.reset()  # a new episode
        ```

    Args:
        model: The policy.
        unnorm_key: As in `predict_action`.
        reuse_reasoning: Number of actions for which a text is used; 1 for a new text at each step.
        tokenizer: The processor's tokenizer, which finds the parts of the text.

    Attributes:
        reasoning_ids: Beginning of each robot's text, which the next step continues; empty for a new text.
        text: The last reasoning of each robot, or `None` without a tokenizer.
        forward_passes: Number of passes of the language model for the last action.

    Raises:
        ValueError: `reuse_reasoning` is not a positive integer, or is above 1 without a tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        unnorm_key: str | list[str] | None = None,
        reuse_reasoning: int = 1,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if not isinstance(reuse_reasoning, int) or isinstance(reuse_reasoning, bool) or reuse_reasoning < 1:
            raise ValueError(f"`reuse_reasoning` must be an integer of at least 1, got {reuse_reasoning!r}.")
        if reuse_reasoning > 1 and tokenizer is None:
            raise ValueError(
                f"`reuse_reasoning={reuse_reasoning}` needs the parts of the text: pass "
                "`tokenizer=processor.tokenizer`."
            )
        self.model, self.unnorm_key = model, unnorm_key
        self.reuse_reasoning, self.tokenizer = reuse_reasoning, tokenizer
        self.reset()

    def reset(self) -> None:
        """Start an episode: forget the last text."""
        self.reasoning_ids: list[list[int]] = []
        self.text: list[str] | None = None
        self.forward_passes = 0
        self._steps_left = 0
        self._prompts: list[list[int]] = []

    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | list[str] | None = None,
        *,
        return_details: bool = False,
        **inputs: Any,
    ) -> Any:
        """Predict like `OpenVLAForActionPrediction.predict_action`; `unnorm_key` defaults to the stream's own.

        A different instruction or number of robots starts a new text.
        """
        prompts = as_tensor("input_ids", input_ids).tolist()
        if self._steps_left == 0 or prompts != self._prompts:
            self.reasoning_ids, self._steps_left, self._prompts = [], self.reuse_reasoning, prompts
        is_new = not self.reasoning_ids
        details = self.model.predict_action(
            input_ids,
            pixel_values,
            attention_mask,
            self.unnorm_key if unnorm_key is None else unnorm_key,
            return_details=True,
            tokenizer=self.tokenizer,
            **inputs | ({} if is_new else {"reasoning_ids": self.reasoning_ids}),
        )
        self._steps_left -= 1
        if is_new and self._steps_left:
            assert self.tokenizer is not None  # required for more than one step
            self.reasoning_ids = [lasting_part(ids, self.tokenizer) for ids in details.reasoning_ids]
        self.text, self.forward_passes = details.text, details.forward_passes
        if return_details:
            return details
        return details.actions[0] if len(details.actions) == 1 else details.actions


__all__ = ["ReasonedActions", "ReasoningStream", "decode_reasoning", "find_action", "lasting_part"]
