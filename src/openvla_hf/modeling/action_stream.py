"""Control loops of a robot, in which actions build on earlier predictions.

Shapes: B batch (robots that act in step), T tokens, K actions of a chunk, A action dimensions, S state dimensions.
"""

import math
from collections.abc import Sequence
from copy import copy
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .model_inputs import as_tensor


# Decoding arguments of a model that decodes in parallel.
DECODING = {"constrained", "initial_noise", "num_inference_steps"}


class ActionStream:
    """Control loop of a robot, in which the tokens of the last action are a draft of the next one.

    The actions equal those of `predict_action` and take fewer passes, since a robot's next action resembles its last.
    A batch is a group of robots that act in step.

    Example:
        ```python
        stream = model.action_stream("bridge_orig")
        for frame in camera:
            robot.step(stream.predict_action(**processor(frame, instruction=instruction)))
        stream.reset()  # a new episode
        ```

    Attributes:
        token_ids: (B, A) of the last action, or `None` at the start of an episode.
        forward_passes: Number of passes of the language model for the last action.
    """

    def __init__(self, model: PreTrainedModel, unnorm_key: str | list[str] | None = None):
        self.model, self.unnorm_key = model, unnorm_key
        self.reset()

    def reset(self) -> None:
        """Start an episode: forget the last action."""
        self.token_ids: np.ndarray | None = None
        self.forward_passes = 0

    def predict_action(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | list[str] | None = None,
        *,
        state: torch.Tensor | np.ndarray | None = None,
        return_details: bool = False,
    ) -> Any:
        """Predict like `OpenVLAForActionPrediction.predict_action`; `unnorm_key` defaults to the stream's own."""
        input_ids = as_tensor("input_ids", input_ids)
        draft = self.token_ids
        if draft is not None and input_ids.shape[:1] != (len(draft),):  # another number of robots
            draft = None
        details = self.model.predict_action(
            input_ids,
            pixel_values,
            attention_mask,
            self.unnorm_key if unnorm_key is None else unnorm_key,
            state=state,
            draft_token_ids=draft,
            return_details=True,
        )
        self.token_ids, self.forward_passes = details.token_ids, details.forward_passes
        if return_details:
            return details
        return details.actions[0] if len(details.actions) == 1 else details.actions


class ChunkStream:
    """Control loop of a robot whose model predicts chunks of actions, which the stream plays one by one.

    Most steps replay a chunk and need no observation. Such a step ignores images and state. If the prompt, the
    `unnorm_key` or the number of robots changes, the stream discards its chunks and predicts a new one. A batch is a
    group of robots that act in step.

    Temporal ensembling (ACT) averages the predictions of all chunks for the current step. The i-th oldest of them,
    counted from 0, has a weight proportional to `exp(-ensemble * i)`: at 0 all weights are equal, and a higher decay
    trusts older predictions more.

    Example:
        ```python
        stream = model.action_stream("libero_spatial_no_noops", execute=4)
        while not done:
            if stream.needs_observation:
                inputs = processor(camera.read(), instruction=instruction, state=robot.state())
                robot.step(stream.predict_action(**inputs))
            else:
                robot.step(stream.predict_action())
        stream.reset()  # a new episode
        ```

    Args:
        model: The policy.
        unnorm_key: As in `predict_action`.
        execute: Number of actions to play before the next prediction; by default K, or 1 with `ensemble`.
        ensemble: Decay of the weights in temporal ensembling, at least 0; `None` for no ensembling.

    Attributes:
        needs_observation: Whether the next step predicts a chunk.
        forward_passes: Number of passes of the language model for the last action; 0 for a replayed one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        unnorm_key: str | list[str] | None = None,
        execute: int | None = None,
        ensemble: float | None = None,
    ):
        horizon = model.config.action_horizon
        if execute is None:
            execute = horizon if ensemble is None else 1
        if not isinstance(execute, int) or isinstance(execute, bool) or not 1 <= execute <= horizon:
            raise ValueError(
                f"`execute` must be an integer from 1 to {horizon} (the actions of a chunk), got {execute!r}."
            )
        if ensemble is not None:
            is_number = isinstance(ensemble, Real) and not isinstance(ensemble, bool)
            if not is_number or not 0 <= ensemble < math.inf:
                raise ValueError(f"`ensemble` must be a finite number of at least 0, got {ensemble!r}.")
        self.model, self.unnorm_key = model, unnorm_key
        self.horizon, self.execute, self.ensemble = horizon, execute, ensemble
        self.reset()

    def reset(self) -> None:
        """Start an episode: forget all chunks."""
        self._chunks: list[np.ndarray] = []  # oldest first, each (B, remaining steps, A)
        self._prompts: torch.Tensor | None = None  # (B, T) of the last prediction, like the key
        self._key: str | list[str] | None = None
        self._played = 0  # steps since the last prediction
        self.forward_passes = 0

    @property
    def needs_observation(self) -> bool:
        """Whether the next step predicts a chunk."""
        return not self._chunks or self._played >= self.execute

    def predict_action(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | list[str] | None = None,
        *,
        state: torch.Tensor | np.ndarray | None = None,
        **decoding: Any,
    ) -> np.ndarray:
        """Return the action of the next step, float64 (A,) or (B, A), in the robot's units.

        Args:
            input_ids: As in `OpenVLAForActionPrediction.predict_action`, like the other inputs. All may be left out
                unless `needs_observation` is true.
            pixel_values: (B, 3 * towers * images, H, W).
            attention_mask: (B, T).
            unnorm_key: Defaults to the stream's own.
            state: (B, S) or (S,) in the robot's units.
            decoding: `constrained`, `initial_noise` and `num_inference_steps`.

        Raises:
            ValueError: A needed observation is missing, an argument is unknown, or an input does not fit the model.
        """
        if unknown := sorted(decoding.keys() - DECODING):
            raise ValueError(
                f"A stream of chunks does not take `{unknown[0]}`: leave it out, or call the model's `predict_action`."
            )
        if input_ids is not None:
            input_ids = as_tensor("input_ids", input_ids)
        key = self.unnorm_key if unnorm_key is None else unnorm_key
        is_named = input_ids is not None or unnorm_key is not None  # otherwise the task stays the same
        if is_named and self._is_other_task(input_ids, key):
            self.reset()
        self.forward_passes = 0
        if self.needs_observation:
            if input_ids is None or pixel_values is None:
                raise ValueError("This step predicts a new chunk: pass the processor's output for the observation.")
            details = self.model.predict_action(
                input_ids, pixel_values, attention_mask, key, state=state, return_details=True, **decoding
            )
            self._prompts, self._key = input_ids.cpu().clone(), copy(key)
            self.forward_passes, self._played = details.forward_passes, 0
            self._chunks = [*(self._chunks if self.ensemble is not None else []), details.actions]
        action = average_chunks(self._chunks, self.ensemble) if self.ensemble is not None else self._chunks[-1][:, 0]
        self._played += 1
        self._chunks = drop_first_step(self._chunks)
        return action[0] if len(action) == 1 else action

    def _is_other_task(self, input_ids: torch.Tensor | None, key: str | list[str] | None) -> bool:
        """Whether the prompts (B, T), if given, or the key differ from those of the last prediction."""
        if self._prompts is None:
            return False
        if key != self._key or input_ids is None:
            return key != self._key
        return input_ids.shape != self._prompts.shape or bool((input_ids.cpu() != self._prompts).any())


def average_chunks(chunks: Sequence[np.ndarray], decay: float) -> np.ndarray:
    """Average the predictions of chunks (..., K, A), oldest first, for their first step (temporal ensembling).

    The i-th oldest chunk has a weight proportional to `exp(-decay * i)`.
    """
    return np.average([chunk[..., 0, :] for chunk in chunks], axis=0, weights=np.exp(-decay * np.arange(len(chunks))))


def drop_first_step(chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Remove the first step of chunks (..., K, A), and chunks that have no other step."""
    return [chunk[..., 1:, :] for chunk in chunks if chunk.shape[-2] > 1]


__all__ = ["ActionStream", "ChunkStream", "average_chunks", "drop_first_step"]
