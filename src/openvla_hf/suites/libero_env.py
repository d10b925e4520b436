"""LIBERO's tasks as Gymnasium environments."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import ExitStack, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data.rotations import quaternion_to_axis_angle
from .libero_states import read_states
from .suite import choose_renderer


choose_renderer()
MISSING = (
    'LIBERO is not installed: run `pip install "openvla-hf[libero]"` in a virtual environment of its own, since '
    "it needs old versions of other packages."
)
CONFIG_FILE = "config.yaml"


def write_config() -> None:
    """Write LIBERO's config with the folders of its package if there is none, since its import would ask for them.

    Raises:
        ImportError: LIBERO is not installed.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(MISSING, name="libero")
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if (folder / CONFIG_FILE).exists():
        return
    root = Path(spec.submodule_search_locations[0], "libero")
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bddl_files": "bddl_files", "init_states": "init_files", "assets": "assets", "datasets": "../datasets"}
    folders = {"benchmark_root": str(root), **{key: str(root / name) for key, name in names.items()}}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(folders), encoding="utf-8")


try:
    import gymnasium
    from gymnasium import spaces

    write_config()
    from libero.libero import get_assets_path, get_libero_path
    from libero.libero.benchmark import get_benchmark
    from libero.libero.envs.env_wrapper import ControlEnv, OffScreenRenderEnv
except ModuleNotFoundError as error:
    raise ImportError(MISSING, name=error.name) from error

ENVIRONMENT_SEED = 0
# Names of the policies' cameras -> names of LIBERO's.
CAMERAS = {"full_image": "agentview_image", "wrist_image": "robot0_eye_in_hand_image"}


class LiberoEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One task of a LIBERO suite.

    The action (7,) is a movement of the hand (position and axis-angle, scaled to [-1, 1]) and the gripper, -1 to open
    and 1 to close. The observation has `full_image` and `wrist_image`, uint8 (size, size, 3), upside down as LIBERO
    renders them, and `state`, float32 (8,): position, axis-angle and the two fingers. `info` has `is_success`.

    An initial state does not contain the places of the fixtures, such as a cabinet, which LIBERO draws at each reset.
    As in OpenVLA's evaluation, the episode from state i has draw i of an environment that was seeded once, with 0.

    Args:
        suite: Name of the suite, such as "libero_spatial".
        index: Number of the task.
        image_size: Pixels along a side.

    Raises:
        OSError: The assets of LIBERO are missing.
    """

    def __init__(self, suite: str, index: int, *, image_size: int = 256) -> None:
        # LIBERO prints while it chooses a task and downloads its assets, but standard output is for results.
        with redirect_stdout(sys.stderr):
            task = get_benchmark(suite)().get_task(index)
            assets = Path(get_assets_path())
        self.task, self.instruction = task.name, task.language
        if not (assets / "scenes").is_dir():
            raise OSError(
                "LIBERO's assets are missing: download the dataset repository lerobot/libero-assets from the Hub to "
                f"{get_libero_path('assets')}."
            )
        self._states = read_states(Path(get_libero_path("init_states"), task.problem_folder, task.init_states_file))
        self._file = str(Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file))
        self._env = OffScreenRenderEnv(bddl_file_name=self._file, camera_heights=image_size, camera_widths=image_size)
        self._copies = ExitStack()
        # States of NumPy's global generator before the draws computed so far.
        self._generators = [np.random.RandomState(ENVIRONMENT_SEED).get_state()]
        self.action_space = spaces.Box(-1.0, 1.0, (7,), dtype=np.float32)
        frame = spaces.Box(0, 255, (image_size, image_size, 3), dtype=np.uint8)
        self.observation_space: spaces.Space[Any] = spaces.Dict(
            {**dict.fromkeys(CAMERAS, frame), "state": spaces.Box(-np.inf, np.inf, (8,), dtype=np.float32)}
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode from the initial state whose number is `seed`. Options are not used.

        Raises:
            ValueError: The task has fewer initial states.
        """
        super().reset(seed=seed)
        number = 0 if seed is None else seed
        if number >= len(self._states):
            raise ValueError(
                f"The task {self.task!r} has {len(self._states)} initial states, so there is no state {number}."
            )
        outside = np.random.get_state()
        try:
            while len(self._generators) <= number:
                self._draw(self._without_images, len(self._generators) - 1)
            self._use_renderer()
            self._draw(self._env, number)
        finally:
            np.random.set_state(outside)
        return _observe(self._env.set_init_state(self._states[number])), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Execute one action (7,)."""
        self._use_renderer()
        observation, reward, done, _ = self._env.step(np.asarray(action).tolist())
        return _observe(observation), float(reward), bool(done), False, self._info(bool(done))

    def close(self) -> None:
        """Free the simulation."""
        self._copies.close()
        self._use_renderer()
        self._env.close()

    @property
    def problem(self) -> Any:
        """LIBERO's own environment, which knows the objects."""
        return self._env.env

    @cached_property
    def _without_images(self) -> Any:
        """The same task without cameras, whose reset draws the same places in a quarter of the time."""
        copy = ControlEnv(bddl_file_name=self._file, has_offscreen_renderer=False, use_camera_obs=False)
        self._copies.callback(copy.close)
        return copy

    def _use_renderer(self) -> None:
        """Make the OpenGL context of this environment current.

        robosuite leaves the last one current that was created, so environments of a process would render, and delete,
        one another's objects.
        """
        self.problem.sim._render_context_offscreen.gl_ctx.make_current()

    def _draw(self, env: Any, number: int) -> None:
        """Reset an environment with the places of a draw."""
        np.random.set_state(self._generators[number])
        env.reset()
        if number + 1 == len(self._generators):
            self._generators.append(np.random.get_state())

    def _info(self, success: bool) -> dict[str, Any]:
        return {"instruction": self.instruction, "task": self.task, "is_success": success}


def _observe(observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    state = [observation["robot0_eef_pos"], quaternion_to_axis_angle(observation["robot0_eef_quat"])]
    state.append(observation["robot0_gripper_qpos"])
    frames = {name: observation[source] for name, source in CAMERAS.items()}
    return {**frames, "state": np.concatenate(state).astype(np.float32)}
