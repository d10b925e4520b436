"""Frames to training batches: prompt, action tokens, stop token, and labels on the last two."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..modeling.action_tokenizer import ActionTokenizer, check_statistics, normalize, resolve_action_stats
from ..processing.processing_openvla import OpenVLAProcessor


IGNORED = -100


class ActionCollator:
    """Builds right-padded batches whose labels are the action tokens and the stop token.

    Args:
        processor: Makes prompts and pixels, as it does for prediction.
        action_tokenizer: Bins <-> ids of the model that is trained.
        stats: Action statistics that normalise the frames' actions.
        prompt_suffix_token_id: Id between the prompt and the action, of the model's config.
        norm_stats: In place of `stats`, those of several data sets by name: each frame's `dataset` says whose it is
            (it may be left out where there is one), and batches get `dataset_index` (B,), its place among them.
        augment: Image to another view of it, by torch's random numbers. What it draws depends on `seed` and on the
            frame's place in the run alone: a run that goes on from a checkpoint, or on other processes with the same
            global batch, draws as it would have.
        seed: Of `augment`.
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
        self.start()

    def start(self, batch: int = 0, process: int = 0, processes: int = 1) -> None:
        """Say which of the run's batches comes next, and in which of how many processes."""
        self.first_batch, self.process, self.processes, self.batches = batch, process, processes, 0

    def __call__(self, frames: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Frames (`image`, `instruction`, `action`) to `input_ids`, `attention_mask`, `labels`, `pixel_values`.

        Empty frames, which stand for those that a resumed run has used, give an empty batch that is counted.

        Raises:
            ValueError: An action is not finite or has not as many dimensions as its statistics, or a frame's
                `dataset` is unknown.
        """
        if not frames[0]:
            self.batches += 1
            return {}
        inputs = self.processor(
            self.views(frames),
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

    def views(self, frames: Sequence[dict[str, Any]]) -> list[Any]:
        """The frames' images, augmented where that is wanted."""
        images = [frame["image"] for frame in frames]
        if self.augment is None:
            return images
        # Workers take batches in round-robin order, and so do processes.
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batch = (self.first_batch + self.batches * workers + index) * self.processes + self.process
        self.batches += 1
        views = []
        with torch.random.fork_rng(devices=[]):
            for place, image in enumerate(images, start=batch * len(images)):
                torch.manual_seed(int(np.random.SeedSequence([self.seed, place]).generate_state(1)[0]))
                views.append(self.augment(image))
        return views

    def encode(self, frame: dict[str, Any]) -> list[int]:
        """Ids of a frame's action."""
        stats = self.stats
        if self.norm_stats is not None:
            stats = resolve_action_stats(self.norm_stats, frame.get("dataset"))
        action = np.asarray(frame["action"], dtype=np.float64)
        dims = len(stats["q01"])
        if action.shape != (dims,):
            raise ValueError(
                f"An action of shape {action.shape}{_place(frame)} for statistics of {dims} dimensions: the data's "
                "robot adapter must give the dimensions that the statistics describe."
            )
        if not np.isfinite(action).all():
            raise ValueError(f"An action{_place(frame)} is not finite: {action.tolist()}.")
        return self.action_tokenizer.encode(normalize(action, stats)).tolist()


def _place(frame: dict[str, Any]) -> str:
    """Where a frame comes from, for an error."""
    known = [f"{name.split('_')[0]} {frame[name]}" for name in ("episode_index", "frame_index") if name in frame]
    return f" ({', '.join(known)})" if known else ""
