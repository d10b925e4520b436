"""A model server for vla-eval, the evaluation harness, with the same policy as the other protocols:

    python -m openvla_hf.serving.vla_eval_server --args.model openvla/openvla-7b --args.unnorm_key bridge_orig

Importing this module needs the package `vla-eval`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import run_server
from vla_eval.specs import (
    GRIPPER_01,
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    ROTATION_EULER,
    DimSpec,
)

from ..tabletop.rollouts import TABLETOP_POLICY
from .policy import Observation, ServedPolicy, Session


MAIN_CAMERA = ("agentview", "primary", "front", "image")
CAMERA_NAMES = {"image": MAIN_CAMERA, "full_image": MAIN_CAMERA, "wrist_image": ("wrist",)}
"""Camera of a policy -> names that vla-eval's benchmarks give it."""
STATES = ("states", "state")
ROTATIONS = {"axis_angle": ROTATION_AA, "euler_xyz": ROTATION_EULER}
GRIPPER_SPECS = {"policy": GRIPPER_01, "binary": GRIPPER_01, "libero": GRIPPER_CLOSE_POS}
"""Convention of the gripper -> how vla-eval describes it."""
ARM_DIM = 7


class OpenVLAModelServer(PredictModelServer):
    """OpenVLA or OpenVLA-OFT behind vla-eval's protocol.

    Each environment has its own session, and observations of several environments are predicted in one batch. A policy
    that predicts chunks predicts again when the benchmark has executed the last chunk.

    Args:
        model: Folder or Hub id of a checkpoint or an adapter. By default, the tabletop policy of this package.
        unnorm_key: Name of the statistics; may be left out if the model has one.
        gripper: Convention of the gripper: "policy" (1 open, 0 closed), "binary" (the same, rounded) or "libero" (-1
            open, 1 closed).
        execute: Number of actions of a chunk to execute; all by default.
        ensemble: Decay of temporal ensembling, with which the policy predicts at each step.
        cameras: Camera of the policy -> name of the benchmark's camera. Not needed for the usual names, nor if both
            have a single camera.
        rotation: Rotations of the policy's actions, which vla-eval compares with the benchmark's: "axis_angle" or
            "euler_xyz".
        observation_params: Parameters of the benchmark that vla-eval sets unless its config does, besides those that
            request the wrist camera and the state.
        dtype: Data type of the weights; that of the checkpoint by default.
        device: Device, such as "cuda"; the CPU by default.
        revision: Branch, tag or commit of a Hub id.
        platform: Robot of a published OpenVLA-OFT checkpoint.
        max_batch_size: Largest number of observations in a batch.
        harness: Other arguments of vla-eval's `PredictModelServer`, such as `max_wait_time`.

    Raises:
        ValueError: An argument does not fit the policy.
    """

    def __init__(
        self,
        model: str = str(TABLETOP_POLICY),
        unnorm_key: str | None = None,
        *,
        gripper: str = "policy",
        execute: int | None = None,
        ensemble: float | None = None,
        cameras: dict[str, str] | None = None,
        rotation: str = "axis_angle",
        observation_params: dict[str, Any] | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        platform: str | None = None,
        max_batch_size: int = 8,
        **harness: Any,
    ):
        if rotation not in ROTATIONS:
            raise ValueError(f"Unknown rotation {rotation!r}: give one of {', '.join(ROTATIONS)}.")
        self.policy = ServedPolicy.load(
            model,
            revision=revision,
            dtype=dtype,
            device=device,
            loading=None if platform is None else {"platform": platform},
            unnorm_key=unnorm_key,
            gripper=gripper,
            execute=execute,
            ensemble=ensemble,
        )
        super().__init__(chunk_size=self.policy.execute, max_batch_size=max_batch_size, **harness)
        self.rotation = rotation
        self.observation_params = observation_params or {}
        self._cameras = dict(cameras or {})
        for camera in self._cameras:
            if camera not in self.policy.cameras:
                known = ", ".join(map(repr, self.policy.cameras))
                raise ValueError(f"This policy has no camera {camera!r}: its cameras are {known}.")
        self._sessions: dict[str, Session] = {}

    def get_observation_params(self) -> dict[str, Any]:
        """Return the parameters that make a benchmark send what the policy sees."""
        params: dict[str, Any] = {}
        if len(self.policy.cameras) > 1:
            params["send_wrist_image"] = True
        if self.policy.state_dim is not None:
            # The second one keeps the rotations of LIBERO's states as the simulator gives them, as in training.
            params |= {"send_state": True, "quat_no_antipodal": True}
        return params | self.observation_params

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Describe the actions."""
        dims = self.policy.describe()["action_dim"]
        if dims != ARM_DIM:
            return {"actions": DimSpec("actions", dims, "raw")}
        gripper = GRIPPER_SPECS[self.policy.gripper_name]
        return {"position": POSITION_DELTA, "rotation": ROTATIONS[self.rotation], "gripper": gripper}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Describe the observations."""
        return {"image": IMAGE_RGB, "language": LANGUAGE}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Start an episode in a new session."""
        await super().on_episode_start(config, ctx)
        self._sessions[ctx.session_id] = self.policy.open_session()

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Forget the session of an episode."""
        await super().on_episode_end(result, ctx)
        self._sessions.pop(ctx.session_id, None)

    def predict_batch(
        self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]
    ) -> list[dict[str, np.ndarray]]:
        """Predict the actions (n, A) to execute after each observation.

        Raises:
            ValueError: An observation does not fit the policy, or was sent before the start of an episode.
        """
        sessions = [self._find_session(ctx) for ctx in ctx_batch]
        observations = [
            session.observe(self.read(observation)) for session, observation in zip(sessions, obs_batch, strict=True)
        ]
        predictions = self.policy.predict([self.policy.prepare(one) for one in observations])
        return [
            {"actions": session.receive(prediction)} for session, prediction in zip(sessions, predictions, strict=True)
        ]

    def _find_session(self, ctx: SessionContext) -> Session:
        if ctx.session_id not in self._sessions:
            raise ValueError("Got an observation before the start of an episode: send `episode_start` first.")
        return self._sessions[ctx.session_id]

    def read(self, observation: Mapping[str, Any]) -> Observation:
        """Read an observation of a benchmark: `images`, `task_description` and maybe `states` or `state`.

        Raises:
            ValueError: An image, the state or the instruction is missing.
        """
        images = observation.get("images") or {}
        if not observation.get("task_description"):
            raise ValueError("The observation has no 'task_description', which is the policy's instruction.")
        state = None
        if self.policy.state_dim is not None:
            found = [observation[name] for name in STATES if observation.get(name) is not None]
            if not found:
                raise ValueError(
                    f"The observation has no state, but the policy needs one of {self.policy.state_dim} dimensions: "
                    "configure the benchmark to send the state."
                )
            state = np.asarray(found[0], dtype=np.float64)
        seen = {camera: images[self._find_camera(camera, images)] for camera in self.policy.cameras}
        return Observation(seen, observation["task_description"], state)

    def _find_camera(self, camera: str, images: Mapping[str, Any]) -> str:
        """Return the benchmark's name for one of the policy's cameras."""
        if camera in self._cameras:
            names: tuple[str, ...] = (self._cameras[camera],)
        elif len(images) == len(self.policy.cameras) == 1:
            names = tuple(images)
        else:
            names = (camera, *CAMERA_NAMES.get(camera, ()))
        found = [name for name in dict.fromkeys(names) if name in images]
        if len(found) != 1:
            problem = "no image" if not found else f"the images {' and '.join(map(repr, found))}"
            raise ValueError(
                f"The observation has {problem} for the policy's camera {camera!r}; its images are "
                f"{', '.join(map(repr, images)) or 'none'}. Name the image with `cameras`."
            )
        return found[0]


__all__ = ["OpenVLAModelServer"]


if __name__ == "__main__":
    run_server(OpenVLAModelServer)
