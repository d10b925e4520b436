"""MetaWorld's tasks as Gymnasium environments with an image, an instruction and a scripted expert."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np

from .suite import choose_renderer


choose_renderer()
try:
    import gymnasium
    import metaworld
    import mujoco
    from gymnasium import spaces
    from metaworld.policies import ENV_POLICY_MAP
except ModuleNotFoundError as error:
    raise ImportError(
        'MetaWorld is not installed: run `pip install "openvla-hf[metaworld]"`.', name=error.name
    ) from error
except (AttributeError, OSError) as error:
    raise ImportError(
        "MuJoCo cannot render: install OSMesa (`apt-get install libosmesa6`), or set MUJOCO_GL=egl on a machine with "
        "a GPU."
    ) from error

# Each benchmark of one task has this many initial states.
INITIAL_STATES = 50
# The camera "corner2", closer to the table than MetaWorld puts it, as in LeRobot's environment.
CAMERA, CAMERA_POSITION = "corner2", (0.75, 0.075, 0.7)


class MetaWorldEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One task of MetaWorld, seen by a camera.

    The action (4,) in [-1, 1] moves the hand by up to 1 cm along x, y and z, and closes (1) or opens (-1) the gripper.
    The observation has `image`, uint8 (size, size, 3), and `state`, float32 (4,): position of the hand in metres, and
    opening of the gripper from 0 to 1. `info` has `is_success`. An episode ends with the first success, or after
    MetaWorld's 500 steps.

    Shadows, reflections and antialiasing are off, which makes software rendering ten times as fast.

    Args:
        task: Name of the task, such as "drawer-open-v3".
        instruction: The task in words, returned in `info`.
        image_size: Pixels along a side.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(self, task: str, instruction: str, *, image_size: int = 224) -> None:
        self.task, self.instruction = task, instruction
        self.render_mode = "rgb_array"
        self.action_space = spaces.Box(-1.0, 1.0, (4,), dtype=np.float32)
        self.observation_space: spaces.Space[Any] = spaces.Dict(
            image=spaces.Box(0, 255, (image_size, image_size, 3), dtype=np.uint8),
            state=spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32),
        )
        self._env = metaworld.ALL_V3_ENVIRONMENTS[task]()
        model = self._env.model
        model.camera(CAMERA).pos[:] = CAMERA_POSITION
        model.vis.quality.offsamples = 0
        self._renderer = mujoco.Renderer(model, image_size, image_size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False
        self._expert = ENV_POLICY_MAP[task]()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode from one of the task's initial states.

        A seed is the number of an initial state: seeds from 0 to 49 are the states of the benchmark with seed 0, from
        50 to 99 those of the benchmark with seed 1, and so on. Options are not used.
        """
        super().reset(seed=seed)
        block, index = divmod(0 if seed is None else seed, INITIAL_STATES)
        self._env.set_task(initial_states(self.task, block)[index])
        self._numbers, _ = self._env.reset()
        return self._observe(), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute one action (4,), clipped to [-1, 1]."""
        clipped = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        self._numbers, reward, _, truncated, info = self._env.step(clipped)
        success = bool(info["success"])
        return self._observe(), float(reward), success, truncated, self._info(success)

    def expert_action(self) -> np.ndarray:
        """Return the action of MetaWorld's scripted expert, float32 (4,), in [-1, 1]."""
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about the clipping
            action = self._expert.get_action(self._numbers)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def render(self) -> np.ndarray:
        """Render the scene, uint8 (size, size, 3). The camera hangs upside down, so its image is rotated."""
        self._renderer.update_scene(self._env.data, CAMERA)
        return np.ascontiguousarray(self._renderer.render()[::-1, ::-1])

    def close(self) -> None:
        """Free the renderer."""
        # MuJoCo would delete the textures of another environment if that one had rendered last.
        self._renderer.render()
        self._renderer.close()
        self._env.close()

    def _observe(self) -> dict[str, np.ndarray]:
        return {"image": self.render(), "state": self._numbers[:4].astype(np.float32)}

    def _info(self, success: bool) -> dict[str, Any]:
        return {"instruction": self.instruction, "task": self.task, "is_success": success}


@lru_cache(maxsize=64)
def initial_states(task: str, seed: int) -> list[Any]:
    """Return the 50 initial states of MetaWorld's benchmark of one task (MT1) with a seed."""
    return metaworld.MT1(task, seed=seed).train_tasks
