"""Decode the ids of an action from a prompt and an image, greedily over the action ids.

Shapes: B batch, P image patches, T tokens, A action dimensions, N action bins, V vocabulary.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from .model_inputs import INTEGERS, as_tensor


ActionPass = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""`action_pass` or `CompiledActionPass`."""
MASKED_ATTENTION = ("eager", "sdpa")
"""Attention implementations that take an additive mask (B, 1, queries, keys)."""
PROMPT_BUCKET = 32
"""Lengths of caches and of compiled prompts are multiples of this, so that a few sizes serve every instruction."""
MAX_COMPILED_SHAPES = 128


@dataclass
class ActionTokens:
    """Decoded ids.

    token_ids: (B, A) int64; -1 where the logits that the id was chosen from are not finite.
    action_logits: (B, A, N) logits of the action ids, lowest action value first (the highest id).
    forward_passes: Number of passes of the language model.
    """

    token_ids: torch.Tensor
    action_logits: torch.Tensor
    forward_passes: int


@dataclass
class DecodedActions:
    """Decoded actions. With parallel decoding they are chunks, (B, K, A) instead of (B, A).

    normalized_actions: (B, A) float64, usually in [-1, 1]; NaN where the model's output is not finite.
    token_ids: (B, A) int64; `None` with an action head.
    action_logits: (B, A, N) logits of the action ids, lowest action value first; `None` with an action head.
    forward_passes: Number of passes of the language model.
    """

    normalized_actions: np.ndarray
    token_ids: np.ndarray | None
    action_logits: torch.Tensor | None
    forward_passes: int


class ActionIdsOnly(LogitsProcessor):
    """Restrict `generate` to the action ids."""

    def __init__(self, first_id: int, end_id: int):
        self.first_id, self.end_id = first_id, end_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores (B, V) of all other ids to -inf."""
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, self.first_id : self.end_id] = scores[:, self.first_id : self.end_id]
        return allowed


def decode_actions(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor,
    dims: Sequence[int],
    proprio: torch.Tensor | None = None,
    constrained: bool = True,
    **decoding: Any,
) -> DecodedActions:
    """Decode one action per row after left-padded prompts (B, T) with their placeholders in place.

    `proprio` (B, S) is the normalised state of the robots, if the model sees it.
    """
    tokens = _decode_ids(model, input_ids, pixel_values, attention_mask, dims, proprio, constrained, **decoding)
    token_ids = tokens.token_ids.cpu().numpy()
    normalized = model.action_tokenizer.decode(token_ids)
    normalized[token_ids < 0] = np.nan
    return DecodedActions(normalized, token_ids, tokens.action_logits, tokens.forward_passes)


def _decode_ids(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor,
    dims: Sequence[int],
    proprio: torch.Tensor | None,
    constrained: bool,
    draft_token_ids: torch.Tensor | np.ndarray | Sequence | None = None,
    **generate_kwargs: Any,
) -> ActionTokens:
    """Decode the ids of `decode_actions`.

    Greedy decoding runs here, in `max(dims)` passes of the language model, or fewer with a draft. Other decoding goes
    through `generate`, and so do language models whose attention does not take an additive mask.
    """
    if generate_kwargs or not _takes_additive_masks(model, input_ids.shape[1] + max(dims)):
        return _decode_by_generate(
            model, input_ids, pixel_values, attention_mask, max(dims), constrained, proprio, **generate_kwargs
        )
    with _Decoding(model, input_ids, pixel_values, attention_mask, max(dims), constrained, proprio) as decoding:
        if draft_token_ids is None:
            return decoding.one_by_one()
        return decoding.verify(decoding.as_draft(draft_token_ids), torch.tensor(dims, device=input_ids.device))


def _takes_additive_masks(model: PreTrainedModel, length: int) -> bool:
    """Return whether every layer attends to all of `length` tokens, under an additive mask."""
    # transformers has a public setter for the attention implementation, but no public getter.
    if model.config.text_config._attn_implementation not in MASKED_ATTENTION:
        return False
    if torch.is_autocast_enabled(model.device.type):  # keys and values differ in dtype, but a cache has one
        return False
    return length <= model.attention_reach


def attention_reach(text_config: PreTrainedConfig) -> int:
    """Return the number of tokens that every layer of a language model can attend to; 0 without keys and values."""
    layers = StaticCache(text_config, sys.maxsize).layers  # allocates memory only in the first pass
    plain = all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in layers)
    return min(layer.max_cache_len for layer in layers) if plain else 0


def _decode_by_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor,
    num_tokens: int,
    constrained: bool,
    proprio: torch.Tensor | None,
    do_sample: bool = False,
    **generate_kwargs: Any,
) -> ActionTokens:
    """Decode with `generate`: sampling, beams, and attention implementations that take no additive mask."""
    if "position_ids" in generate_kwargs:  # they would not fit the prompt with its placeholders and padding
        raise ValueError("`predict_action` computes `position_ids` from `attention_mask`: leave them out.")
    first_id, end_id = model.action_tokenizer.first_id, model.action_tokenizer.vocab_end
    only = LogitsProcessorList([ActionIdsOnly(first_id, end_id)] if constrained else [])
    try:
        outputs = model.generate(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            proprio=proprio,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=do_sample,
            logits_processor=only,
            output_logits=True,
            return_dict_in_generate=True,
            # On a GPU, sampling from logits that are not finite would end the process. `output_logits` are recorded
            # before this replacement.
            **generate_kwargs | {"remove_invalid_values": True},
        )
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        if not generate_kwargs:
            raise
        raise ValueError(
            f"`generate` rejected {', '.join(map(repr, generate_kwargs))}: {str(error).rstrip('.')}."
        ) from error
    token_ids = outputs.sequences[:, input_ids.shape[1] :]
    if len(token_ids) != len(input_ids):
        raise ValueError(
            f"`generate` returned {len(token_ids)} actions for {len(input_ids)} observations: leave out "
            "`num_return_sequences`. To sample several actions, repeat the observation in the batch."
        )
    if token_ids.shape[1] != num_tokens:
        raise ValueError(
            f"`generate` stopped after {token_ids.shape[1]} of {num_tokens} action tokens: leave out whatever stops "
            "it early, such as `max_time` or `stopping_criteria`."
        )
    logits = torch.stack(outputs.logits, dim=1)  # (B * beams, A, V)
    of_actions = logits[..., first_id:end_id]
    has_beams = len(logits) > len(token_ids)
    # Beams are scored by a softmax over the whole vocabulary, so one NaN anywhere spoils all their scores.
    highest = (of_actions if constrained and not has_beams else logits).amax(-1)
    if has_beams:
        highest = highest.unflatten(0, (len(token_ids), -1)).amax(1)
        # Follow the beam of each row's token.
        of_actions = of_actions[outputs.beam_indices, torch.arange(num_tokens, device=logits.device)]
    return ActionTokens(_finite_or_none(token_ids, highest), of_actions.flip(-1), num_tokens)


def action_pass(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    mask: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Cache,
    slot: torch.Tensor,
    keep: int,
    constrained: bool,
    proprio: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the language model over `input_ids` (B, T): all the work of the device between two tokens.

    `CompiledActionPass` compiles this function, so it copies no value to the host and no shape depends on a value.

    Args:
        model: The policy.
        input_ids: (B, T), with image placeholders where there are images.
        pixel_values: Images of the placeholders; `None` in all passes but the first.
        mask: (B, 1, T, slots of the cache), added to the attention's scores.
        position_ids: (B, T).
        cache: Cache whose slots before `slot` contain the tokens that this pass attends to.
        slot: () int64, the first slot that is written.
        keep: Number of positions to predict at, counted from the last.
        constrained: Choose among the action ids only.
        proprio: (B, S) normalised state, read with `pixel_values` by a model that sees it.

    Returns:
        Greedy ids (B, keep), their logits (B, keep; NaN where any logit is NaN), and the logits (B, keep, N) of the
        action ids, highest id first.
    """
    if pixel_values is not None:
        cache.reset()  # old slots are masked, but a NaN left in one would still spread: 0 * NaN is NaN
    for layer in cache.layers:
        layer.cumulative_length.copy_(slot)
    hidden = model.model.language_model(
        inputs_embeds=model.model.embed(input_ids, pixel_values, proprio),
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -keep:]
    return greedy_ids(model, hidden, constrained)


def greedy_ids(
    model: PreTrainedModel, hidden: torch.Tensor, constrained: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the best id at each of the hidden states (B, T, D).

    Args:
        model: The policy.
        hidden: Last hidden states.
        constrained: Choose among the action ids only.

    Returns:
        Ids (B, T), their logits (B, T; NaN where any logit is NaN), and the logits (B, T, N) of the action ids, the
        highest id first.
    """
    first_id, end_id = model.action_tokenizer.first_id, model.action_tokenizer.vocab_end
    head = model.lm_head
    # A plain weight is sliced before the product. A head that is adapted, quantised or offloaded computes all logits,
    # which are sliced afterwards.
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.weight.device == hidden.device
    if constrained and plain:
        of_actions = nn.functional.linear(hidden, head.weight[first_id:end_id])
    else:
        logits = head(hidden)
        of_actions = logits[..., first_id:end_id]
    # `max` takes NaN for the highest value, so a NaN anywhere among the logits shows in `highest`.
    highest, token_ids = (of_actions if constrained else logits).max(-1)
    return token_ids + first_id if constrained else token_ids, highest, of_actions.flip(-1)


class CompiledActionPass:
    """`action_pass`, compiled once for each shape.

    If compilation fails, for example without a C++ compiler or Triton, the model warns once and falls back to
    `action_pass`.

    Args:
        mode: Mode of `torch.compile`.
    """

    def __init__(self, mode: str):
        # Imported only for compiling, since the import takes seconds. These errors have no public names, and the limit
        # below has one (`torch.compiler.config`) only in releases after the oldest supported one.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self.mode, self.failures = mode, (FailOnRecompileLimitHit, TorchDynamoException)
        self.compiled = torch.compile(action_pass, mode=mode, fullgraph=True, dynamic=False)
        # Four shapes for each prompt length and batch size: the first and the later passes, each with and without a
        # draft.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)

    def __reduce__(self) -> tuple[type["CompiledActionPass"], tuple[str]]:
        # Compiled code can't be pickled or shared: a copy compiles its own.
        return CompiledActionPass, (self.mode,)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
        *args: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run `action_pass`, compiled."""
        # Slices have the strides of the whole tensor, and compiled code specialises on strides.
        mask, position_ids = (one.clone(memory_format=torch.contiguous_format) for one in (mask, position_ids))
        inputs = (model, input_ids, pixel_values, mask, position_ids, cache, *args)
        if not cache.layers[0].is_initialized:
            action_pass(*inputs)  # allocates the cache eagerly: memory allocated inside a CUDA graph may move
        torch.compiler.cudagraph_mark_step_begin()
        try:
            outputs = self.compiled(*inputs)
        except self.failures as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"Compilation failed, so actions are predicted without it: {reason}", stacklevel=2)
            model.action_pass = action_pass
            return action_pass(*inputs)
        # The next replay of the graph overwrites these outputs.
        token_ids, highest, of_actions = outputs
        return token_ids.clone(), highest.clone(), of_actions.clone()


class _Decoding:
    """State of one call: a static cache with slots for the prompts and, after them, for the action's tokens.

    Every row's action starts in the same slot, since prompts are padded on the left. A pass may write a slot again.
    Later slots are masked, so nothing attends to what a wrong guess left there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor,
        num_tokens: int,
        constrained: bool,
        proprio: torch.Tensor | None,
    ):
        self.model, self.constrained, self.num_tokens = model, constrained, num_tokens
        self.compiled = model.action_pass is not action_pass
        if self.compiled:  # so that few prompt lengths are compiled
            missing = -input_ids.shape[1] % PROMPT_BUCKET
            input_ids = nn.functional.pad(input_ids, (missing, 0), value=model.config.pad_token_id)
            attention_mask = nn.functional.pad(attention_mask, (missing, 0), value=0)
        self.input_ids, self.pixel_values, self.proprio = input_ids, pixel_values, proprio
        rows, self.prompt = input_ids.shape
        slots = self.prompt + num_tokens - 1  # the last token is never read back
        self.capacity = -(-slots // PROMPT_BUCKET) * PROMPT_BUCKET
        # A cache fits one shape, device and dtype. Tensors made in inference mode can't be written to outside it.
        dtype = model.dtype
        self.cache_key = (rows, self.capacity, input_ids.device, dtype, torch.is_inference_mode_enabled())

        self.slots = torch.arange(self.capacity, device=input_ids.device)
        filled = nn.functional.pad(attention_mask.bool(), (0, self.capacity - self.prompt), value=True)
        later = torch.ones(slots, self.capacity, dtype=torch.bool, device=input_ids.device).triu_(1)
        hidden = later | ~filled[:, None]
        hidden.diagonal(dim1=1, dim2=2).fill_(False)  # padding sees itself, so that no row of the softmax is empty
        mask = torch.zeros(hidden.shape, dtype=dtype, device=input_ids.device)
        self.mask = mask.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)
        self.position_ids = (filled[:, :slots].long().cumsum(-1) - 1).clamp(min=0)

    def __enter__(self) -> "_Decoding":
        # Removed while in use, so that another thread makes its own.
        cache = self.model.action_caches.pop(self.cache_key, None)
        self.cache = new_cache(self.model.config.text_config, self.capacity) if cache is None else cache
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.compiled:  # CUDA graphs refer to the caches of all sizes by address
            self.model.action_caches.clear()
        self.model.action_caches[self.cache_key] = self.cache

    def run(
        self, input_ids: torch.Tensor, slot: int, keep: int, pixel_values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one pass over ids (B, T), which take the slots from `slot` on."""
        window = slice(slot, slot + input_ids.shape[1])
        return self.model.action_pass(
            self.model,
            input_ids,
            pixel_values,
            self.mask[:, :, window],
            self.position_ids[:, window],
            self.cache,
            self.slots[slot],
            keep,
            self.constrained,
            self.proprio,
        )

    def one_by_one(self) -> ActionTokens:
        """Decode token by token."""
        passes = [self.run(self.input_ids, 0, 1, self.pixel_values)]
        for slot in range(self.prompt, self.prompt + self.num_tokens - 1):
            passes.append(self.run(passes[-1][0], slot, 1))
        token_ids, highest, action_logits = (torch.cat(one, dim=1) for one in zip(*passes, strict=True))
        return ActionTokens(_finite_or_none(token_ids, highest), action_logits, self.num_tokens)

    def as_draft(self, token_ids: torch.Tensor | np.ndarray | Sequence) -> torch.Tensor:
        """Turn a guess into ids (B, A), cut or padded to A.

        Values that are not ids are replaced by an action id, which the model corrects.
        """
        draft = as_tensor("draft_token_ids", token_ids)
        rows = len(self.input_ids)
        draft = draft[None] if draft.ndim == 1 else draft
        if draft.ndim != 2 or len(draft) not in (1, rows) or draft.dtype not in INTEGERS:
            raise ValueError(
                f"`draft_token_ids` of shape {tuple(draft.shape)} and {draft.dtype} do not fit {rows} observations: "
                "give one row of integer ids, or one for each observation."
            )
        draft = draft.to(self.input_ids)
        draft = draft[:, : self.num_tokens].expand(rows, -1)
        draft = nn.functional.pad(draft, (0, self.num_tokens - draft.shape[1]), value=-1)
        config = self.model.config
        # A placeholder in the first pass would take a patch of the image.
        is_id = (draft >= 0) & (draft < config.text_config.vocab_size) & (draft != config.image_token_id)
        return draft.where(is_id, config.action_vocab_end - 1)

    def verify(self, draft: torch.Tensor, dims: torch.Tensor) -> ActionTokens:
        """Check a guess (B, A) of the action, and correct it until the model agrees.

        A token that a pass predicts is right if all tokens before it are. The first token that a pass changes is
        therefore right, and each pass settles at least one more token. This takes at most as many passes as decoding
        one by one, and a single pass for a right guess. The pass that finds a wrong token also guesses those after it
        (Jacobi iteration).
        """
        last = self.num_tokens
        prompt_and_draft = torch.cat([self.input_ids, draft[:, :-1]], dim=1)
        token_ids, highest, action_logits = self.run(prompt_and_draft, 0, last, self.pixel_values)
        known = (1 + _leading(token_ids == draft)).clamp(max=last)  # (B,) number of tokens that are right
        passes = 1
        while (first := int(known.where(known < dims, last).min())) < last:
            # Start at the last settled token of the row that has the fewest. Compiled passes all have one length.
            start = 1 if self.compiled else first
            guess, *logits = self.run(token_ids[:, start - 1 : -1], self.prompt + start - 1, last - start)
            before = token_ids[:, start:]
            is_known = torch.arange(start, last, device=known.device) < known.unsqueeze(1)  # stays as it is
            guess = before.where(is_known, guess)
            known = (start + 1 + _leading(guess == before)).clamp(max=last)
            highest[:, start:] = highest[:, start:].where(is_known, logits[0])
            action_logits[:, start:] = action_logits[:, start:].where(is_known.unsqueeze(-1), logits[1])
            token_ids[:, start:] = guess
            passes += 1
        return ActionTokens(_finite_or_none(token_ids, highest), action_logits, passes)


def _leading(agrees: torch.Tensor) -> torch.Tensor:
    """Count the leading true values: (B, A) -> (B,)."""
    return agrees.long().cumprod(dim=1).sum(dim=1)


def _finite_or_none(token_ids: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Replace ids (B, A) whose logits are not finite with -1, which saves a second copy to the host."""
    return token_ids.masked_fill(~highest.isfinite(), -1)


def new_cache(config: PreTrainedConfig, capacity: int) -> Cache:
    """Make a cache that allocates its memory in the first pass and keeps it."""
    return Cache(layers=[StaticLayer(capacity) for _ in range(config.num_hidden_layers)])


__all__ = [
    "ActionPass",
    "ActionTokens",
    "CompiledActionPass",
    "DecodedActions",
    "action_pass",
    "attention_reach",
    "decode_actions",
    "greedy_ids",
]
