"""Episodes in simulation whose actions come from a server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

import numpy as np

from ..suites.play import play
from ..suites.simulator import Simulator, SimulatorProcess, open_simulators
from ..suites.suite import STATE, Episode, Observation, Rollout, Suite, first_image
from ..tabletop.suite import tabletop_suite
from .client import ONLY_CAMERA, Client, ClientSession


# What OpenVLA's policies give to open and to close the gripper.
OPEN, CLOSED = 1.0, 0.0


def check_server(info: dict[str, Any], unnorm_key: str | None = None, suite: Suite | None = None) -> None:
    """Raise `ValueError` if a server does not act for the robot of a suite.

    Args:
        info: Description of the server, as `Client.info` gives it.
        unnorm_key: Name of the statistics; `None` for the server's default.
        suite: The suite; `None` for the tabletop.
    """
    suite = tabletop_suite() if suite is None else suite
    key = info["default_unnorm_key"] if unnorm_key is None else unnorm_key
    if key not in info["action_bounds"]:
        known = ", ".join(map(repr, info["action_bounds"]))
        problem = "has no default statistics" if key is None else f"has no statistics {key!r}"
        raise ValueError(f"The server {problem}: give `unnorm_key=` with one of {known}.")
    gripper = info["gripper"]
    if (gripper["open"], gripper["closed"]) != (OPEN, CLOSED):
        raise ValueError(
            f"The server opens the gripper with {gripper['open']:g} and closes it with {gripper['closed']:g} "
            f"(convention {gripper['convention']!r}), but {suite.title} takes 1 to open and 0 to close. Serve the "
            "policy with the convention 'policy' or 'binary'."
        )
    suite.check_policy(**info["action_bounds"][key])
    names = [camera["name"] for camera in info["cameras"]]
    if names != [ONLY_CAMERA]:
        suite.check_cameras(names)
    if info["state_dim"] not in (None, suite.state_dim):
        raise ValueError(
            f"The server's policy sees a state of {info['state_dim']} dimensions, but that of {suite.title} has "
            f"{suite.state_dim}."
        )
    area = suite.protocol.crop_area
    is_cropped = all(camera["center_crop_area"] == area for camera in info["cameras"])
    if area is not None and not is_cropped and not info.get("training_recorded", False):
        raise ValueError(
            f"The protocol of {suite.title} crops images to {area:g} of their area, but the server does not. Set "
            f"center_crop_area={area:g} in the checkpoint's processor_config.json."
        )


def play_served(
    client: Client,
    suite: Suite,
    episodes: Iterable[Episode],
    simulators: Sequence[Simulator | SimulatorProcess],
    *,
    keep_frames: Callable[[Episode], bool] = lambda episode: False,
    unnorm_key: str | None = None,
) -> Iterator[tuple[Episode, Rollout]]:
    """Play episodes with the policy of a server, one in each simulator at a time, and yield each as it ends.

    Each episode is a robot with its own session. The server predicts for robots that act at the same time in batches.

    Args:
        client: Connection to the server.
        suite: The suite of the episodes.
        episodes: The episodes.
        simulators: Simulators of the suite.
        keep_frames: Whether to keep the frames of an episode, asked when it starts.
        unnorm_key: Name of the statistics; `None` for the server's default.

    Raises:
        ValueError: The server does not act for the robot of the suite.
        ServerError: The server gave no action.
    """
    check_server(client.info, unnorm_key, suite)
    cameras = [camera["name"] for camera in client.info["cameras"]]
    state = client.info["state_dim"] is not None
    is_over = threading.Event()  # nobody waits for the other episodes: one failed, or the caller has stopped
    # A simulator stays in its thread, because some renderers belong to the thread that made them.
    idle: SimpleQueue[Simulator | SimulatorProcess] = SimpleQueue()
    for simulator in simulators:
        idle.put(simulator)
    mine = threading.local()

    def take_simulator() -> None:
        mine.simulator = idle.get()

    def run(episode: Episode) -> tuple[Episode, Rollout]:
        with client.session() as session:

            def act(observations: Sequence[Any], instructions: Sequence[str]) -> np.ndarray:
                if is_over.is_set():
                    raise CancelledError
                return _ask(session, observations[0], instructions[0], cameras, state, unnorm_key)[None]

            (played,) = play(act, [episode], [mine.simulator], keep_frames)
            return played

    with ThreadPoolExecutor(len(simulators), initializer=take_simulator) as pool:
        futures = [pool.submit(run, episode) for episode in episodes]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            is_over.set()
            pool.shutdown(cancel_futures=True)


def _ask(
    session: ClientSession,
    seen: Observation,
    instruction: str,
    cameras: Sequence[str],
    state: bool,
    unnorm_key: str | None,
) -> np.ndarray:
    """Ask the server for the action or the chunk after an observation."""
    by_camera = seen if isinstance(seen, dict) else {ONLY_CAMERA: seen}
    images = {ONLY_CAMERA: first_image(seen)} if cameras == [ONLY_CAMERA] else {one: by_camera[one] for one in cameras}
    return session.predict_action(images, instruction, by_camera[STATE] if state else None, unnorm_key)


def run_served_episodes(
    client: Client,
    seeds: Iterable[int],
    *,
    tasks: Sequence[str] = ("put", "push"),
    condition: str = "as told",
    robots: int = 16,
    unnorm_key: str | None = None,
) -> Iterator[Rollout]:
    """Run one episode of the tabletop for each seed, and yield each as it ends.

    Args:
        client: Connection to the server.
        seeds: One seed for each episode.
        tasks: Families to draw from.
        condition: One of `CONDITIONS`.
        robots: Number of episodes that run at the same time.
        unnorm_key: Name of the statistics; `None` for the server's default.

    Raises:
        ValueError: The server does not act for the tabletop's robot, or an argument is unknown.
        ServerError: The server gave no action.
    """
    suite = tabletop_suite(families=tuple(tasks), condition=condition)
    with open_simulators(suite, robots, processes=False) as simulators:
        for _, rollout in play_served(client, suite, suite.episodes_of(seeds), simulators, unnorm_key=unnorm_key):
            yield rollout


__all__ = ["check_server", "play_served", "run_served_episodes"]
