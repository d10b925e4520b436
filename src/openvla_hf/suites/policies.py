"""A model and its processor as a policy that plays episodes."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .suite import STATE, Observation, Suite, first_image


__all__ = ["ModelPolicy", "model_policy"]

logger = logging.getLogger(__name__)


class ModelPolicy:
    """A model and its processor as a `Policy` that counts the cost of its actions.

    Attributes:
        cameras: Cameras whose images the model takes, or `None` for the first camera alone.
        state: Whether the model takes the robot's state.
        forward_passes: Passes of the language model so far, summed over the observations.
        seconds: Time spent in the processor and the model so far.
    """

    def __init__(self, model: Any, processor: Any, unnorm_key: str | None = None, execute: int | None = None):
        self.model, self.processor = model, processor
        self.unnorm_key, self.execute = unnorm_key, execute
        self.cameras: list[str] | None = processor.cameras
        self.state = processor.state_dim is not None
        self.forward_passes = 0
        self.seconds = 0.0

    def __call__(self, observations: Sequence[Observation], instructions: Sequence[str]) -> np.ndarray:
        """Predict the actions (B, A) or chunks (B, K, A) for observations and instructions."""
        start = time.perf_counter()
        inputs = self.processor(
            [self._images(one) for one in observations],
            instruction=list(instructions),
            state=np.stack([one[STATE] for one in observations]) if self.state else None,
        )
        details = self.model.predict_action(**inputs, unnorm_key=self.unnorm_key, return_details=True)
        self.seconds += time.perf_counter() - start
        self.forward_passes += details.forward_passes * len(observations)
        return details.actions if details.actions.ndim == 2 else details.actions[:, : self.execute]

    def _images(self, observation: Observation) -> Any:
        """Return the images in the order in which the processor takes them."""
        if self.cameras is None or not isinstance(observation, dict):
            return first_image(observation)
        return [observation[camera] for camera in self.cameras]


def model_policy(
    suite: Suite, model: Any, processor: Any, unnorm_key: str | None = None, *, is_trained_crop: bool = False
) -> ModelPolicy:
    """Make a model and its processor the policy of a suite.

    Args:
        suite: The suite to play.
        model: An `OpenVLAForActionPrediction`.
        processor: Its processor.
        unnorm_key: Name of the action statistics, if the model has several.
        is_trained_crop: Whether the processor is known to crop images as in training. Otherwise, a processor without a
            centre crop gets that of the protocol, in a copy.

    Raises:
        ValueError: The policy is for another robot, or takes cameras that the suite does not have, or the protocol
            executes more actions than the model predicts, or has another centre crop.
    """
    protocol, horizon = suite.protocol, model.config.action_horizon
    execute = protocol.execute
    if execute is not None and not 1 <= execute <= horizon:
        raise ValueError(
            f"execute={execute} is not between 1 and {horizon}, the number of actions that the model predicts."
        )
    stats = model.get_action_stats(unnorm_key)
    suite.check_policy(stats["q01"], stats["q99"])
    suite.check_cameras(processor.cameras or ())
    if processor.state_dim not in (None, suite.state_dim):
        raise ValueError(
            f"The policy sees a state of {processor.state_dim} dimensions, but that of {suite.title} has "
            f"{suite.state_dim}."
        )
    area, given = protocol.crop_area, processor.image_processor.center_crop_area
    if area is not None and given != area and not is_trained_crop:
        if given is not None:
            raise ValueError(
                f"The policy's processor crops images to {given:g} of their area, but the protocol of {suite.title} "
                f"to {area:g}, and no record of its training says otherwise. Set center_crop_area={area:g} in "
                "processor_config.json."
            )
        processor = _crop(processor, area)
        logger.warning(
            "The policy's processor has no centre crop, so images are cropped to %g of their area, as in the protocol "
            "of %s.",
            area,
            suite.title,
        )
    return ModelPolicy(model, processor, unnorm_key, execute)


def _crop(processor: Any, area: float) -> Any:
    """Copy a processor with a centre crop."""
    processor = copy.copy(processor)
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.center_crop_area = area
    return processor
