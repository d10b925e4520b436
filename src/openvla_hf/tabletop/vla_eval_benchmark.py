"""The tabletop as a benchmark of vla-eval, the evaluation harness:

    benchmarks:
      - benchmark: "openvla_hf.tabletop.vla_eval_benchmark:TabletopBenchmark"

Importing this module needs the packages `vla-eval` and `gymnasium`.
"""

from collections.abc import Mapping
from typing import Any

from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import GRIPPER_01, IMAGE_RGB, LANGUAGE, POSITION_DELTA, ROTATION_EULER_ACCEPTS_AA, DimSpec

from .env import MAX_STEPS, TabletopEnv
from .rollouts import FIRST_UNSEEN_SEED


class TabletopBenchmark(StepBenchmark):
    """Put and push coloured objects on the simulated table.

    Args:
        seed: Seed of the first episode of each task; the others follow.
        tasks: Families of tasks, see `TabletopEnv`.
        send_wrist_image: Whether to send the image of the camera at the hand, as "wrist".
        send_state: Whether to send the state of the robot.
    """

    render_backends = frozenset({"cpu", "gpu"})  # draws without a renderer

    def __init__(
        self,
        seed: int = FIRST_UNSEEN_SEED,
        tasks: tuple[str, ...] = ("put", "push"),
        send_wrist_image: bool = False,
        send_state: bool = False,
    ):
        super().__init__()
        self.seed, self.tasks = seed, tuple(tasks)
        cameras = ("image", "wrist") if send_wrist_image else ("image",)
        self._env = TabletopEnv(self.tasks, cameras=cameras, state=send_state)

    @classmethod
    def configure_render(cls, mode: str) -> dict[str, str]:
        """Return no variables: the frames are drawn in NumPy."""
        return {}

    def get_tasks(self) -> list[dict[str, Any]]:
        """List the families of tasks."""
        return [{"name": name} for name in self.tasks]

    def reset(self, task: Mapping[str, Any]) -> Any:
        """Start the episode of a task with the seed of its number."""
        observation, self._info = self._env.reset(
            seed=self.seed + task.get("episode_idx", 0), options={"task": task["name"]}
        )
        return observation

    def step(self, action: Mapping[str, Any]) -> StepResult:
        """Execute one action (7,)."""
        observation, reward, terminated, truncated, info = self._env.step(action["actions"])
        return StepResult(observation, reward, terminated or truncated, info)

    def make_obs(self, raw_obs: Any, task: Mapping[str, Any]) -> dict[str, Any]:
        """Name the images, the instruction and the state as vla-eval does."""
        images = {name: image for name, image in raw_obs.items() if name != "state"}
        sent = {"images": images, "task_description": self._info["instruction"]}
        return sent | ({"states": raw_obs["state"]} if "state" in raw_obs else {})

    def get_step_result(self, step_result: StepResult) -> dict[str, bool]:
        """Return whether the episode succeeded."""
        return {"success": bool(step_result.info.get("is_success", False))}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Describe the actions. Rotations are ignored."""
        return {"position": POSITION_DELTA, "rotation": ROTATION_EULER_ACCEPTS_AA, "gripper": GRIPPER_01}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Describe the observations."""
        return {"image": IMAGE_RGB, "language": LANGUAGE}

    def get_metadata(self) -> dict[str, int]:
        """Return the largest number of steps."""
        return {"max_steps": MAX_STEPS}


__all__ = ["TabletopBenchmark"]
