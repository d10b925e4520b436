"""Conversion of frames to training batches: prompt, action tokens and stop token, with labels on the last two."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..modeling.action_tokenizer import ActionTokenizer, check_statistics, normalize, resolve_action_stats
from ..processing.processing_openvla import OpenVLAProcessor


IGNORED = -100
"""Label of the positions that the loss leaves out."""


class ActionCollator:
    """Build right-padded batches whose labels are the action tokens and the stop token.

    Args:
        processor: Makes prompts and pixels, as it does for prediction.
        action_tokenizer: Maps the bins of the trained model to token ids and back.
        stats: Action statistics that normalise the frames' actions.
        prompt_suffix_token_id: Id between the prompt and the action, from the model's config.
        norm_stats: Instead of `stats`, the statistics of several datasets by name. Each frame names its own as
            `dataset`, which may be left out if there is only one. Batches then get `dataset_index` (B,), the position
            of each frame's dataset in `norm_stats`.
        augment: Draws a random view of an image with PyTorch's random number generator. The draw depends only on
            `seed`, the epoch and the frame, so it is the same in any worker or process, and after a resume.
        seed: Seed of `augment`.
    """

    def __init__(
        self,
        processor: OpenVLAProcessor,
        action_tokenizer: ActionTokenizer,
        stats: dict[str, Any] | None = None,
        prompt_suffix_token_id: int | None = None,
        norm_stats: dict[str, Any] | None = None,
        augment: Callable[[Any], Any] | None = None,
        seed: int = 0,
    ):
        self.processor = processor
        self.action_tokenizer = action_tokenizer
        self.stats: dict[str, Any] = stats or {}
        self.suffix = [] if prompt_suffix_token_id is None else [prompt_suffix_token_id]
        self.norm_stats = check_statistics(norm_stats, "`norm_stats`")
        self.augment = augment
        self.seed = seed
        # In shared memory, since workers that outlive an epoch have their own copy of the collator.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that augmentation depends on. Frames of a stream have their own `epoch`, which takes
        precedence."""
        self.epoch.fill_(epoch)

    def __call__(self, frames: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn frames (`image`, `instruction`, `action`) into a batch of B rows of T tokens.

        Returns:
            `input_ids`, `attention_mask` and `labels` (B, T), and `pixel_values` (B, channels, height, width). Empty
            frames, which stand for those that a resumed run has already used, give an empty batch.

        Raises:
            ValueError: An action is not finite or does not have as many dimensions as its statistics, or a frame's
                `dataset` is unknown.
        """
        if not frames[0]:
            return {}
        inputs = self.processor(
            [self.view(frame) for frame in frames],
            text=[self.processor.build_prompt(frame["instruction"]) for frame in frames],
            padding=False,
            return_tensors=None,
        )
        stop, pad = self.processor.tokenizer.eos_token_id, self.processor.tokenizer.pad_token_id
        rows, labels = [], []
        for frame, prompt in zip(frames, inputs["input_ids"], strict=True):
            prompt, supervised = [*prompt, *self.suffix], [*self.encode(frame), stop]
            rows.append(torch.tensor(prompt + supervised))
            labels.append(torch.tensor([IGNORED] * len(prompt) + supervised))
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        batch = {
            "input_ids": input_ids,
            "attention_mask": input_ids.ne(pad).long(),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "pixel_values": torch.as_tensor(np.asarray(inputs["pixel_values"])),
        }
        if self.norm_stats is not None:
            names = list(self.norm_stats)
            batch["dataset_index"] = torch.tensor([names.index(frame.get("dataset", names[0])) for frame in frames])
        return batch

    def view(self, frame: dict[str, Any]) -> Any:
        """Return a frame's image, augmented if `augment` is set."""
        image = frame["image"]
        if self.augment is None:
            return image
        seed = np.random.SeedSequence([self.seed, int(frame.get("epoch", self.epoch)), *_identify(frame)])
        with torch.random.fork_rng(devices=[]):
            # Seed only the CPU: `torch.manual_seed` would also seed the dropout on a GPU.
            torch.default_generator.manual_seed(int(seed.generate_state(1)[0]))
            return self.augment(image)

    def encode(self, frame: dict[str, Any]) -> list[int]:
        """Return the token ids of a frame's action."""
        stats = self.stats
        if self.norm_stats is not None:
            stats = resolve_action_stats(self.norm_stats, frame.get("dataset"))
        action = np.asarray(frame["action"], dtype=np.float64)
        dims = len(stats["q01"])
        if action.shape != (dims,):
            raise ValueError(
                f"An action has shape {action.shape}{_place(frame)}, but its statistics have {dims} dimensions. Use "
                "a robot adapter whose actions have the dimensions of the statistics."
            )
        if not np.isfinite(action).all():
            raise ValueError(f"An action{_place(frame)} is not finite: {action.tolist()}.")
        return self.action_tokenizer.encode(normalize(action, stats)).tolist()


def _identify(frame: dict[str, Any]) -> list[int]:
    """Return numbers that identify a frame: its dataset, episode and index, or a checksum of its image."""
    episode, index = frame.get("episode_index"), frame.get("frame_index")
    if episode is not None and index is not None:
        return [zlib.crc32(str(frame.get("dataset", "")).encode()), int(episode), int(index)]
    return [zlib.crc32(np.ascontiguousarray(frame["image"]).data)]


def _place(frame: dict[str, Any]) -> str:
    """Describe where a frame comes from, for an error."""
    names = ("episode_index", "frame_index")
    known = [f"{name.split('_')[0]} {frame[name]}" for name in names if frame.get(name) is not None]
    return f" ({', '.join(known)})" if known else ""


__all__ = ["IGNORED", "ActionCollator"]
