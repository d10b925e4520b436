"""From a prompt and an image to the ids of an action: greedy decoding over the action ids, and what it needs.

Shapes: B batch, P image patches, T tokens, A action dimensions, N action bins, V vocabulary.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from .model_inputs import INTEGERS, as_tensor


if TYPE_CHECKING:
    from .modeling_openvla import OpenVLAForActionPrediction

ActionPass = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""`action_pass` or `CompiledActionPass`."""
MASKED_ATTENTION = ("eager", "sdpa")
"""Attention implementations that take a mask (B, 1, queries, keys) to add."""
PROMPT_BUCKET = 32
"""Caches, and the prompts of compiled passes, grow by so many tokens: a few sizes serve every instruction."""
MAX_COMPILED_SHAPES = 128


@dataclass
class ActionTokens:
    """Decoded ids.

    token_ids: (B, A) int64; -1 where the logits that the id was chosen from are not finite.
    action_logits: (B, A, N) logits of the action ids, lowest action value first (the highest id).
    forward_passes: How often the language model ran.
    """

    token_ids: torch.Tensor
    action_logits: torch.Tensor
    forward_passes: int


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
    dims: Sequence[int],
    constrained: bool = True,
    draft_token_ids: torch.Tensor | np.ndarray | Sequence | None = None,
    **generate_kwargs: Any,
) -> ActionTokens:
    """Decode the ids of one action a row after left-padded prompts (B, T) with their placeholders in place.

    Greedy decoding runs here, in `max(dims)` passes of the language model, or fewer with a draft. Other decoding goes
    through `generate`, and so do language models whose attention does not take an additive mask.
    """
    if generate_kwargs or not _takes_additive_masks(model, input_ids.shape[1] + max(dims)):
        return _decode_by_generate(
            model, input_ids, pixel_values, attention_mask, max(dims), constrained, **generate_kwargs
        )
    with _Decoding(model, input_ids, pixel_values, attention_mask, max(dims), constrained) as decoding:
        if draft_token_ids is None:
            return decoding.one_by_one()
        return decoding.verify(decoding.as_draft(draft_token_ids), torch.tensor(dims, device=input_ids.device))


def _takes_additive_masks(model: "OpenVLAForActionPrediction", length: int) -> bool:
    """Whether every layer attends to all of `length` tokens before it, under a mask that is added."""
    # transformers has a public setter for the attention implementation, but no public getter.
    if model.config.text_config._attn_implementation not in MASKED_ATTENTION:
        return False
    if torch.is_autocast_enabled(model.device.type):  # keys and values of two dtypes, and a cache has one
        return False
    return length <= model.attention_reach


def attention_reach(text_config: PreTrainedConfig) -> int:
    """Most tokens that every layer of a language model attends to; 0 where a layer does not keep keys and values."""
    layers = StaticCache(text_config, sys.maxsize).layers  # takes memory in the first pass only
    plain = all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in layers)
    return min(layer.max_cache_len for layer in layers) if plain else 0


def _decode_by_generate(
    model: "OpenVLAForActionPrediction",
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    attention_mask: torch.Tensor,
    num_tokens: int,
    constrained: bool,
    do_sample: bool = False,
    **generate_kwargs: Any,
) -> ActionTokens:
    """Decode by `generate`: sampling, beams, and attention implementations that do not take an additive mask."""
    if "position_ids" in generate_kwargs:  # of the prompt before it was padded and got its placeholders
        raise ValueError("`predict_action` makes the `position_ids` from `attention_mask`: leave them out.")
    first_id, end_id = model.action_tokenizer.first_id, model.action_tokenizer.vocab_end
    only = LogitsProcessorList([ActionIdsOnly(first_id, end_id)] if constrained else [])
    try:
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
            # Sampling from logits that are not finite would stop a GPU for good; `output_logits` are from before this.
            **generate_kwargs | {"remove_invalid_values": True},
        )
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        if not generate_kwargs:
            raise
        raise ValueError(
            f"`generate` does not take {', '.join(map(repr, generate_kwargs))} as given: {str(error).rstrip('.')}."
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
    model: "OpenVLAForActionPrediction",
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    mask: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Cache,
    slot: torch.Tensor,
    keep: int,
    constrained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the language model over `input_ids` (B, T): all that happens on the device between two tokens.

    This is what `CompiledActionPass` compiles: it neither asks the device for a value nor makes a shape of one.

    Args:
        model: The policy.
        input_ids: (B, T), with image placeholders where there are images.
        pixel_values: Images of the placeholders; `None` in all passes but the first.
        mask: (B, 1, T, slots of the cache), added to the attention's scores.
        position_ids: (B, T).
        cache: Its slots before the first one written hold what this pass attends to.
        slot: () int64, the first slot that is written.
        keep: At how many of the last positions to predict.
        constrained: Choose among the action ids only.

    Returns:
        Greedy ids (B, keep), their logits (B, keep), NaN where any logit is, and the logits (B, keep, N) of the
        action ids, highest id first.
    """
    if pixel_values is not None:
        cache.reset()  # old slots are masked, but a NaN that is left in one would spoil a sum all the same
    for layer in cache.layers:
        layer.cumulative_length.copy_(slot)
    hidden = model.model.language_model(
        inputs_embeds=model.model.embed(input_ids, pixel_values),
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -keep:]
    first_id, end_id = model.action_tokenizer.first_id, model.action_tokenizer.vocab_end
    head = model.lm_head
    # Rows of a plain weight are cut out before they are multiplied; an adapter, a quantised or an offloaded head
    # gives all its logits, and these are cut.
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.weight.device == hidden.device
    if constrained and plain:
        of_actions = nn.functional.linear(hidden, head.weight[first_id:end_id])
    else:
        logits = head(hidden)
        of_actions = logits[..., first_id:end_id]
    # NaN counts as the highest, so one that is anywhere among the logits shows in `highest`.
    highest, token_ids = (of_actions if constrained else logits).max(-1)
    return token_ids + first_id if constrained else token_ids, highest, of_actions.flip(-1)


class CompiledActionPass:
    """`action_pass`, compiled for each shape that it meets.

    Where compilation fails, as without a C++ compiler or Triton, the model warns once and goes on without.

    Args:
        mode: That of `torch.compile`.
    """

    def __init__(self, mode: str):
        # Imported only for compiling, since the import takes seconds. These errors have no public names, and the
        # limit below has one (`torch.compiler.config`) only in later releases than the oldest supported.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self.mode, self.failures = mode, (FailOnRecompileLimitHit, TorchDynamoException)
        self.compiled = torch.compile(action_pass, mode=mode, fullgraph=True, dynamic=False)
        # Four shapes for each prompt length and batch size: the first and the later passes, each with and without a
        # draft.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)

    def __reduce__(self) -> tuple[type["CompiledActionPass"], tuple[str]]:
        # Compiled code can be neither pickled nor shared: a copy compiles its own.
        return CompiledActionPass, (self.mode,)

    def __call__(
        self,
        model: "OpenVLAForActionPrediction",
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
        *args: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `action_pass`."""
        # A window's strides would tell apart what has the same shape.
        mask, position_ids = (one.clone(memory_format=torch.contiguous_format) for one in (mask, position_ids))
        inputs = (model, input_ids, pixel_values, mask, position_ids, cache, *args)
        if not cache.layers[0].is_initialized:  # memory that is made in a graph does not stay where it is
            action_pass(*inputs)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            outputs = self.compiled(*inputs)
        except self.failures as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"Actions are predicted without compilation, since it failed: {reason}", stacklevel=2)
            model.action_pass = action_pass
            return action_pass(*inputs)
        # The graph's next replay writes over what this one gave.
        token_ids, highest, of_actions = outputs
        return token_ids.clone(), highest.clone(), of_actions.clone()


class _Decoding:
    """One call: prompts in a static cache, and after them the slots of the action's tokens.

    Every row's action starts in the same slot, since prompts are padded on the left. Passes may write a slot again:
    what is behind the pass is masked, so what a wrong guess left there is never seen.
    """

    def __init__(
        self,
        model: "OpenVLAForActionPrediction",
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor,
        num_tokens: int,
        constrained: bool,
    ):
        self.model, self.constrained, self.num_tokens = model, constrained, num_tokens
        self.compiled = model.action_pass is not action_pass
        if self.compiled:  # for a few lengths of prompt
            missing = -input_ids.shape[1] % PROMPT_BUCKET
            input_ids = nn.functional.pad(input_ids, (missing, 0), value=model.config.pad_token_id)
            attention_mask = nn.functional.pad(attention_mask, (missing, 0), value=0)
        self.input_ids, self.pixel_values = input_ids, pixel_values
        rows, self.prompt = input_ids.shape
        slots = self.prompt + num_tokens - 1  # nothing reads the last token's
        self.capacity = -(-slots // PROMPT_BUCKET) * PROMPT_BUCKET
        # A cache fits one shape, device and dtype; outside of inference mode, tensors made in it can't be written to.
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
        # Taken out while in use: another thread that predicts meanwhile makes its own.
        cache = self.model.action_caches.pop(self.cache_key, None)
        self.cache = new_cache(self.model.config.text_config, self.capacity) if cache is None else cache
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.compiled:  # graphs know the caches of all sizes by their addresses
            self.model.action_caches.clear()
        self.model.action_caches[self.cache_key] = self.cache

    def run(
        self, input_ids: torch.Tensor, slot: int, keep: int, pixel_values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass over ids (B, T) that go into the slots from `slot` on."""
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
        )

    def one_by_one(self) -> ActionTokens:
        """The prompt, then each token after the other."""
        passes = [self.run(self.input_ids, 0, 1, self.pixel_values)]
        for slot in range(self.prompt, self.prompt + self.num_tokens - 1):
            passes.append(self.run(passes[-1][0], slot, 1))
        token_ids, highest, action_logits = (torch.cat(one, dim=1) for one in zip(*passes, strict=True))
        return ActionTokens(_finite_or_none(token_ids, highest), action_logits, self.num_tokens)

    def as_draft(self, token_ids: torch.Tensor | np.ndarray | Sequence) -> torch.Tensor:
        """Any guess as ids (B, A): cut or filled up; what is not an id becomes one, and will be found wrong."""
        draft = as_tensor("draft_token_ids", token_ids)
        rows = len(self.input_ids)
        draft = draft[None] if draft.ndim == 1 else draft
        if draft.ndim != 2 or len(draft) not in (1, rows) or draft.dtype not in INTEGERS:
            raise ValueError(
                f"`draft_token_ids` of shape {tuple(draft.shape)} and {draft.dtype} for {rows} observations: give one "
                "row of integer ids, or one for each observation."
            )
        draft = draft.to(self.input_ids)
        draft = draft[:, : self.num_tokens].expand(rows, -1)
        draft = nn.functional.pad(draft, (0, self.num_tokens - draft.shape[1]), value=-1)
        config = self.model.config
        # A placeholder in the first pass would take a patch of the image.
        is_id = (draft >= 0) & (draft < config.text_config.vocab_size) & (draft != config.image_token_id)
        return draft.where(is_id, config.action_vocab_end - 1)

    def verify(self, draft: torch.Tensor, dims: torch.Tensor) -> ActionTokens:
        """Give the model a guess (B, A) of the action, and correct it until it is what the model says.

        A token is right when everything before it is. So the first token that a pass changes is right too, and each
        pass settles at least one more: never more passes than one by one, and a single one if the guess was right.
        What follows a wrong token is guessed by the pass that found it wrong (Jacobi's iteration).
        """
        last = self.num_tokens
        prompt_and_draft = torch.cat([self.input_ids, draft[:, :-1]], dim=1)
        token_ids, highest, action_logits = self.run(prompt_and_draft, 0, last, self.pixel_values)
        known = (1 + _leading(token_ids == draft)).clamp(max=last)  # (B,) tokens that are right
        passes = 1
        while (first := int(known.where(known < dims, last).min())) < last:
            # From the newest right token of the row that is furthest behind; compiled passes have one length.
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
    """(B, A) bool -> (B,): how many are true before the first that is not."""
    return agrees.long().cumprod(dim=1).sum(dim=1)


def _finite_or_none(token_ids: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Ids (B, A), and -1 in place of those whose logits (B, A) are not finite: the caller sees it in the ids' copy."""
    return token_ids.masked_fill(~highest.isfinite(), -1)


def new_cache(config: PreTrainedConfig, capacity: int) -> Cache:
    """A cache that takes its memory in the first pass, and keeps it."""
    return Cache(layers=[StaticLayer(capacity) for _ in range(config.num_hidden_layers)])


__all__ = [
    "ActionPass",
    "ActionTokens",
    "CompiledActionPass",
    "action_pass",
    "attention_reach",
    "decode_actions",
]
