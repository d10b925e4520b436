"""The policy behind every protocol: one model, its processor, its statistics and its gripper convention.

Shapes: K actions of a chunk (1 for plain OpenVLA), A action dimensions, S state dimensions, N action bins, T tokens.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import __version__
from ..checkpoints.identity import describe_arithmetic, identify
from ..checkpoints.model_card import records_training
from ..modeling.action_prediction import ActionPrediction
from ..modeling.action_stream import average_chunks, drop_first_step
from ..modeling.action_tokenizer import resolve_key
from ..modeling.model_inputs import check_prompt_length
from ..modeling.parallel_decoding import num_new_tokens
from ..suites.gripper import GRIPPERS, GripperConvention, is_opening


ONLY_CAMERA = "image"
"""Name of the camera of a policy that sees one image without a name."""
RESIZE_METHODS = {"resize-naive": "stretch", "letterbox": "pad", "resize-crop": "crop"}
"""Strategy of the image processor -> how it makes an image square."""
NO_DRAFT = -1
"""Id for an observation without a draft. The model replaces ids outside its vocabulary."""
LARGEST_ARM = 8
"""Action dimensions of one arm: seven joints and a gripper."""


@dataclass(frozen=True)
class Observation:
    """What one robot sees at one step.

    Attributes:
        images: Image of each of the policy's cameras: PIL, or an array that the processor takes, such as uint8
            (H, W, 3) or float (3, H, W) from 0 to 1. `Service.act` also takes an `EncodedImage`.
        instruction: Task of the robot.
        state: (S,) in robot units, if the policy sees it.
        unnorm_key: Name of the statistics; `None` for the policy's default.
        draft: (A,) guess of the action's ids, which sessions add.
    """

    images: Mapping[str, Any]
    instruction: str
    state: np.ndarray | None = None
    unnorm_key: str | None = None
    draft: np.ndarray | None = None


@dataclass(frozen=True)
class Prepared:
    """An observation as the model's inputs, with a batch dimension of 1."""

    inputs: Mapping[str, Any]
    unnorm_key: str
    draft: np.ndarray | None
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """The policy's answer to one observation.

    Attributes:
        actions: (K, A) float64 in robot units, with the gripper as predicted: 1 for open and 0 for closed.
        unnorm_key: Name of the statistics that were used.
        token_ids: (K, A). Like the next two, `None` with an action head.
        probabilities: (K, A, N) over the bins, lowest value first.
        entropy: (K, A) in nats.
        text: Reasoning before the action, from a model that writes one.
        forward_passes: Passes of the language model for the batch.
        preprocess_seconds: Time from the images and the text of this observation to the model's inputs.
        model_seconds: Time that the model took for the batch.
    """

    actions: np.ndarray
    unnorm_key: str
    token_ids: np.ndarray | None
    probabilities: np.ndarray | None
    entropy: np.ndarray | None
    text: str | None
    forward_passes: int
    preprocess_seconds: float
    model_seconds: float


class ServedPolicy:
    """A model and its processor that act for any number of robots.

    Args:
        model: An `OpenVLAForActionPrediction`.
        processor: Its processor.
        model_id: Folder or Hub id, for `describe`.
        unnorm_key: Default statistics of observations that name none; may be left out if the model has one key.
        gripper: Name of the `GRIPPERS` convention in which actions are returned.
        execute: Number of actions of a chunk that an answer contains; all by default.
        ensemble: Decay of temporal ensembling within a session, see `ChunkStream`; an answer then contains one action.
        control_frequency: Rate in Hz at which robots should act, for `describe`.

    Raises:
        ValueError: An argument does not fit the model.
    """

    engine = "transformers"

    def __init__(
        self,
        model: Any,
        processor: Any,
        model_id: str = "",
        *,
        unnorm_key: str | None = None,
        gripper: str = "policy",
        execute: int | None = None,
        ensemble: float | None = None,
        control_frequency: float | None = None,
    ):
        self.model, self.processor, self.model_id = model, processor, model_id
        self.identity = identify(model, model_id)
        self.training_recorded = records_training(model_id)
        keys = list(model.norm_stats or ())
        has_default = unnorm_key is not None or len(keys) < 2
        self.default_key = resolve_key(model.norm_stats, unnorm_key) if has_default else None
        if gripper not in GRIPPERS:
            raise ValueError(f"Unknown gripper convention {gripper!r}: give one of {', '.join(GRIPPERS)}.")
        self.gripper_name, self.gripper = gripper, GRIPPERS[gripper]
        for key in keys if self.default_key is None else [self.default_key]:
            self._check_gripper(key)
        if execute is not None or ensemble is not None:
            model.action_stream(self.default_key or keys[0], execute=execute, ensemble=ensemble)  # raises if unfit
        horizon = model.config.action_horizon if model.config.is_parallel else 1
        self.execute = 1 if ensemble is not None else execute or horizon
        self.ensemble = ensemble
        self.control_frequency = control_frequency

    @classmethod
    def load(
        cls,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        loading: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "ServedPolicy":
        """Load a checkpoint or an adapter from a folder or the Hub.

        Args:
            model_id: Folder or Hub id.
            revision: Branch, tag or commit.
            dtype: Data type of the weights.
            device: Device, or "auto".
            loading: Further arguments of `from_pretrained` for both model and processor, such as `platform`.
            options: Arguments of `ServedPolicy`.
        """
        from transformers import AutoProcessor

        from ..auto import OpenVLAForActionPrediction

        shared = {"revision": revision or "main", **(loading or {})}
        # Unlike AutoModel, it does not repeat requests to a Hub that does not answer, which would take a minute.
        model = OpenVLAForActionPrediction.from_pretrained(model_id, dtype=dtype, device_map=device, **shared)
        return cls(model.eval(), AutoProcessor.from_pretrained(model_id, **shared), model_id, **options)

    def _check_gripper(self, key: str) -> None:
        """Raise `ValueError` if the gripper of these statistics can't be converted."""
        if self.gripper_name == "policy":
            return
        stats = self.model.get_action_stats(key)
        if len(stats["q01"]) > LARGEST_ARM:
            raise ValueError(
                f"gripper={self.gripper_name!r} converts the last action dimension, but the {len(stats['q01'])} "
                f"dimensions of {key!r} are more than those of one arm. Leave `gripper` out to return the values as "
                "predicted."
            )
        low, high = stats["q01"][-1], stats["q99"][-1]
        if not is_opening(low, high):
            raise ValueError(
                f"gripper={self.gripper_name!r} converts a gripper between 0 and 1, but the last action dimension of "
                f"{key!r} goes from {low:g} to {high:g}. Leave `gripper` out to return the values as predicted."
            )

    @property
    def cameras(self) -> list[str]:
        """Names of the cameras in the model's order."""
        return self.processor.cameras or [ONLY_CAMERA]

    @property
    def state_dim(self) -> int | None:
        """Number of state dimensions, or `None` if the policy does not see the state."""
        return self.processor.state_dim

    @property
    def uses_drafts(self) -> bool:
        """Whether the last action's ids make the next prediction cheaper."""
        return not (self.model.config.is_parallel or self.model.config.reasoning)

    def describe(self) -> dict[str, Any]:
        """Describe what clients need to know, in JSON types."""
        config, image_processor = self.model.config, self.processor.image_processor
        keys = {key: self.model.get_action_dim(key) for key in self.model.norm_stats or ()}
        known = self.model.get_action_stats(self.default_key).get("names") if self.default_key else None
        side, resample = config.vision_config.image_size, image_processor.resample
        resample = resample if isinstance(resample, str) else Image.Resampling(resample).name.lower()
        return {
            "server": "openvla-hf",
            "server_version": __version__,
            "engine": self.engine,
            **self.describe_arithmetic(),
            **self.identity,
            "training_recorded": self.training_recorded,
            "unnorm_keys": list(keys),
            "default_unnorm_key": self.default_key,
            "action_dim": keys[self.default_key] if self.default_key else max(keys.values()),
            "action_names": None if known is None else list(known),
            "action_horizon": self.execute,
            "action_bounds": {key: self._bounds(key) for key in keys},
            "action_decoding": config.action_decoding,
            "temporal_ensemble": self.ensemble,
            "cameras": [
                {
                    "name": name,
                    "height": side,
                    "width": side,
                    "resize": f"{RESIZE_METHODS[image_processor.image_resize_strategy]}, {resample}",
                    "center_crop_area": image_processor.center_crop_area,
                }
                for name in self.cameras
            ],
            "state_dim": self.state_dim,
            "gripper": {
                "convention": self.gripper_name,
                "open": self.gripper.open,
                "closed": self.gripper.closed,
                "binary": self.gripper.binary,
            },
            "control_frequency": self.control_frequency,
        }

    def describe_arithmetic(self) -> Mapping[str, str | None]:
        """Describe what the model computes on (`device`) and in (`dtype`); `None` if another process decides it."""
        return describe_arithmetic(self.model)

    def check_health(self) -> None:
        """Raise `ServingError` if another process runs the model and can't predict at the moment."""

    def _bounds(self, key: str) -> dict[str, list[float]]:
        """Return the 1st and 99th percentiles of the actions in robot units, with the gripper as predicted."""
        stats = self.model.get_action_stats(key)
        return {"low": np.asarray(stats["q01"]).tolist(), "high": np.asarray(stats["q99"]).tolist()}

    def prepare(self, observation: Observation) -> Prepared:
        """Check one observation and convert it to the model's inputs; may run in any thread.

        Raises:
            ValueError: The observation does not fit the policy.
            TypeError: The instruction or the state has a wrong type.
        """
        started = time.perf_counter()
        asked = observation.unnorm_key
        key = resolve_key(self.model.norm_stats, self.default_key if asked is None else asked)
        self._check_gripper(key)
        images: Any = dict(observation.images)
        if self.processor.cameras is None:
            if [*images] != [ONLY_CAMERA]:
                raise ValueError(
                    f"This policy sees one camera, {ONLY_CAMERA!r}, got images from "
                    f"{', '.join(map(repr, images)) or 'none'}."
                )
            images = images[ONLY_CAMERA]
        for camera, image in observation.images.items():
            # Refuse paths and URLs, which the processor would open, and batches.
            is_array = isinstance(image, np.ndarray) and image.ndim in (2, 3)
            if not is_array and not isinstance(image, Image.Image):
                raise TypeError(f"The image of {camera!r} must be a PIL image or an array of shape (H, W, 3).")
            if is_array and has_fourth_channel(image):
                raise ValueError(
                    f"The image of {camera!r} has four channels: send only the three colours, without alpha or depth."
                )
        inputs = self.processor(images, instruction=observation.instruction, state=observation.state)
        config = self.model.config
        new_tokens = num_new_tokens(config) if config.is_parallel else self.model.get_action_dim(key)
        check_prompt_length(config, inputs["attention_mask"], new_tokens)
        return Prepared(inputs, key, observation.draft, time.perf_counter() - started)

    def predict(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        """Predict a batch of one or more observations, whose instructions and keys may differ.

        Raises:
            ValueError: The model's output for an observation is not finite.
        """
        started = time.perf_counter()
        rows = [one.inputs for one in prepared]
        inputs: dict[str, Any] = dict(rows[0])
        if len(rows) > 1:
            text = {name: [row[name][0] for row in rows] for name in ("input_ids", "attention_mask")}
            inputs = dict(self.processor.tokenizer.pad(text, padding=True, return_tensors="pt"))
            inputs["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
            if "state" in rows[0]:
                inputs["state"] = torch.cat([torch.as_tensor(row["state"]) for row in rows])
        more: dict[str, Any] = {}
        if (drafts := self._stack_drafts(prepared)) is not None:
            more["draft_token_ids"] = drafts
        if self.model.config.reasoning:
            more["tokenizer"] = self.processor.tokenizer
        details = self.model.predict_action(
            **inputs,
            unnorm_key=[one.unnorm_key for one in prepared],
            return_details=True,
            **more,
        )
        seconds = time.perf_counter() - started
        return [self._row(details, row, one, seconds) for row, one in enumerate(prepared)]

    def _stack_drafts(self, prepared: Sequence[Prepared]) -> np.ndarray | None:
        """Return the drafts (B, A), or `None` if no observation has one."""
        known = [one.draft for one in prepared if one.draft is not None]
        if not known:
            return None
        drafts = np.full((len(prepared), max(map(len, known))), NO_DRAFT)
        for row, one in enumerate(prepared):
            if one.draft is not None:
                drafts[row, : len(one.draft)] = one.draft
        return drafts

    def _row(self, details: ActionPrediction, row: int, prepared: Prepared, seconds: float) -> Prediction:
        """Cut one observation's answer out of a batch, without the padding of a shorter action."""
        dim = self.model.get_action_dim(prepared.unnorm_key)

        def cut(values: np.ndarray | None) -> np.ndarray | None:
            if values is None:
                return None
            return (values[row] if self.model.config.is_parallel else values[row][None])[:, :dim]

        return Prediction(
            actions=details.actions[row].reshape(-1, details.actions.shape[-1])[:, :dim],
            unnorm_key=prepared.unnorm_key,
            token_ids=cut(details.token_ids),
            probabilities=cut(details.probabilities),
            entropy=cut(details.entropy),
            text=None if details.text is None else details.text[row],
            forward_passes=details.forward_passes,
            preprocess_seconds=prepared.seconds,
            model_seconds=seconds,
        )

    def open_session(self) -> "Session":
        """Start a session for one robot."""
        return Session(self)


def has_fourth_channel(image: np.ndarray) -> bool:
    """Return whether an array has channels for more than colours, last or first, which the processor would drop."""
    return image.ndim == 3 and (image.shape[-1] == 4 or (image.shape[0] == 4 and image.shape[-1] not in (1, 3)))


class Session:
    """One robot's episode: the draft of its next action, and the chunks of temporal ensembling.

    A different instruction or key starts a new episode. `reset` starts one for the same task.

    Attributes:
        episode: Number of the episode. A prediction for an earlier episode must not be received.
    """

    def __init__(self, policy: ServedPolicy):
        self.policy = policy
        self.episode = 0
        self._task: tuple[str, str | None] | None = None
        self.reset()

    def reset(self) -> None:
        """Start an episode: forget the last actions."""
        self.episode += 1
        self._draft: np.ndarray | None = None
        self._chunks: list[np.ndarray] = []  # (later steps, A) each, the oldest first

    def observe(self, observation: Observation) -> Observation:
        """Add the draft to an observation, or start a new episode if the task has changed."""
        task = (observation.instruction, observation.unnorm_key)
        if task != self._task:
            self.reset()
            self._task = task
        return replace(observation, draft=self._draft)

    def receive(self, prediction: Prediction) -> np.ndarray:
        """Take the answer to an observation, and return the actions (n, A) to execute before the next one.

        The gripper is in the policy's convention.
        """
        if self.policy.uses_drafts and prediction.token_ids is not None:
            self._draft = prediction.token_ids[0]
        actions = prediction.actions[: self.policy.execute]
        if self.policy.ensemble is not None:
            self._chunks.append(prediction.actions)
            actions = average_chunks(self._chunks, self.policy.ensemble)[None]
            self._chunks = drop_first_step(self._chunks)
        # Convert last, so that a binary gripper stays binary after the average.
        opening = self.policy.gripper.convert(actions[:, -1:])
        return np.concatenate([actions[:, :-1], opening], axis=1)


__all__ = [
    "GRIPPERS",
    "ONLY_CAMERA",
    "GripperConvention",
    "Observation",
    "Prediction",
    "Prepared",
    "ServedPolicy",
    "Session",
]
