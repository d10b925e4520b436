"""Action statistics, as `dataset_statistics.json` holds them: exact, in one pass over the numbers alone."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher

from ..modeling.checkpoint_files import STATISTICS_FILE
from .frames import FEATURES, images_left_out, matrix, read_action_names
from .loading import cache_folder
from .streams import FrameStream


LOW, HIGH = 0.01, 0.99
COLUMNS = ("dataset", "episode_index", "action", "action_mask", "state")
READ_ROWS = 16384
VERSION = 1
"""Part of the name of cached statistics: a change of how they are computed makes old ones unused."""


def describe(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, deviation, range and the quantiles 0.01 and 0.99 of (N, D) values, each (D)."""
    quantiles = np.quantile(values, (LOW, HIGH), axis=0)
    rows = {
        "mean": values.mean(0),
        "std": values.std(0),
        "max": values.max(0),
        "min": values.min(0),
        "q01": quantiles[0],
        "q99": quantiles[1],
    }
    return {name: row.tolist() for name, row in rows.items()}


def compute_statistics(frames: Dataset | IterableDataset) -> dict[str, Any]:
    """Statistics of every data set that the frames are of, each frame counted once however often it is drawn.

    The statistics of a table are cached, and so are those of a LeRobot or RLDS stream from `load` until its files
    change. Those of a stream from `from_episodes` are cached if it has a `cache_key`. Any other stream, such as one of
    parquet files or of a dataset that is already loaded, is read again at each call.

    Args:
        frames: From `load`, `from_episodes` or `mix`. A mixture of streams takes a pass over each of its streams.

    Returns:
        `{name: {"action": {mean, std, max, min, q01, q99, mask, names}, "proprio": {...}, "num_transitions",
        "num_trajectories"}}`; "names" of the dimensions where the
        data set or the robot's space gives them, "proprio" where there is a state.

    Raises:
        ValueError: there are no frames, or actions of one data set differ in size.
    """
    statistics = _compute_or_reuse(frames)
    parts = [part for part, _ in frames.parts] if isinstance(frames, FrameStream) else []
    for part in (frames, *parts):
        for name, of_one in statistics.items():
            if names := read_action_names(part, name, len(of_one["action"]["q01"])):
                of_one["action"]["names"] = names
    return statistics


def _compute_or_reuse(frames: Dataset | IterableDataset) -> dict[str, Any]:
    key = _key_of(frames)
    if key is None:
        return _compute(frames)
    folder = cache_folder()
    path = folder / f"statistics-{Hasher.hash([VERSION, key])}.json"
    if not path.exists():
        statistics = _compute(frames)
        # Written elsewhere and moved into place, so that no process reads an incomplete file.
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            os.replace(save_statistics(statistics, unfinished), path)
    return json.loads(path.read_text(encoding="utf-8"))


def _key_of(frames: Dataset | IterableDataset) -> Any:
    """What names the frames as they are, or None where nothing does."""
    if isinstance(frames, Dataset):
        return frames._fingerprint
    if not isinstance(frames, FrameStream):
        return None
    if frames.parts:
        keys = [_key_of(part) for part, _ in frames.parts]
        return None if None in keys else keys
    return frames.cache_key and frames.cache_key()


def _compute(frames: Dataset | IterableDataset) -> dict[str, Any]:
    with images_left_out():
        return _describe_all(_read(frames))


def _describe_all(pieces: Iterable[tuple[str, pa.Table]]) -> dict[str, Any]:
    actions: dict[str, list[np.ndarray]] = {}
    states: dict[str, list[np.ndarray]] = {}
    masks: dict[str, list[bool]] = {}
    episodes: dict[str, set[int]] = {}
    for name, batch in pieces:
        actions.setdefault(name, []).append(matrix(batch["action"], f"{name}: action"))
        masks.setdefault(name, batch["action_mask"][0].as_py())
        episodes.setdefault(name, set()).update(pc.unique(batch["episode_index"]).to_pylist())
        if len(known := batch["state"].drop_null()):
            states.setdefault(name, []).append(matrix(known, f"{name}: state"))
    if not actions:
        raise ValueError("There are no frames to compute statistics of.")
    statistics = {}
    for name, parts in actions.items():
        sizes = sorted({part.shape[1] for part in parts})
        if len(sizes) > 1:
            raise ValueError(f"{name!r} has actions of {' and '.join(map(str, sizes))} dimensions.")
        statistics[name] = {
            "action": describe(np.concatenate(parts)) | {"mask": masks[name]},
            **({"proprio": describe(np.concatenate(states[name]))} if name in states else {}),
            "num_transitions": sum(map(len, parts)),
            "num_trajectories": len(episodes[name]),
        }
    return statistics


def _read(frames: Dataset | IterableDataset) -> Iterator[tuple[str, pa.Table]]:
    """Pieces of the table of numbers, each of one data set."""
    if isinstance(frames, FrameStream) and frames.parts:
        # A mixture has no end: a pass over each of its streams, also where it draws from one twice.
        for part in {id(part): part for part, _ in frames.parts}.values():
            yield from _read(part)
        return
    if isinstance(frames, Dataset):
        if frames._indices is not None:
            # Drawn, as in a mixture: each row that is stored once, and in the order in which it is read fastest.
            _, first = np.unique(frames._indices.column(0), return_index=True)
            frames = frames.select(first)
        pieces = frames.select_columns(list(COLUMNS)).with_format("arrow").iter(batch_size=READ_ROWS)
    else:
        schema = pa.schema([FEATURES.arrow_schema.field(name) for name in COLUMNS])
        batches = frames.select_columns(list(COLUMNS)).iter(batch_size=READ_ROWS)
        pieces = (pa.table(batch, schema=schema) for batch in batches)
    for piece in pieces:
        for name in pc.unique(piece["dataset"]).to_pylist():
            yield name, piece.filter(pc.equal(piece["dataset"], name))


def save_statistics(statistics: dict[str, Any], folder: str | os.PathLike) -> Path:
    """Writes `dataset_statistics.json` into a folder, and gives its path."""
    path = Path(folder) / STATISTICS_FILE
    path.write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    return path


def load_statistics(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of statistics, or `dataset_statistics.json` of a folder.

    Raises:
        ValueError: The file does not hold action statistics by the name of their data set.
    """
    path = Path(path) / STATISTICS_FILE if Path(path).is_dir() else Path(path)
    try:
        statistics = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a file of statistics: {error}.") from error
    known = isinstance(statistics, dict) and all(
        isinstance(of_one, dict) and "action" in of_one for of_one in statistics.values()
    )
    if not known or not statistics:
        raise ValueError(f"{path} does not hold action statistics by the name of their data set.")
    return statistics


__all__ = ["compute_statistics", "load_statistics", "save_statistics"]
