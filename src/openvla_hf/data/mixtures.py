"""Mixtures: several datasets as one, drawn from by weight."""

import difflib
import json
import logging
import math
import os
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, interleave_datasets

from ..modeling.known_names import check_name
from .adapters import Robot
from .frames import Frames, describe_contents, read_robot
from .loading import load
from .open_x import dataset_robot, known_table
from .open_x.table import check_weights
from .readers.rlds import RLDSSource, find_version, split_for_training
from .remote import as_os_error, find_folder
from .robots import GENERIC, registered_robots
from .streams import FrameStream, mix_streams
from .whole_statistics import whole_statistics


# Mixture -> folder of a dataset -> weight, which multiplies the dataset's number of frames.
MIXTURES: dict[str, dict[str, float]] = known_table().mixtures

# Smallest similarity, from 0 to 1, of a name that a missing dataset may have been meant by.
NEAR = 0.75
GO_ON = "Pass allow_missing=True to go on without them."

logger = logging.getLogger(__name__)


def mix(parts: Sequence[tuple[Frames, float] | tuple[Frames, float, int]], seed: int = 0) -> Frames:
    """Interleave datasets that are all tables or all streams.

    A weight multiplies the number of frames, as in the mixtures of Open X-Embodiment: with all weights 1, every frame
    of every dataset is equally likely.

    Args:
        parts: Datasets with their weights. A third item is the number of frames that the weight multiplies, which is
            otherwise the length of a table or the number in a stream's metadata.
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
    shares = sampling_shares(weights, [_count(number, *part) for number, part in enumerate(parts)])
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


def sampling_shares(weights: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Return the share of the draws of each dataset: its weight times its size, divided by the sum of all."""
    shares = np.array(weights, np.float64) * sizes
    return (shares / shares.sum()).tolist()


def epoch_length(weights: Sequence[float], sizes: Sequence[int], shares: Sequence[float]) -> int:
    """Return the number of draws in which each dataset of weight 1 is drawn as often as it has frames.

    Raises:
        ValueError: No dataset has weight 1.
    """
    lengths = [size / share for weight, size, share in zip(weights, sizes, shares, strict=True) if weight == 1]
    if not lengths:
        raise ValueError(
            "No dataset of the mixture has weight 1, so the length of an epoch is not defined. Give at least "
            "one dataset the weight 1."
        )
    return int(max(lengths))


def _count(number: int, stream: Frames, weight: float, num_frames: int | None = None) -> int:
    """Return the number of frames that a weight multiplies."""
    name = f"part {number}"
    if isinstance(stream, Dataset):
        return num_frames or len(stream)
    if isinstance(stream, FrameStream):
        if stream.parts:
            raise ValueError("A mixture of streams is endless and can't be part of another. Mix all datasets at once.")
        name, num_frames = repr(stream.name), num_frames or stream.num_frames
    if not num_frames:
        raise ValueError(
            f"The number of frames of {name} is not known, so its weight can't be applied. Save "
            "dataset_statistics.json next to its files, or pass num_frames to `mix` or `load_mixture`."
        )
    return num_frames


def read_mixture(mixture: str | os.PathLike | Mapping[str, float]) -> dict[str, float]:
    """Return the weights of a mixture.

    Args:
        mixture: Name of one of `MIXTURES` or of a dataset of Open X-Embodiment, a JSON or TOML file with weights by
            dataset, their JSON text, or weights by name.

    Raises:
        OSError: There is no such file, or it can't be read.
        ValueError: The mixture is unknown, or its content is not weights by dataset.
    """
    if isinstance(mixture, Mapping):
        return check_weights("given", mixture)
    text = os.fspath(mixture)
    if text.lstrip().startswith("{"):
        return check_weights("given", _parse(text, "The mixture", json.loads))
    table = known_table()
    if text in table.mixtures:
        return dict(table.mixtures[text])
    if text in table.datasets:
        return {text: 1.0}
    if not text.endswith((".json", ".toml")):
        check_name(text, table.mixtures, "mixture")
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {text!r} with the weights of a mixture. Give the path of a JSON or TOML file, or the "
            "name of a mixture."
        )
    loads = tomllib.loads if text.endswith(".toml") else json.loads
    return check_weights(text, _parse(path.read_text(encoding="utf-8"), text, loads))


def _parse(text: str, place: str, loads: Callable[[str], Any]) -> Any:
    try:
        return loads(text)
    except ValueError as error:
        raise ValueError(f"{place} can't be parsed: {error}.") from error


def select_datasets(
    mixture: str | os.PathLike | Mapping[str, float], folder: str | os.PathLike, allow_missing: bool = False
) -> dict[str, float]:
    """Select the datasets of a mixture that can be trained on.

    Args:
        mixture: See `read_mixture`.
        folder: Folder or URL that contains the datasets' folders.
        allow_missing: Whether to leave out the datasets that are missing or can't be trained on, with a warning.

    Raises:
        ValueError: A dataset can't be trained on, or none is left.
        FileNotFoundError: Datasets are missing. The message says where to get them.
    """
    weights = read_mixture(mixture)
    refused = {name: problem for name in weights if (problem := _problem(name))}
    if refused and not allow_missing:
        go_on = f"\n{GO_ON}" if len(refused) < len(weights) else ""
        raise ValueError("\n".join(refused.values()) + go_on)
    fs, root = find_folder(folder)
    with as_os_error(folder):
        missing = [name for name in weights if name not in refused and not fs.exists(f"{root}/{name}")]
        exists = not missing or fs.exists(root)
        paths = fs.ls(root, detail=False) if missing and exists else []
    gone = "" if exists else ", which does not exist"
    folders = {path.rstrip("/").rpartition("/")[2] for path in paths} - {*weights}
    listed = "\n".join(f"  {name}: {_source(name, folders, weights)}" for name in missing)
    if missing and not allow_missing:
        get = " or ".join(sorted({"download" if _published(name) else "record" for name in missing}))
        go_on = f" {GO_ON}" if len(missing) < len(weights) else ""
        raise FileNotFoundError(
            f"Datasets of the mixture are missing from {folder}{gone} ({len(missing)} of {len(weights)}):\n{listed}\n"
            f"{get.capitalize()} each into a folder of its name, or correct the path of the folder.{go_on}"
        )
    for problem in refused.values():
        logger.warning("%s", problem)
    if missing:
        logger.warning(
            "Datasets of the mixture are missing and left out (%d of %d):\n%s", len(missing), len(weights), listed
        )
    selected = {name: weight for name, weight in weights.items() if name not in refused and name not in missing}
    if not selected:
        raise ValueError(
            f"{folder} contains no dataset of the mixture. Give the folder that contains the folders of the datasets."
        )
    return selected


def dataset_folder(folder: str | os.PathLike, name: str) -> str:
    """Return the folder of a dataset of a mixture. Object stores don't ignore a second slash."""
    return f"{os.fspath(folder).rstrip('/')}/{name}"


def training_splits(path: str) -> tuple[str, str | None]:
    """Return the splits that the original trains and evaluates on.

    For an RLDS dataset without a split "val", they are the first 95% and the rest. For other datasets, the original
    has no split to evaluate on.
    """
    fs, root = find_folder(path)
    with as_os_error(path):
        version = find_version(fs, root)
        return split_for_training(RLDSSource(fs, version).splits) if version else ("train", None)


def _problem(name: str) -> str | None:
    """Return why a dataset can't be trained on, if it can't."""
    if name not in known_table().datasets or name in registered_robots():
        return None
    try:
        dataset_robot(name)
    except ValueError as error:
        return str(error)
    return None


def _published(name: str) -> str:
    """Return where a dataset is published, or an empty text if this is not known."""
    row = known_table().datasets.get(name)
    return row.source if row else ""


def _source(name: str, folders: Collection[str], mixture: Collection[str]) -> str:
    """Return where to get a dataset, or else a similar name that is not in the mixture, preferably of a folder."""
    if source := _published(name):
        return source
    for known in (folders, {*known_table().datasets, *registered_robots()} - {*mixture}):
        if near := difflib.get_close_matches(name, sorted(known), n=1, cutoff=NEAR):
            return f"the source is not known. Did you mean {near[0]!r}?"
    return "the source is not known"


def load_mixture(
    mixture: str | os.PathLike | Mapping[str, float],
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    num_frames: Mapping[str, int] | None = None,
    allow_missing: bool = False,
    **options: Any,
) -> Frames:
    """Load the datasets of a mixture from the folders named after them, and mix them.

    A weight multiplies the number of steps of a dataset. As in the original, all steps of an RLDS dataset count,
    including those of other splits; see `whole_statistics`. The streams divide one shuffle buffer by their shares of
    the draws, so that its size does not depend on the number of datasets.

    Args:
        mixture: Name of one of `MIXTURES` or of a dataset of Open X-Embodiment, a JSON or TOML file with weights by
            dataset, or weights by name.
        folder: Folder or URL that contains the datasets' folders.
        seed: Seed of the draws.
        num_frames: Numbers of steps by name, which are not counted then.
        allow_missing: Whether to leave out the datasets that are missing or can't be trained on, with a warning.
        options: Options of `load`.

    Raises:
        ValueError: The mixture or the number of frames of a stream is unknown, or a dataset can't be trained on.
        FileNotFoundError: Datasets are missing. The message says where to get them.
    """
    parts: list[Any] = []
    counted = {name: options[name] for name in ("robot", "every", "skip_bad_episodes") if name in options}
    for name, weight in select_datasets(mixture, folder, allow_missing).items():
        path = dataset_folder(folder, name)
        frames = load(path, name=name, seed=seed, **options)
        note_generic(frames, name, options.get("robot"))
        size = (num_frames or {}).get(name)
        if size is None and (statistics := whole_statistics(path, name=name, **counted)):
            size = statistics["num_transitions"]
        parts.append((frames, weight, size) if size else (frames, weight))
    return mix(divide_buffer(parts, options.get("shuffle_buffer", 0)), seed)


def note_generic(frames: Frames, name: str, robot: Robot | str | None, choose: str = "") -> None:
    """Log that no robot says what a dataset's actions mean, unless the generic robot was chosen.

    Args:
        frames: Frames of the dataset.
        name: Name of the dataset.
        robot: Robot that was chosen, if one was.
        choose: Another way to give the dataset a robot, which ends in "or ".
    """
    if robot is None and read_robot(frames, name) == GENERIC.name:
        logger.warning(
            "No robot is known for the dataset %r, so its actions are kept as recorded and all dimensions are scaled, "
            "including that of a gripper. If it has a gripper, %sregister a robot named %r; for RLDS, a row of this "
            "name in a table does the same. On the command line, give the file that registers it as --robots.",
            name,
            choose,
            name,
        )


def divide_buffer(parts: Sequence[tuple[Any, ...]], shuffle_buffer: int) -> list[tuple[Any, ...]]:
    """Give each stream of a mixture the part of a shuffle buffer that corresponds to its share of the draws."""
    if not shuffle_buffer or not all(isinstance(part[0], FrameStream) for part in parts):
        return list(parts)
    shares = sampling_shares([part[1] for part in parts], [_count(number, *part) for number, part in enumerate(parts)])
    # The division is rounded up, since a buffer of one row does not shuffle.
    sizes = [max(2, math.ceil(share * shuffle_buffer)) for share in shares]
    return [(part[0].with_shuffle_buffer(size), *part[1:]) for part, size in zip(parts, sizes, strict=True)]


__all__ = [
    "MIXTURES",
    "dataset_folder",
    "divide_buffer",
    "epoch_length",
    "load_mixture",
    "mix",
    "note_generic",
    "read_mixture",
    "sampling_shares",
    "select_datasets",
    "training_splits",
]
