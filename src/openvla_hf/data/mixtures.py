"""Several data sets as one, drawn from by weight."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, interleave_datasets

from .loading import Frames, load


MIXTURES: dict[str, dict[str, float]] = {
    # What openvla-7b was trained on; the weights multiply the size of each data set.
    "oxe_magic_soup_plus_minus": {
        **dict.fromkeys(
            (
                "fractal20220817_data",
                "bridge_orig",
                "jaco_play",
                "berkeley_cable_routing",
                "toto",
                "austin_buds_dataset_converted_externally_to_rlds",
                "austin_sailor_dataset_converted_externally_to_rlds",
                "austin_sirius_dataset_converted_externally_to_rlds",
                "dlr_edan_shared_control_converted_externally_to_rlds",
                "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
                "utaustin_mutex",
                "cmu_stretch",
                "fmb_dataset",
            ),
            1.0,
        ),
        "kuka": 0.8341046294,
        **dict.fromkeys(
            (
                "taco_play",
                "roboturk",
                "viola",
                "berkeley_autolab_ur5",
                "stanford_hydra_dataset_converted_externally_to_rlds",
                "ucsd_kitchen_dataset_converted_externally_to_rlds",
                "berkeley_fanuc_manipulation",
            ),
            2.0,
        ),
        "nyu_franka_play_dataset_converted_externally_to_rlds": 3.0,
        "furniture_bench_dataset_converted_externally_to_rlds": 0.1,
        "bc_z": 0.2,
        "dobbe": 0.2,
    }
}
"""Weights by the folder's name, under the mixture's."""


def mix(parts: Sequence[tuple[Frames, float]], seed: int = 0) -> Frames:
    """Interleaves data sets of one kind, all tables or all streams.

    Args:
        parts: Data sets with weights. Of tables, a weight multiplies the size: with all weights 1 every frame is as
            likely. Streams have no known size: their weights are the shares themselves.
        seed: Of the draws.

    Returns:
        Of tables, a table in which every frame is at least once. Of streams, one without an end.

    Raises:
        ValueError: there are no parts, a weight is not above 0, or tables are mixed with streams.
    """
    frames, weights = [part for part, _ in parts], [weight for _, weight in parts]
    if not parts or min(weights) <= 0:
        raise ValueError("A mixture needs at least one data set, each with a weight above 0.")
    tables = [isinstance(part, Dataset) for part in frames]
    if any(tables) != all(tables):
        raise ValueError("A mixture is of tables or of streams: load all with streaming=True, or none.")
    if all(tables):
        shares = np.array(weights) * [len(part) for part in frames]
        strategy = "all_exhausted"
    else:
        shares = np.array(weights)
        strategy = "first_exhausted"
        frames = [part.repeat(None) for part in frames]
    shares = shares / shares.sum()
    return interleave_datasets(frames, probabilities=shares.tolist(), seed=seed, stopping_strategy=strategy)


def load_mixture(mixture: str | Mapping[str, float], folder: str | Path, *, seed: int = 0, **options: Any) -> Frames:
    """Loads the data sets of a mixture from the folders of their names in `folder`, and mixes them.

    Args:
        mixture: Name of one of `MIXTURES`, or weights by name.
        folder: Folder or URL.
        seed: Of the draws.
        options: Of `load`.

    Raises:
        ValueError: there is no such mixture.
    """
    if isinstance(mixture, str):
        if mixture not in MIXTURES:
            raise ValueError(f"There is no mixture {mixture!r}, there is {', '.join(map(repr, MIXTURES))}.")
        mixture = MIXTURES[mixture]
    parts = [(load(f"{folder}/{name}", name=name, seed=seed, **options), weight) for name, weight in mixture.items()]
    return mix(parts, seed)


__all__ = ["MIXTURES", "load_mixture", "mix"]
