"""The parts of `datasets` that it does not offer publicly. Only this file uses them; tests check that they exist."""

from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset


def fingerprint(table: Dataset) -> str:
    """Return the hash of a table's content and of all that was done to it, as `datasets` names its own cache files."""
    return table._fingerprint


def drop_repeats(table: Dataset) -> Dataset:
    """Select each stored row that a table draws once, in the order of storage, in which reading is fastest."""
    # Tables that are selections or mixtures keep the numbers of their rows beside the data.
    if table._indices is None:
        return table
    _, first = np.unique(table._indices.column(0), return_index=True)
    return table.select(first)


def constructor_arguments(stream: IterableDataset) -> dict[str, Any]:
    """Return the arguments that make a stream like this one, for the constructor of a subclass."""
    return {"ex_iterable": stream._ex_iterable, "info": stream.info, "split": stream.split}


__all__ = ["constructor_arguments", "drop_repeats", "fingerprint"]
