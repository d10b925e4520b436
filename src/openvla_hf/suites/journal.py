"""The journal of an evaluation: each episode is appended to a file when it ends, so that a killed run can continue.

The first line describes the run (suite, protocol, policy), and each further line is an episode. A line that was not
written completely is dropped when the journal is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .suite import Episode, Rollout


__all__ = ["JOURNAL_FILE", "Journal", "read_journal"]

JOURNAL_FILE = "episodes.jsonl"
FIELDS = ("seed", "task", "instruction", "success", "moved_target", "steps", "predictions", "moved_object")


class Journal:
    """Episodes of one run, on disk.

    Args:
        folder: Folder of the run.
        run: Description of the run in JSON types.

    Raises:
        ValueError: The folder has the journal of another run, or a damaged one.
    """

    def __init__(self, folder: str | os.PathLike, run: dict[str, Any]) -> None:
        self.path = Path(folder, JOURNAL_FILE)
        self.rollouts: dict[Episode, Rollout] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_partial_line(self.path)
        if not self.path.exists() or not self.path.stat().st_size:
            self._append(run)
            return
        earlier, self.rollouts = read_journal(folder)
        missing = sorted(run.keys() - earlier.keys())
        if missing and not describe_differences(earlier, run, earlier):
            raise ValueError(
                f"{folder} has the episodes of an older run, which does not record {', '.join(missing)}. Give another "
                "folder, or delete this one."
            )
        if different := describe_differences(earlier, run, earlier.keys() | run.keys()):
            raise ValueError(
                f"{folder} has the episodes of another run, which differs in {different}. Give another folder, or "
                "delete this one."
            )

    def add(self, episode: Episode, rollout: Rollout) -> None:
        """Append an episode that has ended."""
        self.rollouts[episode] = rollout
        self._append({"environment": episode.environment, **{name: getattr(rollout, name) for name in FIELDS}})

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def describe_differences(first: Mapping[str, Any], second: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Describe in which of some entries two runs differ, with both values where they are short; "" if in none."""
    different = []
    for key in sorted(key for key in keys if first.get(key) != second.get(key)):
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            different.append(f"{key} ({describe_differences(one, other, one.keys() | other.keys())})")
        elif isinstance(one, list) or isinstance(other, list):
            different.append(key)
        else:
            different.append(f"{key}: {one} and {other}")
    return ", ".join(different)


def read_journal(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[Episode, Rollout]]:
    """Read the description of a run and its episodes.

    Raises:
        FileNotFoundError: The folder has no journal.
        ValueError: The journal is damaged.
    """
    path = Path(folder, JOURNAL_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {JOURNAL_FILE}. Give the --output folder of `openvla-hf evaluate --suite`."
        )
    rollouts = {}
    try:
        run, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            environment = line.pop("environment")
            rollouts[Episode(environment, line["seed"])] = Rollout(**line)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and run the evaluation again.") from error
    return run, rollouts


def _drop_partial_line(path: Path) -> None:
    """Remove what follows the last line break: the line that a killed run did not finish."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with open(path, "r+b") as file:
            file.truncate(end)
