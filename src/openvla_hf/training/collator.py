"""Conversion of frames to training batches: prompts and pixels, and the actions that the policy should predict.

Shapes: B batch, T tokens, C cameras, K actions of a chunk, A action dimensions, S state dimensions.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..modeling.action_tokenizer import (
    NORMALIZATION_KINDS,
    ActionTokenizer,
    check_statistics,
    normalize,
    normalize_state,
    resolve_action_stats,
    resolve_key,
)
from ..modeling.configuration_openvla import OpenVLAConfig
from ..processing.observations import read_frame_images
from ..processing.processing_openvla import OpenVLAProcessor


IGNORED = -100
"""Label of the positions that the loss leaves out."""
PADDING = -1
"""`dataset_index` of frames that only complete a batch, which metrics leave out."""


class ActionCollator:
    """Build right-padded batches whose labels are the action tokens and the stop token.

    Args:
        processor: Makes prompts and pixels, as it does for prediction.
        action_tokenizer: Maps the bins of the trained model to token ids and back.
        stats: Action statistics that normalise the frames' actions.
        prompt_suffix_token_id: Id between the prompt and the action, from the model's config.
        norm_stats: Instead of `stats`, the statistics of several datasets by name. Each frame names its own as
            `dataset`, which may be left out if there is only one. Batches then get `dataset_index` (B,), the position
            of each frame's dataset in `norm_stats`, or `PADDING` for a frame that only completes a batch.
        augment: Draws a random view of an image with PyTorch's random number generator. The draw depends only on
            `seed`, the epoch and the frame, so it is the same in any worker or process, and after a resume.
        seed: Seed of `augment`.
        normalization: Bounds that scale actions and states, named as in `action_normalization` of the model's config.
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
        normalization: str = "q99",
    ):
        self.processor = processor
        self.action_tokenizer = action_tokenizer
        self.stats: dict[str, Any] = stats or {}
        self.suffix = [] if prompt_suffix_token_id is None else [prompt_suffix_token_id]
        self.norm_stats = check_statistics(norm_stats, "`norm_stats`")
        self.augment = augment
        self.seed = seed
        self.normalization = normalization
        # In shared memory, since workers that outlive an epoch have their own copy of the collator.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that augmentation depends on. Frames of a stream have their own `epoch`, which takes
        precedence."""
        self.epoch.fill_(epoch)

    def __call__(self, frames: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn frames (`image` or `images`, `instruction`, `action` and maybe `state`) into a batch of B rows.

        Returns:
            `input_ids`, `attention_mask` and `labels` (B, T), and `pixel_values` (B, channels, height, width). If the
            processor takes a state, also `proprio` (B, S), normalised. Empty frames, which stand for frames that a
            resumed run has already used, give an empty batch.

        Raises:
            ValueError: An action or a state is not finite or does not have as many dimensions as its statistics, a
                state is missing, or a frame's `dataset` is unknown.
        """
        if not frames[0]:
            return {}
        states = None
        if self.processor.state_dim is not None:
            states = np.stack([self.read_state(frame) for frame in frames])
        inputs = self.processor(
            [self.view(frame) for frame in frames],
            text=[self.processor.build_prompt(frame["instruction"]) for frame in frames],
            padding=False,
            return_tensors=None,
            state=states,
        )
        batch = self.supervise(frames, [[*prompt, *self.suffix] for prompt in inputs["input_ids"]])
        batch["pixel_values"] = torch.as_tensor(np.asarray(inputs["pixel_values"]))
        if states is not None:
            rows = [self.normalize_state(*row) for row in zip(frames, states, strict=True)]
            batch["proprio"] = torch.from_numpy(np.stack(rows))
        if self.norm_stats is not None:
            names = list(self.norm_stats)
            numbers = [
                PADDING if frame.get("is_padding") else names.index(frame.get("dataset", names[0])) for frame in frames
            ]
            batch["dataset_index"] = torch.tensor(numbers)
        return batch

    def supervise(self, frames: Sequence[dict[str, Any]], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Append the action tokens and the stop token to each prompt, and label them."""
        stop = self.processor.tokenizer.eos_token_id
        rows = [[*self.encode(self.read_action(frame)), stop] for frame in frames]
        labels = [[IGNORED] * len(prompt) + row for prompt, row in zip(prompts, rows, strict=True)]
        batch = self.pad([prompt + row for prompt, row in zip(prompts, rows, strict=True)])
        return batch | {"labels": _pad(labels, IGNORED)}

    def pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Pad rows of ids on the right, as `input_ids` and `attention_mask` (B, T)."""
        pad = self.processor.tokenizer.pad_token_id
        input_ids = _pad(rows, pad)
        return {"input_ids": input_ids, "attention_mask": input_ids.ne(pad).long()}

    def view(self, frame: dict[str, Any]) -> Any:
        """Return a frame's image, or the list of its images in the order of the processor's cameras.

        The images are augmented if `augment` is set.

        Raises:
            ValueError: A camera of the processor is missing, or the frame has an unknown camera.
        """
        images = read_frame_images(frame, self.processor.cameras, f"A frame{_place(frame)}")
        if self.augment is None:
            return images
        seed = np.random.SeedSequence([self.seed, int(frame.get("epoch", self.epoch)), *_identify(frame)])
        with torch.random.fork_rng(devices=[]):
            # Seed only the CPU: `torch.manual_seed` would also seed the dropout on a GPU.
            torch.default_generator.manual_seed(int(seed.generate_state(1)[0]))
            return [self.augment(image) for image in images] if isinstance(images, list) else self.augment(images)

    def read_action(self, frame: dict[str, Any], name: str = "action") -> np.ndarray:
        """Return a frame's normalised action (A,), or with `name="actions"` its chunk (K, A).

        Raises:
            ValueError: The action is not finite or does not have as many dimensions as its statistics.
        """
        stats = self.stats
        if self.norm_stats is not None:
            stats = resolve_action_stats(self.norm_stats, frame.get("dataset"))
        action = np.asarray(frame[name], dtype=np.float64)
        dims = len(stats["q01"])
        if action.ndim != (2 if name == "actions" else 1) or action.shape[-1] != dims:
            raise ValueError(
                f"An action has shape {action.shape}{_place(frame)}, but its statistics have {dims} dimensions. Use "
                "a robot adapter whose actions have the dimensions of the statistics."
            )
        if not np.isfinite(action).all():
            raise ValueError(f"An action{_place(frame)} is not finite: {action.tolist()}.")
        return normalize(action, stats, NORMALIZATION_KINDS[self.normalization])

    def read_state(self, frame: dict[str, Any]) -> np.ndarray:
        """Return a frame's state (S,) in the robot's units.

        Raises:
            ValueError: The state is missing or has another size than the policy's.
        """
        state = np.asarray(frame.get("state"), dtype=np.float64)  # NaN if there is none
        if state.shape != (self.processor.state_dim,):
            found = "no state" if frame.get("state") is None else f"a state of shape {state.shape}"
            raise ValueError(
                f"A frame{_place(frame)} has {found}, but the policy's has {self.processor.state_dim} dimensions: "
                "load the data with `state=True` and the robot's adapter."
            )
        return state

    def normalize_state(self, frame: dict[str, Any], state: np.ndarray) -> np.ndarray:
        """Normalise the state (S,) of a frame with the statistics of its dataset, as float32."""
        of_dataset = (self.norm_stats or {})[resolve_key(self.norm_stats, frame.get("dataset"))]
        if "proprio" not in of_dataset:
            raise ValueError(
                f"The statistics of {frame.get('dataset')!r} have no 'proprio': compute them again, with the state."
            )
        return normalize_state(state, of_dataset["proprio"], self.normalization).astype(np.float32)

    def encode(self, action: np.ndarray) -> list[int]:
        """Return the token ids of a normalised action, dimension after dimension."""
        return self.action_tokenizer.encode(action).ravel().tolist()


class ChunkCollator(ActionCollator):
    """Build batches for parallel decoding: prompts without actions, and the chunks of actions that follow them.

    Frames have `actions` (K, A) and maybe `chunk_mask` (K,), see `openvla_hf.data.load`. Instead of `labels` over the
    tokens, batches have

    - `actions` (B, K, A), normalised, float32,
    - `action_mask` (B, K), false for actions beyond the end of an episode, which the loss leaves out,
    - `labels` (B, 1 + K * A), the token ids of the actions after one ignored label, for the metrics and the number of
      targets. If the policy decodes tokens and has a stop token, the labels also contain the stop token.

    Args:
        config: Config of the trained model.
        more: Keyword arguments of `ActionCollator`.
    """

    def __init__(self, config: OpenVLAConfig, **more: Any):
        super().__init__(**more, normalization=config.action_normalization)
        self.shape = (config.action_horizon, config.action_dim)
        self.predicts_stop = config.action_head == "none" and config.action_stop_token

    def supervise(self, frames: Sequence[dict[str, Any]], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Pad the prompts, and add the chunks with their masks and labels."""
        chunks, masks, labels = [], [], []
        stop = [self.processor.tokenizer.eos_token_id] if self.predicts_stop else []
        for frame in frames:
            chunk = self.read_action(frame, "actions") if "actions" in frame else self.read_action(frame)[None]
            if chunk.shape != self.shape:
                raise ValueError(
                    f"A chunk of actions has shape {chunk.shape}{_place(frame)}, but the policy predicts "
                    f"{self.shape}: load the data with `chunk={self.shape[0]}`."
                )
            mask = np.asarray(frame.get("chunk_mask", np.ones(len(chunk))), dtype=bool)
            ids = np.where(mask[:, None], self.action_tokenizer.encode(chunk), IGNORED)
            chunks.append(chunk.astype(np.float32))
            masks.append(mask)
            labels.append([IGNORED, *ids.ravel().tolist(), *stop])
        return self.pad(prompts) | {
            "labels": torch.tensor(labels),
            "actions": torch.from_numpy(np.stack(chunks)),
            "action_mask": torch.from_numpy(np.stack(masks)),
        }


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Pad rows on the right to the longest."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _identify(frame: dict[str, Any]) -> list[int]:
    """Return numbers that identify a frame: its dataset, episode and index, or a checksum of its image."""
    episode, index = frame.get("episode_index"), frame.get("frame_index")
    if episode is not None and index is not None:
        return [zlib.crc32(str(frame.get("dataset", "")).encode()), int(episode), int(index)]
    image = next(iter(frame["images"].values())) if "images" in frame else frame["image"]
    return [zlib.crc32(np.ascontiguousarray(image).data)]


def _place(frame: dict[str, Any]) -> str:
    """Describe where a frame comes from, for an error."""
    names = ("episode_index", "frame_index")
    known = [f"{name.split('_')[0]} {frame[name]}" for name in names if frame.get(name) is not None]
    return f" ({', '.join(known)})" if known else ""


__all__ = ["IGNORED", "PADDING", "ActionCollator", "ChunkCollator"]
