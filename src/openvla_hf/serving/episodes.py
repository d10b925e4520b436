"""Tabletop episodes whose actions come from a server."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np

from ..tabletop.rollouts import Rollout, check_robot, run_episodes
from ..tabletop.scene import CAMERAS, STATE_NAMES
from .client import Client


TABLETOP_OPEN, TABLETOP_CLOSED = 1.0, 0.0


def check_server(info: dict[str, Any], unnorm_key: str | None = None) -> None:
    """Raise `ValueError` if a server, described by `Client.info`, does not act for the tabletop's robot."""
    key = info["default_unnorm_key"] if unnorm_key is None else unnorm_key
    if key not in info["action_bounds"]:
        known = ", ".join(map(repr, info["action_bounds"]))
        problem = "has no default statistics" if key is None else f"has no statistics {key!r}"
        raise ValueError(f"The server {problem}: give `unnorm_key=` with one of {known}.")
    gripper = info["gripper"]
    if (gripper["open"], gripper["closed"]) != (TABLETOP_OPEN, TABLETOP_CLOSED):
        raise ValueError(
            f"The server opens the gripper with {gripper['open']:g} and closes it with {gripper['closed']:g} "
            f"(convention {gripper['convention']!r}), but the tabletop's gripper opens with 1 and closes with 0. "
            "Serve the policy with the convention 'policy' or 'binary'."
        )
    check_robot(**info["action_bounds"][key])
    names = [camera["name"] for camera in info["cameras"]]
    if not set(names) <= set(CAMERAS):
        raise ValueError(
            f"The server's policy sees the cameras {', '.join(map(repr, names))}, but the tabletop's cameras are "
            f"{', '.join(map(repr, CAMERAS))}."
        )
    if info["state_dim"] not in (None, len(STATE_NAMES)):
        raise ValueError(
            f"The server's policy sees a state of {info['state_dim']} dimensions, but that of the tabletop has "
            f"{len(STATE_NAMES)}."
        )


def run_served_episodes(
    client: Client,
    seeds: Iterable[int],
    *,
    tasks: Sequence[str] = ("put", "push"),
    condition: str = "as told",
    robots: int = 16,
    unnorm_key: str | None = None,
) -> Iterator[Rollout]:
    """Run one episode for each seed, and yield them in order.

    Each episode is a robot with its own session. The server predicts for robots that act at the same time in
    batches.

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
    info = client.info
    check_server(info, unnorm_key)
    cameras = [camera["name"] for camera in info["cameras"]]
    state = info["state_dim"] is not None
    is_over = threading.Event()  # nobody waits for the other episodes: one failed, or the caller has stopped

    def run(seed: int) -> Rollout:
        with client.session() as session:

            def act(observations: Sequence[Any], instructions: Sequence[str]) -> np.ndarray:
                if is_over.is_set():
                    raise CancelledError
                (seen,), (instruction,) = observations, instructions
                images = {camera: seen[camera] for camera in cameras}
                return session.predict_action(images, instruction, seen.get("state"), unnorm_key)[None]

            (episode,) = run_episodes(
                act, [seed], tasks=tasks, condition=condition, batch_size=1, cameras=cameras, state=state
            )
            return episode

    with ThreadPoolExecutor(robots) as pool:
        try:
            yield from pool.map(run, seeds)
        finally:
            is_over.set()


__all__ = ["check_server", "run_served_episodes"]
