"""Uses of the private parts of `datasets`, all in this file. Tests check that these parts exist."""

from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset


def fingerprint(table: Dataset) -> str:
    """Return the hash of a table's content and operations, by which `datasets` names its own cache files."""
    return table._fingerprint


def drop_repeats(table: Dataset) -> Dataset:
    """Select the stored rows that a table uses, each once and in the order of storage, which is fastest to read."""
    # Selections and mixtures store the numbers of their rows next to the data.
    if table._indices is None:
        return table
    _, first = np.unique(table._indices.column(0), return_index=True)
    return table.select(first)


def constructor_arguments(stream: IterableDataset) -> dict[str, Any]:
    """Return the arguments that make a stream like this one, for the constructor of a subclass."""
    return {"ex_iterable": stream._ex_iterable, "info": stream.info, "split": stream.split}


__all__ = ["constructor_arguments", "drop_repeats", "fingerprint"]
