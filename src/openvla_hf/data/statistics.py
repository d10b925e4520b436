"""Action statistics, as stored in `dataset_statistics.json`: exact, and computed in one pass without the images."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from datasets.fingerprint import Hasher

from ..modeling.checkpoint_files import STATISTICS_FILE
from .columns import matrix
from .datasets_internals import drop_repeats, fingerprint
from .frame_spec import DROPPED_COLUMNS, NUMBERS
from .frames import Frames, read_action_names
from .streams import FrameStream
from .table_cache import cache_folder, write_json


LOW, HIGH = 0.01, 0.99
COLUMNS = ("dataset", "episode_index", "action", "action_mask", "state")
READ_ROWS = 16384
# Part of every cache key: increase it when the computation changes, so that old statistics are not read.
STATISTICS_VERSION = 1


def summarize(values: np.ndarray) -> dict[str, list[float]]:
    """Compute the mean, standard deviation, range and quantiles 0.01 and 0.99 of values (N, D), each (D,)."""
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


def compute_statistics(frames: Frames) -> dict[str, Any]:
    """Compute the statistics of each dataset among the frames. A frame that is drawn repeatedly counts once.

    The statistics of a table are cached, and so are those of a LeRobot or RLDS stream from `load` until its files
    change. Those of a stream from `from_episodes` are cached if it has a `cache_key`. Any other stream, such as one of
    parquet files or of a dataset that is already loaded, is read again at each call. Images are not decoded, except in
    streams that result from operations of `datasets` such as `map`.

    As in OpenVLA-OFT, the last frames of an episode count even if `load` drops them because their chunks are
    incomplete. These frames are unknown after an operation such as `map`. Unlike in OpenVLA-OFT, an episode that gives
    no frames, since it is shorter than a chunk, does not count.

    Args:
        frames: Frames from `load`, `from_episodes` or `mix`. Each stream of a mixture is read once.

    Returns:
        `{name: {"action": {mean, std, max, min, q01, q99, mask, names}, "proprio": {...}, "num_transitions",
        "num_trajectories"}}`. "names" is present if the dataset or the robot's space names the dimensions, and
        "proprio" if there is a state.

    Raises:
        ValueError: There are no frames, or actions or states of one dataset differ in size.
    """
    statistics = _compute_or_reuse(frames)
    parts = [part for part, _ in frames.parts] if isinstance(frames, FrameStream) else []
    for part in (frames, *parts):
        for name, of_one in statistics.items():
            if names := read_action_names(part, name, len(of_one["action"]["q01"])):
                of_one["action"]["names"] = names
    return statistics


def _compute_or_reuse(frames: Frames) -> dict[str, Any]:
    parts = _separate_parts(frames)
    if parts:  # each has its own file in the cache, whatever it is mixed with
        return {name: of_one for part in parts for name, of_one in _compute_or_reuse(part).items()}
    key = _content_key(frames)
    if key is None:
        return _compute(_read(frames))
    path = cache_folder() / f"statistics-{Hasher.hash([STATISTICS_VERSION, key])}.json"
    if not path.exists():
        write_json(path, _compute(_read(frames)))
    return json.loads(path.read_text(encoding="utf-8"))


def _separate_parts(frames: Frames) -> list[FrameStream]:
    """Return the streams of a mixture, or none if some of them may share a dataset and thus its statistics."""
    if not isinstance(frames, FrameStream):
        return []
    parts = list({id(part): part for part, _ in frames.parts}.values())
    named = [part for part in parts if isinstance(part, FrameStream)]
    return named if len({part.name for part in named}) == len(parts) else []


def _content_key(frames: Frames) -> Any:
    """Return a key that identifies the content of the frames, or `None` if there is none."""
    if isinstance(frames, Dataset):
        return fingerprint(frames)
    if not isinstance(frames, FrameStream):
        return None
    if frames.parts:
        keys = [_content_key(part) for part, _ in frames.parts]
        return None if None in keys else keys
    return frames.cache_key and frames.cache_key()


def _compute(pieces: Iterable[tuple[str, pa.Table]]) -> dict[str, Any]:
    actions: dict[str, list[np.ndarray]] = {}
    states: dict[str, list[np.ndarray]] = {}
    masks: dict[str, list[bool]] = {}
    episodes: dict[str, set[int]] = {}
    for name, batch in pieces:
        actions.setdefault(name, []).append(_read_numbers(batch, name, "action", DROPPED_COLUMNS[0]))
        masks.setdefault(name, batch["action_mask"][0].as_py())
        episodes.setdefault(name, set()).update(pc.unique(batch["episode_index"]).to_pylist())
        if len(known := batch.filter(pc.is_valid(batch["state"]))):
            states.setdefault(name, []).append(_read_numbers(known, name, "state", DROPPED_COLUMNS[1]))
    if not actions:
        raise ValueError("There are no frames to compute statistics from.")
    statistics = {}
    for name, parts in actions.items():
        _require_one_size(name, "actions", parts)
        _require_one_size(name, "states", states.get(name, []))
        statistics[name] = {
            "action": summarize(np.concatenate(parts)) | {"mask": masks[name]},
            **({"proprio": summarize(np.concatenate(states[name]))} if name in states else {}),
            "num_transitions": sum(map(len, parts)),
            "num_trajectories": len(episodes[name]),
        }
    return statistics


def _read_numbers(rows: pa.Table, name: str, column: str, dropped_column: str) -> np.ndarray:
    """Read the numbers of rows (N, D), and place those of dropped frames after the row that contains them."""
    numbers = matrix(rows[column], f"{name}: {column}")
    if dropped_column not in rows.column_names or not len(dropped := pc.list_flatten(rows[dropped_column])):
        return numbers
    counts = pc.list_value_length(rows[dropped_column]).to_numpy()
    return np.insert(
        numbers, np.repeat(np.arange(1, len(numbers) + 1), counts), matrix(dropped, f"{name}: {column}"), axis=0
    )


def _require_one_size(name: str, kind: str, parts: list[np.ndarray]) -> None:
    sizes = sorted({part.shape[1] for part in parts})
    if len(sizes) > 1:
        raise ValueError(
            f"{name!r} has {kind} of {' and '.join(map(str, sizes))} dimensions. Give each robot its own dataset name."
        )


def _read(frames: Frames) -> Iterator[tuple[str, pa.Table]]:
    """Read the numbers in pieces, each of one dataset."""
    if isinstance(frames, FrameStream) and frames.parts:
        # A mixture is endless, so read each of its streams once, even if it is listed twice.
        for part in {id(part): part for part, _ in frames.parts}.values():
            yield from _read(part)
        return
    if isinstance(frames, Dataset):
        columns = [*COLUMNS, *(name for name in DROPPED_COLUMNS if name in frames.column_names)]
        pieces = drop_repeats(frames).select_columns(columns).with_format("arrow").iter(batch_size=READ_ROWS)
    else:
        rows, known = (
            (frames.unshuffled, frames.row_features) if isinstance(frames, FrameStream) else (frames, NUMBERS)
        )
        features = {name: known[name] for name in (*COLUMNS, *DROPPED_COLUMNS) if name in known}
        batches = rows.select_columns(list(features)).iter(batch_size=READ_ROWS)
        pieces = (pa.table(batch, schema=Features(features).arrow_schema) for batch in batches)
    for piece in pieces:
        for name in pc.unique(piece["dataset"]).to_pylist():
            yield name, piece.filter(pc.equal(piece["dataset"], name))


def save_statistics(statistics: dict[str, Any], folder: str | os.PathLike) -> Path:
    """Write `dataset_statistics.json` into a folder, and return its path."""
    path = Path(folder) / STATISTICS_FILE
    path.write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    return path


def load_statistics(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of statistics, or `dataset_statistics.json` in a folder.

    Raises:
        ValueError: The file does not contain action statistics by dataset name.
    """
    path = Path(path) / STATISTICS_FILE if Path(path).is_dir() else Path(path)
    try:
        statistics = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Give a {STATISTICS_FILE}.") from error
    known = isinstance(statistics, dict) and all(
        isinstance(of_one, dict) and "action" in of_one for of_one in statistics.values()
    )
    if not known or not statistics:
        raise ValueError(f"{path} does not contain action statistics by dataset name. Give a {STATISTICS_FILE}.")
    return statistics


__all__ = ["compute_statistics", "load_statistics", "save_statistics"]
