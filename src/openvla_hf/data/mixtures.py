"""Mixtures: several datasets as one, drawn from by weight."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, interleave_datasets

from ..modeling.known_names import check_name
from .frames import Frames, describe_contents
from .loading import load
from .open_x import known_table
from .streams import FrameStream, mix_streams


# Mixture -> folder of a dataset -> weight, which multiplies the dataset's number of frames.
MIXTURES: dict[str, dict[str, float]] = known_table().mixtures


def mix(parts: Sequence[tuple[Frames, float] | tuple[Frames, float, int]], seed: int = 0) -> Frames:
    """Interleave datasets that are all tables or all streams.

    A weight multiplies the number of frames, as in the mixtures of Open X-Embodiment: with all weights 1, every frame
    of every dataset is equally likely.

    Args:
        parts: Datasets with their weights. A stream whose metadata does not give its number of frames needs this
            number as a third item.
        seed: Seed of the draws.

    Returns:
        For tables, a table that contains every frame at least once. For streams, an endless stream.

    Raises:
        ValueError: There are no parts, a weight is not positive, tables are mixed with streams, the number of frames
            of a stream is unknown, or the datasets have different cameras or chunks.
    """
    frames, weights = [part[0] for part in parts], [part[1] for part in parts]
    if not parts or not min(weights) > 0:
        raise ValueError("A mixture needs at least one dataset, and every weight must be above 0.")
    tables = [isinstance(part, Dataset) for part in frames]
    if any(tables) != all(tables):
        raise ValueError("A mixture can't combine tables and streams. Load all datasets with streaming=True, or none.")
    _require_same_contents(frames)
    sizes = [
        len(part[0]) if isinstance(part[0], Dataset) else _count(number, *part) for number, part in enumerate(parts)
    ]
    shares = np.array(weights) * sizes
    shares = (shares / shares.sum()).tolist()
    if all(tables):
        return interleave_datasets(frames, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    return mix_streams(list(zip(frames, shares, strict=True)), seed)


def _require_same_contents(parts: Sequence[Frames]) -> None:
    """Raise `ValueError` if frames differ in their cameras or chunks."""
    contents = [describe_contents(part) for part in parts if part.features is not None]
    for other in contents[1:]:
        if other != contents[0]:
            raise ValueError(
                f"The datasets of a mixture must have the same cameras and chunks, but one has {contents[0]} and "
                f"another has {other}. Load them with the same cameras, chunk and chunk_end; "
                "cameras={'name': 'feature'} gives cameras a common name."
            )


def _count(number: int, stream: IterableDataset, weight: float, num_frames: int | None = None) -> int:
    """Return the number of frames of a stream."""
    name = f"part {number}"
    if isinstance(stream, FrameStream):
        if stream.parts:
            raise ValueError("A mixture of streams is endless and can't be part of another. Mix all datasets at once.")
        name, num_frames = repr(stream.name), num_frames or stream.num_frames
    if not num_frames:
        raise ValueError(
            f"The number of frames of {name} is not known, so its weight can't be applied. Save "
            "dataset_statistics.json beside its files, or pass num_frames to `mix` or `load_mixture`."
        )
    return num_frames


def load_mixture(
    mixture: str | Mapping[str, float],
    folder: str | Path,
    *,
    seed: int = 0,
    num_frames: Mapping[str, int] | None = None,
    **options: Any,
) -> Frames:
    """Load the datasets of a mixture from the folders named after them, and mix them.

    Args:
        mixture: Name of one of `MIXTURES`, or weights by name.
        folder: Folder or URL that contains the datasets' folders.
        seed: Seed of the draws.
        num_frames: With `streaming`, numbers of frames by name, for datasets whose metadata does not give them.
        options: Options of `load`.

    Raises:
        ValueError: The mixture or the number of frames of a stream is unknown.
    """
    if isinstance(mixture, str):
        check_name(mixture, MIXTURES, "mixture")
        mixture = MIXTURES[mixture]
    parts: list[Any] = []
    for name, weight in mixture.items():
        frames = load(f"{folder}/{name}", name=name, seed=seed, **options)
        known = (num_frames or {}).get(name)
        parts.append((frames, weight, known) if known else (frames, weight))
    return mix(parts, seed)


__all__ = ["MIXTURES", "load_mixture", "mix"]
