"""Play the episodes of a suite with a policy, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from .simulator import Simulator, SimulatorProcess
from .suite import Episode, Policy, Rollout


__all__ = ["play"]


def play(
    policy: Policy,
    episodes: Iterable[Episode],
    simulators: Sequence[Simulator | SimulatorProcess],
    keep_frames: Callable[[Episode], bool] = lambda episode: False,
) -> Iterator[tuple[Episode, Rollout]]:
    """Play episodes, one in each simulator at a time, and yield each as it ends.

    The policy predicts for all running episodes in one batch. A chunk is executed before the policy predicts again.

    Args:
        policy: Function from observations and instructions to actions.
        episodes: The episodes.
        simulators: Simulators of the suite, as `open_simulators` returns them.
        keep_frames: Whether to keep the frames of an episode, called when the episode starts.
    """
    waiting = deque(episodes)
    idle = list(simulators)
    running: dict[Simulator | SimulatorProcess, Episode] = {}
    while waiting or running:
        while waiting and idle:
            simulator, episode = idle.pop(), waiting.popleft()
            simulator.start(episode, keep_frames(episode))
            running[simulator] = episode
        views = {simulator: simulator.view() for simulator in running}
        for simulator, view in views.items():
            if view.result is not None:
                idle.append(simulator)
                yield running.pop(simulator), view.result
        acting = {simulator: views[simulator] for simulator in running}
        if acting:
            seen, instructions = zip(*((view.observation, view.instruction) for view in acting.values()), strict=True)
            for simulator, actions in zip(acting, policy(seen, instructions), strict=True):
                simulator.act(actions)
