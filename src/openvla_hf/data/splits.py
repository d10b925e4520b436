"""Splits of frames into training and held-out episodes, and samples spread over a dataset."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from .feature_names import counted
from .mixtures import mix
from .streams import FrameStream


def read_split(data: Dataset | IterableDataset, eval_share: float, seed: int) -> tuple[Any, Any]:
    """Split frames into training and evaluation by whole episodes, since neighbouring frames are nearly equal.

    Args:
        data: Frames with `episode_index`.
        eval_share: Share of the episodes to hold out; 0 for none.
        seed: Seed of the draw.

    Returns:
        Training frames, and evaluation frames or `None`.

    Raises:
        ValueError: `data` is a stream or has fewer than two episodes.
    """
    if eval_share <= 0:
        return data, None
    if isinstance(data, IterableDataset):
        raise ValueError("A stream can't be split. Give the evaluation data separately, or load without streaming.")
    episodes = _column(data, "episode_index")
    numbers = np.random.default_rng(seed).permutation(np.unique(episodes))
    require_divisible(dataset_name(data), len(numbers))
    held_out = np.isin(episodes, numbers[: max(1, round(eval_share * len(numbers)))])
    return data.select(np.flatnonzero(~held_out)), data.select(np.flatnonzero(held_out))


def require_divisible(name: str, episodes: int | None) -> None:
    """Raise `ValueError` if a dataset has too few episodes to hold one out. `None` is an unknown number."""
    if episodes is not None and episodes < 2:
        raise ValueError(
            f"{name!r} has {counted(episodes, 'episode')}, so none can be held out. Set `eval_share` to 0."
        )


def split_parts(
    parts: Sequence[Dataset | IterableDataset],
    weights: Sequence[float] | None,
    eval_share: float,
    seed: int,
    sizes: Sequence[int] | None = None,
) -> tuple[Any, Any, dict[str, dict[str, Any]]]:
    """Split each of several datasets, and mix their training frames.

    Args:
        parts: Frames of each dataset.
        weights: Weights of the datasets in the training mixture (see `mix`), by default 1 each. Evaluation takes each
            held-out frame once.
        eval_share: See `read_split`.
        seed: Seed of the draws.
        sizes: Numbers of frames that the weights multiply, by default those of the training frames.

    Returns:
        Training frames, evaluation frames or `None`, and the record of what is held out (see `describe_split`).

    Raises:
        ValueError: Two datasets have the same name and would share statistics, or a dataset can't be split.
    """
    names = [dataset_name(part) for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two datasets are called {twice[0]!r}. Give each its own name with `name`.")
    splits = [read_split(part, eval_share, seed) for part in parts]
    train = [part for part, _ in splits]
    weights = weights or [1.0] * len(parts)
    columns: list[Any] = [train, weights, *([sizes] if sizes is not None else [])]
    train_data = train[0] if len(parts) == 1 else mix(list(zip(*columns, strict=True)), seed)
    if eval_share <= 0:
        return train_data, None, {}
    held_out = [part for _, part in splits]
    record: dict[str, dict[str, Any]] = {}
    for part, kept in zip(parts, held_out, strict=True):
        record |= describe_split(part, kept)
    return train_data, concatenate_datasets(held_out), record


def dataset_name(data: Dataset | IterableDataset) -> str:
    """Return the name of the frames' dataset, or an empty text if there are no frames."""
    if isinstance(data, FrameStream):
        return data.name
    return "".join(data.with_format(None).select_columns(["dataset"])[:1]["dataset"])


def describe_split(data: Dataset, held_out: Dataset) -> dict[str, dict[str, Any]]:
    """Record which episodes of a dataset were held out, for `held_out_frames`.

    Args:
        data: All frames.
        held_out: The frames that `read_split` kept for evaluation.

    Returns:
        By dataset, `episodes` (the numbers of the held-out episodes) and `frames` (the number of all frames).
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
        data: All frames of one dataset, loaded as for training.
        split: Record from `describe_split`.

    Raises:
        ValueError: No episodes of this dataset were held out, or the frames differ from those of training.
    """
    name = str(data[0]["dataset"])
    if name not in split:
        raise ValueError(
            f"Training held out no episodes of {name!r}. Give `split` to evaluate on the episodes of a split."
        )
    expected = split[name]["frames"]
    if len(data) != expected:
        raise ValueError(
            f"{name} has {len(data)} frames, but had {expected} in training. Load it as in training, with the same "
            "robot, cameras, every, drop_idle, chunk, chunk_end and state."
        )
    return data.select(np.flatnonzero(np.isin(_column(data, "episode_index"), split[name]["episodes"])))


def sample_frames(data: Dataset, count: int, seed: int = 0) -> Dataset:
    """Select `count` frames that are spread evenly over the dataset and depend only on the seed.

    One frame is drawn from each of `count` stretches of equal length, so longer episodes give more frames.
    """
    if count >= len(data):
        return data
    edges = np.linspace(0, len(data), count + 1)
    drawn = np.random.default_rng(seed).uniform(edges[:-1], edges[1:])
    return data.select(np.minimum(drawn.astype(np.int64), len(data) - 1))


def sample_episodes(data: Dataset, count: int, seed: int = 0) -> Dataset:
    """Select the frames of `count` episodes, which depend only on the seed."""
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
    "require_divisible",
    "sample_episodes",
    "sample_frames",
    "split_parts",
]
