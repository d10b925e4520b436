"""Evaluate a policy on a suite: episodes that continue after an interruption, pictures, and `evaluation.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..modeling.folder_writing import written_whole
from ..modeling.known_names import check_name
from ..suites.journal import Journal, describe_differences, read_journal
from ..suites.libero import LIBERO_SUITES, libero_suite
from ..suites.metaworld import metaworld_suite
from ..suites.results import Comparison, compare_results, success_by_task
from ..suites.suite import Episode, Rollout, Suite
from ..tabletop.pictures import save_gif
from ..tabletop.suite import tabletop_suite


__all__ = ["SUITES", "Evaluation", "compare_runs", "find_suite"]

# Name -> function that makes the suite with its preset.
SUITES: dict[str, Callable[[], Suite]] = {
    "tabletop": tabletop_suite,
    "metaworld": metaworld_suite,
    **{name: partial(libero_suite, name) for name in LIBERO_SUITES},
}
RESULT_FILE = "evaluation.json"
PICTURES = "episodes"
# What two runs must share so that their episodes with the same seeds are the same.
SAME = ("suite", "condition", "tasks", "protocol", "renderer", "versions")
# Pictures per second: many episodes have hundreds of steps.
SPEED = 20

# Function from episodes, and whether to keep the frames of each, to the episodes and their results as they end.
Player = Callable[[list[Episode], Callable[[Episode], bool]], Iterator[tuple[Episode, Rollout]]]


def find_suite(name: str) -> Suite:
    """Return the suite of a name, with its preset.

    Raises:
        ValueError: The name is unknown.
    """
    check_name(name, SUITES, "suite")
    return SUITES[name]()


class Evaluation:
    """The episodes of one policy on one suite, kept in a folder.

    The folder has `episodes.jsonl`, to which each episode is appended when it ends, `evaluation.json` once all have
    ended, and pictures of the first failures and successes. A second run with the same folder plays what is missing.

    Args:
        suite: The suite.
        policy: Description of the policy in JSON types: its name (`model`), and how it is run.
        folder: Folder of the evaluation.
        pictures: Number of failures and of successes to show.

    Raises:
        ValueError: The folder has the episodes of another run.
        ImportError: A package of the suite is not installed.
    """

    def __init__(self, suite: Suite, policy: dict[str, Any], folder: str | os.PathLike, pictures: int = 3) -> None:
        self.suite, self.folder, self.pictures = suite, Path(folder), pictures
        self.run = {**policy, **suite.describe(), "versions": suite.versions()}
        self.journal = Journal(folder, self.run)

    @property
    def rollouts(self) -> list[Rollout]:
        """The episodes that have ended, in the order of the protocol."""
        known = self.journal.rollouts
        return [known[episode] for episode in self.suite.episodes() if episode in known]

    @property
    def missing(self) -> list[Episode]:
        """The episodes that have not ended yet."""
        return [episode for episode in self.suite.episodes() if episode not in self.journal.rollouts]

    def play(self, player: Player) -> Iterator[Rollout]:
        """Play the missing episodes and yield each as it ends."""
        if not self.missing:
            return
        for episode, rollout in player(self.missing, lambda episode: bool(self._wanted())):
            self._show(episode, rollout)
            self.journal.add(episode, rollout)
            yield rollout

    def result(self) -> dict[str, Any]:
        """Write `evaluation.json` and return its content."""
        results = {self.run.get("condition", "as told"): success_by_task(self.rollouts)}
        result = {**self.run, "environment": self.suite.name, "results": results}
        with written_whole(self.folder) as aside:
            (aside / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    def _wanted(self) -> set[str]:
        """Return the outcomes of which too few pictures exist."""
        folder = self.folder / PICTURES
        return {kind for kind in ("failure", "success") if len(list(folder.glob(f"{kind}-*"))) < self.pictures}

    def _show(self, episode: Episode, rollout: Rollout) -> None:
        kind = "success" if rollout.success else "failure"
        if rollout.frames and kind in self._wanted():
            name = f"{kind}-{episode.environment}-{episode.seed}.gif"
            with written_whole(self.folder / PICTURES) as aside:
                save_gif([rollout], aside / name, columns=1, frames_per_second=SPEED)


def compare_runs(first: str | os.PathLike, second: str | os.PathLike) -> tuple[tuple[str, str], dict[str, Comparison]]:
    """Compare the policies of two evaluations, given by their folders, on the same episodes.

    Returns:
        The names of the policies, and for each task and "all" the comparison.

    Raises:
        FileNotFoundError: A folder has no evaluation.
        ValueError: The evaluations have different suites, protocols or versions, or different episodes.
    """
    (run, rollouts), (other, others) = read_journal(first), read_journal(second)
    if different := describe_differences(run, other, SAME):
        raise ValueError(
            f"The evaluations differ in {different}. Compare policies that were evaluated in the same way."
        )
    for episode in sorted(rollouts.keys() & others.keys()):
        told, other_told = (
            f"the task {one.task!r} with the instruction {one.instruction!r}"
            for one in (rollouts[episode], others[episode])
        )
        if told != other_told:
            raise ValueError(
                f"Episode {episode.seed} of {episode.environment} has {told} in {first}, but "
                f"{other_told} in {second}. Evaluate one of the policies again."
            )
    return (run["model"], other["model"]), compare_results(rollouts, others)
