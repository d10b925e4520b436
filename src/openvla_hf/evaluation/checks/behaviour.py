"""Check what a policy computes: whether its inputs matter, which tokens see which, and whether its cache is right.

Shapes: L tokens, D width, A action dimensions, N action bins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ...modeling.action_decoding import decode_actions
from ...modeling.model_inputs import prepare_prompts
from ...modeling.parallel_decoding import decode_chunk
from .findings import Finding, Subject, failed, passed, skipped


# An input matters if it changes the outputs by more than this many times the rounding error.
SIGNAL = 5.0
# Tokens see each other if one half of a sequence changes the hidden states of the other by more than this share.
SEEN = 0.05
# Largest difference between the logits of the cached loop and of an uncached pass, as a share of their deviation and
# as a multiple of the rounding error.
LOOP_SHARE, LOOP_ROUNDING = 0.1, 50.0
# Padding to estimate the rounding error with.
PADDING = 8
# Denoising steps of a diffusion head: fewer than in use, since only differences count.
STEPS = 5
# Dimensions of an action if the statistics do not say.
ACTION_DIM = 7


@dataclass
class Probe:
    """One observation of a policy, and its outputs if a part of the observation changes.

    Attributes:
        subject: The policy.
        images: (H, W, 3) uint8, one for each camera.
        instruction: Task of the robot.
        other_instruction: Another task.
        proprio: (S,) normalised state, by default the middle of its range; `None` if the policy sees none.
        padding: Number of padding tokens on the left.
        blind_tower: Index of a vision tower whose pixels are zero.
    """

    subject: Subject
    images: Sequence[np.ndarray]
    instruction: str
    other_instruction: str
    proprio: np.ndarray | None = None
    padding: int = 0
    blind_tower: int | None = None

    def __post_init__(self) -> None:
        if self.proprio is None and self.subject.config.proprio_dim is not None:
            self.proprio = np.zeros(self.subject.config.proprio_dim, np.float32)

    def inputs(self) -> dict[str, Any]:
        """Lay out the observation as `predict_action` does."""
        processor, model = self.subject.processor, self.subject.model
        state = {} if processor.state_dim is None else {"state": np.zeros(processor.state_dim)}
        images = self.images[0] if processor.cameras is None else list(self.images)
        made = processor(images, instruction=self.instruction, **state)
        input_ids, mask = prepare_prompts(self.subject.config, made["input_ids"], made["attention_mask"])
        pixels = made["pixel_values"].to(model.device, model.dtype)
        if self.blind_tower is not None:
            pixels.unflatten(1, (-1, len(self.subject.config.vision_configs), 3))[:, :, self.blind_tower] = 0
        pad = self.subject.config.pad_token_id or 0
        proprio = None if self.proprio is None else torch.from_numpy(self.proprio)[None].to(model.device, model.dtype)
        return {
            "input_ids": nn.functional.pad(input_ids, (self.padding, 0), value=pad).to(model.device),
            "pixel_values": pixels,
            "attention_mask": nn.functional.pad(mask, (self.padding, 0)).to(model.device),
            "proprio": proprio,
        }

    @torch.no_grad()
    def outputs(self) -> np.ndarray:
        """Return the logits of the first action id (or of the next id, before a text), or the normalised actions."""
        model, config, inputs = self.subject.model, self.subject.config, self.inputs()
        if not config.is_parallel:
            logits = _logits(model, inputs, 1)[-1]
            return _centred(logits if config.reasoning else logits[_action_ids(model)])
        options: dict[str, Any] = {}
        if config.action_head == "diffusion":
            noise = np.random.default_rng(0).normal(size=(config.action_horizon, config.action_dim))
            options["initial_noise"] = noise.astype(np.float32)
            options["num_inference_steps"] = None if config.diffusion_steps % STEPS else STEPS
        decoded = decode_chunk(model, **inputs, dims=[config.action_dim], **options)
        if decoded.action_logits is None:
            return decoded.normalized_actions[0]
        return _centred(decoded.action_logits[0])

    @cached_property
    def reference(self) -> np.ndarray:
        """The outputs for this observation."""
        return self.outputs()

    @cached_property
    def noise(self) -> float:
        """Rounding error of the outputs: their change if the sums are computed in another order."""
        padded = replace(self, padding=PADDING).outputs()
        smallest = torch.finfo(self.subject.model.dtype).eps * _size(self.reference)
        return max(_size(padded - self.reference), smallest)

    def effect(self, **changes: Any) -> float:
        """Measure by how much the outputs change with another field."""
        return _size(replace(self, **changes).outputs() - self.reference)

    @property
    def unit(self) -> str:
        """Name of the outputs."""
        return "actions" if self.subject.config.action_head != "none" else "logits"


def _size(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _centred(logits: torch.Tensor) -> np.ndarray:
    """Subtract the mean of the logits (..., N), which no probability depends on."""
    values = logits.double().cpu().numpy()
    return values - values.mean(-1, keepdims=True)


def _action_ids(model: Any) -> slice:
    return slice(model.action_tokenizer.first_id, model.action_tokenizer.vocab_end)


def _logits(model: Any, inputs: dict[str, Any], keep: int) -> torch.Tensor:
    """Return the logits (keep, vocabulary) at the last positions, without a cache."""
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(**inputs, position_ids=positions, logits_to_keep=keep, use_cache=False).logits[0]


def another_image(image: np.ndarray) -> np.ndarray:
    """Turn an image by 180 degrees and invert it."""
    return np.ascontiguousarray(255 - image[::-1, ::-1])


def check_inputs(probe: Probe) -> Iterator[Finding]:
    """Check that the image of each camera, each vision tower, the instruction and the state change the outputs."""
    towers = [tower.model_type for tower in probe.subject.config.vision_configs]
    several = ["vision tower"] if len(towers) > 1 else []
    names = ["image", *several, "instruction", *(["state"] if probe.proprio is not None else [])]
    if not np.isfinite(probe.reference).all():
        for name in names:
            yield failed(name, f"The {probe.unit} are not finite.", "See the finding on the weights.")
        return
    cameras = probe.subject.processor.cameras or ["image"]
    for index, camera in enumerate(cameras):
        changed = [another_image(one) if at == index else one for at, one in enumerate(probe.images)]
        where = "Another image" if len(cameras) == 1 else f"Another image of {camera}"
        fix = "Check that `pixel_values` reach the model, and that the projector's weights are those of the training."
        yield _judge("image", where, probe, probe.effect(images=changed), fix)
    for index, kind in enumerate(towers if several else []):
        fix = f"Check that tower {index} is in use, and that its weights are those of the training."
        effect = probe.effect(blind_tower=index)
        yield _judge("vision tower", f"Zero in place of the pixels of tower {index} ({kind})", probe, effect, fix)
    changed_text = probe.effect(instruction=probe.other_instruction)
    fix = "Check that the prompt contains the instruction, and that the tokenizer is the checkpoint's own."
    yield _judge("instruction", "Another instruction", probe, changed_text, fix)
    if probe.proprio is not None:
        fix = "Check that `state` reaches the model, and that the state's projector has the weights of the training."
        yield _judge("state", "Another state", probe, probe.effect(proprio=probe.proprio + 1.0), fix)


def _judge(check: str, what: str, probe: Probe, effect: float, fix: str) -> Finding:
    measured = f"{what} changes the {probe.unit} by {effect:.2g}; rounding errors are {probe.noise:.2g}."
    if effect > SIGNAL * probe.noise:
        return passed(check, measured)
    return failed(check, f"The policy ignores the {check}. {measured}", fix)


@torch.no_grad()
def check_mask(subject: Subject) -> Finding:
    """Check which tokens see which: negate one half of a sequence, and look at the hidden states of the other half.

    A causal model must not change the earlier half; a model that decodes in parallel must change both.
    """
    model, tokenizer = subject.model, subject.processor.tokenizer
    prompt = subject.processor.build_prompt("put the red block on the yellow plate")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    embeds = model.get_input_embeddings()(ids)
    middle = embeds.shape[1] // 2

    def hidden(factors: tuple[float, float]) -> torch.Tensor:
        signs = torch.full((embeds.shape[1], 1), factors[0], dtype=embeds.dtype, device=embeds.device)
        signs[middle:] = factors[1]
        states = model.model(inputs_embeds=embeds * signs, attention_mask=torch.ones_like(ids), use_cache=False)
        return states.last_hidden_state[0].double()

    reference = hidden((1.0, 1.0))

    def share(changed: torch.Tensor, positions: slice) -> float:
        difference = (changed - reference)[positions].norm(dim=-1) / reference[positions].norm(dim=-1)
        return float(difference.median())

    earlier = share(hidden((1.0, -1.0)), slice(0, middle))
    later = share(hidden((-1.0, 1.0)), slice(middle, None))
    measured = (
        f"Later tokens change the hidden states of earlier ones by {earlier:.1%}, and earlier tokens those of later "
        f"ones by {later:.1%}."
    )
    implementation = subject.config.text_config._attn_implementation
    fix = f"Load the model with another `attn_implementation` than {implementation!r}, such as 'sdpa' or 'eager'."
    if not np.isfinite([earlier, later]).all():
        return failed("attention mask", "The hidden states are not finite.", "See the finding on the weights.")
    if later < SEEN:
        return failed("attention mask", f"Tokens do not see earlier ones. {measured}", fix)
    if subject.config.is_parallel and earlier < SEEN:
        return failed("attention mask", f"Causal, but this policy decodes in parallel. {measured}", fix)
    if not subject.config.is_parallel and earlier > SEEN:
        return failed("attention mask", f"Bidirectional, but this policy decodes token by token. {measured}", fix)
    kind = "Bidirectional" if subject.config.is_parallel else "Causal"
    return passed("attention mask", f"{kind}, as declared ({implementation}). {measured}")


@torch.no_grad()
def check_loop(probe: Probe, dims: int) -> Finding:
    """Compare the ids and logits of the decoding loop with those of an uncached pass, and with `generate`.

    Args:
        probe: The observation.
        dims: Number of action dimensions.
    """
    name, model, config = "decoding loop", probe.subject.model, probe.subject.config
    if config.is_parallel:
        return skipped(name, "This policy decodes a chunk in one pass, without a cache.")
    if config.reasoning:
        return skipped(name, "This policy writes a text first, through `generate`.")
    if not np.isfinite(probe.reference).all():
        return failed(name, "The logits are not finite.", "See the finding on the weights.")
    inputs = probe.inputs()
    arguments = (inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], [dims], inputs["proprio"])
    cached = decode_actions(model, *arguments)
    assert cached.token_ids is not None
    assert cached.action_logits is not None
    ids = torch.from_numpy(cached.token_ids).to(inputs["input_ids"])
    grown = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], ids[:, :-1]], dim=1),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, dims - 1), value=1),
    }
    uncached = _centred(_logits(model, grown, dims)[:, _action_ids(model)])
    error = _size(_centred(cached.action_logits[0].flip(-1)) - uncached)
    tolerance = LOOP_SHARE * _size(uncached)
    # Activations may be quantised too, with scales that depend on the other tokens of a pass.
    if getattr(config, "quantization_config", None) is None:
        tolerance = min(tolerance, LOOP_ROUNDING * probe.noise)
    fix = "Report a bug with the versions of PyTorch and transformers. Until then, predict with `num_beams=1`."
    if error > tolerance:
        return failed(name, f"The logits of the cached loop are off by {error:.2g} from an uncached pass.", fix)
    generated = decode_actions(model, *arguments, num_beams=1).token_ids
    if (lead := _lead(uncached, cached.token_ids[0], generated[0], _action_ids(model).start)) > tolerance:  # type: ignore[index]
        return failed(name, f"`generate` chooses another id, by a lead of {lead:.2g} in the logits.", fix)
    return passed(name, f"The cached loop, an uncached pass and `generate` agree (logits to {error:.2g}).")


def _lead(logits: np.ndarray, first: np.ndarray, second: np.ndarray, first_id: int) -> float:
    """Return how far the logits (A, N) of two rows of ids (A,) are apart where the ids first differ; 0 if nowhere."""
    if (first == second).all():
        return 0.0
    at = int((first != second).argmax())
    return float(abs(logits[at, first[at] - first_id] - logits[at, second[at] - first_id]))


__all__ = ["Probe", "check_inputs", "check_loop", "check_mask"]
