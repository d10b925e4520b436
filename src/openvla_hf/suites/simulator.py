"""Simulators: environments of a suite, in this process or in one of their own."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from .suite import Episode, Observation, Rollout, Suite, first_image


__all__ = ["Simulator", "SimulatorProcess", "open_simulators"]

# Longest list of kept frames; of longer episodes, every second, third ... frame is kept.
MOST_FRAMES = 160
# Seconds that a process of a simulator has to end by itself.
CLOSING_SECONDS = 5.0
# Many simulators draw their initial states from NumPy's global generator, which threads share: one starts at a time.
STARTING = threading.Lock()


@dataclass(frozen=True)
class View:
    """What a simulator shows: what the policy sees next, and the result if the episode has ended."""

    observation: Observation
    instruction: str
    result: Rollout | None


class Simulator:
    """Plays episodes of a suite one after the other, in this process.

    Args:
        suite: The suite, whose protocol is applied to observations and actions.
    """

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self._env: Any = None
        self._environment: str | None = None
        self._pending: tuple[Any, ...] = ()

    def start(self, episode: Episode, keep_frames: bool = False) -> None:
        """Start an episode; `view` gives its first observation."""
        self._pending = (self._start, episode, keep_frames)

    def act(self, actions: np.ndarray) -> None:
        """Execute an action (A,) or a chunk (K, A), up to the end of the episode; `view` gives the result."""
        self._pending = (self._act, actions)

    def view(self) -> View:
        """Carry out the last request, and return what the policy sees next."""
        run, *arguments = self._pending
        run(*arguments)
        return View(self._seen, self._rollout.instruction, self._rollout if self._done else None)

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _start(self, episode: Episode, keep_frames: bool) -> None:
        with STARTING:
            if self._environment != episode.environment:
                self.close()
                self._env, self._environment = self.suite.make(episode.environment), episode.environment
            observation, info = self._env.reset(seed=episode.seed, options=self.suite.reset_options())
        protocol = self.suite.protocol
        for _ in range(protocol.settle_steps):
            observation, _, _, _, info = self._env.step(np.array(protocol.settle_action))
        self._rollout = Rollout(episode.seed, info["task"], info["instruction"])
        self._done = False
        self._keep_every = -(-(protocol.max_steps + 1) // MOST_FRAMES) if keep_frames else None
        self._see(observation)

    def _act(self, actions: np.ndarray) -> None:
        protocol, rollout = self.suite.protocol, self._rollout
        rollout.predictions += 1
        for action in np.atleast_2d(actions)[: protocol.execute]:
            observation, _, terminated, truncated, info = self._env.step(protocol.execute_action(action))
            rollout.steps += 1
            rollout.success = bool(info["is_success"])
            self._done = terminated or truncated or rollout.success or rollout.steps >= protocol.max_steps
            self._see(observation)
            if self._done:
                rollout.moved_target = info.get("moved_the_target")
                rollout.moved_object = info.get("moved_object")
                return

    def _see(self, observation: Observation) -> None:
        self._seen = self.suite.show(observation)
        every = self._keep_every
        if every is not None and (self._done or self._rollout.steps % every == 0):
            self._rollout.frames.append(first_image(self._seen))


class SimulatorProcess:
    """A `Simulator` in a process of its own, so that several simulate at the same time."""

    def __init__(self, suite: Suite) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(suite, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, episode: Episode, keep_frames: bool = False) -> None:
        """Start an episode, as `Simulator.start` does, without waiting for it."""
        self._connection.send(("start", episode, keep_frames))

    def act(self, actions: np.ndarray) -> None:
        """Execute actions, as `Simulator.act` does, without waiting for it."""
        self._connection.send(("act", actions))

    def view(self) -> View:
        """Wait until the last request is carried out, and return what the policy sees next.

        Raises:
            OSError: The process ended.
        """
        try:
            result = self._connection.recv()
        except EOFError:
            self._process.join(CLOSING_SECONDS)
            raise OSError(
                f"The process of an environment ended with status {self._process.exitcode}. Run the command again to "
                "continue."
            ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        self._process.join(CLOSING_SECONDS)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(suite: Suite, connection: Connection) -> None:
    """Carry out the requests of a `SimulatorProcess` until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what happens after Ctrl-C
    simulator = Simulator(suite)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (request := connection.recv()) is not None:
            name, *arguments = request
            getattr(simulator, name)(*arguments)
            try:
                connection.send(simulator.view())
            except (ImportError, OSError, ValueError, TypeError, RuntimeError) as error:
                connection.send(error)
    simulator.close()


@contextmanager
def open_simulators(suite: Suite, count: int, processes: bool) -> Iterator[Sequence[Simulator | SimulatorProcess]]:
    """Open simulators of a suite, in this process or each in its own, and close them at the end."""
    kind = SimulatorProcess if processes else Simulator
    simulators: list[Any] = [kind(suite) for _ in range(count)]
    try:
        yield simulators
    finally:
        for simulator in simulators:
            simulator.close()
