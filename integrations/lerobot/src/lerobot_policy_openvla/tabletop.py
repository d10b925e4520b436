"""The simulated table of openvla-hf as an environment of LeRobot: `--env.type=openvla_tabletop`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from openvla_hf.tabletop.env import MAX_STEPS, TabletopEnv
from openvla_hf.tabletop.scene import IMAGE_SIZE, STATE_NAMES


ENV_ID = "lerobot_policy_openvla/Tabletop-v0"
ACTION_DIM = 7


class LeRobotTabletop(gymnasium.Env[dict[str, Any], np.ndarray]):
    """`TabletopEnv` with the observations and attributes that LeRobot expects.

    Args:
        tasks: Families of tasks.
        cameras: Cameras to observe, "image" and "wrist".
        state: Whether to observe the robot's state.
        render_mode: None or "rgb_array".
    """

    metadata = TabletopEnv.metadata

    def __init__(self, tasks: list[str], cameras: list[str], state: bool = False, render_mode: str | None = None):
        self._env = TabletopEnv(tasks, cameras=cameras, state=state, render_mode=render_mode)
        self.render_mode = render_mode
        self.action_space = self._env.action_space
        observed: Any = self._env.observation_space
        parts = dict(observed)
        state_space = {"agent_pos": parts.pop("state")} if state else {}
        self.observation_space = spaces.Dict({"pixels": spaces.Dict(parts), **state_space})
        self.task = self.task_description = ""

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode. LeRobot's options are ignored."""
        super().reset(seed=seed)
        observation, info = self._env.reset(seed=seed)
        self.task, self.task_description = info["task"], info["instruction"]
        return self._rename(observation), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action (7,)."""
        observation, reward, terminated, truncated, info = self._env.step(action)
        return self._rename(observation), reward, terminated, truncated, {"is_success": info["is_success"]}

    def render(self) -> np.ndarray | None:
        """Return the frame of the fixed camera."""
        return self._env.render()

    def _rename(self, observation: dict[str, Any]) -> dict[str, Any]:
        frames = {name: frame for name, frame in observation.items() if name != "state"}
        return {"pixels": frames} | ({"agent_pos": observation["state"]} if "state" in observation else {})


@EnvConfig.register_subclass("openvla_tabletop")
@dataclass
class TabletopEnvConfig(EnvConfig):
    """Configuration of the tabletop.

    Args:
        task: Families of tasks, separated by commas: "put", "push", "stack" and "lift".
        fps: Actions per second.
        cameras: Cameras to observe, "image" and "wrist".
        state: Whether to observe the robot's state.
    """

    task: str | None = "put,push"
    fps: int = 5
    cameras: list[str] = field(default_factory=lambda: ["image"])
    state: bool = False

    def __post_init__(self) -> None:
        frame = PolicyFeature(type=FeatureType.VISUAL, shape=(IMAGE_SIZE, IMAGE_SIZE, 3))
        self.features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_DIM,))}
        self.features_map = {"action": "action"}
        for camera in self.cameras:
            self.features[f"pixels/{camera}"] = frame
            self.features_map[f"pixels/{camera}"] = f"observation.images.{camera}"
        if self.state:
            self.features["agent_pos"] = PolicyFeature(type=FeatureType.STATE, shape=(len(STATE_NAMES),))
            self.features_map["agent_pos"] = "observation.state"

    @property
    def package_name(self) -> str:
        """Module that registers the environment with Gymnasium."""
        return __name__

    @property
    def gym_id(self) -> str:
        """Name of the environment in Gymnasium."""
        return ENV_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of the environment."""
        tasks = [task.strip() for task in (self.task or "").split(",")]
        return {"tasks": tasks, "cameras": self.cameras, "state": self.state, "render_mode": "rgb_array"}


gymnasium.register(ENV_ID, entry_point=f"{__name__}:LeRobotTabletop", max_episode_steps=MAX_STEPS)


__all__ = ["LeRobotTabletop", "TabletopEnvConfig"]
