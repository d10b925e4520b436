"""A tiny policy that writes a text before the action, as Embodied-CoT does."""

from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModel

from openvla_hf.processing.processing_openvla import REASONING_PROMPT
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, tiny_config, tiny_processor, tiny_tokenizer


TEXTS = {
    "put the carrot on the plate": " put the carrot on the plate. PLAN: reach. MOVE REASONING: near. MOVE: up. "
    "GRIPPER POSITION: [1, 2] ACTION:",
    "open the top drawer": " open the top drawer. PLAN: pull the handle. MOVE REASONING: far to the left. "
    "MOVE: back and left. GRIPPER POSITION: [3, 40] ACTION:",
    "push": " push. PLAN: go. MOVE REASONING: x. MOVE: y. GRIPPER POSITION: [5, 6] ACTION:",
}
LONGEST = "open the top drawer"


def teach(steps: int = 400) -> SimpleNamespace:
    """Train a policy on one observation for each instruction, until it repeats them.

    Returns:
        Its `model`, `processor`, `images` (by instruction), and `lessons`: the ids of the text and of the action that
        each instruction was taught.
    """
    tokenizer = tiny_tokenizer([*TEXTS, *TEXTS.values(), REASONING_PROMPT], merges=600)
    statistics = {key: {"action": BRIDGE_LIKE_STATS} for key in ("bridge_orig", "other")}
    config = tiny_config(tokenizer, fused=False, vision_layers=2, norm_stats=statistics)
    config.reasoning = True
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    processor = tiny_processor(tokenizer, config)
    processor.prompt_template = REASONING_PROMPT
    images = dict(zip(TEXTS, [frame["image"] for frame in fake_episode(steps=len(TEXTS))], strict=True))
    rng, action_ids = np.random.default_rng(0), model.action_tokenizer
    lessons = {
        instruction: (
            tokenizer(text, add_special_tokens=False)["input_ids"],
            rng.integers(action_ids.first_id, action_ids.vocab_end, 7).tolist(),
        )
        for instruction, text in TEXTS.items()
    }
    prompts = processor(list(images.values()), instruction=list(TEXTS))
    answers = [torch.tensor([*text, *action, tokenizer.eos_token_id]) for text, action in lessons.values()]
    labels = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100)
    is_answer = labels != -100
    batch = {
        "input_ids": torch.cat([prompts["input_ids"], labels.where(is_answer, tokenizer.pad_token_id)], dim=1),
        "attention_mask": torch.cat([prompts["attention_mask"], is_answer.long()], dim=1),
        "labels": torch.cat([torch.full_like(prompts["input_ids"], -100), labels], dim=1),
        "pixel_values": prompts["pixel_values"],
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(steps):
        loss = model(**batch).loss
        if loss < 0.01:
            return SimpleNamespace(model=model.eval(), processor=processor, images=images, lessons=lessons)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"After {steps} steps the loss is still {loss.item():.3f}.")
