"""Measure how often MetaWorld's experts solve the episodes of the suite, and how often their recorded actions do.

    python benchmarks/metaworld_experts.py --episodes 50

The expert of each task plays the episodes of the suite's protocol. Then its actions are played again through the
suite, open loop: a difference would mean that the suite's episodes or steps are not those of the expert. Rendering
is off, because neither the expert nor the replay needs images.
"""

import argparse
import json
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from openvla_hf.suites.demonstrations import record_episode
from openvla_hf.suites.metaworld import INSTRUCTIONS, MetaWorldSuite, metaworld_suite
from openvla_hf.suites.metaworld_env import MetaWorldEnv
from openvla_hf.suites.play import play
from openvla_hf.suites.results import wilson
from openvla_hf.suites.simulator import open_simulators


class Unseen(MetaWorldEnv):
    """A task whose images are empty."""

    def render(self):
        return np.zeros((1, 1, 3), dtype=np.uint8)


@dataclass(frozen=True)
class UnseenSuite(MetaWorldSuite):
    """MetaWorld without images."""

    def make(self, environment):
        return Unseen(environment, INSTRUCTIONS[environment])


def measure(task, episodes):
    """Return how many episodes of a task its expert solved, and how many its recorded actions solve."""
    preset = metaworld_suite()
    suite = UnseenSuite("metaworld", (task,), preset.protocol, preset.state_dim, preset.packages)
    suite = suite.with_protocol(episodes=episodes)
    env = suite.make(task)
    solved = replayed = 0
    with open_simulators(suite, 1, processes=False) as simulators:
        for episode in suite.episodes():
            frames, success = record_episode(env, episode.seed, noise=0.0)
            if not success:
                continue
            actions = np.stack([frame["action"] for frame in frames])[None]
            ((_, rollout),) = play(lambda seen, told, actions=actions: actions, [episode], simulators)
            solved += 1
            replayed += rollout.success
    env.close()
    return solved, replayed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50, help="episodes of each task")
    parser.add_argument("--task", nargs="+", default=["easy", "medium", "hard", "very_hard"], help="tasks or groups")
    parser.add_argument("--output", help="JSON file for the counts")
    args = parser.parse_args()
    counts = {}
    for task in metaworld_suite().select(args.task).environments:
        counts[task] = measure(task, args.episodes)
        print(task, *counts[task], flush=True)
        if args.output:
            with open(args.output, "w", encoding="utf-8") as file:
                json.dump({"episodes": args.episodes, "tasks": counts}, file)
    solved, replayed = np.sum(list(counts.values()), axis=0).tolist()
    table = Table("", "episodes", "success", "95 % interval", title="MetaWorld's experts")
    total = args.episodes * len(counts)
    for name, successes, among in (("experts", solved, total), ("replayed actions", replayed, solved)):
        low, high = wilson(successes, among)
        table.add_row(name, str(among), f"{successes / max(among, 1):.1%}", f"{low:.1%} to {high:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
