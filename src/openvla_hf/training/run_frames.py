"""The frames of a run: which datasets it reads, how they are mixed, and what is held out for evaluation."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..data import compute_statistics, load, load_statistics
from ..data.frame_spec import name_cameras
from ..data.frames import read_robot
from ..data.loading import try_first_episode
from ..data.mixtures import divide_buffer, note_generic, sampling_shares
from ..data.readers.rlds import DIVISIBLE, EmptySplitError
from ..data.robots import describe_robot, resolve_robot
from ..data.splits import dataset_name, require_divisible, sample_frames, split_parts
from ..data.streams import mix_streams
from ..data.whole_statistics import whole_statistics
from .arguments import VALIDATION_FRAMES, FinetuneArguments, TrainingData, TrainingMixture


NOT_RECORDED = ("streaming", "shuffle_buffer", "seed")
"""Options of `load` that don't change the content of frames. A later evaluation chooses its own."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFrames:
    """The frames of a run.

    Args:
        train: Frames to train on.
        evaluation: Frames to evaluate on, if there are any.
        record: Entries of `training.json` about the frames: `datasets`, `reading`, `held_out`, and `mixture` for a
            mixture.
        statistics: Statistics of a mixture's datasets, or `None`.
    """

    train: Dataset | IterableDataset
    evaluation: Dataset | IterableDataset | Mapping[str, Any] | None
    record: dict[str, Any]
    statistics: dict[str, Any] | None = None


def try_first_episodes(arguments: FinetuneArguments, recipe_options: Mapping[str, Any]) -> None:
    """Read the first episode of each dataset of a run, as far as `try_first_episode` does, and count its episodes.

    Args:
        arguments: Arguments of the run.
        recipe_options: See `read_frames`.

    Raises:
        ValueError: A dataset lacks what is read, or has too few episodes for `eval_share`.
        BadEpisodeError: An episode can't be used.
    """
    for one in arguments.datasets:
        stream = try_first_episode(one.source, **{**recipe_options, **one.options})
        if arguments.eval_share and stream is not None:
            require_divisible(stream.name, stream.losses.total)


def read_frames(arguments: FinetuneArguments, seed: int, recipe_options: Mapping[str, Any]) -> RunFrames:
    """Load the datasets of a run, hold episodes out for evaluation, and mix the rest by the weights.

    Args:
        arguments: Arguments of the run.
        seed: Seed of the draws.
        recipe_options: Options of `load` that the recipe needs, see `Recipe.load_options`.

    Raises:
        ValueError: Datasets share a name, lack statistics or can't be split.
    """
    datasets, parts = load_datasets(arguments, seed, recipe_options)
    record: dict[str, Any] = {}
    if datasets:
        names = [dataset_name(part) for part in parts]
        _require_statistics(arguments, names)
        reading = {str(one.source): _record_reading(one, part) for one, part in zip(datasets, parts, strict=True)}
        record = {"datasets": list(reading), "reading": reading}
    if not datasets and not arguments.eval_share:
        return RunFrames(arguments.data, arguments.eval_data, record)
    statistics = sizes = validation = None
    if isinstance(arguments.data, TrainingMixture):
        # Its errors come before the statistics, which may take hours.
        validation = read_validation(arguments, seed, recipe_options)
        statistics, record["mixture"] = _balance(arguments, datasets, parts)
        sizes = [one["transitions"] for one in record["mixture"].values()]
        weighted = list(zip(parts, [one.weight for one in datasets], sizes, strict=True))
        parts = [part for part, *_ in divide_buffer(weighted, arguments.data.options.get("shuffle_buffer", 0))]
    train, evaluation, held_out = split_parts(parts, arguments.weights, arguments.eval_share, seed, sizes)
    if validation is not None:
        evaluation = validation
    elif arguments.eval_frames:
        evaluation = sample_frames(evaluation, arguments.eval_frames, seed)
    evaluation = arguments.eval_data if evaluation is None else evaluation
    return RunFrames(train, evaluation, record | {"held_out": held_out}, statistics)


def load_datasets(
    arguments: FinetuneArguments, seed: int, recipe_options: Mapping[str, Any]
) -> tuple[tuple[TrainingData, ...], list[Any]]:
    """Load the datasets of a run. Return them with all their options, and their frames. See `read_frames`."""
    datasets = tuple(replace(one, options={**recipe_options, **one.options}) for one in arguments.datasets)
    if not datasets:  # frames that are already loaded
        return (), [arguments.data]
    frames = [load(one.source, **{"seed": seed, **one.options}) for one in datasets]
    choose = "" if isinstance(arguments.data, TrainingMixture) else "choose a robot with --robot, or "
    for data, of_one in zip(datasets, frames, strict=True) if PartialState().is_main_process else ():
        note_generic(of_one, dataset_name(of_one), data.options.get("robot"), choose)
    return datasets, frames


def read_statistics(arguments: FinetuneArguments) -> dict[str, Any] | None:
    """Return the statistics that the arguments give, or `None`."""
    given = arguments.statistics
    return dict(given) if isinstance(given, Mapping) else None if given is None else load_statistics(given)


def read_validation(
    arguments: FinetuneArguments, seed: int, recipe_options: Mapping[str, Any]
) -> IterableDataset | None:
    """Open the stream of the frames for `validation` from metadata alone, or return `None` without `validation`.

    Args:
        arguments: Arguments of the run.
        seed: Seed of the draws.
        recipe_options: See `read_frames`.

    Raises:
        ValueError: A dataset of the mixture has no held-out episodes.
    """
    if not arguments.validation or not isinstance(arguments.data, TrainingMixture):
        return None
    try:
        loaded = [
            load(one.source, seed=seed, **{**recipe_options, **one.options})
            for one in arguments.data.select_validation()
        ]
    except EmptySplitError as error:
        raise ValueError(
            f"{error} With fewer than {DIVISIBLE}, `validation` has no episodes: record more, hold out a larger share "
            "with `eval_share` (without `streaming`), or leave the evaluation out."
        ) from error
    return mix_streams([(part.first(arguments.eval_frames or VALIDATION_FRAMES), 1.0) for part in loaded])


def _balance(
    arguments: FinetuneArguments, datasets: Sequence[TrainingData], parts: Sequence[Any]
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Return the statistics of a mixture's datasets, and the weight, steps and share of the draws of each dataset."""
    statistics: dict[str, Any] = {}
    for one, part in zip(datasets, parts, strict=True):
        name = dataset_name(part)
        given = (read_statistics(arguments) or {}).get(name)
        if given is None or "num_transitions" not in given:
            given = whole_statistics(one.source, **one.statistics_options)
        statistics[name] = given or compute_statistics(part)[name]
    weights = [one.weight for one in datasets]
    transitions = [of_one["num_transitions"] for of_one in statistics.values()]
    shares = sampling_shares(weights, transitions)
    columns = zip(statistics, weights, transitions, shares, strict=True)
    mixture = {
        name: {"weight": weight, "transitions": count, "share": share} for name, weight, count, share in columns
    }
    logger.info("Mixture: %s", mixture)
    return statistics, mixture


def _require_statistics(arguments: FinetuneArguments, names: list[str]) -> None:
    """Raise `ValueError` if statistics were given, but not those of one of the datasets."""
    statistics = read_statistics(arguments)
    missing = [name for name in names if statistics is not None and name not in statistics]
    if missing:
        where = "`statistics`" if isinstance(arguments.statistics, Mapping) else arguments.statistics
        raise ValueError(
            f"{where} has no statistics for {missing[0]!r}, only for {', '.join(map(repr, statistics or ()))}: "
            "give the dataset one of these names with `name`, or give its own statistics."
        )


def _record_reading(data: TrainingData, frames: Dataset | IterableDataset) -> dict[str, Any]:
    """Record how a dataset is read, with the adapter that was chosen if the options name none."""
    options = {option: value for option, value in data.options.items() if option not in NOT_RECORDED}
    name = dataset_name(frames)
    robot = resolve_robot(options.get("robot") or read_robot(frames, name), name)
    if options.get("cameras") is not None:
        options["cameras"] = name_cameras(robot, options["cameras"])
    return options | {"robot": robot.name, "adapter": describe_robot(robot)}


__all__ = ["RunFrames", "load_datasets", "read_frames", "read_statistics", "read_validation", "try_first_episodes"]
