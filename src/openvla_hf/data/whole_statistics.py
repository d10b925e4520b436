"""Statistics of whole RLDS datasets, as the original computes them.

They count every step of every split, including steps without an instruction, pauses and held-out steps.
"""

import contextlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import Robot
from .episodes import BadEpisodeError, Losses, RecordedEpisode, convert_episode
from .frame_spec import FrameSpec, resolve_spec
from .loading import choose_robot
from .motion import name_by_space
from .readers.rlds import RLDSSource, find_version
from .remote import find_folder
from .shard_rows import ShardRows
from .statistics import summarize
from .table_cache import cache_folder, file_version, lock, make_key, write_json


# Part of every cache key: increase it when the computation changes, so that old statistics are not read.
WHOLE_STATISTICS_VERSION = 1


def whole_statistics(
    data: str | os.PathLike,
    robot: Robot | str | None = None,
    *,
    name: str | None = None,
    every: int | None = None,
    skip_bad_episodes: bool | float = False,
) -> dict[str, Any] | None:
    """Compute the statistics of an RLDS dataset once, and read them from the cache afterwards.

    The same pass over the files makes the index of their records, for streams with the default options of `load`.

    Args:
        data: Folder or URL.
        robot: See `load`.
        name: See `load`.
        every: See `load`.
        skip_bad_episodes: See `load`.

    Returns:
        `action` and, if there is a state, `proprio` (mean, std, max, min, q01, q99, and the action's mask and names),
        `num_transitions` and `num_trajectories`, or `None` if the data is not an RLDS dataset.

    Raises:
        ValueError: The dataset lacks what is read.
        BadEpisodeError: An episode can't be used, or more are bad than may be skipped.
    """
    whole = _open_pass(data, robot, name, every, skip_bad_episodes)
    if whole is None:
        return None
    with lock(whole.path):
        if not whole.path.exists():
            write_json(whole.path, _compute(whole))
    return json.loads(whole.path.read_text(encoding="utf-8"))


def cached_whole_statistics(data: str | os.PathLike, **options: Any) -> dict[str, Any] | None:
    """Return the statistics of `whole_statistics` with the same options from the cache, or `None` if it has none."""
    whole = _open_pass(data, **options)
    return json.loads(whole.path.read_text(encoding="utf-8")) if whole and whole.path.exists() else None


@dataclass(frozen=True)
class _Pass:
    """A pass over all splits of a dataset.

    Args:
        path: File of the cache for its result.
        splits: Rows of each split.
        spec: Says how episodes become the frames that count.
        losses: Records what is left out.
    """

    path: Path
    splits: list[ShardRows]
    spec: FrameSpec
    losses: Losses


def _open_pass(
    data: str | os.PathLike,
    robot: Robot | str | None = None,
    name: str | None = None,
    every: int | None = None,
    skip_bad_episodes: bool | float = False,
) -> _Pass | None:
    """Prepare the pass over an RLDS dataset from its metadata, or return `None` for other data."""
    fs, root = find_folder(data)
    version = find_version(fs, root)
    if version is None:
        return None
    source = RLDSSource(fs, version, "train")
    name = name or source.name
    robot = choose_robot(robot, source, name)
    spec = resolve_spec(robot, name, every=every, drop_idle=False)
    losses = Losses.allow(skip_bad_episodes)
    sources = [RLDSSource(fs, version, split) for split in source.splits]
    versions = [file_version(fs, path) for each in sources for path in each.files()]
    key = make_key(WHOLE_STATISTICS_VERSION, versions, replace(spec, cameras=()), losses.limit)
    path = cache_folder() / f"statistics-{name}-{key}.json"
    rows = [ShardRows(each, resolve_spec(robot, name, every=every), name, losses) for each in sources]
    return _Pass(path, rows, spec, losses)


def _compute(whole: _Pass) -> dict[str, Any]:
    splits, spec, losses = whole.splits, whole.spec, whole.losses
    actions, states = [], []
    losses.total = sum(rows.source.num_episodes for rows in splits)

    def collect(episode: RecordedEpisode) -> None:
        with contextlib.suppress(BadEpisodeError):  # reading its rows records it in `losses`
            _, action, state = convert_episode(episode, spec)
            actions.append(action)
            if state is not None:
                states.append(state)

    for rows in splits:
        rows.source.check(spec)
        for shard in rows.shards:
            for _ in rows.read(shard, watch=collect):
                pass
    if not actions:
        raise ValueError(f"{splits[0].source.root} has no usable episode.")
    values = np.concatenate(actions)
    names = name_by_space(spec.robot.standard_space, values.shape[1])
    return {
        "action": summarize(values) | {"mask": spec.robot.mask(values.shape[1])} | ({"names": names} if names else {}),
        **({"proprio": summarize(np.concatenate(states))} if states else {}),
        "num_transitions": len(values),
        "num_trajectories": len(actions),
    }


__all__ = ["cached_whole_statistics", "whole_statistics"]
