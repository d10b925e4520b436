"""Solve tasks of libero_object with a scripted expert, and play its recorded actions again through the suite.

    python benchmarks/libero_replay.py --task 0 1 2

The expert knows where the objects are. It picks up the one that the instruction names and lets it fall into the
basket. Then its actions are played again, open loop: a difference would mean that the suite's initial states or steps
are not those of LIBERO's environment. Run this in the environment that has LIBERO; see docs/evaluation.md.
"""

import argparse
import json
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from openvla_hf.suites.libero import WAIT, libero_suite
from openvla_hf.suites.play import play
from openvla_hf.suites.simulator import open_simulators


METRES = 0.05  # movement of the hand's target for an action of 1
OPEN, CLOSED = -1.0, 1.0
HOVER, DROP = 0.12, 0.18  # metres above the object, and above the basket
NEAR = 0.012  # metres
GRASP_STEPS, RELEASE_STEPS = 12, 15


def stages(problem) -> Iterator[tuple[str, np.ndarray, float, int]]:
    """Yield the expert's stages: an object to go to, the offset from it, the gripper, and the steps to wait there."""
    thing, basket = problem.obj_of_interest
    yield thing, np.array([0.0, 0.0, HOVER]), OPEN, 0
    yield thing, np.zeros(3), OPEN, 0
    yield thing, np.zeros(3), CLOSED, GRASP_STEPS
    yield "", np.array([0.0, 0.0, HOVER + DROP]), CLOSED, 0
    yield basket, np.array([0.0, 0.0, HOVER + DROP]), CLOSED, 0
    yield basket, np.array([0.0, 0.0, DROP]), CLOSED, 0
    yield basket, np.array([0.0, 0.0, DROP]), OPEN, RELEASE_STEPS


def solve(suite, episode) -> tuple[np.ndarray, bool]:
    """Play an episode with the expert. Return its actions (T, 7) in LIBERO's convention, and whether it succeeded."""
    env = suite.make(episode.environment)
    env.reset(seed=episode.seed)
    problem = env.problem
    actions: list[np.ndarray] = []
    success = False
    for _ in range(suite.protocol.settle_steps):
        seen, *_ = env.step(np.array(WAIT))
    for name, offset, gripper, wait in stages(problem):
        start = problem.sim.data.body_xpos[problem.obj_body_id[name]] if name else seen["state"][:3]
        goal = start + offset
        for step in range(60):
            error = goal - seen["state"][:3]
            if step >= wait and (wait or np.abs(error).max() < NEAR):
                break
            move = np.clip(error / METRES, -1, 1)
            actions.append(np.array([*move, 0.0, 0.0, 0.0, gripper]))
            seen, *_, info = env.step(actions[-1])
            success = info["is_success"]
            if success or len(actions) == suite.protocol.max_steps:
                env.close()
                return np.stack(actions), success
    env.close()
    return np.stack(actions), success


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=[str(number) for number in range(10)], help="numbers of tasks")
    parser.add_argument("--episodes", type=int, default=1, help="episodes of each task")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    suite = libero_suite("libero_object").select(args.task).with_protocol(episodes=args.episodes)
    table = Table("task", "episode", "steps", "expert", "replayed actions", title="libero_object")
    rows = []
    with open_simulators(suite, 1, processes=False) as simulators:
        for episode in suite.episodes():
            actions, success = solve(suite, episode)
            # Policies predict an opening from 0 to 1.
            opening = (1 - actions[:, -1:]) / 2
            chunk = np.concatenate([actions[:, :-1], opening], axis=1)[None]
            ((_, rollout),) = play(lambda seen, told, chunk=chunk: chunk, [episode], simulators)
            rows.append((rollout.instruction, episode.seed, len(actions), success, rollout.success))
            print(json.dumps(rows[-1]), flush=True)
            table.add_row(*map(str, rows[-1]))
    if not args.json:
        Console().print(table)


if __name__ == "__main__":
    main()
