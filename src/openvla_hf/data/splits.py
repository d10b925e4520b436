"""Which frames train and which evaluate: whole episodes held out, and samples that are spread over a data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from .mixtures import mix
from .streams import FrameStream


def read_split(data: Dataset | IterableDataset, eval_share: float, seed: int) -> tuple[Any, Any]:
    """Training and evaluation frames: whole episodes are held out, so that no frame has a neighbour on the other side.

    Args:
        data: Frames with `episode_index`.
        eval_share: Share of the episodes that is held out; 0 for none.
        seed: Of the draw.

    Raises:
        ValueError: A stream can't be split, nor a single episode.
    """
    if eval_share <= 0:
        return data, None
    if isinstance(data, IterableDataset):
        raise ValueError("A stream can't be split: give the evaluation data by themselves, or load without streaming.")
    episodes = _column(data, "episode_index")
    numbers = np.random.default_rng(seed).permutation(np.unique(episodes))
    if len(numbers) < 2:
        raise ValueError("There is one episode, so none can be held out: set `eval_share` to 0.")
    held_out = np.isin(episodes, numbers[: max(1, round(eval_share * len(numbers)))])
    return data.select(np.flatnonzero(~held_out)), data.select(np.flatnonzero(held_out))


def split_parts(
    parts: Sequence[Dataset | IterableDataset], weights: Sequence[float] | None, eval_share: float, seed: int
) -> tuple[Any, Any, dict[str, dict[str, Any]]]:
    """Split each of several data sets, and mix what trains.

    Args:
        parts: Frames of each data set.
        weights: Of each in the mixture that trains (see `mix`); 1 each by default. Evaluation takes each held-out
            frame once.
        eval_share: See `read_split`.
        seed: Of the draws.

    Returns:
        Training frames, evaluation frames or `None`, and the record of what is held out (see `describe_split`).

    Raises:
        ValueError: Two data sets have one name, so that their statistics would be taken together; or see `read_split`.
    """
    names = [dataset_name(part) for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two data sets are called {twice[0]!r}: give each a name of its own with `name`.")
    splits = [read_split(part, eval_share, seed) for part in parts]
    train = [part for part, _ in splits]
    weights = weights or [1.0] * len(parts)
    train_data = train[0] if len(parts) == 1 else mix(list(zip(train, weights, strict=True)), seed)
    if eval_share <= 0:
        return train_data, None, {}
    held_out = [part for _, part in splits]
    record: dict[str, dict[str, Any]] = {}
    for part, kept in zip(parts, held_out, strict=True):
        record |= describe_split(part, kept)
    return train_data, concatenate_datasets(held_out), record


def dataset_name(data: Dataset | IterableDataset) -> str:
    """Return the name of the data set that frames are of, or an empty text where there are no frames."""
    return data.name if isinstance(data, FrameStream) else "".join(_column(data, "dataset")[:1])


def describe_split(data: Dataset, held_out: Dataset) -> dict[str, dict[str, Any]]:
    """Record which episodes of a data set were held out, for `held_out_frames`.

    Args:
        data: All frames.
        held_out: Those that `read_split` kept for evaluation.

    Returns:
        Data set -> `episodes` (the numbers of those held out), and `frames`, the count of all frames.
    """
    names, numbers = _column(held_out, "dataset"), _column(held_out, "episode_index")
    all_names = _column(data, "dataset")
    return {
        str(name): {
            "episodes": np.unique(numbers[names == name]).tolist(),
            "frames": int((all_names == name).sum()),
        }
        for name in np.unique(names)
    }


def held_out_frames(data: Dataset, split: dict[str, dict[str, Any]]) -> Dataset:
    """Select the frames of the episodes that were held out.

    Args:
        data: All frames of one data set, read as they were for training.
        split: From `describe_split`.

    Raises:
        ValueError: None of its episodes were held out, or it is not the data set that was split.
    """
    name = str(data[0]["dataset"])
    if name not in split:
        raise ValueError(f"Training held out no episodes of {name!r}.")
    expected = split[name]["frames"]
    if len(data) != expected:
        raise ValueError(
            f"{name} has {len(data)} frames, but {expected} when training held out some of its episodes. Read it as "
            "for training (robot, camera, every, drop_idle)."
        )
    return data.select(np.flatnonzero(np.isin(_column(data, "episode_index"), split[name]["episodes"])))


def sample_frames(data: Dataset, count: int, seed: int = 0) -> Dataset:
    """Select `count` frames, the same for the same seed, that are spread evenly over the episodes.

    One frame is drawn from each of `count` stretches of equal length, so that long episodes give more than short ones.
    """
    if count >= len(data):
        return data
    edges = np.linspace(0, len(data), count + 1)
    drawn = np.random.default_rng(seed).uniform(edges[:-1], edges[1:])
    return data.select(np.minimum(drawn.astype(np.int64), len(data) - 1))


def sample_episodes(data: Dataset, count: int, seed: int = 0) -> Dataset:
    """Select the frames of `count` episodes, the same for the same seed."""
    numbers = _column(data, "episode_index")
    drawn = np.random.default_rng(seed).permutation(np.unique(numbers))[:count]
    return data.select(np.flatnonzero(np.isin(numbers, drawn)))


def _column(data: Dataset, name: str) -> np.ndarray:
    return np.asarray(data.with_format(None).select_columns([name])[name][:])


__all__ = [
    "dataset_name",
    "describe_split",
    "held_out_frames",
    "read_split",
    "sample_episodes",
    "sample_frames",
    "split_parts",
]
