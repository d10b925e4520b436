"""Frames to training batches: prompt, action tokens, stop token, and labels on the last two."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..modeling.action_tokenizer import ActionTokenizer, normalize
from ..processing.processing_openvla import OpenVLAProcessor


IGNORED = -100


class ActionCollator:
    """Builds right-padded batches whose labels are the action tokens and the stop token.

    Args:
        processor: Makes prompts and pixels, as it does for prediction.
        action_tokenizer: Bins <-> ids of the model that is trained.
        stats: Action statistics that normalise the frames' actions.
        prompt_suffix_token_id: Id between the prompt and the action, of the model's config.
    """

    def __init__(
        self,
        processor: OpenVLAProcessor,
        action_tokenizer: ActionTokenizer,
        stats: dict[str, Any],
        prompt_suffix_token_id: int | None = None,
    ):
        self.processor = processor
        self.action_tokenizer = action_tokenizer
        self.stats = stats
        self.suffix = [] if prompt_suffix_token_id is None else [prompt_suffix_token_id]

    def __call__(self, frames: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Frames (`image`, `instruction`, `action`) to `input_ids`, `attention_mask`, `labels`, `pixel_values`."""
        inputs = self.processor(
            [frame["image"] for frame in frames],
            instruction=[frame["instruction"] for frame in frames],
            padding=False,
            return_tensors=None,
        )
        actions = normalize(np.stack([frame["action"] for frame in frames]), self.stats)
        stop, pad = self.processor.tokenizer.eos_token_id, self.processor.tokenizer.pad_token_id
        rows, labels = [], []
        for prompt, action_ids in zip(inputs["input_ids"], self.action_tokenizer.encode(actions), strict=True):
            prompt, supervised = [*prompt, *self.suffix], [*action_ids.tolist(), stop]
            rows.append(torch.tensor(prompt + supervised))
            labels.append(torch.tensor([IGNORED] * len(prompt) + supervised))
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        return {
            "input_ids": input_ids,
            "attention_mask": input_ids.ne(pad).long(),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "pixel_values": torch.as_tensor(np.asarray(inputs["pixel_values"])),
        }
